//! What `install` would change, found out and worded before anything is touched.

use std::fmt;
use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::record::{Entry, Kind, Record};
use super::wanted::{Content, Fate, Wanted};
use super::{InstallError, files, place};
use crate::collect::STATE_DIR;
use crate::tree::Tree;

/// One change.
#[derive(Debug)]
pub(super) struct Change {
    pub wanted: Wanted,
    pub action: Action,
    /// For the record.
    pub kind: Kind,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Action {
    Create,
    /// Other permissions for a file of ours that has the right content.
    Permit,
    /// An older one of ours, with this digest.
    Update(String),
    /// A file that is not ours, which is kept aside here, and put back in the end.
    Replace(String),
    /// A file of ours that was changed by hand, which is kept aside here for who changed it.
    Overrule(String),
}

impl Change {
    /// Whether it only brings up to date what the user has agreed to before.
    pub fn is_refresh(&self) -> bool {
        match self.action {
            Action::Update(_) | Action::Permit => true,
            Action::Create => self.kind != Kind::Folder && self.wanted.path.starts_with(STATE_DIR),
            Action::Replace(_) | Action::Overrule(_) => false,
        }
    }
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

/// What is missing or different, folders first.
///
/// # Errors
/// [`InstallError`], for what is in the way.
pub(super) fn changes(tree: &Tree, record: &Record, wanted: Vec<Wanted>) -> Result<Vec<Change>, InstallError> {
    let mut changes: Vec<Change> = Vec::new();
    for wanted in wanted {
        place::check(tree, &wanted.path)?;
        let missing = Path::new(&wanted.path)
            .ancestors()
            .skip(1)
            .filter(|folder| !tree.path(folder).exists());
        let mut missing: Vec<String> = missing.map(|folder| folder.to_string_lossy().into_owned()).collect();
        missing.reverse();
        for path in missing {
            if !changes.iter().any(|change| change.wanted.path == path) {
                changes.push(Change {
                    wanted: Wanted::folder(path, 0o755, Fate::Remove, "a folder"),
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
        Content::Link(_) if found.as_ref().is_some_and(Metadata::is_symlink) => return Ok(None),
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
    let ours = wanted.path.starts_with(STATE_DIR) || recorded.is_some_and(|entry| entry.made(&digest_found));
    let action = if digest_found == *digest_wanted {
        if found.mode() & 0o7777 == wanted.mode {
            return Ok(None);
        }
        match ours {
            true => Action::Permit,
            false => Action::Replace(free_name(tree, BEFORE, &wanted.path, &path)?),
        }
    } else if ours {
        Action::Update(digest_found)
    } else if recorded.is_some_and(|entry| !is_kept(tree, entry)) {
        Action::Overrule(free_name(tree, EDITED, &wanted.path, &path)?)
    } else {
        Action::Replace(free_name(tree, BEFORE, &wanted.path, &path)?)
    };
    Ok(Some(Change { wanted, action, kind }))
}

/// Whether what is in an entry's place is just what was kept aside of it: an install was cut off before it replaced it.
pub(super) fn is_kept(tree: &Tree, entry: &Entry) -> bool {
    let before = entry.before.as_ref().map(|before| tree.path(before));
    before.is_some_and(|before| is_same(&before, &tree.path(&entry.path)))
}

/// Whether two ordinary files have the same content, owner and permissions.
pub(super) fn is_same(one: &Path, other: &Path) -> bool {
    let same_access = match (one.symlink_metadata(), other.symlink_metadata()) {
        (Ok(one), Ok(other)) => files::same_access(&one, &other),
        _ => false,
    };
    same_access && digest_of(one).is_some_and(|digest| digest_of(other) == Some(digest))
}

/// Begins the names of copies of files that were there before ours.
pub(super) const BEFORE: &str = "before";
/// Begins the names of copies of files of ours that were changed by hand.
pub(super) const EDITED: &str = "edited";

/// Where the file at `found` can be kept aside: no other copy is overwritten, and none is made twice.
fn free_name(tree: &Tree, kind: &str, path: &str, found: &Path) -> Result<String, InstallError> {
    let name = format!("{STATE_DIR}/{kind}{}", path.replace('/', "!"));
    let mut candidate = name.clone();
    let mut number = 1_u32;
    loop {
        let place = tree.path(&candidate);
        if place.symlink_metadata().is_err() || is_same(&place, found) {
            return Ok(candidate);
        }
        number = number.checked_add(1).ok_or(InstallError::InTheWay { path: place })?;
        candidate = format!("{name}.{number}");
    }
}

/// The place that a copy was made of, by the copy's name; the number of a second one is not looked at.
pub(super) fn place_of_copy(name: &str) -> Option<String> {
    let rest = name.strip_prefix(BEFORE).filter(|rest| rest.starts_with('!'))?;
    Some(rest.replace('!', "/"))
}

pub(super) fn open(path: &Path) -> Result<File, InstallError> {
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

/// The digest of an ordinary file; `None` for anything else, which is not even opened: a pipe would wait for ever.
pub(super) fn digest_of(path: &Path) -> Option<String> {
    path.symlink_metadata().ok().filter(Metadata::is_file)?;
    files::digest(&mut File::open(path).ok()?).ok()
}
