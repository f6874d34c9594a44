//! What a disk is called: names that are the same each time, wherever it is plugged in, and that tell it from all others.
//!
//! The export's name for NBD, the NQN, and what an initiator's by-id links are made of. systemd-storagetm names subsystems
//! by the kernel's name of the disk (`sda`), which is another one's after the next boot.

use sha2::{Digest, Sha256};
use stiefel_shared::session::MachineId;
use stiefel_sys::block::Disk;
use stiefel_sys::nvmet::{MAX_MODEL, MAX_SERIAL, TARGET_PREFIX, fitting};

use super::share::Source;
use crate::tree::Tree;

/// The longest name of a disk in bytes: with what comes before it, an NQN may have 223.
pub(super) const MAX_KEY: usize = 80;

/// A disk's names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Names {
    /// For people, and the NBD export: lower-case letters, digits and dashes.
    pub(super) key: String,
    /// The NVMe subsystem.
    pub(super) nqn: String,
    /// 1 to 40 printable characters.
    pub(super) model: String,
    /// 1 to 20 printable characters.
    pub(super) serial: String,
    /// The disk's own, else one that is made of its name.
    pub(super) uuid: String,
    /// The disk's own.
    pub(super) nguid: Option<String>,
}

impl Names {
    /// Of what is lent.
    pub(super) fn of(machine: &str, source: &Source, taken: &dyn Fn(&str) -> bool) -> Self {
        match source {
            Source::Disk(disk) => Self::of_disk(machine, disk, taken),
            Source::File { path, .. } => {
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                Self::of_file(machine, &name, taken)
            }
        }
    }

    /// Of a disk of the machine that [`machine`] names. `taken` are the names that others have.
    pub(super) fn of_disk(machine: &str, disk: &Disk, taken: &dyn Fn(&str) -> bool) -> Self {
        // Nothing tells it from others of its kind: only here the kernel's name is all there is.
        let key = own_key(disk).unwrap_or_else(|| {
            let model = disk.model.as_deref().unwrap_or_default();
            slug(&format!("{model} {}", disk.name))
        });
        let key = if key.is_empty() { slug(&disk.name) } else { key };
        // Cheap USB cases all have the same serial number.
        let key = if taken(&key) {
            slug(&format!("{key} {}", disk.name))
        } else {
            key
        };
        let wwid = disk.wwid.as_deref().unwrap_or_default();
        let own = wwid.strip_prefix("uuid.").map(str::to_owned);
        let nguid = wwid.strip_prefix("eui.").filter(|digits| digits.len() == 32);
        let serial = disk.serial.as_deref();
        Self::new(
            machine,
            key,
            disk.model.as_deref(),
            serial,
            own,
            nguid.map(str::to_owned),
        )
    }

    /// Of a file.
    pub(super) fn of_file(machine: &str, name: &str, taken: &dyn Fn(&str) -> bool) -> Self {
        let base = Some(slug(name))
            .filter(|slug| !slug.is_empty())
            .unwrap_or_else(|| "file".to_owned());
        let numbered = (2..).map(|number: u32| slug(&format!("{base} {number}")));
        let mut keys = std::iter::once(base.clone()).chain(numbered);
        let key = keys.find(|key| !taken(key)).unwrap_or_else(|| "file".to_owned());
        Self::new(machine, key, None, None, None, None)
    }

    fn new(
        machine: &str,
        key: String,
        model: Option<&str>,
        serial: Option<&str>,
        uuid: Option<String>,
        nguid: Option<String>,
    ) -> Self {
        let digest = digest(&["stiefel target disk", machine, &key]);
        let short: String = digest.iter().take(10).map(|byte| format!("{byte:02x}")).collect();
        let or = |text: Option<&str>, limit, other: &str| {
            let text = fitting(text.unwrap_or_default(), limit);
            if text.is_empty() { other.to_owned() } else { text }
        };
        Self {
            nqn: format!("{TARGET_PREFIX}{machine}.{key}"),
            model: or(model, MAX_MODEL, "stiefel storage target"),
            serial: or(serial, MAX_SERIAL, &short),
            uuid: uuid.unwrap_or_else(|| named_uuid(&digest)),
            nguid,
            key,
        }
    }
}

/// The name that a disk has by itself, in each port and after each boot; `None` if it has neither serial number nor world-wide
/// name.
pub(super) fn own_key(disk: &Disk) -> Option<String> {
    let own = disk.serial.as_deref().or(disk.wwid.as_deref())?;
    if slug(own).is_empty() {
        return None;
    }
    Some(slug(&format!("{} {own}", disk.model.as_deref().unwrap_or_default())))
}

/// Lower-case letters, digits and single dashes. Of what is longer than [`MAX_KEY`] the end is a digest of all of it: serial numbers
/// stand there, and without them two disks of one model would be one.
fn slug(text: &str) -> String {
    let mut slug = String::new();
    for c in text.chars() {
        if c.is_ascii_alphanumeric() {
            slug.push(c.to_ascii_lowercase());
        } else if !slug.is_empty() && !slug.ends_with('-') {
            slug.push('-');
        }
    }
    slug.truncate(slug.trim_end_matches('-').len());
    if slug.len() > MAX_KEY {
        let digits: String = digest(&[slug.as_str()])
            .iter()
            .take(8)
            .map(|byte| format!("{byte:02x}"))
            .collect();
        slug.truncate(MAX_KEY - digits.len() - 1);
        slug.truncate(slug.trim_end_matches('-').len());
        slug = format!("{slug}-{digits}");
    }
    slug
}

fn digest(parts: &[&str]) -> [u8; 32] {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update(part.as_bytes());
        hash.update([0]);
    }
    hash.finalize().into()
}

/// A UUID made of a digest (RFC 9562, version 8).
fn named_uuid(digest: &[u8; 32]) -> String {
    let mut bytes = [0; 16];
    bytes.copy_from_slice(digest.get(..16).unwrap_or(&[0; 16]));
    bytes[6] = (bytes[6] & 0x0f) | 0x80;
    bytes[8] = (bytes[8] & 0x3f) | 0x80;
    let digits: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let parts = [0..8, 8..12, 12..16, 16..20, 20..32].map(|part| digits.get(part).unwrap_or_default());
    parts.join("-")
}

/// This machine's part of the names: 32 digits that tell nobody its own identity. The firmware's UUID comes first, so that
/// it is the same in the ramdisk and in the installed system.
pub(super) fn machine(tree: &Tree) -> String {
    let sources = [
        "/sys/class/dmi/id/product_uuid",
        "/etc/machine-id",
        "/sys/class/net/eth0/address",
    ];
    let known = sources.iter().find_map(|source| {
        let text = tree.line(source)?;
        // Boards without one carry the same zeroes or ones.
        let id: Option<MachineId> = text.parse().ok();
        let digits = id.map_or_else(|| text.clone(), |id| id.to_string());
        let plain = digits.trim_matches(|c: char| c == '0' || c == 'f' || c == ':');
        (!plain.is_empty()).then_some(digits)
    });
    let digest = digest(&["stiefel target machine", &known.unwrap_or_default()]);
    digest.iter().take(16).map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;
    use proptest::prelude::*;

    fn disk(name: &str, model: Option<&str>, serial: Option<&str>, wwid: Option<&str>) -> Disk {
        let text = |text: Option<&str>| text.map(str::to_owned);
        Disk {
            model: text(model),
            serial: text(serial),
            wwid: text(wwid),
            ..testing::disk(name)
        }
    }

    fn free(_: &str) -> bool {
        false
    }

    #[test]
    fn a_disk_has_the_same_name_wherever_it_is_plugged_in() {
        let first = Names::of_disk("m", &disk("sda", Some("SSD 980 PRO"), Some("S64D NX"), None), &free);
        let second = Names::of_disk("m", &disk("nvme7n1", Some("SSD 980 PRO"), Some("S64D NX"), None), &free);
        assert_eq!(first, second);
        assert_eq!(first.key, "ssd-980-pro-s64d-nx");
        assert_eq!(first.nqn, "nqn.2026-11.io.stiefel:storagetm.m.ssd-980-pro-s64d-nx");
        assert_eq!(
            (first.model.as_str(), first.serial.as_str()),
            ("SSD 980 PRO", "S64D NX")
        );
    }

    #[test]
    fn a_disk_keeps_its_own_uuid_and_nguid() {
        let own = "uuid.00112233-4455-6677-8899-aabbccddeeff";
        assert_eq!(
            Names::of_disk("m", &disk("a", None, None, Some(own)), &free).uuid,
            own[5..]
        );
        let nguid = "eui.00112233445566778899aabbccddeeff";
        let names = Names::of_disk("m", &disk("a", None, None, Some(nguid)), &free);
        assert_eq!(names.nguid.as_deref(), Some(&nguid[4..]));
        let made = Names::of_disk("m", &disk("a", None, Some("s"), None), &free).uuid;
        let other = Names::of_disk("n", &disk("a", None, Some("s"), None), &free).uuid;
        assert_ne!(made, other);
        assert_eq!((made.len(), &made[14..15]), (36, "8"));
    }

    #[test]
    fn of_two_disks_with_one_serial_number_each_has_a_name() {
        let same = disk("sdb", Some("USB"), Some("0123"), None);
        let taken = |key: &str| key == "usb-0123";
        assert_eq!(Names::of_disk("m", &same, &taken).key, "usb-0123-sdb");
        let taken = |key: &str| ["disk-img", "disk-img-2"].contains(&key);
        assert_eq!(Names::of_file("m", "disk.img", &taken).key, "disk-img-3");
    }

    #[test]
    fn long_names_tell_two_disks_apart_by_their_ends() {
        let model = "A RATHER LONG MODEL OF FORTY CHARACTERS X";
        let t10 = |serial: &str| {
            disk(
                "sda",
                Some(model),
                None,
                Some(&format!("t10.ATA     {model}{serial:>20}")),
            )
        };
        let (one, other) = (own_key(&t10("S1")).unwrap(), own_key(&t10("S2")).unwrap());
        assert!(
            one != other && one.len() <= MAX_KEY && one.starts_with("a-rather-long-model"),
            "{one} {other}"
        );
        assert_eq!(own_key(&t10("S1")).unwrap(), one);
        // A twin of it gets another name, too.
        let second = Names::of_disk("m", &t10("S1"), &|key: &str| key == one).key;
        assert!(second != one && second.len() <= MAX_KEY, "{second}");
        assert_eq!(slug(&"x".repeat(MAX_KEY)), "x".repeat(MAX_KEY));
    }

    #[test]
    fn the_machines_identity_cannot_be_read_from_its_names() {
        let root = tempfile::tempdir().unwrap();
        let tree = Tree::new(root.path());
        std::fs::create_dir_all(root.path().join("etc")).unwrap();
        std::fs::create_dir_all(root.path().join("sys/class/dmi/id")).unwrap();
        std::fs::write(root.path().join("etc/machine-id"), "00112233445566778899aabbccddeeff\n").unwrap();
        let by_id = machine(&tree);
        assert_eq!(by_id.len(), 32);
        assert!(!by_id.contains("0011223344"));
        let uuid = root.path().join("sys/class/dmi/id/product_uuid");
        std::fs::write(&uuid, "FFFFFFFF-FFFF-FFFF-FFFF-FFFFFFFFFFFF\n").unwrap();
        assert_eq!(machine(&tree), by_id);
        std::fs::write(&uuid, "4C4C4544-0042-3510-8052-B4C04F4A4432\n").unwrap();
        assert_ne!(machine(&tree), by_id);
    }

    proptest! {
        #[test]
        fn any_disk_gets_names_that_the_kernel_takes(
            name in "[a-z]{1,8}", model in ".{0,60}", serial in ".{0,60}", wwid in ".{0,60}"
        ) {
            let names = Names::of_disk(&"0".repeat(32), &disk(&name, Some(&model), Some(&serial), Some(&wwid)), &free);
            prop_assert!(names.nqn.len() <= 223);
            prop_assert!((1..=MAX_KEY).contains(&names.key.len()));
            prop_assert!(names.key.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-'));
            prop_assert!((1..=40).contains(&names.model.len()) && (1..=20).contains(&names.serial.len()));
        }
    }
}
