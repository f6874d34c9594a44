//! The NBD server: one file or block device per export, to peers that a [`Gate`] lets in.
//!
//! Counterparts: the Linux kernel's client (set up by `client::nbd`), libnbd, qemu. Bytes: `stiefel_shared::nbd`.
//! Specification: NBD `doc/proto.md`: fixed newstyle only, structured replies, `base:allocation`, multi-conn.
//! Refused: TLS (the tunnel encrypts), oldstyle, extended headers, resizing.
//!
//! Durability: all connections of an export share one open file description and so one page cache. A flush that was
//! answered without error is on the medium, with everything that any connection had answered before. Once a flush has
//! failed, what was lost cannot be known: the export then fails every flush and every write with EIO for good.
//!
//! Layers, so that the engine can be exchanged: [`negotiate`] and [`request`] are pure; `export` and `storage` do the
//! I/O; `connection` is the engine (blocking threads); `server` accepts, counts and drops connections.

mod connection;
mod export;
pub mod negotiate;
pub mod request;
mod server;
mod standalone;
mod storage;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

pub use export::{Export, ExportError, ExportOptions, Stats};
pub use negotiate::Listed;
pub use server::{DropError, Server};
pub use standalone::{Standalone, run_standalone};

/// Who may connect, and what they see. Asked from many threads; must answer at once.
///
/// What a gate no longer gives out is not yet withdrawn from those who have it: then call [`Server::drop_connections`].
pub trait Gate: Send + Sync {
    /// Whether the server talks to `peer` at all; if not, the connection is closed without a byte.
    fn admit(&self, peer: SocketAddr) -> bool;

    /// The export called `name`, empty for the default one; `None` looks to the client as if it did not exist.
    fn export(&self, name: &str, peer: SocketAddr) -> Option<Arc<Export>>;

    /// What `NBD_OPT_LIST` shows; empty where names are secret.
    fn list(&self, peer: SocketAddr) -> Vec<Listed>;
}

/// What one server or connection may take.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Connections of the server at the same time; more are closed at once.
    pub connections: usize,
    /// Requests of one connection that run at the same time (threads).
    pub workers: usize,
    /// Bytes of payload that one connection holds in memory; at least the largest payload, 32 MiB, is used.
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
            bytes_in_flight: 64 << 20,
            negotiation: Duration::from_secs(30),
            peer_timeout: Duration::from_secs(15 * 60),
        }
    }
}
