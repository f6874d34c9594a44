//! Swap space and hibernation: what a session must not use, and what keeps one from beginning.

use super::{Finding, Patient};
use crate::guards::hibernation;

/// Units that hibernate; `systemd` knows no other way.
const TARGETS: [&str; 3] = [
    "hibernate.target",
    "suspend-then-hibernate.target",
    "hybrid-sleep.target",
];

pub(super) fn swap(patient: &Patient) -> Vec<Finding> {
    const CHECK: &str = "swap";
    let tree = &patient.tree;
    let swaps = tree.text("/proc/swaps").unwrap_or_default();
    let served = |path: &&str| {
        if !path.starts_with("/dev/") {
            return true;
        }
        let disks = tree
            .block_name(path)
            .map(|name| tree.disks_below(&name))
            .unwrap_or_default();
        disks.iter().any(|disk| patient.machine.root.disks.contains(disk))
    };
    let places: Vec<&str> = swaps
        .lines()
        .skip(1)
        .filter_map(|line| line.split_ascii_whitespace().next())
        .filter(served)
        .collect();
    let found = match (places.is_empty(), patient.config.session.swap) {
        (true, _) => Finding::ok(CHECK, "there is no swap space on the disk that is served"),
        (false, false) => Finding::ok(CHECK, format!("{} is not used on the desktop", places.join(", "))),
        (false, true) => Finding::warning(
            CHECK,
            format!(
                "the desktop would use {}: over a network that can deadlock when memory is short",
                places.join(", ")
            ),
            "set session.swap to false in config.yaml",
        ),
    };
    vec![found]
}

pub(super) fn hibernation(patient: &Patient) -> Vec<Finding> {
    const CHECK: &str = "hibernation";
    let images = hibernation::check(&patient.tree);
    if !images.is_empty() {
        let failure = |refusal: crate::guards::Refusal| {
            let text = refusal.to_string();
            let (what, next) = text
                .split_once("\n  next: ")
                .unwrap_or((text.as_str(), "start that system and shut it down"));
            Finding::failure(CHECK, what, next)
        };
        return images.into_iter().map(failure).collect();
    }
    let tree = &patient.tree;
    let masked = |target: &&str| {
        std::fs::read_link(tree.path(format!("/etc/systemd/system/{target}"))).is_ok_and(|to| to.ends_with("dev/null"))
    };
    let places = set_up(patient);
    let found = if TARGETS.iter().all(masked) {
        Finding::ok(CHECK, "it is switched off")
    } else if places.is_empty() {
        Finding::ok(CHECK, "it is not set up")
    } else {
        Finding::warning(
            CHECK,
            format!(
                "it is set up ({}): a laptop that was hibernated is not served, until it was started and shut down",
                places.join(", ")
            ),
            format!("systemctl mask {}   # if you never hibernate", TARGETS.join(" ")),
        )
    };
    vec![found]
}

/// Where it is said from what to resume.
fn set_up(patient: &Patient) -> Vec<String> {
    let tree = &patient.tree;
    let mut places = Vec::new();
    let cmdline = tree.text("/proc/cmdline").unwrap_or_default();
    if let Some(word) = cmdline
        .split_ascii_whitespace()
        .find(|word| word.starts_with("resume="))
    {
        places.push(format!("{} on the command line", super::super::presentable(word)));
    }
    let folder = "/etc/initramfs-tools/conf.d";
    let files = tree.names(folder).into_iter().map(|name| format!("{folder}/{name}"));
    for file in files.chain(["/etc/initramfs-tools/initramfs.conf".to_owned()]) {
        let text = tree.text(&file).unwrap_or_default();
        let value = text.lines().rev().find_map(|line| line.trim().strip_prefix("RESUME="));
        if value.is_some_and(|value| !matches!(value.trim_matches(['"', '\'']), "" | "none" | "auto")) {
            places.push(format!("RESUME in {file}"));
        }
    }
    let hooks = super::initrd::mkinitcpio_hooks(tree);
    if hooks.iter().any(|hook| hook == "resume") {
        places.push("the hook resume in /etc/mkinitcpio.conf".to_owned());
    }
    places
}
