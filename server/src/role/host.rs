//! Who owns the disk: opens it for one session at a time, and closes it in order before anything else may have it.
//!
//! The order at the end of a session is always the same: withdraw the export (nobody new gets in), drop the peer's
//! connections, wait until no request runs any more, flush, close the device. Only then may another session begin or
//! the laptop reboot.

use std::fs::File;
use std::net::{IpAddr, SocketAddr, SocketAddrV6};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use stiefel_shared::bundle::{ControlKey, DISK_PORT, DiskOffer, Goodbye, Manifest, Transport};
use stiefel_shared::handover::ServerHandover;
use stiefel_shared::session::{MachineId, SessionName};
use stiefel_sys::block::Disk;
use stiefel_sys::console::Console;
use tokio::sync::mpsc;

use crate::http::{Begin, Bundle, FeedError, Refusal, SessionHost};
use crate::nbd::{self, Export, ExportOptions, Gate, Listed};

/// How long requests that run may take until the disk is closed. A disk that does not answer for this long is broken.
const DRAIN: Duration = Duration::from_secs(60);

/// The NBD server's view: at most one export, for one peer.
#[derive(Default)]
pub(super) struct Door(Mutex<Option<Open>>);

struct Open {
    /// The desktop's link-local address. Its interface is not compared: after a re-plug it has another index, and who can
    /// forge the address still lacks the export's name.
    peer: IpAddr,
    export: Arc<Export>,
}

impl Door {
    fn lock(&self) -> MutexGuard<'_, Option<Open>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Gate for Door {
    fn admit(&self, peer: SocketAddr) -> bool {
        self.lock().as_ref().is_some_and(|open| open.peer == peer.ip())
    }

    fn export(&self, name: &str, peer: SocketAddr) -> Option<Arc<Export>> {
        self.lock()
            .as_ref()
            .filter(|open| open.peer == peer.ip() && open.export.name() == name)
            .map(|open| Arc::clone(&open.export))
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
    /// Why the disk could not be closed in order. What became of its last writes is unknown then, so nobody gets it again
    /// before the laptop was restarted.
    broken: Option<String>,
}

/// The disk and its one session.
pub(super) struct Host(Arc<Inner>);

struct Inner {
    console: &'static Console,
    handover: ServerHandover,
    disk: Disk,
    door: Arc<Door>,
    server: nbd::Server,
    /// Held across a whole change, so that changes happen one after the other.
    seat: Mutex<Seat>,
    parted: mpsc::UnboundedSender<Goodbye>,
    /// The per cent on the screen.
    shown: AtomicU64,
}

impl Host {
    pub(super) fn new(
        console: &'static Console,
        handover: ServerHandover,
        disk: Disk,
        door: Arc<Door>,
        server: nbd::Server,
        parted: mpsc::UnboundedSender<Goodbye>,
    ) -> Self {
        Self(Arc::new(Inner {
            console,
            handover,
            disk,
            door,
            server,
            seat: Mutex::default(),
            parted,
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
            .unwrap_or_else(|_| refuse("the laptop made a mistake; look at its screen"))
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

    async fn goodbye(&self, session: SessionName, _goodbye: Goodbye) -> Result<(), Refusal> {
        self.change(move |inner| inner.goodbye(session)).await
    }

    fn parted(&self, _session: SessionName, goodbye: Goodbye) {
        // Without a receiver the laptop's turn is over already.
        let _ = self.0.parted.send(goodbye);
    }
}

impl Inner {
    fn seat(&self) -> MutexGuard<'_, Seat> {
        self.seat.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin(&self, request: Begin) -> Result<Bundle, Refusal> {
        let mut seat = self.seat();
        if let Some(broken) = &seat.broken {
            return refuse(broken);
        }
        if let Some(present) = &seat.holder {
            if present.key != request.key || present.machine != request.machine {
                self.console.warn(&format!(
                    "refused the desktop at {} (key {}): the disk is in use by the one at {}",
                    request.peer.ip(),
                    request.key,
                    present.peer.ip()
                ));
                return refuse(format!(
                    "the disk is in use by another desktop (key {}); switch that one off first",
                    present.key
                ));
            }
            self.console
                .info("the same desktop starts anew and takes over from itself");
            self.close(&mut seat)?;
        }
        let made = self.open(&request);
        match made {
            Ok((open, bundle)) => {
                self.console.info(&format!(
                    "the desktop at {} (key {}) begins a session",
                    request.peer.ip(),
                    request.key
                ));
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
        let export = SessionName::generate()?.to_string();
        let options = ExportOptions {
            name: export.clone(),
            block_size: Some(self.disk.logical_block_size),
            ..ExportOptions::default()
        };
        let opened = Export::open(&self.disk.path, options)?;
        let mut identity = self.handover.disk.clone();
        identity.size = opened.size();
        let payload = self.handover.payload.clone();
        let parts = payload
            .parts
            .iter()
            .map(|part| File::open(Path::new("/").join(part.part.path())))
            .collect::<Result<_, _>>()?;
        let manifest = Manifest {
            hostname: self.handover.hostname.clone(),
            payload,
            disk: DiskOffer {
                identity,
                logical_block_size: self.disk.logical_block_size,
                transport: Transport::Nbd {
                    port: DISK_PORT,
                    export,
                },
            },
            control: ControlKey::generate()?,
            session: request.session.to_string(),
        };
        Ok((
            Open {
                peer: IpAddr::V6(*request.peer.ip()),
                export: opened,
            },
            Bundle { manifest, parts },
        ))
    }

    /// Ends the session that holds the disk, in order. After an error the disk may still be written to: nobody else gets it.
    fn close(&self, seat: &mut Seat) -> Result<(), Refusal> {
        if let Some(broken) = &seat.broken {
            return refuse(broken);
        }
        let open = self.door.lock().take();
        let dropped = self
            .server
            .drop_connections(DRAIN)
            .map_err(|error| format!("{:#}", anyhow::Error::new(error)));
        let flushed = open.map_or(Ok(()), |open| {
            open.export
                .flush()
                .map_err(|error| format!("the disk could not be flushed: {error}"))
        });
        if let Err(error) = dropped.and(flushed) {
            self.console.error(&error);
            seat.broken = Some(error.clone());
            return refuse(error);
        }
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

    fn goodbye(&self, session: SessionName) -> Result<(), Refusal> {
        let mut seat = self.seat();
        if seat.holder.as_ref().is_none_or(|holder| holder.session != session) {
            return refuse("this session is over");
        }
        self.close(&mut seat)?;
        self.console
            .info("the desktop has said goodbye; the disk is flushed and closed");
        Ok(())
    }
}
