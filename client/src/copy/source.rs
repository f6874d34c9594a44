//! Where a copy comes from: read piece by piece, with what cannot be read, and told from what else there is.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use rustix::fs::{Advice, fadvise, major, minor};
use stiefel_sys::block;

use super::state::State;
use super::{Hash, PIECE, Range, SECTOR, hash, length_at, push};

/// Pieces of an earlier try that are read again before it is gone on with.
const SAMPLES: u64 = 16;
/// Places that are tried before a source is said to have gone.
const PROBES: u64 = 8;

/// An open source.
pub(super) struct Source {
    pub(super) file: File,
    /// In bytes.
    pub(super) size: u64,
    path: PathBuf,
    /// What cannot be read becomes zeroes; else it is an error.
    skip: bool,
}

impl Source {
    pub(super) fn open(path: &Path, skip: bool) -> anyhow::Result<Self> {
        // A FIFO would be waited for.
        let opened = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path);
        let mut file = opened.with_context(|| format!("cannot open {} for reading", path.display()))?;
        let kind = file.metadata()?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            bail!(
                "{} is neither a file nor a block device; name one of these",
                path.display()
            );
        }
        let size = file.seek(SeekFrom::End(0))?;
        if size == 0 {
            bail!("{} is empty; is its medium in?", path.display());
        }
        Ok(Self {
            file,
            size,
            path: path.to_owned(),
            skip,
        })
    }

    /// Whether it has still the size that it was opened with.
    pub(super) fn is_as_large(&self) -> anyhow::Result<()> {
        let now = (&self.file).seek(SeekFrom::End(0))?;
        if now != self.size {
            bail!(
                "{} had {} bytes, and has {now} now: something writes to it; end that, then call again",
                self.path.display(),
                self.size
            );
        }
        Ok(())
    }

    /// A piece, and what of it could not be read.
    pub(super) fn piece(&self, offset: u64) -> anyhow::Result<(Vec<u8>, Vec<Range>)> {
        let mut piece = vec![0; length_at(offset, self.size)];
        let mut unreadable = Vec::new();
        read_piece(&self.file, offset, &mut piece, self.skip, &mut unreadable)?;
        // A disk that was pulled out, or a lost connection, is no disk of bad sectors. What is in memory may still have been read.
        let end = offset + piece.len() as u64;
        if unreadable.last().is_some_and(|(at, length)| at + length == end) && self.has_gone() {
            bail!(
                "{} does not answer any more, anywhere; when it is there again, the same call goes on at byte {offset}",
                self.path.display()
            );
        }
        Ok((piece, unreadable))
    }

    /// The hash of its first piece, by which it is known again. With an earlier try none that cannot be read as a whole any more is
    /// needed: the disk is dying, and what was copied of it is worth more than what it says now.
    pub(super) fn first(&self, earlier: bool) -> anyhow::Result<Option<Hash>> {
        match self.piece(0) {
            Ok((bytes, unreadable)) if unreadable.is_empty() || !earlier => Ok(Some(hash(&bytes))),
            Err(error) if !earlier => Err(error),
            _ => Ok(None),
        }
    }

    /// Whether nothing can be read, in places all over it.
    fn has_gone(&self) -> bool {
        // What is in memory says nothing.
        let _ = fadvise(&self.file, 0, None, Advice::DontNeed);
        let mut places = (0..PROBES).map(|number| self.size / PROBES * number / SECTOR as u64 * SECTOR as u64);
        !places.any(|at| {
            let length = usize::try_from(self.size - at).unwrap_or(SECTOR).min(SECTOR);
            self.file.read_exact_at(&mut vec![0; length], at).is_ok()
        })
    }

    /// Whether pieces from all over what an earlier try has copied are still the same: disks that were cloned from one image begin
    /// alike, and what was written since would be half in the copy.
    pub(super) fn is_still(&self, state: &State) -> anyhow::Result<()> {
        let known = state.hashes.len() as u64;
        let samples = SAMPLES.min(known);
        for number in 1..=samples {
            let index = known * number / samples - 1;
            let offset = index * PIECE as u64;
            let lost = |(at, length): &Range| *at < offset + PIECE as u64 && at + length > offset;
            if state.unreadable.iter().any(lost) {
                // It may be read better this time.
                continue;
            }
            let was = usize::try_from(index).ok().and_then(|index| state.hashes.get(index));
            let mut bytes = vec![0; length_at(offset, self.size)];
            if self.file.read_exact_at(&mut bytes, offset).is_err() {
                // It is copied already, and no longer there to be compared: no reason to throw the copy away.
                continue;
            }
            if was.is_some_and(|was| *was != hash(&bytes)) {
                bail!(
                    "{} is not what it was when its copy was begun (it differs behind byte {offset}): another one, or something has \
                     written to it; delete {} to begin anew",
                    self.path.display(),
                    state.path.display()
                );
            }
        }
        Ok(())
    }
}

/// Whether two files or block devices are the same, or one is a part of the other.
pub(super) fn same(sysfs: &Path, one: &Metadata, other: &Metadata) -> bool {
    match (one.file_type().is_block_device(), other.file_type().is_block_device()) {
        (true, true) => overlap(sysfs, one.rdev(), other.rdev()),
        (false, false) => (one.dev(), one.ino()) == (other.dev(), other.ino()),
        _ => false,
    }
}

/// The loop devices in use, as far as what they stand on is in sight: their names, and that.
pub(super) fn loops(sysfs: &Path) -> Vec<(String, Metadata)> {
    let known = |(name, below): (String, PathBuf)| Some((name, std::fs::metadata(below).ok()?));
    block::loops(sysfs).into_iter().filter_map(known).collect()
}

/// The kernel's folder of a block device.
pub(super) fn folder(sysfs: &Path, number: u64) -> Option<PathBuf> {
    let link = sysfs.join(format!("dev/block/{}:{}", major(number), minor(number)));
    link.canonicalize().ok()
}

/// Whether two block devices are the same, or one is a part of the other. `sysfs` is where that is mounted.
fn overlap(sysfs: &Path, one: u64, other: u64) -> bool {
    let parts = match (folder(sysfs, one), folder(sysfs, other)) {
        // A partition's folder lies in its disk's.
        (Some(one), Some(other)) => one.starts_with(&other) || other.starts_with(&one),
        _ => false,
    };
    one == other || parts
}

/// Reads a piece, in sectors where it cannot be read as a whole: with `skip` what cannot be read becomes zeroes, and is noted; else
/// the first such place is told.
fn read_piece(
    source: &File,
    offset: u64,
    piece: &mut [u8],
    skip: bool,
    unreadable: &mut Vec<Range>,
) -> anyhow::Result<()> {
    if source.read_exact_at(piece, offset).is_ok() {
        return Ok(());
    }
    let mut at = offset;
    for sector in piece.chunks_mut(SECTOR) {
        let length = sector.len() as u64;
        match source.read_exact_at(sector, at) {
            Err(error) if !skip => return Err(error).with_context(|| {
                format!(
                    "cannot read the source at byte {at}; the same call tries again there, --skip-errors goes on with zeroes"
                )
            }),
            Err(_) => {
                sector.fill(0);
                push(unreadable, (at, length));
            }
            Ok(()) => {}
        }
        at += length;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::makedev;
    use std::io::Write;
    use std::os::unix::fs::symlink;

    #[test]
    fn what_cannot_be_read_becomes_zeroes_and_the_rest_is_kept() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![7; 3 * SECTOR]).unwrap();
        // Behind its end nothing can be read, as on a bad sector.
        let mut piece = vec![1; 5 * SECTOR];
        let mut unreadable = Vec::new();
        let refused = read_piece(&file, 0, &mut piece, false, &mut Vec::new()).unwrap_err();
        assert!(
            refused.to_string().contains(&format!("byte {};", 3 * SECTOR)),
            "{refused}"
        );
        read_piece(&file, 0, &mut piece, true, &mut unreadable).unwrap();
        assert_eq!(unreadable, [(3 * SECTOR as u64, 2 * SECTOR as u64)]);
        assert!(piece[..3 * SECTOR].iter().all(|&byte| byte == 7));
        assert!(piece[3 * SECTOR..].iter().all(|&byte| byte == 0));
    }

    #[test]
    fn a_source_with_a_whole_piece_of_bad_sectors_has_not_gone() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(3 * PIECE as u64).unwrap();
        let source = Source::open(file.path(), true).unwrap();
        file.as_file().set_len(PIECE as u64).unwrap();
        let (bytes, unreadable) = source.piece(PIECE as u64).unwrap();
        assert_eq!(unreadable, [(PIECE as u64, PIECE as u64)]);
        assert!(bytes.iter().all(|&byte| byte == 0));
        file.as_file().set_len(0).unwrap();
        assert!(source.piece(PIECE as u64).is_err());
    }

    #[test]
    fn what_was_copied_and_cannot_be_read_any_more_is_no_other_source() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("source");
        std::fs::write(&path, vec![7; 2 * PIECE]).unwrap();
        let source = Source::open(&path, true).unwrap();
        let (state, size) = (dir.path().join("state"), 2 * PIECE as u64);
        let first = source.first(false).unwrap().unwrap();
        let mut known = State::create(&state, size, first).unwrap();
        known
            .add(&[(hash(&[7; PIECE]), Vec::new()), (hash(&[7; PIECE]), Vec::new())])
            .unwrap();
        drop(known);
        // Only the first half of its first piece is still there.
        let file = File::options().write(true).open(&path).unwrap();
        file.set_len(PIECE as u64 / 2).unwrap();
        assert_eq!(source.first(true).unwrap(), None);
        let known = State::earlier(&state, size).unwrap().unwrap();
        source.is_still(&known).unwrap();
        known.is_of(None).unwrap();
        known.is_of(Some(first)).unwrap();
        assert!(known.is_of(Some([0; 32])).is_err());
    }

    #[test]
    fn what_loop_devices_stand_on_is_known() {
        let root = tempfile::tempdir().unwrap();
        let (image, other) = (root.path().join("an image"), root.path().join("other"));
        std::fs::write(&image, "x").unwrap();
        std::fs::write(&other, "x").unwrap();
        for (name, below) in [("loop0", &image), ("loop1", &root.path().join("deleted"))] {
            let folder = root.path().join("block").join(name).join("loop");
            std::fs::create_dir_all(&folder).unwrap();
            std::fs::write(folder.join("backing_file"), format!("{}\n", below.display())).unwrap();
        }
        std::fs::create_dir_all(root.path().join("block/loop2")).unwrap();
        let found = loops(root.path());
        assert_eq!(
            found.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(),
            ["loop0"]
        );
        let known = |path| std::fs::metadata(path).unwrap();
        assert!(same(root.path(), &found[0].1, &known(&image)) && !same(root.path(), &found[0].1, &known(&other)));
        assert!(loops(&root.path().join("nothing")).is_empty());
    }

    #[test]
    fn a_fifo_is_no_source_and_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fifo");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &path,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RUSR,
            0,
        )
        .unwrap();
        let error = Source::open(&path, false).err().unwrap().to_string();
        assert!(error.contains("neither a file nor"), "{error}");
    }

    #[test]
    fn a_disk_and_its_partitions_are_not_copied_onto_each_other() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(root.path().join("dev/block")).unwrap();
        for (number, path) in [
            ("8:0", "sda"),
            ("8:1", "sda/sda1"),
            ("8:2", "sda/sda2"),
            ("8:16", "sdaa"),
        ] {
            std::fs::create_dir_all(root.path().join("devices").join(path)).unwrap();
            symlink(
                Path::new("../../devices").join(path),
                root.path().join("dev/block").join(number),
            )
            .unwrap();
        }
        let same = |one, other| overlap(root.path(), makedev(8, one), makedev(8, other));
        assert!(same(0, 0) && same(0, 1) && same(2, 0));
        assert!(!same(1, 2) && !same(0, 16) && !same(1, 16));
        // Without sysfs.
        assert!(same(5, 5) && !same(5, 6));
    }
}
