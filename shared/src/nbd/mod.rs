//! The NBD wire format: encodes and parses, opens nothing.
//!
//! Spoken by `server::nbd` (which serves) and `client::nbd` (which negotiates, then gives the socket to the kernel).
//! Specification: NBD `doc/proto.md`; the section names in the docstrings are its own. All numbers are big-endian.
//! Only *fixed newstyle* is known; oldstyle and unfixed newstyle peers are refused.
//!
//! Every length that a peer sends is checked against a bound before anything is allocated for it.

mod handshake;
mod transmission;

pub use handshake::*;
pub use transmission::*;

use thiserror::Error;

/// The IANA-registered TCP port of NBD.
pub const PORT: u16 = 10809;

/// The longest string (export name, description, message, query) in bytes ("Conventions").
pub const MAX_STRING: usize = 4096;

/// The largest payload of one request or reply chunk, in bytes: what the specification calls portable ("Size constraints").
pub const MAX_PAYLOAD: u32 = 32 << 20;

/// What was wrong with bytes of the other side, or what it refused.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum WireError {
    /// The first bytes are not an NBD server's.
    #[error("this is not an NBD server (it does not start with NBDMAGIC); check the address and the port")]
    NotNbd,
    /// The peer speaks the withdrawn oldstyle, or newstyle without its fix.
    #[error("the NBD peer does not speak fixed newstyle negotiation; it is too old, use a newer one")]
    NotFixedNewstyle,
    /// A client set flags which no specification knows; the server must drop it ("Client flags").
    #[error("the NBD client set unknown flags {flags:#x}; dropping it, as the specification demands")]
    UnknownClientFlags {
        /// The flags as received.
        flags: u32,
    },
    /// A message does not start with its magic number: the stream is out of step and must be closed.
    #[error(
        "{what} starts with {found:#x} instead of its magic number; the connection is out of step and must be closed"
    )]
    BadMagic {
        /// Which message.
        what: &'static str,
        /// What stood in the magic's place.
        found: u64,
    },
    /// A length is beyond what the specification or this side allows.
    #[error("{what} is {len} bytes long, but at most {max} are allowed")]
    TooLong {
        /// Which message or field.
        what: &'static str,
        /// The length as received.
        len: u64,
        /// The largest allowed.
        max: u64,
    },
    /// A message ended before its last field, or holds more than its fields.
    #[error("{what} has the wrong length: its fields do not fill it exactly")]
    WrongLength {
        /// Which message.
        what: &'static str,
    },
    /// A string is not UTF-8 or holds a NUL.
    #[error("{what} is not a string of UTF-8 characters without NUL")]
    NotText {
        /// Which field.
        what: &'static str,
    },
    /// The server's answer belongs to another option, or has no meaning for this one.
    #[error("the NBD server answered option {option} with an unexpected reply of type {reply:#x}")]
    UnexpectedReply {
        /// The option in the reply.
        option: u32,
        /// The reply's type.
        reply: u32,
    },
    /// The server refused an option ("Option reply types").
    #[error("the NBD server refused: {} {message:?}", rep_name(*.reply))]
    Refused {
        /// One of the `REP_ERR_…` numbers.
        reply: u32,
        /// The server's own words, may be empty.
        message: String,
    },
    /// A field's value is outside of its domain.
    #[error("{what} has the impossible value {value}")]
    BadValue {
        /// Which field.
        what: &'static str,
        /// What it held.
        value: u64,
    },
}

/// Takes fields off the front of a message whose bytes are all there.
struct Fields<'a> {
    what: &'static str,
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    fn new(what: &'static str, rest: &'a [u8]) -> Self {
        Self { what, rest }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let (head, rest) = self
            .rest
            .split_first_chunk()
            .ok_or(WireError::WrongLength { what: self.what })?;
        self.rest = rest;
        Ok(*head)
    }

    fn u16(&mut self) -> Result<u16, WireError> {
        self.array().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Result<u32, WireError> {
        self.array().map(u32::from_be_bytes)
    }

    fn u64(&mut self) -> Result<u64, WireError> {
        self.array().map(u64::from_be_bytes)
    }

    /// A string of `len` bytes.
    fn text(&mut self, len: u32) -> Result<String, WireError> {
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        if len > MAX_STRING {
            return Err(WireError::TooLong {
                what: self.what,
                len: len as u64,
                max: MAX_STRING as u64,
            });
        }
        let (head, rest) = self
            .rest
            .split_at_checked(len)
            .ok_or(WireError::WrongLength { what: self.what })?;
        self.rest = rest;
        text(self.what, head)
    }

    /// The string that fills the rest of the message.
    fn last_text(self) -> Result<String, WireError> {
        if self.rest.len() > MAX_STRING {
            return Err(WireError::TooLong {
                what: self.what,
                len: self.rest.len() as u64,
                max: MAX_STRING as u64,
            });
        }
        text(self.what, self.rest)
    }

    fn end(self) -> Result<(), WireError> {
        if self.rest.is_empty() {
            Ok(())
        } else {
            Err(WireError::WrongLength { what: self.what })
        }
    }
}

/// A string of the protocol: UTF-8 without NUL ("Conventions").
fn text(what: &'static str, bytes: &[u8]) -> Result<String, WireError> {
    match std::str::from_utf8(bytes) {
        Ok(text) if !text.contains('\0') => Ok(text.to_owned()),
        _ => Err(WireError::NotText { what }),
    }
}

/// Appends `text` with its length in 32 bits before it, cut to [`MAX_STRING`] at a character boundary.
fn put_text(out: &mut Vec<u8>, text: &str) {
    let text = clip(text);
    // Cannot saturate: clip() leaves at most MAX_STRING bytes.
    out.extend_from_slice(&u32::try_from(text.len()).unwrap_or(u32::MAX).to_be_bytes());
    out.extend_from_slice(text.as_bytes());
}

/// The longest beginning of `text` that the protocol can carry.
fn clip(text: &str) -> &str {
    &text[..text.floor_char_boundary(MAX_STRING)]
}

#[cfg(test)]
mod tests;
