//! The kernel: mounts, kexec, netlink, modules, uevents. The only home of unsafe code in stiefel.
#![allow(unsafe_code)]

pub mod block;
pub mod kexec;
pub mod kmsg;
pub mod link;
pub mod module;
pub mod mount;
pub mod nbd;
pub mod power;
pub mod process;
pub mod uevent;
