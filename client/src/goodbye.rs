//! The last program of a desktop's session: systemd pivots to `/run/initramfs` and runs this as PID 1.
//!
//! The kernel still has the link and the disk. What is left to do, in this order: unmount the old root, so that the file
//! systems on the laptop's disk are clean; flush; let go of the disk; tell the laptop which way the desktop goes, so that
//! it can go home; end the machine. Every step is bounded in time: a laptop that has gone must not keep the desktop from
//! switching off.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;

use anyhow::Context;
use stiefel_shared::bundle::{AttachSession, Goodbye};
use stiefel_sys::console::Console;
use stiefel_sys::power::{self, Power};
use stiefel_sys::{block, mount};

use crate::{attach, control, disk};

/// Where systemd puts what was the root.
const OLD_ROOT: &str = "/oldroot";
/// Unmounting flushes what is still dirty, which may be gigabytes over a slow cable.
const UNMOUNT: Duration = Duration::from_mins(10);
/// For each step that is only a message or a command to the kernel.
const STEP: Duration = Duration::from_secs(20);

/// How long the screen shows what failed.
const READ: Duration = Duration::from_secs(15);

/// Ends the session and the machine; the kernel would panic if it returned.
pub fn run() -> ! {
    let console: Arc<Console> = Arc::new(Console::open(Path::new("/dev"), Path::new("/proc")));
    let verb = std::env::args().nth(1).unwrap_or_default();
    let (way, power) = direction(&verb);
    let unmounted = {
        let console = Arc::clone(&console);
        bounded(UNMOUNT, move || unmount_old_root(&console))
    };
    let unmounted = report(&console, "unmount the old root", unmounted);
    let clean = match attach::session_at(Path::new("/session.json")) {
        Ok(session) => [unmounted, part(&console, session, way)],
        Err(error) => {
            console.error(&format!("the laptop cannot be told: {error:#}"));
            [unmounted, false]
        }
    };
    if clean.contains(&false) {
        console.error("this was not a clean end; the laptop will check its file systems");
        std::thread::sleep(READ);
    }
    loop {
        let Err(error) = power::now(power);
        console.error(&format!("{error}; switch the machine off by hand"));
        std::thread::sleep(Duration::from_secs(10));
    }
}

/// Lets go of the disk and tells the laptop; whether all went well.
fn part(console: &Console, session: AttachSession, way: Goodbye) -> bool {
    let session = Arc::new(session);
    let step = |what, limit, work: fn(&AttachSession, Goodbye) -> anyhow::Result<()>| {
        let session = Arc::clone(&session);
        report(console, what, bounded(limit, move || work(&session, way)))
    };
    let done = [
        step("flush the disk", UNMOUNT, |session, _| flush(session)),
        step("let go of the disk", STEP, |session, _| {
            disk::detach(session, Path::new("/sys"))
        }),
        step("say goodbye to the laptop", STEP, say_goodbye),
    ];
    !done.contains(&false)
}

/// What systemd's word means for the laptop and for this machine.
fn direction(verb: &str) -> (Goodbye, Power) {
    match verb {
        // Another kernel may have been loaded by kexec on the desktop; it would start without the disk. The stick
        // finds the laptop again.
        "reboot" | "kexec" => (Goodbye::Reboot, Power::Restart),
        "halt" => (Goodbye::Poweroff, Power::Halt),
        _ => (Goodbye::Poweroff, Power::PowerOff),
    }
}

/// Runs a step on a thread and waits for it, but not for ever.
fn bounded(limit: Duration, step: impl FnOnce() -> anyhow::Result<()> + Send + 'static) -> anyhow::Result<()> {
    let (done, result) = mpsc::channel();
    std::thread::Builder::new().spawn(move || {
        // Nobody listens any more once the time is over.
        let _ = done.send(step());
    })?;
    result
        .recv_timeout(limit)
        .with_context(|| format!("not done after {} s; going on without", limit.as_secs()))?
}

/// Says how a step went; whether it went well.
fn report(console: &Console, what: &str, result: anyhow::Result<()>) -> bool {
    match &result {
        Ok(()) => console.info(&format!("{what}: done")),
        Err(error) => console.error(&format!("cannot {what}: {error:#}")),
    }
    result.is_ok()
}

/// Unmounts everything below the old root, deepest first; what is busy is left read-only by systemd already.
fn unmount_old_root(console: &Console) -> anyhow::Result<()> {
    // One unmount may free another (a loop device's file, an overlay's layers), so go round until nothing changes.
    loop {
        let mut entries = mount::read_mountinfo(Path::new("/proc"))?;
        entries.retain(|entry| entry.mount_point.starts_with(OLD_ROOT));
        if entries.is_empty() {
            return Ok(());
        }
        mount::deepest_first(&mut entries);
        let mut errors: Vec<(PathBuf, String)> = Vec::new();
        let before = entries.len();
        for entry in entries {
            if let Err(error) = mount::unmount(&entry.mount_point, false) {
                errors.push((entry.mount_point, error.to_string()));
            }
        }
        if errors.len() == before {
            for (path, error) in &errors {
                console.warn(&format!("{}: {error}", path.display()));
            }
            anyhow::bail!("{} file systems are still in use", errors.len());
        }
    }
}

/// Writes back what the kernel still holds for the disk; the server answers only when it is on the medium.
fn flush(session: &AttachSession) -> anyhow::Result<()> {
    rustix::fs::sync();
    let device = Path::new("/dev").join(disk::device(session, Path::new("/sys"))?);
    let disk = File::open(&device).with_context(|| format!("cannot open {}", device.display()))?;
    rustix::fs::fsync(&disk).context("the laptop did not confirm that everything is written")?;
    block::flush_buffers(&disk)?;
    Ok(())
}

fn say_goodbye(session: &AttachSession, way: Goodbye) -> anyhow::Result<()> {
    // The keeper still holds the NIC's namespace.
    control::goodbye(
        disk::laptop(session, session.http_port),
        &session.session,
        &session.control,
        way,
    )?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halt_counts_as_power_off_for_the_laptop() {
        assert!(matches!(direction("halt"), (Goodbye::Poweroff, Power::Halt)));
        assert!(matches!(direction("poweroff"), (Goodbye::Poweroff, Power::PowerOff)));
        assert!(matches!(direction("reboot"), (Goodbye::Reboot, Power::Restart)));
    }

    #[test]
    fn a_step_that_hangs_is_given_up() {
        let (_keep, never) = mpsc::channel::<()>();
        let error = bounded(Duration::from_millis(10), move || Ok(never.recv()?)).unwrap_err();
        assert!(error.to_string().contains("going on"), "{error}");
    }
}
