//! A variable of the firmware.

#![no_main]

use libfuzzer_sys::fuzz_target;
use stiefel_shared::loader::efi::{load_option, number, text};

fuzz_target!(|data: &[u8]| {
    let _ = (text(data), number(data));
    if let Some(option) = load_option(data) {
        assert!(option.description.len() + option.arguments.len() <= 3 * data.len());
    }
});
