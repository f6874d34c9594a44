//! Puts stiefel into a laptop's system, and takes it out again.
//!
//! Program, service, guards against network managers, configuration, a first key, ramdisk: what and where is in `wanted`.
//! All is decided and shown first; then every file is written beside its place, and only when all are there, put in it. A record
//! says what was done, so that `uninstall` undoes exactly that. Doing it twice changes nothing.

pub(crate) mod files;
mod record;
mod uninstall;
mod wanted;

use std::fmt;
use std::fs::File;
use std::io::{self, BufRead, IsTerminal, Write};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use stiefel_initrd_builder::ramdisk::ManifestError;
use stiefel_shared::config::{CONFIG_PATH, ConfigError, Trigger};
use stiefel_shared::key::KeyError;

use crate::collect::STATE_DIR;
use crate::tree::Tree;
use files::Staged;
use record::{Entry, Kind, Record};
pub use uninstall::{UninstallOptions, uninstall};
use wanted::{Content, Fate, UNIT, Wanted};

/// What to install, and where.
#[derive(Debug, Clone)]
pub struct InstallOptions {
    /// The system's root folder.
    pub root: PathBuf,
    /// The program's file.
    pub program: PathBuf,
    /// Folder with the ramdisk, as `stiefel build` leaves it; without it the ramdisk stays as it is.
    pub ramdisk: Option<PathBuf>,
    /// Becomes the configuration where there is none yet; without it the example does.
    pub config: Option<PathBuf>,
    /// Do not ask.
    pub yes: bool,
    /// Only show what would be done.
    pub dry_run: bool,
}

impl InstallOptions {
    /// Installs the running program below `root`, asking first, without a ramdisk.
    #[must_use]
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self {
            root: root.into(),
            program: "/proc/self/exe".into(),
            ramdisk: None,
            config: None,
            yes: false,
            dry_run: false,
        }
    }

    /// Whether there is a system to install into, and a configuration that can be used: before a ramdisk is built for it.
    ///
    /// # Errors
    /// [`InstallError`].
    pub fn check(&self) -> Result<(), InstallError> {
        check_root(&self.root)?;
        wanted::wanted(&Tree::new(&self.root), self).map(drop)
    }
}

/// Why nothing, or not all, was installed or removed.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// Nobody said yes.
    #[error("nothing was changed: {why}")]
    NotConfirmed {
        /// Why.
        why: &'static str,
    },
    /// There is no system.
    #[error("there is no folder {root} to install into\n  next: mount the system there, or correct --root", root = root.display())]
    NoRoot {
        /// Where it should be.
        root: PathBuf,
    },
    /// The configuration is wrong.
    #[error("the configuration cannot be used; nothing was changed")]
    Config(#[from] ConfigError),
    /// No key could be made.
    #[error("a first key cannot be made")]
    Key(#[from] KeyError),
    /// The ramdisk is not whole.
    #[error("the ramdisk to be installed cannot be used; nothing was changed")]
    Ramdisk(#[from] ManifestError),
    /// Something is where a file of ours belongs.
    #[error("{path} is in the way: it is no ordinary file\n  next: move it away, and install again", path = path.display())]
    InTheWay {
        /// It.
        path: PathBuf,
    },
    /// A file cannot be read.
    #[error("{path} cannot be read\n  next: be root, and see whether it is there", path = path.display())]
    Read {
        /// It.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file cannot be written.
    #[error("{path} cannot be written\n  next: be root, and see whether there is space and the file system is writable; then do it again", path = path.display())]
    Write {
        /// It.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The record of an earlier install is spoiled.
    #[error("the record of what was installed, {path}, is not understood\n  next: install again with --yes after deleting it, or remove the files by hand", path = path.display())]
    Record {
        /// It.
        path: PathBuf,
        /// Why.
        #[source]
        source: Option<serde_json::Error>,
    },
    /// What was there before us cannot be put back.
    #[error(
        "{path} took the place of another file, whose copy {before} is gone; nothing was changed\n  next: put that file at {before} from a backup, or remove {path} by hand; then do it again",
        path = path.display(),
        before = before.display()
    )]
    CopyGone {
        /// Our file.
        path: PathBuf,
        /// Where the copy should be.
        before: PathBuf,
    },
    /// There is nothing to remove.
    #[error("stiefel is not installed below {root}: there is no record of it", root = root.display())]
    NotInstalled {
        /// Where.
        root: PathBuf,
    },
}

/// Names the file in an error of writing it.
fn written<T>(path: &Path, result: io::Result<T>) -> Result<T, InstallError> {
    result.map_err(|source| InstallError::Write {
        path: path.to_owned(),
        source,
    })
}

/// One change.
#[derive(Debug)]
struct Change {
    wanted: Wanted,
    action: Action,
    /// For the record.
    kind: Kind,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Action {
    Create,
    /// Other permissions for a file that has the right content.
    Permit,
    /// An older one of ours, with this digest.
    Update(String),
    /// A file that is not ours, which is kept aside here, and put back in the end.
    Replace(String),
    /// A file of ours that was changed by hand, which is kept aside here for who changed it.
    Overrule(String),
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = match self.action {
            Action::Create => "create",
            Action::Permit | Action::Update(_) => "update",
            Action::Replace(_) | Action::Overrule(_) => "replace",
        };
        write!(f, "{word:8} {} ({})", self.wanted.path, self.wanted.what)?;
        match &self.action {
            Action::Replace(_) => f.write_str("; the file that is there is kept, and put back by `stiefel uninstall`"),
            Action::Overrule(kept) => write!(
                f,
                "; it was changed since it was installed: the changed one is kept as {kept}"
            ),
            _ => Ok(()),
        }
    }
}

/// Installs: shows each change, asks, does it.
///
/// # Errors
/// [`InstallError`].
pub fn install(options: &InstallOptions) -> Result<(), InstallError> {
    check_root(&options.root)?;
    let tree = Tree::new(&options.root);
    let mut record = Record::load(&tree)?.unwrap_or_default();
    let wanted = wanted::wanted(&tree, options)?;
    let obsolete: Vec<Entry> = obsolete(&record, &wanted).cloned().collect();
    let changes = changes(&tree, &record, wanted)?;
    if wanted::configuration(&tree, options.config.as_deref())?.given_is_unused {
        println!("keep     {CONFIG_PATH} (it is there already; the one you gave is not used)");
    }
    if changes.is_empty() && obsolete.is_empty() {
        println!("everything is in place already; after a change of {CONFIG_PATH}: systemctl restart {UNIT}");
        return Ok(());
    }
    changes.iter().for_each(|change| println!("{change}"));
    for entry in &obsolete {
        match uninstall::is_to_go(&tree, entry) {
            true => println!("remove   {} (the configuration names that NIC no more)", entry.path),
            false => println!("keep     {} (it was changed by hand; not needed any more)", entry.path),
        }
    }
    if options.dry_run {
        return Ok(());
    }
    confirm(options.yes)?;
    apply(&tree, &mut record, changes)?;
    for entry in obsolete {
        uninstall::undo(&tree, &entry)?;
        record.entries.retain(|other| *other != entry);
    }
    record.settle();
    record.store(&tree)?;
    if tree.is_live() {
        activate();
    }
    Ok(())
}

/// Files that keep network managers from the dedicated NICs of `trigger`, and are not there below `root`, or differ.
#[must_use]
pub fn missing_guards(root: &Path, trigger: &Trigger) -> Vec<String> {
    wanted::missing_guards(&Tree::new(root), trigger)
}

/// A mistyped folder would be made, and the user would look for what was installed.
fn check_root(root: &Path) -> Result<(), InstallError> {
    if root.is_dir() {
        Ok(())
    } else {
        Err(InstallError::NoRoot { root: root.to_owned() })
    }
}

/// Files of an earlier install that are not wanted any more: guards for NICs that the configuration does not name now.
fn obsolete<'a>(record: &'a Record, wanted: &[Wanted]) -> impl Iterator<Item = &'a Entry> {
    record
        .entries
        .iter()
        .filter(|entry| entry.fate == Fate::RemoveUnchanged && !wanted.iter().any(|wanted| wanted.path == entry.path))
}

/// What is missing or different, folders first.
fn changes(tree: &Tree, record: &Record, wanted: Vec<Wanted>) -> Result<Vec<Change>, InstallError> {
    let mut changes: Vec<Change> = Vec::new();
    for wanted in wanted {
        let missing = Path::new(&wanted.path)
            .ancestors()
            .skip(1)
            .filter(|folder| !tree.path(folder).exists());
        let mut missing: Vec<String> = missing.map(|folder| folder.to_string_lossy().into_owned()).collect();
        missing.reverse();
        for path in missing {
            if !changes.iter().any(|change| change.wanted.path == path) {
                let folder = Wanted {
                    path,
                    content: Content::Folder,
                    mode: 0o755,
                    fate: Fate::Remove,
                    what: "a folder",
                };
                changes.push(Change {
                    wanted: folder,
                    action: Action::Create,
                    kind: Kind::Folder,
                });
            }
        }
        changes.extend(change(tree, record, wanted)?);
    }
    Ok(changes)
}

fn change(tree: &Tree, record: &Record, wanted: Wanted) -> Result<Option<Change>, InstallError> {
    let path = tree.path(&wanted.path);
    let found = path.symlink_metadata().ok();
    let in_the_way = || InstallError::InTheWay { path: path.clone() };
    let kind = match &wanted.content {
        Content::Folder if path.is_dir() => return Ok(None),
        Content::Folder => Kind::Folder,
        // An enabled service is enabled, wherever the link leads.
        Content::Link(_) if found.as_ref().is_some_and(std::fs::Metadata::is_symlink) => return Ok(None),
        Content::Link(target) => Kind::Link((*target).to_owned()),
        Content::Bytes(bytes) => Kind::File(digest(&path, &mut bytes.as_slice())?),
        Content::File(source) => Kind::File(digest(source, &mut open(source)?)?),
    };
    let Some(found) = found else {
        return Ok(Some(Change {
            wanted,
            action: Action::Create,
            kind,
        }));
    };
    let Kind::File(digest_wanted) = &kind else {
        return Err(in_the_way());
    };
    if !found.is_file() {
        return Err(in_the_way());
    }
    let digest_found = digest(&path, &mut open(&path)?)?;
    let recorded = record.get(&wanted.path);
    let action = if digest_found == *digest_wanted {
        if found.permissions().mode() & 0o7777 == wanted.mode {
            return Ok(None);
        }
        Action::Permit
    } else if recorded.is_some_and(|entry| entry.made(&digest_found)) || wanted.path.starts_with(STATE_DIR) {
        Action::Update(digest_found)
    } else if recorded.is_some_and(|entry| !is_kept(tree, entry, &digest_found)) {
        Action::Overrule(free_name(tree, EDITED, &wanted.path, &digest_found)?)
    } else {
        Action::Replace(free_name(tree, BEFORE, &wanted.path, &digest_found)?)
    };
    Ok(Some(Change { wanted, action, kind }))
}

/// Whether a copy of just this file was kept aside: an install was cut off before it replaced it.
fn is_kept(tree: &Tree, entry: &Entry, digest_found: &str) -> bool {
    let before = entry.before.as_ref().map(|before| tree.path(before));
    before.and_then(|before| uninstall::digest_of(&before)).as_deref() == Some(digest_found)
}

/// Begins the names of copies of files that were there before ours.
const BEFORE: &str = "before";
/// Begins the names of copies of files of ours that were changed by hand.
const EDITED: &str = "edited";

/// Where a file with this digest can be kept aside: no other copy is overwritten, and none is made twice.
fn free_name(tree: &Tree, kind: &str, path: &str, digest_found: &str) -> Result<String, InstallError> {
    let name = format!("{STATE_DIR}/{kind}{}", path.replace('/', "!"));
    let mut candidate = name.clone();
    let mut number = 1_u32;
    loop {
        let place = tree.path(&candidate);
        if place.symlink_metadata().is_err() || digest(&place, &mut open(&place)?)? == digest_found {
            return Ok(candidate);
        }
        number += 1;
        candidate = format!("{name}.{number}");
    }
}

fn open(path: &Path) -> Result<File, InstallError> {
    File::open(path).map_err(|source| InstallError::Read {
        path: path.to_owned(),
        source,
    })
}

fn digest(path: &Path, content: &mut dyn io::Read) -> Result<String, InstallError> {
    files::digest(content).map_err(|source| InstallError::Read {
        path: path.to_owned(),
        source,
    })
}

/// Asks on a terminal.
fn confirm(yes: bool) -> Result<(), InstallError> {
    if yes {
        return Ok(());
    }
    let stdin = io::stdin();
    if !stdin.is_terminal() {
        return Err(InstallError::NotConfirmed {
            why: "there is no terminal to ask on; repeat with --yes",
        });
    }
    eprint!("Do this? [y/N] ");
    let _ = io::stderr().flush();
    let mut answer = String::new();
    let read = stdin.lock().read_line(&mut answer);
    match answer.trim() {
        "y" | "Y" | "yes" if read.is_ok() => Ok(()),
        _ => Err(InstallError::NotConfirmed {
            why: "you did not say yes",
        }),
    }
}

/// Keeps aside, records, writes everything beside its place, then puts it there. In this order, what was cut off at any
/// point is understood by the next install or uninstall, and no file of the user's is without its copy.
fn apply(tree: &Tree, record: &mut Record, changes: Vec<Change>) -> Result<(), InstallError> {
    if !tree.path(STATE_DIR).exists() {
        make_folder(&tree.path(STATE_DIR), 0o755)?;
    }
    for change in &changes {
        if let Action::Replace(kept) | Action::Overrule(kept) = &change.action {
            keep_aside(tree, &change.wanted.path, kept)?;
        }
    }
    for change in &changes {
        let (before, older) = match &change.action {
            Action::Replace(kept) => (Some(kept.clone()), None),
            Action::Update(digest) => (None, Some(digest.clone())),
            Action::Create | Action::Permit | Action::Overrule(_) => (None, None),
        };
        let ours_before = record.get(&change.wanted.path).is_some();
        // What only had other permissions, or lay in the ramdisk's folder, was not made by us, and is not ours to remove.
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
    record.store(tree)?;
    let mut staged = Vec::new();
    for Change { wanted, .. } in &changes {
        let place = tree.path(&wanted.path);
        let file = match &wanted.content {
            Content::Folder => {
                make_folder(&place, wanted.mode)?;
                continue;
            }
            Content::Link(target) => Staged::link(&place, target),
            Content::Bytes(bytes) => Staged::write(&place, wanted.mode, &mut bytes.as_slice()),
            Content::File(source) => Staged::write(&place, wanted.mode, &mut open(source)?),
        };
        staged.push((place.clone(), written(&place, file)?));
    }
    staged
        .into_iter()
        .try_for_each(|(place, file)| written(&place, file.put()))
}

fn make_folder(path: &Path, mode: u32) -> Result<(), InstallError> {
    let made = std::fs::DirBuilder::new().recursive(true).mode(mode).create(path);
    written(path, made)
}

/// Copies a file of the user's to where it is kept.
fn keep_aside(tree: &Tree, path: &str, kept: &str) -> Result<(), InstallError> {
    let from = tree.path(path);
    let to = tree.path(kept);
    let mut file = open(&from)?;
    let mode = file
        .metadata()
        .map_err(|source| InstallError::Read { path: from, source })?
        .permissions()
        .mode();
    written(&to, Staged::write(&to, mode & 0o7777, &mut file).and_then(Staged::put))
}

/// Makes the running system see what changed. What does not run needs not be told.
fn activate() {
    if !Path::new("/run/systemd/system").exists() {
        eprintln!(
            "systemd does not run here: start `{} autokexec` yourself",
            wanted::PROGRAM
        );
        return;
    }
    tell("systemctl", &["daemon-reload"]);
    if tell("systemctl", &["restart", UNIT]) {
        println!("{UNIT} runs; see `journalctl -u {UNIT}`");
    }
    reload_network_managers();
}

fn reload_network_managers() {
    for (manager, command) in [
        ("NetworkManager.service", ["nmcli", "general", "reload"].as_slice()),
        ("systemd-networkd.service", &["networkctl", "reload"]),
    ] {
        let active = Command::new("systemctl")
            .args(["--quiet", "is-active", manager])
            .stdin(Stdio::null())
            .status();
        if let (Ok(status), Some((program, arguments))) = (active, command.split_first())
            && status.success()
        {
            tell(program, arguments);
        }
    }
}

/// Runs a command; what it says is for the user. A failure is told and does not undo the files.
fn tell(program: &str, arguments: &[&str]) -> bool {
    match Command::new(program).args(arguments).stdin(Stdio::null()).status() {
        Ok(status) if status.success() => true,
        Ok(status) => {
            eprintln!(
                "warning: `{program} {}` failed ({status}); run it again by hand",
                arguments.join(" ")
            );
            false
        }
        Err(error) => {
            eprintln!("warning: `{program}` cannot be started: {error}");
            false
        }
    }
}

#[cfg(test)]
mod tests;
