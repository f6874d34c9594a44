//! The keeper: a small process that outlives the payload's initramfs and looks after the link.
//!
//! Started by [`crate::attach`], before the kernel has the disk. It is static, locked in memory, and holds no file of
//! the root file system, because it must run while that one waits. systemd spares it (its name starts with `@`).
//!
//! - It holds the network namespace of the NIC: the kernel would give the NIC back without it.
//! - When the distribution mounts its own /run (which hides what was there before), it writes the guards that keep
//!   network managers off the link, and puts the [shutdown program](crate::goodbye) into /run/initramfs.
//! - When somebody mounts the desktop's firmware's variables, it makes them read-only.
//! - When the NIC is plugged in again, it brings it back to its place and points the tunnel at it; when somebody takes the
//!   link's address or state away, it restores them (`mend`). It has the NIC's firmware for that.
//! - When the kernel says that NBD's connection died, it makes a new one and hands it over: I/O that waited goes on. (NVMe
//!   connects anew by itself.)
//! - It exchanges signs of life with the laptop, says when that one is gone and when it is back, and ends
//!   the desktop when nothing else can.
//!
//! No failure ends it: it says what failed, and goes on.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use stiefel_shared::bundle::{AttachSession, Transport};
use stiefel_shared::handover::{LinkMode, secret_json};
use stiefel_sys::console::Console;
use stiefel_sys::link::{LinkError, LinkMonitor};
use stiefel_sys::mount::{self, MountEntry};
use stiefel_sys::nbd::{NbdError, Watch};
use stiefel_sys::netns::Namespace;
use stiefel_sys::process;

use crate::attach::{self, HOME, KEEPER_ARG0};
use crate::disk::{self, NBD_INDEX};
use crate::firmware_variables::Variables;
use crate::leave::{self, Wishes};
use crate::life::{Life, News};
use crate::link::Place;
use crate::mend::Mender;
use crate::mtu::{self, TUNNEL_OVERHEAD};
use crate::pulse::Heart;
use crate::status::{STATUS_PATH, Status};
use crate::{firmware, goodbye, guards};

/// Where the NIC's namespace is kept.
const KEPT: &str = "/run/stiefel";
/// What the keeper says on its standard output when it is ready.
const READY: u8 = b'+';
/// How long it may take for that; larger packets are tried meanwhile.
const START: Duration = Duration::from_mins(1);
/// The argument that says that standard input is the NIC's network namespace.
const NAMESPACE: &str = "namespace";
/// After so long a system that may not have heard is told again to power off.
const ASK_AGAIN: Duration = Duration::from_secs(10);
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
    let console = Arc::new(Console::open(&home("dev"), &home("proc")));
    let Err(error) = begin(&console).map(|mut keeper| keeper.keep());
    console.error(&format!("there is no keeper of the link: {error:#}"));
    std::process::ExitCode::FAILURE
}

/// Everything that can fail; who waits for the keeper is told at its end.
fn begin(console: &Arc<Console>) -> anyhow::Result<Keeper> {
    let mut keeper = Keeper::new(console)?;
    keeper.agree_on_packets();
    outlive(console)?;
    let mut stdout = std::io::stdout();
    stdout
        .write_all(&[READY])
        .and_then(|()| stdout.flush())
        .context("nobody waits for the keeper")?;
    Ok(keeper)
}

/// Makes this process one that needs nothing of the root file system, and that nothing but SIGKILL ends.
fn outlive(console: &Console) -> anyhow::Result<()> {
    std::env::set_current_dir(home("sys")).context("cannot open sysfs")?;
    if let Err(error) = process::never_wait_for_disks() {
        console.warn(&format!(
            "the keeper may wait for the disk when memory is short: {error}"
        ));
    }
    process::lock_memory().context("cannot lock the keeper in memory")?;
    if let Err(error) = process::oom_protect(&home("proc")) {
        console.warn(&format!("the keeper can be killed when memory is short: {error}"));
    }
    // A terminal's hang-up or a stray signal must not end it.
    process::ignore_signals(&[libc::SIGHUP, libc::SIGINT, libc::SIGTERM, libc::SIGPIPE])?;
    Ok(())
}

fn home(name: &str) -> PathBuf {
    Path::new(HOME).join(name)
}

/// sysfs, which is unmounted by now, but for who works in it.
fn sysfs() -> &'static Path {
    Path::new(".")
}

/// Everything the keeper needs once the initramfs is gone, opened while it is there.
struct Keeper {
    console: Arc<Console>,
    session: Arc<AttachSession>,
    place: Arc<Place>,
    mender: Mender,
    /// The NIC's firmware.
    firmware: firmware::Files,
    /// Our program, for the shutdown folder.
    program: File,
    /// /proc/self/mountinfo; POLLPRI tells that it changed.
    mounts: File,
    /// News of NBD's connection; NVMe has none to tell.
    watch: Option<Watch>,
    links: LinkMonitor,
    heart: Heart,
    life: Life,
    wishes: Wishes,
    status: Status,
    /// When the system was told last that the laptop asks it to power off; `None` once it has heard for certain.
    asked: Option<Option<Instant>>,
    /// Whether the guards are written.
    guarded: bool,
    /// Whether something may have been mounted since the table was read.
    mounted: bool,
    /// The desktop's firmware's, where it has any.
    variables: Option<Variables>,
    /// Since when NBD's connection is dead.
    dead: Option<Instant>,
    /// When the kernel last said so.
    died: Option<Instant>,
    /// A new one is being made.
    reconnecting: Option<JoinHandle<anyhow::Result<Instant>>>,
    /// The NIC's packet size that was agreed upon, in bytes.
    mtu: u32,
    /// procfs, which is unmounted by now, but for who has it open.
    proc: File,
}

impl Keeper {
    fn new(console: &Arc<Console>) -> anyhow::Result<Self> {
        let namespace = match std::env::args().nth(1).as_deref() {
            Some(NAMESPACE) => Some(Namespace::from_fd(std::io::stdin().as_fd().try_clone_to_owned()?)?),
            _ => None,
        };
        let session = Arc::new(attach::read_session()?);
        let now = Instant::now();
        let proc = || File::open(home("proc")).context("cannot open proc");
        let place = Arc::new(Place::with(&session, namespace, &home("proc")));
        let firmware = firmware::take().unwrap_or_else(|error| {
            console.warn(&format!("the NIC's firmware cannot be kept: {error}"));
            firmware::Files::new()
        });
        let watch = match session.disk.transport {
            Transport::Nbd { .. } => Some(Watch::open()?),
            Transport::NvmeTcp { .. } => None,
        };
        Ok(Self {
            console: Arc::clone(console),
            mender: Mender::new(console, &session, &place, proc()?),
            firmware,
            program: File::open(attach::program()).context("cannot open our own program")?,
            mounts: File::open(home("proc/self/mountinfo")).context("cannot open the table of mounts")?,
            watch,
            links: LinkMonitor::open()?,
            // Where the laptop's address is reached.
            heart: place.at_address(|| Heart::new(&session, now))?,
            place,
            life: Life::new(now, Duration::from_secs(session.link.grace)),
            wishes: Wishes::new(File::open(home("dev")).context("cannot open devtmpfs")?, proc()?),
            status: first_status(&session),
            asked: None,
            guarded: false,
            mounted: true,
            variables: home("sys/firmware/efi").exists().then(Variables::default),
            dead: None,
            died: None,
            reconnecting: None,
            mtu: 0,
            proc: proc()?,
            session,
        })
    }

    /// Before the disk's connection is made, whose packets are as large as they may be at that moment.
    fn agree_on_packets(&mut self) {
        // A network that others use has its own idea of packets.
        if self.session.link.mode == LinkMode::Lan {
            return;
        }
        if let Ok(Some(nic)) = self.place.bring_up(&self.session) {
            let mtu = mtu::agree(&self.console, &self.session, &self.place, nic, &mut self.heart);
            self.agreed(mtu);
        }
    }

    fn keep(&mut self) -> std::convert::Infallible {
        loop {
            self.hear_of_mounts();
            self.hear_of_the_disk();
            self.hear_of_links();
            self.mender.step();
            self.reconnect();
            self.live();
            match self.wait() {
                Ok(mounted) => self.mounted |= mounted,
                Err(error) => {
                    self.console.error(&format!("the keeper cannot wait for news: {error}"));
                    std::thread::sleep(AGAIN);
                }
            }
        }
    }

    /// Waits for news, until the next sign of life is due, or until it is time for another try. Says whether something was
    /// mounted or unmounted.
    fn wait(&self) -> rustix::io::Result<bool> {
        let mut fds = vec![
            PollFd::new(&self.links, PollFlags::IN),
            PollFd::new(&self.heart, PollFlags::IN),
        ];
        fds.extend(self.watch.as_ref().map(|watch| PollFd::new(watch, PollFlags::IN)));
        // mountinfo reports every mount for ever, so only as long as it is needed.
        if !self.guarded || self.variables.is_some() {
            fds.push(PollFd::new(&self.mounts, PollFlags::PRI));
        }
        let again = self.dead.is_some() || self.mender.is_busy() || self.life.lost();
        let rest = self.heart.rest(Instant::now());
        let patience = if again { rest.min(AGAIN) } else { rest };
        match poll(&mut fds, Timespec::try_from(patience).ok().as_ref()) {
            // Nothing else is told as urgent.
            Ok(_) => Ok(fds.iter().any(|fd| fd.revents().contains(PollFlags::PRI))),
            Err(rustix::io::Errno::INTR) => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn hear_of_mounts(&mut self) {
        if !std::mem::take(&mut self.mounted) {
            return;
        }
        let table = match self.table() {
            Ok(table) => table,
            Err(error) => {
                self.console
                    .error(&format!("what is mounted cannot be seen: {error:#}"));
                self.mounted = true;
                return;
            }
        };
        if let Some(variables) = &mut self.variables {
            if let Err(error) = variables.protect(&table, &self.proc) {
                self.console.warn(&format!(
                    "the desktop's firmware may be changed by what updates a boot loader; its variables cannot be made \
                     read-only: {error}"
                ));
            }
            self.mounted = variables.is_waiting();
        }
        if !self.guarded && table.iter().any(|entry| entry.mount_point == Path::new("/run")) {
            self.guard();
        }
    }

    /// Exchanges signs of life, and does what follows.
    fn live(&mut self) {
        let now = Instant::now();
        if let Err(error) = self.heart.beat(now) {
            self.console.warn(&format!("no sign of life for the laptop: {error:#}"));
        }
        let sign = self.heart.hear();
        let back = sign.and_then(|_| self.life.heard(now));
        let off = self.wishes.off(self.life.lost());
        self.life.wish(now, off);
        for news in back.into_iter().chain(self.life.tick(now)) {
            self.tell(news);
        }
        if let Some(sign) = sign {
            (self.status.battery, self.status.mains) = (sign.battery, sign.mains);
            self.power_off(sign.power_off, now);
            let mtu = u32::from(sign.mtu);
            if mtu != 0 && mtu < self.mtu {
                self.mender.lower(mtu);
                self.agreed(mtu);
            }
        }
        self.publish();
    }

    fn tell(&mut self, news: News) {
        let hostname = &self.session.hostname;
        match news {
            News::Lost => self.console.warn(&format!(
                "{hostname} is not heard any more; everything waits until it is back. To switch the desktop off without \
                 it, press the power key"
            )),
            News::Back(after) => {
                self.status.losses += 1;
                self.console
                    .warn(&format!("{hostname} is back after {} s", after.as_secs()));
            }
            News::Over => self.console.error(&format!(
                "{hostname} was not heard for so long that it has gone back to its own system. This session is over: \
                 nothing more can be written to its disk. The desktop is switched off in a minute"
            )),
            News::Off => leave::switch_off(&self.console, &self.session),
        }
    }

    /// Tells the system that the laptop wants to go, until it has heard: an initrd's first process does not.
    fn power_off(&mut self, wanted: bool, now: Instant) {
        if !wanted {
            self.asked = None;
            return;
        }
        match self.asked {
            Some(None) => return,
            Some(Some(last)) if now.saturating_duration_since(last) < ASK_AGAIN => return,
            Some(_) => {}
            None => self.console.warn(&format!(
                "{} asks this desktop to power off (a key was pressed there, or its battery runs low)",
                self.session.hostname
            )),
        }
        self.asked = Some(match process::ask_power_off(self.proc.as_fd()) {
            Ok(true) => None,
            Ok(false) => Some(now),
            Err(error) => {
                self.console
                    .error(&format!("the system cannot be told to power off: {error}"));
                Some(now)
            }
        });
    }

    fn agreed(&mut self, mtu: u32) {
        let overhead = self.session.link.tunnel.as_ref().map_or(0, |_| TUNNEL_OVERHEAD);
        self.mtu = mtu;
        self.status.mtu = mtu.saturating_sub(overhead);
    }

    /// Writes the status when it has changed.
    fn publish(&mut self) {
        let Some(run) = self.wishes.run() else { return };
        let mut status = Status {
            connected: !self.life.lost(),
            state: disk::state(&self.session, sysfs()),
            ..self.status.clone()
        };
        std::mem::swap(&mut status, &mut self.status);
        if status == self.status {
            return;
        }
        let written = serde_json::to_vec(&self.status)
            .map_err(std::io::Error::from)
            .and_then(|json| leave::replace(run, STATUS_PATH, &json));
        if written.is_err() {
            // Only people look at it; tried again with the next change.
            self.status.state = None;
        }
    }

    /// Writes the guards, once, when a file system is mounted on /run: mount ids change when it is moved into the root, so
    /// it is not looked for again.
    fn guard(&mut self) {
        self.guarded = true;
        if let Err(error) = self.wishes.watch(Path::new("/run")) {
            self.console.warn(&format!("a shutdown will not be seen: {error}"));
        }
        self.status.device = disk::device(&self.session, sysfs()).unwrap_or_default();
        for error in guards::write(Path::new("/run"), &self.session, &self.status.device) {
            self.console
                .error(&format!("a network manager may take the link away: {error}"));
        }
        if let Err(error) = std::fs::create_dir_all(KEPT) {
            self.console.warn(&format!("there will be no status: {error}"));
        }
        if let Err(error) = firmware::offer(&self.firmware, sysfs()) {
            self.console.warn(&format!(
                "the NIC may lack its firmware when it is plugged in again: {error}"
            ));
        }
        // The keeper holds it, too; but where everything is killed at the end, the link must outlive the keeper.
        if let Some(namespace) = &self.place.namespace
            && let Err(error) = namespace.bind(&Path::new(KEPT).join("netns"))
        {
            let error = anyhow::Error::new(error);
            self.console.warn(&format!("the link ends with the keeper: {error:#}"));
        }
        let put = secret_json(&*self.session)
            .map_err(anyhow::Error::from)
            .and_then(|json| guards::put_shutdown_program(Path::new("/run"), &self.program, &json))
            .and_then(|()| match &self.place.namespace {
                // The shutdown program's way to the laptop.
                Some(namespace) => Ok(namespace.bind(&Path::new("/run/initramfs").join(goodbye::NAMESPACE))?),
                None => Ok(()),
            });
        if let Err(error) = put {
            self.console
                .error(&format!("the desktop will not say goodbye to the laptop: {error:#}"));
        }
    }

    fn table(&mut self) -> anyhow::Result<Vec<MountEntry>> {
        self.mounts.rewind()?;
        let mut text = Vec::new();
        (&self.mounts)
            .take(1 << 20)
            .read_to_end(&mut text)
            .context("cannot read the table of mounts")?;
        Ok(mount::mountinfo(&text))
    }

    fn hear_of_the_disk(&mut self) {
        let Some(watch) = &mut self.watch else { return };
        loop {
            match watch.next(Some(Duration::ZERO)) {
                Ok(None) => return,
                Ok(Some(dead)) if dead.index == NBD_INDEX => {}
                Ok(Some(_)) => continue,
                // What was missed is not known. If the connection lives, the laptop ends it for the new one, and the kernel
                // then says that it is dead.
                Err(NbdError::Lost) => {}
                Err(error) => {
                    self.console
                        .error(&format!("news of the disk cannot be heard: {error}"));
                    match Watch::open() {
                        Ok(fresh) => *watch = fresh,
                        Err(_) => std::thread::sleep(AGAIN),
                    }
                    let now = Instant::now();
                    self.died = Some(now);
                    self.dead.get_or_insert(now);
                    return;
                }
            }
            self.died = Some(Instant::now());
            if self.dead.is_none() {
                self.console.warn("the disk's connection is dead; making a new one");
                self.dead = Some(Instant::now());
            }
        }
    }

    /// Has brought back what changed: a NIC that was plugged in again, a tunnel that somebody has altered.
    fn hear_of_links(&mut self) {
        // Not everything that can be taken away is news: without the laptop it is looked at again and again.
        let mut changed = self.life.lost();
        loop {
            match self.links.next(Some(Duration::ZERO)) {
                Ok(None) => break,
                Ok(Some(_)) | Err(LinkError::Lost) => changed = true,
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
        if changed {
            self.mender.changed();
        }
    }

    /// Has a new connection made while NBD's is dead; on a thread, for a laptop that has gone does not even refuse.
    fn reconnect(&mut self) {
        let Some(dead) = self.dead else { return };
        match self.reconnecting.take() {
            Some(running) if !running.is_finished() => self.reconnecting = Some(running),
            Some(done) => match done.join() {
                // The new one has died as well meanwhile.
                Ok(Ok(made)) if self.died.is_some_and(|died| died > made) => {}
                Ok(Ok(_)) => {
                    self.status.reconnects += 1;
                    self.console.warn(&format!(
                        "the disk's connection was made anew after {} s",
                        dead.elapsed().as_secs()
                    ));
                    self.dead = None;
                }
                Ok(Err(error)) => self.console.info(&format!("not yet: {error:#}")),
                Err(_) => self.console.error("the keeper's thread has failed; trying again"),
            },
            None => {
                let (session, place) = (Arc::clone(&self.session), Arc::clone(&self.place));
                let thread = std::thread::Builder::new().spawn(move || disk::reconnect(&session, place.disks()));
                match thread {
                    Ok(thread) => self.reconnecting = Some(thread),
                    Err(error) => self.console.error(&format!("no thread: {error}")),
                }
            }
        }
    }
}

fn first_status(session: &AttachSession) -> Status {
    let transport = match session.disk.transport {
        Transport::Nbd { .. } => "nbd",
        Transport::NvmeTcp { .. } => "nvme-tcp",
    };
    Status {
        laptop: session.hostname.clone(),
        transport: transport.to_owned(),
        encryption: session.link.tunnel.as_ref().map_or("none", |_| "wireguard").to_owned(),
        guest: session.disk.guest,
        mtu: session.link.tunnel.as_ref().map_or(1500, |tunnel| tunnel.mtu),
        connected: true,
        ..Status::default()
    }
}
