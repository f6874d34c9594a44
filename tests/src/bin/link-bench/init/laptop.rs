//! The laptop: serves its disk by all methods, and answers the desktop's plain TCP.
//!
//! All servers run at the same time, so that measurements that are compared follow one another at once; only one of them is
//! asked for anything at a time.

use std::convert::Infallible;
use std::fs::File;
use std::io::Read;
use std::net::{Ipv6Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::result::{SPAN, Way};
use anyhow::{Context, ensure};
use rustix::mount::{MountFlags, mount};
use stiefel_server::nbd::{ExportOptions, Limits, Standalone, Target};
use stiefel_sys::nvmet::{self, CONFIGFS, NQN_PREFIX, Namespace, Port, Publish};

use super::machine::{End, set_up, wait};
use super::{say, tcp};

/// The role's name.
pub(crate) const ROLE: &str = "laptop";
/// Where the disk is, by each method.
pub(crate) const NBD_PORT: u16 = 10809;
/// See [`NBD_PORT`].
pub(crate) const NBD_SERVER_PORT: u16 = 10810;
/// See [`NBD_PORT`].
pub(crate) const NVME_PORT: u16 = 4420;
/// The export's name for NBD.
pub(crate) const EXPORT: &str = "disk";
/// The disk's logical block size in bytes.
pub(crate) const BLOCK: u32 = 512;

const DISK: &str = "/dev/vda";
const PATIENCE: Duration = Duration::from_secs(20);

/// Names in NVMe: the disk's, the desktop's.
pub(crate) fn nqns() -> [String; 2] {
    ["disk", "desktop"].map(|what| format!("{NQN_PREFIX}bench.{what}"))
}

pub(crate) fn run() -> anyhow::Result<Infallible> {
    set_up(End::Laptop, &["virtio_blk", "nvmet", "nvmet_tcp"])?;
    mount("configfs", CONFIGFS, "configfs", MountFlags::empty(), None).context("cannot mount configfs")?;
    let disk = wait("the disk", PATIENCE, || Ok(File::open(DISK).ok()))?;
    // So that all find it in the cache; NVMe's target does not use it.
    std::io::copy(&mut disk.take(SPAN), &mut std::io::sink())?;
    let _nbd = nbd()?;
    nbd_server()?;
    nvme()?;
    tcp::serve()?;
    say("the laptop is ready");
    loop {
        std::thread::park();
    }
}

/// As the server's role exports a disk.
fn nbd() -> anyhow::Result<Standalone> {
    let target = Target {
        path: PathBuf::from(DISK),
        overlay: None,
    };
    let options = ExportOptions {
        name: EXPORT.to_owned(),
        block_size: Some(BLOCK),
        single: true,
        ..ExportOptions::default()
    };
    let at = SocketAddr::from((Ipv6Addr::UNSPECIFIED, NBD_PORT));
    Standalone::start(&target, &[at], options, &Limits::default())
}

/// Debian's, with its defaults; only flushes are let through, as ours are.
fn nbd_server() -> anyhow::Result<()> {
    let config = format!(
        "[generic]\nlistenaddr = ::\nport = {NBD_SERVER_PORT}\n[{EXPORT}]\nexportname = {DISK}\nflush = true\nfua = true\n"
    );
    std::fs::write("/run/nbd-server.conf", config)?;
    // It goes into the background; with -d it would serve one connection only.
    let status = Command::new("/bin/nbd-server")
        .args(["-C", "/run/nbd-server.conf", "-p", "/run/nbd-server.pid"])
        .stdin(Stdio::null())
        .status()
        .context("cannot start nbd-server")?;
    ensure!(
        status.success(),
        "nbd-server: {status}; its words are on the laptop's console"
    );
    wait("nbd-server", PATIENCE, || {
        Ok(TcpStream::connect((Ipv6Addr::LOCALHOST, NBD_SERVER_PORT)).ok())
    })?;
    Ok(())
}

/// As the server's role publishes a disk.
fn nvme() -> anyhow::Result<()> {
    let [nqn, host_nqn] = nqns();
    let mut id = 0;
    let ports = Way::ALL.map(|way| {
        id += 1;
        Port {
            id,
            address: way.laptop().into(),
            tcp_port: NVME_PORT,
        }
    });
    nvmet::recover(Path::new(CONFIGFS))?;
    let _ = nvmet::Target::new(CONFIGFS.into()).publish(&Publish {
        nqn: &nqn,
        host_nqn: &host_nqn,
        model: "bench",
        serial: "bench",
        namespace: Namespace {
            device_path: Path::new(DISK),
            uuid: None,
            nguid: None,
        },
        ports: &ports,
        max_queues: None,
    })?;
    Ok(())
}
