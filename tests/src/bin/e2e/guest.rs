//! Guests: desktops that write, each into the laptop's memory, while the laptop's disk stays as it is.

use std::path::Path;
use std::time::Duration;

use stiefel_shared::handover::{DiskTransport, Encryption, SessionMode};
use stiefel_tests::scenario::{Failure, LOAD_BLOCK, patience, pattern};
use stiefel_tests::{NicModel, Vm, Wire};

use crate::link::{RESTART, no_errors, payload};
use crate::runner::Bench;
use crate::tiny::{DISK_MIB, Server, client_without_nic, key};

/// Memory for what two guests write.
const MEMORY_MIB: u32 = 1024;

/// A guest on a cable of its own.
struct Guest {
    desktop: Vm,
    /// Kept as long as the machine.
    _wire: Wire,
}

/// One guest writes while the laptop's server is killed: it reads back what it wrote, and the disk has not changed.
pub(crate) fn one(bench: &Bench) -> Result<(), Failure> {
    guests(bench, 1)
}

/// Two guests at once, on two cables.
pub(crate) fn two(bench: &Bench) -> Result<(), Failure> {
    guests(bench, 2)
}

fn guests(bench: &Bench, count: u8) -> Result<(), Failure> {
    let dir = tempfile::tempdir_in(bench.kit.dir())?;
    let key = key(bench, "stick")?;
    let wires: Vec<Wire> = (0..count).map(|_| Wire::direct()).collect::<Result<_, _>>()?;
    let mut laptop = Server {
        encryption: Encryption::Wireguard,
        transport: DiskTransport::Nbd,
        session: SessionMode::Guest,
        parts: payload(bench)?,
        nic: NicModel::Usb,
        fill,
        ..Server::new(&key)
    }
    .machine(bench, &wires.first().ok_or("no guest")?.a(), dir.path())?
    .memory_mib(MEMORY_MIB);
    for (number, wire) in (1_u8..).zip(wires.iter().skip(1)) {
        let name = format!("cable{number}");
        laptop = laptop.nic(&name, NicModel::Usb, &wire.a(), &format!("52:54:00:57:1e:2{number}"));
    }
    let laptop = laptop.start()?;
    laptop
        .serial()
        .expect("stiefel: ready; waiting for the desktop", patience::SERVING)?;
    let mut desktops = Vec::new();
    for (number, wire) in (0_u8..).zip(wires) {
        let desktop = client_without_nic(bench, &key)?
            .nic("cable", NicModel::Usb, &wire.b(), &format!("52:54:00:57:1e:3{number}"))
            .start()?;
        desktops.push(Guest { desktop, _wire: wire });
    }
    for guest in &desktops {
        guest
            .desktop
            .serial()
            .expect("load: wrote 4", patience::STICK + patience::BUNDLE + patience::ATTACH)?;
    }
    // Every process but the first: what the guests have written is in its hands alone.
    laptop.sysrq('i')?;
    laptop
        .serial()
        .expect("the server was started anew; the session goes on", RESTART)?;
    for Guest { desktop, .. } in &desktops {
        // It reads all back from the laptop.
        desktop.serial().expect("load: done", Duration::from_secs(120))?;
        no_errors(desktop)?;
        if !desktop.serial().said("guest: nothing is kept")? {
            return Err("the desktop does not say that nothing is kept".into());
        }
    }
    if !laptop.serial().said("as a guest: nothing is kept")? {
        return Err("the laptop does not say that nothing is kept".into());
    }
    drop(desktops);
    drop(laptop);
    let disk = std::fs::read(dir.path().join("disk.img"))?;
    if disk != contents() {
        return Err("the laptop's disk has changed".into());
    }
    Ok(())
}

/// What lies on the disk: every block differs from what a guest writes.
fn contents() -> Vec<u8> {
    (0..u64::from(DISK_MIB << 20) / LOAD_BLOCK as u64)
        .flat_map(|number| pattern(number, 99))
        .collect()
}

fn fill(disk: &Path) -> Result<(), Failure> {
    Ok(std::fs::write(disk, contents())?)
}
