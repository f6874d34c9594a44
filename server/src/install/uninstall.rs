//! Takes out of a system what `install` put into it, by the record of it.
//!
//! What was changed since stays and is named. All is checked before the first file goes; what is cut off at any point can be done
//! again, for the record goes last.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use stiefel_initrd_builder::ramdisk::{KERNEL, MANIFEST, RAMDISK};
use stiefel_shared::config::CONFIG_PATH;

use super::change::{EDITED, digest_of, is_kept, is_same, place_of_copy};
use super::files::{self, Staged};
use super::record::{Entry, Kind, Record, place};
use super::system::{reload_network_managers, systemd_runs, tell};
use super::wanted::{Fate, UNIT};
use super::{InstallError, check_root, confirm, lock, written};
use crate::collect::{KEYS_DIR, STATE_DIR};
use crate::reboot::{self, Left};
use crate::tree::Tree;

/// What to remove.
#[derive(Debug, Clone)]
pub struct UninstallOptions {
    /// The system's root folder.
    pub root: PathBuf,
    /// Remove configuration and keys as well.
    pub purge: bool,
    /// Do not ask.
    pub yes: bool,
    /// Only show what would be done.
    pub dry_run: bool,
}

/// What is to be done.
struct Plan<'a> {
    gone: Vec<&'a Entry>,
    /// Files that no entry names.
    own: Vec<String>,
}

/// Uninstalls: shows each change, asks, does it. Configuration and keys stay without `purge`, and so does what was changed since.
///
/// # Errors
/// [`InstallError`].
pub fn uninstall(options: &UninstallOptions) -> Result<(), InstallError> {
    check_root(&options.root)?;
    let tree = Tree::new(&options.root);
    let _lock = lock(&tree)?;
    let record = Record::load(&tree)?;
    let leftovers = leftovers(&tree, record.as_ref());
    let record = match record {
        Some(record) => record,
        // An install that was cut off before it had written its record.
        None if options.purge || !leftovers.is_empty() || is_empty(&tree.path(STATE_DIR)) => Record::default(),
        None => {
            return Err(InstallError::NotInstalled {
                root: options.root.clone(),
            });
        }
    };
    let plan = plan(&tree, &record, options.purge, leftovers)?;
    show(&tree, &record, &plan, options.purge);
    if options.dry_run {
        return Ok(());
    }
    confirm(options.yes)?;
    let told = tree.is_live() && systemd_runs();
    if told {
        tell("systemctl", &["stop", UNIT]);
    }
    if tree.is_live() {
        match reboot::sweep(&options.root, true) {
            Ok(Left::Nothing | Left::Image(_)) => {}
            Ok(Left::Unseen(point)) => eprintln!(
                "keep     perhaps a one-time image, EFI/stiefel/once.efi on the EFI system partition, which was mounted at {point}; it holds \
                 keys"
            ),
            // Of no use to anybody without our files; but named, for it is not gone.
            Err(error) => eprintln!("keep     the firmware's entry for one start, or its image: {error:#}"),
        }
    }
    remove(&tree, &record, &plan, options.purge)?;
    if told {
        tell("systemctl", &["daemon-reload"]);
        reload_network_managers();
    }
    Ok(())
}

/// Decides, and checks everything that could fail halfway.
fn plan<'a>(tree: &Tree, record: &'a Record, purge: bool, leftovers: Vec<String>) -> Result<Plan<'a>, InstallError> {
    let mut own = if purge { users_own(tree) } else { Vec::new() };
    // `stiefel build` may have put it there since.
    let ramdisk = [KERNEL, RAMDISK, MANIFEST].map(|name| format!("{STATE_DIR}/{name}"));
    own.extend(ramdisk.into_iter().filter(|path| tree.is_file(path)));
    own.extend(leftovers);
    own.iter().try_for_each(|path| super::place::check(tree, path))?;
    let mut gone = Vec::new();
    for entry in record.entries.iter().rev().filter(|entry| !own.contains(&entry.path)) {
        match super::place::check(tree, &entry.path) {
            // What was a folder is something else now: there is nothing of ours in it.
            Err(InstallError::InTheWay { .. }) => continue,
            checked => checked?,
        }
        if is_to_go(tree, entry) {
            check_copy(tree, entry)?;
            gone.push(entry);
        }
    }
    Ok(Plan { gone, own })
}

fn show(tree: &Tree, record: &Record, plan: &Plan, purge: bool) {
    for entry in plan.gone.iter().filter(|entry| entry.kind != Kind::Folder) {
        let word = if entry.before.is_some() { "restore" } else { "remove" };
        println!("{word:8} {}", entry.path);
    }
    plan.own.iter().for_each(|path| println!("remove   {path}"));
    let staying = record.entries.iter().filter(|entry| {
        entry.fate != Fate::Keep && !is_to_go(tree, entry) && tree.path(&entry.path).symlink_metadata().is_ok()
    });
    for entry in staying {
        println!("keep     {} (it was changed since)", entry.path);
        if let Some(before) = &entry.before {
            println!("keep     {before} (what was there before)");
        }
    }
    if !purge {
        edited(tree)
            .iter()
            .for_each(|path| println!("keep     {path} (you changed it)"));
    }
}

fn remove(tree: &Tree, record: &Record, plan: &Plan, purge: bool) -> Result<(), InstallError> {
    // An install that was cut off has left files beside all places, perhaps a key.
    record
        .entries
        .iter()
        .for_each(|entry| files::sweep(&tree.path(&entry.path)));
    let (folders, others): (Vec<&Entry>, Vec<&Entry>) =
        plan.gone.iter().copied().partition(|entry| entry.kind == Kind::Folder);
    others.into_iter().try_for_each(|entry| undo(tree, entry))?;
    for path in plan.own.iter().map(|path| tree.path(path)) {
        written(&path, files::remove(&path))?;
    }
    // The record goes last, but for the folders that it lies in: what was cut off can be done again.
    let (above, beside): (Vec<&Entry>, Vec<&Entry>) = folders
        .into_iter()
        .partition(|folder| Path::new(STATE_DIR).starts_with(&folder.path));
    beside.into_iter().try_for_each(|entry| undo(tree, entry))?;
    if purge {
        [KEYS_DIR, "/etc/stiefel"]
            .iter()
            .map(|folder| tree.path(folder))
            .try_for_each(|folder| written(&folder, files::remove_empty(&folder)))?;
    }
    let record = tree.path(place());
    written(&record, files::remove(&record))?;
    let state = tree.path(STATE_DIR);
    written(&state, files::remove_empty(&state))?;
    above.into_iter().try_for_each(|entry| undo(tree, entry))
}

/// What a run that was killed has left in our folder: files that wait beside their places, and copies of files that were not
/// replaced after all.
fn leftovers(tree: &Tree, record: Option<&Record>) -> Vec<String> {
    let known = |copy: &str| {
        let mut entries = record.iter().flat_map(|record| &record.entries);
        entries.any(|entry| entry.before.as_deref() == Some(copy))
    };
    tree.names(STATE_DIR)
        .into_iter()
        .filter(|name| {
            let copy = format!("{STATE_DIR}/{name}");
            let unused =
                place_of_copy(name).is_some_and(|place| !known(&copy) && is_same(&tree.path(&copy), &tree.path(place)));
            files::is_beside(name) || unused
        })
        .map(|name| format!("{STATE_DIR}/{name}"))
        .collect()
}

fn is_empty(folder: &Path) -> bool {
    fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_none())
}

/// Copies of files of ours that were changed by hand.
fn edited(tree: &Tree) -> Vec<String> {
    tree.names(STATE_DIR)
        .into_iter()
        .filter(|name| name.strip_prefix(EDITED).is_some_and(|rest| rest.starts_with('!')))
        .map(|name| format!("{STATE_DIR}/{name}"))
        .collect()
}

/// Configuration and keys, whoever made them, and copies of what was changed by hand.
fn users_own(tree: &Tree) -> Vec<String> {
    let keys = tree
        .names(KEYS_DIR)
        .into_iter()
        .filter(|name| name.ends_with(".key"))
        .map(|name| format!("{KEYS_DIR}/{name}"));
    keys.chain([CONFIG_PATH.to_owned()])
        .chain(edited(tree))
        .filter(|path| tree.is_file(path))
        .collect()
}

/// What is to be put back must be there, before anything is taken away.
fn check_copy(tree: &Tree, entry: &Entry) -> Result<(), InstallError> {
    let path = tree.path(&entry.path);
    match entry.before.as_ref().map(|before| tree.path(before)) {
        Some(before) if digest_of(&before).is_none() && path.symlink_metadata().is_ok() => {
            Err(InstallError::CopyGone { path, before })
        }
        _ => Ok(()),
    }
}

pub(super) fn is_to_go(tree: &Tree, entry: &Entry) -> bool {
    match entry.fate {
        Fate::Keep => entry.kind == Kind::Folder,
        Fate::Remove if entry.kind == Kind::Folder => true,
        Fate::Remove => {
            let place = tree.path(&entry.path);
            let is_folder = place.symlink_metadata().is_ok_and(|meta| meta.is_dir());
            !is_folder && !is_put_back(tree, entry)
        }
        Fate::RemoveUnchanged => is_unchanged(tree, entry),
    }
}

/// Whether an earlier run, which was cut off, has put back what was there before.
fn is_put_back(tree: &Tree, entry: &Entry) -> bool {
    let before = entry.before.as_ref().map(|before| tree.path(before));
    let ours = || digest_of(&tree.path(&entry.path)).is_some_and(|found| entry.made(&found));
    before.is_some_and(|before| digest_of(&before).is_none()) && !ours()
}

/// Whether a file is as it was installed, or as it was before; one that is gone is nobody's, and what was there before is put
/// back.
fn is_unchanged(tree: &Tree, entry: &Entry) -> bool {
    let path = tree.path(&entry.path);
    let is_gone = path.symlink_metadata().is_err();
    match &entry.kind {
        Kind::Folder => true,
        Kind::Link(target) => is_gone || fs::read_link(path).is_ok_and(|found| found == Path::new(target)),
        Kind::File(_) => is_gone || digest_of(&path).is_some_and(|found| entry.made(&found)) || is_kept(tree, entry),
    }
}

/// Undoes one entry, if it is to go. A folder goes only when nothing is in it.
pub(super) fn undo(tree: &Tree, entry: &Entry) -> Result<(), InstallError> {
    if !is_to_go(tree, entry) {
        return Ok(());
    }
    let path = tree.path(&entry.path);
    match (&entry.kind, &entry.before) {
        (Kind::Folder, _) => written(&path, files::remove_empty(&path)),
        (_, None) => written(&path, files::remove(&path)),
        (_, Some(before)) => restore(&path, &tree.path(before)),
    }
}

/// Puts back what was there before us.
fn restore(path: &Path, before: &Path) -> Result<(), InstallError> {
    let mut file = match File::open(before) {
        Ok(file) => file,
        // `check_copy` has seen that there is nothing in the place either, or an earlier run has put it back.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => {
            return Err(InstallError::Read {
                path: before.to_owned(),
                source,
            });
        }
    };
    // The folder may be gone; then there is no place to put it back to, and the copy stays.
    let Some(folder) = path.parent().filter(|folder| !folder.is_dir()) else {
        written(path, Staged::copy(path, &mut file).and_then(Staged::put))?;
        return written(before, files::remove(before));
    };
    eprintln!(
        "warning: {} is gone, so what was in it before stays in {}",
        folder.display(),
        before.display()
    );
    Ok(())
}
