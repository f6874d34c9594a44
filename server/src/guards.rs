//! The guards: when the laptop must not leave its OS now.
//!
//! Asked by `autokexec` before it collects anything, and by `stiefel serve`. Specification: design.md, "The way of a boot" 3.
//! All reasons are told at once, so that nobody mends them one by one. What cannot be found out is no reason.

mod battery;
pub(crate) mod hibernation;
mod inhibitors;
pub(crate) mod kexec;
mod link;
mod packages;

use std::path::Path;

use serde::Serialize;

use crate::tree::Tree;
pub use inhibitors::Inhibitor;
pub use packages::Sign;

/// Why the laptop stays in its OS; each message says what to do next.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize)]
#[serde(tag = "reason", rename_all = "kebab-case")]
pub enum Refusal {
    /// A hibernated system lies on a disk: what it has in memory would no longer fit to what is on the disk.
    #[error(
        "a hibernated system lies in {place}; booting from its disk would destroy its files\n  \
         next: start that system once and shut it down, then try again"
    )]
    Hibernated {
        /// The device, file or variable.
        place: String,
    },
    /// A program asks not to be shut down.
    #[error("{who} asks not to be shut down: {why}\n  next: wait for it to end (`systemd-inhibit --list` shows it)")]
    Inhibited {
        /// The program, by its own name.
        who: String,
        /// Its reason.
        why: String,
    },
    /// Who asks is not known.
    #[error(
        "cannot ask logind whether a program must not be interrupted: {why}\n  next: see `systemctl status dbus systemd-logind` and try `systemd-inhibit --list`; busctl is part of systemd"
    )]
    LogindSilent {
        /// What happened.
        why: String,
    },
    /// Software is being installed.
    #[error("{program} is installing software ({sign})\n  next: wait for it to end")]
    PackageManager {
        /// Which.
        program: &'static str,
        /// What shows it.
        sign: Sign,
    },
    /// The battery would not last.
    #[error(
        "the battery is at {percent} %, below {limit} %, and not charging\n  next: plug in the power supply, or set trigger.battery in config.yaml"
    )]
    Battery {
        /// Charge in per cent.
        percent: u8,
        /// The configured limit.
        limit: u8,
    },
    /// This system runs on another machine's disk.
    #[error(
        "this system itself runs from a link ({evidence}); its disk is another machine's\n  next: nothing; shut it down to end the session"
    )]
    OnALink {
        /// What shows it.
        evidence: String,
    },
    /// The kernel starts no other.
    #[error("this kernel does not start another: {why}\n  next: {next}")]
    NoKexec {
        /// Why.
        why: &'static str,
        /// What to do.
        next: &'static str,
    },
}

/// Everything that speaks against leaving the OS below `root` now; empty if nothing does.
///
/// `battery_limit` is in per cent, `ramdisk_kernel` the kernel to be started by kexec, if that is how it is left.
#[must_use]
pub fn check(root: &Path, battery_limit: u8, ramdisk_kernel: Option<&Path>) -> Vec<Refusal> {
    let tree = Tree::new(root);
    let mut refusals = Vec::new();
    refusals.extend(link::check(&tree));
    refusals.extend(ramdisk_kernel.and_then(|kernel| kexec::check(&tree, kernel)));
    refusals.extend(hibernation::check(&tree));
    refusals.extend(packages::check(&tree));
    refusals.extend(inhibitors::check(&tree));
    refusals.extend(battery::check(&tree, battery_limit));
    refusals
}

/// Whether the system below `root` itself runs on another machine's disk: then it is no laptop that could serve.
#[must_use]
pub fn on_a_link(root: &Path) -> Option<Refusal> {
    link::check(&Tree::new(root))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    /// A file tree whose files are written by path.
    pub struct Files(pub tempfile::TempDir);

    impl Files {
        pub fn new(files: &[(&str, &str)]) -> Self {
            let new = Self(tempfile::tempdir().unwrap());
            files.iter().for_each(|(path, text)| new.write(path, text.as_bytes()));
            new
        }

        pub fn write(&self, path: &str, bytes: &[u8]) {
            let path = self.tree().path(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        }

        pub fn link(&self, target: &str, path: &str) {
            let path = self.tree().path(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            symlink(target, path).unwrap();
        }

        pub fn tree(&self) -> Tree {
            Tree::new(self.0.path())
        }
    }

    #[test]
    fn all_reasons_are_told_at_once() {
        let files = Files::new(&[
            ("/proc/cmdline", "root=UUID=1 rdinit=/stiefel/stiefel"),
            ("/proc/sys/kernel/kexec_load_disabled", "1\n"),
            ("/sys/class/power_supply/BAT0/type", "Battery\n"),
            ("/sys/class/power_supply/BAT0/capacity", "5\n"),
            ("/sys/class/power_supply/BAT0/status", "Discharging\n"),
            ("/var/lib/pacman/db.lck", ""),
        ]);
        let refusals = check(files.0.path(), 10, Some(Path::new("/nonexistent")));
        assert_eq!(refusals.len(), 4, "{refusals:?}");
        let without = check(files.0.path(), 10, None);
        assert_eq!(without.len(), 3, "a reboot needs no kexec: {without:?}");
        assert!(refusals.iter().all(|refusal| refusal.to_string().contains("next: ")));
    }

    #[test]
    fn an_ordinary_laptop_is_free_to_go() {
        let files = Files::new(&[
            ("/proc/cmdline", "root=UUID=1 quiet"),
            ("/proc/sys/kernel/kexec_load_disabled", "0\n"),
        ]);
        assert_eq!(check(files.0.path(), 10, Some(Path::new("/nonexistent"))), []);
    }
}
