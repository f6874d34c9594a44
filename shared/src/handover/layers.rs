//! What lies between the partitions of a laptop's disk and its file systems, as a stick of the laptop's own is told: LUKS, LVM.
//!
//! Seen by `server::collect::layers` when the stick is written, opened by `server::offline::layers` when it is started.

use serde::{Deserialize, Serialize};

use crate::discovery::Ticket;
use crate::key::StickKey;

/// A volume of LVM.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Logical {
    /// Its volume group.
    pub group: String,
    /// Its name in that.
    pub name: String,
}

impl Logical {
    /// The volume that device mapper calls so: group and name with a dash between, and their own dashes doubled.
    #[must_use]
    pub fn from_mapped(mapped: &str) -> Option<Self> {
        // No name begins with a dash, so two belong together wherever they can.
        let mut group = String::new();
        let mut rest = mapped;
        let name = loop {
            let (before, after) = rest.split_once('-')?;
            group.push_str(before);
            match after.strip_prefix('-') {
                Some(after) => rest = after,
                None => break after,
            }
            group.push('-');
        };
        let volume = Self {
            group,
            name: name.replace("--", "-"),
        };
        (volume.is_sound() && volume.mapped() == mapped).then_some(volume)
    }

    /// What device mapper calls it.
    #[must_use]
    pub fn mapped(&self) -> String {
        format!("{}-{}", self.group.replace('-', "--"), self.name.replace('-', "--"))
    }

    /// Whether both names are ones that LVM takes (lvm(8), "VALID NAMES"): nothing that a command or a path would take for something else.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        let name = |text: &str| {
            (1..=127).contains(&text.len())
                && !text.starts_with(['-', '.'])
                && text
                    .bytes()
                    .all(|byte| byte.is_ascii_alphanumeric() || b"+_.-".contains(&byte))
        };
        name(&self.group) && name(&self.name)
    }
}

/// What has to be opened before the file systems of a laptop's own stick can be mounted, and who may have that done.
///
/// The keys lie on what is locked, so the stick has keys made from them ([`crate::discovery::TicketKind::Unlocking`]), which are good for
/// sending a passphrase and nothing else.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Layers {
    /// The partitions with LUKS.
    pub luks: Vec<Luks>,
    /// The partitions, or the LUKS in them, on which volumes of LVM lie.
    pub physical: Vec<u32>,
    /// The keys of who may send a passphrase.
    pub keys: Vec<StickKey>,
    /// Tell the sticks so.
    pub tickets: Vec<Ticket>,
}

/// A partition with LUKS.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Luks {
    /// The partition's number.
    pub partition: u32,
    /// What the laptop's system calls it once it is open, for people.
    pub label: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_volume_of_lvm_is_known_by_device_mappers_name_of_it() {
        for (mapped, group, name) in [
            ("vg-root", "vg", "root"),
            ("laptop--vg-swap_1", "laptop-vg", "swap_1"),
            ("a----b-c--d", "a--b", "c-d"),
            ("a---b", "a-", "b"),
        ] {
            let volume = Logical::from_mapped(mapped).unwrap();
            assert_eq!((volume.group.as_str(), volume.name.as_str()), (group, name));
            assert_eq!(volume.mapped(), mapped);
        }
        for none in [
            "vg",
            "",
            "-",
            "a--b",
            "a-",
            "-a",
            "vg-..",
            "vg-a/b",
            "vg-ro ot",
            "vg-root-real",
        ] {
            assert_eq!(Logical::from_mapped(none), None, "{none}");
        }
    }

    proptest::proptest! {
        #[test]
        fn every_volume_of_lvm_is_found_again(group in "[a-z+_][a-z+_.-]{0,9}", name in "[a-z+_][a-z+_.-]{0,9}", any in "\\PC{0,12}") {
            let volume = Logical { group, name };
            proptest::prop_assert_eq!(Logical::from_mapped(&volume.mapped()), Some(volume));
            let _ = Logical::from_mapped(&any);
        }
    }
}
