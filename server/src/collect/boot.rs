//! What the laptop boots from, so that the desktop sees at its reboot whether a newer kernel is there by now.
//!
//! Counterpart: `client::anew`, which looks at the same folders from the desktop.

use std::collections::BTreeSet;
use std::path::PathBuf;

use stiefel_shared::handover::{BootFolder, MAX_BOOT_FOLDERS};
use stiefel_sys::fingerprint::fingerprint;

use super::place::partition_of;
use crate::payload::FoundPayload;
use crate::tree::{Mount, Tree};

/// The folders, as they are now: /boot, the file systems mounted below it or at /efi, and what else holds the payload.
/// `disk` is the kernel's name of the one that is served.
///
/// `None` if one of them could not be looked at from the desktop (another disk, an encrypted file system that is not the
/// root, a bind mount), or not be read now: it then takes each of its reboots for one with a new kernel.
pub(super) fn folders(tree: &Tree, disk: &str, payload: &FoundPayload) -> Option<Vec<BootFolder>> {
    for mount in tree.mounts() {
        if mount.kind == "autofs" && boots(&mount.point) {
            // A look mounts what is behind it.
            tree.names(&mount.point);
        }
    }
    let mounts = tree.mounts();
    let root = mounts.iter().rfind(|mount| mount.point == "/")?;
    let mut own: BTreeSet<&str> = mounts
        .iter()
        .map(|mount| mount.point.as_str())
        .filter(|point| boots(point))
        .collect();
    let mut in_root = BTreeSet::new();
    if !own.contains("/boot") && tree.path("/boot").exists() {
        in_root.insert(PathBuf::from("/boot"));
    }
    for piece in payload.initrds.iter().chain([&payload.kernel]) {
        let file = tree.inside(&piece.path)?;
        let below = mounts.iter().filter(|mount| file.starts_with(&mount.point));
        let point = below
            .map(|mount| mount.point.as_str())
            .max_by_key(|point| point.len())?;
        if point != "/" {
            own.insert(point);
        } else if !file.starts_with("/boot") {
            in_root.insert(file);
        }
    }
    if own.len() + in_root.len() > MAX_BOOT_FOLDERS {
        return None;
    }
    let in_root = in_root
        .into_iter()
        .map(|path| folder(tree, path.into_os_string().into_string().ok()?, None, root));
    let own = own.into_iter().map(|point| {
        let mount = mounts.iter().rfind(|mount| mount.point == point)?;
        folder(tree, point.to_owned(), Some(partition(tree, disk, mount)?), mount)
    });
    in_root.chain(own).collect()
}

/// Whether a file system that is mounted here holds what is booted. GRUB's own folders do not: some distributions have
/// subvolumes for its modules.
fn boots(point: &str) -> bool {
    let below = |folder: &str| point.strip_prefix(folder).is_some_and(|rest| rest.starts_with('/'));
    point == "/efi" || point == "/boot" || (below("/boot") && !below("/boot/grub") && !below("/boot/grub2"))
}

fn folder(tree: &Tree, path: String, partition: Option<u32>, mount: &Mount) -> Option<BootFolder> {
    let folder = BootFolder {
        fingerprint: fingerprint(&tree.path(&path)).ok()?,
        path,
        partition,
        fstype: mount.kind.clone(),
    };
    folder.is_sound().then_some(folder)
}

/// Which partition of the disk is mounted as a whole.
fn partition(tree: &Tree, disk: &str, mount: &Mount) -> Option<u32> {
    (mount.root == "/").then(|| partition_of(tree, disk, mount))?
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;
    use std::path::Path;

    const ROOT: &str = "22 1 8:3 / / rw - ext4 /dev/sda3 rw\n";

    /// A laptop with the disk `sda`, these mounts, and a kernel in /boot.
    struct Laptop {
        dir: tempfile::TempDir,
        tree: Tree,
        payload: FoundPayload,
    }

    impl Laptop {
        fn new(mounts: &str) -> Self {
            let dir = tempfile::tempdir().unwrap();
            let tree = Tree::new(dir.path());
            let payload = FoundPayload {
                kernel: tree.path("/boot/vmlinuz").into(),
                initrds: vec![tree.path("/boot/initrd.img").into()],
                cmdline: String::new(),
                version: String::new(),
                modules: PathBuf::new(),
                reason: String::new(),
                notes: Vec::new(),
            };
            let laptop = Self { dir, tree, payload };
            laptop.put("/proc/self/mountinfo", mounts);
            laptop.put("/boot/vmlinuz", "kernel");
            laptop.put("/boot/initrd.img", "initrd");
            laptop.put("/boot/efi/EFI/BOOT/BOOTX64.EFI", "loader");
            for disk in ["sda", "sdb"] {
                for number in 1..=3 {
                    let name = format!("{disk}{number}");
                    laptop.put(&format!("/sys/devices/{disk}/{name}/partition"), &format!("{number}\n"));
                    laptop.put(&format!("/dev/{name}"), "");
                    laptop.link(
                        &format!("../../devices/{disk}/{name}"),
                        &format!("/sys/class/block/{name}"),
                    );
                }
            }
            laptop.link("../dm-0", "/dev/mapper/boot");
            laptop.put("/sys/class/block/dm-0/size", "1\n");
            laptop
        }

        fn put(&self, path: &str, text: &str) {
            let path = self.tree.path(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }

        fn link(&self, target: &str, path: &str) {
            let path = self.tree.path(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            symlink(target, path).unwrap();
        }

        /// Path, partition and type of each folder.
        fn folders(&self) -> Option<Vec<(String, Option<u32>, String)>> {
            let folders = folders(&self.tree, "sda", &self.payload)?;
            let told = folders.into_iter();
            Some(
                told.map(|folder| (folder.path, folder.partition, folder.fstype))
                    .collect(),
            )
        }
    }

    fn told(path: &str, partition: Option<u32>, fstype: &str) -> (String, Option<u32>, String) {
        (path.to_owned(), partition, fstype.to_owned())
    }

    #[test]
    fn a_boot_folder_in_the_root_is_one_of_its_folders() {
        let laptop = Laptop::new(ROOT);
        assert_eq!(laptop.folders(), Some(vec![told("/boot", None, "ext4")]));
    }

    #[test]
    fn separate_file_systems_are_named_by_their_partitions() {
        let laptop = Laptop::new(&format!(
            "{ROOT}23 22 8:2 / /boot rw - ext2 /dev/sda2 rw\n24 23 8:1 / /boot/efi rw - vfat /dev/sda1 rw\n\
             25 22 8:1 / /home rw - xfs /dev/sda1 rw\n26 22 8:1 / /bootleg rw - xfs /dev/sda1 rw\n"
        ));
        let expected = [told("/boot", Some(2), "ext2"), told("/boot/efi", Some(1), "vfat")];
        assert_eq!(laptop.folders().as_deref(), Some(&expected[..]));
    }

    #[test]
    fn a_new_kernel_changes_the_fingerprint() {
        let laptop = Laptop::new(ROOT);
        let before = folders(&laptop.tree, "sda", &laptop.payload);
        assert_eq!(folders(&laptop.tree, "sda", &laptop.payload), before);
        laptop.put("/boot/vmlinuz-6.2", "another");
        assert_ne!(folders(&laptop.tree, "sda", &laptop.payload), before);
    }

    #[test]
    fn what_the_desktop_could_not_look_at_is_told() {
        for boot in [
            "23 22 8:18 / /boot rw - ext4 /dev/sdb2 rw",
            "23 22 254:0 / /boot rw - ext4 /dev/mapper/boot rw",
            "23 22 8:3 /other/boot /boot rw - ext4 /dev/sda3 rw",
            "23 22 0:40 / /boot rw - tmpfs tmpfs rw",
        ] {
            assert_eq!(Laptop::new(&format!("{ROOT}{boot}\n")).folders(), None, "{boot}");
        }
        assert_eq!(Laptop::new("").folders(), None, "nothing runs here");
    }

    #[test]
    fn what_grub_keeps_for_itself_does_not_matter() {
        let laptop = Laptop::new(&format!(
            "{ROOT}23 22 0:30 /@/boot/grub2/i386-pc /boot/grub2/i386-pc rw - btrfs /dev/sda3 rw\n"
        ));
        assert_eq!(laptop.folders(), Some(vec![told("/boot", None, "ext4")]));
    }

    #[test]
    fn a_kernel_that_lies_elsewhere_counts_besides() {
        let mut laptop = Laptop::new(&format!("{ROOT}23 22 8:2 / /data rw - xfs /dev/sda2 rw\n"));
        laptop.put("/usr/lib/modules/6.1/vmlinuz", "kernel");
        laptop.put("/data/initrd", "initrd");
        laptop.payload.kernel = laptop.tree.path("/usr/lib/modules/6.1/vmlinuz").into();
        laptop.payload.initrds = vec![laptop.tree.path("/data/initrd").into()];
        let expected = [
            told("/boot", None, "ext4"),
            told("/usr/lib/modules/6.1/vmlinuz", None, "ext4"),
            told("/data", Some(2), "xfs"),
        ];
        assert_eq!(laptop.folders().as_deref(), Some(&expected[..]));
    }

    #[test]
    fn a_link_to_the_kernel_is_followed() {
        let mut laptop = Laptop::new(ROOT);
        laptop.link("boot/vmlinuz", "/vmlinuz");
        laptop.payload.kernel = laptop.tree.path("/vmlinuz").into();
        assert_eq!(laptop.folders(), Some(vec![told("/boot", None, "ext4")]));
        assert_eq!(
            laptop.tree.inside(&laptop.dir.path().join("vmlinuz")).as_deref(),
            Some(Path::new("/boot/vmlinuz"))
        );
    }
}
