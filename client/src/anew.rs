//! Whether the laptop boots something else by now: a kernel upgrade on the desktop leaves what the laptop's ramdisk has
//! collected behind.
//!
//! Used by the [goodbye](crate::goodbye) of a reboot. Counterpart: `server::collect`, which has looked at the same folders.

use std::path::{Path, PathBuf};

use anyhow::Context;
use stiefel_shared::handover::BootFolder;
use stiefel_sys::fingerprint::fingerprint;
use stiefel_sys::mount::{self, MountFlags};

/// Whether a folder of the root file system, which is at `root`, has changed.
pub(crate) fn in_root(folders: &[BootFolder], root: &Path) -> anyhow::Result<bool> {
    for folder in folders.iter().filter(|folder| folder.partition.is_none()) {
        let path = root.join(folder.path.trim_start_matches('/'));
        if fingerprint(&path)? != folder.fingerprint {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Whether a file system of its own on the disk `device` has changed; each is mounted at the folder `at` for a while.
pub(crate) fn on_partitions(folders: &[BootFolder], device: &Path, at: &Path) -> anyhow::Result<bool> {
    for folder in folders {
        let Some(number) = folder.partition else { continue };
        let now = of_partition(&partition(device, number), &folder.fstype, at)
            .with_context(|| format!("cannot look at {} of the laptop", folder.path))?;
        if now != folder.fingerprint {
            return Ok(true);
        }
    }
    Ok(false)
}

fn of_partition(partition: &Path, fstype: &str, at: &Path) -> anyhow::Result<String> {
    let flags = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount::make_dir_all(at, 0o700)?;
    mount::mount(&partition.to_string_lossy(), at, fstype, flags, None)?;
    let now = fingerprint(at);
    mount::unmount(at, false)?;
    Ok(now?)
}

/// A partition's device: both NBD's and NVMe's names end with a digit, so there is a `p` between.
fn partition(device: &Path, number: u32) -> PathBuf {
    let mut name = device.as_os_str().to_owned();
    name.push(format!("p{number}"));
    name.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A root file system, and /boot in it as the laptop has seen it.
    fn laptop() -> (tempfile::TempDir, Vec<BootFolder>) {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("boot")).unwrap();
        std::fs::write(root.path().join("boot/vmlinuz"), b"6.1").unwrap();
        let boot = BootFolder {
            path: "/boot".to_owned(),
            partition: None,
            fstype: "ext4".to_owned(),
            fingerprint: fingerprint(&root.path().join("boot")).unwrap(),
        };
        (root, vec![boot])
    }

    #[test]
    fn a_kernel_upgrade_is_seen_in_the_old_root() {
        let (root, folders) = laptop();
        assert!(!in_root(&folders, root.path()).unwrap());
        std::fs::write(root.path().join("boot/vmlinuz-6.2"), b"6.2").unwrap();
        assert!(in_root(&folders, root.path()).unwrap());
    }

    #[test]
    fn a_folder_that_is_gone_is_an_error_and_not_the_same() {
        let (root, folders) = laptop();
        std::fs::remove_dir_all(root.path().join("boot")).unwrap();
        assert!(in_root(&folders, root.path()).is_err());
    }

    #[test]
    fn each_folder_is_looked_at_where_it_is() {
        let (root, mut folders) = laptop();
        let (nowhere, at) = (root.path().join("nbd0"), root.path().join("at"));
        assert!(!on_partitions(&folders, &nowhere, &at).unwrap());
        folders[0].partition = Some(2);
        std::fs::remove_dir_all(root.path().join("boot")).unwrap();
        assert!(!in_root(&folders, root.path()).unwrap());
        let error = format!("{:#}", on_partitions(&folders, &nowhere, &at).unwrap_err());
        assert!(error.contains("/boot") && error.contains("nbd0p2"), "{error}");
    }
}
