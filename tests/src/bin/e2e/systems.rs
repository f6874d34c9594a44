//! Other laptops than the plain one: another initrd, another network manager, other file systems, an encrypted disk.

use std::time::Duration;

use stiefel_tests::Vm;
use stiefel_tests::disk::{Initrd, Layout, System};
use stiefel_tests::scenario::Failure;

use crate::endure::{Session, machines_of};
use crate::link::{WAYS, Way};
use crate::runner::Bench;

/// What the load leaves on the disk.
const SUMS: &str = "cd /root/load && sha256sum file-*";

/// Succeeds if /boot is the disk's first partition.
const BOOT: &str = "findmnt --noheadings --output SOURCE /boot | grep -x /dev/nvme0n1p1";

/// What the kernel says of a file system that was not unmounted: ext4, xfs, btrfs.
const REPAIRS: &str = "recovery (required|complete)|orphan cleanup|(starting|ending) recovery|log replay";

/// One installed system for all layouts: dracut's initrd, and NetworkManager.
pub(crate) fn dracut(layout: Layout) -> System {
    System::new(layout, Initrd::Dracut).package("network-manager")
}

/// NetworkManager runs, and is told to let go of everything, in all ways that a user has: the root stays. dracut has made the
/// initrd, and would bring a shutdown program of its own.
pub(crate) fn network_manager(bench: &Bench, way: Way) -> Result<(), Failure> {
    let system = dracut(Layout::Ext4);
    let session = Session::begin(machines_of(bench, &system, way, "", Vec::new())?)?;
    let desktop = &session.desktop;
    desktop.run_ok("systemctl is-active --wait NetworkManager && nm-online -q -s -t 60")?;
    let devices = desktop.run_ok("nmcli --colors no --terse --fields DEVICE,STATE device")?;
    if let Some(managed) = devices
        .lines()
        .find(|line| line.starts_with("stiefel") && !line.ends_with(":unmanaged"))
    {
        return Err(format!("NetworkManager does not leave the link alone: {managed}").into());
    }
    for (command, when) in [
        ("nmcli networking off", "after `nmcli networking off`"),
        (
            "for device in $(nmcli --terse --fields DEVICE device); do nmcli --wait 5 device disconnect $device; done; true",
            "after `nmcli device disconnect` of everything",
        ),
        ("nmcli networking on", "after `nmcli networking on`"),
        (
            "for device in $(nmcli --terse --fields DEVICE device); do nmcli --wait 5 device disconnect $device; done; true",
            "after `nmcli device disconnect` of everything, with networking on",
        ),
        (
            "systemctl restart NetworkManager",
            "after NetworkManager was started anew",
        ),
    ] {
        desktop.run_ok_within(command, Duration::from_secs(60))?;
        session.load_goes_on(when)?;
    }
    dracut_made_it(desktop)?;
    session.load_is_right()?;
    session.end()
}

/// dracut's own shutdown program is installed, but does not take the place of ours.
fn dracut_made_it(desktop: &Vm) -> Result<(), Failure> {
    for (command, why) in [
        (
            "test -e /lib/systemd/system/dracut-shutdown.service",
            "dracut has no shutdown program here",
        ),
        (
            "systemctl show --property LoadState --value dracut-shutdown.service | grep -qx masked",
            "dracut's shutdown program could take the place of ours",
        ),
    ] {
        if desktop.run(command)?.status != 0 {
            return Err(why.into());
        }
    }
    Ok(())
}

/// LVM in LUKS: the payload's own initrd asks for the passphrase, on the desktop as on the laptop; at the power-off all
/// volumes are taken down; swap space on the shared disk is not used.
pub(crate) fn luks_and_lvm(bench: &Bench) -> Result<(), Failure> {
    let system = System::new(Layout::LuksLvm, Initrd::InitramfsTools);
    journey(bench, &system, "laptop--vg-root ext4", |desktop| {
        for (command, why) in [
            (
                "lsblk --noheadings --list --inverse --output NAME,TYPE /dev/mapper/laptop--vg-root | grep -q ' crypt$'",
                "the root does not stand on LUKS",
            ),
            (
                "test -e /dev/mapper/laptop--vg-swap_1",
                "there is no volume for swap space",
            ),
            (
                "test $(wc -l </proc/swaps) = 1",
                "swap space on the laptop's disk is in use",
            ),
            (BOOT, "/boot is not there"),
        ] {
            if desktop.run(command)?.status != 0 {
                return Err(why.into());
            }
        }
        Ok(())
    })
}

/// Subvolumes of a btrfs, with an initrd by dracut.
pub(crate) fn btrfs(bench: &Bench) -> Result<(), Failure> {
    let system = dracut(Layout::Btrfs);
    journey(bench, &system, "nvme0n1p1[/@] btrfs", |desktop| {
        desktop.run_ok("findmnt --noheadings --output SOURCE /home | grep '@home' && touch /home/written")?;
        dracut_made_it(desktop)
    })
}

/// An xfs with a /boot of its own, with an initrd by dracut.
pub(crate) fn xfs(bench: &Bench) -> Result<(), Failure> {
    let system = dracut(Layout::Xfs);
    journey(bench, &system, "nvme0n1p2 xfs", |desktop| {
        desktop.run_ok(BOOT)?;
        dracut_made_it(desktop)
    })
}

/// Plug, login, a load, power-off; the laptop comes home without having to repair anything, and has what was written.
fn journey(
    bench: &Bench,
    system: &System,
    root: &str,
    look: impl FnOnce(&Vm) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let session = Session::begin(machines_of(bench, system, WAYS[0], "", Vec::new())?)?;
    let found = session
        .desktop
        .run_ok("findmnt --noheadings --output SOURCE,FSTYPE /")?;
    if !found.split_whitespace().collect::<Vec<_>>().join(" ").ends_with(root) {
        return Err(format!("the desktop's root is {found:?}, not {root:?}").into());
    }
    look(&session.desktop)?;
    session.load_is_right()?;
    let written = session.desktop.run_ok(SUMS)?;
    session.end_with(|laptop| {
        let read = laptop.run_ok(SUMS)?;
        if read != written {
            return Err(format!("the laptop reads {read:?}, the desktop wrote {written:?}").into());
        }
        let repaired = laptop.run(&format!("dmesg | grep -iE '{REPAIRS}'"))?.output;
        if !repaired.is_empty() {
            return Err(format!("the laptop had to repair: {repaired}").into());
        }
        Ok(())
    })
}
