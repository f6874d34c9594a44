//! A laptop's file tree below a folder: `/`, or what `--root` names; tests make small ones.
//!
//! All that is read of the installed OS is read through it, and bounded. Paths in it are absolute and start with `/`.

use std::collections::{BTreeSet, VecDeque};
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Component, Path, PathBuf};

/// The largest text file of the OS that is read, in bytes.
const MAX_TEXT: u64 = 4 << 20;
/// As many symbolic links as the kernel follows in one path.
const MAX_LINKS: usize = 40;

/// udev's links to block devices.
pub(crate) const BY_UUID: &str = "/dev/disk/by-uuid";
pub(crate) const BY_LABEL: &str = "/dev/disk/by-label";
pub(crate) const BY_PARTUUID: &str = "/dev/disk/by-partuuid";

/// A file tree.
#[derive(Debug, Clone)]
pub(crate) struct Tree {
    root: PathBuf,
}

impl Tree {
    pub fn new(root: &Path) -> Self {
        Self { root: root.to_owned() }
    }

    /// Whether it is the running system's own.
    pub fn is_live(&self) -> bool {
        self.root == Path::new("/")
    }

    /// Where a path of the tree really lies.
    pub fn path(&self, path: impl AsRef<Path>) -> PathBuf {
        let path = path.as_ref();
        self.root.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// Where a path of the tree really lies, with links followed as if the tree were `/`: none leads out of it.
    ///
    /// # Errors
    /// As of opening: something is not there, is no folder, or the links have no end.
    pub fn resolve(&self, path: impl AsRef<Path>) -> io::Result<PathBuf> {
        let parts = |path: &Path| -> Vec<OsString> {
            let kept = path.components().filter_map(|part| match part {
                Component::Normal(_) | Component::ParentDir => Some(part.as_os_str().to_owned()),
                _ => None,
            });
            kept.collect()
        };
        let mut waiting = VecDeque::from(parts(path.as_ref()));
        let (mut found, mut links) = (PathBuf::new(), 0);
        while let Some(part) = waiting.pop_front() {
            if part == ".." {
                found.pop();
                continue;
            }
            let here = found.join(&part);
            let real = self.root.join(&here);
            if !real.symlink_metadata()?.is_symlink() {
                found = here;
                continue;
            }
            links += 1;
            if links > MAX_LINKS {
                return Err(io::Error::other("too many symbolic links"));
            }
            let target = std::fs::read_link(&real)?;
            if target.is_absolute() {
                found = PathBuf::new();
            }
            for part in parts(&target).into_iter().rev() {
                waiting.push_front(part);
            }
        }
        Ok(self.root.join(found))
    }

    /// As [`Self::resolve`], but the running system's own links may be the kernel's to follow (/proc, /sys).
    fn reach(&self, path: impl AsRef<Path>) -> io::Result<PathBuf> {
        if self.is_live() {
            Ok(self.path(path))
        } else {
            self.resolve(path)
        }
    }

    /// The tree's path of a file that really lies at `path`, with links followed; `None` if it is not in the tree.
    pub fn inside(&self, path: &Path) -> Option<PathBuf> {
        let (root, path) = (self.root.canonicalize().ok()?, path.canonicalize().ok()?);
        Some(Path::new("/").join(path.strip_prefix(root).ok()?))
    }

    pub fn is_file(&self, path: impl AsRef<Path>) -> bool {
        self.reach(path).is_ok_and(|path| path.is_file())
    }

    pub fn is_folder(&self, path: impl AsRef<Path>) -> bool {
        self.reach(path).is_ok_and(|path| path.is_dir())
    }

    /// A file of at most `max` bytes.
    pub fn bytes(&self, path: impl AsRef<Path>, max: u64) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        File::open(self.reach(path)?)?.take(max + 1).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > max {
            return Err(io::Error::new(
                io::ErrorKind::FileTooLarge,
                format!("larger than {max} bytes, which no such file is"),
            ));
        }
        Ok(bytes)
    }

    /// A text file; what is not UTF-8 is replaced.
    pub fn text(&self, path: impl AsRef<Path>) -> io::Result<String> {
        let bytes = self.bytes(path, MAX_TEXT)?;
        Ok(String::from_utf8(bytes).unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned()))
    }

    /// A file of one line, trimmed; `None` if it is not there or empty, as in sysfs.
    pub fn line(&self, path: impl AsRef<Path>) -> Option<String> {
        let text = self.text(path).ok()?;
        let text = text.trim();
        (!text.is_empty()).then(|| text.to_owned())
    }

    /// The names in a folder, sorted; none if it is not there.
    pub fn names(&self, path: impl AsRef<Path>) -> Vec<String> {
        let mut names: Vec<_> = self
            .reach(path)
            .and_then(std::fs::read_dir)
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect();
        names.sort();
        names
    }

    /// The kernel's name of a block device: `dm-0` for `/dev/mapper/root`, `sda2` for `8:2`.
    pub fn block_name(&self, device: &str) -> Option<String> {
        let link = if device.starts_with('/') {
            let path = self.path(device);
            let target = std::fs::read_link(&path);
            // Device nodes are no links, and have the kernel's name.
            target.or_else(|_| path.symlink_metadata().map(|_| path))
        } else {
            std::fs::read_link(self.path(format!("/sys/dev/block/{device}")))
        };
        let name = link.ok()?.file_name()?.to_str()?.to_owned();
        Some(name)
    }

    /// The UUID of what is on a block device (a file system, or LUKS), as udev knows it.
    pub fn uuid_of(&self, device: &str) -> Option<String> {
        let name = self.block_name(device)?;
        let folder = BY_UUID;
        self.names(folder).into_iter().find(|uuid| {
            self.block_name(&format!("{folder}/{uuid}"))
                .is_some_and(|found| found == name)
        })
    }

    /// The block device that udev knows by this name in a folder such as [`BY_UUID`], by the kernel's name.
    pub fn device_by(&self, folder: &str, name: &str) -> Option<String> {
        // FAT's UUIDs are upper case, and boot loaders write them in either.
        let name = self
            .names(folder)
            .into_iter()
            .find(|known| known.eq_ignore_ascii_case(name))?;
        self.block_name(&format!("{folder}/{name}"))
    }

    /// The whole disks that a block device stands on (through partitions, LUKS, LVM, md), by the kernel's names, sorted.
    pub fn disks_below(&self, name: &str) -> BTreeSet<String> {
        let mut disks = BTreeSet::new();
        let mut seen = BTreeSet::new();
        let mut waiting = vec![name.to_owned()];
        while let Some(name) = waiting.pop() {
            let folder = format!("/sys/class/block/{name}");
            if !seen.insert(name.clone()) {
                continue;
            }
            let slaves = self.names(format!("{folder}/slaves"));
            if !slaves.is_empty() {
                waiting.extend(slaves);
            } else if self.path(format!("{folder}/partition")).exists() {
                waiting.extend(self.parent_of(&folder));
            } else if self.path(&folder).exists() {
                disks.insert(name);
            }
        }
        disks
    }

    /// The disk of a partition: the folder above in sysfs.
    pub fn parent_of(&self, folder: &str) -> Option<String> {
        let real = std::fs::read_link(self.path(folder)).ok()?;
        Some(real.parent()?.file_name()?.to_str()?.to_owned())
    }

    /// The kernel's name of the block device that holds `/`; `None` for file systems that have none.
    pub fn root_device(&self) -> Option<String> {
        let mounts = self.mounts();
        let root = mounts.iter().rfind(|mount| mount.point == "/")?;
        self.block_name(&root.source)
            .filter(|name| self.path(format!("/sys/class/block/{name}")).exists())
            .or_else(|| self.block_name(&root.device))
    }

    /// The mounts of the system that runs in the tree, in order; none for a tree that is only a folder.
    pub fn mounts(&self) -> Vec<Mount> {
        let text = self.text("/proc/self/mountinfo").unwrap_or_default();
        text.lines().filter_map(Mount::parse).collect()
    }
}

/// A line of /proc/self/mountinfo: proc(5).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mount {
    /// `major:minor`; for btrfs of no device.
    pub device: String,
    /// Which folder of the file system is mounted, e.g. a subvolume.
    pub root: String,
    /// Where.
    pub point: String,
    /// The file system's type.
    pub kind: String,
    /// The device's path, or a word.
    pub source: String,
}

impl Mount {
    fn parse(line: &str) -> Option<Self> {
        let (left, right) = line.split_once(" - ")?;
        let mut left = left.split(' ').skip(2);
        let mut right = right.split(' ');
        Some(Self {
            device: left.next()?.to_owned(),
            root: unescape(left.next()?),
            point: unescape(left.next()?),
            kind: right.next()?.to_owned(),
            source: unescape(right.next()?),
        })
    }
}

/// Undoes the kernel's octal escapes (`\040` for a space).
fn unescape(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        let code = after
            .get(..3)
            .filter(|_| byte == b'\\')
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        bytes.push(code.unwrap_or(byte));
        rest = if code.is_some() {
            after.get(3..).unwrap_or_default()
        } else {
            after
        };
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_read_with_escapes_and_optional_fields() {
        let line =
            "36 35 98:0 /@sub\\040vol /mnt\\134x rw,noatime master:1 shared:2 - ext3 /dev/root rw,errors=continue";
        assert_eq!(
            Mount::parse(line),
            Some(Mount {
                device: "98:0".into(),
                root: "/@sub vol".into(),
                point: "/mnt\\x".into(),
                kind: "ext3".into(),
                source: "/dev/root".into(),
            })
        );
        assert_eq!(Mount::parse("36 35 98:0 / / rw"), None);
        assert_eq!(unescape("a\\9\\04"), "a\\9\\04");
    }

    #[test]
    fn devices_are_known_by_uuid_number_and_link() {
        let dir = tempfile::tempdir().unwrap();
        let tree = Tree::new(dir.path());
        let link = |target: &str, path: &str| {
            let path = tree.path(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::os::unix::fs::symlink(target, path).unwrap();
        };
        link("../../sda2", "/dev/disk/by-uuid/AB-CD");
        link("../../dm-0", "/dev/disk/by-uuid/11-22");
        link("../dm-0", "/dev/mapper/root");
        link("../../devices/x/block/sda/sda2", "/sys/dev/block/8:2");
        std::fs::write(tree.path("/dev/sda2"), "").unwrap();
        assert_eq!(tree.uuid_of("/dev/sda2").as_deref(), Some("AB-CD"));
        assert_eq!(tree.uuid_of("8:2").as_deref(), Some("AB-CD"));
        assert_eq!(tree.uuid_of("/dev/mapper/root").as_deref(), Some("11-22"));
        assert_eq!(tree.uuid_of("/dev/sda3"), None);
        assert_eq!(tree.device_by(BY_UUID, "ab-cd").as_deref(), Some("sda2"));
    }

    #[test]
    fn no_link_leads_out_of_the_tree() {
        let (dir, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let tree = Tree::new(dir.path());
        std::fs::write(outside.path().join("secret"), "x").unwrap();
        std::fs::create_dir_all(tree.path("/boot/sub")).unwrap();
        std::fs::write(tree.path("/boot/kernel"), "k").unwrap();
        let link = |target: &Path, path: &str| std::os::unix::fs::symlink(target, tree.path(path)).unwrap();
        link(&outside.path().join("secret"), "/boot/absolute");
        link(Path::new("../../../../../../../../etc/passwd"), "/boot/relative");
        link(Path::new("/boot/kernel"), "/vmlinuz");
        link(Path::new("../kernel"), "/boot/sub/up");
        link(Path::new("loop"), "/boot/loop");
        for path in [
            "/boot/absolute",
            "/boot/relative",
            "/boot/loop",
            "/boot/none",
            "/boot/kernel/x",
        ] {
            assert!(tree.resolve(path).is_err(), "{path}");
            assert!(!tree.is_file(path) && tree.text(path).is_err(), "{path}");
        }
        for path in [
            "/vmlinuz",
            "/boot/sub/up",
            "/boot/sub/../kernel",
            "/../../boot/./kernel",
        ] {
            assert_eq!(tree.resolve(path).unwrap(), tree.path("/boot/kernel"), "{path}");
            assert!(tree.is_file(path), "{path}");
        }
        assert!(tree.is_folder("/boot") && !tree.is_folder("/vmlinuz"));
    }
}
