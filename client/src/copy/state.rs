//! What is known of a copy that is not complete: a header, then records of 32 bytes, appended as the copy goes on.
//!
//! A record is the SHA-256 of the next piece, or begins with [`MARK`] and is a range in it that could not be read, which comes
//! before the piece's own. Each is on its medium after the piece is on the target's. What was written half is cut off.

use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::{Hash, PIECE, Range, SECTOR, push};

const MAGIC: &[u8; 16] = b"stiefel-copy-2\n\0";
/// The same, without ranges.
const EARLIER: &[u8; 16] = b"stiefel-copy-1\n\0";
/// Magic, the source's size, the first piece's hash.
const HEADER: u64 = 16 + 8 + 32;
const RECORD: usize = 32;
/// No digest begins so but once in 2^128.
const MARK: &[u8; 16] = b"not-read-by-copy";

/// The file of state, which no other copy has meanwhile.
#[derive(Debug)]
pub(super) struct State {
    file: File,
    /// Its length in bytes, as far as it is whole.
    length: u64,
    pub(super) path: PathBuf,
    /// The source's first piece.
    begin: Hash,
    /// Of the pieces that are copied, in their order.
    pub(super) hashes: Vec<Hash>,
    /// What could not be read of them.
    pub(super) unreadable: Vec<Range>,
}

impl State {
    /// Reads what an earlier try has left, if it has; nothing is written.
    ///
    /// # Errors
    /// In words; also if it belongs to a source of another size, or is damaged.
    pub(super) fn earlier(path: &Path, size: u64) -> anyhow::Result<Option<Self>> {
        let file = match OpenOptions::new().read(true).write(true).open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).with_context(|| failed(path)),
        };
        lock(&file, path)?;
        let mut reader = BufReader::new(&file);
        let mut known = Vec::new();
        let header = reader.by_ref().take(HEADER).read_to_end(&mut known);
        header.with_context(|| failed(path))?;
        if known.is_empty() {
            return Ok(None);
        }
        let header = known.split_at_checked(MAGIC.len());
        let Some((_, rest)) = header.filter(|(magic, _)| magic == MAGIC || magic == EARLIER) else {
            bail!("{} is no state of a copy; name another with --state", path.display());
        };
        let header = rest.split_first_chunk().and_then(|(bytes, begin)| {
            let ours = u64::from_be_bytes(*bytes) == size;
            Hash::try_from(begin).ok().filter(|_| ours)
        });
        let begin = header.with_context(|| another(path))?;
        let Some((hashes, unreadable, length)) = records(&mut reader, size).with_context(|| failed(path))? else {
            bail!("{} is damaged; delete it to begin anew", path.display());
        };
        Ok(Some(Self {
            file,
            length,
            path: path.to_owned(),
            begin,
            hashes,
            unreadable,
        }))
    }

    /// Whether it is of a source whose first piece has this hash; one that cannot be read any more is believed.
    ///
    /// # Errors
    /// It is of another one.
    pub(super) fn is_of(&self, first: Option<Hash>) -> anyhow::Result<()> {
        // What could not be read then may be read now, and the other way round.
        let unsure = self.unreadable.iter().any(|(at, _)| *at < PIECE as u64);
        let ours = unsure || first.is_none_or(|first| first == self.begin);
        anyhow::ensure!(ours, another(&self.path));
        Ok(())
    }

    /// Goes on with it: what was written half is cut off.
    ///
    /// # Errors
    /// The file system's.
    pub(super) fn go_on(self, size: u64) -> anyhow::Result<Self> {
        let whole = [&MAGIC[..], &size.to_be_bytes(), &self.begin].concat();
        let written = self.file.set_len(self.length);
        let written = written.and_then(|()| self.file.write_all_at(&whole, 0));
        let written = written.and_then(|()| self.file.sync_data());
        written.with_context(|| failed(&self.path))?;
        Ok(self)
    }

    /// Makes one for a source of `size` bytes whose first piece has the hash `begin`.
    ///
    /// # Errors
    /// In words; also if there is one by now.
    pub(super) fn create(path: &Path, size: u64, begin: Hash) -> anyhow::Result<Self> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let file = options.open(path).with_context(|| failed(path))?;
        lock(&file, path)?;
        if file.metadata().with_context(|| failed(path))?.len() != 0 {
            bail!(
                "{} has come meanwhile; the same call goes on behind what it says",
                path.display()
            );
        }
        let state = Self {
            file,
            length: HEADER,
            path: path.to_owned(),
            begin,
            hashes: Vec::new(),
            unreadable: Vec::new(),
        };
        state.go_on(size)
    }

    /// Notes pieces whose bytes are on the medium, each with what could not be read of it.
    pub(super) fn add(&mut self, pieces: &[(Hash, Vec<Range>)]) -> io::Result<()> {
        let mut bytes = Vec::new();
        for (hash, ranges) in pieces {
            for (at, length) in ranges {
                bytes.extend_from_slice(MARK);
                bytes.extend_from_slice(&at.to_be_bytes());
                bytes.extend_from_slice(&length.to_be_bytes());
            }
            bytes.extend_from_slice(hash);
        }
        self.file.write_all_at(&bytes, self.length)?;
        self.file.sync_data()?;
        self.length += bytes.len() as u64;
        for (hash, ranges) in pieces {
            self.hashes.push(*hash);
            ranges.iter().for_each(|range| push(&mut self.unreadable, *range));
        }
        Ok(())
    }

    /// Deletes it: the copy is complete.
    pub(super) fn finish(self) -> anyhow::Result<()> {
        std::fs::remove_file(&self.path)
            .with_context(|| format!("the copy is complete; delete {}", self.path.display()))
    }
}

fn failed(path: &Path) -> String {
    format!("cannot keep the state of the copy in {}", path.display())
}

fn another(path: &Path) -> String {
    format!(
        "{} belongs to a copy of another source; delete it to begin anew, or name another with --state",
        path.display()
    )
}

fn lock(file: &File, path: &Path) -> anyhow::Result<()> {
    if let Err(Errno::WOULDBLOCK) = flock(file, FlockOperation::NonBlockingLockExclusive) {
        bail!("{} is used by another copy, which has not ended yet", path.display());
    }
    Ok(())
}

type Records = (Vec<Hash>, Vec<Range>, u64);

/// Reads the records behind the header: hashes, ranges, and how long the file is up to the last whole piece. `None` if they can
/// be no copy's of a source of `size` bytes.
fn records(reader: &mut impl Read, size: u64) -> io::Result<Option<Records>> {
    let (mut hashes, mut unreadable, mut length): Records = (Vec::new(), Vec::new(), HEADER);
    // Of the piece whose hash has not come yet.
    let (mut fresh, mut at): (Vec<Range>, u64) = (Vec::new(), HEADER);
    let (pieces, piece) = (size.div_ceil(PIECE as u64), PIECE as u64);
    let mut record = [0; RECORD];
    while fill(reader, &mut record)? {
        at += RECORD as u64;
        let begin = hashes.len() as u64 * piece;
        if let Some((offset, bytes)) = range(&record) {
            let behind = fresh.last().map_or(begin, |(at, length)| at + length);
            let end = offset.checked_add(bytes).filter(|end| *end <= size.min(begin + piece));
            if offset < behind || bytes == 0 || end.is_none() || fresh.len() > PIECE / SECTOR {
                return Ok(None);
            }
            fresh.push((offset, bytes));
        } else if hashes.len() as u64 == pieces {
            return Ok(None);
        } else {
            hashes.push(record);
            fresh.drain(..).for_each(|range| push(&mut unreadable, range));
            length = at;
        }
    }
    Ok(Some((hashes, unreadable, length)))
}

/// `false` at the end, also in the middle of a record.
fn fill(reader: &mut impl Read, record: &mut [u8]) -> io::Result<bool> {
    match reader.read_exact(record) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}

fn range(record: &Hash) -> Option<Range> {
    let (mark, rest) = record.split_at(MARK.len());
    let (offset, length) = rest.split_at(8);
    (mark == MARK).then_some(())?;
    let number = |bytes: &[u8]| Some(u64::from_be_bytes(bytes.try_into().ok()?));
    Some((number(offset)?, number(length)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SIZE: u64 = 3 * PIECE as u64 + 1000;

    fn open(dir: &tempfile::TempDir) -> anyhow::Result<State> {
        let path = dir.path().join("state");
        match State::earlier(&path, SIZE)? {
            Some(state) => state.go_on(SIZE),
            None => State::create(&path, SIZE, [9; 32]),
        }
    }

    #[test]
    fn what_could_not_be_read_is_known_after_an_interruption() {
        let dir = tempfile::tempdir().unwrap();
        let piece = PIECE as u64;
        let mut state = open(&dir).unwrap();
        let lost = vec![(4096, 4096), (piece - 4096, 4096)];
        state.add(&[([1; 32], lost), ([2; 32], vec![(piece, 4096)])]).unwrap();
        drop(state);
        let state = open(&dir).unwrap();
        assert_eq!(state.hashes, [[1; 32], [2; 32]]);
        // Over the pieces' border it is one.
        assert_eq!(state.unreadable, [(4096, 4096), (piece - 4096, 8192)]);
    }

    #[test]
    fn two_copies_have_not_one_state() {
        let dir = tempfile::tempdir().unwrap();
        let first = open(&dir).unwrap();
        assert!(open(&dir).unwrap_err().to_string().contains("another copy"));
        drop(first);
        open(&dir).unwrap();
    }

    #[test]
    fn a_cut_anywhere_leaves_whole_pieces_with_their_ranges() {
        let dir = tempfile::tempdir().unwrap();
        let mut state = open(&dir).unwrap();
        let piece = PIECE as u64;
        state
            .add(&[([1; 32], vec![(0, 4096)]), ([2; 32], vec![(piece, 4096)])])
            .unwrap();
        let bytes = std::fs::read(&state.path).unwrap();
        drop(state);
        for length in usize::try_from(HEADER).unwrap()..=bytes.len() {
            std::fs::write(dir.path().join("state"), &bytes[..length]).unwrap();
            let mut state = open(&dir).unwrap();
            assert!(state.unreadable.len() <= state.hashes.len());
            // Goes on where it is whole.
            state.add(&[([3; 32], Vec::new())]).unwrap();
            let (hashes, unreadable) = (state.hashes.clone(), state.unreadable.clone());
            drop(state);
            let again = open(&dir).unwrap();
            assert_eq!((again.hashes, again.unreadable), (hashes, unreadable));
        }
    }

    #[test]
    fn another_file_is_not_taken_for_a_state() {
        let dir = tempfile::tempdir().unwrap();
        for text in [&b"x"[..], &[7; 200]] {
            std::fs::write(dir.path().join("state"), text).unwrap();
            let error = open(&dir).unwrap_err().to_string();
            assert!(error.contains("is no state") && !error.contains("delete"), "{error}");
            assert_eq!(std::fs::read(dir.path().join("state")).unwrap(), text);
        }
    }

    #[test]
    fn a_state_of_the_earlier_kind_is_gone_on_with() {
        let dir = tempfile::tempdir().unwrap();
        let old = [&EARLIER[..], &SIZE.to_be_bytes(), &[9; 32], &[1; 32]].concat();
        std::fs::write(dir.path().join("state"), old).unwrap();
        assert_eq!(open(&dir).unwrap().hashes, [[1; 32]]);
    }

    #[test]
    fn ranges_that_no_copy_writes_are_refused() {
        let record = |at: u64, length: u64| [&MARK[..], &at.to_be_bytes(), &length.to_be_bytes()].concat();
        let piece = PIECE as u64;
        for (at, length) in [(piece, 1), (0, 0), (0, piece + 1), (u64::MAX, 2), (5, u64::MAX)] {
            let bytes = record(at, length);
            assert!(records(&mut bytes.as_slice(), SIZE).unwrap().is_none(), "{at} {length}");
        }
        let back = [record(4096, 4096), record(4096, 1)].concat();
        assert!(records(&mut back.as_slice(), SIZE).unwrap().is_none());
        assert!(records(&mut [1; 5 * 32].as_slice(), SIZE).unwrap().is_none());
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..400), marks in proptest::collection::vec(0..12usize, 0..4)) {
            let mut bytes = bytes;
            for mark in marks {
                if let Some(place) = bytes.get_mut(mark * 32..mark * 32 + 16) {
                    place.copy_from_slice(MARK);
                }
            }
            if let Some((hashes, ranges, length)) = records(&mut bytes.as_slice(), SIZE).unwrap() {
                prop_assert!(hashes.len() <= 4 && length <= HEADER + bytes.len() as u64);
                prop_assert!(ranges.iter().all(|(at, length)| at + length <= SIZE));
            }
        }
    }
}
