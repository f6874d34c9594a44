//! The main job with a real Debian: triggered by the plug, or by the stick's wake.

use std::time::Duration;

use stiefel_tests::disk::{ExtraFile, PASSWORD};
use stiefel_tests::kit::CONSOLE;
use stiefel_tests::scenario::{self, Failure, Machines, Milestones, patience};
use stiefel_tests::{Vm, VmBuilder, Wire, re};

use crate::runner::Bench;
use crate::setup;

/// Writes a file with random content on the desktop's root, and returns its checksum.
const WRITE: &str =
    "head -c 8000000 /dev/urandom > /root/written-on-the-desktop && sha256sum < /root/written-on-the-desktop";
const READ: &str = "sha256sum < /root/written-on-the-desktop";

fn machines(bench: &Bench) -> Result<Machines, Failure> {
    Machines::prepare(bench.kit, Wire::direct()?)
}

/// The cable is plugged into the running laptop; the desktop boots, writes, is powered off; the laptop comes home by
/// itself and finds what was written; its file system is clean. Prints how long what took.
pub(crate) fn plug(bench: &Bench) -> Result<(), Failure> {
    let machines = machines(bench)?;
    let mut milestones = Milestones::new(false);
    let laptop = scenario::laptop_at_home(&machines.disk, None, false)?;
    milestones.reached("the same disk booted locally: login prompt", laptop.uptime());
    milestones.reached(
        "laptop: from the plug to serving its disk",
        scenario::plug_and_serve(&laptop, &machines.wire.a())?,
    );
    let desktop = scenario::desktop(&machines.stick, &machines.wire.b(), false)?;
    scenario::desktop_boots(&desktop, &mut milestones)?;
    bench.note(&milestones.table());

    let written = use_desktop(&desktop)?;
    desktop.power_off(patience::SHUTDOWN)?;
    ended_cleanly(&desktop)?;
    drop(desktop);
    laptop
        .serial()
        .expect("the disk is flushed and closed", patience::SHUTDOWN)?;
    laptop
        .serial()
        .expect("going back to the laptop's own system", patience::SHUTDOWN)?;
    laptop.wait_reboot(patience::SHUTDOWN)?;
    laptop.unplug_usb_nic("cable")?;
    laptop.login("root", PASSWORD, patience::LOGIN)?;
    let read = laptop.run_ok(READ)?;
    if read != written {
        return Err(format!("the laptop reads {read:?}, the desktop wrote {written:?}").into());
    }
    laptop.power_off(patience::SHUTDOWN)?;
    Ok(machines.disk.fsck_clean()?)
}

/// The desktop's last program found nothing in its way.
pub(crate) fn ended_cleanly(desktop: &Vm) -> Result<(), Failure> {
    if desktop.serial().said("this was not a clean end")? {
        return Err("the desktop did not end cleanly; its console says what was in the way".into());
    }
    Ok(())
}

/// Works on the desktop as its user would: root is the laptop's disk; the checksum of what was written.
fn use_desktop(desktop: &Vm) -> Result<String, Failure> {
    desktop.login("root", PASSWORD, Duration::from_secs(30))?;
    let root = desktop.run_ok("findmnt --noheadings --output SOURCE /")?;
    if !root.contains("/dev/nvme0n1") {
        return Err(format!("the desktop's root is {root:?}, not the laptop's disk by NVMe").into());
    }
    for (command, why) in [
        (
            "test -x /run/initramfs/shutdown",
            "the shutdown program is not in place",
        ),
        (
            "test -f /run/NetworkManager/conf.d/95-stiefel-session.conf",
            "the guards are not in place",
        ),
        (
            "test -e /dev/disk/by-id/virtio-stiefel-laptop",
            "the disk has not the by-id link it has on the laptop",
        ),
        (
            "systemctl is-active stiefel-running.service && test -d /run/stiefel-running",
            "a shutdown would not be seen",
        ),
        (
            "stiefel status | grep -q '^connection *there' && stiefel status --json | grep -q nvme-tcp",
            "stiefel status does not say how the session is",
        ),
        (
            "systemctl show --property LoadState --value dracut-shutdown.service | grep -qE '^(masked|not-found)$'",
            "another shutdown program could take the place of ours",
        ),
        (
            "at=$(sed 's/traddr=\\([^,]*\\),.*/\\1/' /sys/class/nvme/nvme0/address); \
             (exec 3<>/dev/tcp/$at/4420) && ! setpriv --reuid=65534 bash -c \"exec 3<>/dev/tcp/$at/4420\"",
            "root cannot reach the laptop's disk by itself, or other users can",
        ),
        (
            "! setpriv --reuid=65534 cat /sys/class/nvme/nvme0/hostnqn",
            "other users can read the session's names",
        ),
        ("! test -e /stiefel", "our folder is in the installed system"),
        (
            "! systemctl is-active --quiet stiefel-autokexec.service",
            "the laptop's service runs on the desktop",
        ),
    ] {
        if desktop.run(command)?.status != 0 {
            return Err(why.into());
        }
    }
    Ok(desktop.run_ok_within(WRITE, Duration::from_secs(60))?)
}

/// Nothing is plugged: the laptop's NIC is there from the start, the desktop's stick wakes it. A key at the laptop ends it: the
/// desktop powers off in order. What it wrote is on the disk before the laptop's system has touched it again.
pub(crate) fn wake(bench: &Bench) -> Result<(), Failure> {
    let machines = machines(bench)?;
    let laptop = scenario::laptop_at_home(&machines.disk, Some(&machines.wire.a()), false)?;
    let mut milestones = Milestones::new(false);
    let desktop = scenario::desktop(&machines.stick, &machines.wire.b(), false)?;
    desktop
        .serial()
        .expect("its own system runs; waking it", patience::STICK)?;
    scenario::wait_until_serving(&laptop)?;
    scenario::desktop_boots_after_asking(&desktop, &mut milestones)?;
    bench.note(&milestones.table());
    desktop.login("root", PASSWORD, Duration::from_secs(30))?;
    desktop.run_ok("echo kept > /root/written-on-the-desktop")?;
    laptop.serial().send("p")?;
    laptop
        .serial()
        .expect("the desktop is asked to power off", Duration::from_secs(5))?;
    desktop.wait_shutdown(patience::SHUTDOWN)?;
    ended_cleanly(&desktop)?;
    laptop.wait_reboot(patience::SHUTDOWN)?;
    drop(laptop);
    machines.disk.fsck_clean()?;
    let kept = machines.disk.read_file("/root/written-on-the-desktop")?;
    if kept != b"kept\n" {
        return Err("what was written on the desktop is not on the laptop's disk".into());
    }
    Ok(())
}

/// The attach step is in the laptop's own initrd, by the hook that its user has copied: the desktop gets no modules besides, and boots
/// all the same; and so does the laptop by itself.
pub(crate) fn baked(bench: &Bench) -> Result<(), Failure> {
    let hook = include_str!("../../../../hooks/initramfs-tools/stiefel");
    let hook = ExtraFile::new(hook, "/etc/initramfs-tools/hooks/stiefel", 0o755);
    let machines = Machines::with(bench.kit, Wire::direct()?, "", vec![hook])?;
    let laptop = scenario::laptop_at_home(&machines.disk, None, false)?;
    laptop.run_ok_within("update-initramfs -u && sync", setup::REBUILD)?;
    laptop.run_ok_within(
        "lsinitramfs /boot/initrd.img-$(uname -r) | grep -q stiefel/modules",
        setup::BUILD,
    )?;
    scenario::plug_and_serve(&laptop, &machines.wire.a())?;
    let desktop = scenario::desktop(&machines.stick, &machines.wire.b(), false)?;
    scenario::desktop_boots(&desktop, &mut Milestones::new(false))?;
    // Of an archive with nothing in it there is no half.
    for (part, sent) in [("initrd", true), ("modules", false)] {
        if desktop.serial().said(re(&format!(r"stiefel: {part} +\[#+\.")))? != sent {
            return Err(format!("that {part} are sent to the desktop should be {sent}").into());
        }
    }
    desktop.login("root", PASSWORD, Duration::from_secs(30))?;
    desktop.run_ok("findmnt --noheadings --output SOURCE / | grep /dev/nvme0n1")?;
    desktop.power_off(patience::SHUTDOWN)?;
    ended_cleanly(&desktop)?;
    drop(desktop);
    laptop.wait_reboot(patience::SHUTDOWN)?;
    drop(laptop);
    machines.disk.fsck_clean()?;
    let laptop = VmBuilder::new("laptop").boot(machines.disk.boot_its_own_initrd(&CONSOLE)?);
    let laptop = scenario::laptop_with_its_files(&machines.disk, laptop)?;
    laptop.power_off(patience::SHUTDOWN)?;
    Ok(machines.disk.fsck_clean()?)
}
