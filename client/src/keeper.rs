//! The keeper: a small process that outlives the payload's initramfs and looks after the link.
//!
//! Started by [`crate::attach`], before the kernel has the disk. It is static, locked in memory, and holds no file of
//! the root file system, because it must run while that one waits. systemd spares it (its name starts with `@`).
//!
//! - It holds the network namespace of the NIC: the kernel would give the NIC back without it.
//! - When the distribution mounts its own /run (which hides what was there before), it writes the guards that keep
//!   network managers off the link, and puts the [shutdown program](crate::goodbye) into /run/initramfs.
//! - When the NIC is plugged in again, it brings it back to its place and points the tunnel at it; when somebody takes the
//!   tunnel's address or state away, it restores them.
//! - When the kernel says that the disk's connection died, it makes a new one and hands it over: I/O that waited goes on.
//!
//! No failure ends it: it says what failed, and goes on.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use stiefel_shared::bundle::{AttachSession, Transport};
use stiefel_shared::handover::secret_json;
use stiefel_sys::console::Console;
use stiefel_sys::link::{self as sys_link, LinkMonitor};
use stiefel_sys::mount;
use stiefel_sys::nbd::{NbdError, Reconfigure, Watch};
use stiefel_sys::netns::Namespace;
use stiefel_sys::process;

use crate::attach::{self, BACKEND, DEAD_CONNECTION, HOME, KEEPER_ARG0, NBD_INDEX, REQUEST};
use crate::link::{self, Place};
use crate::{guards, nbd};

/// Where the NIC's namespace is kept.
const KEPT: &str = "/run/stiefel";
/// What the keeper says on its standard output when it is ready.
const READY: u8 = b'+';
/// How long it may take for that.
const START: Duration = Duration::from_secs(20);
/// The argument that says that standard input is the NIC's network namespace.
const NAMESPACE: &str = "namespace";
/// How often a lost connection is tried to be made anew, and a failed watch to be opened.
const AGAIN: Duration = Duration::from_secs(1);

/// Starts the keeper, gives it the NIC's place, and waits until it is ready.
pub(crate) fn start(place: Place) -> anyhow::Result<()> {
    let mut command = Command::new(attach::program());
    command.arg0(KEEPER_ARG0).stdout(Stdio::piped());
    match place.namespace {
        Some(namespace) => command.arg(NAMESPACE).stdin(OwnedFd::from(namespace)),
        // Inherited, for there is no /dev/null yet.
        None => command.stdin(Stdio::inherit()),
    };
    let mut child = command.spawn().context("cannot start our own program")?;
    let mut ready = child.stdout.take().context("no pipe to the keeper")?;
    let deadline = Timespec::try_from(START)?;
    let mut fds = [PollFd::new(&ready, PollFlags::IN)];
    if poll(&mut fds, Some(&deadline))? == 0 {
        bail!("the keeper is not ready after {} s", START.as_secs());
    }
    let mut byte = [0];
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
    let console = Console::open(&home("dev"), &home("proc"));
    let Err(error) = Keeper::new(&console).map(|mut keeper| keeper.keep());
    console.error(&format!("there is no keeper of the link: {error:#}"));
    std::process::ExitCode::FAILURE
}

fn home(name: &str) -> PathBuf {
    Path::new(HOME).join(name)
}

/// Everything the keeper needs once the initramfs is gone, opened while it is there.
struct Keeper<'a> {
    console: &'a Console,
    session: AttachSession,
    place: Place,
    /// Our program, for the shutdown folder.
    program: File,
    /// /proc/self/mountinfo; POLLPRI tells that it changed.
    mounts: File,
    watch: Watch,
    links: LinkMonitor,
    /// Whether the guards are written.
    guarded: bool,
    /// Since when the disk's connection is lost.
    lost: Option<Instant>,
    /// The link could not be mended at the last try, and why.
    mend: Option<String>,
    /// The NIC's index, as far as the tunnel was told.
    nic: Option<u32>,
    /// procfs, which is unmounted by now, but for who has it open.
    proc: File,
}

impl<'a> Keeper<'a> {
    fn new(console: &'a Console) -> anyhow::Result<Self> {
        let namespace = match std::env::args().nth(1).as_deref() {
            Some(NAMESPACE) => Some(Namespace::from_fd(std::io::stdin().as_fd().try_clone_to_owned()?)?),
            _ => None,
        };
        let keeper = Self {
            console,
            session: attach::read_session()?,
            place: Place::with(namespace, &home("proc")),
            program: File::open(attach::program()).context("cannot open our own program")?,
            mounts: File::open(home("proc/self/mountinfo")).context("cannot open the table of mounts")?,
            watch: Watch::open()?,
            links: LinkMonitor::open()?,
            guarded: false,
            lost: None,
            mend: None,
            nic: None,
            proc: File::open(home("proc")).context("cannot open proc")?,
        };
        process::lock_memory().context("cannot lock the keeper in memory")?;
        if let Err(error) = process::oom_protect(&home("proc")) {
            console.warn(&format!("the keeper can be killed when memory is short: {error}"));
        }
        // A terminal's hang-up or a stray signal must not end it; only SIGKILL does.
        process::ignore_signals(&[libc::SIGHUP, libc::SIGINT, libc::SIGTERM, libc::SIGPIPE])?;
        let mut stdout = std::io::stdout();
        stdout
            .write_all(&[READY])
            .and_then(|()| stdout.flush())
            .context("nobody waits for the keeper")?;
        Ok(keeper)
    }

    fn keep(&mut self) -> std::convert::Infallible {
        loop {
            self.guard();
            self.hear_of_the_disk();
            self.hear_of_links();
            if self.lost.is_some() {
                self.reconnect();
            }
            if let Err(error) = self.wait() {
                self.console.error(&format!("the keeper cannot wait for news: {error}"));
                std::thread::sleep(AGAIN);
            }
        }
    }

    /// Waits for news, or while the connection is lost until it is time for another try.
    fn wait(&self) -> rustix::io::Result<()> {
        let mut fds = vec![
            PollFd::new(&self.watch, PollFlags::IN),
            PollFd::new(&self.links, PollFlags::IN),
        ];
        // mountinfo would report every mount for ever.
        if !self.guarded {
            fds.push(PollFd::new(&self.mounts, PollFlags::PRI));
        }
        let again = self.lost.is_some() || self.mend.is_some();
        let patience = if again { Timespec::try_from(AGAIN).ok() } else { None };
        match poll(&mut fds, patience.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Writes the guards, once, when a file system is mounted on /run: mount ids change when it is moved into the root, so
    /// it is not looked for again.
    fn guard(&mut self) {
        if self.guarded {
            return;
        }
        match self.run_is_mounted() {
            Ok(false) => return,
            Ok(true) => {}
            Err(error) => {
                self.console
                    .error(&format!("the guards are not written yet: {error:#}"));
                return;
            }
        }
        self.guarded = true;
        for error in guards::write(Path::new("/run"), &self.session) {
            self.console
                .error(&format!("a network manager may take the link away: {error}"));
        }
        // The keeper holds it, too; but where everything is killed at the end, the link must outlive the keeper.
        if let Some(namespace) = &self.place.namespace {
            let kept = std::fs::create_dir_all(KEPT).map_err(anyhow::Error::from);
            let kept = kept.and_then(|()| Ok(namespace.bind(&Path::new(KEPT).join("netns"))?));
            if let Err(error) = kept {
                self.console.warn(&format!("the link ends with the keeper: {error:#}"));
            }
        }
        let put = secret_json(&self.session)
            .map_err(anyhow::Error::from)
            .and_then(|json| guards::put_shutdown_program(Path::new("/run"), &self.program, &json));
        if let Err(error) = put {
            self.console
                .error(&format!("the desktop will not say goodbye to the laptop: {error:#}"));
        }
    }

    fn run_is_mounted(&mut self) -> anyhow::Result<bool> {
        self.mounts.rewind()?;
        let mut text = Vec::new();
        (&self.mounts)
            .take(1 << 20)
            .read_to_end(&mut text)
            .context("cannot read the table of mounts")?;
        Ok(mount::mountinfo(&text)
            .iter()
            .any(|entry| entry.mount_point == Path::new("/run")))
    }

    fn hear_of_the_disk(&mut self) {
        loop {
            match self.watch.next(Some(Duration::ZERO)) {
                Ok(None) => return,
                Ok(Some(dead)) if dead.index == NBD_INDEX => self.is_lost(),
                Ok(Some(_)) => {}
                Err(error) => {
                    // What was missed is not known: a new connection that nobody needs does no harm.
                    self.is_lost();
                    if !matches!(error, NbdError::Lost) {
                        self.console
                            .error(&format!("news of the disk cannot be heard: {error}"));
                        match Watch::open() {
                            Ok(watch) => self.watch = watch,
                            Err(_) => std::thread::sleep(AGAIN),
                        }
                        return;
                    }
                }
            }
        }
    }

    fn is_lost(&mut self) {
        if self.lost.is_none() {
            self.console
                .warn("the link to the laptop is lost; everything waits until it is back");
            self.lost = Some(Instant::now());
        }
    }

    /// Brings back what changed: a NIC that was plugged in again, a tunnel that somebody has altered.
    fn hear_of_links(&mut self) {
        let mut changed = self.mend.is_some();
        loop {
            match self.links.next(Some(Duration::ZERO)) {
                Ok(None) => break,
                Ok(Some(_)) | Err(sys_link::LinkError::Lost) => changed = true,
                Err(error) => {
                    self.console
                        .error(&format!("news of the NICs cannot be heard: {error}"));
                    std::thread::sleep(AGAIN);
                    if let Ok(links) = LinkMonitor::open() {
                        self.links = links;
                    }
                    changed = true;
                    break;
                }
            }
        }
        if !changed {
            return;
        }
        let failed = self.mend_links().err().map(|error| format!("{error:#}"));
        // Tried every second; said when it changes.
        if let Some(why) = failed.as_ref().filter(|_| failed != self.mend) {
            self.console
                .error(&format!("the link to the laptop cannot be mended yet: {why}"));
        }
        self.mend = failed;
    }

    fn mend_links(&mut self) -> anyhow::Result<()> {
        let there = self.place.bring_up(&self.session)?;
        let index = match (there, &self.place.namespace) {
            (Some(index), _) => index,
            (None, None) => return Ok(()),
            // In a namespace of its own it is not seen from here, but where it was plugged in again.
            (None, Some(_)) => {
                let appeared = sys_link::list()?
                    .into_iter()
                    .find(|nic| link::is_sessions(nic, &self.session));
                let Some(nic) = appeared else { return Ok(()) };
                self.console.warn(&format!("the NIC {} is plugged in again", nic.name));
                self.place.take(&nic, &self.session)?
            }
        };
        let Some(tunnel) = &self.session.tunnel else {
            return Ok(());
        };
        if self.nic != Some(index) {
            self.place.redirect(&self.session, tunnel, index)?;
            self.nic = Some(index);
        }
        link::repair(tunnel).or_else(|error| {
            link::allow_ipv6(&self.proc).map_err(|_| error)?;
            link::repair(tunnel)
        })
    }

    /// Tries once to make a new connection; gives up when the kernel has.
    fn reconnect(&mut self) {
        let Some(lost) = self.lost else { return };
        match self.reconnect_once() {
            Ok(()) => {
                self.console.warn(&format!(
                    "the link to the laptop is back after {} s",
                    lost.elapsed().as_secs()
                ));
                self.lost = None;
            }
            Err(error) if lost.elapsed() > DEAD_CONNECTION => {
                self.console
                    .error(&format!("the laptop is gone for good, its disk fails now: {error:#}"));
                if let Err(error) = stiefel_sys::nbd::disconnect(NBD_INDEX) {
                    self.console.error(&format!("{error}"));
                }
                self.lost = None;
            }
            Err(error) => self.console.info(&format!("not yet: {error:#}")),
        }
    }

    fn reconnect_once(&self) -> anyhow::Result<()> {
        let nic = match &self.session.tunnel {
            Some(_) => 0,
            None => {
                let links = sys_link::list()?;
                let nic = links.iter().find(|nic| link::is_sessions(nic, &self.session));
                nic.context("the NIC is not plugged in")?.index
            }
        };
        let Transport::Nbd { export, .. } = &self.session.disk.transport;
        let granted = nbd::connect(link::disk(&self.session, nic), export)?;
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
