//! A kernel's command line, cleaned for another machine.

#![no_main]

use libfuzzer_sys::fuzz_target;
use stiefel_shared::loader::cmdline::{clean, names_root, without_loader_root};

fuzz_target!(|data: &[u8]| {
    let text = String::from_utf8_lossy(data);
    let uuid = |device: &str| (device == "/dev/sda2").then(|| "1-2".to_owned());
    let (without, _) = without_loader_root(&text);
    assert!(!without_loader_root(&without).1);
    if let Ok(once) = clean(&text, &[], &uuid) {
        let _ = names_root(&once);
        assert_eq!(clean(&once, &[], &uuid).as_deref(), Ok(once.as_str()));
    }
});
