//! Who owns the disk: opens it for one session at a time, and closes it in order before anything else may have it.
//!
//! The order at the end of a session is always the same: withdraw the disk (nobody new gets in), drop the peer's
//! connections, wait until no request runs any more, flush, close the device, take the link down. Only then may another
//! session begin or the laptop reboot.
//!
//! What a session is made of is written down ([`record`](super::record)), so that it goes on when this process was killed.

mod person;

use std::fs::File;
use std::net::{IpAddr, SocketAddr, SocketAddrV6};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use stiefel_shared::bundle::{ControlKey, DeviceClaims, DiskOffer, Goodbye, LinkOffer, Manifest};
use stiefel_shared::discovery::LinkEvent;
use stiefel_shared::handover::ServerHandover;
use stiefel_shared::session::{MachineId, Pulse, SessionName, Sign};
use stiefel_sys::block::{Content, Disk};
use stiefel_sys::console::Console;
use tokio::sync::mpsc;

use super::End;
use super::disk::Served;
use super::keys::Person;
use super::link::{Up, Wanted};
use super::machine::Machine;
use super::record::{Record, Records};
use crate::http::{Begin, Bundle, FeedError, Refusal, SessionHost};
use crate::nbd::{self, Export, Gate, Listed};
use crate::supply::Supply;

/// How long requests that run may take until the disk is closed. A disk that does not answer for this long is broken.
const DRAIN: Duration = Duration::from_secs(60);

/// What the host tells those who run it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum News {
    /// A desktop has said goodbye, and knows that it was heard.
    Parted(Goodbye),
    /// A desktop was not heard for too long; its session was closed in order.
    Silent,
    /// The person at the laptop wants it back.
    Home,
    /// The disk could not be closed in order: what became of its last writes is unknown.
    Broken(String),
}

/// What is open to a desktop: at most one disk, for one peer. This is also the NBD server's view.
#[derive(Default)]
pub(super) struct Door(Mutex<Option<Open>>);

struct Open {
    /// The desktop's address of this session. An interface is not compared: after a re-plug it has another index.
    peer: IpAddr,
    served: Served,
    /// Goes with the session.
    link: Option<Up>,
}

impl Door {
    /// Tells the session's link of an interface that came or went.
    pub(super) fn follow(&self, event: &LinkEvent) -> anyhow::Result<()> {
        match self.lock().as_mut().and_then(|open| open.link.as_mut()) {
            Some(link) => link.follow(event),
            None => Ok(()),
        }
    }

    /// Sets the packet size of the session's link, in bytes; what it is then.
    pub(super) fn set_mtu(&self, mtu: u32) -> anyhow::Result<u32> {
        match self.lock().as_mut().and_then(|open| open.link.as_mut()) {
            Some(link) => link.set_mtu(mtu),
            None => Ok(0),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Open>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Gate for Door {
    fn admit(&self, peer: SocketAddr) -> bool {
        self.lock().as_ref().is_some_and(|open| open.peer == peer.ip())
    }

    fn export(&self, name: &str, peer: SocketAddr) -> Option<Arc<Export>> {
        let door = self.lock();
        let open = door.as_ref().filter(|open| open.peer == peer.ip())?;
        open.served.export().filter(|export| export.name() == name).cloned()
    }

    fn list(&self, _peer: SocketAddr) -> Vec<Listed> {
        // The name is the session's secret.
        Vec::new()
    }
}

/// The desktop that has the disk.
#[derive(Debug, Clone)]
struct Holder {
    session: SessionName,
    peer: SocketAddrV6,
    key: String,
    machine: MachineId,
}

/// The desktop's life as far as it is known here. A lock of its own: a session's change may last.
struct Life {
    pulse: Pulse,
    session: SessionName,
    /// The desktop's address of this session.
    peer: IpAddr,
    /// Its last sign; before the first, the session's beginning.
    heard: Instant,
    /// It was heard at all.
    alive: bool,
    /// The countdown is on the screen.
    counting: bool,
}

/// The one session.
#[derive(Default)]
struct Seat {
    holder: Option<Holder>,
    /// Key and machine of another desktop that the person at the laptop does not let in while this session lasts.
    denied: Option<(String, MachineId)>,
    /// Why nobody gets the disk any more before the laptop was restarted.
    closed: Option<String>,
}

/// The disk and its one session.
pub(super) struct Host(Arc<Inner>);

/// What the host works with.
pub(super) struct Setup {
    pub(super) console: &'static Console,
    pub(super) machine: Box<dyn Machine>,
    /// Who decides when two desktops want the disk.
    pub(super) person: Arc<dyn Person>,
    pub(super) records: Records,
    /// The folder below which the payload's parts lie.
    pub(super) root: PathBuf,
    pub(super) door: Arc<Door>,
    pub(super) server: nbd::Server,
    pub(super) news: mpsc::UnboundedSender<News>,
}

pub(super) struct Inner {
    setup: Setup,
    handover: ServerHandover,
    /// Held across a whole change, so that changes happen one after the other.
    seat: Mutex<Seat>,
    life: Mutex<Option<Life>>,
    /// The desktop is asked to power off.
    ask: AtomicBool,
    supply: Mutex<Supply>,
    /// The per cent on the screen.
    shown: AtomicU64,
}

impl Host {
    pub(super) fn new(setup: Setup, handover: ServerHandover) -> Self {
        Self(Arc::new(Inner {
            setup,
            handover,
            seat: Mutex::default(),
            life: Mutex::default(),
            ask: AtomicBool::new(false),
            supply: Mutex::default(),
            shown: AtomicU64::default(),
        }))
    }

    /// Goes on with a session that an earlier process has left.
    ///
    /// # Errors
    /// It cannot go on: the disk was not kept, or is another now.
    pub(super) fn resume(&self) -> anyhow::Result<Option<(SessionName, ControlKey)>> {
        self.0.resume()
    }

    /// Hears a datagram; the answer, if it is the desktop's.
    pub(super) fn hear(&self, peer: SocketAddr, datagram: &[u8]) -> Option<Vec<u8>> {
        self.0.hear(peer, datagram)
    }

    /// Looks at how long the desktop has been silent: counts down, and in the end goes home.
    pub(super) fn look(&self) {
        if let Some(session) = self.0.look() {
            let inner = Arc::clone(&self.0);
            tokio::task::spawn_blocking(move || inner.abandon(session));
        }
    }

    /// Notes how the laptop is supplied; a desktop is asked to power off before the battery is empty.
    pub(super) fn supplied(&self, supply: Supply) {
        let inner = &self.0;
        let before = std::mem::replace(
            &mut *inner.supply.lock().unwrap_or_else(PoisonError::into_inner),
            supply,
        );
        let percent = supply.percent.unwrap_or_default();
        if supply.is_low(CRITICAL) && !inner.ask.load(Ordering::Acquire) {
            if self.ask_power_off() {
                inner.setup.console.error(&format!(
                    "the battery has {percent} % left: the desktop is asked to power off"
                ));
            }
        } else if supply.is_low(LOW) && !before.is_low(LOW) {
            inner
                .setup
                .console
                .warn(&format!("the battery has {percent} % left; plug the laptop in\u{7}"));
        }
    }

    /// Asks the desktop to power off, in order; whether there is one.
    pub(super) fn ask_power_off(&self) -> bool {
        let there = self.0.life().is_some();
        self.0.ask.store(there, Ordering::Release);
        there
    }

    /// Runs a change on a thread for blocking work. It goes on to its end also when the desktop that asked goes away.
    async fn change<T: Send + 'static>(
        &self,
        change: impl FnOnce(&Arc<Inner>) -> Result<T, Refusal> + Send + 'static,
    ) -> Result<T, Refusal> {
        let inner = Arc::clone(&self.0);
        tokio::task::spawn_blocking(move || change(&inner))
            .await
            .unwrap_or_else(|_| refuse("the laptop's service ends; try again in a minute"))
    }
}

fn refuse<T>(reason: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal { reason: reason.into() })
}

impl SessionHost for Host {
    async fn begin(&self, request: Begin) -> Result<Bundle, Refusal> {
        self.change(move |inner| inner.begin(request)).await
    }

    fn progress(&self, _session: SessionName, done: u64, total: u64) {
        let percent = done.saturating_mul(25) / total.max(1) * 4;
        if self.0.shown.swap(percent, Ordering::Relaxed) != percent {
            self.0
                .setup
                .console
                .progress(&format!("the desktop receives: {percent:>3} %"));
        }
    }

    fn fetched(&self, session: SessionName, outcome: Result<(), FeedError>) {
        match outcome {
            Ok(()) => self.0.setup.console.info("the desktop has everything and starts"),
            Err(FeedError::Refused { .. }) => {}
            Err(error) => {
                self.0.setup.console.warn(&format!("{:#}", anyhow::Error::new(error)));
                let inner = Arc::clone(&self.0);
                // It has no way to the disk without the whole bundle, so another desktop may come.
                tokio::task::spawn_blocking(move || inner.give_up(session));
            }
        }
    }

    async fn goodbye(&self, session: SessionName, goodbye: Goodbye) -> Result<(), Refusal> {
        self.change(move |inner| inner.goodbye(session, goodbye)).await
    }

    fn parted(&self, _session: SessionName, goodbye: Goodbye) {
        // Without a receiver the laptop's turn is over already.
        let _ = self.0.setup.news.send(News::Parted(goodbye));
    }
}

impl Inner {
    fn seat(&self) -> MutexGuard<'_, Seat> {
        self.seat.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin(self: &Arc<Self>, request: Begin) -> Result<Bundle, Refusal> {
        let mut seat = self.seat();
        if let Some(closed) = &seat.closed {
            return refuse(closed);
        }
        if seat.holder.as_ref().is_some_and(|present| present.is(&request)) {
            self.setup
                .console
                .info("the same desktop starts anew and takes over from itself");
            self.close(&mut seat)?;
        }
        let mut seat = self.contend(seat, &request)?;
        match self.open(&request) {
            Ok((open, bundle)) => {
                let (peer, key) = (request.peer.ip(), &request.key);
                self.setup
                    .console
                    .info(&format!("the desktop at {peer} (key {key}) begins a session"));
                self.watch(&open.served);
                *self.setup.door.lock() = Some(open);
                seat.holder = Some(Holder {
                    session: request.session,
                    peer: request.peer,
                    key: request.key,
                    machine: request.machine,
                });
                let address = bundle.manifest.link.address;
                self.begin_life(request.session, &bundle.manifest.control, IpAddr::V6(address), 0);
                Ok(bundle)
            }
            Err(error) => {
                self.setup.console.error(&format!("{error:#}"));
                refuse(format!("{error:#}"))
            }
        }
    }

    /// Opens the disk under a new secret name.
    fn open(&self, request: &Begin) -> anyhow::Result<(Open, Bundle)> {
        let handover = &self.handover;
        let disk = self.setup.machine.disk()?;
        let held = self.setup.machine.open(&disk)?;
        // Open and exclusive now: it is still the same one, or another has taken its name in between.
        let again = self
            .setup
            .machine
            .disk()
            .context("the disk went away while it was opened")?;
        ensure!(
            again.device == disk.device && size(&held)? == handover.disk.size,
            "the disk changed while it was opened; is its plug loose? Start the desktop again"
        );
        let claims = self.claims(&disk)?;
        let wanted = Wanted {
            peer: request.peer,
            encryption: handover.encryption,
            mode: handover.mode,
            grace: handover.grace,
        };
        let (link, offer) = self.setup.machine.link(wanted).context("no link to the desktop")?;
        let (served, transport) = Served::open(&*self.setup.machine, held, &disk, handover, &offer)?;
        let offered = DiskOffer {
            identity: handover.disk.clone(),
            logical_block_size: disk.logical_block_size,
            transport,
        };
        let peer = IpAddr::V6(offer.address);
        let open = Open {
            peer,
            served,
            link: Some(link),
        };
        let made = self
            .bundle(request, offered, offer, claims)
            .and_then(|bundle| self.write_down(request, &open, &bundle).map(|()| bundle));
        match made {
            Ok(bundle) => Ok((open, bundle)),
            Err(error) => {
                // Nobody knows of it yet, so nothing was written.
                let _ = open.served.close(&*self.setup.machine, &self.setup.server, DRAIN);
                Err(error)
            }
        }
    }

    /// By what the disk is found, for the desktop to compare with its own.
    ///
    /// # Errors
    /// A hibernated system lies on it: its memory would no longer fit to what the desktop leaves on the disk.
    fn claims(&self, disk: &Disk) -> anyhow::Result<Vec<DeviceClaims>> {
        const NEXT: &str = "start the laptop by itself, let that system resume and shut it down fully, then try again";
        let contents = self.setup.machine.contents(disk);
        if let Some(content) = contents.iter().find(|content| content.hibernated) {
            bail!("a hibernated system lies on the laptop's {}; {NEXT}", content.name);
        }
        ensure!(
            !self.setup.machine.resumes(),
            "the laptop's firmware is to resume a hibernated system (EFI variable HibernateLocation); {NEXT}"
        );
        let mut claims = contents
            .into_iter()
            .map(|Content { name, claims, .. }| DeviceClaims { name, claims })
            .collect();
        let left_out = DeviceClaims::shorten(&mut claims);
        if left_out > 0 {
            self.setup.console.warn(&format!(
                "the disk carries too many UUIDs and labels; {left_out} are not compared with the desktop's own disks"
            ));
        }
        Ok(claims)
    }

    /// Lets the session outlive this process.
    fn write_down(&self, request: &Begin, open: &Open, bundle: &Bundle) -> anyhow::Result<()> {
        let Some(link) = &open.link else { return Ok(()) };
        self.setup.records.hold(open.served.device())?;
        self.setup.records.write(&Record {
            session: request.session.to_string(),
            key: request.key.clone(),
            machine: request.machine.to_string(),
            peer: request.peer,
            control: bundle.manifest.control.clone(),
            transport: bundle.manifest.disk.transport.clone(),
            link: link.known().clone(),
        })
    }

    fn bundle(
        &self,
        request: &Begin,
        disk: DiskOffer,
        link: LinkOffer,
        claims: Vec<DeviceClaims>,
    ) -> anyhow::Result<Bundle> {
        let payload = self.handover.payload.clone();
        let parts = payload
            .parts
            .iter()
            .map(|part| File::open(self.setup.root.join(part.part.path())));
        let parts = parts.collect::<Result<_, _>>().context("the payload is not there")?;
        let manifest = Manifest {
            hostname: self.handover.hostname.clone(),
            payload,
            disk,
            link,
            claims,
            control: ControlKey::generate()?,
            session: request.session.to_string(),
        };
        Ok(Bundle { manifest, parts })
    }

    /// Ends the session that holds the disk, in order. After an error the disk may still be written to: nobody else gets it.
    fn close(&self, seat: &mut Seat) -> Result<(), Refusal> {
        if let Some(closed) = &seat.closed {
            return refuse(closed);
        }
        let open = self.setup.door.lock().take();
        if let Some(open) = open
            && let Err(error) = open.served.close(&*self.setup.machine, &self.setup.server, DRAIN)
        {
            let error = format!("{error:#}");
            seat.closed = Some(error.clone());
            // Without a receiver the laptop's turn is over already.
            let _ = self.setup.news.send(News::Broken(error.clone()));
            return refuse(error);
        }
        if let Err(error) = self.setup.records.clear() {
            // PID 1 may still have the disk open, so nobody may have it; it ends with the ramdisk.
            let error = format!("{error:#}");
            seat.closed = Some(error.clone());
            let _ = self.setup.news.send(News::Broken(error.clone()));
            return refuse(error);
        }
        (seat.holder, seat.denied) = (None, None);
        self.setup.person.never_mind();
        *self.life() = None;
        self.ask.store(false, Ordering::Release);
        Ok(())
    }

    /// Goes on with the session that an earlier process has left, if there is one; its name and secret.
    pub(super) fn resume(self: &Arc<Self>) -> anyhow::Result<Option<(SessionName, ControlKey)>> {
        let Some((record, device)) = self.setup.records.read()? else {
            return Ok(None);
        };
        let mut seat = self.seat();
        let disk = self.setup.machine.disk()?;
        let served = Served::adopt(device, &disk, &record.transport)?;
        self.watch(&served);
        if let (Some(why), Some(export)) = (self.setup.records.failed(), served.export()) {
            export.fail(&why);
        }
        let session: SessionName = record.session.parse()?;
        let peer = IpAddr::V6(record.link.desktop);
        *self.setup.door.lock() = Some(Open {
            peer,
            served,
            link: Some(Up::adopt(record.link)),
        });
        seat.holder = Some(Holder {
            session,
            peer: record.peer,
            key: record.key,
            machine: record.machine.parse()?,
        });
        self.begin_life(session, &record.control, peer, 0);
        self.setup
            .console
            .warn("the server was started anew; the session goes on");
        Ok(Some((session, record.control)))
    }

    /// Has it noted, before anybody is told, that the disk has lost data.
    fn watch(self: &Arc<Self>, served: &Served) {
        let inner = Arc::downgrade(self);
        if let Some(export) = served.export() {
            export.on_failure(Box::new(move |why| {
                if let Some(inner) = inner.upgrade() {
                    inner.setup.records.note_failure(why);
                }
            }));
        }
    }

    fn life(&self) -> MutexGuard<'_, Option<Life>> {
        self.life.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin_life(&self, session: SessionName, control: &ControlKey, peer: IpAddr, heard: u64) {
        *self.life() = Some(Life {
            pulse: Pulse::new(control, session, heard),
            session,
            peer,
            heard: Instant::now(),
            alive: false,
            counting: false,
        });
    }

    fn hear(&self, peer: SocketAddr, datagram: &[u8]) -> Option<Vec<u8>> {
        let mut life = self.life();
        let life = life.as_mut().filter(|life| life.peer == peer.ip())?;
        let beat = life.pulse.hear(datagram).ok()?;
        (life.heard, life.alive) = (Instant::now(), true);
        if std::mem::take(&mut life.counting) {
            self.setup.console.info("the desktop is back");
        }
        let mtu = match beat.mtu {
            0 => Ok(0),
            wanted => self.setup.door.set_mtu(u32::from(wanted)),
        };
        let mtu = mtu.unwrap_or_else(|error| {
            self.setup
                .console
                .warn(&format!("the link's packet size stays: {error:#}"));
            0
        });
        let supply = *self.supply.lock().unwrap_or_else(PoisonError::into_inner);
        let sign = Sign {
            battery: supply.percent,
            mains: supply.mains,
            mtu: u16::try_from(mtu).unwrap_or(u16::MAX),
            power_off: self.ask.load(Ordering::Acquire),
        };
        life.pulse.sign(&beat, sign).ok()
    }

    /// The session whose desktop has been silent for too long.
    fn look(&self) -> Option<SessionName> {
        let mut life = self.life();
        let life = life.as_mut()?;
        // It cannot be heard before its kernel has started.
        let least = if life.alive { Duration::ZERO } else { START };
        let grace = Duration::from_secs(self.handover.grace).max(least);
        let silence = life.heard.elapsed();
        if silence < SILENT {
            return None;
        }
        if life.alive && !std::mem::replace(&mut life.counting, true) {
            self.setup
                .console
                .warn("the desktop is not heard any more; is the cable in?");
        }
        let left = grace.saturating_sub(silence);
        if left.is_zero() {
            return Some(life.session);
        }
        if life.alive {
            let (minutes, seconds) = (left.as_secs() / 60, left.as_secs() % 60);
            self.setup
                .console
                .progress(&format!("the laptop goes home in {minutes}:{seconds:02} min"));
        }
        None
    }

    /// Ends the session of a desktop that is not heard any more.
    fn abandon(&self, session: SessionName) {
        let mut seat = self.seat();
        if seat.holder.as_ref().is_none_or(|holder| holder.session != session) {
            return;
        }
        self.setup
            .console
            .warn("the desktop was not heard for too long; its session is over");
        if self.close(&mut seat).is_ok() {
            self.leave(&mut seat, Goodbye::Poweroff);
            // Without a receiver the laptop's turn is over already.
            let _ = self.setup.news.send(News::Silent);
        }
    }

    fn give_up(&self, session: SessionName) {
        let mut seat = self.seat();
        if seat.holder.as_ref().is_some_and(|holder| holder.session == session) {
            // What fails was said already.
            let _ = self.close(&mut seat);
        }
    }

    fn goodbye(&self, session: SessionName, goodbye: Goodbye) -> Result<(), Refusal> {
        let mut seat = self.seat();
        if seat.holder.as_ref().is_none_or(|holder| holder.session != session) {
            return refuse("this session is over");
        }
        self.close_after(&mut seat)?;
        self.leave(&mut seat, goodbye);
        self.setup
            .console
            .info("the desktop has said goodbye; the disk is flushed and closed");
        Ok(())
    }

    /// Lets nobody in any more if the laptop's turn ends, and has PID 1 know that it does.
    fn leave(&self, seat: &mut Seat, goodbye: Goodbye) {
        let (_, Some(end)) = super::after_goodbye(goodbye, self.handover.after) else {
            return;
        };
        self.end_turn(seat, end);
    }

    /// The laptop's turn is over.
    fn end_turn(&self, seat: &mut Seat, end: End) {
        seat.closed = Some("the laptop is going home; wait until it is there, it can be woken then".to_owned());
        if let Err(error) = self.setup.records.verdict(end) {
            self.setup.console.warn(&format!("{error:#}"));
        }
    }

    /// As [`Inner::close`], but the link stays until the answer to the goodbye has gone through it.
    fn close_after(&self, seat: &mut Seat) -> Result<(), Refusal> {
        let link = self.setup.door.lock().as_mut().and_then(|open| open.link.take());
        let closed = self.close(seat);
        if let Some(link) = link {
            self.linger(link);
        }
        closed
    }

    /// Takes a link down when nothing is said through it any more.
    fn linger(&self, link: Up) {
        let spawned = std::thread::Builder::new().name("link-end".to_owned()).spawn(move || {
            std::thread::sleep(LINGER);
            drop(link);
        });
        if let Err(error) = spawned {
            self.setup
                .console
                .warn(&format!("the link ends before the desktop has its answer: {error}"));
        }
    }
}

fn size(mut disk: &File) -> anyhow::Result<u64> {
    use std::io::{Seek, SeekFrom};
    disk.seek(SeekFrom::End(0)).context("cannot ask the disk for its size")
}

/// Below this charge the laptop warns, in per cent.
const LOW: u8 = 15;
/// Below this one it asks the desktop to power off.
const CRITICAL: u8 = 5;
/// After so long without a sign of life the desktop counts as silent.
const SILENT: Duration = Duration::from_secs(10);
/// How long a desktop may take from the bundle to its first sign.
const START: Duration = Duration::from_mins(5);
/// How long the link outlives the goodbye: the desktop asks again for 18 s if the answer gets lost.
const LINGER: Duration = Duration::from_secs(20);

#[cfg(test)]
mod tests;
