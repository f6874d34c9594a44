//! Unified kernel images: where kernel, initrd and command line lie inside of an EFI program.
//!
//! Read by the laptop's server; `initrd-builder::uki` writes such images. Specification: UAPI group, "Unified Kernel Image";
//! systemd-stub(7); Microsoft, "PE Format". Only headers are read, so an image of any size costs nothing. Refused: sections
//! outside of the file, or too many.

/// Bytes at the beginning of a file in which its headers are.
pub const HEAD: u64 = 64 << 10;
/// More sections than an image with many profiles has.
const MAX_SECTIONS: u16 = 512;
/// Bytes of a section header.
const SECTION_HEADER: usize = 40;
/// Where the file says where its PE header is.
const PE_AT: usize = 0x3c;
/// Bytes of the PE signature and the COFF header.
const COFF: usize = 24;
/// Begins a profile; what stands before the first one is in all.
const PROFILE: &str = ".profile";

/// A section: a part of the file.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Section {
    /// E.g. `.linux`.
    pub name: String,
    /// Where it begins in the file, in bytes.
    pub offset: u64,
    /// Its length in bytes, without padding.
    pub len: u64,
}

/// Lists the sections of an EFI program by the beginning of its file, which has `file_len` bytes in all. `None` if it is none,
/// or broken.
#[must_use]
pub fn sections(head: &[u8], file_len: u64) -> Option<Vec<Section>> {
    if !head.starts_with(b"MZ") {
        return None;
    }
    let at = usize::try_from(u32_at(head, PE_AT)?).ok()?;
    let coff = head.get(at..)?;
    if !coff.starts_with(b"PE\0\0") {
        return None;
    }
    let (count, optional) = (u16_at(coff, 6)?, u16_at(coff, 20)?);
    if count > MAX_SECTIONS {
        return None;
    }
    let table = coff.get(COFF + usize::from(optional)..)?;
    let table = table.get(..usize::from(count) * SECTION_HEADER)?;
    table
        .chunks_exact(SECTION_HEADER)
        .map(|header| {
            let name = header.get(..8)?.split(|byte| *byte == 0).next()?;
            let (size, padded) = (u32_at(header, 8)?, u32_at(header, 16)?);
            // In memory it may be longer than in the file (.bss), and in the file it is padded.
            let len = u64::from(if size == 0 { padded } else { size.min(padded) });
            let offset = u64::from(u32_at(header, 20)?);
            (len == 0 || offset.checked_add(len)? <= file_len).then(|| Section {
                name: String::from_utf8_lossy(name).into_owned(),
                offset,
                len,
            })
        })
        .collect()
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// What an image boots if nothing else is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// `.linux`.
    pub kernel: Section,
    /// `.ucode`, then `.initrd`.
    pub initrds: Vec<Section>,
    /// `.cmdline`.
    pub cmdline: Option<Section>,
    /// `.uname`: the kernel's release.
    pub uname: Option<Section>,
    /// `.osrel`: an os-release file.
    pub osrel: Option<Section>,
    /// How many profiles it has; of these, the first is taken.
    pub profiles: usize,
}

/// The image that the sections of an EFI program make; `None` if it holds no kernel.
///
/// With profiles, the first one counts, as in systemd-stub: what it lacks is taken from what stands before it.
#[must_use]
pub fn image(sections: &[Section]) -> Option<Image> {
    let mut parts = sections.split(|section| section.name == PROFILE);
    let (base, first) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let find = |name: &str| {
        let of = |part: &[Section]| {
            part.iter()
                .find(|section| section.name == name && section.len > 0)
                .cloned()
        };
        of(first).or_else(|| of(base))
    };
    Some(Image {
        kernel: find(".linux")?,
        initrds: [".ucode", ".initrd"].into_iter().filter_map(find).collect(),
        cmdline: find(".cmdline"),
        uname: find(".uname"),
        osrel: find(".osrel"),
        profiles: sections.iter().filter(|section| section.name == PROFILE).count(),
    })
}

/// The text of a section, up to a zero; control characters are spaces, as in systemd-stub.
#[must_use]
pub fn text(bytes: &[u8]) -> String {
    let text = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(text)
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect::<String>()
        .trim()
        .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// An EFI program of these sections, one after the other behind the headers.
    fn program(sections: &[(&str, &[u8])]) -> Vec<u8> {
        let mut bytes = vec![0; 0x40 + COFF + 16 + sections.len() * SECTION_HEADER];
        bytes[..2].copy_from_slice(b"MZ");
        bytes[PE_AT] = 0x40;
        bytes[0x40..0x44].copy_from_slice(b"PE\0\0");
        bytes[0x46] = u8::try_from(sections.len()).unwrap();
        bytes[0x40 + 20] = 16;
        for (index, (name, data)) in sections.iter().enumerate() {
            let at = 0x40 + COFF + 16 + index * SECTION_HEADER;
            let (len, offset) = (u32::try_from(data.len()).unwrap(), u32::try_from(bytes.len()).unwrap());
            bytes[at..at + name.len()].copy_from_slice(name.as_bytes());
            for (field, value) in [(8, len), (16, len + 3), (20, offset)] {
                bytes[at + field..at + field + 4].copy_from_slice(&value.to_le_bytes());
            }
            bytes.extend_from_slice(data);
            bytes.extend_from_slice(&[0; 3]);
        }
        bytes
    }

    fn read(bytes: &[u8]) -> Option<Vec<Section>> {
        sections(bytes, bytes.len() as u64)
    }

    fn data<'a>(bytes: &'a [u8], section: &Section) -> &'a [u8] {
        let at = usize::try_from(section.offset).unwrap();
        &bytes[at..at + usize::try_from(section.len).unwrap()]
    }

    #[test]
    fn an_image_s_parts_are_found_without_their_padding() {
        let bytes = program(&[
            (".text", b"program"),
            (".osrel", b"ID=arch\n"),
            (".cmdline", b"root=UUID=1 rw\n\0"),
            (".initrd", b"initrd"),
            (".ucode", b"microcode"),
            (".uname", b"6.9.1-arch1-1"),
            (".linux", b"kernel"),
        ]);
        let image = image(&read(&bytes).unwrap()).unwrap();
        assert_eq!(data(&bytes, &image.kernel), b"kernel");
        let initrds: Vec<_> = image.initrds.iter().map(|section| data(&bytes, section)).collect();
        assert_eq!(initrds, [&b"microcode"[..], b"initrd"]);
        assert_eq!(text(data(&bytes, &image.cmdline.unwrap())), "root=UUID=1 rw");
        assert_eq!(text(data(&bytes, &image.uname.unwrap())), "6.9.1-arch1-1");
        assert_eq!(image.profiles, 0);
    }

    #[test]
    fn of_profiles_the_first_counts_over_what_all_have() {
        let bytes = program(&[
            (".linux", b"kernel"),
            (".cmdline", b"base"),
            (".profile", b"ID=main"),
            (".cmdline", b"main"),
            (".profile", b"ID=reset"),
            (".cmdline", b"reset"),
        ]);
        let image = image(&read(&bytes).unwrap()).unwrap();
        assert_eq!(data(&bytes, &image.cmdline.unwrap()), b"main");
        assert_eq!((data(&bytes, &image.kernel), image.profiles), (&b"kernel"[..], 2));
        // Made by ukify, all of the first profile stands behind its mark.
        let bytes = program(&[
            (".profile", b"ID=main"),
            (".linux", b"kernel"),
            (".profile", b"x"),
            (".linux", b"other"),
        ]);
        let image = super::image(&read(&bytes).unwrap()).unwrap();
        assert_eq!(data(&bytes, &image.kernel), b"kernel");
    }

    #[test]
    fn other_programs_are_no_images() {
        assert_eq!(image(&read(&program(&[(".text", b"x")])).unwrap()), None);
        assert_eq!(read(b"MZ"), None);
        assert_eq!(read(b"#!/bin/sh"), None);
    }

    #[test]
    fn a_section_outside_of_the_file_is_refused() {
        let bytes = program(&[(".linux", b"kernel")]);
        assert!(sections(&bytes, bytes.len() as u64 - 3).is_some());
        assert_eq!(sections(&bytes, bytes.len() as u64 - 4), None);
    }

    #[test]
    fn texts_end_at_a_zero_and_have_no_control_characters() {
        assert_eq!(text(b" a\tb\n\0c"), "a b");
        assert_eq!(text(b"\xff"), "\u{fffd}");
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn damaged_images_give_sections_inside_of_the_file_or_none(at in 0_usize..200, value: u8, with in 0_usize..200, other: u8, cut in 0_usize..300) {
            let mut bytes = program(&[(".linux", b"kernel"), (".initrd", b"initrd"), (".cmdline", b"quiet")]);
            let last = bytes.len() - 1;
            bytes[at.min(last)] = value;
            bytes[with.min(last)] = other;
            bytes.truncate(bytes.len().saturating_sub(cut));
            for section in read(&bytes).unwrap_or_default() {
                prop_assert!(section.len == 0 || section.offset + section.len <= bytes.len() as u64);
            }
        }

        #[test]
        fn any_bytes_are_read(mut bytes: Vec<u8>) {
            let _ = read(&bytes);
            bytes.splice(..0, *b"MZ");
            let _ = read(&bytes);
        }
    }
}
