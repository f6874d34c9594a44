//! What lies on a block device. The input is the device's size (8 bytes, little-endian) and its content, over and over, so
//! that a short input reaches the superblocks far inside, too.

#![no_main]

use libfuzzer_sys::fuzz_target;
use stiefel_shared::superblock::{MAX_VALUE, holds_memory_image, probe};

fuzz_target!(|data: &[u8]| {
    let Some((size, content)) = data.split_first_chunk::<8>().filter(|(_, content)| !content.is_empty()) else {
        return;
    };
    let size = u64::from_le_bytes(*size);
    let mut read = |offset: u64, bytes: &mut [u8]| {
        let end = offset.checked_add(bytes.len() as u64).expect("no offset overflows");
        assert!(end <= size, "nothing is read past the end");
        let start = usize::try_from(offset % content.len() as u64).expect("it is within the content");
        for (byte, value) in bytes.iter_mut().zip(content.iter().cycle().skip(start)) {
            *byte = *value;
        }
        Ok(())
    };
    for claim in probe(&mut read, size) {
        assert!((1..=MAX_VALUE).contains(&claim.value.len()));
        assert!(!claim.value.chars().any(char::is_control));
    }
    holds_memory_image(&mut read, size);
});
