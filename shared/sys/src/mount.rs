//! Mounting, unmounting, and the table of mounts (mount(2), proc_pid_mountinfo(5)).

use std::collections::HashMap;
use std::ffi::{CString, OsString};
use std::fs::DirBuilder;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use std::os::fd::AsFd;

pub use rustix::mount::MountFlags;
use rustix::mount::{FsPickFlags, UnmountFlags, fsconfig_reconfigure, fsconfig_set_flag, fspick};

/// The longest table of mounts taken, in bytes.
const MAX_TABLE: usize = 16 << 20;

/// What went wrong, with the place.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// mount(2) failed.
    #[error("cannot mount {from} ({fstype}) on {target}; check that the kernel or a module knows {fstype}", target = target.display())]
    Mount {
        /// The device or name.
        from: String,
        /// Where.
        target: PathBuf,
        /// The file system's type.
        fstype: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// umount2(2) failed.
    #[error("cannot unmount {target}; end what still uses it, or unmount it lazily", target = target.display())]
    Unmount {
        /// Where.
        target: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Moving a mount failed.
    #[error("cannot move the mount {from} to {target}; both must exist, and not be shared", from = from.display(), target = target.display())]
    Move {
        /// Where it is.
        from: PathBuf,
        /// Where it should be.
        target: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A folder could not be made.
    #[error("cannot make the folder {path}; its file system must be writable", path = path.display())]
    MakeDir {
        /// Which.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The table of mounts could not be read.
    #[error("cannot read the mounts from {path}; proc must be mounted there", path = path.display())]
    Table {
        /// The file.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// Mounts `from` (a device, or any name for a virtual file system) on the existing folder `target`. `data` are the
/// file system's own options, comma-separated.
///
/// # Errors
/// [`MountError::Mount`].
pub fn mount(from: &str, target: &Path, fstype: &str, flags: MountFlags, data: Option<&str>) -> Result<(), MountError> {
    let failed = |source| MountError::Mount {
        from: from.to_owned(),
        target: target.to_owned(),
        fstype: fstype.to_owned(),
        source,
    };
    let data = data.map(CString::new).transpose().map_err(|nul| failed(nul.into()))?;
    rustix::mount::mount(from, target, fstype, flags, data.as_deref()).map_err(|errno| failed(errno.into()))
}

/// Makes the file system that is mounted at `path` (relative to the folder `at`) read-only wherever it is mounted: fspick(2),
/// since Linux 5.2. Unlike mount(2) it needs no path from this process's own root.
///
/// # Errors
/// The kernel's answer; `ResourceBusy` while a file of it is open for writing.
pub fn make_read_only(at: impl AsFd, path: &Path) -> io::Result<()> {
    let context = fspick(at, path, FsPickFlags::FSPICK_CLOEXEC | FsPickFlags::FSPICK_NO_AUTOMOUNT)?;
    fsconfig_set_flag(&context, "ro")?;
    Ok(fsconfig_reconfigure(&context)?)
}

/// Unmounts what is topmost on `target`; `lazy` takes it out of the tree now and lets go when nothing uses it.
///
/// # Errors
/// [`MountError::Unmount`]: EBUSY while in use, EINVAL if nothing is mounted there.
pub fn unmount(target: &Path, lazy: bool) -> Result<(), MountError> {
    // A link in the old root must not lead us to unmount something else.
    let flags = UnmountFlags::NOFOLLOW
        | if lazy {
            UnmountFlags::DETACH
        } else {
            UnmountFlags::empty()
        };
    rustix::mount::unmount(target, flags).map_err(|errno| MountError::Unmount {
        target: target.to_owned(),
        source: errno.into(),
    })
}

/// Makes a mount appear elsewhere (MS_MOVE), with all below it.
///
/// # Errors
/// [`MountError::Move`].
pub fn move_mount(from: &Path, target: &Path) -> Result<(), MountError> {
    rustix::mount::mount_move(from, target).map_err(|errno| MountError::Move {
        from: from.to_owned(),
        target: target.to_owned(),
        source: errno.into(),
    })
}

/// Makes a folder and those above it, each with `mode` (the umask applies); one that exists is left as it is.
///
/// # Errors
/// [`MountError::MakeDir`].
pub fn make_dir_all(path: &Path, mode: u32) -> Result<(), MountError> {
    DirBuilder::new()
        .recursive(true)
        .mode(mode)
        .create(path)
        .map_err(|source| MountError::MakeDir {
            path: path.to_owned(),
            source,
        })
}

/// One line of the table of mounts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountEntry {
    /// The mount's number; it may be used again after an unmount.
    pub id: u32,
    /// The number of the mount it stands on.
    pub parent: u32,
    /// Major and minor of `st_dev`; major 0 where no block device is behind it (also btrfs).
    pub device: (u32, u32),
    /// What of the file system is shown, e.g. a subvolume.
    pub root: PathBuf,
    /// Where.
    pub mount_point: PathBuf,
    /// Options of the mount, comma-separated.
    pub options: String,
    /// E.g. `ext4`.
    pub fstype: String,
    /// The device or name.
    pub source: String,
    /// Options of the file system, comma-separated.
    pub super_options: String,
}

/// Reads the text of a mountinfo file; lines that are not understood are skipped.
#[must_use]
pub fn mountinfo(text: &[u8]) -> Vec<MountEntry> {
    text.split(|&byte| byte == b'\n').filter_map(entry).collect()
}

/// The mounts of this process, from `PROCFS/self/mountinfo`.
///
/// # Errors
/// [`MountError::Table`].
pub fn read_mountinfo(procfs: &Path) -> Result<Vec<MountEntry>, MountError> {
    let path = procfs.join("self/mountinfo");
    match crate::read::bounded(&path, MAX_TABLE) {
        Ok(text) => Ok(mountinfo(&text)),
        Err(source) => Err(MountError::Table { path, source }),
    }
}

/// Orders mounts so that each comes before the one it stands on: the order to unmount in. (mountinfo is not ordered
/// by depth, and of two mounts at one place only the upper can go.)
pub fn deepest_first(entries: &mut [MountEntry]) {
    let parents: HashMap<u32, u32> = entries.iter().map(|entry| (entry.id, entry.parent)).collect();
    let depth = |entry: &MountEntry| {
        let mut at = entry.id;
        // Bounded: a root is its own parent, or its parent is out of sight.
        (0..parents.len())
            .take_while(|_| parents.get(&at).is_some_and(|&up| up != std::mem::replace(&mut at, up)))
            .count()
    };
    entries.sort_by_cached_key(|entry| std::cmp::Reverse(depth(entry)));
}

fn entry(line: &[u8]) -> Option<MountEntry> {
    let mut fields = line.split(|&byte| byte == b' ');
    let id = number(fields.next()?)?;
    let parent = number(fields.next()?)?;
    let mut device = fields.next()?.splitn(2, |&byte| byte == b':');
    let device = (number(device.next()?)?, number(device.next()?)?);
    let root = path(fields.next()?);
    let mount_point = path(fields.next()?);
    let options = text(fields.next()?);
    // Any number of optional fields, then a dash.
    fields.find(|field| *field == b"-")?;
    let fstype = text(fields.next()?);
    let source = text(fields.next()?);
    let super_options = text(fields.next().unwrap_or_default());
    Some(MountEntry {
        id,
        parent,
        device,
        root,
        mount_point,
        options,
        fstype,
        source,
        super_options,
    })
}

fn number(field: &[u8]) -> Option<u32> {
    std::str::from_utf8(field).ok()?.parse().ok()
}

fn path(field: &[u8]) -> PathBuf {
    OsString::from_vec(unescape(field)).into()
}

fn text(field: &[u8]) -> String {
    String::from_utf8_lossy(&unescape(field)).into_owned()
}

/// Blanks, tabs, newlines and backslashes stand as `\` and three octal digits.
pub(crate) fn unescape(field: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, behind)) = rest.split_first() {
        rest = match behind {
            [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', behind @ ..] if byte == b'\\' => {
                plain.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
                behind
            }
            _ => {
                plain.push(byte);
                behind
            }
        };
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TABLE: &[u8] = b"21 1 0:19 / / rw,relatime - rootfs rootfs rw\n\
        30 21 8:1 /sub\\040vol /mnt/a\\134b rw shared:1 master:2 - ext4 /dev/sda1 rw,errors=remount-ro\n\
        nonsense\n\
        22 30 0:20 / /mnt/a rw - tmpfs tmpfs rw\n\
        31 21 0:21 / /zzz rw - proc none\n\
        29 22 0:22 / /mnt/a rw - tmpfs tmpfs rw\n";

    #[test]
    fn a_line_is_read_with_escapes_and_optional_fields() {
        let entry = &mountinfo(TABLE)[1];
        assert_eq!(entry.root, Path::new("/sub vol"));
        assert_eq!(entry.mount_point, Path::new("/mnt/a\\b"));
        assert_eq!((entry.id, entry.parent, entry.device), (30, 21, (8, 1)));
        assert_eq!((entry.fstype.as_str(), entry.source.as_str()), ("ext4", "/dev/sda1"));
        assert_eq!(entry.super_options, "rw,errors=remount-ro");
    }

    #[test]
    fn what_stands_on_another_mount_is_unmounted_before_it() {
        let mut entries = mountinfo(TABLE);
        deepest_first(&mut entries);
        let order: Vec<_> = entries.iter().map(|entry| entry.id).collect();
        assert_eq!(order, [29, 22, 30, 31, 21]);
    }

    #[test]
    fn a_ring_of_parents_ends() {
        let mut entries = mountinfo(b"1 2 0:1 / /a rw - x x x\n2 1 0:1 / /b rw - x x x\n");
        deepest_first(&mut entries);
        assert_eq!(entries.len(), 2);
    }

    #[test]
    fn this_process_has_a_root() {
        let entries = read_mountinfo(Path::new(crate::PROCFS)).unwrap();
        assert!(entries.iter().any(|entry| entry.mount_point == Path::new("/")));
    }

    #[test]
    fn an_unknown_file_system_is_named_in_the_error() {
        let folder = tempfile::tempdir().unwrap();
        let error = mount("none", folder.path(), "nosuchfs", MountFlags::empty(), None).unwrap_err();
        assert!(error.to_string().contains("nosuchfs"), "{error}");
    }

    #[test]
    fn folders_are_made_with_their_mode() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a/b");
        make_dir_all(&path, 0o700).unwrap();
        make_dir_all(&path, 0o755).unwrap();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o700);
    }

    proptest! {
        #[test]
        fn any_bytes_are_read(bytes: Vec<u8>) {
            deepest_first(&mut mountinfo(&bytes));
        }

        #[test]
        fn escaped_paths_come_back(name in prop::collection::vec(any::<u8>(), 1..20)) {
            let escaped: String = name.iter().map(|byte| format!("\\{:03o}", byte)).collect();
            let line = format!("1 0 0:1 / {escaped} rw - x x x");
            prop_assert_eq!(&mountinfo(line.as_bytes())[0].mount_point, &PathBuf::from(OsString::from_vec(name)));
        }
    }
}
