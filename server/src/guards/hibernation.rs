//! Whether a hibernated system lies on a disk.
//!
//! It leaves a signature in its swap space ([`superblock`]), and systemd the place in an EFI variable. All block devices are
//! looked at, for a second system on the same disk may be the one that sleeps. Asked again by the ramdisk before each
//! session (`role`), of the disk alone.

use std::fs::File;
use std::os::unix::fs::FileExt;

use stiefel_shared::superblock;

use super::Refusal;
use crate::tree::Tree;

/// systemd.hibernate-resume: the variable and its vendor.
pub(crate) const VARIABLE: &str = "/sys/firmware/efi/efivars/HibernateLocation-8cf2644b-4b0b-428f-9387-6d876050dc67";
/// Devices that hold no swap space of their own.
const PASSED_OVER: [&str; 5] = ["loop", "ram", "zram", "sr", "fd"];

pub(crate) fn check(tree: &Tree) -> Vec<Refusal> {
    let devices = tree
        .names("/sys/class/block")
        .into_iter()
        .filter(|name| !PASSED_OVER.iter().any(|prefix| name.starts_with(prefix)))
        .map(|name| format!("/dev/{}", name.replace('!', "/")));
    let mut places: Vec<_> = devices
        .chain(swap_files(tree))
        .filter(|path| holds_image(tree, path))
        .collect();
    if tree.path(VARIABLE).exists() {
        places.push("the place named by the EFI variable HibernateLocation".to_owned());
    }
    places.into_iter().map(|place| Refusal::Hibernated { place }).collect()
}

/// Swap files in use and in fstab.
fn swap_files(tree: &Tree) -> Vec<String> {
    let swaps = tree.text("/proc/swaps").unwrap_or_default();
    let fstab = tree.text("/etc/fstab").unwrap_or_default();
    let used = swaps
        .lines()
        .skip(1)
        .filter_map(|line| line.split_ascii_whitespace().next());
    let configured = fstab.lines().filter_map(|line| {
        let mut fields = line.split_ascii_whitespace();
        let what = fields.next()?;
        (fields.nth(1) == Some("swap")).then_some(what)
    });
    let mut files: Vec<_> = used
        .chain(configured)
        .filter(|path| path.starts_with('/') && !path.starts_with("/dev/"))
        .map(str::to_owned)
        .collect();
    files.sort();
    files.dedup();
    files
}

/// What cannot be read (no medium, gone) holds no image that could be resumed.
fn holds_image(tree: &Tree, path: &str) -> bool {
    File::open(tree.path(path)).is_ok_and(|file| {
        let mut read = |offset: u64, bytes: &mut [u8]| file.read_exact_at(bytes, offset);
        // A block device does not tell its size like a file; reading past its end is refused anyway.
        superblock::holds_memory_image(&mut read, u64::MAX)
    })
}

#[cfg(test)]
mod tests {
    use super::super::tests::Files;
    use super::*;

    fn swap(signature: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; 4096 - 10];
        bytes.extend_from_slice(signature);
        bytes.resize(8192, 0);
        bytes
    }

    fn places(files: &Files) -> Vec<String> {
        check(&files.tree())
            .into_iter()
            .map(|refusal| match refusal {
                Refusal::Hibernated { place } => place,
                other => panic!("{other}"),
            })
            .collect()
    }

    #[test]
    fn an_image_on_any_partition_is_found_and_plain_swap_is_not() {
        let files = Files::new(&[
            ("/sys/class/block/sda2/partition", "2"),
            ("/sys/class/block/sda3/partition", "3"),
            ("/sys/class/block/loop0/size", "3"),
            ("/sys/class/block/sr0/size", "3"),
        ]);
        files.write("/dev/sda2", &swap(b"SWAPSPACE2"));
        files.write("/dev/sda3", &swap(b"S1SUSPEND\0"));
        files.write("/dev/loop0", &swap(b"S1SUSPEND\0"));
        assert_eq!(places(&files), ["/dev/sda3"]);
    }

    #[test]
    fn swap_files_in_use_and_in_fstab_are_looked_at() {
        let files = Files::new(&[
            (
                "/proc/swaps",
                "Filename Type Size Used Priority\n/swapfile file 1 0 -2\n/dev/sda2 partition 1 0 -3\n",
            ),
            (
                "/etc/fstab",
                "# x\nUUID=1 / ext4 rw 0 1\n/swap/b none swap sw 0 0\n/swapfile none swap sw 0 0\n",
            ),
        ]);
        files.write("/swapfile", &swap(b"ULSUSPEND\0"));
        files.write("/swap/b", &swap(b"LINHIB0001"));
        assert_eq!(places(&files), ["/swap/b", "/swapfile"]);
    }

    #[test]
    fn the_efi_variable_of_systemd_counts() {
        assert_eq!(places(&Files::new(&[(VARIABLE, "x")])).len(), 1);
    }
}
