//! The configuration.

#![no_main]

use libfuzzer_sys::fuzz_target;
use stiefel_shared::config::Config;

fuzz_target!(|data: &str| {
    if let Err(error) = Config::parse(data) {
        assert!(!error.to_string().is_empty());
    }
});
