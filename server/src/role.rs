//! The laptop in the ramdisk: finds its disk, answers discovery, serves the bundle and the disk, and says what happens.
//!
//! The pieces are [`crate::discovery`], [`crate::http`] and [`crate::nbd`]; what they may do is decided by
//! `host::Host`, which owns the disk and the one session.

mod host;
mod tunnel;

use std::net::{Ipv6Addr, TcpListener};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::Context;
use stiefel_shared::bundle::{DISK_PORT, Goodbye};
use stiefel_shared::discovery::{About, LinkEvent, PORT, Responder, State};
use stiefel_shared::handover::{After, DiskIdentity, Encryption, ServerHandover};
use stiefel_sys::block::{self, BlockError, Disk};
use stiefel_sys::console::Console;
use stiefel_sys::module::Loader;
use stiefel_sys::uevent::Monitor;
use stiefel_sys::wired;
use tokio::sync::mpsc;

use crate::discovery;
use crate::http;
use crate::nbd;

use host::{Door, Host, News};

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
/// What makes serving impossible: no disk, no port, a disk that could not be closed in order. The caller then goes back to
/// the laptop's own OS.
pub async fn run(console: &'static Console, handover: ServerHandover) -> anyhow::Result<End> {
    let wanted = handover.disk.clone();
    let disk = tokio::task::spawn_blocking(move || wait_for_disk(console, &wanted)).await??;
    console.info(&format!("serving {} ({})", disk.path.display(), handover.disk));
    if handover.encryption == Encryption::Wireguard {
        tokio::task::spawn_blocking(load_wireguard).await??;
    }

    let names: Vec<&str> = handover.keys.iter().map(|key| key.name.as_str()).collect();
    console.info(&format!("sticks with these keys may connect: {}", names.join(", ")));
    let about = About {
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
    let (gate, links_door): (Arc<dyn nbd::Gate>, _) = (Arc::<Door>::clone(&door), Arc::clone(&door));
    let server = nbd::Server::start(listener, gate, nbd::Limits::default()).context("cannot serve the disk")?;
    let after = handover.after;
    let identity = handover.disk.clone();
    let locate = Box::new(move || find_disk(console, &identity).map_err(anyhow::Error::from));
    let (tell, mut news) = mpsc::unbounded_channel();
    let host = Arc::new(Host::new(console, handover, locate, Path::new("/"), door, server, tell));

    let web = http::run(http::bind(PORT)?, host, Arc::clone(&responder), http::Limits::default());
    // Nobody is woken who is awake; the channel only has to stay open.
    let (woken, _woken) = mpsc::channel(1);
    let answers = discovery::run(
        discovery::bind(PORT)?,
        responder,
        follow_links(console, links_door)?,
        woken,
    );
    console.info("ready; waiting for the desktop");
    tokio::pin!(web, answers);
    loop {
        tokio::select! {
            never = &mut web => match never {},
            () = &mut answers => anyhow::bail!("discovery ended"),
            Some(news) = news.recv() => match news {
                News::Broken(why) => anyhow::bail!("the disk could not be closed in order, check it: {why}"),
                News::Parted(goodbye) => {
                    let (says, end) = after_goodbye(goodbye, after);
                    console.info(says);
                    if let Some(end) = end {
                        return Ok(end);
                    }
                }
            },
        }
    }
}

/// What follows a goodbye: what the screen says, and whether the laptop's turn ends.
const fn after_goodbye(goodbye: Goodbye, after: After) -> (&'static str, Option<End>) {
    match (goodbye, after) {
        (Goodbye::Reboot, _) => ("the desktop reboots; serving on", None),
        (Goodbye::Poweroff, After::Stay) => ("the desktop is off; serving on", None),
        (Goodbye::Poweroff, After::Return) => (
            "the desktop is off; going back to the laptop's own system",
            Some(End::Restart),
        ),
        (Goodbye::Poweroff, After::Poweroff) => ("the desktop is off; switching off", Some(End::PowerOff)),
    }
}

/// Brings all wired NICs up, and tells discovery and the screen of them.
fn follow_links(console: &'static Console, door: Arc<Door>) -> anyhow::Result<mpsc::Receiver<LinkEvent>> {
    let (links, followed) = mpsc::channel(64);
    std::thread::Builder::new().name("links".to_owned()).spawn(move || {
        let tell = |event: LinkEvent| {
            match &event {
                LinkEvent::Added { name, .. } => console.info(&format!("the link {name} is up")),
                LinkEvent::Removed { index } => console.warn(&format!("a link is down (interface {index})")),
            }
            if let Err(error) = door.follow(&event) {
                console.warn(&format!("the tunnel waits for the desktop's first word: {error:#}"));
            }
            links.blocking_send(event).is_ok()
        };
        wired::follow(tell, |error| {
            console.error(&format!("the NICs cannot be followed: {error}; trying again"))
        });
    })?;
    Ok(followed)
}

/// The tunnel's module has no device that would load it.
fn load_wireguard() -> anyhow::Result<()> {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let folder = Path::new("/lib/modules").join(release);
    Loader::open(&folder, &[])
        .and_then(|mut loader| loader.load("wireguard"))
        .context("the ramdisk has no WireGuard; build it anew, or set link.encryption to none for a cable you trust")?;
    Ok(())
}

/// Looks for the disk among those that are there.
fn find_disk(console: &Console, wanted: &DiskIdentity) -> Result<Disk, BlockError> {
    let mut seen = Vec::new();
    for disk in block::disks(Path::new("/sys"))? {
        match block::identity(&disk) {
            Ok(identity) => seen.push((disk, identity)),
            // A disk that is dying: not the one, unless it is; then it is missed below.
            Err(error) => console.warn(&format!("{:#}", anyhow::Error::new(error))),
        }
    }
    block::find(wanted, &seen).cloned()
}

/// Finds the disk; waits for it, as its driver may still be at work.
fn wait_for_disk(console: &Console, wanted: &DiskIdentity) -> anyhow::Result<Disk> {
    let deadline = Instant::now() + DISK_PATIENCE;
    // Listening before looking, so that none is missed.
    let mut monitor = Monitor::open()?;
    let mut told = false;
    loop {
        let error = match find_disk(console, wanted) {
            Ok(disk) => return Ok(disk),
            Err(error) => error,
        };
        if !told {
            console.info(&format!("waiting for the disk ({wanted})"));
            told = true;
        }
        // Any new block device is a reason to look again.
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(error).context("the disk to serve is not there");
            }
            match monitor.next(Some(left)) {
                Ok(Some(event)) if event.subsystem.as_deref() == Some("block") => break,
                Ok(_) => {}
                // Events were lost: look again.
                Err(_) => break,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn after_power_off_the_laptop_does_what_is_configured_and_after_reboot_it_serves_on() {
        assert_eq!(after_goodbye(Goodbye::Poweroff, After::Return).1, Some(End::Restart));
        assert_eq!(after_goodbye(Goodbye::Poweroff, After::Poweroff).1, Some(End::PowerOff));
        assert_eq!(after_goodbye(Goodbye::Poweroff, After::Stay).1, None);
        for after in [After::Return, After::Stay, After::Poweroff] {
            assert_eq!(after_goodbye(Goodbye::Reboot, after).1, None);
        }
    }
}
