//! Lending to the holders of a key: who asks, in a session's handshake, gets the list of disks, and a tunnel for each disk.
//!
//! Counterpart: `client::borrow`. Nothing is seen of the disks without a key: discovery does not answer, and the NBD server
//! closes every connection that does not come out of a loan's tunnel. A loan ends by the borrower's goodbye, when its disk
//! goes, when nothing has come through its tunnel for [`GRACE`], or when its borrower, silent, asks for the disk anew.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use stiefel_shared::bundle::{ControlKey, DISK_PORT, DiskOffer, LinkOffer, NVME_PORT, Transport};
use stiefel_shared::handover::DiskIdentity;
use stiefel_shared::lend::{Lent, Loan};
use stiefel_shared::seal;
use stiefel_shared::session::{MachineId, SessionName};
use stiefel_sys::block;
use stiefel_sys::netns::Namespace;
use stiefel_sys::nvmet::{CONFIGFS, NQN_PREFIX, Port, Shelf};

use super::clients;
use super::described::{cut, describe, fitting};
use super::heard::{GRACE, Heard, News};
use super::names::Names;
use super::parts::Parts;
use super::role::Lending;
use super::say::say;
use super::share::{Mode, Share, Source};
use super::tunnel::Tunnel;
use super::work::{Begun, Work};
use crate::http::Begin;
use crate::nbd::{Export, Gate, Listed, Server, Stats};
use crate::role::disk::uuid;

/// Loans at the same time.
const MAX_LOANS: usize = 32;
/// How long the end waits for loans that were being opened or ended.
const PARTING: Duration = Duration::from_secs(25);

/// A disk that may be borrowed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct OnOffer {
    pub(super) source: Source,
    pub(super) names: Names,
    pub(super) mode: Mode,
    pub(super) users: Vec<String>,
}

impl OnOffer {
    /// Whether this can stay lent: it is the same disk, and if it is really written, that is still granted.
    fn allows(&self, share: &Share) -> bool {
        let writes = |mode: &Mode| matches!(mode, Mode::ReadWrite { .. });
        self.source.still_serves(&share.source) && (writes(&self.mode) || !writes(&share.mode))
    }
}

/// A disk that is lent to somebody.
struct LoanState {
    disk: String,
    borrower: String,
    /// The borrower's key and machine.
    asked_by: (String, MachineId),
    client: Ipv6Addr,
    export: Option<Arc<Export>>,
    writable: bool,
    share: Share,
    tunnel: Tunnel,
    /// When something came through the tunnel last.
    heard: Heard,
    /// What it had done when that was said last.
    told: Stats,
}

#[derive(Default)]
struct State {
    disks: BTreeMap<String, OnOffer>,
    /// Disks that the person at the machine has taken back, by their names: a disk keeps its own while it is there, and is still
    /// taken back when it is plugged in again.
    withheld: BTreeSet<String>,
    loans: BTreeMap<String, LoanState>,
    /// Loans that did not end in order, and why: the last [`MAX_LOANS`]. Who asks again is not to be told that all is well.
    broken: VecDeque<(String, String)>,
    /// Nothing is lent any more.
    ended: bool,
}

impl State {
    /// Remembers a loan that did not end in order.
    fn remember(&mut self, name: &str, why: Option<&anyhow::Error>) {
        let Some(why) = why else { return };
        self.broken.push_back((name.to_owned(), format!("{why:#}")));
        if self.broken.len() > MAX_LOANS {
            self.broken.pop_front();
        }
    }

    fn has_room(&self) -> bool {
        self.loans.len() < MAX_LOANS
    }

    /// Whether who has the disk leaves room for one more: a writer is alone.
    fn admits(&self, disk: &str, read_write: bool) -> bool {
        let mut others = self.loans.values().filter(|loan| loan.disk == disk);
        others.all(|other| !other.writable && !read_write)
    }
}

/// Who decides about loans.
pub(super) struct Desk {
    state: Arc<Mutex<State>>,
    /// Loans that are being opened, and those that are being ended.
    work: Arc<Work>,
    hostname: String,
    nvme: bool,
    parts: Parts,
    server: Mutex<Weak<Server>>,
    next_port: AtomicU16,
}

impl Desk {
    /// `nvme`: the kernel has an NVMe target.
    pub(super) fn new(hostname: String, nvme: bool) -> Self {
        Self {
            state: Arc::default(),
            work: Arc::default(),
            hostname,
            nvme,
            // What cannot be read is only not shown.
            parts: Parts::new(|disk| block::contents(Path::new("/sys"), disk).unwrap_or_default()),
            server: Mutex::default(),
            next_port: AtomicU16::new(20000),
        }
    }

    /// The NBD server, which has this as its gate.
    pub(super) fn serve_by(&self, server: &Arc<Server>) {
        *self.server.lock().unwrap_or_else(PoisonError::into_inner) = Arc::downgrade(server);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// What may be borrowed from now on; loans of what has gone end.
    pub(super) fn offer(&self, disks: Vec<OnOffer>) {
        let gone = {
            let mut state = self.lock();
            state.disks = disks.into_iter().map(|disk| (disk.names.key.clone(), disk)).collect();
            let State { disks, loans, .. } = &mut *state;
            let stays = |loan: &LoanState| disks.get(&loan.disk).is_some_and(|disk| disk.allows(&loan.share));
            let names: Vec<String> = loans
                .iter()
                .filter(|(_, loan)| !stays(loan))
                .map(|(name, _)| name.clone())
                .collect();
            names
        };
        for name in gone {
            self.end_aside(&name, "its disk has gone, or must not be written any more");
        }
    }

    /// Whether a disk was taken back.
    pub(super) fn is_withheld(&self, disk: &str) -> bool {
        self.lock().withheld.contains(disk)
    }

    /// Looks from whom something has come, and ends the loans from which nothing has for too long.
    pub(super) fn look(&self, now: Instant) {
        let mut over = Vec::new();
        for (name, loan) in &mut self.lock().loans {
            let (disk, borrower) = (&loan.disk, &loan.borrower);
            match loan.heard.look(loan.tunnel.received(), now) {
                Some(News::Silent) => say(format_args!("{disk}: nothing comes from {borrower} any more")),
                Some(News::Back) => say(format_args!("{disk}: {borrower} is back")),
                None => {}
            }
            if loan.heard.is_over(now) {
                over.push(name.clone());
            }
        }
        for name in over {
            self.end_aside(&name, "nothing has come from its borrower for too long");
        }
    }

    /// Who has what, in words: the disk's name, and the rest.
    pub(super) fn borrowers(&self) -> Vec<(String, String)> {
        let words = |loan: &LoanState| {
            let how = if loan.writable { "READ-WRITE" } else { "read-only" };
            let silent = if loan.heard.is_silent() { ", silent" } else { "" };
            (loan.disk.clone(), format!("lent to {}, {how}{silent}", loan.borrower))
        };
        self.lock().loans.values().map(words).collect()
    }

    /// What borrowers did since this was asked last, `seconds` ago.
    pub(super) fn traffic(&self, seconds: u64) -> Vec<String> {
        let told = |loan: &mut LoanState| {
            let now = loan.share.stats();
            let before = std::mem::replace(&mut loan.told, now);
            let name = format!("{} for {}", loan.disk, loan.borrower);
            clients::traffic(&name, before, now, seconds)
        };
        self.lock().loans.values_mut().filter_map(told).collect()
    }

    /// Ends a loan on a thread of its own: its disk may hang.
    fn end_aside(&self, name: &str, why: &str) {
        let Some(loan) = self.lock().loans.remove(name) else {
            return;
        };
        let server = self.server.lock().unwrap_or_else(PoisonError::into_inner).upgrade();
        let (disk, why, begun) = (loan.disk.clone(), why.to_owned(), self.work.begin());
        let (name, state) = (name.to_owned(), Arc::clone(&self.state));
        let end = move || {
            let closed = close(loan, server.as_deref());
            lock(&state).remember(&name, closed.as_ref().err());
            match closed {
                Ok(()) => say(format_args!("the loan of {disk} is over: {why}")),
                Err(error) => say(format_args!(
                    "the loan of {disk} is over ({why}), not in order: {error:#}"
                )),
            }
            drop(begun);
        };
        // Without a thread the loan is dropped with the closure, which closes all but in order.
        let _ = std::thread::Builder::new().name("let-go".to_owned()).spawn(end);
    }

    /// Ends a loan in order; `false` if there is none of that name.
    ///
    /// # Errors
    /// It did not end in order, now or earlier.
    pub(super) fn end(&self, name: &str) -> anyhow::Result<bool> {
        let begun = self.work.begin();
        let loan = self.lock().loans.remove(name);
        let server = self.server.lock().unwrap_or_else(PoisonError::into_inner).upgrade();
        let Some(loan) = loan else {
            // It may be ended at this moment.
            drop(begun);
            self.work.wait(PARTING);
            let state = self.lock();
            let why = state.broken.iter().find(|(known, _)| known == name);
            return why.map_or(Ok(false), |(_, why)| anyhow::bail!("{why}"));
        };
        let (disk, borrower) = (loan.disk.clone(), loan.borrower.clone());
        let closed = close(loan, server.as_deref());
        self.lock().remember(name, closed.as_ref().err());
        closed?;
        say(format_args!("the loan of {disk} to {borrower} is over"));
        Ok(true)
    }

    /// Ends all, at once, and waits for what had begun before: what is published when the program ends stays so.
    pub(super) fn close(&self) -> anyhow::Result<()> {
        let loans = {
            let mut state = self.lock();
            state.ended = true;
            std::mem::take(&mut state.loans)
        };
        let mut result = Ok(());
        let mut threads = Vec::new();
        for loan in loans.into_values() {
            let server = self.server.lock().unwrap_or_else(PoisonError::into_inner).upgrade();
            let end = move || close(loan, server.as_deref());
            // Each, whatever becomes of the others.
            match std::thread::Builder::new().name("let-go".to_owned()).spawn(end) {
                Ok(thread) => threads.push(thread),
                Err(error) => result = result.and(Err(error.into())),
            }
        }
        for thread in threads {
            let closed = thread.join();
            result = result.and(closed.unwrap_or_else(|_| anyhow::bail!("a loan did not end in order")));
        }
        anyhow::ensure!(
            self.work.wait(PARTING),
            "a loan that was being opened or ended hangs; its disk may still be in use"
        );
        result
    }

    /// What may be borrowed, for who asks.
    pub(super) fn list(&self) -> Loan {
        let state = self.lock();
        let (disks, loans): (Vec<OnOffer>, Vec<(String, String)>) = (
            state
                .disks
                .values()
                .filter(|disk| !state.withheld.contains(&disk.names.key))
                .cloned()
                .collect(),
            state
                .loans
                .values()
                .map(|loan| (loan.disk.clone(), loan.borrower.clone()))
                .collect(),
        );
        drop(state);
        let seen = self
            .parts
            .look(&disks.iter().filter_map(|disk| disk.source.disk()).collect::<Vec<_>>());
        let mut seen = seen.into_iter();
        let infos = disks.iter().map(|disk| {
            let parts = match disk.source.disk() {
                Some(_) => seen.next().flatten(),
                None => Some(Vec::new()),
            };
            let mut info = describe(disk, parts);
            let borrowers = loans.iter().filter(|(name, _)| *name == info.name);
            info.users
                .extend(borrowers.map(|(_, borrower)| cut(&format!("lent to {borrower}"))));
            info
        });
        fitting(infos.collect())
    }

    /// Lends a disk to who asks.
    pub(super) fn attach(&self, begin: &Begin, disk: &str, read_write: bool, nvme: bool) -> anyhow::Result<Loan> {
        let _begun = self.begin()?;
        let asked_by = (begin.key.clone(), begin.machine);
        self.end_earlier(disk, &asked_by)?;
        let on_offer = self.free(disk, read_write)?;
        let session = begin.session.to_string();
        let (tunnel, link, share, transport) = self.open(&on_offer, &session, read_write, nvme)?;
        let control = ControlKey::generate()?;
        let lent = Lent {
            hostname: self.hostname.clone(),
            disk: DiskOffer {
                guest: false,
                identity: identity(&on_offer),
                logical_block_size: on_offer.source.block_size(),
                transport,
            },
            link: link.clone(),
            writable: read_write,
            control,
            session: session.clone(),
        };
        let borrower = format!("{} (key {})", begin.peer.ip(), begin.key);
        let loan = LoanState {
            disk: disk.to_owned(),
            borrower: borrower.clone(),
            asked_by,
            client: link.address,
            export: share.export.clone(),
            writable: read_write,
            share,
            tunnel,
            heard: Heard::new(Instant::now()),
            told: Stats::default(),
        };
        self.enter(session, loan)?;
        let mode = if read_write { "READ-WRITE" } else { "read-only" };
        say(format_args!("{disk} is lent to {borrower}, {mode}"));
        Ok(Loan::Attached(Box::new(lent)))
    }

    /// Begins to open a loan, unless that is over.
    fn begin(&self) -> anyhow::Result<Begun> {
        let state = self.lock();
        anyhow::ensure!(!state.ended, "this machine lends nothing any more");
        Ok(self.work.begin())
    }

    /// Ends what a machine had of this disk before it was started anew: nothing comes from there any more, and it asks again.
    fn end_earlier(&self, disk: &str, asked_by: &(String, MachineId)) -> anyhow::Result<()> {
        let earlier: Vec<String> = {
            let state = self.lock();
            let earlier = |loan: &LoanState| loan.disk == disk && loan.asked_by == *asked_by && loan.heard.is_silent();
            let loans = state.loans.iter().filter(|(_, loan)| earlier(loan));
            loans.map(|(name, _)| name.clone()).collect()
        };
        for name in earlier {
            self.end(&name)?;
        }
        Ok(())
    }

    /// A disk that can be lent so now.
    fn free(&self, disk: &str, read_write: bool) -> anyhow::Result<OnOffer> {
        let state = self.lock();
        anyhow::ensure!(state.has_room(), "too many disks are lent already; detach one");
        let on_offer = state.disks.get(disk).filter(|_| !state.withheld.contains(disk));
        let on_offer = on_offer.ok_or_else(|| anyhow::anyhow!("there is no disk {disk}; list them again"))?;
        anyhow::ensure!(
            state.admits(disk, read_write),
            "{disk} is lent already, and one that is written is for one alone; detach it there first"
        );
        anyhow::ensure!(
            !read_write || on_offer.mode != Mode::ReadOnly,
            "{disk} is lent for reading only; whoever sits there must start `stiefel target` with --read-write {disk}"
        );
        let (size, block) = (on_offer.source.size(), on_offer.source.block_size());
        anyhow::ensure!(
            [512, 4096].contains(&block) && size > 0 && size.is_multiple_of(u64::from(block)),
            "{disk} has {size} bytes in blocks of {block}: only whole blocks of 512 or 4096 bytes are lent so"
        );
        Ok(on_offer.clone())
    }

    /// Makes a tunnel, and opens the disk for whoever is at its end.
    fn open(
        &self,
        on_offer: &OnOffer,
        session: &str,
        read_write: bool,
        nvme: bool,
    ) -> anyhow::Result<(Tunnel, LinkOffer, Share, Transport)> {
        let by_nbd_only = on_offer.mode == Mode::Snapshot || matches!(on_offer.source, Source::File { .. });
        let nvme = nvme && self.nvme && !(read_write && by_nbd_only);
        let place = match nvme {
            // Without one it comes by NBD.
            true => Namespace::new()
                .inspect_err(|error| say(format_args!("no NVMe for this loan: {error}")))
                .ok(),
            false => None,
        };
        let nvme = place.is_some();
        let (tunnel, link) = Tunnel::make(GRACE.as_secs(), place)?;
        let (share, transport) = match nvme {
            true => tunnel.inside(|| self.by_nvme(on_offer, session, read_write, &link))?,
            false => by_nbd(on_offer, read_write)?,
        };
        Ok((tunnel, link, share, transport))
    }

    /// Enters a loan, unless its disk has gone, or was lent to another, while it was opened.
    fn enter(&self, session: String, loan: LoanState) -> anyhow::Result<()> {
        let mut state = self.lock();
        let disk = &loan.disk;
        let still = state.disks.get(disk).is_some_and(|now| now.allows(&loan.share));
        let room = !state.ended && state.has_room();
        if room && still && !state.withheld.contains(disk) && state.admits(disk, loan.writable) {
            state.loans.insert(session, loan);
            return Ok(());
        }
        drop(state);
        let disk = disk.clone();
        close(loan, None)?;
        anyhow::bail!("{disk} has changed while it was opened; try again")
    }

    /// What it publishes listens in the network namespace of the calling thread.
    fn by_nvme(
        &self,
        disk: &OnOffer,
        session: &str,
        writable: bool,
        link: &LinkOffer,
    ) -> anyhow::Result<(Share, Transport)> {
        let id = self.next_port.fetch_add(1, Ordering::Relaxed);
        let port = Port {
            id,
            address: IpAddr::V6(link.laptop),
            tcp_port: NVME_PORT,
        };
        let port = Shelf::another(Path::new(CONFIGFS), &[port])?;
        let host_nqn = format!("{NQN_PREFIX}borrower.{}", SessionName::generate()?);
        // The name in the kernel's tables is the loan's, and as random.
        let mut names = disk.names.clone();
        names.nqn = format!("{}.{}", names.nqn, SessionName::generate()?);
        names.key = session.to_owned();
        let nqn = names.nqn.clone();
        let share = Share::open_for(
            disk.source.clone(),
            names,
            writable,
            writers(disk, writable),
            &host_nqn,
            port,
        )?;
        let transport = Transport::NvmeTcp {
            port: NVME_PORT,
            nqn,
            host_nqn,
            host_id: uuid(seal::random()?),
        };
        Ok((share, transport))
    }
}

/// What else uses a disk counts only against writing it.
fn writers(disk: &OnOffer, writable: bool) -> Vec<String> {
    if writable { disk.users.clone() } else { Vec::new() }
}

fn by_nbd(disk: &OnOffer, writable: bool) -> anyhow::Result<(Share, Transport)> {
    let mut names = disk.names.clone();
    names.key = SessionName::generate()?.to_string();
    let export = names.key.clone();
    let mode = match (writable, &disk.mode) {
        (true, Mode::Snapshot) => Mode::Snapshot,
        (true, _) => Mode::ReadWrite { host: None },
        (false, _) => Mode::ReadOnly,
    };
    let share = Share::open(disk.source.clone(), names, mode, writers(disk, writable), None)?;
    let port = DISK_PORT;
    Ok((share, Transport::Nbd { port, export }))
}

fn close(loan: LoanState, server: Option<&Server>) -> anyhow::Result<()> {
    let LoanState { share, tunnel, .. } = loan;
    let closed = share.close(server);
    drop(tunnel);
    closed
}

fn identity(disk: &OnOffer) -> DiskIdentity {
    let known = match &disk.source {
        Source::Disk(disk) => block::identity(disk).ok(),
        Source::File { .. } => None,
    };
    known.unwrap_or_else(|| DiskIdentity {
        gpt_guid: None,
        wwid: None,
        serial: Some(disk.names.serial.clone()),
        model: Some(disk.names.model.clone()),
        size: disk.source.size(),
    })
}

impl Lending for Arc<Desk> {
    fn names(&self) -> Vec<String> {
        self.lock().disks.keys().cloned().collect()
    }

    fn users_of(&self, disk: &str) -> usize {
        self.lock().loans.values().filter(|loan| loan.disk == disk).count()
    }

    fn users(&self) -> usize {
        self.lock().loans.len()
    }

    fn withhold(&mut self, disk: &str) -> bool {
        let loans: Vec<String> = {
            let mut state = self.lock();
            if state.withheld.remove(disk) {
                return false;
            }
            state.withheld.insert(disk.to_owned());
            let loans = state.loans.iter().filter(|(_, loan)| loan.disk == disk);
            loans.map(|(name, _)| name.clone()).collect()
        };
        for name in loans {
            self.end_aside(&name, "it was taken back at the machine");
        }
        true
    }
}

impl Gate for Desk {
    fn admit(&self, peer: SocketAddr) -> bool {
        self.lock()
            .loans
            .values()
            .any(|loan| IpAddr::V6(loan.client) == peer.ip())
    }

    fn export(&self, name: &str, peer: SocketAddr) -> Option<Arc<Export>> {
        let state = self.lock();
        let mut exports = state
            .loans
            .values()
            .filter(|loan| IpAddr::V6(loan.client) == peer.ip())
            .filter_map(|loan| loan.export.as_ref());
        exports.find(|export| export.name() == name).cloned()
    }

    fn list(&self, _peer: SocketAddr) -> Vec<Listed> {
        Vec::new()
    }
}

/// A lock that outlives a panic in another thread: the tables are plain.
fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
