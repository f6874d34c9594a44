//! How the disk travels: what the configuration asks for, and both kernels can do.

use stiefel_initrd_builder::modules::ModuleTree;
use stiefel_shared::config::Config;
use stiefel_shared::handover::{DiskTransport, Encryption, SessionMode};

use super::CollectError;
use crate::payload::FoundPayload;

/// How the disk is served; refused if one of the two kernels cannot do what the configuration asks for. `wireguard` and
/// `nvme_target` say what the ramdisk can.
pub(crate) fn ways(
    config: &Config,
    wireguard: bool,
    nvme_target: bool,
    payload: &FoundPayload,
) -> Result<DiskTransport, CollectError> {
    if config.link.encryption == Encryption::Wireguard {
        check_tunnel(wireguard, payload)?;
    }
    let wanted = match config.session.mode {
        SessionMode::Normal => config.disk.transport.given().copied(),
        // Only our own server keeps their writes apart.
        SessionMode::Guest => Some(DiskTransport::Nbd),
    };
    transport(wanted, nvme_target, payload)
}

/// Both kernels must be able to make the tunnel: better to hear that now than after the OS is gone.
fn check_tunnel(wireguard: bool, payload: &FoundPayload) -> Result<(), CollectError> {
    if !wireguard {
        return Err(CollectError::NoTunnel {
            kernel: "the ramdisk".to_owned(),
        });
    }
    if !ModuleTree::open(&payload.modules)?.offers("wireguard") {
        return Err(CollectError::NoTunnel {
            kernel: format!("the kernel {} for the desktop", payload.version),
        });
    }
    Ok(())
}

/// How the disk is served: as configured, if both kernels can; else NVMe where both can.
fn transport(
    wanted: Option<DiskTransport>,
    nvme_target: bool,
    payload: &FoundPayload,
) -> Result<DiskTransport, CollectError> {
    if wanted == Some(DiskTransport::Nbd) {
        return Ok(DiskTransport::Nbd);
    }
    let desktop = ModuleTree::open(&payload.modules)?.offers("nvme_tcp");
    let lacks = match (nvme_target, desktop) {
        (true, true) => return Ok(DiskTransport::NvmeTcp),
        (false, _) => "the ramdisk's kernel has no NVMe target (nvmet, nvmet-tcp)".to_owned(),
        (true, false) => format!("the kernel {} for the desktop has no nvme-tcp", payload.version),
    };
    match wanted {
        Some(_) => Err(CollectError::NoNvme { lacks }),
        None => Ok(DiskTransport::Nbd),
    }
}
