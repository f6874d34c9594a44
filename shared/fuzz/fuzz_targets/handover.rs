//! The documents that one kernel hands to the next.

#![no_main]

use libfuzzer_sys::fuzz_target;
use stiefel_shared::bundle::AttachSession;
use stiefel_shared::handover::Handover;

fuzz_target!(|data: &[u8]| {
    if let Ok(handover) = Handover::parse(data) {
        let json = handover.to_json().expect("what was read can be written");
        Handover::parse(&json.0).expect("what was written can be read");
    }
    // An error is as good as a session here.
    let _ = serde_json::from_slice::<AttachSession>(data);
});
