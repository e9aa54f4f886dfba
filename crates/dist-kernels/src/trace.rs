//! The tracing backend.
