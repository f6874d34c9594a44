//! What a file system of the laptop lies on, where that is not a partition: LUKS, LVM, or LVM in LUKS, as sysfs shows it.
//!
//! Counterpart: `crate::offline::layers`, which opens it again in the ramdisk. It goes by what is open now, not by /etc/crypttab, which may
//! name what is not in use. Refused, by name: other disks, RAID, LUKS in LVM, a LUKS header that lies elsewhere, volumes of LVM that stand
//! on others (thin ones, mirrors, snapshots, caches).

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read;
use std::time::SystemTime;

use stiefel_initrd_builder::ramdisk::{CRYPT, DM};
use stiefel_shared::discovery::{Ticket, TicketKind};
use stiefel_shared::handover::{Layers, Logical, Luks};
use stiefel_shared::key::StickKey;
use stiefel_shared::luks;
use stiefel_shared::seal::SealError;

use super::place::{PlaceError, device_of, number_of};
use crate::tree::{Mount, Tree};

/// What has to be opened.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Opened {
    /// Partitions with LUKS, each with the name of the open device.
    luks: BTreeMap<u32, String>,
    /// Partitions with parts of LVM, perhaps in LUKS.
    physical: BTreeSet<u32>,
}

impl Opened {
    /// On which partition a mounted file system lies, and on which volume of LVM; what has to be opened for it is remembered.
    pub(super) fn below(
        &mut self,
        tree: &Tree,
        disk: &str,
        mount: &Mount,
    ) -> Result<(u32, Option<Logical>), PlaceError> {
        let refused = |below: String| PlaceError::Layer {
            point: mount.point.clone(),
            source_name: mount.source.clone(),
            below,
            disk: disk.to_owned(),
        };
        let device = device_of(tree, mount).ok_or_else(|| refused("no block device".to_owned()))?;
        if !is_logical(tree, &device) {
            return Ok((self.partition(tree, disk, &device).map_err(refused)?, None));
        }
        let name = mapped(tree, &device);
        let logical = name.as_deref().and_then(Logical::from_mapped);
        let logical = logical.ok_or_else(|| refused(format!("{device}, a volume of LVM with a strange name")))?;
        let below = tree.names(format!("/sys/class/block/{device}/slaves"));
        let mut first = None;
        for part in &below {
            if is_logical(tree, part) {
                let what = "a volume of LVM that stands on others (thin, mirrored, cached, or with snapshots)";
                return Err(refused(what.to_owned()));
            }
            let partition = self.partition(tree, disk, part).map_err(refused)?;
            self.physical.insert(partition);
            first = first.or(Some(partition));
        }
        let first = first.ok_or_else(|| refused(format!("{device}, a volume of LVM on nothing")))?;
        Ok((first, Some(logical)))
    }

    /// The partition that a device is, or LUKS on which it is; else what it is, for people.
    fn partition(&mut self, tree: &Tree, disk: &str, device: &str) -> Result<u32, String> {
        if let Some(number) = number_of(tree, disk, device) {
            return Ok(number);
        }
        let told = tree
            .line(format!("/sys/class/block/{device}/dm/uuid"))
            .unwrap_or_default();
        if !["CRYPT-LUKS1-", "CRYPT-LUKS2-"]
            .iter()
            .any(|kind| told.starts_with(kind))
        {
            return Err(what_it_is(tree, device, &told));
        }
        let below = tree.names(format!("/sys/class/block/{device}/slaves"));
        let [below] = below.as_slice() else {
            return Err(format!("{device}, LUKS on several devices"));
        };
        let number = number_of(tree, disk, below)
            .ok_or_else(|| format!("LUKS on {below}, which is no partition of that disk"))?;
        if !has_header(tree, below) {
            return Err(format!("LUKS on {below}, whose header lies elsewhere"));
        }
        let label = mapped(tree, device).unwrap_or_else(|| device.to_owned());
        self.luks.insert(number, label);
        Ok(number)
    }

    /// What the ramdisk must have.
    pub(super) fn modules(&self) -> impl Iterator<Item = &'static str> {
        let mapper = (!self.luks.is_empty() || !self.physical.is_empty()).then_some(DM);
        let crypt = (!self.luks.is_empty()).then_some(CRYPT);
        mapper.into_iter().chain(crypt)
    }

    /// As the stick is told of it, with keys made from these; `None` if nothing has to be opened.
    pub(super) fn layers(self, keys: &[StickKey]) -> Result<Option<Layers>, SealError> {
        if self.luks.is_empty() && self.physical.is_empty() {
            return Ok(None);
        }
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let now = now.map_or(0, |now| now.as_secs());
        // Where there is nothing to be unlocked nobody needs one.
        let asked = keys.iter().filter(|_| !self.luks.is_empty());
        let issued = asked.map(|key| Ticket::issue_for(TicketKind::Unlocking, key, now));
        let (tickets, keys) = issued.collect::<Result<Vec<_>, _>>()?.into_iter().unzip();
        let luks = self.luks.into_iter();
        Ok(Some(Layers {
            luks: luks.map(|(partition, label)| Luks { partition, label }).collect(),
            physical: self.physical.into_iter().collect(),
            keys,
            tickets,
        }))
    }
}

fn is_logical(tree: &Tree, device: &str) -> bool {
    tree.line(format!("/sys/class/block/{device}/dm/uuid"))
        .is_some_and(|uuid| uuid.starts_with("LVM-"))
}

/// What device mapper calls it.
fn mapped(tree: &Tree, device: &str) -> Option<String> {
    tree.line(format!("/sys/class/block/{device}/dm/name"))
}

fn what_it_is(tree: &Tree, device: &str, uuid: &str) -> String {
    if let Some(level) = tree.line(format!("/sys/class/block/{device}/md/level")) {
        return format!("{device}, a {level}");
    }
    match uuid.split('-').collect::<Vec<_>>().as_slice() {
        ["LVM", ..] => format!("{device}, LUKS or another layer on a volume of LVM"),
        ["CRYPT", kind, ..] => format!("{device}, encrypted, but not by LUKS ({kind})"),
        _ => format!("{device}, which is no partition of that disk"),
    }
}

/// Whether a partition begins as LUKS does.
fn has_header(tree: &Tree, device: &str) -> bool {
    let mut head = [0; 8];
    let read = File::open(tree.path(format!("/dev/{device}"))).and_then(|mut file| file.read_exact(&mut head));
    read.is_ok() && luks::version(&head).is_some_and(|version| (1..=2).contains(&version))
}

#[cfg(test)]
mod tests {
    use super::super::place::mounts;
    use super::super::place::tests::{laptop, put};
    use super::*;

    /// `sda3` has LUKS, which is open as `dm-0`, with LVM in it: `dm-1` is the volume `laptop--vg-root`. /boot is on `sda2`.
    fn encrypted() -> (tempfile::TempDir, Tree) {
        let (dir, tree) = laptop(
            "22 1 253:1 / / rw - ext4 /dev/mapper/laptop--vg-root rw\n\
             23 22 8:2 / /boot rw - ext4 /dev/sda2 rw\n",
        );
        put(&tree, "/dev/sda3", "LUKS\u{0}\u{0}");
        std::fs::write(tree.path("/dev/sda3"), b"LUKS\xba\xbe\x00\x02").unwrap();
        device(&tree, "dm-0", "CRYPT-LUKS2-0a0b-sda3_crypt", "sda3_crypt", &["sda3"]);
        device(&tree, "dm-1", "LVM-0123", "laptop--vg-root", &["dm-0"]);
        std::fs::create_dir_all(tree.path("/dev/mapper")).unwrap();
        std::os::unix::fs::symlink("../dm-1", tree.path("/dev/mapper/laptop--vg-root")).unwrap();
        (dir, tree)
    }

    fn device(tree: &Tree, device: &str, uuid: &str, name: &str, below: &[&str]) {
        let folder = format!("/sys/class/block/{device}");
        put(tree, &format!("{folder}/dm/uuid"), uuid);
        put(tree, &format!("{folder}/dm/name"), name);
        put(tree, &format!("/dev/{device}"), "");
        let _ = std::fs::remove_dir_all(tree.path(format!("{folder}/slaves")));
        for part in below {
            put(tree, &format!("{folder}/slaves/{part}/x"), "");
        }
    }

    /// Where file systems are mounted, on which partition each lies, and on which volume of LVM.
    type Mounts = Vec<(String, u32, Option<Logical>)>;

    fn found(tree: &Tree) -> Result<(Opened, Mounts), PlaceError> {
        let mut opened = Opened::default();
        let mounts = mounts(tree, "sda", &mut opened)?;
        let mounts = mounts
            .into_iter()
            .map(|(point, volume)| (point, volume.partition, volume.logical));
        let mounts = mounts.collect();
        Ok((opened, mounts))
    }

    fn refusal(tree: &Tree) -> String {
        found(tree).unwrap_err().to_string()
    }

    #[test]
    fn lvm_in_luks_is_opened_by_its_partition_and_its_volumes_name() {
        let (_dir, tree) = encrypted();
        let (opened, mounts) = found(&tree).unwrap();
        let root = Logical {
            group: "laptop-vg".into(),
            name: "root".into(),
        };
        assert_eq!(mounts, [("/".into(), 3, Some(root)), ("/boot".into(), 2, None)]);
        assert_eq!(opened.modules().collect::<Vec<_>>(), ["dm_mod", "dm_crypt"]);
        let keys = ["a", "b"].map(|name| StickKey::generate(name).unwrap());
        let layers = opened.layers(&keys).unwrap().unwrap();
        assert_eq!(
            (layers.luks[0].partition, layers.luks[0].label.as_str()),
            (3, "sda3_crypt")
        );
        assert_eq!(layers.physical, [3]);
        let names: Vec<_> = layers.keys.iter().map(|key| key.name.as_str()).collect();
        assert_eq!((names, layers.tickets.len()), (vec!["a", "b"], 2));
        for (made, stick) in layers.keys.iter().zip(&keys) {
            assert_ne!(made.to_file(), stick.to_file(), "no stick's own key");
        }
    }

    #[test]
    fn a_file_system_in_luks_and_one_in_lvm_alone() {
        let (_dir, tree) = encrypted();
        put(
            &tree,
            "/proc/self/mountinfo",
            "22 1 253:0 / / rw - btrfs /dev/dm-0 rw\n",
        );
        let (opened, mounts) = found(&tree).unwrap();
        assert_eq!(mounts, [("/".into(), 3, None)]);
        assert!(opened.physical.is_empty() && opened.luks.contains_key(&3));

        let (_dir, tree) = encrypted();
        device(&tree, "dm-1", "LVM-0123", "vg-root", &["sda3"]);
        let (opened, mounts) = found(&tree).unwrap();
        assert_eq!((mounts[0].1, opened.modules().collect::<Vec<_>>()), (3, vec!["dm_mod"]));
        let layers = opened.layers(&[StickKey::generate("a").unwrap()]).unwrap().unwrap();
        assert!(layers.keys.is_empty() && layers.tickets.is_empty(), "nobody is asked");
        assert_eq!(layers.physical, [3]);
    }

    #[test]
    fn what_the_ramdisk_could_not_open_is_refused_by_name() {
        let (_dir, tree) = encrypted();
        std::fs::write(tree.path("/dev/sda3"), [0; 8]).unwrap();
        assert!(refusal(&tree).contains("whose header lies elsewhere"));

        let (_dir, tree) = encrypted();
        device(&tree, "dm-2", "LVM-0123-tpool", "vg-pool-tpool", &["dm-0"]);
        device(&tree, "dm-1", "LVM-0123", "vg-root", &["dm-2"]);
        assert!(refusal(&tree).contains("stands on others"));

        let (_dir, tree) = encrypted();
        device(&tree, "dm-0", "CRYPT-PLAIN-x", "x", &["sda3"]);
        assert!(refusal(&tree).contains("not by LUKS"));

        let (_dir, tree) = encrypted();
        device(&tree, "dm-0", "CRYPT-LUKS2-0-x", "x", &["sdb1"]);
        assert!(refusal(&tree).contains("sdb1"));

        // LUKS in a volume of LVM.
        let (_dir, tree) = encrypted();
        put(&tree, "/proc/self/mountinfo", "22 1 253:0 / / rw - ext4 /dev/dm-0 rw\n");
        device(&tree, "dm-0", "CRYPT-LUKS2-0-x", "x", &["dm-1"]);
        assert!(refusal(&tree).contains("dm-1"));

        let (_dir, tree) = encrypted();
        put(&tree, "/proc/self/mountinfo", "22 1 9:0 / / rw - ext4 /dev/md0 rw\n");
        put(&tree, "/dev/md0", "");
        put(&tree, "/sys/class/block/md0/md/level", "raid1\n");
        let text = refusal(&tree);
        assert!(text.contains("md0, a raid1") && text.contains("next:"), "{text}");
    }
}
