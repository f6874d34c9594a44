//! A namespace that takes no writes, as the initiator's kernel sees it.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use rustix::ioctl::{Opcode, opcode};

/// NVME_IOCTL_ADMIN_CMD of `linux/nvme_ioctl.h`.
const ADMIN_COMMAND: Opcode = opcode::read_write::<Command>(b'N', 0x41);
/// NVME_IOCTL_ID.
const NAMESPACE_ID: Opcode = opcode::none(b'N', 0x40);
/// Set Features (NVMe base specification, "Admin Command Set").
const SET_FEATURES: u8 = 0x09;
/// Namespace Write Protection Config (NVM command set, feature 84h).
const WRITE_PROTECTION: u32 = 0x84;
/// Until it is lifted by the same command.
const WRITE_PROTECT: u32 = 1;

/// `struct nvme_passthru_cmd` of `linux/nvme_ioctl.h`.
#[repr(C)]
#[derive(Default)]
struct Command {
    opcode: u8,
    flags: u8,
    reserved: u16,
    namespace: u32,
    words_2_and_3: [u32; 2],
    metadata: u64,
    data: u64,
    metadata_length: u32,
    data_length: u32,
    words_10_to_15: [u32; 6],
    /// In milliseconds; 0 for the kernel's own, 60 s: the connection is made anew after that.
    timeout: u32,
    result: u32,
}

/// Asks the controller of a namespace's block device to write-protect it. A target of Linux then tells this kernel, which makes the
/// device and its partitions read-only a moment later. A convenience: any initiator can lift it again.
///
/// # Errors
/// ENOTTY if it is no such device, EOPNOTSUPP if the controller has no write protection, or does not protect this one.
pub fn write_protect(device: &File) -> io::Result<()> {
    // SAFETY: NVME_IOCTL_ID takes no argument.
    let namespace = unsafe { libc::ioctl(device.as_raw_fd(), libc::Ioctl::from(NAMESPACE_ID)) };
    let namespace = u32::try_from(namespace).map_err(|_| io::Error::last_os_error())?;
    let mut command = Command {
        opcode: SET_FEATURES,
        namespace,
        words_10_to_15: [WRITE_PROTECTION, WRITE_PROTECT, 0, 0, 0, 0],
        ..Command::default()
    };
    let at: *mut Command = &raw mut command;
    // SAFETY: NVME_IOCTL_ADMIN_CMD reads and writes one `nvme_passthru_cmd`, which outlives the call; there is no data to point to.
    match unsafe { libc::ioctl(device.as_raw_fd(), libc::Ioctl::from(ADMIN_COMMAND), at) } {
        0 => Ok(()),
        // A status of NVMe's own; none of them tells more.
        1.. => Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP)),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_sizes_are_those_of_the_kernels_header() {
        assert_eq!((ADMIN_COMMAND, NAMESPACE_ID), (0xc048_4e41, 0x4e40));
        assert_eq!(size_of::<Command>(), 72);
        assert_eq!(std::mem::offset_of!(Command, words_10_to_15), 40);
    }

    #[test]
    fn a_file_is_no_namespace() {
        let error = write_protect(&tempfile::tempfile().unwrap()).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOTTY));
    }
}
