//! Storage target mode in a system's own initrd, as systemd's users boot into theirs: the recipe of docs/target.md, typed as it stands there.

use stiefel_tests::disk::{ExtraFile, Layout};
use stiefel_tests::kit::{CONSOLE, DESKTOP_MAC};
use stiefel_tests::scenario::{self, Failure, Machines, patience};
use stiefel_tests::{Drive, NicModel, VmBuilder, Wire};

use crate::runner::Bench;
use crate::setup::{BUILD, REBUILD};
use crate::systems;
use crate::target::{SOON, TARGET_MAC, another_key_sees_nothing, base, debian, image, known, other_key, same, sum};

const DOCUMENT: &str = include_str!("../../../../docs/target.md");
const HEADING: &str = "## Boot into it: systemd's way";
/// Where the package puts them.
const FOLDER: &str = "/usr/share/stiefel/hooks/target";

/// The commands, but for the key's, which is there.
fn recipe() -> Result<String, Failure> {
    let section = DOCUMENT
        .split_once(HEADING)
        .ok_or("the document has no such section")?
        .1;
    let commands = section.split("```").nth(1).and_then(|block| block.strip_prefix("sh\n"));
    let commands = commands.ok_or("the section has no commands")?;
    let kept: Vec<&str> = commands
        .lines()
        .filter(|line| !line.starts_with("stiefel key new"))
        .collect();
    Ok(kept.join(" && "))
}

/// A Debian with dracut's initrd is booted into the target, and lends its disks from there to the holder of its key.
pub(crate) fn recipe_of_the_document(bench: &Bench) -> Result<(), Failure> {
    let files = [
        (
            "stiefel-target.service",
            include_str!("../../../../hooks/target/stiefel-target.service"),
        ),
        (
            "stiefel-target.target",
            include_str!("../../../../hooks/target/stiefel-target.target"),
        ),
        (
            "stiefel-target.network",
            include_str!("../../../../hooks/target/stiefel-target.network"),
        ),
        ("dracut.conf", include_str!("../../../../hooks/target/dracut.conf")),
    ];
    let files = files.map(|(name, text)| ExtraFile::new(text, &format!("{FOLDER}/{name}"), 0o644));
    let system = systems::dracut(Layout::Ext4).package("dracut-network");
    let machines = Machines::of(bench.kit, &system, Wire::direct()?, "", files.to_vec())?;
    let home = scenario::laptop_with_its_files(
        &machines.disk,
        VmBuilder::new("laptop").boot(machines.disk.boot(&CONSOLE)),
    )?;
    home.run_ok_within(&format!("({})", recipe()?), REBUILD)?;
    home.run_ok_within("sync", BUILD)?;
    home.power_off(patience::SHUTDOWN)?;
    drop(home);

    let dir = tempfile::tempdir_in(bench.kit.dir())?;
    other_key(bench)?;
    let data = dir.path().join("data-a");
    image(&data, "data-a")?;
    let words = [&CONSOLE[..], &["rd.systemd.unit=stiefel-target.target"]].concat();
    let target = VmBuilder::new("target")
        .memory_mib(1536)
        .boot(machines.disk.boot_its_own_initrd(&words)?)
        .disk(machines.disk.drive())
        .disk(Drive {
            path: data.clone(),
            serial: "data-a".to_owned(),
            snapshot: false,
        })
        .nic("wired", NicModel::E1000e, &machines.wire.a(), TARGET_MAC)
        .start()?;
    let client = debian(bench, &base()?, dir.path(), "client")?
        .nic("wired", NicModel::E1000e, &machines.wire.b(), DESKTOP_MAC)
        .start()?;
    target
        .serial()
        .expect("only for the holders of a key", patience::LOGIN)?;
    client.login("root", stiefel_tests::disk::PASSWORD, patience::LOGIN)?;
    client.run_ok("ip link set $(ls /sys/class/net | grep -v lo | head -n 1) up")?;
    let listed = client.run_ok_within("stiefel attach --wait 20", SOON)?;
    // The machine by its own name, which the initrd has.
    for disk in ["laptop/data-a", "laptop/stiefel-laptop"] {
        if !listed.contains(disk) {
            return Err(format!("{disk} is not lent:\n{listed}").into());
        }
    }
    let device = client.run_ok_within("stiefel attach data-a --wait 20", SOON)?;
    let known = known(&data)?;
    same("data-a", &sum(&client, device.trim())?, &known)?;
    another_key_sees_nothing(&client)?;
    target.press_keys(&["ctrl", "alt", "delete"])?;
    target.serial().expect("taking all disks back", SOON)?;
    target.wait_reboot(patience::SHUTDOWN)?;
    Ok(())
}
