//! Whether software is being installed: a kernel that is half there must not be booted elsewhere.
//!
//! Not every package manager takes an inhibitor, but each has a lock. Who holds one is read in /proc/locks (proc(5)), so
//! that nothing is taken away from it, not even for a moment.

use std::os::unix::fs::MetadataExt;

use super::Refusal;
use crate::tree::Tree;

/// Lock files that exist always; what counts is who holds them for writing.
const LOCKS: [(&str, &str); 4] = [
    ("apt", "/var/lib/dpkg/lock-frontend"),
    ("dpkg", "/var/lib/dpkg/lock"),
    ("rpm", "/usr/lib/sysimage/rpm/.rpm.lock"),
    ("rpm", "/var/lib/rpm/.rpm.lock"),
];
/// A lock file that exists only while pacman works.
const PACMAN: &str = "/var/lib/pacman/db.lck";

pub(super) fn check(tree: &Tree) -> Vec<Refusal> {
    let held = tree.text("/proc/locks").unwrap_or_default();
    let held: Vec<_> = held.lines().filter_map(written_inode).collect();
    let is_held = |path: &str| {
        // Not compared by device: btrfs shows another number here than stat does. A false alarm passes by itself.
        std::fs::metadata(tree.path(path)).is_ok_and(|meta| held.contains(&meta.ino()))
    };
    let mut refusals: Vec<_> = LOCKS
        .iter()
        .filter(|(_, lock)| is_held(lock))
        .map(|(program, lock)| Refusal::PackageManager { program, lock })
        .collect();
    if tree.path(PACMAN).exists() {
        refusals.push(Refusal::PackageManager {
            program: "pacman",
            lock: PACMAN,
        });
    }
    refusals
}

/// The inode in a line such as `1: POSIX  ADVISORY  WRITE 1234 08:02:131 0 EOF`; `None` for readers and those who wait.
fn written_inode(line: &str) -> Option<u64> {
    let fields: Vec<_> = line.split_ascii_whitespace().collect();
    match fields.as_slice() {
        [_, _, _, "WRITE", _, file, ..] => file.rsplit(':').next()?.parse().ok(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::Files;
    use super::*;

    #[test]
    fn a_held_write_lock_is_found_and_a_waiting_or_reading_one_is_not() {
        let files = Files::new(&[
            ("/var/lib/dpkg/lock-frontend", ""),
            ("/var/lib/dpkg/lock", ""),
            ("/var/lib/rpm/.rpm.lock", ""),
        ]);
        let inode = |path: &str| std::fs::metadata(files.tree().path(path)).unwrap().ino();
        let locks = format!(
            "1: POSIX  ADVISORY  WRITE 812 08:02:{} 0 EOF\n1: -> POSIX  ADVISORY  WRITE 813 08:02:{} 0 EOF\n2: POSIX  ADVISORY  READ 9 08:02:{} 0 EOF\n",
            inode("/var/lib/dpkg/lock-frontend"),
            inode("/var/lib/dpkg/lock"),
            inode("/var/lib/rpm/.rpm.lock"),
        );
        files.write("/proc/locks", locks.as_bytes());
        let expected = Refusal::PackageManager {
            program: "apt",
            lock: "/var/lib/dpkg/lock-frontend",
        };
        assert_eq!(check(&files.tree()), [expected]);
    }

    #[test]
    fn pacmans_lock_file_is_enough() {
        assert_eq!(check(&Files::new(&[(PACMAN, "")]).tree()).len(), 1);
        assert_eq!(check(&Files::new(&[]).tree()), []);
    }
}
