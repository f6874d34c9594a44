//! The headers of an EFI program, of which a unified kernel image is one.

#![no_main]

use libfuzzer_sys::fuzz_target;
use stiefel_shared::kernel::{Format, is_release, release_in_header};
use stiefel_shared::loader::uki::{image, sections, text};

fuzz_target!(|data: &[u8]| {
    let _ = Format::of(data);
    if let Some(release) = release_in_header(data) {
        assert!(is_release(&release));
    }
    assert!(!text(data).chars().any(char::is_control));
    let Some(sections) = sections(data, data.len() as u64) else {
        return;
    };
    for section in &sections {
        assert!(section.len == 0 || section.offset + section.len <= data.len() as u64);
    }
    let _ = image(&sections);
});
