//! Storage target mode from one `.efi` file: a machine that UEFI starts with it lends its disks, and what its screen shows can be
//! typed elsewhere.

use std::path::Path;
use std::time::Duration;

use serde_json::json;
use stiefel_tests::disk::{PASSWORD, add_partition, esp_of, plain_disk};
use stiefel_tests::kit::{CONSOLE, DESKTOP_MAC};
use stiefel_tests::scenario::{Failure, patience};
use stiefel_tests::screen::wait_for_code;
use stiefel_tests::{Boot, Drive, NicModel, Vm, VmBuilder, Wire, cache};

use crate::runner::Bench;
use crate::target::{
    SOON, TARGET_MAC, another_key_sees_nothing, base, debian, image, known, other_key, plug, same, sum,
};

/// Room for the file, in MiB.
const ESP_MIB: u32 = 160;
/// From a change to its code on the screen.
const SHOWN: Duration = Duration::from_secs(15);

/// The screen's codes are its commands: typed on another machine they attach the disks, by NVMe and NBD; a disk that is plugged in is
/// on the screen, and no longer when it is pulled out; q ends.
pub(crate) fn one_file(bench: &Bench) -> Result<(), Failure> {
    let dir = tempfile::tempdir_in(bench.kit.dir())?;
    let wire = Wire::direct()?;
    other_key(bench)?;
    let target = from_one_file(bench, dir.path(), &wire)?;
    let client = debian(bench, &base()?, dir.path(), "client")?
        .nic("wired", NicModel::E1000e, &wire.b(), DESKTOP_MAC)
        .start()?;
    let picture = cache::log_dir()?.join(format!("{}-target-screen.png", std::process::id()));
    let shown = wait_for_code(&target, &["/data-a", "/firmware"], &picture, patience::STICK)?;
    bench.note(&format!(
        "after {:.1} s the screen says:\n{shown}",
        target.uptime().as_secs_f64()
    ));
    client.login("root", PASSWORD, patience::LOGIN)?;
    client.run_ok("ip link set $(ls /sys/class/net | grep -v lo | head -n 1) up")?;

    // As somebody types it who has read the code.
    let typed = |disk: &str| {
        let mut lines = shown.lines();
        let line = lines.find(|line| line.ends_with(disk) && line.starts_with("stiefel attach stiefel-"));
        line.ok_or_else(|| format!("no command for {disk} in the code:\n{shown}"))
    };
    let device = client.run_ok_within(&format!("{} --wait 20", typed("/data-a")?), SOON)?;
    let known = known(&dir.path().join("data-a"))?;
    same("data-a", &sum(&client, device.trim())?, &known)?;
    client.run_ok_within(
        &format!(
            "! dd if=/dev/zero of={} bs=4096 count=1 oflag=direct conv=fsync",
            device.trim()
        ),
        SOON,
    )?;
    client.run_ok_within(
        &format!(
            "d=$({} --nbd --wait 20) && head -c 520 $d | tail -c 8 | grep -q 'EFI PART'",
            typed("/firmware")?
        ),
        SOON,
    )?;
    another_key_sees_nothing(&client)?;

    plug(&target, dir.path(), "hot", "hot-disk", None)?;
    wait_for_code(&target, &["hot-disk", "/data-a"], &picture, SHOWN)?;
    client.run_ok_within("stiefel attach --wait 10 | grep hot-disk", SOON)?;
    target.execute("device_del", json!({ "id": "hot" }))?;
    client.run_ok_within(
        "for i in $(seq 10); do l=$(stiefel attach --wait 3); \
         echo \"$l\" | grep -q /data-a && ! echo \"$l\" | grep -q hot-disk && exit 0; done; exit 1",
        SOON * 2,
    )?;
    client.run_ok_within("stiefel detach --all", SOON)?;
    target.press_keys(&["q"])?;
    target.wait_reboot(patience::SHUTDOWN)?;
    Ok(())
}

/// A desktop's stick whose kernel is told to lend, and which address to have, as an entry of a boot loader or PXE would: the holders of
/// its key get the machine's disks, read-only, and the address is answered for.
pub(crate) fn by_its_line(bench: &Bench) -> Result<(), Failure> {
    let dir = tempfile::tempdir_in(bench.kit.dir())?;
    let wire = Wire::direct()?;
    other_key(bench)?;
    let (stick, data) = (dir.path().join("stick.img"), dir.path().join("data-a"));
    let words = "stiefel.role=target stiefel.address=10.77.0.1/24 stiefel.address=nonsense";
    let line = format!("{} {words}", CONSOLE.join(" "));
    bench.kit.stick_with(&stick, "stick", &line)?;
    image(&data, "data-a")?;
    let target = VmBuilder::new("target")
        .memory_mib(1024)
        .boot(Boot::Uefi)
        .stick(&stick)
        .disk(Drive {
            path: data.clone(),
            serial: "data-a".to_owned(),
            snapshot: false,
        })
        .nic("wired", NicModel::E1000e, &wire.a(), TARGET_MAC)
        .start()?;
    let client = debian(bench, &base()?, dir.path(), "client")?
        .nic("wired", NicModel::E1000e, &wire.b(), DESKTOP_MAC)
        .start()?;
    for said in [
        "stiefel.address=\"nonsense\" is not an address",
        "disks are lent to the holders of these keys: stick",
        "this machine is 10.77.0.1/24, too",
    ] {
        target.serial().expect(said, patience::STICK)?;
    }
    client.login("root", PASSWORD, patience::LOGIN)?;
    client.run_ok(
        "nic=$(ls /sys/class/net | grep -v lo | head -n 1); ip link set $nic up; ip address add 10.77.0.2/24 dev $nic",
    )?;
    // Whoever answers for the address; nothing needs to listen there.
    client.run_ok_within(
        &format!(
            "for i in $(seq 20); do timeout 1 bash -c ': </dev/tcp/10.77.0.1/9' 2>/dev/null; \
             ip neighbour show 10.77.0.1 | grep -qi {TARGET_MAC} && exit 0; sleep 0.5; done; exit 1"
        ),
        SOON,
    )?;
    client.run_ok_within("! stiefel attach data-a --read-write --wait 20", SOON)?;
    let device = client.run_ok_within("stiefel attach data-a --wait 20", SOON)?;
    let known = known(&data)?;
    same("data-a", &sum(&client, device.trim())?, &known)?;
    another_key_sees_nothing(&client)?;
    client.run_ok_within("stiefel detach --all", SOON)?;
    Ok(())
}

/// A machine without any system but the file on its EFI system partition.
fn from_one_file(bench: &Bench, dir: &Path, wire: &Wire) -> Result<Vm, Failure> {
    let (program, esp, disk, data) = (
        dir.join("target.efi"),
        dir.join("esp.img"),
        dir.join("firmware.img"),
        dir.join("data-a"),
    );
    // The last console is the one that is spoken to.
    let words = format!("{} console=tty0", CONSOLE.join(" "));
    bench.kit.lending_stick(&program, "stick", &words)?;
    esp_of(&program, &esp, ESP_MIB)?;
    plain_disk(&disk, 4, None)?;
    add_partition(&disk, 2, &esp, "ef00")?;
    image(&data, "data-a")?;
    let machine = [(disk, "firmware"), (data, "data-a")].into_iter().fold(
        VmBuilder::new("target").memory_mib(1024).boot(Boot::Uefi).vga(),
        |machine, (path, serial)| {
            machine.disk(Drive {
                path,
                serial: serial.to_owned(),
                snapshot: false,
            })
        },
    );
    Ok(machine.nic("wired", NicModel::E1000e, &wire.a(), TARGET_MAC).start()?)
}
