//! Transmission: requests, simple replies and structured reply chunks ("Transmission").

use super::{Fields, WireError, clip};

/// Before each request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Before each request once extended headers were agreed on.
pub const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// Before each extended reply chunk.
pub const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;
/// Before each simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Before each structured reply chunk.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

/// Transmission flag: always set.
pub const FLAG_HAS_FLAGS: u16 = 1 << 0;
/// Transmission flag: nothing can be written.
pub const FLAG_READ_ONLY: u16 = 1 << 1;
/// Transmission flag: `NBD_CMD_FLUSH` is served.
pub const FLAG_SEND_FLUSH: u16 = 1 << 2;
/// Transmission flag: `NBD_CMD_FLAG_FUA` is served.
pub const FLAG_SEND_FUA: u16 = 1 << 3;
/// Transmission flag: seeking costs time.
pub const FLAG_ROTATIONAL: u16 = 1 << 4;
/// Transmission flag: `NBD_CMD_TRIM` is served.
pub const FLAG_SEND_TRIM: u16 = 1 << 5;
/// Transmission flag: `NBD_CMD_WRITE_ZEROES` is served.
pub const FLAG_SEND_WRITE_ZEROES: u16 = 1 << 6;
/// Transmission flag: `NBD_CMD_FLAG_DF` is served.
pub const FLAG_SEND_DF: u16 = 1 << 7;
/// Transmission flag: a flush on one connection covers all.
pub const FLAG_CAN_MULTI_CONN: u16 = 1 << 8;
/// Transmission flag: `NBD_CMD_CACHE` is served.
pub const FLAG_SEND_CACHE: u16 = 1 << 10;
/// Transmission flag: `NBD_CMD_FLAG_FAST_ZERO` is served.
pub const FLAG_SEND_FAST_ZERO: u16 = 1 << 11;

/// Command flag: answer only when the data are on the medium.
pub const CMD_FLAG_FUA: u16 = 1 << 0;
/// Command flag of `CMD_WRITE_ZEROES`: keep the space allocated.
pub const CMD_FLAG_NO_HOLE: u16 = 1 << 1;
/// Command flag of `CMD_READ`: one content chunk only.
pub const CMD_FLAG_DF: u16 = 1 << 2;
/// Command flag of `CMD_BLOCK_STATUS`: one extent only.
pub const CMD_FLAG_REQ_ONE: u16 = 1 << 3;
/// Command flag of `CMD_WRITE_ZEROES`: fail unless faster than writing.
pub const CMD_FLAG_FAST_ZERO: u16 = 1 << 4;
/// Command flag of extended headers: the length is that of a payload which follows.
pub const CMD_FLAG_PAYLOAD_LEN: u16 = 1 << 5;

/// Command: read.
pub const CMD_READ: u16 = 0;
/// Command: write; the payload follows.
pub const CMD_WRITE: u16 = 1;
/// Command: disconnect; never answered.
pub const CMD_DISC: u16 = 2;
/// Command: bring everything answered so far onto the medium.
pub const CMD_FLUSH: u16 = 3;
/// Command: the data are not needed any more.
pub const CMD_TRIM: u16 = 4;
/// Command: the data will be needed soon.
pub const CMD_CACHE: u16 = 5;
/// Command: write zeroes without sending them.
pub const CMD_WRITE_ZEROES: u16 = 6;
/// Command: which parts are holes.
pub const CMD_BLOCK_STATUS: u16 = 7;
/// Command: change the size; an extension that is never offered here.
pub const CMD_RESIZE: u16 = 8;

/// Reply flag: the last chunk of its request.
pub const REPLY_FLAG_DONE: u16 = 1;
/// Chunk: no content.
pub const REPLY_NONE: u16 = 0;
/// Chunk: an offset and data.
pub const REPLY_OFFSET_DATA: u16 = 1;
/// Chunk: an offset and a length of zeroes.
pub const REPLY_OFFSET_HOLE: u16 = 2;
/// Chunk: a metadata context's extents.
pub const REPLY_BLOCK_STATUS: u16 = 5;
/// Chunk of extended headers: a metadata context's extents with 64-bit lengths.
pub const REPLY_BLOCK_STATUS_EXT: u16 = 6;
/// Chunk: an error.
pub const REPLY_ERROR: u16 = (1 << 15) | 1;
/// Chunk: an error at an offset.
pub const REPLY_ERROR_OFFSET: u16 = (1 << 15) | 2;

/// State of an extent in `base:allocation`: not allocated.
pub const STATE_HOLE: u32 = 1;
/// State of an extent in `base:allocation`: reads as zeroes.
pub const STATE_ZERO: u32 = 2;

/// Length of a request's header, in bytes.
pub const REQUEST_LEN: usize = 28;
/// Length of an extended request's header, in bytes.
pub const EXTENDED_REQUEST_LEN: usize = 32;
/// Length of an extended reply chunk's header, in bytes.
pub const EXTENDED_CHUNK_LEN: usize = 32;
/// Length of a simple reply's header, in bytes.
pub const SIMPLE_REPLY_LEN: usize = 16;
/// Length of a structured reply chunk's header, in bytes.
pub const CHUNK_LEN: usize = 20;

/// The errors that a reply can carry ("Error values").
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Errno {
    /// Writing to what is read-only.
    Perm,
    /// The medium failed.
    Io,
    /// Out of memory.
    NoMem,
    /// The request makes no sense.
    Inval,
    /// Written past the end, or the medium is full.
    NoSpc,
    /// Too long for one request.
    Overflow,
    /// Not to be had fast.
    NotSup,
    /// The server is going away.
    Shutdown,
}

impl Errno {
    /// The number on the wire.
    #[must_use]
    pub fn code(self) -> u32 {
        match self {
            Self::Perm => 1,
            Self::Io => 5,
            Self::NoMem => 12,
            Self::Inval => 22,
            Self::NoSpc => 28,
            Self::Overflow => 75,
            Self::NotSup => 95,
            Self::Shutdown => 108,
        }
    }

    /// The error of a number other than 0; an unknown one counts as `Inval`, as the specification demands of clients.
    #[must_use]
    pub fn from_code(code: u32) -> Self {
        match code {
            1 => Self::Perm,
            5 => Self::Io,
            12 => Self::NoMem,
            28 => Self::NoSpc,
            75 => Self::Overflow,
            95 => Self::NotSup,
            108 => Self::Shutdown,
            _ => Self::Inval,
        }
    }
}

/// What every message of this phase but the simple reply begins with, behind its magic number.
#[derive(Clone, Copy)]
struct Front {
    flags: u16,
    kind: u16,
    cookie: u64,
}

impl Front {
    fn encode(self, magic: u32) -> [u8; 16] {
        join([
            &magic.to_be_bytes(),
            &self.flags.to_be_bytes(),
            &self.kind.to_be_bytes(),
            &self.cookie.to_be_bytes(),
        ])
    }

    fn parse(fields: &mut Fields<'_>, magic: u32) -> Result<Self, WireError> {
        expect_magic(fields, magic)?;
        Ok(Self {
            flags: fields.u16()?,
            kind: fields.u16()?,
            cookie: fields.u64()?,
        })
    }
}

fn expect_magic(fields: &mut Fields<'_>, magic: u32) -> Result<(), WireError> {
    let found = fields.u32()?;
    if found == magic {
        return Ok(());
    }
    Err(WireError::BadMagic {
        what: fields.what,
        found: u64::from(found),
    })
}

/// One message of a fixed length from its parts, which fill it.
fn join<const N: usize, const PARTS: usize>(parts: [&[u8]; PARTS]) -> [u8; N] {
    let mut out = [0; N];
    let mut rest = &mut out[..];
    for part in parts {
        let (place, behind) = rest.split_at_mut(part.len());
        place.copy_from_slice(part);
        rest = behind;
    }
    out
}

/// A request's header ("Request message"). For `CMD_WRITE`, `length` bytes of payload follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// `CMD_FLAG_…`, unknown ones included.
    pub flags: u16,
    /// `CMD_…`, or an unknown number.
    pub command: u16,
    /// The client's own mark, to be sent back as it is.
    pub cookie: u64,
    /// First byte.
    pub offset: u64,
    /// Number of bytes; not yet checked.
    pub length: u32,
}

impl Request {
    /// The header as sent.
    #[must_use]
    pub fn encode(&self) -> [u8; REQUEST_LEN] {
        let front = Asked::from(*self).front().encode(REQUEST_MAGIC);
        join([&front, &self.offset.to_be_bytes(), &self.length.to_be_bytes()])
    }

    /// Reads a header.
    ///
    /// # Errors
    /// `BadMagic`: the connection is out of step.
    pub fn parse(bytes: &[u8; REQUEST_LEN]) -> Result<Self, WireError> {
        let mut fields = Fields::new("an NBD request", bytes);
        let front = Front::parse(&mut fields, REQUEST_MAGIC)?;
        Ok(Self {
            flags: front.flags,
            command: front.kind,
            cookie: front.cookie,
            offset: fields.u64()?,
            length: fields.u32()?,
        })
    }

    /// Bytes that follow the header on the wire.
    #[must_use]
    pub fn payload_len(&self) -> u32 {
        if self.command == CMD_WRITE { self.length } else { 0 }
    }
}

/// A request in either form, as it is checked and executed ("Request message", "Extended request message").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Asked {
    /// `CMD_FLAG_…`, unknown ones included.
    pub flags: u16,
    /// `CMD_…`, or an unknown number.
    pub command: u16,
    /// The client's own mark, to be sent back as it is.
    pub cookie: u64,
    /// First byte.
    pub offset: u64,
    /// Number of bytes; not yet checked.
    pub length: u64,
    /// Bytes that follow the header; not yet checked.
    pub payload: u64,
}

impl From<Request> for Asked {
    fn from(request: Request) -> Self {
        Self {
            flags: request.flags,
            command: request.command,
            cookie: request.cookie,
            offset: request.offset,
            length: request.length.into(),
            payload: request.payload_len().into(),
        }
    }
}

impl Asked {
    fn front(&self) -> Front {
        Front {
            flags: self.flags,
            kind: self.command,
            cookie: self.cookie,
        }
    }

    /// The header of an extended request as sent; `payload` is expressed by [`CMD_FLAG_PAYLOAD_LEN`] alone.
    #[must_use]
    pub fn encode_extended(&self) -> [u8; EXTENDED_REQUEST_LEN] {
        let front = self.front().encode(EXTENDED_REQUEST_MAGIC);
        join([&front, &self.offset.to_be_bytes(), &self.length.to_be_bytes()])
    }

    /// Reads the header of an extended request.
    ///
    /// # Errors
    /// `BadMagic`: the connection is out of step.
    pub fn parse_extended(bytes: &[u8; EXTENDED_REQUEST_LEN]) -> Result<Self, WireError> {
        let mut fields = Fields::new("an extended NBD request", bytes);
        let front = Front::parse(&mut fields, EXTENDED_REQUEST_MAGIC)?;
        let mut asked = Self {
            flags: front.flags,
            command: front.kind,
            cookie: front.cookie,
            offset: fields.u64()?,
            length: fields.u64()?,
            payload: 0,
        };
        if asked.flags & CMD_FLAG_PAYLOAD_LEN != 0 {
            asked.payload = asked.length;
        }
        Ok(asked)
    }
}

/// A simple reply's header ("Simple reply message"). A successful read's data follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SimpleReply {
    /// 0, or an [`Errno`]'s number.
    pub error: u32,
    /// The request's mark.
    pub cookie: u64,
}

impl SimpleReply {
    /// The header as sent.
    #[must_use]
    pub fn encode(self) -> [u8; SIMPLE_REPLY_LEN] {
        join([
            &SIMPLE_REPLY_MAGIC.to_be_bytes(),
            &self.error.to_be_bytes(),
            &self.cookie.to_be_bytes(),
        ])
    }

    /// Reads a header.
    ///
    /// # Errors
    /// `BadMagic`: the connection is out of step.
    pub fn parse(bytes: &[u8; SIMPLE_REPLY_LEN]) -> Result<Self, WireError> {
        let mut fields = Fields::new("a simple NBD reply", bytes);
        expect_magic(&mut fields, SIMPLE_REPLY_MAGIC)?;
        Ok(Self {
            error: fields.u32()?,
            cookie: fields.u64()?,
        })
    }
}

/// A structured reply chunk's header ("Structured reply chunk message"). `length` bytes follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunk {
    /// `REPLY_FLAG_DONE` or 0.
    pub flags: u16,
    /// `REPLY_…`, or an unknown number.
    pub kind: u16,
    /// The request's mark.
    pub cookie: u64,
    /// Length of the payload, in bytes; not yet checked.
    pub length: u32,
}

impl Chunk {
    fn front(self) -> Front {
        Front {
            flags: self.flags,
            kind: self.kind,
            cookie: self.cookie,
        }
    }

    /// The header as sent.
    #[must_use]
    pub fn encode(self) -> [u8; CHUNK_LEN] {
        let front = self.front().encode(STRUCTURED_REPLY_MAGIC);
        join([&front, &self.length.to_be_bytes()])
    }

    /// Reads a header.
    ///
    /// # Errors
    /// `BadMagic`: the connection is out of step.
    pub fn parse(bytes: &[u8; CHUNK_LEN]) -> Result<Self, WireError> {
        let mut fields = Fields::new("a structured NBD reply", bytes);
        let front = Front::parse(&mut fields, STRUCTURED_REPLY_MAGIC)?;
        Ok(Self::behind(front, fields.u32()?))
    }

    fn behind(front: Front, length: u32) -> Self {
        Self {
            flags: front.flags,
            kind: front.kind,
            cookie: front.cookie,
            length,
        }
    }
}

/// An extended reply chunk's header ("Extended reply chunk message"). `length` bytes follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExtendedChunk {
    /// Flags, kind, mark and payload length as in the structured form.
    pub chunk: Chunk,
    /// The request's offset.
    pub offset: u64,
}

impl ExtendedChunk {
    /// The header as sent.
    #[must_use]
    pub fn encode(self) -> [u8; EXTENDED_CHUNK_LEN] {
        let front = self.chunk.front().encode(EXTENDED_REPLY_MAGIC);
        let length = u64::from(self.chunk.length);
        join([&front, &self.offset.to_be_bytes(), &length.to_be_bytes()])
    }

    /// Reads a header.
    ///
    /// # Errors
    /// `BadMagic`: the connection is out of step; `TooLong` beyond 32 bits.
    pub fn parse(bytes: &[u8; EXTENDED_CHUNK_LEN]) -> Result<Self, WireError> {
        let what = "an extended NBD reply";
        let mut fields = Fields::new(what, bytes);
        let front = Front::parse(&mut fields, EXTENDED_REPLY_MAGIC)?;
        let offset = fields.u64()?;
        let len = fields.u64()?;
        let length = u32::try_from(len).map_err(|_| WireError::TooLong {
            what,
            len,
            max: u64::from(u32::MAX),
        })?;
        let chunk = Chunk::behind(front, length);
        Ok(Self { chunk, offset })
    }
}

/// The payload of a `REPLY_ERROR` chunk.
#[must_use]
pub fn encode_error_payload(error: Errno, message: &str) -> Vec<u8> {
    let message = clip(message);
    // Cannot saturate: clip() leaves at most MAX_STRING bytes.
    let len = u16::try_from(message.len()).unwrap_or(u16::MAX);
    [&error.code().to_be_bytes()[..], &len.to_be_bytes(), message.as_bytes()].concat()
}

/// Error and message of a `REPLY_ERROR` chunk.
///
/// # Errors
/// `TooLong`, `WrongLength`, `NotText`; `BadValue` for error 0.
pub fn parse_error_payload(payload: &[u8]) -> Result<(Errno, String), WireError> {
    let mut fields = Fields::new("an NBD error", payload);
    let code = fields.u32()?;
    if code == 0 {
        return Err(WireError::BadValue {
            what: "the error of an NBD error chunk",
            value: 0,
        });
    }
    let len = fields.u16()?;
    let message = fields.text(u32::from(len))?;
    fields.end()?;
    Ok((Errno::from_code(code), message))
}

/// Part of an export that has one state in a metadata context.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Number of bytes, never 0.
    pub length: u64,
    /// `STATE_…`.
    pub state: u32,
}

/// The payload of a `REPLY_BLOCK_STATUS` chunk, or with `extended` of a `REPLY_BLOCK_STATUS_EXT` one.
#[must_use]
pub fn encode_block_status(context: u32, extents: &[Extent], extended: bool) -> Vec<u8> {
    let mut out = Vec::with_capacity(8 + 16 * extents.len());
    out.extend_from_slice(&context.to_be_bytes());
    if extended {
        // Cannot saturate: nobody holds that many extents in memory.
        out.extend_from_slice(&u32::try_from(extents.len()).unwrap_or(u32::MAX).to_be_bytes());
    }
    for extent in extents {
        if extended {
            out.extend_from_slice(&extent.length.to_be_bytes());
            out.extend_from_slice(&u64::from(extent.state).to_be_bytes());
            continue;
        }
        // A shorter extent than there is remains true: the client asks again for the rest.
        let length = u32::try_from(extent.length).unwrap_or(1 << 31);
        out.extend_from_slice(&length.to_be_bytes());
        out.extend_from_slice(&extent.state.to_be_bytes());
        if u64::from(length) < extent.length {
            break;
        }
    }
    out
}

/// Context and extents of a `REPLY_BLOCK_STATUS` chunk.
///
/// # Errors
/// `WrongLength`; `BadValue` for an extent of length 0.
pub fn parse_block_status(payload: &[u8]) -> Result<(u32, Vec<Extent>), WireError> {
    let mut fields = Fields::new("an NBD block status", payload);
    let context = fields.u32()?;
    let mut extents = Vec::new();
    while !fields.rest.is_empty() {
        let extent = Extent {
            length: fields.u32()?.into(),
            state: fields.u32()?,
        };
        if extent.length == 0 {
            return Err(WireError::BadValue {
                what: "the length of an NBD extent",
                value: 0,
            });
        }
        extents.push(extent);
    }
    if extents.is_empty() {
        return Err(WireError::WrongLength {
            what: "an NBD block status",
        });
    }
    Ok((context, extents))
}
