//! Where the running system lives: the disks below its mounts and its swap space, through overlays, images on loop devices and
//! swap files, as far as the kernel's table of mounts and sysfs tell.
//!
//! What they do not tell (ZFS, paths that were true before the root was changed) is said by name, and never guessed: who asks
//! lends nothing then. Interfaces: proc_pid_mountinfo(5), `fs/overlayfs/params.c` (its options), `drivers/block/loop.c`
//! (backing_file).

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use stiefel_sys::block;
use stiefel_sys::mount::MountEntry;

use crate::tree::Tree;

/// Where the running system lies, if it is there at all.
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
/// File systems that are on no disk of this machine.
const DISKLESS: [&str; 12] = [
    "tmpfs",
    "ramfs",
    "rootfs",
    "autofs",
    "nfs",
    "nfs4",
    "9p",
    "virtiofs",
    "cifs",
    "ubifs",
    "jffs2",
    "fuse.sshfs",
];
/// Options of an overlay that name folders: one, or several with colons between them.
const LAYERS: [&str; 4] = ["lowerdir", "lowerdir+", "datadir+", "upperdir"];

/// Steps from a mount to its disks.
const MAX_WAY: usize = 64;
/// Stands for a loop device among the numbers of mounts.
const LOOPED: u32 = u32::MAX;

/// What was found out.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Lives {
    /// The kernel's names of the disks.
    pub(super) disks: BTreeSet<String>,
    /// Parts of the system whose disks cannot be told, in words.
    pub(super) unknown: BTreeSet<String>,
    /// Swap space: the disk and the space's own name.
    pub(super) swaps: Vec<(String, String)>,
}

/// Looks at the machine below `root`, whose mounts are `mounts`.
pub(super) fn lives(root: &Path, mounts: &[MountEntry]) -> Lives {
    let look = Look { root, mounts };
    let mut found = Lives::default();
    if !mounts.iter().any(|entry| entry.mount_point == Path::new("/")) {
        found.unknown.insert("a root that no table of mounts shows".to_owned());
    }
    for entry in mounts {
        let place = &entry.mount_point;
        let exactly = SYSTEM.iter().any(|system| place == Path::new(system));
        // Each of its users and datasets is often a mount of its own.
        let below = || entry.fstype == "zfs" && SYSTEM.iter().skip(1).any(|system| place.starts_with(system));
        if exactly || below() {
            look.below(entry, &mut Vec::new(), &mut found);
        }
    }
    look.swaps(&mut found);
    found
}

/// The names of the whole disks that a mount names itself; all of a btrfs's, not only the one that it was mounted by.
pub(super) fn disks_of(root: &Path, entry: &MountEntry) -> BTreeSet<String> {
    let sysfs = root.join("sys");
    let disks = numbers(root, entry)
        .into_iter()
        .flat_map(|number| block::whole_disks_of_device(&sysfs, number).unwrap_or_default());
    disks.map(|disk| disk.name).collect()
}

struct Look<'a> {
    root: &'a Path,
    mounts: &'a [MountEntry],
}

impl Look<'_> {
    /// Adds what is below a mount. `way` are the numbers of the mounts that led here.
    fn below(&self, entry: &MountEntry, way: &mut Vec<u32>, found: &mut Lives) {
        let unknown = || {
            format!(
                "{} on {} at {}",
                entry.fstype,
                entry.source,
                entry.mount_point.display()
            )
        };
        if way.contains(&entry.id) || way.len() >= MAX_WAY {
            // What lies on itself was named by a path of another root.
            found.unknown.insert(unknown());
            return;
        }
        way.push(entry.id);
        let numbers = numbers(self.root, entry);
        if !numbers.is_empty() {
            for number in numbers {
                if !self.device(number, way, found) {
                    found.unknown.insert(unknown());
                }
            }
        } else if entry.fstype == "overlay" {
            let layers = layers(&entry.super_options);
            let mut known = !layers.is_empty();
            for layer in &layers {
                known &= self.path(layer, way, found);
            }
            if !known {
                found.unknown.insert(unknown());
            }
        } else if entry.fstype == "erofs" || entry.fstype == "squashfs" {
            // An image without a loop device.
            if !self.path(Path::new(&entry.source), way, found) {
                found.unknown.insert(unknown());
            }
        } else if !DISKLESS.contains(&entry.fstype.as_str()) {
            found.unknown.insert(unknown());
        }
        way.pop();
    }

    /// Adds what is below a block device; `false` if that cannot be told.
    fn device(&self, number: (u32, u32), way: &mut Vec<u32>, found: &mut Lives) -> bool {
        let disks = block::whole_disks_of_device(&self.root.join("sys"), number).unwrap_or_default();
        let mut known = !disks.is_empty();
        for disk in disks {
            match disk.name.strip_prefix("loop").map(str::parse::<u32>) {
                Some(Ok(_)) => known &= self.image(&disk.name, way, found),
                _ => {
                    found.disks.insert(disk.name);
                }
            }
        }
        known
    }

    /// Adds what is below a loop device's file.
    fn image(&self, name: &str, way: &mut Vec<u32>, found: &mut Lives) -> bool {
        let backing = Tree::new(self.root).line(format!("/sys/block/{name}/loop/backing_file"));
        let Some(backing) = backing else { return false };
        match number_of(self.root, &backing) {
            // A loop device over a disk, or another loop device.
            Some(number) if way.len() < MAX_WAY => {
                way.push(LOOPED);
                let known = self.device(number, way, found);
                way.pop();
                known
            }
            Some(_) => false,
            None => self.path(Path::new(&backing), way, found),
        }
    }

    /// Adds what a file or folder lies on; `false` if there is none of that name.
    fn path(&self, path: &Path, way: &mut Vec<u32>, found: &mut Lives) -> bool {
        let there = path.is_absolute() && Tree::new(self.root).path(path).symlink_metadata().is_ok();
        let on = self.mounts.iter().filter(|entry| path.starts_with(&entry.mount_point));
        // The deepest; of several at one place the last one covers the others.
        let on = on.max_by_key(|entry| entry.mount_point.components().count());
        match on {
            Some(on) if there => {
                self.below(on, way, found);
                true
            }
            _ => false,
        }
    }

    fn swaps(&self, found: &mut Lives) {
        let text = Tree::new(self.root).text("/proc/swaps").unwrap_or_default();
        for line in text.lines().skip(1) {
            let mut fields = line.split_whitespace();
            let (Some(path), Some(kind)) = (fields.next(), fields.next()) else {
                continue;
            };
            let mut own = Lives::default();
            let known = match kind {
                "file" => self.path(Path::new(path), &mut Vec::new(), &mut own),
                _ => number_of(self.root, path).is_some_and(|number| self.device(number, &mut Vec::new(), &mut own)),
            };
            if !known {
                own.unknown.insert(format!("swap space {path}"));
            }
            found
                .swaps
                .extend(own.disks.iter().map(|disk| (disk.clone(), path.to_owned())));
            found.disks.extend(own.disks);
            found.unknown.extend(own.unknown);
        }
    }
}

/// The folders that an overlay is made of, of its options.
fn layers(options: &str) -> Vec<PathBuf> {
    let mut layers = Vec::new();
    for option in options.split(',') {
        let Some((name, value)) = option.split_once('=') else {
            continue;
        };
        if LAYERS.contains(&name) {
            // A colon in a name has a backslash before it; two colons begin folders of data.
            let value = value.replace("\\:", "\0");
            let folders = value.split(':').filter(|folder| !folder.is_empty());
            layers.extend(folders.map(|folder| PathBuf::from(folder.replace('\0', ":"))));
        }
    }
    layers
}

/// The numbers of the devices that a mount names itself.
fn numbers(root: &Path, entry: &MountEntry) -> Vec<(u32, u32)> {
    let mut numbers = Vec::new();
    if entry.device.0 != 0 {
        numbers.push(entry.device);
    } else if entry.source.starts_with("/dev/") {
        // bcachefs names all of its devices.
        numbers.extend(entry.source.split(':').filter_map(|device| number_of(root, device)));
    }
    if entry.fstype == "btrfs" {
        let first = numbers.first().copied();
        numbers.extend(first.into_iter().flat_map(|first| btrfs_devices(root, first)));
    }
    numbers.sort_unstable();
    numbers.dedup();
    numbers
}

/// Major and minor number of a device below /dev, as sysfs has it.
pub(super) fn number_of(root: &Path, device: &str) -> Option<(u32, u32)> {
    let tree = Tree::new(root);
    let name = device.starts_with("/dev/").then(|| tree.block_name(device))??;
    pair(&tree.line(format!("/sys/class/block/{name}/dev"))?)
}

fn pair(text: &str) -> Option<(u32, u32)> {
    let (major, minor) = text.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// All devices of the btrfs that `first` belongs to.
fn btrfs_devices(root: &Path, first: (u32, u32)) -> Vec<(u32, u32)> {
    let tree = Tree::new(root);
    for file_system in tree.names("/sys/fs/btrfs") {
        let folder = format!("/sys/fs/btrfs/{file_system}/devices");
        let devices = tree.names(&folder);
        let numbers: Vec<_> = devices
            .iter()
            .filter_map(|device| pair(&tree.line(format!("{folder}/{device}/dev"))?))
            .collect();
        if numbers.contains(&first) {
            return numbers;
        }
    }
    Vec::new()
}

#[cfg(test)]
mod tests {
    use super::super::pick::fake::Machine;
    use super::*;
    use proptest::prelude::*;
    use std::fs;
    use stiefel_sys::mount::mountinfo;

    /// What is said of a machine with the disks sda, sdb, sdc with a partition each, and these mounts, swaps and paths.
    fn seen(mounts: &str, swaps: &str, paths: &[&str], loops: &[(&str, &str)]) -> (Vec<String>, Vec<String>) {
        let mut disks = vec![
            ("sda", "8:0", vec![("sda1", "8:1")]),
            ("sdb", "8:16", vec![("sdb1", "8:17")]),
            ("sdc", "8:32", vec![("sdc1", "8:33")]),
        ];
        let numbers: Vec<String> = (0..loops.len()).map(|number| format!("7:{number}")).collect();
        for ((name, _), number) in loops.iter().zip(&numbers) {
            disks.push((name, number, Vec::new()));
        }
        let disks: Vec<_> = disks.iter().map(|(a, b, c)| (*a, *b, c.as_slice())).collect();
        let machine = Machine::new(&disks, mounts, swaps);
        let root = machine.root();
        for path in paths {
            fs::create_dir_all(root.join(path.trim_start_matches('/'))).unwrap();
        }
        for (name, backing) in loops {
            let folder = root.join("sys/block").join(name).join("loop");
            fs::create_dir_all(&folder).unwrap();
            fs::write(folder.join("backing_file"), backing).unwrap();
        }
        let found = lives(root, &mountinfo(mounts.as_bytes()));
        (found.disks.into_iter().collect(), found.unknown.into_iter().collect())
    }

    const STICK: &str = "30 22 8:17 / /run/live/medium ro - iso9660 /dev/sdb1 ro\n";
    const IMAGE: &str = "31 22 7:0 / /run/live/rootfs ro - squashfs /dev/loop0 ro\n";

    #[test]
    fn a_live_system_lives_on_the_stick_that_holds_its_image() {
        let root = "22 1 0:30 / / rw - overlay overlay rw,lowerdir=/run/live/rootfs,upperdir=/run/live/cow/rw,workdir=/run/live/cow/work\n";
        let cow = "32 22 0:31 / /run/live/cow rw - tmpfs tmpfs rw\n";
        let (disks, unknown) = seen(
            &format!("{root}{STICK}{IMAGE}{cow}"),
            "",
            &[
                "/run/live/rootfs",
                "/run/live/cow/rw",
                "/run/live/medium/live/filesystem.squashfs",
            ],
            &[("loop0", "/run/live/medium/live/filesystem.squashfs\n")],
        );
        assert_eq!(disks, ["sdb"]);
        assert!(unknown.is_empty(), "{unknown:?}");
    }

    #[test]
    fn an_overlay_over_a_disk_lives_on_that_disk() {
        let mounts = "22 1 0:30 / / rw - overlay overlayroot rw,lowerdir=/media/root-ro,upperdir=/media/root-rw/overlay,workdir=/media/root-rw/work\n\
             23 22 8:1 / /media/root-ro ro - ext4 /dev/sda1 ro\n\
             24 22 8:33 / /media/root-rw rw - ext4 /dev/sdc1 rw\n";
        let (disks, unknown) = seen(mounts, "", &["/media/root-ro", "/media/root-rw/overlay"], &[]);
        assert_eq!(disks, ["sda", "sdc"]);
        assert!(unknown.is_empty(), "{unknown:?}");
    }

    #[test]
    fn layers_that_are_out_of_sight_are_said() {
        let root = |options: &str| format!("22 1 0:30 / / rw - overlay overlay rw,{options}\n");
        for options in [
            // Not there, not absolute, none, on the overlay itself.
            "lowerdir=/gone",
            "lowerdir=l/ABC:l/DEF",
            "index=off",
            "lowerdir=/there",
        ] {
            let (disks, unknown) = seen(&root(options), "", &["/there"], &[]);
            assert_eq!(unknown, ["overlay on overlay at /"], "{options}");
            assert!(disks.is_empty());
        }
        let mounts = format!("{}{IMAGE}", root("lowerdir=/run/live/rootfs"));
        let (_, unknown) = seen(&mounts, "", &["/run/live/rootfs"], &[("loop0", "/was/there (deleted)")]);
        assert_eq!(unknown, ["squashfs on /dev/loop0 at /run/live/rootfs"]);
    }

    #[test]
    fn zfs_and_unknown_file_systems_are_said_and_plain_memory_is_none() {
        let (disks, unknown) = seen(
            "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n23 22 0:40 / /home/anna rw - zfs tank/home/anna rw\n\
             24 22 0:41 / /var rw - strangefs somewhere rw\n25 22 0:42 / /etc rw - tmpfs tmpfs rw\n\
             26 22 0:43 / /mnt/more rw - zfs tank/more rw\n",
            "",
            &[],
            &[],
        );
        assert_eq!(disks, ["sda"]);
        assert_eq!(
            unknown,
            ["strangefs on somewhere at /var", "zfs on tank/home/anna at /home/anna"]
        );
        assert_eq!(seen("22 1 0:2 / / rw - rootfs rootfs rw\n", "", &[], &[]).1, [""; 0]);
        assert_eq!(seen("", "", &[], &[]).1.len(), 1);
    }

    #[test]
    fn a_swap_file_counts_for_the_disk_below_it() {
        let mounts = "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n23 22 8:33 / /data rw - ext4 /dev/sdc1 rw\n";
        let table = "Filename Type Size Used Priority\n/data/swap file 1 0 -2\n";
        assert_eq!(seen(mounts, table, &["/data/swap"], &[]).0, ["sda", "sdc"]);
        assert_eq!(seen(mounts, table, &[], &[]).1, ["swap space /data/swap"]);
    }

    #[test]
    fn all_layers_are_found_in_the_options() {
        let found = layers("rw,lowerdir=/a:/b\\:c::/d,upperdir=/e,workdir=/f,lowerdir+=/g,datadir+=/h,index=off");
        let expected = ["/a", "/b:c", "/d", "/e", "/g", "/h"].map(PathBuf::from);
        assert_eq!(found, expected);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn any_table_of_mounts_ends(lines in proptest::collection::vec(
            ("[0-9]{1,2}", "(/|/usr|/a|/a/b)", "(overlay|ext4|zfs|squashfs)", "(/a|/a/b|/dev/sda1|x)"), 0..8
        )) {
            let text: String = lines
                .iter()
                .map(|(id, at, kind, source)| format!("{id} 1 0:3 / {at} rw - {kind} {source} rw,lowerdir={source}:/usr\n"))
                .collect();
            let _ = seen(&text, "", &["/a/b", "/usr"], &[]);
        }
    }
}
