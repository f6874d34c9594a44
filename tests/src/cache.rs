//! Where the harness keeps what is expensive to make, and the logs of what it ran.

use std::fs::{self, DirEntry, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{Duration, SystemTime};

/// How long logs of earlier runs are kept.
const LOG_AGE: Duration = Duration::from_secs(7 * 24 * 3600);

/// How the names of folders begin that [`crate::kit::Kit`] makes.
const KIT: &str = "kit-";
/// Shared by all processes that use the cache, as long as they live.
const IN_USE: &str = "in-use.lock";
/// A folder that was changed since is left to a program that knows nothing of the lock.
const KIT_AGE: Duration = Duration::from_secs(3600);

/// The cache directory, made if it is not there: `$XDG_CACHE_HOME/stiefel`, else `~/.cache/stiefel`.
///
/// Kits whose process could not remove them (it was killed, the power failed) are removed on the way, once per process.
///
/// # Errors
/// When the directory cannot be made.
pub fn dir() -> io::Result<PathBuf> {
    let base = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .filter(|path| path.is_absolute())
        .or_else(|| std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache")))
        .unwrap_or_else(std::env::temp_dir);
    let dir = base.join("stiefel");
    fs::create_dir_all(&dir)?;
    static USER: OnceLock<Option<File>> = OnceLock::new();
    USER.get_or_init(|| use_cache(&dir, KIT_AGE).ok());
    Ok(dir)
}

/// Says to other processes that the cache is used, as long as the file is open. If nobody else uses it, all kits that were
/// left unchanged for `age` belong to nobody and are removed.
fn use_cache(dir: &Path, age: Duration) -> io::Result<File> {
    let lock = File::create(dir.join(IN_USE))?;
    if lock.try_lock().is_ok() {
        for entry in fs::read_dir(dir)?.flatten() {
            if entry.file_name().to_string_lossy().starts_with(KIT) && is_older(&entry, age) {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
    }
    // In between another process may look, too; this one has nothing there yet.
    lock.lock_shared()?;
    Ok(lock)
}

fn is_older(entry: &DirEntry, age: Duration) -> bool {
    let changed = entry.metadata().and_then(|meta| meta.modified()).ok();
    changed
        .and_then(|at| at.elapsed().ok())
        .is_some_and(|since| since >= age)
}

/// The directory for serial logs, made if it is not there: `$STIEFEL_TEST_LOGS`, else `logs` in the cache.
///
/// Logs older than a week are removed on the way.
///
/// # Errors
/// When the directory cannot be made.
pub fn log_dir() -> io::Result<PathBuf> {
    if let Some(dir) = std::env::var_os("STIEFEL_TEST_LOGS") {
        fs::create_dir_all(&dir)?;
        return Ok(dir.into());
    }
    let dir = dir()?.join("logs");
    fs::create_dir_all(&dir)?;
    for entry in fs::read_dir(&dir)?.flatten() {
        if is_older(&entry, LOG_AGE) {
            let _ = fs::remove_file(entry.path());
        }
    }
    Ok(dir)
}

/// A short text that changes every Monday (UTC): the number of ISO weeks since 1970.
pub(crate) fn week(now: SystemTime) -> String {
    let days = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs() / 86_400;
    // 1 January 1970 was a Thursday.
    format!("w{}", (days + 3) / 7)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(days: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(days * 86_400)
    }

    #[test]
    fn a_week_begins_on_monday() {
        // 1970-01-04 was a Sunday, 2026-11-23 (day 20780) is a Monday.
        assert_eq!(week(at(0)), week(at(3)));
        assert_ne!(week(at(3)), week(at(4)));
        assert_ne!(week(at(20_779)), week(at(20_780)));
        assert_eq!(week(at(20_780)), week(at(20_786)));
    }

    /// Closing it is not enough: other tests start programs, and a child has a copy of every file until it has become another program.
    fn leave(user: File) {
        user.unlock().unwrap();
    }

    #[test]
    fn kits_are_removed_when_nobody_uses_the_cache_and_they_are_old() {
        let dir = tempfile::tempdir().unwrap();
        let kit = dir.path().join("kit-abc");
        let make = || fs::create_dir_all(kit.join("keys")).unwrap();
        fs::create_dir(dir.path().join("logs")).unwrap();
        make();
        let first = use_cache(dir.path(), Duration::ZERO).unwrap();
        assert!(!kit.exists());
        make();
        let second = use_cache(dir.path(), Duration::ZERO).unwrap();
        assert!(kit.exists(), "the first one uses it");
        leave(first);
        leave(use_cache(dir.path(), Duration::ZERO).unwrap());
        assert!(kit.exists(), "the second one uses it");
        leave(second);
        leave(use_cache(dir.path(), Duration::from_secs(3600)).unwrap());
        assert!(kit.exists(), "it is new");
        leave(use_cache(dir.path(), Duration::ZERO).unwrap());
        assert!(!kit.exists());
        assert!(dir.path().join("logs").exists());
    }
}
