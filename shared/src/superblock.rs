//! By what a block device is found again: the UUIDs, labels and volume groups in its first sectors; and whether a
//! hibernated system lies on it.
//!
//! Two devices that carry the same are taken for each other: by `/etc/fstab`, `root=UUID=…`, LVM, btrfs. So a desktop
//! whose own disks carry what the laptop's disk carries is not booted (`client::clash`), and memory images are looked for
//! before the disk is lent (`server::guards`, `server::role`). Nothing here says what a device *is*: remains of an earlier
//! use count, for other programs may find them, too.
//!
//! Offsets are those of the kernel's headers (`fs/ext4/ext4.h`, `fs/xfs/libxfs/xfs_format.h`, `include/linux/swap.h`,
//! `uapi/linux/{btrfs_tree,msdos_fs}.h`, `uapi/linux/raid/md_p.h`), of the LUKS 1 and 2 on-disk format specifications, of
//! LVM2's `lib/format_text/layout.h`, and of the UEFI specification, 5.3.

mod table;
mod volume;

use std::{fmt, io};

use serde::{Deserialize, Serialize};

pub use table::Guid;

/// The longest value of a claim, in bytes: a label of btrfs.
pub const MAX_VALUE: usize = 256;
/// Page sizes of Linux, in bytes; a swap header's signature lies at the end of its first page.
const PAGE_SIZES: [u64; 5] = [4096, 8192, 16384, 32768, 65536];
/// Signatures of swap space that holds a memory image: of the kernel (`HIBERNATE_SIG`) and of uswsusp.
const MEMORY_IMAGES: [&[u8]; 4] = [b"S1SUSPEND", b"S2SUSPEND", b"ULSUSPEND", b"LINHIB0001"];
/// Signature of swap space in use (`linux/swap.h`).
const SWAP_SPACE: &[u8] = b"SWAPSPACE2";
/// Both signatures' room, in bytes.
const SWAP_SIGNATURE: usize = 10;

/// Reads at an offset (in bytes) as many bytes as the buffer has; an error if there are fewer.
pub type ReadAt<'a> = dyn FnMut(u64, &mut [u8]) -> io::Result<()> + 'a;

/// Something by which a device is found.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Claim {
    /// What it is.
    pub kind: ClaimKind,
    /// As it is usually written; without control characters, 1 to [`MAX_VALUE`] bytes.
    pub value: String,
}

/// What a claim is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ClaimKind {
    /// Of a partition table: the GPT's own GUID, or the signature of an MBR.
    DiskGuid,
    /// Of a GPT's partition.
    PartUuid,
    /// Of a file system; a FAT's serial number.
    FsUuid,
    /// Of a file system other than FAT, where one and the same label is everywhere.
    FsLabel,
    /// Of swap space.
    SwapUuid,
    /// Of swap space.
    SwapLabel,
    /// Of an encrypted volume.
    LuksUuid,
    /// Of an encrypted volume (LUKS 2).
    LuksLabel,
    /// Of a physical volume of LVM.
    PvUuid,
    /// The name of LVM's volume group.
    VolumeGroup,
    /// Of an array of md.
    RaidUuid,
}

impl ClaimKind {
    /// Whether people give it, and can change it.
    #[must_use]
    pub const fn is_name(self) -> bool {
        matches!(
            self,
            Self::FsLabel | Self::SwapLabel | Self::LuksLabel | Self::VolumeGroup
        )
    }
}

impl fmt::Display for ClaimKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::DiskGuid => "partition table's GUID",
            Self::PartUuid => "partition UUID",
            Self::FsUuid => "file system UUID",
            Self::FsLabel => "file system label",
            Self::SwapUuid => "swap UUID",
            Self::SwapLabel => "swap label",
            Self::LuksUuid => "LUKS UUID",
            Self::LuksLabel => "LUKS label",
            Self::PvUuid => "physical volume UUID",
            Self::VolumeGroup => "volume group",
            Self::RaidUuid => "array UUID",
        })
    }
}

/// All claims of a device (or partition) with `size` bytes, sorted, each once. What cannot be read claims nothing.
#[must_use]
pub fn probe(read: &mut ReadAt<'_>, size: u64) -> Vec<Claim> {
    let mut device = Device { read, size };
    let mut claims = Claims(Vec::new());
    for format in [
        ext,
        xfs,
        btrfs,
        fat,
        swap,
        volume::luks,
        volume::lvm,
        volume::md,
        table::gpt,
        table::mbr,
    ] {
        // `None` is a device without this format.
        let _: Option<()> = format(&mut device, &mut claims);
    }
    let Claims(mut claims) = claims;
    claims.sort();
    claims.dedup();
    claims
}

/// What lies on a device (or partition), for people: the formats whose signatures it has, such as `ext` or `LUKS`.
#[must_use]
pub fn formats(read: &mut ReadAt<'_>, size: u64) -> Vec<&'static str> {
    type Format = fn(&mut Device<'_, '_>, &mut Claims) -> Option<()>;
    let known: [(&'static str, Format); 10] = [
        ("ext", ext),
        ("XFS", xfs),
        ("btrfs", btrfs),
        ("FAT", fat),
        ("swap", swap),
        ("LUKS", volume::luks),
        ("LVM", volume::lvm),
        ("RAID", volume::md),
        ("GPT", table::gpt),
        ("MBR", table::mbr),
    ];
    let mut device = Device { read, size };
    let mut found: Vec<&'static str> = Vec::new();
    for (name, format) in known {
        let mut claims = Claims(Vec::new());
        let _: Option<()> = format(&mut device, &mut claims);
        // The protective MBR of a GPT says nothing more.
        let covered = name == "MBR" && found.contains(&"GPT");
        if !claims.0.is_empty() && !covered {
            found.push(name);
        }
    }
    found
}

/// Whether the device (or partition, or swap file) holds the memory of a hibernated system. What cannot be read holds none
/// that could be resumed.
#[must_use]
pub fn holds_memory_image(read: &mut ReadAt<'_>, size: u64) -> bool {
    let mut device = Device { read, size };
    PAGE_SIZES.iter().any(|page| {
        device
            .bytes::<SWAP_SIGNATURE>(page - SWAP_SIGNATURE as u64)
            .is_some_and(|found| is_memory_image(&found))
    })
}

fn is_memory_image(signature: &[u8]) -> bool {
    MEMORY_IMAGES.iter().any(|known| signature.starts_with(known))
}

/// What is read from, with bounds.
struct Device<'a, 'b> {
    read: &'a mut ReadAt<'b>,
    size: u64,
}

impl Device<'_, '_> {
    /// Exactly N bytes.
    fn bytes<const N: usize>(&mut self, offset: u64) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        self.fill(offset, &mut bytes).then_some(bytes)
    }

    fn fill(&mut self, offset: u64, bytes: &mut [u8]) -> bool {
        let end = offset.checked_add(bytes.len() as u64);
        end.is_some_and(|end| end <= self.size) && (self.read)(offset, bytes).is_ok()
    }
}

/// What was found.
struct Claims(Vec<Claim>);

impl Claims {
    fn uuid(&mut self, kind: ClaimKind, uuid: [u8; 16]) {
        if uuid != [0; 16] {
            self.text(kind, dashed(uuid).as_bytes());
        }
    }

    /// A text that ends with its field or a zero.
    fn text(&mut self, kind: ClaimKind, field: &[u8]) {
        let text = field.split(|byte| *byte == 0).next().unwrap_or_default();
        // A replaced character may be longer than what was there.
        let mut value: String = String::from_utf8_lossy(text)
            .trim()
            .chars()
            .map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c })
            .collect();
        value.truncate(value.floor_char_boundary(MAX_VALUE));
        if !value.is_empty() {
            self.0.push(Claim { kind, value });
        }
    }
}

/// A UUID as it is usually written (RFC 9562, section 4).
fn dashed(bytes: [u8; 16]) -> String {
    let number = u128::from_be_bytes(bytes);
    let digits = format!("{number:032x}");
    [0..8, 8..12, 12..16, 16..20, 20..32]
        .map(|group| digits.get(group).unwrap_or_default())
        .join("-")
}

/// A part of a fixed length.
fn part<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

/// ext2, ext3 and ext4.
fn ext(device: &mut Device<'_, '_>, claims: &mut Claims) -> Option<()> {
    let block: [u8; 1024] = device.bytes(1024)?;
    if part::<2>(&block, 0x38)? == [0x53, 0xef] {
        claims.uuid(ClaimKind::FsUuid, part(&block, 0x68)?);
        claims.text(ClaimKind::FsLabel, &part::<16>(&block, 0x78)?);
    }
    Some(())
}

fn xfs(device: &mut Device<'_, '_>, claims: &mut Claims) -> Option<()> {
    let block: [u8; 512] = device.bytes(0)?;
    if block.starts_with(b"XFSB") {
        claims.uuid(ClaimKind::FsUuid, part(&block, 32)?);
        claims.text(ClaimKind::FsLabel, &part::<12>(&block, 108)?);
    }
    Some(())
}

fn btrfs(device: &mut Device<'_, '_>, claims: &mut Claims) -> Option<()> {
    let block: [u8; 1024] = device.bytes(65536)?;
    if part::<8>(&block, 64)? == *b"_BHRfS_M" {
        claims.uuid(ClaimKind::FsUuid, part(&block, 32)?);
        claims.text(ClaimKind::FsLabel, &part::<256>(&block, 0x12b)?);
    }
    Some(())
}

/// FAT12, FAT16 and FAT32. Their labels are no claim: the one of every ESP is the same.
fn fat(device: &mut Device<'_, '_>, claims: &mut Claims) -> Option<()> {
    let block: [u8; 512] = device.bytes(0)?;
    if part::<2>(&block, 510)? != [0x55, 0xaa] {
        return None;
    }
    let narrow = [*b"FAT12   ", *b"FAT16   ", *b"FAT     "].contains(&part::<8>(&block, 54)?);
    let at = if part::<8>(&block, 82)? == *b"FAT32   " {
        67
    } else if narrow {
        39
    } else {
        return None;
    };
    let serial = u32::from_le_bytes(part(&block, at)?);
    if serial != 0 {
        let text = format!("{:04X}-{:04X}", serial >> 16, serial & 0xffff);
        claims.text(ClaimKind::FsUuid, text.as_bytes());
    }
    Some(())
}

/// Swap space, also while it holds a memory image: that changes nothing but the signature.
fn swap(device: &mut Device<'_, '_>, claims: &mut Claims) -> Option<()> {
    for page in PAGE_SIZES {
        let found: [u8; SWAP_SIGNATURE] = device.bytes(page - SWAP_SIGNATURE as u64)?;
        if found == SWAP_SPACE || is_memory_image(&found) {
            let header: [u8; 44] = device.bytes(1024)?;
            claims.uuid(ClaimKind::SwapUuid, part(&header, 12)?);
            claims.text(ClaimKind::SwapLabel, &part::<16>(&header, 28)?);
        }
    }
    Some(())
}

#[cfg(test)]
mod tests;
