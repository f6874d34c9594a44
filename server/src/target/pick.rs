//! Which disks there are, what uses them, and which of them the running system lives on.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use stiefel_sys::block::{self, BlockError, Disk};
use stiefel_sys::mount;

use super::lives::{disks_of, lives, number_of};
use crate::tree::Tree;

/// A disk, and what keeps it from being written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Candidate {
    pub(super) disk: Disk,
    /// The running system lives on it.
    pub(super) system: bool,
    /// It is behind USB: its serial number may be that of a case, in which there may be another disk next time.
    pub(super) usb: bool,
    /// What uses it, in words: mounts, swap space, volumes.
    pub(super) users: Vec<String>,
}

/// What was found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Survey {
    pub(super) disks: Vec<Candidate>,
    /// Parts of the running system whose disks are not known (ZFS), in words: any could be its.
    pub(super) unknown: Option<String>,
    /// Files that are used as disks, and how, in words.
    pub(super) images: BTreeMap<PathBuf, String>,
}

/// Looks at the machine below `root`.
pub(super) fn survey(root: &Path) -> Result<Survey, BlockError> {
    let (sysfs, procfs) = (root.join("sys"), root.join("proc"));
    let mounts = mount::read_mountinfo(&procfs).unwrap_or_default();
    let lives = lives(root, &mounts);
    let mut users: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let used = mounts.iter().flat_map(|entry| {
        let at = format!("mounted at {}", entry.mount_point.display());
        disks_of(root, entry).into_iter().map(move |disk| (disk, at.clone()))
    });
    let swaps = lives
        .swaps
        .iter()
        .map(|(disk, name)| (disk.clone(), format!("swap space {name}")));
    for (disk, user) in used.chain(swaps) {
        users.entry(disk).or_default().insert(user);
    }
    let mut images: BTreeMap<PathBuf, String> = BTreeMap::new();
    for (_, space) in &lives.swaps {
        images.insert(space.into(), format!("swap space {space}"));
    }
    for Looped { name, over, read_only } in loops(root) {
        // Nothing else says of a disk that one stands on it.
        let mut through = users.get(&name).cloned().unwrap_or_default();
        if !read_only {
            through.insert(format!("held by {name}"));
        }
        match over {
            Over::Disks(disks) => disks
                .into_iter()
                .for_each(|disk| users.entry(disk).or_default().extend(through.clone())),
            Over::File(path) if !through.is_empty() => {
                images.insert(path, through.into_iter().collect::<Vec<_>>().join(", "));
            }
            Over::File(_) => {}
        }
    }
    let disks = block::disks(&sysfs)?
        .into_iter()
        .map(|mut disk| {
            let usb = usb_device(&sysfs, &disk.name);
            if let (None, Some(usb)) = (&disk.serial, &usb) {
                // Few such disks tell one of their own.
                disk.serial = usb.line("/serial");
            }
            let mut users: Vec<String> = users.remove(&disk.name).unwrap_or_default().into_iter().collect();
            users.extend(
                holders(root, &disk)
                    .into_iter()
                    .map(|holder| format!("held by {holder}")),
            );
            Candidate {
                system: lives.disks.contains(&disk.name),
                usb: usb.is_some(),
                users,
                disk,
            }
        })
        .collect();
    Ok(Survey {
        images,
        disks,
        unknown: (!lives.unknown.is_empty()).then(|| lives.unknown.into_iter().collect::<Vec<_>>().join(", ")),
    })
}

/// A loop device.
struct Looped {
    name: String,
    over: Over,
    /// It refuses writes, as those of our shields do.
    read_only: bool,
}

/// What a loop device stands on.
enum Over {
    Disks(Vec<String>),
    File(PathBuf),
}

/// All loop devices that are in use.
fn loops(root: &Path) -> Vec<Looped> {
    let tree = Tree::new(root);
    let looped = |(name, backing): (String, PathBuf)| {
        let over = match number_of(root, &backing.to_string_lossy()) {
            Some(number) => {
                let disks = block::whole_disks_of_device(&root.join("sys"), number).unwrap_or_default();
                Over::Disks(disks.into_iter().map(|disk| disk.name).collect())
            }
            None => Over::File(backing),
        };
        let read_only = tree
            .line(format!("/sys/block/{name}/ro"))
            .is_some_and(|text| text == "1");
        Looped { name, over, read_only }
    };
    block::loops(&root.join("sys")).into_iter().map(looped).collect()
}

/// The USB device that a disk is in.
fn usb_device(sysfs: &Path, disk: &str) -> Option<Tree> {
    let device = sysfs.join("block").join(disk).join("device").canonicalize().ok()?;
    let usb = device.ancestors().find(|folder| folder.join("idVendor").exists())?;
    Some(Tree::new(usb))
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
pub(super) mod fake {
    use super::*;
    use std::fs;

    pub(in super::super) struct Machine(tempfile::TempDir);

    /// Name, number, partitions with their numbers.
    pub(in super::super) type FakeDisk<'a> = (&'a str, &'a str, &'a [(&'a str, &'a str)]);

    impl Machine {
        /// Disks (name, number, partitions with numbers), and the table of mounts.
        pub(in super::super) fn new(disks: &[FakeDisk], mounts: &str, swaps: &str) -> Self {
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

        pub(in super::super) fn root(&self) -> &Path {
            self.0.path()
        }

        pub(in super::super) fn survey(&self) -> Survey {
            survey(self.0.path()).unwrap()
        }
    }
}

/// Disks that nothing uses, and on which no system lives.
#[cfg(test)]
pub(super) fn unused(disks: &[&Disk]) -> Survey {
    let candidate = |disk: &&Disk| Candidate {
        disk: (*disk).clone(),
        system: false,
        usb: false,
        users: Vec::new(),
    };
    Survey {
        disks: disks.iter().map(candidate).collect(),
        ..Survey::default()
    }
}

#[cfg(test)]
mod tests {
    use super::fake::Machine;
    use super::*;
    use std::fs;

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
        assert_eq!(survey.unknown, None);
    }

    #[test]
    fn a_disk_in_a_usb_case_has_the_serial_number_of_the_case() {
        let machine = Machine::new(&[("sda", "8:0", &[])], "", "");
        let case = machine.root().join("sys/devices/usb1/1-1");
        fs::create_dir_all(case.join("1-1:1.0/host0/target")).unwrap();
        for (file, text) in [("idVendor", "0951"), ("serial", "CASE42")] {
            fs::write(case.join(file), text).unwrap();
        }
        let link = machine.root().join("sys/block/sda/device");
        std::os::unix::fs::symlink(case.join("1-1:1.0/host0/target"), link).unwrap();
        let found = machine.survey();
        assert_eq!(found.disks[0].disk.serial.as_deref(), Some("CASE42"));
        assert!(found.disks[0].usb);
    }

    #[test]
    fn what_stands_on_a_partition_holds_its_disk() {
        let machine = Machine::new(&[("sda", "8:0", &[("sda2", "8:2")])], "", "");
        fs::create_dir_all(machine.root().join("sys/block/sda/sda2/holders/dm-0")).unwrap();
        assert_eq!(machine.survey().disks[0].users, ["held by dm-0"]);
    }

    #[test]
    fn what_a_loop_device_stands_on_is_in_use_unless_it_only_reads() {
        let machine = Machine::new(
            &[
                ("sda", "8:0", &[("sda1", "8:1")]),
                ("sdb", "8:16", &[]),
                ("sdc", "8:32", &[]),
                ("loop0", "7:0", &[]),
                ("loop1", "7:1", &[]),
                ("loop2", "7:2", &[]),
                ("loop3", "7:3", &[]),
            ],
            &format!("{ROOT}23 22 7:1 / /mnt rw - ext4 /dev/loop1 rw\n"),
            "",
        );
        let loops = [
            ("loop0", "/dev/sda1", "0"),
            ("loop1", "/dev/sdb", "1"),
            ("loop2", "/dev/sdc", "1"),
            ("loop3", "/a/b.img", "0"),
        ];
        for (name, backing, read_only) in loops {
            let folder = machine.root().join("sys/block").join(name);
            fs::create_dir_all(folder.join("loop")).unwrap();
            fs::write(folder.join("loop/backing_file"), backing).unwrap();
            fs::write(folder.join("ro"), read_only).unwrap();
        }
        let survey = machine.survey();
        let users: Vec<String> = survey.disks.iter().map(|found| found.users.join(", ")).collect();
        assert_eq!(users, ["held by loop0", "mounted at /mnt", ""]);
        assert_eq!(survey.images[Path::new("/a/b.img")], "held by loop3");
    }

    #[test]
    fn all_disks_of_a_btrfs_are_the_systems() {
        let machine = Machine::new(
            &[("sda", "8:0", &[("sda2", "8:2")]), ("sdb", "8:16", &[])],
            "22 1 0:30 /@ / rw - btrfs /dev/sda2 rw\n",
            "",
        );
        let devices = machine.root().join("sys/fs/btrfs/some-uuid/devices");
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
        assert_eq!(zfs.survey().unknown.as_deref(), Some("zfs on rpool/ROOT at /"));
        let ramdisk = Machine::new(&[("sda", "8:0", &[])], "1 1 0:2 / / rw - rootfs rootfs rw\n", "");
        assert_eq!(ramdisk.survey().unknown, None);
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
