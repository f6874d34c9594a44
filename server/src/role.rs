//! The laptop in the ramdisk: finds its disk, answers discovery, serves the bundle and the disk, and says what happens.
//!
//! The pieces are [`crate::discovery`], [`crate::http`] and [`crate::nbd`]; what they may do is decided by the
//! `host::Host`, which owns the disk and the one session.

mod host;

use std::net::{Ipv6Addr, TcpListener};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::Context;
use stiefel_shared::bundle::{DISK_PORT, Goodbye};
use stiefel_shared::discovery::{LinkEvent, PORT, Responder, State};
use stiefel_shared::handover::{After, DiskIdentity, ServerHandover};
use stiefel_sys::block::{self, Disk};
use stiefel_sys::console::Console;
use stiefel_sys::uevent::Monitor;
use stiefel_sys::wired;
use tokio::sync::mpsc;

use crate::discovery;
use crate::http;
use crate::nbd;

use host::{Door, Host};

/// How the laptop's turn ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Reboot into its own OS.
    Restart,
    /// Power off.
    PowerOff,
}

/// How long the disk's driver may take; USB and RAID controllers are slow.
const DISK_PATIENCE: Duration = Duration::from_secs(60);

/// Serves until a desktop's goodbye ends the laptop's turn.
///
/// # Errors
/// What makes serving impossible: no disk, no port. The caller then goes back to the laptop's own OS.
pub async fn run(console: &'static Console, handover: ServerHandover) -> anyhow::Result<End> {
    let wanted = handover.disk.clone();
    let disk = tokio::task::spawn_blocking(move || find_disk(console, &wanted)).await??;
    console.info(&format!("serving {} ({})", disk.path.display(), handover.disk));

    let names: Vec<&str> = handover.keys.iter().map(|key| key.name.as_str()).collect();
    console.info(&format!("sticks with these keys may connect: {}", names.join(", ")));
    let about = stiefel_shared::discovery::About {
        hostname: handover.hostname.clone(),
        http_port: PORT,
        ready_in: 0,
    };
    let responder = Arc::new(Mutex::new(Responder::new(
        &handover.keys,
        about,
        State::Ready,
        Instant::now(),
    )));

    let door = Arc::new(Door::default());
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, DISK_PORT))
        .with_context(|| format!("cannot listen on TCP port {DISK_PORT} for the disk"))?;
    let gate: Arc<dyn nbd::Gate> = Arc::<Door>::clone(&door);
    let server = nbd::Server::start(listener, gate, nbd::Limits::default()).context("cannot serve the disk")?;
    let after = handover.after;
    let (parted, mut partings) = mpsc::unbounded_channel();
    let host = Arc::new(Host::new(console, handover, disk, door, server, parted));

    let web = http::run(http::bind(PORT)?, host, Arc::clone(&responder), http::Limits::default());
    // Nobody is woken who is awake; the channel only has to stay open.
    let (woken, _woken) = mpsc::channel(1);
    let answers = discovery::run(discovery::bind(PORT)?, responder, follow_links(console)?, woken);
    console.info("ready; waiting for the desktop");
    tokio::pin!(web, answers);
    loop {
        tokio::select! {
            never = &mut web => match never {},
            () = &mut answers => anyhow::bail!("discovery ended"),
            Some(goodbye) = partings.recv() => match (goodbye, after) {
                (Goodbye::Reboot, _) => console.info("the desktop reboots; serving on"),
                (Goodbye::Poweroff, After::Stay) => console.info("the desktop is off; serving on"),
                (Goodbye::Poweroff, After::Return) => {
                    console.info("the desktop is off; going back to the laptop's own system");
                    return Ok(End::Restart);
                }
                (Goodbye::Poweroff, After::Poweroff) => {
                    console.info("the desktop is off; switching off");
                    return Ok(End::PowerOff);
                }
            },
        }
    }
}

/// Brings all wired NICs up, and tells discovery and the screen of them.
fn follow_links(console: &'static Console) -> anyhow::Result<mpsc::Receiver<LinkEvent>> {
    let (links, followed) = mpsc::channel(64);
    std::thread::Builder::new().name("links".to_owned()).spawn(move || {
        let result = wired::follow(true, |event| {
            match &event {
                LinkEvent::Added { name, .. } => console.info(&format!("the link {name} is up")),
                LinkEvent::Removed { index } => console.warn(&format!("a link is down (interface {index})")),
            }
            links.blocking_send(event).is_ok()
        });
        if let Err(error) = result {
            console.error(&format!("no more NICs are brought up: {:#}", anyhow::Error::new(error)));
        }
    })?;
    Ok(followed)
}

/// Finds the disk by its identity; waits for it, as its driver may still be at work.
fn find_disk(console: &Console, wanted: &DiskIdentity) -> anyhow::Result<Disk> {
    let deadline = Instant::now() + DISK_PATIENCE;
    // Listening before looking, so that none is missed.
    let mut monitor = Monitor::open()?;
    let mut told = false;
    loop {
        let mut seen = Vec::new();
        for disk in block::disks(Path::new("/sys"))? {
            match block::identity(&disk) {
                Ok(identity) => seen.push((disk, identity)),
                // A card reader without a card, a disk that is dying: not the one, unless it is; then it is missed below.
                Err(error) => console.warn(&format!("{:#}", anyhow::Error::new(error))),
            }
        }
        let error = match block::find(wanted, &seen) {
            Ok(disk) => return Ok(disk.clone()),
            Err(error) => error,
        };
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(error).context("the disk to serve is not there");
        }
        if !told {
            console.info(&format!("waiting for the disk ({wanted})"));
            told = true;
        }
        // Any new block device is a reason to look again.
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match monitor.next(Some(left)) {
                Ok(Some(event)) if event.subsystem.as_deref() == Some("block") => break,
                Ok(Some(_)) => {}
                Ok(None) | Err(_) => break,
            }
        }
    }
}
