//! The encrypted stream, altered on the way.

#![no_main]

use libfuzzer_sys::fuzz_target;
use stiefel_shared::session::fuzz_receiver;

fuzz_target!(|data: &[u8]| {
    let Some(mut receiver) = fuzz_receiver() else { return };
    for mut piece in data.chunks(1000) {
        loop {
            match receiver.next(&mut piece) {
                Ok(Some(_)) => panic!("nothing verifies without the key"),
                Ok(None) => break,
                Err(_) => return,
            }
        }
    }
    assert!(receiver.finish().is_err());
});
