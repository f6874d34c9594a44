//! Which disks there are, what uses them, and which of them the running system lives on.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use stiefel_sys::block::{self, BlockError, Disk};
use stiefel_sys::mount::{self, MountEntry};

use crate::tree::Tree;

/// Where the running system lies, if it is there at all. Swap space counts, too.
const SYSTEM: [&str; 10] = [
    "/",
    "/usr",
    "/boot",
    "/boot/efi",
    "/efi",
    "/var",
    "/home",
    "/etc",
    "/nix",
    "/opt",
];
/// File systems that are on no disk of this machine: a root on one of them lies on none.
const DISKLESS: [&str; 12] = [
    "tmpfs", "ramfs", "rootfs", "overlay", "squashfs", "erofs", "nfs", "nfs4", "9p", "virtiofs", "cifs", "fuse",
];

/// A disk, and what keeps it from being written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Candidate {
    pub(super) disk: Disk,
    /// The running system lives on it.
    pub(super) system: bool,
    /// What uses it, in words: mounts, swap space, volumes.
    pub(super) users: Vec<String>,
}

/// What was found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Survey {
    pub(super) disks: Vec<Candidate>,
    /// The running system's root is on a file system whose disks are not known (ZFS): any could be its.
    pub(super) root_unknown: Option<String>,
}

/// Looks at the machine below `root`.
pub(super) fn survey(root: &Path) -> Result<Survey, BlockError> {
    let (sysfs, procfs) = (root.join("sys"), root.join("proc"));
    let mounts = mount::read_mountinfo(&procfs).unwrap_or_default();
    let mut users: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let mut system: BTreeSet<String> = BTreeSet::new();
    for entry in &mounts {
        for disk in disks_of(root, &sysfs, entry) {
            let at = entry.mount_point.display();
            users
                .entry(disk.clone())
                .or_default()
                .insert(format!("mounted at {at}"));
            if SYSTEM.iter().any(|place| entry.mount_point == Path::new(place)) {
                system.insert(disk);
            }
        }
    }
    for (disk, name) in swaps(root, &sysfs) {
        users
            .entry(disk.clone())
            .or_default()
            .insert(format!("swap space {name}"));
        system.insert(disk);
    }
    let disks = block::disks(&sysfs)?
        .into_iter()
        .map(|mut disk| {
            if disk.serial.is_none() {
                disk.serial = usb_serial(&sysfs, &disk.name);
            }
            let mut users: Vec<String> = users.remove(&disk.name).unwrap_or_default().into_iter().collect();
            users.extend(
                holders(root, &disk)
                    .into_iter()
                    .map(|holder| format!("held by {holder}")),
            );
            Candidate {
                system: system.contains(&disk.name),
                users,
                disk,
            }
        })
        .collect();
    Ok(Survey {
        disks,
        root_unknown: unknown_root(root, &sysfs, &mounts),
    })
}

/// The serial number of the USB device that a disk is in: few such disks tell one of their own.
fn usb_serial(sysfs: &Path, disk: &str) -> Option<String> {
    let device = sysfs.join("block").join(disk).join("device").canonicalize().ok()?;
    let usb = device.ancestors().find(|folder| folder.join("idVendor").exists())?;
    Tree::new(usb).line("/serial")
}

/// The names of the whole disks below a mount; all of a btrfs's, not only the one that it was mounted by.
fn disks_of(root: &Path, sysfs: &Path, entry: &MountEntry) -> BTreeSet<String> {
    let mut numbers = Vec::new();
    if entry.device.0 != 0 {
        numbers.push(entry.device);
    } else if entry.source.starts_with("/dev/") {
        numbers.extend(number_of(root, &entry.source));
    }
    if entry.fstype == "btrfs" {
        let first = numbers.first().copied();
        numbers.extend(first.into_iter().flat_map(|first| btrfs_devices(root, first)));
    }
    let found = numbers
        .into_iter()
        .flat_map(|number| block::whole_disks_of_device(sysfs, number).unwrap_or_default());
    found.map(|disk| disk.name).collect()
}

/// Major and minor number of a device below /dev, as sysfs has it.
fn number_of(root: &Path, device: &str) -> Option<(u32, u32)> {
    let tree = Tree::new(root);
    let name = tree.block_name(device)?;
    let text = tree.line(format!("/sys/class/block/{name}/dev"))?;
    let (major, minor) = text.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// All devices of the btrfs that `first` belongs to.
fn btrfs_devices(root: &Path, first: (u32, u32)) -> Vec<(u32, u32)> {
    let tree = Tree::new(root);
    for file_system in tree.names("/sys/fs/btrfs") {
        let devices = tree.names(format!("/sys/fs/btrfs/{file_system}/devices"));
        let numbers: Vec<_> = devices
            .iter()
            .filter_map(|device| {
                let text = tree.line(format!("/sys/fs/btrfs/{file_system}/devices/{device}/dev"))?;
                let (major, minor) = text.split_once(':')?;
                Some((major.parse().ok()?, minor.parse().ok()?))
            })
            .collect();
        if numbers.contains(&first) {
            return numbers;
        }
    }
    Vec::new()
}

/// Swap space: the disk and the space's own name.
fn swaps(root: &Path, sysfs: &Path) -> Vec<(String, String)> {
    let tree = Tree::new(root);
    let text = tree.text("/proc/swaps").unwrap_or_default();
    let paths = text.lines().skip(1).filter_map(|line| line.split_whitespace().next());
    paths
        .flat_map(|path| {
            let number = number_of(root, path);
            let disks = number.and_then(|number| block::whole_disks_of_device(sysfs, number).ok());
            let named = disks.unwrap_or_default().into_iter();
            named.map(|disk| (disk.name, path.to_owned())).collect::<Vec<_>>()
        })
        .collect()
}

/// What stands on a disk or its partitions: `dm-0`, `md127`.
fn holders(root: &Path, disk: &Disk) -> BTreeSet<String> {
    let tree = Tree::new(root);
    let folder = format!("/sys/block/{}", disk.name);
    let partitions = tree.names(&folder).into_iter();
    let partitions = partitions.filter(|name| tree.is_file(format!("{folder}/{name}/partition")));
    let folders = std::iter::once(folder.clone()).chain(partitions.map(|name| format!("{folder}/{name}")));
    folders
        .flat_map(|folder| tree.names(format!("{folder}/holders")))
        .collect()
}

/// Why the disks of the root cannot be told; `None` if they can, or there are none.
fn unknown_root(root: &Path, sysfs: &Path, mounts: &[MountEntry]) -> Option<String> {
    // The one mounted last covers the others.
    let entry = mounts.iter().rev().find(|entry| entry.mount_point == Path::new("/"))?;
    let remote = DISKLESS
        .iter()
        .any(|kind| entry.fstype == *kind || entry.fstype.starts_with("fuse."));
    let known = remote || !disks_of(root, sysfs, entry).is_empty();
    (!known).then(|| format!("{} on {}", entry.fstype, entry.source))
}

/// A device or file that the user named.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Named {
    /// A whole disk, by its name.
    Disk(String),
    /// A file.
    File(PathBuf),
}

/// What the user means by `path`.
///
/// # Errors
/// In words: it is neither a whole disk nor a file.
pub(super) fn named(root: &Path, path: &Path) -> anyhow::Result<Named> {
    use std::os::unix::fs::FileTypeExt;
    let metadata = std::fs::metadata(path)
        .map_err(|error| anyhow::anyhow!("cannot look at {}: {error}; name a disk or a file", path.display()))?;
    if metadata.is_file() {
        return Ok(Named::File(std::path::absolute(path)?));
    }
    if !metadata.file_type().is_block_device() {
        anyhow::bail!("{} is neither a disk nor a file; name one of these", path.display());
    }
    let name = Tree::new(root).block_name(&path.to_string_lossy());
    let disks = block::disks(&root.join("sys"))?;
    match name.filter(|name| disks.iter().any(|disk| disk.name == *name)) {
        Some(name) => Ok(Named::Disk(name)),
        None => anyhow::bail!(
            "{} is no whole disk: partitions and what stands on disks are not exported by themselves; name the disk",
            path.display()
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    struct Machine(tempfile::TempDir);

    /// Name, number, partitions with their numbers.
    type FakeDisk<'a> = (&'a str, &'a str, &'a [(&'a str, &'a str)]);

    impl Machine {
        /// Disks (name, number, partitions with numbers), and the table of mounts.
        fn new(disks: &[FakeDisk], mounts: &str, swaps: &str) -> Self {
            let dir = tempfile::tempdir().unwrap();
            let put = |path: String, text: &str| {
                let path = dir.path().join(path);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, text).unwrap();
            };
            for folder in ["sys/dev/block", "sys/class/block", "proc/self"] {
                fs::create_dir_all(dir.path().join(folder)).unwrap();
            }
            // As in sysfs: links there are relative.
            let link = |number: &str, path: String| {
                let target = Path::new("../..").join(path.trim_start_matches("sys/"));
                let name = target.file_name().unwrap().to_owned();
                std::os::unix::fs::symlink(&target, dir.path().join("sys/dev/block").join(number)).unwrap();
                std::os::unix::fs::symlink(&target, dir.path().join("sys/class/block").join(name)).unwrap();
            };
            for (disk, number, partitions) in disks {
                put(format!("dev/{disk}"), "");
                put(format!("sys/block/{disk}/dev"), number);
                put(format!("sys/block/{disk}/size"), "2048");
                link(number, format!("sys/block/{disk}"));
                for (partition, number) in *partitions {
                    put(format!("dev/{partition}"), "");
                    put(format!("sys/block/{disk}/{partition}/partition"), "1");
                    put(format!("sys/block/{disk}/{partition}/dev"), number);
                    link(number, format!("sys/block/{disk}/{partition}"));
                }
            }
            put("proc/self/mountinfo".to_owned(), mounts);
            put("proc/swaps".to_owned(), swaps);
            Self(dir)
        }

        fn survey(&self) -> Survey {
            survey(self.0.path()).unwrap()
        }
    }

    const ROOT: &str = "22 1 8:2 / / rw - ext4 /dev/sda2 rw\n";

    #[test]
    fn the_disk_of_the_running_system_and_of_its_swap_space_is_known() {
        let machine = Machine::new(
            &[
                ("sda", "8:0", &[("sda2", "8:2")]),
                ("sdb", "8:16", &[("sdb1", "8:17")]),
                ("sdc", "8:32", &[]),
            ],
            &format!("{ROOT}23 22 8:17 / /mnt/data rw - ext4 /dev/sdb1 rw\n"),
            "Filename Type Size Used Priority\n/dev/sdc partition 1 0 -2\n",
        );
        let survey = machine.survey();
        let told: Vec<_> = survey
            .disks
            .iter()
            .map(|found| (found.disk.name.as_str(), found.system, found.users.join(", ")))
            .collect();
        assert_eq!(
            told,
            [
                ("sda", true, "mounted at /".to_owned()),
                ("sdb", false, "mounted at /mnt/data".to_owned()),
                ("sdc", true, "swap space /dev/sdc".to_owned()),
            ]
        );
        assert_eq!(survey.root_unknown, None);
    }

    #[test]
    fn a_disk_in_a_usb_case_has_the_serial_number_of_the_case() {
        let machine = Machine::new(&[("sda", "8:0", &[])], "", "");
        let case = machine.0.path().join("sys/devices/usb1/1-1");
        fs::create_dir_all(case.join("1-1:1.0/host0/target")).unwrap();
        for (file, text) in [("idVendor", "0951"), ("serial", "CASE42")] {
            fs::write(case.join(file), text).unwrap();
        }
        let link = machine.0.path().join("sys/block/sda/device");
        std::os::unix::fs::symlink(case.join("1-1:1.0/host0/target"), link).unwrap();
        assert_eq!(machine.survey().disks[0].disk.serial.as_deref(), Some("CASE42"));
    }

    #[test]
    fn what_stands_on_a_partition_holds_its_disk() {
        let machine = Machine::new(&[("sda", "8:0", &[("sda2", "8:2")])], "", "");
        fs::create_dir_all(machine.0.path().join("sys/block/sda/sda2/holders/dm-0")).unwrap();
        assert_eq!(machine.survey().disks[0].users, ["held by dm-0"]);
    }

    #[test]
    fn all_disks_of_a_btrfs_are_the_systems() {
        let machine = Machine::new(
            &[("sda", "8:0", &[("sda2", "8:2")]), ("sdb", "8:16", &[])],
            "22 1 0:30 /@ / rw - btrfs /dev/sda2 rw\n",
            "",
        );
        let devices = machine.0.path().join("sys/fs/btrfs/some-uuid/devices");
        for (name, number) in [("sda2", "8:2"), ("sdb", "8:16")] {
            fs::create_dir_all(devices.join(name)).unwrap();
            fs::write(devices.join(name).join("dev"), number).unwrap();
        }
        assert!(
            machine.survey().disks.iter().all(|found| found.system),
            "{:?}",
            machine.survey()
        );
    }

    #[test]
    fn a_root_whose_disks_cannot_be_seen_is_told() {
        let zfs = Machine::new(&[("sda", "8:0", &[])], "22 1 0:30 / / rw - zfs rpool/ROOT rw\n", "");
        assert_eq!(zfs.survey().root_unknown.as_deref(), Some("zfs on rpool/ROOT"));
        let ramdisk = Machine::new(&[("sda", "8:0", &[])], "1 1 0:2 / / rw - rootfs rootfs rw\n", "");
        assert_eq!(ramdisk.survey().root_unknown, None);
    }

    #[test]
    fn a_partition_or_a_folder_is_no_disk() {
        let root = tempfile::tempdir().unwrap();
        assert!(named(root.path(), root.path()).is_err());
        assert!(named(root.path(), Path::new("/nowhere")).is_err());
        let file = root.path().join("image");
        fs::write(&file, "x").unwrap();
        assert_eq!(named(root.path(), &file).unwrap(), Named::File(file));
    }
}
