//! Block devices, before they are overwritten: what they are, what is on them, who uses them.
//!
//! Read from sysfs and procfs, without udev. Documentation/ABI/stable/sysfs-block, proc_pid_mountinfo(5).

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use stiefel_sys::block;

/// sysfs counts sizes in these, whatever the disk's sectors are.
const SYSFS_SECTOR: u64 = 512;

/// Why a device must not be overwritten, or cannot be looked at.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// Not a block device.
    #[error("{} is no block device: give a whole disk such as /dev/sdb, or a new file's name", path.display())]
    NotABlockDevice {
        /// Its path.
        path: PathBuf,
    },
    /// A partition, or something on top of disks.
    #[error("{} is {what}, not a whole disk: give the disk itself", path.display())]
    NotAWholeDisk {
        /// Its path.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// Somebody uses it.
    #[error("{} is in use ({}): unmount it, or give another disk", path.display(), uses.join(", "))]
    InUse {
        /// Its path.
        path: PathBuf,
        /// Who, each in a few words.
        uses: Vec<String>,
    },
    /// Built into the machine, as far as the kernel knows.
    #[error("{} ({model}) is no removable disk: check that it is the right one, then repeat with --allow-fixed", path.display())]
    Fixed {
        /// Its path.
        path: PathBuf,
        /// What it calls itself.
        model: String,
    },
    /// Its write protection is on.
    #[error("{} is write-protected: look for a switch on it", path.display())]
    ReadOnly {
        /// Its path.
        path: PathBuf,
    },
    /// Neither 512 nor 4096 bytes.
    #[error("{} has sectors of {bytes} bytes, which no FAT file system for EFI has: use another disk", path.display())]
    SectorSize {
        /// Its path.
        path: PathBuf,
        /// Length of a logical sector.
        bytes: u64,
    },
    /// Another device has taken its name since it was looked at.
    #[error("{} is another device than a moment ago: try again", path.display())]
    Changed {
        /// Its path.
        path: PathBuf,
    },
    /// The kernel's description cannot be read.
    #[error("cannot look at {}", path.display())]
    Look {
        /// The device, or the file that describes it.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A partition on a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartitionInfo {
    /// The kernel's name, such as `sdb1`.
    pub name: String,
    /// Its length.
    pub bytes: u64,
}

/// A whole disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInfo {
    /// As it was given.
    pub path: PathBuf,
    /// The kernel's name, such as `sdb`.
    pub name: String,
    /// What it calls itself; empty if it does not.
    pub model: String,
    /// Its length.
    pub bytes: u64,
    /// Length of its logical sectors.
    pub sector_bytes: u64,
    /// Whether it is a removable medium, an SD card, or on USB.
    pub removable: bool,
    /// Whether it is write-protected.
    pub read_only: bool,
    /// What will be lost.
    pub partitions: Vec<PartitionInfo>,
    /// Who uses it, each in a few words; empty if nobody.
    pub uses: Vec<String>,
    /// Its serial number; empty if it has none.
    serial: String,
    /// The kernel's count of disks when this one appeared, never given twice (Linux 5.15); 0 if it does not count.
    diskseq: u64,
    /// Its device number.
    device: u64,
}

impl fmt::Display for DeviceInfo {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: u64| bytes >> 20;
        let model = self.model_text();
        let kind = if self.removable { "removable" } else { "fixed" };
        write!(out, "{}: {model}, {} MiB, {kind}", self.path.display(), mib(self.bytes))?;
        for partition in &self.partitions {
            write!(out, "\n  {}: {} MiB", partition.name, mib(partition.bytes))?;
        }
        self.uses.iter().try_for_each(|used| write!(out, "\n  in use: {used}"))
    }
}

impl DeviceInfo {
    fn model_text(&self) -> &str {
        if self.model.is_empty() {
            "unknown model"
        } else {
            &self.model
        }
    }

    /// Whether it may be overwritten.
    pub fn check(&self, allow_fixed: bool) -> Result<(), DeviceError> {
        let path = self.path.clone();
        if !self.uses.is_empty() {
            return Err(DeviceError::InUse {
                path,
                uses: self.uses.clone(),
            });
        }
        if self.read_only {
            return Err(DeviceError::ReadOnly { path });
        }
        if !self.removable && !allow_fixed {
            return Err(DeviceError::Fixed {
                path,
                model: self.model_text().to_owned(),
            });
        }
        Ok(())
    }

    /// Whether the opened device is still the disk that was looked at, and still free. Names and numbers are given to the
    /// next disk when one is unplugged, so the disk itself is compared.
    pub(super) fn check_same(&self, opened: &File, allow_fixed: bool) -> Result<(), DeviceError> {
        let found = opened.metadata().map_err(|source| DeviceError::Look {
            path: self.path.clone(),
            source,
        })?;
        self.check_same_in(&Roots::default(), found.rdev(), allow_fixed)
    }

    fn check_same_in(&self, roots: &Roots, device: u64, allow_fixed: bool) -> Result<(), DeviceError> {
        let found = roots.describe(&self.path, device)?;
        if found.identity() == self.identity() {
            found.check(allow_fixed)
        } else {
            Err(DeviceError::Changed {
                path: self.path.clone(),
            })
        }
    }

    /// What no other disk has at the same time, or the next one under the same name.
    fn identity(&self) -> (u64, u64, u64, u64, &str, &str) {
        (
            self.diskseq,
            self.device,
            self.bytes,
            self.sector_bytes,
            &self.model,
            &self.serial,
        )
    }
}

/// Describes a whole disk, so that a user can be shown what will be lost.
///
/// # Errors
/// `NotABlockDevice`, `NotAWholeDisk`, or `Look`. A disk in use is described as such, not refused.
pub fn describe(path: &Path) -> Result<DeviceInfo, DeviceError> {
    let look = |source| DeviceError::Look {
        path: path.to_owned(),
        source,
    };
    let metadata = fs::metadata(path).map_err(look)?;
    if !metadata.file_type().is_block_device() {
        return Err(DeviceError::NotABlockDevice { path: path.to_owned() });
    }
    let mut info = Roots::default().describe(path, metadata.rdev())?;
    // The kernel knows best, e.g. of further disks of a btrfs.
    let exclusive = i32::try_from(rustix::fs::OFlags::EXCL.bits()).unwrap_or_default();
    match OpenOptions::new().read(true).custom_flags(exclusive).open(path) {
        Err(error) if error.kind() == io::ErrorKind::ResourceBusy && info.uses.is_empty() => {
            info.uses.push("the kernel says so".to_owned());
        }
        Err(error) if error.kind() != io::ErrorKind::ResourceBusy => return Err(look(error)),
        _ => {}
    }
    Ok(info)
}

/// Where the kernel describes itself; elsewhere in tests.
struct Roots {
    sys: PathBuf,
    proc: PathBuf,
}

impl Default for Roots {
    fn default() -> Self {
        Self {
            sys: "/sys".into(),
            proc: "/proc".into(),
        }
    }
}

impl Roots {
    fn describe(&self, path: &Path, device: u64) -> Result<DeviceInfo, DeviceError> {
        let number = (rustix::fs::major(device), rustix::fs::minor(device));
        let link = self.sys.join(format!("dev/block/{}:{}", number.0, number.1));
        let dir = link
            .canonicalize()
            .map_err(|source| DeviceError::Look { path: link, source })?;
        let others = [
            ("partition", "a partition"),
            ("dm", "a device-mapper device"),
            ("md", "an array of disks"),
        ];
        if let Some((_, what)) = others.into_iter().find(|(file, _)| dir.join(file).exists()) {
            return Err(DeviceError::NotAWholeDisk {
                path: path.to_owned(),
                what,
            });
        }
        let disk = block::whole_disks_of_device(&self.sys, number)
            .map_err(|error| DeviceError::Look {
                path: path.to_owned(),
                source: io::Error::other(error),
            })?
            .into_iter()
            .find(|disk| disk.device == number)
            .ok_or_else(|| DeviceError::NotAWholeDisk {
                path: path.to_owned(),
                what: "something on top of other disks",
            })?;
        let mut parts: Vec<PathBuf> = fs::read_dir(&dir)
            .map_err(|source| DeviceError::Look {
                path: dir.clone(),
                source,
            })?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|entry| entry.join("partition").exists())
            .collect();
        parts.sort();
        let partitions: Vec<_> = parts
            .iter()
            .map(|part| PartitionInfo {
                name: base_name(part),
                bytes: number_in(&part.join("size")).saturating_mul(SYSFS_SECTOR),
            })
            .collect();
        let words = ["vendor", "model", "name"].map(|file| text_in(&dir.join("device").join(file)));
        let words: Vec<_> = words
            .iter()
            .map(String::as_str)
            .filter(|word| !word.is_empty())
            .collect();
        let on_usb = dir
            .components()
            .any(|part| part.as_os_str().to_string_lossy().starts_with("usb"));
        let sd_card = text_in(&dir.join("device/type")) == "SD";
        Ok(DeviceInfo {
            path: path.to_owned(),
            model: words.join(" "),
            bytes: disk.size,
            sector_bytes: disk.logical_block_size.into(),
            removable: disk.removable || on_usb || sd_card,
            read_only: disk.read_only,
            uses: self.uses(std::iter::once(&dir).chain(&parts))?,
            serial: disk.serial.unwrap_or_else(|| usb_serial(&dir)),
            diskseq: number_in(&dir.join("diskseq")),
            partitions,
            name: disk.name,
            device,
        })
    }

    /// Who uses any of these devices (folders in sysfs).
    fn uses<'a>(&self, dirs: impl Iterator<Item = &'a PathBuf>) -> Result<Vec<String>, DeviceError> {
        let required = |name: &str| {
            let path = self.proc.join(name);
            fs::read_to_string(&path).map_err(|source| DeviceError::Look { path, source })
        };
        let mounts = required("self/mountinfo")?;
        // Kernels without swap have no such file.
        let swaps = fs::read_to_string(self.proc.join("swaps")).unwrap_or_default();
        let mut uses = Vec::new();
        for dir in dirs {
            let (name, number) = (base_name(dir), text_in(&dir.join("dev")));
            for line in mounts.lines() {
                let fields: Vec<_> = line.split(' ').collect();
                let source = line
                    .split_once(" - ")
                    .and_then(|(_, rest)| rest.split(' ').nth(1))
                    .unwrap_or_default();
                if fields.get(2) == Some(&number.as_str()) || device_name(source) == name {
                    let place = fields.get(4).copied().unwrap_or_default().replace("\\040", " ");
                    uses.push(format!("{name} is mounted at {place}"));
                }
            }
            if swaps
                .lines()
                .skip(1)
                .any(|line| device_name(line.split(' ').next().unwrap_or_default()) == name)
            {
                uses.push(format!("{name} is swap space"));
            }
            let holders = fs::read_dir(dir.join("holders"))
                .into_iter()
                .flatten()
                .filter_map(Result::ok);
            uses.extend(holders.map(|holder| format!("{name} is part of {}", holder.file_name().to_string_lossy())));
        }
        Ok(uses)
    }
}

/// The kernel's name of a device that is named by a path, which may be a link such as `/dev/disk/by-uuid/…`.
fn device_name(path: &str) -> String {
    if !path.starts_with("/dev/") {
        return String::new();
    }
    base_name(&fs::canonicalize(path).unwrap_or_else(|_| path.into()))
}

fn base_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// The serial number of the USB device that a disk belongs to; empty if there is none.
fn usb_serial(dir: &Path) -> String {
    // Only USB devices have both files.
    dir.ancestors()
        .find(|folder| folder.join("idVendor").exists())
        .map(|usb| text_in(&usb.join("serial")))
        .unwrap_or_default()
}

/// A sysfs file's text; empty if there is none.
fn text_in(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

/// A sysfs file's number; 0 if there is none.
fn number_in(path: &Path) -> u64 {
    text_in(path).parse().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    const MOUNTINFO: &str = "22 1 254:1 / / rw - ext4 /dev/vda1 rw\n";

    /// sysfs and procfs of a machine with one USB stick `sdz` (8:400) with a partition, and a partitionless fixed disk `vdz` (254:32).
    fn machine() -> (tempfile::TempDir, Roots) {
        let root = tempfile::tempdir().unwrap();
        let put = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        let stick = "sys/devices/pci0/usb1/1-1/block/sdz";
        for (file, text) in [
            ("dev", "8:400\n"),
            ("size", "2097152\n"),
            ("removable", "1\n"),
            ("diskseq", "9\n"),
            ("ro", "0\n"),
            ("queue/logical_block_size", "512\n"),
            ("device/vendor", "Acme    \n"),
            ("device/model", "Stick  \n"),
            ("sdz1/partition", "1\n"),
            ("sdz1/dev", "8:401\n"),
            ("sdz1/size", "2048\n"),
        ] {
            put(&format!("{stick}/{file}"), text);
        }
        put("sys/devices/pci0/usb1/1-1/idVendor", "1234\n");
        put("sys/devices/pci0/usb1/1-1/serial", "S1\n");
        let disk = "sys/devices/pci0/virtio0/block/vdz";
        for (file, text) in [
            ("dev", "254:32\n"),
            ("size", "4194304\n"),
            ("removable", "0\n"),
            ("queue/logical_block_size", "4096\n"),
        ] {
            put(&format!("{disk}/{file}"), text);
        }
        put("proc/self/mountinfo", MOUNTINFO);
        put("proc/swaps", "Filename Type Size Used Priority\n");
        let links = root.path().join("sys/dev/block");
        fs::create_dir_all(&links).unwrap();
        for (number, place) in [("8:400", stick), ("8:401", &format!("{stick}/sdz1")), ("254:32", disk)] {
            symlink(root.path().join(place), links.join(number)).unwrap();
        }
        let roots = Roots {
            sys: root.path().join("sys"),
            proc: root.path().join("proc"),
        };
        (root, roots)
    }

    fn stick(roots: &Roots) -> Result<DeviceInfo, DeviceError> {
        roots.describe(Path::new("/dev/sdz"), rustix::fs::makedev(8, 400))
    }

    #[test]
    fn a_stick_is_described_and_may_be_written() {
        let (_root, roots) = machine();
        let info = stick(&roots).unwrap();
        assert_eq!((info.name.as_str(), info.model.as_str()), ("sdz", "Acme Stick"));
        assert_eq!((info.bytes, info.sector_bytes, info.removable), (1 << 30, 512, true));
        assert_eq!(
            info.partitions,
            [PartitionInfo {
                name: "sdz1".to_owned(),
                bytes: 1 << 20
            }]
        );
        assert_eq!(
            info.to_string(),
            "/dev/sdz: Acme Stick, 1024 MiB, removable\n  sdz1: 1 MiB"
        );
        info.check(false).unwrap();
    }

    #[test]
    fn a_partition_is_no_whole_disk() {
        let (_root, roots) = machine();
        let error = roots
            .describe(Path::new("/dev/sdz1"), rustix::fs::makedev(8, 401))
            .unwrap_err();
        assert!(
            matches!(
                error,
                DeviceError::NotAWholeDisk {
                    what: "a partition",
                    ..
                }
            ),
            "{error}"
        );
    }

    #[test]
    fn mounted_swapped_and_held_disks_are_refused() {
        for (file, text, word) in [
            (
                "proc/self/mountinfo",
                "30 22 8:401 / /media/my\\040stick rw - vfat /dev/sdz1 rw\n",
                "sdz1 is mounted at /media/my stick",
            ),
            (
                "proc/self/mountinfo",
                "30 22 0:55 /@ /mnt rw shared:1 - btrfs /dev/sdz1 rw\n",
                "sdz1 is mounted at /mnt",
            ),
            (
                "proc/swaps",
                "Filename Type\n/dev/sdz1 partition 1 0 -2\n",
                "sdz1 is swap space",
            ),
            (
                "sys/devices/pci0/usb1/1-1/block/sdz/sdz1/holders/dm-0",
                "",
                "sdz1 is part of dm-0",
            ),
        ] {
            let (root, roots) = machine();
            let path = root.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
            let info = stick(&roots).unwrap();
            assert_eq!(info.uses, [word]);
            let error = info.check(true).unwrap_err();
            assert!(matches!(error, DeviceError::InUse { .. }), "{error}");
        }
    }

    #[test]
    fn fixed_and_protected_disks_are_refused() {
        let (root, roots) = machine();
        let disk = roots
            .describe(Path::new("/dev/vdz"), rustix::fs::makedev(254, 32))
            .unwrap();
        assert_eq!(disk.sector_bytes, 4096);
        assert!(matches!(disk.check(false), Err(DeviceError::Fixed { .. })));
        disk.check(true).unwrap();
        fs::write(root.path().join("sys/devices/pci0/usb1/1-1/block/sdz/ro"), "1\n").unwrap();
        assert!(matches!(
            stick(&roots).unwrap().check(true),
            Err(DeviceError::ReadOnly { .. })
        ));
    }

    #[test]
    fn without_a_list_of_mounts_nothing_counts_as_free() {
        let (root, roots) = machine();
        fs::remove_file(root.path().join("proc/self/mountinfo")).unwrap();
        assert!(matches!(stick(&roots), Err(DeviceError::Look { .. })));
    }

    #[test]
    fn another_disk_under_the_same_name_is_not_the_one_that_was_shown() {
        let number = rustix::fs::makedev(8, 400);
        let (_root, roots) = machine();
        let shown = stick(&roots).unwrap();
        shown.check_same_in(&roots, number, false).unwrap();
        for (file, text) in [
            ("block/sdz/diskseq", "10\n"),
            ("block/sdz/size", "4194304\n"),
            ("block/sdz/device/model", "Other\n"),
            ("serial", "S2\n"),
        ] {
            let (root, roots) = machine();
            fs::write(root.path().join("sys/devices/pci0/usb1/1-1").join(file), text).unwrap();
            let error = shown.check_same_in(&roots, number, true).unwrap_err();
            assert!(matches!(error, DeviceError::Changed { .. }), "{file}: {error}");
        }
        let error = shown
            .check_same_in(&roots, rustix::fs::makedev(254, 32), true)
            .unwrap_err();
        assert!(matches!(error, DeviceError::Changed { .. }), "{error}");
        let error = shown
            .check_same_in(&roots, rustix::fs::makedev(8, 416), true)
            .unwrap_err();
        assert!(matches!(error, DeviceError::Look { .. }), "unplugged: {error}");
    }

    #[test]
    fn a_disk_that_was_mounted_since_it_was_shown_is_refused() {
        let (root, roots) = machine();
        let shown = stick(&roots).unwrap();
        let mounted = "30 22 8:401 / /media rw - vfat /dev/sdz1 rw\n";
        fs::write(root.path().join("proc/self/mountinfo"), mounted).unwrap();
        let error = shown
            .check_same_in(&roots, rustix::fs::makedev(8, 400), true)
            .unwrap_err();
        assert!(matches!(error, DeviceError::InUse { .. }), "{error}");
    }

    #[test]
    fn what_lies_on_other_disks_is_no_whole_disk() {
        let (root, roots) = machine();
        let slaves = root.path().join("sys/devices/pci0/virtio0/block/vdz/slaves");
        fs::create_dir_all(&slaves).unwrap();
        symlink(
            root.path().join("sys/devices/pci0/usb1/1-1/block/sdz"),
            slaves.join("sdz"),
        )
        .unwrap();
        let error = roots
            .describe(Path::new("/dev/vdz"), rustix::fs::makedev(254, 32))
            .unwrap_err();
        assert!(matches!(error, DeviceError::NotAWholeDisk { .. }), "{error}");
    }
}
