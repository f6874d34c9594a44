//! Reading small files of sysfs, procfs and module indexes, never more than a bound.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

/// sysfs attributes fit a page.
const ATTRIBUTE: usize = 4096;

/// Reads a whole file of at most `limit` bytes; a longer one is refused with `FileTooLarge`.
pub(crate) fn bounded(path: &Path, limit: usize) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let limit_u64 = u64::try_from(limit).unwrap_or(u64::MAX);
    File::open(path)?
        .take(limit_u64.saturating_add(1))
        .read_to_end(&mut bytes)?;
    if bytes.len() > limit {
        Err(io::ErrorKind::FileTooLarge.into())
    } else {
        Ok(bytes)
    }
}

/// A sysfs attribute without surrounding blanks; `None` if it is absent, unreadable or empty.
pub(crate) fn attribute(path: &Path) -> Option<String> {
    let bytes = bounded(path, ATTRIBUTE).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    let text = text.trim_matches(|c: char| c.is_whitespace() || c == '\0');
    (!text.is_empty()).then(|| text.to_owned())
}

/// A decimal sysfs attribute.
pub(crate) fn number<T: std::str::FromStr>(path: &Path) -> Option<T> {
    attribute(path)?.parse().ok()
}

/// A sysfs attribute that is 0 or 1; absent counts as 0.
pub(crate) fn flag(path: &Path) -> bool {
    number::<u8>(path).is_some_and(|value| value != 0)
}
