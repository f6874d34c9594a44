//! Copies a disk or an image to another, with all that can go wrong in between: it can be interrupted and gone on with, leaves
//! zeroes out, and is read back and compared at the end.
//!
//! The copy goes in pieces of [`PIECE`] bytes. What is known of it lies in a file of state (`state`): the SHA-256 of each piece
//! that is on the medium, and what could not be read. A copy that is begun again goes on behind them, if source and target are
//! still the same.
//!
//! Refused: a target that is smaller, in use, or the source itself, its disk or a part of it; a file of state that belongs to another
//! source, or is used by another copy.

mod source;
mod state;
mod target;

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::Duration;

use anyhow::{Context, bail};
use rustix::fs::{Advice, fadvise};
use sha2::{Digest, Sha256};

use source::Source;
use state::State;
use target::Target;

/// Bytes copied at a time.
pub const PIECE: usize = 4 << 20;
/// Bytes tried at a time where a piece cannot be read.
const SECTOR: usize = 4096;
/// Pieces between two syncs of the target.
const SYNC_EVERY: u64 = 32;
/// How long a piece is waited for before it is said again how far the copy is: a source may hang.
const LOOK: Duration = Duration::from_millis(200);
/// Pieces read ahead of the writer.
const AHEAD: usize = 2;

type Hash = [u8; 32];
/// Offset and length in bytes.
type Range = (u64, u64);

/// What is to be copied.
#[derive(Debug, Clone)]
pub struct Copy<'a> {
    /// A file or block device.
    pub source: &'a Path,
    /// A file, which is made, or a block device.
    pub target: &'a Path,
    /// Where the state is kept until the copy is complete.
    pub state: &'a Path,
    /// What cannot be read becomes zeroes; else it ends the copy.
    pub skip_errors: bool,
}

/// What happens meanwhile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// Source and target have been looked at, and nothing has been written yet; the target is there already, or is to be made.
    Begins(bool),
    /// So many bytes of so many are copied.
    Copied(u64, u64),
    /// So many bytes of so many are read back and compared.
    Compared(u64, u64),
}

/// A complete copy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// In bytes.
    pub size: u64,
    /// Of these so many were zeroes, and not written where that was not needed.
    pub zeroes: u64,
    /// Of these so many were there from an earlier try.
    pub resumed: u64,
    /// Where the source could not be read: offset and length in bytes.
    pub unreadable: Vec<Range>,
    /// SHA-256 of the whole target, as `sha256sum` says it.
    pub sha256: String,
}

/// Hears what happens; its error ends the copy.
pub type Hears<'a> = dyn FnMut(Progress) -> anyhow::Result<()> + 'a;

/// Copies, and compares.
///
/// # Errors
/// In words, with what to do next; what is copied stays, and the same call goes on behind it.
pub fn copy(job: &Copy<'_>, progress: &mut Hears<'_>) -> anyhow::Result<Report> {
    let ready = Ready::look(job)?;
    progress(Progress::Begins(ready.target.is_some()))?;
    let (source, target, mut state) = ready.begin(job)?;
    let size = source.size;
    let resumed = (state.hashes.len() as u64 * PIECE as u64).min(size);
    progress(Progress::Copied(resumed, size))?;
    let zeroes = transfer(source, &target, &mut state, progress)?;
    target.sync().context("cannot bring the copy onto its medium")?;
    let sha256 = compare(&target, size, &state.hashes, progress)?;
    target.is_at_its_path()?;
    let unreadable = std::mem::take(&mut state.unreadable);
    state.finish()?;
    Ok(Report {
        size,
        zeroes,
        resumed,
        unreadable,
        sha256,
    })
}

/// A copy that can begin; nothing is written yet.
struct Ready {
    source: Source,
    /// Unless it is to be made.
    target: Option<Target>,
    /// What an earlier try has left.
    earlier: Option<State>,
}

impl Ready {
    fn look(job: &Copy<'_>) -> anyhow::Result<Self> {
        let source = Source::open(job.source, job.skip_errors)?;
        let earlier = State::earlier(job.state, source.size)?;
        let first = source.first(earlier.is_some())?;
        let target = Target::open(job.target, &source.file, source.size)?;
        if let Some(state) = &earlier {
            state.is_of(first)?;
            source.is_still(state)?;
            match &target {
                Some(target) => target.has_the_last_of(state, source.size)?,
                None if state.hashes.is_empty() => {}
                None => bail!(
                    "{} is not there, and {} says that a part of it was copied; delete the latter to begin anew",
                    job.target.display(),
                    job.state.display()
                ),
            }
        }
        Ok(Self {
            source,
            target,
            earlier,
        })
    }

    /// Makes what is to be made, after another look: somebody may have thought long.
    fn begin(self, job: &Copy<'_>) -> anyhow::Result<(Source, Target, State)> {
        let size = self.source.size;
        self.source.is_as_large()?;
        let first = self.source.first(self.earlier.is_some())?;
        if let Some(target) = &self.target {
            target.is_at_its_path()?;
        }
        let is_new = self.target.is_none();
        let target = self.target.map_or_else(|| Target::create(job.target), Ok)?;
        let state = match (self.earlier, first) {
            (Some(state), first) => state.is_of(first).and_then(|()| state.go_on(size)),
            (None, Some(first)) => State::create(job.state, size, first),
            (None, None) => Err(anyhow::anyhow!(
                "the beginning of the source cannot be read; see whether it is still there, then call again"
            )),
        };
        if state.is_err() && is_new && target.is_at_its_path().is_ok() {
            // Nothing is in it; it would be asked about next time.
            let _ = std::fs::remove_file(job.target);
        }
        let state = state?;
        target.make_room(size)?;
        Ok((self.source, target, state))
    }
}

fn hash(bytes: &[u8]) -> Hash {
    Sha256::digest(bytes).into()
}

/// Adds a range behind others, and to the last one if it begins where that ends.
fn push(ranges: &mut Vec<Range>, (at, length): Range) {
    match ranges.last_mut() {
        Some((begin, known)) if *begin + *known == at => *known += length,
        _ => ranges.push((at, length)),
    }
}

fn length_at(offset: u64, size: u64) -> usize {
    usize::try_from(size.saturating_sub(offset))
        .unwrap_or(usize::MAX)
        .min(PIECE)
}

struct Piece {
    offset: u64,
    bytes: Vec<u8>,
    hash: Hash,
    zero: bool,
    unreadable: Vec<Range>,
}

/// Copies what is missing; how many bytes were zeroes.
fn transfer(source: Source, target: &Target, state: &mut State, progress: &mut Hears<'_>) -> anyhow::Result<u64> {
    let (begin, size) = (state.hashes.len() as u64 * PIECE as u64, source.size);
    let (send, receive) = sync_channel::<anyhow::Result<Piece>>(AHEAD);
    let reader = std::thread::Builder::new()
        .name("copy-read".to_owned())
        .spawn(move || {
            let mut offset = begin;
            while offset < size {
                let piece = source.piece(offset).map(|(bytes, unreadable)| Piece {
                    hash: hash(&bytes),
                    zero: bytes.iter().all(|&byte| byte == 0),
                    offset,
                    bytes,
                    unreadable,
                });
                // The writer has given up.
                if send.send(piece).is_err() {
                    return;
                }
                offset += length_at(offset, size) as u64;
            }
        })?;
    let written = write_pieces(&receive, begin.min(size), size, target, state, progress);
    drop(receive);
    if written.is_ok() {
        // A panic there showed as an early end here. Else it ends as soon as nobody listens, or when a source that hangs answers.
        let _ = reader.join();
    }
    written
}

fn write_pieces(
    pieces: &Receiver<anyhow::Result<Piece>>,
    begin: u64,
    size: u64,
    target: &Target,
    state: &mut State,
    progress: &mut Hears<'_>,
) -> anyhow::Result<u64> {
    let (mut zeroes, mut done) = (0, begin);
    let mut fresh: Vec<(Hash, Vec<Range>)> = Vec::new();
    let mut result = Ok(());
    loop {
        let step = match pieces.recv_timeout(LOOK) {
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => Ok(()),
            Ok(piece) => piece.and_then(|piece| {
                let written = target.write(piece.offset, &piece.bytes, piece.zero);
                written.with_context(|| format!("cannot write the copy at byte {}", piece.offset))?;
                let length = piece.bytes.len() as u64;
                zeroes += if piece.zero { length } else { 0 };
                done = piece.offset + length;
                fresh.push((piece.hash, piece.unreadable));
                Ok(())
            }),
        };
        let step = step.and_then(|()| progress(Progress::Copied(done, size)));
        if let Err(error) = step {
            result = Err(error);
            break;
        }
        if fresh.len() as u64 >= SYNC_EVERY {
            note(target, state, &mut fresh)?;
        }
    }
    // Also after an error: what was copied need not be copied again.
    note(target, state, &mut fresh)?;
    result?;
    if state.hashes.len() as u64 != size.div_ceil(PIECE as u64) {
        bail!("reading the source ended early; the same call goes on");
    }
    Ok(zeroes)
}

fn note(target: &Target, state: &mut State, fresh: &mut Vec<(Hash, Vec<Range>)>) -> anyhow::Result<()> {
    target.sync().context("cannot bring the copy onto its medium")?;
    state.add(fresh).context("cannot note what was copied")?;
    fresh.clear();
    Ok(())
}

/// Reads the copy back from its medium; its SHA-256.
fn compare(target: &Target, size: u64, hashes: &[Hash], progress: &mut Hears<'_>) -> anyhow::Result<String> {
    // What is in memory says nothing of the medium.
    let _ = fadvise(&target.file, 0, None, Advice::DontNeed);
    let mut whole = Sha256::new();
    let mut piece = vec![0; PIECE];
    let mut offset = 0;
    for known in hashes {
        let bytes = piece.get_mut(..length_at(offset, size)).unwrap_or_default();
        target
            .file
            .read_exact_at(bytes, offset)
            .with_context(|| format!("cannot read the copy back at byte {offset}"))?;
        if hash(bytes) != *known {
            bail!(
                "the copy differs from the source between byte {offset} and {}: the target's medium is broken, or something \
                 else writes to it",
                offset + bytes.len() as u64
            );
        }
        whole.update(&*bytes);
        offset += bytes.len() as u64;
        progress(Progress::Compared(offset, size))?;
    }
    Ok(whole.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Where the state of a copy to `target` is kept if nothing else is said: beside a file, and for a device in `folder`.
#[must_use]
pub fn usual_state(target: &Path, folder: &Path) -> PathBuf {
    let device = match std::fs::metadata(target) {
        Ok(known) => known.file_type().is_block_device(),
        // It may be plugged in the next moment.
        Err(_) => target.starts_with("/dev"),
    };
    let name = target.file_name().unwrap_or_default().to_string_lossy().into_owned();
    match device {
        true => folder.join(format!("copy-{name}.state")),
        false => target.with_file_name(format!("{name}.copy-state")),
    }
}

/// Makes sure that what was written is found: for callers that copy to a new file.
///
/// # Errors
/// The file system's.
pub fn sync_folder(target: &Path) -> io::Result<()> {
    match target.parent() {
        Some(parent) if parent.as_os_str().is_empty() => File::open(".")?.sync_all(),
        Some(parent) => File::open(parent)?.sync_all(),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests;
