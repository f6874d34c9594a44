//! The encrypted stream: the laptop's answer to the request for the bundle.
//!
//! Made by [`Sender`] in `server::http`, read by [`Receiver`] in `client::fetch`. Layout: docs/protocol.md, "The
//! stream". Frames are counted by Noise, so none can be left out, doubled or moved; the stream is whole only when
//! its End frame came. Both sides hold one frame at a time, and the receiver hands out nothing that did not verify.

use snow::TransportState;
use zeroize::Zeroizing;

use super::SessionName;
use crate::bundle::{Manifest, ManifestError};
use crate::handover::{Part, PartSize};
use crate::unlock::Unlocking;

/// The most bytes of a part in one frame.
pub const CHUNK: usize = 60 * 1024;
/// The longest reason of a refusal, in bytes.
const MAX_REASON: usize = 1024;
/// Noise's tag, in bytes.
const TAG: usize = 16;
/// The longest frame without its length field.
const MAX_FRAME: usize = CHUNK + 1 + TAG;

/// A frame's first byte.
mod kind {
    pub const WAITING: u8 = 2;
    pub const REFUSAL: u8 = 3;
    pub const MANIFEST: u8 = 4;
    pub const DATA: u8 = 5;
    pub const END: u8 = 6;
    pub const LOAN: u8 = 7;
    pub const UNLOCKING: u8 = 8;
}

/// Why a stream ended before its time.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// A frame does not verify.
    #[error("the data was altered or damaged on the way; check the cable, then try again")]
    Altered,
    /// No End frame came.
    #[error("the data ended too early; check the cable and the laptop's screen, then try again")]
    Truncated,
    /// The laptop does not want to.
    #[error("the laptop refuses: {reason}")]
    Refused {
        /// In the laptop's words, without control characters.
        reason: String,
    },
    /// The manifest is not accepted.
    #[error("the laptop's bundle is not accepted")]
    Manifest(#[source] ManifestError),
    /// The laptop said something that does not belong there.
    #[error("the laptop sent {what} where it does not belong; use the same version of stiefel on laptop and stick")]
    Order {
        /// What it was.
        what: &'static str,
    },
    /// Sealing failed: a frame is too long, or there were too many.
    #[error("the data could not be encrypted")]
    Seal(#[source] snow::Error),
}

/// Where a stream is: which parts are still to come.
#[derive(Debug)]
enum Place {
    Manifest,
    Parts {
        left: std::vec::IntoIter<PartSize>,
        now: Option<PartSize>,
    },
    Ended,
}

impl Place {
    fn parts(manifest: &Manifest) -> Self {
        let mut place = Self::Parts {
            left: manifest.payload.parts.clone().into_iter(),
            now: None,
        };
        place.settle();
        place
    }

    /// Goes on to the next part that is not empty.
    fn settle(&mut self) {
        if let Self::Parts { left, now } = self {
            while now.is_none_or(|part| part.size == 0) {
                *now = left.next();
                if now.is_none() {
                    break;
                }
            }
        }
    }

    /// Counts `length` bytes of the current part; its name.
    fn advance(&mut self, length: usize) -> Result<Part, StreamError> {
        let Self::Parts { now: Some(part), .. } = self else {
            return Err(StreamError::Order { what: "data" });
        };
        let length = u64::try_from(length).unwrap_or(u64::MAX);
        if length == 0 || length > part.size {
            return Err(StreamError::Order { what: "too much data" });
        }
        part.size -= length;
        let name = part.part;
        self.settle();
        Ok(name)
    }

    fn end(&mut self) -> Result<(), StreamError> {
        match self {
            Self::Parts { now: None, .. } => {
                *self = Self::Ended;
                Ok(())
            }
            _ => Err(StreamError::Order { what: "the end" }),
        }
    }
}

/// The laptop's side of the stream; every method gives the bytes to send next.
pub struct Sender {
    noise: TransportState,
    place: Place,
}

impl Sender {
    pub(super) const fn new(noise: TransportState) -> Self {
        Self {
            noise,
            place: Place::Manifest,
        }
    }

    fn frame(&mut self, kind: u8, content: &[u8]) -> Result<Vec<u8>, StreamError> {
        let mut plain = Zeroizing::new(Vec::with_capacity(1 + content.len()));
        plain.push(kind);
        plain.extend_from_slice(content);
        let length = plain.len() + TAG;
        let field = u16::try_from(length).map_err(|_| StreamError::Seal(snow::Error::Input))?;
        let mut out = vec![0; 2 + length];
        let (head, body) = out.split_at_mut(2);
        head.copy_from_slice(&field.to_be_bytes());
        self.noise.write_message(&plain, body).map_err(StreamError::Seal)?;
        Ok(out)
    }

    /// Any frame, also one that no honest laptop sends.
    #[cfg(test)]
    pub(super) fn raw(&mut self, kind: u8, content: &[u8]) -> Vec<u8> {
        self.frame(kind, content).unwrap()
    }

    /// Says that the laptop is alive but not ready to go on.
    ///
    /// # Errors
    /// [`StreamError::Order`] once the manifest was sent.
    pub fn waiting(&mut self) -> Result<Vec<u8>, StreamError> {
        match self.place {
            Place::Manifest => self.frame(kind::WAITING, &[]),
            _ => Err(StreamError::Order { what: "a delay" }),
        }
    }

    /// Refuses, in words for people; ends the stream.
    ///
    /// # Errors
    /// [`StreamError::Order`] once the manifest was sent.
    pub fn refusal(&mut self, reason: &str) -> Result<Vec<u8>, StreamError> {
        match self.place {
            Place::Manifest => {
                self.place = Place::Ended;
                self.frame(
                    kind::REFUSAL,
                    &reason.as_bytes()[..reason.floor_char_boundary(MAX_REASON)],
                )
            }
            _ => Err(StreamError::Order { what: "a refusal" }),
        }
    }

    /// The manifest, before anything else but delays.
    ///
    /// # Errors
    /// [`StreamError::Manifest`] if the desktop would not accept it.
    pub fn manifest(&mut self, manifest: &Manifest) -> Result<Vec<u8>, StreamError> {
        if !matches!(self.place, Place::Manifest) {
            return Err(StreamError::Order { what: "a manifest" });
        }
        let json = manifest.to_json().map_err(StreamError::Manifest)?;
        self.place = Place::parts(manifest);
        self.frame(kind::MANIFEST, &json)
    }

    /// The next bytes of the parts, at most [`CHUNK`] and never across a part's end.
    ///
    /// # Errors
    /// [`StreamError::Order`] if more is given than the manifest says.
    pub fn data(&mut self, bytes: &[u8]) -> Result<Vec<u8>, StreamError> {
        if bytes.len() > CHUNK {
            return Err(StreamError::Seal(snow::Error::Input));
        }
        self.place.advance(bytes.len())?;
        self.frame(kind::DATA, bytes)
    }

    /// Opens the desktop's next message; `None` if it does not verify.
    pub(super) fn open(&mut self, sealed: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
        let mut plain = Zeroizing::new(vec![0; sealed.len()]);
        let length = self.noise.read_message(sealed, &mut plain).ok()?;
        plain.truncate(length);
        Some(plain)
    }

    /// The answer of a machine that lends disks, instead of a manifest; ends the stream.
    ///
    /// # Errors
    /// [`StreamError::Order`] once anything else was sent, [`StreamError::Seal`] if it is longer than [`CHUNK`].
    pub fn loan(&mut self, json: &[u8]) -> Result<Vec<u8>, StreamError> {
        if json.len() > CHUNK {
            return Err(StreamError::Seal(snow::Error::Input));
        }
        match self.place {
            Place::Manifest => {
                self.place = Place::Ended;
                self.frame(kind::LOAN, json)
            }
            _ => Err(StreamError::Order { what: "a loan" }),
        }
    }

    /// The answer of a laptop that waits for its passphrase, instead of a manifest; ends the stream.
    ///
    /// # Errors
    /// [`StreamError::Order`] once anything else was sent.
    pub fn unlocking(&mut self, answer: &Unlocking) -> Result<Vec<u8>, StreamError> {
        match self.place {
            Place::Manifest => {
                self.place = Place::Ended;
                self.frame(kind::UNLOCKING, &answer.to_bytes())
            }
            _ => Err(StreamError::Order {
                what: "an answer about a passphrase",
            }),
        }
    }

    /// The end, after the last byte of the last part.
    ///
    /// # Errors
    /// [`StreamError::Order`] if something is missing.
    pub fn end(&mut self) -> Result<Vec<u8>, StreamError> {
        self.place.end()?;
        self.frame(kind::END, &[])
    }
}

/// What came out of the stream, verified.
#[derive(Debug)]
pub enum Item<'a> {
    /// The laptop is alive but not ready to go on.
    Waiting,
    /// The manifest, checked: sizes are within [`Part::limit`].
    Manifest(Box<Manifest>),
    /// The next bytes of a part.
    Data {
        /// Of which part.
        part: Part,
        /// The bytes.
        bytes: &'a [u8],
    },
    /// Everything came.
    End,
    /// The answer of a machine that lends disks; nothing comes after it.
    Loan(Zeroizing<Vec<u8>>),
    /// The answer of a laptop that waits for its passphrase; nothing comes after it.
    Unlocking(Unlocking),
}

/// The desktop's side of the stream.
pub struct Receiver {
    noise: TransportState,
    session: SessionName,
    place: Place,
    /// The frame that is coming in, with its length field.
    frame: Vec<u8>,
    plain: Zeroizing<Vec<u8>>,
}

impl Receiver {
    pub(super) fn new(noise: TransportState, session: SessionName) -> Self {
        Self {
            noise,
            session,
            place: Place::Manifest,
            frame: Vec::with_capacity(2 + MAX_FRAME),
            plain: Zeroizing::new(vec![0; MAX_FRAME]),
        }
    }

    /// Seals the desktop's next message.
    pub(super) fn seal(&mut self, plain: &[u8]) -> Result<Vec<u8>, snow::Error> {
        let mut sealed = vec![0; plain.len() + TAG];
        self.noise.write_message(plain, &mut sealed)?;
        Ok(sealed)
    }

    /// Opens the whole answer of a machine that lends disks.
    ///
    /// # Errors
    /// [`StreamError::Refused`] with its reason; [`StreamError::Altered`], [`StreamError::Truncated`], [`StreamError::Order`].
    pub fn loan(mut self, mut body: &[u8]) -> Result<Zeroizing<Vec<u8>>, StreamError> {
        match self.next(&mut body) {
            Ok(None) => Err(StreamError::Truncated),
            Ok(Some(Item::Loan(json))) if body.is_empty() => Ok(json),
            Ok(Some(_)) => Err(StreamError::Order {
                what: "something else than a loan",
            }),
            Err(error) => Err(error),
        }
    }

    /// Opens the whole answer of a laptop that waits for its passphrase.
    ///
    /// # Errors
    /// As [`Self::loan`].
    pub fn unlocking(mut self, mut body: &[u8]) -> Result<Unlocking, StreamError> {
        match self.next(&mut body) {
            Ok(None) => Err(StreamError::Truncated),
            Ok(Some(Item::Unlocking(answer))) if body.is_empty() => Ok(answer),
            Ok(Some(_)) => Err(StreamError::Order {
                what: "something else than an answer about a passphrase",
            }),
            Err(error) => Err(error),
        }
    }

    /// Takes bytes from the front of `input` until something is complete; `None`: more bytes are needed.
    ///
    /// # Errors
    /// [`StreamError`]; the stream cannot go on after it.
    pub fn next(&mut self, input: &mut &[u8]) -> Result<Option<Item<'_>>, StreamError> {
        if !self.fill(input, 2) {
            return Ok(None);
        }
        if matches!(self.place, Place::Ended) {
            return Err(StreamError::Order {
                what: "something after the end",
            });
        }
        let length = match self.frame.first_chunk() {
            Some(field) => usize::from(u16::from_be_bytes(*field)),
            None => return Ok(None),
        };
        // The field itself is not sealed: a wrong one is as good as a wrong frame.
        if !(TAG < length && length <= MAX_FRAME) {
            return Err(StreamError::Altered);
        }
        if !self.fill(input, 2 + length) {
            return Ok(None);
        }
        let sealed = self.frame.get(2..).unwrap_or_default();
        let opened = self
            .noise
            .read_message(sealed, &mut self.plain)
            .map_err(|_| StreamError::Altered)?;
        self.frame.clear();
        self.open(opened).map(Some)
    }

    /// Collects up to `wanted` bytes of the current frame; whether they are there.
    fn fill(&mut self, input: &mut &[u8], wanted: usize) -> bool {
        let missing = wanted.saturating_sub(self.frame.len()).min(input.len());
        let (head, tail) = input.split_at(missing);
        self.frame.extend_from_slice(head);
        *input = tail;
        self.frame.len() >= wanted
    }

    fn open(&mut self, length: usize) -> Result<Item<'_>, StreamError> {
        let plain = self.plain.get(..length).unwrap_or_default();
        let (&kind, content) = plain
            .split_first()
            .ok_or(StreamError::Order { what: "an empty frame" })?;
        let first = matches!(self.place, Place::Manifest);
        match kind {
            kind::WAITING if first && content.is_empty() => Ok(Item::Waiting),
            kind::REFUSAL if first => {
                let reason: String = String::from_utf8_lossy(content)
                    .chars()
                    .filter(|c| !c.is_control())
                    .take(MAX_REASON)
                    .collect();
                Err(StreamError::Refused { reason })
            }
            kind::MANIFEST if first => {
                let manifest = Manifest::parse(content).map_err(StreamError::Manifest)?;
                if manifest.session != self.session.to_string() {
                    return Err(StreamError::Order {
                        what: "another session's manifest",
                    });
                }
                self.place = Place::parts(&manifest);
                Ok(Item::Manifest(Box::new(manifest)))
            }
            kind::LOAN if first => {
                let json = Zeroizing::new(content.to_vec());
                self.place = Place::Ended;
                Ok(Item::Loan(json))
            }
            kind::UNLOCKING if first => {
                let answer = Unlocking::parse(content).map_err(|_| StreamError::Order {
                    what: "an unknown answer about a passphrase",
                })?;
                self.place = Place::Ended;
                Ok(Item::Unlocking(answer))
            }
            kind::DATA => Ok(Item::Data {
                part: self.place.advance(content.len())?,
                bytes: content,
            }),
            kind::END if content.is_empty() => self.place.end().map(|()| Item::End),
            _ => Err(StreamError::Order {
                what: "an unknown frame",
            }),
        }
    }

    /// Takes a frame as it lies under the encryption; for the fuzz target, which cannot encrypt.
    #[doc(hidden)]
    pub fn fuzz_frame(&mut self, plain: &[u8]) -> Result<(), StreamError> {
        let length = plain.len().min(MAX_FRAME - TAG);
        self.plain
            .get_mut(..length)
            .unwrap_or_default()
            .copy_from_slice(plain.get(..length).unwrap_or_default());
        self.open(length).map(drop)
    }

    /// Says that no more bytes will come.
    ///
    /// # Errors
    /// [`StreamError::Truncated`] unless the End frame came.
    pub fn finish(&self) -> Result<(), StreamError> {
        match self.place {
            Place::Ended if self.frame.is_empty() => Ok(()),
            _ => Err(StreamError::Truncated),
        }
    }
}
