//! Disks: which there are, which is the one that was meant, and what only block devices can do (sysfs, ioctls).
//!
//! The laptop's OS describes its disk with [`identity`]; in the ramdisk [`find`] finds it again, where names such as
//! `sda` may have changed. Used by the server and by storage target mode.

mod contents;
mod device;
mod gpt;
mod identity;

use std::collections::HashSet;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::mount::{self, MountEntry};
use crate::read;

pub use contents::{Content, contents};
pub use device::{discard, flush_buffers, logical_block_size, open_exclusive, reread_partitions, size, zero_out};
pub use gpt::gpt_disk_guid;
pub use identity::{find, identity};
pub use stiefel_shared::superblock::Guid;

/// sysfs counts in sectors of this many bytes, whatever the disk's own block size is.
const SECTOR: u64 = 512;
/// Partitions, crypt, volumes and arrays may be stacked, but not endlessly.
const MAX_STACK: usize = 32;
/// Names, before digits, of what is no disk of its own.
const NO_DISKS: [&str; 14] = [
    "loop", "ram", "zram", "nbd", "dm-", "md", "sr", "fd", "bcache", "drbd", "rbd", "zd", "mtdblock", "ublkb",
];

/// Why a disk cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// sysfs could not be read.
    #[error("cannot read {path}; sysfs must be mounted there", path = path.display())]
    Sysfs {
        /// The folder.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// A disk could not be read.
    #[error("cannot read the partition table of {path}; be root, and see whether the disk is there", path = path.display())]
    Read {
        /// The device.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// No block device is behind a path.
    #[error("cannot find the disk below {path}; give the disk itself in boot.disk", path = path.display())]
    NoDevice {
        /// The path.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// Two disks match.
    #[error("both {first} and {second} match the wanted disk ({by}); unplug one of them")]
    Ambiguous {
        /// A device.
        first: PathBuf,
        /// Another.
        second: PathBuf,
        /// What they have in common.
        by: &'static str,
    },
    /// No disk matches.
    #[error(
        "the wanted disk ({wanted}) is not among: {seen}; check its connection, and that its driver is in the ramdisk"
    )]
    NotFound {
        /// What was looked for.
        wanted: String,
        /// What there is.
        seen: String,
    },
}

/// A whole disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// The kernel's name, e.g. `nvme0n1`.
    pub name: String,
    /// Its device below /dev.
    pub path: PathBuf,
    /// Major and minor number.
    pub device: (u32, u32),
    /// In bytes.
    pub size: u64,
    /// In bytes.
    pub logical_block_size: u32,
    /// In bytes.
    pub physical_block_size: u32,
    /// The model, as far as the kernel tells.
    pub model: Option<String>,
    /// The serial number, as far as the kernel tells.
    pub serial: Option<String>,
    /// The world-wide name (`naa.…`, `eui.…`, `t10.…`), as far as the kernel tells.
    pub wwid: Option<String>,
    /// Its medium can be taken out (USB sticks, card readers).
    pub removable: bool,
    /// The kernel refuses writes.
    pub read_only: bool,
    /// It has turning platters.
    pub rotational: bool,
    /// Its number since the machine's start, which no later disk gets, also in the same place (Linux 5.15).
    pub sequence: Option<u64>,
}

/// The loop devices in use: their names, and the path of what each stands on, as the kernel knows it.
#[must_use]
pub fn loops(sysfs: &Path) -> Vec<(String, PathBuf)> {
    let entries = std::fs::read_dir(sysfs.join("block")).into_iter().flatten().flatten();
    let looped = |entry: std::fs::DirEntry| {
        let below = read::attribute(&entry.path().join("loop/backing_file"))?;
        Some((entry.file_name().to_string_lossy().into_owned(), below.into()))
    };
    let mut loops: Vec<_> = entries.filter_map(looped).collect();
    loops.sort();
    loops
}

/// All disks with a medium, by name: no loop, memory, network, optical, floppy or stacked devices, no partitions.
///
/// # Errors
/// [`BlockError::Sysfs`].
pub fn disks(sysfs: &Path) -> Result<Vec<Disk>, BlockError> {
    let folder = sysfs.join("block");
    let entries = std::fs::read_dir(&folder).map_err(|source| BlockError::Sysfs {
        path: folder.clone(),
        source,
    })?;
    let mut disks: Vec<Disk> = entries
        .flatten()
        .filter(|entry| entry.file_name().to_str().is_some_and(is_disk_name))
        .filter(|entry| !read::flag(&entry.path().join("hidden")))
        .filter_map(|entry| read_disk(&entry.path()))
        .filter(|disk| disk.size > 0)
        .collect();
    disks.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(disks)
}

fn is_disk_name(name: &str) -> bool {
    let virtual_name = NO_DISKS.iter().any(|kind| {
        name.strip_prefix(kind)
            .is_some_and(|number| number.bytes().all(|byte| byte.is_ascii_digit()))
    });
    // The boot and replay-protected areas of an eMMC are devices of their own.
    let mmc_area = name.starts_with("mmcblk") && (name.contains("boot") || name.contains("rpmb"));
    !virtual_name && !mmc_area
}

fn read_disk(folder: &Path) -> Option<Disk> {
    let name = folder.file_name()?.to_str()?.to_owned();
    let first = |names: &[&str]| names.iter().find_map(|name| read::attribute(&folder.join(name)));
    let sectors: u64 = read::number(&folder.join("size"))?;
    let (major, minor) = read::attribute(&folder.join("dev"))?
        .split_once(':')
        .map(|(a, b)| (a.to_owned(), b.to_owned()))?;
    let block_size = |file| read::number(&folder.join(file)).unwrap_or(512);
    Some(Disk {
        path: Path::new("/dev").join(name.replace('!', "/")),
        name,
        device: (major.parse().ok()?, minor.parse().ok()?),
        size: sectors.checked_mul(SECTOR)?,
        logical_block_size: block_size("queue/logical_block_size"),
        physical_block_size: block_size("queue/physical_block_size"),
        model: first(&["device/model", "device/name"]),
        serial: first(&["serial", "device/serial"]).or_else(|| scsi_serial(folder)),
        wwid: first(&["wwid", "device/wwid", "device/cid"]),
        removable: read::flag(&folder.join("removable")),
        read_only: read::flag(&folder.join("ro")),
        rotational: read::flag(&folder.join("queue/rotational")),
        sequence: read::number(&folder.join("diskseq")),
    })
}

/// SCSI and SATA disks: page 0x80 of the vital product data, the serial after four bytes (SPC-4, 7.8.15).
fn scsi_serial(folder: &Path) -> Option<String> {
    let page = read::bounded(&folder.join("device/vpd_pg80"), 4096).ok()?;
    let serial = String::from_utf8_lossy(page.get(4..)?)
        .trim_matches(|c: char| c.is_whitespace() || c == '\0')
        .to_owned();
    (!serial.is_empty()).then_some(serial)
}

/// The whole disks below `path`: a block device, or a file or folder on a file system. Looks through partitions,
/// device mapper and arrays. A file system on several devices (btrfs) answers for the one it was mounted by. What
/// comes out may be no disk in the sense of [`disks`], e.g. `nbd0`, whose data comes from elsewhere, or `loop0`.
///
/// # Errors
/// [`BlockError::NoDevice`] where no block device is behind it (tmpfs, NFS, ZFS); [`BlockError::Sysfs`].
pub fn whole_disks_of(sysfs: &Path, procfs: &Path, path: &Path) -> Result<Vec<Disk>, BlockError> {
    let missing = |source| BlockError::NoDevice {
        path: path.to_owned(),
        source,
    };
    let found = std::fs::metadata(path).map_err(missing)?;
    let device = if found.file_type().is_block_device() {
        found.rdev()
    } else {
        found.dev()
    };
    let mut number = (rustix::fs::major(device), rustix::fs::minor(device));
    if number.0 == 0 {
        // btrfs has numbers that lead nowhere, each subvolume another one than its mount's; the table of mounts names a device.
        let mounts = mount::read_mountinfo(procfs).map_err(|error| missing(io::Error::other(error)))?;
        let of = mount_of(&mounts, &path.canonicalize().map_err(missing)?)
            .filter(|mount| mount.source.starts_with("/dev/"))
            .ok_or_else(|| missing(io::ErrorKind::NotFound.into()))?;
        let device = std::fs::metadata(&of.source).map_err(missing)?.rdev();
        number = (rustix::fs::major(device), rustix::fs::minor(device));
    }
    whole_disks_of_device(sysfs, number)
}

/// On which mount a path lies, which has no links in it: the innermost, and of several at one place the last.
fn mount_of<'a>(mounts: &'a [MountEntry], path: &Path) -> Option<&'a MountEntry> {
    let above = mounts.iter().filter(|mount| path.starts_with(&mount.mount_point));
    above.max_by_key(|mount| mount.mount_point.components().count())
}

/// As [`whole_disks_of`], for the major and minor number of a block device.
///
/// # Errors
/// [`BlockError::Sysfs`] if there is no such device.
pub fn whole_disks_of_device(sysfs: &Path, device: (u32, u32)) -> Result<Vec<Disk>, BlockError> {
    let link = sysfs.join(format!("dev/block/{}:{}", device.0, device.1));
    let start = link
        .canonicalize()
        .map_err(|source| BlockError::Sysfs { path: link, source })?;
    let mut found = Vec::new();
    let mut seen = HashSet::new();
    let mut waiting = vec![(start, 0)];
    while let Some((folder, depth)) = waiting.pop() {
        if depth > MAX_STACK || !seen.insert(folder.clone()) {
            continue;
        }
        let slaves: Vec<_> = std::fs::read_dir(folder.join("slaves"))
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| entry.path().canonicalize().ok())
            .collect();
        if folder.join("partition").exists() {
            waiting.extend(folder.parent().map(|disk| (disk.to_owned(), depth + 1)));
        } else if slaves.is_empty() {
            found.extend(read_disk(&folder));
        } else {
            waiting.extend(slaves.into_iter().map(|slave| (slave, depth + 1)));
        }
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(found)
}

#[cfg(test)]
mod tests;
