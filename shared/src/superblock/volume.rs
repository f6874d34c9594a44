//! What lies between a partition and a file system: encryption, volumes, arrays.

use super::{ClaimKind, Claims, Device, part};

const SECTOR: u64 = 512;
/// Of LVM's texts only so much is read, in bytes: the group's name stands at the beginning.
const TEXT: usize = 256;
/// LVM: a physical volume's areas that are looked at.
const MAX_AREAS: usize = 8;
/// LVM: bytes before a metadata area's texts, which wrap around to there.
const AREA_HEADER: u64 = 512;

/// LUKS 1 (specification 1.2.3, 2.1) and LUKS 2 (2.1); numbers are big-endian.
pub(super) fn luks(device: &mut Device<'_, '_>, claims: &mut Claims) -> Option<()> {
    let header: [u8; 208] = device.bytes(0)?;
    if !header.starts_with(b"LUKS\xba\xbe") {
        return None;
    }
    let version = u16::from_be_bytes(part(&header, 6)?);
    if [1, 2].contains(&version) {
        claims.text(ClaimKind::LuksUuid, &part::<40>(&header, 168)?);
    }
    if version == 2 {
        claims.text(ClaimKind::LuksLabel, &part::<48>(&header, 24)?);
    }
    Some(())
}

/// A physical volume of LVM2: its label is in one of the first four sectors.
pub(super) fn lvm(device: &mut Device<'_, '_>, claims: &mut Claims) -> Option<()> {
    for sector in 0..4 {
        let label: [u8; 512] = device.bytes(sector * SECTOR)?;
        let own = u64::from_le_bytes(part(&label, 8)?);
        if label.starts_with(b"LABELONE") && own == sector && part::<8>(&label, 24)? == *b"LVM2 001" {
            // A field that points past the label: no volume of ours to read.
            let _: Option<()> = physical_volume(device, &label, claims);
        }
    }
    Some(())
}

/// `struct pv_header`: UUID, size, then two lists of areas (offset and size), each ended by zeros: data, metadata.
fn physical_volume(device: &mut Device<'_, '_>, label: &[u8], claims: &mut Claims) -> Option<()> {
    let at = usize::try_from(u32::from_le_bytes(part(label, 20)?)).ok()?;
    let header = label.get(at..)?;
    let id: [u8; 32] = part(header, 0)?;
    let id = std::str::from_utf8(&id)
        .ok()
        .filter(|id| id.bytes().all(|b| b.is_ascii_alphanumeric()))?;
    let groups = [0..6, 6..10, 10..14, 14..18, 18..22, 22..26, 26..32];
    let groups = groups.map(|group| id.get(group).unwrap_or_default());
    claims.text(ClaimKind::PvUuid, groups.join("-").as_bytes());

    let mut areas = header.get(40..)?.chunks_exact(16).map(|area| {
        let number = |at| part(area, at).map_or(0, u64::from_le_bytes);
        (number(0), number(8))
    });
    let ended = |area: &(u64, u64)| area.0 == 0;
    areas.by_ref().take(MAX_AREAS).find(ended)?;
    for (offset, size) in areas.take(MAX_AREAS).take_while(|area| !ended(area)) {
        // Another copy may be sound.
        if let Some(name) = group_name(device, offset, size) {
            claims.text(ClaimKind::VolumeGroup, name.as_bytes());
        }
    }
    Some(())
}

/// `struct mda_header`, and the text it points to: `name {`, then what the group is.
fn group_name(device: &mut Device<'_, '_>, area: u64, size: u64) -> Option<String> {
    const IGNORED: u32 = 1;
    let header: [u8; 512] = device.bytes(area)?;
    if part::<16>(&header, 4)? != *b" LVM2 x[5A%r0N*>" {
        return None;
    }
    let number = |at| Some(u64::from_le_bytes(part(&header, at)?));
    let (offset, length) = (number(40)?, number(48)?);
    let flags = u32::from_le_bytes(part(&header, 60)?);
    if flags & IGNORED != 0 || offset < AREA_HEADER || offset >= size || length == 0 {
        return None;
    }
    let mut text = [0; TEXT];
    let wanted = length.min(TEXT as u64);
    let straight = wanted.min(size - offset);
    let (first, rest) = text
        .get_mut(..usize::try_from(wanted).ok()?)?
        .split_at_mut_checked(usize::try_from(straight).ok()?)?;
    let read = device.fill(area.checked_add(offset)?, first)
        && (rest.is_empty() || device.fill(area.checked_add(AREA_HEADER)?, rest));
    // What comes later may be cut in the middle of a character.
    let text = String::from_utf8_lossy(&text);
    let (name, _) = text.split_once(" {").filter(|_| read)?;
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"+_.-".contains(&b);
    (!name.is_empty() && name.bytes().all(plain)).then(|| name.to_owned())
}

/// md's superblock of version 1, at the end (1.0), the beginning (1.1), or after 4 KiB (1.2).
pub(super) fn md(device: &mut Device<'_, '_>, claims: &mut Claims) -> Option<()> {
    let end = (device.size / SECTOR)
        .checked_sub(16)
        .map(|sector| (sector & !7) * SECTOR);
    for at in [Some(0), Some(4096), end].into_iter().flatten() {
        let Some(block) = device.bytes::<256>(at) else {
            continue;
        };
        let number = |at| part(&block, at).map(u32::from_le_bytes);
        let own = part(&block, 144).map(u64::from_le_bytes);
        if number(0) == Some(0xa92b_4efc) && number(4) == Some(1) && own == Some(at / SECTOR) {
            claims.uuid(ClaimKind::RaidUuid, part(&block, 16)?);
        }
    }
    Some(())
}
