//! Files that are written beside their place, synced, and then renamed: there is always the old one or the new one.
//!
//! All that `install` and `uninstall` change goes through here, so that tests can cut power at every single step.

use std::fs::{self, DirBuilder, File, FileTimes, Metadata, Permissions};
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

/// Ends the name of a file that waits beside its place.
const BESIDE: &str = ".stiefel-new";

/// A file that waits beside its place; removed if it is dropped before.
#[derive(Debug)]
pub struct Staged {
    beside: PathBuf,
    place: PathBuf,
    done: bool,
}

impl Staged {
    /// Writes `content` beside `place`, with exactly these permissions from the beginning, for who runs this.
    ///
    /// # Errors
    /// Those of reading and writing.
    pub fn write(place: &Path, mode: u32, content: &mut dyn Read) -> io::Result<Self> {
        let (staged, mut file) = Self::create(place, mode)?;
        io::copy(content, &mut file)?;
        // A folder may hand down its group; the umask has a say at the opening.
        own(
            &file,
            rustix::process::geteuid().as_raw(),
            rustix::process::getegid().as_raw(),
        )?;
        file.set_permissions(Permissions::from_mode(mode))?;
        sync(&file)?;
        Ok(staged)
    }

    /// Copies a file beside `place`: content, owner, permissions, time of its last change.
    ///
    /// # Errors
    /// Those of reading and writing.
    pub fn copy(place: &Path, from: &mut File) -> io::Result<Self> {
        let meta = from.metadata()?;
        let (staged, mut file) = Self::create(place, 0o600)?;
        io::copy(from, &mut file)?;
        own(&file, meta.uid(), meta.gid())?;
        file.set_permissions(Permissions::from_mode(meta.mode() & 0o7777))?;
        file.set_times(FileTimes::new().set_modified(meta.modified()?))?;
        sync(&file)?;
        Ok(staged)
    }

    /// Makes a symbolic link beside `place`.
    ///
    /// # Errors
    /// Those of symlink(2).
    pub fn link(place: &Path, target: &str) -> io::Result<Self> {
        let staged = Self::beside(place)?;
        fuse::burn()?;
        std::os::unix::fs::symlink(target, &staged.beside)?;
        Ok(staged)
    }

    fn create(place: &Path, mode: u32) -> io::Result<(Self, File)> {
        let staged = Self::beside(place)?;
        fuse::burn()?;
        let file = File::options()
            .write(true)
            .create_new(true)
            .mode(mode & 0o700)
            .open(&staged.beside)?;
        Ok((staged, file))
    }

    fn beside(place: &Path) -> io::Result<Self> {
        let name = place.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_string_lossy();
        let beside = place.with_file_name(format!(".{name}{BESIDE}"));
        // What an earlier run that was killed has left.
        match fs::remove_file(&beside) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        Ok(Self {
            beside,
            place: place.to_owned(),
            done: false,
        })
    }

    /// Puts it in its place.
    ///
    /// # Errors
    /// Those of rename(2).
    pub fn put(mut self) -> io::Result<()> {
        fuse::burn()?;
        fs::rename(&self.beside, &self.place)?;
        self.done = true;
        sync_folder_of(&self.place)
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        if !self.done && fuse::burn().is_ok() {
            let _ = fs::remove_file(&self.beside);
        }
    }
}

/// Hands a file over. Who already has it needs not be root for that.
fn own(file: &File, uid: u32, gid: u32) -> io::Result<()> {
    let meta = file.metadata()?;
    if (meta.uid(), meta.gid()) == (uid, gid) {
        return Ok(());
    }
    std::os::unix::fs::fchown(file, Some(uid), Some(gid))
}

/// Waits until it is on the disk. Not in tests: they cut no real power, but do so some hundred times.
fn sync(file: &File) -> io::Result<()> {
    if cfg!(test) { Ok(()) } else { file.sync_all() }
}

fn sync_folder_of(path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), |folder| sync(&File::open(folder)?))
}

/// Removes what an interrupted run has left beside a place.
pub fn sweep(place: &Path) {
    drop(Staged::beside(place));
}

/// Whether a file of this name waits beside its place, or was left there by a run that was killed.
#[must_use]
pub fn is_beside(name: &str) -> bool {
    name.starts_with('.') && name.ends_with(BESIDE)
}

/// Makes one folder, with exactly these permissions; one that is there is fine.
///
/// # Errors
/// Those of mkdir(2).
pub fn make_folder(path: &Path, mode: u32) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    fuse::burn()?;
    DirBuilder::new().mode(mode & 0o700).create(path)?;
    fs::set_permissions(path, Permissions::from_mode(mode))?;
    sync_folder_of(path)
}

/// Removes a folder with nothing in it; what is not there, is no folder, or has something in it is left alone.
///
/// # Errors
/// Those of rmdir(2).
pub fn remove_empty(path: &Path) -> io::Result<()> {
    use io::ErrorKind::{DirectoryNotEmpty, NotADirectory, NotFound};
    fuse::burn()?;
    match fs::remove_dir(path) {
        Ok(()) => sync_folder_of(path),
        Err(error) if matches!(error.kind(), NotFound | DirectoryNotEmpty | NotADirectory) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Removes a file or link, durably, and what an interrupted run left beside it; one that is not there is fine.
///
/// # Errors
/// Those of unlink(2).
pub fn remove(path: &Path) -> io::Result<()> {
    fuse::burn()?;
    sweep(path);
    match fs::remove_file(path) {
        Ok(()) => sync_folder_of(path),
        // Its folder may have become something else.
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Whether two files have the same owner and permissions.
#[must_use]
pub fn same_access(one: &Metadata, other: &Metadata) -> bool {
    (one.uid(), one.gid(), one.mode() & 0o7777) == (other.uid(), other.gid(), other.mode() & 0o7777)
}

/// SHA-256 in hexadecimal digits.
///
/// # Errors
/// Those of reading.
pub fn digest(content: &mut dyn Read) -> io::Result<String> {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 16];
    loop {
        let read = match content.read(&mut buffer) {
            Ok(0) => break,
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        hash.update(buffer.get(..read).unwrap_or_default());
    }
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Where a test cuts the power: so many changes are made, and none after.
pub(super) mod fuse {
    use std::io;

    #[cfg(test)]
    thread_local! {
        static LEFT: std::cell::Cell<Option<u32>> = const { std::cell::Cell::new(None) };
    }

    /// Asked before each change.
    pub(super) fn burn() -> io::Result<()> {
        #[cfg(test)]
        match LEFT.get() {
            Some(0) => return Err(io::Error::other("the power is cut")),
            Some(left) => LEFT.set(Some(left - 1)),
            None => {}
        }
        Ok(())
    }

    /// Lets so many changes happen on this thread, then no more; `None`: all.
    #[cfg(test)]
    pub fn set(left: Option<u32>) {
        LEFT.set(left);
    }

    /// Whether the power was cut.
    #[cfg(test)]
    pub fn is_blown() -> bool {
        LEFT.get() == Some(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_staged_file_has_its_mode_and_leaves_nothing_beside() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("file");
        fs::write(&place, "old").unwrap();
        let staged = Staged::write(&place, 0o640, &mut &b"new"[..]).unwrap();
        assert_eq!(fs::read(&place).unwrap(), b"old");
        staged.put().unwrap();
        assert_eq!(fs::read(&place).unwrap(), b"new");
        assert_eq!(fs::metadata(&place).unwrap().permissions().mode() & 0o7777, 0o640);
        drop(Staged::write(&place, 0o600, &mut &b"never"[..]).unwrap());
        fs::write(dir.path().join(".file.stiefel-new"), "left by a crash").unwrap();
        Staged::link(&place, "elsewhere").unwrap().put().unwrap();
        assert_eq!(fs::read_link(&place).unwrap(), Path::new("elsewhere"));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_link_that_waits_where_a_file_is_to_be_staged_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let victim = dir.path().join("victim");
        fs::write(&victim, "precious").unwrap();
        std::os::unix::fs::symlink(&victim, dir.path().join(".file.stiefel-new")).unwrap();
        let place = dir.path().join("file");
        Staged::write(&place, 0o644, &mut &b"new"[..]).unwrap().put().unwrap();
        assert_eq!(fs::read(&victim).unwrap(), b"precious");
        assert!(!place.is_symlink());
    }

    #[test]
    fn a_copy_has_owner_mode_and_time_of_the_original() {
        let dir = tempfile::tempdir().unwrap();
        let [from, to] = ["from", "to"].map(|name| dir.path().join(name));
        fs::write(&from, "text").unwrap();
        if rustix::process::geteuid().is_root() {
            std::os::unix::fs::chown(&from, Some(7), Some(8)).unwrap();
        }
        fs::set_permissions(&from, Permissions::from_mode(0o4751)).unwrap();
        let past = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000);
        let times = FileTimes::new().set_modified(past);
        File::options()
            .write(true)
            .open(&from)
            .unwrap()
            .set_times(times)
            .unwrap();
        Staged::copy(&to, &mut File::open(&from).unwrap())
            .unwrap()
            .put()
            .unwrap();
        let [from, to] = [from, to].map(|path| path.metadata().unwrap());
        assert!(same_access(&from, &to));
        assert_eq!((to.modified().unwrap(), to.len()), (past, 4));
    }

    #[test]
    fn digests_are_sha256() {
        assert_eq!(
            digest(&mut &b"abc"[..]).unwrap(),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
    }
}
