//! The laptop in the ramdisk: finds its disk, answers discovery, serves the bundle and the disk, and says what happens.
//!
//! The pieces are [`crate::discovery`], [`crate::http`] and [`crate::nbd`]; what they may do is decided by
//! `host::Host`, which owns the disk and its sessions: one that writes, or several of guests.

pub(crate) mod disk;
mod host;
mod keys;
pub(crate) mod link;
mod machine;
mod pulse;
mod record;

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::Context;
use stiefel_shared::discovery::{About, LinkEvent, PORT, Responder, State};
use stiefel_shared::handover::{DiskIdentity, DiskTransport, Encryption, ServerHandover, SessionMode};
use stiefel_sys::block::{self, BlockError, Disk};
use stiefel_sys::console::Console;
use stiefel_sys::custody::Custody;
use stiefel_sys::module::Loader;
use stiefel_sys::mount::{self, MountFlags};
use stiefel_sys::nvmet::CONFIGFS;
use stiefel_sys::uevent::Monitor;
use stiefel_sys::wired;
use tokio::sync::mpsc;

use crate::discovery;
use crate::http;
use crate::supply::Supply;
use crate::tree::Tree;

use host::{Host, News, Setup};
use keys::Keys;
use machine::Laptop;
pub(crate) use machine::Memory;
use record::{RECORD, Records};

/// How the laptop's turn ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Reboot into its own OS.
    Restart,
    /// Power off.
    PowerOff,
    /// Reboot, after the screen has shown for a while why.
    GiveUp,
}

/// How long the disk's driver may take; USB and RAID controllers are slow.
const DISK_PATIENCE: Duration = Duration::from_secs(60);

/// How often the battery is looked at.
const SUPPLY: Duration = Duration::from_secs(10);

/// Serves until a desktop's goodbye ends the laptop's turn. `status` is the exit status by which PID 1 knows an end.
///
/// # Errors
/// What makes serving impossible: no disk, no port, a disk that could not be closed in order. The caller then goes back to
/// the laptop's own OS.
pub async fn run(console: &'static Console, handover: ServerHandover, status: fn(End) -> u8) -> anyhow::Result<End> {
    prepare(console, &handover).await?;
    let about = About {
        hostname: handover.hostname.clone(),
        http_port: PORT,
        ready_in: 0,
    };
    let responder = Arc::new(Mutex::new(
        Responder::new(&handover.keys, about, State::Ready, Instant::now()).with_tickets(&handover.tickets),
    ));
    let keys = Arc::new(Keys::new(console));
    let (setup, mut news) = setup(console, &handover, Arc::clone(&keys), status);
    let host = Arc::new(Host::new(setup, handover));
    let resumed = {
        let host = Arc::clone(&host);
        tokio::task::spawn_blocking(move || host.resume()).await?
    }
    .context("the session that was there cannot go on")?;

    follow_supply(Arc::clone(&host))?;
    let pulse = pulse::run(pulse::bind()?, Arc::clone(&host));
    let web = http::run(
        http::bind(PORT)?,
        Arc::clone(&host),
        Arc::clone(&responder),
        http::Limits::default(),
        resumed,
    );
    // Nobody is woken who is awake; the channel only has to stay open.
    let (woken, _woken) = mpsc::channel(1);
    let answers = discovery::run(
        discovery::bind(PORT)?,
        responder,
        follow_links(console, Arc::clone(&host))?,
        woken,
    );
    console.info("ready; waiting for the desktop");
    keys.follow(host);
    tokio::pin!(web, answers, pulse);
    tokio::select! {
        never = &mut web => match never {},
        never = &mut pulse => match never {},
        () = &mut answers => anyhow::bail!("discovery ended"),
        Some(news) = news.recv() => match news {
            News::Broken(why) => anyhow::bail!("the disk could not be closed in order, check it: {why}"),
            News::End(end) => Ok(end),
        },
    }
}

/// Waits for the disk, loads what serving it needs, and says who may have it.
async fn prepare(console: &'static Console, handover: &ServerHandover) -> anyhow::Result<()> {
    let wanted = handover.disk.clone();
    let disk = tokio::task::spawn_blocking(move || wait_for_disk(console, &wanted)).await??;
    console.info(&format!("serving {} ({})", disk.path.display(), handover.disk));
    let needed = needed_modules(handover);
    tokio::task::spawn_blocking(move || load(&needed)).await??;
    if handover.session == SessionMode::Guest {
        console.info(
            "guest: nothing is kept. What desktops write stays in this laptop's memory; its disk is open read-only",
        );
    }
    let names: Vec<&str> = handover.keys.iter().map(|key| key.name.as_str()).collect();
    console.info(&format!("sticks with these keys may connect: {}", names.join(", ")));
    Ok(())
}

/// What the host works with, and where its news come out.
fn setup(
    console: &'static Console,
    handover: &ServerHandover,
    person: Arc<Keys>,
    status: fn(End) -> u8,
) -> (Setup, mpsc::UnboundedReceiver<News>) {
    let machine = Box::new(Laptop {
        console,
        identity: handover.disk.clone(),
    });
    let (tell, news) = mpsc::unbounded_channel();
    let setup = Setup {
        console,
        machine,
        person,
        records: Records::new(Path::new(RECORD), Custody::inherited(), status),
        root: "/".into(),
        news: tell,
    };
    (setup, news)
}

/// Whether an earlier process, or this one, has left a session that could go on.
#[must_use]
pub fn has_session() -> bool {
    Path::new(RECORD).exists()
}

/// Brings all wired NICs up, and tells discovery and the screen of them.
fn follow_links(console: &'static Console, host: Arc<Host>) -> anyhow::Result<mpsc::Receiver<LinkEvent>> {
    let (links, followed) = mpsc::channel(64);
    wired::follow(console, move |event| {
        wired::say(console, &event);
        if let Err(error) = host.follow(&event) {
            console.warn(&format!("the tunnel waits for the desktop's first word: {error:#}"));
        }
        links.blocking_send(event).is_ok()
    })?;
    Ok(followed)
}

/// Looks at the battery, which tells of nothing by itself on many laptops.
fn follow_supply(host: Arc<Host>) -> anyhow::Result<()> {
    std::thread::Builder::new().name("supply".to_owned()).spawn(move || {
        let tree = Tree::new(Path::new("/"));
        loop {
            host.supplied(Supply::read(&tree));
            std::thread::sleep(SUPPLY);
        }
    })?;
    Ok(())
}

/// Modules that have no device that would load them.
fn needed_modules(handover: &ServerHandover) -> Vec<&'static str> {
    let tunnel = (handover.encryption == Encryption::Wireguard).then_some("wireguard");
    let nvme: &[&str] = match handover.transport {
        DiskTransport::NvmeTcp => &["nvmet", "nvmet_tcp"],
        DiskTransport::Nbd => &[],
    };
    tunnel.into_iter().chain(nvme.iter().copied()).collect()
}

/// Loads them, and mounts where the kernel's target is set up.
fn load(modules: &[&str]) -> anyhow::Result<()> {
    let mut loader = Loader::running()?;
    for module in modules {
        loader.load(module).with_context(|| {
            format!("the ramdisk lacks the module {module}; build it anew, or see link.encryption and disk.transport")
        })?;
    }
    let target = Path::new(CONFIGFS);
    if modules.contains(&"nvmet") && !target.join("nvmet").exists() {
        mount::mount(
            "configfs",
            target,
            "configfs",
            MountFlags::NOEXEC | MountFlags::NOSUID,
            None,
        )?;
    }
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
pub(crate) fn wait_for_disk(console: &Console, wanted: &DiskIdentity) -> anyhow::Result<Disk> {
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
