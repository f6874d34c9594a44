//! The disk's own GUID in the header of a GPT (UEFI specification, 5.3.2).

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use stiefel_shared::superblock::Guid;

use super::BlockError;

const SIGNATURE: &[u8] = b"EFI PART";
/// The header's smallest length in bytes.
const MIN_HEADER: usize = 92;
/// Block sizes that a GPT is found on.
const BLOCK_SIZES: std::ops::RangeInclusive<u32> = 512..=65536;

/// The GUID of the disk (or image) at `path`; `None` if block 1 holds no sound GPT header.
///
/// # Errors
/// [`BlockError::Read`]: EINVAL for a block size that no disk has.
pub fn gpt_disk_guid(path: &Path, logical_block_size: u32) -> Result<Option<Guid>, BlockError> {
    read_guid(path, logical_block_size).map_err(|source| BlockError::Read {
        path: path.to_owned(),
        source,
    })
}

fn read_guid(path: &Path, logical_block_size: u32) -> io::Result<Option<Guid>> {
    if !BLOCK_SIZES.contains(&logical_block_size) || !logical_block_size.is_power_of_two() {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let mut block = vec![0; usize::try_from(logical_block_size).map_err(io::Error::other)?];
    match File::open(path)?.read_exact_at(&mut block, u64::from(logical_block_size)) {
        Ok(()) => Ok(parse(&block)),
        // A disk of one block has no room for a header.
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
        Err(error) => Err(error),
    }
}

/// Reads block 1.
fn parse(block: &[u8]) -> Option<Guid> {
    if !block.starts_with(SIGNATURE) {
        return None;
    }
    let number = |at: usize| Some(u32::from_le_bytes(block.get(at..at + 4)?.try_into().ok()?));
    let length = usize::try_from(number(12)?).ok()?;
    let header = block.get(..length).filter(|header| header.len() >= MIN_HEADER)?;
    let mut crc = flate2::Crc::new();
    // Its own checksum counts as zero.
    crc.update(header.get(..16)?);
    crc.update(&[0; 4]);
    crc.update(header.get(20..)?);
    let own_block = u64::from_le_bytes(block.get(24..32)?.try_into().ok()?);
    (crc.sum() == number(16)? && own_block == 1).then(|| block.get(56..72)?.try_into().ok().map(Guid))?
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GUID: [u8; 16] = [
        0x33, 0x22, 0x11, 0x00, 0x55, 0x44, 0x77, 0x66, 0x88, 0x99, 0xaa, 0xbb, 0xcc, 0xdd, 0xee, 0xff,
    ];

    fn block(size: usize) -> Vec<u8> {
        let mut block = vec![0; size];
        block[..8].copy_from_slice(SIGNATURE);
        block[8..12].copy_from_slice(&0x1_0000u32.to_le_bytes());
        block[12..16].copy_from_slice(&92u32.to_le_bytes());
        block[24..32].copy_from_slice(&1u64.to_le_bytes());
        block[56..72].copy_from_slice(&GUID);
        let mut crc = flate2::Crc::new();
        crc.update(&block[..92]);
        block[16..20].copy_from_slice(&crc.sum().to_le_bytes());
        block
    }

    #[test]
    fn the_guid_is_read_and_shown_as_usual() {
        assert_eq!(
            parse(&block(512)).unwrap().to_string(),
            "00112233-4455-6677-8899-aabbccddeeff"
        );
    }

    #[test]
    fn the_header_is_looked_for_at_block_one_of_the_disks_size() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for size in [512usize, 4096] {
            let image = [vec![0; size], block(size)].concat();
            std::fs::write(file.path(), image).unwrap();
            let guid = |size| gpt_disk_guid(file.path(), size).unwrap();
            assert_eq!(guid(u32::try_from(size).unwrap()), Some(Guid(GUID)));
            assert_eq!(guid(if size == 512 { 4096 } else { 512 }), None);
        }
    }

    #[test]
    fn odd_block_sizes_are_refused() {
        for size in [0, 513, 1 << 30] {
            assert!(matches!(
                gpt_disk_guid(Path::new("/dev/null"), size),
                Err(BlockError::Read { .. })
            ));
        }
    }

    #[test]
    fn a_real_table_is_read() {
        // Made by `sgdisk -U 00112233-…`: only where sgdisk is installed.
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(8 << 20).unwrap();
        let guid = "00112233-4455-6677-8899-aabbccddeeff";
        let made = std::process::Command::new("sgdisk")
            .args(["-o", "-U", guid])
            .arg(file.path())
            .output();
        if made.is_ok_and(|output| output.status.success()) {
            assert_eq!(gpt_disk_guid(file.path(), 512).unwrap().unwrap().to_string(), guid);
        }
    }

    proptest! {
        #[test]
        fn a_changed_bit_in_the_header_is_noticed(bit in 0usize..92 * 8) {
            let mut block = block(512);
            block[bit / 8] ^= 1 << (bit % 8);
            prop_assert_eq!(parse(&block), None);
        }

        #[test]
        fn any_bytes_are_read(mut bytes: Vec<u8>) {
            let _ = parse(&bytes);
            bytes.splice(..0, SIGNATURE.iter().copied());
            let _ = parse(&bytes);
        }
    }
}
