//! Tells when the folder of the sticks' keys changes, without polling: a revoked key must not wake the laptop any more, a new
//! one must.
//!
//! Specification: inotify(7). Where the folder is not there yet, the nearest one above it is watched.

use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::io::Errno;

/// Bytes of one look at what has changed; what it is does not matter, all keys are read again.
const BUFFER: usize = 4096;

/// Calls `changed` when something in `folder` may have changed, and once at the beginning, until it says `false`.
///
/// # Errors
/// Those of inotify_init(2), inotify_add_watch(2) and read(2).
pub fn watch(folder: &Path, mut changed: impl FnMut() -> bool) -> io::Result<()> {
    let flags = WatchFlags::CREATE
        | WatchFlags::CLOSE_WRITE
        | WatchFlags::ATTRIB
        | WatchFlags::DELETE
        | WatchFlags::DELETE_SELF
        | WatchFlags::MOVE;
    loop {
        // A new one each time: the folder may have been replaced.
        let events = inotify::init(CreateFlags::CLOEXEC)?;
        let watched = nearest(folder);
        match inotify::add_watch(&events, &watched, flags | WatchFlags::MOVE_SELF | WatchFlags::ONLYDIR) {
            Err(Errno::NOENT | Errno::NOTDIR) => continue,
            other => other?,
        };
        if nearest(folder) != watched {
            continue;
        }
        // What changed before the watch is seen by this look, what changes later by the next.
        if !changed() {
            return Ok(());
        }
        loop {
            match rustix::io::read(&events, &mut [0_u8; BUFFER]) {
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
                Ok(_) => break,
            }
        }
    }
}

/// The folder, or the nearest above it that is there.
fn nearest(folder: &Path) -> PathBuf {
    folder
        .ancestors()
        .find(|folder| folder.is_dir())
        .unwrap_or(Path::new("/"))
        .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::sync::mpsc;
    use std::thread;
    use std::time::Duration;

    /// Only a missing event takes so long.
    const HUNG: Duration = Duration::from_secs(60);

    #[test]
    fn each_change_of_the_folder_is_told_also_of_one_that_comes_later() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("stiefel/keys");
        let (sender, told) = mpsc::sync_channel(0);
        let (watched, beside) = (folder.clone(), sender.clone());
        thread::spawn(move || watch(&watched, || sender.send(()).is_ok()));
        // Keeps the channel open; its end would look like a missing event.
        let _beside = beside;
        // As the first look at a folder that is not there.
        told.recv_timeout(HUNG).unwrap();
        fs::create_dir_all(&folder).unwrap();
        told.recv_timeout(HUNG).unwrap();
        while told.try_recv().is_ok() {}
        for change in [
            |folder: &Path| fs::write(folder.join("a.key"), "x").unwrap(),
            |folder: &Path| fs::rename(folder.join("a.key"), folder.join("b.key")).unwrap(),
            |folder: &Path| fs::remove_file(folder.join("b.key")).unwrap(),
            |folder: &Path| fs::remove_dir(folder).unwrap(),
        ] {
            change(&folder);
            told.recv_timeout(HUNG).unwrap();
        }
    }
}
