//! Where a file lies on the served disk, as the ramdisk finds it: partition, file system, path.
//!
//! Counterpart: `crate::offline`, which mounts it. Refused, by name: what is not in the clear on a partition of that disk, and file
//! systems that the ramdisk does not have.

use std::path::{Path, PathBuf};

use stiefel_initrd_builder::ramdisk::{LOOP, Manifest};
use stiefel_shared::handover::{Logical, Place, VOLUMES, Volume};

use super::layers::Opened;
use crate::payload::Piece;
use crate::tree::{Mount, Tree};

/// Why the ramdisk would not find a file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlaceError {
    /// It is on no mounted file system of the tree.
    #[error("{path} is on no file system that is known\n  next: be root, and see whether it is there", path = path.display())]
    Nowhere {
        /// The file.
        path: PathBuf,
    },
    /// LUKS, LVM, RAID, another disk, or a file system without a device.
    #[error(
        "{point} ({kind} on {source_name}) is not in the clear on a partition of {disk}: the ramdisk cannot read it there (encryption, LVM, \
         RAID or another disk)\n  next: have /boot on a partition of its own, without encryption; or set trigger.method to kexec"
    )]
    NotInClear {
        /// Where it is mounted.
        point: String,
        /// Its type.
        kind: String,
        /// The device or name.
        source_name: String,
        /// The served disk.
        disk: String,
    },
    /// Something below it that the ramdisk does not open.
    #[error(
        "{point} ({source_name}) is on {below}, which the ramdisk does not open: it does LUKS that takes a passphrase, and ordinary volumes \
         of LVM in it or by themselves, all on partitions of {disk}\n  \
         next: have it on such; or start the laptop's own system, and serve from there"
    )]
    Layer {
        /// Where it is mounted.
        point: String,
        /// The device or name.
        source_name: String,
        /// What is in the way.
        below: String,
        /// The served disk.
        disk: String,
    },
    /// A file system that the ramdisk does not have.
    #[error(
        "{point} is a {kind}, which the ramdisk does not read\n  next: have /boot on ext4, xfs, btrfs or vfat; or set trigger.method to kexec"
    )]
    Unknown {
        /// Where it is mounted.
        point: String,
        /// Its type.
        kind: String,
    },
    /// A module that the ramdisk was built without.
    #[error(
        "the ramdisk has no {module}, without which it cannot read the laptop's disk\n  \
         next: have `default`, or `fs` (of encrypted disks and LVM: `dm`, too) besides the others, among `modules` in config.yaml, then: stiefel install"
    )]
    NotInRamdisk {
        /// Which.
        module: String,
    },
}

/// Whether this ramdisk can mount these, as `crate::offline` does: better to hear that while the OS is there.
pub(crate) fn readable<'a>(
    ramdisk: &Manifest,
    volumes: impl IntoIterator<Item = &'a Volume>,
) -> Result<(), PlaceError> {
    let file_systems = volumes.into_iter().map(|volume| volume.fstype.as_str());
    has_all(ramdisk, [LOOP].into_iter().chain(file_systems))
}

/// Whether this ramdisk has all these modules.
pub(super) fn has_all<'a>(ramdisk: &Manifest, needed: impl IntoIterator<Item = &'a str>) -> Result<(), PlaceError> {
    let mut needed = needed.into_iter();
    let missing = needed.find(|module| !ramdisk.reads.iter().any(|has| has == module));
    missing.map_or(Ok(()), |module| {
        Err(PlaceError::NotInRamdisk {
            module: module.to_owned(),
        })
    })
}

/// Where a piece of the payload lies on `disk`.
pub(crate) fn place(tree: &Tree, disk: &str, piece: &Piece) -> Result<Place, PlaceError> {
    let nowhere = || PlaceError::Nowhere {
        path: piece.path.clone(),
    };
    let file = tree.inside(&piece.path).ok_or_else(nowhere)?;
    let mount = mount_of(tree, &piece.path).ok_or_else(nowhere)?;
    let rest = file.strip_prefix(&mount.point).map_err(|_| nowhere())?;
    let path = Path::new(&mount.root).join(rest);
    Ok(Place {
        volume: Volume {
            // From the top of the file system, whatever of it is mounted.
            folder: "/".to_owned(),
            ..volume(tree, disk, &mount)?
        },
        path: path.into_os_string().into_string().map_err(|_| nowhere())?,
        range: piece.section.as_ref().map(|section| (section.offset, section.len)),
    })
}

/// The mounted file system that a file (as it really lies) is on.
pub(crate) fn mount_of(tree: &Tree, path: &Path) -> Option<Mount> {
    let file = tree.inside(path)?;
    // Of several at one place the last one counts: `max_by_key` takes that.
    let below = tree.mounts().into_iter().filter(|mount| file.starts_with(&mount.point));
    below.max_by_key(|mount| mount.point.len())
}

/// The file systems that make up the system in the tree, for reading the payload of a later day: `/` first, then those where kernels
/// and modules may be. What has to be opened for them is added to `opened`.
pub(crate) fn mounts(tree: &Tree, disk: &str, opened: &mut Opened) -> Result<Vec<(String, Volume)>, PlaceError> {
    for point in POINTS {
        // A look mounts what an automount has there.
        tree.names(point);
    }
    let mounts = tree.mounts();
    let at = |point: &str| {
        mounts
            .iter()
            .rfind(|mount| mount.point == point && mount.kind != "autofs")
    };
    let mut found = Vec::new();
    for point in POINTS {
        match at(point) {
            Some(mount) => found.push((point.to_owned(), volume_below(tree, disk, mount, opened)?)),
            None if point == "/" => return Err(PlaceError::Nowhere { path: point.into() }),
            None => {}
        }
    }
    Ok(found)
}

/// Each one before what is mounted in it.
const POINTS: [&str; 5] = ["/", "/usr", "/boot", "/efi", "/boot/efi"];

fn volume(tree: &Tree, disk: &str, mount: &Mount) -> Result<Volume, PlaceError> {
    let partition = partition_of(tree, disk, mount).ok_or_else(|| PlaceError::NotInClear {
        point: mount.point.clone(),
        kind: mount.kind.clone(),
        source_name: mount.source.clone(),
        disk: disk.to_owned(),
    })?;
    volume_on(mount, partition, None)
}

/// As [`volume`], also through LUKS and LVM.
fn volume_below(tree: &Tree, disk: &str, mount: &Mount, opened: &mut Opened) -> Result<Volume, PlaceError> {
    if partition_of(tree, disk, mount).is_some() {
        return volume(tree, disk, mount);
    }
    let (partition, logical) = opened.below(tree, disk, mount)?;
    volume_on(mount, partition, logical)
}

fn volume_on(mount: &Mount, partition: u32, logical: Option<Logical>) -> Result<Volume, PlaceError> {
    // One driver for the three.
    let kind = match mount.kind.as_str() {
        "ext2" | "ext3" => "ext4",
        kind => kind,
    };
    if !VOLUMES.iter().any(|(known, _)| *known == kind) {
        return Err(PlaceError::Unknown {
            point: mount.point.clone(),
            kind: kind.to_owned(),
        });
    }
    Ok(Volume {
        partition,
        fstype: kind.to_owned(),
        folder: mount.root.clone(),
        logical,
    })
}

/// On which partition of the disk a mounted file system is.
pub(crate) fn partition_of(tree: &Tree, disk: &str, mount: &Mount) -> Option<u32> {
    number_of(tree, disk, &device_of(tree, mount)?)
}

/// The device of a mounted file system, by the kernel's name.
pub(super) fn device_of(tree: &Tree, mount: &Mount) -> Option<String> {
    tree.block_name(&mount.source)
        .or_else(|| tree.block_name(&mount.device))
}

/// The number of the disk's partition that the kernel calls so.
pub(super) fn number_of(tree: &Tree, disk: &str, name: &str) -> Option<u32> {
    let device = format!("/sys/class/block/{name}");
    let number = tree.line(format!("{device}/partition"))?.parse().ok()?;
    (tree.parent_of(&device)? == disk).then_some(number)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use stiefel_shared::loader::uki::Section;

    /// A laptop with the disk `sda` of three partitions, and these mounts.
    pub(crate) fn laptop(mounts: &str) -> (tempfile::TempDir, Tree) {
        let dir = tempfile::tempdir().unwrap();
        let tree = Tree::new(dir.path());
        put(&tree, "/proc/self/mountinfo", mounts);
        for number in 1..=3 {
            let folder = format!("/sys/devices/sda/sda{number}");
            put(&tree, &format!("{folder}/partition"), &format!("{number}\n"));
            put(&tree, &format!("/dev/sda{number}"), "");
            let link = tree.path(format!("/sys/class/block/sda{number}"));
            std::fs::create_dir_all(link.parent().unwrap()).unwrap();
            std::os::unix::fs::symlink(format!("../../devices/sda/sda{number}"), link).unwrap();
        }
        put(&tree, "/dev/dm-0", "");
        put(&tree, "/sys/class/block/dm-0/size", "1\n");
        (dir, tree)
    }

    pub(crate) fn put(tree: &Tree, path: &str, text: &str) {
        let path = tree.path(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    fn found(mounts: &str, file: &str) -> Result<Place, PlaceError> {
        let (_dir, tree) = laptop(mounts);
        put(&tree, file, "x");
        place(&tree, "sda", &tree.path(file).into())
    }

    fn at(partition: u32, fstype: &str, path: &str) -> Place {
        Place {
            volume: Volume {
                partition,
                fstype: fstype.into(),
                folder: "/".into(),
                logical: None,
            },
            path: path.into(),
            range: None,
        }
    }

    #[test]
    fn a_file_is_found_in_the_root_in_boot_and_in_a_subvolume() {
        let root = "22 1 8:3 / / rw - ext4 /dev/sda3 rw\n";
        assert_eq!(found(root, "/boot/vmlinuz"), Ok(at(3, "ext4", "/boot/vmlinuz")));
        let boot = format!("{root}23 22 8:2 / /boot rw - xfs /dev/sda2 rw\n");
        assert_eq!(found(&boot, "/boot/vmlinuz"), Ok(at(2, "xfs", "/vmlinuz")));
        let btrfs = "22 1 0:25 /@ / rw - btrfs /dev/sda3 rw\n";
        assert_eq!(found(btrfs, "/boot/vmlinuz"), Ok(at(3, "btrfs", "/@/boot/vmlinuz")));
        let old = "22 1 8:3 / / rw - ext3 /dev/sda3 rw\n";
        assert_eq!(found(old, "/boot/vmlinuz"), Ok(at(3, "ext4", "/boot/vmlinuz")));
    }

    #[test]
    fn a_ramdisk_that_was_built_without_what_reads_the_disk_is_refused_by_name() {
        let part = serde_json::json!({"bytes": 0, "sha256": ""});
        let mut manifest: Manifest = serde_json::from_value(serde_json::json!({
            "stiefel_version": "0", "kernel_version": "6.1", "kernel": part, "ramdisk": part, "unpacked_bytes": 0, "modules": 0,
            "wireguard": true, "firmware": 0, "missing_firmware": 0, "classes": [],
        }))
        .unwrap();
        let volumes = [at(1, "vfat", "/a").volume, at(2, "ext4", "/a").volume];
        for has in ["loop", "vfat", "ext4"] {
            let refused = readable(&manifest, &volumes);
            assert!(
                matches!(refused, Err(PlaceError::NotInRamdisk { module }) if module == has),
                "{has}"
            );
            manifest.reads.push(has.to_owned());
        }
        assert_eq!(readable(&manifest, &volumes), Ok(()));
    }

    #[test]
    fn the_root_may_be_encrypted_if_boot_is_not() {
        let root = "22 1 253:0 / / rw - ext4 /dev/dm-0 rw\n";
        let boot = format!("{root}23 22 8:2 / /boot rw - ext4 /dev/sda2 rw\n");
        assert_eq!(found(&boot, "/boot/initrd.img"), Ok(at(2, "ext4", "/initrd.img")));
        let error = found(root, "/boot/initrd.img").unwrap_err().to_string();
        assert!(
            error.contains("/dev/dm-0") && error.contains("trigger.method"),
            "{error}"
        );
    }

    #[test]
    fn another_disk_and_another_file_system_are_refused_by_name() {
        let root = "22 1 8:3 / / rw - f2fs /dev/sda3 rw\n";
        assert!(matches!(found(root, "/boot/a"), Err(PlaceError::Unknown { kind, .. }) if kind == "f2fs"));
        let (_dir, tree) = laptop("22 1 8:3 / / rw - ext4 /dev/sda3 rw\n");
        put(&tree, "/boot/a", "x");
        let other = place(&tree, "sdb", &tree.path("/boot/a").into());
        assert!(matches!(other, Err(PlaceError::NotInClear { disk, .. }) if disk == "sdb"));
    }

    #[test]
    fn a_section_of_an_image_is_a_range_of_its_file() {
        let (_dir, tree) = laptop("22 1 8:1 / / rw - vfat /dev/sda1 rw\n");
        put(&tree, "/a.efi", "0123456789");
        let piece = Piece {
            path: tree.path("/a.efi"),
            section: Some(Section {
                name: ".linux".into(),
                offset: 3,
                len: 4,
            }),
        };
        assert_eq!(place(&tree, "sda", &piece).unwrap().range, Some((3, 4)));
    }

    #[test]
    fn the_systems_file_systems_are_listed_with_the_root_first() {
        let (_dir, tree) = laptop(
            "22 1 0:25 /@ / rw - btrfs /dev/sda3 rw\n23 22 8:2 / /boot rw - ext4 /dev/sda2 rw\n\
             24 23 0:40 / /boot/efi rw - autofs systemd-1 rw\n25 24 8:1 / /boot/efi rw - vfat /dev/sda1 rw\n",
        );
        let mut opened = Opened::default();
        let listed = mounts(&tree, "sda", &mut opened).unwrap();
        assert_eq!(opened, Opened::default(), "nothing has to be opened");
        let told: Vec<_> = listed
            .iter()
            .map(|(point, volume)| (point.as_str(), volume.partition, volume.folder.as_str()))
            .collect();
        assert_eq!(told, [("/", 3, "/@"), ("/boot", 2, "/"), ("/boot/efi", 1, "/")]);
    }
}
