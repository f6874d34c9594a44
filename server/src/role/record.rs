//! What sessions are made of, written down in memory (/run is no disk), so that they outlive this process; and the
//! descriptors of the disk and of what guests have written, which PID 1 keeps meanwhile.
//!
//! PID 1 has the disk under number 0, and a guest's memory under 1 and the session's number. It is given there before the
//! session is written down, and taken back after that is forgotten: what is written down is kept, and nothing else counts.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::net::SocketAddrV6;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::Context;
use serde::{Deserialize, Serialize};
use stiefel_shared::bundle::{ControlKey, Transport};
use stiefel_shared::handover::{SecretBytes, secret_json};
use stiefel_shared::session::SessionName;
use stiefel_sys::custody::{Custody, PLACES};
use stiefel_sys::wipe;

use super::End;
use super::link::Known;

/// Where the record lies in the ramdisk; beside it what went wrong.
pub(super) const RECORD: &str = "/run/stiefel/session.json";

/// PID 1's number for the disk.
const DISK: u8 = 0;
/// What is wrong when PID 1 does not do what it is asked for.
const SILENT: &str = "the ramdisk's first process does not answer";

/// A session.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Record {
    pub(super) session: String,
    pub(super) key: String,
    pub(super) machine: String,
    pub(super) peer: SocketAddrV6,
    pub(super) control: ControlKey,
    pub(super) transport: Transport,
    pub(super) link: Known,
    /// The number of a sign of life that was heard; later ones count.
    pub(super) beat: u64,
    /// The session's own number.
    pub(super) place: u8,
    /// How many bytes of memory a guest's writes may take.
    pub(super) memory: Option<u64>,
}

/// Where records are kept.
pub(super) struct Records {
    path: PathBuf,
    /// PID 1; not there in tests.
    custody: Option<Custody>,
    /// The exit status that tells PID 1 of an end.
    status: fn(End) -> u8,
    /// What was written last.
    last: Mutex<Vec<Record>>,
}

impl Records {
    pub(super) fn new(path: &Path, custody: Option<Custody>, status: fn(End) -> u8) -> Self {
        Self {
            path: path.to_owned(),
            custody,
            status,
            last: Mutex::default(),
        }
    }

    /// Has the open disk kept while sessions last.
    pub(super) fn hold_disk(&self, device: BorrowedFd<'_>) -> anyhow::Result<()> {
        self.ask(|custody| custody.hold(DISK, device))
    }

    /// Has the memory kept that holds what the guest with this number writes.
    pub(super) fn hold_memory(&self, place: u8, upper: BorrowedFd<'_>) -> anyhow::Result<()> {
        self.ask(|custody| custody.hold(memory(place), upper))
    }

    /// Writes a session down, beside others.
    pub(super) fn write(&self, record: Record) -> anyhow::Result<()> {
        let mut last = self.last();
        let mut records = last.clone();
        records.retain(|known| known.session != record.session);
        records.push(record);
        self.put_all(&records)?;
        *last = records;
        Ok(())
    }

    /// Writes down what has changed, if there is such a session.
    pub(super) fn update(&self, session: SessionName, change: impl FnOnce(&mut Record)) {
        let session = session.to_string();
        let mut last = self.last();
        if let Some(record) = last.iter_mut().find(|record| record.session == session) {
            change(record);
            // Without it a server that is killed goes on less well.
            let _ = self.put_all(&last);
        }
    }

    fn put_all(&self, records: &[Record]) -> anyhow::Result<()> {
        self.put(&self.path, &secret_json(&records)?.0)
    }

    fn last(&self) -> MutexGuard<'_, Vec<Record>> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that a session has lost data: no later process may write on as if nothing had happened.
    pub(super) fn note_failure(&self, session: SessionName, why: &str) {
        // Without it the session still ends badly in this process.
        let _ = self.put(&self.failure(&session.to_string()), why.as_bytes());
    }

    /// What [`Records::note_failure`] noted.
    pub(super) fn failed(&self, session: SessionName) -> Option<String> {
        std::fs::read_to_string(self.failure(&session.to_string())).ok()
    }

    fn failure(&self, session: &str) -> PathBuf {
        self.path.with_extension(format!("failed-{session}"))
    }

    fn put(&self, path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
        let failed = || format!("cannot write {}", path.display());
        let beside = path.with_added_extension("new");
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).with_context(failed)?;
        }
        File::options()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&beside)
            .and_then(|mut file| file.write_all(bytes))
            .and_then(|()| std::fs::rename(&beside, path))
            .with_context(failed)
    }

    /// The sessions that an earlier process has left. What PID 1 keeps besides is closed: it was killed between two steps of
    /// a beginning or an end, no desktop has that, and open it could not be given to another.
    pub(super) fn read(&self) -> anyhow::Result<Vec<Record>> {
        let records: Vec<Record> = match std::fs::read(&self.path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Vec::new(),
            read => {
                let json = SecretBytes(read.context("the sessions' record cannot be read")?);
                serde_json::from_slice(&json.0).context("the sessions' record is not understood")?
            }
        };
        let guests = records.iter().filter(|record| record.memory.is_some());
        let mut kept: Vec<u8> = guests.map(|record| memory(record.place)).collect();
        if !records.is_empty() {
            kept.push(DISK);
        }
        for place in (0..PLACES).filter(|place| !kept.contains(place)) {
            self.ask(|custody| custody.release(place))?;
        }
        *self.last() = records.clone();
        Ok(records)
    }

    /// The open disk that an earlier process has left.
    pub(super) fn disk(&self) -> anyhow::Result<File> {
        self.fetch(DISK)?.context("the disk was not kept")
    }

    /// What the guest with this number has written.
    pub(super) fn memory(&self, place: u8) -> anyhow::Result<File> {
        self.fetch(memory(place))?
            .context("what the guest has written was not kept")
    }

    fn fetch(&self, place: u8) -> anyhow::Result<Option<File>> {
        let custody = self.custody.as_ref().context("nobody has kept anything")?;
        let fetched = custody.fetch(place).context(SILENT)?;
        Ok(fetched.map(File::from))
    }

    /// Forgets a session, and has closed what was kept for it alone. In this order: a record says that it is kept.
    pub(super) fn forget(&self, session: SessionName, place: u8) -> anyhow::Result<()> {
        let session = session.to_string();
        let left = {
            let mut last = self.last();
            last.retain(|record| record.session != session);
            if !last.is_empty() {
                self.put_all(&last)?;
            }
            last.len()
        };
        let over = (left == 0).then(|| self.path.clone());
        for path in [Some(self.failure(&session)), over].into_iter().flatten() {
            match wipe::file(&path) {
                Err(error) if error.kind() != ErrorKind::NotFound => return Err(error).context("cannot wipe a record"),
                _ => {}
            }
        }
        self.ask(|custody| custody.release(memory(place)))?;
        if left == 0 {
            self.ask(|custody| custody.release(DISK))?;
        }
        Ok(())
    }

    fn ask(&self, request: impl FnOnce(&Custody) -> std::io::Result<()>) -> anyhow::Result<()> {
        match &self.custody {
            Some(custody) => request(custody).context(SILENT),
            None => Ok(()),
        }
    }

    /// Tells PID 1 how the laptop's turn will end, whatever becomes of this process.
    pub(super) fn verdict(&self, end: End) -> anyhow::Result<()> {
        self.ask(|custody| custody.verdict((self.status)(end)))
    }
}

/// PID 1's number for what the guest with this number writes.
const fn memory(place: u8) -> u8 {
    DISK + 1 + place
}
