//! How the session is, as the keeper knows it: a file in /run that `stiefel status` reads. It holds no secret.

use serde::{Deserialize, Serialize};

/// Where it lies, below /run.
pub const STATUS_PATH: &str = "stiefel/status.json";

/// A session as it is now.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Status {
    /// The laptop's host name.
    pub laptop: String,
    /// `nvme-tcp` or `nbd`.
    pub transport: String,
    /// `wireguard` or `none`.
    pub encryption: String,
    /// The name of the disk's block device.
    pub device: String,
    /// Nothing that is written is kept: it is gone when this desktop is switched off or reboots.
    pub guest: bool,
    /// The largest packet on the way to the disk, in bytes.
    pub mtu: u32,
    /// Whether the laptop is heard.
    pub connected: bool,
    /// The kernel's view of the connection, where it has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state: Option<String>,
    /// How often the laptop was lost and came back.
    pub losses: u32,
    /// How often the disk's connection was made anew by the keeper.
    pub reconnects: u32,
    /// The laptop's battery in per cent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub battery: Option<u8>,
    /// Whether the laptop is on mains.
    pub mains: bool,
}
