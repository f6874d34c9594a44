//! The bundle's manifest.

#![no_main]

use libfuzzer_sys::fuzz_target;
use stiefel_shared::bundle::Manifest;

fuzz_target!(|data: &[u8]| {
    if let Ok(manifest) = Manifest::parse(data) {
        assert!(
            manifest
                .payload
                .parts
                .iter()
                .all(|entry| entry.size <= entry.part.limit())
        );
        // Writing can only fail where the same meaning takes more room than before.
        if let Ok(json) = manifest.to_json() {
            Manifest::parse(&json).expect("what was written can be read");
        }
    }
});
