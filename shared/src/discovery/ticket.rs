//! Tickets: how a stick comes by the key of one activation.
//!
//! A laptop that leaves its OS by a reboot (`trigger.method: reboot`) has to leave its ramdisk's secrets on the EFI system
//! partition for a moment, where everybody with the disk can read them. The sticks' keys are not among them: the OS makes a key
//! for this activation from the stick's key and fresh random bytes (the *nonce*), and a ticket that tells the nonce, sealed
//! under the stick's key. The ramdisk has the made key and the ticket; it hands the ticket to whoever asks under a key that it
//! does not know, and the stick, which alone can open it, makes the same key. Layout: docs/protocol.md, "Tickets".
//!
//! A laptop that is started from a stick of its own, and whose keys lie on a disk that has to be unlocked first, has tickets and made keys
//! of another kind on that stick: they are good for as long as the stick is, but for nothing than asking for a passphrase.
//!
//! Refused: a ticket that does not verify, or (of one activation) is more than [`LIFETIME`] away from the desktop's clock: it could be of an activation
//! whose key somebody has found on the disk since.

use std::time::Duration;

use data_encoding::HEXLOWER;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};
use zeroize::Zeroizing;

use super::{BODY, DATAGRAM, HEADER, Random, header};
use crate::key::{Purpose, StickKey};
use crate::seal::{self, SealError, SealKey};

/// How old a ticket may be by the desktop's clock; as far it may lie in the future, for clocks that show local time.
pub const LIFETIME: Duration = Duration::from_hours(7 * 24);
/// The type byte of what is answered by a ticket.
const DISCOVER: u8 = 1;

/// What the key is good for to which a ticket leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// For all of one activation.
    Activation,
    /// For asking for a passphrase ([`super::State::Locked`]), and nothing else.
    Unlocking,
}

impl Kind {
    const ALL: [Self; 2] = [Self::Activation, Self::Unlocking];

    /// The ticket's type byte.
    const fn type_byte(self) -> u8 {
        match self {
            Self::Activation => 9,
            Self::Unlocking => 10,
        }
    }

    /// Of a ticket that begins with these bytes.
    fn of(head: &[u8; HEADER]) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *head == header(kind.type_byte()))
    }
}

/// What a ticket tells the stick that it is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Opened {
    pub kind: Kind,
    pub activation: Random,
    /// When it was made, in seconds since 1970.
    pub issued: u64,
}

/// A ticket, as it is sent; not secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ticket(Box<[u8; DATAGRAM]>);

impl Ticket {
    /// Begins an activation at `unix` (seconds since 1970): its ticket, and the key that only it and `key` lead to.
    ///
    /// # Errors
    /// [`SealError::Random`] without randomness.
    pub fn issue(key: &StickKey, unix: u64) -> Result<(Self, StickKey), SealError> {
        Self::issue_for(Kind::Activation, key, unix)
    }

    /// As [`Self::issue`], for a key that is good for what `kind` says.
    ///
    /// # Errors
    /// [`SealError::Random`] without randomness.
    pub fn issue_for(kind: Kind, key: &StickKey, unix: u64) -> Result<(Self, StickKey), SealError> {
        let activation = seal::random()?;
        Ok((
            Self::with(kind, key, activation, unix, seal::random()?)?,
            key.for_activation(&activation),
        ))
    }

    fn with(
        kind: Kind,
        key: &StickKey,
        activation: Random,
        unix: u64,
        nonce: [u8; seal::NONCE],
    ) -> Result<Self, SealError> {
        let mut body = Zeroizing::new([0; BODY]);
        let mut rest = body.as_mut_slice();
        super::put(&mut rest, &activation);
        super::put(&mut rest, &unix.to_be_bytes());
        let header = header(kind.type_byte());
        let sealed = seal_key(key).seal_with_nonce(nonce, &header, &*body)?;
        let datagram = <[u8; DATAGRAM]>::try_from([header.as_slice(), &sealed].concat());
        datagram
            .map(|datagram| Self(Box::new(datagram)))
            .map_err(|_| SealError::Unverified)
    }

    /// The bytes to send.
    #[must_use]
    pub fn datagram(&self) -> &[u8] {
        &*self.0
    }
}

/// As hexadecimal digits.
impl Serialize for Ticket {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&HEXLOWER.encode(&*self.0))
    }
}

impl<'de> Deserialize<'de> for Ticket {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        // A length that does not fit is refused before anything is allocated for it.
        if text.len() != 2 * DATAGRAM {
            return Err(D::Error::custom("a ticket has another length"));
        }
        let bytes = HEXLOWER.decode(text.as_bytes()).map_err(D::Error::custom)?;
        let datagram =
            <[u8; DATAGRAM]>::try_from(bytes).map_err(|_| D::Error::custom("a ticket has another length"))?;
        if datagram.first_chunk().and_then(Kind::of).is_none() {
            return Err(D::Error::custom("no ticket of this version"));
        }
        Ok(Self(Box::new(datagram)))
    }
}

/// What seals the tickets of a stick.
pub(super) fn seal_key(key: &StickKey) -> SealKey {
    SealKey::new(&key.subkey(Purpose::Ticket))
}

/// Opens a ticket.
pub(super) fn open(key: &SealKey, datagram: &[u8]) -> Option<Opened> {
    if datagram.len() != DATAGRAM {
        return None;
    }
    let (head, sealed) = datagram.split_first_chunk::<HEADER>()?;
    let kind = Kind::of(head)?;
    let body = key.open(head, sealed).ok()?;
    let mut rest = body.as_slice();
    let activation = super::take(&mut rest)?;
    let issued = u64::from_be_bytes(super::take(&mut rest)?);
    let opened = Opened {
        kind,
        activation,
        issued,
    };
    rest.iter().all(|&byte| byte == 0).then_some(opened)
}

/// Whether a datagram that opens under no key could be the Discover of a stick that lacks a ticket.
pub(super) fn may_lack(datagram: &[u8]) -> bool {
    datagram.len() == DATAGRAM && datagram.first_chunk() == Some(&header(DISCOVER))
}

/// Whether a ticket of `issued` still counts at `unix`, both in seconds since 1970.
pub(super) const fn is_fresh(issued: u64, unix: u64) -> bool {
    issued.abs_diff(unix) <= LIFETIME.as_secs()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::tests::fixed;

    const NOW: u64 = 1_800_000_000;

    #[test]
    fn the_stick_makes_the_same_key_from_the_ticket_and_no_other_stick_does() {
        let stick = fixed();
        let (ticket, key) = Ticket::issue(&stick, NOW).unwrap();
        let opened = open(&seal_key(&stick), ticket.datagram()).unwrap();
        let activation = opened.activation;
        assert_eq!((opened.kind, opened.issued), (Kind::Activation, NOW));
        assert_eq!(stick.for_activation(&activation).to_file(), key.to_file());
        assert_ne!(key.to_file(), stick.to_file());
        let other = StickKey::generate("other").unwrap();
        assert_eq!(open(&seal_key(&other), ticket.datagram()), None);
        assert_ne!(other.for_activation(&activation).to_file(), key.to_file());
        // Who has the activation's key alone cannot make a ticket that the stick takes.
        let (forged, _) = Ticket::issue(&key, NOW).unwrap();
        assert_eq!(open(&seal_key(&stick), forged.datagram()), None);
    }

    #[test]
    fn each_activation_has_a_key_of_its_own() {
        let (first, second) = (
            Ticket::issue(&fixed(), NOW).unwrap().1,
            Ticket::issue(&fixed(), NOW).unwrap().1,
        );
        assert_ne!(first.to_file(), second.to_file());
    }

    #[test]
    fn the_bytes_are_the_pinned_ones() {
        let counting = |first: u8| std::array::from_fn(|at| first + u8::try_from(at).unwrap());
        for (kind, nonce, name) in [
            (Kind::Activation, 0x60, "ticket"),
            (Kind::Unlocking, 0x80, "unlocking_ticket"),
        ] {
            let ticket = Ticket::with(kind, &fixed(), counting(0xa0), NOW, counting(nonce)).unwrap();
            let pinned = crate::vectors::value("datagrams.txt", name);
            assert_eq!(HEXLOWER.encode(ticket.datagram()), pinned, "{name}");
        }
        let key = fixed().for_activation(&counting(0xa0));
        let pinned = crate::vectors::value("keys.txt", "activation");
        assert_eq!(key.to_file().trim_end(), format!("stiefel-key-1 {pinned}"));
    }

    #[test]
    fn a_ticket_cannot_be_made_one_of_the_other_kind() {
        for (kind, other) in [(Kind::Activation, 10), (Kind::Unlocking, 9)] {
            let (ticket, _) = Ticket::issue_for(kind, &fixed(), NOW).unwrap();
            let opened = open(&seal_key(&fixed()), ticket.datagram()).unwrap();
            assert_eq!(opened.kind, kind);
            let mut bytes = ticket.datagram().to_vec();
            bytes[HEADER - 1] = other;
            assert_eq!(open(&seal_key(&fixed()), &bytes), None);
            let json = serde_json::to_string(&ticket).unwrap();
            assert_eq!(serde_json::from_str::<Ticket>(&json).unwrap(), ticket);
        }
    }

    #[test]
    fn an_altered_ticket_is_refused_and_a_whole_one_survives_json() {
        let (ticket, _) = Ticket::issue(&fixed(), NOW).unwrap();
        for at in [0, 4, 5, 6, 40, DATAGRAM - 1] {
            let mut bytes = ticket.datagram().to_vec();
            bytes[at] ^= 1;
            assert_eq!(open(&seal_key(&fixed()), &bytes), None, "{at}");
        }
        assert_eq!(open(&seal_key(&fixed()), &ticket.datagram()[1..]), None);
        let json = serde_json::to_string(&ticket).unwrap();
        assert_eq!(serde_json::from_str::<Ticket>(&json).unwrap(), ticket);
        assert!(serde_json::from_str::<Ticket>(&json.replacen("09", "01", 1)).is_err());
        assert!(serde_json::from_str::<Ticket>("\"00\"").is_err());
    }

    #[test]
    fn a_ticket_counts_for_a_week_around_the_desktops_clock() {
        let week = LIFETIME.as_secs();
        assert!(is_fresh(NOW, NOW + week) && is_fresh(NOW + week, NOW));
        assert!(!is_fresh(NOW, NOW + week + 1) && !is_fresh(NOW, 0) && !is_fresh(u64::MAX, NOW));
    }
}
