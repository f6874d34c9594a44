//! Whether one of the desktop's own disks would be taken for the laptop's.
//!
//! The laptop's system, started here, sees both. It finds its file systems, swap space and volumes by UUIDs, labels and
//! names; where two devices carry the same, it may mount or resume the wrong one, and write to it. The laptop says in the
//! manifest what its disk carries; compared is what [`stiefel_shared::superblock`] finds on both sides.

use std::collections::HashMap;
use std::path::Path;

use stiefel_shared::bundle::DeviceClaims;
use stiefel_shared::superblock::{Claim, ClaimKind};
use stiefel_sys::SYSFS;
use stiefel_sys::block::{self, BlockError, Content};

/// Two devices that would be taken for each other.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the desktop's {own} and the laptop's {laptop} carry the same {kind} {value}{others}; the laptop's system could take one \
     for the other and write to the wrong one\nnext: {next}",
    kind = claim.kind, value = claim.value, others = others(*more), next = next(claim.kind)
)]
pub(crate) struct Clash {
    /// The desktop's device.
    own: String,
    /// The laptop's.
    laptop: String,
    /// What both carry.
    claim: Claim,
    /// How many more there are.
    more: usize,
}

fn others(count: usize) -> String {
    if count == 0 {
        String::new()
    } else {
        format!(" (and {count} more in common)")
    }
}

const fn next(kind: ClaimKind) -> &'static str {
    if kind.is_name() {
        "rename one of the two, or unplug the desktop's disk or switch it off in the firmware"
    } else {
        "unplug that disk of the desktop, or switch it off in the firmware"
    }
}

/// What lies on all disks of this machine, the stick among them.
///
/// # Errors
/// [`BlockError::Sysfs`].
pub(crate) fn own_disks() -> Result<Vec<Content>, BlockError> {
    let sysfs = Path::new(SYSFS);
    let disks = block::disks(sysfs)?;
    // An empty card reader has none, and the laptop's system will not find anything on a broken disk either.
    Ok(disks
        .iter()
        .flat_map(|disk| block::contents(sysfs, disk).unwrap_or_default())
        .collect())
}

/// Compares what the desktop's own devices carry with what the laptop's carry.
///
/// # Errors
/// The first that both carry, in the order of the desktop's devices.
pub(crate) fn check(own: &[Content], laptop: &[DeviceClaims]) -> Result<(), Clash> {
    let theirs: HashMap<&Claim, &str> = laptop
        .iter()
        .flat_map(|device| device.claims.iter().map(|claim| (claim, device.name.as_str())))
        .collect();
    let mut clashes = own
        .iter()
        .flat_map(|content| content.claims.iter().map(|claim| (content.name.as_str(), claim)))
        .filter_map(|(name, claim)| Some((name, claim, *theirs.get(claim)?)));
    let Some((own, claim, laptop)) = clashes.next() else {
        return Ok(());
    };
    Err(Clash {
        own: own.to_owned(),
        laptop: laptop.to_owned(),
        claim: claim.clone(),
        more: clashes.count(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claims(list: &[(ClaimKind, &str)]) -> Vec<Claim> {
        list.iter()
            .map(|&(kind, value)| Claim {
                kind,
                value: value.to_owned(),
            })
            .collect()
    }

    fn own(name: &str, list: &[(ClaimKind, &str)]) -> Content {
        Content {
            name: name.to_owned(),
            size: 0,
            formats: Vec::new(),
            claims: claims(list),
            hibernated: false,
        }
    }

    fn laptop(name: &str, list: &[(ClaimKind, &str)]) -> DeviceClaims {
        DeviceClaims {
            name: name.to_owned(),
            claims: claims(list),
        }
    }

    #[test]
    fn disks_that_have_nothing_in_common_are_fine() {
        let desktop = [
            own("sda", &[(ClaimKind::DiskGuid, "1")]),
            own("sda1", &[(ClaimKind::FsLabel, "home"), (ClaimKind::FsUuid, "2")]),
            // One file system on two disks, as of btrfs.
            own("sdb1", &[(ClaimKind::FsUuid, "2")]),
        ];
        let theirs = [
            laptop("nvme0n1", &[(ClaimKind::DiskGuid, "3")]),
            // The same word as another kind of name is found by other means.
            laptop(
                "nvme0n1p1",
                &[(ClaimKind::VolumeGroup, "home"), (ClaimKind::PartUuid, "1")],
            ),
        ];
        assert_eq!(check(&desktop, &theirs), Ok(()));
        assert_eq!(check(&[], &theirs), Ok(()));
        assert_eq!(check(&desktop, &[]), Ok(()));
    }

    #[test]
    fn a_common_uuid_is_told_with_both_devices_and_what_to_do() {
        let desktop = [own("sda2", &[(ClaimKind::FsUuid, "0ABC-12EF")])];
        let theirs = [
            laptop("nvme0n1p1", &[(ClaimKind::FsUuid, "1")]),
            laptop("nvme0n1p2", &[(ClaimKind::FsUuid, "0ABC-12EF")]),
        ];
        let message = check(&desktop, &theirs).unwrap_err().to_string();
        assert!(
            message.starts_with(
                "the desktop's sda2 and the laptop's nvme0n1p2 carry the same file system UUID 0ABC-12EF;"
            ),
            "{message}"
        );
        assert!(message.contains("next: unplug that disk"), "{message}");
    }

    #[test]
    fn a_common_name_can_be_changed() {
        for kind in [ClaimKind::FsLabel, ClaimKind::VolumeGroup] {
            let message = check(&[own("sda2", &[(kind, "data")])], &[laptop("vda", &[(kind, "data")])])
                .unwrap_err()
                .to_string();
            assert!(message.contains("next: rename one"), "{message}");
        }
    }

    #[test]
    fn a_copy_of_the_disk_is_told_once() {
        let all: &[_] = &[
            (ClaimKind::DiskGuid, "1"),
            (ClaimKind::PartUuid, "2"),
            (ClaimKind::PartUuid, "3"),
        ];
        let clash = check(&[own("sda", all)], &[laptop("vda", all)]).unwrap_err();
        assert_eq!((clash.claim.kind, clash.more), (ClaimKind::DiskGuid, 2));
        assert!(clash.to_string().contains("(and 2 more in common)"), "{clash}");
    }
}
