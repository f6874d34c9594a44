//! What a stick of the laptop's own is told (`stiefel stick --laptop`): keys, disk, configuration, and where the system lies.
//!
//! Counterpart: `crate::offline::search`. Nothing of the payload goes onto the stick, so that it stays good after kernel upgrades.
//! Refused: a system whose root the ramdisk cannot read, for its modules are needed, too.

use std::path::Path;

use stiefel_initrd_builder::ramdisk::Manifest;
use stiefel_shared::config::Config;
use stiefel_shared::handover::{MAX_CARRIED_CONFIG, SearchHandover};

use super::place::{PlaceError, mounts};
use super::{CollectError, KEYS_DIR, disk, hostname, identity, read_keys};
use crate::tree::Tree;

/// Why there can be no such stick.
#[derive(Debug, thiserror::Error)]
pub enum SearchError {
    /// Something is missing.
    #[error("a stick of this laptop's own cannot be made")]
    Collect(#[from] CollectError),
    /// The ramdisk would not find the system.
    #[error("started from a stick, this laptop's system could not be read")]
    Place(#[from] PlaceError),
    /// The configuration is too long.
    #[error("the configuration has more than {MAX_CARRIED_CONFIG} bytes\n  next: take comments out of it")]
    LongConfig,
}

/// Looks at the system below `root`, whose configuration `config` was read from `text`; `ramdisk` is the one that goes onto the stick.
///
/// # Errors
/// [`SearchError`].
pub fn search(root: &Path, config: &Config, text: String, ramdisk: &Manifest) -> Result<SearchHandover, SearchError> {
    if text.len() > MAX_CARRIED_CONFIG {
        return Err(SearchError::LongConfig);
    }
    let tree = Tree::new(root);
    let keys = read_keys(&tree.path(KEYS_DIR))?;
    let disk = disk(&tree, &config.boot.disk)?;
    Ok(SearchHandover {
        keys,
        hostname: hostname(&tree),
        mounts: mounts(&tree, &disk.name)?,
        disk: identity(&tree, &disk)?,
        config: text,
        wireguard: ramdisk.wireguard,
        nvme_target: ramdisk.nvme_target,
    })
}
