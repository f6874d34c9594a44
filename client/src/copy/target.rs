//! Where a copy goes: looked at before anything is written, and held until the end.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use rustix::fs::{FallocateFlags, FlockOperation, fallocate, flock};
use rustix::io::Errno;

use super::state::State;
use super::{PIECE, hash, length_at, source};

/// An open target, which nobody else has mounted, and no other copy has.
pub(super) struct Target {
    pub(super) file: File,
    path: PathBuf,
    device: bool,
}

impl Target {
    /// `None` if it is to be a file, and is not there yet. Nothing is written.
    pub(super) fn open(path: &Path, source: &File, size: u64) -> anyhow::Result<Option<Self>> {
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
        if !device && !known.is_file() {
            bail!(
                "{} is neither a file nor a block device; name one of these",
                path.display()
            );
        }
        let sysfs = Path::new("/sys");
        may_be_written(sysfs, path, &known, &source.metadata()?)?;
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        if device {
            // A mounted one is refused.
            options.custom_flags(libc::O_EXCL);
        }
        let file = match options.open(path) {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                bail!(
                    "{} is mounted or held; unmount it, or end what holds it",
                    path.display()
                )
            }
            opened => opened.with_context(|| format!("cannot open {} for writing", path.display()))?,
        };
        let mut target = Self::locked(file, path, device)?;
        // What was looked at is what was opened.
        target.is_at_its_path()?;
        let room = target.file.seek(SeekFrom::End(0))?;
        if device && room < size {
            bail!(
                "{} has {room} bytes, and {size} are to be copied; name a larger one",
                path.display()
            );
        }
        Ok(Some(target))
    }

    /// Makes the file.
    pub(super) fn create(path: &Path) -> anyhow::Result<Self> {
        let mut options = OpenOptions::new();
        let made = options.read(true).write(true).create(true).truncate(false).open(path);
        let file = made.with_context(|| format!("cannot make {}", path.display()))?;
        let target = Self::locked(file, path, false)?;
        let now = target.file.metadata()?;
        if !now.is_file() || now.len() != 0 {
            bail!("{} has come meanwhile; call again", path.display());
        }
        Ok(target)
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

    /// Whether who looks for the copy at its path finds what is open here: it may have been moved or deleted, or another disk got
    /// the name.
    pub(super) fn is_at_its_path(&self) -> anyhow::Result<()> {
        let open = self.file.metadata()?;
        let same = std::fs::metadata(&self.path).is_ok_and(|there| match self.device {
            true => there.file_type().is_block_device() && there.rdev() == open.rdev(),
            false => (there.dev(), there.ino()) == (open.dev(), open.ino()),
        });
        if !same || open.file_type().is_block_device() != self.device {
            bail!(
                "{} has gone, or is another one than it was; see what became of it, then call again",
                self.path.display()
            );
        }
        Ok(())
    }

    /// A copy that goes on must still have what was written last: else the target is another one.
    pub(super) fn has_the_last_of(&self, state: &State, size: u64) -> anyhow::Result<()> {
        let Some(last) = state.hashes.last() else {
            return Ok(());
        };
        let offset = (state.hashes.len() as u64 - 1) * PIECE as u64;
        let mut piece = vec![0; length_at(offset, size)];
        let has = match self.file.read_exact_at(&mut piece, offset) {
            Ok(()) => hash(&piece) == *last,
            // It is shorter.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => false,
            Err(error) => return Err(error).context("cannot read the copy"),
        };
        if !has {
            bail!(
                "{} does not hold what was copied before; delete {} to begin anew",
                self.path.display(),
                state.path.display()
            );
        }
        Ok(())
    }

    /// Makes a file as large as the source.
    pub(super) fn make_room(&self, size: u64) -> anyhow::Result<()> {
        if !self.device && self.file.metadata()?.len() != size {
            self.file
                .set_len(size)
                .with_context(|| format!("cannot make {} as large as the source", self.path.display()))?;
        }
        Ok(())
    }

    pub(super) fn write(&self, offset: u64, piece: &[u8], zero: bool) -> io::Result<()> {
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

    pub(super) fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}

/// Refuses what would harm the source or another: the source itself, its disk or a part of it, and what a loop device stands on.
pub(super) fn may_be_written(sysfs: &Path, path: &Path, known: &Metadata, from: &Metadata) -> anyhow::Result<()> {
    let loops = source::loops(sysfs);
    let device = Some(known).filter(|known| known.file_type().is_block_device());
    let folder = device.and_then(|device| source::folder(sysfs, device.rdev()));
    // A loop device's, or that of a part of it.
    let is_on = |name: &str| {
        let own = folder.as_deref().into_iter().flat_map(Path::ancestors);
        own.take(2).any(|folder| folder.ends_with(name))
    };
    let on_the_source = |(name, below): &(String, Metadata)| is_on(name) && source::same(sysfs, below, from);
    if source::same(sysfs, known, from) || loops.iter().any(on_the_source) {
        bail!("{} would be copied onto itself; name another target", path.display());
    }
    if let Some((name, _)) = loops.iter().find(|(_, below)| source::same(sysfs, below, known)) {
        bail!(
            "the loop device /dev/{name} stands on {}, and whatever uses it would be overwritten; end that first \
             (`losetup --detach /dev/{name}`)",
            path.display()
        );
    }
    let read_only = folder.and_then(|folder| std::fs::read_to_string(folder.join("ro")).ok());
    if read_only.is_some_and(|text| text.trim() == "1") {
        bail!("{} is read-only; name another target", path.display());
    }
    Ok(())
}
