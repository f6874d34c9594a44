//! The first process inside the payload's own initrd: makes the laptop's disk a local one, then gives way to the
//! distribution's `/init`.
//!
//! Started by the kernel as `rdinit=/stiefel/stiefel`. It loads drivers until the NIC is there that the stick found the
//! laptop through, attaches the disk (so that the kernel does all its input and output and no process is
//! needed for it), starts the [keeper](mod@crate::keeper), leaves nothing mounted, and execs `/init` with its own arguments.

use std::ffi::OsString;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use stiefel_shared::bundle::AttachSession;
use stiefel_shared::handover::{LinkMode, MAX_DOCUMENT, PROGRAM_PATH, SESSION_PATH, SecretBytes};
use stiefel_sys::console::Console;
use stiefel_sys::kmsg;
use stiefel_sys::link::{self as sys_link, Link};
use stiefel_sys::module::Loader;
use stiefel_sys::mount::{self, MountFlags};
use stiefel_sys::netns::Namespace;
use stiefel_sys::power::{self, Power};
use stiefel_sys::uevent::{self, Monitor, UeventError};
use stiefel_sys::wipe;

use crate::link::{self, Place};
use crate::{disk, firmware, keeper};

/// Our folder in the payload's initrd; all that is mounted while we attach is below it.
pub(crate) const HOME: &str = "/stiefel";
/// How long the NIC, its link and the laptop may take to show up before the desktop starts over.
const PATIENCE: Duration = Duration::from_mins(2);
/// `cdc_subset` races `cdc_ether` for QEMU's USB NIC and gives it a random hardware address.
const NEVER: [&str; 1] = ["cdc_subset"];

/// What people must know of a guest's disk.
pub(crate) const GUEST: &str =
    "guest: nothing is kept. What this desktop writes is gone when it is switched off or reboots";

/// Attaches the disk and execs the distribution's `/init`; the kernel would panic if it returned.
pub fn run() -> ! {
    let mounted = mount_private();
    let console = Console::open(&home("dev"), &home("proc"));
    // Without it the kernel drops what is said in a hurry; a log with holes is still a log.
    let _ = kmsg::unlimited(&home("proc"));
    let attached = mounted.and_then(|()| attach(&console));
    let error = match attached {
        Ok(()) => {
            unmount_private(&console);
            let error = Command::new("/init")
                .arg0("/init")
                .args(std::env::args_os().skip(1))
                .exec();
            anyhow::Error::new(error).context("cannot start the payload's own /init; is this an initrd?")
        }
        Err(error) => error,
    };
    give_up(&console, &error)
}

/// Below our folder.
fn home(name: &str) -> PathBuf {
    Path::new(HOME).join(name)
}

const PRIVATE: [(&str, &str); 3] = [("proc", "proc"), ("sys", "sysfs"), ("dev", "devtmpfs")];

/// Mounts proc, sysfs and devtmpfs where the distribution will not look: it mounts its own later.
fn mount_private() -> anyhow::Result<()> {
    for (name, fstype) in PRIVATE {
        let dir = home(name);
        mount::make_dir_all(&dir, 0o755)?;
        mount::mount(fstype, &dir, fstype, MountFlags::NOSUID | MountFlags::NOEXEC, None)?;
    }
    Ok(())
}

fn unmount_private(console: &Console) {
    for (name, _) in PRIVATE {
        // Lazily: the keeper holds files of proc open.
        if let Err(error) = mount::unmount(&home(name), true) {
            console.warn(&error.to_string());
        }
    }
}

fn attach(console: &Console) -> anyhow::Result<()> {
    let session = read_session()?;
    console.info(&format!("attaching the disk of {}", session.hostname));
    let nic = find_nic(console, &session)?;
    firmware::keep(console, &session, &nic.name);
    let (place, failed) = Place::new(&session, &home("proc"));
    if let Some(failed) = failed {
        console.warn(&failed);
    }
    let nic_index = place.take(&nic, &session)?;
    place.wait(nic_index, PATIENCE)?;
    if let Some(tunnel) = &session.link.tunnel {
        place.make_tunnel(&session, tunnel, nic_index)?;
    }
    let proc = std::fs::File::open(home("proc")).context("cannot open proc")?;
    if let Err(error) = place.at_address(|| Ok(sys_link::only_root_reaches(session.link.laptop)?)) {
        console.warn(&format!("{error:#}"));
    }
    place.repair(&session, nic_index, proc.as_fd())?;
    console.info(&format!("the link is {}", nic.name));
    // Back to the kernel's default: later drivers find their firmware in the root file system.
    if let Err(error) = std::fs::write(firmware_path(), b"\n") {
        console.warn(&format!("cannot reset the firmware path: {error}"));
    }
    // Before the kernel has the disk: the link may be lost while the partition table is read.
    let disks = place.disks().map(Namespace::try_clone).transpose()?;
    keeper::start(place).context("cannot start the keeper of the link")?;
    let name = disk::attach(console, &session, disks.as_ref(), &home("dev"), &home("sys"), PATIENCE)?;
    // The keeper has its own, locked copy; nothing else may find the session's secret.
    wipe::file(&Path::new("/").join(SESSION_PATH)).context("cannot remove the session file")?;
    console.info(&format!(
        "the disk of {} is attached as /dev/{name}; starting its system",
        session.hostname
    ));
    if session.disk.guest {
        console.warn(GUEST);
    }
    Ok(())
}

/// Reads the session that the stick left for us.
pub(crate) fn read_session() -> anyhow::Result<AttachSession> {
    session_at(&Path::new("/").join(SESSION_PATH))
}

/// Reads a session file.
pub(crate) fn session_at(path: &Path) -> anyhow::Result<AttachSession> {
    let size = std::fs::metadata(path)
        .with_context(|| format!("no session in {}", path.display()))?
        .len();
    if size > MAX_DOCUMENT {
        bail!("the session file is {size} bytes long; at most {MAX_DOCUMENT} are read");
    }
    let json = SecretBytes(std::fs::read(path).context("cannot read the session file")?);
    serde_json::from_slice(&json.0)
        .context("the session file is not understood; build the stick and the laptop's ramdisk with the same stiefel")
}

/// Loads drivers until the session's NIC is there.
fn find_nic(console: &Console, session: &AttachSession) -> anyhow::Result<Link> {
    let deadline = Instant::now() + PATIENCE;
    // What the drivers ask for lies with us: the initrd's own /lib is the distribution's.
    if let Err(error) = std::fs::write(firmware_path(), home("firmware").as_os_str().as_encoded_bytes()) {
        console.warn(&format!("NICs may lack their firmware: {error}"));
    }
    let mut monitor = Monitor::open()?;
    let mut loader = load_by_name(session)?;
    coldplug(console, &mut loader);
    let found = loop {
        if let Some(nic) = sys_link::list()?
            .into_iter()
            .find(|nic| link::is_sessions(nic, session))
        {
            break nic;
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            bail!(
                "the NIC that leads to the laptop is not there; is it plugged in, and does the laptop's kernel drive it?"
            );
        }
        // A new device may need a driver; a new NIC is a uevent, too.
        match monitor.next(Some(left)) {
            Ok(Some(event)) if event.action == "add" => {
                if let Some(modalias) = event.modalias() {
                    load(console, &mut loader, modalias);
                }
            }
            Ok(_) => {}
            Err(UeventError::Lost) => coldplug(console, &mut loader),
            Err(error) => return Err(error.into()),
        }
    };
    Ok(found)
}

/// Where the kernel is told to look for firmware first.
fn firmware_path() -> PathBuf {
    home("sys").join(firmware::SEARCH)
}

/// Loads what has no device that would ask for it.
fn load_by_name(session: &AttachSession) -> anyhow::Result<Loader> {
    let mut loader = Loader::open(&home("modules").join(&session.version), &NEVER)?;
    // Built in almost everywhere, so not having them as modules is no fault.
    for name in ["ipv6", "af_packet"] {
        if loader.index().path(name).is_some() {
            loader.load(name)?;
        }
    }
    loader
        .load(disk::module(session))
        .context("the laptop's kernel cannot attach the disk")?;
    if session.link.mode == LinkMode::Lan {
        loader.load("macvlan").context(
            "the laptop's kernel cannot share a NIC (module macvlan); set link.mode to dedicated in its config.yaml",
        )?;
    }
    if session.link.tunnel.is_some() {
        loader.load("wireguard").context(
            "the laptop's kernel has no WireGuard; set link.encryption to none in its config.yaml if you trust the cable",
        )?;
    }
    Ok(loader)
}

fn coldplug(console: &Console, loader: &mut Loader) {
    for device in uevent::coldplug(&home("sys")) {
        load(console, loader, &device.modalias);
    }
}

fn load(console: &Console, loader: &mut Loader, modalias: &str) {
    for error in loader.load_modalias(modalias).failed {
        console.warn(&format!("{:#}", anyhow::Error::new(error)));
    }
}

/// There is no way back into the ramdisk: show why, then start over from the stick.
fn give_up(console: &Console, error: &anyhow::Error) -> ! {
    console.error(&format!("{error:#}"));
    for left in (1..=30).rev() {
        console.progress(&format!("the desktop starts over in {left} s"));
        std::thread::sleep(Duration::from_secs(1));
    }
    loop {
        let Err(error) = power::sync_and(Power::Restart);
        console.error(&format!("{error}; switch the machine off by hand"));
        std::thread::sleep(Duration::from_secs(10));
    }
}

/// The argv\[0\] of the keeper; systemd spares processes whose name starts with `@` at switch-root and at shutdown.
pub const KEEPER_ARG0: &str = "@stiefel-keeper";

/// Our own program, wherever it was started from.
pub(crate) fn program() -> OsString {
    OsString::from(format!("/{PROGRAM_PATH}"))
}
