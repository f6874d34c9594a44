//! Whether this system is itself the desktop of a session: its disk is then another machine's.

use super::Refusal;
use crate::tree::Tree;

pub(super) fn check(tree: &Tree) -> Option<Refusal> {
    let cmdline = tree.text("/proc/cmdline").unwrap_or_default();
    // The attacher's place in the payload's initrd: shared::handover::PROGRAM_PATH.
    if let Some(word) = cmdline
        .split_ascii_whitespace()
        .find(|word| word.starts_with("rdinit=/stiefel/"))
    {
        return Some(Refusal::OnALink {
            evidence: format!("{word} on its command line"),
        });
    }
    let root = tree.root_device()?;
    let disk = tree.disks_below(&root).into_iter().find(|disk| is_remote(tree, disk))?;
    Some(Refusal::OnALink {
        evidence: format!("/ is on {disk}"),
    })
}

/// Whether a disk is reached over a network.
fn is_remote(tree: &Tree, disk: &str) -> bool {
    if disk.starts_with("nbd") {
        return true;
    }
    let device = format!("/sys/class/block/{disk}/device");
    // With multipath, the disk hangs below a subsystem, whose controllers say how they are reached.
    let controllers = tree.names(&device).into_iter().filter(|name| name.starts_with("nvme"));
    let places = controllers.map(|name| format!("{device}/{name}/transport"));
    [format!("{device}/transport")]
        .into_iter()
        .chain(places)
        .filter_map(|path| tree.line(path))
        .any(|transport| matches!(transport.as_str(), "tcp" | "rdma" | "fc"))
}

#[cfg(test)]
mod tests {
    use super::super::tests::Files;
    use super::*;

    /// A root on LVM on LUKS on the second partition of `disk`.
    fn laptop(disk: &str) -> Files {
        let part = format!("{disk}p2");
        let files = Files::new(&[
            ("/proc/cmdline", "root=/dev/mapper/vg-root"),
            (
                "/proc/self/mountinfo",
                "22 1 253:1 / / rw - ext4 /dev/mapper/vg-root rw\n",
            ),
            ("/sys/class/block/dm-1/slaves/dm-0/x", ""),
            (&format!("/sys/class/block/dm-0/slaves/{part}/x"), ""),
            (&format!("/sys/devices/bus/{disk}/{part}/partition"), "2\n"),
        ]);
        files.link("../dm-1", "/dev/mapper/vg-root");
        files.link(
            &format!("../../devices/bus/{disk}"),
            &format!("/sys/class/block/{disk}"),
        );
        files.link(
            &format!("../../devices/bus/{disk}/{part}"),
            &format!("/sys/class/block/{part}"),
        );
        files
    }

    #[test]
    fn a_root_on_nbd_is_seen_through_lvm_and_luks() {
        assert_eq!(
            check(&laptop("nbd0").tree()),
            Some(Refusal::OnALink {
                evidence: "/ is on nbd0".into()
            })
        );
    }

    #[test]
    fn nvme_counts_only_over_a_network() {
        let files = laptop("nvme0n1");
        assert_eq!(check(&files.tree()), None);
        files.write("/sys/devices/bus/nvme0n1/device/transport", b"pcie\n");
        assert_eq!(check(&files.tree()), None);
        files.write("/sys/devices/bus/nvme0n1/device/nvme0/transport", b"tcp\n");
        assert_eq!(
            check(&files.tree()),
            Some(Refusal::OnALink {
                evidence: "/ is on nvme0n1".into()
            })
        );
    }

    #[test]
    fn the_attachers_mark_on_the_command_line_is_enough() {
        let files = Files::new(&[("/proc/cmdline", "root=UUID=1 rdinit=/stiefel/stiefel noresume\n")]);
        assert!(check(&files.tree()).is_some());
    }
}
