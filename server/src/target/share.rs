//! One disk as it is lent: the NBD server's export, and the kernel's NVMe subsystem where it has one.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context;
use stiefel_sys::block::{self, Disk};
use stiefel_sys::nvmet::{Item, Namespace, Published, Shelf};
use stiefel_sys::shield::Shield;

use super::clients;
use super::late::soon_or_late;
use super::names::Names;
use crate::nbd::{Export, ExportOptions, Server, Stats, Upper, open_base, open_guest};
use crate::tree::Tree;

/// How long a disk may take to be let go of, each by NBD and by NVMe.
pub(super) const LET_GO: Duration = Duration::from_secs(20);

/// What may be done with a disk.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case", tag = "kind")]
pub(super) enum Mode {
    /// Nobody can write, and nobody can change that.
    ReadOnly,
    /// One initiator may write. `host`: the NQN of the only host, by NVMe and not by NBD; else by NBD and not by NVMe, for
    /// two doors would be two writers.
    ReadWrite { host: Option<String> },
    /// Writes go to memory and are gone at the end; by NBD only.
    Snapshot,
}

impl Mode {
    pub(super) const fn words(&self) -> &'static str {
        match self {
            Self::ReadOnly => "read-only",
            Self::ReadWrite { .. } => "READ-WRITE",
            Self::Snapshot => "snapshot, writes are thrown away",
        }
    }

    pub(super) const fn by_nbd(&self) -> bool {
        !matches!(self, Self::ReadWrite { host: Some(_) })
    }

    const fn by_nvme(&self) -> bool {
        matches!(self, Self::ReadOnly | Self::ReadWrite { host: Some(_) })
    }
}

/// What is lent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Source {
    Disk(Disk),
    File { path: PathBuf, size: u64 },
}

impl Source {
    pub(super) fn path(&self) -> &Path {
        match self {
            Self::Disk(disk) => &disk.path,
            Self::File { path, .. } => path,
        }
    }

    /// `None` for a file.
    pub(super) const fn disk(&self) -> Option<&Disk> {
        match self {
            Self::Disk(disk) => Some(disk),
            Self::File { .. } => None,
        }
    }

    /// Whether this is what `earlier` was, though something about it may have changed: a disk that was not unplugged.
    pub(super) fn is_still(&self, earlier: &Self) -> bool {
        match (self, earlier) {
            (Self::Disk(disk), Self::Disk(earlier)) => {
                let numbered = disk.sequence.is_some() && disk.sequence == earlier.sequence;
                (numbered && disk.name == earlier.name) || disk == earlier
            }
            (Self::File { path, .. }, Self::File { path: earlier, .. }) => path == earlier,
            _ => false,
        }
    }

    /// Whether who has `earlier` can go on with it: it is still that, and not of another size. Rules of the system change other things
    /// about a disk at any time (whether it turns, how it is read ahead).
    pub(super) fn still_serves(&self, earlier: &Self) -> bool {
        self.is_still(earlier) && (self.size(), self.block_size()) == (earlier.size(), earlier.block_size())
    }

    pub(super) fn size(&self) -> u64 {
        match self {
            Self::Disk(disk) => disk.size,
            Self::File { size, .. } => *size,
        }
    }

    pub(super) fn block_size(&self) -> u32 {
        match self {
            Self::Disk(disk) => disk.logical_block_size,
            Self::File { .. } => 512,
        }
    }
}

/// A disk that is lent.
pub(super) struct Share {
    pub(super) names: Names,
    pub(super) source: Source,
    pub(super) mode: Mode,
    /// What else uses it, in words.
    pub(super) users: Vec<String>,
    /// `None`: by NVMe only.
    pub(super) export: Option<Arc<Export>>,
    /// What a snapshot's writes may take.
    _memory: Option<Promise>,
    nvme: Option<Nvme>,
    /// Why there is no NVMe, in words.
    pub(super) no_nvme: Option<String>,
    /// Exclusive, for a disk that the kernel writes.
    _hold: Option<File>,
    /// A port of its own; removed after what is on it.
    port: Option<Shelf>,
}

/// What the kernel serves; taken back when dropped. The fields go in this order: a shield stays while it is in use.
struct Nvme {
    published: Published,
    shield: Option<Shield>,
    /// The kernel's name of the device that is published, and what had been done on it before.
    device: String,
    before: Stats,
}

impl Nvme {
    /// Takes it back; it may hang with its disk. May be called again after an error.
    fn withdraw(&mut self) -> anyhow::Result<()> {
        self.published.withdraw()?;
        match &mut self.shield {
            Some(shield) => Ok(shield.lower()?),
            None => Ok(()),
        }
    }
}

impl Drop for Nvme {
    fn drop(&mut self) {
        // The kernel would serve it as long as it runs. Nothing is left to do after `Share::close`.
        let _ = self.withdraw();
    }
}

impl Share {
    /// Opens it. `shelf` is the kernel's target, `None` without one.
    pub(super) fn open(
        source: Source,
        names: Names,
        mode: Mode,
        users: Vec<String>,
        shelf: Option<&Shelf>,
    ) -> anyhow::Result<Self> {
        if mode != Mode::ReadOnly && !users.is_empty() {
            anyhow::bail!(
                "{} is in use ({}): it can only be read; unmount it first",
                source.path().display(),
                users.join(", ")
            );
        }
        let hold = match (&mode, &source) {
            (Mode::ReadWrite { host: Some(_) }, Source::Disk(disk)) => {
                let held = block::open_exclusive(&disk.path, true);
                Some(held.with_context(|| format!("cannot have {} alone", disk.path.display()))?)
            }
            (Mode::ReadWrite { host: Some(_) }, Source::File { path, .. }) => {
                anyhow::bail!(
                    "{} is a file: it can be written by NBD only, without a host's NQN",
                    path.display()
                )
            }
            _ => None,
        };
        let memory = (mode == Mode::Snapshot).then(Promise::make).transpose()?;
        let limit = memory.as_ref().map(|promise| promise.0);
        let open = || mode.by_nbd().then(|| export(&source, &names, &mode, limit)).transpose();
        let export = opened(&source, open)?;
        let mut share = Self {
            names,
            source,
            mode,
            users,
            export,
            _memory: memory,
            nvme: None,
            no_nvme: None,
            _hold: hold,
            port: None,
        };
        match (shelf, share.mode.by_nvme()) {
            (Some(shelf), true) => match share.publish(shelf) {
                Ok(nvme) => share.nvme = Some(nvme),
                // With NBD all the same; a disk that is for one host's NVMe only is not lent at all then.
                Err(error) if share.export.is_some() => share.no_nvme = Some(format!("{error:#}")),
                Err(error) => return Err(error),
            },
            (None, true) if share.export.is_none() => {
                anyhow::bail!("this kernel has no NVMe target; leave the host's NQN out and it can be written by NBD")
            }
            (_, false) => share.no_nvme = Some("writable disks without a host's NQN come by NBD only".to_owned()),
            (None, true) => {}
        }
        Ok(share)
    }

    /// Opens it for one host by NVMe alone, on a port of its own.
    pub(super) fn open_for(
        source: Source,
        names: Names,
        writable: bool,
        users: Vec<String>,
        host: &str,
        port: Shelf,
    ) -> anyhow::Result<Self> {
        let mut share = if writable {
            let host = Some(host.to_owned());
            return Self::open(source, names, Mode::ReadWrite { host }, users, Some(&port)).map(|mut share| {
                share.port = Some(port);
                share
            });
        } else {
            Self::open(source, names, Mode::ReadOnly, users, None)?
        };
        share.by_nvme_alone(|share| share.publish_to(&port, Some(host)))?;
        share.port = Some(port);
        Ok(share)
    }

    /// Publishes what is open; it is let go of only when the kernel has a descriptor of its own, so that meanwhile no other disk
    /// gets its name.
    fn by_nvme_alone(&mut self, publish: impl FnOnce(&Self) -> anyhow::Result<Nvme>) -> anyhow::Result<()> {
        self.nvme = Some(publish(self)?);
        self.export = None;
        Ok(())
    }

    fn publish(&self, shelf: &Shelf) -> anyhow::Result<Nvme> {
        let host = match &self.mode {
            Mode::ReadWrite { host } => host.as_deref(),
            _ => None,
        };
        self.publish_to(shelf, host)
    }

    fn publish_to(&self, shelf: &Shelf, host: Option<&str>) -> anyhow::Result<Nvme> {
        let shield = match self.mode {
            Mode::ReadWrite { .. } => None,
            Mode::ReadOnly | Mode::Snapshot => {
                let (path, block) = (self.source.path(), self.source.block_size());
                let raise = || Ok(Shield::raise(Path::new("/dev"), path, &self.names.key, block)?);
                Some(opened(&self.source, raise)?)
            }
        };
        let device_path = shield.as_ref().map_or(self.source.path(), Shield::path);
        let published = shelf.put(&Item {
            nqn: &self.names.nqn,
            host_nqn: host,
            model: &self.names.model,
            serial: &self.names.serial,
            namespace: Namespace {
                device_path,
                uuid: Some(&self.names.uuid),
                nguid: self.names.nguid.as_deref(),
            },
        })?;
        let device = device_path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        Ok(Nvme {
            before: done_on(&device),
            device,
            published,
            shield,
        })
    }

    /// What initiators have done so far, by NBD and NVMe together; NVMe's errors are in the kernel's log only.
    pub(super) fn stats(&self) -> Stats {
        let mut all = self.export.as_ref().map(|export| export.stats()).unwrap_or_default();
        if let Some(nvme) = &self.nvme {
            let now = done_on(&nvme.device);
            all.bytes_read += now.bytes_read.saturating_sub(nvme.before.bytes_read);
            all.bytes_written += now.bytes_written.saturating_sub(nvme.before.bytes_written);
            all.requests += now.requests.saturating_sub(nvme.before.requests);
        }
        all
    }

    /// Whether the kernel serves it, too.
    pub(super) const fn by_nvme(&self) -> bool {
        self.nvme.is_some()
    }

    /// Lets go of it in order: nobody is served any more, and all is on the medium. Bounded in time; what hangs is left behind
    /// and said.
    pub(super) fn close(self, server: Option<&Server>) -> anyhow::Result<()> {
        let mut result = Ok(());
        if let (Some(export), Some(server)) = (&self.export, server) {
            result = server.drop_export(export, LET_GO).map_err(anyhow::Error::from);
        }
        let Self {
            names,
            nvme,
            _hold: hold,
            port,
            ..
        } = self;
        if let Some(mut nvme) = nvme {
            // A disk that does not answer keeps the kernel waiting for it.
            let withdraw = move || -> anyhow::Result<()> {
                if let Err(error) = nvme.withdraw() {
                    // It may still be written from there: nobody else has it before this program ends.
                    std::mem::forget(hold);
                    return Err(error);
                }
                // First of all what was written; and whatever becomes of that, the door is shut.
                let flushed = hold.map_or(Ok(()), |hold| hold.sync_all());
                let closed = port.map_or(Ok(()), |mut port| port.close());
                flushed.context("the last flush failed")?;
                Ok(closed?)
            };
            result = result.and(in_time(LET_GO, &names.key, withdraw));
        }
        result
    }
}

/// Does something that may hang with a disk, on a thread of its own: what hangs is left behind, and said.
pub(super) fn in_time(
    limit: Duration,
    what: &str,
    work: impl FnOnce() -> anyhow::Result<()> + Send + 'static,
) -> anyhow::Result<()> {
    soon_or_late(limit, work, |_| ())?.unwrap_or_else(|| {
        Err(anyhow::anyhow!(
            "the kernel does not let go of {what}; the disk may be hanging"
        ))
    })
}

/// What was done on a block device since it is there; nothing if it has gone.
fn done_on(device: &str) -> Stats {
    let text = Tree::new(Path::new("/")).text(format!("/sys/block/{device}/stat"));
    text.ok().and_then(|text| clients::done(&text)).unwrap_or_default()
}

/// Opens something by the disk's name. What is open stays what it is; before, another disk may have got that name.
fn opened<T>(source: &Source, open: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
    let opened = open()?;
    same_disk(source)?;
    Ok(opened)
}

/// Whether the device that was just opened by its name is still the disk that was meant.
fn same_disk(source: &Source) -> anyhow::Result<()> {
    let Source::Disk(disk) = source else { return Ok(()) };
    let now = Tree::new(Path::new("/")).line(format!("/sys/block/{}/diskseq", disk.name));
    let now = now.and_then(|number| number.parse().ok());
    anyhow::ensure!(
        disk.sequence == now,
        "{} has become another disk while it was opened; plug it in again",
        disk.path.display()
    );
    Ok(())
}

/// Memory that is promised to snapshots, in bytes.
static PROMISED: Mutex<u64> = Mutex::new(0);
/// The least that a snapshot gets.
const LEAST: u64 = 16 << 20;

/// What one snapshot's writes may take, in bytes; free again when dropped. Together they may take half of the machine's memory, for
/// if that ran out, all that is lent would end.
struct Promise(u64);

impl Promise {
    fn make() -> anyhow::Result<Self> {
        let system = rustix::system::sysinfo();
        let total = (system.totalram as u64).saturating_mul(system.mem_unit.into());
        let mut promised = PROMISED.lock().unwrap_or_else(PoisonError::into_inner);
        let next = next_promise(total, *promised)
            .context("this machine's memory does not suffice for one more snapshot; take another one back")?;
        *promised += next;
        Ok(Self(next))
    }
}

impl Drop for Promise {
    fn drop(&mut self) {
        *PROMISED.lock().unwrap_or_else(PoisonError::into_inner) -= self.0;
    }
}

/// Half of what is left of the half of `total`.
fn next_promise(total: u64, promised: u64) -> Option<u64> {
    let next = (total / 2).saturating_sub(promised) / 2;
    (next >= LEAST).then_some(next)
}

fn export(source: &Source, names: &Names, mode: &Mode, memory: Option<u64>) -> anyhow::Result<Arc<Export>> {
    let block_size = match source {
        Source::Disk(disk) => Some(disk.logical_block_size),
        Source::File { .. } => None,
    };
    let options = ExportOptions {
        name: names.key.clone(),
        read_only: *mode == Mode::ReadOnly,
        description: format!("{} {}, {}", names.model, names.serial, mode.words()),
        single: *mode != Mode::ReadOnly,
        block_size,
    };
    let path = source.path();
    Ok(match mode {
        Mode::Snapshot => open_guest(&open_base(path)?, path, &Upper::Memory(memory), options)?,
        Mode::ReadOnly | Mode::ReadWrite { .. } => Export::open(path, options)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;
    use std::cell::Cell;

    #[test]
    fn a_disk_of_which_little_has_changed_stays_lent() {
        let disk = |change: &dyn Fn(&mut Disk)| {
            let mut disk = Disk {
                sequence: Some(7),
                ..testing::disk("sda")
            };
            change(&mut disk);
            Source::Disk(disk)
        };
        let lent = disk(&|_| {});
        assert!(disk(&|disk| disk.rotational = true).still_serves(&lent));
        assert!(!disk(&|disk| disk.size *= 2).still_serves(&lent));
        assert!(!disk(&|disk| disk.sequence = Some(8)).still_serves(&lent));
        // Before Linux 5.15 nothing else tells it from the next one in its place.
        let old = disk(&|disk| disk.sequence = None);
        let other = |disk: &mut Disk| (disk.sequence, disk.serial) = (None, Some("other".into()));
        assert!(!disk(&other).still_serves(&old));
        let file = |size| Source::File {
            path: "/a.img".into(),
            size,
        };
        assert!(file(512).still_serves(&file(512)) && !file(1024).still_serves(&file(512)));
    }

    #[test]
    fn what_is_opened_by_the_name_of_a_disk_that_has_gone_is_let_go_of() {
        // No kernel calls a disk so.
        let gone = Disk {
            sequence: Some(7),
            ..testing::disk("no-such-disk")
        };
        let (was_opened, gone) = (Cell::new(false), Source::Disk(gone));
        let open = || {
            was_opened.set(true);
            Ok(())
        };
        let error = opened(&gone, open).unwrap_err();
        assert!(
            was_opened.get() && error.to_string().contains("another disk"),
            "{error}"
        );
        assert!(opened(&gone, || Err::<(), _>(anyhow::anyhow!("no"))).is_err());
    }

    #[test]
    fn all_snapshots_together_take_half_of_the_memory_at_most() {
        let (total, mut promised) = (8 << 30, 0);
        let mut promises = Vec::new();
        while let Some(next) = next_promise(total, promised) {
            promises.push(next);
            promised += next;
        }
        assert_eq!((promises[0], promises[1]), (2 << 30, 1 << 30));
        assert!(promises.len() >= 7 && promised <= total / 2);
        assert_eq!(next_promise(8 << 20, 0), None);
        // What one has nobody else gets meanwhile.
        let one = Promise::make().unwrap();
        assert!(*PROMISED.lock().unwrap() >= one.0);
    }

    #[test]
    fn what_hangs_is_left_behind_and_said() {
        let (hold, held) = std::sync::mpsc::channel::<()>();
        let hangs = move || Ok(held.recv()?);
        let error = in_time(Duration::from_millis(50), "sdb", hangs).unwrap_err();
        assert!(error.to_string().contains("let go of sdb"), "{error}");
        drop(hold);
        assert!(in_time(Duration::from_secs(60), "sdb", || Ok(())).is_ok());
        assert!(in_time(Duration::from_secs(60), "sdb", || anyhow::bail!("no")).is_err());
    }

    #[test]
    fn a_disk_stays_open_until_the_kernel_has_it() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let source = Source::File {
            path: file.path().to_owned(),
            size: 1 << 20,
        };
        let names = Names::of_file("m", "disk.img", &|_| false);
        let mut share = Share::open(source, names, Mode::ReadOnly, Vec::new(), None).unwrap();
        let open_meanwhile = Cell::new(false);
        let publish = |share: &Share| {
            open_meanwhile.set(share.export.is_some());
            anyhow::bail!("no kernel here")
        };
        assert!(share.by_nvme_alone(publish).is_err() && open_meanwhile.get());
    }
}
