//! The server's side of the negotiation. Pure: bytes in, bytes out; [`run`] moves them over any stream.
//!
//! Counterparts: `client::nbd`, libnbd, qemu, nbd-client. Specification: "Handshake", "Option types".
//! Refused: everything but fixed newstyle; STARTTLS and unknown options (`NBD_REP_ERR_UNSUP`).

use std::io::{self, Read, Write};

use stiefel_shared::nbd::{
    BASE_ALLOCATION, BlockSizes, FLAG_SEND_DF, INFO_BLOCK_SIZE, INFO_DESCRIPTION, INFO_NAME, Info, InfoRequest,
    MAX_STRING, MetaRequest, OPT_ABORT, OPT_EXPORT_NAME, OPT_EXTENDED_HEADERS, OPT_GO, OPT_INFO, OPT_LIST,
    OPT_LIST_META_CONTEXT, OPT_SET_META_CONTEXT, OPT_STRUCTURED_REPLY, OPTION_HEADER_LEN, OptionHeader, REP_ACK,
    REP_ERR_EXT_HEADER_REQD, REP_ERR_INVALID, REP_ERR_SHUTDOWN, REP_ERR_TOO_BIG, REP_ERR_UNKNOWN, REP_ERR_UNSUP,
    REP_INFO, REP_META_CONTEXT, REP_SERVER, WireError, encode_export_name_answer, encode_greeting, encode_listed,
    encode_meta_context, parse_client_flags, put_option_reply,
};
use thiserror::Error;

use super::request::Bounds;

/// Options one client may send.
const MAX_OPTIONS: u32 = 128;
/// Data of one option that are looked at; longer ones are skipped and refused.
const MAX_OPTION: u32 = 16 << 10;
/// Data of all options together.
const MAX_TOTAL: u64 = 512 << 10;
/// The number by which `base:allocation` goes in one connection.
pub const ALLOCATION_CONTEXT: u32 = 1;

/// One entry of the list of exports. No `Debug`: names can be secret.
#[derive(Clone, PartialEq, Eq)]
pub struct Listed {
    /// The name to ask for.
    pub name: String,
    /// Words for people.
    pub description: String,
}

/// What an export has to offer. No `Debug`: names can be secret.
#[derive(Clone, PartialEq, Eq)]
pub struct Offer {
    /// The canonical name.
    pub name: String,
    /// Words for people; may be empty.
    pub description: String,
    /// Size in bytes.
    pub size: u64,
    /// Transmission flags, without those that depend on structured replies.
    pub flags: u16,
    /// Block sizes.
    pub block_sizes: BlockSizes,
}

/// Something that can be chosen.
pub trait Offered {
    /// What it has to offer.
    fn offer(&self) -> Offer;
}

/// What one client may choose from.
pub trait Catalogue {
    /// What is chosen.
    type Export: Offered;
    /// The export called `name`; empty for the default one.
    fn export(&self, name: &str) -> Option<Self::Export>;
    /// The same, only to be told of: whoever has it keeps it.
    fn look(&self, name: &str) -> Option<Self::Export>;
    /// What `NBD_OPT_LIST` shows.
    fn list(&self) -> Vec<Listed>;
    /// Whether the server is going away.
    fn closing(&self) -> bool;
}

/// The negotiation's good end.
#[derive(Debug)]
pub struct Agreed<E> {
    /// What the client chose.
    pub export: E,
    /// What it may ask for.
    pub bounds: Bounds,
    /// The form of requests and replies.
    pub style: Style,
}

/// The form of requests and replies in the transmission phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    /// Simple replies.
    Simple,
    /// Structured replies.
    Structured,
    /// Extended headers both ways, which imply structured replies.
    Extended,
}

/// What comes after an option was answered.
#[derive(Debug)]
pub enum Next<E> {
    /// Another option.
    Option,
    /// Transmission.
    Transmission(Agreed<E>),
    /// The client went away in good order.
    Abort,
}

/// Why a connection must be closed during the negotiation.
#[derive(Debug, Error)]
pub enum NegotiationError {
    /// Receiving or sending failed, or the time was up.
    #[error("the NBD client went away or was too slow during the negotiation")]
    Stream(#[from] io::Error),
    /// The client broke the protocol.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The client sent more options or data than any real one does.
    #[error("the NBD client sent too many options or too much data; dropping it")]
    TooMuch,
    /// `NBD_OPT_EXPORT_NAME` cannot be refused otherwise.
    #[error("the NBD client asked for an export that there is not, by an option that only closing can refuse")]
    NoSuchExport,
}

/// How much of an option's data to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Intake {
    /// All of this many bytes.
    Take(usize),
    /// Skip this many bytes and answer without them.
    Skip(u64),
}

/// The state between two options.
pub struct Negotiation<'a, C: Catalogue> {
    catalogue: &'a C,
    no_zeroes: bool,
    style: Style,
    /// The export name for which `base:allocation` is selected.
    allocation_of: Option<String>,
    options: u32,
    total: u64,
}

impl<'a, C: Catalogue> Negotiation<'a, C> {
    /// Begins after the client's answer to the greeting.
    ///
    /// # Errors
    /// The connection must be closed.
    pub fn new(catalogue: &'a C, client_flags: [u8; 4]) -> Result<Self, WireError> {
        let no_zeroes = parse_client_flags(client_flags)?;
        Ok(Self {
            catalogue,
            no_zeroes,
            style: Style::Simple,
            allocation_of: None,
            options: 0,
            total: 0,
        })
    }

    /// Takes an option's header and says what to do with its data, then call [`Negotiation::answer`].
    ///
    /// # Errors
    /// The connection must be closed.
    pub fn header(&mut self, bytes: &[u8; OPTION_HEADER_LEN]) -> Result<(u32, Intake), NegotiationError> {
        let OptionHeader { option, len } = OptionHeader::parse(bytes)?;
        self.options += 1;
        self.total += u64::from(len);
        if self.options > MAX_OPTIONS || self.total > MAX_TOTAL {
            return Err(NegotiationError::TooMuch);
        }
        if option == OPT_EXPORT_NAME && len as usize > MAX_STRING {
            return Err(NegotiationError::NoSuchExport);
        }
        Ok((
            option,
            if len > MAX_OPTION {
                Intake::Skip(u64::from(len))
            } else {
                Intake::Take(len as usize)
            },
        ))
    }

    /// Answers one option; `data` is `None` when they were skipped. Appends what is to be sent to `out`.
    ///
    /// # Errors
    /// The connection must be closed.
    pub fn answer(
        &mut self,
        option: u32,
        data: Option<&[u8]>,
        out: &mut Vec<u8>,
    ) -> Result<Next<C::Export>, NegotiationError> {
        if option == OPT_EXPORT_NAME {
            return self.export_name(data.unwrap_or_default(), out);
        }
        if option == OPT_ABORT {
            put_option_reply(out, option, REP_ACK, &[])?;
            return Ok(Next::Abort);
        }
        let answered = match (data, option) {
            _ if self.catalogue.closing() => Err((REP_ERR_SHUTDOWN, "the server is going away")),
            (None, _) => Err((REP_ERR_TOO_BIG, "more data than this option can need")),
            (Some(data), OPT_LIST) => self.list(data, out),
            (Some(data), OPT_INFO | OPT_GO) => self.info(option, data, out),
            (Some(_), OPT_STRUCTURED_REPLY) if self.style == Style::Extended => {
                Err((REP_ERR_EXT_HEADER_REQD, "extended headers were agreed on already"))
            }
            (Some(data), OPT_STRUCTURED_REPLY) => empty(data).map(|()| {
                self.style = Style::Structured;
                Next::Option
            }),
            (Some(data), OPT_EXTENDED_HEADERS) => empty(data).map(|()| {
                self.style = Style::Extended;
                Next::Option
            }),
            (Some(data), OPT_LIST_META_CONTEXT) => self.list_contexts(data, out),
            (Some(data), OPT_SET_META_CONTEXT) => self.set_context(data, out),
            _ => Err((REP_ERR_UNSUP, "this server does not know the option")),
        };
        match answered {
            Ok(next) => {
                put_option_reply(out, option, REP_ACK, &[])?;
                Ok(next)
            }
            Err((error, words)) => {
                put_option_reply(out, option, error, words.as_bytes())?;
                Ok(Next::Option)
            }
        }
    }

    fn export_name(&mut self, data: &[u8], out: &mut Vec<u8>) -> Result<Next<C::Export>, NegotiationError> {
        let name = std::str::from_utf8(data).map_err(|_| NegotiationError::NoSuchExport)?;
        // Extended headers forbid this option.
        if self.catalogue.closing() || self.style == Style::Extended {
            return Err(NegotiationError::NoSuchExport);
        }
        let export = self.catalogue.export(name).ok_or(NegotiationError::NoSuchExport)?;
        let agreed = self.agree(name, export, false);
        out.extend_from_slice(&encode_export_name_answer(
            agreed.bounds.size,
            agreed.bounds.flags,
            self.no_zeroes,
        ));
        Ok(Next::Transmission(agreed))
    }

    /// What holds for an export; a client that was not told of block sizes need not keep to them.
    fn agree(&self, name: &str, export: C::Export, told: bool) -> Agreed<C::Export> {
        let offer = export.offer();
        let bounds = Bounds {
            size: offer.size,
            flags: offer.flags | if self.style == Style::Simple { 0 } else { FLAG_SEND_DF },
            minimum: if told { offer.block_sizes.minimum } else { 1 },
            maximum: offer.block_sizes.maximum,
            block_status: self.style != Style::Simple && self.allocation_of.as_deref() == Some(name),
            extended: self.style == Style::Extended,
        };
        Agreed {
            export,
            bounds,
            style: self.style,
        }
    }

    fn list(&self, data: &[u8], out: &mut Vec<u8>) -> Answered<C::Export> {
        empty(data)?;
        for entry in self.catalogue.list() {
            put(
                out,
                OPT_LIST,
                REP_SERVER,
                &encode_listed(&entry.name, &entry.description),
            )?;
        }
        Ok(Next::Option)
    }

    fn info(&self, option: u32, data: &[u8], out: &mut Vec<u8>) -> Answered<C::Export> {
        let request = InfoRequest::parse(data).map_err(|_| INVALID)?;
        let chosen = match option {
            OPT_GO => self.catalogue.export(&request.name),
            _ => self.catalogue.look(&request.name),
        };
        let export = chosen.ok_or(UNKNOWN)?;
        let offer = export.offer();
        let told = request.wanted.contains(&INFO_BLOCK_SIZE);
        let agreed = self.agree(&request.name, export, told);
        let mut infos = vec![Info::Export {
            size: agreed.bounds.size,
            flags: agreed.bounds.flags,
        }];
        if request.wanted.contains(&INFO_NAME) {
            infos.push(Info::Name(offer.name));
        }
        if request.wanted.contains(&INFO_DESCRIPTION) && !offer.description.is_empty() {
            infos.push(Info::Description(offer.description));
        }
        if told {
            infos.push(Info::BlockSize(offer.block_sizes));
        }
        for info in infos {
            put(out, option, REP_INFO, &info.encode())?;
        }
        Ok(if option == OPT_GO {
            Next::Transmission(agreed)
        } else {
            Next::Option
        })
    }

    fn contexts(&self, data: &[u8]) -> Result<MetaRequest, (u32, &'static str)> {
        if self.style == Style::Simple {
            return Err((REP_ERR_INVALID, "structured replies must be agreed on first"));
        }
        let request = MetaRequest::parse(data).map_err(|_| INVALID)?;
        self.catalogue.look(&request.name).ok_or(UNKNOWN)?;
        Ok(request)
    }

    fn list_contexts(&self, data: &[u8], out: &mut Vec<u8>) -> Answered<C::Export> {
        let queries = self.contexts(data)?.queries;
        if queries.is_empty() || queries.iter().any(|query| query == BASE_ALLOCATION || query == "base:") {
            put(
                out,
                OPT_LIST_META_CONTEXT,
                REP_META_CONTEXT,
                &encode_meta_context(0, BASE_ALLOCATION),
            )?;
        }
        Ok(Next::Option)
    }

    fn set_context(&mut self, data: &[u8], out: &mut Vec<u8>) -> Answered<C::Export> {
        // Also a request that fails replaces what was selected before.
        self.allocation_of = None;
        let request = self.contexts(data)?;
        if request.queries.iter().any(|query| query == BASE_ALLOCATION) {
            let context = encode_meta_context(ALLOCATION_CONTEXT, BASE_ALLOCATION);
            put(out, OPT_SET_META_CONTEXT, REP_META_CONTEXT, &context)?;
            self.allocation_of = Some(request.name);
        }
        Ok(Next::Option)
    }
}

/// What to do next, or the error reply to send.
type Answered<E> = Result<Next<E>, (u32, &'static str)>;

const INVALID: (u32, &str) = (REP_ERR_INVALID, "the option's data are malformed");
const UNKNOWN: (u32, &str) = (REP_ERR_UNKNOWN, "no such export");

fn empty(data: &[u8]) -> Result<(), (u32, &'static str)> {
    if data.is_empty() {
        Ok(())
    } else {
        Err((REP_ERR_INVALID, "this option has no data"))
    }
}

fn put(out: &mut Vec<u8>, option: u32, reply: u32, data: &[u8]) -> Result<(), (u32, &'static str)> {
    put_option_reply(out, option, reply, data).map_err(|_| (REP_ERR_TOO_BIG, "the answer is too large"))
}

/// Negotiates over a stream; `None` when the client went away in good order.
///
/// # Errors
/// See [`NegotiationError`]; the connection must be closed.
pub fn run<C: Catalogue>(
    stream: &mut (impl Read + Write),
    catalogue: &C,
) -> Result<Option<Agreed<C::Export>>, NegotiationError> {
    stream.write_all(&encode_greeting())?;
    let mut flags = [0; 4];
    stream.read_exact(&mut flags)?;
    let mut negotiation = Negotiation::new(catalogue, flags)?;
    loop {
        let mut header = [0; OPTION_HEADER_LEN];
        stream.read_exact(&mut header)?;
        let (option, intake) = negotiation.header(&header)?;
        let data = match intake {
            Intake::Take(len) => {
                let mut data = vec![0; len];
                stream.read_exact(&mut data)?;
                Some(data)
            }
            Intake::Skip(len) => {
                if io::copy(&mut Read::take(&mut *stream, len), &mut io::sink())? < len {
                    return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
                }
                None
            }
        };
        let mut out = Vec::new();
        let next = negotiation.answer(option, data.as_deref(), &mut out)?;
        let sent = stream.write_all(&out).and_then(|()| stream.flush());
        match next {
            // A client may well be gone before it hears the answer.
            Next::Abort => return Ok(None),
            Next::Transmission(agreed) => return sent.map(|()| Some(agreed)).map_err(Into::into),
            Next::Option => sent?,
        }
    }
}

#[cfg(test)]
#[path = "negotiate_tests.rs"]
mod tests;
