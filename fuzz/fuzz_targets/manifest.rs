//! Any bytes as a manifest: refused, or one whose files can be laid out and that is the same when it is read again. The
//! checksum is made anew, so that what lies behind it is reached as well.
#![no_main]

use std::sync::LazyLock;

use dist_core::Rank;
use dist_models::manifest::layout::FileLayout;
use dist_models::manifest::{Digest, Manifest, RankManifest};
use libfuzzer_sys::fuzz_target;

static WHOLE: LazyLock<(Manifest, Digest, Vec<FileLayout>)> = LazyLock::new(|| {
    let sharded = include_bytes!("../seeds/manifest/sharded.json");
    let whole = Manifest::parse("seed", sharded).expect("a sound seed");
    let (identity, files) = (whole.identity(), whole.files());
    (whole, identity, files)
});

fuzz_target!(|bytes: &[u8]| {
    let _ = Manifest::parse("fuzz", bytes);
    if let Ok(manifest) = serde_json::from_slice::<Manifest>(bytes)
        && manifest.check("fuzz").is_ok()
    {
        assert!(!manifest.files().is_empty());
        let again = Manifest::parse("fuzz", &manifest.to_json()).expect("written as it was checked");
        assert_eq!(again.identity(), manifest.identity());
    }
    let _ = RankManifest::parse("fuzz", bytes);
    if let Ok(part) = serde_json::from_slice::<RankManifest>(bytes) {
        let (whole, identity, files) = &*WHOLE;
        for (rank, layout) in files.iter().enumerate() {
            if part.expect("fuzz", (whole, *identity), Rank(rank), layout).is_ok() {
                assert_eq!(part.tensors.len(), layout.slots.len());
            }
        }
    }
});
