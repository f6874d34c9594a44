//! A disk that the user named, followed by what it is: never by the kernel's name of it, which another disk may get later.
//!
//! It is known by the name that it has by itself (model, serial number or world-wide name) and its size, wherever it is plugged
//! in; one that has no such name, or shares it with another, only until it is unplugged. So a disk that comes later is never
//! taken for one of two twins.

use std::path::{Path, PathBuf};

use stiefel_sys::block::Disk;

use super::names::own_key;
use super::pick::{Named, Survey};
use super::share::Source;

/// What the user named.
#[derive(Debug)]
pub(super) struct Followed {
    /// As it was called.
    word: String,
    to: To,
}

#[derive(Debug, PartialEq, Eq)]
enum To {
    /// The only disk that calls itself so; `size` in bytes, if it was there when it was named; `last` is its latest number.
    Own {
        key: String,
        size: Option<u64>,
        last: Option<u64>,
    },
    /// What has this number, until it is unplugged.
    Plugged(u64),
    /// What the kernel calls so.
    Called(String),
    File(PathBuf),
    /// Nothing any more.
    Nobody,
}

impl Followed {
    /// A disk that is there now; `None` if another one could be taken for it later.
    pub(super) fn disk(word: &str, disk: &Disk, survey: &Survey) -> Option<Self> {
        let twins = |key: &str| {
            let same = survey.disks.iter();
            same.filter(|found| is_own(&found.disk, key, Some(disk.size))).count() > 1
        };
        let to = match own_key(disk).filter(|key| !twins(key)) {
            Some(key) => To::Own {
                key,
                size: Some(disk.size),
                last: disk.sequence,
            },
            None => To::Plugged(disk.sequence?),
        };
        Some(Self::to(word, to))
    }

    /// A disk that may come later, by the name that it has by itself.
    pub(super) fn awaited(key: &str) -> Self {
        let own = To::Own {
            key: key.to_owned(),
            size: None,
            last: None,
        };
        Self::to(key, own)
    }

    /// A file.
    pub(super) fn file(word: &str, path: &Path) -> Self {
        Self::to(word, To::File(path.to_owned()))
    }

    fn to(word: &str, to: To) -> Self {
        let word = word.to_owned();
        Self { word, to }
    }

    pub(super) fn word(&self) -> &str {
        &self.word
    }

    /// Looks at what is there; an answer means that there are several of its name now, and whether the one that was here before
    /// is still meant.
    pub(super) fn look(&mut self, survey: &Survey) -> Option<bool> {
        let To::Own { key, size, last } = &mut self.to else {
            return None;
        };
        let disks = survey.disks.iter().map(|found| &found.disk);
        let mut called = disks.filter(|disk| is_own(disk, key, *size));
        match (called.next(), called.next()) {
            (None, _) => None,
            (Some(only), None) => {
                *last = only.sequence;
                None
            }
            (Some(_), Some(_)) => {
                let kept = last.is_some();
                self.to = last.map_or(To::Nobody, To::Plugged);
                Some(kept)
            }
        }
    }

    /// Whether this is what was named.
    pub(super) fn is(&self, source: &Source) -> bool {
        match (&self.to, source) {
            (To::Own { key, size, .. }, Source::Disk(disk)) => is_own(disk, key, *size),
            (To::Plugged(number), Source::Disk(disk)) => disk.sequence == Some(*number),
            (To::Called(name), Source::Disk(disk)) => disk.name == *name,
            (To::File(named), Source::File { path, .. }) => named == path,
            _ => false,
        }
    }
}

fn is_own(disk: &Disk, key: &str, size: Option<u64>) -> bool {
    own_key(disk).is_some_and(|own| own == key) && size.is_none_or(|size| size == disk.size)
}

/// What the user named to be lent.
#[derive(Debug, Default)]
pub(super) struct Chosen(Vec<Followed>);

impl Chosen {
    /// Of what is there now. A disk that could not be followed (before Linux 5.15) is the one that the kernel calls so.
    pub(super) fn new(named: &[Named], survey: &Survey) -> Self {
        let followed = |named: &Named| match named {
            Named::File(path) => Followed::file(&path.to_string_lossy(), path),
            Named::Disk(name) => {
                let disk = survey.disks.iter().find(|found| found.disk.name == *name);
                let disk = disk.and_then(|found| Followed::disk(name, &found.disk, survey));
                disk.unwrap_or_else(|| Followed::to(name, To::Called(name.clone())))
            }
        };
        Self(named.iter().map(followed).collect())
    }

    /// Follows the disks; what is to be said.
    pub(super) fn look(&mut self, survey: &Survey) -> Vec<String> {
        let said = |followed: &mut Followed| {
            let rest = match followed.look(survey)? {
                false => "none of them is lent",
                true => "only the one that was here before is lent, until it is unplugged",
            };
            Some(format!("several disks are called {}: {rest}", followed.word))
        };
        self.0.iter_mut().filter_map(said).collect()
    }

    /// Whether a disk was named.
    pub(super) fn has(&self, disk: &Disk) -> bool {
        let source = Source::Disk(disk.clone());
        self.0.iter().any(|followed| followed.is(&source))
    }

    /// The files.
    pub(super) fn files(&self) -> impl Iterator<Item = &Path> {
        self.0.iter().filter_map(|followed| match &followed.to {
            To::File(path) => Some(path.as_path()),
            _ => None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::pick::Candidate;
    use super::*;

    fn disk(name: &str, serial: Option<&str>, sequence: Option<u64>) -> Disk {
        Disk {
            name: name.into(),
            path: format!("/dev/{name}").into(),
            device: (8, 0),
            size: 1 << 20,
            logical_block_size: 512,
            physical_block_size: 512,
            model: None,
            serial: serial.map(str::to_owned),
            wwid: None,
            removable: false,
            read_only: false,
            rotational: false,
            sequence,
        }
    }

    fn survey(disks: &[&Disk]) -> Survey {
        let candidate = |disk: &&Disk| Candidate {
            disk: (*disk).clone(),
            system: false,
            users: Vec::new(),
        };
        Survey {
            disks: disks.iter().map(candidate).collect(),
            unknown: None,
        }
    }

    #[test]
    fn a_disk_that_gets_the_name_of_a_named_one_is_not_lent() {
        for serial in [Some("A1"), None] {
            let meant = disk("sdb", serial, Some(1));
            let mut chosen = Chosen::new(&[Named::Disk("sdb".into())], &survey(&[&meant]));
            assert!(chosen.has(&meant));
            let other = disk("sdb", Some("B2"), Some(2));
            assert!(chosen.look(&survey(&[&other])).is_empty());
            assert!(!chosen.has(&other));
        }
        let twin = disk("sdc", Some("A1"), Some(3));
        let meant = disk("sdb", Some("A1"), Some(1));
        let mut chosen = Chosen::new(&[Named::Disk("sdb".into())], &survey(&[&meant]));
        assert_eq!(chosen.look(&survey(&[&meant, &twin])).len(), 1);
        assert!(chosen.has(&meant) && !chosen.has(&twin));
    }

    #[test]
    fn a_file_is_itself_and_an_old_kernel_has_only_names() {
        let old = disk("sdb", None, None);
        let named = [Named::Disk("sdb".into()), Named::File("/a/b.img".into())];
        let chosen = Chosen::new(&named, &survey(&[&old]));
        assert!(chosen.has(&old) && !chosen.has(&disk("sdc", None, None)));
        assert_eq!(chosen.files().collect::<Vec<_>>(), [Path::new("/a/b.img")]);
    }
}
