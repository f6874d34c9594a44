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

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, sync_channel};

use anyhow::{Context, bail};
use rustix::fs::{Advice, FallocateFlags, FlockOperation, fadvise, fallocate, flock};
use rustix::io::Errno;
use sha2::{Digest, Sha256};

use source::Source;
use state::State;

/// Bytes copied at a time.
pub const PIECE: usize = 4 << 20;
/// Bytes tried at a time where a piece cannot be read.
const SECTOR: usize = 4096;
/// Pieces between two syncs of the target.
const SYNC_EVERY: u64 = 32;
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
    let source = Source::open(job.source, job.skip_errors)?;
    let size = source.size;
    let first = source.first(job.state.exists())?;
    let target = Target::open(job.target, &source.file, size)?;
    progress(Progress::Begins(target.is_some()))?;
    // Before the target is touched: a state of another copy refuses.
    let mut state = State::open(job.state, size, first)?;
    source.is_still(&state)?;
    let target = target.map_or_else(|| Target::create(job.target), Ok)?.sized(size)?;
    let resumed = state.hashes.len() as u64;
    check_last(&state, &target, size)?;
    progress(Progress::Copied((resumed * PIECE as u64).min(size), size))?;
    let zeroes = transfer(source, &target, &mut state, progress)?;
    target.sync().context("cannot bring the copy onto its medium")?;
    let sha256 = compare(&target, size, &state.hashes, progress)?;
    let unreadable = std::mem::take(&mut state.unreadable);
    state.finish()?;
    Ok(Report {
        size,
        zeroes,
        resumed: (resumed * PIECE as u64).min(size),
        unreadable,
        sha256,
    })
}

/// Where the copy goes.
struct Target {
    file: File,
    path: PathBuf,
    device: bool,
}

impl Target {
    /// `None` if it is to be a file, and is not there yet. Nothing is written.
    fn open(path: &Path, source: &File, size: u64) -> anyhow::Result<Option<Self>> {
        let known = match std::fs::metadata(path) {
            Ok(known) => known,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                if path.starts_with("/dev") {
                    bail!("{} is not there; is the disk plugged in?", path.display());
                }
                return Ok(None);
            }
            Err(error) => return Err(error).with_context(|| format!("cannot see what {} is", path.display())),
        };
        let device = known.file_type().is_block_device();
        let from = source.metadata()?;
        let devices = device && from.file_type().is_block_device();
        let same_device = devices && source::overlap(Path::new("/sys"), known.rdev(), from.rdev());
        if same_device || (!device && (known.dev(), known.ino()) == (from.dev(), from.ino())) {
            bail!("{} would be copied onto itself; name another target", path.display());
        }
        if !device && !known.is_file() {
            bail!(
                "{} is neither a file nor a block device; name one of these",
                path.display()
            );
        }
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        if device {
            // A mounted one is refused.
            options.custom_flags(libc::O_EXCL);
        }
        let file = options.open(path).with_context(|| {
            format!(
                "cannot open {} alone for writing; is it mounted or held?",
                path.display()
            )
        })?;
        let mut target = Self::locked(file, path, device)?;
        let room = target.file.seek(SeekFrom::End(0))?;
        if device && room < size {
            bail!(
                "{} has {room} bytes, and {size} are to be copied; name a larger one",
                path.display()
            );
        }
        Ok(Some(target))
    }

    fn create(path: &Path) -> anyhow::Result<Self> {
        let made = OpenOptions::new().read(true).write(true).create_new(true).open(path);
        Self::locked(
            made.with_context(|| format!("cannot make {}", path.display()))?,
            path,
            false,
        )
    }

    fn locked(file: File, path: &Path, device: bool) -> anyhow::Result<Self> {
        // What O_EXCL is to devices.
        if let Err(Errno::WOULDBLOCK) = flock(&file, FlockOperation::NonBlockingLockExclusive) {
            bail!("{} is written by another copy, which has not ended yet", path.display());
        }
        Ok(Self {
            file,
            path: path.to_owned(),
            device,
        })
    }

    /// Makes a file as large as the source.
    fn sized(self, size: u64) -> anyhow::Result<Self> {
        if !self.device && self.file.metadata()?.len() != size {
            self.file
                .set_len(size)
                .with_context(|| format!("cannot make {} as large as the source", self.path.display()))?;
        }
        Ok(self)
    }

    fn write(&self, offset: u64, piece: &[u8], zero: bool) -> io::Result<()> {
        if !zero {
            return self.file.write_all_at(piece, offset);
        }
        let length = piece.len() as u64;
        let done = if self.device {
            stiefel_sys::block::zero_out(&self.file, offset, length)
        } else {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            fallocate(&self.file, flags, offset, length).map_err(io::Error::from)
        };
        // A file system without holes, or a last piece that is not of whole blocks.
        done.or_else(|_| self.file.write_all_at(piece, offset))
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
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

/// A copy that goes on must still have what was written last: else the target is another one.
fn check_last(state: &State, target: &Target, size: u64) -> anyhow::Result<()> {
    let Some(last) = state.hashes.last() else {
        return Ok(());
    };
    let offset = (state.hashes.len() as u64 - 1) * PIECE as u64;
    let mut piece = vec![0; length_at(offset, size)];
    target
        .file
        .read_exact_at(&mut piece, offset)
        .context("cannot read the copy")?;
    if hash(&piece) != *last {
        bail!(
            "{} does not hold what was copied before; delete {} to begin anew",
            target.path.display(),
            state.path.display()
        );
    }
    Ok(())
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
    let written = write_pieces(&receive, size, target, state, progress);
    drop(receive);
    // It ends as soon as nobody listens; a panic there showed as an early end here.
    let _ = reader.join();
    written
}

fn write_pieces(
    pieces: &Receiver<anyhow::Result<Piece>>,
    size: u64,
    target: &Target,
    state: &mut State,
    progress: &mut Hears<'_>,
) -> anyhow::Result<u64> {
    let mut zeroes = 0;
    let mut fresh: Vec<(Hash, Vec<Range>)> = Vec::new();
    let mut result = Ok(());
    for piece in pieces {
        let step = piece.and_then(|piece| {
            let length = piece.bytes.len() as u64;
            let written = target.write(piece.offset, &piece.bytes, piece.zero);
            written.with_context(|| format!("cannot write the copy at byte {}", piece.offset))?;
            zeroes += if piece.zero { length } else { 0 };
            fresh.push((piece.hash, piece.unreadable));
            progress(Progress::Copied(piece.offset + length, size))
        });
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
    let device = std::fs::metadata(target).is_ok_and(|known| known.file_type().is_block_device());
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
mod tests {
    use super::*;
    use std::fs;
    use std::io::Write;

    struct Place(tempfile::TempDir);

    impl Place {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn path(&self, name: &str) -> PathBuf {
            self.0.path().join(name)
        }

        /// Three pieces and a bit, the second of zeroes.
        fn source(&self) -> Vec<u8> {
            let mut bytes: Vec<u8> = (0..3 * PIECE + 1000).map(|i| u8::try_from(i % 251).unwrap()).collect();
            bytes[PIECE..2 * PIECE].fill(0);
            fs::write(self.path("source"), &bytes).unwrap();
            bytes
        }

        fn copy(&self) -> anyhow::Result<Report> {
            copy(
                &Copy {
                    source: &self.path("source"),
                    target: &self.path("target"),
                    state: &self.path("state"),
                    skip_errors: false,
                },
                &mut |_| Ok(()),
            )
        }
    }

    #[test]
    fn a_copy_is_the_same_and_leaves_zeroes_out() {
        let place = Place::new();
        let bytes = place.source();
        let report = place.copy().unwrap();
        assert_eq!(fs::read(place.path("target")).unwrap(), bytes);
        assert_eq!(
            (report.size, report.zeroes, report.resumed),
            (bytes.len() as u64, PIECE as u64, 0)
        );
        let expected: String = hash(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(report.sha256, expected);
        assert!(!place.path("state").exists());
        let blocks = fs::metadata(place.path("target")).unwrap().blocks();
        assert!(blocks * 512 < bytes.len() as u64);
    }

    #[test]
    fn old_bytes_do_not_shine_through_where_the_source_is_zero() {
        let place = Place::new();
        let bytes = place.source();
        fs::write(place.path("target"), vec![0xff; bytes.len() + 5]).unwrap();
        place.copy().unwrap();
        assert_eq!(fs::read(place.path("target")).unwrap(), bytes);
    }

    /// The state as after the first two pieces.
    fn interrupted(place: &Place, bytes: &[u8]) {
        let file = fs::File::create(place.path("target")).unwrap();
        file.set_len(bytes.len() as u64).unwrap();
        file.write_all_at(&bytes[..2 * PIECE], 0).unwrap();
        let mut state = State::open(&place.path("state"), bytes.len() as u64, Some(hash(&bytes[..PIECE]))).unwrap();
        let lost = vec![(PIECE as u64 + 4096, 8192), (2 * PIECE as u64 - 4096, 4096)];
        state
            .add(&[
                (hash(&bytes[..PIECE]), Vec::new()),
                (hash(&bytes[PIECE..2 * PIECE]), lost),
            ])
            .unwrap();
        // Torn in the middle of the third.
        let file = fs::File::options().append(true).open(place.path("state")).unwrap();
        (&file).write_all(&[1; 7]).unwrap();
    }

    #[test]
    fn an_interrupted_copy_goes_on_behind_what_is_there() {
        let place = Place::new();
        let bytes = place.source();
        interrupted(&place, &bytes);
        let report = place.copy().unwrap();
        assert_eq!(report.resumed, 2 * PIECE as u64);
        // What the earlier try could not read is said again.
        let piece = PIECE as u64;
        assert_eq!(report.unreadable, [(piece + 4096, 8192), (2 * piece - 4096, 4096)]);
        assert_eq!(fs::read(place.path("target")).unwrap(), bytes);
    }

    #[test]
    fn another_source_or_target_is_not_gone_on_with() {
        let place = Place::new();
        let mut bytes = place.source();
        interrupted(&place, &bytes);
        let other = fs::File::options().write(true).open(place.path("target")).unwrap();
        other.write_all_at(&[9; 10], PIECE as u64 + 5).unwrap();
        assert!(place.copy().unwrap_err().to_string().contains("does not hold"));
        bytes[0] ^= 1;
        fs::write(place.path("source"), &bytes).unwrap();
        assert!(place.copy().unwrap_err().to_string().contains("another source"));
    }

    #[test]
    fn a_source_that_has_changed_behind_its_first_piece_is_not_gone_on_with() {
        let place = Place::new();
        let mut bytes = place.source();
        interrupted(&place, &bytes);
        // The third piece, without losses.
        let mut state = State::open(&place.path("state"), bytes.len() as u64, Some(hash(&bytes[..PIECE]))).unwrap();
        state.add(&[(hash(&bytes[2 * PIECE..3 * PIECE]), Vec::new())]).unwrap();
        drop(state);
        let target = fs::File::options().write(true).open(place.path("target")).unwrap();
        target
            .write_all_at(&bytes[2 * PIECE..3 * PIECE], 2 * PIECE as u64)
            .unwrap();
        // A disk that was cloned from the same image.
        bytes[2 * PIECE + 9] ^= 1;
        fs::write(place.path("source"), &bytes).unwrap();
        let error = place.copy().unwrap_err().to_string();
        assert!(error.contains("not what it was"), "{error}");
    }

    #[test]
    fn a_source_that_has_gone_is_no_disk_of_bad_sectors() {
        let place = Place::new();
        let source = place.path("source");
        place.source();
        let job = Copy {
            source: &source,
            target: &place.path("target"),
            state: &place.path("state"),
            skip_errors: true,
        };
        // As when it is pulled out: nothing of it can be read any more.
        let mut pull = |progress| {
            if let Progress::Copied(..) = progress {
                File::options().write(true).open(&source)?.set_len(0)?;
            }
            Ok(())
        };
        let error = copy(&job, &mut pull).unwrap_err().to_string();
        assert!(error.contains("does not answer any more"), "{error}");
        assert!(place.path("state").exists());
    }

    #[test]
    fn a_target_that_changes_under_the_copy_is_noticed() {
        let place = Place::new();
        place.source();
        let target = place.path("target");
        let mut done = false;
        let mut meddle = |progress| {
            if let Progress::Compared(..) = progress
                && !std::mem::replace(&mut done, true)
            {
                let file = fs::File::options().write(true).open(&target).unwrap();
                file.write_all_at(&[1], 2 * PIECE as u64).unwrap();
            }
            Ok(())
        };
        let job = Copy {
            source: &place.path("source"),
            target: &place.path("target"),
            state: &place.path("state"),
            skip_errors: false,
        };
        let error = copy(&job, &mut meddle).unwrap_err();
        assert!(error.to_string().contains("differs"), "{error}");
    }

    #[test]
    fn nothing_is_written_before_it_begins() {
        let place = Place::new();
        place.source();
        fs::write(place.path("target"), "old").unwrap();
        let ended = |at: Progress| {
            let job = Copy {
                source: &place.path("source"),
                target: &place.path("target"),
                state: &place.path("state"),
                skip_errors: false,
            };
            let mut hears = |progress| match progress == at {
                true => bail!("no"),
                false => Ok(()),
            };
            copy(&job, &mut hears).unwrap_err().to_string()
        };
        assert_eq!(ended(Progress::Begins(true)), "no");
        assert_eq!(fs::read(place.path("target")).unwrap(), b"old");
        assert!(!place.path("state").exists());
        // What cannot be is refused before anybody is asked.
        fs::remove_file(place.path("target")).unwrap();
        assert_eq!(ended(Progress::Begins(false)), "no");
        fs::create_dir(place.path("target")).unwrap();
        assert!(ended(Progress::Begins(true)).contains("neither a file"));
    }

    #[test]
    fn a_copy_that_is_ended_keeps_what_it_has() {
        let place = Place::new();
        let bytes = place.source();
        let piece = PIECE as u64;
        let job = Copy {
            source: &place.path("source"),
            target: &place.path("target"),
            state: &place.path("state"),
            skip_errors: false,
        };
        let mut hears = |progress| match progress {
            Progress::Copied(done, _) if done == 2 * piece => bail!("enough"),
            _ => Ok(()),
        };
        assert_eq!(copy(&job, &mut hears).unwrap_err().to_string(), "enough");
        assert_eq!(place.copy().unwrap().resumed, 2 * piece);
        assert_eq!(fs::read(place.path("target")).unwrap(), bytes);
    }

    #[test]
    fn a_file_is_not_copied_onto_itself() {
        let place = Place::new();
        place.source();
        fs::hard_link(place.path("source"), place.path("target")).unwrap();
        assert!(place.copy().unwrap_err().to_string().contains("itself"));
    }

    #[test]
    fn the_state_of_a_file_lies_beside_it() {
        let state = usual_state(Path::new("/tmp/a/disk.img"), Path::new("/var/lib/stiefel"));
        assert_eq!(state, Path::new("/tmp/a/disk.img.copy-state"));
    }
}
