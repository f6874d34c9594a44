//! The loop of `stiefel target`: disks and addresses come and go, what is lent follows, and people are told.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{IsTerminal, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use socket2::{Domain, Protocol, Socket, Type};
use stiefel_shared::bundle::NVME_PORT;
use stiefel_sys::link::LinkMonitor;
use stiefel_sys::module::Loader;
use stiefel_sys::mount::{self, MountFlags};
use stiefel_sys::nvmet::{CONFIGFS, Port, Shelf};
use stiefel_sys::shield;
use stiefel_sys::uevent::Monitor;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;

use super::Options;
use super::catalog::Catalog;
use super::clients::{self, Who};
use super::grant::Grants;
use super::listing::{LeftOut, Listing, places};
use super::names::{Names, machine};
use super::pick::{self, Candidate, Named, Survey};
use super::share::{Mode, Share, Source};
use crate::nbd::{self, Limits, Server, Stats};
use crate::tree::Tree;

/// How often it is looked who is connected, and what they do.
pub(super) const LOOK: Duration = Duration::from_secs(2);
/// How long a disk that is being let go of is waited for at the end.
const PARTING: Duration = Duration::from_secs(25);
/// One plug makes a burst of events; looked at once after it.
pub(super) const SETTLE: Duration = Duration::from_millis(200);
/// Initiators open several connections for each disk.
const CONNECTIONS: usize = 256;

const WARNING: &str = "everyone who can reach this machine can read these disks, and nothing is encrypted";

/// What happens.
pub(super) enum Event {
    /// Disks or addresses may have changed.
    Changed,
    /// A disk has been let go of, or why not.
    Closed(String, anyhow::Result<()>),
}

/// Lends in clear to everybody, until SIGINT or SIGTERM; then everything is withdrawn in order.
///
/// # Errors
/// Nothing can be lent at all, or a disk was not let go of in order.
pub fn run(options: &Options) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let ended = runtime.block_on(follow(options));
    runtime.shutdown_background();
    ended
}

pub(super) async fn follow(options: &Options) -> anyhow::Result<()> {
    // Before anyone is told that it runs, so that a signal never finds it unprepared.
    let mut ended = Signals::new()?;
    let (tell, mut events) = mpsc::unbounded_channel();
    watch(&tell)?;
    let mut lender = Lender::new(options, tell)?;
    lender.warn();
    let served = serve(&mut lender, &mut events, &mut ended).await;
    eprintln!("stiefel: taking all disks back");
    while !lender.closing.is_empty() {
        match tokio::time::timeout(PARTING, events.recv()).await {
            Ok(Some(Event::Closed(name, result))) => lender.closed(&name, result),
            Ok(Some(Event::Changed)) => {}
            // One that hangs is left behind.
            Ok(None) | Err(_) => break,
        }
    }
    // In order also after an error: the kernel would go on serving by itself.
    served.and(lender.end())
}

/// Whatever tells the program to end; also that its terminal has gone.
pub(super) struct Signals([Signal; 3]);

impl Signals {
    pub(super) fn new() -> std::io::Result<Self> {
        let kinds = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()];
        let [interrupt, terminate, hangup] = kinds.map(signal);
        Ok(Self([interrupt?, terminate?, hangup?]))
    }

    /// Waits for one.
    pub(super) async fn any(&mut self) {
        let [interrupt, terminate, hangup] = &mut self.0;
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
        }
    }
}

/// Follows disks and addresses until a signal comes.
async fn serve(
    lender: &mut Lender<'_>,
    events: &mut mpsc::UnboundedReceiver<Event>,
    ended: &mut Signals,
) -> anyhow::Result<()> {
    lender.reconcile()?;
    let mut look = tokio::time::interval(LOOK);
    loop {
        tokio::select! {
            () = ended.any() => return Ok(()),
            _ = look.tick() => lender.look(),
            Some(event) = events.recv() => {
                if let Event::Closed(name, result) = event {
                    lender.closed(&name, result);
                }
                tokio::time::sleep(SETTLE).await;
                while let Ok(event) = events.try_recv() {
                    if let Event::Closed(name, result) = event {
                        lender.closed(&name, result);
                    }
                }
                lender.reconcile()?;
            }
        }
    }
}

/// Threads that hear of block devices and of addresses.
pub(super) fn watch(tell: &mpsc::UnboundedSender<Event>) -> anyhow::Result<()> {
    let mut blocks = Monitor::open()?;
    let told = tell.clone();
    std::thread::Builder::new().name("disks".to_owned()).spawn(move || {
        loop {
            let news = match blocks.next(None) {
                Ok(Some(event)) => event.subsystem.as_deref() == Some("block"),
                Ok(None) => false,
                // Events were lost, or the socket is broken: look again, not in a busy loop.
                Err(_) => {
                    std::thread::sleep(LOOK);
                    true
                }
            };
            if news && told.send(Event::Changed).is_err() {
                return;
            }
        }
    })?;
    let mut links = LinkMonitor::open()?;
    let told = tell.clone();
    std::thread::Builder::new()
        .name("addresses".to_owned())
        .spawn(move || {
            loop {
                if links.next(None).is_err() {
                    std::thread::sleep(LOOK);
                }
                if told.send(Event::Changed).is_err() {
                    return;
                }
            }
        })?;
    Ok(())
}

/// Everything that is lent.
struct Lender<'a> {
    options: &'a Options,
    named: Vec<Named>,
    machine: String,
    catalog: Arc<Catalog>,
    server: Arc<Server>,
    shelf: Option<Shelf>,
    /// Who may write what.
    grants: Grants,
    /// By their names.
    shares: BTreeMap<String, Share>,
    /// Names of those that are being let go of.
    closing: BTreeSet<String>,
    /// Sources that could not be lent, and why: not tried again until they change.
    failed: Vec<(Source, String)>,
    tell: mpsc::UnboundedSender<Event>,
    shown: String,
    who: BTreeMap<Who, usize>,
    stats: BTreeMap<String, Stats>,
    /// What was not let go of in order.
    broken: Option<anyhow::Error>,
}

impl<'a> Lender<'a> {
    fn new(options: &'a Options, tell: mpsc::UnboundedSender<Event>) -> anyhow::Result<Self> {
        let root = Path::new("/");
        let named = options.devices.iter().map(|path| pick::named(root, path));
        let named = named.collect::<anyhow::Result<Vec<_>>>()?;
        let shelf = match options.no_nvme {
            true => None,
            false => shelf()
                .inspect_err(|error| eprintln!("stiefel: no NVMe, only NBD: {error:#}"))
                .ok(),
        };
        let catalog = Arc::new(Catalog::default());
        let limits = Limits {
            connections: CONNECTIONS,
            ..Limits::default()
        };
        let gate: Arc<dyn nbd::Gate> = Arc::<Catalog>::clone(&catalog);
        let listener = listen(options.nbd_port).with_context(|| {
            format!(
                "cannot listen on TCP port {}; choose another with --port",
                options.nbd_port
            )
        })?;
        let server = Server::start(listener, gate, limits)?;
        Ok(Self {
            options,
            grants: grants(options, &named)?,
            named,
            machine: machine(&Tree::new(root)),
            catalog,
            server: Arc::new(server),
            shelf,
            shares: BTreeMap::new(),
            closing: BTreeSet::new(),
            failed: Vec::new(),
            tell,
            shown: String::new(),
            who: BTreeMap::new(),
            stats: BTreeMap::new(),
            broken: None,
        })
    }

    fn warn(&self) {
        let (red, plain) = if std::io::stderr().is_terminal() {
            ("\x1b[1;31m", "\x1b[0m")
        } else {
            ("", "")
        };
        eprintln!("{red}WARNING: {WARNING}{plain}");
    }

    /// Takes back what has gone, lends what has come, and shows it.
    fn reconcile(&mut self) -> anyhow::Result<()> {
        let root = Path::new("/");
        let survey = pick::survey(root)?;
        for words in self.grants.look(&survey) {
            eprintln!("stiefel: {words}");
        }
        let (wanted, mut left_out) = wanted(self.options, &self.named, &survey);
        let is_wanted = |source: &Source| wanted.iter().any(|want| want.source == *source);
        let gone = self.shares.iter().filter(|(_, share)| !is_wanted(&share.source));
        let gone: Vec<String> = gone.map(|(name, _)| name.clone()).collect();
        for name in gone {
            eprintln!("stiefel: {name} has gone");
            self.take_back(&name);
        }
        self.failed.retain(|(source, _)| is_wanted(source));
        for want in wanted {
            let lent = self.shares.values_mut().find(|share| share.source == want.source);
            if let Some(share) = lent {
                share.users = want.users;
            } else if let Some((_, why)) = self.failed.iter().find(|(source, _)| *source == want.source) {
                left_out.push(LeftOut {
                    device: want.source.path().display().to_string(),
                    why: why.clone(),
                });
            } else if let Some(why) = self.lend(want) {
                left_out.push(why);
            }
        }
        self.show(&left_out)
    }

    /// Lends a disk; what is to be said if that fails.
    fn lend(&mut self, want: Wanted) -> Option<LeftOut> {
        let Wanted { source, users } = want;
        let names = Names::of(&self.machine, &source, &|key: &str| self.shares.contains_key(key));
        if self.closing.contains(&names.key) {
            // Plugged in again at once: tried again when the earlier one has been let go of.
            return None;
        }
        let mode = mode(self.options, &self.grants, &source);
        let device = source.path().display().to_string();
        match Share::open(source.clone(), names, mode, users, self.shelf.as_ref()) {
            Ok(share) => {
                if let Some(export) = &share.export {
                    self.catalog.insert(Arc::clone(export));
                }
                self.shares.insert(share.names.key.clone(), share);
                None
            }
            Err(error) => {
                let why = format!("{error:#}");
                self.failed.push((source, why.clone()));
                Some(LeftOut { device, why })
            }
        }
    }

    /// Lets go of a disk, on a thread of its own: it may hang.
    fn take_back(&mut self, name: &str) {
        let Some(share) = self.shares.remove(name) else {
            return;
        };
        self.catalog.remove(name);
        self.stats.remove(name);
        self.closing.insert(name.to_owned());
        let (server, tell, name) = (Arc::clone(&self.server), self.tell.clone(), name.to_owned());
        let close = move || {
            let result = share.close(Some(&server));
            // At the end nobody may be listening any more.
            let _ = tell.send(Event::Closed(name, result));
        };
        if let Err(error) = std::thread::Builder::new().name("let-go".to_owned()).spawn(close) {
            self.broken.get_or_insert(error.into());
        }
    }

    fn closed(&mut self, name: &str, result: anyhow::Result<()>) {
        self.closing.remove(name);
        if let Err(error) = result {
            eprintln!("stiefel: {name} was not let go of in order: {error:#}");
        }
    }

    /// Shows what is lent, if that has changed.
    fn show(&mut self, left_out: &[LeftOut]) -> anyhow::Result<()> {
        let places = places()?;
        let listing = Listing::new(self.shares.values(), left_out, &places, self.options.nbd_port);
        let text = if self.options.json {
            listing.json() + "\n"
        } else {
            listing.words()
        };
        if text != self.shown {
            let mut out = std::io::stdout().lock();
            let gap = if self.options.json || self.shown.is_empty() {
                ""
            } else {
                "\n"
            };
            out.write_all(format!("{gap}{text}").as_bytes())?;
            out.flush()?;
            self.shown = text;
        }
        Ok(())
    }

    /// Says who is connected and what they do.
    fn look(&mut self) {
        let now = clients::connected(&self.server, &Tree::new(Path::new("/")));
        for words in clients::changes(&self.who, &now) {
            eprintln!("stiefel: {words}");
        }
        self.who = now;
        for (name, share) in &self.shares {
            let Some(export) = &share.export else { continue };
            let now = export.stats();
            let before = self.stats.insert(name.clone(), now).unwrap_or_default();
            if let Some(words) = clients::traffic(name, before, now, LOOK.as_secs()) {
                eprintln!("stiefel: {words}");
            }
        }
    }

    /// Takes everything back.
    fn end(mut self) -> anyhow::Result<()> {
        let names: Vec<String> = self.shares.keys().cloned().collect();
        let mut result = match self.broken.take() {
            Some(error) => Err(error),
            None => Ok(()),
        };
        let mut threads = Vec::new();
        for name in names {
            if let Some(share) = self.shares.remove(&name) {
                self.catalog.remove(&name);
                let server = Arc::clone(&self.server);
                threads.push(std::thread::spawn(move || (name, share.close(Some(&server)))));
            }
        }
        for thread in threads {
            // `close` is bounded in time.
            match thread.join() {
                Ok((name, closed)) => result = result.and(closed.with_context(|| name)),
                Err(_) => result = result.and(Err(anyhow::anyhow!("a disk was not let go of in order"))),
            }
        }
        if let Some(mut shelf) = self.shelf.take() {
            result = result.and(shelf.close().map_err(anyhow::Error::from));
        }
        result
    }
}

/// What is to be lent.
pub(super) struct Wanted {
    pub(super) source: Source,
    pub(super) users: Vec<String>,
}

/// Which disks are to be lent, and which are not, with the reason.
pub(super) fn wanted(options: &Options, named: &[Named], survey: &Survey) -> (Vec<Wanted>, Vec<LeftOut>) {
    let (mut wanted, mut left_out) = (Vec::new(), Vec::new());
    for Candidate { disk, system, users } in &survey.disks {
        let by_name = named.contains(&Named::Disk(disk.name.clone()));
        if !by_name && options.all == 0 {
            continue;
        }
        let refused = match &survey.unknown {
            _ if options.all >= 2 => None,
            _ if *system => Some("the running system lives on it; --all twice lends it all the same".to_owned()),
            Some(part) if !by_name => Some(format!(
                "it may be one of the running system's ({part}); name it, or say --all twice"
            )),
            _ => None,
        };
        match refused {
            Some(why) => left_out.push(LeftOut {
                device: disk.path.display().to_string(),
                why,
            }),
            None => wanted.push(Wanted {
                source: Source::Disk(disk.clone()),
                users: users.clone(),
            }),
        }
    }
    for file in named {
        if let Named::File(path) = file
            && let Ok(metadata) = std::fs::metadata(path)
        {
            wanted.push(Wanted {
                source: Source::File {
                    path: path.clone(),
                    size: metadata.len(),
                },
                users: Vec::new(),
            });
        }
    }
    (wanted, left_out)
}

/// Which of what is there now may be written.
///
/// # Errors
/// In words: what the user named is not there.
pub(super) fn grants(options: &Options, named: &[Named]) -> anyhow::Result<Grants> {
    let survey = pick::survey(Path::new("/"))?;
    let (wanted, _) = wanted(options, named, &survey);
    let lent = with_names("", wanted);
    Grants::new(options, lent.iter().map(|(want, names)| (&want.source, names)), &survey)
}

/// Gives each its name.
pub(super) fn with_names(machine: &str, wanted: Vec<Wanted>) -> Vec<(Wanted, Names)> {
    let mut all: Vec<(Wanted, Names)> = Vec::new();
    for want in wanted {
        let names = Names::of(machine, &want.source, &|key: &str| {
            all.iter().any(|(_, names)| names.key == key)
        });
        all.push((want, names));
    }
    all
}

pub(super) fn mode(options: &Options, grants: &Grants, source: &Source) -> Mode {
    match grants.of(source) {
        Some(grant) => Mode::ReadWrite {
            host: grant.host.clone(),
        },
        None if options.snapshot => Mode::Snapshot,
        None => Mode::ReadOnly,
    }
}

/// Listens on all addresses of both families; where IPv6 is off, on IPv4's.
fn listen(port: u16) -> std::io::Result<TcpListener> {
    let open = |domain, address: IpAddr| -> std::io::Result<TcpListener> {
        let socket = Socket::new(domain, Type::STREAM.cloexec(), Some(Protocol::TCP))?;
        if address.is_ipv6() {
            socket.set_only_v6(false)?;
        }
        socket.set_reuse_address(true)?;
        socket.bind(&SocketAddr::from((address, port)).into())?;
        socket.listen(64)?;
        Ok(TcpListener::from(socket))
    };
    open(Domain::IPV6, Ipv6Addr::UNSPECIFIED.into()).or_else(|error: std::io::Error| {
        // A port that is taken is taken; only without IPv6 the other one is tried.
        match error.kind() {
            std::io::ErrorKind::AddrInUse | std::io::ErrorKind::PermissionDenied => Err(error),
            _ => open(Domain::IPV4, Ipv4Addr::UNSPECIFIED.into()),
        }
    })
}

/// Loads the modules of the kernel's NVMe target, and mounts where it is set up.
pub(super) fn load_target() -> anyhow::Result<()> {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    // Built in, or loaded already, where there is no folder: what is missing shows below.
    if let Ok(mut loader) = Loader::open(&Path::new("/lib/modules").join(release), &[]) {
        for module in ["nvmet", "nvmet_tcp", "loop", "dm_mod"] {
            if let Err(error) = loader.load(module) {
                eprintln!("stiefel: {:#}", anyhow::Error::new(error));
            }
        }
    }
    let target = Path::new(CONFIGFS);
    if target.exists() && std::fs::read_dir(target).is_ok_and(|mut found| found.next().is_none()) {
        let flags = MountFlags::NOEXEC | MountFlags::NOSUID;
        mount::mount("configfs", target, "configfs", flags, None)?;
    }
    anyhow::ensure!(
        target.join("nvmet").exists(),
        "this kernel has no NVMe target (nvmet, nvmet-tcp)"
    );
    Ok(())
}

/// The kernel's NVMe target with a port for everybody.
fn shelf() -> anyhow::Result<Shelf> {
    load_target()?;
    let port = |address: IpAddr| Port {
        id: NVME_PORT,
        address,
        tcp_port: NVME_PORT,
    };
    let ipv6 = Path::new("/proc/net/if_inet6").exists();
    let address = if ipv6 {
        Ipv6Addr::UNSPECIFIED.into()
    } else {
        Ipv4Addr::UNSPECIFIED.into()
    };
    let shelf = Shelf::open(Path::new(CONFIGFS), &[port(address)])?;
    // After what an earlier process had published was taken back.
    shield::sweep(Path::new("/sys"), Path::new("/dev"));
    Ok(shelf)
}

#[cfg(test)]
mod tests {
    use super::*;
    use stiefel_sys::block::Disk;

    fn candidate(name: &str, system: bool) -> Candidate {
        Candidate {
            disk: Disk {
                name: name.into(),
                path: format!("/dev/{name}").into(),
                device: (8, 0),
                size: 1 << 20,
                logical_block_size: 512,
                physical_block_size: 512,
                model: None,
                serial: Some(format!("serial {name}")),
                wwid: None,
                removable: false,
                read_only: false,
                rotational: false,
                sequence: None,
            },
            system,
            users: Vec::new(),
        }
    }

    fn lent(options: &Options, named: &[Named], survey: &Survey) -> (Vec<String>, Vec<String>) {
        let (wanted, left) = wanted(options, named, survey);
        let devices = wanted.iter().map(|want| want.source.path().display().to_string());
        (devices.collect(), left.into_iter().map(|left| left.why).collect())
    }

    #[test]
    fn the_systems_disk_is_lent_only_when_asked_for_twice() {
        let survey = Survey {
            disks: vec![candidate("sda", true), candidate("sdb", false)],
            unknown: None,
        };
        let all = |all| Options {
            all,
            ..Options::default()
        };
        let (devices, why) = lent(&all(1), &[], &survey);
        assert_eq!(devices, ["/dev/sdb"]);
        assert!(why[0].contains("running system"), "{why:?}");
        assert_eq!(lent(&all(2), &[], &survey).0, ["/dev/sda", "/dev/sdb"]);
        // Also by its name, for a slip of the finger is enough.
        assert!(lent(&all(0), &[Named::Disk("sda".into())], &survey).0.is_empty());
        assert_eq!(lent(&all(0), &[Named::Disk("sdb".into())], &survey).0, ["/dev/sdb"]);
    }

    #[test]
    fn where_the_root_is_unknown_only_named_disks_are_lent() {
        let survey = Survey {
            disks: vec![candidate("sda", false)],
            unknown: Some("zfs on rpool".into()),
        };
        let options = Options {
            all: 1,
            ..Options::default()
        };
        assert!(lent(&options, &[], &survey).0.is_empty());
        assert_eq!(
            lent(&Options::default(), &[Named::Disk("sda".into())], &survey).0,
            ["/dev/sda"]
        );
    }

    #[test]
    fn disks_are_read_only_unless_named() {
        let survey = Survey {
            disks: vec![candidate("sda", false)],
            unknown: None,
        };
        let with = |disk: Option<&str>, snapshot| {
            let options = Options {
                writable: disk.iter().map(|disk| disk.parse().unwrap()).collect(),
                all: 1,
                snapshot,
                ..Options::default()
            };
            let lent = with_names("m", wanted(&options, &[], &survey).0);
            let sources = lent.iter().map(|(want, names)| (&want.source, names));
            let grants = Grants::new(&options, sources, &survey).unwrap();
            mode(&options, &grants, &lent[0].0.source)
        };
        for word in ["sda", "/dev/sda", "serial-sda"] {
            for snapshot in [false, true] {
                let granted = Mode::ReadWrite { host: None };
                assert_eq!(with(Some(word), snapshot), granted, "{word}");
            }
        }
        assert_eq!(with(None, false), Mode::ReadOnly);
        assert_eq!(with(None, true), Mode::Snapshot);
    }
}
