//! Goodbyes and their answers.

#![no_main]

use libfuzzer_sys::fuzz_target;
use stiefel_shared::bundle::{ControlKey, Goodbye};
use stiefel_shared::session::{Farewell, ReceivedGoodbye};

fuzz_target!(|data: &[u8]| {
    let control = ControlKey([7; 32]);
    let Ok(session) = "00112233445566778899aabbccddeeff".parse() else {
        return;
    };
    let Ok(farewell) = Farewell::new(&control, session, Goodbye::Poweroff) else {
        return;
    };
    assert!(
        farewell.answered(&control, session, data).is_err(),
        "answers a question asked just now"
    );
    // A recording, as in the corpus, may verify here: once per session is the server's rule.
    let _ = ReceivedGoodbye::open(&control, session, data);
});
