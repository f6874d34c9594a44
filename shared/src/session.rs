//! The session: the handshake that opens it, the encrypted stream that carries the bundle, the goodbye that ends it.
//!
//! Spoken by `client::fetch` and `client::control` with `server::http`, inside HTTP bodies. Layout:
//! docs/protocol.md, "The session". The handshake is Noise NNpsk0 with a subkey of the stick's key; its prologue
//! binds the Offer's random. Its first message can be replayed: no session exists before [`Accepted::begin`]
//! verified the desktop's first transport message.
//!
//! This module turns bytes into bytes and does no input or output. What `snow` keeps in memory is not wiped by it.

use std::fmt;
use std::str::FromStr;

use data_encoding::HEXLOWER;
use snow::{Builder, HandshakeState, TransportState};
use zeroize::Zeroizing;

use crate::discovery::{Random, VERSION};
use crate::key::{Purpose, StickKey};
use crate::seal::{self, SealError};

mod goodbye;
mod pulse;
mod stream;
#[cfg(test)]
mod tests;

pub use goodbye::{Farewell, GoodbyeError, MAX_REASON, ReceivedGoodbye};
pub use pulse::{Beat, LONGEST, Pulse, PulseError, SHORTEST, Sign};
pub use stream::{CHUNK, Item, Receiver, Sender, StreamError};

/// The Noise protocol's name.
pub const NOISE: &str = "Noise_NNpsk0_25519_ChaChaPoly_BLAKE2s";
/// Length of the request that opens a session, in bytes.
pub const OPENING: usize = 1 + 16 + 32 + 16 + 16;
/// Length of its answer, in bytes.
pub const OPENED: usize = 32 + 16 + 16;
/// Length of the request for the bundle, in bytes.
pub const BEGIN: usize = 1 + 16;

/// What is sealed after the handshake is bound to this; it is not sent.
fn header(type_byte: u8, session: SessionName) -> [u8; 22] {
    let mut header = [0; 22];
    header[..4].copy_from_slice(b"stfl");
    header[4] = VERSION;
    header[5] = type_byte;
    header[6..].copy_from_slice(&session.0);
    header
}

/// The first and only byte of the desktop's first transport message.
const BEGIN_WORD: u8 = 1;
const PROLOGUE: &[u8] = b"stiefel session";

/// Why a handshake failed.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// Something is wrong with the machine, not with the peer.
    #[error("the handshake could not be prepared")]
    Prepare(#[source] snow::Error),
    /// No randomness.
    #[error("the handshake could not be prepared")]
    Random(#[source] SealError),
    /// Not a request of ours.
    #[error("this is no request for a session")]
    Malformed,
    /// The other side speaks another version.
    #[error(
        "the other side speaks version {theirs} of the protocol, this one version {VERSION}; \
             use the same version of stiefel on the laptop and the stick"
    )]
    Version {
        /// The other side's version.
        theirs: u8,
    },
    /// It does not verify.
    #[error("the handshake does not verify: the other side has another key, or the message was altered on the way")]
    Unverified,
}

/// Which desktop it is, so that the same one booting anew can take over from itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MachineId([u8; 16]);

impl FromStr for MachineId {
    type Err = SessionError;

    /// Reads 32 hexadecimal digits as in /etc/machine-id, or a UUID as in DMI; surrounding white space is ignored.
    fn from_str(text: &str) -> Result<Self, SessionError> {
        if text.len() > 64 {
            return Err(SessionError::Malformed);
        }
        let digits = text.trim().replace('-', "").to_ascii_lowercase();
        hex16(&digits).map(Self).ok_or(SessionError::Malformed)
    }
}

impl fmt::Display for MachineId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&HEXLOWER.encode(&self.0))
    }
}

/// A session's public name, 128 random bits; in URLs and manifests as 32 lower-case hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SessionName([u8; 16]);

impl SessionName {
    /// A new name.
    ///
    /// # Errors
    /// [`SealError::Random`] without randomness.
    pub fn generate() -> Result<Self, SealError> {
        seal::random().map(Self)
    }
}

impl FromStr for SessionName {
    type Err = SessionError;

    fn from_str(text: &str) -> Result<Self, SessionError> {
        hex16(text).map(Self).ok_or(SessionError::Malformed)
    }
}

impl fmt::Display for SessionName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&HEXLOWER.encode(&self.0))
    }
}

fn hex16(digits: &str) -> Option<[u8; 16]> {
    let mut bytes = [0; 16];
    (digits.len() == 32 && HEXLOWER.decode_mut(digits.as_bytes(), &mut bytes).is_ok()).then_some(bytes)
}

/// The desktop, waiting for the answer to its request.
pub struct Initiator {
    noise: HandshakeState,
}

impl Initiator {
    /// Begins a handshake with the laptop that made the offer with this challenge; also the body of the request.
    ///
    /// # Errors
    /// [`SessionError::Prepare`] without randomness.
    pub fn start(key: &StickKey, offer: &Random, machine: MachineId) -> Result<(Self, Vec<u8>), SessionError> {
        Self::start_with(key, offer, machine, |builder| builder)
    }

    fn start_with(
        key: &StickKey,
        offer: &Random,
        machine: MachineId,
        tune: impl for<'a> FnOnce(Builder<'a>) -> Builder<'a>,
    ) -> Result<(Self, Vec<u8>), SessionError> {
        let mut noise = handshake(key, offer, |builder| tune(builder).build_initiator())?;
        let mut message = [0; OPENING];
        let length = noise
            .write_message(&machine.0, &mut message)
            .map_err(SessionError::Prepare)?;
        let mut body = Vec::with_capacity(OPENING);
        body.push(VERSION);
        body.extend_from_slice(offer);
        body.extend_from_slice(message.get(..length).unwrap_or_default());
        Ok((Self { noise }, body))
    }

    /// Reads the laptop's answer; the session's name, what to send to begin, and what opens the stream.
    ///
    /// # Errors
    /// [`SessionError::Unverified`] if it is not from the laptop that has our key, or was altered.
    pub fn finish(mut self, answer: &[u8]) -> Result<Opened, SessionError> {
        let mut name = [0; OPENED];
        if answer.len() != OPENED || self.noise.read_message(answer, &mut name).is_err() {
            return Err(SessionError::Unverified);
        }
        let (name, _) = name.split_first_chunk().ok_or(SessionError::Malformed)?;
        let mut noise = self.noise.into_transport_mode().map_err(SessionError::Prepare)?;
        let mut begin = vec![0; BEGIN];
        noise
            .write_message(&[BEGIN_WORD], &mut begin)
            .map_err(SessionError::Prepare)?;
        Ok(Opened {
            session: SessionName(*name),
            begin,
            stream: Receiver::new(noise, SessionName(*name)),
        })
    }
}

/// What the desktop has after the handshake.
pub struct Opened {
    /// The session's name, for the URL.
    pub session: SessionName,
    /// The body of the request for the bundle: proves that this side is alive and no recording.
    pub begin: Vec<u8>,
    /// Opens the answer.
    pub stream: Receiver,
}

impl Opened {
    /// The body of a request to a machine that lends disks, or waits for its passphrase: `begin`, and `question` sealed; and what opens
    /// the answer.
    ///
    /// # Errors
    /// [`SessionError::Prepare`] for a question that is too long.
    pub fn ask(mut self, question: &[u8]) -> Result<(Vec<u8>, Receiver), SessionError> {
        let sealed = self.stream.seal(question).map_err(SessionError::Prepare)?;
        Ok(([self.begin, sealed].concat(), self.stream))
    }
}

/// The request that opens a session, not yet verified.
#[derive(Debug, PartialEq, Eq)]
pub struct Opening<'a> {
    /// The challenge of the offer that it follows.
    pub offer: Random,
    message: &'a [u8],
}

impl<'a> Opening<'a> {
    /// Reads the body of a request for a session; verifies nothing yet.
    ///
    /// # Errors
    /// [`SessionError::Version`] if it is of another version, [`SessionError::Malformed`] if it is none.
    pub fn parse(body: &'a [u8]) -> Result<Self, SessionError> {
        let (&version, rest) = body.split_first().ok_or(SessionError::Malformed)?;
        if version != VERSION {
            return Err(SessionError::Version { theirs: version });
        }
        let (offer, message) = rest.split_first_chunk().ok_or(SessionError::Malformed)?;
        if body.len() != OPENING {
            return Err(SessionError::Malformed);
        }
        Ok(Self { offer: *offer, message })
    }

    /// Verifies the request with the key to which the offer was made, and answers it.
    ///
    /// # Errors
    /// [`SessionError::Unverified`] if it was made with another key or altered.
    pub fn accept(&self, key: &StickKey, session: SessionName) -> Result<Accepted, SessionError> {
        self.accept_with(key, session, |builder| builder)
    }

    fn accept_with(
        &self,
        key: &StickKey,
        session: SessionName,
        tune: impl for<'b> FnOnce(Builder<'b>) -> Builder<'b>,
    ) -> Result<Accepted, SessionError> {
        let mut noise = handshake(key, &self.offer, |builder| tune(builder).build_responder())?;
        let mut payload = [0; OPENING];
        let length = noise
            .read_message(self.message, &mut payload)
            .map_err(|_| SessionError::Unverified)?;
        let machine = payload
            .get(..length)
            .and_then(|id| id.try_into().ok())
            .ok_or(SessionError::Malformed)?;
        let mut answer = vec![0; OPENED];
        noise
            .write_message(&session.0, &mut answer)
            .map_err(|_| SessionError::Unverified)?;
        let noise = noise.into_transport_mode().map_err(SessionError::Prepare)?;
        Ok(Accepted {
            machine: MachineId(machine),
            session,
            answer,
            noise,
        })
    }
}

/// A handshake that the laptop has answered: not a session yet, for the request may have been a recording.
pub struct Accepted {
    /// Which desktop says it is asking.
    pub machine: MachineId,
    /// The name the session is going to have.
    pub session: SessionName,
    /// The body of the answer.
    pub answer: Vec<u8>,
    noise: TransportState,
}

impl Accepted {
    /// Verifies the request for the bundle, the desktop's first transport message: now there is a session.
    ///
    /// # Errors
    /// [`SessionError::Unverified`] if it does not come from the desktop of this very handshake.
    pub fn begin(mut self, message: &[u8]) -> Result<Sender, SessionError> {
        let mut word = [0; BEGIN];
        let length = match message.len() {
            BEGIN => self
                .noise
                .read_message(message, &mut word)
                .map_err(|_| SessionError::Unverified)?,
            _ => return Err(SessionError::Unverified),
        };
        if word.get(..length) != Some(&[BEGIN_WORD]) {
            return Err(SessionError::Malformed);
        }
        Ok(Sender::new(self.noise))
    }
}

impl Accepted {
    /// As [`Accepted::begin`], for a request to a machine that lends disks, or waits for its passphrase: also what is asked in it.
    ///
    /// # Errors
    /// As there.
    pub fn begin_asking(self, body: &[u8]) -> Result<(Sender, Zeroizing<Vec<u8>>), SessionError> {
        let (begin, question) = body.split_at_checked(BEGIN).ok_or(SessionError::Unverified)?;
        let mut sender = self.begin(begin)?;
        let question = sender.open(question).ok_or(SessionError::Unverified)?;
        Ok((sender, question))
    }
}

/// A Noise handshake with the stick's key and our prologue.
fn handshake(
    key: &StickKey,
    offer: &Random,
    build: impl FnOnce(Builder<'_>) -> Result<HandshakeState, snow::Error>,
) -> Result<HandshakeState, SessionError> {
    let psk = key.subkey(Purpose::Handshake);
    let prologue = [PROLOGUE, &[VERSION], offer].concat();
    let params = NOISE.parse().map_err(SessionError::Prepare)?;
    Builder::new(params)
        .prologue(&prologue)
        .and_then(|builder| builder.psk(0, &psk))
        .and_then(build)
        .map_err(SessionError::Prepare)
}

/// A stream's desktop side with keys that nobody knows, for the fuzz targets.
#[doc(hidden)]
#[must_use]
pub fn fuzz_receiver() -> Option<Receiver> {
    let key = StickKey::generate("fuzz").ok()?;
    let (initiator, opening) = Initiator::start(&key, &[0; 16], MachineId([0; 16])).ok()?;
    let accepted = Opening::parse(&opening).ok()?.accept(&key, SessionName([0; 16])).ok()?;
    initiator.finish(&accepted.answer).ok().map(|opened| opened.stream)
}
