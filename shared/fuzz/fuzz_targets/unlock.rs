//! What a desktop sends to a laptop that waits for its passphrase, and what that answers.

#![no_main]

use libfuzzer_sys::fuzz_target;
use stiefel_shared::unlock::{Passphrase, Unlocking};

fuzz_target!(|data: &[u8]| {
    if let Ok(passphrase) = Passphrase::parse(data) {
        assert_eq!(&passphrase.to_request()[..], data, "a request has only one form");
    }
    if let Ok(answer) = Unlocking::parse(data) {
        assert_eq!(answer.to_bytes(), data, "an answer has only one form");
    }
});
