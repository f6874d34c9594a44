//! Guest boot: what is written goes into an upper layer, the base is never touched.
//!
//! The upper layer is a file, in memory (a memfd) or kept on a disk. Block 0 says what it is; then comes one bit per block
//! of the base, set where the upper layer has the block; then the blocks, at the base's offsets. Holes stay holes.
//!
//! Several guests share one base, each with its own upper layer; [`open_base`] keeps every writer away meanwhile.
//!
//! Durability, for a file: a flush brings the blocks onto the disk, then the bits, then is answered. So after a power cut
//! each block is what was flushed, or older, or newer, never what nobody wrote. A kept overlay that could not be flushed
//! is refused for ever. What was not flushed is lost when the *process* ends, so its session must end with it.
//! In memory: bits are written through before a write is answered; whoever holds the memfd (PID 1, by [`Overlay::upper`]) can
//! have a new process go on with it by [`Overlay::resume`] as if nothing had happened.

mod map;

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice, IoSliceMut};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, TryLockError};

use rustix::fs::{MemfdFlags, OFlags, fcntl_getfl, memfd_create};
use stiefel_shared::nbd::{Extent, STATE_HOLE};

use map::{BLOCK, LEAF, Map, length};

use super::export::{Export, ExportError, ExportOptions};
use super::request::Range;
use super::storage::{Access, FileStore, Medium, lock};
use super::store::{Store, Traits};

/// The first bytes of an upper layer.
const MAGIC: &[u8; 12] = b"stiefel-ovl1";
/// Where block 0 has the base's size, 64 bits, little-endian.
const SIZE_AT: usize = 16;
/// Where block 0 says that a flush has failed.
const LOST_AT: u64 = 24;

/// Where a guest's writes go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Upper {
    /// Into memory, of at most so many bytes; by default half of what the machine has.
    Memory(Option<u64>),
    /// Into a file that is kept.
    File(PathBuf),
}

/// `memory`, `memory:SIZE` (bytes, or with K, M, G, T for powers of 1024), or else a file's path.
impl FromStr for Upper {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            _ if text == "memory" => Ok(Self::Memory(None)),
            Some(("memory", size)) => parse_size(size).map(|bytes| Self::Memory(Some(bytes))),
            _ if text.is_empty() => Err("name a file, or say memory".into()),
            _ => Ok(Self::File(text.into())),
        }
    }
}

fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(['K', 'M', 'G', 'T']);
    let shift = match &text[digits.len()..] {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return Err(format!("{text} is no size; write for example 512M or 4G")),
    };
    let number: u64 = digits
        .parse()
        .map_err(|_| format!("{text} is no size; write for example 512M or 4G"))?;
    number
        .checked_mul(1 << shift)
        .filter(|bytes| *bytes > 0)
        .ok_or_else(|| format!("{text} is no possible size"))
}

/// Exports `base` to a guest: as [`Export::open`], but what is written goes into an upper layer of its own.
///
/// # Errors
/// See [`ExportError`].
pub fn open_guest(
    base: &Arc<dyn Store>,
    path: &Path,
    upper: &Upper,
    options: ExportOptions,
) -> Result<Arc<Export>, ExportError> {
    let overlay = match upper {
        Upper::File(file) => Overlay::file(Arc::clone(base), file)?,
        Upper::Memory(limit) => {
            let limit = limit.unwrap_or_else(|| {
                let system = rustix::system::sysinfo();
                (system.totalram as u64).saturating_mul(system.mem_unit.into()) / 2
            });
            Overlay::memory(Arc::clone(base), limit).map_err(|source| ExportError::Open {
                path: "a memory overlay".into(),
                source,
            })?
        }
    };
    Export::of(Arc::new(overlay), path, options)
}

/// Opens what guests share: read-only, away from everybody who writes it.
///
/// # Errors
/// See [`ExportError`].
pub fn open_base(path: &Path) -> Result<Arc<dyn Store>, ExportError> {
    Ok(Arc::new(FileStore::open(path, Access::Base)?))
}

/// As [`open_base`], of an open file or device that the caller holds; `path` is only shown.
///
/// # Errors
/// See [`ExportError`]; `Open` also if it could be written through this very file.
pub fn base_of(file: File, path: &Path) -> Result<Arc<dyn Store>, ExportError> {
    let failed = |source| ExportError::Open {
        path: path.to_owned(),
        source,
    };
    let flags = fcntl_getfl(&file).map_err(|errno| failed(errno.into()))?;
    if flags & OFlags::RWMODE != OFlags::RDONLY {
        return Err(failed(io::Error::other(
            "what guests share must not be open for writing",
        )));
    }
    Ok(Arc::new(FileStore::of(file, path)?))
}

/// A base with an upper layer.
#[derive(Debug)]
pub struct Overlay {
    base: Arc<dyn Store>,
    upper: Arc<dyn Store>,
    /// Where the blocks begin in the upper layer.
    blocks_at: u64,
    /// Upper layers in memory: nothing to bring onto a disk, but bytes that may be used.
    memory: Option<u64>,
    map: RwLock<Map>,
}

impl Overlay {
    /// An upper layer in memory, of at most `limit` bytes, gone with its last descriptor.
    ///
    /// # Errors
    /// No memory could be had.
    pub fn memory(base: Arc<dyn Store>, limit: u64) -> io::Result<Self> {
        let file = File::from(memfd_create("stiefel-overlay", MemfdFlags::CLOEXEC)?);
        begin(&file, base.size())?;
        Self::resume(base, file, Some(limit))
    }

    /// An upper layer in a file, which is made if it is not there, and kept.
    ///
    /// # Errors
    /// `InUse`; `Open` also for a file that is no overlay of this base or that lost data.
    pub fn file(base: Arc<dyn Store>, path: &Path) -> Result<Self, ExportError> {
        let failed = |source| ExportError::Open {
            path: path.to_owned(),
            source,
        };
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        let file = options.open(path).map_err(failed)?;
        lock(&file, path, false)?;
        if file.metadata().map_err(failed)?.len() == 0 {
            begin(&file, base.size())
                .and_then(|()| file.sync_all())
                .map_err(failed)?;
        }
        Self::resume(base, file, None).map_err(failed)
    }

    /// Goes on with an upper layer; `memory` is its limit if it is one in memory.
    ///
    /// # Errors
    /// It is none, or another base's, or a flush of it has failed; reading failed.
    pub fn resume(base: Arc<dyn Store>, upper: File, memory: Option<u64>) -> io::Result<Self> {
        let size = upper.metadata()?.len();
        Self::over(base, Arc::new(FileStore::new(upper, Medium::File, size)), memory)
    }

    /// Over any store that was begun as an upper layer.
    ///
    /// # Errors
    /// As [`Overlay::resume`].
    pub fn over(base: Arc<dyn Store>, upper: Arc<dyn Store>, memory: Option<u64>) -> io::Result<Self> {
        let invalid = |why| Err(io::Error::new(io::ErrorKind::InvalidData, why));
        let (blocks_at, total) = layout(base.size());
        if upper.size() != total {
            return invalid("not an overlay of this disk: its size does not fit");
        }
        let mut first = vec![0; length(BLOCK)];
        upper.read(&mut first, 0)?;
        if first[..MAGIC.len()] != MAGIC[..] || first[SIZE_AT..][..8] != base.size().to_le_bytes() {
            return invalid("not an overlay of this disk");
        }
        if first[length(LOST_AT)] != 0 {
            return invalid("this overlay has lost data in a flush that failed; begin a new one");
        }
        let mut leaves = Vec::new();
        for at in (BLOCK..blocks_at).step_by(length(BLOCK)) {
            let mut bits = vec![0; length(BLOCK)];
            upper.read(&mut bits, at)?;
            leaves.push(bits.iter().any(|byte| *byte != 0).then(|| bits.into()));
        }
        let map = Map {
            leaves,
            dirty: BTreeSet::new(),
        };
        Ok(Self {
            base,
            upper,
            blocks_at,
            memory,
            map: RwLock::new(map),
        })
    }

    /// The upper layer's file, for someone to hold beyond this process's life.
    #[must_use]
    pub fn upper(&self) -> Option<&File> {
        self.upper.file()
    }

    fn read_map(&self) -> RwLockReadGuard<'_, Map> {
        self.map.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_map(&self) -> RwLockWriteGuard<'_, Map> {
        self.map.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes of memory that the upper layer takes, and how many it may; `None` if it is not in memory.
    #[must_use]
    pub fn filled(&self) -> Option<(u64, u64)> {
        let (limit, file) = (self.memory?, self.upper.file()?);
        Some((file.metadata().ok()?.blocks() * 512, limit))
    }

    /// Whether the upper layer may take what a range needs: as much as it is long, but for what has its place already.
    fn check_room(&self, offset: u64, bytes: u64) -> io::Result<()> {
        let (Some(limit), Some(file)) = (self.memory, self.upper.file()) else {
            return Ok(());
        };
        let used = file.metadata()?.blocks() * 512;
        if used + bytes <= limit {
            return Ok(());
        }
        // Nearly full: what is there can still be overwritten.
        let range = Range {
            offset: self.blocks_at + offset / BLOCK * BLOCK,
            length: (offset + bytes).next_multiple_of(BLOCK) - offset / BLOCK * BLOCK,
        };
        let holes = self.upper.extents(range, usize::MAX).into_iter();
        let needed: u64 = holes
            .filter(|extent| extent.state & STATE_HOLE != 0)
            .map(|extent| extent.length)
            .sum();
        if needed > 0 && used + needed > limit {
            return Err(io::ErrorKind::StorageFull.into());
        }
        Ok(())
    }

    /// Whether a write to these blocks needs no new bit: they are there, and, in memory, all bits are where a new process
    /// would find them.
    fn is_known(&self, map: &Map, blocks: &std::ops::Range<u64>) -> bool {
        map.has_all(blocks.start, blocks.end) && (self.memory.is_none() || map.dirty.is_empty())
    }

    /// The parts of a range that come from one layer each: where, how long, whether from the upper one.
    fn parts(map: &Map, range: Range) -> impl Iterator<Item = (u64, u64, bool)> {
        let end = range.offset + range.length;
        let mut at = range.offset;
        std::iter::from_fn(move || {
            if at >= end {
                return None;
            }
            let (next, upper) = map.run(at / BLOCK, end.div_ceil(BLOCK));
            let next = (next * BLOCK).min(end);
            let part = (at, next - at, upper);
            at = next;
            Some(part)
        })
    }

    /// Takes blocks that the upper layer now has into account.
    fn took(&self, map: &mut Map, blocks: std::ops::Range<u64>) -> io::Result<()> {
        map.set(blocks);
        if self.memory.is_some() {
            self.store_leaves(map)?;
        }
        Ok(())
    }

    /// Writes the dirty leaves into the upper layer.
    fn store_leaves(&self, map: &mut Map) -> io::Result<()> {
        while let Some(leaf) = map.dirty.first().copied() {
            if let Some(bits) = &map.leaves[leaf] {
                self.upper.write(bits, BLOCK + leaf as u64 * BLOCK)?;
            }
            map.dirty.remove(&leaf);
        }
        Ok(())
    }

    /// A block of the base with a part of it changed.
    fn merged(&self, block: u64, from: usize, data: &[u8]) -> io::Result<Vec<u8>> {
        let start = block * BLOCK;
        let mut merged = vec![0; length(BLOCK.min(self.base.size() - start))];
        self.base.read(&mut merged, start)?;
        merged[from..from + data.len()].copy_from_slice(data);
        Ok(merged)
    }
}

/// Where the blocks begin, and where the upper layer ends.
fn layout(size: u64) -> (u64, u64) {
    let blocks_at = BLOCK + size.div_ceil(BLOCK).div_ceil(LEAF) * BLOCK;
    (blocks_at, blocks_at + size.next_multiple_of(BLOCK))
}

/// Makes an empty file the upper layer of a base of `size` bytes.
fn begin(file: &File, size: u64) -> io::Result<()> {
    file.set_len(layout(size).1)?;
    file.write_all_at(&first_block(size), 0)
}

/// The first bytes of the upper layer of a base of `size` bytes; the rest of it is zeroes.
#[must_use]
pub fn first_block(size: u64) -> Vec<u8> {
    let mut first = MAGIC.to_vec();
    first.resize(SIZE_AT, 0);
    first.extend_from_slice(&size.to_le_bytes());
    first
}

/// How long the upper layer of a base of `size` bytes is.
#[must_use]
pub fn upper_size(size: u64) -> u64 {
    layout(size).1
}

impl Store for Overlay {
    fn size(&self) -> u64 {
        self.base.size()
    }

    fn traits(&self) -> Traits {
        Traits {
            discards: true,
            ..self.base.traits()
        }
    }

    fn read_now(&self, parts: &mut [IoSliceMut<'_>], mut offset: u64) -> usize {
        let Ok(map) = self.map.try_read() else { return 0 };
        let mut done = 0;
        for data in parts {
            let range = Range {
                offset,
                length: data.len() as u64,
            };
            let mut rest: &mut [u8] = data;
            for (at, bytes, upper) in Self::parts(&map, range) {
                let (here, behind) = rest.split_at_mut(length(bytes));
                rest = behind;
                let mut here = [IoSliceMut::new(here)];
                let read = if upper {
                    self.upper.read_now(&mut here, self.blocks_at + at)
                } else {
                    self.base.read_now(&mut here, at)
                };
                done += read;
                if (read as u64) < bytes {
                    return done;
                }
            }
            offset += range.length;
        }
        done
    }

    fn read(&self, data: &mut [u8], offset: u64) -> io::Result<()> {
        let map = self.read_map();
        let range = Range {
            offset,
            length: data.len() as u64,
        };
        let mut rest = data;
        for (at, bytes, upper) in Self::parts(&map, range) {
            let (here, behind) = rest.split_at_mut(length(bytes));
            rest = behind;
            if upper {
                self.upper.read(here, self.blocks_at + at)?;
            } else {
                self.base.read(here, at)?;
            }
        }
        Ok(())
    }

    fn write_now(&self, parts: &[IoSlice<'_>], offset: u64) -> io::Result<usize> {
        let bytes: usize = parts.iter().map(|part| part.len()).sum();
        let end = offset + bytes as u64;
        let blocks = offset / BLOCK..end.div_ceil(BLOCK);
        self.check_room(offset, bytes as u64)?;
        match self.map.try_read() {
            Ok(map) if self.is_known(&map, &blocks) => {
                return self.upper.write_now(parts, self.blocks_at + offset);
            }
            Ok(_) | Err(TryLockError::Poisoned(_)) => {}
            Err(TryLockError::WouldBlock) => return Ok(0),
        }
        if !offset.is_multiple_of(BLOCK) || !end.is_multiple_of(BLOCK) {
            return Ok(0);
        }
        let Ok(mut map) = self.map.try_write() else {
            return Ok(0);
        };
        let written = self.upper.write_now(parts, self.blocks_at + offset)?;
        if written < bytes {
            return Ok(0);
        }
        self.took(&mut map, blocks)?;
        Ok(written)
    }

    fn write(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.check_room(offset, data.len() as u64)?;
        let end = offset + data.len() as u64;
        let blocks = offset / BLOCK..end.div_ceil(BLOCK);
        {
            let map = self.read_map();
            if self.is_known(&map, &blocks) {
                return self.upper.write(data, self.blocks_at + offset);
            }
        }
        let mut map = self.write_map();
        let mut at = offset;
        let mut rest = data;
        while !rest.is_empty() {
            let block = at / BLOCK;
            // The next block's begin, or as far as whole blocks go, or the end.
            let whole = end - end % BLOCK;
            let next = if at.is_multiple_of(BLOCK) && whole > at {
                whole
            } else {
                ((block + 1) * BLOCK).min(end)
            };
            let (here, behind) = rest.split_at(length(next - at));
            let partial = here.len() < length(BLOCK) && !map.has(block);
            if partial {
                let merged = self.merged(block, length(at % BLOCK), here)?;
                self.upper.write(&merged, self.blocks_at + block * BLOCK)?;
            } else {
                self.upper.write(here, self.blocks_at + at)?;
            }
            self.took(&mut map, block..next.div_ceil(BLOCK))?;
            (at, rest) = (next, behind);
        }
        Ok(())
    }

    fn trim(&self, range: Range) -> io::Result<()> {
        let blocks = range.offset.div_ceil(BLOCK)..(range.offset + range.length) / BLOCK;
        if blocks.is_empty() {
            return Ok(());
        }
        let mut map = self.write_map();
        let inner = Range {
            offset: self.blocks_at + blocks.start * BLOCK,
            length: (blocks.end - blocks.start) * BLOCK,
        };
        // As zeroes, because trimming alone may do nothing and blocks that were never written would show.
        match self.upper.zero(inner, false, true) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(()),
            Err(error) => Err(error),
            Ok(()) => self.took(&mut map, blocks),
        }
    }

    fn zero(&self, range: Range, no_hole: bool, fast: bool) -> io::Result<()> {
        let end = range.offset + range.length;
        let blocks = range.offset.div_ceil(BLOCK)..end / BLOCK;
        if no_hole {
            self.check_room(range.offset, range.length)?;
        }
        if blocks.start >= blocks.end {
            return self.write(&vec![0; length(range.length)], range.offset);
        }
        let inner = Range {
            offset: self.blocks_at + blocks.start * BLOCK,
            length: (blocks.end - blocks.start) * BLOCK,
        };
        {
            let mut map = self.write_map();
            self.upper.zero(inner, no_hole, fast)?;
            self.took(&mut map, blocks.clone())?;
        }
        let edges = [(range.offset, blocks.start * BLOCK), (blocks.end * BLOCK, end)];
        for (from, to) in edges.into_iter().filter(|(from, to)| from < to) {
            self.write(&vec![0; length(to - from)], from)?;
        }
        Ok(())
    }

    fn cache(&self, range: Range) -> io::Result<()> {
        self.base.cache(range)
    }

    fn extents(&self, range: Range, most: usize) -> Vec<Extent> {
        let map = self.read_map();
        let mut found = Vec::new();
        for (at, length, upper) in Self::parts(&map, range) {
            let left = most.saturating_sub(found.len());
            if left == 0 {
                break;
            }
            let (store, offset) = if upper {
                (&self.upper, self.blocks_at + at)
            } else {
                (&self.base, at)
            };
            let part = store.extents(Range { offset, length }, left);
            let told: u64 = part.iter().map(|extent| extent.length).sum();
            found.extend(part);
            if told < length {
                break;
            }
        }
        found
    }

    fn sync(&self) -> io::Result<()> {
        if self.memory.is_some() {
            // Those of a write that was not answered because they could not be stored.
            return self.store_leaves(&mut self.write_map());
        }
        // The bits as they are now: what they stand for was written before, so the first flush covers it.
        let bits: Vec<(usize, Box<[u8]>)> = {
            let mut map = self.write_map();
            let dirty = std::mem::take(&mut map.dirty);
            dirty
                .into_iter()
                .filter_map(|leaf| Some((leaf, map.leaves[leaf].clone()?)))
                .collect()
        };
        let synced = self.upper.sync().and_then(|()| {
            if bits.is_empty() {
                return Ok(());
            }
            for (leaf, bits) in &bits {
                self.upper.write(bits, BLOCK + *leaf as u64 * BLOCK)?;
            }
            self.upper.sync()
        });
        if synced.is_err() {
            // As far as that is still possible, nobody shall take this overlay for a good one.
            let _ = self.upper.write(&[1], LOST_AT).and_then(|()| self.upper.sync());
        }
        synced
    }
}

#[cfg(test)]
#[path = "overlay_tests.rs"]
mod tests;
