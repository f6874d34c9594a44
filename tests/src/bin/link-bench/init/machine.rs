//! What both machines need: mounts, modules, the NIC, the tunnel.

use std::net::{IpAddr, SocketAddrV6};
use std::path::Path;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use crate::result::Way;
use anyhow::Context;
use rustix::mount::{MountFlags, mount};
use stiefel_sys::PROCFS;
use stiefel_sys::link;
use stiefel_sys::module::Loader;
use stiefel_sys::wireguard::{self, Device, Interface, Peer, PresharedKey, PrivateKey};

/// Where the overlay has the modules, in a folder named by the kernel's version.
const MODULES: &str = "/stiefel/modules";
/// What both machines need.
const BOTH: [&str; 3] = ["virtio_pci", "virtio_net", "wireguard"];
const TUNNEL: &str = "bench0";
const TUNNEL_PORT: u16 = 5182;
/// What WireGuard adds to a packet over IPv6, in bytes.
const OVERHEAD: u32 = 80;
const PREFIX: u8 = 64;
/// For hardware to appear.
const APPEAR: Duration = Duration::from_secs(20);
const LOOK: Duration = Duration::from_millis(50);

/// Which end of the cable this is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    Laptop,
    Desktop,
}

pub(crate) fn mount_all() -> anyhow::Result<()> {
    for (fstype, target) in [
        ("proc", "/proc"),
        ("devtmpfs", "/dev"),
        ("tmpfs", "/run"),
        ("sysfs", "/sys"),
    ] {
        std::fs::create_dir_all(target)?;
        mount(fstype, target, fstype, MountFlags::empty(), None).with_context(|| format!("cannot mount {target}"))?;
    }
    Ok(())
}

/// Loads `modules` besides those that both need, and brings NIC and tunnel up.
pub(crate) fn set_up(end: End, modules: &[&str]) -> anyhow::Result<()> {
    let mut folders = std::fs::read_dir(MODULES).context("there are no modules")?;
    let folder = folders.next().context("there are no modules")??.path();
    let mut loader = Loader::open(&folder, &[])?;
    for module in BOTH.iter().chain(modules) {
        loader.load(module)?;
    }
    let nic = wait("the NIC", APPEAR, || {
        Ok(link::list()?.into_iter().find(link::Link::is_wired_physical))
    })?;
    link::disable_dad(Path::new(PROCFS), &nic.name)?;
    link::set_up(nic.index)?;
    // The loopback interface, always the first.
    link::set_up(1)?;
    let own = |way: Way| match end {
        End::Laptop => way.laptop(),
        End::Desktop => way.desktop(),
    };
    link::add_address(nic.index, IpAddr::V6(own(Way::Bare)), PREFIX)?;
    let index = make_tunnel(end)?;
    link::set_mtu(index, nic.mtu - OVERHEAD)?;
    link::add_address(index, IpAddr::V6(own(Way::Tunnel)), PREFIX)?;
    Ok(link::set_up(index)?)
}

/// Makes the tunnel. Its keys protect nothing: they are the same in every run.
fn make_tunnel(end: End) -> anyhow::Result<u32> {
    let [laptop, desktop] = [1, 2].map(|byte| PrivateKey::from_bytes([byte; 32]));
    let (own, other, at, inside) = match end {
        End::Laptop => (laptop, desktop, Way::Bare.desktop(), Way::Tunnel.desktop()),
        End::Desktop => (desktop, laptop, Way::Bare.laptop(), Way::Tunnel.laptop()),
    };
    let index = wireguard::create(TUNNEL)?;
    wireguard::configure(&Device {
        interface: Interface::Index(index),
        private_key: &own,
        listen_port: Some(TUNNEL_PORT),
        peer: Peer {
            public_key: other.public(),
            preshared_key: &PresharedKey::from_bytes([3; 32]),
            endpoint: Some(SocketAddrV6::new(at, TUNNEL_PORT, 0, 0)),
            allowed_ips: &[(IpAddr::V6(inside), 128)],
            persistent_keepalive: None,
        },
        replace_peers: true,
    })?;
    Ok(index)
}

/// Waits until `look` finds something.
pub(crate) fn wait<T>(
    what: &str,
    patience: Duration,
    mut look: impl FnMut() -> anyhow::Result<Option<T>>,
) -> anyhow::Result<T> {
    let deadline = Instant::now() + patience;
    loop {
        if let Some(found) = look()? {
            return Ok(found);
        }
        anyhow::ensure!(Instant::now() < deadline, "{what}: not there after {patience:?}");
        std::thread::sleep(LOOK);
    }
}

/// Does something that could hang, but waits for it only so long.
pub(crate) fn within<T: Send + 'static>(
    what: &str,
    limit: Duration,
    work: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
) -> anyhow::Result<T> {
    let (done, result) = mpsc::channel();
    std::thread::spawn(move || {
        // Nobody listens any more once the time is over.
        let _ = done.send(work());
    });
    result
        .recv_timeout(limit)
        .map_err(|_| anyhow::anyhow!("hangs, for {limit:?} now"))
        .flatten()
        .with_context(|| what.to_owned())
}
