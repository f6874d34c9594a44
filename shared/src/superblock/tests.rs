use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use proptest::prelude::*;

use super::*;

const UUID: &str = "00112233-4455-6677-8899-aabbccddeeff";
const BYTES: [u8; 16] = [
    0x00, 0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88, 0x99, 0xaa, 0xbb, 0xcc, 0xdd, 0xee, 0xff,
];

fn claim(kind: ClaimKind, value: &str) -> Claim {
    Claim {
        kind,
        value: value.to_owned(),
    }
}

fn reader(bytes: &[u8]) -> impl FnMut(u64, &mut [u8]) -> io::Result<()> {
    move |offset, buffer| {
        let at = usize::try_from(offset).map_err(io::Error::other)?;
        let found = bytes.get(at..).and_then(|rest| rest.get(..buffer.len()));
        buffer.copy_from_slice(found.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

fn probed(bytes: &[u8]) -> Vec<Claim> {
    probe(&mut reader(bytes), bytes.len() as u64)
}

/// A device of 256 KiB with these bytes at these places.
fn device(pieces: &[(usize, &[u8])]) -> Vec<u8> {
    let mut bytes = vec![0; 256 << 10];
    for (at, piece) in pieces {
        bytes[*at..at + piece.len()].copy_from_slice(piece);
    }
    bytes
}

/// What a real tool made of a file of `mib`; `FILE` among the arguments is the file.
fn made(mib: u64, program: &str, args: &[&str]) -> (tempfile::NamedTempFile, Vec<Claim>) {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(mib << 20).unwrap();
    run(file.path(), program, args);
    let claims = probe(
        &mut |offset, bytes| file.as_file().read_exact_at(bytes, offset),
        mib << 20,
    );
    (file, claims)
}

fn run(file: &Path, program: &str, args: &[&str]) {
    // An ordinary user's PATH may lack them.
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap());
    let args = args
        .iter()
        .map(|arg| if *arg == "FILE" { file.as_os_str() } else { arg.as_ref() });
    let output = Command::new(program).args(args).env("PATH", path).output();
    let output = output.unwrap_or_else(|error| panic!("{program} cannot be run: {error}"));
    assert!(output.status.success(), "{program}: {output:?}");
}

#[test]
fn what_mkfs_ext4_makes_has_its_uuid_and_label() {
    let (_file, claims) = made(
        4,
        "mkfs.ext4",
        &["-q", "-F", "-U", UUID, "-L", "a label of 16 b", "FILE"],
    );
    assert_eq!(
        claims,
        [
            claim(ClaimKind::FsUuid, UUID),
            claim(ClaimKind::FsLabel, "a label of 16 b")
        ]
    );
}

#[test]
fn what_mkfs_vfat_makes_has_its_serial_and_no_label() {
    for (mib, bits) in [(2, "12"), (16, "16"), (64, "32")] {
        let (_file, claims) = made(mib, "mkfs.vfat", &["-F", bits, "-i", "0aBC12ef", "-n", "EFI", "FILE"]);
        assert_eq!(claims, [claim(ClaimKind::FsUuid, "0ABC-12EF")], "FAT{bits}");
    }
}

#[test]
fn what_mkswap_makes_has_its_uuid_and_label_also_while_a_system_sleeps_in_it() {
    for page in [4096, 65536] {
        let page_text = page.to_string();
        let (file, claims) = made(1, "mkswap", &["-p", &page_text, "-U", UUID, "-L", "sleep", "FILE"]);
        let expected = [claim(ClaimKind::SwapUuid, UUID), claim(ClaimKind::SwapLabel, "sleep")];
        assert_eq!(claims, expected);
        let mut read = |offset, bytes: &mut [u8]| file.as_file().read_exact_at(bytes, offset);
        assert!(!holds_memory_image(&mut read, 1 << 20));
        file.as_file().write_all_at(b"S1SUSPEND\0", page - 10).unwrap();
        assert!(holds_memory_image(&mut read, 1 << 20));
        assert!(!holds_memory_image(&mut read, page - 1));
        assert_eq!(probe(&mut read, 1 << 20), expected);
    }
}

#[test]
fn what_sgdisk_makes_has_the_guids_of_the_disk_and_its_partitions() {
    let (second, third) = (UUID.replace('0', "1"), UUID.replace('0', "2"));
    let (file, claims) = made(
        8,
        "sgdisk",
        &[
            "-o",
            "-U",
            UUID,
            "-n",
            "1:2048:+1M",
            "-u",
            &format!("1:{second}"),
            "-n",
            "3:0:+1M",
            "-u",
            &format!("3:{third}"),
            "FILE",
        ],
    );
    assert_eq!(
        claims,
        [
            claim(ClaimKind::DiskGuid, UUID),
            claim(ClaimKind::PartUuid, &second),
            claim(ClaimKind::PartUuid, &third),
        ]
    );
    // Without the protective MBR the kernel does not heed the table.
    file.as_file().write_all_at(&[0; 512], 0).unwrap();
    let mut read = |offset, bytes: &mut [u8]| file.as_file().read_exact_at(bytes, offset);
    assert_eq!(probe(&mut read, 8 << 20), []);
}

#[test]
fn a_table_in_blocks_of_4_kib_is_read() {
    let mut mbr = [0; 66];
    mbr[4] = 0xee;
    mbr[64..].copy_from_slice(&[0x55, 0xaa]);
    let mut header = [0; 92];
    header[..8].copy_from_slice(b"EFI PART");
    header[24] = 1;
    header[56..72].copy_from_slice(&BYTES);
    header[72] = 2;
    header[80] = 4;
    header[84] = 128;
    let entry = [[1; 16], BYTES].concat();
    let bytes = device(&[(446, &mbr), (4096, &header), (8192 + 128, &entry)]);
    let turned = "33221100-5544-7766-8899-aabbccddeeff";
    assert_eq!(
        probed(&bytes),
        [claim(ClaimKind::DiskGuid, turned), claim(ClaimKind::PartUuid, turned)]
    );
}

#[test]
fn an_mbrs_signature_counts_if_it_has_partitions() {
    let table = |kind, flag| {
        let mut bytes = device(&[(440, &[0xef, 0xbe, 0xad, 0xde]), (510, &[0x55, 0xaa])]);
        (bytes[446], bytes[450]) = (flag, kind);
        probed(&bytes)
    };
    assert_eq!(table(0x83, 0x80), [claim(ClaimKind::DiskGuid, "deadbeef")]);
    assert_eq!(table(0, 0), []);
    assert_eq!(table(0x83, 0x65), [], "that is a boot program's text");
}

#[test]
fn xfs_and_btrfs_have_their_uuids_and_labels() {
    let xfs = device(&[(0, b"XFSB"), (32, &BYTES), (108, b"twelve bytes")]);
    assert_eq!(
        probed(&xfs),
        [
            claim(ClaimKind::FsUuid, UUID),
            claim(ClaimKind::FsLabel, "twelve bytes")
        ]
    );
    let btrfs = device(&[
        (65536 + 32, &BYTES),
        (65536 + 64, b"_BHRfS_M"),
        (65536 + 0x12b, b"lab\0el"),
    ]);
    assert_eq!(
        probed(&btrfs),
        [claim(ClaimKind::FsUuid, UUID), claim(ClaimKind::FsLabel, "lab")]
    );
}

#[test]
fn luks_has_its_uuid_and_the_second_version_a_label() {
    let header = |version| {
        device(&[
            (0, b"LUKS\xba\xbe\0"),
            (7, &[version]),
            (24, b"vault"),
            (168, UUID.as_bytes()),
        ])
    };
    assert_eq!(probed(&header(1)), [claim(ClaimKind::LuksUuid, UUID)]);
    assert_eq!(
        probed(&header(2)),
        [claim(ClaimKind::LuksUuid, UUID), claim(ClaimKind::LuksLabel, "vault")]
    );
    assert_eq!(probed(&header(3)), []);
}

/// A physical volume with the label in sector 1, and the metadata's text at `offset` in an area of `size` bytes.
fn physical_volume(offset: u64, size: u64, flags: u8) -> Vec<u8> {
    const AREA: usize = 4096;
    let text = b"vg-home_1 {\nid = \"x\"\nseqno = 1\n";
    let numbers = |numbers: &[u64]| {
        numbers
            .iter()
            .flat_map(|number| number.to_le_bytes())
            .collect::<Vec<_>>()
    };
    let label = [
        b"LABELONE".to_vec(),
        numbers(&[1]),
        vec![0, 0, 0, 0, 32, 0, 0, 0],
        b"LVM2 001".to_vec(),
        b"abcdefGHIJKLMNOPQRSTUVWXYZ012345".to_vec(),
        // Its size; one area of data, one of metadata.
        numbers(&[1 << 18, 1 << 17, 0, 0, 0, AREA as u64, size, 0, 0]),
    ]
    .concat();
    let header = [
        b"\0\0\0\0 LVM2 x[5A%r0N*>\x01\0\0\0".to_vec(),
        numbers(&[AREA as u64, size, offset, text.len() as u64]),
        vec![0, 0, 0, 0, flags],
    ]
    .concat();
    let mut bytes = device(&[(512, &label), (AREA, &header)]);
    for (index, byte) in text.iter().enumerate() {
        let at = offset + index as u64;
        let at = if at < size { at } else { at - size + 512 };
        bytes[AREA + usize::try_from(at).unwrap()] = *byte;
    }
    bytes
}

#[test]
fn a_physical_volume_has_its_uuid_and_its_groups_name() {
    let uuid = claim(ClaimKind::PvUuid, "abcdef-GHIJ-KLMN-OPQR-STUV-WXYZ-012345");
    let both = [uuid.clone(), claim(ClaimKind::VolumeGroup, "vg-home_1")];
    assert_eq!(probed(&physical_volume(512, 8192, 0)), both);
    // The text goes across the area's end.
    assert_eq!(probed(&physical_volume(8192 - 4, 8192, 0)), both);
    assert_eq!(probed(&physical_volume(512, 8192, 1)), [uuid], "an area to be ignored");
}

#[test]
fn md_has_its_arrays_uuid_wherever_its_superblock_is() {
    let superblock = |at: usize| {
        let mut block = vec![0; 152];
        block[..8].copy_from_slice(&[0xfc, 0x4e, 0x2b, 0xa9, 1, 0, 0, 0]);
        block[16..32].copy_from_slice(&BYTES);
        block[144..].copy_from_slice(&(at as u64 / 512).to_le_bytes());
        block
    };
    for at in [0, 4096, (256 << 10) - 8192] {
        let bytes = device(&[(at, &superblock(at))]);
        assert_eq!(probed(&bytes), [claim(ClaimKind::RaidUuid, UUID)], "at {at}");
    }
    // The copy of a superblock is none.
    assert_eq!(probed(&device(&[(0, &superblock(4096))])), []);
}

#[test]
fn nothing_is_claimed_by_zeros_and_a_device_that_fails() {
    assert_eq!(probed(&vec![0; 1 << 20]), []);
    let mut fails = |_: u64, _: &mut [u8]| Err(io::ErrorKind::Other.into());
    assert_eq!(probe(&mut fails, 1 << 20), []);
    assert!(!holds_memory_image(&mut fails, 1 << 20));
    // Neither is an empty UUID.
    assert_eq!(probed(&device(&[(0, b"XFSB")])), []);
}

#[test]
fn a_label_cannot_disturb_the_screen_or_exceed_its_bound() {
    let nasty = device(&[(0, b"XFSB"), (108, b"a\x1b[2J\n\xff b")]);
    assert_eq!(
        probed(&nasty),
        [claim(ClaimKind::FsLabel, "a\u{fffd}[2J\u{fffd}\u{fffd} b")]
    );
    let long = device(&[(65536 + 64, b"_BHRfS_M"), (65536 + 0x12b, &[0x1b; 256])]);
    let value = &probed(&long)[0].value;
    assert!(
        value.len() <= MAX_VALUE && value.len() > MAX_VALUE - 4,
        "{}",
        value.len()
    );
}

proptest! {
    #[test]
    fn any_bytes_are_read(
        pieces in proptest::collection::vec((0usize..12, proptest::collection::vec(any::<u8>(), 1..600)), 0..12),
        volume in any::<proptest::sample::Index>(),
        change: u8,
    ) {
        // Where fields are, around what makes a format believed.
        let places = [0, 446, 512, 1024, 1060, 4086, 4096, 8192, 65536, 65526, 65568, 200_000];
        let mut bytes = physical_volume(8190, 8192, 0);
        for (place, piece) in &pieces {
            bytes[places[*place]..][..piece.len()].copy_from_slice(piece);
        }
        for (at, magic) in [
            (510, &[0x55, 0xaa][..]), (0, b"LUKS\xba\xbe\0\x02"), (0, b"XFSB"), (512, b"EFI PART"),
            (536, b"LVM2 001"), (1080, &[0x53, 0xef]), (65600, b"_BHRfS_M"), (4086, b"S1SUSPEND\0"),
        ] {
            let at: usize = at;
            bytes[at..at + magic.len()].copy_from_slice(magic);
            let length = volume.index(bytes.len());
            for bytes in [&bytes[..], &bytes[..length]] {
                for claim in probed(bytes) {
                    prop_assert!((1..=MAX_VALUE).contains(&claim.value.len()));
                    prop_assert!(!claim.value.chars().any(char::is_control));
                }
            }
        }
        let mut volume_bytes = physical_volume(8190, 8192, 0);
        // One changed byte in a header that is otherwise believed.
        let at = [512 + volume.index(160), 4096 + volume.index(80)][usize::from(change & 1)];
        volume_bytes[at] = change;
        let _ = probed(&volume_bytes);
    }
}
