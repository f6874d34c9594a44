//! A kernel's release, from its image or its file's name.
//!
//! Specification: Linux, Documentation/arch/x86/boot.rst, "Details of Header Fields", `kernel_version`.

use std::fs::File;
use std::io::Read;
use std::path::Path;

/// The setup code, which holds the version, is at most 64 sectors; 32 KiB is what the boot protocol allows.
const SETUP: u64 = 32 * 1024 + 0x200;

/// What `uname -r` will say under the kernel in `file`.
///
/// From the image's header; for formats that have none, from a name such as `vmlinuz-6.1.0-18-amd64`.
///
/// # Errors
/// Those of reading.
pub fn release(file: &Path) -> std::io::Result<Option<String>> {
    let mut head = Vec::new();
    File::open(file)?.take(SETUP).read_to_end(&mut head)?;
    let named = || file.file_name()?.to_str().and_then(release_in_name);
    Ok(release_in_header(&head).or_else(named))
}

/// The release in a bzImage's version string, `6.1.0-18-amd64 (builder@host) #1 SMP …`.
#[must_use]
pub fn release_in_header(head: &[u8]) -> Option<String> {
    if head.get(0x202..0x206)? != b"HdrS" {
        return None;
    }
    let pointer = u16::from_le_bytes(head.get(0x20e..0x210)?.try_into().ok()?);
    if pointer == 0 {
        return None;
    }
    let text = head.get(usize::from(pointer) + 0x200..)?;
    let end = text.iter().position(|b| *b == 0 || *b == b' ')?;
    let release = std::str::from_utf8(text.get(..end)?).ok()?;
    is_release(release).then(|| release.to_owned())
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

/// Whether a text can be a release and a folder's name in /lib/modules.
pub fn is_release(text: &str) -> bool {
    (1..=64).contains(&text.len())
        && !text.starts_with('.')
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._+-~".contains(&b))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The beginning of a bzImage with this version string.
    pub fn image(version: &str) -> Vec<u8> {
        let mut head = vec![0; 0x3000];
        head[0x202..0x206].copy_from_slice(b"HdrS");
        head[0x20e..0x210].copy_from_slice(&0x2000_u16.to_le_bytes());
        head[0x2200..0x2200 + version.len()].copy_from_slice(version.as_bytes());
        head
    }

    #[test]
    fn the_header_names_the_release() {
        let head = image("6.1.0-18-amd64 (debian-kernel@lists.debian.org) #1 SMP");
        assert_eq!(release_in_header(&head).as_deref(), Some("6.1.0-18-amd64"));
        assert_eq!(release_in_header(&image("../../etc x")), None);
        assert_eq!(release_in_header(&head[..0x2204]), None);
        assert_eq!(release_in_header(b"MZ"), None);
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

    proptest! {
        #[test]
        fn any_bytes_are_read_without_panic(mut head in proptest::collection::vec(any::<u8>(), 0..0x400), magic: bool) {
            if magic && head.len() > 0x210 {
                head[0x202..0x206].copy_from_slice(b"HdrS");
            }
            if let Some(release) = release_in_header(&head) {
                prop_assert!(is_release(&release) && !release.contains('/'));
            }
        }
    }
}
