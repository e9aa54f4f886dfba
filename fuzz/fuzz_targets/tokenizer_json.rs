//! Any bytes as tokenizer.json, then a text there and back through what was accepted.
#![no_main]

use std::sync::Arc;

use dist_models::tokenizer::{TextStream, Tokenizer};
use libfuzzer_sys::fuzz_target;

fuzz_target!(
    init: {
        // libfuzzer aborts on every panic; those inside the tokenizers library are caught and are errors. One that gets
        // out of the target still ends the run.
        std::panic::set_hook(Box::new(|_| {}));
    },
    |bytes: &[u8]| {
        let Ok(tokenizer) = Tokenizer::from_json("fuzz", bytes, 300) else { return };
        let tokenizer = Arc::new(tokenizer);
        let ids = tokenizer.encode("To be, or not — 🙂 aab").unwrap_or_default();
        let mut stream = TextStream::new(Arc::clone(&tokenizer));
        for id in ids.iter().copied().chain(0..40) {
            stream.push(id);
        }
        stream.finish();
        tokenizer.decode(&ids);
    }
);
