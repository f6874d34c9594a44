//! The handshake: greeting, client flags, options and their replies ("Handshake", "Fixed newstyle negotiation").

use super::{Fields, WireError, clip, put_text};

/// ASCII `NBDMAGIC`, the first bytes of every server.
pub const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// ASCII `IHAVEOPT`: newstyle; also before each option of the client.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Before each of the server's replies to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;

/// Handshake flag: the server speaks fixed newstyle.
pub const FLAG_FIXED_NEWSTYLE: u16 = 1;
/// Handshake flag: the server can leave out the 124 zeroes after `NBD_OPT_EXPORT_NAME`.
pub const FLAG_NO_ZEROES: u16 = 2;
/// Client flag: the client speaks fixed newstyle.
pub const CLIENT_FIXED_NEWSTYLE: u32 = 1;
/// Client flag: the client wants the 124 zeroes left out.
pub const CLIENT_NO_ZEROES: u32 = 2;

/// Option: choose this export and begin transmission, with no way to say no.
pub const OPT_EXPORT_NAME: u32 = 1;
/// Option: end the negotiation.
pub const OPT_ABORT: u32 = 2;
/// Option: list the exports.
pub const OPT_LIST: u32 = 3;
/// Option: begin TLS.
pub const OPT_STARTTLS: u32 = 5;
/// Option: describe an export.
pub const OPT_INFO: u32 = 6;
/// Option: describe an export and begin transmission.
pub const OPT_GO: u32 = 7;
/// Option: use structured replies.
pub const OPT_STRUCTURED_REPLY: u32 = 8;
/// Option: list metadata contexts.
pub const OPT_LIST_META_CONTEXT: u32 = 9;
/// Option: select metadata contexts.
pub const OPT_SET_META_CONTEXT: u32 = 10;
/// Option: use extended headers.
pub const OPT_EXTENDED_HEADERS: u32 = 11;

/// Reply: done.
pub const REP_ACK: u32 = 1;
/// Reply: one export of the list.
pub const REP_SERVER: u32 = 2;
/// Reply: one information about an export.
pub const REP_INFO: u32 = 3;
/// Reply: one metadata context.
pub const REP_META_CONTEXT: u32 = 4;
/// Set in every reply that is an error.
pub const REP_FLAG_ERROR: u32 = 1 << 31;
/// Error reply: the option is unknown here.
pub const REP_ERR_UNSUP: u32 = REP_FLAG_ERROR | 1;
/// Error reply: forbidden by the server's policy.
pub const REP_ERR_POLICY: u32 = REP_FLAG_ERROR | 2;
/// Error reply: the option's data make no sense.
pub const REP_ERR_INVALID: u32 = REP_FLAG_ERROR | 3;
/// Error reply: not on this platform.
pub const REP_ERR_PLATFORM: u32 = REP_FLAG_ERROR | 4;
/// Error reply: TLS first.
pub const REP_ERR_TLS_REQD: u32 = REP_FLAG_ERROR | 5;
/// Error reply: no such export.
pub const REP_ERR_UNKNOWN: u32 = REP_FLAG_ERROR | 6;
/// Error reply: the server is going away.
pub const REP_ERR_SHUTDOWN: u32 = REP_FLAG_ERROR | 7;
/// Error reply: ask for the block sizes first.
pub const REP_ERR_BLOCK_SIZE_REQD: u32 = REP_FLAG_ERROR | 8;
/// Error reply: the option or its answer is too large.
pub const REP_ERR_TOO_BIG: u32 = REP_FLAG_ERROR | 9;
/// Error reply: not together with extended headers.
pub const REP_ERR_EXT_HEADER_REQD: u32 = REP_FLAG_ERROR | 10;

/// Information: size and transmission flags.
pub const INFO_EXPORT: u16 = 0;
/// Information: the canonical name.
pub const INFO_NAME: u16 = 1;
/// Information: a description for people.
pub const INFO_DESCRIPTION: u16 = 2;
/// Information: block sizes.
pub const INFO_BLOCK_SIZE: u16 = 3;

/// The only metadata context that the specification defines: which parts are holes.
pub const BASE_ALLOCATION: &str = "base:allocation";

/// Length of the server's greeting, in bytes.
pub const GREETING_LEN: usize = 18;
/// Length of an option's header, in bytes.
pub const OPTION_HEADER_LEN: usize = 16;
/// Length of the header of a reply to an option, in bytes.
pub const OPTION_REPLY_HEADER_LEN: usize = 20;
/// Zeroes that end the answer to `NBD_OPT_EXPORT_NAME` unless both sides agreed to leave them out.
pub const EXPORT_NAME_ZEROES: usize = 124;

/// A server's first words: fixed newstyle, zeroes may be left out.
#[must_use]
pub fn encode_greeting() -> [u8; GREETING_LEN] {
    let mut out = [0; GREETING_LEN];
    out[..8].copy_from_slice(&INIT_MAGIC.to_be_bytes());
    out[8..16].copy_from_slice(&OPTION_MAGIC.to_be_bytes());
    out[16..].copy_from_slice(&(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES).to_be_bytes());
    out
}

/// The handshake flags of a server's first words, unknown ones included ("Newstyle negotiation").
///
/// # Errors
/// `NotNbd`, `NotFixedNewstyle`.
pub fn parse_greeting(bytes: &[u8; GREETING_LEN]) -> Result<u16, WireError> {
    let mut fields = Fields::new("the NBD greeting", bytes);
    if fields.u64()? != INIT_MAGIC {
        return Err(WireError::NotNbd);
    }
    let style = fields.u64()?;
    let flags = fields.u16()?;
    if style != OPTION_MAGIC || flags & FLAG_FIXED_NEWSTYLE == 0 {
        return Err(WireError::NotFixedNewstyle);
    }
    Ok(flags)
}

/// A client's answer to the greeting, from the server's handshake flags: only what the server offered.
#[must_use]
pub fn encode_client_flags(handshake_flags: u16) -> [u8; 4] {
    let zeroes = if handshake_flags & FLAG_NO_ZEROES == 0 {
        0
    } else {
        CLIENT_NO_ZEROES
    };
    (CLIENT_FIXED_NEWSTYLE | zeroes).to_be_bytes()
}

/// Whether the client wants the zeroes left out ("Client flags").
///
/// # Errors
/// `UnknownClientFlags`, `NotFixedNewstyle`: after both the server must drop the connection.
pub fn parse_client_flags(bytes: [u8; 4]) -> Result<bool, WireError> {
    let flags = u32::from_be_bytes(bytes);
    if flags & !(CLIENT_FIXED_NEWSTYLE | CLIENT_NO_ZEROES) != 0 {
        return Err(WireError::UnknownClientFlags { flags });
    }
    if flags & CLIENT_FIXED_NEWSTYLE == 0 {
        return Err(WireError::NotFixedNewstyle);
    }
    Ok(flags & CLIENT_NO_ZEROES != 0)
}

/// What stands before an option's data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionHeader {
    /// One of the `OPT_…` numbers, or an unknown one.
    pub option: u32,
    /// Length of the data, in bytes; not yet checked.
    pub len: u32,
}

impl OptionHeader {
    /// The header as sent.
    #[must_use]
    pub fn encode(self) -> [u8; OPTION_HEADER_LEN] {
        let mut out = [0; OPTION_HEADER_LEN];
        out[..8].copy_from_slice(&OPTION_MAGIC.to_be_bytes());
        out[8..12].copy_from_slice(&self.option.to_be_bytes());
        out[12..].copy_from_slice(&self.len.to_be_bytes());
        out
    }

    /// Reads a header.
    ///
    /// # Errors
    /// `BadMagic`: the connection is out of step.
    pub fn parse(bytes: &[u8; OPTION_HEADER_LEN]) -> Result<Self, WireError> {
        let mut fields = Fields::new("an NBD option", bytes);
        let found = fields.u64()?;
        if found != OPTION_MAGIC {
            return Err(WireError::BadMagic {
                what: "an NBD option",
                found,
            });
        }
        Ok(Self {
            option: fields.u32()?,
            len: fields.u32()?,
        })
    }
}

/// An option with its data, as a client sends it.
///
/// # Errors
/// `TooLong` when the length does not fit its field.
pub fn encode_option(option: u32, data: &[u8]) -> Result<Vec<u8>, WireError> {
    let len = length("an NBD option", data.len())?;
    let mut out = Vec::with_capacity(OPTION_HEADER_LEN + data.len());
    out.extend_from_slice(&OptionHeader { option, len }.encode());
    out.extend_from_slice(data);
    Ok(out)
}

/// The data of `NBD_OPT_INFO` and `NBD_OPT_GO`. No `Debug`: names can be secret.
#[derive(Clone, PartialEq, Eq)]
pub struct InfoRequest {
    /// The export's name; empty means the default one.
    pub name: String,
    /// The `INFO_…` numbers wanted.
    pub wanted: Vec<u16>,
}

impl InfoRequest {
    /// The data as sent.
    ///
    /// # Errors
    /// `TooLong` when a length does not fit its field.
    pub fn encode(&self) -> Result<Vec<u8>, WireError> {
        let count = u16::try_from(self.wanted.len()).map_err(|_| WireError::TooLong {
            what: "the list of NBD information requests",
            len: self.wanted.len() as u64,
            max: u64::from(u16::MAX),
        })?;
        let mut out = Vec::with_capacity(6 + self.name.len() + 2 * self.wanted.len());
        put_text(&mut out, &self.name);
        out.extend_from_slice(&count.to_be_bytes());
        self.wanted
            .iter()
            .for_each(|info| out.extend_from_slice(&info.to_be_bytes()));
        Ok(out)
    }

    /// Reads the data of a client's option.
    ///
    /// # Errors
    /// `TooLong`, `WrongLength`, `NotText`.
    pub fn parse(data: &[u8]) -> Result<Self, WireError> {
        let mut fields = Fields::new("an NBD information request", data);
        let len = fields.u32()?;
        let name = fields.text(len)?;
        let count = usize::from(fields.u16()?);
        if fields.rest.len() != 2 * count {
            return Err(WireError::WrongLength { what: fields.what });
        }
        let wanted = fields
            .rest
            .as_chunks::<2>()
            .0
            .iter()
            .map(|pair| u16::from_be_bytes(*pair))
            .collect();
        Ok(Self { name, wanted })
    }
}

/// The data of `NBD_OPT_LIST_META_CONTEXT` and `NBD_OPT_SET_META_CONTEXT`. No `Debug`: names can be secret.
#[derive(Clone, PartialEq, Eq)]
pub struct MetaRequest {
    /// The export's name; empty means the default one.
    pub name: String,
    /// What is asked for, such as `base:allocation` or `base:`.
    pub queries: Vec<String>,
}

impl MetaRequest {
    /// The data as sent.
    ///
    /// # Errors
    /// `TooLong` when the number of queries does not fit its field.
    pub fn encode(&self) -> Result<Vec<u8>, WireError> {
        let mut out = Vec::new();
        put_text(&mut out, &self.name);
        out.extend_from_slice(&length("the list of NBD metadata queries", self.queries.len())?.to_be_bytes());
        self.queries.iter().for_each(|query| put_text(&mut out, query));
        Ok(out)
    }

    /// Reads the data of a client's option.
    ///
    /// # Errors
    /// `TooLong`, `WrongLength`, `NotText`.
    pub fn parse(data: &[u8]) -> Result<Self, WireError> {
        let mut fields = Fields::new("an NBD metadata request", data);
        let len = fields.u32()?;
        let name = fields.text(len)?;
        let count = fields.u32()?;
        // Each query takes four bytes at least, so the count is bounded by the data that is there.
        if u64::from(count) * 4 > fields.rest.len() as u64 {
            return Err(WireError::WrongLength { what: fields.what });
        }
        let mut queries = Vec::new();
        for _ in 0..count {
            let len = fields.u32()?;
            queries.push(fields.text(len)?);
        }
        fields.end()?;
        Ok(Self { name, queries })
    }
}

/// What stands before the data of a reply to an option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionReplyHeader {
    /// The option that is answered.
    pub option: u32,
    /// One of the `REP_…` numbers, or an unknown one.
    pub reply: u32,
    /// Length of the data, in bytes; not yet checked.
    pub len: u32,
}

impl OptionReplyHeader {
    /// The header as sent.
    #[must_use]
    pub fn encode(self) -> [u8; OPTION_REPLY_HEADER_LEN] {
        let mut out = [0; OPTION_REPLY_HEADER_LEN];
        out[..8].copy_from_slice(&OPTION_REPLY_MAGIC.to_be_bytes());
        out[8..12].copy_from_slice(&self.option.to_be_bytes());
        out[12..16].copy_from_slice(&self.reply.to_be_bytes());
        out[16..].copy_from_slice(&self.len.to_be_bytes());
        out
    }

    /// Reads a header.
    ///
    /// # Errors
    /// `BadMagic`: the connection is out of step.
    pub fn parse(bytes: &[u8; OPTION_REPLY_HEADER_LEN]) -> Result<Self, WireError> {
        let mut fields = Fields::new("an NBD option reply", bytes);
        let found = fields.u64()?;
        if found != OPTION_REPLY_MAGIC {
            return Err(WireError::BadMagic {
                what: "an NBD option reply",
                found,
            });
        }
        Ok(Self {
            option: fields.u32()?,
            reply: fields.u32()?,
            len: fields.u32()?,
        })
    }
}

/// Appends a reply to an option, with its data.
///
/// # Errors
/// `TooLong` when the length does not fit its field.
pub fn put_option_reply(out: &mut Vec<u8>, option: u32, reply: u32, data: &[u8]) -> Result<(), WireError> {
    let len = length("an NBD option reply", data.len())?;
    out.extend_from_slice(&OptionReplyHeader { option, reply, len }.encode());
    out.extend_from_slice(data);
    Ok(())
}

/// The data of `NBD_REP_SERVER`: one entry of the list of exports.
#[must_use]
pub fn encode_listed(name: &str, description: &str) -> Vec<u8> {
    let mut out = Vec::with_capacity(4 + name.len() + description.len());
    put_text(&mut out, name);
    out.extend_from_slice(clip(description).as_bytes());
    out
}

/// Name and description of one entry of the list of exports.
///
/// # Errors
/// `TooLong`, `WrongLength`, `NotText`.
pub fn parse_listed(data: &[u8]) -> Result<(String, String), WireError> {
    let mut fields = Fields::new("an entry of the list of NBD exports", data);
    let len = fields.u32()?;
    Ok((fields.text(len)?, fields.last_text()?))
}

/// The data of `NBD_REP_META_CONTEXT`.
#[must_use]
pub fn encode_meta_context(id: u32, name: &str) -> Vec<u8> {
    [&id.to_be_bytes(), clip(name).as_bytes()].concat()
}

/// Number and name of a metadata context.
///
/// # Errors
/// `TooLong`, `WrongLength`, `NotText`.
pub fn parse_meta_context(data: &[u8]) -> Result<(u32, String), WireError> {
    let mut fields = Fields::new("an NBD metadata context", data);
    Ok((fields.u32()?, fields.last_text()?))
}

/// Block sizes in bytes ("Size constraints").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockSizes {
    /// Offsets and lengths must be multiples of this power of two.
    pub minimum: u32,
    /// Offsets and lengths had better be multiples of this power of two.
    pub preferred: u32,
    /// No payload may be longer.
    pub maximum: u32,
}

/// The data of `NBD_REP_INFO`. No `Debug`: names can be secret.
#[derive(Clone, PartialEq, Eq)]
pub enum Info {
    /// Size and transmission flags; never missing.
    Export {
        /// The export's size in bytes.
        size: u64,
        /// `FLAG_…` of the transmission phase.
        flags: u16,
    },
    /// The canonical name.
    Name(String),
    /// A description for people.
    Description(String),
    /// Block sizes.
    BlockSize(BlockSizes),
    /// Something newer, to be ignored.
    Unknown(u16),
}

impl Info {
    /// The data as sent.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Self::Export { size, flags } => [
                &INFO_EXPORT.to_be_bytes()[..],
                &size.to_be_bytes(),
                &flags.to_be_bytes(),
            ]
            .concat(),
            Self::Name(name) => [&INFO_NAME.to_be_bytes(), clip(name).as_bytes()].concat(),
            Self::Description(words) => [&INFO_DESCRIPTION.to_be_bytes(), clip(words).as_bytes()].concat(),
            Self::BlockSize(sizes) => {
                let BlockSizes {
                    minimum,
                    preferred,
                    maximum,
                } = sizes;
                [
                    &INFO_BLOCK_SIZE.to_be_bytes()[..],
                    &minimum.to_be_bytes(),
                    &preferred.to_be_bytes(),
                    &maximum.to_be_bytes(),
                ]
                .concat()
            }
            Self::Unknown(kind) => kind.to_be_bytes().to_vec(),
        }
    }

    /// Reads the data of a server's reply.
    ///
    /// # Errors
    /// `TooLong`, `WrongLength`, `NotText`; `BadValue` for block sizes outside of "Size constraints".
    pub fn parse(data: &[u8]) -> Result<Self, WireError> {
        let mut fields = Fields::new("an NBD information reply", data);
        match fields.u16()? {
            INFO_EXPORT => {
                let info = Self::Export {
                    size: fields.u64()?,
                    flags: fields.u16()?,
                };
                fields.end().map(|()| info)
            }
            INFO_NAME => fields.last_text().map(Self::Name),
            INFO_DESCRIPTION => fields.last_text().map(Self::Description),
            INFO_BLOCK_SIZE => {
                let sizes = BlockSizes {
                    minimum: fields.u32()?,
                    preferred: fields.u32()?,
                    maximum: fields.u32()?,
                };
                fields.end()?;
                sizes.check().map(Self::BlockSize)
            }
            kind => Ok(Self::Unknown(kind)),
        }
    }
}

impl BlockSizes {
    fn check(self) -> Result<Self, WireError> {
        let bad = |what, value| {
            Err(WireError::BadValue {
                what,
                value: u64::from(value),
            })
        };
        if !self.minimum.is_power_of_two() || self.minimum > 1 << 16 {
            return bad("the minimum NBD block size", self.minimum);
        }
        if !self.preferred.is_power_of_two() || self.preferred < self.minimum.max(512) {
            return bad("the preferred NBD block size", self.preferred);
        }
        if self.maximum < self.preferred {
            return bad("the largest NBD payload", self.maximum);
        }
        Ok(self)
    }
}

/// The server's answer to `NBD_OPT_EXPORT_NAME`, which has no header.
#[must_use]
pub fn encode_export_name_answer(size: u64, flags: u16, no_zeroes: bool) -> Vec<u8> {
    let mut out = [&size.to_be_bytes()[..], &flags.to_be_bytes()].concat();
    if !no_zeroes {
        out.resize(out.len() + EXPORT_NAME_ZEROES, 0);
    }
    out
}

/// What a client knows once the server's answers to `NBD_OPT_GO` or `NBD_OPT_INFO` are complete.
///
/// Feed every reply to [`GoAnswer::absorb`] until it says that the last one came.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GoAnswer {
    /// The export's size in bytes and its transmission flags.
    pub export: Option<(u64, u16)>,
    /// Block sizes, when the server named them.
    pub block_sizes: Option<BlockSizes>,
}

impl GoAnswer {
    /// The longest data of a reply that a client has to take; a longer one ends the negotiation.
    pub const MAX_DATA: u32 = 2 + 4096;

    /// Takes one reply to `option` with its data; true when it was the last one.
    ///
    /// # Errors
    /// `Refused` by the server, `UnexpectedReply` (also an end without size), or what is wrong with the data.
    pub fn absorb(&mut self, option: u32, header: OptionReplyHeader, data: &[u8]) -> Result<bool, WireError> {
        let unexpected = WireError::UnexpectedReply {
            option: header.option,
            reply: header.reply,
        };
        if header.option != option {
            return Err(unexpected);
        }
        match header.reply {
            REP_ACK if self.export.is_some() => Ok(true),
            REP_INFO => {
                match Info::parse(data)? {
                    Info::Export { size, flags } => self.export = Some((size, flags)),
                    Info::BlockSize(sizes) => self.block_sizes = Some(sizes),
                    Info::Name(_) | Info::Description(_) | Info::Unknown(_) => {}
                }
                Ok(false)
            }
            reply if reply & REP_FLAG_ERROR != 0 => {
                let words = &data[..data.len().min(super::MAX_STRING)];
                Err(WireError::Refused {
                    reply,
                    message: String::from_utf8_lossy(words).into_owned(),
                })
            }
            _ => Err(unexpected),
        }
    }
}

/// What a reply's type is called in the specification.
#[must_use]
pub fn rep_name(reply: u32) -> &'static str {
    match reply {
        REP_ACK => "NBD_REP_ACK",
        REP_SERVER => "NBD_REP_SERVER",
        REP_INFO => "NBD_REP_INFO",
        REP_META_CONTEXT => "NBD_REP_META_CONTEXT",
        REP_ERR_UNSUP => "NBD_REP_ERR_UNSUP (option not supported)",
        REP_ERR_POLICY => "NBD_REP_ERR_POLICY (forbidden by policy)",
        REP_ERR_INVALID => "NBD_REP_ERR_INVALID (invalid option)",
        REP_ERR_PLATFORM => "NBD_REP_ERR_PLATFORM (not on that platform)",
        REP_ERR_TLS_REQD => "NBD_REP_ERR_TLS_REQD (TLS is required)",
        REP_ERR_UNKNOWN => "NBD_REP_ERR_UNKNOWN (no such export)",
        REP_ERR_SHUTDOWN => "NBD_REP_ERR_SHUTDOWN (server is shutting down)",
        REP_ERR_BLOCK_SIZE_REQD => "NBD_REP_ERR_BLOCK_SIZE_REQD (block sizes must be asked for)",
        REP_ERR_TOO_BIG => "NBD_REP_ERR_TOO_BIG (too large)",
        REP_ERR_EXT_HEADER_REQD => "NBD_REP_ERR_EXT_HEADER_REQD (extended headers required)",
        _ => "an unknown reply",
    }
}

fn length(what: &'static str, len: usize) -> Result<u32, WireError> {
    u32::try_from(len).map_err(|_| WireError::TooLong {
        what,
        len: len as u64,
        max: u64::from(u32::MAX),
    })
}
