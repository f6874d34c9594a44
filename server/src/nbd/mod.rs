//! The NBD server: one file or block device per export, to peers that a [`Gate`] lets in.
//!
//! Counterparts: the Linux kernel's client (set up by `client::nbd`), libnbd, qemu. Bytes: `stiefel_shared::nbd`.
//! Specification: NBD `doc/proto.md`: fixed newstyle only, structured replies, extended headers, `base:allocation`,
//! multi-conn. Refused: TLS (the tunnel encrypts), oldstyle, resizing. What is served exactly: docs/nbd.md.
//!
//! Durability: all connections of an export share one open file description and so one page cache. A flush that was
//! answered without error is on the medium, with everything that any connection had answered before. Once a flush has
//! failed, what was lost cannot be known: the export then fails every flush and every write with EIO for good.
//!
//! Layers: [`negotiate`], [`request`] and `reply` are pure; a [`Store`] is what is read and written: `storage` (a file or
//! device) or [`overlay`] (guests); `export` adds what all stores need; `driver`, `connection`, `output`, `pipe` and `pool`
//! are the engine; `server` accepts, counts and drops connections.

mod connection;
mod driver;
mod export;
pub mod negotiate;
mod output;
pub mod overlay;
mod pipe;
mod pool;
mod reply;
pub mod request;
mod server;
mod standalone;
mod storage;
pub mod store;
mod wire;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

pub use export::{Export, ExportError, ExportOptions, Stats};
pub use negotiate::Listed;
pub use overlay::{Overlay, Upper, open_base, open_guest};
pub use request::Range;
pub use server::{DropError, Server};
pub use standalone::{Standalone, Target, run_standalone};
pub use store::{Store, Traits};

/// Who may connect, and what they see. Asked from many threads; must answer at once.
///
/// What a gate no longer gives out is not yet withdrawn from those who have it: then call [`Server::drop_connections`].
pub trait Gate: Send + Sync {
    /// Whether the server talks to `peer` at all; if not, the connection is closed without a byte.
    fn admit(&self, peer: SocketAddr) -> bool;

    /// The export called `name`, empty for the default one; `None` looks to the client as if it did not exist.
    fn export(&self, name: &str, peer: SocketAddr) -> Option<Arc<Export>>;

    /// The same for one that is only asked about: nothing changes by it.
    fn look(&self, name: &str, peer: SocketAddr) -> Option<Arc<Export>> {
        self.export(name, peer)
    }

    /// What `NBD_OPT_LIST` shows; empty where names are secret.
    fn list(&self, peer: SocketAddr) -> Vec<Listed>;
}

/// What one server or connection may take.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Connections of the server at the same time; more are closed at once.
    pub connections: usize,
    /// Requests of one connection that wait for the medium at the same time (threads).
    pub workers: u32,
    /// Bytes of payload that these requests hold in memory; at least 1 MiB is used, for longer requests go piece by piece.
    /// Besides, a connection has buffers of 0.5 to 1.5 MiB.
    pub bytes_in_flight: u32,
    /// Time for the whole negotiation.
    pub negotiation: Duration,
    /// How long a peer may be silent or take nothing, as behind a pulled cable, before its connection is dropped.
    pub peer_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 32,
            workers: 16,
            bytes_in_flight: 2 << 20,
            negotiation: Duration::from_secs(30),
            peer_timeout: Duration::from_secs(15 * 60),
        }
    }
}
