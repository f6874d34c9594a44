//! Who owns the disk: opens it for one session at a time, and closes it in order before anything else may have it.
//!
//! The order at the end of a session is always the same: withdraw the export (nobody new gets in), drop the peer's
//! connections, wait until no request runs any more, flush, close the device, take the tunnel down. Only then may another
//! session begin or the laptop reboot.

use std::fs::File;
use std::net::{IpAddr, SocketAddr, SocketAddrV6};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, ensure};
use stiefel_shared::bundle::{ControlKey, DISK_PORT, DiskOffer, Goodbye, Manifest, Transport, Tunnel};
use stiefel_shared::discovery::LinkEvent;
use stiefel_shared::handover::{After, Encryption, ServerHandover};
use stiefel_shared::session::{MachineId, SessionName};
use stiefel_sys::block::Disk;
use stiefel_sys::console::Console;
use tokio::sync::mpsc;

use super::tunnel;
use crate::http::{Begin, Bundle, FeedError, Refusal, SessionHost};
use crate::nbd::{self, Export, ExportOptions, Gate, Listed};

/// How long requests that run may take until the disk is closed. A disk that does not answer for this long is broken.
const DRAIN: Duration = Duration::from_secs(60);

/// What the host tells those who run it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum News {
    /// A desktop has said goodbye, and knows that it was heard.
    Parted(Goodbye),
    /// The disk could not be closed in order: what became of its last writes is unknown.
    Broken(String),
}

/// The NBD server's view: at most one export, for one peer.
#[derive(Default)]
pub(super) struct Door(Mutex<Option<Open>>);

struct Open {
    /// The desktop's address: in the tunnel, or link-local without one. An interface is not compared: after a re-plug it has
    /// another index.
    peer: IpAddr,
    export: Arc<Export>,
    /// The tunnel goes with the session.
    tunnel: Option<tunnel::Up>,
}

impl Door {
    /// Tells the session's tunnel of an interface that came or went.
    pub(super) fn follow(&self, event: &LinkEvent) -> anyhow::Result<()> {
        match self.lock().as_mut().and_then(|open| open.tunnel.as_mut()) {
            Some(tunnel) => tunnel.follow(event),
            None => Ok(()),
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
        let open = door
            .as_ref()
            .filter(|open| open.peer == peer.ip() && open.export.name() == name)?;
        Some(Arc::clone(&open.export))
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
    /// Why nobody gets the disk any more before the laptop was restarted.
    closed: Option<String>,
}

/// Finds the disk by its identity, each time anew: names such as /dev/sda change their meaning when a disk is re-plugged.
pub(super) type Locate = Box<dyn Fn() -> anyhow::Result<Disk> + Send + Sync>;

/// The disk and its one session.
pub(super) struct Host(Arc<Inner>);

pub(super) struct Inner {
    console: &'static Console,
    handover: ServerHandover,
    locate: Locate,
    /// The folder below which the payload's parts lie.
    root: PathBuf,
    door: Arc<Door>,
    server: nbd::Server,
    /// Held across a whole change, so that changes happen one after the other.
    seat: Mutex<Seat>,
    news: mpsc::UnboundedSender<News>,
    /// The per cent on the screen.
    shown: AtomicU64,
}

impl Host {
    pub(super) fn new(
        console: &'static Console,
        handover: ServerHandover,
        locate: Locate,
        root: &Path,
        door: Arc<Door>,
        server: nbd::Server,
        news: mpsc::UnboundedSender<News>,
    ) -> Self {
        Self(Arc::new(Inner {
            console,
            handover,
            locate,
            root: root.to_owned(),
            door,
            server,
            seat: Mutex::default(),
            news,
            shown: AtomicU64::default(),
        }))
    }

    /// Runs a change on a thread for blocking work. It goes on to its end also when the desktop that asked goes away.
    async fn change<T: Send + 'static>(
        &self,
        change: impl FnOnce(&Inner) -> Result<T, Refusal> + Send + 'static,
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
                .console
                .progress(&format!("the desktop receives: {percent:>3} %"));
        }
    }

    fn fetched(&self, session: SessionName, outcome: Result<(), FeedError>) {
        match outcome {
            Ok(()) => self.0.console.info("the desktop has everything and starts"),
            Err(FeedError::Refused { .. }) => {}
            Err(error) => {
                self.0.console.warn(&format!("{:#}", anyhow::Error::new(error)));
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
        let _ = self.0.news.send(News::Parted(goodbye));
    }
}

impl Inner {
    fn seat(&self) -> MutexGuard<'_, Seat> {
        self.seat.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin(&self, request: Begin) -> Result<Bundle, Refusal> {
        let mut seat = self.seat();
        if let Some(closed) = &seat.closed {
            return refuse(closed);
        }
        if let Some(present) = &seat.holder {
            if present.key != request.key || present.machine != request.machine {
                let (peer, key, there) = (request.peer.ip(), &request.key, present.peer.ip());
                self.console.warn(&format!(
                    "refused the desktop at {peer} (key {key}): the disk is in use by the one at {there}"
                ));
                return refuse(format!(
                    "the disk is in use by another desktop (key {}); switch that one off, or restart the laptop",
                    present.key
                ));
            }
            self.console
                .info("the same desktop starts anew and takes over from itself");
            self.close(&mut seat)?;
        }
        match self.open(&request) {
            Ok((open, bundle)) => {
                let (peer, key) = (request.peer.ip(), &request.key);
                self.console
                    .info(&format!("the desktop at {peer} (key {key}) begins a session"));
                *self.door.lock() = Some(open);
                seat.holder = Some(Holder {
                    session: request.session,
                    peer: request.peer,
                    key: request.key,
                    machine: request.machine,
                });
                Ok(bundle)
            }
            Err(error) => {
                self.console.error(&format!("{error:#}"));
                refuse(format!("{error:#}"))
            }
        }
    }

    /// Opens the disk under a new secret name.
    fn open(&self, request: &Begin) -> anyhow::Result<(Open, Bundle)> {
        let disk = (self.locate)()?;
        let export = SessionName::generate()?.to_string();
        let options = ExportOptions {
            name: export.clone(),
            block_size: Some(disk.logical_block_size),
            single: true,
            ..ExportOptions::default()
        };
        let opened = Export::open(&disk.path, options)?;
        // Open and exclusive now: it is still the same one, or another has taken its name in between.
        let again = (self.locate)().context("the disk went away while it was opened")?;
        ensure!(
            again.device == disk.device && opened.size() == self.handover.disk.size,
            "the disk changed while it was opened; is its plug loose? Start the desktop again"
        );
        let (tunnel, peer) = match self.handover.encryption {
            Encryption::None => (None, *request.peer.ip()),
            Encryption::Wireguard => {
                let (up, tunnel) = tunnel::set_up(request.peer).context("no tunnel to the desktop")?;
                let peer = tunnel.address;
                (Some((up, tunnel)), peer)
            }
        };
        let (up, tunnel) = tunnel.unzip();
        let bundle = self.bundle(request, &disk, export, tunnel)?;
        Ok((
            Open {
                peer: IpAddr::V6(peer),
                export: opened,
                tunnel: up,
            },
            bundle,
        ))
    }

    fn bundle(&self, request: &Begin, disk: &Disk, export: String, tunnel: Option<Tunnel>) -> anyhow::Result<Bundle> {
        let payload = self.handover.payload.clone();
        let parts = payload
            .parts
            .iter()
            .map(|part| File::open(self.root.join(part.part.path())));
        let parts = parts.collect::<Result<_, _>>().context("the payload is not there")?;
        let manifest = Manifest {
            hostname: self.handover.hostname.clone(),
            payload,
            disk: DiskOffer {
                identity: self.handover.disk.clone(),
                logical_block_size: disk.logical_block_size,
                transport: Transport::Nbd {
                    port: DISK_PORT,
                    export,
                },
            },
            tunnel,
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
        let open = self.door.lock().take();
        // Also flushes; what was never granted was never written.
        if let Err(error) = self.server.drop_connections(DRAIN) {
            let error = format!("{:#}", anyhow::Error::new(error));
            seat.closed = Some(error.clone());
            // Without a receiver the laptop's turn is over already.
            let _ = self.news.send(News::Broken(error.clone()));
            return refuse(error);
        }
        // The last hold of the disk: this closes it, and takes the tunnel down.
        drop(open);
        seat.holder = None;
        Ok(())
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
        if goodbye == Goodbye::Poweroff && self.handover.after != After::Stay {
            seat.closed = Some("the laptop is going home; wait until it is there, it can be woken then".to_owned());
        }
        self.console
            .info("the desktop has said goodbye; the disk is flushed and closed");
        Ok(())
    }

    /// As [`Inner::close`], but the tunnel stays until the answer to the goodbye has gone through it.
    fn close_after(&self, seat: &mut Seat) -> Result<(), Refusal> {
        let tunnel = self.door.lock().as_mut().and_then(|open| open.tunnel.take());
        let closed = self.close(seat);
        if let Some(tunnel) = tunnel {
            self.linger(tunnel);
        }
        closed
    }

    /// Takes a tunnel down when nothing is said through it any more.
    fn linger(&self, tunnel: tunnel::Up) {
        let spawned = std::thread::Builder::new()
            .name("tunnel-end".to_owned())
            .spawn(move || {
                std::thread::sleep(LINGER);
                drop(tunnel);
            });
        if let Err(error) = spawned {
            self.console
                .warn(&format!("the tunnel ends before the desktop has its answer: {error}"));
        }
    }
}

/// How long the tunnel outlives the goodbye: the desktop asks again for 18 s if the answer gets lost.
const LINGER: Duration = Duration::from_secs(20);

#[cfg(test)]
mod tests;
