//! Who owns the disk: opens it for one session at a time, and closes it in order before anything else may have it. Or it
//! opens it read-only, for guests ([`guests`]), of whom there may be several; never both.
//!
//! The order at the end of a session is always the same: withdraw the disk (nobody new gets in), drop the peer's
//! connections, wait until no request runs any more, flush, close the device, take the link down. Only then may another
//! session begin or the laptop reboot.
//!
//! What a session is made of is written down ([`record`](super::record)), so that it goes on when this process was killed
//! ([`resume`]).

mod end;
mod guests;
mod life;
mod links;
mod person;
mod resume;
mod seat;

use std::fs::File;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use stiefel_shared::bundle::{ControlKey, DeviceClaims, DiskOffer, Goodbye, LinkOffer, Manifest};
use stiefel_shared::handover::ServerHandover;
use stiefel_shared::session::SessionName;
use stiefel_sys::block::{Content, Disk};
use stiefel_sys::console::Console;
use tokio::sync::mpsc;

use life::Life;
use links::Links;
use seat::{Holder, Seat, Session};

use super::End;
use super::disk::{Base, Served, With};
use super::keys::Person;
use super::link::{Up, Wanted};
use super::machine::{Machine, within};
use super::record::{Record, Records};
use crate::http::{Begin, Bundle, FeedError, Refusal, SessionHost};
use crate::nbd::Export;
use crate::supply::Supply;

/// How long requests that run may take until the disk is closed. A disk that does not answer for this long is broken.
const DRAIN: Duration = Duration::from_secs(60);

/// What the host tells those who run it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum News {
    /// The laptop's turn ends; whoever had to know knows it.
    End(End),
    /// The disk could not be closed in order: what became of its last writes is unknown.
    Broken(String),
}

/// The disk and its sessions.
pub(super) struct Host(Arc<Inner>);

/// What a session begins with. By default it has the disk alone.
#[derive(Default)]
struct Opening {
    /// Its number among those that are there.
    place: u8,
    /// What guests share already, and how many bytes of memory this one's writes may take.
    guest: Option<(Option<Arc<Base>>, u64)>,
}

/// The disk, open for a session.
enum Taken {
    Own(File),
    Shared(Arc<Base>, u64),
}

/// What the host works with.
pub(super) struct Setup {
    pub(super) console: &'static Console,
    pub(super) machine: Box<dyn Machine>,
    /// Who decides when two desktops want the disk.
    pub(super) person: Arc<dyn Person>,
    pub(super) records: Records,
    /// The folder below which the payload's parts lie.
    pub(super) root: PathBuf,
    pub(super) news: mpsc::UnboundedSender<News>,
}

pub(super) struct Inner {
    setup: Setup,
    handover: ServerHandover,
    /// Held across a whole change, so that changes happen one after the other.
    seat: Mutex<Seat>,
    links: Links,
    lives: Mutex<Vec<Life>>,
    /// How the laptop's turn ends, and whose goodbye it was that ended it.
    over: OnceLock<(Option<SessionName>, End)>,
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
            links: Links::default(),
            lives: Mutex::default(),
            over: OnceLock::new(),
            supply: Mutex::default(),
            shown: AtomicU64::default(),
        }))
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

    fn parted(&self, session: SessionName, _goodbye: Goodbye) {
        if let Some((Some(last), end)) = self.0.over.get()
            && *last == session
        {
            // Without a receiver the laptop's turn is over already.
            let _ = self.0.setup.news.send(News::End(*end));
        }
    }
}

impl Inner {
    fn seat(&self) -> MutexGuard<'_, Seat> {
        self.seat.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The seat, when the desktop that asks has fallen silent in the session that it has already: one that starts anew says nothing
    /// in the old one. Who goes on saying something there is another one, with a copy of the stick. The seat is free meanwhile.
    fn let_fall_silent(&self, request: &Begin) -> MutexGuard<'_, Seat> {
        let seat = self.seat();
        let left = seat.of(request).map(|present| self.until_silent(present));
        match left.filter(|left| !left.is_zero()) {
            None => seat,
            Some(left) => {
                drop(seat);
                std::thread::sleep(left);
                self.seat()
            }
        }
    }

    fn begin(self: &Arc<Self>, request: Begin) -> Result<Bundle, Refusal> {
        let mut seat = self.let_fall_silent(&request);
        if let Some(closed) = &seat.closed {
            return refuse(closed);
        }
        if let Some(present) = seat
            .of(&request)
            .filter(|present| self.until_silent(*present).is_zero())
        {
            self.setup
                .console
                .info("the same desktop starts anew and takes over from itself");
            self.close(&mut seat, present)?;
        }
        let (mut seat, opening) = if self.has_guests() {
            let opening = self.plan_guest(&seat, &request)?;
            (seat, opening)
        } else {
            (self.contend(seat, &request)?, Opening::default())
        };
        let opened = {
            let (inner, request) = (Arc::clone(self), request.clone());
            within(DRAIN, move || inner.open(&request, opening))
        };
        let opened = match opened {
            Ok(opened) => opened,
            // It goes on, and would open the disk behind the next one's back.
            Err(error) => return Err(self.break_off(&mut seat, &error)),
        };
        match opened {
            Ok((session, link, bundle)) => {
                let (peer, key) = (request.peer.ip(), &request.key);
                let guest = match session.served.filled() {
                    Some((_, limit)) => format!(
                        " as a guest: nothing is kept; what it writes may take {} MiB of memory",
                        limit >> 20
                    ),
                    None => String::new(),
                };
                self.setup
                    .console
                    .info(&format!("the desktop at {peer} (key {key}) begins a session{guest}"));
                Self::has_returned(&mut seat, &request);
                self.links.add(request.session, link);
                seat.sessions.push(session);
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

    /// Opens the disk, or the guest's share of it, under a new secret name.
    fn open(self: &Arc<Self>, request: &Begin, opening: Opening) -> anyhow::Result<(Session, Up, Bundle)> {
        let (handover, place) = (&self.handover, opening.place);
        let (disk, taken) = self.take_disk(opening)?;
        let claims = self.claims(&disk)?;
        let wanted = Wanted {
            peer: request.peer,
            encryption: handover.encryption,
            mode: handover.mode,
            grace: handover.grace,
            place,
        };
        let (link, offer) = self.setup.machine.link(wanted).context("no link to the desktop")?;
        let with = With {
            machine: &*self.setup.machine,
            disk: &disk,
            watch: &|export: &Export| self.watch(request.session, export),
        };
        let guest = matches!(taken, Taken::Shared(..));
        let (served, transport) = match taken {
            Taken::Own(device) => Served::open(with, device, handover.transport, &offer)?,
            Taken::Shared(base, limit) => Served::to_guest(with, base, limit, &offer)?,
        };
        let offered = DiskOffer {
            identity: handover.disk.clone(),
            logical_block_size: disk.logical_block_size,
            transport,
            guest,
        };
        let session = Session {
            holder: Holder::new(request),
            place,
            served,
            warned: false,
        };
        let made = self
            .bundle(request, offered, offer, claims)
            .and_then(|bundle| self.write_down(&session, &link, &bundle).map(|()| bundle));
        match made {
            Ok(bundle) => Ok((session, link, bundle)),
            Err(error) => {
                // Nobody knows of it yet, so nothing was written.
                let _ = session.served.close(&*self.setup.machine, DRAIN);
                drop(link);
                let _ = self.setup.records.forget(request.session, place);
                Err(error)
            }
        }
    }

    /// Opens the disk exclusively, if no guest has it open already.
    fn take_disk(&self, opening: Opening) -> anyhow::Result<(Disk, Taken)> {
        let machine = &self.setup.machine;
        let disk = machine.disk()?;
        if let Some((Some(base), limit)) = opening.guest {
            ensure!(
                is_device(base.device(), disk.device)?,
                "the disk is not the one any more that the other guests have; is its plug loose? Restart the laptop"
            );
            return Ok((disk, Taken::Shared(base, limit)));
        }
        let held = machine.open(&disk, opening.guest.is_none())?;
        // Open and exclusive now: it is still the same one, or another has taken its name in between.
        let again = machine.disk().context("the disk went away while it was opened")?;
        ensure!(
            again.device == disk.device && size(&held)? == self.handover.disk.size,
            "the disk changed while it was opened; is its plug loose? Start the desktop again"
        );
        let taken = match opening.guest {
            None => Taken::Own(held),
            Some((_, limit)) => Taken::Shared(Base::new(held, &disk)?, limit),
        };
        Ok((disk, taken))
    }

    /// By what the disk is found, for the desktop to compare with its own.
    ///
    /// # Errors
    /// A hibernated system lies on it: its memory would no longer fit to what the desktop leaves on the disk.
    fn claims(&self, disk: &Disk) -> anyhow::Result<Vec<DeviceClaims>> {
        const NEXT: &str = "start the laptop by itself, let that system resume and shut it down fully, then try again";
        let contents = self
            .setup
            .machine
            .contents(disk)
            .context("what lies on the disk cannot be read, so nobody gets it")?;
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
    fn write_down(&self, session: &Session, link: &Up, bundle: &Bundle) -> anyhow::Result<()> {
        let Session {
            holder, place, served, ..
        } = session;
        self.setup.records.hold_disk(served.device())?;
        if let Some(upper) = served.upper() {
            self.setup.records.hold_memory(*place, upper.as_fd())?;
        }
        self.setup.records.write(Record {
            session: holder.session.to_string(),
            key: holder.key.clone(),
            machine: holder.machine.to_string(),
            peer: holder.peer,
            control: bundle.manifest.control.clone(),
            transport: bundle.manifest.disk.transport.clone(),
            link: link.known().clone(),
            beat: 0,
            place: *place,
            memory: served.filled().map(|(_, limit)| limit),
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

    /// Has it noted, before anybody is told, that a session has lost data; and lets nobody forget what was noted.
    fn watch(self: &Arc<Self>, session: SessionName, export: &Export) {
        let inner = Arc::downgrade(self);
        export.on_failure(Box::new(move |why| {
            if let Some(inner) = inner.upgrade() {
                inner.setup.records.note_failure(session, why);
            }
        }));
        if let Some(why) = self.setup.records.failed(session) {
            export.fail(&why);
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

#[cfg(test)]
mod tests;
