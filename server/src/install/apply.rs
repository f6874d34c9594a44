//! Does what was decided: keeps aside, records, writes everything beside its place, then puts it there.
//!
//! In this order, what was cut off at any point is understood by the next install or uninstall, and no file of the user's is
//! without its copy. What fails before the first file is in its place (no space, a read-only file system) is taken back.

use std::path::{Path, PathBuf};

use super::change::{Action, Change, open};
use super::files::{self, Staged};
use super::record::{Entry, Record, place};
use super::wanted::{Content, Fate};
use super::{InstallError, written};
use crate::collect::STATE_DIR;
use crate::tree::Tree;

/// What was made so far that a failure takes back.
#[derive(Default)]
struct Made {
    folders: Vec<PathBuf>,
    copies: Vec<PathBuf>,
}

/// Does the changes. `loaded` is the record as it was found, `record` becomes what it is now.
///
/// # Errors
/// [`InstallError`]; [`InstallError::Mixed`] if some files are in their places and some are not.
pub(super) fn apply(
    tree: &Tree,
    loaded: Option<&Record>,
    record: &mut Record,
    changes: &[Change],
) -> Result<(), InstallError> {
    let mut made = Made::default();
    let staged = match prepare(tree, record, changes, &mut made) {
        Ok(staged) => staged,
        Err(error) => {
            take_back(tree, loaded, &made);
            return Err(error);
        }
    };
    for (place, file) in staged {
        file.put()
            .map_err(|source| InstallError::Mixed { path: place, source })?;
    }
    Ok(())
}

fn prepare(
    tree: &Tree,
    record: &mut Record,
    changes: &[Change],
    made: &mut Made,
) -> Result<Vec<(PathBuf, Staged)>, InstallError> {
    let (root, state) = (tree.path("/"), tree.path(STATE_DIR));
    let mut above: Vec<&Path> = state.ancestors().take_while(|folder| *folder != root).collect();
    above.reverse();
    for folder in above {
        make_folder(folder, 0o755, made)?;
    }
    for change in changes {
        if let Action::Replace(kept) | Action::Overrule(kept) = &change.action {
            keep_aside(tree, &change.wanted.path, kept, made)?;
        }
    }
    for change in changes {
        record_change(record, change);
    }
    record.store(tree)?;
    let mut staged = Vec::new();
    for Change { wanted, .. } in changes {
        let place = tree.path(&wanted.path);
        let file = match &wanted.content {
            Content::Folder => {
                make_folder(&place, wanted.mode, made)?;
                continue;
            }
            Content::Link(target) => Staged::link(&place, target),
            Content::Bytes(bytes) => Staged::write(&place, wanted.mode, &mut bytes.as_slice()),
            Content::File(source) => Staged::write(&place, wanted.mode, &mut open(source)?),
        };
        staged.push((place.clone(), written(&place, file)?));
    }
    Ok(staged)
}

fn record_change(record: &mut Record, change: &Change) {
    let (before, older) = match &change.action {
        Action::Replace(kept) => (Some(kept.clone()), None),
        Action::Update(digest) => (None, Some(digest.clone())),
        Action::Create | Action::Permit | Action::Overrule(_) => (None, None),
    };
    let ours_before = record.get(&change.wanted.path).is_some();
    // What lay in the ramdisk's folder was not made by us, but goes with it.
    let foreign = matches!(change.action, Action::Permit | Action::Update(_)) && !ours_before;
    if !foreign || change.wanted.fate == Fate::Remove {
        record.add(Entry {
            path: change.wanted.path.clone(),
            kind: change.kind.clone(),
            fate: change.wanted.fate,
            before,
            older,
        });
    }
}

/// As far as it goes: what cannot be taken back is what `uninstall` finds by the record, or is an empty folder.
fn take_back(tree: &Tree, loaded: Option<&Record>, made: &Made) {
    for copy in &made.copies {
        let _ = files::remove(copy);
    }
    let _ = match loaded {
        Some(record) => record.store(tree).is_ok(),
        None => files::remove(&tree.path(place())).is_ok(),
    };
    for folder in made.folders.iter().rev() {
        let _ = files::remove_empty(folder);
    }
}

fn make_folder(path: &Path, mode: u32, made: &mut Made) -> Result<(), InstallError> {
    if path.is_dir() {
        return Ok(());
    }
    made.folders.push(path.to_owned());
    written(path, files::make_folder(path, mode))
}

/// Copies a file of the user's to where it is kept.
fn keep_aside(tree: &Tree, path: &str, kept: &str, made: &mut Made) -> Result<(), InstallError> {
    let to = tree.path(kept);
    if to.symlink_metadata().is_ok() {
        // `change` has seen that it is just this file.
        return Ok(());
    }
    made.copies.push(to.clone());
    let mut file = open(&tree.path(path))?;
    written(&to, Staged::copy(&to, &mut file).and_then(Staged::put))
}
