//! Which disks may be written, by whom: looked up once, at the start, and followed from then on ([`super::follow`]).

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, bail};
use stiefel_shared::handover::WritableDisk;

use super::follow::Followed;
use super::names::{Names, own_key};
use super::pick::Survey;
use super::share::Source;
use super::{Options, Writable};

/// All disks that may be written.
#[derive(Debug, Default)]
pub(super) struct Grants(Vec<Grant>);

/// One disk that may be written.
#[derive(Debug)]
pub(super) struct Grant {
    /// The only host's NQN, if it is to be written by NVMe.
    pub(super) host: Option<String>,
    disk: Followed,
}

impl Grants {
    /// Looks up what the user named among what is lent now.
    ///
    /// # Errors
    /// In words: a disk is not there, or could not be told from another one later.
    pub(super) fn new<'a>(
        options: &Options,
        lent: impl Iterator<Item = (&'a Source, &'a Names)> + Clone,
        survey: &Survey,
    ) -> anyhow::Result<Self> {
        let grant = |writable: &Writable| {
            let word = &writable.disk;
            let is_meant = |(source, names): &(&'a Source, &'a Names)| is_called(word, source, names);
            let disk = match lent.clone().find(is_meant) {
                _ if options.awaited => Followed::awaited(word, writable.size),
                Some((Source::Disk(disk), _)) => Followed::disk(word, disk, survey).with_context(|| {
                    format!(
                        "--read-write {word}: it has no serial number of its own, so another disk could be taken for it later (this \
                         kernel does not number disks; Linux 5.15 does); lend it read-only"
                    )
                })?,
                Some((Source::File { path, .. }, _)) => Followed::file(word, path),
                None => bail!(
                    "--read-write {word}: no disk {word} is there to be lent; name one that is (`lsblk` lists them)"
                ),
            };
            let host = writable.host.clone();
            anyhow::Ok(Grant { host, disk })
        };
        let grants = options.writable.iter().map(grant).collect::<anyhow::Result<_>>()?;
        Ok(Self(grants))
    }

    /// Follows the disks; what is to be said.
    pub(super) fn look(&mut self, survey: &Survey, now: Instant) -> Vec<String> {
        let grants = self.0.iter_mut();
        grants
            .filter_map(|grant| grant.disk.look(survey, now, "written"))
            .collect()
    }

    /// Whether a disk is there that it is too early to say of.
    pub(super) fn waits(&self) -> bool {
        self.0.iter().any(|grant| grant.disk.waits())
    }

    /// Who may write this; `None`: nobody.
    pub(super) fn of(&self, source: &Source) -> Option<&Grant> {
        self.0.iter().find(|grant| grant.disk.is(source))
    }
}

/// Whether the user means this: by the name that is listed, the kernel's name, or a path.
fn is_called(word: &str, source: &Source, names: &Names) -> bool {
    let path = source.path();
    let by_path = || std::fs::canonicalize(word).is_ok_and(|found| found == path);
    word == names.key
        || Path::new(word) == path
        || path.strip_prefix("/dev").is_ok_and(|name| name == Path::new(word))
        || by_path()
}

/// By what a disk of this running system is known after the next start, for the handover.
///
/// # Errors
/// In words: it is not there, or has no name that stays.
pub(super) fn lasting(word: &str, survey: &Survey) -> anyhow::Result<WritableDisk> {
    let disks = survey.disks.iter().map(|found| &found.disk);
    let found = disks.clone().find(|disk| {
        let names = Names::of_disk("", disk, &|_| false);
        is_called(word, &Source::Disk((*disk).clone()), &names)
    });
    let disk = found.with_context(|| format!("--read-write {word}: no disk {word} is there; `lsblk` lists them"))?;
    let key = own_key(disk).with_context(|| {
        format!("--read-write {word}: it has no serial number by which it would be known after the start")
    })?;
    let twins = disks.filter(|other| own_key(other).as_deref() == Some(&key)).count();
    anyhow::ensure!(
        twins == 1,
        "--read-write {word}: several disks are called {key} and could not be told apart after the start"
    );
    Ok(WritableDisk {
        name: key,
        size: Some(disk.size),
    })
}

#[cfg(test)]
mod tests {
    use super::super::follow::ALONE;
    use super::super::pick::unused;
    use super::*;
    use crate::testing;
    use proptest::prelude::*;
    use std::time::Duration;
    use stiefel_sys::block::Disk;

    fn disk(name: &str, serial: Option<&str>, sequence: Option<u64>) -> Disk {
        Disk {
            model: Some("USB".into()),
            serial: serial.map(str::to_owned),
            sequence,
            ..testing::disk(name)
        }
    }

    fn grants(word: &str, awaited: bool, disks: &[&Disk]) -> anyhow::Result<Grants> {
        sized(word, None, awaited, disks)
    }

    fn sized(word: &str, size: Option<u64>, awaited: bool, disks: &[&Disk]) -> anyhow::Result<Grants> {
        let options = Options {
            writable: vec![Writable {
                size,
                ..word.parse().unwrap()
            }],
            awaited,
            ..Options::default()
        };
        let lent: Vec<(Source, Names)> = disks
            .iter()
            .map(|disk| (Source::Disk((*disk).clone()), Names::of_disk("m", disk, &|_| false)))
            .collect();
        Grants::new(
            &options,
            lent.iter().map(|(source, names)| (source, names)),
            &unused(disks),
        )
    }

    fn may_write(grants: &Grants, disk: &Disk) -> bool {
        grants.of(&Source::Disk(disk.clone())).is_some()
    }

    #[test]
    fn another_disk_that_gets_the_kernels_name_is_not_written() {
        let meant = disk("sdb", Some("A1"), Some(7));
        for word in ["sdb", "/dev/sdb", "usb-a1"] {
            let mut grants = grants(word, false, &[&meant]).unwrap();
            assert!(may_write(&grants, &meant), "{word}");
            let other = disk("sdb", Some("B2"), Some(8));
            assert!(grants.look(&unused(&[&other]), Instant::now()).is_empty());
            assert!(!may_write(&grants, &other), "{word}");
            // The disk itself, in another port.
            let again = disk("sdx", Some("A1"), Some(9));
            grants.look(&unused(&[&other, &again]), Instant::now());
            assert!(may_write(&grants, &again) && !may_write(&grants, &other), "{word}");
        }
    }

    #[test]
    fn another_disk_in_the_same_case_is_told_by_its_size() {
        let meant = disk("sdb", Some("CASE"), Some(7));
        let grants = grants("sdb", false, &[&meant]).unwrap();
        let mut other = disk("sdb", Some("CASE"), Some(8));
        other.size *= 2;
        assert!(!may_write(&grants, &other));
    }

    #[test]
    fn a_disk_without_a_name_of_its_own_is_written_until_it_is_unplugged() {
        let meant = disk("sdb", None, Some(7));
        let grants_of = |disk| grants("sdb", false, &[disk]);
        let grants = grants_of(&meant).unwrap();
        assert!(may_write(&grants, &meant));
        assert!(!may_write(&grants, &disk("sdb", None, Some(8))));
        let error = grants_of(&disk("sdb", None, None)).unwrap_err();
        assert!(error.to_string().contains("Linux 5.15"), "{error}");
    }

    #[test]
    fn of_twins_only_the_one_that_was_named_is_written() {
        let (meant, twin) = (disk("sdb", Some("0123"), Some(7)), disk("sdc", Some("0123"), Some(8)));
        let both = grants("sdc", false, &[&meant, &twin]).unwrap();
        assert!(may_write(&both, &twin) && !may_write(&both, &meant));
        // The twin comes later, and stays when the first one has gone.
        let now = Instant::now();
        let mut one = grants("sdb", false, &[&meant]).unwrap();
        one.look(&unused(&[&meant]), now);
        assert_eq!(one.look(&unused(&[&meant, &twin]), now).len(), 1);
        assert!(may_write(&one, &meant) && !may_write(&one, &twin));
        one.look(&unused(&[&twin]), now);
        assert!(!may_write(&one, &twin));
    }

    #[test]
    fn a_name_that_nothing_has_is_an_error_unless_it_is_awaited() {
        let there = disk("sda", Some("A1"), Some(1));
        assert!(grants("sdb", false, &[&there]).unwrap_err().to_string().contains("sdb"));
        let mut later = grants("usb-b2", true, &[&there]).unwrap();
        let comes = disk("sdb", Some("B2"), Some(2));
        let now = Instant::now();
        for at in [now, now + ALONE] {
            later.look(&unused(&[&there, &comes]), at);
        }
        assert!(may_write(&later, &comes) && !may_write(&later, &there));
        // A kernel's name is nobody's own.
        let mut named = grants("sda", true, &[&there]).unwrap();
        for at in [now, now + ALONE] {
            named.look(&unused(&[&there]), at);
        }
        assert!(!may_write(&named, &there));
        // Twins that are there already: nobody could say which is meant.
        let twin = disk("sdc", Some("B2"), Some(3));
        let mut both = grants("usb-b2", true, &[&comes, &twin]).unwrap();
        assert_eq!(both.look(&unused(&[&comes, &twin]), now).len(), 1);
        both.look(&unused(&[&comes]), now + ALONE);
        assert!(!may_write(&both, &comes) && !may_write(&both, &twin));
    }

    #[test]
    fn an_awaited_disk_is_written_only_after_it_was_alone_for_a_while() {
        let (first, twin) = (disk("sdb", Some("B2"), Some(2)), disk("sdc", Some("B2"), Some(3)));
        let now = Instant::now();
        let mut quick = grants("usb-b2", true, &[]).unwrap();
        quick.look(&unused(&[&first]), now);
        assert!(quick.waits() && !may_write(&quick, &first));
        assert_eq!(quick.look(&unused(&[&first, &twin]), now + ALONE).len(), 1);
        assert!(!quick.waits() && !may_write(&quick, &first) && !may_write(&quick, &twin));
        // Late: what was written so far may have been the wrong one.
        let mut late = grants("usb-b2", true, &[]).unwrap();
        late.look(&unused(&[&first]), now);
        late.look(&unused(&[&first]), now + ALONE);
        assert!(may_write(&late, &first) && !may_write(&late, &twin));
        assert_eq!(late.look(&unused(&[&first, &twin]), now + 2 * ALONE).len(), 1);
        assert!(!may_write(&late, &first) && !may_write(&late, &twin));
    }

    #[test]
    fn another_disk_in_the_case_of_an_awaited_one_is_not_written() {
        let (first, mut other) = (disk("sdb", Some("B2"), Some(2)), disk("sdb", Some("B2"), Some(3)));
        other.size *= 2;
        let now = Instant::now();
        let mut grants = grants("usb-b2", true, &[]).unwrap();
        for (there, at) in [(&first, 0), (&first, 1), (&other, 2), (&other, 3)] {
            grants.look(&unused(&[there]), now + at * ALONE);
        }
        assert!(!may_write(&grants, &other) && !grants.waits());
        for at in [4, 5] {
            grants.look(&unused(&[&first]), now + at * ALONE);
        }
        assert!(may_write(&grants, &first));
    }

    #[test]
    fn only_a_name_that_lasts_goes_into_the_handover() {
        let (own, none) = (disk("sda", Some("A1"), Some(1)), disk("sdb", None, Some(2)));
        let both = unused(&[&own, &none]);
        let expected = WritableDisk {
            name: "usb-a1".to_owned(),
            size: Some(own.size),
        };
        assert_eq!(lasting("sda", &both).unwrap(), expected);
        assert_eq!(lasting("usb-a1", &both).unwrap(), expected);
        assert!(lasting("sdb", &both).is_err());
        assert!(lasting("sdz", &both).is_err());
        let twin = disk("sdc", Some("A1"), Some(3));
        assert!(lasting("sda", &unused(&[&own, &twin])).is_err());
    }

    #[test]
    fn an_awaited_disk_in_a_usb_case_is_written_only_where_its_size_was_named() {
        let meant = disk("sdb", Some("CASE"), Some(2));
        let mut other = disk("sdb", Some("CASE"), Some(3));
        other.size *= 2;
        let now = Instant::now();
        let seen = |disk: &Disk, size: Option<u64>| {
            let mut grants = sized("usb-case", size, true, &[]).unwrap();
            let mut survey = unused(&[disk]);
            survey.disks[0].usb = true;
            let said: Vec<String> = [now, now + ALONE]
                .iter()
                .flat_map(|at| grants.look(&survey, *at))
                .collect();
            (may_write(&grants, disk), said.join("\n"))
        };
        assert_eq!(seen(&meant, Some(meant.size)), (true, String::new()));
        assert_eq!(seen(&other, Some(meant.size)), (false, String::new()));
        let (written, said) = seen(&meant, None);
        assert!(!written && said.contains("usb-case=BYTES"), "{said}");
    }

    proptest! {
        /// Whatever comes and goes in whatever order: once both have been seen together, only the one may be written that was
        /// there alone before.
        #[test]
        fn a_twin_is_never_written(steps in proptest::collection::vec((any::<bool>(), any::<bool>()), 1..12)) {
            let (meant, twin) = (disk("sdb", Some("0123"), Some(7)), disk("sdc", Some("0123"), Some(8)));
            let mut grants = grants("sdb", false, &[&meant]).unwrap();
            let (mut met, mut alone) = (false, &meant);
            for (first, second) in steps {
                let both = [(first, &meant), (second, &twin)];
                let there: Vec<&Disk> = both.iter().filter(|(is, _)| *is).map(|(_, disk)| *disk).collect();
                grants.look(&unused(&there), Instant::now());
                met |= there.len() == 2;
                if let ([only], false) = (there.as_slice(), met) {
                    alone = only;
                }
                if met {
                    prop_assert_eq!(may_write(&grants, &meant), alone.name == meant.name);
                    prop_assert_eq!(may_write(&grants, &twin), alone.name == twin.name);
                }
            }
        }

        /// Once both have been seen together, neither; before, none that was not alone for long enough without a break.
        #[test]
        fn no_awaited_disk_with_a_twin_is_written(
            steps in proptest::collection::vec((any::<bool>(), any::<bool>(), 0_u32..12), 1..16)
        ) {
            let (one, two) = (disk("sdb", Some("0123"), Some(7)), disk("sdc", Some("0123"), Some(8)));
            let mut grants = grants("usb-0123", true, &[]).unwrap();
            let (mut met, mut now, mut since) = (false, Instant::now(), [None, None]);
            for (first, second, seconds) in steps {
                now += Duration::from_secs(seconds.into());
                let both = [(first, &one), (second, &two)];
                let there: Vec<&Disk> = both.iter().filter(|(is, _)| *is).map(|(_, disk)| *disk).collect();
                grants.look(&unused(&there), now);
                met |= there.len() == 2;
                for ((is, disk), since) in both.iter().zip(&mut since) {
                    *since = is.then(|| since.unwrap_or(now));
                    let long = since.is_some_and(|since: Instant| now - since >= ALONE);
                    prop_assert_eq!(may_write(&grants, disk), !met && long);
                }
            }
        }
    }
}
