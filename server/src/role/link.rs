//! The laptop's end of the session's link: its address, and the WireGuard tunnel.
//!
//! Counterpart: `client::link`. All keys are made here, for one session, and die with it: the desktop's are sent inside the
//! encrypted bundle. The laptop keeps the tunnel alive as well as the desktop does: WireGuard refuses handshakes whose time
//! stamp is not newer than the last one's, so after the desktop's clock was set back only the laptop can renew the keys.
//!
//! Without a tunnel the session's address is given to the NIC itself: a link-local one could not be reached any more after
//! a re-plug (NVMe keeps the old scope).

use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6};

use anyhow::Context;
use serde::{Deserialize, Serialize};
use stiefel_shared::bundle::{LinkOffer, TUNNEL_PORT, Tunnel};
use stiefel_shared::discovery::LinkEvent;
use stiefel_shared::handover::{Encryption, LinkMode};
use stiefel_shared::seal;
use stiefel_sys::link::{self, Link};
use stiefel_sys::wireguard::{self, Device, Interface, Peer, PresharedKey, PrivateKey, PublicKey};

/// The tunnels' interfaces; a number comes after it.
const NAME: &str = "stiefel";
/// Seconds between two signs of life.
const KEEPALIVE: u16 = 5;
/// What fits a frame of 1500 bytes with WireGuard's 80 around it over IPv6.
const MTU: u32 = USUAL - OVERHEAD;
/// Every Ethernet adapter's packets, in bytes.
const USUAL: u32 = 1500;
/// What WireGuard adds over IPv6, in bytes.
const OVERHEAD: u32 = 80;
/// The session's network holds its two ends (RFC 6164).
const PREFIX: u8 = 127;

/// What a link is to be.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted {
    /// Where the desktop is: link-local, with the scope id of our interface.
    pub(super) peer: SocketAddrV6,
    pub(super) encryption: Encryption,
    pub(super) mode: LinkMode,
    /// In seconds.
    pub(super) grace: u64,
    /// The session's number: guests have tunnels beside each other.
    pub(super) place: u8,
}

/// The UDP port of a session's tunnel: after the first's comes that of the signs of life.
fn tunnel_port(place: u8) -> u16 {
    TUNNEL_PORT + u16::from(place) + u16::from(place > 0)
}

/// How the link is known again after the server's process was restarted. The kernel has all else.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Known {
    pub(super) peer: SocketAddrV6,
    pub(super) laptop: Ipv6Addr,
    pub(super) desktop: Ipv6Addr,
    /// The hardware address of the NIC that led to it at first.
    mac: [u8; 6],
    tunnel: Option<KnownTunnel>,
    /// The NIC's packet size that both sides have agreed upon, in bytes.
    pub(super) mtu: u32,
}

/// A tunnel. Its name is that of the next session with the same number, too.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
struct KnownTunnel {
    /// Its interface; the kernel gives no number twice.
    index: u32,
    /// The desktop's public key.
    desktop: [u8; 32],
}

/// A link that is up; gone when dropped.
pub(super) struct Up {
    known: Known,
    /// Whether dropping it takes it down.
    down: bool,
}

impl Up {
    /// The link that is set up, perhaps by an earlier process of ours.
    pub(super) fn adopt(mut known: Known) -> Self {
        let scope = known.peer.scope_id();
        let gone = |links: Vec<Link>| links.iter().all(|link| link.index != scope);
        if link::list().is_ok_and(gone) {
            // Re-plugged since it was written down; [`Up::follow`] is told of those that are there now.
            known.peer.set_scope_id(0);
        }
        Self { known, down: true }
    }

    /// How it is known again.
    pub(super) fn known(&self) -> &Known {
        &self.known
    }

    /// Follows the interfaces: the NIC that led to the desktop at first is taken whenever it comes up; when it is gone, or the
    /// desktop is `silent`, the next that comes up. Then nothing that the desktop says need be the first word. Whether the way has
    /// changed.
    pub(super) fn follow(&mut self, event: &LinkEvent, silent: bool) -> anyhow::Result<bool> {
        let peer = &mut self.known.peer;
        let before = peer.scope_id();
        let scope = match event {
            // Zero is no interface.
            LinkEvent::Removed { index } if *index == before => 0,
            LinkEvent::Added { index, .. }
                if before == 0 || (before != *index && (silent || mac(*index) == Some(self.known.mac))) =>
            {
                *index
            }
            _ => return Ok(false),
        };
        peer.set_scope_id(scope);
        if self.known.tunnel.is_none() && before != 0 {
            // Gone with the NIC, unless only the cable was pulled.
            let _ = link::delete_address(before, IpAddr::V6(self.known.laptop), PREFIX);
        }
        if scope == 0 {
            return Ok(true);
        }
        if self.known.mtu != USUAL && link::set_mtu(scope, self.known.mtu).is_err() {
            // Another adapter, which cannot; the desktop hears of it.
            self.known.mtu = USUAL;
            if let Some(tunnel) = self.known.tunnel {
                link::set_mtu(tunnel.index, MTU)?;
            }
        }
        match self.known.tunnel {
            Some(tunnel) => {
                let desktop = PublicKey::from_bytes(tunnel.desktop);
                // In a LAN the desktop speaks from another address than its stick did.
                let status = wireguard::status(tunnel.index)?;
                if let Some(SocketAddr::V6(heard)) = status.peers.first().and_then(|peer| peer.endpoint) {
                    self.known.peer.set_ip(*heard.ip());
                }
                wireguard::set_endpoint(tunnel.index, &desktop, self.known.peer)?;
            }
            None => {
                let address = IpAddr::V6(self.known.laptop);
                if !link::addresses(scope)?.iter().any(|have| have.addr == address) {
                    link::add_address(scope, address, PREFIX)?;
                }
            }
        }
        Ok(true)
    }

    /// Lets the NIC send packets of up to `wanted` bytes, if its driver can, and the tunnel those that fit inside; what
    /// the NIC sends then.
    pub(super) fn set_mtu(&mut self, wanted: u32) -> anyhow::Result<u32> {
        let nic = link::list()?
            .into_iter()
            .find(|link| link.index == self.known.peer.scope_id())
            .context("the NIC is gone")?;
        let mtu = wanted.clamp(USUAL, nic.max_mtu.unwrap_or(USUAL).max(USUAL));
        if nic.mtu != mtu {
            link::set_mtu(nic.index, mtu)?;
        }
        if let Some(tunnel) = self.known.tunnel {
            link::set_mtu(tunnel.index, mtu - OVERHEAD)?;
        }
        self.known.mtu = mtu;
        Ok(mtu)
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        if !self.down {
            return;
        }
        if self.known.mtu != USUAL {
            // What comes next knows nothing of larger packets.
            let _ = link::set_mtu(self.known.peer.scope_id(), USUAL);
        }
        // These fail only if it is gone already.
        if self.known.tunnel.is_none() {
            let _ = link::delete_address(self.known.peer.scope_id(), IpAddr::V6(self.known.laptop), PREFIX);
        } else if let Some(tunnel) = self.known.tunnel {
            let _ = link::delete(tunnel.index);
        }
    }
}

/// Sets the laptop's end up; the desktop's end is returned, to be sent to it.
///
/// # Errors
/// What the kernel says: no wireguard module, no interface.
pub(super) fn set_up(wanted: Wanted) -> anyhow::Result<(Up, LinkOffer)> {
    let [laptop, address] = addresses(seal::random()?);
    let port = tunnel_port(wanted.place);
    let mut known = Known {
        peer: SocketAddrV6::new(*wanted.peer.ip(), port, 0, wanted.peer.scope_id()),
        laptop,
        desktop: address,
        mac: mac(wanted.peer.scope_id()).unwrap_or_default(),
        tunnel: None,
        mtu: USUAL,
    };
    let tunnel = match wanted.encryption {
        Encryption::Wireguard => {
            let (made, tunnel) = make_tunnel(&known, wanted.place)?;
            known.tunnel = Some(made);
            Some(tunnel)
        }
        Encryption::None => {
            link::add_address(wanted.peer.scope_id(), IpAddr::V6(laptop), PREFIX)?;
            None
        }
    };
    let offer = LinkOffer {
        mode: wanted.mode,
        address,
        laptop,
        grace: wanted.grace,
        tunnel,
    };
    Ok((Up::adopt(known), offer))
}

/// An interface's hardware address.
fn mac(index: u32) -> Option<[u8; 6]> {
    let links = link::list().ok()?;
    links.into_iter().find(|link| link.index == index).map(|link| link.mac)
}

/// Makes the tunnel; how it is known here, and the desktop's end.
fn make_tunnel(known: &Known, place: u8) -> anyhow::Result<(KnownTunnel, Tunnel)> {
    let (name, port) = (format!("{NAME}{place}"), tunnel_port(place));
    let own = PrivateKey::from_bytes(seal::random()?);
    let desktop_bytes: [u8; 32] = seal::random()?;
    let desktop = PrivateKey::from_bytes(desktop_bytes);
    let preshared_bytes: [u8; 32] = seal::random()?;
    let preshared = PresharedKey::from_bytes(preshared_bytes);

    // An earlier session may have left one behind.
    if let Some(index) = link::index_of(&name)? {
        link::delete(index)?;
    }
    let index = wireguard::create(&name)?;
    wireguard::configure(&Device {
        interface: Interface::Index(index),
        private_key: &own,
        listen_port: Some(port),
        peer: Peer {
            public_key: desktop.public(),
            preshared_key: &preshared,
            endpoint: Some(known.peer),
            allowed_ips: &[(IpAddr::V6(known.desktop), 128)],
            persistent_keepalive: Some(KEEPALIVE),
        },
        replace_peers: true,
    })?;
    link::set_mtu(index, MTU)?;
    link::add_address(index, IpAddr::V6(known.laptop), PREFIX)?;
    link::set_up(index)?;
    let tunnel = Tunnel {
        private_key: *desktop.as_bytes(),
        laptop_key: *own.public().as_bytes(),
        preshared_key: preshared_bytes,
        port,
        mtu: MTU,
    };
    let made = KnownTunnel {
        index,
        desktop: *desktop.public().as_bytes(),
    };
    Ok((made, tunnel))
}

/// The two addresses of a /127 in a random unique local prefix (RFC 4193; RFC 6164 for /127): laptop, desktop.
pub(crate) fn addresses(random: [u8; 16]) -> [Ipv6Addr; 2] {
    let mut bytes = random;
    bytes[0] = 0xfd;
    [0, 1].map(|end| {
        bytes[15] = (bytes[15] & 0xfe) | end;
        Ipv6Addr::from(bytes)
    })
}

#[cfg(test)]
impl Up {
    /// A link between two ends on this machine, with nothing to take down.
    pub(super) fn loopback(peer: SocketAddrV6) -> Self {
        let known = Known {
            peer,
            laptop: Ipv6Addr::LOCALHOST,
            desktop: *peer.ip(),
            mac: [0; 6],
            tunnel: None,
            mtu: USUAL,
        };
        Self { known, down: false }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_guests_tunnel_has_a_port_of_its_own() {
        let ports: Vec<u16> = (0..8).map(tunnel_port).collect();
        assert_eq!(ports, [61572, 61574, 61575, 61576, 61577, 61578, 61579, 61580]);
        assert!(!ports.contains(&stiefel_shared::bundle::PULSE_PORT));
    }

    #[test]
    fn the_two_addresses_are_one_unique_local_127() {
        for last in [0, 0xff] {
            let [laptop, desktop] = addresses([last; 16]);
            assert!(laptop.is_unique_local() && desktop.is_unique_local());
            assert_eq!(u128::from(laptop) ^ u128::from(desktop), 1);
        }
    }
}
