//! Puts a configuration and a first key into the system: never over something that is there without keeping it.

use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use rustix::fs::Access;
use stiefel_shared::config::MAX_CONFIG;
use stiefel_shared::key::{KeyError, StickKey};

use crate::collect::KEYS_DIR;
use crate::install::files::Staged;
use crate::tree::Tree;

/// The first key's name; `stiefel stick` takes it if no other is named.
const FIRST_KEY: &str = "stick";

/// Why something was not written.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// There is no such place, or it is not writable.
    #[error("{path} cannot be written; nothing was changed\n  next: {next}", path = path.display())]
    NotWritable {
        /// The nearest folder that is there.
        path: PathBuf,
        /// What to do.
        next: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file could not be written.
    #[error("{path} cannot be written\n  next: see whether there is space and the file system is writable; then do it again", path = path.display())]
    Write {
        /// It.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file could not be read.
    #[error("{path} cannot be read\n  next: be root, and see whether it is a file of text", path = path.display())]
    Read {
        /// It.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// No key could be made.
    #[error("a first key cannot be made")]
    Key(#[from] KeyError),
}

/// A configuration that was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placed {
    /// Where the one that was there before is now.
    pub kept: Option<PathBuf>,
}

/// Whether `file` can be made or replaced, as far as can be told before.
///
/// # Errors
/// [`SetupError::NotWritable`].
pub fn check_writable(file: &Path) -> Result<(), SetupError> {
    let folder = file
        .ancestors()
        .skip(1)
        .find(|folder| folder.exists())
        .unwrap_or(Path::new("/"));
    let refuse = |source: io::Error, next| SetupError::NotWritable {
        path: folder.to_owned(),
        next,
        source,
    };
    if !folder.is_dir() {
        return Err(refuse(
            io::ErrorKind::NotADirectory.into(),
            "move it away: a folder belongs there",
        ));
    }
    rustix::fs::access(folder, Access::WRITE_OK | Access::EXEC_OK).map_err(|errno| {
        let source = io::Error::from(errno);
        let next = match source.kind() {
            io::ErrorKind::ReadOnlyFilesystem => {
                "make the file system writable (`mount -o remount,rw …`); on a system whose /etc is made by other means, use `--dry-run` and put the text there by those"
            }
            _ => "be root (`sudo stiefel init`); `--dry-run` shows without root what would be written",
        };
        refuse(source, next)
    })
}

/// The configuration that is there.
///
/// # Errors
/// [`SetupError::Read`], also if it is longer than any configuration.
pub fn read_configuration(path: &Path) -> Result<Option<String>, SetupError> {
    let read = || -> io::Result<String> {
        let mut text = String::new();
        fs::File::open(path)?.take(MAX_CONFIG + 1).read_to_string(&mut text)?;
        match text.len() as u64 > MAX_CONFIG {
            true => Err(io::ErrorKind::FileTooLarge.into()),
            false => Ok(text),
        }
    };
    match read() {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(SetupError::Read {
            path: path.to_owned(),
            source,
        }),
    }
}

/// Writes the configuration; one that is there is kept beside, under a name that was free.
///
/// # Errors
/// [`SetupError::Write`]; then what was there is still there.
pub fn put(path: &Path, text: &str) -> Result<Placed, SetupError> {
    let failed = |source| SetupError::Write {
        path: path.to_owned(),
        source,
    };
    if let Some(folder) = path.parent() {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(folder)
            .map_err(failed)?;
    }
    // No secret is in it: the keys are files of their own.
    let staged = Staged::write(path, 0o644, &mut text.as_bytes()).map_err(failed)?;
    let kept = keep(path).map_err(failed)?;
    staged.put().map_err(failed)?;
    Ok(Placed { kept })
}

/// A second name for what is there, that no other file has.
fn keep(path: &Path) -> io::Result<Option<PathBuf>> {
    for number in 1_u32.. {
        let mut name = path.as_os_str().to_owned();
        name.push(format!(
            ".old{}",
            if number == 1 {
                String::new()
            } else {
                format!(".{number}")
            }
        ));
        let name = PathBuf::from(name);
        match fs::hard_link(path, &name) {
            Ok(()) => return Ok(Some(name)),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

/// Whether the system below `root` has a key.
#[must_use]
pub fn has_key(root: &Path) -> bool {
    Tree::new(root)
        .names(KEYS_DIR)
        .iter()
        .any(|name| name.ends_with(".key"))
}

/// Makes a first key, if there is none; answers where it is.
///
/// # Errors
/// [`SetupError::Key`], [`SetupError::Write`].
pub fn first_key(root: &Path) -> Result<Option<PathBuf>, SetupError> {
    if has_key(root) {
        return Ok(None);
    }
    let folder = Tree::new(root).path(KEYS_DIR);
    let path = folder.join(format!("{FIRST_KEY}.key"));
    let failed = |source| SetupError::Write {
        path: path.clone(),
        source,
    };
    let key = StickKey::generate(FIRST_KEY)?;
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&folder)
        .map_err(failed)?;
    Staged::write(&path, 0o600, &mut key.to_file().as_bytes())
        .and_then(Staged::put)
        .map_err(failed)?;
    Ok(Some(path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o7777
    }

    #[test]
    fn a_configuration_that_is_there_is_kept_beside_and_no_backup_is_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("etc/stiefel/config.yaml");
        assert_eq!(put(&path, "one").unwrap().kept, None);
        assert_eq!(mode(&path), 0o644);
        let first = put(&path, "two").unwrap().kept.unwrap();
        let second = put(&path, "three").unwrap().kept.unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "three");
        assert_eq!(fs::read_to_string(first).unwrap(), "one");
        assert_eq!(fs::read_to_string(&second).unwrap(), "two");
        assert!(second.ends_with("config.yaml.old.2"));
    }

    #[test]
    fn a_first_key_is_private_and_made_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = first_key(dir.path()).unwrap().unwrap();
        assert_eq!(mode(&path), 0o600);
        assert_eq!(mode(path.parent().unwrap()), 0o700);
        let key = fs::read(&path).unwrap();
        assert!(StickKey::parse("stick", &key).is_ok());
        assert_eq!(first_key(dir.path()).unwrap(), None);
        assert_eq!(fs::read(&path).unwrap(), key);
    }

    #[test]
    fn what_is_in_the_way_is_said_before_anything_is_written() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("etc"), "").unwrap();
        let error = check_writable(&dir.path().join("etc/stiefel/config.yaml")).unwrap_err();
        assert!(error.to_string().contains("a folder belongs there"), "{error}");
        assert!(check_writable(&dir.path().join("new/deep/file")).is_ok());
        assert!(matches!(read_configuration(dir.path()), Err(SetupError::Read { .. })));
        assert_eq!(read_configuration(&dir.path().join("none")).unwrap(), None);
    }
}
