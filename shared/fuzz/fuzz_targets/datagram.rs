//! Whatever comes over UDP: dropped by both sides.

#![no_main]

use std::net::{Ipv6Addr, SocketAddrV6};
use std::time::Instant;

use libfuzzer_sys::fuzz_target;
use stiefel_shared::discovery::{About, Responder, Seeker, State};
use stiefel_shared::key::StickKey;

const KEY: &str = "stiefel-key-1 000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f";

fuzz_target!(|data: &[u8]| {
    let key = StickKey::parse("fuzz", KEY.as_bytes()).expect("a key");
    let now = Instant::now();
    let from = SocketAddrV6::new(Ipv6Addr::LOCALHOST, 9, 0, 0);
    let about = About {
        hostname: "laptop".into(),
        http_port: 1,
        ready_in: 0,
    };
    let mut responder = Responder::new(std::slice::from_ref(&key), about, State::Asleep, now);
    if let Some(answer) = responder.receive(now, from, data) {
        // Only a recording under this very key, as in the corpus, is answered.
        assert!(answer.datagram.len() <= data.len());
    }
    let _ = Seeker::new(&key).ticket(0, data);
    assert!(
        Seeker::new(&key).receive(now, from, data).is_none(),
        "nothing was asked"
    );
});
