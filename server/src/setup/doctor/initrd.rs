//! Initrds that are made for this machine only.
//!
//! On the desktop our overlay brings what reaches the laptop, so such an initrd starts there. The other way round is worse: one
//! that is built while the system runs on the desktop has the desktop's drivers, and the laptop does not start from it any
//! more. Specification: initramfs.conf(5), dracut.conf(5), mkinitcpio.conf(5), booster's README.

use super::{Finding, Patient};
use crate::tree::Tree;

/// How an initrd is made for one machine, and for all.
struct Maker {
    /// What says so.
    evidence: String,
    /// What makes it for all.
    command: &'static str,
}

pub(super) fn drivers(patient: &Patient) -> Vec<Finding> {
    const CHECK: &str = "initrd";
    let found = match narrow(&patient.tree) {
        None => Finding::ok(CHECK, "it is made for any machine, or by a program that is not known"),
        Some(Maker { evidence, command }) => {
            let drivers = patient.machine.root.drivers.join(", ");
            let own = if drivers.is_empty() {
                String::new()
            } else {
                format!(" ({drivers})")
            };
            Finding::warning(
                CHECK,
                format!(
                    "it is made for this machine only ({evidence}). On the desktop stiefel adds the drivers of wired adapters, USB, \
                     keyboards, NBD, NVMe over TCP and WireGuard; until / is there, only the desktop's graphics and its processor's \
                     microcode would be missing. But an initrd that is built on the desktop (a kernel upgrade there) would lack the \
                     drivers of the laptop's disk{own}, and the laptop would not start from it"
                ),
                command,
            )
        }
    };
    vec![found]
}

fn narrow(tree: &Tree) -> Option<Maker> {
    let there = |path: &str| tree.path(path).exists();
    let dracut = there("/usr/bin/dracut") || there("/usr/sbin/dracut");
    // Debian leaves the configuration of initramfs-tools behind where dracut took its place.
    if there("/etc/initramfs-tools/initramfs.conf") && (!dracut || there("/usr/sbin/mkinitramfs")) {
        return initramfs_tools(tree);
    }
    if there("/etc/mkinitcpio.conf") {
        let autodetect = mkinitcpio_hooks(tree).iter().any(|hook| hook == "autodetect");
        return autodetect.then(|| Maker {
            evidence: "the hook autodetect in /etc/mkinitcpio.conf".to_owned(),
            command: r"sed -i -E '/^HOOKS=/s/ autodetect\b//' /etc/mkinitcpio.conf && mkinitcpio -P",
        });
    }
    if dracut || there("/usr/lib/dracut/dracut.conf.d") || there("/etc/dracut.conf.d") {
        return dracut_file(tree).map(|file| Maker {
            evidence: format!("hostonly in {file}"),
            command: "echo 'hostonly=\"no\"' > /etc/dracut.conf.d/99-stiefel.conf && dracut --regenerate-all --force",
        });
    }
    let booster = tree.text("/etc/booster.yaml").ok()?;
    let universal = booster.lines().any(|line| line.trim() == "universal: true");
    (!universal).then(|| Maker {
        evidence: "no `universal: true` in /etc/booster.yaml".to_owned(),
        command: "echo 'universal: true' >> /etc/booster.yaml && /usr/lib/booster/regenerate_images",
    })
}

fn initramfs_tools(tree: &Tree) -> Option<Maker> {
    let folder = "/etc/initramfs-tools/conf.d";
    let files = tree.names(folder).into_iter().map(|name| format!("{folder}/{name}"));
    let mut said = None;
    // What comes later overrules.
    for file in ["/etc/initramfs-tools/initramfs.conf".to_owned()]
        .into_iter()
        .chain(files)
    {
        let text = tree.text(&file).unwrap_or_default();
        let value = text.lines().rev().find_map(|line| line.trim().strip_prefix("MODULES="));
        if let Some(value) = value {
            said = Some((value.trim().trim_matches(['"', '\'']).to_owned(), file));
        }
    }
    let (value, file) = said?;
    matches!(value.as_str(), "dep" | "list").then(|| Maker {
        evidence: format!("MODULES={value} in {file}"),
        command: "echo MODULES=most > /etc/initramfs-tools/conf.d/zz-stiefel && update-initramfs -u -k all",
    })
}

/// The file that says `hostonly`, if the last one that says anything says yes.
fn dracut_file(tree: &Tree) -> Option<String> {
    let folders = ["/usr/lib/dracut/dracut.conf.d", "/etc/dracut.conf.d"];
    let mut files: std::collections::BTreeMap<String, String> = std::collections::BTreeMap::new();
    for folder in folders {
        // A file in /etc takes the place of one of the same name.
        let names = tree.names(folder).into_iter().filter(|name| name.ends_with(".conf"));
        files.extend(names.map(|name| (name.clone(), format!("{folder}/{name}"))));
    }
    let mut said = None;
    for file in ["/etc/dracut.conf".to_owned()].into_iter().chain(files.into_values()) {
        let text = tree.text(&file).unwrap_or_default();
        let value = text
            .lines()
            .rev()
            .find_map(|line| line.trim().strip_prefix("hostonly="));
        if let Some(value) = value {
            said = Some((value.trim().trim_matches(['"', '\'']).to_owned(), file));
        }
    }
    said.filter(|(value, _)| value == "yes").map(|(_, file)| file)
}

/// The hooks of mkinitcpio's configuration and its drop-ins.
pub(super) fn mkinitcpio_hooks(tree: &Tree) -> Vec<String> {
    let folder = "/etc/mkinitcpio.conf.d";
    let files = tree.names(folder).into_iter().map(|name| format!("{folder}/{name}"));
    let mut hooks = Vec::new();
    for file in ["/etc/mkinitcpio.conf".to_owned()].into_iter().chain(files) {
        let text = tree.text(&file).unwrap_or_default();
        let line = text
            .lines()
            .rev()
            .find_map(|line| line.trim().strip_prefix("HOOKS=(")?.split(')').next());
        if let Some(line) = line {
            hooks = line
                .split_ascii_whitespace()
                .map(|hook| hook.trim_matches(['"', '\'']).to_owned())
                .collect();
        }
    }
    hooks
}
