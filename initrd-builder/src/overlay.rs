//! The overlay: modules and firmware that a payload's own initrd lacks to reach the laptop.
//!
//! Built by the laptop's server for the payload's kernel, appended by the client to the payload's initrd, used there by
//! the attacher. Everything lies below `/stiefel`: the payload's initrd has `/lib` as a link, and the kernel would put a
//! folder of ours in its place. A user is waiting: the quickest compression, if any.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::archive::Archive;
use crate::baked;
use crate::modules::{Class, DEFAULT, ModuleSet, ModuleTree, ModulesError};

/// What a desktop needs before it can reach the disk. (HID: a passphrase may be asked.)
const CLASSES: [&str; 3] = ["nic", "usb", "hid"];
/// How the disk comes. NBD always works, so it must be there.
const TRANSPORTS: [&str; 3] = ["nvme_tcp", "wireguard", "macvlan"];
/// zstd: about 400 MB/s, and most of what the higher levels save.
const LEVEL: i32 = 3;

/// Why there is no overlay.
#[derive(Debug, thiserror::Error)]
pub enum OverlayError {
    /// The payload's kernel cannot have its root on the network.
    #[error(
        "kernel {version} has no module nbd, without which a desktop cannot use this disk: boot a kernel that has (Debian: linux-image-amd64, not the cloud one)"
    )]
    NoNbd {
        /// The payload's kernel.
        version: String,
    },
    /// The modules cannot be read.
    #[error(transparent)]
    Modules(#[from] ModulesError),
    /// They cannot be put into an initrd.
    #[error("cannot write {} for the initrd", path.display())]
    Bake {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The archive cannot be made.
    #[error("cannot put the modules of kernel {version} into an archive")]
    Archive {
        /// The payload's kernel.
        version: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// An overlay and what is in it.
#[derive(Debug)]
pub struct Overlay {
    /// The archive, a multiple of 4 bytes long unless compressed.
    pub bytes: Vec<u8>,
    /// The kernel's version.
    pub version: String,
    /// Number of modules.
    pub modules: usize,
    /// Number of firmware files.
    pub firmware: usize,
    /// Firmware that drivers ask for and this laptop does not have.
    pub missing_firmware: usize,
}

/// Builds the overlay for the kernel whose modules are in `modules_dir` (such as `/lib/modules/6.1.0-13-amd64`).
///
/// It holds `/stiefel/modules/VERSION/` and `/stiefel/firmware/`, and is zstd compressed if asked for. `configured` is what
/// the configuration says below `modules`: modules that it names are taken, too; its classes are the ramdisk's.
///
/// # Errors
/// `NoNbd` if the kernel lacks it, `Modules` if its modules cannot be read or it lacks one that is named.
pub fn overlay(
    modules_dir: &Path,
    configured: &[String],
    firmware_dirs: &[PathBuf],
    zstd: bool,
) -> Result<Overlay, OverlayError> {
    let set = modules(modules_dir, configured, firmware_dirs)?;
    let version = set.version.clone();
    let pack = || -> io::Result<Vec<u8>> {
        let mut archive = Archive::new(Vec::new());
        set.write(&mut archive, "stiefel")?;
        let plain = archive.finish()?;
        if zstd {
            zstd::bulk::compress(&plain, LEVEL)
        } else {
            Ok(plain)
        }
    };
    let bytes = pack().map_err(|source| OverlayError::Archive {
        version: version.clone(),
        source,
    })?;
    let (modules, firmware, missing_firmware) = (set.modules, set.firmware.len(), set.missing_firmware.len());
    Ok(Overlay {
        bytes,
        version,
        modules,
        firmware,
        missing_firmware,
    })
}

/// An overlay without anything in it, for an initrd that has it all.
///
/// # Errors
/// `Archive`, though nothing of it can fail.
pub fn empty(version: &str) -> Result<Overlay, OverlayError> {
    let bytes = Archive::new(Vec::new())
        .finish()
        .map_err(|source| OverlayError::Archive {
            version: version.to_owned(),
            source,
        })?;
    Ok(Overlay {
        bytes,
        version: version.to_owned(),
        modules: 0,
        firmware: 0,
        missing_firmware: 0,
    })
}

/// Puts the same into the folder of an initrd that is being built, and the program with it: below its
/// `stiefel`. A mark tells [`crate::baked::is_baked`].
///
/// # Errors
/// As [`overlay`]; `Bake` if a file cannot be written.
pub fn bake(
    modules_dir: &Path,
    configured: &[String],
    firmware_dirs: &[PathBuf],
    program: &Path,
    initrd: &Path,
) -> Result<(), OverlayError> {
    let set = modules(modules_dir, configured, firmware_dirs)?;
    let dir = initrd.join("stiefel");
    let put = |path: PathBuf, write: &dyn Fn(&Path) -> io::Result<()>| {
        let parent = path.parent().map_or(Ok(()), fs::create_dir_all);
        parent
            .and_then(|()| write(&path))
            .map_err(|source| OverlayError::Bake { path, source })
    };
    for (path, bytes) in &set.files {
        put(dir.join("modules").join(&set.version).join(path), &|path| {
            fs::write(path, bytes)
        })?;
    }
    for (path, bytes) in &set.firmware {
        put(dir.join("firmware").join(path), &|path| fs::write(path, bytes))?;
    }
    let mark = baked::mark(&set.version, configured);
    put(initrd.join(baked::MARK), &|path| fs::write(path, &mark))?;
    put(dir.join("stiefel"), &|path| {
        fs::copy(program, path)?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o755))
    })
}

/// The modules and the firmware that an initrd lacks to reach the laptop.
fn modules(modules_dir: &Path, configured: &[String], firmware_dirs: &[PathBuf]) -> Result<ModuleSet, OverlayError> {
    let tree = ModuleTree::open(modules_dir)?;
    let version = tree.version().to_owned();
    if !tree.offers("nbd") {
        return Err(OverlayError::NoNbd { version });
    }
    let classes = CLASSES
        .into_iter()
        .filter(|name| Class::named(name).is_some_and(|class| tree.offers_class(class)));
    let named = configured
        .iter()
        .map(String::as_str)
        .filter(|word| *word != DEFAULT && Class::named(word).is_none());
    let wanted: Vec<_> = classes
        .chain(["nbd"])
        .chain(TRANSPORTS.into_iter().filter(|module| tree.offers(module)))
        .chain(named)
        .collect();
    Ok(tree.load(&tree.select(&wanted)?, firmware_dirs, &mut |_, _| {})?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{VERSION, module_tree};
    use std::fs;
    use stiefel_shared::cpio::Reader;

    fn paths(bytes: &[u8]) -> Vec<String> {
        Reader::new(bytes)
            .map(|entry| String::from_utf8(entry.unwrap().path.to_vec()).unwrap())
            .collect()
    }

    #[test]
    fn everything_lies_below_stiefel() {
        let root = tempfile::tempdir().unwrap();
        let firmware = root.path().join("firmware");
        fs::create_dir_all(firmware.join("rtl_nic")).unwrap();
        fs::write(firmware.join("rtl_nic/rtl8168.fw"), b"firmware").unwrap();
        let overlay = overlay(&module_tree(root.path()), &[], &[firmware], false).unwrap();
        assert_eq!((overlay.modules, overlay.firmware, overlay.missing_firmware), (9, 1, 1));
        let paths = paths(&overlay.bytes);
        assert!(
            paths
                .iter()
                .all(|path| path == "stiefel" || path.starts_with("stiefel/")),
            "{paths:?}"
        );
        for path in [
            format!("stiefel/modules/{VERSION}/modules.dep"),
            format!("stiefel/modules/{VERSION}/kernel/drivers/block/nbd.ko"),
            format!("stiefel/modules/{VERSION}/kernel/drivers/virtio/virtio_pci.ko"),
            format!("stiefel/modules/{VERSION}/kernel/drivers/nvme/host/nvme-tcp.ko"),
            "stiefel/firmware/rtl_nic/rtl8168.fw".to_owned(),
        ] {
            assert!(paths.contains(&path), "{path} missing in {paths:?}");
        }
        assert!(
            !paths.iter().any(|path| path.ends_with("/nvme.ko")),
            "the desktop's own disks are none of ours"
        );
        assert_eq!(overlay.bytes.len() % 4, 0);
    }

    #[test]
    fn an_initrd_gets_the_same_files_and_the_program() {
        let root = tempfile::tempdir().unwrap();
        let modules_dir = module_tree(root.path());
        let firmware = root.path().join("firmware");
        fs::create_dir_all(firmware.join("rtl_nic")).unwrap();
        fs::write(firmware.join("rtl_nic/rtl8168.fw"), b"firmware").unwrap();
        let program = root.path().join("program");
        fs::write(&program, b"program").unwrap();
        let initrd = root.path().join("initrd");
        let firmware = [firmware];
        bake(&modules_dir, &[], &firmware, &program, &initrd).unwrap();
        for entry in Reader::new(&overlay(&modules_dir, &[], &firmware, false).unwrap().bytes) {
            let entry = entry.unwrap();
            let path = initrd.join(std::str::from_utf8(entry.path).unwrap());
            match path.is_dir() {
                true => assert!(entry.data.is_empty()),
                false => assert_eq!(fs::read(&path).unwrap(), entry.data, "{}", path.display()),
            }
        }
        let baked = initrd.join("stiefel/stiefel");
        assert_eq!(fs::read(&baked).unwrap(), b"program");
        assert_eq!(fs::metadata(baked).unwrap().permissions().mode() & 0o777, 0o755);
        let error = bake(&modules_dir, &[], &[], &program, &program).unwrap_err();
        assert!(matches!(error, OverlayError::Bake { .. }), "{error}");
    }

    #[test]
    fn compressed_overlay_holds_the_same() {
        let root = tempfile::tempdir().unwrap();
        let dir = module_tree(root.path());
        let plain = overlay(&dir, &[], &[], false).unwrap();
        let packed = overlay(&dir, &[], &[], true).unwrap();
        assert_eq!(zstd::bulk::decompress(&packed.bytes, 1 << 20).unwrap(), plain.bytes);
    }

    #[test]
    fn kernel_without_nbd_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let dir = module_tree(root.path());
        let dep = fs::read_to_string(dir.join("modules.dep")).unwrap();
        fs::write(
            dir.join("modules.dep"),
            dep.replace("kernel/drivers/block/nbd.ko:\n", ""),
        )
        .unwrap();
        let error = overlay(&dir, &[], &[], false).unwrap_err();
        assert!(matches!(error, OverlayError::NoNbd { .. }), "{error}");
    }

    #[test]
    fn modules_that_the_configuration_names_come_along_but_not_its_classes() {
        let root = tempfile::tempdir().unwrap();
        let dir = module_tree(root.path());
        let configured = ["default", "disk", "fs", "iwlwifi"].map(str::to_owned);
        let paths = paths(&overlay(&dir, &configured, &[], false).unwrap().bytes);
        assert!(paths.iter().any(|path| path.ends_with("/iwlwifi.ko")), "{paths:?}");
        for other in ["/nvme.ko", "/ext4.ko"] {
            assert!(!paths.iter().any(|path| path.ends_with(other)), "{other} in {paths:?}");
        }
    }

    #[test]
    fn a_named_module_that_the_payloads_kernel_lacks_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let error = overlay(&module_tree(root.path()), &["r8127".to_owned()], &[], false).unwrap_err();
        assert!(
            error.to_string().contains("r8127") && error.to_string().contains(VERSION),
            "{error}"
        );
    }
}
