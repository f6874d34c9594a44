//! Faults and attacks between two ramdisks.

use std::sync::atomic::Ordering;
use std::time::Duration;

use stiefel_tests::net::FlipTcpByte;
use stiefel_tests::scenario::{Failure, patience};
use stiefel_tests::{Wire, re};

use crate::runner::Bench;
use crate::tiny::{Server, client, key, server};

/// TCP port of the laptop's HTTP server.
const HTTP: u16 = stiefel_shared::discovery::PORT;
/// A full frame's worth of the bundle.
const LARGE: usize = 1000;
const READY: &str = "stiefel: ready; waiting for the desktop";

/// A stick with a key that the laptop does not know: nothing happens on the laptop, the desktop says so. Then one that it
/// knows, on the same cable: found.
pub(crate) fn wrong_key(bench: &Bench) -> Result<(), Failure> {
    let dir = tempfile::tempdir_in(bench.kit.dir())?;
    let wire = Wire::direct()?;
    let right = key(bench, "stick")?;
    let laptop = server(bench, &right, &wire.a(), dir.path())?.start()?;
    laptop.serial().expect(READY, patience::SERVING)?;
    laptop.serial().skip();
    let stranger = client(bench, &key(bench, "stranger")?, &wire.b())?.start()?;
    stranger
        .serial()
        .expect("no laptop that knows this stick's key answers on", patience::STICK)?;
    if stranger.serial().said("found ")? {
        return Err("the laptop answered a stick whose key it does not know".into());
    }
    stranger.quit()?;
    if laptop.serial().said(re("begins a session|refused"))? {
        return Err("something happened on the laptop".into());
    }
    let desktop = client(bench, &right, &wire.b())?.start()?;
    desktop.serial().expect("found tiny on", patience::STICK)?;
    Ok(())
}

/// One byte of the bundle is flipped on the way, with a checksum that fits: the desktop says so, boots nothing of it, tries
/// again, and the second time it goes well.
pub(crate) fn altered_bundle(bench: &Bench) -> Result<(), Failure> {
    let dir = tempfile::tempdir_in(bench.kit.dir())?;
    let wire = Wire::relayed(0)?;
    let flip = FlipTcpByte::new(HTTP, LARGE, 200);
    let flipped = flip.done();
    wire.set_tamper(Some(Box::new(flip)))?;
    let key = key(bench, "stick")?;
    let laptop = server(bench, &key, &wire.a(), dir.path())?.start()?;
    let desktop = client(bench, &key, &wire.b())?.start()?;
    laptop.serial().expect(READY, patience::SERVING)?;
    desktop.serial().expect("altered", patience::STICK + patience::BUNDLE)?;
    if !flipped.load(Ordering::Relaxed) {
        return Err("the desktop complained although nothing was altered".into());
    }
    desktop.serial().expect("searching again", Duration::from_secs(5))?;
    desktop.serial().expect(re("stiefel: received "), patience::BUNDLE)?;
    Ok(())
}

/// The laptop dies in the middle of the fetch: the desktop says so and searches on; a laptop that comes later is found.
pub(crate) fn server_killed(bench: &Bench) -> Result<(), Failure> {
    let dir = tempfile::tempdir_in(bench.kit.dir())?;
    let wire = Wire::direct()?;
    let key = key(bench, "stick")?;
    let laptop = server(bench, &key, &wire.a(), dir.path())?.start()?;
    let desktop = client(bench, &key, &wire.b())?.start()?;
    laptop.serial().expect(READY, patience::SERVING)?;
    desktop.serial().expect("initrd ", patience::STICK + patience::BUNDLE)?;
    laptop.quit()?;
    desktop.serial().expect("the laptop has gone", patience::BUNDLE)?;
    desktop.serial().expect("searching again", Duration::from_secs(5))?;
    let _laptop = server(bench, &key, &wire.a(), dir.path())?.start()?;
    desktop.serial().expect("found tiny on", patience::SERVING)?;
    desktop.serial().expect(re("stiefel: received "), patience::BUNDLE)?;
    Ok(())
}

/// The disk that the laptop is to serve is not there: it says which one it misses and which there are, and goes home.
pub(crate) fn absent_disk(bench: &Bench) -> Result<(), Failure> {
    let dir = tempfile::tempdir_in(bench.kit.dir())?;
    let wire = Wire::direct()?;
    let laptop = Server {
        serial: "another-disk",
        ..Server::new(&key(bench, "stick")?)
    }
    .machine(bench, &wire.a(), dir.path())?
    .start()?;
    laptop.serial().expect("waiting for the disk", patience::SERVING)?;
    laptop.serial().expect(
        re("the disk to serve is not there.*another-disk"),
        Duration::from_secs(90),
    )?;
    laptop
        .serial()
        .expect("going back to the laptop's own system in", Duration::from_secs(5))?;
    laptop.wait_reboot(Duration::from_secs(60))?;
    Ok(())
}

/// The all-NIC image serves and searches in machines with little memory.
pub(crate) fn small_memory(bench: &Bench) -> Result<(), Failure> {
    let wire = Wire::direct()?;
    let desktop = client(bench, &key(bench, "stick")?, &wire.b())?
        .memory_mib(256)
        .start()?;
    desktop.serial().expect(re("stiefel: asking on "), patience::STICK)?;
    Ok(())
}

/// Keys pressed at the laptop while no desktop is there: `p` has nobody to ask, `h` goes home.
pub(crate) fn keys(bench: &Bench) -> Result<(), Failure> {
    let dir = tempfile::tempdir_in(bench.kit.dir())?;
    let wire = Wire::direct()?;
    let laptop = server(bench, &key(bench, "stick")?, &wire.a(), dir.path())?.start()?;
    laptop.serial().expect(READY, patience::SERVING)?;
    laptop.serial().expect("keys: p asks", Duration::from_secs(5))?;
    laptop.serial().send("xyp")?;
    laptop
        .serial()
        .expect("no desktop is here; press h to go home", Duration::from_secs(5))?;
    laptop.serial().send("h")?;
    laptop
        .serial()
        .expect("going back to the laptop's own system", Duration::from_secs(5))?;
    laptop.wait_reboot(Duration::from_secs(30))?;
    Ok(())
}
