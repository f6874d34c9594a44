//! The keeper: a small process that outlives the payload's initramfs and looks after the link.
//!
//! Started by [`crate::attach`], before the distribution's `/init`. It is static, locked in memory, and holds no file of
//! the root file system, because it must run while that one waits. systemd spares it (its name starts with `@`).
//!
//! - When the distribution mounts its own /run (which hides what was there before), it writes the guards that keep
//!   network managers off the link, and puts the [shutdown program](crate::goodbye) into /run/initramfs.
//! - When the kernel says that the disk's connection died, it makes a new one and hands it over: I/O that waited goes on.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rustix::event::{PollFd, PollFlags, poll};
use stiefel_shared::bundle::{AttachSession, Transport};
use stiefel_shared::handover::SecretBytes;
use stiefel_sys::console::Console;
use stiefel_sys::link::{self, LinkMonitor};
use stiefel_sys::mount;
use stiefel_sys::nbd::{Reconfigure, Watch};
use stiefel_sys::process;

use crate::attach::{self, BACKEND, DEAD_CONNECTION, HOME, KEEPER_ARG0, LINK_NAME, NBD_INDEX, REQUEST};
use crate::{guards, nbd};

/// What the keeper says on its standard output when it is ready.
const READY: u8 = b'+';
/// How long it may take for that.
const START: Duration = Duration::from_secs(20);

/// Starts the keeper and waits until it is ready.
pub(crate) fn start() -> anyhow::Result<()> {
    let mut child = Command::new(attach::program())
        .arg0(KEEPER_ARG0)
        // Inherited, for there is no /dev/null yet.
        .stdin(Stdio::inherit())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start our own program")?;
    let mut ready = child.stdout.take().context("no pipe to the keeper")?;
    let mut byte = [0];
    let deadline = rustix::time::Timespec::try_from(START)?;
    let mut fds = [PollFd::new(&ready, PollFlags::IN)];
    if poll(&mut fds, Some(&deadline))? == 0 {
        bail!("the keeper is not ready after {} s", START.as_secs());
    }
    ready
        .read_exact(&mut byte)
        .context("the keeper ended; the kernel log says why")?;
    if byte != [READY] {
        bail!("the keeper answered nonsense");
    }
    Ok(())
}

/// Runs the keeper; ends with the machine.
#[must_use]
pub fn run() -> std::process::ExitCode {
    let console = Console::open(&Path::new(HOME).join("dev"), &Path::new(HOME).join("proc"));
    match keep(&console) {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            console.error(&format!("the keeper of the link ends: {error:#}"));
            std::process::ExitCode::FAILURE
        }
    }
}

/// Everything the keeper needs once the initramfs is gone, opened while it is there.
struct Keeper {
    session: AttachSession,
    /// Our program, for the shutdown folder.
    program: File,
    /// /proc/self/mountinfo; POLLPRI tells that it changed.
    mounts: File,
    watch: Watch,
}

fn keep(console: &Console) -> anyhow::Result<()> {
    let mut keeper = Keeper {
        session: attach::read_session()?,
        program: File::open(attach::program()).context("cannot open our own program")?,
        mounts: File::open(Path::new(HOME).join("proc/self/mountinfo")).context("cannot open the table of mounts")?,
        watch: Watch::open()?,
    };
    process::lock_memory().context("cannot lock the keeper in memory")?;
    if let Err(error) = process::oom_protect(&Path::new(HOME).join("proc")) {
        console.warn(&format!("the keeper can be killed when memory is short: {error}"));
    }
    // A terminal's hang-up or a stray signal must not end it; only SIGKILL does.
    process::ignore_signals(&[libc::SIGHUP, libc::SIGINT, libc::SIGTERM, libc::SIGPIPE])?;
    let mut stdout = std::io::stdout();
    stdout
        .write_all(&[READY])
        .and_then(|()| stdout.flush())
        .context("nobody waits for the keeper")?;
    keeper.watch_mounts_and_link(console)
}

impl Keeper {
    fn watch_mounts_and_link(&mut self, console: &Console) -> anyhow::Result<()> {
        let mut guarded = self.guard_if_run_is_there(console)?;
        loop {
            {
                let mounts = if guarded { PollFlags::empty() } else { PollFlags::PRI };
                let mut fds = [
                    PollFd::new(&self.watch, PollFlags::IN),
                    PollFd::new(&self.mounts, mounts),
                ];
                // With no events asked for, mountinfo still reports errors: leave it out once it is not needed.
                let count = if guarded { 1 } else { 2 };
                match poll(&mut fds[..count], None) {
                    Err(rustix::io::Errno::INTR) => continue,
                    other => other.context("cannot wait for news of the link")?,
                };
            }
            if !guarded {
                guarded = self.guard_if_run_is_there(console)?;
            }
            while let Some(dead) = self.watch.next(Some(Duration::ZERO))? {
                if dead.index == NBD_INDEX {
                    self.reconnect(console);
                }
            }
        }
    }

    /// Acts once, when a file system is mounted on /run: mount ids change when it is moved into the root, so it is not
    /// looked for again.
    fn guard_if_run_is_there(&mut self, console: &Console) -> anyhow::Result<bool> {
        use std::io::Seek;
        self.mounts.rewind()?;
        let mut text = Vec::new();
        (&self.mounts)
            .take(1 << 20)
            .read_to_end(&mut text)
            .context("cannot read the table of mounts")?;
        if !mount::mountinfo(&text)
            .iter()
            .any(|entry| entry.mount_point == Path::new("/run"))
        {
            return Ok(false);
        }
        for error in guards::write(Path::new("/run"), &self.session) {
            console.error(&format!("a network manager may take the link away: {error}"));
        }
        let json = SecretBytes(serde_json::to_vec(&self.session)?);
        if let Err(error) = guards::put_shutdown_program(Path::new("/run"), &self.program, &json) {
            console.error(&format!("the desktop will not say goodbye to the laptop: {error:#}"));
        }
        Ok(true)
    }

    /// Makes new connections until one is taken, or the kernel has given up on the disk.
    fn reconnect(&mut self, console: &Console) {
        console.warn("the link to the laptop is lost; everything waits until it is back");
        let lost = Instant::now();
        while lost.elapsed() < DEAD_CONNECTION {
            match self.reconnect_once() {
                Ok(()) => {
                    console.warn(&format!(
                        "the link to the laptop is back after {} s",
                        lost.elapsed().as_secs()
                    ));
                    return;
                }
                Err(error) => {
                    // Wait for something to change, but not for ever: the laptop's side tells nothing when it comes back.
                    console.info(&format!("{error:#}"));
                    if let Ok(mut monitor) = LinkMonitor::open() {
                        let _ = monitor.next(Some(Duration::from_secs(1)));
                    }
                }
            }
        }
        console.error("the laptop is gone for good; its disk fails now");
        if let Err(error) = stiefel_sys::nbd::disconnect(NBD_INDEX) {
            console.error(&format!("{error}"));
        }
    }

    fn reconnect_once(&self) -> anyhow::Result<()> {
        let link = link::list()?
            .into_iter()
            .find(|link| attach::is_sessions(link, &self.session))
            .context("the NIC is not plugged in")?;
        if !link.up {
            // A plugged-in-again NIC is a new one: name, then up. The name may be taken back by udev, which is harmless.
            if link.name != LINK_NAME {
                let _ = link::rename(link.index, LINK_NAME);
            }
            link::set_up(link.index)?;
        }
        attach::wait_for_address(link.index, Duration::from_secs(5))?;
        let Transport::Nbd { export, .. } = &self.session.disk.transport;
        let granted = nbd::connect(attach::laptop(&self.session, link.index), export)?;
        stiefel_sys::nbd::reconfigure(&Reconfigure {
            index: NBD_INDEX,
            timeout: REQUEST,
            dead_conn_timeout: DEAD_CONNECTION,
            backend_identifier: BACKEND,
            sockets: &[granted.socket.as_fd()],
        })?;
        Ok(())
    }
}
