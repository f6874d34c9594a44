//! How a desktop is ended whose disk may be gone: nothing here reads a file system of the disk.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{AtFlags, Mode, OFlags, openat, statat};
use stiefel_shared::bundle::AttachSession;
use stiefel_sys::console::Console;
use stiefel_sys::input::PowerKeys;
use stiefel_sys::power::{self, Power};

use crate::{disk, guards};

/// How long the kernel may take to let the disk go.
const DETACH: Duration = Duration::from_secs(5);

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
}

impl Wishes {
    /// Looks below `dev`, an open devtmpfs, for keys.
    pub(crate) fn new(dev: File) -> Self {
        Self {
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
            false
        };
        self.pressed || (self.ran && !running)
    }
}

/// Lets the disk go, so that what waits for it fails, and switches the machine off.
pub(crate) fn switch_off(console: &Arc<Console>, session: &Arc<AttachSession>) -> ! {
    console.error("the desktop is switched off now, without the laptop; what was not written there is lost");
    let (session, told) = (Arc::clone(session), Arc::clone(console));
    let (done, wait) = std::sync::mpsc::channel();
    let detach = std::thread::Builder::new().spawn(move || {
        if let Err(error) = disk::detach(&session, Path::new(".")) {
            told.warn(&format!("{error:#}"));
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
