//! A regular file or a block device as a [`Store`]: cached access without waiting, holes, zeroes, discarding, read-ahead.

use std::fs::{self, File, OpenOptions};
use std::io::{self, IoSlice, IoSliceMut, Seek};
use std::num::NonZeroU64;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::fs::{Advice, FallocateFlags, FlockOperation, OFlags, SeekFrom, fadvise, fallocate, flock, seek};
use rustix::io::{Errno, ReadWriteFlags, preadv2, pwritev, pwritev2};
use stiefel_shared::nbd::{Extent, STATE_HOLE, STATE_ZERO};

use super::export::ExportError;
use super::request::Range;
use super::store::{Store, Traits};

/// How long a device's lock is waited for: systemd-udevd has a shared one while it looks at a device that a writer has just closed
/// (systemd.io/BLOCK_DEVICE_LOCKING).
const PROBED: Duration = Duration::from_secs(5);
const LOOK: Duration = Duration::from_millis(20);
/// A write that took longer than this waited for the medium, as when too much is unwritten.
const SLOW: Duration = Duration::from_millis(50);
/// How long writes are then left to threads that may wait.
const SLOW_FOR: Duration = Duration::from_millis(200);
/// Zeroes written at a time where nothing faster works.
static ZEROES: [u8; 1 << 18] = [0; 1 << 18];
/// Bytes read ahead for one request at most: the kernel would take the whole range at once.
const MAX_READ_AHEAD: u64 = 32 << 20;

/// What a file or device is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    /// To be written.
    Write,
    /// To be read; whoever writes it otherwise, as a mounted file system, is let be.
    Read,
    /// To be the base of overlays: nobody else may write it.
    Base,
}

/// Which kind of thing is exported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Medium {
    /// A regular file.
    File,
    /// A block device.
    Device {
        /// Its logical block size in bytes, a power of two.
        block: u32,
        /// Whether it can discard.
        discards: bool,
        /// Whether seeking costs time.
        rotational: bool,
    },
}

impl Medium {
    /// Looks at an open file; `None` when it is neither a regular file nor a block device.
    pub(super) fn of(file: &File) -> io::Result<Option<Self>> {
        let metadata = file.metadata()?;
        if metadata.is_file() {
            return Ok(Some(Self::File));
        }
        if !metadata.file_type().is_block_device() {
            return Ok(None);
        }
        let block = rustix::fs::ioctl_blksszget(file)?;
        if !block.is_power_of_two() {
            return Err(io::Error::other(format!("impossible logical block size {block}")));
        }
        let device = metadata.rdev();
        Ok(Some(Self::Device {
            block,
            discards: queue(device, "discard_max_bytes").is_none_or(|most| most > 0),
            rotational: queue(device, "rotational") == Some(1),
        }))
    }
}

/// A number from the device's request queue in sysfs; a partition's queue is its disk's.
fn queue(device: u64, name: &str) -> Option<u64> {
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let directory = PathBuf::from(format!("/sys/dev/block/{major}:{minor}"));
    ["queue", "../queue"]
        .into_iter()
        .find_map(|queue| fs::read_to_string(directory.join(queue).join(name)).ok())
        .and_then(|text| text.trim().parse().ok())
}

/// A file or device as a store.
#[derive(Debug)]
pub(super) struct FileStore {
    file: File,
    medium: Medium,
    size: u64,
    /// Whether the file system can be asked to write without waiting (ext4 cannot).
    asks: AtomicBool,
    opened: Instant,
    /// Milliseconds after `opened` until which writes are expected to wait.
    slow_until: AtomicU64,
}

impl FileStore {
    /// Opens `path` and fixes its size. A block device is opened exclusively for writing: a mounted one is refused. Who
    /// writes a file or device has it alone among all servers of this kind; who only reads shares it.
    pub(super) fn open(path: &Path, access: Access) -> Result<Self, ExportError> {
        let read_only = access != Access::Write;
        let failed = |source| ExportError::Open {
            path: path.to_owned(),
            source,
        };
        // Looked at before opening, because opening a pipe would wait.
        let kind = std::fs::metadata(path).map_err(failed)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(ExportError::WrongKind { path: path.to_owned() });
        }
        let exclusive = kind.is_block_device() && access != Access::Read;
        let flags = if exclusive { OFlags::EXCL } else { OFlags::empty() };
        let file = OpenOptions::new()
            .read(true)
            .write(!read_only)
            .custom_flags(flags.bits().cast_signed())
            .open(path)
            .map_err(failed)?;
        lock(&file, path, read_only)?;
        Self::of(file, path)
    }

    /// Takes an open file or device, whose holder has seen to it that nobody else writes it.
    pub(super) fn of(mut file: File, path: &Path) -> Result<Self, ExportError> {
        let failed = |source| ExportError::Open {
            path: path.to_owned(),
            source,
        };
        let medium = Medium::of(&file).map_err(failed)?;
        let medium = medium.ok_or_else(|| ExportError::WrongKind { path: path.to_owned() })?;
        let size = file.seek(io::SeekFrom::End(0)).map_err(failed)?;
        Ok(Self::new(file, medium, size))
    }

    pub(super) fn new(file: File, medium: Medium, size: u64) -> Self {
        Self {
            file,
            medium,
            size,
            asks: AtomicBool::new(true),
            opened: Instant::now(),
            slow_until: AtomicU64::new(0),
        }
    }

    fn now(&self) -> u64 {
        u64::try_from(self.opened.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Writes into the page cache, which waits only when that is too full of unwritten pages: seen by the time it takes.
    fn timed(&self, write: impl FnOnce() -> Result<usize, Errno>) -> io::Result<usize> {
        let begun = self.now();
        if self.is_slow() {
            return Ok(0);
        }
        let written = match write() {
            Err(Errno::INTR) => Ok(0),
            written => written.map_err(io::Error::from),
        };
        let ended = self.now();
        if u128::from(ended - begun) > SLOW.as_millis() {
            let more = u64::try_from(SLOW_FOR.as_millis()).unwrap_or(u64::MAX);
            self.slow_until.store(ended.saturating_add(more), Ordering::Relaxed);
        }
        written
    }

    /// Asks the kernel to write without waiting; `None` when it cannot be asked.
    fn ask_to_write(&self, parts: &[IoSlice<'_>], offset: u64) -> Option<io::Result<usize>> {
        if !self.asks.load(Ordering::Relaxed) {
            return None;
        }
        match pwritev2(&self.file, parts, offset, ReadWriteFlags::NOWAIT) {
            Ok(written) => Some(Ok(written)),
            Err(Errno::AGAIN | Errno::INTR) => Some(Ok(0)),
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {
                self.asks.store(false, Ordering::Relaxed);
                None
            }
            Err(errno) => Some(Err(errno.into())),
        }
    }
}

/// Keeps writers from those who rely on nothing being written. File systems without locks (some network ones) are let be.
pub(super) fn lock(file: &File, path: &Path, shared: bool) -> Result<(), ExportError> {
    let operation = if shared {
        FlockOperation::NonBlockingLockShared
    } else {
        FlockOperation::NonBlockingLockExclusive
    };
    let device = file.metadata().is_ok_and(|known| known.file_type().is_block_device());
    match locked(file, operation, if device { PROBED } else { Duration::ZERO }) {
        true => Ok(()),
        false => Err(ExportError::InUse { path: path.to_owned() }),
    }
}

/// Takes a lock, unless somebody has it for longer than `patience`.
fn locked(file: &File, operation: FlockOperation, patience: Duration) -> bool {
    let begun = Instant::now();
    while let Err(Errno::WOULDBLOCK) = flock(file, operation) {
        if begun.elapsed() >= patience {
            return false;
        }
        std::thread::sleep(LOOK);
    }
    true
}

impl Store for FileStore {
    fn size(&self) -> u64 {
        self.size
    }

    fn traits(&self) -> Traits {
        match self.medium {
            Medium::File => Traits {
                block: 1,
                discards: true,
                rotational: false,
            },
            Medium::Device {
                block,
                discards,
                rotational,
            } => Traits {
                block,
                discards,
                rotational,
            },
        }
    }

    fn read_now(&self, parts: &mut [IoSliceMut<'_>], offset: u64) -> usize {
        preadv2(&self.file, parts, offset, ReadWriteFlags::NOWAIT).unwrap_or(0)
    }

    fn read(&self, data: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(data, offset)
    }

    fn write_now(&self, parts: &[IoSlice<'_>], offset: u64) -> io::Result<usize> {
        if let Some(asked) = self.ask_to_write(parts, offset) {
            return asked;
        }
        self.timed(|| pwritev(&self.file, parts, offset))
    }

    fn write(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_all_at(data, offset)
    }

    fn is_slow(&self) -> bool {
        self.now() < self.slow_until.load(Ordering::Relaxed)
    }

    fn trim(&self, range: Range) -> io::Result<()> {
        trim(&self.file, self.medium, range)
    }

    fn zero(&self, range: Range, no_hole: bool, fast: bool) -> io::Result<()> {
        zero(&self.file, self.medium, range, no_hole, fast)
    }

    fn cache(&self, range: Range) -> io::Result<()> {
        let length = NonZeroU64::new(range.length.min(MAX_READ_AHEAD));
        fadvise(&self.file, range.offset, length, Advice::WillNeed).map_err(io::Error::from)
    }

    fn extents(&self, range: Range, most: usize) -> Vec<Extent> {
        extents(&self.file, self.medium, range, most)
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn file(&self) -> Option<&File> {
        Some(&self.file)
    }
}

/// Gives the range's space back where the medium can; never fails for want of support, it is a hint.
fn trim(file: &File, medium: Medium, range: Range) -> io::Result<()> {
    let done = match medium {
        Medium::File => {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            fallocate(file, flags, range.offset, range.length).map_err(io::Error::from)
        }
        Medium::Device { block, .. } => match inner(range, block) {
            Some((start, length)) => stiefel_sys::block::discard(file, start, length),
            None => Ok(()),
        },
    };
    match done {
        Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(()),
        other => other,
    }
}

/// The whole blocks inside of a range: start and length, unless there is none.
fn inner(range: Range, block: u32) -> Option<(u64, u64)> {
    let block = u64::from(block);
    let start = range.offset.next_multiple_of(block);
    let end = (range.offset + range.length) / block * block;
    (start < end).then(|| (start, end - start))
}

/// Makes the range read as zeroes.
///
/// # Errors
/// `Unsupported` with `fast` when that would not be faster than writing; nothing is changed then.
fn zero(file: &File, medium: Medium, range: Range, no_hole: bool, fast: bool) -> io::Result<()> {
    let (start, length) = match medium {
        Medium::File => (range.offset, range.length),
        Medium::Device { block, .. } => match inner(range, block) {
            Some(blocks) => blocks,
            None if fast => return Err(io::ErrorKind::Unsupported.into()),
            None => return write_zeroes(file, range.offset, range.length),
        },
    };
    if !zero_blocks(file, medium, start, length, no_hole, fast)? {
        if fast {
            return Err(io::ErrorKind::Unsupported.into());
        }
        return write_zeroes(file, range.offset, range.length);
    }
    let end = start + length;
    write_zeroes(file, range.offset, start - range.offset)?;
    write_zeroes(file, end, range.offset + range.length - end)
}

/// Zeroes by the file system or the device; false when it cannot.
fn zero_blocks(file: &File, medium: Medium, start: u64, length: u64, no_hole: bool, fast: bool) -> io::Result<bool> {
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    let keep = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
    // On a device ZERO_RANGE writes zeroes itself where the hardware cannot, so it is never known to be fast.
    let keep_is_fast = medium == Medium::File;
    let ways = [(punch, !no_hole), (keep, keep_is_fast || !fast)];
    for (flags, _) in ways.into_iter().filter(|(_, wanted)| *wanted) {
        loop {
            match fallocate(file, flags, start, length) {
                Ok(()) => return Ok(true),
                Err(Errno::INTR) => {}
                Err(Errno::OPNOTSUPP | Errno::NOSYS) => break,
                Err(errno) => return Err(errno.into()),
            }
        }
    }
    Ok(false)
}

fn write_zeroes(file: &File, mut offset: u64, mut length: u64) -> io::Result<()> {
    while length > 0 {
        let now = usize::try_from(length).unwrap_or(usize::MAX).min(ZEROES.len());
        file.write_all_at(&ZEROES[..now], offset)?;
        offset += now as u64;
        length -= now as u64;
    }
    Ok(())
}

/// Data and holes from the range's start on, at least one extent, none beyond the range's end.
fn extents(file: &File, medium: Medium, range: Range, most: usize) -> Vec<Extent> {
    let end = range.offset + range.length;
    let mut found = Vec::new();
    let mut at = range.offset;
    while at < end && found.len() < most {
        let (next, state) = match medium {
            Medium::File => next_extent(file, at, end),
            Medium::Device { .. } => (end, 0),
        };
        found.push(Extent {
            length: next - at,
            state,
        });
        at = next;
    }
    found
}

/// Where the extent at `at` ends (never beyond `end`), and its state; what cannot be found out counts as data.
fn next_extent(file: &File, at: u64, end: u64) -> (u64, u32) {
    match seek(file, SeekFrom::Data(at)) {
        Ok(data) if data > at => (data.min(end), STATE_HOLE | STATE_ZERO),
        // No data up to the file's end. What lies beyond that, in one that was cut, is an error to be told by reading it.
        Err(Errno::NXIO) => match file.metadata() {
            Ok(now) if now.len() > at => (now.len().min(end), STATE_HOLE | STATE_ZERO),
            _ => (end, 0),
        },
        Err(_) => (end, 0),
        Ok(_) => match seek(file, SeekFrom::Hole(at)) {
            Ok(hole) if hole > at => (hole.min(end), 0),
            _ => (end, 0),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MIB: u64 = 1 << 20;

    fn read(file: &File, range: Range) -> io::Result<Vec<u8>> {
        let mut data = vec![0; usize::try_from(range.length).unwrap()];
        file.read_exact_at(&mut data, range.offset).map(|()| data)
    }

    fn sparse() -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4 * MIB).unwrap();
        file.write_all_at(&[7; 1 << 20], MIB).unwrap();
        file
    }

    #[test]
    fn a_lock_that_is_soon_given_up_is_waited_for() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let other = File::open(file.path()).unwrap();
        flock(&other, FlockOperation::LockShared).unwrap();
        let exclusive = FlockOperation::NonBlockingLockExclusive;
        assert!(!locked(file.as_file(), exclusive, Duration::ZERO));
        let holder = std::thread::spawn(move || {
            std::thread::sleep(LOOK * 3);
            drop(other);
        });
        assert!(locked(file.as_file(), exclusive, Duration::from_secs(60)));
        holder.join().unwrap();
    }

    #[test]
    fn what_a_cut_file_has_lost_is_no_hole() {
        let file = sparse();
        file.set_len(3 * MIB).unwrap();
        let rest = Range {
            offset: 2 * MIB,
            length: 2 * MIB,
        };
        let states: Vec<_> = extents(&file, Medium::File, rest, 9)
            .iter()
            .map(|extent| (extent.length, extent.state))
            .collect();
        assert_eq!(states, [(MIB, STATE_HOLE | STATE_ZERO), (MIB, 0)]);
    }

    #[test]
    fn extents_show_the_holes() {
        let file = sparse();
        let hole = STATE_HOLE | STATE_ZERO;
        let all = Range {
            offset: 0,
            length: 4 * MIB,
        };
        let found = extents(&file, Medium::File, all, 99);
        let expected = [(MIB, hole), (MIB, 0), (2 * MIB, hole)].map(|(length, state)| Extent { length, state });
        assert_eq!(found, expected);
        assert_eq!(extents(&file, Medium::File, all, 1), expected[..1]);
        let device = Medium::Device {
            block: 512,
            discards: true,
            rotational: false,
        };
        assert_eq!(
            extents(&file, device, all, 99),
            [Extent {
                length: 4 * MIB,
                state: 0
            }]
        );
    }

    #[test]
    fn zeroes_and_trims_stay_inside_their_range() {
        for no_hole in [false, true] {
            let file = sparse();
            zero(
                &file,
                Medium::File,
                Range {
                    offset: MIB + 100,
                    length: 5000,
                },
                no_hole,
                false,
            )
            .unwrap();
            let data = read(
                &file,
                Range {
                    offset: MIB,
                    length: 6000,
                },
            )
            .unwrap();
            assert!(data[..100].iter().chain(&data[5100..]).all(|byte| *byte == 7));
            assert!(data[100..5100].iter().all(|byte| *byte == 0));
            trim(
                &file,
                Medium::File,
                Range {
                    offset: MIB + 8192,
                    length: 4096,
                },
            )
            .unwrap();
            let data = read(
                &file,
                Range {
                    offset: MIB + 8191,
                    length: 4098,
                },
            )
            .unwrap();
            assert_eq!((data[0], data[4097]), (7, 7));
            assert_eq!(file.metadata().unwrap().len(), 4 * MIB);
        }
    }

    proptest! {
        #[test]
        fn whole_blocks_lie_inside_the_range(offset in 0..u64::MAX / 2, length in 1_u64..1 << 33, shift in 9_u32..13) {
            let block = 1_u64 << shift;
            if let Some((start, len)) = inner(Range { offset, length }, 1 << shift) {
                prop_assert!(start >= offset && start + len <= offset + length);
                prop_assert!(start % block == 0 && len % block == 0 && len > 0);
                prop_assert!(start - offset < block && offset + length - start - len < block);
            } else {
                prop_assert!(length < 2 * block);
            }
        }
    }
}
