//! One export: a file or block device, its counters, and the state of its flushes.

use std::fmt;
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};

use stiefel_shared::nbd::{
    BlockSizes, Extent, FLAG_CAN_MULTI_CONN, FLAG_HAS_FLAGS, FLAG_READ_ONLY, FLAG_ROTATIONAL, FLAG_SEND_CACHE,
    FLAG_SEND_FAST_ZERO, FLAG_SEND_FLUSH, FLAG_SEND_FUA, FLAG_SEND_TRIM, FLAG_SEND_WRITE_ZEROES, MAX_PAYLOAD,
    MAX_STRING,
};
use thiserror::Error;

use super::negotiate::{Offer, Offered};
use super::request::Range;
use super::storage::{Access, FileStore};
use super::store::{Store, Traits};

/// Extents in one answer; the rest is asked for again.
const MAX_EXTENTS: usize = 8192;

/// How something is exported. The name can be a session's secret, so `Debug` leaves it out.
#[derive(Clone, Default)]
pub struct ExportOptions {
    /// The canonical name; at most 4096 bytes.
    pub name: String,
    /// Nothing can be written, and the file is opened so.
    pub read_only: bool,
    /// Words for people, shown by `nbdinfo`.
    pub description: String,
    /// One connection at a time: a new one ends the earlier ones before it is granted the export, so that nothing that is
    /// still on its way through an old connection can be done after what the new one asks for.
    pub single: bool,
    /// The smallest unit of access in bytes, a power of two up to 65536. By default a device's logical block size, and 1
    /// for a file.
    pub block_size: Option<u32>,
}

impl fmt::Debug for ExportOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            name: _,
            read_only,
            description,
            single,
            block_size,
        } = self;
        f.debug_struct("ExportOptions")
            .field("read_only", read_only)
            .field("description", description)
            .field("single", single)
            .field("block_size", block_size)
            .finish_non_exhaustive()
    }
}

/// Why something cannot be exported.
#[derive(Debug, Error)]
pub enum ExportError {
    /// Opening or looking at it failed.
    #[error("cannot open {path:?} for the NBD server; check the path, the permissions, and that nothing else uses it")]
    Open {
        /// What was to be exported.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// It is a directory, a pipe or the like.
    #[error("{path:?} is neither a regular file nor a block device; name one of these")]
    WrongKind {
        /// What was to be exported.
        path: PathBuf,
    },
    /// The block size makes no sense for it.
    #[error("{path:?} cannot be exported with blocks of {block_size} bytes: {why}")]
    BlockSize {
        /// What was to be exported.
        path: PathBuf,
        /// The size asked for.
        block_size: u32,
        /// What is wrong with it.
        why: &'static str,
    },
    /// Another session has it.
    #[error(
        "{path:?} is being served already: it can be written by one, or shared by many that do not write; end the other \
         session first"
    )]
    InUse {
        /// What was to be exported.
        path: PathBuf,
    },
    /// Name or description cannot be sent.
    #[error("the NBD export's name and description must each be at most 4096 bytes without NUL; shorten them")]
    Text,
}

/// What was done on an export so far, over all connections.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    /// Bytes sent to clients.
    pub bytes_read: u64,
    /// Bytes taken from clients.
    pub bytes_written: u64,
    /// Requests answered, whether well or not.
    pub requests: u64,
    /// Requests answered with an error.
    pub errors: u64,
}

/// A file or block device that can be served. One open file description, so one page cache, for all connections.
#[derive(Debug)]
pub struct Export {
    path: PathBuf,
    store: Arc<dyn Store>,
    options: ExportOptions,
    minimum: u32,
    syncs: Mutex<Syncs>,
    synced: Condvar,
    /// A flush has failed: the same as `syncs.failure`, to be seen without its lock.
    failed: AtomicBool,
    told: OnceLock<Told>,
    bytes_read: AtomicU64,
    bytes_written: AtomicU64,
    requests: AtomicU64,
    errors: AtomicU64,
}

/// Who is told of a failed flush.
struct Told(Box<dyn Fn(&str) + Send + Sync>);

impl fmt::Debug for Told {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Told(..)")
    }
}

/// Concurrent flushes share one `fdatasync`: one that begins after the flush was asked for covers it.
#[derive(Debug, Default)]
struct Syncs {
    begun: u64,
    ended: u64,
    running: bool,
    /// The first failure, kept for ever: the kernel reports a lost write once and then forgets it.
    failure: Option<String>,
}

impl Export {
    /// Opens `path` and fixes its size. A block device is opened exclusively for writing: a mounted one is refused.
    ///
    /// # Errors
    /// See [`ExportError`].
    pub fn open(path: &Path, options: ExportOptions) -> Result<Arc<Self>, ExportError> {
        let store = FileStore::open(path, if options.read_only { Access::Read } else { Access::Write })?;
        Self::of(Arc::new(store), path, options)
    }

    /// Exports an open file or device that the caller holds (exclusively, if it may be written); `path` is only shown.
    ///
    /// # Errors
    /// See [`ExportError`].
    pub fn of_file(file: File, path: &Path, options: ExportOptions) -> Result<Arc<Self>, ExportError> {
        let store = FileStore::of(file, path)?;
        Self::of(Arc::new(store), path, options)
    }

    /// Has `told` called with the reason when a flush fails, before any client hears of it. Only the first call counts.
    pub fn on_failure(&self, told: Box<dyn Fn(&str) + Send + Sync>) {
        // A second one would be another's.
        let _ = self.told.set(Told(told));
    }

    /// Behaves as after a failed flush, as one that an earlier process has seen.
    pub fn fail(&self, why: &str) {
        let mut syncs = self.syncs.lock().unwrap_or_else(PoisonError::into_inner);
        syncs.failure.get_or_insert_with(|| why.to_owned());
        self.failed.store(true, Ordering::Release);
    }

    /// Exports any store; `path` is only shown.
    ///
    /// # Errors
    /// See [`ExportError`].
    pub fn of(store: Arc<dyn Store>, path: &Path, options: ExportOptions) -> Result<Arc<Self>, ExportError> {
        if [&options.name, &options.description]
            .iter()
            .any(|text| text.len() > MAX_STRING || text.contains('\0'))
        {
            return Err(ExportError::Text);
        }
        let minimum = minimum_block(path, store.as_ref(), options.block_size)?;
        Ok(Arc::new(Self {
            path: path.to_owned(),
            store,
            options,
            minimum,
            syncs: Mutex::default(),
            synced: Condvar::new(),
            failed: AtomicBool::new(false),
            told: OnceLock::new(),
            bytes_read: AtomicU64::new(0),
            bytes_written: AtomicU64::new(0),
            requests: AtomicU64::new(0),
            errors: AtomicU64::new(0),
        }))
    }

    /// Size in bytes, as it was when opened.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.store.size()
    }

    /// What is exported.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The canonical name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.options.name
    }

    /// Words for people.
    #[must_use]
    pub fn description(&self) -> &str {
        &self.options.description
    }

    /// Whether it is for one connection at a time.
    #[must_use]
    pub fn single(&self) -> bool {
        self.options.single
    }

    /// Whether nothing can be written.
    #[must_use]
    pub fn read_only(&self) -> bool {
        self.options.read_only
    }

    /// What was done so far.
    #[must_use]
    pub fn stats(&self) -> Stats {
        Stats {
            bytes_read: self.bytes_read.load(Ordering::Relaxed),
            bytes_written: self.bytes_written.load(Ordering::Relaxed),
            requests: self.requests.load(Ordering::Relaxed),
            errors: self.errors.load(Ordering::Relaxed),
        }
    }

    /// Counts requests that were answered well.
    pub(super) fn count_many(&self, requests: usize) {
        self.requests.fetch_add(requests as u64, Ordering::Relaxed);
    }

    pub(super) fn count(&self, ok: bool) {
        self.requests.fetch_add(1, Ordering::Relaxed);
        if !ok {
            self.errors.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Brings everything written so far onto the medium (`NBD_CMD_FLUSH`).
    ///
    /// # Errors
    /// The medium's error; after the first one every flush fails, for what was lost cannot be known.
    pub fn flush(&self) -> io::Result<()> {
        if self.options.read_only {
            return Ok(());
        }
        let mut syncs = self.syncs.lock().unwrap_or_else(PoisonError::into_inner);
        let wanted = syncs.begun + 1;
        while syncs.ended < wanted && syncs.failure.is_none() {
            if syncs.running {
                syncs = self.synced.wait(syncs).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            syncs.running = true;
            syncs.begun += 1;
            drop(syncs);
            let result = self.store.sync();
            syncs = self.syncs.lock().unwrap_or_else(PoisonError::into_inner);
            syncs.running = false;
            syncs.ended = syncs.begun;
            if let Err(error) = result {
                let why = error.to_string();
                if let Some(Told(told)) = self.told.get() {
                    told(&why);
                }
                syncs.failure.get_or_insert(why);
                self.failed.store(true, Ordering::Release);
            }
            self.synced.notify_all();
        }
        fail_for_good(&syncs)
    }

    /// Fails once a flush has failed: no more must be written onto a state that nobody knows.
    fn check(&self) -> io::Result<()> {
        if !self.failed.load(Ordering::Acquire) {
            return Ok(());
        }
        fail_for_good(&self.syncs.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether this byte is in memory.
    pub(super) fn is_at_hand(&self, offset: u64) -> bool {
        self.store.read_now(&mut [IoSliceMut::new(&mut [0])], offset) == 1
    }

    /// What came to the client past [`Export::read`].
    pub(super) fn count_read(&self, bytes: usize) {
        self.bytes_read.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// As [`Store::read_now`].
    pub(super) fn read_now(&self, parts: &mut [IoSliceMut<'_>], offset: u64) -> usize {
        let read = self.store.read_now(parts, offset);
        self.count_read(read);
        read
    }

    /// Reads what is not sent, only to see that it can be read.
    pub(super) fn try_read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.store.read(data, offset)
    }

    /// Fills `data`; an early end, as of a file that was cut meanwhile, is an error.
    pub(super) fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.store.read(data, offset)?;
        self.count_read(data.len());
        Ok(())
    }

    /// As [`Store::write_now`].
    pub(super) fn write_now(&self, parts: &[IoSlice<'_>], offset: u64) -> io::Result<usize> {
        self.check()?;
        let written = self.store.write_now(parts, offset)?;
        self.bytes_written.fetch_add(written as u64, Ordering::Relaxed);
        Ok(written)
    }

    /// As [`Store::is_slow`].
    pub(super) fn is_slow(&self) -> bool {
        self.store.is_slow()
    }

    /// The file that long reads may be sent from without passing through memory.
    pub(super) fn file(&self) -> Option<&File> {
        self.store.file()
    }

    pub(super) fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.check()?;
        self.store.write(data, offset)?;
        self.bytes_written.fetch_add(data.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    pub(super) fn trim(&self, range: Range) -> io::Result<()> {
        self.check()?;
        self.store.trim(range)
    }

    pub(super) fn zero(&self, range: Range, no_hole: bool, fast: bool) -> io::Result<()> {
        self.check()?;
        self.store.zero(range, no_hole, fast)
    }

    pub(super) fn cache(&self, range: Range) -> io::Result<()> {
        self.store.cache(range)
    }

    /// Data and holes; `one` extent, or as many as fit in an answer.
    pub(super) fn extents(&self, range: Range, one: bool) -> Vec<Extent> {
        self.extents_up_to(range, if one { 1 } else { MAX_EXTENTS })
    }

    pub(super) fn extents_up_to(&self, range: Range, most: usize) -> Vec<Extent> {
        self.store.extents(range, most)
    }
}

impl Offered for Arc<Export> {
    fn offer(&self) -> Offer {
        let mut flags = FLAG_HAS_FLAGS | FLAG_SEND_FLUSH | FLAG_SEND_FUA | FLAG_SEND_CACHE;
        if !self.options.single {
            flags |= FLAG_CAN_MULTI_CONN;
        }
        let Traits {
            discards, rotational, ..
        } = self.store.traits();
        if rotational {
            flags |= FLAG_ROTATIONAL;
        }
        if self.options.read_only {
            flags |= FLAG_READ_ONLY;
        } else {
            flags |= FLAG_SEND_WRITE_ZEROES | FLAG_SEND_FAST_ZERO;
            if discards {
                flags |= FLAG_SEND_TRIM;
            }
        }
        Offer {
            name: self.options.name.clone(),
            description: self.options.description.clone(),
            size: self.store.size(),
            flags,
            block_sizes: BlockSizes {
                minimum: self.minimum,
                preferred: self.minimum.max(4096),
                maximum: MAX_PAYLOAD,
            },
        }
    }
}

fn fail_for_good(syncs: &Syncs) -> io::Result<()> {
    match &syncs.failure {
        None => Ok(()),
        Some(failure) => Err(io::Error::other(format!(
            "a flush failed ({failure}): data were lost, nothing more is written"
        ))),
    }
}

fn minimum_block(path: &Path, store: &dyn Store, wanted: Option<u32>) -> Result<u32, ExportError> {
    let (logical, size) = (store.traits().block, store.size());
    let block_size = wanted.unwrap_or(logical);
    let refuse = |why| {
        Err(ExportError::BlockSize {
            path: path.to_owned(),
            block_size,
            why,
        })
    };
    if !block_size.is_power_of_two() || block_size > 1 << 16 {
        return refuse("it must be a power of two up to 65536");
    }
    if block_size < logical {
        return refuse("the device's own blocks are larger");
    }
    if !size.is_multiple_of(u64::from(block_size)) {
        return refuse("the size is no multiple of it; choose a smaller one");
    }
    Ok(block_size)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(len: u64) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(len).unwrap();
        file
    }

    #[test]
    fn a_failed_flush_stays_failed_and_stops_all_writing() {
        let backing = file(4096);
        let export = Export::open(backing.path(), ExportOptions::default()).unwrap();
        export.write(0, b"before").unwrap();
        export.syncs.lock().unwrap().failure = Some("Input/output error".into());
        export.failed.store(true, Ordering::Release);
        let range = Range { offset: 0, length: 512 };
        for _ in 0..2 {
            assert!(export.flush().is_err());
            assert!(export.write(0, b"after").is_err());
            assert!(export.trim(range).is_err());
            assert!(export.zero(range, false, false).is_err());
        }
        let mut data = [0; 6];
        export.read(0, &mut data).unwrap();
        assert_eq!(&data, b"before");
    }

    #[test]
    fn concurrent_flushes_all_end() {
        let backing = file(4096);
        let export = Export::open(backing.path(), ExportOptions::default()).unwrap();
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| (0..20).for_each(|_| export.flush().unwrap()));
            }
        });
        let syncs = export.syncs.lock().unwrap();
        assert!(!syncs.running && syncs.begun == syncs.ended && (20..=160).contains(&syncs.ended));
    }

    #[test]
    fn a_read_beyond_a_file_that_was_cut_is_an_error() {
        let backing = file(4096);
        let export = Export::open(backing.path(), ExportOptions::default()).unwrap();
        backing.as_file().set_len(10).unwrap();
        let error = export.read(0, &mut [0; 11]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn names_do_not_leak_into_debug_output() {
        let backing = file(4096);
        let options = ExportOptions {
            name: "secret".into(),
            ..ExportOptions::default()
        };
        assert!(!format!("{options:?}").contains("secret"));
        let export = Export::open(backing.path(), options).unwrap();
        assert!(!format!("{export:?}").contains("secret"));
    }

    #[test]
    fn what_cannot_be_exported_is_refused() {
        let options = ExportOptions::default;
        assert!(matches!(
            Export::open(Path::new("/"), options()),
            Err(ExportError::WrongKind { .. })
        ));
        assert!(matches!(
            Export::open(Path::new("/dev/null"), options()),
            Err(ExportError::WrongKind { .. })
        ));
        assert!(matches!(
            Export::open(Path::new("/nonexistent"), options()),
            Err(ExportError::Open { .. })
        ));
        let odd = file(1000);
        for block_size in [0, 3, 512, 1 << 17] {
            let refused = Export::open(
                odd.path(),
                ExportOptions {
                    block_size: Some(block_size),
                    ..options()
                },
            );
            assert!(matches!(refused, Err(ExportError::BlockSize { .. })), "{block_size}");
        }
        let name = "n".repeat(4097);
        assert!(matches!(
            Export::open(odd.path(), ExportOptions { name, ..options() }),
            Err(ExportError::Text)
        ));
        assert_eq!(Export::open(odd.path(), options()).unwrap().size(), 1000);
    }

    #[test]
    fn offers_tell_the_truth() {
        let backing = file(8192);
        let offer = Export::open(backing.path(), ExportOptions::default()).unwrap().offer();
        assert_eq!(offer.flags, 0b1101_0110_1101);
        assert_eq!(
            offer.block_sizes,
            BlockSizes {
                minimum: 1,
                preferred: 4096,
                maximum: 32 << 20
            }
        );
        let options = ExportOptions {
            read_only: true,
            block_size: Some(512),
            ..ExportOptions::default()
        };
        let offer = Export::open(backing.path(), options).unwrap().offer();
        assert_eq!(offer.flags, 0b101_0000_1111);
        assert_eq!(offer.block_sizes.minimum, 512);
    }
}
