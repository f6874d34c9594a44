//! Storage target mode: this machine's disks, on the network, for others to look at and to copy.
//!
//! The job of systemd-storagetm, Diskomator and Apple's Target Disk Mode. Each whole disk is lent as it appears and taken back
//! as it goes, read-only unless told otherwise: by our NBD server ([`crate::nbd`]) and, where this kernel has it, by the
//! kernel's NVMe target with a device under it that refuses writes ([`stiefel_sys::shield`]).
//!
//! Refused: partitions and what stands on disks; disks that the running system lives on, unless asked for twice; writing to
//! what is mounted, swap or held. What `--open` lends is lent to everybody, in clear.

// They panic when nobody can be told any more: see `say`.
#![deny(clippy::print_stdout, clippy::print_stderr)]

mod alone;
mod catalog;
mod clients;
mod closed;
mod described;
mod desk;
mod doors;
mod follow;
mod grant;
mod heard;
mod hosted;
mod late;
mod listing;
mod lives;
mod names;
mod parts;
mod pick;
mod qr;
mod reboot;
mod role;
mod run;
mod say;
mod share;
mod tunnel;
mod wanted;
mod words;
mod work;

use std::path::PathBuf;

pub use closed::run_closed;
pub use reboot::{Reboot, RebootOptions};
pub use role::run_role;
pub use run::run;
pub use words::Words;

/// The keys in a folder, each private to root.
///
/// # Errors
/// There is none, or one that others could have read.
pub fn keys(folder: &std::path::Path) -> anyhow::Result<Vec<stiefel_shared::key::StickKey>> {
    Ok(crate::collect::keys::read(folder, 0)?)
}

/// What is to be lent, and how.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Disks and files; empty with `all`.
    pub devices: Vec<PathBuf>,
    /// 1: every disk but those that the system lives on; 2: these, too.
    pub all: u8,
    /// Disks that one initiator may write: their name, device or path.
    pub writable: Vec<Writable>,
    /// These are names of disks that may appear later; else one that is not there is an error.
    pub awaited: bool,
    /// All others can be written, too, but what is written is thrown away at the end.
    pub snapshot: bool,
    /// Without the kernel's NVMe target.
    pub no_nvme: bool,
    /// TCP port of the NBD server.
    pub nbd_port: u16,
    /// What this machine is called, if not as the kernel says.
    pub hostname: Option<String>,
    /// Print JSON, one line for each change.
    pub json: bool,
}

/// A disk that may be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Writable {
    /// Its name here, its device or path.
    pub disk: String,
    /// The only host's NQN: by NVMe; else by NBD.
    pub host: Option<String>,
    /// In bytes, if that is known of a disk that is awaited; else nothing.
    pub size: Option<u64>,
}

impl std::str::FromStr for Writable {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (disk, host) = match text.split_once('=') {
            Some((disk, host)) => (disk, Some(host)),
            None => (text, None),
        };
        if disk.is_empty() || host.is_some_and(|host| !host.starts_with("nqn.")) {
            return Err("give DISK, or DISK=HOSTNQN with the NQN of the only host (its /etc/nvme/hostnqn)".to_owned());
        }
        Ok(Self {
            disk: disk.to_owned(),
            host: host.map(str::to_owned),
            size: None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_writable_disk_may_name_its_only_host() {
        let host = "nqn.2014-08.org.nvmexpress:uuid:1";
        let parsed: Writable = format!("/dev/sda={host}").parse().unwrap();
        assert_eq!((parsed.disk.as_str(), parsed.host.as_deref()), ("/dev/sda", Some(host)));
        assert_eq!("sda".parse::<Writable>().unwrap().host, None);
        assert!("=x".parse::<Writable>().is_err());
        assert!("sda=laptop".parse::<Writable>().is_err());
    }
}
