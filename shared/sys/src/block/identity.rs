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

/// Finds the wanted disk: by its partition table's GUID where both have one, else by its WWID, else by serial number and
/// model. Where several have the same GUID (a copy of a disk), WWID, serial number and model decide between them.
///
/// # Errors
/// [`BlockError::Ambiguous`] names two that cannot be told apart, [`BlockError::NotFound`] what there is instead.
pub fn find<'a>(wanted: &DiskIdentity, disks: &'a [(Disk, DiskIdentity)]) -> Result<&'a Disk, BlockError> {
    /// `None` where one of both does not know.
    type Same = fn(&DiskIdentity, &DiskIdentity) -> Option<bool>;
    let criteria: [(&'static str, Same); 3] = [
        ("same GPT GUID", |a, b| same(a.gpt_guid.as_ref(), b.gpt_guid.as_ref())),
        ("same WWID", |a, b| same(a.wwid.as_ref(), b.wwid.as_ref())),
        ("same serial number and model", |a, b| {
            let serial = same(a.serial.as_ref(), b.serial.as_ref())?;
            Some(serial && a.model == b.model && a.size == b.size)
        }),
    ];
    let mut left: Vec<&(Disk, DiskIdentity)> = disks.iter().collect();
    let mut matched_by = None;
    for (by, is_same) in criteria {
        let matching: Vec<_> = left
            .iter()
            .copied()
            .filter(|(_, seen)| is_same(wanted, seen) == Some(true))
            .collect();
        if let [(disk, _)] = matching[..] {
            return Ok(disk);
        }
        if !matching.is_empty() {
            left = matching;
            matched_by = Some(by);
        } else if matched_by.is_none() {
            // What is known to differ is not the disk, whatever else is the same.
            left.retain(|(_, seen)| is_same(wanted, seen).is_none());
        }
    }
    match (matched_by, &left[..]) {
        (Some(by), [(first, _), (second, _), ..]) => Err(BlockError::Ambiguous {
            first: first.path.clone(),
            second: second.path.clone(),
            by,
        }),
        _ => {
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

/// `None` if one is unknown: two unknowns are not the same.
fn same(a: Option<&String>, b: Option<&String>) -> Option<bool> {
    Some(a?.eq_ignore_ascii_case(b?))
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
        };
        (disk, identity)
    }

    #[test]
    fn the_guid_counts_before_wwid_and_serial() {
        let disks = [disk("sda", "g1", "w2", "s2"), disk("sdb", "g2", "w1", "s1")];
        let (_, wanted) = disk("old", "G1", "w1", "s1");
        assert_eq!(find(&wanted, &disks).unwrap().name, "sda");
    }

    #[test]
    fn without_guid_the_wwid_then_serial_and_model_count() {
        let disks = [
            disk("sda", "g1", "w1", "s1"),
            disk("sdb", "", "w2", "s2"),
            disk("sdc", "", "", "s3"),
        ];
        assert_eq!(find(&disk("old", "", "w2", "s1").1, &disks).unwrap().name, "sdb");
        assert_eq!(find(&disk("old", "", "", "s3").1, &disks).unwrap().name, "sdc");
        let other_model = DiskIdentity {
            model: None,
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
