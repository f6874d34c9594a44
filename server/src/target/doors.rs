//! Where initiators come in: the NBD server's port, and the kernel's NVMe target.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::path::Path;

use socket2::{Domain, Protocol, Socket, Type};
use stiefel_shared::bundle::NVME_PORT;
use stiefel_sys::module::Loader;
use stiefel_sys::mount::{self, MountFlags};
use stiefel_sys::nvmet::{CONFIGFS, Port, Shelf};
use stiefel_sys::shield;

use super::alone::{self, Alone, AloneError};
use super::say::say;

/// Listens on all addresses of both families; where IPv6 is off, on IPv4's.
pub(super) fn listen(port: u16) -> std::io::Result<TcpListener> {
    let open = |domain, address: IpAddr| -> std::io::Result<TcpListener> {
        let socket = Socket::new(domain, Type::STREAM.cloexec(), Some(Protocol::TCP))?;
        if address.is_ipv6() {
            socket.set_only_v6(false)?;
        }
        socket.set_reuse_address(true)?;
        socket.bind(&SocketAddr::from((address, port)).into())?;
        socket.listen(64)?;
        Ok(TcpListener::from(socket))
    };
    open(Domain::IPV6, Ipv6Addr::UNSPECIFIED.into()).or_else(|error: std::io::Error| {
        // A port that is taken is taken; only without IPv6 the other one is tried.
        match error.kind() {
            std::io::ErrorKind::AddrInUse | std::io::ErrorKind::PermissionDenied => Err(error),
            _ => open(Domain::IPV4, Ipv4Addr::UNSPECIFIED.into()),
        }
    })
}

/// Loads modules that no device asks for. Built in, or loaded already, where there is no folder: what is missing shows when it is
/// used.
pub(super) fn load(modules: &[&str]) {
    let Ok(mut loader) = Loader::running() else { return };
    for module in modules {
        if let Err(error) = loader.load(module) {
            say(format_args!("{:#}", anyhow::Error::new(error)));
        }
    }
}

/// Loads the modules of the kernel's NVMe target, and mounts where it is set up.
pub(super) fn load_target() -> anyhow::Result<()> {
    load(&["nvmet", "nvmet_tcp", "loop", "dm_mod"]);
    let target = Path::new(CONFIGFS);
    if target.exists() && std::fs::read_dir(target).is_ok_and(|mut found| found.next().is_none()) {
        let flags = MountFlags::NOEXEC | MountFlags::NOSUID;
        mount::mount("configfs", target, "configfs", flags, None)?;
    }
    anyhow::ensure!(
        target.join("nvmet").exists(),
        "this kernel has no NVMe target (nvmet, nvmet-tcp)"
    );
    Ok(())
}

/// The kernel's NVMe target for us alone, if there is one.
pub(super) fn opened_shelf() -> Result<(Option<Alone>, Option<Shelf>), AloneError> {
    let open = || -> anyhow::Result<_> { Ok((Some(Alone::take(Path::new(alone::FOLDER))?), Some(shelf()?))) };
    open().or_else(|error| match error.downcast() {
        Ok(AloneError::Taken) => Err(AloneError::Taken),
        Ok(error) => Ok(only_nbd(&error.into())),
        Err(error) => Ok(only_nbd(&error)),
    })
}

fn only_nbd(error: &anyhow::Error) -> (Option<Alone>, Option<Shelf>) {
    say(format_args!("no NVMe, only NBD: {error:#}"));
    (None, None)
}

/// The kernel's NVMe target with a port for everybody.
fn shelf() -> anyhow::Result<Shelf> {
    load_target()?;
    let port = |address: IpAddr| Port {
        id: NVME_PORT,
        address,
        tcp_port: NVME_PORT,
    };
    let ipv6 = Path::new("/proc/net/if_inet6").exists();
    let address = if ipv6 {
        Ipv6Addr::UNSPECIFIED.into()
    } else {
        Ipv4Addr::UNSPECIFIED.into()
    };
    let shelf = Shelf::open(Path::new(CONFIGFS), &[port(address)])?;
    // After what an earlier process had published was taken back.
    shield::sweep(Path::new("/sys"), Path::new("/dev"));
    Ok(shelf)
}
