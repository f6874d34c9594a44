//! The laptop's disk as this kernel's block device, by NBD or by NVMe.
//!
//! Used by the attacher (which makes it), the keeper (which looks after it) and the goodbye (which lets it go).

use std::net::{IpAddr, SocketAddr, SocketAddrV6};
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use stiefel_shared::bundle::{AttachSession, Transport};
use stiefel_sys::console::Console;
use stiefel_sys::nbd::Reconfigure;
use stiefel_sys::netns::Namespace;
use stiefel_sys::{nvme, wireguard};

use crate::link::{self, TUNNEL};
use crate::nbd;

/// The index of the device, /dev/nbd0.
pub(crate) const NBD_INDEX: u32 = 0;
/// How long the kernel lets I/O wait for a link that is away; the [keeper](mod@crate::keeper) decides earlier.
const DEAD_CONNECTION: Duration = Duration::from_hours(48);
/// After this long without an answer a connection counts as dead, and its requests are sent again on a new one; only then,
/// also where the connection was seen to end. The laptop ends the old one first, so nothing is done twice in the wrong order;
/// a disk that takes longer only has its laptop asked again.
const REQUEST: Duration = Duration::from_secs(20);
/// What the kernel shows as the device's backend; a new connection must name the same.
const BACKEND: &str = "stiefel";
/// Between two tries of the NVMe driver to connect anew.
const NVME_RECONNECT: Duration = Duration::from_secs(2);
/// After this long without any sign from the laptop's driver it does; before, TCP itself goes on. The laptop forgets a half-made
/// connection after the same time, and newer kernels then give the disk up (`nvmf_should_reconnect`: "do not retry"), so it must be
/// longer than links that only flap stay away.
const NVME_KEEP_ALIVE: Duration = Duration::from_secs(30);
/// A request that the laptop's disk takes longer for is sent again on a new connection, while the old one may still be done, after
/// newer ones. No disk that works takes this long; that the laptop is gone is found out by other means.
const NVME_REQUEST: Duration = Duration::from_mins(30);
/// More queues than this only cost memory on a cable.
const NVME_QUEUES: usize = 8;
/// The largest request, in KiB.
const REQUEST_KIB: u32 = 1024;
/// How much is read ahead of who reads in order, in KiB: some round trips' worth at 10 Gbit/s.
const READ_AHEAD_KIB: u32 = 2048;
/// Between two looks for what the kernel does not announce.
const LOOK: Duration = Duration::from_millis(50);

/// The kernel's modules for the session's transport.
pub(crate) const fn module(session: &AttachSession) -> &'static str {
    match session.disk.transport {
        Transport::Nbd { .. } => "nbd",
        Transport::NvmeTcp { .. } => "nvme_tcp",
    }
}

/// Where the laptop listens on TCP port `port`.
pub(crate) fn laptop(session: &AttachSession, port: u16) -> SocketAddr {
    SocketAddr::V6(SocketAddrV6::new(session.link.laptop, port, 0, 0))
}

/// Attaches the disk; the name of its block device. `place` is the namespace of NBD's connection, `dev` and `sysfs` are where they
/// are mounted.
pub(crate) fn attach(
    console: &Console,
    session: &AttachSession,
    place: Option<&Namespace>,
    dev: &Path,
    sysfs: &Path,
    patience: Duration,
) -> anyhow::Result<String> {
    let deadline = Instant::now() + patience;
    let name = match &session.disk.transport {
        Transport::Nbd { port, export } => {
            let granted = link::at(place, || connect(console, laptop(session, *port), export, deadline))?;
            attach_nbd(session, &granted)?
        }
        Transport::NvmeTcp { .. } => attach_nvme(console, session, dev, sysfs, deadline)?,
    };
    tune(console, sysfs, &name);
    // Without udev nobody opens the device, and NBD's partition table is read at the first open.
    std::fs::File::open(dev.join(&name)).context("cannot open the attached disk")?;
    Ok(name)
}

/// What the kernel shall do with a disk on a cable: fetch more ahead than from one inside, ask for more at once, and not sort
/// requests that the laptop's own disk sorts again. Only speed depends on it. (Sockets need no larger buffers: the kernel lets
/// them grow to 6 MiB, and 10 Gbit/s times a cable's round trip is less than one.)
fn tune(console: &Console, sysfs: &Path, name: &str) {
    let queue = sysfs.join("block").join(name).join("queue");
    let most = std::fs::read_to_string(queue.join("max_hw_sectors_kb"));
    let most = most
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(REQUEST_KIB);
    for (file, value) in [
        ("max_sectors_kb", REQUEST_KIB.min(most).to_string()),
        ("read_ahead_kb", READ_AHEAD_KIB.to_string()),
        ("scheduler", "none".to_owned()),
    ] {
        if let Err(error) = std::fs::write(queue.join(file), &value) {
            console.info(&format!("{name}: {file} stays as it is ({error})"));
        }
    }
}

fn attach_nbd(session: &AttachSession, granted: &nbd::Granted) -> anyhow::Result<String> {
    check_size(session, granted.size)?;
    stiefel_sys::nbd::connect(&stiefel_sys::nbd::Connect {
        index: Some(NBD_INDEX),
        size: granted.size,
        block_size: u64::from(session.disk.logical_block_size),
        timeout: REQUEST,
        server_flags: granted.flags,
        dead_conn_timeout: DEAD_CONNECTION,
        backend_identifier: BACKEND,
        sockets: &[granted.socket.as_fd()],
    })
    .context("the kernel did not take the disk")?;
    Ok(format!("nbd{NBD_INDEX}"))
}

/// Connects, and tries on while the laptop may still be busy or the cable be put right.
fn connect(console: &Console, at: SocketAddr, export: &str, deadline: Instant) -> anyhow::Result<nbd::Granted> {
    loop {
        match nbd::connect(at, export) {
            Ok(granted) => return Ok(granted),
            Err(error @ nbd::NbdError::Refused(_)) => return Err(error.into()),
            Err(error) if Instant::now() >= deadline => return Err(error.into()),
            Err(error) => {
                console.warn(&format!("{:#}; trying on", anyhow::Error::new(error)));
                std::thread::sleep(Duration::from_secs(1));
            }
        }
    }
}

/// Another size than offered would shift what the partition table and the file systems say.
fn check_size(session: &AttachSession, size: u64) -> anyhow::Result<()> {
    let offered = session.disk.identity.size;
    if size != offered {
        bail!("the laptop offered a disk of {offered} bytes, but serves one of {size}; start again from the stick");
    }
    Ok(())
}

fn attach_nvme(
    console: &Console,
    session: &AttachSession,
    dev: &Path,
    sysfs: &Path,
    deadline: Instant,
) -> anyhow::Result<String> {
    let Transport::NvmeTcp {
        port,
        nqn,
        host_nqn,
        host_id,
    } = &session.disk.transport
    else {
        bail!("the disk does not come by NVMe");
    };
    // The kernel's own attempt would wait for minutes.
    wait_for_tunnel(session, deadline)?;
    let queues = std::thread::available_parallelism().map_or(1, |cpus| cpus.get().min(NVME_QUEUES));
    let options = nvme::Connect {
        address: IpAddr::V6(session.link.laptop),
        port: *port,
        nqn,
        host_nqn,
        host_id,
        ctrl_loss_timeout: None,
        reconnect_delay: NVME_RECONNECT,
        keep_alive: NVME_KEEP_ALIVE,
        queues: u32::try_from(queues).ok(),
        queue_size: None,
    };
    let before = nvme::set_io_timeout(sysfs, NVME_REQUEST)?;
    let controller = loop {
        match nvme::connect(&dev.join("nvme-fabrics"), &options) {
            Ok(controller) => break controller,
            Err(error) if Instant::now() >= deadline => return Err(error.into()),
            Err(error) => {
                console.warn(&format!("{:#}; trying on", anyhow::Error::new(error)));
                std::thread::sleep(Duration::from_secs(1));
            }
        }
    };
    // For the machine's own disks.
    nvme::set_io_timeout(sysfs, before)?;
    if let Err(error) = nvme::hide_names(sysfs, controller.instance) {
        console.warn(&format!(
            "other users can see the session's names: {:#}",
            anyhow::Error::new(error)
        ));
    }
    // The kernel looks for the disk behind a controller in its own time, without a word when it is done.
    loop {
        if let Some(name) = nvme::namespaces(sysfs, controller.instance)?.into_iter().next()
            && dev.join(&name).exists()
        {
            check_size(session, size(sysfs, &name)?)?;
            return Ok(name);
        }
        if Instant::now() >= deadline {
            bail!("the laptop's disk does not appear; its screen may say why");
        }
        std::thread::sleep(LOOK);
    }
}

fn wait_for_tunnel(session: &AttachSession, deadline: Instant) -> anyhow::Result<()> {
    while session.link.tunnel.is_some() {
        let status = wireguard::status(TUNNEL)?;
        if status.peers.iter().any(|peer| peer.last_handshake.is_some()) {
            break;
        }
        if Instant::now() >= deadline {
            bail!("the laptop does not answer in the tunnel; is the cable in, and does its screen say that it serves?");
        }
        std::thread::sleep(LOOK);
    }
    Ok(())
}

/// A block device's size in bytes.
fn size(sysfs: &Path, name: &str) -> anyhow::Result<u64> {
    let path = sysfs.join("block").join(name).join("size");
    let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    // sysfs counts in sectors of 512 bytes, whatever the disk's own block size is.
    let sectors: u64 = text.trim().parse().context("the disk's size is no number")?;
    Ok(sectors.saturating_mul(512))
}

/// The disk's block device, if it is attached.
pub(crate) fn device(session: &AttachSession, sysfs: &Path) -> anyhow::Result<String> {
    match &session.disk.transport {
        Transport::Nbd { .. } => Ok(format!("nbd{NBD_INDEX}")),
        Transport::NvmeTcp { nqn, .. } => {
            let instance = nvme::find(sysfs, nqn)?.context("the disk is not attached")?;
            let mut names = nvme::namespaces(sysfs, instance)?.into_iter();
            names.next().context("the disk is not attached")
        }
    }
}

/// Makes a new connection for the kernel's NBD client; when the kernel had it. NVMe needs none: the kernel connects anew by
/// itself.
pub(crate) fn reconnect(session: &AttachSession, place: Option<&Namespace>) -> anyhow::Result<Instant> {
    let Transport::Nbd { port, export } = &session.disk.transport else {
        return Ok(Instant::now());
    };
    let granted = link::at(place, || Ok(nbd::connect(laptop(session, *port), export)?))?;
    stiefel_sys::nbd::reconfigure(&Reconfigure {
        index: NBD_INDEX,
        timeout: REQUEST,
        dead_conn_timeout: DEAD_CONNECTION,
        backend_identifier: BACKEND,
        sockets: &[granted.socket.as_fd()],
    })?;
    Ok(Instant::now())
}

/// Takes the disk away from this machine; what still waits for it fails. With NVMe and a laptop that has gone it lasts more
/// than a minute: bound it.
pub(crate) fn detach(session: &AttachSession, sysfs: &Path) -> anyhow::Result<()> {
    match &session.disk.transport {
        Transport::Nbd { .. } => Ok(stiefel_sys::nbd::disconnect(NBD_INDEX)?),
        Transport::NvmeTcp { nqn, .. } => match nvme::find(sysfs, nqn)? {
            Some(instance) => Ok(nvme::delete(sysfs, instance)?),
            None => Ok(()),
        },
    }
}

/// The kernel's view of the connection, for people.
pub(crate) fn state(session: &AttachSession, sysfs: &Path) -> Option<String> {
    let Transport::NvmeTcp { nqn, .. } = &session.disk.transport else {
        return None;
    };
    let instance = nvme::find(sysfs, nqn).ok()??;
    nvme::state(sysfs, instance)
        .ok()
        .map(|state| format!("{state:?}").to_lowercase())
}
