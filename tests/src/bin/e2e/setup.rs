//! The laptop is set up as its user would do it: the package, `stiefel init`, `stiefel install`, a stick written on the laptop
//! itself; after a session everything is taken out again, and no trace is left.

use std::path::{Path, PathBuf};
use std::time::Duration;

use stiefel_tests::disk::{ExtraFile, Initrd, LaptopDisk, Layout, System};
use stiefel_tests::kit::{CONSOLE, DEDICATED_MAC};
use stiefel_tests::scenario::{self, Failure, Milestones, patience};
use stiefel_tests::{Vm, VmBuilder, Wire};

use crate::journey;
use crate::runner::Bench;
use crate::systems;

/// Where the package lies on the laptop.
pub(crate) const PACKAGE: &str = "/root/stiefel.deb";
/// A stick's size, in bytes.
const STICK: u64 = 256 << 20;
/// For what works for a while: a ramdisk or an initrd is built.
pub(crate) const BUILD: Duration = Duration::from_secs(180);
/// For an initrd that is built on the desktop: hundreds of small files come over the link.
pub(crate) const REBUILD: Duration = Duration::from_secs(400);

/// Prints all files of the laptop; see there.
pub(crate) const TREE_SCRIPT: &str = include_str!("tree.sh");
pub(crate) const TREE: &str = "/root/tree/list";

/// Which laptop, and what makes an initrd there that would know only the machine that it was made on.
struct Laptop {
    system: System,
    /// Asks for that.
    narrow: &'static str,
    /// Makes it, which takes long over the link.
    make: Option<&'static str>,
}

/// Debian 12 with its own initrd; nothing is made on the desktop.
pub(crate) fn short(bench: &Bench) -> Result<(), Failure> {
    let laptop = Laptop {
        make: None,
        ..initramfs_tools(System::default())
    };
    whole(bench, &laptop)
}

/// Debian 12, or another release, with Debian's own initrd.
pub(crate) fn plain(bench: &Bench, suite: &str) -> Result<(), Failure> {
    whole(bench, &initramfs_tools(System::default().suite(suite)))
}

/// LVM in LUKS, with Debian's own initrd.
pub(crate) fn luks_and_lvm(bench: &Bench) -> Result<(), Failure> {
    let system = System::new(Layout::LuksLvm, Initrd::InitramfsTools);
    whole(bench, &initramfs_tools(system))
}

/// Subvolumes of a btrfs, by dracut.
pub(crate) fn btrfs(bench: &Bench) -> Result<(), Failure> {
    whole(bench, &dracut(Layout::Btrfs))
}

/// An xfs with a /boot of its own, by dracut.
pub(crate) fn xfs(bench: &Bench) -> Result<(), Failure> {
    whole(bench, &dracut(Layout::Xfs))
}

fn initramfs_tools(system: System) -> Laptop {
    Laptop {
        system,
        narrow: "sed -i s/^MODULES=.*/MODULES=dep/ /etc/initramfs-tools/initramfs.conf",
        make: Some("update-initramfs -u"),
    }
}

fn dracut(layout: Layout) -> Laptop {
    Laptop {
        system: systems::dracut(layout),
        narrow: "echo 'hostonly=\"yes\"' >/etc/dracut.conf.d/50-narrow.conf",
        make: Some("dracut --force /boot/initrd.img-$(uname -r) $(uname -r)"),
    }
}

fn whole(bench: &Bench, laptop: &Laptop) -> Result<(), Failure> {
    let dir = tempfile::tempdir_in(bench.kit.dir())?;
    let package = bench.kit.package(&dir.path().join("package"))?;
    let files = vec![
        ExtraFile::new(package.as_path(), PACKAGE, 0o644),
        ExtraFile::new(TREE_SCRIPT, TREE, 0o755),
    ];
    let disk = bench
        .kit
        .plain_disk_of(&laptop.system, &dir.path().join("laptop.img"), files)?;
    let blank = dir.path().join("blank.img");
    std::fs::File::create(&blank)?.set_len(STICK)?;
    let wire = Wire::direct()?;
    let machine = VmBuilder::new("laptop").boot(disk.boot(&CONSOLE)).stick(&blank);
    let home = scenario::laptop_with_its_files(&disk, machine)?;
    home.run_ok(laptop.narrow)?;
    home.run_ok_within(&format!("{TREE} >/root/tree/before"), BUILD)?;
    home.plug_usb_nic("cable", &wire.a(), DEDICATED_MAC)?;
    set_up(bench, &home)?;
    let stick = take_stick(&home, &blank, dir.path())?;
    home.unplug_usb_nic("cable")?;
    scenario::plug_and_serve(&home, &wire.a())?;

    let desktop = scenario::desktop(&stick, &wire.b(), false)?;
    scenario::desktop_logs_in(&desktop, &disk, &mut Milestones::new(false))?;
    desktop.run_ok("findmnt --noheadings / && echo kept >/root/tree/written")?;
    firmware_is_read_only(&desktop)?;
    if let Some(make) = laptop.make {
        // An initrd that is made here knows the laptop's disk all the same.
        desktop.run_ok_within(make, REBUILD)?;
    }
    desktop.power_off(patience::SHUTDOWN)?;
    journey::ended_cleanly(&desktop)?;
    drop(desktop);
    home.wait_reboot(patience::SHUTDOWN)?;
    home.unplug_usb_nic("cable")?;
    scenario::login(&home, &disk)?;
    home.run_ok("grep kept /root/tree/written")?;
    home.power_off(patience::SHUTDOWN)?;
    drop(home);
    disk.fsck_clean()?;
    take_out(laptop, &disk)
}

/// What the user types. The adapter is plugged in.
fn set_up(bench: &Bench, home: &Vm) -> Result<(), Failure> {
    home.run_ok(&format!("dpkg -i {PACKAGE}"))?;
    let said = home.run_ok_within("stiefel init --yes", BUILD)?;
    for expected in ["is the adapter to dedicate", "write    /etc/stiefel/config.yaml"] {
        if !said.contains(expected) {
            return Err(format!("`stiefel init` does not say {expected:?} but:\n{said}").into());
        }
    }
    home.run_ok_within("stiefel install --yes", BUILD)?;
    let again = home.run_ok_within("stiefel install --yes", BUILD)?;
    if !again.contains("everything is in place already") {
        return Err(format!("the second `stiefel install` says:\n{again}").into());
    }
    // Warnings are not failures.
    let said = home.run_within("stiefel doctor", BUILD)?;
    bench.note(&format!(
        "`stiefel doctor`: {}\n",
        said.output.lines().last().unwrap_or_default()
    ));
    if said.status != 0 {
        return Err(format!("`stiefel doctor` finds after the installation:\n{}", said.output).into());
    }
    home.run_ok("systemctl is-active stiefel-autokexec.service")?;
    Ok(())
}

/// The desktop's firmware variables can be read and not written, also where they are mounted once more.
fn firmware_is_read_only(desktop: &Vm) -> Result<(), Failure> {
    desktop.run_ok("mkdir /run/again && mount -t efivarfs efivarfs /run/again")?;
    for place in ["/sys/firmware/efi/efivars", "/run/again"] {
        // The keeper is told of a mount after it is there.
        let told = format!("timeout 10 sh -c 'until findmnt -no OPTIONS {place} | grep -qw ro; do sleep 0.1; done'");
        desktop.run_ok(&told)?;
        desktop.run_ok(&format!("ls {place} | grep -q BootOrder"))?;
        let name = format!("{place}/Stiefel-4d1ede05-38c7-4a6a-9cc6-4bcca8b38c14");
        let said = desktop.run(&format!("printf '\\7\\0\\0\\0x' >{name}"))?;
        if said.status == 0 || !said.output.contains("ead-only") {
            return Err(format!(
                "a variable of the desktop's firmware was written in {place}: {}",
                said.output
            )
            .into());
        }
    }
    desktop.run_ok("umount /run/again")?;
    Ok(())
}

/// Writes the stick on the laptop; the image, as what is then put into the desktop.
fn take_stick(home: &Vm, image: &Path, dir: &Path) -> Result<PathBuf, Failure> {
    home.run_ok_within("stiefel stick --yes /dev/disk/by-id/usb-*stick0* && sync", BUILD)?;
    let copy = dir.join("stick.img");
    std::fs::copy(image, &copy)?;
    Ok(copy)
}

/// The laptop boots the initrd that was made on the desktop; then everything is taken out, and is as it was.
fn take_out(laptop: &Laptop, disk: &LaptopDisk) -> Result<(), Failure> {
    let boot = match (laptop.make, laptop.system.layout) {
        // It cannot be read from outside.
        (None, _) | (_, Layout::Btrfs) => disk.boot(&CONSOLE),
        (Some(_), _) => disk.boot_its_own_initrd(&CONSOLE)?,
    };
    let home = scenario::laptop_with_its_files(disk, VmBuilder::new("laptop").boot(boot))?;
    home.run_ok("systemctl is-active stiefel-autokexec.service")?;
    home.run_ok_within("stiefel uninstall --yes --purge", BUILD)?;
    home.run_ok("dpkg --purge stiefel")?;
    home.run_ok_within(&format!("{TREE} >/root/tree/after"), BUILD)?;
    // The initrd is what was made anew on the desktop.
    let said = home
        .run("diff /root/tree/before /root/tree/after | grep '^[<>]' | grep -vE ' /boot/initrd.img-'")?
        .output;
    if !said.is_empty() {
        return Err(format!("after the removal the laptop is not as it was before:\n{said}").into());
    }
    home.power_off(patience::SHUTDOWN)?;
    Ok(())
}
