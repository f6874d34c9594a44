//! Key files, from a medium that anyone may have written.

#![no_main]

use libfuzzer_sys::fuzz_target;
use stiefel_shared::key::StickKey;

fuzz_target!(|data: &[u8]| {
    if let Ok(key) = StickKey::parse("fuzz", data) {
        assert_eq!(
            key.to_file().trim_end().as_bytes(),
            data.strip_suffix(b"\n").unwrap_or(data)
        );
    }
});
