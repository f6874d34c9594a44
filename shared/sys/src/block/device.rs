//! What only a block device can do (`linux/fs.h`). Offsets and lengths are in bytes, in whole logical blocks.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::ioctl::{self, opcode};

const BLKRRPART: ioctl::Opcode = opcode::none(0x12, 95);
const BLKFLSBUF: ioctl::Opcode = opcode::none(0x12, 97);
const BLKDISCARD: ioctl::Opcode = opcode::none(0x12, 119);
const BLKZEROOUT: ioctl::Opcode = opcode::none(0x12, 127);
const BLKGETSIZE64: ioctl::Opcode = opcode::read::<libc::size_t>(0x12, 114);

/// Opens a block device so that nothing else can mount it or open it likewise (O_EXCL).
///
/// # Errors
/// EBUSY if it is mounted or otherwise held.
pub fn open_exclusive(path: &Path, writable: bool) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(writable)
        .custom_flags(libc::O_EXCL)
        .open(path)
}

/// The size in bytes.
///
/// # Errors
/// ENOTTY if it is no block device.
pub fn size(device: &File) -> io::Result<u64> {
    // SAFETY: BLKGETSIZE64 writes one u64 (its number, for historic reasons, counts a size_t).
    Ok(unsafe { ioctl::ioctl(device, ioctl::Getter::<BLKGETSIZE64, u64>::new()) }?)
}

/// The logical block size in bytes.
///
/// # Errors
/// ENOTTY if it is no block device.
pub fn logical_block_size(device: &File) -> io::Result<u32> {
    Ok(rustix::fs::ioctl_blksszget(device)?)
}

/// Tells the device that a range is no longer needed; what is read there afterwards is undefined.
///
/// # Errors
/// EOPNOTSUPP where it cannot, EINVAL for a range that is not of whole blocks or past the end.
pub fn discard(device: &File, offset: u64, length: u64) -> io::Result<()> {
    range_call(device, BLKDISCARD, offset, length)
}

/// Fills a range with zeroes, by the device itself where it can.
///
/// # Errors
/// EINVAL for a range that is not of whole blocks or past the end.
pub fn zero_out(device: &File, offset: u64, length: u64) -> io::Result<()> {
    range_call(device, BLKZEROOUT, offset, length)
}

fn range_call(device: &File, request: ioctl::Opcode, offset: u64, length: u64) -> io::Result<()> {
    let range: [u64; 2] = [offset, length];
    // SAFETY: both requests read two u64, offset and length, from the pointer, which outlives the call.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), libc::Ioctl::from(request), range.as_ptr()) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Writes the kernel's buffers of this device out, and drops them.
///
/// # Errors
/// ENOTTY if it is no block device.
pub fn flush_buffers(device: &File) -> io::Result<()> {
    // SAFETY: BLKFLSBUF takes no argument.
    Ok(unsafe { ioctl::ioctl(device, ioctl::NoArg::<BLKFLSBUF>::new()) }?)
}

/// Has the kernel read the partition table again.
///
/// # Errors
/// EBUSY while a partition is in use, EINVAL for a device that has no partitions.
pub fn reread_partitions(device: &File) -> io::Result<()> {
    // SAFETY: BLKRRPART takes no argument.
    Ok(unsafe { ioctl::ioctl(device, ioctl::NoArg::<BLKRRPART>::new()) }?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_are_those_of_the_kernels_header() {
        assert_eq!(
            [BLKRRPART, BLKFLSBUF, BLKDISCARD, BLKZEROOUT],
            [0x125f, 0x1261, 0x1277, 0x127f]
        );
        assert_eq!(
            BLKGETSIZE64,
            if cfg!(target_pointer_width = "64") {
                0x8008_1272
            } else {
                0x8004_1272
            }
        );
    }

    #[test]
    fn a_file_is_no_block_device() {
        let file = tempfile::tempfile().unwrap();
        let results = [
            size(&file).map(drop),
            logical_block_size(&file).map(drop),
            discard(&file, 0, 512),
            zero_out(&file, 0, 512),
            flush_buffers(&file),
            reread_partitions(&file),
        ];
        for result in results {
            assert_eq!(result.unwrap_err().raw_os_error(), Some(libc::ENOTTY));
        }
    }
}
