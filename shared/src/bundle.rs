//! The boot bundle: what the laptop's ramdisk gives to the desktop, and what the desktop keeps of it for its payload.
//!
//! Sent by `server::http`, received by `client::fetch`, inside the encrypted stream of [`crate::session`]:
//! first one [`Manifest`] as JSON, then the parts it names, back to back. Layout: docs/protocol.md, "The bundle".

use serde::{Deserialize, Serialize};
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

use crate::discovery::MAX_HOSTNAME;
use crate::handover::{BootFolder, DiskIdentity, LinkMode, MAX_BOOT_FOLDERS, Part, Payload};
use crate::seal::SealError;
use crate::superblock::{self, Claim};

/// TCP port of the laptop's disk.
pub const DISK_PORT: u16 = 61571;
/// UDP port of both ends of the tunnel; of a further guest's see docs/protocol.md, "The link".
pub const TUNNEL_PORT: u16 = 61572;
/// UDP port of the laptop's signs of life.
pub const PULSE_PORT: u16 = 61573;
/// TCP port of the laptop's disk by NVMe (IANA: nvme).
pub const NVME_PORT: u16 = 4420;
/// The largest manifest that is read, in bytes.
pub const MAX_MANIFEST: usize = 60 * 1024;
/// What the claims may take of it, in bytes: some three hundred UUIDs.
const MAX_CLAIMS: usize = 40 * 1024;
/// The longest name of a disk or partition, in bytes.
const MAX_DEVICE_NAME: usize = 64;

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
    /// The way there.
    pub link: LinkOffer,
    /// By what the disk and its partitions are found: the desktop's own disks must carry none of it.
    pub claims: Vec<DeviceClaims>,
    /// The secret of this session.
    pub control: ControlKey,
    /// The session's public name: 128 random bits in hexadecimal digits, also in the URL.
    pub session: String,
}

/// Why a manifest was not accepted.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// It is no manifest of this version.
    #[error("the laptop's manifest is not understood; use the same version of stiefel on the laptop and the stick")]
    Json(#[source] serde_json::Error),
    /// It does not fit.
    #[error("the laptop's manifest has {size} bytes, more than the {MAX_MANIFEST} that fit; shorten boot.load.cmdline")]
    TooLarge {
        /// Its length.
        size: usize,
    },
    /// A part is larger than is accepted.
    #[error("the laptop's {} has {size} bytes, more than the {} that are accepted", part.name(), part.limit())]
    PartTooLarge {
        /// Which part.
        part: Part,
        /// Its length in bytes.
        size: u64,
    },
    /// A part is named twice, or there is no kernel.
    #[error("the laptop's manifest does not name each part once, with a kernel")]
    Parts,
    /// A field holds what it must not.
    #[error("the laptop's manifest has an impossible {field}")]
    Field {
        /// Which field.
        field: &'static str,
    },
}

impl Manifest {
    /// Reads and checks a manifest.
    ///
    /// # Errors
    /// [`ManifestError`] for anything that [`Manifest::to_json`] would not write.
    pub fn parse(json: &[u8]) -> Result<Self, ManifestError> {
        if json.len() > MAX_MANIFEST {
            return Err(ManifestError::TooLarge { size: json.len() });
        }
        let manifest: Self = serde_json::from_slice(json).map_err(ManifestError::Json)?;
        manifest.check()?;
        Ok(manifest)
    }

    /// The manifest as JSON; secret.
    ///
    /// # Errors
    /// [`ManifestError`] if the desktop would not accept it.
    pub fn to_json(&self) -> Result<Zeroizing<Vec<u8>>, ManifestError> {
        self.check()?;
        // Large enough from the start: a growing vector would leave copies of the secret behind.
        let mut json = Zeroizing::new(Vec::with_capacity(2 * MAX_MANIFEST));
        serde_json::to_writer(&mut *json, self).map_err(ManifestError::Json)?;
        if json.len() > MAX_MANIFEST {
            return Err(ManifestError::TooLarge { size: json.len() });
        }
        Ok(json)
    }

    /// The length of all parts, in bytes.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.payload
            .parts
            .iter()
            .map(|part| part.size)
            .fold(0, u64::saturating_add)
    }

    fn check(&self) -> Result<(), ManifestError> {
        let parts = &self.payload.parts;
        for (index, this) in parts.iter().enumerate() {
            if this.size > this.part.limit() {
                return Err(ManifestError::PartTooLarge {
                    part: this.part,
                    size: this.size,
                });
            }
            if parts.iter().skip(index + 1).any(|other| other.part == this.part) {
                return Err(ManifestError::Parts);
            }
        }
        if !parts.iter().any(|part| part.part == Part::Kernel) {
            return Err(ManifestError::Parts);
        }
        let field = |field, fits: bool| {
            if fits {
                Ok(())
            } else {
                Err(ManifestError::Field { field })
            }
        };
        let plain = |text: &str| !text.chars().any(char::is_control);
        // The version becomes the name of a folder.
        let version = self.payload.version.as_str();
        let folder = (1..=128).contains(&version.len()) && !version.contains('/') && ![".", ".."].contains(&version);
        field("kernel version", folder && plain(version))?;
        field("command line", plain(&self.payload.cmdline.replace('\t', " ")))?;
        let boot = self.payload.boot.as_deref().unwrap_or_default();
        let sound = boot.len() <= MAX_BOOT_FOLDERS && boot.iter().all(BootFolder::is_sound);
        field("boot folder", sound)?;
        field(
            "host name",
            self.hostname.len() <= MAX_HOSTNAME && plain(&self.hostname),
        )?;
        field(
            "session name",
            self.session.parse::<crate::session::SessionName>().is_ok(),
        )?;
        let shown = |text: &str, limit| (1..=limit).contains(&text.len()) && plain(text);
        let sound = |device: &DeviceClaims| {
            let mut claims = device.claims.iter();
            shown(&device.name, MAX_DEVICE_NAME) && claims.all(|claim| shown(&claim.value, superblock::MAX_VALUE))
        };
        field("content of the disk", self.claims.iter().all(sound))?;
        field("block size", [512, 4096].contains(&self.disk.logical_block_size))
    }
}

/// By what a disk or one of its partitions is found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceClaims {
    /// The laptop kernel's name for it, e.g. `nvme0n1p2`: 1 to 64 bytes.
    pub name: String,
    /// What it carries.
    pub claims: Vec<Claim>,
}

impl DeviceClaims {
    /// Leaves out from the end what would take too much of the manifest; how many claims that were.
    pub fn shorten(devices: &mut Vec<Self>) -> usize {
        let mut room = MAX_CLAIMS;
        let mut left_out = 0;
        for device in devices.iter_mut() {
            // Quotes are escaped, so a text may take twice its length; the field names come on top.
            room = room.saturating_sub(2 * device.name.len() + 32);
            let before = device.claims.len();
            device.claims.retain(|claim| {
                let size = 2 * claim.value.len() + 48;
                let fits = size <= room;
                room = if fits { room - size } else { 0 };
                fits
            });
            left_out += before - device.claims.len();
        }
        devices.retain(|device| !device.claims.is_empty());
        left_out
    }
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
    /// What is written stays in the laptop's memory, and is gone with the session.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub guest: bool,
}

/// How the disk travels.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Transport {
    /// Our own NBD server.
    Nbd {
        /// TCP port on the address that answered.
        port: u16,
        /// The export's name; holds 128 random bits of the session, so that it cannot be guessed.
        export: String,
    },
    /// The kernel's NVMe over TCP.
    NvmeTcp {
        /// TCP port at the laptop's address of this session.
        port: u16,
        /// The subsystem's name; holds 128 random bits of the session.
        nqn: String,
        /// The only host's name; as random.
        host_nqn: String,
        /// That host's UUID, which belongs to its name alone.
        host_id: String,
    },
}

impl std::fmt::Debug for Transport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The export's name is the session's secret.
        match self {
            Self::Nbd { port, .. } => write!(f, "Nbd(port {port}, ..)"),
            Self::NvmeTcp { port, .. } => write!(f, "NvmeTcp(port {port}, ..)"),
        }
    }
}

/// The way to the disk: the two ends' addresses for this session, random and unique (RFC 4193), and the tunnel between
/// them. Without a tunnel the addresses are the NICs' own, and everything travels in clear.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinkOffer {
    /// What the link is used for besides.
    pub mode: LinkMode,
    /// The desktop's address, in a /127.
    pub address: std::net::Ipv6Addr,
    /// The laptop's.
    pub laptop: std::net::Ipv6Addr,
    /// After how many seconds without a sign of life from the desktop the laptop goes home.
    pub grace: u64,
    /// The tunnel.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tunnel: Option<Tunnel>,
}

/// The desktop's end of the session's WireGuard tunnel. All keys are fresh, made by the laptop, sent only inside the
/// encrypted stream (which has forward secrecy), and die with the session.
#[derive(Clone, PartialEq, Eq, Zeroize, ZeroizeOnDrop, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tunnel {
    /// The desktop's private key.
    #[serde(with = "crate::key::hex32")]
    pub private_key: [u8; 32],
    /// The laptop's public key.
    #[serde(with = "crate::key::hex32")]
    pub laptop_key: [u8; 32],
    /// Mixed into the handshake.
    #[serde(with = "crate::key::hex32")]
    pub preshared_key: [u8; 32],
    /// UDP port of both ends.
    pub port: u16,
    /// The tunnel's largest packet in bytes.
    pub mtu: u32,
}

impl std::fmt::Debug for Tunnel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tunnel(UDP port {}, MTU {}, ..)", self.port, self.mtu)
    }
}

/// Seals the goodbye and all else that is said about a session after the bundle; dies with the server's ramdisk.
#[derive(Clone, Zeroize, ZeroizeOnDrop, Serialize, Deserialize)]
pub struct ControlKey(#[serde(with = "crate::key::hex32")] pub [u8; 32]);

impl ControlKey {
    /// A new session's secret.
    ///
    /// # Errors
    /// [`SealError::Random`] without randomness.
    pub fn generate() -> Result<Self, SealError> {
        let mut key = Self([0; 32]);
        getrandom::fill(&mut key.0).map_err(SealError::Random)?;
        Ok(key)
    }
}

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
    /// The way there.
    pub link: LinkOffer,
    /// The session's secret.
    pub control: ControlKey,
    /// The session's public name.
    pub session: String,
    /// What the laptop boots from, see [`Payload::boot`].
    pub boot: Option<Vec<BootFolder>>,
}

/// Which way a desktop goes, told to the laptop in the goodbye.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Goodbye {
    /// Power off or halt: the laptop may go home.
    Poweroff,
    /// The desktop will be back: serve again.
    Reboot,
    /// The desktop will be back, and what it is to boot has changed: the laptop goes home for it, and is woken there.
    RebootAnew,
}
