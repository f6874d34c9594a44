//! What lies under an export: anything that can be read, written and flushed like a disk.
//!
//! Two kinds of calls: the ones that end in `_now` never wait for a medium and may do less than asked; the others do all
//! of it or fail. The engine tries the first on the connection's own thread and gives the second to a thread that may wait.

use std::fmt;
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};

use stiefel_shared::nbd::Extent;

use super::request::Range;

/// A disk's contents. Every range lies within [`Store::size`]; the caller has checked it.
pub trait Store: Send + Sync + fmt::Debug {
    /// Size in bytes; never changes.
    fn size(&self) -> u64;

    /// What the clients are told.
    fn traits(&self) -> Traits;

    /// Fills the parts one after the other with what is in memory; returns how many bytes, 0 when the medium is needed.
    /// An error counts as 0: [`Store::read`] will tell.
    fn read_now(&self, parts: &mut [IoSliceMut<'_>], offset: u64) -> usize;

    /// Fills `data`.
    ///
    /// # Errors
    /// The medium's; an early end, as of a file that was cut meanwhile, is one too.
    fn read(&self, data: &mut [u8], offset: u64) -> io::Result<()>;

    /// Writes the parts one after the other as far as that needs no waiting; returns how many bytes.
    ///
    /// # Errors
    /// The medium's; some bytes may be written nevertheless.
    fn write_now(&self, parts: &[IoSlice<'_>], offset: u64) -> io::Result<usize>;

    /// Whether writes have lately had to wait, so that they had better be left to threads that may.
    fn is_slow(&self) -> bool {
        false
    }

    /// Writes all of `data`.
    ///
    /// # Errors
    /// The medium's; some bytes may be written nevertheless.
    fn write(&self, data: &[u8], offset: u64) -> io::Result<()>;

    /// Gives the range's space back where that can be done; what it reads as afterwards is not promised.
    ///
    /// # Errors
    /// The medium's; never for want of support, it is a hint.
    fn trim(&self, range: Range) -> io::Result<()>;

    /// Makes the range read as zeroes; with `no_hole` its space stays allocated.
    ///
    /// # Errors
    /// `Unsupported` with `fast` when that would not be faster than writing (nothing is changed then); the medium's.
    fn zero(&self, range: Range, no_hole: bool, fast: bool) -> io::Result<()>;

    /// Reads ahead; nothing is promised.
    ///
    /// # Errors
    /// The medium's.
    fn cache(&self, range: Range) -> io::Result<()>;

    /// Data and holes from the range's start on: at least one extent and at most `most`, none beyond the range's end.
    /// What is said to read as zeroes does.
    fn extents(&self, range: Range, most: usize) -> Vec<Extent>;

    /// Brings onto the medium all that was written before the call, by whichever thread.
    ///
    /// # Errors
    /// The medium's; what was lost cannot be known then.
    fn sync(&self) -> io::Result<()>;

    /// The file whose bytes these are, at the same offsets, if they are one file's.
    fn file(&self) -> Option<&File> {
        None
    }
}

/// What clients are told of a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Traits {
    /// The smallest unit of access in bytes, a power of two; 1 when any will do.
    pub block: u32,
    /// Whether trimming does anything.
    pub discards: bool,
    /// Whether seeking costs time.
    pub rotational: bool,
}
