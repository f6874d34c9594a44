//! Runs the role as a child of PID 1, restarts it when it fails, and does what it says when it ends.

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{self, Command};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::process::{WaitId, WaitIdOptions, waitid};
use stiefel_sys::console::Console;
use stiefel_sys::power::Power;
use stiefel_sys::process::reap_children;

use crate::drivers::Child;
use crate::{ROLE_ARG0, Role, countdown, end, wipe_secrets};

/// How a role ends, as its exit status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum RoleEnd {
    /// Reboot: the laptop into its installed OS.
    Restart = 10,
    /// Power off.
    PowerOff = 11,
    /// Boot the kernel that the role has loaded by kexec.
    Kexec = 12,
    /// It cannot work, and trying again would not help: the laptop goes home after a countdown.
    GiveUp = 13,
}

impl RoleEnd {
    fn from_status(status: process::ExitStatus) -> Option<Self> {
        [Self::Restart, Self::PowerOff, Self::Kexec, Self::GiveUp]
            .into_iter()
            .find(|end| status.code() == Some(*end as i32))
    }

    const fn power(self) -> Power {
        match self {
            Self::Restart | Self::GiveUp => Power::Restart,
            Self::PowerOff => Power::PowerOff,
            Self::Kexec => Power::Kexec,
        }
    }
}

/// A role that fails this often within [`WINDOW`] is given up (on the laptop).
const FAILURES: usize = 5;
/// See [`FAILURES`].
const WINDOW: Duration = Duration::from_mins(1);
/// How long the screen shows why before the laptop goes home, in seconds.
const HOME_COUNTDOWN: u32 = 30;

/// Runs the role until it ends the machine's turn.
pub(crate) fn run(console: &Console, mut drivers: Child, role: Role) -> ! {
    let mut failures: Vec<Instant> = Vec::new();
    loop {
        let why = match spawn() {
            Err(error) => format!("the role could not be started: {error}"),
            Ok(child) => match wait(console, child, Some(&mut drivers)) {
                Ok(status) => match RoleEnd::from_status(status) {
                    Some(RoleEnd::GiveUp) => go_home(console),
                    Some(role_end) => end(console, role_end.power()),
                    None => format!("the role ended with {status}"),
                },
                Err(error) => format!("the role got lost: {error}"),
            },
        };
        console.error(&why);
        let now = Instant::now();
        failures.retain(|at| now.duration_since(*at) < WINDOW);
        failures.push(now);
        match role {
            Role::Server if failures.len() >= FAILURES => go_home(console),
            // The desktop has nowhere else to go: it tries on, slower when it fails often.
            Role::Client if failures.len() >= FAILURES => countdown(console, 10, "trying again"),
            _ => {}
        }
    }
}

/// Shows for a while why, then reboots: into the laptop's own OS.
fn go_home(console: &Console) -> ! {
    wipe_secrets(console);
    countdown(console, HOME_COUNTDOWN, "going back to the laptop's own system");
    end(console, Power::Restart)
}

fn spawn() -> std::io::Result<process::Child> {
    Command::new("/init").arg0(ROLE_ARG0).spawn()
}

/// Waits for a child; meanwhile PID 1 reaps whatever else ends, and keeps the drivers' process.
fn wait(
    console: &Console,
    mut child: process::Child,
    mut drivers: Option<&mut Child>,
) -> std::io::Result<process::ExitStatus> {
    loop {
        // Looks without reaping, so that the status stays for who waits for that child.
        match waitid(WaitId::All, WaitIdOptions::EXITED | WaitIdOptions::NOWAIT) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let kept = [Some(child.id()), drivers.as_ref().and_then(|drivers| drivers.id())];
        let kept: Vec<i32> = kept
            .into_iter()
            .flatten()
            .filter_map(|id| i32::try_from(id).ok())
            .collect();
        reap_children(&kept, Path::new("/proc"))?;
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if let Some(drivers) = &mut drivers {
            drivers.keep(console);
        }
    }
}

/// A shell on the console, until it is left.
pub(crate) fn shell(console: &Console) {
    let shell = Command::new("/bin/sh")
        .arg0("-sh")
        .env("PATH", "/bin")
        .env("TERM", "linux")
        .spawn()
        .and_then(|child| wait(console, child, None));
    if let Err(error) = shell {
        console.error(&format!("no shell: {error}"));
    }
}
