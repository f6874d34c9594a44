//! What stands on a disk besides mounted file systems, and how it is taken down: swap space, loop devices, arrays and
//! device-mapper volumes (LUKS, LVM). sysfs(5), proc_swaps(5), `linux/dm-ioctl.h`, `linux/raid/md_u.h`, `linux/loop.h`.
//!
//! Used by `client::goodbye` at the very end, when no process but it is left.

use std::collections::BTreeSet;
use std::ffi::{CString, OsStr, OsString};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::ioctl::{self, opcode};

use crate::{mount, read};

/// Stop an array.
const STOP_ARRAY: ioctl::Opcode = opcode::none(9, 0x32);
/// Take a loop device's file away.
const LOOP_CLR_FD: ioctl::Opcode = 0x4c01;
/// Remove a device-mapper device.
const DM_DEV_REMOVE: ioctl::Opcode = opcode::read_write::<DmIoctl>(0xfd, 4);
/// The interface we speak; the kernel refuses another major version only.
pub(crate) const DM_VERSION: [u32; 3] = [4, 0, 0];
/// The longest table of swap space that is read, in bytes.
const MAX_SWAPS: usize = 1 << 20;

/// `struct dm_ioctl`; all numbers are the machine's.
#[repr(C)]
pub(crate) struct DmIoctl {
    pub(crate) version: [u32; 3],
    pub(crate) data_size: u32,
    pub(crate) data_start: u32,
    pub(crate) target_count: u32,
    pub(crate) open_count: i32,
    pub(crate) flags: u32,
    pub(crate) event_nr: u32,
    pub(crate) padding: u32,
    pub(crate) dev: u64,
    pub(crate) name: [u8; 128],
    pub(crate) uuid: [u8; 129],
    pub(crate) data: [u8; 7],
}

/// How a volume is taken down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Mapped,
    Array,
    Loop,
    /// Of a kind that we cannot take down.
    Other,
}

impl Kind {
    fn of(name: &str) -> Self {
        let numbered = |prefix: &str| name.strip_prefix(prefix).is_some_and(is_number);
        if numbered("dm-") {
            Self::Mapped
        } else if name.starts_with("md") {
            // `md127`, and named ones: `md_d0`, `md_home`.
            Self::Array
        } else if numbered("loop") {
            Self::Loop
        } else {
            Self::Other
        }
    }
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

/// A block device that stands on others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume {
    /// The kernel's name, e.g. `dm-0`.
    pub name: String,
    /// What people call it, e.g. `vg-root`.
    pub label: Option<String>,
    device: (u32, u32),
    kind: Kind,
}

impl std::fmt::Display for Volume {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.label {
            Some(label) => write!(f, "{label} ({})", self.name),
            None => f.write_str(&self.name),
        }
    }
}

/// Something that could not be taken down.
#[derive(Debug, thiserror::Error)]
#[error("{what} stays: {source}")]
pub struct Stays {
    what: String,
    source: io::Error,
}

/// What stands on the whole disk `disk` (the kernel's name, e.g. `nbd0`), the uppermost first. All loop devices count: what
/// their files lie on cannot be seen, and at the end of a session nobody needs them.
///
/// # Errors
/// When sysfs cannot be read.
pub fn volumes(sysfs: &Path, disk: &str) -> io::Result<Vec<Volume>> {
    let folder = sysfs.join("block");
    let mut waiting: Vec<(String, BTreeSet<String>)> = Vec::new();
    for name in names(&folder)? {
        let block = folder.join(&name);
        let mut below: BTreeSet<String> = names(&block.join("slaves")).unwrap_or_default();
        if block.join("loop/backing_file").exists() {
            below.insert(disk.to_owned());
        }
        if name != disk && !below.is_empty() {
            waiting.push((name, below));
        }
    }
    let mut on = with_partitions(&folder, disk);
    let mut volumes = Vec::new();
    // Each round finds what stands on what the round before has found.
    loop {
        let (found, rest): (Vec<_>, Vec<_>) = waiting.into_iter().partition(|(_, below)| !below.is_disjoint(&on));
        if found.is_empty() {
            break;
        }
        for (name, _) in found {
            on.extend(with_partitions(&folder, &name));
            volumes.extend(volume(&folder.join(&name), name));
        }
        waiting = rest;
    }
    volumes.reverse();
    Ok(volumes)
}

fn volume(block: &Path, name: String) -> Option<Volume> {
    let device = read::attribute(&block.join("dev"))?;
    let (major, minor) = device.split_once(':')?;
    Some(Volume {
        label: read::attribute(&block.join("dm/name")).or_else(|| read::attribute(&block.join("loop/backing_file"))),
        device: (major.parse().ok()?, minor.parse().ok()?),
        kind: Kind::of(&name),
        name,
    })
}

/// A disk and its partitions.
fn with_partitions(folder: &Path, disk: &str) -> BTreeSet<String> {
    let block = folder.join(disk);
    let mut all = names(&block).unwrap_or_default();
    all.retain(|name| block.join(name).join("partition").exists());
    all.insert(disk.to_owned());
    all
}

fn names(folder: &Path) -> io::Result<BTreeSet<String>> {
    let entries = std::fs::read_dir(folder)?;
    Ok(entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect())
}

/// One round over all that stands on `disk`: swap space, then the volumes from the top. What stays, stays for now: taking
/// one thing down, or unmounting, may free another. `dev`, `sysfs` and `procfs` are where they are mounted.
///
/// # Errors
/// When it cannot be seen what there is.
pub fn take_down(sysfs: &Path, procfs: &Path, dev: &Path, disk: &str) -> io::Result<Vec<Stays>> {
    let volumes = volumes(sysfs, disk)?;
    let folder = sysfs.join("block");
    let ours: BTreeSet<String> = volumes
        .iter()
        .map(|volume| volume.name.as_str())
        .chain([disk])
        .flat_map(|name| with_partitions(&folder, name))
        .collect();
    let swaps = match read::bounded(&procfs.join("swaps"), MAX_SWAPS) {
        // A kernel without swap space.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        read => read?,
    };
    let mut stays = Vec::new();
    for space in swap_space(&swaps, &ours) {
        stays.extend(swap_off(&space).err().map(|source| Stays {
            what: format!("swap space {}", space.display()),
            source,
        }));
    }
    for volume in volumes {
        stays.extend(remove(dev, &volume).err().map(|source| Stays {
            what: volume.to_string(),
            source,
        }));
    }
    Ok(stays)
}

/// The swap space in the text of /proc/swaps that lies on the devices `ours`, or in a file.
fn swap_space(swaps: &[u8], ours: &BTreeSet<String>) -> Vec<PathBuf> {
    let line = |line: &[u8]| -> Option<PathBuf> {
        let mut fields = line.split(u8::is_ascii_whitespace).filter(|field| !field.is_empty());
        let path = PathBuf::from(OsString::from_vec(mount::unescape(fields.next()?)));
        let device = fields.next()? == b"partition";
        let name = path.file_name().and_then(OsStr::to_str);
        (!device || name.is_some_and(|name| ours.contains(name))).then_some(path)
    };
    // The first line is a heading.
    swaps.split(|&byte| byte == b'\n').skip(1).filter_map(line).collect()
}

fn swap_off(path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: the path ends with a NUL and outlives the call, which keeps nothing of it.
    match unsafe { libc::swapoff(path.as_ptr()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn remove(dev: &Path, volume: &Volume) -> io::Result<()> {
    match volume.kind {
        Kind::Mapped => remove_mapped(
            &File::options()
                .read(true)
                .write(true)
                .open(dev.join("mapper/control"))?,
            volume,
        ),
        Kind::Array => {
            // Exclusively: an array with a file system on it is refused here.
            let array = OpenOptions::new()
                .read(true)
                .custom_flags(libc::O_EXCL)
                .open(dev.join(&volume.name))?;
            rustix::fs::fsync(&array)?;
            // SAFETY: STOP_ARRAY takes no argument.
            Ok(unsafe { ioctl::ioctl(&array, ioctl::NoArg::<STOP_ARRAY>::new()) }?)
        }
        Kind::Loop => {
            let device = File::open(dev.join(&volume.name))?;
            rustix::fs::fsync(&device)?;
            // SAFETY: LOOP_CLR_FD takes no argument.
            Ok(unsafe { ioctl::ioctl(&device, ioctl::NoArg::<LOOP_CLR_FD>::new()) }?)
        }
        Kind::Other => Err(io::Error::other("this kind of volume cannot be taken down from here")),
    }
}

fn remove_mapped(control: &File, volume: &Volume) -> io::Result<()> {
    let mut request = DmIoctl {
        version: DM_VERSION,
        // 312, far below any limit.
        data_size: u32::try_from(size_of::<DmIoctl>()).map_err(io::Error::other)?,
        data_start: 0,
        target_count: 0,
        open_count: 0,
        flags: 0,
        event_nr: 0,
        padding: 0,
        dev: device_number(volume.device),
        // Without a name or UUID the number tells which.
        name: [0; 128],
        uuid: [0; 129],
        data: [0; 7],
    };
    // SAFETY: DM_DEV_REMOVE reads and writes one `struct dm_ioctl` of the size in its `data_size`; ours has that size and
    // layout, and lives until the call is over.
    let result = unsafe {
        libc::ioctl(
            control.as_raw_fd(),
            libc::Ioctl::from(DM_DEV_REMOVE),
            std::ptr::from_mut(&mut request),
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A device's number as the kernel's interfaces have it (`huge_encode_dev`).
pub(crate) fn device_number((major, minor): (u32, u32)) -> u64 {
    u64::from((minor & 0xff) | (major & 0xfff) << 8 | (minor & !0xff) << 12)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_numbers_are_those_of_the_kernels_headers() {
        assert_eq!(size_of::<DmIoctl>(), 312);
        assert_eq!(std::mem::offset_of!(DmIoctl, dev), 40);
        assert_eq!(std::mem::offset_of!(DmIoctl, name), 48);
        assert_eq!(std::mem::offset_of!(DmIoctl, uuid), 176);
        assert_eq!(std::mem::offset_of!(DmIoctl, data), 305);
        assert_eq!(DM_DEV_REMOVE, 0xc138_fd04);
        assert_eq!((STOP_ARRAY, LOOP_CLR_FD), (0x932, 0x4c01));
        assert_eq!(device_number((253, 3)), 0xfd03);
        assert_eq!(device_number((253, 0x123)), 0x0010_fd23);
    }

    /// A sysfs with these devices: name, and what it stands on.
    fn sysfs(devices: &[(&str, &[&str])], partitions: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let put = |path: &str, text: &str| {
            let path = dir.path().join("block").join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        for (number, (name, below)) in devices.iter().enumerate() {
            put(&format!("{name}/dev"), &format!("253:{number}\n"));
            for slave in *below {
                put(&format!("{name}/slaves/{slave}"), "");
            }
            if name.starts_with("loop") {
                put(&format!("{name}/loop/backing_file"), "/oldroot/image\n");
            } else if name.starts_with("dm-") {
                put(&format!("{name}/dm/name"), &format!("vol{number}\n"));
            }
        }
        for (disk, partition) in partitions {
            put(&format!("{disk}/{partition}/partition"), "1\n");
        }
        dir
    }

    #[test]
    fn only_what_stands_on_the_disk_is_found_and_the_uppermost_first() {
        let sysfs = sysfs(
            &[
                ("nbd0", &[]),
                ("sda", &[]),
                ("dm-0", &["dm-2"]),
                ("dm-1", &["sda1"]),
                ("dm-2", &["md127p1"]),
                ("md127", &["nbd0p2"]),
                ("loop0", &[]),
            ],
            &[("nbd0", "nbd0p2"), ("sda", "sda1"), ("md127", "md127p1")],
        );
        let found = volumes(sysfs.path(), "nbd0").unwrap();
        let names: Vec<_> = found.iter().map(|volume| volume.name.as_str()).collect();
        assert_eq!(names, ["dm-0", "dm-2", "md127", "loop0"]);
        assert_eq!(found[0].to_string(), "vol2 (dm-0)");
        assert_eq!(found[1].device, (253, 4));
        assert_eq!(found[3].kind, Kind::Loop);
    }

    #[test]
    fn a_ring_of_devices_ends() {
        let sysfs = sysfs(&[("nbd0", &[]), ("dm-0", &["dm-1", "nbd0"]), ("dm-1", &["dm-0"])], &[]);
        assert_eq!(volumes(sysfs.path(), "nbd0").unwrap().len(), 2);
    }

    #[test]
    fn a_loop_device_without_a_file_is_none() {
        let sysfs = sysfs(&[("nbd0", &[])], &[]);
        std::fs::create_dir_all(sysfs.path().join("block/loop0/loop")).unwrap();
        assert_eq!(volumes(sysfs.path(), "nbd0").unwrap(), []);
        assert!(volumes(Path::new("/nowhere"), "nbd0").is_err());
    }

    #[test]
    fn kinds_are_known_by_their_names() {
        let kinds = ["dm-12", "md0", "md_home", "loop3", "bcache0", "drbd1", "dm-x"].map(Kind::of);
        use Kind::{Array, Loop, Mapped, Other};
        assert_eq!(kinds, [Mapped, Array, Array, Loop, Other, Other, Other]);
    }

    const SWAPS: &[u8] = b"Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n\
        /dev/dm-1                               partition\t1048572\t\t0\t\t-2\n\
        /oldroot/swap\\040file                   file\t\t1048572\t\t0\t\t-3\n\
        /dev/sda2                               partition\t1048572\t\t0\t\t-4\n\
        /dev/zram0                              partition\t1048572\t\t0\t\t100\n";

    #[test]
    fn swap_space_of_other_disks_is_left_alone() {
        let ours = BTreeSet::from(["nbd0", "nbd0p1", "dm-1"].map(str::to_owned));
        assert_eq!(
            swap_space(SWAPS, &ours),
            [PathBuf::from("/dev/dm-1"), PathBuf::from("/oldroot/swap file")]
        );
    }

    #[test]
    fn what_stays_is_told_by_its_name() {
        let sysfs = sysfs(&[("nbd0", &[]), ("dm-0", &["nbd0"]), ("bcache0", &["dm-0"])], &[]);
        std::fs::write(sysfs.path().join("swaps"), "Filename\n/nowhere/swap file 1 0 -2\n").unwrap();
        let stays = take_down(sysfs.path(), sysfs.path(), Path::new("/nowhere"), "nbd0").unwrap();
        let told: Vec<_> = stays.iter().map(ToString::to_string).collect();
        assert!(told[0].contains("/nowhere/swap stays"), "{told:?}");
        assert!(told[1].starts_with("bcache0 stays: this kind"), "{told:?}");
        assert!(told[2].starts_with("vol1 (dm-0) stays: No such file"), "{told:?}");
        assert_eq!(told.len(), 3);
    }

    #[test]
    fn a_device_that_is_none_of_them_is_refused_by_the_kernel() {
        let volume = Volume {
            name: "null".to_owned(),
            label: None,
            device: (253, 0),
            kind: Kind::Mapped,
        };
        let file = tempfile::tempfile().unwrap();
        assert_eq!(
            remove_mapped(&file, &volume).unwrap_err().raw_os_error(),
            Some(libc::ENOTTY)
        );
        for kind in [Kind::Array, Kind::Loop] {
            assert!(remove(Path::new("/dev"), &Volume { kind, ..volume.clone() }).is_err());
        }
    }

    proptest! {
        #[test]
        fn any_table_of_swap_space_is_read(bytes: Vec<u8>) {
            swap_space(&bytes, &BTreeSet::new());
        }
    }
}
