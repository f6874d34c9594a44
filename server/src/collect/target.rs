//! The initrd of a ramdisk that is to lend this machine's disks: the ramdisk, then the handover, in one memory file.

use std::fs::File;
use std::path::{Path, PathBuf};

use stiefel_initrd_builder::ramdisk::{KERNEL, Manifest, RAMDISK};
use stiefel_shared::handover::{Handover, TargetHandover};
use stiefel_sys::kexec;

use super::image::{Source, begin};
use super::{CollectError, STATE_DIR, fits, memory};
use crate::tree::Tree;

/// What is to be started.
#[derive(Debug)]
pub struct TargetImage {
    /// The ramdisk's kernel.
    pub kernel: PathBuf,
    /// A sealed file in memory, at its start. Holds the keys.
    pub initrd: File,
}

/// Puts it together in the system below `root`.
///
/// # Errors
/// [`CollectError`], which says what to do next.
pub fn image_for_target(root: &Path, handover: &TargetHandover) -> Result<TargetImage, CollectError> {
    let tree = Tree::new(root);
    let state = tree.path(STATE_DIR);
    let manifest = Manifest::load(&state)?;
    manifest.verify(&state)?;
    if !handover.open && !manifest.wireguard {
        return Err(CollectError::NoTunnelToLend);
    }
    let document = Handover::Target(handover.clone()).to_cpio()?;
    let ramdisk = Source::open(&[state.join(RAMDISK).into()])?;
    let size = ramdisk.len + document.0.len() as u64;
    if let Some(memory) = memory(&tree) {
        fits(size, manifest.unpacked_bytes, memory)?;
    }
    let initrd = kexec::memfd("stiefel-initrd", |file| begin(file, ramdisk, &document).map(drop));
    Ok(TargetImage {
        kernel: state.join(KERNEL),
        initrd: initrd.map_err(|source| CollectError::Image { size, source })?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use stiefel_initrd_builder::ramdisk::MANIFEST;
    use stiefel_shared::cpio;
    use stiefel_shared::handover::{HANDOVER_PATH, WritableDisk};
    use stiefel_shared::key::StickKey;

    /// A system with a ramdisk in its place.
    fn system(wireguard: bool) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join(STATE_DIR.trim_start_matches('/'));
        std::fs::create_dir_all(&state).unwrap();
        let part = |bytes: &[u8]| {
            use sha2::{Digest, Sha256};
            let hash: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
            serde_json::json!({"bytes": bytes.len(), "sha256": hash})
        };
        let (kernel, ramdisk) = (b"kernel".as_slice(), b"\x28\xb5\x2f\xfdzstd!".as_slice());
        std::fs::write(state.join(KERNEL), kernel).unwrap();
        std::fs::write(state.join(RAMDISK), ramdisk).unwrap();
        let manifest = serde_json::json!({
            "stiefel_version": "0", "kernel_version": "6.1", "kernel": part(kernel), "ramdisk": part(ramdisk),
            "unpacked_bytes": 0, "modules": 0, "wireguard": wireguard, "nvme_target": true, "firmware": 0,
            "missing_firmware": 0, "classes": [],
        });
        std::fs::write(state.join(MANIFEST), manifest.to_string()).unwrap();
        dir
    }

    fn ssd() -> WritableDisk {
        WritableDisk {
            name: "ssd-980".to_owned(),
            size: Some(1 << 40),
        }
    }

    fn handover(open: bool) -> TargetHandover {
        TargetHandover {
            keys: vec![StickKey::generate("stick").unwrap()],
            open,
            read_write: vec![ssd()],
            snapshot: true,
            hostname: Some("laptop".to_owned()),
        }
    }

    #[test]
    fn the_ramdisk_is_told_what_to_lend_and_to_whom() {
        let dir = system(true);
        let mut image = image_for_target(dir.path(), &handover(false)).unwrap();
        let mut bytes = Vec::new();
        image.initrd.read_to_end(&mut bytes).unwrap();
        assert_eq!(&bytes[..12], b"\x28\xb5\x2f\xfdzstd!\0\0\0");
        let entry = cpio::Reader::new(&bytes[12..])
            .map(Result::unwrap)
            .find(|entry| entry.path == HANDOVER_PATH.as_bytes())
            .unwrap();
        assert_eq!(entry.permissions(), 0o600);
        let Handover::Target(told) = Handover::parse(entry.data).unwrap() else {
            panic!("another role");
        };
        assert_eq!((told.keys.len(), told.open, told.snapshot), (1, false, true));
        assert_eq!(told.read_write, [ssd()]);
    }

    #[test]
    fn without_wireguard_only_everybody_is_lent_to() {
        let dir = system(false);
        let error = image_for_target(dir.path(), &handover(false)).unwrap_err();
        assert!(matches!(error, CollectError::NoTunnelToLend), "{error}");
        image_for_target(dir.path(), &handover(true)).unwrap();
    }
}
