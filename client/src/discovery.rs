//! Discovery on the desktop: asks on every interface at once, as each comes up, and reports who answers.
//!
//! Counterpart: `server::discovery`. Bytes and rules: docs/protocol.md, "Discovery"; what is believed is decided by
//! [`Seeker`], how often is asked by [`Pacer`]. One socket serves all interfaces: the scope id of an address says
//! which one is meant.

use std::collections::HashMap;
use std::io;
use std::net::{Ipv6Addr, SocketAddr, SocketAddrV6};
use std::time::{Duration, Instant, SystemTime};

use socket2::{Domain, Protocol, Socket, Type};
use stiefel_shared::discovery::{DATAGRAM, GROUP, Heard, LinkEvent, Offer, Pacer, Random, Seeker, State, Told};
use stiefel_shared::key::StickKey;
use tokio::net::UdpSocket;
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;

/// The index that Linux gives the loopback interface, where a laptop on this very machine is asked.
const LOOPBACK: u32 = 1;
/// How long a laptop that said it is waking is left alone.
const WAKING_PEACE: Duration = Duration::from_secs(20);
/// A laptop that was woken so often and came back without serving is left alone for a while: something is wrong with it,
/// and each wake ends its user's work.
pub(crate) const MAX_WAKES: u32 = 2;
/// How long.
const LONG_PEACE: Duration = Duration::from_mins(15);
/// How many laptops are remembered as waking.
const MAX_WAKING: usize = 64;

/// Why no laptop can be looked for.
#[derive(Debug, thiserror::Error)]
pub enum DiscoveryError {
    /// The kernel gave no socket.
    #[error("cannot open a socket to look for the laptop; is IPv6 switched off (`ipv6.disable=1`)?")]
    Socket(#[source] io::Error),
}

/// A laptop that has our key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Its host name, fit for a terminal.
    pub hostname: String,
    /// What it is doing.
    pub state: State,
    /// Its HTTP server, with the scope id of the interface.
    pub address: SocketAddrV6,
    /// The interface of ours on which it answered.
    pub interface: String,
    /// The random of its offer: opens one session within 30 seconds.
    pub challenge: Random,
    /// In how many seconds it thinks to be ready; 0 if it does not know.
    pub ready_in: u16,
    /// How often it was woken without getting ready.
    pub woken: u32,
    /// The activation whose key opens the session; `None` is the stick's own key.
    pub activation: Option<Random>,
}

impl Found {
    /// The key that this laptop knows, of the stick with `key`.
    #[must_use]
    pub fn key(&self, key: &StickKey) -> StickKey {
        self.activation
            .map_or_else(|| key.clone(), |activation| key.for_activation(&activation))
    }
}

/// What happens during the search.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The first question left on this interface.
    Asking {
        /// Its name.
        interface: String,
    },
    /// A laptop answered; comes again with each answer, as each opens one session.
    Found(Found),
    /// The laptop was woken and is on its way.
    Waking {
        /// Where it is.
        address: SocketAddrV6,
        /// The interface of ours that leads to it.
        interface: String,
        /// In how many seconds it thinks to be ready; 0 if it does not know.
        ready_in: u16,
    },
    /// A laptop that left its system by a reboot has shown a ticket that is too old by this machine's clock.
    OutOfDate {
        /// The interface of ours on which it came.
        interface: String,
        /// When the ticket was made, in seconds since 1970.
        issued: u64,
    },
}

/// Looks for laptops on UDP port `port` until `events` is closed; wakes sleeping ones if `wake`.
///
/// `links` names the interfaces to ask on, as they come and go; one that is added again is asked on at once.
///
/// # Errors
/// [`DiscoveryError::Socket`].
pub async fn run(
    key: &StickKey,
    port: u16,
    wake: bool,
    mut links: mpsc::Receiver<LinkEvent>,
    events: mpsc::Sender<Event>,
) -> Result<(), DiscoveryError> {
    let socket = open().map_err(DiscoveryError::Socket)?;
    socket.writable().await.map_err(DiscoveryError::Socket)?;
    let mut search = Search {
        socket,
        port,
        wake,
        seeker: Seeker::new(key),
        links: HashMap::new(),
        waking: HashMap::new(),
    };
    let mut links_open = true;
    // One byte more than any datagram of ours: a longer one is seen to be longer.
    let mut buffer = [0; DATAGRAM + 1];
    loop {
        let due = search.links.values().map(|link| link.pacer.due()).min();
        let happened = tokio::select! {
            () = events.closed() => return Ok(()),
            event = links.recv(), if links_open => {
                match event {
                    Some(event) => search.follow(event),
                    None => links_open = false,
                }
                Vec::new()
            }
            () = until(due) => search.ask(),
            received = search.socket.recv_from(&mut buffer) => match received {
                Ok((length, SocketAddr::V6(from))) => {
                    search.hear(from, buffer.get(..length).unwrap_or_default()).into_iter().collect()
                }
                // An earlier packet could not be delivered, or memory is short; not in a busy loop.
                _ => {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                    Vec::new()
                }
            },
        };
        for event in happened {
            // An offer is good for seconds only: for a listener who is busy it is dropped, and comes again.
            let listening = match event {
                Event::Found(_) | Event::OutOfDate { .. } => {
                    !matches!(events.try_send(event), Err(TrySendError::Closed(_)))
                }
                Event::Asking { .. } | Event::Waking { .. } => events.send(event).await.is_ok(),
            };
            if !listening {
                return Ok(());
            }
        }
    }
}

async fn until(due: Option<Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due.into()).await,
        None => std::future::pending().await,
    }
}

fn open() -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::IPV6, Type::DGRAM.nonblocking().cloexec(), Some(Protocol::UDP))?;
    socket.set_only_v6(true)?;
    socket.set_multicast_hops_v6(1)?;
    socket.set_unicast_hops_v6(1)?;
    socket.set_multicast_loop_v6(false)?;
    socket.bind(&SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)).into())?;
    UdpSocket::from_std(socket.into())
}

/// Asks under the stick's key, and under that of each activation that is known; whether all could be sent.
fn ask(seeker: &mut Seeker, socket: &UdpSocket, to: SocketAddr, scope: u32, now: Instant) -> bool {
    let activations = seeker.activations().into_iter().map(Some);
    [None].into_iter().chain(activations).all(|activation| {
        let question = seeker.discover_as(now, scope, activation);
        question.is_ok_and(|datagram| socket.try_send_to(&datagram, to).is_ok())
    })
}

/// This machine's clock, in seconds since 1970.
fn unix() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    now.map_or(0, |now| now.as_secs())
}

struct Link {
    name: String,
    pacer: Pacer,
    announced: bool,
}

struct Search {
    socket: UdpSocket,
    port: u16,
    wake: bool,
    seeker: Seeker,
    links: HashMap<u32, Link>,
    /// When it said last that it is waking, and how often it was woken since it was last ready.
    waking: HashMap<SocketAddrV6, (Instant, u32)>,
}

impl Search {
    fn follow(&mut self, event: LinkEvent) {
        match event {
            LinkEvent::Added { index, name } => {
                let announced = self
                    .links
                    .get(&index)
                    .is_some_and(|link| link.announced && link.name == name);
                self.links.insert(
                    index,
                    Link {
                        name,
                        pacer: Pacer::new(Instant::now()),
                        announced,
                    },
                );
            }
            LinkEvent::Removed { index } => {
                self.links.remove(&index);
            }
        }
    }

    /// Asks on every interface where it is due.
    fn ask(&mut self) -> Vec<Event> {
        let now = Instant::now();
        let mut happened = Vec::new();
        for (&index, link) in self.links.iter_mut().filter(|(_, link)| link.pacer.due() <= now) {
            // Loopback has no multicast, and its addresses no scope.
            let (to, scope) = if index == LOOPBACK {
                (Ipv6Addr::LOCALHOST, 0)
            } else {
                (GROUP, index)
            };
            let to = SocketAddr::V6(SocketAddrV6::new(to, self.port, 0, scope));
            let sent = ask(&mut self.seeker, &self.socket, to, scope, now);
            if !sent {
                link.pacer.failed(now);
                continue;
            }
            link.pacer.sent(now);
            if !link.announced {
                link.announced = true;
                happened.push(Event::Asking {
                    interface: link.name.clone(),
                });
            }
        }
        happened
    }

    fn hear(&mut self, from: SocketAddrV6, datagram: &[u8]) -> Option<Event> {
        let now = Instant::now();
        let index = if from.ip().is_loopback() {
            LOOPBACK
        } else {
            from.scope_id()
        };
        let interface = self.links.get(&index)?.name.clone();
        match self.seeker.ticket(unix(), datagram) {
            // Asked under its key at once.
            Some(Told::Activation) => {
                self.links.get_mut(&index)?.pacer.hurry(now);
                return None;
            }
            Some(Told::OutOfDate { issued }) => return Some(Event::OutOfDate { interface, issued }),
            None => {}
        }
        match self.seeker.receive(now, from, datagram)? {
            Heard::Offer(offer) => {
                self.wake_up(now, &offer);
                if offer.state == State::Ready {
                    self.waking.remove(&offer.from);
                }
                let woken = self.waking.get(&offer.from).map_or(0, |(_, woken)| *woken);
                Some(Event::Found(Found {
                    hostname: offer.hostname,
                    state: offer.state,
                    address: SocketAddrV6::new(*from.ip(), offer.http_port, 0, from.scope_id()),
                    interface,
                    challenge: offer.challenge,
                    ready_in: offer.ready_in,
                    woken,
                    activation: offer.activation,
                }))
            }
            Heard::Waking { from, ready_in } => {
                if self.waking.len() >= MAX_WAKING {
                    self.waking.clear();
                }
                let woken = self.waking.get(&from).map_or(0, |(_, woken)| *woken);
                self.waking.insert(from, (now, woken.saturating_add(1)));
                Some(Event::Waking {
                    address: from,
                    interface,
                    ready_in,
                })
            }
        }
    }

    /// Wakes a sleeping laptop; a lost Wake is repeated with its next offer.
    fn wake_up(&mut self, now: Instant, offer: &Offer) {
        let left_alone = self.waking.get(&offer.from).is_some_and(|(at, woken)| {
            let peace = if *woken >= MAX_WAKES { LONG_PEACE } else { WAKING_PEACE };
            now.duration_since(*at) < peace
        });
        if !self.wake || offer.state != State::Asleep || left_alone {
            return;
        }
        if let Ok(datagram) = self.seeker.wake(now, offer) {
            let _ = self.socket.try_send_to(&datagram, offer.from.into());
        }
    }
}
