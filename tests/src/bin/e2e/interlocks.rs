//! What keeps two systems from writing to one disk, or one system to the wrong one.

use std::io::{Seek, SeekFrom, Write};
use std::path::Path;
use std::time::Duration;

use stiefel_shared::handover::Part;
use stiefel_tests::disk::{ROOT_OFFSET, plain_disk};
use stiefel_tests::scenario::{Failure, patience};
use stiefel_tests::{Drive, Wire, re};

use crate::runner::Bench;
use crate::tiny::{DISK_MIB, Server, client, key};

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
