//! What a regular file or a block device can do beyond reading and writing: holes, zeroes, discarding, read-ahead.

use std::fs::{self, File};
use std::io;
use std::num::NonZeroU64;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;

use rustix::fs::{Advice, FallocateFlags, SeekFrom, fadvise, fallocate, seek};
use rustix::io::Errno;
use stiefel_shared::nbd::{Extent, STATE_HOLE, STATE_ZERO};

use super::request::Range;

/// Extents in one answer; the rest is asked for again.
const MAX_EXTENTS: usize = 8192;
/// Zeroes written at a time where nothing faster works.
static ZEROES: [u8; 1 << 18] = [0; 1 << 18];
/// Bytes read ahead for one request at most: the kernel would take the whole range at once.
const MAX_READ_AHEAD: u32 = 32 << 20;

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
        use std::os::unix::fs::FileTypeExt;
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

/// Gives the range's space back where the medium can; never fails for want of support, it is a hint.
pub(super) fn trim(file: &File, medium: Medium, range: Range) -> io::Result<()> {
    let done = match medium {
        Medium::File => {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            fallocate(file, flags, range.offset, u64::from(range.length)).map_err(io::Error::from)
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
    let end = (range.offset + u64::from(range.length)) / block * block;
    (start < end).then(|| (start, end - start))
}

/// Makes the range read as zeroes.
///
/// # Errors
/// `Unsupported` with `fast` when that would not be faster than writing; nothing is changed then.
pub(super) fn zero(file: &File, medium: Medium, range: Range, no_hole: bool, fast: bool) -> io::Result<()> {
    let (start, length) = match medium {
        Medium::File => (range.offset, u64::from(range.length)),
        Medium::Device { block, .. } => match inner(range, block) {
            Some(blocks) => blocks,
            None if fast => return Err(io::ErrorKind::Unsupported.into()),
            None => return write_zeroes(file, range.offset, u64::from(range.length)),
        },
    };
    if !zero_blocks(file, medium, start, length, no_hole, fast)? {
        if fast {
            return Err(io::ErrorKind::Unsupported.into());
        }
        return write_zeroes(file, range.offset, u64::from(range.length));
    }
    let end = start + length;
    write_zeroes(file, range.offset, start - range.offset)?;
    write_zeroes(file, end, range.offset + u64::from(range.length) - end)
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

/// Lets the kernel read ahead; nothing is promised.
pub(super) fn cache(file: &File, range: Range) -> io::Result<()> {
    let length = NonZeroU64::new(u64::from(range.length.min(MAX_READ_AHEAD)));
    fadvise(file, range.offset, length, Advice::WillNeed).map_err(io::Error::from)
}

/// Data and holes from the range's start on, at least one extent, none beyond the range's end.
pub(super) fn extents(file: &File, medium: Medium, range: Range, one: bool) -> Vec<Extent> {
    let end = range.offset + u64::from(range.length);
    let most = if one { 1 } else { MAX_EXTENTS };
    let mut found = Vec::new();
    let mut at = range.offset;
    while at < end && found.len() < most {
        let (next, state) = match medium {
            Medium::File => next_extent(file, at, end),
            Medium::Device { .. } => (end, 0),
        };
        // Cannot saturate: the range's own length is 32 bits.
        found.push(Extent {
            length: u32::try_from(next - at).unwrap_or(u32::MAX),
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
        Err(Errno::NXIO) => (end, STATE_HOLE | STATE_ZERO),
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

    const MIB: u32 = 1 << 20;

    fn read(file: &File, range: Range) -> io::Result<Vec<u8>> {
        let mut data = vec![0; range.length as usize];
        file.read_exact_at(&mut data, range.offset).map(|()| data)
    }

    fn sparse() -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(u64::from(4 * MIB)).unwrap();
        file.write_all_at(&[7; MIB as usize], u64::from(MIB)).unwrap();
        file
    }

    #[test]
    fn extents_show_the_holes() {
        let file = sparse();
        let hole = STATE_HOLE | STATE_ZERO;
        let all = Range {
            offset: 0,
            length: 4 * MIB,
        };
        let found = extents(&file, Medium::File, all, false);
        let expected = [(MIB, hole), (MIB, 0), (2 * MIB, hole)].map(|(length, state)| Extent { length, state });
        assert_eq!(found, expected);
        assert_eq!(extents(&file, Medium::File, all, true), expected[..1]);
        let device = Medium::Device {
            block: 512,
            discards: true,
            rotational: false,
        };
        assert_eq!(
            extents(&file, device, all, false),
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
                    offset: u64::from(MIB) + 100,
                    length: 5000,
                },
                no_hole,
                false,
            )
            .unwrap();
            let data = read(
                &file,
                Range {
                    offset: u64::from(MIB),
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
                    offset: u64::from(MIB) + 8192,
                    length: 4096,
                },
            )
            .unwrap();
            let data = read(
                &file,
                Range {
                    offset: u64::from(MIB) + 8191,
                    length: 4098,
                },
            )
            .unwrap();
            assert_eq!((data[0], data[4097]), (7, 7));
            assert_eq!(file.metadata().unwrap().len(), u64::from(4 * MIB));
        }
    }

    proptest! {
        #[test]
        fn whole_blocks_lie_inside_the_range(offset in 0..u64::MAX / 2, length in 1_u32.., shift in 9_u32..13) {
            let block = 1_u64 << shift;
            if let Some((start, len)) = inner(Range { offset, length }, 1 << shift) {
                prop_assert!(start >= offset && start + len <= offset + u64::from(length));
                prop_assert!(start % block == 0 && len % block == 0 && len > 0);
                prop_assert!(start - offset < block && offset + u64::from(length) - start - len < block);
            } else {
                prop_assert!(u64::from(length) < 2 * block);
            }
        }
    }
}
