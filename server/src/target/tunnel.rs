//! One borrower's tunnel, which lives as long as the loan.
//!
//! Counterpart: `client::borrow`. The keys are fresh for each loan. This side waits for the first word, so the borrower may be
//! anywhere and use any port; the kernel chooses this side's port.
//!
//! For NVMe its interface is in a network namespace of its own, and what is published from there listens there only: the
//! loan's names stand in configfs and in the kernel's log, and other users of this machine could else speak to our own address (no
//! routing rule comes before the table of own addresses). Its socket stays outside. For NBD it is in the root namespace: the
//! server takes the borrower's address only, which nobody here has.

use std::net::IpAddr;
use std::os::fd::AsFd;

use anyhow::Context;
use stiefel_shared::bundle::{LinkOffer, Tunnel as Offered};
use stiefel_shared::handover::LinkMode;
use stiefel_shared::seal;
use stiefel_sys::link;
use stiefel_sys::netns::Namespace;
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
    name: String,
    /// Where its interface is, if not in the root namespace.
    place: Option<Namespace>,
}

impl Tunnel {
    /// Makes it; the other end is returned, to be sent to the borrower. `grace` is told to it, in seconds. `place`: where its
    /// interface is to be.
    ///
    /// # Errors
    /// What the kernel says: no wireguard module.
    pub(super) fn make(grace: u64, place: Option<Namespace>) -> anyhow::Result<(Self, LinkOffer)> {
        let [own_address, address] = addresses(seal::random()?);
        let own = PrivateKey::from_bytes(seal::random()?);
        let other = PrivateKey::from_bytes(seal::random()?);
        let preshared: [u8; 32] = seal::random()?;
        let [a, b] = seal::random()?;
        let name = format!("{PREFIX}{a:02x}{b:02x}");
        let index = wireguard::create(&name).context("cannot make a tunnel; load the module wireguard")?;
        let mut tunnel = Self { name, place: None };
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
        if let Some(place) = place {
            link::set_namespace(index, place.as_fd())?;
            tunnel.place = Some(place);
        }
        let port = tunnel.inside(|| {
            // Another number there, if this one is taken.
            let index = link::index_of(&tunnel.name)?.context("the tunnel has vanished")?;
            link::set_mtu(index, MTU)?;
            link::add_address(index, IpAddr::V6(own_address), BITS)?;
            link::set_up(index)?;
            Ok(wireguard::status(index)?.listen_port)
        })?;
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

    /// None at all, for tests.
    #[cfg(test)]
    pub(super) fn none() -> Self {
        Self {
            name: "no-tunnel".to_owned(),
            place: None,
        }
    }

    /// Does something where its interface is.
    pub(super) fn inside<T: Send>(&self, work: impl FnOnce() -> anyhow::Result<T> + Send) -> anyhow::Result<T> {
        match &self.place {
            Some(place) => place.run(work)?,
            None => work(),
        }
    }

    /// How many bytes have come through; `None` if it cannot be asked.
    pub(super) fn received(&self) -> Option<u64> {
        let status = self
            .inside(|| Ok(wireguard::status(Interface::Name(&self.name))?))
            .ok()?;
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
        let _ = self.inside(|| match link::index_of(&self.name)? {
            Some(index) => Ok(link::delete(index)?),
            None => Ok(()),
        });
    }
}
