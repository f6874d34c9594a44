//! Runs the role as a child of PID 1, restarts it when it fails, and does what it says when it ends.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{self, Command};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, pidfd_open};
use stiefel_sys::console::Console;
use stiefel_sys::nvmet::{self, CONFIGFS};
use stiefel_sys::power::Power;
use stiefel_sys::process::{poll, reap_children};

use crate::custody::{Kept, within};
use crate::drivers::Child;
use crate::{ROLE_ARG0, Role, SYNC, countdown, describe, end, wipe_secrets};

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
    /// The one that an exit status says.
    pub(crate) fn from_status(status: i32) -> Option<Self> {
        [Self::Restart, Self::PowerOff, Self::Kexec, Self::GiveUp]
            .into_iter()
            .find(|end| status == *end as i32)
    }

    /// What is to be done when the role's process is gone: what it says itself, else what was decided before; `None`: it failed.
    fn after(status: Option<process::ExitStatus>, verdict: Option<Self>) -> Option<Self> {
        status
            .and_then(|status| status.code())
            .and_then(Self::from_status)
            .or(verdict)
    }

    const fn power(self) -> Power {
        match self {
            Self::Restart | Self::GiveUp => Power::Restart,
            Self::PowerOff => Power::PowerOff,
            Self::Kexec => Power::Kexec,
        }
    }
}

/// A role that fails more often than this within [`WINDOW`] is given up (on the laptop).
const FAILURES: usize = 5;
/// See [`FAILURES`].
const WINDOW: Duration = Duration::from_mins(1);
/// How long the screen shows why before the laptop goes home, in seconds.
const HOME_COUNTDOWN: u32 = 30;
/// The same where somebody has to pull a stick out first.
const STICK_COUNTDOWN: u32 = 120;
/// How long a reboot into the stick waits for somebody who would pull it out.
const PULL_COUNTDOWN: u32 = 10;
/// How long a role may take to exit after its verdict: a thread that waits for a disk that hangs cannot end.
const EXIT: Duration = Duration::from_mins(1);
/// How long it may take when it was killed.
const DEATH: Duration = Duration::from_secs(5);
/// How often PID 1 looks at what it is not told of.
const TICK: Duration = Duration::from_secs(1);

/// The failures of late.
#[derive(Debug, Default)]
struct Failures(Vec<Instant>);

impl Failures {
    /// Notes one; whether there are too many.
    fn add(&mut self, now: Instant) -> bool {
        self.0.retain(|at| now.duration_since(*at) < WINDOW);
        self.0.push(now);
        self.0.len() > FAILURES
    }
}

/// Runs the role until it ends the machine's turn.
pub(crate) fn run(console: &'static Console, mut drivers: Child, role: Role) -> ! {
    let kept = Arc::new(Kept::default());
    let mut failures = Failures::default();
    loop {
        let why = match run_once(console, &mut drivers, &kept, role) {
            Ok(Ended::By(RoleEnd::GiveUp)) => go_home(console, &kept, role),
            Ok(Ended::By(role_end)) => {
                let_go(console, &kept);
                if let Some((seconds, what)) = notice(role, role_end) {
                    countdown(console, seconds, what);
                }
                end(console, role_end.power())
            }
            Ok(Ended::Failed(status)) => format!("the role ended with {status}"),
            Err(error) => format!("the role could not be run: {error}"),
        };
        console.error(&why);
        match role {
            _ if !failures.add(Instant::now()) => {}
            Role::Server | Role::ServerByStick => go_home(console, &kept, role),
            // The desktop, or who lends disks, has nowhere else to go: it tries on, slower when it fails often.
            Role::Client | Role::Target => countdown(console, 10, "trying again"),
        }
    }
}

/// How a role's process ended.
enum Ended {
    /// With the machine's turn.
    By(RoleEnd),
    /// Otherwise.
    Failed(process::ExitStatus),
}

/// Runs the role's process to its end.
fn run_once(console: &'static Console, drivers: &mut Child, kept: &Arc<Kept>, role: Role) -> std::io::Result<Ended> {
    let (stdin, attended) = kept.attend(console)?;
    let mut child = spawn(stdin)?;
    let overdue = || kept.verdict().is_some_and(|verdict| verdict.since.elapsed() >= EXIT);
    let status = match wait(console, &mut child, Some(drivers), overdue) {
        Ok(Some(status)) => Some(status),
        Ok(None) => {
            console.error("the role does not end; a disk may be hanging. Going on without it");
            kill(console, &mut child)
        }
        Err(error) => {
            // A second role beside it would be worse than none.
            if kill(console, &mut child).is_none() {
                go_home(console, kept, role);
            }
            return Err(error);
        }
    };
    attended.finish();
    match (
        RoleEnd::after(status, kept.verdict().map(|verdict| verdict.end)),
        status,
    ) {
        (Some(role_end), _) => Ok(Ended::By(role_end)),
        (None, Some(status)) => Ok(Ended::Failed(status)),
        (None, None) => Err(std::io::Error::other("it does not end")),
    }
}

fn spawn(stdin: OwnedFd) -> std::io::Result<process::Child> {
    Command::new("/init").arg0(ROLE_ARG0).stdin(stdin).spawn()
}

/// Ends a process by force; its status, unless it hangs in the kernel.
fn kill(console: &Console, child: &mut process::Child) -> Option<process::ExitStatus> {
    // It may have ended by itself.
    let _ = child.kill();
    let begun = Instant::now();
    wait(console, child, None, || begun.elapsed() >= DEATH).ok().flatten()
}

/// Shows for a while why, then reboots: into the laptop's own OS, where that comes next.
fn go_home(console: &Console, kept: &Kept, role: Role) -> ! {
    wipe_secrets(console);
    let_go(console, kept);
    let (seconds, what, how) = home(role);
    countdown(console, seconds, what);
    end(console, how)
}

/// How a laptop goes home that cannot serve: what the screen says for how many seconds, and then.
const fn home(role: Role) -> (u32, &'static str, Power) {
    match role {
        // The stick may be started again, which would fail again, without end.
        Role::ServerByStick => (
            STICK_COUNTDOWN,
            "pull the stick out and start the laptop anew; switching it off",
            Power::PowerOff,
        ),
        Role::Server | Role::Client | Role::Target => {
            (HOME_COUNTDOWN, "going back to the laptop's own system", Power::Restart)
        }
    }
}

/// What a person has to know, and for how many seconds, before a turn ends in this way.
const fn notice(role: Role, role_end: RoleEnd) -> Option<(u32, &'static str)> {
    match (role, role_end) {
        (Role::ServerByStick, RoleEnd::Restart) => Some((
            PULL_COUNTDOWN,
            "rebooting, into this stick again if it is not pulled out,",
        )),
        _ => None,
    }
}

/// Has what a role has left open written to its medium, and closes it.
fn let_go(console: &Console, kept: &Kept) {
    // The kernel may serve it by itself.
    match within(SYNC, || nvmet::recover(Path::new(CONFIGFS))) {
        Some(Ok(_)) => {}
        Some(Err(error)) => console.error(&describe(&error)),
        None => console.error("the kernel does not let the disk go; data may be lost, check the disk"),
    }
    let held = kept.take();
    if held.is_empty() {
        return;
    }
    // What lies in memory alone is done at once.
    let flush = move || held.iter().try_for_each(rustix::fs::fsync);
    match within(SYNC, flush) {
        // Whether an earlier flush has failed the role has said.
        Some(Ok(())) => console.info("the disk is closed"),
        Some(Err(error)) => console.error(&format!(
            "the final flush of the disk failed ({error}); data may be lost, check the disk"
        )),
        None => console.error(&format!(
            "the disk is not flushed after {} s; data may be lost, check the disk",
            SYNC.as_secs()
        )),
    }
}

/// Waits for a child, or until it has had enough time; meanwhile PID 1 reaps whatever else ends, and keeps the drivers' process.
fn wait(
    console: &Console,
    child: &mut process::Child,
    mut drivers: Option<&mut Child>,
    enough: impl Fn() -> bool,
) -> std::io::Result<Option<process::ExitStatus>> {
    let gone = pidfd_open(Pid::from_child(child), PidfdFlags::empty())?;
    loop {
        poll(&[gone.as_fd()], Some(TICK))?;
        let others = [Some(child.id()), drivers.as_ref().and_then(|drivers| drivers.id())];
        let others: Vec<i32> = others
            .into_iter()
            .flatten()
            .filter_map(|id| i32::try_from(id).ok())
            .collect();
        // Others wait for these themselves.
        reap_children(&others, Path::new("/proc"))?;
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if let Some(drivers) = &mut drivers {
            drivers.keep(console, Instant::now());
        }
        if enough() {
            return Ok(None);
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
        .and_then(|mut child| wait(console, &mut child, None, || false));
    if let Err(error) = shell {
        console.error(&format!("no shell: {}", describe(&error)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;

    fn exited(code: i32) -> Option<process::ExitStatus> {
        Some(process::ExitStatus::from_raw(code << 8))
    }

    #[test]
    fn a_role_says_itself_how_the_turn_ends_else_its_verdict_does_else_it_failed() {
        let killed = Some(process::ExitStatus::from_raw(9));
        let verdict = Some(RoleEnd::PowerOff);
        assert_eq!(RoleEnd::after(exited(10), verdict), Some(RoleEnd::Restart));
        for status in [exited(0), exited(1), killed, None] {
            assert_eq!(RoleEnd::after(status, verdict), verdict);
            assert_eq!(RoleEnd::after(status, None), None);
        }
    }

    #[test]
    fn a_laptop_that_was_started_by_its_stick_and_cannot_serve_does_not_start_that_again() {
        let (seconds, what, how) = home(Role::ServerByStick);
        assert!(how == Power::PowerOff && seconds > HOME_COUNTDOWN && what.contains("pull the stick out"));
        assert!(home(Role::Server).2 == Power::Restart);
        assert!(notice(Role::ServerByStick, RoleEnd::Restart).is_some());
        assert_eq!(notice(Role::ServerByStick, RoleEnd::PowerOff), None);
        assert_eq!(notice(Role::Server, RoleEnd::Restart), None);
    }

    #[test]
    fn more_than_five_failures_within_a_minute_are_too_many() {
        let (mut failures, begun) = (Failures::default(), Instant::now());
        for second in 0..5 {
            assert!(!failures.add(begun + Duration::from_secs(second)));
        }
        assert!(failures.add(begun + Duration::from_secs(59)));
        assert!(!failures.add(begun + Duration::from_secs(119)));
    }
}
