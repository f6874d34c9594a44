//! Whether software is being installed: a kernel that is half there must not be booted elsewhere, and a system that is left in
//! the middle of it may not start any more.
//!
//! Not every package manager takes an inhibitor, but each shows in some way that it works: it holds a lock on a file, has
//! written its process's number into one, has made one, or can be seen by its name. Who holds a lock is read in /proc/locks
//! (proc(5)), so that nothing is taken away from it, not even for a moment. (fwupd and PackageKit ask logind for an
//! inhibitor; PackageKit's work is besides done by the libraries whose locks are here.)

use std::fmt;
use std::os::unix::fs::MetadataExt;

use serde::Serialize;

use super::Refusal;
use crate::tree::Tree;

/// Lock files that may always be there; what counts is who holds them for writing.
const LOCKS: [(&str, &str); 9] = [
    ("apt", "/var/lib/dpkg/lock-frontend"),
    ("dpkg", "/var/lib/dpkg/lock"),
    // Gives dpkg's lock back between the packages.
    ("unattended-upgrades", "/run/unattended-upgrades.lock"),
    ("rpm", "/usr/lib/sysimage/rpm/.rpm.lock"),
    ("rpm", "/var/lib/rpm/.rpm.lock"),
    ("dnf5", "/run/dnf/rpmtransaction.lock"),
    ("portage", "/var/db/.pkg.portage_lockfile"),
    ("nix", "/nix/var/nix/profiles/system.lock"),
    ("switch-to-configuration", "/run/nixos/switch-to-configuration.lock"),
];
/// Files that hold the number of the process that works; it may have been killed, and left them there.
const NUMBERS: [(&str, &str); 2] = [
    ("zypper, or another program of libzypp,", "/run/zypp.pid"),
    ("dnf", "/var/lib/dnf/rpmdb_lock.pid"),
];
/// Lock files that exist only while their program works.
const FILES: [(&str, &str); 1] = [("pacman", "/var/lib/pacman/db.lck")];
/// Names of processes (proc_pid_comm(5)) that work for hours, and hold a lock only now and then.
const PROCESSES: [&str; 1] = ["emerge"];

/// What shows that a package manager works.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Sign {
    /// Somebody holds a lock on this file.
    Locked(&'static str),
    /// This file names a process that runs.
    Named {
        /// The file.
        file: &'static str,
        /// The process.
        pid: u32,
    },
    /// This file is there.
    Exists(&'static str),
    /// This process runs.
    Process(u32),
}

impl fmt::Display for Sign {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Locked(file) => write!(f, "{file} is locked"),
            Self::Named { file, pid } => write!(f, "{file} names the process {pid}, which runs"),
            Self::Exists(file) => write!(f, "{file} is there"),
            Self::Process(pid) => write!(f, "process {pid}"),
        }
    }
}

pub(super) fn check(tree: &Tree) -> Vec<Refusal> {
    let table = tree.text("/proc/locks").unwrap_or_default();
    let held: Vec<Held> = table.lines().filter_map(held).collect();
    let locked = LOCKS
        .iter()
        .filter(|(_, file)| is_held(tree, file, &held))
        .map(|(program, file)| (*program, Sign::Locked(file)));
    let named = NUMBERS.iter().filter_map(|(program, file)| {
        let pid: u32 = tree.line(file)?.trim().parse().ok()?;
        runs(tree, pid).then_some((*program, Sign::Named { file, pid }))
    });
    let existing = FILES
        .iter()
        .filter(|(_, file)| tree.path(file).exists())
        .map(|(program, file)| (*program, Sign::Exists(file)));
    let processes = processes(tree).into_iter();
    locked
        .chain(named)
        .chain(existing)
        .chain(processes)
        .map(|(program, sign)| Refusal::PackageManager { program, sign })
        .collect()
}

/// A file that somebody has locked for writing: the major and minor number of its file system, and its inode.
type Held = (u32, u32, u64);

fn is_held(tree: &Tree, file: &str, held: &[Held]) -> bool {
    let Ok(meta) = std::fs::metadata(tree.path(file)) else {
        return false;
    };
    let device = (rustix::fs::major(meta.dev()), rustix::fs::minor(meta.dev()));
    held.iter().any(|&(major, minor, inode)| {
        // The device is compared only in /run, whose inodes have small numbers that other file systems have, too: btrfs shows
        // another one here than stat does. A false alarm passes by itself.
        inode == meta.ino() && (!file.starts_with("/run/") || (major, minor) == device)
    })
}

/// The file in a line such as `1: POSIX  ADVISORY  WRITE 1234 08:02:131 0 EOF`; `None` for readers and those who wait.
fn held(line: &str) -> Option<Held> {
    let fields: Vec<_> = line.split_ascii_whitespace().collect();
    let [_, _, _, "WRITE", _, file, ..] = fields.as_slice() else {
        return None;
    };
    let mut numbers = file.split(':');
    let mut hexadecimal = || u32::from_str_radix(numbers.next()?, 16).ok();
    let (major, minor) = (hexadecimal()?, hexadecimal()?);
    Some((major, minor, numbers.next()?.parse().ok()?))
}

fn runs(tree: &Tree, pid: u32) -> bool {
    tree.is_folder(format!("/proc/{pid}"))
}

fn processes(tree: &Tree) -> Vec<(&'static str, Sign)> {
    let pids = tree.names("/proc").into_iter().filter_map(|name| name.parse().ok());
    let named = |pid: u32| {
        let name = tree.line(format!("/proc/{pid}/comm"))?;
        let known = PROCESSES.into_iter().find(|known| *known == name)?;
        Some((known, Sign::Process(pid)))
    };
    pids.filter_map(named).collect()
}

#[cfg(test)]
mod tests {
    use super::super::tests::Files;
    use super::*;
    use proptest::prelude::*;

    /// A line of /proc/locks for a file that is there.
    fn line(files: &Files, path: &str, state: &str) -> String {
        let meta = std::fs::metadata(files.tree().path(path)).unwrap();
        let (major, minor) = (rustix::fs::major(meta.dev()), rustix::fs::minor(meta.dev()));
        format!("1: {state} 812 {major:02x}:{minor:02x}:{} 0 EOF\n", meta.ino())
    }

    fn refused(program: &'static str, sign: Sign) -> Refusal {
        Refusal::PackageManager { program, sign }
    }

    #[test]
    fn each_package_managers_write_lock_is_found() {
        for (program, path) in LOCKS {
            for kind in [
                "POSIX  ADVISORY  WRITE",
                "FLOCK  ADVISORY  WRITE",
                "OFDLCK ADVISORY  WRITE",
            ] {
                let files = Files::new(&[(path, "")]);
                assert_eq!(check(&files.tree()), [], "{path} alone is no sign");
                files.write("/proc/locks", line(&files, path, kind).as_bytes());
                assert_eq!(check(&files.tree()), [refused(program, Sign::Locked(path))]);
            }
        }
    }

    #[test]
    fn who_reads_or_waits_is_no_sign() {
        let (lock, reader) = ("/var/lib/dpkg/lock", "/var/lib/rpm/.rpm.lock");
        let files = Files::new(&[(lock, ""), (reader, "")]);
        let locks = line(&files, lock, "-> POSIX  ADVISORY  WRITE") + &line(&files, reader, "POSIX  ADVISORY  READ ");
        files.write("/proc/locks", locks.as_bytes());
        assert_eq!(check(&files.tree()), []);
    }

    #[test]
    fn on_btrfs_the_device_differs_and_in_run_the_inode_alone_says_nothing() {
        let other = |path: &str| {
            let files = Files::new(&[(path, "")]);
            let inode = std::fs::metadata(files.tree().path(path)).unwrap().ino();
            let locks = format!("1: POSIX  ADVISORY  WRITE 812 fe:fe:{inode} 0 EOF\n");
            files.write("/proc/locks", locks.as_bytes());
            check(&files.tree()).len()
        };
        assert_eq!(other("/var/lib/dpkg/lock"), 1);
        assert_eq!(other("/run/unattended-upgrades.lock"), 0);
    }

    #[test]
    fn a_process_that_a_file_names_counts_while_it_runs() {
        for (program, file) in NUMBERS {
            let files = Files::new(&[(file, "4711\n")]);
            assert_eq!(check(&files.tree()), [], "it was killed");
            files.write("/proc/4711/comm", b"zypper\n");
            let sign = Sign::Named { file, pid: 4711 };
            assert_eq!(check(&files.tree()), [refused(program, sign)]);
            for nothing in ["", "\n", "-1\n", "x4711\n"] {
                files.write(file, nothing.as_bytes());
                assert_eq!(check(&files.tree()), [], "{nothing:?}");
            }
        }
    }

    #[test]
    fn pacmans_lock_file_is_enough() {
        let [(program, file)] = FILES;
        assert_eq!(
            check(&Files::new(&[(file, "")]).tree()),
            [refused(program, Sign::Exists(file))]
        );
        assert_eq!(check(&Files::new(&[]).tree()), []);
    }

    #[test]
    fn emerge_counts_also_between_the_packages() {
        let files = Files::new(&[("/proc/12/comm", "emerge\n"), ("/proc/13/comm", "emerged\n")]);
        let refusals = check(&files.tree());
        assert_eq!(refusals, [refused("emerge", Sign::Process(12))]);
        let text = refusals[0].to_string();
        assert!(text.contains("emerge is installing software (process 12)"), "{text}");
    }

    proptest! {
        #[test]
        fn any_table_of_locks_is_read(text in "[ -~\n]{0,200}", fields in "(1: )?[A-Z]{0,6} [A-Z]{0,8} WRITE -?[0-9]{1,12} [0-9a-f:]{0,40}") {
            for line in text.lines().chain([fields.as_str()]) {
                let _ = held(line);
            }
        }
    }
}
