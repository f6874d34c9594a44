//! Questions to a machine that lends disks, and its answers.

#![no_main]

use libfuzzer_sys::fuzz_target;
use stiefel_shared::lend::{Ask, Loan, is_name};

fuzz_target!(|data: &[u8]| {
    if let Ok(ask) = Ask::parse(data) {
        if let Ask::Attach { disk, .. } = &ask {
            assert!(is_name(disk));
        }
        assert_eq!(
            Ask::parse(&ask.to_json().expect("it was accepted")).expect("what was written can be read"),
            ask
        );
    }
    if let Ok(loan) = Loan::parse(data) {
        // Writing can only fail where the same meaning takes more room than before.
        if let Ok(json) = loan.to_json() {
            Loan::parse(&json).expect("what was written can be read");
        }
    }
});
