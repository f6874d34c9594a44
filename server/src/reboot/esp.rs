//! The EFI system partition: where it is mounted, and as what the firmware knows it.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use stiefel_shared::handover::Volume;
use stiefel_shared::loader::efi::Program;
use stiefel_shared::superblock::Guid;

use super::RebootError;
use crate::collect::partition_of;
use crate::tree::{BY_PARTUUID, Tree};

/// Where it is mounted.
pub(super) const POINTS: [&str; 3] = ["/efi", "/boot/efi", "/boot"];
/// sysfs counts in sectors of this many bytes.
const SECTOR: u64 = 512;
/// Boot loaders are in folders of `EFI`.
const DEPTH: u32 = 3;

/// The EFI system partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Esp {
    /// Where it is mounted.
    pub(super) point: String,
    /// As the ramdisk finds it.
    pub(super) volume: Volume,
    blocks: (u64, u64),
    guid: Guid,
}

impl Esp {
    /// As what the firmware knows a file on it.
    pub(super) fn program(&self, path: &str) -> Program {
        Program {
            partition: self.volume.partition,
            blocks: self.blocks,
            guid: self.guid,
            path: path.to_owned(),
        }
    }
}

/// The one on `disk` (the kernel's name).
///
/// # Errors
/// [`RebootError::NoEsp`].
pub(super) fn find(tree: &Tree, disk: &str) -> Result<Esp, RebootError> {
    let found = POINTS.iter().find_map(|point| at(tree, disk, point));
    found.ok_or_else(|| RebootError::NoEsp { disk: disk.to_owned() })
}

/// Whether others could read a file there, going by one that is there: a mount of FAT gives all the same permissions.
///
/// # Errors
/// [`RebootError::Open`], [`RebootError::NotRoots`].
pub(super) fn closed(tree: &Tree, esp: &Esp) -> Result<(), RebootError> {
    let point = tree.path(&esp.point);
    let Some(file) = any_file(&point, DEPTH) else {
        // The image itself is looked at, too.
        return Ok(());
    };
    super::private(&point, file.mode(), file.uid())
}

/// Any file in a folder, or so deep below it.
fn any_file(folder: &Path, depth: u32) -> Option<Metadata> {
    let entries = std::fs::read_dir(folder).ok()?.flatten();
    let (folders, files): (Vec<_>, Vec<_>) = entries
        .filter_map(|entry| Some((entry.path(), entry.path().symlink_metadata().ok()?)))
        .partition(|(_, meta)| meta.is_dir());
    let file = files.into_iter().map(|(_, meta)| meta).find(Metadata::is_file);
    file.or_else(|| {
        let below = depth.checked_sub(1)?;
        folders.iter().find_map(|(path, _)| any_file(path, below))
    })
}

fn at(tree: &Tree, disk: &str, point: &str) -> Option<Esp> {
    // A look mounts what an automount has there.
    if !tree.names(point).iter().any(|name| name.eq_ignore_ascii_case("EFI")) {
        return None;
    }
    let mounts = tree.mounts();
    let mount = mounts.iter().rfind(|mount| mount.point == point)?;
    let partition = partition_of(tree, disk, mount).filter(|_| mount.kind == "vfat" && mount.root == "/")?;
    let name = tree
        .block_name(&mount.source)
        .or_else(|| tree.block_name(&mount.device))?;
    let guid = tree.names(BY_PARTUUID).into_iter().find(|uuid| {
        let device = tree.block_name(&format!("{BY_PARTUUID}/{uuid}"));
        device.as_ref() == Some(&name)
    });
    let number = |path: String| tree.line(path)?.parse::<u64>().ok();
    let block = number(format!("/sys/class/block/{disk}/queue/logical_block_size"))
        .filter(|block| block.is_power_of_two() && *block >= SECTOR)?;
    // The firmware counts in the disk's own blocks.
    let blocks = |what: &str| Some(number(format!("/sys/class/block/{name}/{what}"))? / (block / SECTOR));
    Some(Esp {
        point: point.to_owned(),
        volume: Volume {
            partition,
            fstype: mount.kind.clone(),
            folder: "/".to_owned(),
            logical: None,
        },
        blocks: (blocks("start")?, blocks("size")?),
        // Of an MBR's partition it is no GUID.
        guid: Guid::parse(&guid?)?,
    })
}
