//! What a session is made of, written down in memory (/run is no disk), so that it outlives this process; and the disk's
//! descriptor, which PID 1 keeps meanwhile.

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
use stiefel_sys::custody::Custody;
use stiefel_sys::wipe;

use super::End;
use super::link::Known;

/// Where the record lies in the ramdisk.
pub(super) const RECORD: &str = "/run/stiefel/session.json";

/// A session.
#[derive(Clone, Serialize, Deserialize)]
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
}

/// Where records are kept.
pub(super) struct Records {
    path: PathBuf,
    /// PID 1; not there in tests.
    custody: Option<Custody>,
    /// The exit status that tells PID 1 of an end.
    status: fn(End) -> u8,
    /// What was written last.
    last: Mutex<Option<Record>>,
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

    /// Has the open disk kept while the session lasts.
    pub(super) fn hold(&self, device: BorrowedFd<'_>) -> anyhow::Result<()> {
        match &self.custody {
            Some(custody) => custody
                .hold(device)
                .context("the ramdisk's first process does not answer"),
            None => Ok(()),
        }
    }

    /// Writes the session down.
    pub(super) fn write(&self, record: Record) -> anyhow::Result<()> {
        let json = secret_json(&record)?;
        let mut last = self.last();
        self.put(&self.path, &json.0)?;
        *last = Some(record);
        Ok(())
    }

    /// Writes down what has changed, if there is a session.
    pub(super) fn update(&self, change: impl FnOnce(&mut Record)) {
        let record = self.last().clone();
        if let Some(mut record) = record {
            change(&mut record);
            // Without it a server that is killed goes on less well.
            let _ = self.write(record);
        }
    }

    fn last(&self) -> MutexGuard<'_, Option<Record>> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that the disk has lost data: no later process may write on as if nothing had happened.
    pub(super) fn note_failure(&self, why: &str) {
        // Without it the session still ends badly in this process.
        let _ = self.put(&self.failure(), why.as_bytes());
    }

    /// What [`Records::note_failure`] noted.
    pub(super) fn failed(&self) -> Option<String> {
        std::fs::read_to_string(self.failure()).ok()
    }

    fn failure(&self) -> PathBuf {
        self.path.with_extension("failed")
    }

    fn put(&self, path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
        let failed = || format!("cannot write {}", path.display());
        let beside = path.with_extension("new");
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

    /// The session that an earlier process has left, with the open disk.
    pub(super) fn read(&self) -> anyhow::Result<Option<(Record, File)>> {
        let json = match std::fs::read(&self.path) {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                // It was killed between two steps of a beginning or an end: no desktop has that disk, and open it could not
                // be given to another.
                self.release()?;
                return Ok(None);
            }
            read => SecretBytes(read.context("the session's record cannot be read")?),
        };
        let record: Record = serde_json::from_slice(&json.0).context("the session's record is not understood")?;
        *self.last() = Some(record.clone());
        let custody = self.custody.as_ref().context("nobody has kept the disk")?;
        let device = custody.fetch().context("the ramdisk's first process does not answer")?;
        Ok(Some((record, device.context("the disk was not kept")?.into())))
    }

    /// Forgets the session, and has the disk closed. In this order: a record says that the disk is kept.
    pub(super) fn clear(&self) -> anyhow::Result<()> {
        *self.last() = None;
        for path in [&self.failure(), &self.path] {
            match wipe::file(path) {
                Err(error) if error.kind() != ErrorKind::NotFound => return Err(error).context("cannot wipe a record"),
                _ => {}
            }
        }
        self.release()
    }

    fn release(&self) -> anyhow::Result<()> {
        match &self.custody {
            Some(custody) => custody.release().context("the ramdisk's first process does not answer"),
            None => Ok(()),
        }
    }

    /// Tells PID 1 how the laptop's turn will end, whatever becomes of this process.
    pub(super) fn verdict(&self, end: End) -> anyhow::Result<()> {
        match &self.custody {
            Some(custody) => custody
                .verdict((self.status)(end))
                .context("the ramdisk's first process does not answer"),
            None => Ok(()),
        }
    }
}
