//! The kernel: mounts, kexec, netlink, modules, uevents. The only home of unsafe code in stiefel.
//!
//! All calls are synchronous: they run in PID 1, in a payload's initramfs, and from tokio by `spawn_blocking`.
//! Readers of sysfs and procfs take the folder where it is mounted (usually [`SYSFS`], [`PROCFS`]): in a payload's
//! initramfs these stand at private places.
#![allow(unsafe_code)]

pub mod block;
pub mod console;
pub mod custody;
pub mod fingerprint;
pub mod input;
pub mod kexec;
pub mod keyboard;
pub mod kmsg;
pub mod link;
pub mod module;
pub mod mount;
pub mod nbd;
mod netlink;
pub mod netns;
pub mod nvme;
pub mod nvmet;
pub mod power;
pub mod process;
mod read;
pub mod say;
pub mod shield;
pub mod stack;
pub mod uevent;
pub mod wipe;
pub mod wired;
pub mod wireguard;

/// Where sysfs usually is.
pub const SYSFS: &str = "/sys";
/// Where procfs usually is.
pub const PROCFS: &str = "/proc";
