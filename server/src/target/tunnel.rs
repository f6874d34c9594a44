//! One borrower's tunnel: its interface is in the root namespace, and it lives as long as the loan.
//!
//! Counterpart: `client::borrow`. The keys are fresh for each loan. This side waits for the first word, so the borrower may be
//! anywhere and use any port; the kernel chooses this side's port.

use std::net::IpAddr;

use anyhow::Context;
use stiefel_shared::bundle::{LinkOffer, Tunnel as Offered};
use stiefel_shared::handover::LinkMode;
use stiefel_shared::seal;
use stiefel_sys::link;
use stiefel_sys::wireguard::{self, Device, Interface, Peer, PresharedKey, PrivateKey};

use crate::role::link::addresses;

/// What its interface is called, before four digits.
const PREFIX: &str = "stiefel-l";
/// What fits a frame of 1500 bytes with WireGuard's 80 around it over IPv6.
const MTU: u32 = 1420;
/// The network holds the two ends (RFC 6164).
const BITS: u8 = 127;

/// An open tunnel; gone when dropped.
pub(super) struct Tunnel {
    index: u32,
}

impl Tunnel {
    /// Makes it; the other end is returned, to be sent to the borrower. `grace` is told to it, in seconds.
    ///
    /// # Errors
    /// What the kernel says: no wireguard module.
    pub(super) fn make(grace: u64) -> anyhow::Result<(Self, LinkOffer)> {
        let [own_address, address] = addresses(seal::random()?);
        let own = PrivateKey::from_bytes(seal::random()?);
        let other = PrivateKey::from_bytes(seal::random()?);
        let preshared: [u8; 32] = seal::random()?;
        let [a, b] = seal::random()?;
        let index = wireguard::create(&format!("{PREFIX}{a:02x}{b:02x}"))
            .context("cannot make a tunnel; load the module wireguard")?;
        let tunnel = Self { index };
        wireguard::configure(&Device {
            interface: Interface::Index(index),
            private_key: &own,
            listen_port: None,
            peer: Peer {
                public_key: other.public(),
                preshared_key: &PresharedKey::from_bytes(preshared),
                endpoint: None,
                allowed_ips: &[(IpAddr::V6(address), 128)],
                persistent_keepalive: None,
            },
            replace_peers: true,
        })?;
        link::set_mtu(index, MTU)?;
        link::add_address(index, IpAddr::V6(own_address), BITS)?;
        link::set_up(index)?;
        let port = wireguard::status(index)?.listen_port;
        let offer = LinkOffer {
            mode: LinkMode::Lan,
            address,
            laptop: own_address,
            grace,
            tunnel: Some(Offered {
                private_key: *other.as_bytes(),
                laptop_key: *own.public().as_bytes(),
                preshared_key: preshared,
                port,
                mtu: MTU,
            }),
        };
        Ok((tunnel, offer))
    }

    /// How many bytes have come through; `None` if it cannot be asked.
    pub(super) fn received(&self) -> Option<u64> {
        let status = wireguard::status(self.index).ok()?;
        status.peers.first().map(|peer| peer.rx_bytes)
    }
}

/// Takes away the tunnels of a process that was killed.
pub(super) fn sweep() {
    for link in link::list().unwrap_or_default() {
        if link.name.starts_with(PREFIX) && link.kind.as_deref() == Some("wireguard") {
            let _ = link::delete(link.index);
        }
    }
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        // Fails only if it is gone already.
        let _ = link::delete(self.index);
    }
}
