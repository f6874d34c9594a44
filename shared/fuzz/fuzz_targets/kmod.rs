//! The index files of kernel modules: `dep`, `alias`, `softdep` and `builtin`, each after a NUL.

#![no_main]

use libfuzzer_sys::fuzz_target;
use stiefel_shared::kmod::{ModuleIndex, Texts};

fuzz_target!(|data: &[u8]| {
    let mut texts = data.split(|&byte| byte == 0);
    let mut next = || texts.next().unwrap_or_default();
    let texts = Texts {
        dep: next(),
        alias: next(),
        softdep: next(),
        builtin: next(),
    };
    let Ok(index) = ModuleIndex::parse(&texts) else { return };
    let names: Vec<String> = index.iter().map(|(name, _)| name.to_owned()).take(20).collect();
    for name in &names {
        // A cycle or a missing module is an error, never an endless walk.
        let _ = index.resolve(name);
    }
    let _ = index.by_modalias("pci:v00008086d000015F3sv00001043sd000087D2bc02sc00i00");
});
