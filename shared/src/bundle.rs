//! The boot bundle: what the laptop's ramdisk gives to the desktop, and what the desktop keeps of it for its payload.
//!
//! Sent by `server::http`, received by `client::fetch`, inside the encrypted stream of [`crate::session`]:
//! first one [`Manifest`] as JSON, then the parts it names, back to back. Layout: docs/protocol.md, "The bundle".

use serde::{Deserialize, Serialize};
use zeroize::{Zeroize, ZeroizeOnDrop};

use crate::handover::{DiskIdentity, Payload};

/// The largest manifest that is read, in bytes.
pub const MAX_MANIFEST: usize = 60 * 1024;

/// What the laptop sends first.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// The laptop's host name.
    pub hostname: String,
    /// What is to be booted.
    pub payload: Payload,
    /// The disk it boots from.
    pub disk: DiskOffer,
    /// The secret of this session.
    pub control: ControlKey,
    /// The session's public name: 128 random bits in hexadecimal digits, also in the URL.
    pub session: String,
}

/// The disk, and how to reach it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskOffer {
    /// The disk's own identity, for its by-id links on the desktop.
    pub identity: DiskIdentity,
    /// Logical block size in bytes; partition tables count in it.
    pub logical_block_size: u32,
    /// How it is served.
    pub transport: Transport,
}

/// How the disk travels.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Transport {
    /// Our own NBD server.
    Nbd {
        /// TCP port on the address that answered.
        port: u16,
        /// The export's name; holds 128 random bits of the session, so that it cannot be guessed.
        export: String,
    },
}

/// Seals the goodbye and all else that is said about a session after the bundle; dies with the server's ramdisk.
#[derive(Clone, Zeroize, ZeroizeOnDrop, Serialize, Deserialize)]
pub struct ControlKey(#[serde(with = "crate::key::hex32")] pub [u8; 32]);

impl std::fmt::Debug for ControlKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ControlKey(..)")
    }
}

/// What `client::attach` finds in the payload's initrd at [`crate::handover::SESSION_PATH`].
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AttachSession {
    /// The laptop's host name, for messages.
    pub hostname: String,
    /// The payload kernel's release: which modules folder is meant.
    pub version: String,
    /// The desktop's own NIC that leads to the laptop, by its hardware address.
    pub link_mac: [u8; 6],
    /// The laptop's link-local address on that link.
    pub laptop: std::net::Ipv6Addr,
    /// TCP port of the laptop's HTTP server, for the goodbye.
    pub http_port: u16,
    /// The disk.
    pub disk: DiskOffer,
    /// The session's secret.
    pub control: ControlKey,
    /// The session's public name.
    pub session: String,
}

/// Which way a desktop goes, told to the laptop in the goodbye.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Goodbye {
    /// Power off or halt: the laptop may go home.
    Poweroff,
    /// The desktop will be back: serve again.
    Reboot,
}
