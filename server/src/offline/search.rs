//! The start from a stick of the laptop's own (`stiefel stick --laptop`): what the laptop would boot by itself is looked for on its disk.
//!
//! The file systems are those that made up the system when the stick was written. What is looked for, and how, is the same as in the
//! running system ([`crate::payload`]); there is only no firmware to ask what has booted, and no udev to ask for UUIDs.

use std::path::{Path, PathBuf};

use anyhow::Context;
use stiefel_initrd_builder::overlay;
use stiefel_shared::config::Config;
use stiefel_shared::handover::{Part, SearchHandover, ServerHandover};
use stiefel_sys::block::Disk;
use stiefel_sys::console::Console;

use super::volumes::Volumes;
use super::{Gather, settle};
use crate::collect;
use crate::payload::{self, Piece};
use crate::role::wait_for_disk;
use crate::tree::Tree;

/// Where the laptop's system is put together.
const FOLDER: &str = "/run/stiefel/disk/root";

/// Looks for the payload, gets its parts, and gives the handover of a server.
///
/// # Errors
/// Why nobody can be served.
pub fn search(console: &Console, handover: SearchHandover) -> anyhow::Result<ServerHandover> {
    let config =
        Config::parse(&handover.config).context("the configuration on this stick cannot be used; write it anew")?;
    let disk = wait_for_disk(console, &handover.disk)?;
    let root = Path::new("/");
    let server = {
        let mut volumes = Volumes::new(console, &disk)?;
        assemble(&mut volumes, &handover, &disk)?;
        found(console, &config, handover, Path::new(FOLDER), root)?
    };
    settle(root, &server)?;
    Ok(server)
}

/// Mounts all of the system below [`FOLDER`].
fn assemble(volumes: &mut Volumes<'_>, handover: &SearchHandover, disk: &Disk) -> anyhow::Result<()> {
    for (point, volume) in &handover.mounts {
        let place = below(Path::new(FOLDER), point)?;
        volumes.mount(volume, &place).with_context(|| {
            format!(
                "{point} of the laptop's system (partition {} of {}) cannot be read; if the disk was partitioned anew, write this stick anew",
                volume.partition,
                disk.path.display()
            )
        })?;
    }
    Ok(())
}

/// A mount point, inside of the tree whatever links are there.
fn below(folder: &Path, point: &str) -> anyhow::Result<PathBuf> {
    if point == "/" {
        return Ok(folder.to_owned());
    }
    let tree = Tree::new(folder);
    tree.resolve(point)
        .with_context(|| format!("{point} is not in the laptop's system"))
}

/// Finds the payload in the tree at `system`, and puts its parts below `root`.
fn found(
    console: &Console,
    config: &Config,
    handover: SearchHandover,
    system: &Path,
    root: &Path,
) -> anyhow::Result<ServerHandover> {
    let found = payload::find(system, &config.boot.load)?;
    console.info(&format!("what the desktop boots:\n{found}"));
    let transport = collect::ways(config, handover.wireguard, handover.nvme_target, &found)?;
    let tree = Tree::new(system);
    let zstd = collect::unpacks_zstd(&tree, &found.version);
    let overlay = overlay::overlay(&found.modules, &config.modules.0, &collect::firmware(&tree), zstd)?;
    let mut gather = Gather::begin(root, Part::Overlay)?;
    gather.write(&overlay.bytes)?;
    let (overlay, _) = gather.end();
    let kernel = gathered(root, Part::Kernel, std::slice::from_ref(&found.kernel))?;
    let initrd = gathered(root, Part::Initrd, &found.initrds)?;
    Ok(ServerHandover {
        // What changes on the desktop cannot be seen from here: each of its reboots reads the disk anew.
        payload: collect::payload(&config.session, &found, [kernel, initrd, overlay], None)?,
        keys: handover.keys,
        hostname: handover.hostname,
        disk: handover.disk,
        after: config.session.after,
        encryption: config.link.encryption,
        mode: config.link.mode,
        transport,
        session: config.session.mode,
        grace: config.session.grace.0.as_secs(),
        tickets: Vec::new(),
    })
}

fn gathered(root: &Path, part: Part, pieces: &[Piece]) -> anyhow::Result<u64> {
    let mut gather = Gather::begin(root, part)?;
    for piece in pieces {
        let range = piece.section.as_ref().map(|section| (section.offset, section.len));
        gather
            .add(&piece.path, range)
            .with_context(|| format!("cannot read {piece}"))?;
    }
    Ok(gather.end().0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_lie_in_the_tree_and_what_is_not_there_is_said() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("usr/boot")).unwrap();
        std::os::unix::fs::symlink("/usr/boot", dir.path().join("boot")).unwrap();
        std::os::unix::fs::symlink("../../../../etc", dir.path().join("efi")).unwrap();
        assert_eq!(below(dir.path(), "/").unwrap(), dir.path());
        assert_eq!(below(dir.path(), "/boot").unwrap(), dir.path().join("usr/boot"));
        assert!(below(dir.path(), "/efi").is_err());
    }
}
