//! The laptop's HTTP server: explains itself to people, opens sessions, sends the bundle, hears the goodbye.
//!
//! Counterpart: `client::fetch` and `client::control`. Requests and answers: docs/protocol.md, "HTTP"; what is inside
//! them is [`stiefel_shared::session`]. What happens with the disk is decided by the [`SessionHost`].
//!
//! Everything that a stranger can make it hold is bounded: connections (in all and per address), headers, bodies,
//! unfinished handshakes, and the time for each. One request per connection.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::{Ipv6Addr, SocketAddr, SocketAddrV6};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use socket2::{Domain, Protocol, Socket, Type};
use stiefel_shared::bundle::{ControlKey, Goodbye, Manifest};
use stiefel_shared::discovery::Responder;
use stiefel_shared::lend::{Ask, Loan};
use stiefel_shared::session::{MachineId, SessionName};
use stiefel_shared::unlock::{Passphrase, Unlocking};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;

mod feed;
mod places;
mod route;

use places::Places;
use route::Server;

/// A desktop that proved to be there and to have a key, and asks for a session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Begin {
    /// Where it is, with the scope id of the interface.
    pub peer: SocketAddrV6,
    /// The name of its stick's key.
    pub key: String,
    /// Which machine it is: the same key and machine may take over from itself.
    pub machine: MachineId,
    /// The name of the session, to be put into the manifest.
    pub session: SessionName,
}

/// What a session's desktop gets.
#[derive(Debug)]
pub struct Bundle {
    /// The manifest.
    pub manifest: Manifest,
    /// The files of `manifest.payload.parts`, in that order, at their start.
    pub parts: Vec<std::fs::File>,
}

/// No, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// In words for the person at the desktop.
    pub reason: String,
}

/// Who owns the disk and decides about sessions.
pub trait SessionHost: Send + Sync + 'static {
    /// Begins a session; the desktop is told to wait meanwhile. Ends an older one, if it does, in order.
    ///
    /// Runs to its end also if the desktop goes away; then [`SessionHost::fetched`] says so.
    fn begin(&self, request: Begin) -> impl Future<Output = Result<Bundle, Refusal>> + Send;

    /// Answers a question to a machine that lends single disks; a lent disk is a session then, which says goodbye.
    fn lend(&self, _request: Begin, _ask: Ask) -> impl Future<Output = Result<Loan, Refusal>> + Send {
        let reason = "this machine does not lend single disks: a desktop boots from it".to_owned();
        std::future::ready(Err(Refusal { reason }))
    }

    /// Takes a passphrase of a desktop, or tells what is wanted if it is empty. Runs to its end also if the desktop goes away.
    fn unlock(
        &self,
        _request: Begin,
        _passphrase: Passphrase,
    ) -> impl Future<Output = Result<Unlocking, Refusal>> + Send {
        let reason = "this machine waits for no passphrase".to_owned();
        std::future::ready(Err(Refusal { reason }))
    }

    /// The answer that all is open has left: now the laptop may go on.
    fn unlocked(&self) {}

    /// So many bytes of the bundle were sent.
    fn progress(&self, _session: SessionName, _done: u64, _total: u64) {}

    /// The bundle was sent to its end, or why it was not.
    fn fetched(&self, _session: SessionName, _outcome: Result<(), FeedError>) {}

    /// The desktop has finished with the disk. Flushes it before it returns `Ok`, which tells the desktop so.
    ///
    /// Called once per session, but again if it failed. Not interrupted when the desktop goes away.
    fn goodbye(&self, session: SessionName, goodbye: Goodbye) -> impl Future<Output = Result<(), Refusal>> + Send;

    /// The answer to an accepted goodbye has left: now the laptop may go, too.
    fn parted(&self, session: SessionName, goodbye: Goodbye);
}

/// Why the bundle was not sent to its end.
#[derive(Debug, thiserror::Error)]
pub enum FeedError {
    /// The host said no.
    #[error("the session was refused: {reason}")]
    Refused {
        /// What the desktop was told.
        reason: String,
    },
    /// The connection broke.
    #[error("the desktop went away before it had everything")]
    Gone,
    /// The connection is there, but nothing is taken from it.
    #[error("the desktop has taken nothing for too long")]
    Stalled,
    /// A part could not be read.
    #[error("the payload's part {part} could not be read")]
    Read {
        /// Its name for people.
        part: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The bundle cannot be sent as it is.
    #[error("the bundle could not be sent")]
    Stream(#[source] stiefel_shared::session::StreamError),
    /// Parts and manifest do not match.
    #[error("the bundle has another number of files than its manifest")]
    Parts,
}

/// What a stranger may use up.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// For a request's headers to arrive.
    pub header: Duration,
    /// For a request's body to arrive.
    pub body: Duration,
    /// For the desktop to take one chunk of the bundle.
    pub stall: Duration,
    /// How often a waiting desktop is told to wait on.
    pub waiting: Duration,
    /// Connections in all.
    pub connections: usize,
    /// Connections from one address.
    pub per_peer: usize,
    /// Handshakes that were answered but not followed.
    pub handshakes: usize,
    /// How long such a handshake is kept.
    pub handshake: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            header: Duration::from_secs(5),
            body: Duration::from_secs(5),
            stall: Duration::from_secs(30),
            waiting: Duration::from_secs(4),
            connections: 32,
            per_peer: 8,
            handshakes: 16,
            handshake: Duration::from_secs(30),
        }
    }
}

/// Why there is no HTTP server.
#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    /// The port is not ours.
    #[error("cannot listen for desktops on TCP port {port}; end the other program that uses it (`ss -tlpn`)")]
    Bind {
        /// The TCP port.
        port: u16,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Opens the listener on `[::]:port` (0: any, for tests), IPv6 only.
///
/// # Errors
/// [`HttpError::Bind`]. Call it inside a tokio runtime.
pub fn bind(port: u16) -> Result<TcpListener, HttpError> {
    (|| {
        let socket = Socket::new(Domain::IPV6, Type::STREAM.nonblocking().cloexec(), Some(Protocol::TCP))?;
        socket.set_only_v6(true)?;
        socket.set_reuse_address(true)?;
        socket.bind(&SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)).into())?;
        socket.listen(64)?;
        TcpListener::from_std(socket.into())
    })()
    .map_err(|source| HttpError::Bind { port, source })
}

/// Serves until the future is dropped, which also closes all connections.
///
/// `resumed` are sessions that an earlier process has begun: they can say goodbye. `responder` is shared with
/// [`crate::discovery`]: it knows what was offered to whom.
pub async fn run<H: SessionHost>(
    listener: TcpListener,
    host: Arc<H>,
    responder: Arc<Mutex<Responder>>,
    limits: Limits,
    resumed: Vec<(SessionName, ControlKey)>,
) -> Infallible {
    let server = Arc::new(Server::new(host, responder, limits));
    for (session, control) in resumed {
        server.resume(session, control);
    }
    let places = Places::new(limits.connections, limits.per_peer);
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let (stream, peer) = match listener.accept().await {
            Ok((stream, SocketAddr::V6(peer))) => (stream, peer),
            Ok(_) => continue,
            // Too many open files, or the peer has gone again; not in a busy loop.
            Err(_) => {
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        // One too many is closed at once, so that honest peers wait for a place and not in the backlog.
        let Some(place) = Places::take(&places, &peer) else {
            continue;
        };
        let server = Arc::clone(&server);
        connections.spawn(async move {
            serve(server, stream, peer).await;
            drop(place);
        });
    }
}

/// What a request's handler knows of its connection.
#[derive(Clone)]
struct Wire {
    peer: SocketAddrV6,
    /// Cuts the connection.
    cut: Arc<Notify>,
    /// Closed when the connection is.
    closed: watch::Receiver<()>,
}

async fn serve<H: SessionHost>(server: Arc<Server<H>>, stream: TcpStream, peer: SocketAddrV6) {
    // Only speed is lost without it.
    let _ = stream.set_nodelay(true);
    let limits = server.limits;
    let (open, closed) = watch::channel(());
    let wire = Wire {
        peer,
        cut: Arc::new(Notify::new()),
        closed,
    };
    let cut = Arc::clone(&wire.cut);
    let service = service_fn(move |request| {
        let (server, wire) = (Arc::clone(&server), wire.clone());
        async move { Ok::<_, Infallible>(server.answer(request, wire).await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.header)
        .keep_alive(false)
        .max_buf_size(16 * 1024)
        .max_headers(32)
        .serve_connection(TokioIo::new(stream), service);
    tokio::select! {
        // How a stranger's connection ended is of no interest; a session hears of it through its own channel.
        _ = connection => {}
        () = cut.notified() => {}
    }
    drop(open);
}

/// A lock that outlives a panic in another task: the data are plain tables.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
