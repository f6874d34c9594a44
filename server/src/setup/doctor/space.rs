//! Whether there is room: for the ramdisk on the disk and in memory, for kernels in /boot.

use std::path::Path;

use stiefel_initrd_builder::ramdisk::Manifest;

use super::{Finding, Patient};
use crate::collect::STATE_DIR;
use crate::tree::Tree;

const MIB: u64 = 1 << 20;
/// A ramdisk with all firmware, and a second one beside it while it is replaced, in bytes.
const RAMDISK: u64 = 400 * MIB;
/// A kernel and its initrd, in bytes.
const KERNEL: u64 = 100 * MIB;
/// Less memory than that is too little for the ramdisk and its work, in bytes.
const MEMORY: u64 = 900 * MIB;
/// What the service writes below /run, in bytes.
const RUN: u64 = MIB;

/// Bytes that are free.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space(pub u64);

/// Free for root on the file system of a path.
pub(super) fn of(path: &Path) -> Option<Space> {
    let found = rustix::fs::statvfs(path).ok()?;
    found.f_bavail.checked_mul(found.f_frsize).map(Space)
}

pub(super) fn check(patient: &Patient) -> Vec<Finding> {
    let mut findings: Vec<Finding> = [
        room(
            patient,
            "/var",
            RAMDISK,
            "a ramdisk and its successor",
            "remove what is not needed below /var; `apt clean`, `journalctl --vacuum-size=100M`",
        ),
        room(
            patient,
            "/boot",
            KERNEL,
            "one more kernel, also one that is installed on the desktop",
            "remove old kernels: `apt autoremove`",
        ),
        room(
            patient,
            "/run",
            RUN,
            "what the service writes",
            "see with `du -x /run` what fills it",
        ),
    ]
    .into_iter()
    .flatten()
    .collect();
    findings.extend(memory(patient));
    findings
}

fn room(patient: &Patient, place: &str, needed: u64, what: &str, next: &str) -> Option<Finding> {
    const CHECK: &str = "space";
    use super::super::Family;
    let path = patient.tree.path(place);
    if !path.exists() {
        return None;
    }
    let next = match patient.machine.distribution.family {
        Family::Debian | Family::Ubuntu => next.to_owned(),
        Family::Fedora => next
            .replace("apt clean", "dnf clean all")
            .replace("apt autoremove", "dnf remove --oldinstallonly"),
        Family::Arch => next
            .replace("apt clean", "pacman -Sc")
            .replace(": `apt autoremove`", ""),
        Family::Gentoo => next
            .replace("apt clean", "eclean distfiles")
            .replace("apt autoremove", "eclean-kernel -n 2"),
        _ => next.replace("`apt clean`, ", "").replace(": `apt autoremove`", ""),
    };
    let Some(Space(free)) = (patient.space)(&path) else {
        return Some(Finding::warning(
            CHECK,
            format!("how much is free in {place} cannot be told"),
            format!("df -h {place}"),
        ));
    };
    let (free_mib, needed_mib) = (free / MIB, needed / MIB);
    Some(match free >= needed {
        true => Finding::ok(CHECK, format!("{free_mib} MiB are free in {place}")),
        false => Finding::warning(
            CHECK,
            format!("{free_mib} MiB are free in {place}; {what} needs about {needed_mib} MiB"),
            next,
        ),
    })
}

/// The ramdisk's root is a tmpfs, which takes half of the memory at most.
fn memory(patient: &Patient) -> Option<Finding> {
    const CHECK: &str = "memory";
    let total = total_memory(&patient.tree)?;
    let ramdisk = Manifest::load(&patient.tree.path(STATE_DIR)).map(|manifest| manifest.unpacked_bytes);
    let needed = ramdisk.map_or(MEMORY, |unpacked| unpacked.saturating_mul(2));
    let total_mib = total / MIB;
    Some(match total >= needed {
        true => Finding::ok(CHECK, format!("{total_mib} MiB")),
        false => Finding::failure(
            CHECK,
            format!("{total_mib} MiB; the ramdisk needs about {} MiB", needed / MIB),
            "take fewer classes of `modules` in config.yaml, then: stiefel install",
        ),
    })
}

/// In bytes: proc_meminfo(5).
fn total_memory(tree: &Tree) -> Option<u64> {
    let text = tree.text("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.split_ascii_whitespace().next()?.parse().ok()?;
    kib.checked_mul(1024)
}
