//! The laptop as `stiefel init` and `stiefel doctor` see it: facts about the machine, the configuration made from them, and what
//! stands against a session.
//!
//! All looking goes through a root folder, so that a tree that is only a folder can be looked at, too. Nothing here asks a
//! question or prints: that is the command's job. What cannot be found out is `None`, never a guess.

mod configuration;
mod disks;
mod distribution;
pub mod doctor;
mod firmware;
mod nics;
mod place;

#[cfg(test)]
mod fixture;

use std::collections::BTreeSet;
use std::path::Path;

use stiefel_initrd_builder::modules::{DEFAULT, ModuleTree};

pub use configuration::{Choice, render};
pub use disks::{Layer, LayerKind, RootDisk};
pub use distribution::{Distribution, Family, Package};
pub use firmware::Firmware;
pub use nics::{Identity, Nic};
pub use place::{Placed, SetupError, check_writable, first_key, has_key, put, read_configuration};

use crate::tree::Tree;

/// What is known of a laptop.
#[derive(Debug, Clone)]
pub struct Machine {
    /// Its name.
    pub hostname: String,
    /// Its system.
    pub distribution: Distribution,
    /// The running kernel's release.
    pub release: Option<String>,
    /// Firmware: Secure Boot, lockdown, boot loader.
    pub firmware: Firmware,
    /// The disk that holds `/`.
    pub root: RootDisk,
    /// Wired network adapters.
    pub nics: Vec<Nic>,
    /// `console=` words of the running kernel's command line.
    pub consoles: Vec<String>,
}

impl Machine {
    /// Looks at the system below `root` (`/` for the running one).
    #[must_use]
    pub fn look(root: &Path) -> Self {
        Self::of(&Tree::new(root))
    }

    pub(crate) fn of(tree: &Tree) -> Self {
        let cmdline = tree.text("/proc/cmdline").unwrap_or_default();
        let consoles = cmdline
            .split_ascii_whitespace()
            .filter(|word| word.strip_prefix("console=").is_some_and(|place| !place.is_empty()))
            .map(presentable)
            .collect();
        Self {
            hostname: presentable(&crate::collect::hostname(tree)),
            distribution: Distribution::of(tree),
            release: tree
                .line("/proc/sys/kernel/osrelease")
                .filter(|release| stiefel_shared::kernel::is_release(release)),
            firmware: Firmware::of(tree),
            root: RootDisk::of(tree),
            nics: nics::list(tree),
            consoles,
        }
    }

    /// The adapters that may be dedicated: on USB, pluggable, no telephone.
    #[must_use]
    pub fn candidates(&self) -> Vec<&Nic> {
        self.nics.iter().filter(|nic| nic.may_be_dedicated()).collect()
    }
}

/// Names for `modules` in the configuration: drivers of this laptop's disk and adapters that its class `default` does not bring,
/// though the kernel has them.
#[must_use]
pub fn extra_modules(root: &Path, machine: &Machine) -> Vec<String> {
    let tree = Tree::new(root);
    let Some(release) = &machine.release else {
        return Vec::new();
    };
    let Ok(modules) = ModuleTree::open(&tree.path(format!("/lib/modules/{release}"))) else {
        return Vec::new();
    };
    let Ok(usual) = modules.select(&[DEFAULT]) else {
        return Vec::new();
    };
    let drivers = machine
        .nics
        .iter()
        .filter_map(|nic| nic.driver.as_ref())
        .chain(&machine.root.drivers);
    let extra: BTreeSet<String> = drivers
        .filter(|driver| modules.offers(driver) && !modules.has(&usual, driver))
        .filter_map(|driver| configuration::module_name(driver))
        .collect();
    extra.into_iter().collect()
}

/// Text from hardware or files, fit for a terminal and a comment: one line, without control characters, not endless.
fn presentable(text: &str) -> String {
    const LONGEST: usize = 80;
    let text: String = text.chars().filter(|c| !c.is_control()).take(LONGEST).collect();
    text.trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::fixture::Fixture;
    use super::*;

    #[test]
    fn a_debian_on_lvm_on_luks_is_described() {
        let laptop = Machine::of(&Fixture::debian_luks_lvm().tree());
        assert_eq!(laptop.distribution.family, Family::Debian);
        assert_eq!(laptop.release.as_deref(), Some("6.1.0-13-amd64"));
        assert_eq!(
            laptop.root.to_string(),
            "/ is ext4 on LVM (vg-root) on LUKS2 (nvme0n1p3_crypt) on partition nvme0n1p3 of nvme0n1 (Samsung SSD 980, 512.1 GB)"
        );
        assert_eq!(laptop.firmware.loader.as_deref(), Some("GRUB"));
        let candidates = laptop.candidates();
        assert_eq!(candidates.len(), 1);
        assert_eq!(
            candidates[0].identity(&laptop.nics).unwrap().to_string(),
            "0bda:8153:000001"
        );
    }

    #[test]
    fn an_arch_on_btrfs_booted_by_systemd_boot_is_described() {
        let laptop = Machine::of(&Fixture::arch().tree());
        assert_eq!(laptop.distribution.family, Family::Arch);
        assert_eq!(laptop.firmware.loader.as_deref(), Some("systemd-boot 256.7-1-arch"));
        assert_eq!(laptop.firmware.secure_boot, Some(false));
        assert!(
            laptop
                .root
                .to_string()
                .starts_with("/ is btrfs on partition sda2 of sda"),
            "{}",
            laptop.root
        );
    }

    #[test]
    fn a_fedora_under_lockdown_is_described() {
        let laptop = Machine::of(&Fixture::fedora().tree());
        assert_eq!(laptop.distribution.family, Family::Fedora);
        assert_eq!(laptop.firmware.secure_boot, Some(true));
        assert_eq!(laptop.firmware.lockdown.as_deref(), Some("integrity"));
    }

    #[test]
    fn drivers_that_no_class_brings_are_named_for_the_configuration() {
        let laptop = Fixture::debian_luks_lvm();
        laptop.nic("eth9", "r8127", None);
        laptop.link("../../odd-raid", "/sys/devices/pci/nvme0n1/driver/module");
        let extra = || extra_modules(laptop.root(), &Machine::of(&laptop.tree()));
        assert_eq!(extra(), Vec::<String>::new(), "this kernel has neither as a module");
        let modules = [&Fixture::MODULES[..], &["updates/r8127", "extra/odd-raid"]].concat();
        laptop.kernel("6.1.0-13-amd64", &modules);
        assert_eq!(extra(), ["odd_raid", "r8127"]);
    }

    #[test]
    fn a_folder_without_a_system_gives_unknowns_and_no_panic() {
        let laptop = Machine::of(&Fixture::new().tree());
        assert_eq!(laptop.release, None);
        assert!(laptop.root.disks.is_empty() && laptop.nics.is_empty());
        assert_eq!(laptop.firmware.loader, None);
    }
}
