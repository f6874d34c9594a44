//! Signs of life while a session lasts: the desktop's keeper sends a [`Beat`] every two seconds, the laptop answers each with a
//! [`Sign`]. So each side knows whether the other is there, whatever the disk's transport does; the laptop also says how
//! its battery is, and whether the desktop shall switch off.
//!
//! Datagrams over UDP, inside the tunnel if there is one. Sent by `client::keeper`, answered by `server::role`. Layout:
//! docs/protocol.md, "Signs of life". Both are sealed under subkeys of the session's [`ControlKey`], one per direction; a sign
//! echoes its beat's random, and a beat's number only grows: nothing that was recorded says anything again.
//!
//! A beat may be longer than it need be, and its sign has the same length: so a path's largest packet is found out.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::bundle::ControlKey;
use crate::discovery::Random;
use crate::key::derive;
use crate::seal::{self, OVERHEAD, SealError, SealKey};

use super::{SessionName, header};

const TYPE_BEAT: u8 = 7;
const TYPE_SIGN: u8 = 8;
/// What is said in a beat or sign, in bytes; zeros follow.
const BODY: usize = 32;
/// The shortest datagram, in bytes.
pub const SHORTEST: usize = OVERHEAD + BODY;
/// The longest, in bytes: what fits a jumbo frame.
pub const LONGEST: usize = 9000;

/// Why a datagram was dropped.
#[derive(Debug, thiserror::Error)]
pub enum PulseError {
    /// It could not be sealed.
    #[error("the sign of life could not be prepared")]
    Seal(#[source] SealError),
    /// It is of another session, altered, or nothing of the kind.
    #[error("this is no sign of life of this session")]
    Unverified,
}

/// The desktop's sign of life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Beat {
    /// Larger than that of all beats before; begins with 1.
    pub number: u64,
    /// The largest packet that the laptop's NIC shall send, if it can, in bytes; the tunnel's is 80 less. 0 leaves it.
    pub mtu: u16,
    /// Echoed by the sign.
    pub random: Random,
    /// Length of the datagram in bytes.
    pub length: usize,
}

/// The laptop's answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Sign {
    /// The battery's charge in per cent; `None` without one.
    pub battery: Option<u8>,
    /// Whether the laptop is on mains.
    pub mains: bool,
    /// The desktop shall power off, in order.
    pub power_off: bool,
    /// The largest packet that the laptop's NIC sends and takes now, in bytes; 0 if that is not known.
    pub mtu: u16,
}

/// The two keys of one session's pulse.
pub struct Pulse {
    session: SessionName,
    desktop: SealKey,
    laptop: SealKey,
    /// The last beat that was heard (at the laptop).
    heard: AtomicU64,
}

impl Pulse {
    /// The pulse of a session; the laptop may go on behind the beat `heard`.
    #[must_use]
    pub fn new(control: &ControlKey, session: SessionName, heard: u64) -> Self {
        Self {
            session,
            desktop: SealKey::new(&derive(&control.0, b"pulse desktop to laptop")),
            laptop: SealKey::new(&derive(&control.0, b"pulse laptop to desktop")),
            heard: AtomicU64::new(heard),
        }
    }

    /// The desktop seals a beat; its length is cut to what is allowed.
    ///
    /// # Errors
    /// [`PulseError::Seal`].
    pub fn beat(&self, beat: &Beat) -> Result<Vec<u8>, PulseError> {
        self.beat_with(beat, seal::random().map_err(PulseError::Seal)?)
    }

    pub(super) fn beat_with(&self, beat: &Beat, nonce: [u8; seal::NONCE]) -> Result<Vec<u8>, PulseError> {
        let mut plain = vec![0; beat.length.clamp(SHORTEST, LONGEST) - OVERHEAD];
        let said = [
            beat.number.to_be_bytes().as_slice(),
            &beat.random,
            &beat.mtu.to_be_bytes(),
        ]
        .concat();
        plain[..said.len()].copy_from_slice(&said);
        self.desktop
            .seal_with_nonce(nonce, &header(TYPE_BEAT, self.session), &plain)
            .map_err(PulseError::Seal)
    }

    /// The laptop hears a datagram; each beat counts once.
    ///
    /// # Errors
    /// [`PulseError::Unverified`]; it is not answered then.
    pub fn hear(&self, datagram: &[u8]) -> Result<Beat, PulseError> {
        let plain = open(&self.desktop, &header(TYPE_BEAT, self.session), datagram)?;
        let (number, rest) = plain.split_first_chunk().ok_or(PulseError::Unverified)?;
        let (random, rest) = rest.split_first_chunk().ok_or(PulseError::Unverified)?;
        let (mtu, rest) = rest.split_first_chunk().ok_or(PulseError::Unverified)?;
        let beat = Beat {
            number: u64::from_be_bytes(*number),
            mtu: u16::from_be_bytes(*mtu),
            random: *random,
            length: datagram.len(),
        };
        let fresh =
            rest.iter().all(|byte| *byte == 0) && self.heard.fetch_max(beat.number, Ordering::AcqRel) < beat.number;
        if fresh { Ok(beat) } else { Err(PulseError::Unverified) }
    }

    /// The laptop answers a beat.
    ///
    /// # Errors
    /// [`PulseError::Seal`].
    pub fn sign(&self, beat: &Beat, sign: Sign) -> Result<Vec<u8>, PulseError> {
        self.sign_with(beat, sign, seal::random().map_err(PulseError::Seal)?)
    }

    pub(super) fn sign_with(&self, beat: &Beat, sign: Sign, nonce: [u8; seal::NONCE]) -> Result<Vec<u8>, PulseError> {
        let mut plain = vec![0; beat.length.clamp(SHORTEST, LONGEST) - OVERHEAD];
        let flags = u8::from(sign.mains) | u8::from(sign.power_off) << 1;
        let said = [
            beat.random.as_slice(),
            &[flags, sign.battery.unwrap_or(0xff)],
            &sign.mtu.to_be_bytes(),
        ]
        .concat();
        plain[..said.len()].copy_from_slice(&said);
        self.laptop
            .seal_with_nonce(nonce, &header(TYPE_SIGN, self.session), &plain)
            .map_err(PulseError::Seal)
    }

    /// The desktop reads the answer to one of its beats; also that beat's random.
    ///
    /// # Errors
    /// [`PulseError::Unverified`].
    pub fn read(&self, datagram: &[u8]) -> Result<(Random, Sign), PulseError> {
        let plain = open(&self.laptop, &header(TYPE_SIGN, self.session), datagram)?;
        let (random, rest) = plain.split_first_chunk().ok_or(PulseError::Unverified)?;
        match rest {
            [flags, battery, high, low, zeros @ ..] if *flags < 4 && zeros.iter().all(|byte| *byte == 0) => Ok((
                *random,
                Sign {
                    battery: (*battery <= 100).then_some(*battery),
                    mains: flags & 1 != 0,
                    power_off: flags & 2 != 0,
                    mtu: u16::from_be_bytes([*high, *low]),
                },
            )),
            _ => Err(PulseError::Unverified),
        }
    }
}

fn open(key: &SealKey, header: &[u8], datagram: &[u8]) -> Result<zeroize::Zeroizing<Vec<u8>>, PulseError> {
    if !(SHORTEST..=LONGEST).contains(&datagram.len()) {
        return Err(PulseError::Unverified);
    }
    key.open(header, datagram).map_err(|_| PulseError::Unverified)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pulse() -> Pulse {
        Pulse::new(&ControlKey([0x20; 32]), SessionName([7; 16]), 0)
    }

    fn beat(number: u64, length: usize) -> Beat {
        Beat {
            number,
            mtu: 1420,
            random: [9; 16],
            length,
        }
    }

    #[test]
    fn a_beat_is_heard_once_and_never_behind_a_later_one() {
        let pulse = pulse();
        let first = pulse.beat(&beat(1, 0)).unwrap();
        let second = pulse.beat(&beat(2, 1500)).unwrap();
        assert_eq!((first.len(), second.len()), (SHORTEST, 1500));
        assert_eq!(pulse.hear(&second).unwrap(), beat(2, 1500));
        for old in [&first, &second] {
            assert!(pulse.hear(old).is_err());
        }
    }

    #[test]
    fn a_sign_is_as_long_as_its_beat_and_says_which_it_answers() {
        let pulse = pulse();
        let sign = Sign {
            battery: Some(42),
            mains: false,
            power_off: true,
            mtu: 1500,
        };
        let heard = beat(1, 4000);
        let datagram = pulse.sign(&heard, sign).unwrap();
        assert_eq!(datagram.len(), 4000);
        assert_eq!(pulse.read(&datagram).unwrap(), ([9; 16], sign));
        assert!(pulse.hear(&datagram).is_err(), "reflected");
        let none = Sign { battery: None, ..sign };
        assert_eq!(pulse.read(&pulse.sign(&heard, none).unwrap()).unwrap().1, none);
    }

    #[test]
    fn another_session_and_altered_datagrams_are_not_heard() {
        let pulse = pulse();
        let datagram = pulse.beat(&beat(1, 100)).unwrap();
        let other = Pulse::new(&ControlKey([0x20; 32]), SessionName([8; 16]), 0);
        assert!(other.hear(&datagram).is_err());
        for at in 0..datagram.len() {
            let mut altered = datagram.clone();
            altered[at] ^= 1;
            assert!(pulse.hear(&altered).is_err(), "{at}");
        }
        assert!(pulse.hear(&datagram).is_ok());
    }

    proptest! {
        #[test]
        fn no_datagram_makes_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let pulse = pulse();
            prop_assert!(pulse.hear(&bytes).is_err());
            prop_assert!(pulse.read(&bytes).is_err());
        }
    }
}
