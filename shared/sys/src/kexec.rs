//! Loading the next kernel (kexec_file_load(2)), and the memory files it is loaded from.
//!
//! `power::now(Power::Kexec)`, or the running system's `systemctl kexec`, then starts it.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Seek};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::Path;

use rustix::fs::{MemfdFlags, SealFlags};

/// The longest command line in bytes: the limit of x86-64 and arm64 without its NUL.
pub const MAX_CMDLINE: usize = 2047;

const KEXEC_FILE_UNLOAD: libc::c_ulong = 1;
const KEXEC_FILE_NO_INITRAMFS: libc::c_ulong = 4;

/// Why the kernel was not taken.
#[derive(Debug, thiserror::Error)]
pub enum KexecError {
    /// The command line is too long.
    #[error("the kernel command line has {bytes} bytes, more than {MAX_CMDLINE}; shorten boot.load.cmdline")]
    CmdlineTooLong {
        /// Its length.
        bytes: usize,
    },
    /// The command line holds a NUL or a line break.
    #[error("the kernel command line holds a NUL or a line break; correct boot.load.cmdline")]
    CmdlineInvalid,
    /// EPERM.
    #[error(
        "loading another kernel is not permitted; be root, and see whether kernel.kexec_load_disabled is 1 or the kernel is locked down (Secure Boot)"
    )]
    NotPermitted {
        /// The kernel's answer.
        source: io::Error,
    },
    /// The signature of the kernel is missing or not trusted.
    #[error(
        "the running kernel does not trust this kernel's signature; sign it with a key in Secure Boot's db or MOK list (only its first signature counts), or turn Secure Boot off"
    )]
    Signature {
        /// The kernel's answer.
        source: io::Error,
    },
    /// ENOEXEC.
    #[error(
        "this file is no kernel that can be started; give a bzImage or Image of this machine's architecture in boot.load.kernel"
    )]
    NotAKernel {
        /// The kernel's answer.
        source: io::Error,
    },
    /// EBUSY.
    #[error("another kernel is just being loaded; wait for kexec-tools or kdump to end, and try again")]
    Busy {
        /// The kernel's answer.
        source: io::Error,
    },
    /// ENOMEM, EADDRNOTAVAIL or EFBIG.
    #[error("there is not enough free memory for the kernel and its initrd; close programs, and try again")]
    Memory {
        /// The kernel's answer.
        source: io::Error,
    },
    /// ENOSYS or EOPNOTSUPP.
    #[error("the running kernel cannot load another (CONFIG_KEXEC_FILE is off); use a distribution's kernel")]
    Unsupported {
        /// The kernel's answer.
        source: io::Error,
    },
    /// Anything else.
    #[error("loading the kernel failed; the kernel's log (dmesg) may say more")]
    Other {
        /// The kernel's answer.
        source: io::Error,
    },
}

impl From<io::Error> for KexecError {
    fn from(source: io::Error) -> Self {
        match source.raw_os_error().unwrap_or_default() {
            libc::EPERM | libc::EACCES => Self::NotPermitted { source },
            // ENODATA: unsigned under lockdown. ENOKEY: its signer is not enrolled.
            libc::EKEYREJECTED
            | libc::ENOKEY
            | libc::EKEYEXPIRED
            | libc::EKEYREVOKED
            | libc::ENODATA
            | libc::EBADMSG => Self::Signature { source },
            libc::ENOEXEC => Self::NotAKernel { source },
            libc::EBUSY => Self::Busy { source },
            libc::ENOMEM | libc::EADDRNOTAVAIL | libc::EFBIG => Self::Memory { source },
            libc::ENOSYS | libc::EOPNOTSUPP => Self::Unsupported { source },
            _ => Self::Other { source },
        }
    }
}

/// Loads a kernel to be started by the next kexec, in place of any that was loaded before.
///
/// # Errors
/// Each [`KexecError`] says what to do next.
pub fn load(kernel: BorrowedFd<'_>, initrd: Option<BorrowedFd<'_>>, cmdline: &str) -> Result<(), KexecError> {
    let cmdline = check_cmdline(cmdline)?;
    let flags = if initrd.is_none() { KEXEC_FILE_NO_INITRAMFS } else { 0 };
    let bytes = cmdline.as_bytes_with_nul();
    // SAFETY: both descriptors are open while borrowed (or -1, which the flag says is not to be used); the command
    // line is NUL-terminated, its length counts the NUL, and it outlives the call; the kernel only reads it.
    let result = unsafe {
        libc::syscall(
            libc::SYS_kexec_file_load,
            kernel.as_raw_fd(),
            initrd.map_or(-1, |fd| fd.as_raw_fd()),
            bytes.len(),
            bytes.as_ptr(),
            flags,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error().into())
    }
}

/// Forgets a loaded kernel, so that no later reboot starts it; its initrd may hold secrets.
///
/// # Errors
/// As [`load`].
pub fn unload() -> Result<(), KexecError> {
    // SAFETY: with KEXEC_FILE_UNLOAD the kernel looks at none of the other arguments.
    let result = unsafe {
        libc::syscall(
            libc::SYS_kexec_file_load,
            -1,
            -1,
            0_usize,
            std::ptr::null::<libc::c_char>(),
            KEXEC_FILE_UNLOAD,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error().into())
    }
}

fn check_cmdline(cmdline: &str) -> Result<CString, KexecError> {
    if cmdline.len() > MAX_CMDLINE {
        return Err(KexecError::CmdlineTooLong { bytes: cmdline.len() });
    }
    if cmdline.contains('\n') {
        return Err(KexecError::CmdlineInvalid);
    }
    CString::new(cmdline).map_err(|_| KexecError::CmdlineInvalid)
}

/// Whether a kernel is loaded for the next kexec, from `SYSFS/kernel/kexec_loaded`.
///
/// # Errors
/// If the kernel has no such file (no kexec) or sysfs is not mounted.
pub fn is_loaded(sysfs: &Path) -> io::Result<bool> {
    let text = crate::read::bounded(&sysfs.join("kernel/kexec_loaded"), 16)?;
    Ok(text.trim_ascii() == b"1")
}

/// Makes a file in memory, lets `write` fill it, and seals it: nobody can change it any more. It is closed on exec,
/// at its start, and seen by others as `/memfd:NAME`.
///
/// # Errors
/// What `write` or the kernel says.
pub fn memfd(name: &str, write: impl FnOnce(&mut File) -> io::Result<()>) -> io::Result<File> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    // Hardened systems (vm.memfd_noexec) demand NOEXEC_SEAL, kernels before 6.3 do not know it.
    let fd = match rustix::fs::memfd_create(name, flags | MemfdFlags::NOEXEC_SEAL) {
        Err(rustix::io::Errno::INVAL) => rustix::fs::memfd_create(name, flags),
        other => other,
    }?;
    let mut file = File::from(fd);
    write(&mut file)?;
    file.rewind()?;
    let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE | SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(&file, seals)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::fd::AsFd;

    #[test]
    fn a_memory_file_is_filled_rewound_and_sealed() {
        let mut file = memfd("kernel", |file| file.write_all(b"bytes")).unwrap();
        let mut back = String::new();
        file.read_to_string(&mut back).unwrap();
        assert_eq!(back, "bytes");
        assert!(file.write_all(b"more").is_err());
        assert!(file.set_len(0).is_err());
    }

    #[test]
    fn too_long_a_command_line_is_refused() {
        assert!(check_cmdline(&"x".repeat(MAX_CMDLINE)).is_ok());
        let error = check_cmdline(&"x".repeat(MAX_CMDLINE + 1)).unwrap_err();
        assert!(matches!(error, KexecError::CmdlineTooLong { bytes: 2048 }));
    }

    #[test]
    fn a_command_line_with_nul_or_line_break_is_refused() {
        for cmdline in ["a\0b", "a\nb"] {
            assert!(matches!(check_cmdline(cmdline), Err(KexecError::CmdlineInvalid)));
        }
    }

    #[test]
    fn refusals_of_lockdown_are_told_apart() {
        let error = |errno| KexecError::from(io::Error::from_raw_os_error(errno));
        assert!(matches!(error(libc::EPERM), KexecError::NotPermitted { .. }));
        for errno in [61, 126, libc::EKEYREJECTED] {
            assert!(matches!(error(errno), KexecError::Signature { .. }), "{errno}");
        }
        assert!(matches!(error(libc::ENOEXEC), KexecError::NotAKernel { .. }));
        assert!(matches!(error(libc::EBUSY), KexecError::Busy { .. }));
        assert!(matches!(error(libc::EIO), KexecError::Other { .. }));
    }

    #[test]
    fn an_empty_file_is_not_loaded_as_a_kernel() {
        let empty = memfd("empty", |_| Ok(())).unwrap();
        assert!(load(empty.as_fd(), None, "").is_err());
    }

    #[test]
    fn loaded_is_read_from_sysfs() {
        let sysfs = tempfile::tempdir().unwrap();
        assert!(is_loaded(sysfs.path()).is_err());
        std::fs::create_dir(sysfs.path().join("kernel")).unwrap();
        for (text, expected) in [("1\n", true), ("0\n", false)] {
            std::fs::write(sysfs.path().join("kernel/kexec_loaded"), text).unwrap();
            assert_eq!(is_loaded(sysfs.path()).unwrap(), expected);
        }
    }
}
