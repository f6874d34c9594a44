//! The laptop: autokexec while its OS runs; discovery answers, the boot bundle over HTTP and the disk over NBD in the ramdisk.
//!
//! Counterpart: the crate `stiefel-client`, which this one never imports.

pub mod autokexec;
pub mod collect;
pub mod discovery;
pub mod guards;
pub mod http;
pub mod install;
pub mod nbd;
pub mod offline;
pub mod payload;
pub mod reboot;
pub mod role;
pub mod setup;
mod supply;
pub mod target;
#[cfg(test)]
mod testing;
mod tree;
