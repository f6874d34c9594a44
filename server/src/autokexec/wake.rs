//! Listens for an authenticated wake: discovery in the state *asleep* on all wired NICs, as they come and go.
//!
//! Counterpart: `client::discovery`. Rules: docs/protocol.md, "Discovery". The dedicated NIC is no network manager's (the
//! guards that `install` writes), so it is brought up here.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread;
use std::time::Instant;

use stiefel_shared::discovery::{About, LinkEvent, PORT, Responder, State, Woken};
use stiefel_sys::link::{self, ChangeKind, Link, LinkError, LinkMonitor};
use tokio::sync::mpsc as channel;

use super::log;
use super::nics::{Interface, Known, is_dedicated};
use crate::collect::{self, KEYS_DIR};
use crate::discovery;
use crate::tree::Tree;

/// How many changes may wait; then the thread that sends them waits.
const QUEUE: usize = 64;

/// Says what the laptop is doing to who asks.
#[derive(Clone)]
pub struct Wake {
    responder: Arc<Mutex<Responder>>,
}

impl Wake {
    /// Back to sleep, after a wake that was not followed; or on the way, after a plug.
    pub fn set_state(&self, state: State) {
        self.responder
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .set_state(state);
    }
}

/// Begins to listen; `woken` gets each wake.
///
/// # Errors
/// What is missing for it.
pub fn listen(dedicated: Vec<Known>, woken: mpsc::Sender<Woken>) -> anyhow::Result<Wake> {
    let keys = collect::read_keys(Path::new(KEYS_DIR))?;
    let hostname = collect::hostname(&Tree::new(Path::new("/")));
    let about = About {
        hostname,
        http_port: PORT,
        ready_in: 0,
    };
    let responder = Responder::new(&keys, about, State::Asleep, Instant::now());
    let wake = Wake {
        responder: Arc::new(Mutex::new(responder)),
    };
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
        keys.len()
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

/// Number and name of the wired interfaces that are up.
fn usable(links: Vec<Link>, dedicated: &[Known]) -> Vec<(u32, String)> {
    let wired = links.into_iter().filter(Link::is_wired_physical);
    wired
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
