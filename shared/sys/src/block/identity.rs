//! Which disk was meant: told apart by what it is, not by its name.

use stiefel_shared::handover::DiskIdentity;

use super::{BlockError, Disk, gpt_disk_guid};

/// Describes a disk, reading its partition table.
///
/// # Errors
/// [`BlockError::Read`].
pub fn identity(disk: &Disk) -> Result<DiskIdentity, BlockError> {
    let guid = gpt_disk_guid(&disk.path, disk.logical_block_size)?;
    Ok(DiskIdentity {
        gpt_guid: guid.map(|guid| guid.to_string()),
        wwid: disk.wwid.clone(),
        serial: disk.serial.clone(),
        model: disk.model.clone(),
        size: disk.size,
    })
}

/// Finds the wanted disk. It is the one that has the same partition table's GUID, WWID or serial number, and of which nothing
/// that is known on both sides differs: a copy of a disk has its GUID, too, but another serial number or size.
///
/// # Errors
/// [`BlockError::Ambiguous`] names two that cannot be told apart, [`BlockError::NotFound`] what there is instead.
pub fn find<'a>(wanted: &DiskIdentity, disks: &'a [(Disk, DiskIdentity)]) -> Result<&'a Disk, BlockError> {
    let matching: Vec<&Disk> = disks
        .iter()
        .filter(|(_, seen)| is_same(wanted, seen))
        .map(|(disk, _)| disk)
        .collect();
    match matching[..] {
        [disk] => Ok(disk),
        [first, second, ..] => Err(BlockError::Ambiguous {
            first: first.path.clone(),
            second: second.path.clone(),
            by: "same identity",
        }),
        [] => {
            let seen: Vec<_> = disks
                .iter()
                .map(|(disk, seen)| format!("{} ({seen})", disk.path.display()))
                .collect();
            let seen = if seen.is_empty() {
                "no disk at all".to_owned()
            } else {
                seen.join("; ")
            };
            Err(BlockError::NotFound {
                wanted: wanted.to_string(),
                seen,
            })
        }
    }
}

fn is_same(wanted: &DiskIdentity, seen: &DiskIdentity) -> bool {
    // What one side does not know says nothing.
    let same = |a: &Option<String>, b: &Option<String>| Some(a.as_ref()?.eq_ignore_ascii_case(b.as_ref()?));
    let known: Vec<bool> = [
        same(&wanted.gpt_guid, &seen.gpt_guid),
        same(&wanted.wwid, &seen.wwid),
        same(&wanted.serial, &seen.serial),
    ]
    .into_iter()
    .flatten()
    .collect();
    let model = same(&wanted.model, &seen.model) != Some(false);
    wanted.size == seen.size && model && !known.is_empty() && known.iter().all(|same| *same)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    fn disk(name: &str, guid: &str, wwid: &str, serial: &str) -> (Disk, DiskIdentity) {
        let known = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        let identity = DiskIdentity {
            gpt_guid: known(guid),
            wwid: known(wwid),
            serial: known(serial),
            model: known("M"),
            size: 512,
        };
        let disk = Disk {
            name: name.into(),
            path: PathBuf::from(format!("/dev/{name}")),
            device: (8, 0),
            size: 512,
            logical_block_size: 512,
            physical_block_size: 512,
            model: identity.model.clone(),
            serial: identity.serial.clone(),
            wwid: identity.wwid.clone(),
            removable: false,
            read_only: false,
            rotational: false,
            sequence: None,
        };
        (disk, identity)
    }

    #[test]
    fn a_copy_of_the_disk_is_not_taken_for_it() {
        // As after `dd`: same table, another disk.
        let copy = disk("sda", "g1", "w2", "s2");
        let (_, wanted) = disk("old", "G1", "w1", "s1");
        assert!(matches!(
            find(&wanted, std::slice::from_ref(&copy)),
            Err(BlockError::NotFound { .. })
        ));
        assert_eq!(
            find(&wanted, &[copy, disk("sdb", "g1", "w1", "s1")]).unwrap().name,
            "sdb"
        );
        let mut larger = disk("sdc", "g1", "", "");
        larger.1.size = 1024;
        assert!(matches!(find(&wanted, &[larger]), Err(BlockError::NotFound { .. })));
    }

    #[test]
    fn one_known_part_is_enough_if_nothing_differs() {
        let disks = [
            disk("sda", "g1", "w1", "s1"),
            disk("sdb", "", "w2", "s2"),
            disk("sdc", "", "", "s3"),
        ];
        assert_eq!(find(&disk("old", "g1", "", "").1, &disks).unwrap().name, "sda");
        assert_eq!(find(&disk("old", "", "w2", "s2").1, &disks).unwrap().name, "sdb");
        assert_eq!(find(&disk("old", "", "", "s3").1, &disks).unwrap().name, "sdc");
        let other_model = DiskIdentity {
            model: Some("N".to_owned()),
            ..disk("old", "", "", "s3").1
        };
        assert!(matches!(find(&other_model, &disks), Err(BlockError::NotFound { .. })));
    }

    #[test]
    fn a_disk_with_another_guid_is_not_taken_for_its_wwid() {
        let disks = [disk("sda", "g2", "w1", "s1")];
        let (_, wanted) = disk("old", "g1", "w1", "s1");
        assert!(matches!(find(&wanted, &disks), Err(BlockError::NotFound { .. })));
    }

    #[test]
    fn of_two_copies_the_wwid_decides() {
        let disks = [disk("sda", "g1", "w1", "s1"), disk("sdb", "g1", "w2", "s2")];
        assert_eq!(find(&disk("old", "g1", "w2", "").1, &disks).unwrap().name, "sdb");
    }

    #[test]
    fn two_that_cannot_be_told_apart_are_both_named() {
        let disks = [disk("sda", "g1", "", ""), disk("sdb", "g1", "", "")];
        let message = find(&disk("old", "g1", "w1", "s1").1, &disks).unwrap_err().to_string();
        assert!(
            message.contains("/dev/sda") && message.contains("/dev/sdb"),
            "{message}"
        );
    }

    #[test]
    fn unknown_parts_match_nothing() {
        let disks = [disk("sda", "", "", "")];
        let message = find(&disk("old", "", "", "").1, &disks).unwrap_err().to_string();
        assert!(message.contains("/dev/sda"), "{message}");
        assert!(matches!(find(&disks[0].1, &[]), Err(BlockError::NotFound { .. })));
    }
}
