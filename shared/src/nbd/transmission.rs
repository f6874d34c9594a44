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
        let mut out = [0; REQUEST_LEN];
        out[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        out[4..6].copy_from_slice(&self.flags.to_be_bytes());
        out[6..8].copy_from_slice(&self.command.to_be_bytes());
        out[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        out[16..24].copy_from_slice(&self.offset.to_be_bytes());
        out[24..].copy_from_slice(&self.length.to_be_bytes());
        out
    }

    /// Reads a header.
    ///
    /// # Errors
    /// `BadMagic`: the connection is out of step.
    pub fn parse(bytes: &[u8; REQUEST_LEN]) -> Result<Self, WireError> {
        let mut fields = Fields::new("an NBD request", bytes);
        let found = fields.u32()?;
        if found != REQUEST_MAGIC {
            return Err(WireError::BadMagic {
                what: "an NBD request",
                found: u64::from(found),
            });
        }
        Ok(Self {
            flags: fields.u16()?,
            command: fields.u16()?,
            cookie: fields.u64()?,
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
    /// The header of an extended request as sent; `payload` is expressed by [`CMD_FLAG_PAYLOAD_LEN`] alone.
    #[must_use]
    pub fn encode_extended(&self) -> [u8; EXTENDED_REQUEST_LEN] {
        let mut out = [0; EXTENDED_REQUEST_LEN];
        out[..4].copy_from_slice(&EXTENDED_REQUEST_MAGIC.to_be_bytes());
        out[4..6].copy_from_slice(&self.flags.to_be_bytes());
        out[6..8].copy_from_slice(&self.command.to_be_bytes());
        out[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        out[16..24].copy_from_slice(&self.offset.to_be_bytes());
        out[24..].copy_from_slice(&self.length.to_be_bytes());
        out
    }

    /// Reads the header of an extended request.
    ///
    /// # Errors
    /// `BadMagic`: the connection is out of step.
    pub fn parse_extended(bytes: &[u8; EXTENDED_REQUEST_LEN]) -> Result<Self, WireError> {
        let mut fields = Fields::new("an extended NBD request", bytes);
        let found = fields.u32()?;
        if found != EXTENDED_REQUEST_MAGIC {
            return Err(WireError::BadMagic {
                what: "an extended NBD request",
                found: u64::from(found),
            });
        }
        let mut asked = Self {
            flags: fields.u16()?,
            command: fields.u16()?,
            cookie: fields.u64()?,
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
        let mut out = [0; SIMPLE_REPLY_LEN];
        out[..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
        out[4..8].copy_from_slice(&self.error.to_be_bytes());
        out[8..].copy_from_slice(&self.cookie.to_be_bytes());
        out
    }

    /// Reads a header.
    ///
    /// # Errors
    /// `BadMagic`: the connection is out of step.
    pub fn parse(bytes: &[u8; SIMPLE_REPLY_LEN]) -> Result<Self, WireError> {
        let mut fields = Fields::new("a simple NBD reply", bytes);
        let found = fields.u32()?;
        if found != SIMPLE_REPLY_MAGIC {
            return Err(WireError::BadMagic {
                what: "a simple NBD reply",
                found: u64::from(found),
            });
        }
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
    /// The header as sent.
    #[must_use]
    pub fn encode(self) -> [u8; CHUNK_LEN] {
        let mut out = [0; CHUNK_LEN];
        out[..4].copy_from_slice(&STRUCTURED_REPLY_MAGIC.to_be_bytes());
        out[4..6].copy_from_slice(&self.flags.to_be_bytes());
        out[6..8].copy_from_slice(&self.kind.to_be_bytes());
        out[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        out[16..].copy_from_slice(&self.length.to_be_bytes());
        out
    }

    /// Reads a header.
    ///
    /// # Errors
    /// `BadMagic`: the connection is out of step.
    pub fn parse(bytes: &[u8; CHUNK_LEN]) -> Result<Self, WireError> {
        let mut fields = Fields::new("a structured NBD reply", bytes);
        let found = fields.u32()?;
        if found != STRUCTURED_REPLY_MAGIC {
            return Err(WireError::BadMagic {
                what: "a structured NBD reply",
                found: u64::from(found),
            });
        }
        Ok(Self {
            flags: fields.u16()?,
            kind: fields.u16()?,
            cookie: fields.u64()?,
            length: fields.u32()?,
        })
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
        let mut out = [0; EXTENDED_CHUNK_LEN];
        out[..16].copy_from_slice(&self.chunk.encode()[..16]);
        out[..4].copy_from_slice(&EXTENDED_REPLY_MAGIC.to_be_bytes());
        out[16..24].copy_from_slice(&self.offset.to_be_bytes());
        out[24..].copy_from_slice(&u64::from(self.chunk.length).to_be_bytes());
        out
    }

    /// Reads a header.
    ///
    /// # Errors
    /// `BadMagic`: the connection is out of step; `TooLong` beyond 32 bits.
    pub fn parse(bytes: &[u8; EXTENDED_CHUNK_LEN]) -> Result<Self, WireError> {
        let what = "an extended NBD reply";
        let mut fields = Fields::new(what, bytes);
        let found = fields.u32()?;
        if found != EXTENDED_REPLY_MAGIC {
            return Err(WireError::BadMagic {
                what,
                found: u64::from(found),
            });
        }
        let (flags, kind, cookie, offset) = (fields.u16()?, fields.u16()?, fields.u64()?, fields.u64()?);
        let len = fields.u64()?;
        let length = u32::try_from(len).map_err(|_| WireError::TooLong {
            what,
            len,
            max: u64::from(u32::MAX),
        })?;
        let chunk = Chunk {
            flags,
            kind,
            cookie,
            length,
        };
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

/// The payload of a `REPLY_BLOCK_STATUS` chunk.
#[must_use]
pub fn encode_block_status(context: u32, extents: &[Extent]) -> Vec<u8> {
    let mut out = Vec::with_capacity(4 + 8 * extents.len());
    out.extend_from_slice(&context.to_be_bytes());
    for extent in extents {
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

/// The payload of a `REPLY_BLOCK_STATUS_EXT` chunk.
#[must_use]
pub fn encode_block_status_ext(context: u32, extents: &[Extent]) -> Vec<u8> {
    let mut out = Vec::with_capacity(8 + 16 * extents.len());
    out.extend_from_slice(&context.to_be_bytes());
    // Cannot saturate: nobody holds that many extents in memory.
    out.extend_from_slice(&u32::try_from(extents.len()).unwrap_or(u32::MAX).to_be_bytes());
    for extent in extents {
        out.extend_from_slice(&extent.length.to_be_bytes());
        out.extend_from_slice(&u64::from(extent.state).to_be_bytes());
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
