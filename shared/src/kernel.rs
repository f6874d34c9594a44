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

/// What a kernel's file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// x86: compressed, with the boot protocol's header.
    BzImage,
    /// arm64: plain (Documentation/arch/arm64/booting.rst).
    Arm64,
    /// Compressed by gzip, as arm64's `Image.gz`.
    Gzip,
    /// Compressed inside of an EFI program that unpacks itself (`drivers/firmware/efi/libstub/zboot-header.S`).
    Zboot,
    /// `vmlinux`.
    Elf,
    /// Something else.
    Unknown,
}

impl Format {
    /// By the beginning of a file.
    #[must_use]
    pub fn of(head: &[u8]) -> Self {
        let has = |at: usize, magic: &[u8]| head.get(at..).is_some_and(|rest| rest.starts_with(magic));
        if is_bzimage(head) {
            Self::BzImage
        } else if has(0x38, b"ARM\x64") {
            Self::Arm64
        } else if has(0, b"\x1f\x8b") {
            Self::Gzip
        } else if has(0, b"MZ") && has(4, b"zimg") {
            Self::Zboot
        } else if has(0, b"\x7fELF") {
            Self::Elf
        } else {
            Self::Unknown
        }
    }

    /// For people.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::BzImage => "an x86 kernel (bzImage)",
            Self::Arm64 => "an arm64 kernel (Image)",
            Self::Gzip => "compressed as a whole (gzip)",
            Self::Zboot => "a kernel that unpacks itself as an EFI program (zboot)",
            Self::Elf => "an ELF file (vmlinux)",
            Self::Unknown => "no kernel image that is known",
        }
    }
}

/// The kind of machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arch {
    /// x86 with 64 bits.
    X86_64,
    /// ARM with 64 bits.
    Arm64,
    /// Another.
    Other,
}

impl Arch {
    /// The one that this program is for.
    pub const OURS: Self = if cfg!(target_arch = "x86_64") {
        Self::X86_64
    } else if cfg!(target_arch = "aarch64") {
        Self::Arm64
    } else {
        Self::Other
    };

    /// Whether kexec_file_load starts a kernel of this format here.
    #[must_use]
    pub const fn starts(self, format: Format) -> bool {
        match self {
            Self::X86_64 => matches!(format, Format::BzImage),
            Self::Arm64 => matches!(format, Format::Arm64),
            Self::Other => !matches!(format, Format::Gzip | Format::Zboot),
        }
    }

    /// What it starts, for people.
    #[must_use]
    pub const fn wanted(self) -> &'static str {
        match self {
            Self::X86_64 => "a bzImage, such as /boot/vmlinuz-RELEASE",
            Self::Arm64 => {
                "an unpacked Image (`gunzip -c vmlinuz-RELEASE > Image-RELEASE`; for zboot, CONFIG_EFI_ZBOOT=n)"
            }
            Self::Other => "an unpacked kernel",
        }
    }

    /// UEFI's name, e.g. in `BOOTX64.EFI`.
    #[must_use]
    pub const fn efi_name(self) -> &'static str {
        match self {
            Self::X86_64 => "x64",
            Self::Arm64 => "aa64",
            Self::Other => "",
        }
    }
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
    fn formats_are_known_by_their_beginning() {
        let at = |at: usize, magic: &[u8]| [vec![0; at], magic.to_vec()].concat();
        for (head, format) in [
            (image("6.1 x"), Format::BzImage),
            (at(0x38, b"ARM\x64"), Format::Arm64),
            (at(0, b"\x1f\x8b\x08"), Format::Gzip),
            (at(0, b"MZ\0\0zimg"), Format::Zboot),
            (at(0, b"\x7fELF\x02"), Format::Elf),
            (at(0, b"MZ\0\0"), Format::Unknown),
            (Vec::new(), Format::Unknown),
        ] {
            assert_eq!(Format::of(&head), format);
            assert_eq!(Arch::X86_64.starts(format), format == Format::BzImage);
            assert_eq!(Arch::Arm64.starts(format), format == Format::Arm64);
        }
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
