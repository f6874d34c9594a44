//! The EFI system partition: a FAT32 file system in memory with the one program in it.
//!
//! Specification: Microsoft, "FAT32 File System"; UEFI 2.10, section 13.3. Its times are fixed, so that images can be compared.

use std::io::Cursor;
use std::path::Path;

use hadris_fat::format::{FatFormatOptions, FatTypeSelection, FatVolumeFormatter, SectorSize};
use hadris_fat::time::EpochTimeProvider;
use hadris_fat::{FatVolume, FatVolumeWriteExt};
use zeroize::Zeroizing;

use super::DeviceError;

const MIB: u64 = 1 << 20;
/// Clusters a FAT32 must have, and some more: the file system's own tables take space as well.
const CLUSTERS_MIN: u64 = 66_000;
/// From this length on, in bytes, clusters are larger than a sector.
const SMALL_CLUSTERS_MAX: u64 = 512 * MIB;
/// Sectors of a large cluster.
const LARGE_CLUSTER: u8 = 8;
static EPOCH: EpochTimeProvider = EpochTimeProvider;

/// Logical sectors of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sector {
    S512,
    S4096,
}

impl Sector {
    /// The sector for a device's logical block size.
    pub(super) fn of(bytes: u64, path: &Path) -> Result<Self, DeviceError> {
        match bytes {
            512 => Ok(Self::S512),
            4096 => Ok(Self::S4096),
            bytes => Err(DeviceError::SectorSize {
                path: path.to_owned(),
                bytes,
            }),
        }
    }

    pub(super) fn bytes(self) -> u64 {
        match self {
            Self::S512 => 512,
            Self::S4096 => 4096,
        }
    }
}

/// Length of a partition that holds `content` bytes, with room for a somewhat larger successor.
fn partition_bytes(content: u64, sector: Sector) -> u64 {
    let least = (CLUSTERS_MIN * sector.bytes() * 102 / 100).max(64 * MIB);
    (content + content / 8 + 16 * MIB).max(least).next_multiple_of(MIB)
}

/// Makes the file system with `program` as `/EFI/BOOT/NAME`. It may hold secrets, so it is wiped when dropped.
pub(super) fn build(
    program: &[u8],
    name: &str,
    sector: Sector,
    volume_id: u32,
) -> Result<Zeroizing<Vec<u8>>, hadris_fat::Error> {
    let bytes = partition_bytes(program.len() as u64, sector);
    let mut image = Zeroizing::new(vec![0; usize::try_from(bytes).unwrap_or(usize::MAX)]);
    let options = FatFormatOptions::new(bytes)
        .fat_type(FatTypeSelection::Fat32)
        .sector_size(match sector {
            Sector::S512 => SectorSize::S512,
            Sector::S4096 => SectorSize::S4096,
        })
        .sectors_per_cluster(if bytes > SMALL_CLUSTERS_MAX { LARGE_CLUSTER } else { 1 })
        .hidden_sectors(u32::try_from(super::MIB / sector.bytes()).unwrap_or_default())
        .volume_label("STIEFEL")
        .volume_id(volume_id);
    drop(FatVolumeFormatter::format(Cursor::new(image.as_mut_slice()), options)?);
    let volume = FatVolume::builder(Cursor::new(image.as_mut_slice()))
        .time_provider(&EPOCH)
        .open()?;
    let root = volume.root_dir();
    let efi = volume.create_dir(&root, "EFI")?;
    let boot = volume.create_dir(&efi, "BOOT")?;
    let entry = volume.create_file(&boot, name)?;
    let mut writer = volume.write_file(&entry)?;
    let mut rest = program;
    while !rest.is_empty() {
        let written = writer.write(rest)?;
        rest = rest.get(written..).unwrap_or_default();
    }
    writer.finish()?;
    volume.sync()?;
    drop(volume);
    Ok(image)
}
