//! Unified kernel images: one EFI program that holds kernel, initrd and command line as sections behind systemd's stub.
//!
//! Counterpart: systemd-stub on the desktop, which finds the sections by name; `stick` puts the image on the stick.
//! Specification: UAPI group, "UKI"; Microsoft, "PE Format". Refuses what would not load: no room for the headers,
//! a signed stub (its signature would break), another machine's kernel.

use object::LittleEndian as LE;
use object::pe::{IMAGE_DIRECTORY_ENTRY_SECURITY, IMAGE_SCN_CNT_INITIALIZED_DATA, IMAGE_SCN_MEM_READ};
use object::read::pe::{ImageNtHeaders, ImageOptionalHeader, PeFile64};
use zeroize::Zeroizing;

/// Bytes of one section header.
const SECTION_HEADER_LEN: usize = 40;
/// Where the optional header begins, after the signature and the COFF header.
const OPTIONAL_HEADER_AT: usize = 24;
/// Sections begin at pages in memory, whatever smaller alignment the stub asks for.
const PAGE: u32 = 4096;
/// Each part of an initrd begins at a multiple of this many bytes, as the kernel demands.
const INITRD_ALIGN: usize = 4;

/// Why no image can be built, or a file is none.
#[derive(Debug, thiserror::Error)]
pub enum UkiError {
    /// The file is no 64-bit EFI program.
    #[error("{what} is no 64-bit EFI program: give one built for UEFI")]
    NotPe {
        /// Which file.
        what: &'static str,
        /// What is wrong with it.
        #[source]
        source: object::Error,
    },
    /// The stub carries a signature that would not hold any more.
    #[error(
        "the EFI stub is signed, and sections cannot be added to it: give the unsigned one (package systemd-boot-efi)"
    )]
    SignedStub,
    /// The stub already holds one of the sections.
    #[error(
        "the EFI stub already has a section {name}: it is a whole image; give the plain stub (package systemd-boot-efi)"
    )]
    SectionExists {
        /// The section's name.
        name: String,
    },
    /// There is no room for further section headers before the first section.
    #[error(
        "the EFI stub has room for {have} bytes of headers, {need} are needed: use a newer stub (package systemd-boot-efi)"
    )]
    NoHeaderSpace {
        /// Bytes before the first section.
        have: usize,
        /// Bytes of all headers.
        need: usize,
    },
    /// Alignments that are no powers of two, or sections that overlap.
    #[error("the EFI stub's layout is broken ({what}): reinstall it (package systemd-boot-efi)")]
    BadLayout {
        /// Which rule it breaks.
        what: &'static str,
    },
    /// Kernel and stub are for different machines.
    #[error(
        "the kernel is for machine {kernel:#06x}, the EFI stub for {stub:#06x}: give both for the same architecture"
    )]
    OtherMachine {
        /// The kernel's PE machine number.
        kernel: u16,
        /// The stub's PE machine number.
        stub: u16,
    },
    /// The command line has bytes that no kernel command line can have.
    #[error("the kernel command line contains a control character: remove it")]
    BadCommandLine,
    /// The image would exceed what a PE file can describe.
    #[error("the image would be larger than 2 GiB: use a smaller ramdisk")]
    TooLarge,
}

/// What goes into an image.
pub struct Uki<'a> {
    /// systemd's EFI stub, unsigned and without sections of its own.
    pub stub: &'a [u8],
    /// Contents of an os-release file, shown by boot menus.
    pub os_release: &'a str,
    /// The kernel's command line.
    pub cmdline: &'a str,
    /// Parts of the initrd, in order; each is padded to 4 bytes.
    pub initrd: &'a [&'a [u8]],
    /// The kernel, with its own EFI stub.
    pub kernel: &'a [u8],
}

/// One section of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Section<'a> {
    /// E.g. `.linux`.
    pub name: String,
    /// Where it lies in memory, from the image's base.
    pub address: u32,
    /// Its contents, without padding.
    pub data: &'a [u8],
}

/// Lists the sections of an EFI program, in the order of its headers.
///
/// # Errors
/// `NotPe` for anything else, also if a section lies outside of the file.
pub fn sections(bytes: &[u8]) -> Result<Vec<Section<'_>>, UkiError> {
    let not_pe = |source| UkiError::NotPe {
        what: "the image",
        source,
    };
    let file = PeFile64::parse(bytes).map_err(not_pe)?;
    let mut sections = Vec::new();
    for header in file.section_table().iter() {
        let name = header.raw_name();
        let data = header.pe_data(bytes).map_err(not_pe)?;
        sections.push(Section {
            name: String::from_utf8_lossy(name).into_owned(),
            address: header.virtual_address.get(LE),
            data,
        });
    }
    Ok(sections)
}

/// The PE machine number of an EFI program, e.g. 0x8664 for x86-64.
///
/// # Errors
/// `NotPe` for anything else.
pub fn machine(bytes: &[u8]) -> Result<u16, UkiError> {
    let file = PeFile64::parse(bytes).map_err(|source| UkiError::NotPe {
        what: "the image",
        source,
    })?;
    Ok(file.nt_headers().file_header().machine.get(LE).0)
}

/// What of the stub's headers matters for adding sections.
struct StubLayout {
    /// Where the optional header begins in the file.
    optional_at: usize,
    /// Where the next section header goes.
    headers_end: usize,
    /// Number of sections it has.
    count: u16,
    file_align: u32,
    /// First free address, in memory.
    next_address: u32,
    initialized_data: u32,
}

/// Where a new section goes.
struct Placed<'a> {
    name: &'static str,
    parts: Vec<&'a [u8]>,
    align: usize,
    len: u32,
    address: u32,
    file_at: u32,
    file_len: u32,
}

impl Uki<'_> {
    /// Puts the image together. It may hold secrets (the handover), so it is wiped when dropped.
    ///
    /// # Errors
    /// See [`UkiError`]; everything is checked before anything is written.
    pub fn assemble(&self) -> Result<Zeroizing<Vec<u8>>, UkiError> {
        if self.cmdline.chars().any(char::is_control) {
            return Err(UkiError::BadCommandLine);
        }
        let new: [(&'static str, Vec<&[u8]>, usize); 4] = [
            (".osrel", vec![self.os_release.as_bytes()], 1),
            (".cmdline", vec![self.cmdline.as_bytes()], 1),
            (".initrd", self.initrd.to_vec(), INITRD_ALIGN),
            (".linux", vec![self.kernel], 1),
        ];
        let layout = self.check_stub(&new.each_ref().map(|(name, _, _)| *name))?;
        let placed = place(new, &layout, self.stub.len())?;
        Ok(write(self.stub, &layout, &placed))
    }

    /// Checks that stub and kernel belong together, and finds the room for the new sections.
    fn check_stub(&self, names: &[&str]) -> Result<StubLayout, UkiError> {
        let stub = PeFile64::parse(self.stub).map_err(|source| UkiError::NotPe {
            what: "the EFI stub",
            source,
        })?;
        let kernel = PeFile64::parse(self.kernel).map_err(|source| UkiError::NotPe {
            what: "the kernel",
            source,
        })?;
        let machine = |file: &PeFile64| file.nt_headers().file_header().machine.get(LE).0;
        if machine(&stub) != machine(&kernel) {
            return Err(UkiError::OtherMachine {
                kernel: machine(&kernel),
                stub: machine(&stub),
            });
        }
        let signed = |directory: &object::pe::ImageDataDirectory| directory.virtual_address.get(LE) != 0;
        if stub.data_directory(IMAGE_DIRECTORY_ENTRY_SECURITY).is_some_and(signed) {
            return Err(UkiError::SignedStub);
        }
        stub_layout(&stub, self.stub, names)
    }
}

/// Finds the room for new sections in a stub's headers, in the file and in memory.
fn stub_layout(stub: &PeFile64, bytes: &[u8], names: &[&str]) -> Result<StubLayout, UkiError> {
    let broken = |what| Err(UkiError::BadLayout { what });
    let nt = stub.nt_headers();
    let optional = nt.optional_header();
    let (file_align, section_align) = (optional.file_alignment(), optional.section_alignment());
    if !file_align.is_power_of_two() || !section_align.is_power_of_two() {
        return broken("alignment is no power of two");
    }
    let count = nt.file_header().number_of_sections.get(LE);
    let optional_at = stub.dos_header().nt_headers_offset() as usize + OPTIONAL_HEADER_AT;
    let headers_end = optional_at
        + usize::from(nt.file_header().size_of_optional_header.get(LE))
        + usize::from(count) * SECTION_HEADER_LEN;
    let mut first_data = optional.size_of_headers() as usize;
    let mut end = optional.size_of_headers();
    for header in stub.section_table().iter() {
        let name = String::from_utf8_lossy(header.raw_name()).into_owned();
        if names.contains(&name.as_str()) {
            return Err(UkiError::SectionExists { name });
        }
        let what = "the EFI stub";
        header
            .pe_data(bytes)
            .map_err(|source| UkiError::NotPe { what, source })?;
        let address = header.virtual_address.get(LE);
        if address < end {
            return broken("sections overlap in memory");
        }
        end = address
            .checked_add(header.virtual_size.get(LE))
            .ok_or(UkiError::TooLarge)?;
        if header.size_of_raw_data.get(LE) > 0 {
            first_data = first_data.min(header.pointer_to_raw_data.get(LE) as usize);
        }
    }
    let need = headers_end + names.len() * SECTION_HEADER_LEN;
    if need > first_data {
        return Err(UkiError::NoHeaderSpace { have: first_data, need });
    }
    let room = bytes.get(headers_end..need);
    if room.is_none_or(|room| room.iter().any(|byte| *byte != 0)) {
        return broken("data between headers and sections");
    }
    Ok(StubLayout {
        optional_at,
        headers_end,
        count,
        file_align,
        next_address: end
            .checked_next_multiple_of(section_align.max(PAGE))
            .ok_or(UkiError::TooLarge)?,
        initialized_data: optional.size_of_initialized_data(),
    })
}

/// Lays the sections out one after another, in the file and in memory.
fn place<'a>(
    new: [(&'static str, Vec<&'a [u8]>, usize); 4],
    layout: &StubLayout,
    stub_len: usize,
) -> Result<Vec<Placed<'a>>, UkiError> {
    let round = |value: u32, to: u32| {
        value
            .checked_next_multiple_of(to)
            .filter(|value| i32::try_from(*value).is_ok())
    };
    let round = |value, to| round(value, to).ok_or(UkiError::TooLarge);
    let mut file_at = round(
        u32::try_from(stub_len).map_err(|_| UkiError::TooLarge)?,
        layout.file_align,
    )?;
    let mut address = layout.next_address;
    let mut placed = Vec::new();
    for (name, parts, align) in new {
        let mut total = 0_usize;
        for part in &parts {
            total = total
                .checked_add(part.len())
                .and_then(|total| total.checked_next_multiple_of(align))
                .ok_or(UkiError::TooLarge)?;
        }
        let len = u32::try_from(total).map_err(|_| UkiError::TooLarge)?;
        let file_len = round(len, layout.file_align)?;
        let end = address.checked_add(len).ok_or(UkiError::TooLarge)?;
        placed.push(Placed {
            name,
            parts,
            align,
            len,
            address,
            file_at,
            file_len,
        });
        file_at = file_at.checked_add(file_len).ok_or(UkiError::TooLarge)?;
        address = round(end, PAGE)?;
    }
    Ok(placed)
}

/// Writes stub, headers and sections. The layout was checked: all places lie inside.
fn write(stub: &[u8], layout: &StubLayout, placed: &[Placed]) -> Zeroizing<Vec<u8>> {
    let total = placed
        .last()
        .map_or(stub.len(), |last| (last.file_at + last.file_len) as usize);
    // The full size from the beginning: growing would leave copies of the secrets behind.
    let mut image = Zeroizing::new(Vec::with_capacity(total));
    image.extend_from_slice(stub);
    for section in placed {
        image.resize(section.file_at as usize, 0);
        for part in &section.parts {
            image.extend_from_slice(part);
            let padded = image.len() + (section.align - part.len() % section.align) % section.align;
            image.resize(padded, 0);
        }
    }
    image.resize(total, 0);

    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    for (index, section) in placed.iter().enumerate() {
        put(
            layout.headers_end + index * SECTION_HEADER_LEN,
            &section_header(section),
        );
    }
    let added = u16::try_from(placed.len()).unwrap_or(u16::MAX);
    put(
        layout.optional_at - OPTIONAL_HEADER_AT + 6,
        &(layout.count + added).to_le_bytes(),
    );
    let data_len = placed.iter().fold(layout.initialized_data, |sum, section| {
        sum.saturating_add(section.file_len)
    });
    put(layout.optional_at + 8, &data_len.to_le_bytes());
    let image_len = placed.last().map_or(layout.next_address, |last| {
        (last.address + last.len).next_multiple_of(PAGE)
    });
    put(layout.optional_at + 56, &image_len.to_le_bytes());
    // The checksum is optional for EFI programs; a wrong one would be worse than none.
    put(layout.optional_at + 64, &0_u32.to_le_bytes());
    image
}

fn section_header(section: &Placed) -> [u8; SECTION_HEADER_LEN] {
    let mut header = [0; SECTION_HEADER_LEN];
    header[..section.name.len()].copy_from_slice(section.name.as_bytes());
    for (at, value) in [
        (8, section.len),
        (12, section.address),
        (16, section.file_len),
        (20, section.file_at),
        (36, IMAGE_SCN_CNT_INITIALIZED_DATA.0 | IMAGE_SCN_MEM_READ.0),
    ] {
        header[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }
    header
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::testing::{installed_file, tool};

    /// A minimal PE32+ file with one section `.text` (8 bytes), and `room` bytes of header space.
    pub(crate) fn tiny_pe(machine: u16, room: usize) -> Vec<u8> {
        let mut pe = vec![0_u8; room + 512];
        let mut put = |at: usize, bytes: &[u8]| pe[at..at + bytes.len()].copy_from_slice(bytes);
        let room32 = u32::try_from(room).unwrap();
        put(0, b"MZ");
        put(0x3c, &64_u32.to_le_bytes());
        put(64, b"PE\0\0");
        put(68, &machine.to_le_bytes());
        put(70, &1_u16.to_le_bytes());
        put(84, &240_u16.to_le_bytes());
        put(88, &0x20b_u16.to_le_bytes());
        put(88 + 32, &512_u32.to_le_bytes());
        put(88 + 36, &512_u32.to_le_bytes());
        put(88 + 56, &(0x4000_u32 + 512).to_le_bytes());
        put(88 + 60, &room32.to_le_bytes());
        put(88 + 108, &16_u32.to_le_bytes());
        put(328, b".text");
        put(328 + 8, &8_u32.to_le_bytes());
        put(328 + 12, &0x4000_u32.to_le_bytes());
        put(328 + 16, &512_u32.to_le_bytes());
        put(328 + 20, &room32.to_le_bytes());
        put(room, b"programm");
        pe
    }

    const AMD64: u16 = 0x8664;

    fn uki<'a>(stub: &'a [u8], kernel: &'a [u8], initrd: &'a [&'a [u8]]) -> Uki<'a> {
        Uki {
            stub,
            os_release: "ID=stiefel\n",
            cmdline: "quiet",
            initrd,
            kernel,
        }
    }

    #[test]
    fn sections_come_back_in_order_with_the_initrd_parts_aligned() {
        let (stub, kernel) = (tiny_pe(AMD64, 1024), tiny_pe(AMD64, 512));
        let image = uki(&stub, &kernel, &[b"abcde", b"xyz"]).assemble().unwrap();
        let sections = sections(&image).unwrap();
        let names: Vec<_> = sections.iter().map(|section| section.name.as_str()).collect();
        assert_eq!(names, [".text", ".osrel", ".cmdline", ".initrd", ".linux"]);
        assert_eq!(sections[0].data, b"programm");
        assert_eq!(sections[1].data, b"ID=stiefel\n");
        assert_eq!(sections[2].data, b"quiet");
        assert_eq!(sections[3].data, b"abcde\0\0\0xyz\0");
        assert_eq!(sections[4].data, kernel);
        for pair in sections.windows(2) {
            let end = pair[0].address as usize + pair[0].data.len();
            assert!(
                end <= pair[1].address as usize,
                "{} overlaps {}",
                pair[0].name,
                pair[1].name
            );
            assert_eq!(pair[1].address % PAGE, 0);
        }
        let last = &sections[4];
        let size = PeFile64::parse(&**image)
            .unwrap()
            .nt_headers()
            .optional_header()
            .size_of_image();
        assert_eq!(
            size as usize,
            (last.address as usize + last.data.len()).next_multiple_of(4096)
        );
    }

    #[test]
    fn stub_without_room_for_headers_is_refused() {
        let (stub, kernel) = (tiny_pe(AMD64, 512), tiny_pe(AMD64, 512));
        let error = uki(&stub, &kernel, &[]).assemble().unwrap_err();
        assert!(
            matches!(error, UkiError::NoHeaderSpace { have: 512, need: 528 }),
            "{error}"
        );
    }

    #[test]
    fn a_whole_image_is_refused_as_a_stub() {
        let (stub, kernel) = (tiny_pe(AMD64, 2048), tiny_pe(AMD64, 512));
        let image = uki(&stub, &kernel, &[]).assemble().unwrap();
        let error = uki(&image, &kernel, &[]).assemble().unwrap_err();
        assert!(
            matches!(&error, UkiError::SectionExists { name } if name == ".osrel"),
            "{error}"
        );
    }

    #[test]
    fn signed_stub_and_foreign_kernel_and_newlines_are_refused() {
        let (mut stub, kernel) = (tiny_pe(AMD64, 1024), tiny_pe(AMD64, 512));
        let arm = tiny_pe(0xaa64, 512);
        assert!(matches!(
            uki(&stub, &arm, &[]).assemble(),
            Err(UkiError::OtherMachine { .. })
        ));
        let mut lines = uki(&stub, &kernel, &[]);
        lines.cmdline = "quiet\nsplash";
        assert!(matches!(lines.assemble(), Err(UkiError::BadCommandLine)));
        stub[88 + 112 + 4 * 8] = 1;
        assert!(matches!(uki(&stub, &kernel, &[]).assemble(), Err(UkiError::SignedStub)));
    }

    #[test]
    fn truncated_files_are_refused_and_never_panic() {
        let kernel = tiny_pe(AMD64, 512);
        let stub = tiny_pe(AMD64, 1024);
        for len in 0..stub.len() {
            let _ = uki(&stub[..len], &kernel, &[]).assemble();
            let _ = sections(&stub[..len]);
        }
        assert!(matches!(sections(b"MZ"), Err(UkiError::NotPe { .. })));
    }

    proptest::proptest! {
        #![proptest_config(crate::testing::cases(256))]
        #[test]
        fn damaged_stubs_never_panic(at in 0_usize..1536, value: u8, with in 0_usize..1536, other: u8) {
            let (mut stub, kernel) = (tiny_pe(AMD64, 1024), tiny_pe(AMD64, 512));
            stub[at] = value;
            stub[with] = other;
            if let Ok(image) = uki(&stub, &kernel, &[b"initrd"]).assemble() {
                let found = sections(&image).unwrap();
                assert_eq!(found.last().unwrap().data, kernel);
            }
        }
    }

    #[test]
    fn objdump_sees_the_same_sections_on_systemds_stub() {
        let stub = installed_file(crate::stick::DEFAULT_STUB);
        let (Some(stub), Some(mut objdump)) = (stub, tool("objdump")) else {
            return;
        };
        let kernel = tiny_pe(AMD64, 512);
        let image = uki(&stub, &kernel, &[&[7; 5000]]).assemble().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("uki.efi");
        std::fs::write(&path, &*image).unwrap();
        let output = objdump.arg("-h").arg(&path).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{text}");
        for section in sections(&image).unwrap() {
            let line = text
                .lines()
                .find(|line| line.split_whitespace().nth(1) == Some(&section.name))
                .unwrap();
            let fields: Vec<_> = line.split_whitespace().collect();
            assert_eq!(
                usize::from_str_radix(fields[2], 16).unwrap(),
                section.data.len(),
                "{line}"
            );
            assert_eq!(u32::from_str_radix(fields[3], 16).unwrap(), section.address, "{line}");
        }
    }
}
