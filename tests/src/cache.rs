//! Where the harness keeps what is expensive to make, and the logs of what it ran.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};
use std::{fs, io};

/// How long logs of earlier runs are kept.
const LOG_AGE: Duration = Duration::from_secs(7 * 24 * 3600);

/// The cache directory, made if it is not there: `$XDG_CACHE_HOME/stiefel`, else `~/.cache/stiefel`.
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
    Ok(dir)
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
        let age = entry
            .metadata()
            .and_then(|meta| meta.modified())
            .ok()
            .and_then(|at| at.elapsed().ok());
        if age.is_some_and(|age| age > LOG_AGE) {
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
}
