//! Discovery datagrams: how the desktop finds the laptop, and wakes it.
//!
//! `Discover` and `Wake` go from `client::discovery` to `server::discovery`, `Offer` and `Waking` come back.
//! Layout: docs/protocol.md, "Discovery". Every datagram has the same length and is sealed under a subkey of its
//! direction; what fails its tag is dropped unanswered. This module holds the bytes and the pace; who believes and
//! answers what is decided by [`Responder`] (laptop) and [`Seeker`] (desktop), which open no sockets and have no
//! clock of their own.

use std::net::Ipv6Addr;
use std::time::{Duration, Instant};

use zeroize::Zeroizing;

use crate::key::{Purpose, StickKey};
use crate::seal::{self, SealError, SealKey};

mod responder;
mod seeker;
#[cfg(test)]
mod tests;
mod ticket;

pub use responder::{About, Answer, Responder, Woken};
pub use seeker::{Heard, Offer, Seeker, Told};
pub use ticket::{Kind as TicketKind, LIFETIME as TICKET_LIFETIME, Ticket};

/// UDP port of the laptop; its HTTP server has the same number by default.
pub const PORT: u16 = 61570;
/// Every node on the link.
pub const GROUP: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
/// Length of every datagram in bytes, header to tag.
pub const DATAGRAM: usize = HEADER + BODY + seal::OVERHEAD;
/// The longest host name in an Offer, in bytes of UTF-8.
pub const MAX_HOSTNAME: usize = 64;

/// The only version spoken.
pub const VERSION: u8 = 1;
const MAGIC: [u8; 4] = *b"stfl";
const HEADER: usize = 6;
const BODY: usize = 128;

/// A random that has to come back.
pub type Random = [u8; 16];

/// What the laptop is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Its own OS runs; it can be woken.
    Asleep,
    /// It was woken and is on its way into the ramdisk.
    Waking,
    /// Its ramdisk serves.
    Ready,
    /// It boots nobody: it lends single disks ([`crate::lend`]). Sticks older than this do not understand the Offer, and
    /// pass it over.
    Lending,
    /// It was started from a stick of its own, and waits for its disk's passphrase ([`crate::unlock`]). Offered only under the key of
    /// a [`TicketKind::Unlocking`] ticket, and believed under no other. Sticks older than this know neither.
    Locked,
}

impl State {
    const ALL: [Self; 5] = [Self::Asleep, Self::Waking, Self::Ready, Self::Lending, Self::Locked];
}

/// An interface that came or went; the caller says which ones take part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LinkEvent {
    /// The interface is up, or came up again.
    Added {
        /// Its index, which is also the scope id of addresses on it.
        index: u32,
        /// Its name, for messages.
        name: String,
    },
    /// The interface is gone or down.
    Removed {
        /// Its index.
        index: u32,
    },
}

/// What a datagram says; the bodies in docs/protocol.md.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Message {
    Discover { random: Random },
    Offer(OfferBody),
    Wake { challenge: Random, random: Random },
    Waking { random: Random, ready_in: u16 },
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct OfferBody {
    pub random: Random,
    pub challenge: Random,
    pub state: State,
    pub http_port: u16,
    pub ready_in: u16,
    pub hostname: String,
}

/// Which side sealed a datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Desktop,
    Laptop,
}

impl Message {
    const fn type_byte(&self) -> u8 {
        match self {
            Self::Discover { .. } => 1,
            Self::Offer(_) => 2,
            Self::Wake { .. } => 3,
            Self::Waking { .. } => 4,
        }
    }

    const fn side(&self) -> Side {
        match self {
            Self::Discover { .. } | Self::Wake { .. } => Side::Desktop,
            Self::Offer(_) | Self::Waking { .. } => Side::Laptop,
        }
    }

    fn body(&self) -> Zeroizing<[u8; BODY]> {
        let mut body = Zeroizing::new([0; BODY]);
        let mut rest = body.as_mut_slice();
        match self {
            Self::Discover { random } => put(&mut rest, random),
            Self::Offer(offer) => {
                let name = &offer.hostname.as_bytes()[..offer.hostname.len().min(MAX_HOSTNAME)];
                put(&mut rest, &offer.random);
                put(&mut rest, &offer.challenge);
                put(&mut rest, &[offer.state as u8]);
                put(&mut rest, &offer.http_port.to_be_bytes());
                put(&mut rest, &offer.ready_in.to_be_bytes());
                put(&mut rest, &[u8::try_from(name.len()).unwrap_or(0)]);
                put(&mut rest, name);
            }
            Self::Wake { challenge, random } => {
                put(&mut rest, challenge);
                put(&mut rest, random);
            }
            Self::Waking { random, ready_in } => {
                put(&mut rest, random);
                put(&mut rest, &ready_in.to_be_bytes());
            }
        }
        body
    }

    /// Reads a body; `None` for anything that [`Message::body`] does not write.
    fn parse(type_byte: u8, body: &[u8]) -> Option<Self> {
        let mut rest = body;
        let message = match type_byte {
            1 => Self::Discover {
                random: take(&mut rest)?,
            },
            2 => Self::Offer(OfferBody {
                random: take(&mut rest)?,
                challenge: take(&mut rest)?,
                state: *State::ALL.get(usize::from(take::<1>(&mut rest)?[0]))?,
                http_port: u16::from_be_bytes(take(&mut rest)?),
                ready_in: u16::from_be_bytes(take(&mut rest)?),
                hostname: take_hostname(&mut rest)?,
            }),
            3 => Self::Wake {
                challenge: take(&mut rest)?,
                random: take(&mut rest)?,
            },
            4 => Self::Waking {
                random: take(&mut rest)?,
                ready_in: u16::from_be_bytes(take(&mut rest)?),
            },
            _ => return None,
        };
        rest.iter().all(|&b| b == 0).then_some(message)
    }
}

fn put(rest: &mut &mut [u8], bytes: &[u8]) {
    // Every body is a constant shape smaller than BODY; nothing from outside gets here.
    let (head, tail) = std::mem::take(rest).split_at_mut(bytes.len());
    head.copy_from_slice(bytes);
    *rest = tail;
}

fn take<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    let (head, tail) = rest.split_first_chunk::<N>()?;
    *rest = tail;
    Some(*head)
}

fn take_hostname(rest: &mut &[u8]) -> Option<String> {
    let length = usize::from(take::<1>(rest)?[0]);
    if length > MAX_HOSTNAME {
        return None;
    }
    let (name, tail) = rest.split_at_checked(length)?;
    *rest = tail;
    let name = std::str::from_utf8(name).ok()?;
    // It goes to a terminal: nothing that could move the cursor.
    (!name.chars().any(char::is_control)).then(|| name.to_owned())
}

/// The host name as an Offer carries it: without control characters, cut at a character's end.
fn presentable(hostname: &str) -> String {
    let mut name: String = hostname.chars().filter(|c| !c.is_control()).collect();
    name.truncate(name.floor_char_boundary(MAX_HOSTNAME));
    name
}

/// The two subkeys of a stick's key that seal datagrams.
#[derive(Debug)]
pub(crate) struct DatagramKeys {
    desktop: SealKey,
    laptop: SealKey,
}

impl DatagramKeys {
    pub fn new(key: &StickKey) -> Self {
        Self {
            desktop: SealKey::new(&key.subkey(Purpose::DesktopDatagrams)),
            laptop: SealKey::new(&key.subkey(Purpose::LaptopDatagrams)),
        }
    }

    const fn of(&self, side: Side) -> &SealKey {
        match side {
            Side::Desktop => &self.desktop,
            Side::Laptop => &self.laptop,
        }
    }

    /// A datagram of [`DATAGRAM`] bytes.
    pub fn seal(&self, message: &Message) -> Result<Vec<u8>, SealError> {
        self.seal_with_nonce(seal::random()?, message)
    }

    fn seal_with_nonce(&self, nonce: [u8; seal::NONCE], message: &Message) -> Result<Vec<u8>, SealError> {
        let header = header(message.type_byte());
        let sealed = self
            .of(message.side())
            .seal_with_nonce(nonce, &header, &*message.body())?;
        Ok([header.as_slice(), &sealed].concat())
    }

    /// Opens a datagram of the desktop; `None` for everything else.
    pub fn open_desktop(&self, datagram: &[u8]) -> Option<Message> {
        self.open(datagram, Side::Desktop)
    }

    /// Opens a datagram of the laptop; `None` for everything else.
    pub fn open_laptop(&self, datagram: &[u8]) -> Option<Message> {
        self.open(datagram, Side::Laptop)
    }

    fn open(&self, datagram: &[u8], side: Side) -> Option<Message> {
        if datagram.len() != DATAGRAM {
            return None;
        }
        let (head, sealed) = datagram.split_first_chunk::<HEADER>()?;
        let type_byte = head[HEADER - 1];
        if *head != header(type_byte) {
            return None;
        }
        let body = self.of(side).open(head, sealed).ok()?;
        Message::parse(type_byte, &body).filter(|message| message.side() == side)
    }
}

fn header(type_byte: u8) -> [u8; HEADER] {
    let [a, b, c, d] = MAGIC;
    [a, b, c, d, VERSION, type_byte]
}

/// Reads a datagram's body as it lies under the seal; for the fuzz target, which cannot forge a seal.
#[doc(hidden)]
pub fn fuzz_body(data: &[u8]) {
    if let Some((&type_byte, body)) = data.split_first()
        && let Some(message) = Message::parse(type_byte, body)
        && body.len() == BODY
    {
        assert_eq!(message.body().as_slice(), body, "a body has only one form");
    }
}

/// When the next Discover is due on one interface.
///
/// At once when the interface comes up, where the link-local address is often still tentative and sending fails, so
/// failures are tried again soon; then every half second, and every two seconds once nobody answered for a while.
#[derive(Debug, Clone)]
pub struct Pacer {
    due: Instant,
    sent: u32,
    failed: u32,
    hurried: Option<Instant>,
}

impl Pacer {
    const SOON: Duration = Duration::from_millis(50);
    const QUICK: Duration = Duration::from_millis(500);
    const SLOW: Duration = Duration::from_secs(2);
    const QUICK_COUNT: u32 = 20;
    const HURRY: Duration = Duration::from_secs(1);

    /// An interface that came up at `now`.
    #[must_use]
    pub const fn new(now: Instant) -> Self {
        Self {
            due: now,
            sent: 0,
            failed: 0,
            hurried: None,
        }
    }

    /// There is something new to ask: at once, but not for everybody who sends something new in turn.
    pub fn hurry(&mut self, now: Instant) {
        let at = self.hurried.map_or(now, |last| (last + Self::HURRY).max(now));
        if at < self.due {
            self.due = at;
            self.hurried = Some(at);
        }
    }

    /// When to send next.
    #[must_use]
    pub const fn due(&self) -> Instant {
        self.due
    }

    /// A Discover was sent.
    pub fn sent(&mut self, now: Instant) {
        self.sent = self.sent.saturating_add(1);
        self.failed = 0;
        self.due = now
            + if self.sent < Self::QUICK_COUNT {
                Self::QUICK
            } else {
                Self::SLOW
            };
    }

    /// It could not be sent.
    pub fn failed(&mut self, now: Instant) {
        self.failed = self.failed.saturating_add(1);
        // Duplicate address detection takes one to two seconds.
        self.due = now + if self.failed < 100 { Self::SOON } else { Self::SLOW };
    }
}
