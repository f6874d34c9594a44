//! Entries of the Boot Loader Specification and the order of systemd-boot's menu: loader.conf, then file names and texts,
//! each after a NUL.

#![no_main]

use libfuzzer_sys::fuzz_target;
use stiefel_shared::loader::sdboot::{Choice, Listed, Wishes, choose, configured_default, order};
use stiefel_shared::loader::{bls, version};

fuzz_target!(|data: &[u8]| {
    let text = String::from_utf8_lossy(data);
    let mut texts = text.split('\0');
    let configured = configured_default(texts.next().unwrap_or_default());
    let mut listed = Vec::new();
    while let (Some(file), Some(text)) = (texts.next(), texts.next()) {
        let entry = bls::parse(text);
        let _ = bls::os_release(text);
        listed.push(Listed {
            file: file.to_owned(),
            sort_key: entry.sort_key,
            machine_id: entry.machine_id,
            version: entry.version,
        });
        if listed.len() > 8 {
            break;
        }
    }
    for (a, b) in listed.iter().zip(listed.iter().skip(1)) {
        assert_eq!(order(a, b), order(b, a).reverse());
        assert_eq!(
            version::packages(&a.file, &b.file),
            version::packages(&b.file, &a.file).reverse()
        );
    }
    listed.sort_by(order);
    let wishes = Wishes {
        configured,
        ..Wishes::default()
    };
    match choose(&listed, &wishes) {
        None => assert!(listed.is_empty()),
        Some(Choice::Listed(index, _)) => assert!(index < listed.len()),
        Some(Choice::Automatic(_)) => {}
    }
});
