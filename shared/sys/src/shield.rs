//! A block device over a disk that refuses every write, whoever opens it for writing: for the kernel's NVMe target.
//!
//! nvmet opens what it publishes for reading and writing, and its own write-protection can be lifted by any host. It does not
//! take a device that says it is read-only (`blkdev_get_by_path`: EACCES), and the block layer itself only warns of writes
//! to one. So two devices are stacked, each for one half:
//!
//! - a loop device whose file is the disk opened for reading only. Its driver fails each write, discard and zeroing with
//!   an error (`loop_handle_cmd`, LO_FLAGS_READ_ONLY), and the file below it could not be written either;
//! - a linear device-mapper device over all of it with an ordinary table, which says that it can be written and can so be
//!   opened by nvmet. It passes everything on, also writes: to the loop device, which refuses them.
//!
//! Neither holds the disk exclusively: a mounted one can be looked at. Used by `server::target`. Interfaces:
//! `linux/loop.h` (LOOP_CONFIGURE: Linux 5.8), `linux/dm-ioctl.h`, Documentation/admin-guide/device-mapper/linear.rst.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::path::{Path, PathBuf};

use rustix::ioctl::{Opcode, opcode};

use crate::read;
use crate::stack::{DM_VERSION, DmIoctl, device_number};

/// What the names of our devices begin with; [`sweep`] takes away what has it.
const PREFIX: &str = "stiefel-shield-";
/// sysfs and device mapper count in sectors of this many bytes.
const SECTOR: u64 = 512;
const LOOP_CTL_GET_FREE: Opcode = 0x4c82;
const LOOP_CONFIGURE: Opcode = 0x4c0a;
const LO_FLAGS_READ_ONLY: u32 = 1;
/// It goes away with its last user.
const LO_FLAGS_AUTOCLEAR: u32 = 4;
/// Past the page cache: what is read is what is on the disk now.
const LO_FLAGS_DIRECT_IO: u32 = 16;
const DM_DEV_CREATE: Opcode = opcode::read_write::<DmIoctl>(0xfd, 3);
const DM_DEV_REMOVE: Opcode = opcode::read_write::<DmIoctl>(0xfd, 4);
/// Without a flag it resumes, which brings the loaded table into use.
const DM_DEV_SUSPEND: Opcode = opcode::read_write::<DmIoctl>(0xfd, 6);
const DM_TABLE_LOAD: Opcode = opcode::read_write::<DmIoctl>(0xfd, 9);
/// How often another free loop device is asked for when a neighbour was faster.
const TRIES: u32 = 16;

/// Why a disk cannot be shielded.
#[derive(Debug, thiserror::Error)]
pub enum ShieldError {
    /// The disk could not be opened.
    #[error("cannot open {path} for reading; see whether it is still there", path = path.display())]
    Open {
        /// The disk.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// There is no loop device for it.
    #[error("cannot put a read-only loop device over {path}; load the module loop (Linux 5.8 or newer)", path = path.display())]
    Loop {
        /// The disk.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The kernel has no device mapper, or it refused.
    #[error("cannot {step} the device-mapper device {name}; load the module dm_mod")]
    Mapper {
        /// What was tried.
        step: &'static str,
        /// Its name.
        name: String,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// A shielded disk; taken away when dropped, if nobody has it open.
#[derive(Debug)]
pub struct Shield {
    /// Keeps the loop device until the mapped one is made; it is cleared after both have let go.
    below: File,
    control: File,
    name: String,
    path: PathBuf,
    gone: bool,
}

impl Shield {
    /// Shields `disk`, a block device or a file, under a `name` of its own (letters, digits, dashes). `dev` is where devtmpfs
    /// is mounted, `block_size` the disk's logical block size in bytes.
    ///
    /// # Errors
    /// [`ShieldError`]; nothing is left then.
    pub fn raise(dev: &Path, disk: &Path, name: &str, block_size: u32) -> Result<Self, ShieldError> {
        let file = File::open(disk).map_err(|source| ShieldError::Open {
            path: disk.to_owned(),
            source,
        })?;
        let looped = |source| ShieldError::Loop {
            path: disk.to_owned(),
            source,
        };
        let (loop_file, _) = read_only_loop(dev, &file, block_size).map_err(looped)?;
        let sectors = crate::block::size(&loop_file).map_err(looped)? / SECTOR;
        let name = format!("{PREFIX}{name}");
        let failed = |step| {
            let name = name.clone();
            move |source| ShieldError::Mapper { step, name, source }
        };
        let control = control(dev).map_err(failed("reach"))?;
        let mut create = Request::new(&name, 0);
        create.call(&control, DM_DEV_CREATE).map_err(failed("make"))?;
        let minor = minor(create.header.dev);
        let shield = Self {
            below: loop_file,
            control,
            path: dev.join(format!("dm-{minor}")),
            name: name.clone(),
            gone: false,
        };
        // From here on an error drops the shield, which removes the device.
        let (major, minor) = device_of(&shield.below).map_err(failed("read"))?;
        let mut load = Request::new(&name, 1);
        load.linear(sectors, &format!("{major}:{minor} 0"));
        load.call(&shield.control, DM_TABLE_LOAD).map_err(failed("fill"))?;
        Request::new(&name, 0)
            .call(&shield.control, DM_DEV_SUSPEND)
            .map_err(failed("start"))?;
        Ok(shield)
    }

    /// The device that can be opened for writing and written by nobody.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Takes it away; EBUSY while somebody has it open.
    ///
    /// # Errors
    /// [`ShieldError::Mapper`]; may be tried again.
    pub fn lower(&mut self) -> Result<(), ShieldError> {
        if self.gone {
            return Ok(());
        }
        let removed = Request::new(&self.name, 0).call(&self.control, DM_DEV_REMOVE);
        match removed {
            Err(error) if error.raw_os_error() != Some(libc::ENXIO) => Err(ShieldError::Mapper {
                step: "remove",
                name: self.name.clone(),
                source: error,
            }),
            _ => {
                self.gone = true;
                Ok(())
            }
        }
    }
}

impl Drop for Shield {
    fn drop(&mut self) {
        // Who still has it open keeps it; `sweep` finds it.
        let _ = self.lower();
    }
}

/// A loop device over `disk` that refuses writes, as the lower half of a [`Shield`]: for mounting a file system whose driver would write
/// even so (a journal). It goes away with its last user, which is at first the file that comes with its path. `dev` is where devtmpfs
/// is mounted, `block_size` the disk's logical block size in bytes.
///
/// # Errors
/// [`ShieldError::Open`], [`ShieldError::Loop`].
pub fn read_only(dev: &Path, disk: &Path, block_size: u32) -> Result<(File, PathBuf), ShieldError> {
    let path = || disk.to_owned();
    let file = File::open(disk).map_err(|source| ShieldError::Open { path: path(), source })?;
    let (held, number) =
        read_only_loop(dev, &file, block_size).map_err(|source| ShieldError::Loop { path: path(), source })?;
    Ok((held, dev.join(format!("loop{number}"))))
}

/// Takes away the shields that an earlier process has left, as far as nobody uses them. `sysfs` and `dev` are where they are
/// mounted.
pub fn sweep(sysfs: &Path, dev: &Path) {
    let Ok(control) = control(dev) else { return };
    for entry in std::fs::read_dir(sysfs.join("block")).into_iter().flatten().flatten() {
        if let Some(name) = read::attribute(&entry.path().join("dm/name")).filter(|name| name.starts_with(PREFIX)) {
            // Still in use: by another one of us.
            let _ = Request::new(&name, 0).call(&control, DM_DEV_REMOVE);
        }
    }
}

fn control(dev: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(dev.join("mapper/control"))
}

/// `struct loop_config`; all numbers are the machine's.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo,
    reserved: [u64; 8],
}

/// `struct loop_info64`.
#[repr(C)]
struct LoopInfo {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// A loop device over `file`, which was opened for reading only; its open descriptor and number.
fn read_only_loop(dev: &Path, file: &File, block_size: u32) -> io::Result<(File, u32)> {
    let control = OpenOptions::new()
        .read(true)
        .write(true)
        .open(dev.join("loop-control"))?;
    let mut last = io::Error::from(io::ErrorKind::ResourceBusy);
    for _ in 0..TRIES {
        // SAFETY: LOOP_CTL_GET_FREE takes no argument and answers a number.
        let number = unsafe { libc::ioctl(control.as_raw_fd(), libc::Ioctl::from(LOOP_CTL_GET_FREE)) };
        let number = u32::try_from(number).map_err(|_| io::Error::last_os_error())?;
        let device = File::open(dev.join(format!("loop{number}")))?;
        match configure(&device, file.as_raw_fd(), block_size) {
            Ok(()) => return Ok((device, number)),
            // Somebody else took it meanwhile.
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => last = error,
            Err(error) => return Err(error),
        }
    }
    Err(last)
}

fn configure(device: &File, fd: RawFd, block_size: u32) -> io::Result<()> {
    let config = LoopConfig {
        fd: fd.cast_unsigned(),
        block_size,
        info: LoopInfo {
            device: 0,
            inode: 0,
            rdevice: 0,
            offset: 0,
            size_limit: 0,
            number: 0,
            encrypt_type: 0,
            encrypt_key_size: 0,
            flags: LO_FLAGS_READ_ONLY | LO_FLAGS_AUTOCLEAR | LO_FLAGS_DIRECT_IO,
            file_name: [0; 64],
            crypt_name: [0; 64],
            encrypt_key: [0; 32],
            init: [0; 2],
        },
        reserved: [0; 8],
    };
    // SAFETY: LOOP_CONFIGURE reads one `struct loop_config` from the pointer, which outlives the call.
    let result = unsafe {
        libc::ioctl(
            device.as_raw_fd(),
            libc::Ioctl::from(LOOP_CONFIGURE),
            std::ptr::from_ref(&config),
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Major and minor number of an open block device.
fn device_of(device: &File) -> io::Result<(u32, u32)> {
    use std::os::unix::fs::MetadataExt;
    let number = device.metadata()?.rdev();
    Ok((rustix::fs::major(number), rustix::fs::minor(number)))
}

/// The minor number in one of the kernel's (`huge_encode_dev`).
fn minor(dev: u64) -> u64 {
    (dev & 0xff) | ((dev >> 12) & 0xf_ff00)
}

/// `struct dm_target_spec` and the room for its parameters.
#[repr(C)]
struct Target {
    start: u64,
    length: u64,
    status: i32,
    next: u32,
    kind: [u8; 16],
    parameters: [u8; 64],
}

/// One call to device mapper.
#[repr(C)]
struct Request {
    header: DmIoctl,
    target: Target,
}

impl Request {
    fn new(name: &str, targets: u32) -> Self {
        let mut header = DmIoctl {
            version: DM_VERSION,
            data_size: 0,
            data_start: 0,
            target_count: targets,
            open_count: 0,
            flags: 0,
            event_nr: 0,
            padding: 0,
            dev: device_number((0, 0)),
            name: [0; 128],
            uuid: [0; 129],
            data: [0; 7],
        };
        // One byte stays zero, as the kernel wants it; a longer name is cut, and another device's never begins with ours.
        for (to, from) in header.name.iter_mut().take(127).zip(name.bytes()) {
            *to = from;
        }
        Self {
            header,
            target: Target {
                start: 0,
                length: 0,
                status: 0,
                next: 0,
                kind: [0; 16],
                parameters: [0; 64],
            },
        }
    }

    /// The one target: all of another device.
    fn linear(&mut self, sectors: u64, parameters: &str) {
        self.target.length = sectors;
        for (to, from) in self.target.kind.iter_mut().zip(b"linear") {
            *to = *from;
        }
        for (to, from) in self.target.parameters.iter_mut().take(63).zip(parameters.bytes()) {
            *to = from;
        }
    }

    fn call(&mut self, control: &File, request: Opcode) -> io::Result<()> {
        self.header.data_size = u32::try_from(size_of::<Self>()).map_err(io::Error::other)?;
        self.header.data_start = u32::try_from(std::mem::offset_of!(Self, target)).map_err(io::Error::other)?;
        // SAFETY: device mapper reads and writes `data_size` bytes from the pointer, which are ours: a `struct dm_ioctl`, and at
        // `data_start` the target; it lives until the call is over.
        let result = unsafe {
            libc::ioctl(
                control.as_raw_fd(),
                libc::Ioctl::from(request),
                std::ptr::from_mut(self),
            )
        };
        match result {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_and_sizes_are_those_of_the_kernels_headers() {
        assert_eq!(size_of::<LoopInfo>(), 232);
        assert_eq!(size_of::<LoopConfig>(), 304);
        assert_eq!(std::mem::offset_of!(Target, parameters), 40);
        assert_eq!(std::mem::offset_of!(Request, target), 312);
        assert_eq!(DM_DEV_CREATE, 0xc138_fd03);
        assert_eq!(DM_DEV_SUSPEND, 0xc138_fd06);
        assert_eq!(DM_TABLE_LOAD, 0xc138_fd09);
        assert_eq!(minor(0x0010_fd23), 0x123);
    }

    #[test]
    fn a_table_is_one_linear_target_over_all_of_the_device() {
        let mut request = Request::new("stiefel-shield-x", 1);
        request.linear(2048, "7:3 0");
        assert_eq!((request.target.start, request.target.length), (0, 2048));
        assert!(request.target.kind.starts_with(b"linear\0"));
        assert!(request.target.parameters.starts_with(b"7:3 0\0"));
        assert!(request.header.name.starts_with(b"stiefel-shield-x\0"));
        assert_eq!(request.header.flags, 0);
    }

    #[test]
    fn a_name_longer_than_device_mapper_takes_is_cut_before_its_end_mark() {
        let request = Request::new(&"x".repeat(300), 0);
        assert_eq!(request.header.name[126..], [b'x', 0]);
    }

    #[test]
    fn a_disk_that_is_gone_is_named() {
        let error = Shield::raise(Path::new("/dev"), Path::new("/nowhere"), "x", 512).unwrap_err();
        assert!(error.to_string().contains("/nowhere"), "{error}");
    }

    /// Only where there are loop devices, and as root: the half that refuses.
    #[test]
    fn a_loop_device_over_a_disk_opened_for_reading_refuses_writes() {
        use std::io::{Read, Write};
        let image = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(image.path(), vec![7; 1 << 20]).unwrap();
        let file = File::open(image.path()).unwrap();
        let Ok((device, number)) = read_only_loop(Path::new("/dev"), &file, 512) else {
            return;
        };
        let path = format!("/dev/loop{number}");
        let mut first = [0; 512];
        File::open(&path).unwrap().read_exact(&mut first).unwrap();
        assert_eq!(first, [7; 512]);
        let written = OpenOptions::new()
            .write(true)
            .open(&path)
            .and_then(|mut file| file.write_all(&[0; 512]).and_then(|()| file.sync_all()));
        assert!(written.is_err());
        drop(device);
        assert_eq!(std::fs::read(image.path()).unwrap(), vec![7; 1 << 20]);
    }
}
