//! The desktop: attaches the laptop's disk by all methods, by one way and then the other, and measures them in turn.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::result::{Measure, Method, Sample, Way};
use anyhow::{Context, bail, ensure};
use stiefel_sys::SYSFS;
use stiefel_sys::{nbd, nvme};

use super::laptop::{BLOCK, EXPORT, NBD_PORT, NBD_SERVER_PORT, NVME_PORT, nqns};
use super::machine::{End, set_up, wait, within};
use super::{disk, say, tcp};

/// The role's name.
pub(crate) const ROLE: &str = "desktop";

/// For the laptop to be there.
const PATIENCE: Duration = Duration::from_secs(120);
/// For one step here.
const STEP: Duration = Duration::from_secs(60);
/// What a measurement may take longer than wanted: all that is on its way when the time is over.
const OVERTIME: Duration = Duration::from_secs(120);
/// Of the NBD devices: ours, nbd-client's.
const OURS: u32 = 0;
const THEIRS: &str = "nbd1";

pub(crate) fn run(rounds: u32, time: Duration) -> anyhow::Result<()> {
    set_up(End::Desktop, &["nbd", "nvme_tcp"])?;
    for way in Way::ALL {
        // The first packet makes WireGuard's handshake. All servers run when the last of them does.
        tcp::wait_for_laptop(way, PATIENCE).with_context(|| way.word())?;
    }
    for round in 0..rounds {
        let (mut ways, mut methods) = (Way::ALL, Method::ALL);
        // Who comes first may find a quieter or busier machine than who comes last.
        ways.rotate_left(round as usize % Way::ALL.len());
        methods.rotate_left(round as usize % Method::ALL.len());
        for way in ways {
            measure(round, way, methods, time)?;
        }
    }
    Ok(())
}

fn measure(round: u32, way: Way, methods: [Method; 4], time: Duration) -> anyhow::Result<()> {
    let place = |what: &str, method: Method| format!("{what} ({}, {})", method.word(), way.word());
    let mut attached = Vec::new();
    for method in methods {
        let device = within(&place("attach", method), STEP, move || attach(way, method))?;
        attached.push((method, device));
    }
    for measure in Measure::ALL {
        for (method, device) in &attached {
            let device = device.clone();
            let value = within(&place(measure.word(), *method), time + OVERTIME, move || match device {
                None => tcp::measure(way, measure, time),
                Some(device) => Ok(disk::measure(&device, measure, time)?),
            })?;
            let sample = Sample {
                round,
                way,
                method: *method,
                measure,
                value,
            };
            say(&sample.to_string());
        }
    }
    for method in methods {
        within(&place("detach", method), STEP, move || detach(method))?;
    }
    Ok(())
}

/// The disk's device; none for TCP.
fn attach(way: Way, method: Method) -> anyhow::Result<Option<PathBuf>> {
    let name = match method {
        Method::Tcp => return Ok(None),
        Method::NbdClient => {
            let host = way.laptop().to_string();
            let (port, device) = (NBD_SERVER_PORT.to_string(), format!("/dev/{THEIRS}"));
            nbd_client(&["-N", EXPORT, &host, &port, &device])?;
            THEIRS.to_owned()
        }
        Method::Nbd => attach_nbd(way)?,
        Method::Nvme => attach_nvme(way)?,
    };
    wait("the disk's size", STEP, || {
        Ok((number(&name, "size")? != 0).then_some(()))
    })?;
    Ok(Some(Path::new("/dev").join(name)))
}

fn nbd_client(args: &[&str]) -> anyhow::Result<()> {
    let mut command = Command::new("/bin/nbd-client");
    let output = command.args(args).stdin(Stdio::null()).output()?;
    let said = [output.stdout, output.stderr].concat();
    ensure!(
        output.status.success(),
        "nbd-client: {} ({})",
        String::from_utf8_lossy(&said).trim().replace('\n', " "),
        output.status
    );
    Ok(())
}

/// As `client::disk` does.
fn attach_nbd(way: Way) -> anyhow::Result<String> {
    let granted = stiefel_client::nbd::connect(way.at(NBD_PORT), EXPORT)?;
    nbd::connect(&nbd::Connect {
        index: Some(OURS),
        size: granted.size,
        block_size: u64::from(BLOCK),
        timeout: Duration::from_secs(60),
        server_flags: granted.flags,
        dead_conn_timeout: Duration::from_hours(48),
        backend_identifier: "bench",
        sockets: &[granted.socket.as_fd()],
    })?;
    Ok(format!("nbd{OURS}"))
}

/// As `client::disk` does.
fn attach_nvme(way: Way) -> anyhow::Result<String> {
    let [nqn, host_nqn] = nqns();
    let queues = std::thread::available_parallelism().map_or(1, |cpus| cpus.get().min(8));
    let options = nvme::Connect {
        address: way.laptop().into(),
        port: NVME_PORT,
        nqn: &nqn,
        host_nqn: &host_nqn,
        host_id: "57aefe1d-0000-4000-8000-000000000009",
        ctrl_loss_timeout: None,
        reconnect_delay: Duration::from_secs(2),
        keep_alive: Duration::from_secs(5),
        queues: u32::try_from(queues).ok(),
        queue_size: None,
    };
    let controller = nvme::connect(Path::new(nvme::FABRICS), &options)?;
    wait("the disk behind the controller", STEP, || {
        let names = nvme::namespaces(Path::new(SYSFS), controller.instance)?;
        Ok(names.into_iter().find(|name| Path::new("/dev").join(name).exists()))
    })
}

fn detach(method: Method) -> anyhow::Result<()> {
    let name = match method {
        Method::Tcp => return Ok(()),
        Method::NbdClient => {
            nbd_client(&["-d", &format!("/dev/{THEIRS}")])?;
            THEIRS.to_owned()
        }
        Method::Nbd => {
            nbd::disconnect(OURS)?;
            format!("nbd{OURS}")
        }
        Method::Nvme => {
            let [nqn, _] = nqns();
            let Some(instance) = nvme::find(Path::new(SYSFS), &nqn)? else {
                bail!("the controller has vanished");
            };
            return Ok(nvme::delete(Path::new(SYSFS), instance)?);
        }
    };
    // The kernel shows this file as long as a device is connected.
    let pid = Path::new(SYSFS).join("block").join(name).join("pid");
    wait("the end of the device", STEP, || Ok((!pid.exists()).then_some(())))
}

/// A number that sysfs tells of a block device.
fn number(name: &str, attribute: &str) -> anyhow::Result<u64> {
    let path = Path::new(SYSFS).join("block").join(name).join(attribute);
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    Ok(text.trim().parse()?)
}
