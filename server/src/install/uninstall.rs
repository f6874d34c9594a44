//! Takes out of a system what `install` put into it, by the record of it.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use stiefel_initrd_builder::ramdisk::{KERNEL, MANIFEST, RAMDISK};
use stiefel_shared::config::CONFIG_PATH;

use super::files::{self, Staged};
use super::record::{Entry, Kind, Record, place};
use super::wanted::{Fate, UNIT};
use super::{InstallError, confirm, reload_network_managers, tell, written};
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

/// Configuration and keys, whoever made them.
fn users_own(tree: &Tree) -> Vec<String> {
    let keys = tree
        .names(KEYS_DIR)
        .into_iter()
        .filter(|name| name.ends_with(".key"))
        .map(|name| format!("{KEYS_DIR}/{name}"));
    keys.chain([CONFIG_PATH.to_owned()])
        .filter(|path| tree.is_file(path))
        .collect()
}

fn is_to_go(tree: &Tree, entry: &Entry) -> bool {
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
        Kind::File(digest) => File::open(path)
            .and_then(|mut file| files::digest(&mut file))
            .is_ok_and(|found| found == *digest),
    }
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
        // An install that was cut off before it kept anything aside: the place still has the old file.
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
