//! The harness proves itself with small machines: firmware, screen, ramdisk, and a QEMU that goes with its test.
//!
//! `cargo test -p stiefel-tests --test machines -- --ignored --test-threads 1`

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};
use stiefel_tests::disk::{BaseOptions, BaseSystem};
use stiefel_tests::tiny::tiny;
use stiefel_tests::{Boot, Content, NicModel, VmBuilder, Wire, stop};

const SOON: Duration = Duration::from_secs(20);

#[test]
#[ignore = "runs QEMU"]
fn uefi_speaks_on_the_console_and_shows_a_screen() -> Result<()> {
    let stick = tempfile::NamedTempFile::new()?;
    stick.as_file().set_len(1 << 20)?;
    let vm = VmBuilder::new("uefi")
        .memory_mib(256)
        .boot(Boot::Uefi)
        .stick(stick.path())
        .vga()
        .start()?;
    vm.serial().expect("BdsDxe", SOON)?;
    let screen = vm.dir().join("screen.png");
    vm.screendump(&screen)?;
    ensure!(std::fs::read(&screen)?.starts_with(b"\x89PNG"));
    vm.quit()?;
    Ok(())
}

#[test]
#[ignore = "runs QEMU"]
fn uefi_with_secure_boot_starts() -> Result<()> {
    let vars = "/usr/share/OVMF/OVMF_VARS_4M.ms.fd".into();
    let vm = VmBuilder::new("secure")
        .memory_mib(256)
        .boot(Boot::SecureUefi { vars })
        .start()?;
    vm.serial().expect("BdsDxe", SOON)?;
    Ok(())
}

/// A program for the ramdisk's own shell: shows that it was found, asks for an address, and switches off.
const FIRST_PROCESS: &str = "#!/bin/sh
mount -t devtmpfs none /dev
exec >/dev/ttyS0 2>&1
echo STIEFEL-FIRST-PROCESS
modprobe virtio_pci
modprobe virtio_net
ipconfig -t 3 -c dhcp eth0
poweroff -f
";

#[test]
#[ignore = "runs QEMU"]
fn a_handover_is_appended_to_a_ramdisk_and_frames_reach_the_relay() -> Result<()> {
    let installed = BaseSystem::ensure(&BaseOptions::default())?.extract_kernel()?;
    let dir = tempfile::tempdir()?;
    let program = dir.path().join("first");
    std::fs::write(&program, FIRST_PROCESS)?;
    std::fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;

    let cable = Wire::relayed(1 << 20)?;
    let ramdisk = Content::from(installed.initrd.as_path());
    let vm = tiny(
        "tiny",
        &installed.kernel,
        &ramdisk,
        &archive(dir.path(), "first\n")?,
        &["rdinit=/first"],
    )
    .nic("n0", NicModel::VirtioPlain, &cable.a(), "52:54:00:00:00:07")
    .start()?;
    vm.serial().expect("STIEFEL-FIRST-PROCESS", SOON)?;
    vm.wait_shutdown(SOON)?;
    ensure!(
        cable.counts()?.lost > 0,
        "nothing was sent to the machine that is not there"
    );
    // The sender's own address, in its DHCP request.
    ensure!(cable.carried(&[0x52, 0x54, 0, 0, 0, 7])?);
    Ok(())
}

/// A cpio archive of `names` in `dir`.
fn archive(dir: &Path, names: &str) -> Result<Vec<u8>> {
    let mut cpio = Command::new("cpio")
        .args(["--quiet", "-o", "-H", "newc"])
        .current_dir(dir)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    cpio.stdin.take().context("no pipe")?.write_all(names.as_bytes())?;
    Ok(cpio.wait_with_output()?.stdout)
}

#[test]
#[ignore = "runs QEMU"]
fn a_machine_ends_with_its_value_also_by_a_panic() -> Result<()> {
    let vm = VmBuilder::new("x").memory_mib(64).start()?;
    let (pid, dir) = (vm.pid(), vm.dir().to_owned());
    ensure!(vm.is_running() && Path::new(&format!("/proc/{pid}")).exists());
    let panicked = std::thread::spawn(move || {
        let _vm = vm;
        panic!("as a failing test does");
    });
    ensure!(panicked.join().is_err());
    ensure!(!Path::new(&format!("/proc/{pid}")).exists());
    ensure!(!dir.exists());
    Ok(())
}

/// Where the process below makes its folders.
const PLACE: &str = "STIEFEL_TEST_MACHINE_PLACE";

/// Not a test of its own: the process that the next one sends a signal to. Its machine never says anything.
#[test]
#[ignore = "started by the next test"]
fn process_that_waits_for_a_machine() -> Result<()> {
    if std::env::var_os(PLACE).is_none() {
        return Ok(());
    }
    stop::on_signals()?;
    let wire = Wire::direct()?;
    let vm = VmBuilder::new("silent").memory_mib(64).start()?;
    println!("QEMU is {}", vm.pid());
    let error = vm.serial().expect("what never comes", Duration::from_secs(1000));
    ensure!(error.is_err() && stop::check().is_err());
    ensure!(vm.plug_usb_nic("late", &wire.a(), "52:54:00:00:00:08").is_err());
    Ok(())
}

#[test]
#[ignore = "runs QEMU"]
fn a_signal_ends_machines_and_removes_their_folders() -> Result<()> {
    let place = tempfile::tempdir()?;
    let mut child = Command::new(std::env::current_exe()?)
        .args([
            "--ignored",
            "--exact",
            "--nocapture",
            "process_that_waits_for_a_machine",
        ])
        .env(PLACE, "")
        .env("TMPDIR", place.path())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut lines = BufReader::new(child.stdout.take().context("no pipe")?).lines();
    let pid = lines
        .by_ref()
        .map_while(Result::ok)
        .find_map(|line| Some(line.split_once("QEMU is ")?.1.to_owned()))
        .context("the machine did not start")?;
    ensure!(std::fs::read_dir(&place)?.count() == 2, "a cable and a machine");
    kill_process(Pid::from_child(&child), Signal::TERM)?;
    let rest: Vec<_> = lines.map_while(Result::ok).collect();
    ensure!(child.wait()?.success(), "{rest:?}");
    ensure!(!Path::new(&format!("/proc/{pid}")).exists());
    ensure!(std::fs::read_dir(&place)?.count() == 0);
    Ok(())
}

#[test]
#[ignore = "runs QEMU"]
fn a_qemu_that_refuses_says_why() {
    let missing = stiefel_tests::Drive {
        path: "/no/such/image".into(),
        serial: "s".into(),
        snapshot: false,
    };
    let error = VmBuilder::new("x")
        .disk(missing)
        .start()
        .err()
        .map(|error| error.to_string())
        .unwrap_or_default();
    assert!(error.contains("/no/such/image"), "{error}");
}
