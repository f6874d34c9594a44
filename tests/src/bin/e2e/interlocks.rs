//! What keeps two systems from writing to one disk, or one system to the wrong one.

use std::io::{Seek, SeekFrom, Write};
use std::path::Path;
use std::time::Duration;

use stiefel_shared::handover::Part;
use stiefel_tests::disk::{ROOT_OFFSET, plain_disk};
use stiefel_tests::scenario::{Failure, patience};
use stiefel_tests::{Drive, NicModel, Wire, re};

use crate::link;
use crate::runner::Bench;
use crate::tiny::{DISK_MIB, Server, client, client_without_nic, key};

/// Of the file system on both machines' disks.
const FS_UUID: &str = "57aefe1d-0000-4000-8000-000000000004";
const READY: &str = "stiefel: ready; waiting for the desktop";

/// A payload that is received at once. None of it may be started.
fn small(bench: &Bench) -> Result<Vec<(Part, Vec<u8>)>, Failure> {
    Ok(vec![(Part::Kernel, std::fs::read(&bench.kit.installed().kernel)?)])
}

/// The desktop has a disk of its own with a file system of the same UUID: it names both and boots nothing.
pub(crate) fn same_uuid(bench: &Bench) -> Result<(), Failure> {
    let dir = tempfile::tempdir_in(bench.kit.dir())?;
    let wire = Wire::direct()?;
    let key = key(bench, "stick")?;
    let laptop = Server {
        parts: small(bench)?,
        fill: |disk| Ok(plain_disk(disk, DISK_MIB, Some(FS_UUID))?),
        ..Server::new(&key)
    }
    .machine(bench, &wire.a(), dir.path())?
    .start()?;
    laptop.serial().expect(READY, patience::SERVING)?;
    let own = dir.path().join("own.img");
    plain_disk(&own, DISK_MIB, Some(FS_UUID))?;
    let desktop = client(bench, &key, &wire.b())?
        .disk(Drive {
            path: own,
            serial: "own-disk".to_owned(),
            snapshot: false,
        })
        .start()?;
    desktop
        .serial()
        .expect(re("stiefel: received "), patience::STICK + patience::BUNDLE)?;
    desktop.serial().expect(
        re(&format!(
            "the desktop's vda1 and the laptop's vda1 carry the same file system UUID {FS_UUID}"
        )),
        Duration::from_secs(20),
    )?;
    desktop
        .serial()
        .expect("next: unplug that disk", Duration::from_secs(5))?;
    desktop.serial().expect("searching again", Duration::from_secs(5))?;
    if desktop.serial().said("stiefel: starting ")? {
        return Err("the desktop boots in spite of what it says".into());
    }
    Ok(())
}

/// Two desktops want the disk, each on a cable of its own. The laptop's screen asks: after `n` the second one is told who has it
/// and the first writes on; after `y` the first one's session is ended and the second gets the disk.
pub(crate) fn two_desktops(bench: &Bench) -> Result<(), Failure> {
    let dir = tempfile::tempdir_in(bench.kit.dir())?;
    let (cable, other_cable) = (Wire::direct()?, Wire::direct()?);
    let key = key(bench, "stick")?;
    let laptop = Server {
        parts: link::payload(bench)?,
        ..Server::new(&key)
    }
    .machine(bench, &cable.a(), dir.path())?
    .nic("second", NicModel::VirtioPlain, &other_cable.a(), "52:54:00:57:1e:21")
    .start()?;
    laptop.serial().expect(READY, patience::SERVING)?;
    let first = client(bench, &key, &cable.b())?.start()?;
    first
        .serial()
        .expect("load: wrote 1", patience::STICK + patience::BUNDLE + patience::ATTACH)?;
    let second = client_without_nic(bench, &key)?
        .nic("cable", NicModel::VirtioPlain, &other_cable.b(), "52:54:00:57:1e:22")
        .start()?;
    let asked = || {
        laptop
            .serial()
            .expect(re("wants the disk, which the one at .* has; press y"), patience::STICK)
    };
    asked()?;
    laptop.serial().send("n")?;
    second.serial().expect(
        "the laptop refuses: the disk is in use by another desktop (key stick)",
        Duration::from_secs(10),
    )?;
    first.serial().expect("load: done", Duration::from_secs(60))?;
    // It is not asked about again as long as that session lasts; a desktop that starts anew is another matter.
    first.system_reset()?;
    first
        .serial()
        .expect("load: wrote 1", patience::STICK + patience::BUNDLE + patience::ATTACH)?;
    asked()?;
    laptop.serial().send("y")?;
    laptop.serial().expect(
        "the session of the desktop that had the disk is ended",
        patience::SHUTDOWN,
    )?;
    first
        .serial()
        .expect("the disk's connection is dead", Duration::from_secs(30))?;
    second.serial().expect(
        "load: done",
        patience::BUNDLE + patience::ATTACH + Duration::from_secs(60),
    )?;
    if first.serial().said("the disk's connection was made anew")? {
        return Err("the first desktop got the disk again after its session was ended".into());
    }
    drop((first, second, laptop));
    link::check_disk(&dir.path().join("disk.img"))
}

/// A hibernated system lies on the laptop's disk: no session begins, and the desktop is told why.
pub(crate) fn hibernated(bench: &Bench) -> Result<(), Failure> {
    let dir = tempfile::tempdir_in(bench.kit.dir())?;
    let wire = Wire::direct()?;
    let key = key(bench, "stick")?;
    let laptop = Server {
        parts: small(bench)?,
        fill: hibernate,
        ..Server::new(&key)
    }
    .machine(bench, &wire.a(), dir.path())?
    .start()?;
    laptop.serial().expect(READY, patience::SERVING)?;
    let desktop = client(bench, &key, &wire.b())?.start()?;
    desktop.serial().expect(
        re("the laptop refuses: a hibernated system lies on the laptop's vda1;.*shut it down"),
        patience::STICK + patience::BUNDLE,
    )?;
    desktop.serial().expect("searching again", Duration::from_secs(5))?;
    laptop
        .serial()
        .expect("a hibernated system lies on the laptop's vda1", Duration::from_secs(5))?;
    if laptop.serial().said("begins a session")? {
        return Err("the laptop lends its disk in spite of what it says".into());
    }
    Ok(())
}

/// Leaves what the kernel leaves in swap space (`kernel/power/swap.c`).
fn hibernate(disk: &Path) -> Result<(), Failure> {
    plain_disk(disk, DISK_MIB, None)?;
    let mut file = std::fs::File::options().write(true).open(disk)?;
    file.seek(SeekFrom::Start(ROOT_OFFSET + 4086))?;
    file.write_all(b"S1SUSPEND\0")?;
    Ok(())
}
