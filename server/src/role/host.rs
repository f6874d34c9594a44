//! Who owns the disk: opens it for one session at a time, and closes it in order before anything else may have it.
//!
//! The order at the end of a session is always the same: withdraw the disk (nobody new gets in), drop the peer's
//! connections, wait until no request runs any more, flush, close the device, take the link down. Only then may another
//! session begin or the laptop reboot.
//!
//! What a session is made of is written down ([`record`](super::record)), so that it goes on when this process was killed.

mod life;
mod person;

use std::fs::File;
use std::net::{IpAddr, SocketAddr, SocketAddrV6};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use stiefel_shared::bundle::{ControlKey, DeviceClaims, DiskOffer, Goodbye, LinkOffer, Manifest, Transport};
use stiefel_shared::discovery::LinkEvent;
use stiefel_shared::handover::ServerHandover;
use stiefel_shared::session::{MachineId, SessionName};
use stiefel_sys::block::{Content, Disk};
use stiefel_sys::console::Console;
use tokio::sync::mpsc;

use life::Life;

use super::End;
use super::disk::Served;
use super::keys::Person;
use super::link::{Known, Up, Wanted};
use super::machine::{Machine, within};
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
    /// Tells the session's link of an interface that came or went; how it is known when that has changed something.
    fn follow(&self, event: &LinkEvent, silent: bool) -> anyhow::Result<Option<Known>> {
        match self.lock().as_mut().and_then(|open| open.link.as_mut()) {
            Some(link) => Ok(link.follow(event, silent)?.then(|| link.known().clone())),
            None => Ok(None),
        }
    }

    /// The packet size of the session's link, in bytes.
    fn mtu(&self) -> u32 {
        let door = self.lock();
        let link = door.as_ref().and_then(|open| open.link.as_ref());
        link.map_or(0, |link| link.known().mtu)
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
        let opened = {
            let (inner, request) = (Arc::clone(self), request.clone());
            within(DRAIN, move || inner.open(&request))
        };
        let opened = match opened {
            Ok(opened) => opened,
            // It goes on, and would open the disk behind the next one's back.
            Err(error) => return Err(self.break_off(&mut seat, &error)),
        };
        match opened {
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
                self.begin_life(request.session, &bundle.manifest.control, IpAddr::V6(address), None);
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
                drop(open);
                let _ = self.setup.records.clear();
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
        self.setup.records.write(Record {
            session: request.session.to_string(),
            key: request.key.clone(),
            machine: request.machine.to_string(),
            peer: request.peer,
            control: bundle.manifest.control.clone(),
            transport: bundle.manifest.disk.transport.clone(),
            link: link.known().clone(),
            beat: 0,
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
        self.close_with(seat, None)
    }

    /// As [`Inner::close`]; with the session the laptop's turn may end.
    fn close_with(&self, seat: &mut Seat, end: Option<End>) -> Result<(), Refusal> {
        if let Some(closed) = &seat.closed {
            return refuse(closed);
        }
        let open = self.setup.door.lock().take();
        if let Some(open) = open
            && let Err(error) = open.served.close(&*self.setup.machine, &self.setup.server, DRAIN)
        {
            return Err(self.break_off(seat, &error));
        }
        // Before the record goes: a process that was killed in between would serve on.
        if let Some(end) = end {
            self.end_turn(seat, end);
        }
        // PID 1 may still have the disk open otherwise, so nobody may have it; it ends with the ramdisk.
        if let Err(error) = self.setup.records.clear() {
            return Err(self.break_off(seat, &error));
        }
        (seat.holder, seat.denied) = (None, None);
        self.setup.person.never_mind();
        *self.life() = None;
        self.ask.store(false, Ordering::Release);
        Ok(())
    }

    /// What is done with the disk is not known any more: nobody gets it, and the laptop goes home, whatever hangs.
    fn break_off(&self, seat: &mut Seat, error: &anyhow::Error) -> Refusal {
        let reason = format!("{error:#}");
        seat.closed = Some(reason.clone());
        if let Err(error) = self.setup.records.verdict(End::GiveUp) {
            self.setup.console.warn(&format!("{error:#}"));
        }
        // Without a receiver the laptop's turn is over already.
        let _ = self.setup.news.send(News::Broken(reason.clone()));
        Refusal { reason }
    }

    /// Goes on with the session that an earlier process has left, if there is one; its name and secret.
    pub(super) fn resume(self: &Arc<Self>) -> anyhow::Result<Option<(SessionName, ControlKey)>> {
        let Some((record, device)) = self.setup.records.read()? else {
            return Ok(None);
        };
        let mut seat = self.seat();
        let disk = self.setup.machine.disk()?;
        ensure!(
            size(&device)? == self.handover.disk.size && is_device(&device, disk.device)?,
            "the disk that was kept is not the one that is there now"
        );
        if let Transport::NvmeTcp { nqn, .. } = &record.transport {
            ensure!(self.setup.machine.published(nqn), "the disk is not served any more");
        }
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
        // What was heard since it was noted may be said again, once.
        self.begin_life(session, &record.control, peer, Some(record.beat));
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
        self.close_after(&mut seat, self.end_after(goodbye))?;
        self.setup
            .console
            .info("the desktop has said goodbye; the disk is flushed and closed");
        Ok(())
    }

    /// Whether the laptop's turn ends with a goodbye.
    fn end_after(&self, goodbye: Goodbye) -> Option<End> {
        super::after_goodbye(goodbye, self.handover.after).1
    }

    /// Lets nobody in any more, and has PID 1 know that the laptop's turn ends.
    fn end_turn(&self, seat: &mut Seat, end: End) {
        seat.closed = Some("the laptop is going home; wait until it is there, it can be woken then".to_owned());
        if let Err(error) = self.setup.records.verdict(end) {
            self.setup.console.warn(&format!("{error:#}"));
        }
    }

    /// As [`Inner::close_with`], but the link stays until the answer to the goodbye has gone through it.
    fn close_after(&self, seat: &mut Seat, end: Option<End>) -> Result<(), Refusal> {
        let link = self.setup.door.lock().as_mut().and_then(|open| open.link.take());
        let closed = self.close_with(seat, end);
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

/// Whether an open file is this block device; a file that is none stands for any, in tests.
fn is_device(file: &File, device: (u32, u32)) -> anyhow::Result<bool> {
    use std::os::unix::fs::{FileTypeExt, MetadataExt};
    let metadata = file.metadata().context("cannot look at the disk that was kept")?;
    let number = (rustix::fs::major(metadata.rdev()), rustix::fs::minor(metadata.rdev()));
    Ok(!metadata.file_type().is_block_device() || number == device)
}

fn size(mut disk: &File) -> anyhow::Result<u64> {
    use std::io::{Seek, SeekFrom};
    disk.seek(SeekFrom::End(0)).context("cannot ask the disk for its size")
}

/// How long the link outlives the goodbye: the desktop asks again for 18 s if the answer gets lost.
const LINGER: Duration = Duration::from_secs(20);

#[cfg(test)]
mod tests;
