//! The bodies of datagrams, as they lie under the seal.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| stiefel_shared::discovery::fuzz_body(data));
