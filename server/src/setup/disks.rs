//! What `/` stands on: file system, volumes, encryption, arrays, partitions, disks.
//!
//! Specification: Linux, Documentation/ABI/testing/sysfs-block-dm (names and UUIDs of device-mapper volumes) and md(4).

use std::collections::BTreeSet;
use std::fmt;

use stiefel_sys::block::{self, Disk};

use super::presentable;
use crate::tree::Tree;

/// Layers that are followed; real ones have five.
const MAX_LAYERS: usize = 64;

/// One block device between `/` and its disks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    /// The kernel's name, e.g. `dm-0`.
    pub device: String,
    /// What people call it, e.g. `vg-root`.
    pub name: String,
    /// What it is.
    pub kind: LayerKind,
}

/// What a layer is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LayerKind {
    /// Encryption; which version of LUKS, or another word.
    Crypt(String),
    /// A logical volume.
    Lvm,
    /// An array, with its level.
    Raid(String),
    /// Another device of the device mapper, or bcache and the like.
    Other,
    /// A partition.
    Partition,
    /// A whole disk.
    Disk,
}

/// `/`, and what it stands on.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RootDisk {
    /// The file system's type.
    pub file_system: Option<String>,
    /// From the file system's device downwards.
    pub layers: Vec<Layer>,
    /// The disks' names in the kernel; more than one cannot be served.
    pub disks: Vec<String>,
    /// What is known of each disk.
    pub known: Vec<Disk>,
    /// The kernel modules that drive the disks and what they are plugged into.
    pub drivers: Vec<String>,
    /// The pool, where `/` is on ZFS, which tells nothing of its disks.
    pub pool: Option<String>,
}

impl RootDisk {
    pub(super) fn of(tree: &Tree) -> Self {
        let mounts = tree.mounts();
        let mount = mounts.iter().rfind(|mount| mount.point == "/");
        let file_system = mount.map(|mount| presentable(&mount.kind));
        let pool = mount
            .filter(|mount| mount.kind == "zfs")
            .and_then(|mount| mount.source.split('/').next())
            .map(presentable);
        let Some(device) = tree.root_device().filter(|_| pool.is_none()) else {
            return Self {
                file_system,
                pool,
                ..Self::default()
            };
        };
        let tops = btrfs_devices(tree, &device).unwrap_or_else(|| vec![device]);
        let disks: BTreeSet<String> = tops.iter().flat_map(|device| tree.disks_below(device)).collect();
        let known = block::disks(&tree.path("/sys")).unwrap_or_default();
        Self {
            file_system,
            layers: layers(tree, tops),
            drivers: disks
                .iter()
                .flat_map(|disk| drivers(tree, disk))
                .collect::<BTreeSet<_>>()
                .into_iter()
                .collect(),
            known: known.into_iter().filter(|disk| disks.contains(&disk.name)).collect(),
            disks: disks.into_iter().collect(),
            pool: None,
        }
    }

    /// The devices that hold LUKS volumes below `/`, by the kernel's names.
    pub(crate) fn encrypted(&self, tree: &Tree) -> Vec<String> {
        let below = |layer: &Layer| tree.names(format!("/sys/class/block/{}/slaves", layer.device));
        let crypt = self
            .layers
            .iter()
            .filter(|layer| matches!(layer.kind, LayerKind::Crypt(_)));
        crypt.flat_map(below).collect()
    }
}

/// The modules behind a disk: of itself and of all that it is plugged into.
fn drivers(tree: &Tree, disk: &str) -> Vec<String> {
    let Ok(device) = tree.path(format!("/sys/class/block/{disk}")).canonicalize() else {
        return Vec::new();
    };
    let devices = tree.path("/sys/devices").canonicalize().unwrap_or_default();
    let inside = device.ancestors().take_while(|folder| folder.starts_with(&devices));
    let module = |folder: &std::path::Path| {
        let module = std::fs::read_link(folder.join("driver/module")).ok()?;
        Some(stiefel_shared::kmod::normalise(module.file_name()?.to_str()?))
    };
    inside
        .flat_map(|folder| [module(folder), module(&folder.join("device"))])
        .flatten()
        .collect()
}

/// All devices of a btrfs with several.
fn btrfs_devices(tree: &Tree, root: &str) -> Option<Vec<String>> {
    let folder = "/sys/fs/btrfs";
    tree.names(folder)
        .into_iter()
        .map(|uuid| tree.names(format!("{folder}/{uuid}/devices")))
        .find(|devices| devices.iter().any(|device| device == root))
}

fn layers(tree: &Tree, tops: Vec<String>) -> Vec<Layer> {
    let mut layers: Vec<Layer> = Vec::new();
    let mut waiting = std::collections::VecDeque::from(tops);
    while let Some(device) = waiting.pop_front() {
        if layers.len() >= MAX_LAYERS || layers.iter().any(|layer| layer.device == device) {
            continue;
        }
        let folder = format!("/sys/class/block/{device}");
        if tree.path(format!("{folder}/partition")).exists() {
            waiting.extend(tree.parent_of(&folder));
        }
        waiting.extend(tree.names(format!("{folder}/slaves")));
        layers.push(layer(tree, device, &folder));
    }
    layers
}

fn layer(tree: &Tree, device: String, folder: &str) -> Layer {
    let get = |file: &str| tree.line(format!("{folder}/{file}"));
    let uuid = get("dm/uuid").unwrap_or_default();
    let kind = if tree.path(format!("{folder}/partition")).exists() {
        LayerKind::Partition
    } else if let Some(rest) = uuid.strip_prefix("CRYPT-") {
        LayerKind::Crypt(presentable(rest.split('-').next().unwrap_or(rest)))
    } else if uuid.starts_with("LVM-") {
        LayerKind::Lvm
    } else if let Some(level) = get("md/level") {
        LayerKind::Raid(presentable(&level))
    } else if tree.names(format!("{folder}/slaves")).is_empty() {
        LayerKind::Disk
    } else {
        LayerKind::Other
    };
    let name = get("dm/name").map_or_else(|| device.clone(), |name| presentable(&name));
    Layer { device, name, kind }
}

/// As it is printed on disks: powers of ten.
fn gigabytes(bytes: u64) -> String {
    let tenths = bytes / 100_000_000;
    format!("{}.{} GB", tenths / 10, tenths % 10)
}

impl fmt::Display for RootDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let system = self.file_system.as_deref().unwrap_or("an unknown file system");
        if let Some(pool) = &self.pool {
            return write!(f, "/ is ZFS, of the pool {pool}, which does not tell its disks");
        }
        write!(f, "/ is {system}")?;
        if self.disks.is_empty() {
            return f.write_str(", which stands on no disk that can be seen");
        }
        let several = self.disks.len() > 1;
        for layer in &self.layers {
            let name = &layer.name;
            match &layer.kind {
                LayerKind::Crypt(kind) => write!(f, " on {kind} ({name})")?,
                LayerKind::Lvm => write!(f, " on LVM ({name})")?,
                LayerKind::Raid(level) => write!(f, " on {level} ({name})")?,
                LayerKind::Other => write!(f, " on {name}")?,
                LayerKind::Partition if several => {}
                LayerKind::Partition => write!(f, " on partition {name}")?,
                LayerKind::Disk => {}
            }
        }
        let named = self.disks.iter().map(|name| {
            let known = self.known.iter().find(|disk| disk.name == *name);
            known.map_or_else(
                || name.clone(),
                |disk| {
                    let model = presentable(disk.model.as_deref().unwrap_or("unknown model"));
                    format!("{name} ({model}, {})", gigabytes(disk.size))
                },
            )
        });
        let named = named.collect::<Vec<_>>().join(", ");
        match several {
            true => write!(f, " on {} disks: {named}", self.disks.len()),
            false if self.layers.iter().any(|layer| layer.kind == LayerKind::Partition) => write!(f, " of {named}"),
            false => write!(f, " on {named}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::fixture::Fixture;
    use super::*;

    #[test]
    fn all_disks_of_a_btrfs_are_named() {
        let laptop = Fixture::arch();
        laptop.disk("sdb", "Other", 1000);
        for device in ["sda2", "sdb"] {
            laptop.write(&format!("/sys/fs/btrfs/1-2/devices/{device}/size"), "1\n");
        }
        let root = RootDisk::of(&laptop.tree());
        assert_eq!(root.disks, ["sda", "sdb"]);
        assert!(root.to_string().contains("on 2 disks: sda (Crucial, "), "{root}");
    }

    #[test]
    fn an_array_is_named_with_its_level_and_disks() {
        let laptop = Fixture::new();
        laptop.disk("sda", "A", 1000);
        laptop.disk("sdb", "B", 1000);
        laptop.write("/sys/class/block/md0/md/level", "raid1\n");
        laptop.write("/sys/class/block/md0/slaves/sda/x", "");
        laptop.write("/sys/class/block/md0/slaves/sdb/x", "");
        laptop.mount("md0", "/", "xfs", "/dev/md0");
        laptop.write("/dev/md0", "");
        let root = RootDisk::of(&laptop.tree());
        assert_eq!(root.disks, ["sda", "sdb"]);
        assert!(
            root.to_string().starts_with("/ is xfs on raid1 (md0) on 2 disks"),
            "{root}"
        );
    }

    #[test]
    fn a_pool_of_zfs_is_named() {
        let laptop = Fixture::new();
        laptop.mount("0:30", "/", "zfs", "rpool/ROOT/debian");
        let root = RootDisk::of(&laptop.tree());
        assert_eq!(root.pool.as_deref(), Some("rpool"));
        assert!(root.disks.is_empty() && root.to_string().contains("rpool"));
    }

    #[test]
    fn encrypted_devices_are_those_below_the_encryption() {
        let laptop = Fixture::debian_luks_lvm();
        let tree = laptop.tree();
        assert_eq!(RootDisk::of(&tree).encrypted(&tree), ["nvme0n1p3"]);
    }
}
