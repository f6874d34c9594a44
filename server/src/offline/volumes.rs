//! The laptop's file systems, mounted so that nothing at all is written to its disk.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use stiefel_initrd_builder::modules::MAPPER;
use stiefel_shared::handover::{Layers, Logical, VOLUMES, Volume};
use stiefel_shared::unlock::Passphrase;
use stiefel_sys::block::{self, Disk};
use stiefel_sys::console::Console;
use stiefel_sys::module::Loader;
use stiefel_sys::mount::{self, MountEntry, MountFlags};
use stiefel_sys::shield;

use super::desk::{self, Asking};
use super::layers::{self, Lock, Locks};
use super::tools;
use crate::tree::Tree;

/// Where file systems of the disk are mounted for a moment; nothing else is.
pub(super) const FOLDER: &str = "/run/stiefel/disk";

/// Unmounts what a role that was killed while it read has left: it must not outlive reading, and btrfs and xfs take a second device with
/// the same content for a duplicate.
pub(super) fn release() -> anyhow::Result<()> {
    let entries = mount::read_mountinfo(Path::new("/proc"))?;
    unmount(&mut left(entries))
}

/// Takes down what a role that was killed while it read, or this one, has opened on the disk.
///
/// # Errors
/// Something stays: the disk must not be served then.
pub(super) fn take_down(disk: &Disk) -> anyhow::Result<()> {
    layers::down(&mut layers::Kernel { disk })
}

/// The mount points of ours, in the order in which they were mounted.
fn left(mut entries: Vec<MountEntry>) -> Vec<PathBuf> {
    entries.retain(|entry| entry.mount_point.starts_with(FOLDER));
    mount::deepest_first(&mut entries);
    let points = entries.into_iter().rev().map(|entry| entry.mount_point);
    points.collect()
}

/// Unmounts these, the last one first.
fn unmount(points: &mut Vec<PathBuf>) -> anyhow::Result<()> {
    while let Some(point) = points.last() {
        mount::unmount(point, false)
            .context("a file system of the laptop's disk stays mounted, so the disk is served to nobody")?;
        points.pop();
    }
    Ok(())
}

/// File systems that are to be unmounted by [`Self::end`]; after an error they are when this is dropped, as far as that goes.
pub(super) struct Volumes<'a> {
    console: &'a Console,
    disk: &'a Disk,
    mounted: Vec<PathBuf>,
    /// What stands between partitions and file systems.
    layers: Option<Open>,
    /// One for each partition: btrfs takes a second one with the same content for a duplicate. They go away after the mounts.
    devices: Vec<(u32, File, PathBuf)>,
}

/// LUKS and LVM of the disk.
struct Open {
    /// The partitions with LUKS.
    luks: Vec<u32>,
    /// Those with parts of LVM.
    physical: Vec<u32>,
    /// The volumes of LVM that are open, with their devices.
    logical: Vec<(Logical, PathBuf)>,
}

impl<'a> Volumes<'a> {
    /// Of this disk; loads what is needed for that.
    pub(super) fn new(console: &'a Console, disk: &'a Disk) -> anyhow::Result<Self> {
        load(&["loop"])?;
        Ok(Self {
            console,
            disk,
            mounted: Vec::new(),
            layers: None,
            devices: Vec::new(),
        })
    }

    /// Has LUKS opened by passphrases that a desktop sends, so that volumes on it, and on LVM, can be mounted.
    pub(super) fn open(&mut self, console: &'static Console, hostname: &str, layers: &Layers) -> anyhow::Result<()> {
        load(MAPPER)?;
        let mut locks = Vec::new();
        for luks in &layers.luks {
            locks.push(Lock {
                label: format!(
                    "{} ({}, partition {})",
                    luks.label,
                    self.disk.path.display(),
                    luks.partition
                ),
                name: layers::unlocked(luks.partition),
                device: self.device(luks.partition)?,
            });
        }
        self.layers = Some(Open {
            luks: layers.luks.iter().map(|luks| luks.partition).collect(),
            physical: layers.physical.clone(),
            logical: Vec::new(),
        });
        if locks.is_empty() {
            return Ok(());
        }
        let asking = Asking {
            hostname,
            keys: &layers.keys,
            tickets: &layers.tickets,
        };
        let open = |lock: &Lock, passphrase: &Passphrase| layers::open(Path::new("/"), lock, passphrase);
        desk::wait(console, &asking, Locks::new(locks, open))
    }

    /// Mounts a volume at `point`, which may lie in another one; nothing on it can be run, and nothing is written.
    pub(super) fn mount(&mut self, volume: &Volume, point: &Path) -> anyhow::Result<()> {
        let known = VOLUMES.iter().find(|(fstype, _)| *fstype == volume.fstype);
        let Some((fstype, without_journal)) = known else {
            bail!("the ramdisk does not read the file system {}", volume.fstype);
        };
        load(&modules_of(fstype))?;
        super::step();
        if !point.is_dir() {
            mount::make_dir_all(point, 0o700)?;
        }
        let device = self.device_of(volume)?;
        let looped = device.display().to_string();
        let flags = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
        let folder = subvolume(volume)?;
        let try_with = |options: &[&str]| {
            let options = Some(options.join(",")).filter(|options| !options.is_empty());
            mount::mount(&looped, point, fstype, flags, options.as_deref())
        };
        let plain: Vec<&str> = folder.as_deref().into_iter().collect();
        if let Err(error) = try_with(&plain) {
            // On a device that cannot be written, a journal that is not empty is refused.
            let Some(without_journal) = without_journal else {
                return Err(error.into());
            };
            let options: Vec<&str> = plain.into_iter().chain([*without_journal]).collect();
            try_with(&options)?;
            self.console.warn(&format!(
                "partition {} of {} was not unmounted in order when the laptop was used last; it is read as it is, without its \
                 journal, so what is booted may be older than it should be. Start the laptop's own system once to mend that",
                volume.partition,
                self.disk.path.display()
            ));
        }
        self.mounted.push(point.to_owned());
        Ok(())
    }

    /// Unmounts them, the last one first: what is served must not be mounted.
    pub(super) fn end(mut self) -> anyhow::Result<()> {
        self.close()
    }

    fn close(&mut self) -> anyhow::Result<()> {
        unmount(&mut self.mounted)?;
        if self.layers.is_some() {
            // Each goes with its last user, which is what stands on it.
            self.devices.clear();
            take_down(self.disk)?;
            self.layers = None;
        }
        Ok(())
    }

    /// The device of a volume, perhaps through LUKS and LVM.
    fn device_of(&mut self, volume: &Volume) -> anyhow::Result<PathBuf> {
        let Some(logical) = &volume.logical else {
            return self.base(volume.partition);
        };
        let open = self
            .layers
            .as_ref()
            .context("the stick does not say on what LVM lies")?;
        if let Some((_, device)) = open.logical.iter().find(|(known, _)| known == logical) {
            return Ok(device.clone());
        }
        let physical = open.physical.clone();
        let on = physical.into_iter().map(|partition| self.base(partition));
        let on = on.collect::<anyhow::Result<Vec<_>>>()?;
        let device = layers::activate(Path::new("/"), Path::new("/dev"), logical, &on)?;
        if let Some(open) = &mut self.layers {
            open.logical.push((logical.clone(), device.clone()));
        }
        Ok(device)
    }

    /// What cannot be written, over a partition or the open LUKS in it.
    fn base(&mut self, number: u32) -> anyhow::Result<PathBuf> {
        let open = self.layers.as_ref();
        if open.is_some_and(|open| open.luks.contains(&number)) {
            return Ok(tools::mapped(Path::new("/dev"), &layers::unlocked(number)));
        }
        self.device(number)
    }

    /// What cannot be written, over a partition.
    fn device(&mut self, number: u32) -> anyhow::Result<PathBuf> {
        if let Some((_, _, path)) = self.devices.iter().find(|(known, ..)| *known == number) {
            return Ok(path.clone());
        }
        let device = partition(&Tree::new(Path::new("/")), &self.disk.name, number)?;
        let file = File::open(&device).with_context(|| format!("cannot open {}", device.display()))?;
        let (held, path) = shield::read_only(Path::new("/dev"), &device, block::logical_block_size(&file)?)?;
        self.devices.push((number, held, path.clone()));
        Ok(path)
    }
}

impl Drop for Volumes<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.close() {
            self.console.warn(&format!("{error:#}"));
        }
    }
}

/// How a subvolume of btrfs is named; others have none.
fn subvolume(volume: &Volume) -> anyhow::Result<Option<String>> {
    if volume.fstype == "btrfs" {
        ensure!(
            volume.folder.starts_with('/') && !volume.folder.contains([',', '\0']),
            "the subvolume {:?} cannot be mounted by name",
            volume.folder
        );
        // Of the top, not of the default subvolume.
        return Ok(Some(format!("subvol={}", volume.folder)));
    }
    ensure!(
        volume.folder == "/",
        "the folder {:?} of a {} cannot be mounted by itself",
        volume.folder,
        volume.fstype
    );
    Ok(None)
}

/// A file system's own module, and those that nothing names as its dependency.
pub(super) fn modules_of(fstype: &str) -> Vec<&str> {
    let besides: &[&str] = match fstype {
        "vfat" => &["nls_cp437", "nls_ascii", "nls_iso8859_1", "nls_utf8"],
        _ => &["crc32c_generic"],
    };
    besides.iter().copied().chain([fstype]).collect()
}

/// Loads modules; one that this kernel does not have is in it already, or it will be missed soon.
pub(super) fn load(modules: &[&str]) -> anyhow::Result<()> {
    let mut loader = Loader::running()?;
    for module in modules {
        // What is missed is said by who needs it.
        let _ = loader.load(module);
    }
    Ok(())
}

/// The device of a disk's partition.
pub(super) fn partition(tree: &Tree, disk: &str, number: u32) -> anyhow::Result<PathBuf> {
    let folder = format!("/sys/block/{disk}");
    let name = tree.names(&folder).into_iter().find(|name| {
        let told = tree.line(format!("{folder}/{name}/partition"));
        told.and_then(|told| told.parse().ok()) == Some(number)
    });
    let name = name.with_context(|| format!("the disk {disk} has no partition {number} any more"))?;
    Ok(tree.path(Path::new("/dev").join(name)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volume(fstype: &str, folder: &str) -> Volume {
        Volume {
            partition: 1,
            fstype: fstype.into(),
            folder: folder.into(),
            logical: None,
        }
    }

    #[test]
    fn a_subvolume_is_named_from_the_top_and_nothing_else_can_be() {
        let named = |fstype, folder| subvolume(&volume(fstype, folder)).ok();
        assert_eq!(named("btrfs", "/"), Some(Some("subvol=/".into())));
        assert_eq!(named("btrfs", "/@/boot"), Some(Some("subvol=/@/boot".into())));
        assert_eq!(named("ext4", "/"), Some(None));
        for (fstype, folder) in [("ext4", "/boot"), ("btrfs", "/a,exec"), ("btrfs", "a")] {
            assert_eq!(named(fstype, folder), None, "{fstype} {folder}");
        }
    }

    #[test]
    fn what_an_earlier_try_has_left_is_found_with_what_stands_on_others_last() {
        let table = b"22 1 0:2 / / rw - rootfs rootfs rw\n23 22 0:21 / /run rw - tmpfs tmpfs rw\n\
            31 30 7:1 / /run/stiefel/disk/root/boot ro - ext4 /dev/loop1 ro\n30 23 7:0 / /run/stiefel/disk/root ro - ext4 /dev/loop0 ro\n\
            32 23 7:2 / /run/stiefel/diskette ro - ext4 /dev/loop2 ro\n";
        let points = left(mount::mountinfo(table));
        assert_eq!(
            points,
            ["/run/stiefel/disk/root", "/run/stiefel/disk/root/boot"].map(PathBuf::from)
        );
    }

    #[test]
    fn a_file_system_that_stays_mounted_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        // Not mounted, or not ours to unmount.
        let mut points = vec![dir.path().join("a"), dir.path().to_owned()];
        let error = unmount(&mut points).unwrap_err().to_string();
        assert!(error.contains("served to nobody"), "{error}");
        assert_eq!(points.len(), 2, "what is left is known");
        assert!(unmount(&mut Vec::new()).is_ok());
    }

    #[test]
    fn a_partition_is_found_by_its_number_whatever_its_name() {
        let dir = tempfile::tempdir().unwrap();
        for (name, number) in [("nvme0n1p2", "2\n"), ("nvme0n1p10", "10\n"), ("queue", "")] {
            let folder = dir.path().join("sys/block/nvme0n1").join(name);
            std::fs::create_dir_all(&folder).unwrap();
            std::fs::write(folder.join("partition"), number).unwrap();
        }
        let tree = Tree::new(dir.path());
        let found = |number| partition(&tree, "nvme0n1", number).ok();
        assert_eq!(found(10), Some(dir.path().join("dev/nvme0n1p10")));
        assert_eq!(found(1), None);
    }
}
