//! The laptop's disk for tests: a real Debian with systemd on a GPT, made without a loop device and without root.
//!
//! [`System`] says which Debian and which layout, [`BaseSystem`] is the installed system as a tar archive (cached),
//! [`LaptopDisk`] an image made from it with the files a test adds.

mod base;
mod grub;
mod image;
mod inspect;
mod overlay;
mod system;
mod workshop;

use std::path::PathBuf;

use crate::process::CommandError;

pub use base::{BaseOptions, BaseSystem, Installed};
pub use image::{
    DISK_GUID, LaptopDisk, LaptopDiskBuilder, PASSWORD, ROOT_FS_UUID, ROOT_OFFSET, ROOT_PARTUUID, add_partition,
    esp_of, ext4_of, plain_disk,
};
pub use inspect::{fsck_clean, read_file};
pub use overlay::ExtraFile;
pub use system::{Initrd, Layout, System};

/// A disk could not be made or read.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// A host program failed.
    #[error("cannot {action}")]
    Command {
        /// What was tried.
        action: &'static str,
        /// Why.
        #[source]
        source: CommandError,
    },
    /// A file on the host failed.
    #[error("cannot {action} {path}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The installed system is not what it should be.
    #[error("the installed system {base} has no {what}; remove it, so that it is made anew")]
    Base {
        /// The archive.
        base: PathBuf,
        /// What is missing.
        what: &'static str,
    },
    /// The machine that lays out and checks disks has failed.
    #[error("the workshop cannot {job}")]
    Workshop {
        /// What it had to do.
        job: String,
        /// What it said.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A path in the guest that cannot be used.
    #[error("{path:?} is no path for a file in the guest: it must begin with / and go straight there")]
    GuestPath {
        /// The path.
        path: String,
    },
    /// There is no such file in the image.
    #[error("there is no file {path} in the image {image}")]
    NoFile {
        /// The image.
        image: PathBuf,
        /// The path in it.
        path: String,
    },
    /// The file system is not clean.
    #[error("the file system in {image} is not clean; e2fsck says:\n{said}")]
    NotClean {
        /// The image.
        image: PathBuf,
        /// What e2fsck said.
        said: String,
    },
}

pub(crate) fn io_error(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> DiskError {
    let path = path.into();
    move |source| DiskError::Io { action, path, source }
}

pub(crate) fn command_error(action: &'static str) -> impl FnOnce(CommandError) -> DiskError {
    move |source| DiskError::Command { action, source }
}
