//! PID 1 of the ramdisk: mounts, drivers, role.
//!
//! Started by the kernel as `/init`. It mounts the kernel's file systems, loads drivers by modalias for what is there
//! and for what is plugged in later, and runs the role that the handover names as a child, so that a fault there cannot
//! end PID 1 (the kernel would panic). It never returns: a failing laptop goes back to its installed OS after a visible
//! countdown, a failing desktop tries again.

mod custody;
mod drivers;
mod supervise;

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use stiefel_shared::handover::{HANDOVER_PATH, Handover, MAX_DOCUMENT, SecretBytes};
use stiefel_sys::console::Console;
use stiefel_sys::kmsg;
use stiefel_sys::link::{self, LinkError};
use stiefel_sys::mount::{self, MountFlags};
use stiefel_sys::power::{self, Power};
use stiefel_sys::{process, wipe};

pub use drivers::{DRIVERS_ARG0, run as run_drivers};
pub use supervise::RoleEnd;

/// The argv\[0\] under which the program knows that it is the child that runs the role.
pub const ROLE_ARG0: &str = "stiefel-role";

/// Runs the ramdisk; the kernel panics if PID 1 ends, so this never returns.
pub fn run() -> ! {
    let console = start();
    console.info(&format!("ramdisk of stiefel {}", env!("CARGO_PKG_VERSION")));
    let drivers = drivers::Child::start(console);
    match read_handover().map(|handover| handover.as_ref().map(Role::of)) {
        Ok(Some(role)) => supervise::run(console, drivers, role),
        Ok(None) => console.warn("this ramdisk was started without a handover, so it has no role"),
        Err(error) => console.error(&format!("{error:#}")),
    }
    last_resort(console)
}

/// What PID 1 has to know of the handover; its secrets are the role's alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Server,
    /// A server that was started from a stick of the laptop's own: the next start may be from there, too.
    ServerByStick,
    Client,
    Target,
}

impl Role {
    fn of(handover: &Handover) -> Self {
        match handover {
            Handover::Server(_) | Handover::Once(_) => Self::Server,
            Handover::Search(_) => Self::ServerByStick,
            Handover::Client(_) => Self::Client,
            Handover::Target(_) => Self::Target,
        }
    }
}

/// Mounts what everything else needs. What cannot be mounted is said and done without: better half a ramdisk that
/// tells its trouble than a kernel panic.
fn start() -> &'static Console {
    let mut failed = Vec::new();
    for (source, target, fstype, flags, data) in [
        (
            "proc",
            "/proc",
            "proc",
            MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC,
            None,
        ),
        (
            "sysfs",
            "/sys",
            "sysfs",
            MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC,
            None,
        ),
        ("devtmpfs", "/dev", "devtmpfs", MountFlags::NOSUID, Some("mode=0755")),
        (
            "tmpfs",
            "/run",
            "tmpfs",
            MountFlags::NOSUID | MountFlags::NODEV,
            Some("mode=0755"),
        ),
    ] {
        let target = Path::new(target);
        let mounted =
            mount::make_dir_all(target, 0o755).and_then(|()| mount::mount(source, target, fstype, flags, data));
        if let Err(error) = mounted {
            failed.push(describe(&error));
        }
    }
    // Lives as long as the machine.
    let console: &'static Console = Box::leak(Box::new(Console::open(Path::new("/dev"), Path::new("/proc"))));
    for failure in failed {
        console.error(&failure);
    }
    for (what, done) in [
        ("set the host name", process::set_hostname("stiefel")),
        (
            "keep Ctrl-Alt-Del from rebooting at once",
            power::disable_ctrl_alt_del(),
        ),
        ("log without limit", kmsg::unlimited(Path::new("/proc"))),
    ] {
        if let Err(error) = done {
            console.warn(&format!("cannot {what}: {error}"));
        }
    }
    console
}

/// Reads the handover, if there is one.
///
/// # Errors
/// When it is not understood, or everyone could read it.
pub fn read_handover() -> anyhow::Result<Option<Handover>> {
    use anyhow::Context;
    let path = Path::new("/").join(HANDOVER_PATH);
    let meta = match std::fs::metadata(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        other => other.context("cannot look at the handover")?,
    };
    anyhow::ensure!(
        meta.len() <= MAX_DOCUMENT,
        "the handover is {} bytes long; at most {MAX_DOCUMENT} are read",
        meta.len()
    );
    anyhow::ensure!(
        meta.permissions().mode() & 0o077 == 0,
        "the handover can be read by everyone; build it with this stiefel"
    );
    let json = SecretBytes(std::fs::read(&path).context("cannot read the handover")?);
    Ok(Some(Handover::parse(&json.0)?))
}

/// Overwrites and removes the secrets in the ramdisk's files.
fn wipe_secrets(console: &Console) {
    // The last two are a session's, while it lasts and while it is written down.
    for path in [
        HANDOVER_PATH,
        "run/stiefel/session.json",
        "run/stiefel/session.json.new",
    ] {
        if let Err(error) = wipe::file(&Path::new("/").join(path)) {
            console.warn(&format!("cannot wipe {path}: {error}"));
        }
    }
}

/// Debug images offer a shell; others restart the machine after a countdown.
fn last_resort(console: &Console) -> ! {
    wipe_secrets(console);
    if Path::new("/bin/sh").exists() {
        console.info("debug image: a shell, for everyone at this console; leaving it reboots");
        supervise::shell(console);
    } else {
        countdown(console, 30, "the machine reboots");
    }
    end(console, Power::Restart)
}

/// An error with its causes, on one line.
pub(crate) fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text += &format!(": {error}");
        cause = error.source();
    }
    text
}

/// Counts down on the screen.
fn countdown(console: &Console, seconds: u32, what: &str) {
    for left in (1..=seconds).rev() {
        console.progress(&format!("{what} in {left} s"));
        std::thread::sleep(Duration::from_secs(1));
    }
    console.info(&format!("{what} now"));
}

/// How long the disks may take to write what is left when the machine's turn ends.
const SYNC: Duration = Duration::from_secs(20);

/// How long NICs may take to be taken down.
const QUIET: Duration = Duration::from_secs(10);

/// Takes all NICs down. One that is up goes on putting packets into this kernel's memory: e1000e leaves the 82574 receiving when the
/// machine ends (`FLAG2_NO_DISABLE_RX`), and the next kernel's driver lets it reach memory again before it resets it. What a packet
/// is written over then belongs to that kernel. A NIC that is closed before was reset by its driver.
fn quiet_links(console: &Console) {
    let down = || -> Result<(), LinkError> {
        let mut done = Ok(());
        for link in link::list()?.iter().filter(|link| link.up) {
            // One that is gone already keeps no other up.
            done = link::set_down(link.index).and(done);
        }
        done
    };
    match custody::within(QUIET, down) {
        Some(Ok(())) => {}
        Some(Err(error)) => console.warn(&describe(&error)),
        None => console.warn(&format!("a NIC is not down after {} s", QUIET.as_secs())),
    }
}

/// Ends the machine's turn; tried until it works.
fn end(console: &Console, how: Power) -> ! {
    wipe_secrets(console);
    if custody::within(SYNC, rustix::fs::sync).is_none() {
        console.error(&format!(
            "the disks have not taken everything within {} s; going on without them",
            SYNC.as_secs()
        ));
    }
    quiet_links(console);
    loop {
        let Err(error) = power::now(how);
        console.error(&format!("{}; switch the machine off by hand", describe(&error)));
        std::thread::sleep(Duration::from_secs(10));
    }
}
