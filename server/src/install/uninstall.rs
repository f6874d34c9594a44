//! Takes out of a system what `install` put into it, by the record of it.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use stiefel_initrd_builder::ramdisk::{KERNEL, MANIFEST, RAMDISK};
use stiefel_shared::config::CONFIG_PATH;

use super::files::{self, Staged};
use super::record::{Entry, Kind, Record, place};
use super::wanted::{Fate, UNIT};
use super::{EDITED, InstallError, check_root, confirm, is_kept, reload_network_managers, tell, written};
use crate::collect::{KEYS_DIR, STATE_DIR};
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

/// Uninstalls: shows each change, asks, does it. Configuration and keys stay without `purge`, and so does what was changed since.
///
/// # Errors
/// [`InstallError`].
pub fn uninstall(options: &UninstallOptions) -> Result<(), InstallError> {
    check_root(&options.root)?;
    let tree = Tree::new(&options.root);
    let record = match Record::load(&tree)? {
        Some(record) => record,
        None if options.purge => Record::default(),
        None => {
            return Err(InstallError::NotInstalled {
                root: options.root.clone(),
            });
        }
    };
    let mut own = if options.purge { users_own(&tree) } else { Vec::new() };
    // `stiefel build` may have put it there since.
    let ramdisk = [KERNEL, RAMDISK, MANIFEST].map(|name| format!("{STATE_DIR}/{name}"));
    own.extend(ramdisk.into_iter().filter(|path| tree.is_file(path)));
    let (gone, staying): (Vec<&Entry>, Vec<&Entry>) = record
        .entries
        .iter()
        .rev()
        .partition(|entry| is_to_go(&tree, entry) && !own.contains(&entry.path));
    gone.iter().try_for_each(|entry| check_copy(&tree, entry))?;
    gone.iter()
        .filter(|entry| entry.kind != Kind::Folder)
        .for_each(|entry| println!("{}", describe(entry)));
    own.iter().for_each(|path| println!("remove   {path}"));
    for entry in staying
        .iter()
        .filter(|entry| entry.fate == Fate::RemoveUnchanged && tree.path(&entry.path).exists())
    {
        println!("keep     {} (it was changed since)", entry.path);
    }
    if !options.purge {
        edited(&tree)
            .iter()
            .for_each(|path| println!("keep     {path} (you changed it)"));
    }
    if options.dry_run {
        return Ok(());
    }
    confirm(options.yes)?;
    let systemd_runs = tree.is_live() && Path::new("/run/systemd/system").exists();
    if systemd_runs {
        tell("systemctl", &["stop", UNIT]);
    }
    let (folders, others): (Vec<&Entry>, Vec<&Entry>) = gone.into_iter().partition(|entry| entry.kind == Kind::Folder);
    others.into_iter().try_for_each(|entry| undo(&tree, entry))?;
    for path in own.iter().map(|path| tree.path(path)) {
        written(&path, files::remove(&path))?;
    }
    // The record goes last of the files: what was cut off can be done again.
    let record = tree.path(place());
    written(&record, files::remove(&record))?;
    remove_empty(&tree.path(STATE_DIR))?;
    folders.into_iter().try_for_each(|entry| undo(&tree, entry))?;
    if options.purge {
        [KEYS_DIR, "/etc/stiefel"]
            .iter()
            .try_for_each(|folder| remove_empty(&tree.path(folder)))?;
    }
    if systemd_runs {
        tell("systemctl", &["daemon-reload"]);
        reload_network_managers();
    }
    Ok(())
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
        Some(before) if !before.is_file() && path.symlink_metadata().is_ok() => {
            Err(InstallError::CopyGone { path, before })
        }
        _ => Ok(()),
    }
}

pub(super) fn is_to_go(tree: &Tree, entry: &Entry) -> bool {
    match entry.fate {
        Fate::Keep => entry.kind == Kind::Folder,
        Fate::Remove => true,
        Fate::RemoveUnchanged => is_unchanged(tree, entry),
    }
}

fn is_unchanged(tree: &Tree, entry: &Entry) -> bool {
    let path = tree.path(&entry.path);
    match &entry.kind {
        Kind::Folder => true,
        Kind::Link(target) => fs::read_link(path).is_ok_and(|found| found == Path::new(target)),
        Kind::File(_) => digest_of(&path).is_some_and(|found| entry.made(&found) || is_kept(tree, entry, &found)),
    }
}

pub(super) fn digest_of(path: &Path) -> Option<String> {
    let mut file = File::open(path).ok()?;
    files::digest(&mut file).ok()
}

fn describe(entry: &Entry) -> String {
    match &entry.before {
        Some(_) => format!("restore  {}", entry.path),
        None => format!("remove   {}", entry.path),
    }
}

/// Undoes one entry, if it is to go. A folder goes only when nothing is in it.
pub(super) fn undo(tree: &Tree, entry: &Entry) -> Result<(), InstallError> {
    if !is_to_go(tree, entry) {
        return Ok(());
    }
    let path = tree.path(&entry.path);
    match (&entry.kind, &entry.before) {
        (Kind::Folder, _) => remove_empty(&path),
        (_, None) => written(&path, files::remove(&path)),
        (_, Some(before)) => restore(&path, &tree.path(before)),
    }
}

/// Puts back what was there before us.
fn restore(path: &Path, before: &Path) -> Result<(), InstallError> {
    use std::os::unix::fs::PermissionsExt;
    let unreadable = |source| InstallError::Read {
        path: before.to_owned(),
        source,
    };
    let mut file = match File::open(before) {
        Ok(file) => file,
        // `check_copy` has seen that there is nothing in the place either.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(unreadable(error)),
    };
    let mode = file.metadata().map_err(unreadable)?.permissions().mode() & 0o7777;
    written(path, Staged::write(path, mode, &mut file).and_then(Staged::put))?;
    written(before, files::remove(before))
}

fn remove_empty(path: &Path) -> Result<(), InstallError> {
    match fs::remove_dir(path) {
        Err(error) if !matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::DirectoryNotEmpty) => {
            written(path, Err(error))
        }
        _ => Ok(()),
    }
}
