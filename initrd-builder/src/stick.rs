//! The stick: a disk image, or a whole USB stick, from which the desktop boots.
//!
//! GPT with one EFI system partition; in it, as `/EFI/BOOT/BOOTX64.EFI`, kernel, ramdisk, handover and command line in one
//! program (see `uki`). Firmware starts that name from removable disks without any configuration.
//! Specification: UEFI 2.10, sections 3.5 (removable media), 5 (GPT), 13.3 (FAT).
//!
//! Or that program alone, as one file: for a boot entry of the firmware's, iPXE, or an EFI system partition that is there.
//!
//! The image holds the stick's key: it is 0600, and wiped from memory. The boot code of the protective MBR and the sectors up
//! to the first MiB stay free for a BIOS loader. Nothing is written before everything was checked; the partition table comes
//! last, so that an interrupted write leaves no stick that seems whole.

mod device;
mod esp;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use gptman::{GPT, GPTPartitionEntry};
use rustix::fs::OFlags;
use stiefel_shared::cpio;
use stiefel_sys::wipe;
use zeroize::Zeroizing;

use crate::uki::{self, Uki, UkiError};
pub use device::{DeviceError, DeviceInfo, PartitionInfo, describe};

/// Where Debian's package systemd-boot-efi (and Arch's and Fedora's systemd) put the EFI stub.
pub const DEFAULT_STUB: &str = "/usr/lib/systemd/boot/efi/linuxx64.efi.stub";
/// GUID of EFI system partitions, as it is stored.
const ESP_TYPE: [u8; 16] = [
    0x28, 0x73, 0x2a, 0xc1, 0x1f, 0xf8, 0xd2, 0x11, 0xba, 0x4b, 0x00, 0xa0, 0xc9, 0x3e, 0xc9, 0x3b,
];
/// Name of the partition.
const PARTITION_NAME: &str = "stiefel";
/// Where the partition begins, and what stays free behind it for the second partition table, in bytes.
const MIB: u64 = 1 << 20;
/// Bytes written at a time.
const CHUNK: usize = 4 << 20;
/// The largest input file taken, in bytes.
const INPUT_MAX: u64 = 1 << 30;
/// First bytes of zstd compressed data.
const ZSTD_MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// What goes onto a stick.
pub struct StickOptions {
    /// The kernel, with its EFI stub.
    pub kernel: PathBuf,
    /// The compressed ramdisk.
    pub ramdisk: PathBuf,
    /// An uncompressed cpio archive with role and key.
    pub handover: Zeroizing<Vec<u8>>,
    /// The kernel's command line.
    pub cmdline: String,
    /// systemd's EFI stub; [`DEFAULT_STUB`] if `None`.
    pub stub: Option<PathBuf>,
}

/// What was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StickReport {
    /// Length of the image; of a device, the part that is used.
    pub bytes: u64,
    /// Length of the EFI program.
    pub program_bytes: u64,
    /// The file system did not keep a file's mode 0600 (FAT): others may read the key.
    pub exposed: bool,
}

/// Gets how many bytes are written, of how many.
pub type Progress<'a> = &'a mut dyn FnMut(u64, u64);

/// Why no stick was written.
#[derive(Debug, thiserror::Error)]
pub enum StickError {
    /// An input file cannot be read.
    #[error("cannot read {what} {}{}", path.display(), hint(what))]
    Read {
        /// Which one.
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The ramdisk is not what `stiefel build` makes.
    #[error("{} is no zstd compressed ramdisk: run stiefel build", path.display())]
    NotARamdisk {
        /// Its path.
        path: PathBuf,
    },
    /// The handover is no archive.
    #[error("the handover is no cpio archive")]
    BadHandover {
        /// Why.
        #[source]
        source: cpio::ReadError,
    },
    /// The EFI program cannot be put together.
    #[error(transparent)]
    Uki(#[from] UkiError),
    /// No removable-disk name is known for the stub's machine.
    #[error(
        "the EFI stub is for a machine (PE {machine:#06x}) that sticks are not made for: use that for x86-64 or arm64"
    )]
    UnknownMachine {
        /// The PE machine number.
        machine: u16,
    },
    /// The image exists already.
    #[error("{} exists already: choose another name, or repeat with --overwrite", path.display())]
    Exists {
        /// Its path.
        path: PathBuf,
    },
    /// A file below /dev would be lost at the next boot, and a device was meant.
    #[error("there is no device {}: is the stick plugged in? `lsblk` lists the disks", path.display())]
    NoSuchDevice {
        /// Its path.
        path: PathBuf,
    },
    /// Something that must not be replaced by a file.
    #[error("{} is no ordinary file: give a new file's name, or a whole disk such as /dev/sdb", path.display())]
    NotAFile {
        /// Its path.
        path: PathBuf,
    },
    /// The device must not be written to, or cannot be looked at.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The device is too small.
    #[error("{} has {have} bytes, {need} are needed: use a larger stick", path.display())]
    TooSmall {
        /// The device.
        path: PathBuf,
        /// Its size.
        have: u64,
        /// What is needed.
        need: u64,
    },
    /// The file system cannot be made.
    #[error("cannot make the FAT file system of the stick")]
    Fat {
        /// Why.
        #[source]
        source: hadris_fat::Error,
    },
    /// The partition table cannot be made.
    #[error("cannot write the partition table to {}", path.display())]
    Gpt {
        /// Image or device.
        path: PathBuf,
        /// Why.
        #[source]
        source: gptman::Error,
    },
    /// The system gives no random numbers.
    #[error("the system gives no random numbers for the partition table")]
    Random {
        /// Why.
        #[source]
        source: getrandom::Error,
    },
    /// Writing failed.
    #[error("cannot write {}", path.display())]
    Write {
        /// Image or device.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

fn hint(what: &str) -> &'static str {
    match what {
        STUB => ": install systemd's EFI stub (Debian: systemd-boot-efi; Arch, Fedora: systemd, systemd-boot)",
        _ => ": run stiefel build",
    }
}

const STUB: &str = "the EFI stub";
const KERNEL: &str = "the kernel";
const RAMDISK: &str = "the ramdisk";

/// Whether an image file may be written to `path`.
///
/// # Errors
/// [`StickError::NoSuchDevice`], [`StickError::NotAFile`], [`StickError::Exists`].
pub fn check_image_path(path: &Path, overwrite: bool) -> Result<(), StickError> {
    let path_of = || path.to_owned();
    match path.symlink_metadata() {
        Ok(found) if !found.is_file() => return Err(StickError::NotAFile { path: path_of() }),
        Ok(_) if !overwrite => return Err(StickError::Exists { path: path_of() }),
        _ => {}
    }
    if is_among_devices(folder_of(path)) {
        return Err(StickError::NoSuchDevice { path: path_of() });
    }
    Ok(())
}

fn folder_of(path: &Path) -> &Path {
    path.parent()
        .filter(|dir| !dir.as_os_str().is_empty())
        .unwrap_or(Path::new("."))
}

/// Whether a folder is below /dev, or on the kernel's file system of devices, mounted elsewhere.
fn is_among_devices(folder: &Path) -> bool {
    let file_system = |path: &Path| fs::metadata(path).map(|meta| meta.dev()).ok();
    let folder = folder.canonicalize().unwrap_or_else(|_| folder.to_owned());
    let devices = file_system(Path::new("/dev")).filter(|dev| Some(*dev) != file_system(Path::new("/")));
    folder.starts_with("/dev") || (devices.is_some() && file_system(&folder) == devices)
}

/// Writes an image file for the whole disk, 0600; an existing one, which is wiped, only if `overwrite`. Needs neither root nor loop devices.
///
/// # Errors
/// See [`StickError`]. The file is written beside, synced and renamed: it is whole or not there.
pub fn write_image(
    options: &StickOptions,
    path: &Path,
    overwrite: bool,
    progress: Progress,
) -> Result<StickReport, StickError> {
    check_image_path(path, overwrite)?;
    let content = Content::new(options, esp::Sector::S512)?;
    let exposed = create(path, overwrite, |file, failed| {
        file.set_len(content.disk_bytes()).map_err(failed)?;
        content.write(file, path, progress)
    })?;
    Ok(StickReport {
        exposed,
        ..content.report()
    })
}

/// Writes the EFI program alone, as one file, 0600; an existing one, which is wiped, only if `overwrite`.
///
/// # Errors
/// See [`StickError`]. The file is written beside, synced and renamed: it is whole or not there.
pub fn write_program(
    options: &StickOptions,
    path: &Path,
    overwrite: bool,
    progress: Progress,
) -> Result<StickReport, StickError> {
    check_image_path(path, overwrite)?;
    let program = program(options)?;
    let total = program.len() as u64;
    let exposed = create(path, overwrite, |file, failed| {
        let mut done = 0;
        for chunk in program.chunks(CHUNK) {
            file.write_all(chunk).map_err(failed)?;
            done += chunk.len() as u64;
            progress(done, total);
        }
        file.sync_all().map_err(failed)
    })?;
    Ok(StickReport {
        bytes: total,
        program_bytes: total,
        exposed,
    })
}

/// Lets `fill` write a file beside `path`, which also syncs it, and gives it its name; whether others can read it then.
fn create(
    path: &Path,
    overwrite: bool,
    fill: impl FnOnce(&mut File, &dyn Fn(io::Error) -> StickError) -> Result<(), StickError>,
) -> Result<bool, StickError> {
    let failed = |source| StickError::Write {
        path: path.to_owned(),
        source,
    };
    let dir = folder_of(path);
    // A temporary file is 0600 from the beginning, and stays so.
    let mut file = tempfile::Builder::new()
        .prefix(".stiefel-")
        .tempfile_in(dir)
        .map_err(failed)?;
    fill(file.as_file_mut(), &failed)?;
    let mode = file.as_file().metadata().map_err(failed)?.mode();
    if overwrite {
        wipe_earlier(path).map_err(failed)?;
    }
    let renamed = if overwrite {
        file.persist(path)
    } else {
        file.persist_noclobber(path)
    };
    renamed.map_err(|error| match error.error.kind() {
        io::ErrorKind::AlreadyExists => StickError::Exists { path: path.to_owned() },
        _ => failed(error.error),
    })?;
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(failed)?;
    Ok(mode & 0o077 != 0)
}

/// Takes an earlier file away, and the key in it off the disk. One that has another name, too, keeps its content for that.
fn wipe_earlier(path: &Path) -> io::Result<()> {
    // Another user may put a link in its place.
    let flags = OFlags::NOFOLLOW.union(OFlags::NONBLOCK).union(OFlags::CLOEXEC);
    let flags = i32::try_from(flags.bits()).unwrap_or_default();
    let earlier = match OpenOptions::new().write(true).custom_flags(flags).open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        earlier => earlier?,
    };
    let found = earlier.metadata()?;
    if found.is_file() && found.nlink() == 1 {
        wipe::opened(&earlier)?;
    }
    drop(earlier);
    fs::remove_file(path)
}

/// Writes to a whole block device: all that was on it is lost. `shown` is what [`describe`] said and the user agreed to;
/// the same disk is written, or none.
///
/// # Errors
/// See [`StickError`]. A disk in use, one that is not removable (unless `allow_fixed`), and another than the one that was
/// shown are refused.
pub fn write_device(
    options: &StickOptions,
    shown: &DeviceInfo,
    allow_fixed: bool,
    progress: Progress,
) -> Result<StickReport, StickError> {
    shown.check(allow_fixed)?;
    let (info, path) = (shown, shown.path.as_path());
    let content = Content::new(options, esp::Sector::of(info.sector_bytes, path)?)?;
    if info.bytes < content.disk_bytes() {
        return Err(StickError::TooSmall {
            path: path.to_owned(),
            have: info.bytes,
            need: content.disk_bytes(),
        });
    }
    let failed = |source| StickError::Write {
        path: path.to_owned(),
        source,
    };
    // On a block device O_EXCL fails if anybody in the kernel has it: what was mounted since the check is not overwritten.
    let flags = OFlags::EXCL.union(OFlags::CLOEXEC);
    let flags = i32::try_from(flags.bits()).unwrap_or_default();
    let mut device = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(flags)
        .open(path)
        .map_err(failed)?;
    info.check_same(&device, allow_fixed)?;
    // Traces of older file systems and tables at both ends would confuse whoever looks at the disk.
    let zeros = vec![0; usize::try_from(MIB).unwrap_or_default()];
    for at in [0, info.bytes - MIB] {
        device.write_all_at(&zeros, at).map_err(failed)?;
    }
    content.write(&mut device, path, progress)?;
    // The table is on the disk already; a kernel that cannot re-read it now will see it at the next plug.
    let _ = gptman::linux::reread_partition_table(&mut device);
    Ok(content.report())
}

/// Kernel, ramdisk, handover and command line in one EFI program, secret like the handover in it.
///
/// # Errors
/// [`StickError`], as far as it is about what goes in.
pub fn program(options: &StickOptions) -> Result<Zeroizing<Vec<u8>>, StickError> {
    let stub = read(STUB, options.stub.as_deref().unwrap_or(Path::new(DEFAULT_STUB)))?;
    let kernel = read(KERNEL, &options.kernel)?;
    let ramdisk = read(RAMDISK, &options.ramdisk)?;
    if !ramdisk.starts_with(&ZSTD_MAGIC) {
        return Err(StickError::NotARamdisk {
            path: options.ramdisk.clone(),
        });
    }
    if let Some(source) = cpio::Reader::new(&options.handover).find_map(Result::err) {
        return Err(StickError::BadHandover { source });
    }
    let os_release = concat!(
        "ID=stiefel\nNAME=stiefel\nPRETTY_NAME=\"stiefel ",
        env!("CARGO_PKG_VERSION"),
        "\"\nVERSION_ID=",
        env!("CARGO_PKG_VERSION"),
        "\n"
    );
    let initrd = [ramdisk.as_slice(), options.handover.as_slice()];
    let uki = Uki {
        stub: &stub,
        os_release,
        cmdline: &options.cmdline,
        initrd: &initrd,
        kernel: &kernel,
    };
    Ok(uki.assemble()?)
}

/// What is written, all in memory.
struct Content {
    esp: Zeroizing<Vec<u8>>,
    sector: esp::Sector,
    program_bytes: u64,
    disk_guid: [u8; 16],
    partition_guid: [u8; 16],
}

impl Content {
    fn new(options: &StickOptions, sector: esp::Sector) -> Result<Self, StickError> {
        let program = program(options)?;
        let name = match uki::machine(&program)? {
            0x8664 => "BOOTX64.EFI",
            0xaa64 => "BOOTAA64.EFI",
            machine => return Err(StickError::UnknownMachine { machine }),
        };
        let [mut disk_guid, mut partition_guid, mut volume] = [[0; 16]; 3];
        for random in [&mut disk_guid, &mut partition_guid, &mut volume] {
            getrandom::fill(random).map_err(|source| StickError::Random { source })?;
        }
        // Version 4 (random) of RFC 9562, in the mixed byte order of GPT.
        for guid in [&mut disk_guid, &mut partition_guid] {
            guid[7] = guid[7] & 0x0f | 0x40;
            guid[8] = guid[8] & 0x3f | 0x80;
        }
        let [a, b, c, d, ..] = volume;
        let esp = esp::build(&program, name, sector, u32::from_le_bytes([a, b, c, d]))
            .map_err(|source| StickError::Fat { source })?;
        Ok(Self {
            esp,
            sector,
            program_bytes: program.len() as u64,
            disk_guid,
            partition_guid,
        })
    }

    /// Bytes of the smallest disk that holds it.
    fn disk_bytes(&self) -> u64 {
        MIB + self.esp.len() as u64 + MIB
    }

    fn report(&self) -> StickReport {
        StickReport {
            bytes: self.disk_bytes(),
            program_bytes: self.program_bytes,
            exposed: false,
        }
    }

    /// Writes to a file or device of the right length whose first and last MiB are zero, and syncs.
    fn write(&self, disk: &mut File, path: &Path, progress: Progress) -> Result<(), StickError> {
        let failed = |source| StickError::Write {
            path: path.to_owned(),
            source,
        };
        let broken = |source| StickError::Gpt {
            path: path.to_owned(),
            source,
        };
        // Behind the last byte that is not zero there are only free clusters: their content does not matter.
        let used = self.esp.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        let used = self
            .esp
            .get(..used.next_multiple_of(CHUNK).min(self.esp.len()))
            .unwrap_or_default();
        let total = used.len() as u64;
        disk.seek(SeekFrom::Start(MIB)).map_err(failed)?;
        let mut done = 0;
        for chunk in used.chunks(CHUNK) {
            disk.write_all(chunk).map_err(failed)?;
            done += chunk.len() as u64;
            progress(done, total);
        }
        disk.sync_data().map_err(failed)?;

        let sector = self.sector.bytes();
        let mut table = GPT::new_from(disk, sector, self.disk_guid).map_err(broken)?;
        table[1] = GPTPartitionEntry {
            partition_type_guid: ESP_TYPE,
            unique_partition_guid: self.partition_guid,
            starting_lba: MIB / sector,
            ending_lba: (MIB + self.esp.len() as u64) / sector - 1,
            attribute_bits: 0,
            partition_name: PARTITION_NAME.into(),
        };
        table.write_into(disk).map_err(broken)?;
        GPT::write_protective_mbr_into(disk, sector).map_err(broken)?;
        disk.sync_all().map_err(failed)
    }
}

fn read(what: &'static str, path: &Path) -> Result<Vec<u8>, StickError> {
    let failed = |source| StickError::Read {
        what,
        path: path.to_owned(),
        source,
    };
    let len = fs::metadata(path).map_err(failed)?.len();
    if len > INPUT_MAX {
        return Err(failed(io::Error::new(
            io::ErrorKind::FileTooLarge,
            format!("it has more than {INPUT_MAX} bytes"),
        )));
    }
    fs::read(path).map_err(failed)
}

#[cfg(test)]
mod tests;
