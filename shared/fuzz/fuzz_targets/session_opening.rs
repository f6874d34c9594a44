//! The request that opens a session.

#![no_main]

use libfuzzer_sys::fuzz_target;
use stiefel_shared::key::StickKey;
use stiefel_shared::session::{MachineId, Opening, SessionName};

const KEY: &str = "stiefel-key-1 000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f";

fuzz_target!(|data: &[u8]| {
    let key = StickKey::parse("fuzz", KEY.as_bytes()).expect("a key");
    let name = SessionName::generate().expect("randomness");
    if let Ok(opening) = Opening::parse(data)
        && let Ok(accepted) = opening.accept(&key, name)
    {
        assert!(accepted.begin(data).is_err(), "a first message is no second one");
    }
    if let Ok(text) = std::str::from_utf8(data) {
        if let Ok(id) = text.parse::<MachineId>() {
            assert_eq!(id.to_string().parse::<MachineId>().ok(), Some(id));
        }
        if let Ok(name) = text.parse::<SessionName>() {
            assert_eq!(name.to_string(), text);
        }
    }
});
