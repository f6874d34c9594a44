//! One `stiefel target` at a time has the kernel's NVMe target, shields and tunnels: whoever begins takes away what an earlier
//! one has left that was killed, and would take it from a living one in the middle of its loans.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

/// Where the lock is.
pub(super) const FOLDER: &str = "/run/stiefel";

/// Why it cannot be had.
#[derive(Debug, thiserror::Error)]
pub(super) enum AloneError {
    /// Another process has it.
    #[error("another `stiefel target` lends disks of this machine; end that one first")]
    Taken,
    /// It could not be made.
    #[error("cannot make {path}; be root", path = path.display())]
    Make {
        /// The lock.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
}

/// As long as this lives, no other one has it; the kernel ends it with the process, however that ends.
#[derive(Debug)]
pub(super) struct Alone {
    _lock: File,
}

impl Alone {
    /// Takes the lock in `folder`, which is made if it is not there.
    ///
    /// # Errors
    /// [`AloneError`].
    pub(super) fn take(folder: &Path) -> Result<Self, AloneError> {
        let path = folder.join("target.lock");
        let make = |source| AloneError::Make {
            path: path.clone(),
            source,
        };
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(folder)
            .map_err(make)?;
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let file = options.open(&path).map_err(make)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Self { _lock: file }),
            Err(Errno::WOULDBLOCK) => Err(AloneError::Taken),
            Err(error) => Err(make(error.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_one_is_refused_until_the_first_has_ended() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("stiefel");
        let first = Alone::take(&folder).unwrap();
        assert!(matches!(Alone::take(&folder), Err(AloneError::Taken)));
        drop(first);
        Alone::take(&folder).unwrap();
    }
}
