//! The goodbye: the desktop says which way it goes, the laptop answers when the disk is flushed.
//!
//! Said by `client::control`, heard by `server::http`. Layout: docs/protocol.md, "The goodbye". Both are sealed
//! under subkeys of the session's [`ControlKey`], one per direction, and bound to the session's name; the answer is
//! bound to the very request. A goodbye is honoured once per session: the laptop keeps what it answered.

use crate::bundle::{ControlKey, Goodbye};
use crate::discovery::Random;
use crate::key::derive;
use crate::seal::{self, OVERHEAD, SealError, SealKey};

use super::{SessionName, header};

/// The longest reason of a refusal, in bytes of UTF-8.
pub const MAX_REASON: usize = 200;

const TYPE_GOODBYE: u8 = 5;
const TYPE_ANSWER: u8 = 6;
const GOODBYE: usize = 17;

/// Why a goodbye or its answer was not accepted.
#[derive(Debug, thiserror::Error)]
pub enum GoodbyeError {
    /// It could not be sealed.
    #[error("the goodbye could not be prepared")]
    Seal(#[source] SealError),
    /// It does not verify, or answers something else.
    #[error("the goodbye's answer does not verify: it is of another session, or was altered on the way")]
    Unverified,
    /// The laptop could not do it.
    #[error("the laptop did not accept the goodbye: {reason}")]
    Refused {
        /// In the laptop's words, without control characters.
        reason: String,
    },
}

/// A goodbye as the desktop sends it.
pub struct Farewell {
    /// The body of the request. It may be sent again if no answer came.
    pub body: Vec<u8>,
    random: Random,
}

/// A goodbye as the laptop heard it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReceivedGoodbye {
    /// Which way the desktop goes.
    pub goodbye: Goodbye,
    random: Random,
}

impl Farewell {
    /// Seals a goodbye.
    ///
    /// # Errors
    /// [`GoodbyeError::Seal`] without randomness.
    pub fn new(control: &ControlKey, session: SessionName, goodbye: Goodbye) -> Result<Self, GoodbyeError> {
        let nonce = seal::random().map_err(GoodbyeError::Seal)?;
        Self::new_with(
            control,
            session,
            goodbye,
            nonce,
            seal::random().map_err(GoodbyeError::Seal)?,
        )
    }

    pub(super) fn new_with(
        control: &ControlKey,
        session: SessionName,
        goodbye: Goodbye,
        nonce: [u8; seal::NONCE],
        random: Random,
    ) -> Result<Self, GoodbyeError> {
        let way = match goodbye {
            Goodbye::Poweroff => 1,
            Goodbye::Reboot => 2,
            Goodbye::RebootAnew => 3,
        };
        let plain = [random.as_slice(), &[way]].concat();
        let body = desktop_key(control)
            .seal_with_nonce(nonce, &header(TYPE_GOODBYE, session), &plain)
            .map_err(GoodbyeError::Seal)?;
        Ok(Self { body, random })
    }

    /// Reads the laptop's answer to this goodbye.
    ///
    /// # Errors
    /// [`GoodbyeError::Refused`] if the laptop says no, [`GoodbyeError::Unverified`] if the answer is not to this.
    pub fn answered(&self, control: &ControlKey, session: SessionName, answer: &[u8]) -> Result<(), GoodbyeError> {
        if answer.len() > OVERHEAD + GOODBYE + MAX_REASON {
            return Err(GoodbyeError::Unverified);
        }
        let plain = laptop_key(control)
            .open(&header(TYPE_ANSWER, session), answer)
            .map_err(|_| GoodbyeError::Unverified)?;
        let (random, rest) = plain.split_first_chunk().ok_or(GoodbyeError::Unverified)?;
        if *random != self.random {
            return Err(GoodbyeError::Unverified);
        }
        match rest {
            [0] => Ok(()),
            [1, reason @ ..] => {
                let reason = String::from_utf8_lossy(reason)
                    .chars()
                    .filter(|c| !c.is_control())
                    .collect();
                Err(GoodbyeError::Refused { reason })
            }
            _ => Err(GoodbyeError::Unverified),
        }
    }
}

impl ReceivedGoodbye {
    /// Reads the body of a goodbye; at most once per session is up to the caller.
    ///
    /// # Errors
    /// [`GoodbyeError::Unverified`] if it is not this session's desktop that says it.
    pub fn open(control: &ControlKey, session: SessionName, body: &[u8]) -> Result<Self, GoodbyeError> {
        if body.len() != OVERHEAD + GOODBYE {
            return Err(GoodbyeError::Unverified);
        }
        let plain = desktop_key(control)
            .open(&header(TYPE_GOODBYE, session), body)
            .map_err(|_| GoodbyeError::Unverified)?;
        let (random, rest) = plain.split_first_chunk().ok_or(GoodbyeError::Unverified)?;
        let goodbye = match rest {
            [1] => Goodbye::Poweroff,
            [2] => Goodbye::Reboot,
            [3] => Goodbye::RebootAnew,
            _ => return Err(GoodbyeError::Unverified),
        };
        Ok(Self {
            goodbye,
            random: *random,
        })
    }

    /// The answer's body; `Err` carries the reason for people, cut to [`MAX_REASON`].
    ///
    /// # Errors
    /// [`GoodbyeError::Seal`] without randomness.
    pub fn answer(
        &self,
        control: &ControlKey,
        session: SessionName,
        outcome: Result<(), &str>,
    ) -> Result<Vec<u8>, GoodbyeError> {
        self.answer_with(control, session, outcome, seal::random().map_err(GoodbyeError::Seal)?)
    }

    pub(super) fn answer_with(
        &self,
        control: &ControlKey,
        session: SessionName,
        outcome: Result<(), &str>,
        nonce: [u8; seal::NONCE],
    ) -> Result<Vec<u8>, GoodbyeError> {
        let mut plain = self.random.to_vec();
        match outcome {
            Ok(()) => plain.push(0),
            Err(reason) => {
                plain.push(1);
                plain.extend_from_slice(&reason.as_bytes()[..reason.floor_char_boundary(MAX_REASON)]);
            }
        }
        laptop_key(control)
            .seal_with_nonce(nonce, &header(TYPE_ANSWER, session), &plain)
            .map_err(GoodbyeError::Seal)
    }
}

fn desktop_key(control: &ControlKey) -> SealKey {
    SealKey::new(&derive(&control.0, b"goodbye desktop to laptop"))
}

fn laptop_key(control: &ControlKey) -> SealKey {
    SealKey::new(&derive(&control.0, b"goodbye laptop to desktop"))
}
