//! A kernel image's own version, which names its folder of modules.
//!
//! Used by the laptop's server and the builder. Specification: Linux, Documentation/arch/x86/boot.rst, "The Real-Mode
//! Kernel Header", `kernel_version`.

/// Bytes at the beginning of a bzImage in which its version is: the boot protocol allows 32 KiB of setup code.
pub const HEAD: u64 = 32 * 1024 + 0x200;

/// Where the header has its magic number.
const MAGIC_AT: usize = 0x202;
/// Where it says at which offset the version string is, minus one sector.
const POINTER_AT: usize = 0x20e;
/// A sector of the setup code.
const SECTOR: usize = 0x200;
/// The longest release that `uname` can tell, in bytes.
const RELEASE_MAX: usize = 64;

/// Whether an image begins as a bzImage does.
#[must_use]
pub fn is_bzimage(head: &[u8]) -> bool {
    head.get(MAGIC_AT..).is_some_and(|rest| rest.starts_with(b"HdrS"))
}

/// The release in a bzImage's version string, `6.1.0-18-amd64 (builder@host) #1 SMP …`: what `uname -r` will print under
/// it. `None` for other formats, and for what cannot be a release.
#[must_use]
pub fn release_in_header(head: &[u8]) -> Option<String> {
    if !is_bzimage(head) {
        return None;
    }
    let pointer = u16::from_le_bytes(head.get(POINTER_AT..POINTER_AT + 2)?.try_into().ok()?);
    if pointer == 0 {
        return None;
    }
    let text = head.get(usize::from(pointer) + SECTOR..)?;
    let end = text.iter().position(|byte| matches!(byte, 0 | b' '))?;
    let release = std::str::from_utf8(text.get(..end)?).ok()?;
    is_release(release).then(|| release.to_owned())
}

/// Whether a text can be a release and a folder's name in /lib/modules.
#[must_use]
pub fn is_release(text: &str) -> bool {
    (1..=RELEASE_MAX).contains(&text.len())
        && !text.starts_with('.')
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"._+-~".contains(&byte))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The beginning of a bzImage with this version string.
    fn image(version: &str) -> Vec<u8> {
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
        assert_eq!(release_in_header(&head[..0x2204]), None);
        assert_eq!(release_in_header(b"MZ"), None);
        let mut without = head;
        without[0x20e..0x210].fill(0);
        assert_eq!(release_in_header(&without), None);
    }

    #[test]
    fn what_is_no_folders_name_is_no_release() {
        for version in ["../../etc x", " x", "a/b x", ".. x", &format!("{} x", "1".repeat(65))] {
            assert_eq!(release_in_header(&image(version)), None, "{version}");
        }
        assert!(is_release("6.12.9+bpo-amd64") && is_release(&"1".repeat(64)));
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn any_bytes_are_read_without_panic(mut head in proptest::collection::vec(any::<u8>(), 0..0x400), magic: bool) {
            if magic && head.len() > 0x210 {
                head[0x202..0x206].copy_from_slice(b"HdrS");
                head[0x20f] &= 1;
            }
            if let Some(release) = release_in_header(&head) {
                prop_assert!(is_release(&release) && !release.contains('/'));
            }
        }
    }
}
