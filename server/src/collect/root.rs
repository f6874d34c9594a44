//! Which disks the root file system is on: one is served, so a system on several is refused, with what spreads it.
//!
//! Found through `slaves` in sysfs (arrays, volumes, encryption, bcache) and btrfs' list of its devices.

use std::collections::BTreeSet;
use std::path::Path;

use crate::tree::Tree;

/// What the root file system stands on.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RootStack {
    /// What spreads it over several devices, for people: `btrfs on sda2, sdb2`, `RAID md0`. Empty if nothing does.
    pub layers: Vec<String>,
    /// The whole disks, by the kernel's names.
    pub disks: BTreeSet<String>,
}

impl std::fmt::Display for RootStack {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("/")?;
        if !self.layers.is_empty() {
            write!(f, " ({})", self.layers.join(", "))?;
        }
        Ok(())
    }
}

/// What the root file system of the system below `root` stands on; nothing where it is on no block device (ZFS, overlays).
#[must_use]
pub fn disks_of_root(root: &Path) -> RootStack {
    stack(&Tree::new(root))
}

/// A btrfs may have several devices, and its mount names only one of them; below, arrays and volumes may have several.
pub(super) fn stack(tree: &Tree) -> RootStack {
    let Some(root) = tree.root_device() else {
        return RootStack::default();
    };
    let folder = "/sys/fs/btrfs";
    let btrfs = tree
        .names(folder)
        .into_iter()
        .map(|uuid| tree.names(format!("{folder}/{uuid}/devices")))
        .find(|devices| devices.contains(&root))
        .unwrap_or_default();
    let mut stack = RootStack::default();
    if btrfs.len() > 1 {
        stack.layers.push(format!("btrfs on {}", btrfs.join(", ")));
    }
    let mut waiting = if btrfs.is_empty() { vec![root] } else { btrfs };
    let mut seen = BTreeSet::new();
    while let Some(device) = waiting.pop() {
        if !seen.insert(device.clone()) {
            continue;
        }
        let block = format!("/sys/class/block/{device}");
        let below = tree.names(format!("{block}/slaves"));
        if below.len() > 1 {
            stack.layers.push(layer(tree, &block, &device));
        }
        if below.is_empty() {
            stack.disks.extend(tree.disks_below(&device));
        }
        waiting.extend(below);
    }
    stack
}

/// A device on several others, for people.
fn layer(tree: &Tree, block: &str, device: &str) -> String {
    let name = tree.line(format!("{block}/dm/name"));
    match tree.line(format!("{block}/md/level")) {
        Some(level) => format!("{level} {device}"),
        None => match name {
            Some(name) => format!("volume {name}"),
            None => device.to_owned(),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collect::{CollectError, disk};
    use crate::testing::tree;
    use stiefel_shared::config::Auto;

    /// The refusal of a root on these devices.
    fn refusal(files: &[(&str, &str)]) -> String {
        let (dir, tree) = tree(files);
        let error = disk(&tree, &Auto::Auto).unwrap_err();
        assert!(matches!(&error, CollectError::SeveralDisks { .. }), "{error}");
        assert!(disks_of_root(dir.path()).disks.len() > 1);
        error.to_string()
    }

    #[test]
    fn a_root_on_several_disks_is_refused_with_all_of_them_and_what_spreads_it() {
        let text = refusal(&[
            ("/proc/self/mountinfo", "22 1 0:25 /@ / rw - btrfs /dev/sda rw\n"),
            ("/dev/sda", ""),
            ("/sys/class/block/sda/size", "1"),
            ("/sys/class/block/sdb/size", "1"),
            ("/sys/fs/btrfs/1-2/devices/sda/x", ""),
            ("/sys/fs/btrfs/1-2/devices/sdb/x", ""),
            ("/sys/fs/btrfs/3-4/devices/sdc/x", ""),
        ]);
        assert!(
            text.contains("/ (btrfs on sda, sdb)") && text.contains("disks (sda, sdb)"),
            "{text}"
        );
        assert!(text.contains("boot.disk"), "{text}");

        let text = refusal(&[
            ("/proc/self/mountinfo", "22 1 9:0 / / rw - ext4 /dev/md0 rw\n"),
            ("/dev/md0", ""),
            ("/sys/class/block/md0/md/level", "raid1\n"),
            ("/sys/class/block/md0/slaves/sda/x", ""),
            ("/sys/class/block/md0/slaves/sdb/x", ""),
            ("/sys/class/block/sda/size", "1"),
            ("/sys/class/block/sdb/size", "1"),
        ]);
        assert!(text.contains("/ (raid1 md0)") && text.contains("sda, sdb"), "{text}");

        // A volume on two encrypted disks.
        let text = refusal(&[
            ("/proc/self/mountinfo", "22 1 253:2 / / rw - xfs /dev/dm-2 rw\n"),
            ("/dev/dm-2", ""),
            ("/sys/class/block/dm-2/dm/name", "vg-root\n"),
            ("/sys/class/block/dm-2/slaves/dm-0/x", ""),
            ("/sys/class/block/dm-2/slaves/dm-1/x", ""),
            ("/sys/class/block/dm-0/slaves/nvme0n1/x", ""),
            ("/sys/class/block/dm-1/slaves/sdb/x", ""),
            ("/sys/class/block/nvme0n1/size", "1"),
            ("/sys/class/block/sdb/size", "1"),
        ]);
        assert!(
            text.contains("/ (volume vg-root)") && text.contains("nvme0n1, sdb"),
            "{text}"
        );
    }

    #[test]
    fn several_devices_on_one_disk_are_one_disk() {
        let (dir, tree) = tree(&[
            ("/proc/self/mountinfo", "22 1 253:0 / / rw - ext4 /dev/dm-0 rw\n"),
            ("/dev/dm-0", ""),
            ("/sys/class/block/dm-0/slaves/sda2/x", ""),
            ("/sys/class/block/dm-0/slaves/sda3/x", ""),
            ("/sys/devices/sda/sda2/partition", "2"),
            ("/sys/devices/sda/sda3/partition", "3"),
            ("/sys/class/block/sda/size", "1"),
        ]);
        for name in ["sda2", "sda3"] {
            let link = tree.path(format!("/sys/class/block/{name}"));
            std::os::unix::fs::symlink(format!("../../devices/sda/{name}"), link).unwrap();
        }
        let stack = disks_of_root(dir.path());
        assert_eq!(stack.disks.into_iter().collect::<Vec<_>>(), ["sda"]);
        assert_eq!(disks_of_root(Path::new("/nowhere")), RootStack::default());
    }
}
