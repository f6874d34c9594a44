//! The last program of a desktop's session: systemd pivots to `/run/initramfs` and runs this as PID 1.
//!
//! The kernel still has the link and the disk; systemd has taken down all but the root file system and what that stands on.
//! What is left to do, in this order: unmount the old root, so that the file systems on the laptop's disk are clean, and
//! take its volumes down; at a reboot, see whether the laptop boots something else by now (`anew`); flush; let go of
//! the disk; tell the laptop which way the desktop goes, so that it can go home; end the machine. Every step is bounded in
//! time: a laptop that has gone must not keep the desktop from switching off.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;

use anyhow::Context;
use stiefel_shared::bundle::{AttachSession, Goodbye, Transport};
use stiefel_shared::handover::BootFolder;
use stiefel_sys::console::Console;
use stiefel_sys::netns::Namespace;
use stiefel_sys::power::{self, Power};
use stiefel_sys::stack::{self, Stays};
use stiefel_sys::{block, mount};

use crate::{anew, attach, control, disk, link};

/// Where systemd puts what was the root.
const OLD_ROOT: &str = "/oldroot";
/// The namespace through which the laptop is reached, in the folder that systemd pivots to, whose mounts it leaves alone. What is
/// mounted in there is not taken along: it is found below the old root.
pub(crate) const NAMESPACE: &str = "netns";
/// Unmounting flushes what is still dirty, which may be gigabytes over a slow cable: it is given up when nothing was written
/// for so long.
const UNMOUNT: Duration = Duration::from_mins(2);
/// For each step that is only a message or a command to the kernel.
const STEP: Duration = Duration::from_secs(20);

/// For a look at what the laptop boots, twice.
const LOOK: Duration = Duration::from_mins(1);
/// Where partitions are mounted for it; made beforehand, in case our own root is read-only by then.
pub(crate) const LOOK_AT: &str = "boot";

/// How long the screen shows what failed.
const READ: Duration = Duration::from_secs(15);

/// Ends the session and the machine; the kernel would panic if it returned.
pub fn run() -> ! {
    let console: Arc<Console> = Arc::new(Console::open(Path::new("/dev"), Path::new("/proc")));
    let verb = std::env::args().nth(1).unwrap_or_default();
    let (way, power) = direction(&verb);
    let session = attach::session_at(Path::new("/session.json")).map(Arc::new);
    let known = session.as_ref().ok();
    // Before anything is unmounted: it goes with its last holder.
    let place = Namespace::open(&Path::new(OLD_ROOT).join("run/initramfs").join(NAMESPACE));
    let place = place.ok().map(Arc::new);
    if known.is_some_and(|session| session.disk.guest) {
        console.info("guest: what this desktop has written is discarded by the laptop");
    }
    // While the root file system is there; the others are gone.
    let in_root = known
        .filter(|session| may_change(session, way))
        .map(|session| look(session, |session| anew::in_root(folders(session)?, Path::new(OLD_ROOT))));
    let cleared = {
        let (console, session) = (Arc::clone(&console), known.cloned());
        let written = known.map(|session| written(session));
        patiently(written, move || clear(&console, session.as_deref()))
    };
    let cleared = report(&console, "unmount the old root and take its volumes down", cleared);
    let clean = match session {
        Ok(session) => {
            let way = if in_root.is_some_and(|seen| has_changed(&console, &session, seen)) {
                Goodbye::RebootAnew
            } else {
                way
            };
            [cleared, part(&console, &session, place, way)]
        }
        Err(error) => {
            console.error(&format!("the laptop cannot be told: {error:#}"));
            [cleared, false]
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
fn part(console: &Console, session: &Arc<AttachSession>, place: Option<Arc<Namespace>>, way: Goodbye) -> bool {
    let step = |what, work: fn(&AttachSession) -> anyhow::Result<()>| {
        let session = Arc::clone(session);
        report(console, what, bounded(STEP, move || work(&session)))
    };
    let flushed = {
        let session = Arc::clone(session);
        patiently(Some(written(&session)), move || flush(&session))
    };
    let flushed = report(console, "flush the disk", flushed);
    let detached = step("let go of the disk", |session| disk::detach(session, Path::new("/sys")));
    let said = {
        let session = Arc::clone(session);
        bounded(STEP, move || say_goodbye(&session, place.as_deref(), way))
    };
    flushed & detached & report(console, "say goodbye to the laptop", said)
}

/// How much was written to the disk: a counter of its own kernel's (`Documentation/admin-guide/iostats.rst`, field 7).
fn written(session: &AttachSession) -> impl Fn() -> Option<u64> + use<> {
    let sysfs = Path::new("/sys");
    let stat = disk::device(session, sysfs).map(|name| sysfs.join("block").join(name).join("stat"));
    move || {
        let text = std::fs::read_to_string(stat.as_ref().ok()?).ok()?;
        text.split_ascii_whitespace().nth(6)?.parse().ok()
    }
}

/// Runs a step that may have much to write: waits as long as that goes on.
fn patiently(
    written: Option<impl Fn() -> Option<u64>>,
    step: impl FnOnce() -> anyhow::Result<()> + Send + 'static,
) -> anyhow::Result<()> {
    let (done, result) = mpsc::channel();
    std::thread::Builder::new().spawn(move || {
        // Nobody listens any more once it is given up.
        let _ = done.send(step());
    })?;
    let now = || written.as_ref().and_then(|written| written());
    let mut before = now();
    loop {
        match result.recv_timeout(UNMOUNT) {
            Ok(result) => return result,
            Err(_) if before.is_some() && now() != before => before = now(),
            Err(_) => anyhow::bail!("nothing was written for {} s; going on without", UNMOUNT.as_secs()),
        }
    }
}

/// Whether the laptop may have to collect anew what the desktop boots: a guest's changes are never booted.
fn may_change(session: &AttachSession, way: Goodbye) -> bool {
    way == Goodbye::Reboot && !session.disk.guest
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

/// What the laptop boots from.
fn folders(session: &AttachSession) -> anyhow::Result<&[BootFolder]> {
    let folders = session.boot.as_deref();
    folders.context("not all of what the laptop boots from can be seen from here")
}

/// Looks at what the laptop boots, but not for ever.
fn look(session: &Arc<AttachSession>, work: fn(&AttachSession) -> anyhow::Result<bool>) -> anyhow::Result<bool> {
    let session = Arc::clone(session);
    bounded(LOOK, move || work(&session))
}

/// Whether the laptop has to collect anew; if that cannot be seen, it does. `in_root` is what was seen in the old root.
fn has_changed(console: &Console, session: &Arc<AttachSession>, in_root: anyhow::Result<bool>) -> bool {
    let seen = match in_root {
        Ok(false) => look(session, |session| {
            let device = Path::new("/dev").join(disk::device(session, Path::new("/sys"))?);
            anew::on_partitions(folders(session)?, &device, &Path::new("/").join(LOOK_AT))
        }),
        known => known,
    };
    match &seen {
        Ok(false) => {}
        Ok(true) => console.info("the kernel or its initrd was changed: the laptop goes home first to take the new one"),
        Err(error) => console.warn(&format!(
            "it cannot be seen whether the kernel was changed ({error:#}); the laptop goes home first to take what is there"
        )),
    }
    seen.unwrap_or(true)
}

/// Runs a step on a thread and waits for it, but not for ever.
fn bounded<T: Send + 'static>(
    limit: Duration,
    step: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
) -> anyhow::Result<T> {
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

/// Unmounts everything below the old root, and takes down what stands on the laptop's disk.
fn clear(console: &Console, session: Option<&AttachSession>) -> anyhow::Result<()> {
    let sysfs = Path::new("/sys");
    let disk = session.and_then(|session| disk::device(session, sysfs).ok());
    // One thing may free another (a volume a loop device's file, that one a file system, an overlay its layers), so go round
    // until nothing changes.
    let mut before = usize::MAX;
    loop {
        let mut stay = unmount_old_root()?;
        if let Some(disk) = &disk {
            let volumes = stack::take_down(sysfs, Path::new("/proc"), Path::new("/dev"), disk);
            let volumes = volumes.context("cannot see which volumes there are")?;
            stay.extend(volumes.iter().map(Stays::to_string));
        }
        if stay.is_empty() {
            return Ok(());
        }
        if stay.len() >= before {
            for what in &stay {
                console.warn(what);
            }
            anyhow::bail!("{} file systems and volumes are still in use", stay.len());
        }
        before = stay.len();
    }
}

/// Unmounts everything below the old root once, deepest first; what is busy is left read-only by systemd already, and told.
fn unmount_old_root() -> anyhow::Result<Vec<String>> {
    let mut entries = mount::read_mountinfo(Path::new("/proc"))?;
    entries.retain(|entry| entry.mount_point.starts_with(OLD_ROOT));
    mount::deepest_first(&mut entries);
    Ok(entries
        .into_iter()
        .filter_map(|entry| {
            // The keeper has the old /run open; what lies in memory alone may end later, and frees what it stands on at once.
            let error = mount::unmount(&entry.mount_point, in_memory(&entry.fstype)).err()?;
            Some(format!("{:#}", anyhow::Error::new(error)))
        })
        .collect())
}

/// Whether a file system has no medium.
fn in_memory(fstype: &str) -> bool {
    matches!(fstype, "tmpfs" | "ramfs" | "devtmpfs" | "proc" | "sysfs")
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

fn say_goodbye(session: &AttachSession, place: Option<&Namespace>, way: Goodbye) -> anyhow::Result<()> {
    let say = || {
        let laptop = disk::laptop(session, session.http_port);
        Ok(control::goodbye(laptop, &session.session, &session.control, way)?)
    };
    match (place, &session.disk.transport) {
        // There the tunnel's interface is in the namespace.
        (Some(place), Transport::Nbd { .. }) if session.link.tunnel.is_some() => link::at(Some(place), say),
        _ => say(),
    }
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
