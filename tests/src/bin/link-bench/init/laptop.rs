//! The laptop: serves its disk by one method at a time, and answers the desktop's plain TCP.
//!
//! Its orders come over a TCP connection, a line each: a method's name to begin, `stop` to end; it answers with a line each:
//! `ok`, or why not.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::result::{Method, SPAN, Way};
use anyhow::{Context, bail, ensure};
use rustix::mount::{MountFlags, mount};
use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};
use stiefel_server::nbd::{ExportOptions, Limits, Standalone, Target};
use stiefel_sys::nvmet::{self, CONFIGFS, NQN_PREFIX, Namespace, Port, Publish};

use super::machine::{End, set_up, wait};
use super::{say, tcp};

/// The role's name.
pub(crate) const ROLE: &str = "laptop";
/// Where orders are taken.
pub(crate) const ORDERS: u16 = 7000;
/// Where the disk is, by each method.
pub(crate) const NBD_PORT: u16 = 10809;
/// See [`NBD_PORT`].
pub(crate) const NBD_SERVER_PORT: u16 = 10810;
/// See [`NBD_PORT`].
pub(crate) const NVME_PORT: u16 = 4420;
/// The export's name for NBD.
pub(crate) const EXPORT: &str = "disk";
/// Ends a method.
pub(crate) const STOP: &str = "stop";
/// The answer to an order that was carried out.
pub(crate) const OK: &str = "ok";
/// The disk's logical block size in bytes.
pub(crate) const BLOCK: u32 = 512;

const NBD_SERVER_PID: &str = "/run/nbd-server.pid";
const DISK: &str = "/dev/vda";
const PATIENCE: Duration = Duration::from_secs(20);

/// Names in NVMe: the disk's, the desktop's.
pub(crate) fn nqns() -> [String; 2] {
    ["disk", "desktop"].map(|what| format!("{NQN_PREFIX}bench.{what}"))
}

/// Who serves the disk.
enum Serving {
    Nobody,
    Nbd(Standalone),
    NbdServer(Pid),
    Nvme,
}

pub(crate) fn run() -> anyhow::Result<()> {
    set_up(End::Laptop, &["virtio_blk", "nvmet", "nvmet_tcp"])?;
    mount("configfs", CONFIGFS, "configfs", MountFlags::empty(), None).context("cannot mount configfs")?;
    let disk = wait("the disk", PATIENCE, || Ok(File::open(DISK).ok()))?;
    // Kept open, so that the cache stays when one server has closed the disk and the next opens it: all find it warm.
    std::io::copy(&mut disk.take(SPAN), &mut std::io::sink())?;
    let _kept = File::open(DISK)?;
    tcp::serve()?;
    let orders = TcpListener::bind((Ipv6Addr::UNSPECIFIED, ORDERS))?;
    say("the laptop is ready");
    let (mut desktop, _) = orders.accept()?;
    let mut serving = Serving::Nobody;
    for order in BufReader::new(desktop.try_clone()?).lines() {
        let done = obey(&mut serving, &order?);
        let answer = done.map_or_else(|error| format!("{error:#}"), |()| OK.to_owned());
        writeln!(desktop, "{}", answer.replace('\n', " "))?;
    }
    bail!("the desktop has gone")
}

fn obey(serving: &mut Serving, order: &str) -> anyhow::Result<()> {
    // Whoever serves ends first: the disk is open to one at a time.
    match std::mem::replace(serving, Serving::Nobody) {
        Serving::Nobody => {}
        Serving::Nbd(server) => server.stop()?,
        Serving::NbdServer(pid) => {
            kill_process(pid, Signal::TERM)?;
            wait("the end of nbd-server", PATIENCE, || {
                Ok(waitpid(Some(pid), WaitOptions::NOHANG)?)
            })?;
        }
        Serving::Nvme => drop(nvmet::recover(Path::new(CONFIGFS))?),
    }
    if order == STOP {
        return Ok(());
    }
    *serving = match Method::named(order).with_context(|| format!("{order:?} is no order"))? {
        Method::Tcp => Serving::Nobody,
        Method::Nbd => Serving::Nbd(nbd()?),
        Method::NbdClient => Serving::NbdServer(nbd_server()?),
        Method::Nvme => {
            nvme()?;
            Serving::Nvme
        }
    };
    Ok(())
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
fn nbd_server() -> anyhow::Result<Pid> {
    let config = format!(
        "[generic]\nlistenaddr = ::\nport = {NBD_SERVER_PORT}\n[{EXPORT}]\nexportname = {DISK}\nflush = true\nfua = true\n"
    );
    std::fs::write("/run/nbd-server.conf", config)?;
    // It goes into the background; with -d it would serve one connection only. So its parent is the first process: this one.
    let status = Command::new("/bin/nbd-server")
        .args(["-C", "/run/nbd-server.conf", "-p", NBD_SERVER_PID])
        .stdin(Stdio::null())
        .status()
        .context("cannot start nbd-server")?;
    ensure!(
        status.success(),
        "nbd-server: {status}; its words are on the laptop's console"
    );
    wait("nbd-server", PATIENCE, || {
        let pid = std::fs::read_to_string(NBD_SERVER_PID)
            .ok()
            .and_then(|text| text.trim().parse().ok());
        let there = TcpStream::connect((Ipv6Addr::LOCALHOST, NBD_SERVER_PORT)).is_ok();
        Ok(pid.and_then(Pid::from_raw).filter(|_| there))
    })
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
