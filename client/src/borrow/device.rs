//! A borrowed disk as this kernel's block device: the tunnel, then NVMe or NBD; and all of it taken away again.

use std::fs::{File, OpenOptions};
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use stiefel_shared::bundle::{Goodbye, Transport};
use stiefel_shared::lend::Lent;
use stiefel_shared::seal;
use stiefel_sys::module::Loader;
use stiefel_sys::say::say;
use stiefel_sys::wireguard::{self, Device, Interface, Peer, PresharedKey, PrivateKey, PublicKey};
use stiefel_sys::{link, nvme};

use super::record::{RECORDS, Record};
use crate::{control, nbd};

/// How long requests wait for NBD's connection when it is lost; then they fail.
pub(super) const NBD_PATIENCE: Duration = Duration::from_secs(30);
/// After this long without an answer an NBD connection counts as lost.
const NBD_REQUEST: Duration = Duration::from_secs(30);
/// How long the kernel tries to reach a lost NVMe target again: as long as the other side keeps the loan.
const NVME_LOSS: Duration = Duration::from_secs(300);
/// How long it is tried to give a disk back that could not be made a device.
const GIVING_BACK: Duration = Duration::from_secs(10);
/// How long the tunnel and the device may take to come up.
const COMING_UP: Duration = Duration::from_secs(30);
/// How long the other side may take to tell this kernel that a disk has become read-only.
const HEARD: Duration = Duration::from_secs(5);
const LOOK: Duration = Duration::from_millis(50);
/// Seconds between two signs of life: also how the other side knows that we are there.
const KEEPALIVE: u16 = 5;
/// The network holds the two ends (RFC 6164).
const BITS: u8 = 127;
const FABRICS: &str = "/dev/nvme-fabrics";
/// Before the loan's name, by which the kernel tells whose an NBD device is.
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

/// Makes the device, and writes it down. What fails half-way is undone, and the disk given back: the other side would keep it for us
/// as long as for one who is silent.
pub(super) fn make(disk: &str, lent: &Lent, address: SocketAddrV6) -> anyhow::Result<Record> {
    let made = try_to_make(disk, lent, address);
    if made.is_err() {
        let peer = SocketAddr::V6(SocketAddrV6::new(*address.ip(), address.port(), 0, address.scope_id()));
        // It ends the loan by itself if it does not hear.
        let _ = control::goodbye_within(GIVING_BACK, peer, &lent.session, &lent.control, Goodbye::Poweroff);
    }
    made
}

fn try_to_make(disk: &str, lent: &Lent, address: SocketAddrV6) -> anyhow::Result<Record> {
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
    /// The other end, which only root reaches.
    lender: Ipv6Addr,
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
            lender: lent.link.laptop,
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
            say(format_args!("{:#}", anyhow::Error::new(error)));
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
            // Both fail only if it is gone already.
            let _ = link::everybody_reaches(self.lender);
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
                backend_identifier: &backend(&lent.session),
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
        say(format_args!(
            "other users can see the loan's names: {:#}",
            anyhow::Error::new(error)
        ));
    }
    let sysfs = Path::new("/sys");
    let device = appeared(sysfs, controller.instance, lent);
    match &device {
        Ok(device) if !lent.writable => show_read_only(sysfs, device),
        Ok(_) => {}
        Err(_) => {
            let _ = nvme::delete(sysfs, controller.instance);
        }
    }
    device
}

/// Has this kernel know that nothing can be written, as with NBD: it mounts read-only then, instead of failing at the first write. Where
/// that cannot be had, the other machine refuses the writes all the same.
fn show_read_only(sysfs: &Path, device: &str) {
    let asked = File::open(device).and_then(|device| nvme::write_protect(&device));
    let name = Path::new(device).file_name().unwrap_or_default();
    let shown = sysfs.join("block").join(name).join("ro");
    let writable = || std::fs::read_to_string(&shown).is_ok_and(|shown| shown.trim() == "0");
    let deadline = Instant::now() + HEARD;
    while asked.is_ok() && writable() && Instant::now() < deadline {
        std::thread::sleep(LOOK);
    }
    if writable() {
        let why = asked.err().map(|error| format!(" ({error})")).unwrap_or_default();
        say(format_args!(
            "{device} looks writable here{why}, and is not: writes fail; mount it with -o ro"
        ));
    }
}

/// Waits for the block device of a new controller, and looks at its size.
fn appeared(sysfs: &Path, instance: u32, lent: &Lent) -> anyhow::Result<String> {
    let deadline = Instant::now() + COMING_UP;
    loop {
        if let Some(name) = nvme::namespaces(sysfs, instance)?.into_iter().next() {
            let path = PathBuf::from("/dev").join(&name);
            if path.exists() {
                let sectors = std::fs::read_to_string(sysfs.join("block").join(&name).join("size"))?;
                let sectors: u64 = sectors.trim().parse().context("the disk's size is no number")?;
                return same_size(lent, sectors.saturating_mul(512)).map(|()| path.display().to_string());
            }
        }
        if Instant::now() >= deadline {
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

/// Takes the device away, unless something uses it. With `lost`, also if what was written cannot be brought to the other machine.
pub(super) fn take_away(record: &Record, lost: bool) -> anyhow::Result<()> {
    // Until it is taken away: nothing can be mounted in between.
    let held = hold(record, lost)?;
    let_go(record)?;
    drop(held);
    Ok(())
}

/// Has the device alone, with all that was written on the other side; nothing if it has gone.
fn hold(record: &Record, lost: bool) -> anyhow::Result<Option<File>> {
    let device = Path::new(&record.device);
    if !device.exists() || !is_there(Path::new("/sys"), record)? {
        return Ok(None);
    }
    // Exclusively: what is mounted or held is refused here, before anything is lost.
    match OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(device) {
        Ok(file) => {
            if record.writable {
                brought(file.sync_all(), &record.device, lost)?;
            }
            Ok(Some(file))
        }
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
            bail!("{} is in use; unmount it first", record.device)
        }
        // Its other end is gone.
        Err(_) => Ok(None),
    }
}

/// What becomes of the last flush.
fn brought(flushed: io::Result<()>, device: &str, lost: bool) -> anyhow::Result<()> {
    match flushed {
        Err(error) if !lost => Err(error).with_context(|| {
            format!("cannot bring all that was written onto {device}; `detach --lost` gives it back all the same")
        }),
        _ => Ok(()),
    }
}

fn let_go(record: &Record) -> anyhow::Result<()> {
    match &record.transport {
        Transport::Nbd { .. } => {
            let index = nbd_index(record)?;
            if is_ours(Path::new("/sys"), index, record) {
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

fn nbd_index(record: &Record) -> anyhow::Result<u32> {
    let index = record
        .device
        .strip_prefix("/dev/nbd")
        .and_then(|number| number.parse().ok());
    index.context("the record of this disk is damaged")
}

/// Whether the device of a record is still this loan's: another disk may have got its name, borrowed or not.
fn is_there(sysfs: &Path, record: &Record) -> anyhow::Result<bool> {
    match &record.transport {
        Transport::Nbd { .. } => Ok(is_ours(sysfs, nbd_index(record)?, record)),
        Transport::NvmeTcp { nqn, .. } => {
            let Some(instance) = nvme::find(sysfs, nqn)? else {
                return Ok(false);
            };
            // One that goes away meanwhile has none.
            let names = nvme::namespaces(sysfs, instance).unwrap_or_default();
            Ok(names
                .iter()
                .any(|name| Path::new("/dev").join(name) == Path::new(&record.device)))
        }
    }
}

fn backend(session: &str) -> String {
    format!("{BACKEND}.{session}")
}

/// Whether an NBD device is the one that this loan made. Before Linux 5.14 the kernel does not say whose one is: it is then, if it is
/// connected at all.
fn is_ours(sysfs: &Path, index: u32, record: &Record) -> bool {
    let folder = sysfs.join(format!("block/nbd{index}"));
    match std::fs::read_to_string(folder.join("backend")) {
        Ok(found) => found.trim() == backend(&record.session),
        Err(_) if says_whose(&rustix::system::uname().release().to_string_lossy()) => false,
        Err(_) => folder.join("pid").exists(),
    }
}

/// Whether a kernel of this release says whose an NBD device is.
fn says_whose(release: &str) -> bool {
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map(|number| number.parse::<u32>().unwrap_or(u32::MAX));
    (numbers.next(), numbers.next()) >= (Some(5), Some(14))
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

#[cfg(test)]
mod tests {
    use super::*;
    use stiefel_shared::bundle::ControlKey;

    #[test]
    fn another_loan_that_got_the_name_is_not_this_one() {
        let sysfs = tempfile::tempdir().unwrap();
        let device = sysfs.path().join("block/nbd0");
        std::fs::create_dir_all(&device).unwrap();
        let record = |session: &str| Record {
            disk: "ssd-1".into(),
            hostname: "laptop".into(),
            device: "/dev/nbd0".into(),
            writable: true,
            address: ("fe80::1".parse().unwrap(), 3, 61570),
            tunnel: "stiefel-b0000".into(),
            transport: Transport::Nbd {
                port: 61571,
                export: "x".into(),
            },
            control: ControlKey([1; 32]),
            session: session.into(),
        };
        assert!(!is_there(sysfs.path(), &record("00ff")).unwrap());
        std::fs::write(device.join("backend"), "stiefel-borrowed.00ff\n").unwrap();
        assert!(is_there(sysfs.path(), &record("00ff")).unwrap());
        assert!(!is_there(sysfs.path(), &record("00ee")).unwrap());
        assert!(
            says_whose("5.14.0-1-amd64")
                && says_whose("6.1")
                && !says_whose("5.10.0-30-amd64")
                && !says_whose("4.19.0")
        );
    }

    #[test]
    fn a_disk_whose_machine_has_gone_can_be_given_up() {
        let failed = || Err(io::Error::from_raw_os_error(libc::EIO));
        let error = brought(failed(), "/dev/nbd0", false).unwrap_err().to_string();
        assert!(error.contains("detach --lost"), "{error}");
        assert!(brought(failed(), "/dev/nbd0", true).is_ok() && brought(Ok(()), "/dev/nbd0", false).is_ok());
    }
}
