//! The desktop's end of the link: the NIC that leads to the laptop, and the tunnel through it.
//!
//! Counterpart: `server::role::link`. With a tunnel, the NIC and WireGuard's socket live in a network namespace of their
//! own, where no network manager, firewall or user sees them. The tunnel's interface is there, too, when the disk comes by NBD; NVMe's
//! driver connects in the root namespace, so the interface must be there, and only root may send to the laptop. In a LAN
//! (`link.mode`), where the desktop's system uses the NIC, too, a second interface on it (macvlan) lives there instead. Without
//! a tunnel (or where the kernel has no namespaces) the NIC stays in the root namespace, and the [guards](crate::guards) keep
//! network managers off.

use std::fs::File;
use std::net::{IpAddr, SocketAddrV6};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::Context;
use rustix::fs::{Mode, OFlags};
use stiefel_shared::bundle::{AttachSession, Transport, Tunnel};
use stiefel_shared::handover::LinkMode;
use stiefel_sys::link::{self, Link};
use stiefel_sys::netns::Namespace;
use stiefel_sys::wireguard::{self, Device, Interface, Peer, PresharedKey, PrivateKey, PublicKey};

/// The name of the NIC that leads to the laptop.
pub(crate) const NIC: &str = "stiefellink";
/// The tunnel's interface.
pub(crate) const TUNNEL: &str = "stiefel0";
/// Seconds between two signs of life.
const KEEPALIVE: u16 = 5;

/// Whether this is the NIC through which the stick found the laptop.
pub(crate) fn is_sessions(link: &Link, session: &AttachSession) -> bool {
    link.mac == session.link_mac || link.permanent_mac == Some(session.link_mac)
}

/// The hardware address of the second interface in a LAN: the same after a re-plug, or the laptop would not know where to
/// look; of the session's own network, so random, and locally administered (IEEE 802).
fn second_mac(session: &AttachSession) -> [u8; 6] {
    let [.., a, b, c, d, e, _] = session.link.address.octets();
    [0x02, a, b, c, d, e]
}

/// Where the NIC lives.
#[derive(Debug)]
pub(crate) struct Place {
    /// Its own namespace; `None` is the root one.
    pub(crate) namespace: Option<Namespace>,
    /// What the link is used for besides.
    mode: LinkMode,
    /// The tunnel's interface is in the root namespace.
    outside: bool,
    /// The packet size that was agreed upon, in bytes.
    mtu: AtomicU32,
    /// Where proc is mounted, and an open folder of it: the keeper has it unmounted by the time that a NIC is plugged in again.
    proc: PathBuf,
    opened: Option<File>,
}

impl Place {
    /// A place for this session's NIC.
    pub(crate) fn new(session: &AttachSession, proc: &Path) -> (Self, Option<String>) {
        // Without a tunnel the disk's own socket must reach the NIC.
        let made = session.link.tunnel.as_ref().map(|_| Namespace::new());
        let (namespace, error) = match made.transpose() {
            Ok(namespace) => (namespace, None),
            Err(error) => (
                None,
                Some(format!("the link stays in sight of network managers: {error}")),
            ),
        };
        (Self::with(session, namespace, proc), error)
    }

    /// A place that exists already.
    pub(crate) fn with(session: &AttachSession, namespace: Option<Namespace>, proc: &Path) -> Self {
        Self {
            namespace,
            mode: session.link.mode,
            outside: matches!(session.disk.transport, Transport::NvmeTcp { .. }),
            mtu: AtomicU32::new(0),
            proc: proc.to_owned(),
            opened: File::open(proc).ok(),
        }
    }

    fn inside<T: Send>(&self, work: impl FnOnce() -> anyhow::Result<T> + Send) -> anyhow::Result<T> {
        at(self.namespace.as_ref(), work)
    }

    /// The namespace of the disk's connection, if it is not the root one.
    pub(crate) fn disks(&self) -> Option<&Namespace> {
        self.namespace.as_ref().filter(|_| !self.outside)
    }

    /// Does something where the link's address is: the tunnel's, or without a tunnel the NIC's own.
    pub(crate) fn at_address<T: Send>(&self, work: impl FnOnce() -> anyhow::Result<T> + Send) -> anyhow::Result<T> {
        at(self.disks(), work)
    }

    /// Whether the NIC itself stays in the root namespace, for the desktop's system, and only a second interface on it
    /// is ours.
    const fn shares(&self) -> bool {
        matches!(self.mode, LinkMode::Lan) && self.namespace.is_some()
    }

    /// The session's interface, if it is there.
    fn find(&self, session: &AttachSession) -> anyhow::Result<Option<Link>> {
        let ours = |link: &Link| {
            if self.shares() {
                link.name == NIC
            } else {
                is_sessions(link, session)
            }
        };
        self.inside(|| Ok(link::list()?.into_iter().find(ours)))
    }

    /// An interface by its index at its place.
    pub(crate) fn look(&self, index: u32) -> anyhow::Result<Option<Link>> {
        self.inside(|| Ok(link::list()?.into_iter().find(|link| link.index == index)))
    }

    /// Sets the packet size of the NIC, now and after a re-plug.
    pub(crate) fn set_mtu(&self, index: u32, mtu: u32) -> anyhow::Result<()> {
        self.mtu.store(mtu, Ordering::Relaxed);
        self.inside(|| Ok(link::set_mtu(index, mtu)?))
    }

    /// Takes the NIC that appeared in the root namespace to its place, and brings it up; its index there.
    pub(crate) fn take(&self, nic: &Link, session: &AttachSession) -> anyhow::Result<u32> {
        if let Some(namespace) = &self.namespace {
            let index = if self.shares() {
                if !nic.up {
                    link::set_up(nic.index)?;
                }
                link::create_macvlan(NIC, nic.index, second_mac(session))
                    .context("cannot share the NIC with the desktop's system")?
            } else {
                nic.index
            };
            // The kernel takes it down on the way.
            if let Err(error) = link::set_namespace(index, namespace.as_fd()) {
                if self.shares() {
                    // Its name must be free for the next try.
                    let _ = link::delete(index);
                }
                return Err(error).context("cannot move the NIC out of sight");
            }
        }
        self.bring_up(session)?.context("the NIC has vanished")
    }

    /// Keeps a NIC that is shared with the desktop's system up, whatever that does.
    pub(crate) fn keep_parent(&self, session: &AttachSession) -> anyhow::Result<()> {
        if self.shares() {
            for nic in link::list()?.iter().filter(|nic| is_sessions(nic, session) && !nic.up) {
                link::set_up(nic.index)?;
            }
        }
        Ok(())
    }

    /// Brings the NIC up where it is, if it is there; its index.
    pub(crate) fn bring_up(&self, session: &AttachSession) -> anyhow::Result<Option<u32>> {
        let Some(here) = self.find(session)? else {
            return Ok(None);
        };
        self.inside(|| {
            if !here.up {
                // Renaming works only while it is down; the name is for people, so a refusal does no harm.
                let named = here.name == NIC || link::rename(here.index, NIC).is_ok();
                // Saves a second or two; the keeper has no proc any more when it does this after a re-plug.
                let name = if named { NIC } else { &here.name };
                let _ = link::disable_dad(&self.proc, name);
                // Off for the whole system where its owner wanted that.
                if let Some(proc) = &self.opened {
                    let _ = allow_ipv6(name, proc);
                }
                let mtu = self.mtu.load(Ordering::Relaxed);
                if mtu != 0 && here.max_mtu.is_some_and(|most| most >= mtu) {
                    // Up with smaller packets is better than not at all: the tunnel then cuts its own in pieces.
                    let _ = link::set_mtu(here.index, mtu);
                }
                link::set_up(here.index)?;
            }
            Ok(Some(here.index))
        })
    }

    /// Waits until the NIC has its link-local address.
    pub(crate) fn wait(&self, nic_index: u32, patience: Duration) -> anyhow::Result<()> {
        self.inside(|| {
            link::wait_link_local(nic_index, patience)
                .context("the link to the laptop does not come up; is the cable in at both ends?")?;
            Ok(())
        })
    }

    /// Makes the tunnel through the NIC `nic_index`.
    pub(crate) fn make_tunnel(&self, session: &AttachSession, tunnel: &Tunnel, nic_index: u32) -> anyhow::Result<()> {
        let root = Namespace::current()?;
        let made = self.inside(|| {
            // Its socket stays where it was made.
            let index = wireguard::create(TUNNEL)?;
            if self.namespace.is_some() && self.outside {
                link::set_namespace(index, root.as_fd())?;
            }
            Ok(())
        });
        made.context("cannot make the tunnel to the laptop")?;
        let private_key = PrivateKey::from_bytes(tunnel.private_key);
        let device = Device {
            interface: Interface::Name(TUNNEL),
            private_key: &private_key,
            listen_port: Some(tunnel.port),
            peer: Peer {
                public_key: PublicKey::from_bytes(tunnel.laptop_key),
                preshared_key: &PresharedKey::from_bytes(tunnel.preshared_key),
                endpoint: Some(endpoint(session, tunnel, nic_index)),
                allowed_ips: &[(IpAddr::V6(session.link.laptop), 128)],
                persistent_keepalive: Some(KEEPALIVE),
            },
            replace_peers: true,
        };
        self.at_address(|| {
            wireguard::configure(&device)?;
            let index = link::index_of(TUNNEL)?.context("the tunnel has vanished")?;
            Ok(link::set_mtu(index, tunnel.mtu)?)
        })
    }

    /// Points the tunnel at the laptop through another NIC, or the same one under another index.
    pub(crate) fn redirect(&self, session: &AttachSession, tunnel: &Tunnel, nic_index: u32) -> anyhow::Result<()> {
        let peer = PublicKey::from_bytes(tunnel.laptop_key);
        let to = endpoint(session, tunnel, nic_index);
        self.at_address(|| Ok(wireguard::set_endpoint(TUNNEL, &peer, to)?))
    }

    /// Gives the link its address and what else it needs, also after a network manager or a sysctl has taken it away. `proc` is
    /// an open folder of procfs.
    pub(crate) fn repair(&self, session: &AttachSession, nic_index: u32, proc: BorrowedFd<'_>) -> anyhow::Result<()> {
        self.at_address(|| repair(session, nic_index, proc))
    }
}

/// Does something in a namespace, or where the caller is.
pub(crate) fn at<T: Send>(
    namespace: Option<&Namespace>,
    work: impl FnOnce() -> anyhow::Result<T> + Send,
) -> anyhow::Result<T> {
    match namespace {
        Some(namespace) => namespace.run(work)?,
        None => work(),
    }
}

fn endpoint(session: &AttachSession, tunnel: &Tunnel, nic_index: u32) -> SocketAddrV6 {
    SocketAddrV6::new(session.laptop, tunnel.port, 0, nic_index)
}

/// The session's network holds its two ends (RFC 6164).
const PREFIX: u8 = 127;

fn repair(session: &AttachSession, nic_index: u32, proc: BorrowedFd<'_>) -> anyhow::Result<()> {
    let index = match session.link.tunnel {
        Some(_) => link::index_of(TUNNEL)?.context("the tunnel is gone; only a restart of the desktop helps")?,
        None => nic_index,
    };
    let links = link::list()?;
    let this = links.iter().find(|link| link.index == index);
    let this = this.context("the link's interface has vanished")?;
    if !this.up {
        link::set_up(index)?;
    }
    // Where the kernel has no such rules, the attacher has said so.
    let _ = link::only_root_reaches(session.link.laptop);
    let address = IpAddr::V6(session.link.address);
    // Only what is missing is added: what is replaced would be news again, for ever.
    if link::addresses(index)?.iter().any(|have| have.addr == address) {
        return Ok(());
    }
    link::add_address(index, address, PREFIX).or_else(|error| {
        allow_ipv6(&this.name, proc).map_err(|_| error)?;
        Ok(link::add_address(index, address, PREFIX)?)
    })
}

/// Switches IPv6 on where it is off: by a sysctl, or for the whole system.
fn allow_ipv6(name: &str, proc: impl AsFd) -> anyhow::Result<()> {
    let path = format!("sys/net/ipv6/conf/{name}/disable_ipv6");
    let file = rustix::fs::openat(proc, path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
    rustix::io::write(file, b"0")?;
    Ok(())
}
