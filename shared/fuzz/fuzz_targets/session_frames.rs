//! The frames of a stream, as they lie under the encryption: a length (two bytes) and a frame, over and over.

#![no_main]

use libfuzzer_sys::fuzz_target;
use stiefel_shared::session::fuzz_receiver;

fuzz_target!(|data: &[u8]| {
    let Some(mut receiver) = fuzz_receiver() else { return };
    let mut rest = data;
    while let Some((field, after)) = rest.split_first_chunk() {
        let length = usize::from(u16::from_be_bytes(*field)).min(after.len());
        let (frame, after) = after.split_at(length);
        if receiver.fuzz_frame(frame).is_err() {
            return;
        }
        rest = after;
    }
});
