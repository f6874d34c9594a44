//! Secrets in files: overwritten, then removed.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

/// Overwrites a file with zeroes and removes it; one that is not there is fine. Only for file systems in memory: on a disk
/// the old bytes may stay.
///
/// # Errors
/// What the kernel says.
pub fn file(path: &Path) -> io::Result<()> {
    match File::options().write(true).open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => overwrite(&other?)?,
    }
    std::fs::remove_file(path)
}

/// As [`file()`], of a file on a disk: it is gone from the medium when this returns, as far as the file system and the medium's own
/// translation of addresses go; what flash has put aside may stay for a while. One that is not there is an error.
///
/// # Errors
/// What the kernel says.
pub fn written_file(path: &Path) -> io::Result<()> {
    let file = File::options().write(true).open(path)?;
    opened(&file)?;
    drop(file);
    std::fs::remove_file(path)?;
    File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all()
}

/// As [`written_file`], of one that is open and keeps its name.
///
/// # Errors
/// What the kernel says.
pub fn opened(file: &File) -> io::Result<()> {
    overwrite(file)?;
    file.sync_all()
}

fn overwrite(mut file: &File) -> io::Result<()> {
    let mut left = file.metadata()?.len();
    let zeroes = [0; 1 << 16];
    while left > 0 {
        let chunk = left.min(zeroes.len() as u64);
        file.write_all(
            zeroes
                .get(..usize::try_from(chunk).unwrap_or_default())
                .unwrap_or_default(),
        )?;
        left -= chunk;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn the_bytes_are_zero_for_who_still_has_the_file_open() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("secret");
        std::fs::write(&path, vec![7; 10_000]).unwrap();
        let mut open = File::open(&path).unwrap();
        super::file(&path).unwrap();
        assert!(!path.exists());
        std::fs::write(&path, [7; 100]).unwrap();
        written_file(&path).unwrap();
        assert!(!path.exists() && written_file(&path).is_err());
        let mut left = Vec::new();
        open.read_to_end(&mut left).unwrap();
        assert_eq!(left, vec![0; 10_000]);
        super::file(&path).unwrap();
    }
}
