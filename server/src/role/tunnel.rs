//! The laptop's end of the session's WireGuard tunnel.
//!
//! Counterpart: `client::link`. All keys are made here, for one session, and die with it: the desktop's are sent inside the
//! encrypted bundle. The laptop keeps the tunnel alive as well as the desktop does: WireGuard refuses handshakes whose time
//! stamp is not newer than the last one's, so after the desktop's clock was set back only the laptop can renew the keys.

use std::net::{IpAddr, Ipv6Addr, SocketAddrV6};

use stiefel_shared::bundle::{TUNNEL_PORT, Tunnel};
use stiefel_shared::discovery::LinkEvent;
use stiefel_shared::seal;
use stiefel_sys::link;
use stiefel_sys::wireguard::{self, Device, Interface, Peer, PresharedKey, PrivateKey, PublicKey};

/// The tunnel's interface, on both machines.
const NAME: &str = "stiefel0";
/// Seconds between two signs of life.
const KEEPALIVE: u16 = 5;
/// What fits a frame of 1500 bytes with WireGuard's 80 around it over IPv6.
const MTU: u32 = 1420;

/// A tunnel that is up; gone when dropped.
pub(super) struct Up {
    index: u32,
    /// The desktop's key, and where it is.
    desktop: PublicKey,
    peer: SocketAddrV6,
}

impl Up {
    /// Points the tunnel at the desktop through an interface that has come up, when the one it went through is gone: then
    /// nothing that the desktop says need be the first word.
    pub(super) fn follow(&mut self, event: &LinkEvent) -> anyhow::Result<()> {
        let scope = match event {
            // Zero is no interface: the next one that comes is taken.
            LinkEvent::Removed { index } if *index == self.peer.scope_id() => 0,
            LinkEvent::Added { index, .. } if self.peer.scope_id() == 0 => *index,
            _ => return Ok(()),
        };
        self.peer.set_scope_id(scope);
        if scope != 0 {
            wireguard::set_endpoint(self.index, &self.desktop, self.peer)?;
        }
        Ok(())
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        // Fails only if it is gone already.
        let _ = link::delete(self.index);
    }
}

/// Sets the laptop's end up for the desktop at `peer`; the desktop's end is returned, to be sent to it.
///
/// # Errors
/// What the kernel says: no wireguard module, no interface.
pub(super) fn set_up(peer: SocketAddrV6) -> anyhow::Result<(Up, Tunnel)> {
    let own = PrivateKey::from_bytes(seal::random()?);
    let desktop_bytes: [u8; 32] = seal::random()?;
    let desktop = PrivateKey::from_bytes(desktop_bytes);
    let preshared_bytes: [u8; 32] = seal::random()?;
    let preshared = PresharedKey::from_bytes(preshared_bytes);
    let [laptop_address, desktop_address] = addresses(seal::random()?);

    // An earlier process of ours may have left one behind.
    if let Some(index) = link::index_of(NAME)? {
        link::delete(index)?;
    }
    let up = Up {
        index: wireguard::create(NAME)?,
        desktop: desktop.public(),
        peer: SocketAddrV6::new(*peer.ip(), TUNNEL_PORT, 0, peer.scope_id()),
    };
    wireguard::configure(&Device {
        interface: Interface::Index(up.index),
        private_key: &own,
        listen_port: Some(TUNNEL_PORT),
        peer: Peer {
            public_key: up.desktop,
            preshared_key: &preshared,
            endpoint: Some(up.peer),
            allowed_ips: &[(IpAddr::V6(desktop_address), 128)],
            persistent_keepalive: Some(KEEPALIVE),
        },
        replace_peers: true,
    })?;
    link::set_mtu(up.index, MTU)?;
    link::add_address(up.index, IpAddr::V6(laptop_address), 127)?;
    link::set_up(up.index)?;
    let tunnel = Tunnel {
        private_key: *desktop.as_bytes(),
        laptop_key: *own.public().as_bytes(),
        preshared_key: preshared_bytes,
        address: desktop_address,
        laptop: laptop_address,
        port: TUNNEL_PORT,
        mtu: MTU,
    };
    Ok((up, tunnel))
}

/// The two addresses of a /127 in a random unique local prefix (RFC 4193; RFC 6164 for /127): laptop, desktop.
fn addresses(random: [u8; 16]) -> [Ipv6Addr; 2] {
    let mut bytes = random;
    bytes[0] = 0xfd;
    [0, 1].map(|end| {
        bytes[15] = (bytes[15] & 0xfe) | end;
        Ipv6Addr::from(bytes)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_two_addresses_are_one_unique_local_127() {
        for last in [0, 0xff] {
            let [laptop, desktop] = addresses([last; 16]);
            assert!(laptop.is_unique_local() && desktop.is_unique_local());
            assert_eq!(u128::from(laptop) ^ u128::from(desktop), 1);
        }
    }
}
