//! What was installed: /var/lib/stiefel/installed.json, so that `uninstall` takes away exactly that.
//!
//! Written before the first file is put in its place: an install that was cut off can still be undone.

use std::io;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::files::Staged;
use super::wanted::Fate;
use super::{InstallError, written};
use crate::collect::STATE_DIR;
use crate::tree::Tree;

/// Its name in the folder of the ramdisk.
pub const RECORD: &str = "installed.json";
/// The format's version.
const VERSION: u32 = 1;

/// What was installed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    version: u32,
    /// In the order in which it was put there.
    pub entries: Vec<Entry>,
}

impl Default for Record {
    fn default() -> Self {
        Self {
            version: VERSION,
            entries: Vec::new(),
        }
    }
}

/// One thing that was put there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// Where, inside of the tree.
    pub path: String,
    /// What.
    pub kind: Kind,
    /// What becomes of it.
    pub fate: Fate,
    /// Where the file is kept that was there before, and was not ours.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<String>,
    /// SHA-256 of the older file of ours that is being replaced: after a cut-off, either may be in the place.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub older: Option<String>,
}

/// What was put there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Kind {
    /// A folder that was not there.
    Folder,
    /// A file with this SHA-256.
    File(String),
    /// A symbolic link to this.
    Link(String),
}

impl Record {
    /// Reads it; `None` if nothing is installed.
    ///
    /// # Errors
    /// [`InstallError::Read`], [`InstallError::Record`].
    pub fn load(tree: &Tree) -> Result<Option<Self>, InstallError> {
        let path = tree.path(place());
        match tree.text(place()) {
            Ok(text) => match serde_json::from_str::<Self>(&text) {
                Ok(record) if record.version == VERSION && record.entries.iter().all(Entry::is_sound) => {
                    Ok(Some(record))
                }
                Ok(_) => Err(InstallError::Record { path, source: None }),
                Err(source) => Err(InstallError::Record {
                    path,
                    source: Some(source),
                }),
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(InstallError::Read { path, source }),
        }
    }

    /// Writes it.
    ///
    /// # Errors
    /// [`InstallError::Write`], [`InstallError::Record`].
    pub fn store(&self, tree: &Tree) -> Result<(), InstallError> {
        let path = tree.path(place());
        let json = serde_json::to_string_pretty(self).map_err(|source| InstallError::Record {
            path: path.clone(),
            source: Some(source),
        })?;
        written(
            &path,
            Staged::write(&path, 0o644, &mut format!("{json}\n").as_bytes()).and_then(Staged::put),
        )
    }

    /// Takes an entry in; the newer replaces the older of the same path, but for what was there before both.
    pub fn add(&mut self, entry: Entry) {
        match self.entries.iter_mut().find(|old| old.path == entry.path) {
            Some(old) => {
                *old = Entry {
                    before: old.before.take().or(entry.before),
                    ..entry
                }
            }
            None => self.entries.push(entry),
        }
    }

    /// All is in its place: older files are gone.
    pub fn settle(&mut self) {
        self.entries.iter_mut().for_each(|entry| entry.older = None);
    }

    /// The entry of a path.
    #[must_use]
    pub fn get(&self, path: &str) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.path == path)
    }
}

impl Entry {
    /// Whether a file with this digest was put there by us.
    pub fn made(&self, digest: &str) -> bool {
        matches!(&self.kind, Kind::File(ours) if ours == digest) || self.older.as_deref() == Some(digest)
    }

    /// A record is only believed where it cannot lead anywhere else.
    fn is_sound(&self) -> bool {
        let sound = |path: &str| path.starts_with('/') && !path.split('/').any(|part| part == "..");
        sound(&self.path) && self.before.as_deref().is_none_or(sound)
    }
}

/// Where it lies, inside of the tree.
pub fn place() -> PathBuf {
    PathBuf::from(STATE_DIR).join(RECORD)
}
