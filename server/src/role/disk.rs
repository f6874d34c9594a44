//! The disk of a session as it is served: by our NBD server, or by the kernel's NVMe target.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use stiefel_shared::bundle::{DISK_PORT, LinkOffer, NVME_PORT, Transport};
use stiefel_shared::handover::{DiskTransport, ServerHandover};
use stiefel_shared::seal;
use stiefel_shared::session::SessionName;
use stiefel_sys::block::Disk;
use stiefel_sys::nvmet::{MAX_MODEL, MAX_SERIAL, NQN_PREFIX, Namespace, Port, Publish, fitting};

use super::machine::{Machine, within};
use crate::nbd::{self, Export, ExportOptions};

/// What a failed flush means.
const LOST: &str = "the final flush of the disk failed; data may be lost, check the disk";

/// A disk that is open to one desktop.
pub(super) struct Served {
    /// Exclusive; with NBD the very file that is served.
    device: File,
    /// `None`: the kernel serves it.
    export: Option<Arc<Export>>,
}

impl Served {
    /// Opens `disk`, which `device` holds exclusively, to the desktop at the other end of `link`, under names that nobody can
    /// guess.
    pub(super) fn open(
        machine: &dyn Machine,
        device: File,
        disk: &Disk,
        handover: &ServerHandover,
        link: &LinkOffer,
    ) -> anyhow::Result<(Self, Transport)> {
        match handover.transport {
            DiskTransport::Nbd => {
                let export = SessionName::generate()?.to_string();
                let port = DISK_PORT;
                let served = Self::nbd(device, disk, &export)?;
                Ok((served, Transport::Nbd { port, export }))
            }
            DiskTransport::NvmeTcp => {
                let transport = publish(machine, disk, link)?;
                let served = Self { device, export: None };
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

    /// The disk that an earlier process of ours served; the kernel still serves it by NVMe.
    pub(super) fn adopt(device: File, disk: &Disk, transport: &Transport) -> anyhow::Result<Self> {
        match transport {
            Transport::Nbd { export, .. } => Self::nbd(device, disk, export),
            Transport::NvmeTcp { .. } => Ok(Self { device, export: None }),
        }
    }

    fn nbd(device: File, disk: &Disk, name: &str) -> anyhow::Result<Self> {
        let options = ExportOptions {
            name: name.to_owned(),
            block_size: Some(disk.logical_block_size),
            single: true,
            ..ExportOptions::default()
        };
        let export = Export::of_file(device.try_clone()?, &disk.path, options)?;
        Ok(Self {
            device,
            export: Some(export),
        })
    }

    /// The NBD server's export.
    pub(super) const fn export(&self) -> Option<&Arc<Export>> {
        self.export.as_ref()
    }

    /// The open disk.
    pub(super) fn device(&self) -> BorrowedFd<'_> {
        self.device.as_fd()
    }

    /// Ends the serving, in order: nobody is served any more and all is on the medium when this succeeds.
    ///
    /// # Errors
    /// Then the disk may still be written to.
    pub(super) fn close(&self, machine: &dyn Machine, server: &nbd::Server, limit: Duration) -> anyhow::Result<()> {
        if let Some(export) = &self.export {
            server.drop_connections(limit)?;
            // Also what an earlier process has written, of which this server knows no connection.
            let export = Arc::clone(export);
            return within(limit, move || export.flush()).and_then(|flushed| flushed.context(LOST));
        }
        machine.withdraw()?;
        let device = self.device.try_clone()?;
        within(limit, move || device.sync_all()).and_then(|flushed| flushed.context(LOST))
    }
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
