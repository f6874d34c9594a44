//! What is to be lent, of what is there, and how.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::Options;
use super::follow::Chosen;
use super::grant::Grants;
use super::listing::LeftOut;
use super::names::Names;
use super::pick::{self, Candidate, Survey};
use super::share::{Mode, Source};

/// What is to be lent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Wanted {
    pub(super) source: Source,
    pub(super) users: Vec<String>,
}

/// Which disks are to be lent, and which are not, with the reason.
pub(super) fn wanted(options: &Options, chosen: &Chosen, survey: &Survey) -> (Vec<Wanted>, Vec<LeftOut>) {
    let (mut wanted, mut left_out) = (Vec::new(), Vec::new());
    for Candidate {
        disk, system, users, ..
    } in &survey.disks
    {
        let by_name = chosen.has(disk);
        if !by_name && options.all == 0 {
            continue;
        }
        let refused = match &survey.unknown {
            _ if options.all >= 2 => None,
            _ if *system => {
                Some("the running system lives on it; `--all --all` lends every disk, also this one".to_owned())
            }
            Some(part) if !by_name => Some(format!(
                "it may be one of the running system's ({part}); name it, or say --all twice"
            )),
            _ => None,
        };
        match refused {
            Some(why) => left_out.push(LeftOut {
                device: disk.path.display().to_string(),
                why,
            }),
            None => wanted.push(Wanted {
                source: Source::Disk(disk.clone()),
                users: users.clone(),
            }),
        }
    }
    for path in chosen.files() {
        if let Ok(metadata) = std::fs::metadata(path) {
            // By what it is: it may have more than one name.
            let same = |image: &PathBuf| {
                let known = std::fs::metadata(image);
                known.is_ok_and(|known| (known.dev(), known.ino()) == (metadata.dev(), metadata.ino()))
            };
            let users = survey.images.iter().find(|(image, _)| same(image));
            wanted.push(Wanted {
                source: Source::File {
                    path: path.to_owned(),
                    size: metadata.len(),
                },
                users: users.map(|(_, user)| user.clone()).into_iter().collect(),
            });
        }
    }
    (wanted, left_out)
}

/// What the user has named of what is there now, to be lent, and to be written.
///
/// # Errors
/// In words: it is not there, or not one that can be lent.
pub(super) fn look_up(options: &Options) -> anyhow::Result<(Chosen, Grants)> {
    let root = Path::new("/");
    let named = options.devices.iter().map(|path| pick::named(root, path));
    let named = named.collect::<anyhow::Result<Vec<_>>>()?;
    let survey = pick::survey(root)?;
    let chosen = Chosen::new(&named, &survey);
    let lent = Called::default().with_names("", wanted(options, &chosen, &survey).0);
    let sources = lent.iter().map(|(want, names)| (&want.source, names));
    let grants = Grants::new(options, sources, &survey)?;
    Ok((chosen, grants))
}

/// What each is called, for as long as it is there: a twin that comes later does not get the name of the one that has it.
#[derive(Debug, Default)]
pub(super) struct Called(Vec<(Source, Names)>);

impl Called {
    /// Gives each its name.
    pub(super) fn with_names(&mut self, machine: &str, wanted: Vec<Wanted>) -> Vec<(Wanted, Names)> {
        self.0
            .retain(|(source, _)| wanted.iter().any(|want| want.source.is_still(source)));
        let mut all = Vec::new();
        for want in wanted {
            let known = self.0.iter().find(|(source, _)| want.source.is_still(source));
            let names = match known {
                Some((_, names)) => names.clone(),
                None => {
                    let taken = |key: &str| self.0.iter().any(|(_, names)| names.key == key);
                    let names = Names::of(machine, &want.source, &taken);
                    self.0.push((want.source.clone(), names.clone()));
                    names
                }
            };
            all.push((want, names));
        }
        all
    }
}

pub(super) fn mode(options: &Options, grants: &Grants, source: &Source) -> Mode {
    match grants.of(source) {
        Some(grant) => Mode::ReadWrite {
            host: grant.host.clone(),
        },
        None if options.snapshot => Mode::Snapshot,
        None => Mode::ReadOnly,
    }
}

#[cfg(test)]
mod tests {
    use super::super::pick::Named;
    use super::*;
    use crate::testing;
    use stiefel_sys::block::Disk;

    fn candidate(name: &str, system: bool) -> Candidate {
        Candidate {
            disk: Disk {
                serial: Some(format!("serial {name}")),
                ..testing::disk(name)
            },
            system,
            usb: false,
            users: Vec::new(),
        }
    }

    fn lent(options: &Options, named: &[Named], survey: &Survey) -> (Vec<String>, Vec<String>) {
        let (wanted, left) = wanted(options, &Chosen::new(named, survey), survey);
        let devices = wanted.iter().map(|want| want.source.path().display().to_string());
        (devices.collect(), left.into_iter().map(|left| left.why).collect())
    }

    #[test]
    fn the_systems_disk_is_lent_only_when_asked_for_twice() {
        let survey = Survey {
            disks: vec![candidate("sda", true), candidate("sdb", false)],
            ..Survey::default()
        };
        let all = |all| Options {
            all,
            ..Options::default()
        };
        let (devices, why) = lent(&all(1), &[], &survey);
        assert_eq!(devices, ["/dev/sdb"]);
        assert!(why[0].contains("running system"), "{why:?}");
        assert_eq!(lent(&all(2), &[], &survey).0, ["/dev/sda", "/dev/sdb"]);
        // Also by its name, for a slip of the finger is enough.
        assert!(lent(&all(0), &[Named::Disk("sda".into())], &survey).0.is_empty());
        assert_eq!(lent(&all(0), &[Named::Disk("sdb".into())], &survey).0, ["/dev/sdb"]);
    }

    #[test]
    fn where_the_root_is_unknown_only_named_disks_are_lent() {
        let survey = Survey {
            disks: vec![candidate("sda", false)],
            unknown: Some("zfs on rpool".into()),
            ..Survey::default()
        };
        let options = Options {
            all: 1,
            ..Options::default()
        };
        assert!(lent(&options, &[], &survey).0.is_empty());
        assert_eq!(
            lent(&Options::default(), &[Named::Disk("sda".into())], &survey).0,
            ["/dev/sda"]
        );
    }

    #[test]
    fn a_disk_keeps_its_name_while_it_is_there_whatever_twin_comes_or_goes() {
        let twin = |name: &str, sequence| {
            let mut disk = candidate(name, false).disk;
            disk.serial = Some("0123".into());
            disk.sequence = Some(sequence);
            disk
        };
        let mut called = Called::default();
        let mut names = |disks: &[&Disk]| -> Vec<String> {
            let want = |disk: &&Disk| Wanted {
                source: Source::Disk((*disk).clone()),
                users: Vec::new(),
            };
            let named = called.with_names("m", disks.iter().map(want).collect());
            named.into_iter().map(|(_, names)| names.key).collect()
        };
        let (mut first, second) = (twin("sdb", 1), twin("sda", 2));
        assert_eq!(names(&[&first]), ["0123"]);
        assert_eq!(names(&[&second, &first]), ["0123-sda", "0123"]);
        // Of the same disk something else may change.
        first.read_only = true;
        assert_eq!(names(&[&second, &first]), ["0123-sda", "0123"]);
        assert_eq!(names(&[&second]), ["0123-sda"]);
        // Another one, though the kernel calls it as the first.
        assert_eq!(names(&[&second, &twin("sdb", 3)]), ["0123-sda", "0123"]);
        let mut other = twin("sdb", 4);
        other.serial = Some("4567".into());
        assert_eq!(names(&[&second, &other]), ["0123-sda", "4567"]);
    }

    #[test]
    fn disks_are_read_only_unless_named() {
        let survey = Survey {
            disks: vec![candidate("sda", false)],
            ..Survey::default()
        };
        let with = |disk: Option<&str>, snapshot| {
            let options = Options {
                writable: disk.iter().map(|disk| disk.parse().unwrap()).collect(),
                all: 1,
                snapshot,
                ..Options::default()
            };
            let lent = Called::default().with_names("m", wanted(&options, &Chosen::default(), &survey).0);
            let sources = lent.iter().map(|(want, names)| (&want.source, names));
            let grants = Grants::new(&options, sources, &survey).unwrap();
            mode(&options, &grants, &lent[0].0.source)
        };
        for word in ["sda", "/dev/sda", "serial-sda"] {
            for snapshot in [false, true] {
                let granted = Mode::ReadWrite { host: None };
                assert_eq!(with(Some(word), snapshot), granted, "{word}");
            }
        }
        assert_eq!(with(None, false), Mode::ReadOnly);
        assert_eq!(with(None, true), Mode::Snapshot);
    }

    #[test]
    fn a_file_that_is_in_use_under_another_name_is_in_use() {
        let dir = tempfile::tempdir().unwrap();
        let [image, link, other] = ["image", "link", "other"].map(|name| dir.path().join(name));
        std::fs::write(&image, [0; 4096]).unwrap();
        std::fs::hard_link(&image, &link).unwrap();
        std::fs::write(&other, [0; 4096]).unwrap();
        let survey = Survey {
            disks: Vec::new(),
            unknown: None,
            images: std::collections::BTreeMap::from([(image, "held by loop3".to_owned())]),
        };
        let named = [link, other].map(pick::Named::File);
        let chosen = Chosen::new(&named, &survey);
        let (lent, _) = wanted(&Options::default(), &chosen, &survey);
        let users: Vec<&[String]> = lent.iter().map(|want| want.users.as_slice()).collect();
        assert_eq!(users, [&["held by loop3".to_owned()][..], &[]]);
    }
}
