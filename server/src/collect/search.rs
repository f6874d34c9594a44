//! What a stick of the laptop's own is told (`stiefel stick --laptop`): the disk, and where on it the system lies.
//!
//! Counterpart: `crate::offline::search`. Nothing of the payload goes onto the stick, so that it stays good after kernel upgrades; and
//! no key, so that a lost stick boots nothing, and `stiefel key revoke` counts also for a laptop that was started by it. Where those
//! keys are on an encrypted disk, keys made from them go onto it, by which a desktop may send the passphrase and do nothing else.
//! Refused: a system whose root the ramdisk cannot read, for its modules are needed, too; keys or a configuration that lie elsewhere.

use std::path::Path;

use stiefel_initrd_builder::ramdisk::Manifest;
use stiefel_shared::config::{CONFIG_PATH, Config};
use stiefel_shared::handover::{SearchHandover, Volume};
use stiefel_shared::seal::SealError;

use super::layers::Opened;
use super::place::{PlaceError, has_all, mount_of, mounts, readable};
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
    /// No keys could be made.
    #[error("no keys could be made for asking for the passphrase")]
    Keys(#[from] SealError),
    /// Keys or configuration lie on a file system that it would not mount.
    #[error(
        "{path} is on the file system at {point}, which a laptop that is started from a stick does not read\n  \
         next: have it on that of / or /usr"
    )]
    Elsewhere {
        /// What.
        path: &'static str,
        /// Where that is mounted.
        point: String,
    },
}

/// Looks at the system below `root`, which has this configuration; `ramdisk` is the one that goes onto the stick.
///
/// # Errors
/// [`SearchError`].
pub fn search(root: &Path, config: &Config, ramdisk: &Manifest) -> Result<SearchHandover, SearchError> {
    let tree = Tree::new(root);
    // Without LUKS only whether there are any counts.
    let keys = read_keys(&tree.path(KEYS_DIR))?;
    let disk = disk(&tree, &config.boot.disk)?;
    let mut opened = Opened::default();
    let mounts = mounts(&tree, &disk.name, &mut opened)?;
    is_read(&tree, &mounts)?;
    readable(ramdisk, mounts.iter().map(|(_, volume)| volume))?;
    has_all(ramdisk, opened.modules())?;
    Ok(SearchHandover {
        hostname: hostname(&tree),
        mounts,
        disk: identity(&tree, &disk)?,
        wireguard: ramdisk.wireguard,
        nvme_target: ramdisk.nvme_target,
        layers: opened.layers(&keys)?,
    })
}

/// Whether keys and configuration are where the ramdisk will look.
fn is_read(tree: &Tree, mounts: &[(String, Volume)]) -> Result<(), SearchError> {
    for path in [KEYS_DIR, CONFIG_PATH] {
        // Without a configuration the defaults count.
        let Some(mount) = mount_of(tree, &tree.path(path)) else {
            continue;
        };
        if !mounts.iter().any(|(point, _)| *point == mount.point) {
            return Err(SearchError::Elsewhere {
                path,
                point: mount.point,
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::place::tests::{laptop, put};
    use super::*;

    #[test]
    fn keys_on_a_file_system_that_is_not_read_are_refused_when_the_stick_is_written() {
        let root = "22 1 8:3 / / rw - ext4 /dev/sda3 rw\n";
        let elsewhere = format!("{root}23 22 8:2 / /etc/stiefel/keys rw - ext4 /dev/sda2 rw\n");
        for (mounted, fine) in [(root, true), (&elsewhere, false)] {
            let (_dir, tree) = laptop(mounted);
            put(&tree, "/etc/stiefel/keys/stick.key", "x");
            let read = is_read(&tree, &mounts(&tree, "sda", &mut Opened::default()).unwrap());
            assert_eq!(read.is_ok(), fine, "{mounted}");
        }
    }
}
