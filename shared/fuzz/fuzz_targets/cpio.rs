//! Cpio archives.

#![no_main]

use libfuzzer_sys::fuzz_target;
use stiefel_shared::cpio::Reader;

fuzz_target!(|data: &[u8]| {
    for entry in Reader::new(data) {
        if entry.is_err() {
            break;
        }
    }
});
