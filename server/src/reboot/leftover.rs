//! What an activation that did not come to pass has left: found, and taken away.
//!
//! An image holds the keys of its activation, so it must not stay. The mark, in our own folder, is there from before an image is written
//! until it is seen to be gone: it tells of one on an EFI system partition that is not mounted now.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::esp::POINTS;
use super::{BESIDE, FOLDER, IMAGE, RebootError, TITLE, variables};
use crate::collect::STATE_DIR;
use crate::tree::Tree;

/// The mark; what is in it is where the EFI system partition was mounted.
const MARK: &str = "/var/lib/stiefel/once";

/// What there is of an earlier activation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Left {
    /// Nothing.
    Nothing,
    /// An image.
    Image(PathBuf),
    /// Perhaps an image, on an EFI system partition that is not mounted here now.
    Unseen(String),
}

/// Held by who arms or sweeps: one at a time.
#[derive(Debug)]
pub(super) struct Turn {
    // None where nothing of ours was ever installed.
    _folder: Option<File>,
}

impl Turn {
    /// Takes it, if nobody has it.
    pub(super) fn take(tree: &Tree) -> Result<Self, RebootError> {
        let folder = tree.path(STATE_DIR);
        let file = match File::open(&folder) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self { _folder: None }),
            Err(source) => return Err(RebootError::Write { path: folder, source }),
        };
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Self { _folder: Some(file) }),
            Err(Errno::WOULDBLOCK) => Err(RebootError::Busy),
            Err(error) => Err(RebootError::Write {
                path: folder,
                source: error.into(),
            }),
        }
    }
}

/// Looks, and changes nothing.
#[must_use]
pub(crate) fn look(tree: &Tree) -> Left {
    let places = POINTS
        .iter()
        .flat_map(|point| [IMAGE, BESIDE].map(|name| format!("{point}{name}")));
    let mut there = places.map(|path| tree.path(path)).filter(|path| path.is_file());
    if let Some(image) = there.next() {
        return Left::Image(image);
    }
    let Some(point) = tree.line(MARK) else {
        return Left::Nothing;
    };
    let mounts = tree.mounts();
    match mounts.iter().any(|mount| mount.point == point && mount.kind == "vfat") {
        true => Left::Nothing,
        false => Left::Unseen(point),
    }
}

/// Takes away an image that the firmware has not started, and what tells it to; what there was. With `entry` also the entry that is kept
/// for the next time.
///
/// # Errors
/// Why it is still there.
pub fn sweep(root: &Path, entry: bool) -> anyhow::Result<Left> {
    let tree = Tree::new(root);
    // Not that of an activation which goes on right now.
    let _turn = Turn::take(&tree)?;
    let cancelled = variables::cancel(&tree, TITLE);
    if entry {
        variables::forget(&tree, TITLE)?;
    }
    let left = look(&tree);
    for point in POINTS {
        for name in [IMAGE, BESIDE] {
            crate::offline::take_away(&tree.path(point), name)?;
        }
        // Only if it is empty.
        let _ = std::fs::remove_dir(tree.path(format!("{point}{FOLDER}")));
    }
    if !matches!(left, Left::Unseen(_)) {
        unmark(&tree);
    }
    cancelled?;
    Ok(left)
}

/// There may be an image from now on, on what is mounted at `point`.
pub(super) fn mark(tree: &Tree, point: &str) -> Result<(), RebootError> {
    let path = tree.path(MARK);
    let written = File::create(&path).and_then(|mut file| {
        file.write_all(point.as_bytes())?;
        file.sync_all()
    });
    written.map_err(|source| RebootError::Write { path, source })
}

/// There is none any more.
pub(super) fn unmark(tree: &Tree) {
    // One that stays is looked at again the next time.
    let _ = std::fs::remove_file(tree.path(MARK));
}
