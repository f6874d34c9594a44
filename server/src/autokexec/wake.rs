//! Listens for an authenticated wake: discovery in the state *asleep* on all wired NICs, as they come and go.
//!
//! Counterpart: `client::discovery`. Rules: docs/protocol.md, "Discovery". The dedicated NIC is no network manager's (the
//! guards that `install` writes), so it is brought up here.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread;
use std::time::Instant;

use stiefel_shared::discovery::{About, LinkEvent, PORT, Responder, State, Woken};
use stiefel_shared::key::StickKey;
use stiefel_sys::link::{self, ChangeKind, Link, LinkError, LinkMonitor};
use tokio::sync::mpsc as channel;

use super::log;
use super::nics::{Interface, Known, is_dedicated};
use crate::collect::{self, CollectError, KEYS_DIR};
use crate::discovery;
use crate::tree::Tree;

/// How many changes may wait; then the thread that sends them waits.
const QUEUE: usize = 64;

/// Says what the laptop is doing to who asks, and holds the keys that may wake it.
pub struct Wake {
    folder: PathBuf,
    about: About,
    keys: Vec<StickKey>,
    responder: Arc<Mutex<Responder>>,
}

impl Wake {
    /// With the keys that are in `folder` now; there may be none yet.
    fn new(folder: &Path, about: About) -> Self {
        let responder = Responder::new(&[], about.clone(), State::Asleep, Instant::now());
        let mut wake = Self {
            folder: folder.to_owned(),
            about,
            keys: Vec::new(),
            responder: Arc::new(Mutex::new(responder)),
        };
        wake.reload();
        wake
    }

    /// Back to sleep, after a wake that was not followed; or on the way, after a plug.
    pub fn set_state(&self, state: State) {
        self.responder().set_state(state);
    }

    /// How many keys may wake.
    pub fn count(&self) -> usize {
        self.keys.len()
    }

    /// Reads the keys again; `true` if they are others than before. Keys that cannot be used wake nobody.
    pub fn reload(&mut self) -> bool {
        let keys = match collect::read_keys(&self.folder) {
            Ok(keys) => keys,
            Err(CollectError::NoKeys { .. }) => Vec::new(),
            Err(error) => {
                log::warning(format_args!("no key may wake the laptop: {error}"));
                Vec::new()
            }
        };
        let same = keys.len() == self.keys.len() && keys.iter().zip(&self.keys).all(|(a, b)| is_same(a, b));
        if !same {
            let mut responder = self.responder();
            // Challenges that were issued to a stick whose key is gone go with it.
            *responder = Responder::new(&keys, self.about.clone(), responder.state(), Instant::now());
            drop(responder);
            self.keys = keys;
        }
        !same
    }

    /// Whether a wake with the key of this name counts: not if the key was revoked or replaced since it was heard.
    pub fn may_wake(&mut self, name: &str) -> bool {
        let find = |keys: &[StickKey]| keys.iter().find(|key| key.name == name).cloned();
        let before = find(&self.keys);
        self.reload();
        matches!((before, find(&self.keys)), (Some(before), Some(now)) if is_same(&before, &now))
    }

    fn responder(&self) -> MutexGuard<'_, Responder> {
        self.responder.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn is_same(a: &StickKey, b: &StickKey) -> bool {
    a.name == b.name && a.to_file() == b.to_file()
}

/// Begins to listen; `woken` gets each wake.
///
/// # Errors
/// What is missing for it.
pub fn listen(dedicated: Vec<Known>, woken: mpsc::Sender<Woken>) -> anyhow::Result<Wake> {
    let about = About {
        hostname: collect::hostname(&Tree::new(Path::new("/"))),
        http_port: PORT,
        ready_in: 0,
    };
    let wake = Wake::new(Path::new(KEYS_DIR), about);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let socket = {
        let _inside = runtime.enter();
        discovery::bind(PORT)?
    };
    let (links, link_events) = channel::channel(QUEUE);
    let monitor = LinkMonitor::open()?;
    thread::Builder::new().name("links".to_owned()).spawn(move || {
        if let Err(error) = follow_links(monitor, &dedicated, &links) {
            log::error(format_args!(
                "no more wakes are heard on new interfaces: {error}; restart the service"
            ));
        }
    })?;
    let responder = Arc::clone(&wake.responder);
    thread::Builder::new().name("discovery".to_owned()).spawn(move || {
        runtime.block_on(async {
            let (sender, mut wakes) = channel::channel(1);
            let forward = async {
                while let Some(wake) = wakes.recv().await {
                    if woken.send(wake).is_err() {
                        break;
                    }
                }
            };
            tokio::join!(discovery::run(socket, responder, link_events, sender), forward);
        });
    })?;
    log::info(format_args!(
        "listening for a wake on wired NICs, UDP port {PORT}, {} key(s)",
        wake.count()
    ));
    Ok(wake)
}

/// Tells of the wired interfaces that are up, for ever.
fn follow_links(
    mut monitor: LinkMonitor,
    dedicated: &[Known],
    events: &channel::Sender<LinkEvent>,
) -> Result<(), LinkError> {
    let mut known: Vec<(u32, String)> = Vec::new();
    loop {
        let now = usable(link::list()?, dedicated);
        for event in changes(&known, &now) {
            if events.blocking_send(event).is_err() {
                return Ok(());
            }
        }
        known = now;
        // Addresses do not matter here: the socket hears on the interface, whatever it is called.
        loop {
            match monitor.next(None) {
                Ok(Some(change)) if matches!(change.kind, ChangeKind::Link | ChangeKind::LinkGone) => break,
                Ok(_) => {}
                Err(LinkError::Lost) => break,
                Err(error) => return Err(error),
            }
        }
    }
}

/// Number and name of the wired interfaces that are up; and loopback, where `stiefel doctor` asks whether the service answers.
fn usable(links: Vec<Link>, dedicated: &[Known]) -> Vec<(u32, String)> {
    let heard = links
        .into_iter()
        .filter(|link| link.is_wired_physical() || link.index == discovery::LOOPBACK);
    heard
        .filter(|link| link.up || (is_dedicated(dedicated, &Interface::of(link)) && bring_up(link)))
        .map(|link| (link.index, link.name))
        .collect()
}

fn bring_up(link: &Link) -> bool {
    match link::set_up(link.index) {
        Ok(()) => true,
        Err(error) => {
            log::warning(format_args!("cannot bring the dedicated NIC {} up: {error}", link.name));
            false
        }
    }
}

fn changes(before: &[(u32, String)], now: &[(u32, String)]) -> Vec<LinkEvent> {
    let in_list = |list: &[(u32, String)], index: u32| list.iter().any(|(other, _)| *other == index);
    let gone = before
        .iter()
        .filter(|(index, _)| !in_list(now, *index))
        .map(|(index, _)| LinkEvent::Removed { index: *index });
    let new = now
        .iter()
        .filter(|(index, _)| !in_list(before, *index))
        .map(|(index, name)| LinkEvent::Added {
            index: *index,
            name: name.clone(),
        });
    gone.chain(new).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Keys {
        dir: tempfile::TempDir,
        wake: Wake,
    }

    impl Keys {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let about = About {
                hostname: "laptop".into(),
                http_port: PORT,
                ready_in: 0,
            };
            let wake = Wake::new(&dir.path().join("keys"), about);
            Self { dir, wake }
        }

        fn make(&self, name: &str) {
            use std::os::unix::fs::PermissionsExt;
            let path = self.dir.path().join("keys").join(format!("{name}.key"));
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, StickKey::generate(name).unwrap().to_file().as_bytes()).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        }

        fn revoke(&self, name: &str) {
            std::fs::remove_file(self.dir.path().join("keys").join(format!("{name}.key"))).unwrap();
        }
    }

    #[test]
    fn a_key_that_is_made_later_may_wake() {
        let mut keys = Keys::new();
        assert_eq!(keys.wake.count(), 0);
        keys.make("blue");
        assert!(keys.wake.reload());
        assert!(keys.wake.may_wake("blue"));
        assert!(!keys.wake.reload(), "nothing new");
    }

    #[test]
    fn a_key_that_was_revoked_or_replaced_since_its_wake_does_not_wake() {
        let mut keys = Keys::new();
        keys.make("blue");
        keys.make("red");
        keys.wake.reload();
        keys.revoke("blue");
        assert!(!keys.wake.may_wake("blue"));
        assert!(keys.wake.may_wake("red"));
        keys.revoke("red");
        keys.make("red");
        assert!(!keys.wake.may_wake("red"), "another key of the same name");
        assert!(keys.wake.may_wake("red"), "the next wake is of the new one");
        assert!(!keys.wake.may_wake("blue"));
    }

    #[test]
    fn reading_keys_again_does_not_change_what_the_laptop_is_doing() {
        let mut keys = Keys::new();
        keys.wake.set_state(State::Waking);
        keys.make("blue");
        keys.wake.reload();
        assert_eq!(keys.wake.responder().state(), State::Waking);
    }

    #[test]
    fn wired_interfaces_that_are_up_are_heard_and_loopback() {
        let link = |index, name: &str, up, arphrd, physical| Link {
            index,
            name: name.into(),
            up,
            arphrd,
            physical,
            ..Link::default()
        };
        let links = vec![
            link(1, "lo", true, 772, false),
            link(2, "eth0", true, 1, true),
            link(3, "eth1", false, 1, true),
            link(4, "br0", true, 1, false),
        ];
        assert_eq!(usable(links, &[]), [(1, "lo".to_owned()), (2, "eth0".to_owned())]);
    }

    #[test]
    fn interfaces_that_come_and_go_are_told_once() {
        let list = |items: &[(u32, &str)]| {
            items
                .iter()
                .map(|(index, name)| (*index, (*name).to_owned()))
                .collect::<Vec<_>>()
        };
        let (before, now) = (list(&[(2, "eth0"), (3, "usb0")]), list(&[(3, "enx0"), (4, "eth1")]));
        assert_eq!(
            changes(&before, &now),
            [
                LinkEvent::Removed { index: 2 },
                LinkEvent::Added {
                    index: 4,
                    name: "eth1".into()
                }
            ]
        );
        assert_eq!(changes(&now, &now), []);
    }
}
