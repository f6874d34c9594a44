//! A disk that the user named, followed by what it is: never by the kernel's name of it, which another disk may get later.
//!
//! It is known by the name that it has by itself (model, serial number or world-wide name) and its size, wherever it is plugged
//! in; one that has no such name, or shares it with another, only until it is unplugged. So a disk that comes later is never
//! taken for one of two twins. One that is named before it is there may be any that comes: see [`Awaited`].

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use stiefel_sys::block::Disk;

use super::names::own_key;
use super::pick::{Candidate, Named, Survey};
use super::share::Source;

/// How long an awaited disk has to be the only one of its name before it counts: at a start all disks come within a few seconds, in
/// any order.
pub(super) const ALONE: Duration = Duration::from_secs(5);

/// What the user named.
#[derive(Debug)]
pub(super) struct Followed {
    /// As it was called.
    word: String,
    to: To,
}

#[derive(Debug, PartialEq, Eq)]
enum To {
    /// The only disk that calls itself so and has this size in bytes; `last` is its latest number.
    Own {
        key: String,
        size: u64,
        last: Option<u64>,
    },
    Awaited(Awaited),
    /// What has this number, until it is unplugged.
    Plugged(u64),
    /// What the kernel calls so.
    Called(String),
    File(PathBuf),
    /// Nothing any more.
    Nobody,
}

/// A disk that was named before it was there: the only one of its name, once it has been that for [`ALONE`], each time anew.
/// With a second one nobody knows which was meant, so it is neither.
#[derive(Debug, PartialEq, Eq)]
struct Awaited {
    key: String,
    /// In bytes, if it was named.
    size: Option<u64>,
    /// That of the first one that counted: another disk in its case is not it.
    first: Option<u64>,
    /// The only one: its name here, its number, and since when.
    only: Option<(String, Option<u64>, Instant)>,
    /// Whether it counts; `None` if that is too early to say.
    counts: Option<bool>,
}

/// Why no awaited disk is meant any more.
enum Lost {
    /// There are several.
    Several,
    /// Nothing tells it from another disk in its case.
    InACase,
}

impl Awaited {
    fn look(&mut self, survey: &Survey, now: Instant) -> Result<(), Lost> {
        let disks = survey.disks.iter();
        let mut called = disks.filter(|found| is_own(&found.disk, &self.key, self.size));
        match (called.next(), called.next()) {
            (None, _) => self.only = None,
            (Some(_), Some(_)) => return Err(Lost::Several),
            (Some(found), None) if found.usb && self.size.is_none() => return Err(Lost::InACase),
            (Some(Candidate { disk: only, .. }), None) => {
                let before = self.only.take();
                let since = before.filter(|(name, number, _)| *name == only.name && *number == only.sequence);
                let since = since.map_or(now, |(_, _, since)| since);
                let waited = now.saturating_duration_since(since) >= ALONE;
                self.counts = waited.then(|| *self.first.get_or_insert(only.size) == only.size);
                self.only = Some((only.name.clone(), only.sequence, since));
            }
        }
        Ok(())
    }

    fn is(&self, disk: &Disk) -> bool {
        let only = self.only.as_ref();
        let is_only = only.is_some_and(|(name, number, _)| *name == disk.name && *number == disk.sequence);
        is_only && self.counts == Some(true) && is_own(disk, &self.key, self.first)
    }
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
                size: disk.size,
                last: disk.sequence,
            },
            None => To::Plugged(disk.sequence?),
        };
        Some(Self::to(word, to))
    }

    /// A disk that may come later, by the name that it has by itself, and its size in bytes if that is known.
    pub(super) fn awaited(key: &str, size: Option<u64>) -> Self {
        let awaited = Awaited {
            key: key.to_owned(),
            size,
            first: size,
            only: None,
            counts: None,
        };
        Self::to(key, To::Awaited(awaited))
    }

    /// A file.
    pub(super) fn file(word: &str, path: &Path) -> Self {
        Self::to(word, To::File(path.to_owned()))
    }

    fn to(word: &str, to: To) -> Self {
        let word = word.to_owned();
        Self { word, to }
    }

    /// Looks at what is there. What is to be said if that changes what is meant; `done` is what may be done with it.
    pub(super) fn look(&mut self, survey: &Survey, now: Instant, done: &str) -> Option<String> {
        let word = &self.word;
        let none = format!("several disks are called {word}: none of them can be {done}");
        let (key, size, last) = match &mut self.to {
            To::Own { key, size, last } => (key, *size, last),
            To::Awaited(awaited) => {
                let lost = awaited.look(survey, now).err()?;
                self.to = To::Nobody;
                return Some(match lost {
                    Lost::Several => none,
                    Lost::InACase => format!(
                        "{word} is behind USB, and its serial number may be that of a case with another disk in it: it cannot be \
                         {done}; name its size, too: {word}=BYTES (`lsblk --bytes`)"
                    ),
                });
            }
            _ => return None,
        };
        let disks = survey.disks.iter().map(|found| &found.disk);
        let mut called = disks.filter(|disk| is_own(disk, key, Some(size)));
        match (called.next(), called.next()) {
            (None, _) => None,
            (Some(only), None) => {
                *last = only.sequence;
                None
            }
            (Some(_), Some(_)) => {
                let kept = last.map(To::Plugged);
                let said = match &kept {
                    None => none,
                    Some(_) => format!(
                        "several disks are called {word}: only the one that was here before can be {done}, until it is unplugged"
                    ),
                };
                self.to = kept.unwrap_or(To::Nobody);
                Some(said)
            }
        }
    }

    /// Whether it is there, and it is too early to say that it is what was named: [`Self::look`] again soon.
    pub(super) const fn waits(&self) -> bool {
        matches!(
            &self.to,
            To::Awaited(Awaited {
                only: Some(_),
                counts: None,
                ..
            })
        )
    }

    /// Whether this is what was named.
    pub(super) fn is(&self, source: &Source) -> bool {
        match (&self.to, source) {
            (To::Own { key, size, .. }, Source::Disk(disk)) => is_own(disk, key, Some(*size)),
            (To::Awaited(awaited), Source::Disk(disk)) => awaited.is(disk),
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
    pub(super) fn look(&mut self, survey: &Survey, now: Instant) -> Vec<String> {
        let followed = self.0.iter_mut();
        followed
            .filter_map(|followed| followed.look(survey, now, "lent"))
            .collect()
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
    use super::super::pick::unused;
    use super::*;
    use crate::testing;

    fn disk(name: &str, serial: Option<&str>, sequence: Option<u64>) -> Disk {
        Disk {
            serial: serial.map(str::to_owned),
            sequence,
            ..testing::disk(name)
        }
    }

    #[test]
    fn a_disk_that_gets_the_name_of_a_named_one_is_not_lent() {
        for serial in [Some("A1"), None] {
            let meant = disk("sdb", serial, Some(1));
            let mut chosen = Chosen::new(&[Named::Disk("sdb".into())], &unused(&[&meant]));
            assert!(chosen.has(&meant));
            let other = disk("sdb", Some("B2"), Some(2));
            assert!(chosen.look(&unused(&[&other]), Instant::now()).is_empty());
            assert!(!chosen.has(&other));
        }
        let twin = disk("sdc", Some("A1"), Some(3));
        let meant = disk("sdb", Some("A1"), Some(1));
        let mut chosen = Chosen::new(&[Named::Disk("sdb".into())], &unused(&[&meant]));
        assert_eq!(chosen.look(&unused(&[&meant, &twin]), Instant::now()).len(), 1);
        assert!(chosen.has(&meant) && !chosen.has(&twin));
    }

    #[test]
    fn a_file_is_itself_and_an_old_kernel_has_only_names() {
        let old = disk("sdb", None, None);
        let named = [Named::Disk("sdb".into()), Named::File("/a/b.img".into())];
        let chosen = Chosen::new(&named, &unused(&[&old]));
        assert!(chosen.has(&old) && !chosen.has(&disk("sdc", None, None)));
        assert_eq!(chosen.files().collect::<Vec<_>>(), [Path::new("/a/b.img")]);
    }
}
