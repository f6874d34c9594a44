//! The desktop's side of discovery: what it asks, and what it believes.
//!
//! Driven by `client::discovery`. Specification: docs/protocol.md, "What the desktop does". All state is bounded.

use std::collections::VecDeque;
use std::net::SocketAddrV6;
use std::time::{Duration, Instant};

use super::{DatagramKeys, Message, Random, State, TicketKind, ticket};
use crate::key::StickKey;
use crate::seal::{self, SealError, SealKey};

/// How long an answer is waited for.
const LIFETIME: Duration = Duration::from_secs(5);
/// How many questions are remembered: sixteen interfaces at two a second, each under the stick's key and all activations'.
const MAX_ASKED: usize = 160 * (1 + MAX_ACTIVATIONS);
/// How many laptops can answer one Discover.
const MAX_ANSWERS: usize = 16;
/// How many activations' keys are asked with besides the stick's own; those that were issued last count, of each kind by itself.
const MAX_ACTIVATIONS: usize = 2 * MAX_OF_A_KIND;
const MAX_OF_A_KIND: usize = 4;

/// A laptop that answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Offer {
    /// Where it answered from; the port is the datagram's, not HTTP's.
    pub from: SocketAddrV6,
    /// The laptop's fresh random: the challenge for a Wake, bound into a session's handshake.
    pub challenge: Random,
    /// What it is doing.
    pub state: State,
    /// TCP port of its HTTP server.
    pub http_port: u16,
    /// In how many seconds it thinks to be ready; 0 if it does not know.
    pub ready_in: u16,
    /// Its host name, without control characters.
    pub hostname: String,
    /// It answered under the key of this activation ([`StickKey::for_activation`]), and knows no other.
    pub activation: Option<Random>,
}

/// What [`Seeker::ticket`] understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Told {
    /// There is an activation that was not known: ask again, under its key, too.
    Activation,
    /// The ticket is too old, or one of the two clocks is wrong.
    OutOfDate {
        /// When it was issued, in seconds since 1970.
        issued: u64,
    },
}

/// What [`Seeker::receive`] understood.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Heard {
    /// A laptop that has our key answered.
    Offer(Offer),
    /// The laptop that we woke is on its way.
    Waking {
        /// Where it answered from.
        from: SocketAddrV6,
        /// In how many seconds it thinks to be ready; 0 if it does not know.
        ready_in: u16,
    },
}

/// The desktop: asks, and believes only answers to what it asked.
#[derive(Debug)]
pub struct Seeker {
    stick: StickKey,
    keys: DatagramKeys,
    tickets: SealKey,
    activations: Vec<Activation>,
    asked: VecDeque<Asked>,
}

#[derive(Debug)]
struct Activation {
    name: Random,
    kind: TicketKind,
    /// When its ticket was made, in seconds since 1970.
    issued: u64,
    keys: DatagramKeys,
}

#[derive(Debug)]
struct Asked {
    random: Random,
    at: Instant,
    /// Under whose key: an activation's, or the stick's own.
    activation: Option<Random>,
    what: What,
}

#[derive(Debug)]
enum What {
    /// On the link of this scope; the challenges that came back so far.
    Discover { scope: u32, answers: Vec<Random> },
    /// Of this laptop.
    Wake { peer: SocketAddrV6 },
}

impl Seeker {
    /// A desktop with its stick's key.
    #[must_use]
    pub fn new(key: &StickKey) -> Self {
        Self {
            stick: key.clone(),
            keys: DatagramKeys::new(key),
            tickets: ticket::seal_key(key),
            activations: Vec::new(),
            asked: VecDeque::new(),
        }
    }

    /// The activations that tickets have told of; each is asked for by a Discover of its own.
    #[must_use]
    pub fn activations(&self) -> Vec<Random> {
        self.activations.iter().map(|activation| activation.name).collect()
    }

    /// Takes a datagram in that may be a ticket; `unix` is the desktop's clock in seconds since 1970. `None`: it is none, or
    /// says nothing new.
    pub fn ticket(&mut self, unix: u64, datagram: &[u8]) -> Option<Told> {
        let opened = ticket::open(&self.tickets, datagram)?;
        let (kind, name, issued) = (opened.kind, opened.activation, opened.issued);
        // A stick of the laptop's own is good for years, and for little.
        if kind == TicketKind::Activation && !ticket::is_fresh(issued, unix) {
            return Some(Told::OutOfDate { issued });
        }
        if self.activations.iter().any(|known| known.name == name) {
            return None;
        }
        let all = self.activations.iter().enumerate();
        let same: Vec<(usize, u64)> = all
            .filter(|(_, known)| known.kind == kind)
            .map(|(at, known)| (at, known.issued))
            .collect();
        if same.len() >= MAX_OF_A_KIND {
            // Old tickets can be sent by everybody who has heard them: they must not push out the one of a laptop that runs.
            let (oldest, time) = same.into_iter().min_by_key(|(_, issued)| *issued)?;
            if issued <= time {
                return None;
            }
            self.activations.remove(oldest);
        }
        let keys = DatagramKeys::new(&self.stick.for_activation(&name));
        self.activations.push(Activation {
            name,
            kind,
            issued,
            keys,
        });
        Some(Told::Activation)
    }

    fn keys_of(&self, activation: Option<Random>) -> Option<&DatagramKeys> {
        let Some(activation) = activation else {
            return Some(&self.keys);
        };
        let known = self.activations.iter().find(|known| known.name == activation);
        known.map(|known| &known.keys)
    }

    /// A Discover for the link with this scope id; never sent twice, so that each copy can be answered once.
    ///
    /// # Errors
    /// [`SealError::Random`] without randomness.
    pub fn discover(&mut self, now: Instant, scope: u32) -> Result<Vec<u8>, SealError> {
        self.discover_as(now, scope, None)
    }

    /// As [`Self::discover`], under the key of an activation; `None` is the stick's own.
    ///
    /// # Errors
    /// [`SealError::Random`] without randomness, [`SealError::Unverified`] for an activation that is not known.
    pub fn discover_as(&mut self, now: Instant, scope: u32, activation: Option<Random>) -> Result<Vec<u8>, SealError> {
        let random = seal::random()?;
        let keys = self.keys_of(activation).ok_or(SealError::Unverified)?;
        let datagram = keys.seal(&Message::Discover { random })?;
        self.remember(Asked {
            random,
            at: now,
            activation,
            what: What::Discover {
                scope,
                answers: Vec::new(),
            },
        });
        Ok(datagram)
    }

    /// A Wake for the laptop that made this offer, to be sent to `offer.from`.
    ///
    /// # Errors
    /// [`SealError::Random`] without randomness.
    pub fn wake(&mut self, now: Instant, offer: &Offer) -> Result<Vec<u8>, SealError> {
        let random = seal::random()?;
        let keys = self.keys_of(offer.activation).ok_or(SealError::Unverified)?;
        let datagram = keys.seal(&Message::Wake {
            challenge: offer.challenge,
            random,
        })?;
        self.remember(Asked {
            random,
            at: now,
            activation: offer.activation,
            what: What::Wake { peer: offer.from },
        });
        Ok(datagram)
    }

    fn remember(&mut self, asked: Asked) {
        self.asked
            .retain(|old| asked.at.saturating_duration_since(old.at) < LIFETIME);
        if self.asked.len() >= MAX_ASKED {
            self.asked.pop_front();
        }
        self.asked.push_back(asked);
    }

    /// Takes a datagram in; `None`: it is not an answer to anything asked lately, or not the first time.
    pub fn receive(&mut self, now: Instant, from: SocketAddrV6, datagram: &[u8]) -> Option<Heard> {
        let own = [(None, &self.keys)].into_iter();
        let activations = self.activations.iter().map(|known| (Some(known.name), &known.keys));
        let (activation, message) = own
            .chain(activations)
            .find_map(|(activation, keys)| Some((activation, keys.open_laptop(datagram)?)))?;
        let echo = match &message {
            Message::Offer(offer) => offer.random,
            Message::Waking { random, .. } => *random,
            Message::Discover { .. } | Message::Wake { .. } => return None,
        };
        let index = self.asked.iter().position(|asked| {
            asked.random == echo && asked.activation == activation && now.saturating_duration_since(asked.at) < LIFETIME
        })?;
        match (message, &mut self.asked.get_mut(index)?.what) {
            (Message::Offer(offer), What::Discover { scope, answers }) => {
                let fresh = !answers.contains(&offer.challenge) && answers.len() < MAX_ANSWERS;
                // Who has found a laptop's own stick has such a key: it must not give a desktop anything to boot, and no other key asks
                // for a passphrase.
                let kind = self.activations.iter().find(|known| Some(known.name) == activation);
                let unlocking = kind.is_some_and(|known| known.kind == TicketKind::Unlocking);
                if !fresh || from.scope_id() != *scope || unlocking != (offer.state == State::Locked) {
                    return None;
                }
                answers.push(offer.challenge);
                Some(Heard::Offer(Offer {
                    from,
                    challenge: offer.challenge,
                    state: offer.state,
                    http_port: offer.http_port,
                    ready_in: offer.ready_in,
                    hostname: offer.hostname,
                    activation,
                }))
            }
            (Message::Waking { ready_in, .. }, What::Wake { peer }) if *peer == from => {
                self.asked.remove(index);
                Some(Heard::Waking { from, ready_in })
            }
            _ => None,
        }
    }

    #[cfg(test)]
    pub(super) fn held(&self) -> usize {
        self.asked.len()
    }
}
