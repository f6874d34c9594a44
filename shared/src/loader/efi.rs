//! Variables of the firmware as efivarfs shows them: four bytes of attributes, then the value.
//!
//! Read by the laptop's server: what booted this machine. Specification: UEFI, 3.1 ("Boot Manager", `EFI_LOAD_OPTION`), 10.3
//! ("Device Path Nodes"); Linux, Documentation/filesystems/efivarfs.rst.

/// The longest variable that is read, in bytes.
pub const MAX_VARIABLE: u64 = 64 << 10;
/// The namespace of the firmware's own variables.
pub const GLOBAL: &str = "8be4df61-93ca-11d2-aa0d-00e098032b8c";
/// The namespace of boot loaders' variables (systemd.io/BOOT_LOADER_INTERFACE).
pub const LOADER: &str = "4a67b082-0a4c-41cf-b6c7-440b29bb8c4f";

/// Types of device path nodes: a medium, and the end.
const MEDIUM: u8 = 4;
const END: u8 = 0x7f;
/// Media: a partition, and a file on it.
const PARTITION: u8 = 1;
const FILE: u8 = 4;
/// A partition known by a GUID.
const BY_GUID: u8 = 2;
/// It is in a GPT.
const GPT_TABLE: u8 = 2;
/// The end of the whole path.
const WHOLE: u8 = 0xff;
/// Attributes of a variable that is kept, and seen by boot loaders and the OS.
const KEPT: [u8; 4] = [7, 0, 0, 0];
/// Attributes of an entry: `LOAD_OPTION_ACTIVE`.
const ACTIVE: [u8; 4] = [1, 0, 0, 0];

/// The value behind the attributes.
#[must_use]
pub fn value(variable: &[u8]) -> Option<&[u8]> {
    variable.get(4..)
}

/// A variable that holds a text.
#[must_use]
pub fn text(variable: &[u8]) -> Option<String> {
    let text = utf16(value(variable)?);
    (!text.is_empty()).then_some(text)
}

/// A variable that holds a number of 16 bits.
#[must_use]
pub fn number(variable: &[u8]) -> Option<u16> {
    Some(u16::from_le_bytes(*value(variable)?.first_chunk()?))
}

/// UTF-16 up to a zero, or to the end.
fn utf16(bytes: &[u8]) -> String {
    let units = bytes.chunks_exact(2).map(|pair| match pair {
        [low, high] => u16::from_le_bytes([*low, *high]),
        _ => 0,
    });
    char::decode_utf16(units.take_while(|unit| *unit != 0))
        .map(|c| c.unwrap_or(char::REPLACEMENT_CHARACTER))
        .collect()
}

/// An entry of the firmware's boot menu (`Boot0001`).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LoadOption {
    /// For people.
    pub description: String,
    /// The partition's GUID, in small letters.
    pub partition: Option<String>,
    /// The program's path on it, with `/`.
    pub path: Option<String>,
    /// What the program is given, if that is a text.
    pub arguments: String,
}

/// Where a program lies that the firmware is to start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    /// The partition's number in its GPT.
    pub partition: u32,
    /// Its first block, and how many it has; in the disk's logical blocks.
    pub blocks: (u64, u64),
    /// Its own GUID.
    pub guid: crate::superblock::Guid,
    /// The path on it, with slashes.
    pub path: String,
}

/// The variable of an entry for this program: its attributes, then an active `EFI_LOAD_OPTION` (UEFI, 3.1.3) with a short-form device
/// path (10.3.5.1, 10.3.5.4). `None` if it is too long for one.
#[must_use]
pub fn boot_option(description: &str, program: &Program) -> Option<Vec<u8>> {
    let wide = |text: &str| -> Vec<u8> { text.encode_utf16().chain([0]).flat_map(u16::to_le_bytes).collect() };
    let node = |kind: u8, subtype: u8, data: &[u8]| {
        let [low, high] = u16::try_from(data.len() + 4).ok()?.to_le_bytes();
        Some([&[kind, subtype, low, high], data].concat())
    };
    let (first, count) = program.blocks;
    let disk = [
        program.partition.to_le_bytes().as_slice(),
        &first.to_le_bytes(),
        &count.to_le_bytes(),
        &program.guid.0,
        &[GPT_TABLE, BY_GUID],
    ]
    .concat();
    let path = [
        node(MEDIUM, PARTITION, &disk)?,
        node(MEDIUM, FILE, &wide(&program.path.replace('/', "\\")))?,
        node(END, WHOLE, &[])?,
    ]
    .concat();
    let length = u16::try_from(path.len()).ok()?.to_le_bytes();
    Some([&KEPT, &ACTIVE, length.as_slice(), &wide(description), &path].concat())
}

/// The variable that holds a number of 16 bits, such as `BootNext`.
#[must_use]
pub fn number_variable(number: u16) -> Vec<u8> {
    [KEPT.as_slice(), &number.to_le_bytes()].concat()
}

/// Reads an entry from its variable; `None` if that is broken.
#[must_use]
pub fn load_option(variable: &[u8]) -> Option<LoadOption> {
    let bytes = value(variable)?;
    let length = usize::from(u16::from_le_bytes(*bytes.get(4..)?.first_chunk()?));
    let rest = bytes.get(6..)?;
    let end = rest.chunks_exact(2).position(|pair| pair == [0, 0])?;
    let (description, rest) = rest.split_at_checked(2 * end + 2)?;
    let (mut nodes, arguments) = rest.split_at_checked(length)?;
    let mut option = LoadOption {
        description: utf16(description),
        arguments: arguments_of(arguments),
        ..LoadOption::default()
    };
    while let [kind, subtype, low, high, ..] = nodes {
        let length = usize::from(u16::from_le_bytes([*low, *high]));
        // A node is at least its own header, so each round gets on.
        let (node, after) = nodes.split_at_checked(length.max(4))?;
        match (*kind, *subtype) {
            (END, _) => break,
            (MEDIUM, PARTITION) if node.get(41) == Some(&BY_GUID) => {
                let guid: Option<[u8; 16]> = node.get(24..).and_then(|rest| rest.first_chunk().copied());
                option.partition = guid.map(|guid| crate::superblock::Guid(guid).to_string());
            }
            (MEDIUM, FILE) => {
                let part = utf16(node.get(4..)?).replace('\\', "/");
                option.path.get_or_insert_default().push_str(&part);
            }
            _ => {}
        }
        nodes = after;
    }
    Some(option)
}

/// What a program is given: UTF-16 (the Linux stub, efibootmgr -u), or plain text.
fn arguments_of(bytes: &[u8]) -> String {
    let wide = bytes.len() >= 2 && bytes.len().is_multiple_of(2) && bytes.get(1) == Some(&0);
    let text = if wide {
        utf16(bytes)
    } else {
        let plain = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
        std::str::from_utf8(plain).unwrap_or_default().to_owned()
    };
    if text.chars().any(|c| c.is_control() && c != '\n') {
        String::new()
    } else {
        text.trim().to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn wide(text: &str) -> Vec<u8> {
        text.encode_utf16().chain([0]).flat_map(u16::to_le_bytes).collect()
    }

    fn node(kind: u8, subtype: u8, data: &[u8]) -> Vec<u8> {
        let length = u16::try_from(data.len() + 4).unwrap().to_le_bytes();
        [&[kind, subtype, length[0], length[1]], data].concat()
    }

    fn option(arguments: &[u8]) -> Vec<u8> {
        let mut partition = [0_u8; 38];
        partition[20..36].copy_from_slice(&[
            0x33, 0x22, 0x11, 0x00, 0x55, 0x44, 0x77, 0x66, 0x88, 0x99, 0xaa, 0xbb, 0xcc, 0xdd, 0xee, 0xff,
        ]);
        partition[37] = BY_GUID;
        let path = [
            node(2, 1, &[0; 8]),
            node(MEDIUM, PARTITION, &partition),
            node(MEDIUM, FILE, &wide("\\EFI\\Linux\\arch.efi")),
            node(END, 0xff, &[]),
        ]
        .concat();
        let length = u16::try_from(path.len()).unwrap().to_le_bytes();
        [&[7, 0, 0, 0, 1, 0, 0, 0][..], &length, &wide("Arch"), &path, arguments].concat()
    }

    #[test]
    fn an_entry_of_the_firmware_names_partition_and_program() {
        let read = load_option(&option(&wide("root=UUID=1 quiet"))).unwrap();
        assert_eq!(
            read,
            LoadOption {
                description: "Arch".into(),
                partition: Some("00112233-4455-6677-8899-aabbccddeeff".into()),
                path: Some("/EFI/Linux/arch.efi".into()),
                arguments: "root=UUID=1 quiet".into(),
            }
        );
        assert_eq!(load_option(&option(b"ro quiet\0")).unwrap().arguments, "ro quiet");
        assert_eq!(load_option(&option(&[1, 2, 3])).unwrap().arguments, "");
    }

    #[test]
    fn an_entry_that_is_written_has_the_pinned_bytes_and_reads_back() {
        let program = Program {
            partition: 1,
            blocks: (2048, 0x10_0000),
            guid: crate::superblock::Guid::parse("00112233-4455-6677-8899-aabbccddeeff").unwrap(),
            path: "/EFI/a.efi".into(),
        };
        let written = boot_option("once", &program).unwrap();
        let pinned = concat!(
            "07000000", // attributes of the variable
            "01000000",
            "4800",                 // active; length of the path
            "6f006e00630065000000", // once
            "04012a00",
            "01000000", // a partition: the first
            "0008000000000000",
            "0000100000000000", // its blocks
            "33221100554477668899aabbccddeeff",
            "0202",     // its GUID, in a GPT
            "04041a00", // a file
            "5c004500460049005c0061002e006500660069000000",
            "7fff0400"
        );
        assert_eq!(data_encoding::HEXLOWER.encode(&written), pinned);
        let read = load_option(&written).unwrap();
        assert_eq!(read.description, "once");
        assert_eq!(read.path.as_deref(), Some("/EFI/a.efi"));
        assert_eq!(read.partition.as_deref(), Some("00112233-4455-6677-8899-aabbccddeeff"));
        assert_eq!(
            boot_option(&"x".repeat(70_000), &program).map(|bytes| bytes.len() > 70_000),
            Some(true)
        );
        let long = Program {
            path: "x".repeat(40_000),
            ..program
        };
        assert_eq!(boot_option("once", &long), None);
        assert_eq!(number_variable(0x1a), [7, 0, 0, 0, 0x1a, 0]);
    }

    #[test]
    fn guids_are_read_as_they_are_written_and_nothing_else_is() {
        let text = "00112233-4455-6677-8899-aabbccddeeff";
        let guid = crate::superblock::Guid::parse(text).unwrap();
        assert_eq!(guid.to_string(), text);
        assert_eq!(crate::superblock::Guid::parse(&text.to_uppercase()), Some(guid));
        for bad in [
            "",
            "1234-5678",
            "deadbeef-01",
            &text.replace('-', ""),
            &text.replace("ff", "fg"),
            &format!("{text}0"),
        ] {
            assert_eq!(crate::superblock::Guid::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn texts_and_numbers_are_read_behind_their_attributes() {
        let variable = [&[6, 0, 0, 0][..], &wide("arch.conf")].concat();
        assert_eq!(text(&variable).as_deref(), Some("arch.conf"));
        assert_eq!(text(&[6, 0, 0, 0]), None);
        assert_eq!(text(&[6, 0]), None);
        assert_eq!(number(&[6, 0, 0, 0, 2, 1]), Some(0x102));
        assert_eq!(number(&[6, 0, 0, 0, 2]), None);
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn damaged_entries_are_read_or_refused(at in 0_usize..150, value: u8, cut in 0_usize..150) {
            let mut bytes = option(b"quiet");
            let last = bytes.len() - 1;
            bytes[at.min(last)] = value;
            bytes.truncate(bytes.len().saturating_sub(cut));
            let _ = (load_option(&bytes), text(&bytes), number(&bytes));
        }

        #[test]
        fn texts_survive(written in "[a-zA-Zé€𝄞.-]{1,20}") {
            let variable = [vec![0; 4], wide(&written)].concat();
            prop_assert_eq!(text(&variable), Some(written));
        }
    }
}
