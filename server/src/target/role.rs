//! The role `target` of the ramdisk: all disks of a machine that was started for nothing else.
//!
//! Nothing of the machine's own system runs, so `--all` leaves nothing out. The screen is this program's alone: what is lent, to
//! whom, and what they do. Keys: 1 to 9 take a disk back (or lend it again), asked twice while it is lent to somebody; q ends.

use std::path::Path;
use std::time::{Duration, Instant};

use stiefel_shared::handover::TargetHandover;
use stiefel_sys::console::Console;
use stiefel_sys::keyboard::Keyboard;
use stiefel_sys::{SYSFS, wired};
use tokio::sync::mpsc;

use super::closed::{self, Seat};
use super::names::machine;
use super::words::{self, Words};
use super::{Options, Writable, run};
use crate::tree::Tree;

/// Within this time the second press of a key counts.
const SURE: Duration = Duration::from_secs(5);

/// Lends until q is pressed at the machine, with the addresses of `words` on its NICs.
///
/// # Errors
/// Nothing can be lent at all, or something was not ended in order.
pub async fn run_role(console: &'static Console, handover: &TargetHandover, words: Words) -> anyhow::Result<()> {
    let mut addresses = words.into_giver();
    let options = options(handover, Path::new("/"));
    // In the ramdisk nobody else sets the NICs up.
    let tree = Tree::new(Path::new("/"));
    wired::follow(console, move |event| {
        wired::say(console, &event);
        let mac = |nic: &str| words::mac(&tree, nic);
        addresses.follow(&event, mac, |index, address, prefix| {
            words::add(console, index, address, prefix);
        });
        true
    })?;
    if handover.open {
        return run::follow(&options, keys(console)).await;
    }
    let names: Vec<&str> = handover.keys.iter().map(|key| key.name.as_str()).collect();
    console.info(&format!(
        "disks are lent to the holders of these keys: {}",
        names.join(", ")
    ));
    closed::follow(&options, &handover.keys, keys(console)).await
}

/// Everything, for nothing of it is in use; disks that may be written are known by the names that stay.
fn options(handover: &TargetHandover, root: &Path) -> Options {
    let writable = handover.read_write.iter().map(|disk| Writable {
        disk: disk.name.clone(),
        host: None,
        size: disk.size,
    });
    Options {
        all: 2,
        writable: writable.collect(),
        awaited: true,
        snapshot: handover.snapshot,
        nbd_port: stiefel_shared::nbd::PORT,
        hostname: Some(
            handover
                .hostname
                .clone()
                .unwrap_or_else(|| name_of(&machine(&Tree::new(root)))),
        ),
        ..Options::default()
    }
}

/// What a machine is called of which only its hardware is known: there may be several, and all sticks are the same.
fn name_of(machine: &str) -> String {
    format!("stiefel-{}", machine.get(..6).unwrap_or_default())
}

/// The keys that people press; none are heard where there is no keyboard.
fn keys(console: &'static Console) -> Seat {
    let (tell, pressed) = mpsc::channel(8);
    match Keyboard::open(Path::new("/dev"), Path::new(SYSFS)) {
        Err(error) => console.warn(&format!("this machine hears no keys: {error}")),
        Ok(mut keyboard) => {
            console.info("keys: 1 to 9 take a disk back or lend it again, q ends");
            let listen = move || {
                while let Ok(key) = keyboard.next(None) {
                    if let Some(key) = key
                        && tell.blocking_send(key).is_err()
                    {
                        return;
                    }
                }
            };
            if let Err(error) = std::thread::Builder::new().name("keys".to_owned()).spawn(listen) {
                console.warn(&format!("no keys are heard: {error}"));
            }
        }
    }
    Seat {
        keys: Some(pressed),
        sure: Sure::default(),
    }
}

/// What a key does.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Press {
    /// End everything.
    End,
    /// A disk is taken back, or lent again.
    Done(String),
    /// It is in use: pressed again it is taken back.
    Warned(String),
    /// It means nothing.
    Nothing,
}

/// Remembers which key has been warned of.
#[derive(Debug, Default)]
pub(super) struct Sure(Option<(char, Instant)>);

/// What can be taken back at the machine.
pub(super) trait Lending {
    /// All disks' names, in the order in which they are shown.
    fn names(&self) -> Vec<String>;
    /// How many have a disk.
    fn users_of(&self, disk: &str) -> usize;
    /// How many have any.
    fn users(&self) -> usize;
    /// Takes a disk back (`true`), or lends it again.
    fn withhold(&mut self, disk: &str) -> bool;
}

impl Sure {
    /// What a key that was pressed at `now` does.
    pub(super) fn press(&mut self, key: char, now: Instant, lending: &mut dyn Lending) -> Press {
        let key = key.to_ascii_lowercase();
        let again = self
            .0
            .take()
            .is_some_and(|(before, at)| before == key && now.duration_since(at) < SURE);
        let number = key
            .to_digit(10)
            .and_then(|digit| usize::try_from(digit).ok())
            .filter(|digit| *digit > 0);
        let name = number.and_then(|number| lending.names().into_iter().nth(number - 1));
        let (users, what) = match (&name, key) {
            (Some(name), _) => (lending.users_of(name), name.clone()),
            (None, 'q') => (lending.users(), "everything".to_owned()),
            (None, _) => return Press::Nothing,
        };
        if users > 0 && !again {
            self.0 = Some((key, now));
            return Press::Warned(format!(
                "{what} is in use ({users} users): pressed again it is taken back all the same"
            ));
        }
        match name {
            None => Press::End,
            Some(name) => Press::Done(match lending.withhold(&name) {
                true => format!("{name} is taken back"),
                false => format!("{name} is lent again"),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::desk::{Desk, OnOffer};
    use super::super::names::Names;
    use super::super::share::{Mode, Source};
    use super::*;
    use std::sync::Arc;
    use stiefel_shared::handover::WritableDisk;

    fn desk() -> Arc<Desk> {
        let desk = Desk::new("laptop".to_owned(), false);
        let names = Names::of_file("m", "disk.img", &|_| false);
        let source = Source::File {
            path: "/nowhere/disk.img".into(),
            size: 4096,
        };
        desk.offer(vec![OnOffer {
            source,
            names,
            mode: Mode::ReadOnly,
            users: Vec::new(),
        }]);
        Arc::new(desk)
    }

    #[test]
    fn a_disk_is_taken_back_and_lent_again_by_its_number() {
        let (mut desk, mut sure, now) = (desk(), Sure::default(), Instant::now());
        assert_eq!(
            sure.press('1', now, &mut desk),
            Press::Done("disk-img is taken back".into())
        );
        assert!(desk.is_withheld("disk-img"));
        assert_eq!(
            sure.press('1', now, &mut desk),
            Press::Done("disk-img is lent again".into())
        );
        assert!(!desk.is_withheld("disk-img"));
    }

    /// One disk that somebody has.
    struct Used(bool);

    impl Lending for Used {
        fn names(&self) -> Vec<String> {
            vec!["disk".to_owned()]
        }

        fn users_of(&self, _disk: &str) -> usize {
            usize::from(!self.0)
        }

        fn users(&self) -> usize {
            usize::from(!self.0)
        }

        fn withhold(&mut self, _disk: &str) -> bool {
            self.0 = !self.0;
            self.0
        }
    }

    #[test]
    fn what_is_in_use_is_taken_back_when_the_key_is_pressed_again_soon() {
        let (mut used, mut sure, now) = (Used(false), Sure::default(), Instant::now());
        assert!(matches!(sure.press('1', now, &mut used), Press::Warned(_)));
        // Another key, or too late: warned again.
        assert!(matches!(sure.press('q', now, &mut used), Press::Warned(_)));
        assert!(matches!(sure.press('1', now, &mut used), Press::Warned(_)));
        assert!(matches!(sure.press('1', now + SURE, &mut used), Press::Warned(_)));
        assert!(matches!(sure.press('1', now + SURE, &mut used), Press::Done(_)));
        assert_eq!(sure.press('q', now + SURE, &mut used), Press::End);
    }

    #[test]
    fn what_the_handover_says_is_lent_so() {
        let handover = TargetHandover {
            keys: Vec::new(),
            open: false,
            read_write: vec![WritableDisk {
                name: "ssd-980".to_owned(),
                size: Some(1 << 40),
            }],
            snapshot: true,
            hostname: None,
        };
        let root = tempfile::tempdir().unwrap();
        let options = options(&handover, root.path());
        assert_eq!((options.all, options.snapshot, options.awaited), (2, true, true));
        let ssd = Writable {
            size: Some(1 << 40),
            .."ssd-980".parse().unwrap()
        };
        assert_eq!(options.writable, [ssd]);
        let name = options.hostname.unwrap();
        assert!(name.starts_with("stiefel-") && name.len() == 14, "{name}");
        let named = TargetHandover {
            hostname: Some("laptop".to_owned()),
            ..handover
        };
        assert_eq!(super::options(&named, root.path()).hostname.as_deref(), Some("laptop"));
    }

    #[test]
    fn q_ends_and_other_keys_mean_nothing() {
        let (mut desk, mut sure, now) = (desk(), Sure::default(), Instant::now());
        for key in ['2', '0', 'x', '\n'] {
            assert_eq!(sure.press(key, now, &mut desk), Press::Nothing, "{key:?}");
        }
        assert_eq!(sure.press('Q', now, &mut desk), Press::End);
    }
}
