//! Files that are written beside their place, synced, and then renamed: there is always the old one or the new one.

use std::fs::{self, File, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

/// A file that waits beside its place; removed if it is dropped before.
#[derive(Debug)]
pub struct Staged {
    beside: PathBuf,
    place: PathBuf,
    done: bool,
}

impl Staged {
    /// Writes `content` beside `place`, with exactly these permissions from the beginning.
    ///
    /// # Errors
    /// Those of reading and writing.
    pub fn write(place: &Path, mode: u32, content: &mut dyn Read) -> io::Result<Self> {
        let staged = Self::beside(place)?;
        let mut file = File::options()
            .write(true)
            .create_new(true)
            .mode(mode & 0o700)
            .open(&staged.beside)?;
        io::copy(content, &mut file)?;
        // The umask has a say at the opening.
        file.set_permissions(Permissions::from_mode(mode))?;
        file.flush()?;
        file.sync_all()?;
        Ok(staged)
    }

    /// Makes a symbolic link beside `place`.
    ///
    /// # Errors
    /// Those of symlink(2).
    pub fn link(place: &Path, target: &str) -> io::Result<Self> {
        let staged = Self::beside(place)?;
        std::os::unix::fs::symlink(target, &staged.beside)?;
        Ok(staged)
    }

    fn beside(place: &Path) -> io::Result<Self> {
        let name = place.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_string_lossy();
        let beside = place.with_file_name(format!(".{name}.stiefel-new"));
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
        fs::rename(&self.beside, &self.place)?;
        self.done = true;
        sync_folder_of(&self.place)
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        if !self.done {
            let _ = fs::remove_file(&self.beside);
        }
    }
}

fn sync_folder_of(path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), |folder| File::open(folder)?.sync_all())
}

/// Removes a file or link, durably, and what an interrupted run left beside it; one that is not there is fine.
///
/// # Errors
/// Those of unlink(2).
pub fn remove(path: &Path) -> io::Result<()> {
    drop(Staged::beside(path));
    match fs::remove_file(path) {
        Ok(()) => sync_folder_of(path),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
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
    fn digests_are_sha256() {
        assert_eq!(
            digest(&mut &b"abc"[..]).unwrap(),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
    }
}
