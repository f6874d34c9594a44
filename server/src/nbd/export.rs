//! One export: a file or block device, its counters, and the state of its flushes.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use stiefel_shared::nbd::{
    BlockSizes, Extent, FLAG_CAN_MULTI_CONN, FLAG_HAS_FLAGS, FLAG_READ_ONLY, FLAG_ROTATIONAL, FLAG_SEND_CACHE,
    FLAG_SEND_FAST_ZERO, FLAG_SEND_FLUSH, FLAG_SEND_FUA, FLAG_SEND_TRIM, FLAG_SEND_WRITE_ZEROES, MAX_PAYLOAD,
    MAX_STRING,
};
use thiserror::Error;

use super::negotiate::{Offer, Offered};
use super::request::Range;
use super::storage::{self, Medium};

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
    file: File,
    medium: Medium,
    options: ExportOptions,
    size: u64,
    minimum: u32,
    syncs: Mutex<Syncs>,
    synced: Condvar,
    bytes_read: AtomicU64,
    bytes_written: AtomicU64,
    requests: AtomicU64,
    errors: AtomicU64,
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
        let failed = |source| ExportError::Open {
            path: path.to_owned(),
            source,
        };
        if [&options.name, &options.description]
            .iter()
            .any(|text| text.len() > MAX_STRING || text.contains('\0'))
        {
            return Err(ExportError::Text);
        }
        // Looked at before opening, because opening a pipe would wait.
        let kind = std::fs::metadata(path).map_err(failed)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(ExportError::WrongKind { path: path.to_owned() });
        }
        let exclusive = kind.is_block_device() && !options.read_only;
        let mut file = OpenOptions::new()
            .read(true)
            .write(!options.read_only)
            .custom_flags(if exclusive {
                rustix::fs::OFlags::EXCL.bits().cast_signed()
            } else {
                0
            })
            .open(path)
            .map_err(failed)?;
        let medium = Medium::of(&file).map_err(failed)?;
        let medium = medium.ok_or_else(|| ExportError::WrongKind { path: path.to_owned() })?;
        let size = file.seek(SeekFrom::End(0)).map_err(failed)?;
        let minimum = minimum_block(path, medium, size, options.block_size)?;
        Ok(Arc::new(Self {
            path: path.to_owned(),
            file,
            medium,
            options,
            size,
            minimum,
            syncs: Mutex::default(),
            synced: Condvar::new(),
            bytes_read: AtomicU64::new(0),
            bytes_written: AtomicU64::new(0),
            requests: AtomicU64::new(0),
            errors: AtomicU64::new(0),
        }))
    }

    /// Size in bytes, as it was when opened.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
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
            let result = self.file.sync_data();
            syncs = self.syncs.lock().unwrap_or_else(PoisonError::into_inner);
            syncs.running = false;
            syncs.ended = syncs.begun;
            if let Err(error) = result {
                syncs.failure.get_or_insert(error.to_string());
            }
            self.synced.notify_all();
        }
        fail_for_good(&syncs)
    }

    /// Fails once a flush has failed: no more must be written onto a state that nobody knows.
    fn check(&self) -> io::Result<()> {
        fail_for_good(&self.syncs.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Fills `data`; an early end, as of a file that was cut meanwhile, is an error.
    pub(super) fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(data, offset)?;
        self.bytes_read.fetch_add(data.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    pub(super) fn write(&self, offset: u64, data: &[u8], fua: bool) -> io::Result<()> {
        self.check()?;
        self.file.write_all_at(data, offset)?;
        self.bytes_written.fetch_add(data.len() as u64, Ordering::Relaxed);
        // Not RWF_DSYNC: its error would not tell a refused write from lost data of before.
        if fua { self.flush() } else { Ok(()) }
    }

    pub(super) fn trim(&self, range: Range, fua: bool) -> io::Result<()> {
        self.check()?;
        storage::trim(&self.file, self.medium, range)?;
        if fua { self.flush() } else { Ok(()) }
    }

    pub(super) fn zero(&self, range: Range, no_hole: bool, fast: bool, fua: bool) -> io::Result<()> {
        self.check()?;
        storage::zero(&self.file, self.medium, range, no_hole, fast)?;
        if fua { self.flush() } else { Ok(()) }
    }

    pub(super) fn cache(&self, range: Range) -> io::Result<()> {
        storage::cache(&self.file, range)
    }

    pub(super) fn extents(&self, range: Range, one: bool) -> Vec<Extent> {
        storage::extents(&self.file, self.medium, range, one)
    }
}

impl Offered for Arc<Export> {
    fn offer(&self) -> Offer {
        let mut flags = FLAG_HAS_FLAGS | FLAG_SEND_FLUSH | FLAG_SEND_FUA | FLAG_SEND_CACHE;
        if !self.options.single {
            flags |= FLAG_CAN_MULTI_CONN;
        }
        let (discards, rotational) = match self.medium {
            Medium::File => (true, false),
            Medium::Device {
                discards, rotational, ..
            } => (discards, rotational),
        };
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
            size: self.size,
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

fn minimum_block(path: &Path, medium: Medium, size: u64, wanted: Option<u32>) -> Result<u32, ExportError> {
    let logical = match medium {
        Medium::File => 1,
        Medium::Device { block, .. } => block,
    };
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
        export.write(0, b"before", true).unwrap();
        export.syncs.lock().unwrap().failure = Some("Input/output error".into());
        let range = Range { offset: 0, length: 512 };
        for _ in 0..2 {
            assert!(export.flush().is_err());
            assert!(export.write(0, b"after", false).is_err());
            assert!(export.trim(range, false).is_err());
            assert!(export.zero(range, false, false, false).is_err());
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
