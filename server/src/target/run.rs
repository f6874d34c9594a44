//! The loop of `stiefel target`: disks and addresses come and go, what is lent follows, and people are told.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use stiefel_sys::link::LinkMonitor;
use stiefel_sys::nvmet::Shelf;
use stiefel_sys::uevent::Monitor;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;

use super::Options;
use super::alone::Alone;
use super::catalog::Catalog;
use super::clients::{self, Who};
use super::closed::Seat;
use super::doors::{listen, opened_shelf};
use super::follow::Chosen;
use super::grant::Grants;
use super::heard::GRACE;
use super::late::soon_or_late;
use super::listing::{LeftOut, Listing, places};
use super::names::{Names, machine};
use super::pick;
use super::qr::{self, Room};
use super::role::{Lending, Press};
use super::say::{self, say};
use super::share::{LET_GO, Mode, Share, Source, in_time};
use super::wanted::{Wanted, look_up, mode, wanted};
use crate::nbd::{self, Limits, Server, Stats};
use crate::tree::Tree;

/// How often it is looked who is connected, and what they do.
pub(super) const LOOK: Duration = Duration::from_secs(2);
/// How long a disk that is being let go of is waited for at the end.
const PARTING: Duration = Duration::from_secs(25);
/// How long a disk that is being opened holds up all else.
const PATIENCE: Duration = Duration::from_secs(3);
const NO_ANSWER: &str = "it does not answer; it is lent as soon as it does";
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
    /// A disk that did not answer at once has been opened, or why not; what it is called.
    Opened(String, Box<Wanted>, anyhow::Result<Box<Share>>),
}

/// Lends in clear to everybody, until SIGINT or SIGTERM; then everything is withdrawn in order.
///
/// # Errors
/// Nothing can be lent at all, or a disk was not let go of in order.
pub fn run(options: &Options) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let ended = runtime.block_on(follow(options, Seat::default()));
    runtime.shutdown_background();
    ended
}

pub(super) async fn follow(options: &Options, mut seat: Seat) -> anyhow::Result<()> {
    // Before anyone is told that it runs, so that a signal never finds it unprepared.
    let mut ended = Signals::new()?;
    let (tell, mut events) = mpsc::unbounded_channel();
    watch(&tell)?;
    let mut lender = Lender::new(options, tell)?;
    lender.numbered = seat.keys.is_some();
    say::loudly(WARNING);
    let served = serve(&mut lender, &mut events, &mut ended, &mut seat).await;
    say(format_args!("taking all disks back"));
    // For all of them: events go on coming.
    let parted = tokio::time::Instant::now() + PARTING;
    while !(lender.closing.is_empty() && lender.opening.is_empty()) {
        match tokio::time::timeout_at(parted, events.recv()).await {
            Ok(Some(event)) => lender.hear(event),
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
    seat: &mut Seat,
) -> anyhow::Result<()> {
    lender.reconcile()?;
    let mut look = tokio::time::interval(LOOK);
    loop {
        tokio::select! {
            () = ended.any() => return Ok(()),
            _ = look.tick() => lender.look()?,
            key = seat.key() => match seat.sure.press(key, Instant::now(), lender) {
                Press::End => return Ok(()),
                Press::Done(words) | Press::Warned(words) => {
                    say(words);
                    lender.reconcile()?;
                }
                Press::Nothing => {}
            },
            Some(event) = events.recv() => {
                lender.hear(event);
                tokio::time::sleep(SETTLE).await;
                while let Ok(event) = events.try_recv() {
                    lender.hear(event);
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
    chosen: Chosen,
    machine: String,
    catalog: Arc<Catalog>,
    server: Arc<Server>,
    shelf: Option<Arc<Shelf>>,
    /// Who may write what.
    grants: Grants,
    /// By their names.
    shares: BTreeMap<String, Share>,
    /// Names of those that are being let go of.
    closing: BTreeSet<String>,
    /// Those that do not answer, and are still being opened, by their names.
    opening: BTreeMap<String, Source>,
    /// Names of those that the person at the machine has taken back.
    withheld: BTreeSet<String>,
    /// Keys take disks back: the listing says which.
    numbered: bool,
    left_out: Vec<LeftOut>,
    /// What could not be lent, and why: not tried again until it changes, or what uses it.
    failed: Vec<(Wanted, String)>,
    tell: mpsc::UnboundedSender<Event>,
    shown: String,
    who: BTreeMap<Who, usize>,
    stats: BTreeMap<String, Stats>,
    /// What was not let go of in order.
    broken: Option<anyhow::Error>,
    /// Where the kernel serves, too; until all that has been taken back.
    _alone: Option<Alone>,
}

impl<'a> Lender<'a> {
    fn new(options: &'a Options, tell: mpsc::UnboundedSender<Event>) -> anyhow::Result<Self> {
        let root = Path::new("/");
        let (chosen, grants) = look_up(options)?;
        let catalog = Arc::new(Catalog::default());
        let limits = Limits {
            connections: CONNECTIONS,
            // Whoever was switched off while writing keeps others out no longer.
            peer_timeout: GRACE,
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
        // Last: from here on what an earlier process has left is taken away.
        let (alone, shelf) = match options.no_nvme {
            true => (None, None),
            false => opened_shelf()?,
        };
        Ok(Self {
            options,
            grants,
            chosen,
            machine: machine(&Tree::new(root)),
            catalog,
            server: Arc::new(server),
            shelf: shelf.map(Arc::new),
            _alone: alone,
            shares: BTreeMap::new(),
            closing: BTreeSet::new(),
            opening: BTreeMap::new(),
            withheld: BTreeSet::new(),
            numbered: false,
            left_out: Vec::new(),
            failed: Vec::new(),
            tell,
            shown: String::new(),
            who: BTreeMap::new(),
            stats: BTreeMap::new(),
            broken: None,
        })
    }

    /// Takes back what has gone, lends what has come, and shows it.
    fn reconcile(&mut self) -> anyhow::Result<()> {
        let root = Path::new("/");
        let survey = look(root, &mut self.grants, &mut self.chosen)?;
        let (wanted, mut left_out) = wanted(self.options, &self.chosen, &survey);
        let gone = self.shares.iter().filter_map(|(name, share)| {
            let mut sources = wanted.iter().map(|want| &want.source);
            let now = sources.find(|source| source.still_serves(&share.source));
            let mode = mode(self.options, &self.grants, now.unwrap_or(&share.source));
            Some((name.clone(), why_not_so(share, now.is_some(), &mode)?))
        });
        for (name, why) in gone.collect::<Vec<_>>() {
            say(format_args!("{name} {why}"));
            self.take_back(&name);
        }
        self.failed.retain(|(failed, _)| wanted.contains(failed));
        for want in wanted {
            let mut shares = self.shares.values_mut();
            if let Some(share) = shares.find(|share| want.source.still_serves(&share.source)) {
                (share.users, share.source) = (want.users, want.source);
            } else if let Some((_, why)) = self.failed.iter().find(|(failed, _)| *failed == want) {
                left_out.push(LeftOut {
                    device: want.source.path().display().to_string(),
                    why: why.clone(),
                });
            } else if let Some(why) = self.lend(want) {
                left_out.push(why);
            }
        }
        self.left_out = left_out;
        self.show()
    }

    /// Lends a disk; what is to be said if that fails.
    fn lend(&mut self, want: Wanted) -> Option<LeftOut> {
        let Wanted { source, users } = want.clone();
        let taken = |key: &str| {
            let hangs = self.opening.get(key);
            self.shares.contains_key(key) || hangs.is_some_and(|hangs| !source.still_serves(hangs))
        };
        let names = Names::of(&self.machine, &source, &taken);
        let name = names.key.clone();
        if self.withheld.contains(&name) || self.closing.contains(&name) {
            // Taken back; or plugged in again at once: tried again when the earlier one has been let go of.
            return None;
        }
        let left_out = |why: String| {
            let device = want.source.path().display().to_string();
            Some(LeftOut { device, why })
        };
        if self.opening.contains_key(&name) {
            return left_out(NO_ANSWER.to_owned());
        }
        let (mode, shelf) = (mode(self.options, &self.grants, &source), self.shelf.clone());
        let open = move || Share::open(source, names, mode, users, shelf.as_deref()).map(Box::new);
        let (tell, late_name, late_want) = (self.tell.clone(), name.clone(), Box::new(want.clone()));
        let late = move |opened| {
            // At the end nobody may be listening any more.
            let _ = tell.send(Event::Opened(late_name, late_want, opened));
        };
        match soon_or_late(PATIENCE, open, late) {
            Ok(Some(opened)) => self.opened(want, opened),
            Ok(None) => {
                self.opening.insert(name, want.source.clone());
                left_out(NO_ANSWER.to_owned())
            }
            Err(error) => left_out(format!("no thread could be had to open it: {error}")),
        }
    }

    /// Gives an open disk out; what is to be said if it could not be opened.
    fn opened(&mut self, want: Wanted, opened: anyhow::Result<Box<Share>>) -> Option<LeftOut> {
        match opened {
            Ok(share) => {
                if let Some(export) = &share.export {
                    self.catalog.insert(Arc::clone(export));
                }
                self.shares.insert(share.names.key.clone(), *share);
                None
            }
            Err(error) => {
                let (device, why) = (want.source.path().display().to_string(), format!("{error:#}"));
                self.failed.push((want, why.clone()));
                Some(LeftOut { device, why })
            }
        }
    }

    /// Takes note of what has happened; [`Self::reconcile`] does what follows.
    fn hear(&mut self, event: Event) {
        match event {
            Event::Changed => {}
            Event::Closed(name, result) => self.closed(&name, result),
            Event::Opened(name, want, opened) => {
                self.opening.remove(&name);
                // Said with all others.
                let _ = self.opened(*want, opened);
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
            say(format_args!("{name} was not let go of in order: {error:#}"));
        }
    }

    /// Shows what is lent and who has it, if that has changed.
    fn show(&mut self) -> anyhow::Result<()> {
        let places = places().unwrap_or_else(|error| {
            // As while very many change: asked again after a moment.
            say(format_args!("{:#}", anyhow::Error::new(error)));
            let _ = self.tell.send(Event::Changed);
            Vec::new()
        });
        let mut listing = Listing::new(self.shares.values(), &self.left_out, &places, self.options.nbd_port);
        listing.add_clients(self.who.keys());
        let text = match (self.options.json, self.numbered) {
            (true, _) => listing.json() + "\n",
            (false, true) => listing.numbered(&self.withheld),
            (false, false) => listing.words(),
        };
        if text == self.shown {
            return Ok(());
        }
        let mut out = std::io::stdout().lock();
        if !self.options.json && !self.shown.is_empty() {
            writeln!(out)?;
        }
        out.write_all(text.as_bytes())?;
        if let Some(room) = Room::of_stdout().filter(|_| !self.options.json)
            && let Some(code) = qr::code(&listing.shortest(), room.below(text.lines().count()))
        {
            out.write_all(code.as_bytes())?;
        }
        out.flush()?;
        self.shown = text;
        Ok(())
    }

    /// Says who is connected and what they do.
    fn look(&mut self) -> anyhow::Result<()> {
        let now = clients::connected(&self.server, &Tree::new(Path::new("/")));
        let changes = clients::changes(&self.who, &now);
        for words in &changes {
            say(words);
        }
        self.who = now;
        for (name, share) in &self.shares {
            let now = share.stats();
            let before = self.stats.insert(name.clone(), now).unwrap_or_default();
            if let Some(words) = clients::traffic(name, before, now, LOOK.as_secs()) {
                say(words);
            }
        }
        // Nothing is heard of a disk that is unmounted.
        let used = self.failed.iter().any(|(want, _)| !want.users.is_empty());
        match (used || self.grants.waits(), changes.is_empty()) {
            (true, _) => self.reconcile(),
            (false, true) => Ok(()),
            (false, false) => self.show(),
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
                let close = move || share.close(Some(&server));
                match std::thread::Builder::new().name("let-go".to_owned()).spawn(close) {
                    Ok(thread) => threads.push((name, thread)),
                    Err(error) => result = result.and(Err(error.into())),
                }
            }
        }
        for (name, thread) in threads {
            // `close` is bounded in time.
            let closed = thread
                .join()
                .unwrap_or_else(|_| Err(anyhow::anyhow!("it was not let go of in order")));
            result = result.and(closed.with_context(|| name));
        }
        match self.shelf.take().map(Arc::into_inner) {
            None => result,
            Some(None) => result.and(Err(anyhow::anyhow!(
                "a disk that does not answer is still being opened"
            ))),
            Some(Some(mut shelf)) => {
                // A host of a disk that does not answer keeps its port.
                let close = move || shelf.close().map_err(anyhow::Error::from);
                result.and(in_time(LET_GO, "the NVMe target's port", close))
            }
        }
    }
}

/// Why a disk does not stay lent as it is, if it does not; with another mode it is lent anew when it has been let go of.
fn why_not_so(share: &Share, is_wanted: bool, mode: &Mode) -> Option<String> {
    match is_wanted {
        false => Some("has gone".to_owned()),
        true => (share.mode != *mode).then(|| format!("is taken back, and lent anew: {}", mode.words())),
    }
}

impl Lending for Lender<'_> {
    fn names(&self) -> Vec<String> {
        let all: BTreeSet<&String> = self.shares.keys().chain(&self.withheld).collect();
        all.into_iter().cloned().collect()
    }

    fn users_of(&self, disk: &str) -> usize {
        let by_nvme = self.shares.get(disk).is_some_and(Share::by_nvme);
        // Which disk a host has by NVMe the kernel does not say: it may be this one.
        let has = |name: &Option<String>| name.as_deref().map_or(by_nvme, |name| name == disk);
        self.who.keys().filter(|(name, _)| has(name)).count()
    }

    fn users(&self) -> usize {
        self.who.len()
    }

    fn withhold(&mut self, disk: &str) -> bool {
        if self.withheld.remove(disk) {
            return false;
        }
        self.withheld.insert(disk.to_owned());
        self.take_back(disk);
        true
    }
}

/// Looks at the disks that are there, and says what has become of those that were named.
pub(super) fn look(root: &Path, grants: &mut Grants, chosen: &mut Chosen) -> anyhow::Result<pick::Survey> {
    let survey = pick::survey(root)?;
    let now = Instant::now();
    let news = grants.look(&survey, now).into_iter();
    for words in news.chain(chosen.look(&survey, now)) {
        say(words);
    }
    Ok(survey)
}

#[cfg(test)]
mod tests {
    use super::super::share::Source;
    use super::*;

    #[test]
    fn what_may_not_be_written_any_more_does_not_stay_lent_for_writing() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let source = Source::File {
            path: file.path().to_owned(),
            size: 1 << 20,
        };
        let names = Names::of_file("m", "disk.img", &|_| false);
        let granted = Mode::ReadWrite { host: None };
        let share = Share::open(source, names, granted.clone(), Vec::new(), None).unwrap();
        assert_eq!(why_not_so(&share, true, &granted), None);
        assert!(why_not_so(&share, true, &Mode::ReadOnly).unwrap().contains("read-only"));
        assert!(why_not_so(&share, false, &granted).unwrap().contains("gone"));
    }
}
