//! The harness proves itself with small machines: firmware, screen, ramdisk, and a QEMU that goes with its test.
//!
//! `cargo test -p stiefel-tests --test machines -- --ignored --test-threads 1`

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use stiefel_tests::disk::{BaseOptions, BaseSystem};
use stiefel_tests::tiny::tiny;
use stiefel_tests::{Boot, Content, NicModel, VmBuilder, Wire};

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
