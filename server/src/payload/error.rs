//! Why there is no payload.

use std::io;
use std::path::PathBuf;

use stiefel_shared::loader::cmdline::CmdlineError;

/// Why there is no payload.
#[derive(Debug, thiserror::Error)]
pub enum PayloadError {
    /// The command line is of no use on the desktop.
    #[error(transparent)]
    Cmdline(#[from] CmdlineError),
    /// Nothing names the root file system.
    #[error(
        "the command line ({cmdline:?}) has no root=, so the initrd would choose by what it finds, on the desktop perhaps another disk\n  \
         next: find the UUID with `findmnt -no UUID /` and set boot.load.append to [\"root=UUID=...\"] in config.yaml"
    )]
    NoRoot {
        /// The cleaned command line.
        cmdline: String,
    },
    /// A file that is to be booted is not there, or cannot be read.
    #[error("the {what} {path} cannot be read\n  next: correct {option} in config.yaml, or install it again")]
    File {
        /// `kernel` or `initrd`.
        what: &'static str,
        /// Where it should be.
        path: PathBuf,
        /// The option that names it.
        option: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// There is a kernel but no initrd.
    #[error(
        "no initrd belongs to the kernel {kernel}; stiefel starts inside of it\n  \
         next: make one (update-initramfs, dracut, mkinitcpio), or set boot.load.initrd in config.yaml"
    )]
    NoInitrd {
        /// The kernel.
        kernel: String,
    },
    /// Nothing says what to boot.
    #[error(
        "nothing to boot was found: {why}; and the running kernel's files are not in the usual places ({release})\n  \
         next: see that /boot is mounted and readable (be root); after a kernel upgrade, reboot first; or set boot.load.kernel \
         and boot.load.initrd in config.yaml"
    )]
    Nothing {
        /// Why the boot loader's configuration gave nothing.
        why: String,
        /// The running kernel's release, in words.
        release: String,
    },
    /// The kernel is none that kexec starts.
    #[error(
        "the kernel {kernel} is {what}, which kexec does not start on this kind of machine\n  \
         next: set boot.load.kernel in config.yaml to {wanted}"
    )]
    Format {
        /// The kernel.
        kernel: PathBuf,
        /// What its file is.
        what: &'static str,
        /// What would be taken.
        wanted: &'static str,
    },
    /// The kernel's release cannot be found out.
    #[error(
        "the release of the kernel {kernel} is not known: neither the file's header nor its name has it\n  \
         next: name it vmlinuz-RELEASE and set boot.load.kernel in config.yaml"
    )]
    NoRelease {
        /// The kernel.
        kernel: PathBuf,
    },
    /// There are no modules for it.
    #[error(
        "the kernel {kernel} has release {version}, but there are no modules of it in {folder}\n  \
         next: install its modules, or choose another kernel with boot.load.kernel in config.yaml"
    )]
    NoModules {
        /// The kernel.
        kernel: PathBuf,
        /// Its release.
        version: String,
        /// Where they should be.
        folder: PathBuf,
    },
}
