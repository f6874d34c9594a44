//! A kernel's release, from its image or its file's name.
//!
//! The header is read by `stiefel_shared::kernel`.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;

pub use stiefel_shared::kernel::is_release;
use stiefel_shared::kernel::{HEAD, release_in_header};

use super::Piece;

/// The beginning of a kernel.
pub(super) fn head(kernel: &Piece) -> io::Result<Vec<u8>> {
    let mut file = File::open(&kernel.path)?;
    let mut len = HEAD;
    if let Some(section) = &kernel.section {
        file.seek(SeekFrom::Start(section.offset))?;
        len = len.min(section.len);
    }
    let mut head = Vec::new();
    file.take(len).read_to_end(&mut head)?;
    Ok(head)
}

/// What `uname -r` will say under the kernel in `file`.
///
/// From the image's header; for formats that have none, from a name such as `vmlinuz-6.1.0-18-amd64`.
///
/// # Errors
/// Those of reading.
pub fn release(file: &Path) -> io::Result<Option<String>> {
    let kernel = Piece::from(file.to_owned());
    Ok(release_of(&head(&kernel)?, &kernel))
}

/// As [`release`], with the image's beginning.
pub(super) fn release_of(head: &[u8], kernel: &Piece) -> Option<String> {
    // The name of a unified kernel image is not the kernel's.
    let whole = || kernel.section.is_none().then_some(&kernel.path);
    let named = || whole()?.file_name()?.to_str().and_then(release_in_name);
    release_in_header(head).or_else(named)
}
/// The release in a kernel file's name.
#[must_use]
pub fn release_in_name(name: &str) -> Option<String> {
    let release = ["vmlinuz-", "vmlinux-", "kernel-", "bzImage-", "Image-"]
        .iter()
        .find_map(|prefix| name.strip_prefix(prefix))?;
    // Arch's `vmlinuz-linux` names a package.
    (is_release(release) && release.starts_with(|c: char| c.is_ascii_digit())).then(|| release.to_owned())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// The beginning of a bzImage with this version string.
    pub fn image(version: &str) -> Vec<u8> {
        let mut head = vec![0; 0x3000];
        head[0x202..0x206].copy_from_slice(b"HdrS");
        head[0x20e..0x210].copy_from_slice(&0x2000_u16.to_le_bytes());
        head[0x2200..0x2200 + version.len()].copy_from_slice(version.as_bytes());
        head
    }

    #[test]
    fn the_header_counts_more_than_the_name() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("vmlinuz-5.10.0-1-amd64");
        std::fs::write(&file, image("6.1.0-18-amd64 (debian-kernel@lists.debian.org) #1 SMP")).unwrap();
        assert_eq!(release(&file).unwrap().as_deref(), Some("6.1.0-18-amd64"));
        std::fs::write(&file, b"MZ").unwrap();
        assert_eq!(release(&file).unwrap().as_deref(), Some("5.10.0-1-amd64"));
    }

    #[test]
    fn the_name_serves_where_there_is_no_header() {
        assert_eq!(
            release_in_name("vmlinuz-6.1.0-18-amd64").as_deref(),
            Some("6.1.0-18-amd64")
        );
        assert_eq!(release_in_name("kernel-6.6.1-gentoo").as_deref(), Some("6.6.1-gentoo"));
        assert_eq!(release_in_name("vmlinuz-linux"), None);
        assert_eq!(release_in_name("vmlinuz"), None);
    }
}
