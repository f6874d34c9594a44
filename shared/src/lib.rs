//! Configuration, keys, units and wire formats. Parses bytes, opens nothing.
//!
//! Imports none of stiefel's other crates, so that laptop, desktop, ramdisk and builder can all stand on it.

pub mod bundle;
pub mod config;
pub mod cpio;
pub mod discovery;
pub mod handover;
pub mod kernel;
pub mod key;
pub mod kmod;
pub mod lend;
pub mod loader;
pub mod luks;
pub mod nbd;
pub mod seal;
pub mod session;
pub mod superblock;
pub mod unlock;

#[cfg(test)]
mod vectors;
