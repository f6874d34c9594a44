//! The kernel: mounts, kexec, netlink, modules, uevents; the only home of unsafe code.
#![allow(unsafe_code)]
