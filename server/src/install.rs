//! Puts stiefel into a laptop's system, and takes it out again.
//!
//! Program, service, guards against network managers, what keeps the ramdisk and the laptop's own initrds usable after updates,
//! configuration, a first key, ramdisk: what and where is in `wanted`. All is decided and shown first; then every file is
//! written beside its place, and only when all are there, put in it. A record says what was done, so that `uninstall` undoes
//! exactly that. Doing it twice changes nothing.
//!
//! Refused: a path that a link, or another user, could lead elsewhere (`place`); two of them at a time.

mod apply;
mod change;
mod drivers;
pub(crate) mod files;
mod network;
mod place;
mod record;
mod system;
mod uninstall;
mod updates;
mod wanted;

use std::fs::File;
use std::io::{self, BufRead, IsTerminal, Write};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

use stiefel_initrd_builder::ramdisk::ManifestError;
use stiefel_shared::config::{CONFIG_PATH, ConfigError, Trigger};
use stiefel_shared::key::KeyError;

use crate::collect::STATE_DIR;
use crate::reboot::{self, Left};
use crate::tree::Tree;
use change::Change;
use record::{Entry, Record};
pub use uninstall::{UninstallOptions, uninstall};
use wanted::{Fate, PROGRAM, UNIT, Wanted};

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
    /// Only bring up to date what is installed and was not changed by hand, without asking: after an upgrade of stiefel or of
    /// the kernel.
    pub refresh: bool,
    /// Say nothing where nothing is wrong.
    pub quiet: bool,
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
            refresh: false,
            quiet: false,
        }
    }

    /// Whether there is a system to install into, and a configuration that can be used: before a ramdisk is built for it.
    ///
    /// # Errors
    /// [`InstallError`].
    pub fn check(&self) -> Result<(), InstallError> {
        check_root(&self.root)?;
        let tree = Tree::new(&self.root);
        if self.refresh && Record::load(&tree)?.is_none() {
            return Err(self.not_installed());
        }
        wanted::wanted(&tree, self).map(drop)
    }

    fn not_installed(&self) -> InstallError {
        InstallError::NotInstalled {
            root: self.root.clone(),
        }
    }

    fn say(&self, line: impl std::fmt::Display) {
        if !self.quiet {
            println!("{line}");
        }
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
    #[error("the configuration {path} cannot be used; nothing was changed", path = path.display())]
    Config {
        /// It; of one that was given, that.
        path: PathBuf,
        /// Why.
        source: ConfigError,
    },
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
    /// A link leads out of the system.
    #[error(
        "{path} leads to {real}, outside of the system to install into; nothing was changed\n  next: have a folder there, or a link within that system",
        path = path.display(),
        real = real.display()
    )]
    Elsewhere {
        /// The link.
        path: PathBuf,
        /// Where it leads.
        real: PathBuf,
    },
    /// A folder that others may change.
    #[error(
        "{path} belongs to another user, or everyone may write to it: who does could decide what root writes where; nothing was changed\n  next: chown root:root {path} && chmod go-w {path}",
        path = path.display()
    )]
    NotOurs {
        /// It.
        path: PathBuf,
    },
    /// Another one runs.
    #[error(
        "another `stiefel install`, `upgrade` or `uninstall` runs; nothing was changed\n  next: wait for it to end"
    )]
    Busy,
    /// A file cannot be read.
    #[error("{path} cannot be read\n  next: be root, and see whether it is there", path = path.display())]
    Read {
        /// It.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file cannot be written; nothing is in its place yet.
    #[error("{path} cannot be written; what was begun is taken back\n  next: be root, and see whether there is space (`df`) and the file system is writable (`findmnt`); then do it again", path = path.display())]
    Write {
        /// It.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Some of it was done.
    #[error("{path} cannot be put in its place, after others were\n  next: do it again, or undo it with `stiefel uninstall`", path = path.display())]
    Mixed {
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

/// Installs: shows each change, asks, does it.
///
/// # Errors
/// [`InstallError`].
pub fn install(options: &InstallOptions) -> Result<(), InstallError> {
    check_root(&options.root)?;
    let tree = Tree::new(&options.root);
    let _lock = lock(&tree)?;
    if tree.is_live() && !options.dry_run {
        sweep_once(options);
    }
    let loaded = Record::load(&tree)?;
    if options.refresh && loaded.is_none() {
        return Err(options.not_installed());
    }
    let mut record = loaded.clone().unwrap_or_default();
    let wanted = wanted::wanted(&tree, options)?;
    let mut obsolete: Vec<Entry> = obsolete(&tree, &record, &wanted).cloned().collect();
    let mut changes = change::changes(&tree, &record, wanted)?;
    if options.refresh {
        let all = changes.len() + obsolete.len();
        changes.retain(Change::is_refresh);
        obsolete.clear();
        if changes.len() < all {
            options.say("`stiefel install` would change more than this; it shows what");
        }
    }
    if wanted::configuration(&tree, options.config.as_deref())?.given_is_unused {
        options.say(format_args!(
            "keep     {CONFIG_PATH} (it is there already; the one you gave is not used)"
        ));
    }
    if changes.is_empty() && obsolete.is_empty() {
        if !options.dry_run {
            // An install that was cut off at its very end.
            files::sweep(&tree.path(record::place()));
        }
        options.say(match options.refresh {
            true => "everything is up to date".to_owned(),
            false => {
                format!("everything is in place already; after a change of {CONFIG_PATH}: systemctl restart {UNIT}")
            }
        });
        return Ok(());
    }
    show(options, &tree, &changes, &obsolete)?;
    if options.dry_run {
        return Ok(());
    }
    confirm(options.yes || options.refresh)?;
    apply::apply(&tree, loaded.as_ref(), &mut record, &changes)?;
    for entry in obsolete {
        uninstall::undo(&tree, &entry)?;
        record.entries.retain(|other| *other != entry);
    }
    record.settle();
    record.store(&tree)?;
    if tree.is_live() {
        match options.refresh {
            false => system::activate(),
            true if changes.iter().any(|change| !change.wanted.path.starts_with(STATE_DIR)) => system::reload(),
            true => {}
        }
    }
    Ok(())
}

/// Takes away a one-time image that was not started (`trigger.method: reboot`), also where that is not the method any more: the service,
/// which does so at its start, could then not write there.
fn sweep_once(options: &InstallOptions) {
    match reboot::sweep(&options.root, false) {
        Ok(Left::Nothing) => {}
        Ok(Left::Image(path)) => options.say(format_args!(
            "remove   {} (the firmware has not started it, or it failed early)",
            path.display()
        )),
        Ok(Left::Unseen(point)) => options.say(format_args!(
            "keep     perhaps a one-time image with keys: the EFI system partition is not mounted at {point}; mount it and try again"
        )),
        Err(error) => options.say(format_args!("keep     perhaps a one-time image with keys: {error:#}")),
    }
}

/// Tells what is about to be done.
fn show(options: &InstallOptions, tree: &Tree, changes: &[Change], obsolete: &[Entry]) -> Result<(), InstallError> {
    changes.iter().for_each(|change| options.say(change));
    for entry in obsolete {
        place::check(tree, &entry.path)?;
        options.say(match uninstall::is_to_go(tree, entry) {
            true => format!("remove   {} (not needed any more)", entry.path),
            false => format!("keep     {} (it was changed by hand; not needed any more)", entry.path),
        });
    }
    Ok(())
}

/// Files that keep network managers from the dedicated NICs of `trigger`, and are not there below `root`, or differ.
#[must_use]
pub fn missing_guards(root: &Path, trigger: &Trigger) -> Vec<String> {
    network::missing_guards(&Tree::new(root), trigger)
}

/// A mistyped folder would be made, and the user would look for what was installed.
fn check_root(root: &Path) -> Result<(), InstallError> {
    if root.is_dir() {
        Ok(())
    } else {
        Err(InstallError::NoRoot { root: root.to_owned() })
    }
}

/// Held as long as it is there; the root folder is locked, for that is always there and leaves no trace.
fn lock(tree: &Tree) -> Result<File, InstallError> {
    let root = tree.path("/");
    let folder = change::open(&root)?;
    match flock(&folder, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(folder),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(InstallError::Busy),
        Err(error) => Err(InstallError::Read {
            path: root,
            source: error.into(),
        }),
    }
}

/// Files of an earlier install that are not wanted any more: guards for NICs that the configuration does not name now, hooks of
/// programs that are gone, the program itself where a package brings it.
fn obsolete<'a>(tree: &Tree, record: &'a Record, wanted: &[Wanted]) -> impl Iterator<Item = &'a Entry> {
    record.entries.iter().filter(|entry| {
        (entry.fate == Fate::RemoveUnchanged || entry.path == PROGRAM)
            && !wanted.iter().any(|wanted| wanted.path == entry.path)
            // Changed by hand, and in the place of another one, whose copy the record must not forget.
            && (entry.before.is_none() || uninstall::is_to_go(tree, entry))
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

#[cfg(test)]
mod tests;
