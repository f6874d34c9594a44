//! The disk of a session as it is served: by our NBD server, or by the kernel's NVMe target. Guests share the disk, which is
//! read-only then, and each has an overlay in memory above it.
//!
//! Each session has an NBD server of its own, at the laptop's address of that session: what happens to one desktop's
//! connections is none of another's business.

use std::fs::File;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Context;
use stiefel_shared::bundle::{DISK_PORT, LinkOffer, NVME_PORT, Transport};
use stiefel_shared::handover::DiskTransport;
use stiefel_shared::seal;
use stiefel_shared::session::SessionName;
use stiefel_sys::block::Disk;
use stiefel_sys::nvmet::{MAX_MODEL, MAX_SERIAL, NQN_PREFIX, Namespace, Port, Publish, fitting};

use super::link::Known;
use super::machine::{Machine, within};
use crate::nbd::overlay::base_of;
use crate::nbd::{self, Export, ExportOptions, Listed, Overlay, Store};

/// What a failed flush means.
const LOST: &str = "the final flush of the disk failed; data may be lost, check the disk";

/// The disk that guests share: opened read-only, and away from everybody who would write it.
#[derive(Debug)]
pub(super) struct Base {
    device: File,
    store: Arc<dyn Store>,
}

impl Base {
    /// Takes the disk, which `device` holds exclusively.
    ///
    /// # Errors
    /// It is open for writing, or cannot be read.
    pub(super) fn new(device: File, disk: &Disk) -> anyhow::Result<Arc<Self>> {
        let store = base_of(device.try_clone()?, &disk.path)?;
        Ok(Arc::new(Self { device, store }))
    }

    /// The open disk.
    pub(super) const fn device(&self) -> &File {
        &self.device
    }
}

/// A disk that is open to one desktop.
pub(super) struct Served {
    device: Device,
    /// `None`: the kernel serves it.
    nbd: Option<Nbd>,
}

enum Device {
    /// One desktop's; exclusive. With NBD the very file that is served.
    Own(File),
    /// A guest's: what it writes lies in the overlay.
    Shared(Arc<Base>, Arc<Overlay>),
}

/// What our server does for one session.
struct Nbd {
    door: Arc<Door>,
    export: Arc<Export>,
    server: nbd::Server,
}

/// With what a disk is served.
#[derive(Clone, Copy)]
pub(super) struct With<'a> {
    pub(super) machine: &'a dyn Machine,
    pub(super) disk: &'a Disk,
    /// Sees an export before anybody else does.
    pub(super) watch: &'a dyn Fn(&Export),
}

/// Where a session is served.
#[derive(Debug, Clone, Copy)]
pub(super) struct At {
    /// The laptop's address of this session.
    laptop: Ipv6Addr,
    /// The desktop's. An interface is not compared: after a re-plug it has another index.
    desktop: Ipv6Addr,
    /// TCP.
    port: u16,
}

impl At {
    /// Where a new session with this link is served.
    const fn new(link: &LinkOffer) -> Self {
        Self {
            laptop: link.laptop,
            desktop: link.address,
            port: DISK_PORT,
        }
    }

    /// Where an earlier process served it.
    pub(super) const fn again(link: &Known, port: u16) -> Self {
        Self {
            laptop: link.laptop,
            desktop: link.desktop,
            port,
        }
    }
}

/// Lets one desktop in, to the one export whose name it knows, until it is shut.
struct Door {
    peer: IpAddr,
    export: Mutex<Option<Arc<Export>>>,
}

impl Door {
    /// Lets nobody in any more. Nothing here has the disk open then.
    fn shut(&self) {
        *self.lock() = None;
    }

    fn lock(&self) -> MutexGuard<'_, Option<Arc<Export>>> {
        self.export.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl nbd::Gate for Door {
    fn admit(&self, peer: SocketAddr) -> bool {
        self.peer == peer.ip() && self.lock().is_some()
    }

    fn export(&self, name: &str, peer: SocketAddr) -> Option<Arc<Export>> {
        let export = self.lock();
        let export = export.as_ref().filter(|export| export.name() == name)?;
        (self.peer == peer.ip()).then(|| Arc::clone(export))
    }

    fn list(&self, _peer: SocketAddr) -> Vec<Listed> {
        // The name is the session's secret.
        Vec::new()
    }
}

impl Served {
    /// Opens the disk, which `device` holds exclusively, to the desktop at the other end of `link`, under names that nobody can
    /// guess.
    pub(super) fn open(
        with: With<'_>,
        device: File,
        transport: DiskTransport,
        link: &LinkOffer,
    ) -> anyhow::Result<(Self, Transport)> {
        let With { machine, disk, .. } = with;
        match transport {
            DiskTransport::Nbd => {
                let export = SessionName::generate()?.to_string();
                let (nbd, port) = Nbd::start(with, own_export(&device, disk, &export)?, At::new(link))?;
                let served = Self {
                    device: Device::Own(device),
                    nbd: Some(nbd),
                };
                Ok((served, Transport::Nbd { port, export }))
            }
            DiskTransport::NvmeTcp => {
                let transport = publish(machine, disk, link)?;
                let served = Self {
                    device: Device::Own(device),
                    nbd: None,
                };
                // The kernel has opened it by its name.
                match machine.disk() {
                    Ok(again) if again.device == disk.device => Ok((served, transport)),
                    _ => {
                        machine.withdraw().context("the disk changed while it was opened")?;
                        anyhow::bail!(
                            "the disk changed while it was opened; is its plug loose? Start the desktop again"
                        )
                    }
                }
            }
        }
    }

    /// Opens what guests share to one more of them, whose writes may take `limit` bytes of memory.
    pub(super) fn to_guest(
        with: With<'_>,
        base: Arc<Base>,
        limit: u64,
        link: &LinkOffer,
    ) -> anyhow::Result<(Self, Transport)> {
        let overlay = Overlay::memory(Arc::clone(&base.store), limit).context("no memory for what the guest writes")?;
        let export = SessionName::generate()?.to_string();
        let (served, port) = Self::guest(with, base, overlay, &export, At::new(link))?;
        Ok((served, Transport::Nbd { port, export }))
    }

    /// The disk that an earlier process of ours served; the kernel still serves it by NVMe.
    pub(super) fn adopt(with: With<'_>, device: File, transport: &Transport, link: &Known) -> anyhow::Result<Self> {
        let nbd = match transport {
            Transport::Nbd { port, export } => {
                let at = At::again(link, *port);
                Some(Nbd::start(with, own_export(&device, with.disk, export)?, at)?.0)
            }
            Transport::NvmeTcp { .. } => None,
        };
        Ok(Self {
            device: Device::Own(device),
            nbd,
        })
    }

    /// The guest that an earlier process served, with the memory that it has left.
    pub(super) fn adopt_guest(
        with: With<'_>,
        base: Arc<Base>,
        (upper, limit): (File, u64),
        export: &str,
        at: At,
    ) -> anyhow::Result<Self> {
        let overlay = Overlay::resume(Arc::clone(&base.store), upper, Some(limit))
            .context("what the guest has written was not kept")?;
        Ok(Self::guest(with, base, overlay, export, at)?.0)
    }

    fn guest(with: With<'_>, base: Arc<Base>, overlay: Overlay, name: &str, at: At) -> anyhow::Result<(Self, u16)> {
        let overlay = Arc::new(overlay);
        let store: Arc<dyn Store> = Arc::<Overlay>::clone(&overlay);
        let export = Export::of(store, &with.disk.path, options(with.disk, name))?;
        let (nbd, port) = Nbd::start(with, export, at)?;
        let served = Self {
            device: Device::Shared(base, overlay),
            nbd: Some(nbd),
        };
        Ok((served, port))
    }

    /// The open disk.
    pub(super) fn device(&self) -> BorrowedFd<'_> {
        match &self.device {
            Device::Own(device) => device.as_fd(),
            Device::Shared(base, _) => base.device.as_fd(),
        }
    }

    /// What guests share, if this is one's.
    pub(super) const fn base(&self) -> Option<&Arc<Base>> {
        match &self.device {
            Device::Own(_) => None,
            Device::Shared(base, _) => Some(base),
        }
    }

    /// The file in memory that holds what a guest has written.
    pub(super) fn upper(&self) -> Option<&File> {
        match &self.device {
            Device::Own(_) => None,
            Device::Shared(_, overlay) => overlay.upper(),
        }
    }

    /// Bytes of memory that a guest's writes take, and how many they may.
    pub(super) fn filled(&self) -> Option<(u64, u64)> {
        match &self.device {
            Device::Own(_) => None,
            Device::Shared(_, overlay) => overlay.filled(),
        }
    }

    /// Ends the serving, in order: nobody is served any more and all is on the medium when this succeeds.
    ///
    /// # Errors
    /// Then the disk may still be written to, unless it is a guest's.
    pub(super) fn close(self, machine: &dyn Machine, limit: Duration) -> anyhow::Result<()> {
        let Some(Nbd { door, export, server }) = self.nbd else {
            machine.withdraw()?;
            let Device::Own(device) = self.device else {
                return Ok(());
            };
            return within(limit, move || device.sync_all()).and_then(|flushed| flushed.context(LOST));
        };
        door.shut();
        server.stop(limit)?;
        // Also what an earlier process has written, of which this server knows no connection.
        within(limit, move || export.flush()).and_then(|flushed| flushed.context(LOST))
    }
}

impl Nbd {
    /// Serves an export to one desktop; on which TCP port.
    fn start(with: With<'_>, export: Arc<Export>, at: At) -> anyhow::Result<(Self, u16)> {
        (with.watch)(&export);
        let listener = with.machine.listen(SocketAddrV6::new(at.laptop, at.port, 0, 0))?;
        let port = listener.local_addr()?.port();
        let door = Arc::new(Door {
            peer: IpAddr::V6(at.desktop),
            export: Mutex::new(Some(Arc::clone(&export))),
        });
        let gate: Arc<dyn nbd::Gate> = Arc::<Door>::clone(&door);
        let server = nbd::Server::start(listener, gate, nbd::Limits::default()).context("cannot serve the disk")?;
        Ok((Self { door, export, server }, port))
    }
}

fn options(disk: &Disk, name: &str) -> ExportOptions {
    ExportOptions {
        name: name.to_owned(),
        block_size: Some(disk.logical_block_size),
        single: true,
        ..ExportOptions::default()
    }
}

fn own_export(device: &File, disk: &Disk, name: &str) -> anyhow::Result<Arc<Export>> {
    Ok(Export::of_file(device.try_clone()?, &disk.path, options(disk, name))?)
}

/// Publishes the disk by NVMe, with its own identity: by-id links, LVM's devices file and ZFS hold.
fn publish(machine: &dyn Machine, disk: &Disk, link: &LinkOffer) -> anyhow::Result<Transport> {
    let nqn = format!("{NQN_PREFIX}disk.{}", SessionName::generate()?);
    let host_nqn = format!("{NQN_PREFIX}desktop.{}", SessionName::generate()?);
    let host_id = uuid(seal::random()?);
    let named = |text: Option<&str>, limit| {
        let text = fitting(text.unwrap_or_default(), limit);
        if text.is_empty() { "stiefel".to_owned() } else { text }
    };
    let wwid = disk.wwid.as_deref().unwrap_or_default();
    let publish = Publish {
        nqn: &nqn,
        host_nqn: &host_nqn,
        model: &named(disk.model.as_deref(), MAX_MODEL),
        serial: &named(disk.serial.as_deref(), MAX_SERIAL),
        namespace: Namespace {
            device_path: &disk.path,
            uuid: wwid.strip_prefix("uuid."),
            nguid: wwid.strip_prefix("eui.").filter(|digits| digits.len() == 32),
        },
        ports: &[Port {
            id: 1,
            address: link.laptop.into(),
            tcp_port: NVME_PORT,
        }],
        max_queues: None,
    };
    machine.publish(&publish)?;
    Ok(Transport::NvmeTcp {
        port: NVME_PORT,
        nqn,
        host_nqn,
        host_id,
    })
}

/// A random UUID (RFC 9562, version 4).
pub(crate) fn uuid(mut random: [u8; 16]) -> String {
    random[6] = (random[6] & 0x0f) | 0x40;
    random[8] = (random[8] & 0x3f) | 0x80;
    let digits: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
    let parts = [0..8, 8..12, 12..16, 16..20, 20..32].map(|part| digits.get(part).unwrap_or_default());
    parts.join("-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_id_is_a_random_uuid() {
        assert_eq!(uuid([0; 16]), "00000000-0000-4000-8000-000000000000");
        assert_eq!(uuid([0xff; 16]), "ffffffff-ffff-4fff-bfff-ffffffffffff");
    }
}
