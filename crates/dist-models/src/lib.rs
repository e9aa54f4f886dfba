//! Skeleton.

pub mod request;
pub mod step;
