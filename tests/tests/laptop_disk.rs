//! The harness proves itself: the laptop's disk boots, takes a command, goes off, and is clean.
//!
//! Slow (a full Debian), so only on demand: `cargo test -p stiefel-tests --test laptop_disk -- --ignored --nocapture`.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use stiefel_tests::disk::{BaseOptions, BaseSystem, ExtraFile, LaptopDisk, PASSWORD, ROOT_PARTUUID};
use stiefel_tests::{VmBuilder, Wire, re};

const LOGIN: Duration = Duration::from_secs(60);
const SOON: Duration = Duration::from_secs(20);
const OFF: Duration = Duration::from_secs(30);
const MAC: &str = "52:54:00:12:34:56";

const UNIT: &str = "[Service]\nType=oneshot\nExecStart=/bin/sh -c 'echo STIEFEL-UNIT-RAN > /dev/ttyS0'\n";

/// Prints how long the step took that ends now.
fn step(start: &mut Instant, what: &str) {
    eprintln!("{:6.1} s  {what}", start.elapsed().as_secs_f64());
    *start = Instant::now();
}

#[test]
#[ignore = "boots a full Debian"]
fn the_laptops_disk_boots_takes_commands_and_goes_off_clean() -> Result<()> {
    let mut clock = Instant::now();
    let base = BaseSystem::ensure(&BaseOptions::default())?;
    step(&mut clock, "installed system");
    let dir = tempfile::tempdir()?;
    let disk = LaptopDisk::builder(&base)
        .file(ExtraFile::new(UNIT, "/etc/systemd/system/hello.service", 0o644))
        .enable("hello.service", "multi-user.target")
        .build(&dir.path().join("laptop.img"))?;
    step(&mut clock, "disk image");
    disk.fsck_clean()?;
    ensure!(disk.read_file("/etc/hostname")? == b"laptop\n");

    let cable = Wire::direct()?;
    let laptop = VmBuilder::new("laptop")
        .boot(disk.boot(&[]))
        .disk(disk.drive())
        .start()?;
    step(&mut clock, &format!("QEMU started ({:?})", laptop.accel()));
    laptop.serial().expect("STIEFEL-UNIT-RAN", LOGIN)?;
    laptop.login("root", PASSWORD, LOGIN)?;
    step(&mut clock, "login");

    ensure!(laptop.run_ok("cat /proc/cmdline")?.contains("no_timer_check"));
    ensure!(laptop.run_ok("echo one! two; echo three")? == "one! two\nthree");
    ensure!(laptop.run("exit 7")?.status == 7);
    let partition = laptop.run_ok("readlink -f /dev/disk/by-partuuid/*")?;
    ensure!(partition == "/dev/vda1", "{partition}");
    ensure!(laptop.run_ok("ls /dev/disk/by-partuuid")? == ROOT_PARTUUID);
    ensure!(laptop.run_ok("ls /dev/disk/by-id")?.contains("virtio-stiefel-laptop"));
    laptop.run_ok("echo kept > /root/written")?;
    step(&mut clock, "commands");

    for round in 0..2 {
        laptop.plug_usb_nic("cable", &cable.a(), MAC)?;
        laptop.run_ok_within("until ip link | grep -q enx525400123456; do sleep 0.2; done", SOON)?;
        laptop.unplug_usb_nic("cable")?;
        laptop.run_ok_within("while ip link | grep -q enx525400123456; do sleep 0.2; done", SOON)?;
        step(&mut clock, &format!("NIC plugged and unplugged ({round})"));
    }

    laptop.power_off(OFF)?;
    step(&mut clock, "power-off");
    disk.fsck_clean()?;
    ensure!(disk.read_file("/root/written")? == b"kept\n");
    Ok(())
}

#[test]
#[ignore = "boots a full Debian"]
fn the_laptop_logs_in_by_itself_and_reboots() -> Result<()> {
    let mut clock = Instant::now();
    let base = BaseSystem::ensure(&BaseOptions::default())?;
    let dir = tempfile::tempdir()?;
    let disk = LaptopDisk::builder(&base)
        .autologin(true)
        .build(&dir.path().join("laptop.img"))?;
    let laptop = VmBuilder::new("laptop")
        .boot(disk.boot(&["quiet"]))
        .disk(disk.drive())
        .start()?;
    laptop.login("root", PASSWORD, LOGIN)?;
    step(&mut clock, "image and first login");
    laptop.serial().send_line("systemctl reboot")?;
    laptop.wait_reboot(OFF)?;
    step(&mut clock, "reboot");
    laptop.serial().expect(re("laptop login: root"), LOGIN)?;
    step(&mut clock, "second login");
    laptop.quit()?;
    // The plug was pulled: a file system that is mounted is not clean.
    ensure!(disk.fsck_clean().is_err());
    Ok(())
}
