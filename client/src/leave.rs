//! How a desktop is ended whose disk may be gone: nothing here reads a file system of the disk.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::fs::{AtFlags, Dir, Mode, OFlags, fstat, openat, readlinkat, statat};
use stiefel_shared::bundle::AttachSession;
use stiefel_sys::console::Console;
use stiefel_sys::input::PowerKeys;
use stiefel_sys::power::{self, Power};

use crate::{disk, guards};

/// How long the kernel may take to let the disk go, and others to take what is unwritten.
const DETACH: Duration = Duration::from_secs(10);

/// What tells that the desktop is to be switched off: a shutdown that has begun, or its power key.
pub(crate) struct Wishes {
    /// The distribution's /run.
    run: Option<OwnedFd>,
    /// The running system's mark was seen in it.
    ran: bool,
    keys: PowerKeys,
    /// devtmpfs.
    dev: File,
    pressed: bool,
    /// procfs.
    proc: Arc<File>,
    /// A command was seen that is to end the system.
    commanded: Arc<AtomicBool>,
    /// Looks for one.
    looking: Option<JoinHandle<()>>,
}

impl Wishes {
    /// Looks below `dev`, an open devtmpfs, for keys, and in `proc`, an open procfs, for commands.
    pub(crate) fn new(dev: File, proc: File) -> Self {
        Self {
            proc: Arc::new(proc),
            commanded: Arc::default(),
            looking: None,
            run: None,
            ran: false,
            keys: PowerKeys::default(),
            dev,
            pressed: false,
        }
    }

    /// The distribution's /run is there.
    pub(crate) fn watch(&mut self, run: &Path) -> std::io::Result<()> {
        self.run = Some(File::open(run)?.into());
        Ok(())
    }

    /// The distribution's /run.
    pub(crate) const fn run(&self) -> Option<&OwnedFd> {
        self.run.as_ref()
    }

    /// Whether the system goes down, or the power key was pressed since the laptop was `lost`.
    pub(crate) fn off(&mut self, lost: bool) -> bool {
        let running = self
            .run
            .as_ref()
            .is_some_and(|run| statat(run, guards::RUNNING, AtFlags::SYMLINK_NOFOLLOW).is_ok());
        self.ran |= running;
        self.pressed = if lost {
            // While all is well the system itself hears the key.
            self.keys.pressed(self.dev.as_fd()) || self.pressed
        } else {
            self.keys = PowerKeys::default();
            self.commanded.store(false, Ordering::Relaxed);
            false
        };
        if lost {
            self.look();
        }
        self.pressed || self.commanded.load(Ordering::Relaxed) || (self.ran && !running)
    }

    /// Has the processes looked at; on a thread, for what a process was called with lies in its memory, which may wait for the
    /// disk.
    fn look(&mut self) {
        if self.looking.as_ref().is_some_and(|looking| !looking.is_finished()) {
            return;
        }
        let (proc, commanded) = (Arc::clone(&self.proc), Arc::clone(&self.commanded));
        let look = move || {
            // What was called off does not count any more.
            commanded.store(ends_are_commanded(&proc).unwrap_or(false), Ordering::Relaxed);
        };
        // Without a thread for now: the next look is in a second.
        self.looking = std::thread::Builder::new().spawn(look).ok();
    }
}

/// Whether somebody has typed `poweroff` or the like: where the disk is gone, such a command may wait before the system
/// knows of it.
fn ends_are_commanded(proc: &File) -> std::io::Result<bool> {
    let ours = readlinkat(proc, "self/ns/pid", Vec::new())?;
    for entry in Dir::read_from(proc)?.flatten() {
        let Ok(name) = entry.file_name().to_str() else { continue };
        if !name.bytes().all(|byte| byte.is_ascii_digit()) {
            continue;
        }
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        // One that has ended meanwhile commands nothing.
        let Ok(process) = openat(proc, name, flags | OFlags::DIRECTORY, Mode::empty()) else {
            continue;
        };
        let read = |file: &str| -> std::io::Result<Vec<u8>> {
            let mut bytes = Vec::new();
            File::from(openat(&process, file, flags, Mode::empty())?)
                .take(4096)
                .read_to_end(&mut bytes)?;
            Ok(bytes)
        };
        // The name first, which needs nothing of the process's memory. Only root's, and not those of containers.
        let is_one = read("comm").is_ok_and(|name| COMMANDS.contains(&name.trim_ascii()))
            && fstat(&process).is_ok_and(|of| of.st_uid == 0)
            && readlinkat(&process, "ns/pid", Vec::new()).is_ok_and(|theirs| theirs == ours);
        if is_one && read("cmdline").is_ok_and(|words| ends_system(&words)) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Names of the programs that end a system.
const COMMANDS: [&[u8]; 5] = [b"systemctl", b"poweroff", b"reboot", b"halt", b"shutdown"];

/// Whether a command line, each word ended by a zero, ends this system, now.
fn ends_system(cmdline: &[u8]) -> bool {
    let mut words = cmdline.split(|byte| *byte == 0).filter(|word| !word.is_empty());
    let program = words.next().and_then(|path| path.rsplit(|byte| *byte == b'/').next());
    let (options, plain): (Vec<&[u8]>, Vec<&[u8]>) = words.partition(|word| word.starts_with(b"-"));
    let ends = |word: &[u8]| matches!(word, b"poweroff" | b"reboot" | b"halt" | b"kexec");
    let elsewhere = [&b"-M"[..], b"-H", b"--machine", b"--host", b"--when", b"--user"];
    match program {
        Some(b"systemctl") => {
            plain.first().is_some_and(|verb| ends(verb))
                && !options
                    .iter()
                    .any(|option| elsewhere.iter().any(|other| option.starts_with(other)))
        }
        Some(b"shutdown") => {
            plain.first().is_none_or(|time| [&b"now"[..], b"+0"].contains(time))
                && !options.iter().any(|option| [&b"-c"[..], b"-k"].contains(option))
        }
        Some(program) => ends(program),
        None => false,
    }
}

/// Lets the disk go, so that what waits for it fails, and switches the machine off.
pub(crate) fn switch_off(console: &Arc<Console>, session: &Arc<AttachSession>) -> ! {
    console.error("the desktop is switched off now, without the laptop; what was not written there is lost");
    let (session, told) = (Arc::clone(session), Arc::clone(console));
    let (done, wait) = std::sync::mpsc::channel();
    let detach = std::thread::Builder::new().spawn(move || {
        match disk::detach(&session, Path::new(".")) {
            // What else is mounted, such as a stick, has nothing to do with the laptop.
            Ok(()) => rustix::fs::sync(),
            Err(error) => told.warn(&format!("{error:#}")),
        }
        // Nobody waits any more once the time is over.
        let _ = done.send(());
    });
    if detach.is_ok() {
        // With or without: the machine goes.
        let _ = wait.recv_timeout(DETACH);
    }
    loop {
        let Err(error) = power::now(Power::PowerOff);
        console.error(&format!("{error}"));
        std::thread::sleep(Duration::from_secs(10));
    }
}

/// Replaces a file below an open folder.
pub(crate) fn replace(folder: &OwnedFd, name: &str, bytes: &[u8]) -> std::io::Result<()> {
    let beside = format!("{name}.new");
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let file = openat(folder, &beside, flags, Mode::from_raw_mode(0o644))?;
    std::io::Write::write_all(&mut File::from(file), bytes)?;
    rustix::fs::renameat(folder, &beside, folder, name)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_commands_that_end_the_system_count() {
        let cmdline = |text: &str| text.replace(' ', "\0").into_bytes();
        for ends in [
            "systemctl poweroff",
            "systemctl --no-block reboot",
            "/sbin/poweroff",
            "reboot -f",
            "shutdown -h now",
        ] {
            assert!(ends_system(&cmdline(ends)), "{ends}");
        }
        for other in [
            "systemctl status",
            "systemctl",
            "systemctl status kexec",
            "systemctl -M box reboot",
            "systemctl --host=there poweroff",
            "shutdown -c",
            "shutdown -h 23:00",
            "",
            "vim poweroff",
        ] {
            assert!(!ends_system(&cmdline(other)), "{other}");
        }
    }

    #[test]
    fn processes_are_looked_at_without_harm() {
        assert!(!ends_are_commanded(&File::open("/proc").unwrap()).unwrap());
        let empty = tempfile::tempdir().unwrap();
        assert!(ends_are_commanded(&File::open(empty.path()).unwrap()).is_err());
    }
}
