//! Partition tables: GPT (UEFI specification, 5.3) and MBR (5.2).

use std::fmt;

use super::{ClaimKind, Claims, Device, part};

/// Block sizes of disks, in bytes; the table counts in them.
const BLOCK_SIZES: [u64; 2] = [512, 4096];
/// Entries that are looked at; a table has 128.
const MAX_ENTRIES: u32 = 1024;
/// The type of the one partition by which an MBR protects a GPT.
const PROTECTIVE: u8 = 0xee;

/// A GUID as it stands on the disk; shown as usual, the first three groups turned around.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Guid(pub [u8; 16]);

impl Guid {
    /// Reads one as it is usually written; nothing else.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let dashes = [8, 13, 18, 23];
        let fits = text.len() == 36
            && text
                .bytes()
                .enumerate()
                .all(|(at, byte)| (byte == b'-') == dashes.contains(&at));
        let digits = text.replace('-', "").to_ascii_lowercase();
        let bytes = data_encoding::HEXLOWER
            .decode(digits.as_bytes())
            .ok()
            .filter(|_| fits)?;
        let [a0, a1, a2, a3, b0, b1, c0, c1, rest @ ..] = <[u8; 16]>::try_from(bytes).ok()?;
        let mut stored = [0; 16];
        stored[..8].copy_from_slice(&[a3, a2, a1, a0, b1, b0, c1, c0]);
        stored[8..].copy_from_slice(&rest);
        Some(Self(stored))
    }
}

impl fmt::Display for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a0, a1, a2, a3, b0, b1, c0, c1, rest @ ..] = self.0;
        let mut turned = [0; 16];
        turned[..8].copy_from_slice(&[a3, a2, a1, a0, b1, b0, c1, c0]);
        turned[8..].copy_from_slice(&rest);
        f.write_str(&super::dashed(turned))
    }
}

impl fmt::Debug for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Guid({self})")
    }
}

/// A GPT behind a protective MBR: without that, Linux does not heed it.
pub(super) fn gpt(device: &mut Device<'_, '_>, claims: &mut Claims) -> Option<()> {
    if !types(&device.bytes(0)?)?.contains(&PROTECTIVE) {
        return None;
    }
    for block in BLOCK_SIZES {
        let header: [u8; 92] = device.bytes(block)?;
        let number = |at| Some(u64::from_le_bytes(part(&header, at)?));
        let small = |at| Some(u32::from_le_bytes(part(&header, at)?));
        if !header.starts_with(b"EFI PART") || number(24)? != 1 {
            continue;
        }
        guid(claims, ClaimKind::DiskGuid, part(&header, 56)?);
        let (count, length) = (small(80)?.min(MAX_ENTRIES), u64::from(small(84)?));
        let first = number(72)?.checked_mul(block)?;
        for index in 0..u64::from(count) {
            // Type, then the partition's own GUID.
            let entry: [u8; 32] = device.bytes(first.checked_add(index.checked_mul(length)?)?)?;
            if part::<16>(&entry, 0)? != [0; 16] {
                guid(claims, ClaimKind::PartUuid, part(&entry, 16)?);
            }
        }
    }
    Some(())
}

fn guid(claims: &mut Claims, kind: ClaimKind, bytes: [u8; 16]) {
    if bytes != [0; 16] {
        claims.text(kind, Guid(bytes).to_string().as_bytes());
    }
}

/// An MBR's signature, of which the PARTUUIDs of its partitions are made.
pub(super) fn mbr(device: &mut Device<'_, '_>, claims: &mut Claims) -> Option<()> {
    let block = device.bytes(0)?;
    let types = types(&block)?;
    let signature = u32::from_le_bytes(part(&block, 440)?);
    if signature != 0 && types != [0; 4] && !types.contains(&PROTECTIVE) {
        claims.text(ClaimKind::DiskGuid, format!("{signature:08x}").as_bytes());
    }
    Some(())
}

/// The types of an MBR's four partitions; a file system's boot sector, which ends alike, is none.
fn types(block: &[u8; 512]) -> Option<[u8; 4]> {
    let entry = |index: usize| part::<16>(block, 446 + 16 * index);
    let entries = [entry(0)?, entry(1)?, entry(2)?, entry(3)?];
    let sound = part::<2>(block, 510)? == [0x55, 0xaa] && entries.iter().all(|entry| entry[0] & 0x7f == 0);
    sound.then(|| entries.map(|entry| entry[4]))
}
