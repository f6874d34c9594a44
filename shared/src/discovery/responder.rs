//! The laptop's side of discovery: what it believes, and what it answers.
//!
//! Driven by `server::discovery`. Specification: docs/protocol.md, "What the laptop does". All state is bounded:
//! the table of challenges is as large as the rate limit can fill within their lifetime, so no flood of replayed
//! datagrams can push an honest desktop's challenge out.

use std::collections::{HashSet, VecDeque};
use std::net::{Ipv6Addr, SocketAddrV6};
use std::time::{Duration, Instant};

use super::{DatagramKeys, Message, OfferBody, Random, State, Ticket, presentable, ticket};
use crate::key::StickKey;
use crate::seal;

/// How long a challenge can be answered by a Wake.
const WAKE_LIFETIME: Duration = Duration::from_secs(10);
/// How long a challenge can open a session.
const SESSION_LIFETIME: Duration = Duration::from_secs(30);
/// Offers per second, and how many at once.
const RATE: u32 = 10;
const BURST: u32 = 20;
/// What the rate lets in within the longest lifetime.
const MAX_ISSUED: usize = 20 + 10 * 30;
/// How many answered Discovers are remembered.
const MAX_ANSWERED: usize = 8192;

/// What the laptop says about itself.
#[derive(Debug, Clone)]
pub struct About {
    /// Its host name; cut to [`super::MAX_HOSTNAME`] bytes, control characters removed.
    pub hostname: String,
    /// TCP port of its HTTP server.
    pub http_port: u16,
    /// How long waking takes, in seconds, as far as is known; 0 if not.
    pub ready_in: u16,
}

/// What [`Responder::receive`] wants done.
#[derive(Debug)]
pub struct Answer {
    /// To be sent back to where the datagram came from.
    pub datagram: Vec<u8>,
    /// Set when the laptop is to wake up.
    pub woken: Option<Woken>,
}

/// An authenticated wake.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Woken {
    /// The name of the stick's key.
    pub key: String,
    /// Who woke us.
    pub peer: SocketAddrV6,
}

/// The laptop: answers what comes from a stick whose key it has.
#[derive(Debug)]
pub struct Responder {
    keys: Vec<(StickKey, DatagramKeys)>,
    about: About,
    state: State,
    bucket: Bucket,
    issued: VecDeque<Issued>,
    answered: Answered,
    /// For sticks whose own keys are not here; in turn.
    tickets: VecDeque<Ticket>,
    /// Of its own: tickets, which anybody can ask for, must not use up the Offers'.
    ticket_bucket: Bucket,
}

/// A challenge that went out in an Offer.
#[derive(Debug)]
struct Issued {
    challenge: Random,
    key: usize,
    peer: SocketAddrV6,
    at: Instant,
    spent: bool,
}

impl Responder {
    /// A laptop in `state` that knows `keys`.
    #[must_use]
    pub fn new(keys: &[StickKey], about: About, state: State, now: Instant) -> Self {
        let about = About {
            hostname: presentable(&about.hostname),
            ..about
        };
        Self {
            keys: keys.iter().map(|key| (key.clone(), DatagramKeys::new(key))).collect(),
            about,
            state,
            bucket: Bucket { tokens: BURST, at: now },
            issued: VecDeque::new(),
            answered: Answered::default(),
            tickets: VecDeque::new(),
            ticket_bucket: Bucket { tokens: BURST, at: now },
        }
    }

    /// Answers what no key opens by one of these: the keys are those of one activation.
    #[must_use]
    pub fn with_tickets(self, tickets: &[Ticket]) -> Self {
        Self {
            tickets: tickets.iter().cloned().collect(),
            ..self
        }
    }

    /// What the laptop is doing.
    #[must_use]
    pub const fn state(&self) -> State {
        self.state
    }

    /// Says what the laptop is doing now; back to [`State::Asleep`] if a wake was not followed.
    pub const fn set_state(&mut self, state: State) {
        self.state = state;
    }

    /// Takes a datagram in; `None`: say nothing. A first valid Wake turns [`State::Asleep`] into [`State::Waking`].
    pub fn receive(&mut self, now: Instant, from: SocketAddrV6, datagram: &[u8]) -> Option<Answer> {
        let opened = self
            .keys
            .iter()
            .enumerate()
            .find_map(|(index, (_, keys))| Some((index, keys.open_desktop(datagram)?)));
        let Some((key, message)) = opened else {
            return self.ticket(now, datagram);
        };
        match message {
            Message::Discover { random } => self.offer(now, from, key, random),
            Message::Wake { challenge, random } => self.wake(now, from, key, challenge, random),
            Message::Offer(_) | Message::Waking { .. } => None,
        }
    }

    fn offer(&mut self, now: Instant, from: SocketAddrV6, key: usize, random: Random) -> Option<Answer> {
        if self.answered.contains(&random) || !self.bucket.take(now) {
            return None;
        }
        let challenge = seal::random().ok()?;
        let offer = Message::Offer(OfferBody {
            random,
            challenge,
            state: self.state,
            http_port: self.about.http_port,
            ready_in: self.about.ready_in,
            hostname: self.about.hostname.clone(),
        });
        let datagram = self.keys.get(key)?.1.seal(&offer).ok()?;
        self.answered.insert(random);
        self.issued
            .retain(|issued| now.saturating_duration_since(issued.at) < SESSION_LIFETIME);
        if self.issued.len() >= MAX_ISSUED {
            self.issued.pop_front();
        }
        self.issued.push_back(Issued {
            challenge,
            key,
            peer: from,
            at: now,
            spent: false,
        });
        Some(Answer { datagram, woken: None })
    }

    /// One ticket, as long as what it answers; whose it is only its stick can tell.
    fn ticket(&mut self, now: Instant, datagram: &[u8]) -> Option<Answer> {
        if self.tickets.is_empty() || !ticket::may_lack(datagram) || !self.ticket_bucket.take(now) {
            return None;
        }
        self.tickets.rotate_left(1);
        let datagram = self.tickets.back()?.datagram().to_vec();
        Some(Answer { datagram, woken: None })
    }

    fn wake(
        &mut self,
        now: Instant,
        from: SocketAddrV6,
        key: usize,
        challenge: Random,
        random: Random,
    ) -> Option<Answer> {
        if self.state != State::Asleep {
            return None;
        }
        let issued = self.issued.iter_mut().find(|issued| {
            !issued.spent
                && issued.challenge == challenge
                && issued.key == key
                && same_place(&issued.peer, &from)
                && issued.peer.port() == from.port()
                && now.saturating_duration_since(issued.at) < WAKE_LIFETIME
        })?;
        let (stick, keys) = self.keys.get(key)?;
        let datagram = keys
            .seal(&Message::Waking {
                random,
                ready_in: self.about.ready_in,
            })
            .ok()?;
        issued.spent = true;
        self.state = State::Waking;
        Some(Answer {
            datagram,
            woken: Some(Woken {
                key: stick.name.clone(),
                peer: from,
            }),
        })
    }

    /// The key of the stick to which `challenge` was offered at `peer`'s address a moment ago, if it was not spent.
    #[must_use]
    pub fn offered(&self, now: Instant, peer: &SocketAddrV6, challenge: &Random) -> Option<&StickKey> {
        let issued = self.issued.iter().find(|issued| {
            !issued.spent
                && issued.challenge == *challenge
                && same_place(&issued.peer, peer)
                && now.saturating_duration_since(issued.at) < SESSION_LIFETIME
        })?;
        self.keys.get(issued.key).map(|(key, _)| key)
    }

    /// Spends a challenge, which can be done once; whether it could be.
    pub fn spend(&mut self, challenge: &Random) -> bool {
        let unspent = self
            .issued
            .iter_mut()
            .find(|issued| !issued.spent && issued.challenge == *challenge);
        unspent.map(|issued| issued.spent = true).is_some()
    }

    #[cfg(test)]
    pub(super) fn held(&self) -> (usize, usize) {
        (self.issued.len(), self.answered.order.len())
    }
}

/// Whether two sockets are at the same address of the same link; ports may differ.
fn same_place(a: &SocketAddrV6, b: &SocketAddrV6) -> bool {
    let place = |s: &SocketAddrV6| -> (Ipv6Addr, u32) { (*s.ip(), s.scope_id()) };
    place(a) == place(b)
}

/// A token bucket: [`RATE`] per second, at most [`BURST`].
#[derive(Debug)]
struct Bucket {
    tokens: u32,
    at: Instant,
}

impl Bucket {
    fn take(&mut self, now: Instant) -> bool {
        let step = Duration::from_secs(1) / RATE;
        let whole = now.saturating_duration_since(self.at).as_nanos() / step.as_nanos();
        if whole >= u128::from(BURST) {
            self.tokens = BURST;
            self.at = now;
        } else {
            let whole = u32::try_from(whole).unwrap_or(BURST);
            self.tokens = (self.tokens + whole).min(BURST);
            self.at += step * whole;
        }
        let some = self.tokens > 0;
        self.tokens = self.tokens.saturating_sub(1);
        some
    }
}

/// The randoms of the Discovers answered last; bounded, the oldest is forgotten first.
#[derive(Debug, Default)]
struct Answered {
    set: HashSet<Random>,
    order: VecDeque<Random>,
}

impl Answered {
    fn contains(&self, random: &Random) -> bool {
        self.set.contains(random)
    }

    fn insert(&mut self, random: Random) {
        if self.order.len() >= MAX_ANSWERED
            && let Some(oldest) = self.order.pop_front()
        {
            self.set.remove(&oldest);
        }
        self.set.insert(random);
        self.order.push_back(random);
    }
}
