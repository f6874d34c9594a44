//! A borrowed disk as this kernel's block device: the tunnel, then NVMe or NBD; and all of it taken away again.

use std::fs::OpenOptions;
use std::net::{IpAddr, SocketAddr, SocketAddrV6};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use stiefel_shared::bundle::Transport;
use stiefel_shared::lend::Lent;
use stiefel_shared::seal;
use stiefel_sys::module::Loader;
use stiefel_sys::wireguard::{self, Device, Interface, Peer, PresharedKey, PrivateKey, PublicKey};
use stiefel_sys::{link, nvme};

use super::record::{RECORDS, Record};
use crate::nbd;

/// How long requests wait for NBD's connection when it is lost; then they fail.
pub(super) const NBD_PATIENCE: Duration = Duration::from_secs(30);
/// After this long without an answer an NBD connection counts as lost.
const NBD_REQUEST: Duration = Duration::from_secs(30);
/// How long the kernel tries to reach a lost NVMe target again: as long as the other side keeps the loan.
const NVME_LOSS: Duration = Duration::from_secs(300);
/// How long the tunnel and the device may take to come up.
const COMING_UP: Duration = Duration::from_secs(30);
const LOOK: Duration = Duration::from_millis(50);
/// Seconds between two signs of life: also how the other side knows that we are there.
const KEEPALIVE: u16 = 5;
/// The network holds the two ends (RFC 6164).
const BITS: u8 = 127;
const FABRICS: &str = "/dev/nvme-fabrics";
const BACKEND: &str = "stiefel-borrowed";

/// Loads the modules; whether this kernel can have disks by NVMe over TCP.
pub(super) fn prepare(allow_nvme: bool) -> anyhow::Result<bool> {
    if let Ok(mut loader) = Loader::running() {
        for module in ["wireguard", "nbd", "nvme_tcp"] {
            // Built in, or missing: what is missing shows when it is used.
            let _ = loader.load(module);
        }
    }
    Ok(allow_nvme && Path::new(FABRICS).exists() && Path::new("/sys/module/nvme_tcp").exists())
}

/// Makes the device, and writes it down. What fails half-way is undone; the other side ends the loan by itself then.
pub(super) fn make(disk: &str, lent: &Lent, address: SocketAddrV6) -> anyhow::Result<Record> {
    let tunnel = Tunnel::open(lent, address)?;
    let device = attach(lent)?;
    let record = Record {
        disk: disk.to_owned(),
        hostname: lent.hostname.clone(),
        device,
        writable: lent.writable,
        address: (*address.ip(), address.scope_id(), address.port()),
        tunnel: tunnel.name.clone(),
        transport: lent.disk.transport.clone(),
        control: lent.control.clone(),
        session: lent.session.clone(),
    };
    let written = record.write(Path::new(RECORDS));
    if let Err(error) = written {
        // Without a record nobody could give it back.
        let _ = let_go(&record);
        return Err(error).context(format!("cannot write the record of the borrowed disk below {RECORDS}"));
    }
    tunnel.keep();
    Ok(record)
}

/// A tunnel that is taken away unless it is kept.
struct Tunnel {
    name: String,
    index: u32,
    kept: bool,
}

impl Tunnel {
    fn open(lent: &Lent, address: SocketAddrV6) -> anyhow::Result<Self> {
        let offered = lent
            .link
            .tunnel
            .as_ref()
            .context("the other machine offers no tunnel")?;
        let [a, b] = seal::random()?;
        let name = format!("stiefel-b{a:02x}{b:02x}");
        let index = wireguard::create(&name).context("cannot make the tunnel; load the module wireguard")?;
        let tunnel = Self {
            name,
            index,
            kept: false,
        };
        wireguard::configure(&Device {
            interface: Interface::Index(index),
            private_key: &PrivateKey::from_bytes(offered.private_key),
            listen_port: None,
            peer: Peer {
                public_key: PublicKey::from_bytes(offered.laptop_key),
                preshared_key: &PresharedKey::from_bytes(offered.preshared_key),
                endpoint: Some(SocketAddrV6::new(*address.ip(), offered.port, 0, address.scope_id())),
                allowed_ips: &[(IpAddr::V6(lent.link.laptop), 128)],
                persistent_keepalive: Some(KEEPALIVE),
            },
            replace_peers: true,
        })?;
        link::set_mtu(index, offered.mtu)?;
        link::add_address(index, IpAddr::V6(lent.link.address), BITS)?;
        // The kernel and root alone: other users of this machine would speak NVMe to the lender as it does.
        if let Err(error) = link::only_root_reaches(lent.link.laptop) {
            eprintln!("stiefel: {:#}", anyhow::Error::new(error));
        }
        link::set_up(index)?;
        tunnel.wait()?;
        Ok(tunnel)
    }

    /// Waits until the other side has answered.
    fn wait(&self) -> anyhow::Result<()> {
        let deadline = Instant::now() + COMING_UP;
        loop {
            let status = wireguard::status(self.index)?;
            if status.peers.iter().any(|peer| peer.last_handshake.is_some()) {
                return Ok(());
            }
            if Instant::now() >= deadline {
                bail!(
                    "the other machine does not answer in the tunnel; does a firewall there or here drop UDP between the two?"
                );
            }
            std::thread::sleep(LOOK);
        }
    }

    fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        if !self.kept {
            // Fails only if it is gone already.
            let _ = link::delete(self.index);
        }
    }
}

/// The path of the new block device.
fn attach(lent: &Lent) -> anyhow::Result<String> {
    match &lent.disk.transport {
        Transport::Nbd { port, export } => {
            let at = SocketAddr::V6(SocketAddrV6::new(lent.link.laptop, *port, 0, 0));
            let granted = nbd::connect(at, export)?;
            same_size(lent, granted.size)?;
            let index = stiefel_sys::nbd::connect(&stiefel_sys::nbd::Connect {
                index: None,
                size: granted.size,
                block_size: u64::from(lent.disk.logical_block_size),
                timeout: NBD_REQUEST,
                server_flags: granted.flags,
                dead_conn_timeout: NBD_PATIENCE,
                backend_identifier: BACKEND,
                sockets: &[granted.socket.as_fd()],
            })
            .context("the kernel did not take the disk; load the module nbd")?;
            let device = format!("/dev/nbd{index}");
            // Its partitions are looked for at the first open.
            if let Err(error) = std::fs::File::open(&device) {
                let _ = stiefel_sys::nbd::disconnect(index);
                return Err(error).context(format!("cannot open {device}"));
            }
            Ok(device)
        }
        Transport::NvmeTcp { .. } => attach_nvme(lent),
    }
}

fn attach_nvme(lent: &Lent) -> anyhow::Result<String> {
    let Transport::NvmeTcp {
        port,
        nqn,
        host_nqn,
        host_id,
    } = &lent.disk.transport
    else {
        bail!("the disk does not come by NVMe");
    };
    let controller = nvme::connect(
        Path::new(FABRICS),
        &nvme::Connect {
            address: IpAddr::V6(lent.link.laptop),
            port: *port,
            nqn,
            host_nqn,
            host_id,
            ctrl_loss_timeout: Some(NVME_LOSS),
            reconnect_delay: Duration::from_secs(2),
            keep_alive: Duration::from_secs(5),
            queues: None,
            queue_size: None,
        },
    )?;
    if let Err(error) = nvme::hide_names(Path::new("/sys"), controller.instance) {
        eprintln!(
            "stiefel: other users can see the loan's names: {:#}",
            anyhow::Error::new(error)
        );
    }
    let deadline = Instant::now() + COMING_UP;
    loop {
        let sysfs = Path::new("/sys");
        if let Some(name) = nvme::namespaces(sysfs, controller.instance)?.into_iter().next() {
            let path = PathBuf::from("/dev").join(&name);
            if path.exists() {
                let sectors = std::fs::read_to_string(sysfs.join("block").join(&name).join("size"))?;
                let sectors: u64 = sectors.trim().parse().context("the disk's size is no number")?;
                let sized = same_size(lent, sectors.saturating_mul(512));
                if sized.is_err() {
                    let _ = nvme::delete(sysfs, controller.instance);
                }
                return sized.map(|()| path.display().to_string());
            }
        }
        if Instant::now() >= deadline {
            let _ = nvme::delete(sysfs, controller.instance);
            bail!("the disk does not appear; the kernel's log (dmesg) may say why");
        }
        std::thread::sleep(LOOK);
    }
}

/// Another size than offered would be another disk.
fn same_size(lent: &Lent, size: u64) -> anyhow::Result<()> {
    let offered = lent.disk.identity.size;
    if size != offered {
        bail!("the other machine offered a disk of {offered} bytes, but serves one of {size}; list the disks again");
    }
    Ok(())
}

/// Takes the device away, unless something uses it.
pub(super) fn take_away(record: &Record) -> anyhow::Result<()> {
    let device = Path::new(&record.device);
    if device.exists() {
        // Exclusively: what is mounted or held is refused here, before anything is lost.
        let open = OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(device);
        match open {
            Ok(file) => {
                if record.writable {
                    file.sync_all()
                        .with_context(|| format!("cannot bring all onto {}", record.device))?;
                }
            }
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                bail!("{} is in use; unmount it first", record.device)
            }
            // Its other end is gone.
            Err(_) => {}
        }
    }
    let_go(record)
}

fn let_go(record: &Record) -> anyhow::Result<()> {
    match &record.transport {
        Transport::Nbd { .. } => {
            let index = record
                .device
                .strip_prefix("/dev/nbd")
                .and_then(|number| number.parse().ok());
            let index = index.context("the record of this disk is damaged")?;
            if is_ours(index) {
                stiefel_sys::nbd::disconnect(index)?;
            }
        }
        Transport::NvmeTcp { nqn, .. } => {
            let sysfs = Path::new("/sys");
            if let Some(instance) = nvme::find(sysfs, nqn)? {
                nvme::delete(sysfs, instance)?;
            }
        }
    }
    Ok(())
}

/// Whether an NBD device is still the one that we made: another may have got its number.
fn is_ours(index: u32) -> bool {
    let backend = std::fs::read_to_string(format!("/sys/block/nbd{index}/backend"));
    backend.is_ok_and(|backend| backend.trim() == BACKEND)
}

/// Takes the tunnel away, if it is still there.
pub(super) fn close_tunnel(record: &Record) {
    if let Ok(Some(index)) = link::index_of(&record.tunnel) {
        // The other of the two addresses there are.
        for own in link::addresses(index).unwrap_or_default() {
            if let (IpAddr::V6(own), BITS) = (own.addr, own.prefix) {
                let _ = link::everybody_reaches((u128::from(own) ^ 1).into());
            }
        }
        let _ = link::delete(index);
    }
}
