//! Whether software is being installed: a kernel that is half there must not be booted elsewhere, and a system that is left in
//! the middle of it may not start any more.
//!
//! Not every package manager takes an inhibitor, but each shows in some way that it works: it holds a lock on a file, has
//! written its process's number into one, has made one, or can be seen by its name. Who holds a lock is read in /proc/locks
//! (proc(5)), so that nothing is taken away from it, not even for a moment. (fwupd and PackageKit ask logind for an
//! inhibitor; PackageKit's work is besides done by the libraries whose locks are here.)
//!
//! Only root's processes count: any user may lock by flock(2) what they may read, call a program of theirs as they like, or
//! be given a number that an old file still names; none of that may keep the laptop here.

use std::fmt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

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
    /// This file names a process of root's that runs.
    Named {
        /// The file.
        file: &'static str,
        /// The process.
        pid: u32,
    },
    /// This file is there.
    Exists(&'static str),
    /// This process of root's runs.
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
    let held = Table::read(tree);
    let locked = LOCKS
        .iter()
        .filter(|(_, file)| held.has(&tree.path(file)))
        .map(|(program, file)| (*program, Sign::Locked(file)));
    let named = NUMBERS.iter().filter_map(|(program, file)| {
        let pid: u32 = tree.line(file)?.trim().parse().ok()?;
        is_roots(tree, pid).then_some((*program, Sign::Named { file, pid }))
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

/// The major and minor number of a file system.
type Device = (u32, u32);

/// What root has locked for writing.
struct Table {
    held: Vec<Held>,
    /// The mounted btrfs, by the numbers that /proc/locks knows them by; stat(2) shows those of their subvolumes.
    btrfs: Vec<Device>,
}

impl Table {
    fn read(tree: &Tree) -> Self {
        let text = tree.text("/proc/locks").unwrap_or_default();
        let mounts = tree.mounts();
        Self {
            held: text
                .lines()
                .filter_map(held)
                .filter(|held| held.holder.is_none_or(|pid| is_roots(tree, pid)))
                .collect(),
            btrfs: mounts
                .iter()
                .filter(|mount| mount.kind == "btrfs")
                .filter_map(|mount| device(&mount.device, 10))
                .collect(),
        }
    }

    fn has(&self, file: &Path) -> bool {
        let Ok(meta) = std::fs::metadata(file) else {
            return false;
        };
        let own = (rustix::fs::major(meta.dev()), rustix::fs::minor(meta.dev()));
        // A lock on another file of a btrfs that has the same number is a false alarm, but root's, and passes by itself.
        let is_on = |device: Device| device == own || self.btrfs.contains(&device);
        self.held
            .iter()
            .any(|held| held.inode == meta.ino() && is_on(held.device))
    }
}

/// A file that a process has locked for writing.
struct Held {
    device: Device,
    inode: u64,
    /// The process; `None` for a lock of an open file description, which has none, and is had only by who may write the file.
    holder: Option<u32>,
}

/// What is held by a line such as `1: POSIX  ADVISORY  WRITE 1234 08:02:131 0 EOF`; `None` for readers and those who wait.
fn held(line: &str) -> Option<Held> {
    let fields: Vec<_> = line.split_ascii_whitespace().collect();
    let [_, kind, _, "WRITE", holder, file, ..] = fields.as_slice() else {
        return None;
    };
    let (numbers, inode) = file.rsplit_once(':')?;
    Some(Held {
        device: device(numbers, 16)?,
        inode: inode.parse().ok()?,
        holder: match *kind {
            "OFDLCK" => None,
            _ => Some(holder.parse().ok()?),
        },
    })
}

/// `major:minor`, in digits of this base.
fn device(text: &str, base: u32) -> Option<Device> {
    let (major, minor) = text.split_once(':')?;
    Some((
        u32::from_str_radix(major, base).ok()?,
        u32::from_str_radix(minor, base).ok()?,
    ))
}

/// Whether a process runs and is wholly root's: one that a user has started with root's rights for a moment (su) is not.
fn is_roots(tree: &Tree, pid: u32) -> bool {
    let status = tree.text(format!("/proc/{pid}/status")).unwrap_or_default();
    let uids = status.lines().find_map(|line| line.strip_prefix("Uid:"));
    uids.is_some_and(|uids| {
        let mut real_and_effective = uids.split_ascii_whitespace().take(2);
        real_and_effective.next() == Some("0") && real_and_effective.next() == Some("0")
    })
}

fn processes(tree: &Tree) -> Vec<(&'static str, Sign)> {
    let pids = tree.names("/proc").into_iter().filter_map(|name| name.parse().ok());
    let named = |pid: u32| {
        let name = tree.line(format!("/proc/{pid}/comm"))?;
        let known = PROCESSES.into_iter().find(|known| *known == name)?;
        is_roots(tree, pid).then_some((known, Sign::Process(pid)))
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

    const ROOTS: &str = "Name:\tx\nUid:\t0\t0\t0\t0\n";

    /// A tree in which the process 812 is root's.
    fn files(list: &[(&str, &str)]) -> Files {
        let files = Files::new(list);
        files.write("/proc/812/status", ROOTS.as_bytes());
        files
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
                let files = files(&[(path, "")]);
                assert_eq!(check(&files.tree()), [], "{path} alone is no sign");
                files.write("/proc/locks", line(&files, path, kind).as_bytes());
                assert_eq!(check(&files.tree()), [refused(program, Sign::Locked(path))]);
            }
        }
    }

    #[test]
    fn who_reads_or_waits_is_no_sign() {
        let (lock, reader) = ("/var/lib/dpkg/lock", "/var/lib/rpm/.rpm.lock");
        let files = files(&[(lock, ""), (reader, "")]);
        let locks = line(&files, lock, "-> POSIX  ADVISORY  WRITE") + &line(&files, reader, "POSIX  ADVISORY  READ ");
        files.write("/proc/locks", locks.as_bytes());
        assert_eq!(check(&files.tree()), []);
    }

    #[test]
    fn a_lock_on_a_file_of_another_file_system_counts_only_if_that_is_a_btrfs() {
        let found = |mounted: &str, path: &str| {
            let files = files(&[(path, ""), ("/proc/self/mountinfo", mounted)]);
            let inode = std::fs::metadata(files.tree().path(path)).unwrap().ino();
            let locks = format!("1: POSIX  ADVISORY  WRITE 812 fe:1f:{inode} 0 EOF\n");
            files.write("/proc/locks", locks.as_bytes());
            check(&files.tree()).len()
        };
        for path in ["/var/lib/dpkg/lock", "/run/unattended-upgrades.lock"] {
            assert_eq!(found("", path), 0, "{path}");
            assert_eq!(found("22 1 254:31 / / rw - ext4 /dev/sda2 rw\n", path), 0, "{path}");
        }
        let btrfs = "22 1 254:31 /@ / rw shared:1 - btrfs /dev/sda2 rw\n";
        assert_eq!(found(btrfs, "/var/lib/dpkg/lock"), 1);
    }

    #[test]
    fn no_user_but_root_can_keep_the_laptop_here() {
        let lock = "/var/lib/rpm/.rpm.lock";
        let numbers = NUMBERS.map(|(_, file)| (file, "812\n"));
        for (uids, expected) in [
            ("0\t0\t0\t0", 2 + NUMBERS.len()),
            ("1000\t1000\t1000\t1000", 0),
            // What su is while it asks for the password.
            ("1000\t0\t0\t0", 0),
            ("0\t1000\t0\t1000", 0),
            ("", 0),
        ] {
            let files = Files::new(&[(lock, ""), ("/proc/812/comm", "emerge\n")]);
            numbers.iter().for_each(|(file, pid)| files.write(file, pid.as_bytes()));
            files.write("/proc/812/status", format!("Name:\temerge\nUid:\t{uids}\n").as_bytes());
            let locks = line(&files, lock, "FLOCK  ADVISORY  WRITE");
            files.write("/proc/locks", locks.as_bytes());
            assert_eq!(check(&files.tree()).len(), expected, "{uids:?}");
        }
    }

    #[test]
    fn an_unknown_holder_is_no_sign_but_for_a_lock_of_an_open_file_which_names_none() {
        let path = "/var/lib/dpkg/lock";
        let files = Files::new(&[(path, "")]);
        for (kind, expected) in [("OFDLCK ADVISORY  WRITE", 1), ("FLOCK  ADVISORY  WRITE", 0)] {
            let locks = line(&files, path, kind).replace(" 812 ", " -1 ");
            files.write("/proc/locks", locks.as_bytes());
            assert_eq!(check(&files.tree()).len(), expected, "{kind}");
        }
        // Who took it has ended, and left it to a child.
        files.write("/proc/locks", line(&files, path, "FLOCK  ADVISORY  WRITE").as_bytes());
        assert_eq!(check(&files.tree()), []);
    }

    #[test]
    fn a_process_that_a_file_names_counts_while_it_runs() {
        for (program, file) in NUMBERS {
            let files = Files::new(&[(file, "4711\n")]);
            assert_eq!(check(&files.tree()), [], "it was killed");
            files.write("/proc/4711/status", ROOTS.as_bytes());
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
        for pid in [12, 13] {
            files.write(&format!("/proc/{pid}/status"), ROOTS.as_bytes());
        }
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
