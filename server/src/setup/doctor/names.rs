//! Names of devices in fstab and crypttab that mean something else on the desktop, or nothing.
//!
//! Specification: fstab(5), crypttab(5). The kernel's names and paths of ports are another machine's there; what lies on a disk
//! that is not served is not there at all, and without `nofail` the desktop's start stops at it.

use std::collections::BTreeSet;

use super::{Finding, Patient, pattern, shell};

const FSTAB: &str = "/etc/fstab";
const CRYPTTAB: &str = "/etc/crypttab";
/// The kernel's names of disks, without number or letter.
const DISKS: [&str; 6] = ["sd", "hd", "vd", "xvd", "nvme", "mmcblk"];

/// A line that is used at every start.
struct Entry {
    /// The device, as it is written.
    device: String,
    /// Where it is mounted, or the volume's name.
    point: String,
    /// Missing, it stops nothing.
    may_miss: bool,
    swap: bool,
}

/// What is by its place in this machine.
fn is_place(device: &str) -> bool {
    let Some(name) = device.strip_prefix("/dev/") else {
        return false;
    };
    let numbered = |kind: &str| {
        let rest = name.strip_prefix(kind);
        rest.is_some_and(|rest| !rest.is_empty() && rest.bytes().all(|byte| byte.is_ascii_alphanumeric()))
    };
    name.starts_with("disk/by-path/") || DISKS.into_iter().any(numbered)
}

fn lines(text: &str) -> impl Iterator<Item = Vec<&str>> {
    text.lines()
        .map(str::trim_start)
        .filter(|line| !line.starts_with('#'))
        .map(|line| line.split_ascii_whitespace().collect())
}

fn has(options: &str, wanted: &[&str]) -> bool {
    options.split(',').any(|option| wanted.contains(&option))
}

fn fstab_entries(text: &str) -> Vec<Entry> {
    let entry = |fields: Vec<&str>| {
        let (device, point, kind) = (*fields.first()?, *fields.get(1)?, *fields.get(2)?);
        let options = fields.get(3).copied().unwrap_or("defaults");
        (!has(options, &["noauto"])).then(|| Entry {
            device: device.to_owned(),
            point: point.to_owned(),
            may_miss: has(options, &["nofail", "x-systemd.automount"]),
            swap: kind == "swap",
        })
    };
    lines(text).filter_map(entry).collect()
}

fn crypttab_entries(text: &str) -> Vec<Entry> {
    let entry = |fields: Vec<&str>| {
        let (name, device) = (*fields.first()?, *fields.get(1)?);
        let options = fields.get(3).copied().unwrap_or_default();
        (!has(options, &["noauto"])).then(|| Entry {
            device: device.to_owned(),
            point: name.to_owned(),
            may_miss: has(options, &["nofail"]),
            swap: has(options, &["swap"]),
        })
    };
    lines(text).filter_map(entry).collect()
}

pub(super) fn fstab(patient: &Patient) -> Vec<Finding> {
    const CHECK: &str = "fstab";
    let Ok(text) = patient.tree.text(FSTAB) else {
        return vec![Finding::ok(CHECK, "there is none")];
    };
    let mut findings = Vec::new();
    for entry in fstab_entries(&text).iter().filter(|entry| counts(patient, entry)) {
        let Entry { device, point, .. } = entry;
        if is_place(device) {
            let next = by_uuid(patient, FSTAB, device, |device, uuid| {
                format!(r"s#^{device}(\s)#UUID={uuid}\1#")
            });
            findings.push(named_by_place(
                CHECK,
                entry,
                format!("{point} is named by its place, {device}"),
                next,
            ));
        } else if let Some(disk) = elsewhere(patient, device).filter(|_| !entry.may_miss) {
            findings.push(Finding::failure(
                CHECK,
                format!(
                    "{point} is on {disk}, which stays in the laptop: the desktop's start would wait for it, and stop"
                ),
                format!(
                    "sed -i -E {} {FSTAB}",
                    shell(&format!(r"s#^(\s*\S+\s+{}\s+\S+\s+\S+)#\1,nofail#", pattern(point)))
                ),
            ));
        }
    }
    if findings.is_empty() {
        findings.push(Finding::ok(
            CHECK,
            "every file system is named by what it is, not by its place",
        ));
    }
    findings
}

/// The command that names a device in `table` by its UUID; `replace` makes sed's command of a pattern for the device, and the UUID.
fn by_uuid(patient: &Patient, table: &str, device: &str, replace: impl Fn(&str, &str) -> String) -> String {
    match patient.tree.uuid_of(device) {
        Some(uuid) => format!("sed -i -E {} {table}", shell(&replace(&pattern(device), &uuid))),
        None => format!(
            "find its UUID with `blkid {}`, and write UUID=… in its place in {table}",
            shell(device)
        ),
    }
}

pub(super) fn crypttab(patient: &Patient) -> Vec<Finding> {
    const CHECK: &str = "crypttab";
    let Ok(text) = patient.tree.text(CRYPTTAB) else {
        return Vec::new();
    };
    let mut findings = Vec::new();
    for entry in crypttab_entries(&text).iter().filter(|entry| counts(patient, entry)) {
        let Entry { device, point, .. } = entry;
        if is_place(device) {
            let next = by_uuid(patient, CRYPTTAB, device, |device, uuid| {
                format!(r"s#(\s){device}(\s|$)#\1UUID={uuid}\2#")
            });
            findings.push(named_by_place(
                CHECK,
                entry,
                format!("the volume {point} is named by its place, {device}"),
                next,
            ));
        } else if let Some(disk) = elsewhere(patient, device).filter(|_| !entry.may_miss) {
            findings.push(Finding::failure(
                CHECK,
                format!(
                    "the volume {point} is on {disk}, which stays in the laptop: the desktop's start would wait for it"
                ),
                format!("add nofail to the options of {point} in {CRYPTTAB}"),
            ));
        }
    }
    if findings.is_empty() {
        findings.push(Finding::ok(
            CHECK,
            "every volume is named by what it is, not by its place",
        ));
    }
    findings
}

/// Swap space is not used on the desktop, unless it is configured.
fn counts(patient: &Patient, entry: &Entry) -> bool {
    !entry.swap || patient.config.session.swap
}

fn named_by_place(check: &'static str, entry: &Entry, text: String, next: String) -> Finding {
    match entry.may_miss {
        true => Finding::warning(
            check,
            format!("{text}: on the desktop that is another disk, or none"),
            next,
        ),
        false => Finding::failure(
            check,
            format!("{text}: on the desktop that is another disk, or none, and its start would stop there"),
            next,
        ),
    }
}

/// The disk that a device is on, if it is another one than the one that is served.
fn elsewhere(patient: &Patient, device: &str) -> Option<String> {
    let (tree, served) = (&patient.tree, &patient.machine.root.disks);
    let name = match device.split_once('=') {
        Some(("UUID", uuid)) => tree.device_by("/dev/disk/by-uuid", uuid.trim_matches('"'))?,
        Some(("LABEL", label)) => tree.block_name(&format!("/dev/disk/by-label/{}", label.trim_matches('"')))?,
        Some(("PARTUUID", uuid)) => tree.block_name(&format!("/dev/disk/by-partuuid/{}", uuid.trim_matches('"')))?,
        Some(("PARTLABEL", label)) => {
            tree.block_name(&format!("/dev/disk/by-partlabel/{}", label.trim_matches('"')))?
        }
        _ => tree.block_name(device.starts_with("/dev/").then_some(device)?)?,
    };
    let disks: BTreeSet<String> = tree.disks_below(&name);
    let apart = !served.is_empty() && !disks.is_empty() && disks.iter().all(|disk| !served.contains(disk));
    apart.then(|| disks.into_iter().collect::<Vec<_>>().join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn places_are_told_from_identities() {
        for device in [
            "/dev/sda1",
            "/dev/nvme0n1p2",
            "/dev/mmcblk0p1",
            "/dev/vda",
            "/dev/disk/by-path/pci-0000:00:1f.2-ata-1-part1",
        ] {
            assert!(is_place(device), "{device}");
        }
        for device in [
            "UUID=1",
            "/dev/mapper/vg-root",
            "/dev/vg/root",
            "/dev/disk/by-uuid/1",
            "/dev/disk/by-id/nvme-x",
            "/dev/sd",
            "tmpfs",
            "/dev/sr0",
        ] {
            assert!(!is_place(device), "{device}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_read(text in "(\\PC|\\n|\\t){0,200}") {
            let _ = (fstab_entries(&text).len(), crypttab_entries(&text).len());
        }
    }
}
