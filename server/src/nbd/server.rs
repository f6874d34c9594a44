//! Accepts connections, counts them, and drops them with every request ended.

use std::collections::HashMap;
use std::io::{self, BufReader};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use socket2::{SockRef, TcpKeepalive};
use thiserror::Error;

use super::driver::transmit;
use super::export::Export;
use super::negotiate::{self, Catalogue, Listed};
use super::pool::Pool;
use super::wire::{Peer, Wire};
use super::{Gate, Limits};

/// Requests that a client sent ahead and that are taken in one system call, in bytes.
const RECEIVE_BUFFER: usize = 32 << 10;
/// How long running requests may still send their replies before the sockets are closed under them.
const LAST_REPLIES: Duration = Duration::from_millis(500);
/// How long a new connection to an export for one waits for the earlier one's requests; shorter than its client's patience.
const RETIRE: Duration = Duration::from_secs(8);
/// Silence after which the peer is asked whether it still lives, and the pause between two such questions.
const PROBE: Duration = Duration::from_secs(30);

/// Why connections could not be dropped as promised: the disk must not be given to anyone else.
#[derive(Debug, Error)]
pub enum DropError {
    /// Requests still run, as on a disk that does not answer.
    #[error("{connections} NBD connections still have running requests after {waited:?}; the disk may be hanging")]
    StillRunning {
        /// How many connections.
        connections: usize,
        /// How long it was waited for them.
        waited: Duration,
    },
    /// The final flush failed.
    #[error("the final flush of {path:?} failed; data may be lost, check the disk")]
    Flush {
        /// What was exported.
        path: PathBuf,
        /// The medium's error.
        #[source]
        source: io::Error,
    },
    /// There was no thread for the final flush.
    #[error("no thread could be had for the final flush of the NBD exports; free some memory and try again")]
    NoThread(#[source] io::Error),
    /// The final flush did not end in time.
    #[error("the final flush of the NBD exports did not end in {waited:?}; the disk may be hanging")]
    FlushHangs {
        /// How long it was waited for.
        waited: Duration,
    },
}

/// A listening NBD server. Dropping it closes the listener and all sockets, without waiting.
pub struct Server {
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
    wake: Arc<OwnedFd>,
}

struct Shared {
    gate: Arc<dyn Gate>,
    limits: Limits,
    peers: Mutex<HashMap<u64, Client>>,
    left: Condvar,
    next: AtomicU64,
    pool: Arc<Pool>,
    /// Everything that was ever served, for the final flush.
    exports: Mutex<Vec<Weak<Export>>>,
    stopping: AtomicBool,
}

/// One connection, and the export that it was granted last.
struct Client {
    peer: Arc<Peer>,
    export: Weak<Export>,
}

impl Client {
    fn serves(&self, export: &Arc<Export>) -> bool {
        std::ptr::eq(self.export.as_ptr(), Arc::as_ptr(export))
    }
}

impl Server {
    /// Serves what `gate` gives out to those who connect to `listener`.
    ///
    /// # Errors
    /// No thread or event descriptor could be had.
    pub fn start(listener: TcpListener, gate: Arc<dyn Gate>, limits: Limits) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let shared = Arc::new(Shared {
            gate,
            limits,
            peers: Mutex::default(),
            left: Condvar::new(),
            next: AtomicU64::new(0),
            pool: Arc::default(),
            exports: Mutex::default(),
            stopping: AtomicBool::new(false),
        });
        let (accepting, woken) = (Arc::clone(&shared), Arc::clone(&wake));
        let acceptor = thread::Builder::new()
            .name("nbd-accept".into())
            .spawn(move || accept_all(&listener, &woken, &accepting))?;
        Ok(Self {
            shared,
            acceptor: Some(acceptor),
            wake,
        })
    }

    /// Connections at this moment, negotiating ones included.
    #[must_use]
    pub fn connections(&self) -> usize {
        lock(&self.shared.peers).len()
    }

    /// Drops every connection there is, waits until none of their requests runs any more, and flushes what was served.
    /// Who connects later is asked of the gate anew: withdraw the export there first.
    ///
    /// # Errors
    /// See [`DropError`]; after an error nothing is known about what still reaches the disk.
    pub fn drop_connections(&self, deadline: Duration) -> Result<(), DropError> {
        let begun = Instant::now();
        self.shared.retire(&|_, _| true, begun, deadline)?;
        self.shared.flush_all(begun, deadline)
    }

    /// As [`Server::drop_connections`], for those who have one export; the others are left alone.
    ///
    /// # Errors
    /// See [`DropError`].
    pub fn drop_export(&self, export: &Arc<Export>, deadline: Duration) -> Result<(), DropError> {
        let begun = Instant::now();
        let doomed = |_: u64, client: &Client| client.serves(export);
        self.shared.retire(&doomed, begun, deadline)?;
        self.shared.flush_some(begun, deadline, vec![Arc::clone(export)])
    }

    /// Who has been granted which export.
    #[must_use]
    pub fn clients(&self) -> Vec<(SocketAddr, Arc<Export>)> {
        let peers = lock(&self.shared.peers);
        peers
            .values()
            .filter_map(|client| Some((client.peer.stream.peer_addr().ok()?, client.export.upgrade()?)))
            .collect()
    }

    /// Closes the listener, then does as [`Server::drop_connections`].
    ///
    /// # Errors
    /// See [`DropError`].
    pub fn stop(mut self, deadline: Duration) -> Result<(), DropError> {
        self.stop_accepting();
        self.drop_connections(deadline)
    }

    fn stop_accepting(&mut self) {
        self.shared.stopping.store(true, Ordering::Release);
        // Cannot fail: the counter of a fresh event descriptor has room for one.
        let _ = rustix::io::write(&*self.wake, &1_u64.to_ne_bytes());
        if let Some(acceptor) = self.acceptor.take() {
            // It returns at once and does not panic; nothing could be done if it had.
            let _ = acceptor.join();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop_accepting();
        for Client { peer, .. } in lock(&self.shared.peers).values() {
            peer.closing.store(true, Ordering::Release);
            let _ = peer.stream.shutdown(Shutdown::Both);
        }
    }
}

impl Shared {
    /// Ends the connections that came before `before` and have the same export, without any further answer: their client asks
    /// again on the new one, for an error would be one of the disk's to it. Whether `before` is the newest that has it.
    fn replace(&self, before: u64, export: &Arc<Export>) -> bool {
        let doomed = |id: u64, client: &Client| id < before && client.serves(export);
        {
            let mut peers = lock(&self.peers);
            // Noted before the others are looked at: of two that ask at once, each sees the other.
            if let Some(client) = peers.get_mut(&before) {
                client.export = Arc::downgrade(export);
            }
            if peers.iter().any(|(id, client)| *id > before && client.serves(export)) {
                return false;
            }
            for (_, client) in peers.iter().filter(|(id, client)| doomed(**id, client)) {
                let _ = client.peer.stream.shutdown(Shutdown::Both);
            }
        }
        self.retire(&doomed, Instant::now(), RETIRE).is_ok()
    }

    /// Ends the connections that are `doomed`, and waits until none of their requests runs any more.
    fn retire(
        &self,
        doomed: &dyn Fn(u64, &Client) -> bool,
        begun: Instant,
        deadline: Duration,
    ) -> Result<(), DropError> {
        let doomed: Vec<(u64, Arc<Peer>)> = lock(&self.peers)
            .iter()
            .filter(|(id, client)| doomed(**id, client))
            .map(|(id, client)| (*id, Arc::clone(&client.peer)))
            .collect();
        for (_, peer) in &doomed {
            peer.closing.store(true, Ordering::Release);
            // Fails only if the peer has closed already.
            let _ = peer.stream.shutdown(Shutdown::Read);
        }
        let ids: Vec<u64> = doomed.iter().map(|(id, _)| *id).collect();
        if self.wait_for(&ids, begun + LAST_REPLIES.min(deadline)) > 0 {
            for (_, peer) in &doomed {
                let _ = peer.stream.shutdown(Shutdown::Both);
            }
            let connections = self.wait_for(&ids, begun + deadline);
            if connections > 0 {
                return Err(DropError::StillRunning {
                    connections,
                    waited: deadline,
                });
            }
        }
        Ok(())
    }

    /// Waits for connections to end; returns how many are left at the deadline.
    fn wait_for(&self, ids: &[u64], deadline: Instant) -> usize {
        let mut peers = lock(&self.peers);
        loop {
            let running = ids.iter().filter(|id| peers.contains_key(id)).count();
            let left = deadline.saturating_duration_since(Instant::now());
            if running == 0 || left.is_zero() {
                return running;
            }
            peers = self
                .left
                .wait_timeout(peers, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Flushes all exports that are still held by someone, in a thread of its own because a disk may hang.
    fn flush_all(&self, begun: Instant, deadline: Duration) -> Result<(), DropError> {
        let exports: Vec<Arc<Export>> = lock(&self.exports).iter().filter_map(Weak::upgrade).collect();
        self.flush_some(begun, deadline, exports)
    }

    fn flush_some(&self, begun: Instant, deadline: Duration, exports: Vec<Arc<Export>>) -> Result<(), DropError> {
        if exports.is_empty() {
            return Ok(());
        }
        let (done, result) = mpsc::channel();
        let flush = move || {
            let flushed = exports.iter().try_for_each(|export| {
                let path = export.path().to_owned();
                export.flush().map_err(|source| DropError::Flush { path, source })
            });
            // Before the answer, so that the caller's own handle is then the last one and closes the device.
            drop(exports);
            // Our caller may be gone already, as nobody waits longer than the deadline.
            let _ = done.send(flushed);
        };
        thread::Builder::new()
            .name("nbd-flush".into())
            .spawn(flush)
            .map_err(DropError::NoThread)?;
        let left = (begun + deadline).saturating_duration_since(Instant::now());
        result
            .recv_timeout(left)
            .unwrap_or(Err(DropError::FlushHangs { waited: deadline }))
    }

    /// Notes what a connection was granted.
    fn note(&self, id: u64, export: &Arc<Export>) {
        if let Some(client) = lock(&self.peers).get_mut(&id) {
            client.export = Arc::downgrade(export);
        }
    }

    fn remember(&self, export: &Arc<Export>) {
        let mut exports = lock(&self.exports);
        exports.retain(|known| known.strong_count() > 0);
        if !exports.iter().any(|known| known.as_ptr() == Arc::as_ptr(export)) {
            exports.push(Arc::downgrade(export));
        }
    }
}

fn accept_all(listener: &TcpListener, wake: &OwnedFd, shared: &Arc<Shared>) {
    while !shared.stopping.load(Ordering::Acquire) {
        let mut wanted = [PollFd::new(listener, PollFlags::IN), PollFd::new(wake, PollFlags::IN)];
        // Interrupted or not: both descriptors are looked at below.
        let _ = poll(&mut wanted, None);
        if shared.stopping.load(Ordering::Acquire) {
            return;
        }
        match listener.accept() {
            Ok((stream, address)) => welcome(stream, address, shared),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            // The client is gone already, or we are out of descriptors for the moment.
            Err(_) => thread::sleep(Duration::from_millis(50)),
        }
    }
}

/// Lets a new client in, or closes its connection without a byte.
fn welcome(stream: TcpStream, address: SocketAddr, shared: &Arc<Shared>) {
    if prepare(&stream, shared.limits.peer_timeout).is_err() {
        return;
    }
    let peer = Arc::new(Peer {
        stream,
        closing: AtomicBool::new(false),
    });
    let id = shared.next.fetch_add(1, Ordering::Relaxed);
    {
        let mut peers = lock(&shared.peers);
        if peers.len() >= shared.limits.connections {
            return;
        }
        let client = Client {
            peer: Arc::clone(&peer),
            export: Weak::new(),
        };
        peers.insert(id, client);
    }
    // From here on drop_connections knows it. The gate is asked only now, so that who was let in by a gate's old state
    // is dropped for certain.
    let guard = Registered {
        shared: Arc::clone(shared),
        id,
    };
    if !shared.gate.admit(address) {
        return;
    }
    let serve = move || serve(peer, guard, address);
    // Without a thread the guard is dropped, which closes the connection.
    let _ = shared.pool.run(Box::new(serve));
}

/// Sets the socket up: no delays, and a dead peer is noticed, but not too early.
fn prepare(stream: &TcpStream, peer_timeout: Duration) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_nodelay(true)?;
    let socket = SockRef::from(stream);
    let probes = (peer_timeout.as_secs() / PROBE.as_secs()).clamp(1, 127);
    let keepalive = TcpKeepalive::new()
        .with_time(PROBE)
        .with_interval(PROBE)
        .with_retries(u32::try_from(probes).unwrap_or(127));
    socket.set_tcp_keepalive(&keepalive)?;
    // Congestion control is for a network. Where there is none, one that sends by a timer's pace (BBR) only costs: half the
    // speed. The kernel always has this one; where it is forbidden, the other stays.
    if stream.peer_addr()?.ip().to_canonical().is_loopback() {
        let _ = socket.set_tcp_congestion(b"reno");
    }
    socket.set_tcp_user_timeout(Some(peer_timeout))
}

/// Takes a connection off the list when its thread ends, however it ends.
struct Registered {
    shared: Arc<Shared>,
    id: u64,
}

impl Drop for Registered {
    fn drop(&mut self) {
        if let Some(Client { peer, .. }) = lock(&self.shared.peers).remove(&self.id) {
            // Fails only if the peer has closed already.
            let _ = peer.stream.shutdown(Shutdown::Both);
        }
        self.shared.left.notify_all();
    }
}

/// What one client sees of the gate.
struct View<'a> {
    shared: &'a Shared,
    peer: &'a Peer,
    id: u64,
    address: SocketAddr,
}

impl Catalogue for View<'_> {
    type Export = Arc<Export>;

    fn export(&self, name: &str) -> Option<Arc<Export>> {
        let export = self.shared.gate.export(name, self.address)?;
        // Refused while an old request hangs on the disk: the client tries again.
        let alone = if export.single() {
            self.shared.replace(self.id, &export)
        } else {
            self.shared.note(self.id, &export);
            true
        };
        // Asked again, now that `drop_export` finds this connection: it may have been withdrawn meanwhile.
        let still = self.shared.gate.export(name, self.address);
        let alone = alone && still.is_some_and(|still| Arc::ptr_eq(&still, &export));
        alone.then_some(export)
    }

    fn look(&self, name: &str) -> Option<Arc<Export>> {
        self.shared.gate.look(name, self.address)
    }

    fn list(&self) -> Vec<Listed> {
        self.shared.gate.list(self.address)
    }

    fn closing(&self) -> bool {
        self.peer.closing.load(Ordering::Acquire)
    }
}

/// Negotiates with one client and serves it to the end.
fn serve(peer: Arc<Peer>, guard: Registered, address: SocketAddr) {
    let (shared, id) = (Arc::clone(&guard.shared), guard.id);
    let limits = &shared.limits;
    let wire = Wire {
        peer: Arc::clone(&peer),
        deadline: Instant::now().checked_add(limits.negotiation),
    };
    let mut stream = Buffered(BufReader::with_capacity(RECEIVE_BUFFER, wire));
    let view = View {
        shared: &shared,
        peer: &peer,
        id,
        address,
    };
    // Which client broke which rule is no news to anybody: it sees its connection closed.
    let Ok(Some(agreed)) = negotiate::run(&mut stream, &view) else {
        return;
    };
    shared.remember(&agreed.export);
    if stream.0.get_mut().unlimit().is_ok() {
        let ahead = stream.0.buffer().to_vec();
        let (pool, share) = (Arc::clone(&shared.pool), (limits.workers, limits.bytes_in_flight));
        drop(stream);
        transmit(peer, &ahead, agreed, pool, share, Box::new(guard));
    }
}

/// Reads buffered, writes straight through.
struct Buffered(BufReader<Wire>);

impl io::Read for Buffered {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl io::Write for Buffered {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.0.get_mut().write(data)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
