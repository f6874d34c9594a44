//! WireGuard tunnels of the kernel: make one, give it keys and its peer, ask how it is (generic netlink "wireguard").
//!
//! Used by the attacher, the keeper and the server; the keys come out of the session's handshake. Numbers:
//! `linux/wireguard.h`. A tunnel's socket stays in the network namespace in which the tunnel was made
//! ([`create`] inside [`Namespace::run`](crate::netns::Namespace::run)), also when the tunnel is moved; an endpoint's
//! scope id is an interface's index *there*. The other calls go to the namespace where the tunnel is now.
//!
//! A peer refuses handshakes whose wall-clock stamp is not newer than the last it saw; taking the peer away
//! ([`remove_peer`]) and configuring it again makes it forget.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::link::{self, LinkError};
use crate::netlink::{self, Body, Family, GENERIC_HEADER, NLM_F_DUMP, attributes, generic, u16_at, u32_at, u64_at};

mod key;

pub use key::{PresharedKey, PrivateKey, PublicKey};

const FAMILY: &str = "wireguard";
const VERSION: u8 = 1;

const WG_CMD_GET_DEVICE: u8 = 0;
const WG_CMD_SET_DEVICE: u8 = 1;

const WGDEVICE_F_REPLACE_PEERS: u32 = 1;
const WGDEVICE_A_IFINDEX: u16 = 1;
const WGDEVICE_A_IFNAME: u16 = 2;
const WGDEVICE_A_PRIVATE_KEY: u16 = 3;
const WGDEVICE_A_PUBLIC_KEY: u16 = 4;
const WGDEVICE_A_FLAGS: u16 = 5;
const WGDEVICE_A_LISTEN_PORT: u16 = 6;
const WGDEVICE_A_PEERS: u16 = 8;

const WGPEER_F_REMOVE_ME: u32 = 1;
const WGPEER_F_REPLACE_ALLOWEDIPS: u32 = 2;
const WGPEER_F_UPDATE_ONLY: u32 = 4;
const WGPEER_A_PUBLIC_KEY: u16 = 1;
const WGPEER_A_PRESHARED_KEY: u16 = 2;
const WGPEER_A_FLAGS: u16 = 3;
const WGPEER_A_ENDPOINT: u16 = 4;
const WGPEER_A_PERSISTENT_KEEPALIVE_INTERVAL: u16 = 5;
const WGPEER_A_LAST_HANDSHAKE_TIME: u16 = 6;
const WGPEER_A_RX_BYTES: u16 = 7;
const WGPEER_A_TX_BYTES: u16 = 8;
const WGPEER_A_ALLOWEDIPS: u16 = 9;

const WGALLOWEDIP_A_FAMILY: u16 = 1;
const WGALLOWEDIP_A_IPADDR: u16 = 2;
const WGALLOWEDIP_A_CIDR_MASK: u16 = 3;

/// The kernel numbers no items of its lists.
const ITEM: u16 = 0;
const AF_INET: u16 = 2;
const AF_INET6: u16 = 10;
/// More would not be a tunnel of ours; the message must stay below an attribute's 64 KiB.
const MAX_ALLOWED: usize = 256;

/// Why something about a tunnel failed.
#[derive(Debug, thiserror::Error)]
pub enum WireGuardError {
    /// The kernel has no WireGuard.
    #[error("the kernel has no WireGuard; load the module wireguard, or set link.encryption: none")]
    NoWireGuard {
        /// The kernel's answer.
        source: io::Error,
    },
    /// The tunnel could not be made.
    #[error("cannot make the tunnel")]
    Create {
        /// Why.
        source: LinkError,
    },
    /// Netlink itself failed.
    #[error("cannot talk with the kernel's WireGuard; this needs root")]
    Netlink {
        /// The kernel's answer.
        source: io::Error,
    },
    /// A command was refused.
    #[error("the kernel refused to {action} the tunnel {device}; it may be gone, or no tunnel")]
    Refused {
        /// What was tried.
        action: &'static str,
        /// The interface's name, or its number.
        device: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A network that cannot be one.
    #[error("{address}/{prefix} is no network; give at most 32 bits for IPv4 and 128 for IPv6")]
    Prefix {
        /// Its address.
        address: IpAddr,
        /// Its length in bits.
        prefix: u8,
    },
    /// Too many networks.
    #[error("{count} networks are too many for the tunnel's peer; give at most {MAX_ALLOWED}")]
    TooManyNetworks {
        /// How many.
        count: usize,
    },
    /// The kernel told nothing of the tunnel.
    #[error("the kernel's description of the tunnel {device} cannot be read; it may be newer than this program")]
    Unreadable {
        /// The interface's name, or its number.
        device: String,
    },
}

/// Which tunnel is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interface<'a> {
    /// The one with this index.
    Index(u32),
    /// The one with this name.
    Name(&'a str),
}

impl From<u32> for Interface<'_> {
    fn from(index: u32) -> Self {
        Self::Index(index)
    }
}

impl<'a> From<&'a str> for Interface<'a> {
    fn from(name: &'a str) -> Self {
        Self::Name(name)
    }
}

impl std::fmt::Display for Interface<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Index(index) => index.fmt(f),
            Self::Name(name) => name.fmt(f),
        }
    }
}

impl Interface<'_> {
    fn begin(self, command: u8) -> Body {
        let body = generic(command, VERSION);
        match self {
            Self::Index(index) => body.attr(WGDEVICE_A_IFINDEX, &index.to_ne_bytes()),
            Self::Name(name) => body.attr_string(WGDEVICE_A_IFNAME, name),
        }
    }
}

/// What a tunnel shall be; [`configure`] takes it.
#[derive(Clone, Copy, Debug)]
pub struct Device<'a> {
    /// Which tunnel.
    pub interface: Interface<'a>,
    /// Its own key.
    pub private_key: &'a PrivateKey,
    /// The UDP port it listens on; `None` leaves it as it is (at first the kernel picks one).
    pub listen_port: Option<u16>,
    /// The other side. An existing peer with the same key is changed.
    pub peer: Peer<'a>,
    /// Take all other peers away first, and this one too if it exists, with what the kernel remembers of it.
    pub replace_peers: bool,
}

/// The other side of a tunnel.
#[derive(Clone, Copy, Debug)]
pub struct Peer<'a> {
    /// Its key.
    pub public_key: PublicKey,
    /// The secret both sides mix in.
    pub preshared_key: &'a PresharedKey,
    /// Where it is; `None` waits until it speaks first.
    pub endpoint: Option<SocketAddrV6>,
    /// The addresses it has inside the tunnel, each with the length of its network in bits. Replaces earlier ones.
    pub allowed_ips: &'a [(IpAddr, u8)],
    /// Send something at least this often, in seconds; `Some(0)` never, `None` leaves it as it is.
    pub persistent_keepalive: Option<u16>,
}

/// How a tunnel is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// Its own key; `None` before it has one.
    pub public_key: Option<PublicKey>,
    /// The UDP port it listens on; 0 before it was first brought up.
    pub listen_port: u16,
    /// The other sides.
    pub peers: Vec<PeerStatus>,
}

/// How a tunnel's other side is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerStatus {
    /// Its key.
    pub public_key: PublicKey,
    /// Where it was last heard from, or was said to be.
    pub endpoint: Option<SocketAddr>,
    /// When keys were last agreed upon, by this machine's wall clock at that time; `None` if never.
    pub last_handshake: Option<SystemTime>,
    /// Received from it, in bytes as encrypted.
    pub rx_bytes: u64,
    /// Sent to it, in bytes as encrypted.
    pub tx_bytes: u64,
}

/// Makes a tunnel in the caller's network namespace, down and without keys, and answers its index there.
///
/// # Errors
/// [`WireGuardError::NoWireGuard`]; [`WireGuardError::Create`], also if the name is taken.
pub fn create(name: &str) -> Result<u32, WireGuardError> {
    link::create(name, FAMILY).map_err(|error| match error {
        LinkError::Create { source, .. } if source.raw_os_error() == Some(libc::EOPNOTSUPP) => {
            WireGuardError::NoWireGuard { source }
        }
        source => WireGuardError::Create { source },
    })
}

/// Gives a tunnel its keys, its port and its peer.
///
/// # Errors
/// [`WireGuardError::Prefix`], [`WireGuardError::TooManyNetworks`], [`WireGuardError::NoWireGuard`],
/// [`WireGuardError::Refused`] (EADDRINUSE: the port is taken).
pub fn configure(device: &Device<'_>) -> Result<(), WireGuardError> {
    device.peer.check()?;
    set("configure", device.interface, &device.body())
}

/// Says where a known peer is now. Nothing else changes; an unknown peer is not added, and that is no error.
/// A handshake under way to the old place is tried again only after 5 s.
///
/// # Errors
/// [`WireGuardError::NoWireGuard`], [`WireGuardError::Refused`].
pub fn set_endpoint<'a>(
    interface: impl Into<Interface<'a>>,
    peer: &PublicKey,
    endpoint: SocketAddrV6,
) -> Result<(), WireGuardError> {
    let interface = interface.into();
    set("redirect", interface, &endpoint_body(interface, peer, endpoint))
}

/// Takes a peer away, with its session keys and the stamp of its last handshake; one that is not there is no error.
///
/// # Errors
/// [`WireGuardError::NoWireGuard`], [`WireGuardError::Refused`].
pub fn remove_peer<'a>(interface: impl Into<Interface<'a>>, peer: &PublicKey) -> Result<(), WireGuardError> {
    let interface = interface.into();
    set("take a peer from", interface, &removal_body(interface, peer))
}

/// How a tunnel and its peers are.
///
/// # Errors
/// [`WireGuardError::NoWireGuard`], [`WireGuardError::Refused`], [`WireGuardError::Unreadable`].
pub fn status<'a>(interface: impl Into<Interface<'a>>) -> Result<Status, WireGuardError> {
    let interface = interface.into();
    let (mut socket, family) = open()?;
    let answers = socket
        .request(family.id, NLM_F_DUMP, &interface.begin(WG_CMD_GET_DEVICE))
        .map_err(refused("look at", interface))?;
    let bodies = answers.iter().map(|(_, body)| body.as_slice());
    parse_status(bodies).ok_or_else(|| WireGuardError::Unreadable {
        device: interface.to_string(),
    })
}

fn set(action: &'static str, interface: Interface<'_>, body: &Body) -> Result<(), WireGuardError> {
    let (mut socket, family) = open()?;
    socket
        .request(family.id, 0, body)
        .map(drop)
        .map_err(refused(action, interface))
}

fn refused(action: &'static str, interface: Interface<'_>) -> impl FnOnce(io::Error) -> WireGuardError {
    let device = interface.to_string();
    move |source| WireGuardError::Refused { action, device, source }
}

fn open() -> Result<(netlink::Socket, Family), WireGuardError> {
    let found = netlink::Socket::open_generic(FAMILY).map_err(|source| WireGuardError::Netlink { source })?;
    found.ok_or(WireGuardError::NoWireGuard {
        source: io::ErrorKind::NotFound.into(),
    })
}

impl Device<'_> {
    fn body(&self) -> Body {
        let mut body = self
            .interface
            .begin(WG_CMD_SET_DEVICE)
            .attr(WGDEVICE_A_PRIVATE_KEY, self.private_key.as_bytes());
        if self.replace_peers {
            body = body.attr(WGDEVICE_A_FLAGS, &WGDEVICE_F_REPLACE_PEERS.to_ne_bytes());
        }
        if let Some(port) = self.listen_port {
            body = body.attr(WGDEVICE_A_LISTEN_PORT, &port.to_ne_bytes());
        }
        with_peer(body, &self.peer.body())
    }
}

impl Peer<'_> {
    fn check(&self) -> Result<(), WireGuardError> {
        if self.allowed_ips.len() > MAX_ALLOWED {
            let count = self.allowed_ips.len();
            return Err(WireGuardError::TooManyNetworks { count });
        }
        for &(address, prefix) in self.allowed_ips {
            if prefix > if address.is_ipv4() { 32 } else { 128 } {
                return Err(WireGuardError::Prefix { address, prefix });
            }
        }
        Ok(())
    }

    fn body(&self) -> Body {
        let mut body = Body::default()
            .attr(WGPEER_A_PUBLIC_KEY, self.public_key.as_bytes())
            .attr(WGPEER_A_FLAGS, &WGPEER_F_REPLACE_ALLOWEDIPS.to_ne_bytes())
            .attr(WGPEER_A_PRESHARED_KEY, self.preshared_key.as_bytes());
        if let Some(endpoint) = self.endpoint {
            body = body.attr(WGPEER_A_ENDPOINT, &socket_address(endpoint));
        }
        if let Some(seconds) = self.persistent_keepalive {
            body = body.attr(WGPEER_A_PERSISTENT_KEEPALIVE_INTERVAL, &seconds.to_ne_bytes());
        }
        let networks = self
            .allowed_ips
            .iter()
            .fold(Body::default(), |list, &(address, prefix)| {
                list.nest(ITEM, &network_body(address, prefix))
            });
        body.nest(WGPEER_A_ALLOWEDIPS, &networks)
    }
}

fn with_peer(device: Body, peer: &Body) -> Body {
    device.nest(WGDEVICE_A_PEERS, &Body::default().nest(ITEM, peer))
}

fn network_body(address: IpAddr, prefix: u8) -> Body {
    let body = match address {
        IpAddr::V4(address) => Body::default()
            .attr(WGALLOWEDIP_A_FAMILY, &AF_INET.to_ne_bytes())
            .attr(WGALLOWEDIP_A_IPADDR, &address.octets()),
        IpAddr::V6(address) => Body::default()
            .attr(WGALLOWEDIP_A_FAMILY, &AF_INET6.to_ne_bytes())
            .attr(WGALLOWEDIP_A_IPADDR, &address.octets()),
    };
    body.attr(WGALLOWEDIP_A_CIDR_MASK, &[prefix])
}

fn endpoint_body(interface: Interface<'_>, peer: &PublicKey, endpoint: SocketAddrV6) -> Body {
    let peer = Body::default()
        .attr(WGPEER_A_PUBLIC_KEY, peer.as_bytes())
        .attr(WGPEER_A_FLAGS, &WGPEER_F_UPDATE_ONLY.to_ne_bytes())
        .attr(WGPEER_A_ENDPOINT, &socket_address(endpoint));
    with_peer(interface.begin(WG_CMD_SET_DEVICE), &peer)
}

fn removal_body(interface: Interface<'_>, peer: &PublicKey) -> Body {
    let flags = WGPEER_F_REMOVE_ME | WGPEER_F_UPDATE_ONLY;
    let peer = Body::default()
        .attr(WGPEER_A_PUBLIC_KEY, peer.as_bytes())
        .attr(WGPEER_A_FLAGS, &flags.to_ne_bytes());
    with_peer(interface.begin(WG_CMD_SET_DEVICE), &peer)
}

/// `struct sockaddr_in6`.
fn socket_address(address: SocketAddrV6) -> [u8; 28] {
    let mut bytes = [0; 28];
    bytes[0..2].copy_from_slice(&AF_INET6.to_ne_bytes());
    bytes[2..4].copy_from_slice(&address.port().to_be_bytes());
    bytes[4..8].copy_from_slice(&address.flowinfo().to_be_bytes());
    bytes[8..24].copy_from_slice(&address.ip().octets());
    bytes[24..28].copy_from_slice(&address.scope_id().to_ne_bytes());
    bytes
}

/// `struct sockaddr_in` or `sockaddr_in6`; `None` for another family or a short one.
fn parse_socket_address(bytes: &[u8]) -> Option<SocketAddr> {
    let port = u16::from_be_bytes(bytes.get(2..4)?.try_into().ok()?);
    match u16_at(bytes, 0)? {
        AF_INET => {
            let octets: [u8; 4] = bytes.get(4..8)?.try_into().ok()?;
            Some(SocketAddrV4::new(Ipv4Addr::from(octets), port).into())
        }
        AF_INET6 => {
            let flow = u32::from_be_bytes(bytes.get(4..8)?.try_into().ok()?);
            let octets: [u8; 16] = bytes.get(8..24)?.try_into().ok()?;
            Some(SocketAddrV6::new(Ipv6Addr::from(octets), port, flow, u32_at(bytes, 24)?).into())
        }
        _ => None,
    }
}

/// Puts a tunnel's description together: it comes in several messages if there is much of it, the last peer of one and
/// the first of the next being the same where its networks did not fit. `None` if there was none.
fn parse_status<'a>(bodies: impl Iterator<Item = &'a [u8]>) -> Option<Status> {
    let mut status = None;
    for body in bodies.filter(|body| body.len() >= GENERIC_HEADER) {
        let status = status.get_or_insert(Status {
            public_key: None,
            listen_port: 0,
            peers: Vec::new(),
        });
        for (kind, value) in attributes(body, GENERIC_HEADER) {
            match kind {
                WGDEVICE_A_PUBLIC_KEY => status.public_key = PublicKey::from_slice(value),
                WGDEVICE_A_LISTEN_PORT => status.listen_port = u16_at(value, 0).unwrap_or_default(),
                WGDEVICE_A_PEERS => {
                    for peer in attributes(value, 0).filter_map(|(_, peer)| parse_peer(peer)) {
                        if status
                            .peers
                            .last()
                            .is_none_or(|last| last.public_key != peer.public_key)
                        {
                            status.peers.push(peer);
                        }
                    }
                }
                _ => {}
            }
        }
    }
    status
}

fn parse_peer(body: &[u8]) -> Option<PeerStatus> {
    let (_, key) = attributes(body, 0).find(|(kind, _)| *kind == WGPEER_A_PUBLIC_KEY)?;
    let mut peer = PeerStatus {
        public_key: PublicKey::from_slice(key)?,
        endpoint: None,
        last_handshake: None,
        rx_bytes: 0,
        tx_bytes: 0,
    };
    for (kind, value) in attributes(body, 0) {
        match kind {
            WGPEER_A_ENDPOINT => peer.endpoint = parse_socket_address(value),
            WGPEER_A_LAST_HANDSHAKE_TIME => peer.last_handshake = parse_time(value),
            WGPEER_A_RX_BYTES => peer.rx_bytes = u64_at(value, 0).unwrap_or_default(),
            WGPEER_A_TX_BYTES => peer.tx_bytes = u64_at(value, 0).unwrap_or_default(),
            _ => {}
        }
    }
    Some(peer)
}

/// `struct __kernel_timespec`, seconds and nanoseconds of 64 bits each; zero says never.
fn parse_time(value: &[u8]) -> Option<SystemTime> {
    let seconds = u64_at(value, 0)?;
    let nanoseconds = u32::try_from(u64_at(value, 8)?).ok().filter(|&n| n < 1_000_000_000)?;
    if seconds == 0 && nanoseconds == 0 {
        return None;
    }
    UNIX_EPOCH.checked_add(Duration::new(seconds, nanoseconds))
}

#[cfg(test)]
mod tests;
