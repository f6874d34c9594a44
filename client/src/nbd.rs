//! The NBD client's half that is not the kernel's: connects, negotiates, and leaves a socket the kernel can take over.
//!
//! Counterpart: `server::nbd`. Specification: NBD `doc/proto.md`, "Fixed newstyle negotiation".
//! The kernel's client speaks simple replies only, so structured replies are not asked for.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use stiefel_shared::nbd::{
    GREETING_LEN, GoAnswer, INFO_BLOCK_SIZE, InfoRequest, OPT_GO, OPTION_REPLY_HEADER_LEN, OptionReplyHeader,
    WireError, encode_client_flags, encode_option, parse_greeting,
};

/// How long one connection attempt, or one answer of the negotiation, may take.
const STEP: Duration = Duration::from_secs(10);
/// The most replies to one `NBD_OPT_GO`: a server sends four at most, a hostile one must not keep us.
const MAX_REPLIES: usize = 32;

/// Why no export was reached.
#[derive(Debug, thiserror::Error)]
pub enum NbdError {
    /// No TCP connection.
    #[error(
        "cannot connect to the laptop's disk at {at}; is the cable in, and does the laptop's screen say that it serves?"
    )]
    Connect {
        /// Where.
        at: SocketAddr,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The connection broke, or nothing came.
    #[error("the laptop's disk server at {at} went silent while it was asked for the disk")]
    Talk {
        /// Where.
        at: SocketAddr,
        /// The kernel's answer.
        source: io::Error,
    },
    /// It answered, but not as it should.
    #[error("the laptop's disk server did not grant the disk")]
    Refused(#[from] WireError),
}

/// A granted export.
#[derive(Debug)]
pub struct Granted {
    /// In transmission phase; blocking, without time-outs.
    pub socket: TcpStream,
    /// The export's size in bytes.
    pub size: u64,
    /// Transmission flags, as the kernel's client wants them.
    pub flags: u16,
}

/// Connects to `at` and asks for `export`.
///
/// # Errors
/// [`NbdError`]; the connection is closed then.
pub fn connect(at: SocketAddr, export: &str) -> Result<Granted, NbdError> {
    let socket = TcpStream::connect_timeout(&at, STEP).map_err(|source| NbdError::Connect { at, source })?;
    let talk = |source| NbdError::Talk { at, source };
    let prepare = |step| {
        socket.set_nodelay(true)?;
        socket.set_read_timeout(step)?;
        socket.set_write_timeout(step)
    };
    prepare(Some(STEP)).map_err(talk)?;
    let answer = negotiate(&socket, export).map_err(|error| match error {
        Failure::Io(source) => talk(source),
        Failure::Wire(error) => error.into(),
    })?;
    prepare(None).map_err(talk)?;
    // `absorb` ends only with a size.
    let (size, flags) = answer.export.unwrap_or_default();
    Ok(Granted { socket, size, flags })
}

enum Failure {
    Io(io::Error),
    Wire(WireError),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<WireError> for Failure {
    fn from(error: WireError) -> Self {
        Self::Wire(error)
    }
}

fn negotiate(mut stream: impl Read + Write, export: &str) -> Result<GoAnswer, Failure> {
    let mut greeting = [0; GREETING_LEN];
    stream.read_exact(&mut greeting)?;
    let flags = parse_greeting(&greeting)?;
    let request = InfoRequest {
        name: export.to_owned(),
        wanted: vec![INFO_BLOCK_SIZE],
    };
    let option = encode_option(OPT_GO, &request.encode()?)?;
    stream.write_all(&[&encode_client_flags(flags)[..], &option].concat())?;
    let mut answer = GoAnswer::default();
    for _ in 0..MAX_REPLIES {
        let mut header = [0; OPTION_REPLY_HEADER_LEN];
        stream.read_exact(&mut header)?;
        let header = OptionReplyHeader::parse(&header)?;
        if header.len > GoAnswer::MAX_DATA {
            return Err(WireError::TooLong {
                what: "an NBD option reply",
                len: u64::from(header.len),
                max: u64::from(GoAnswer::MAX_DATA),
            }
            .into());
        }
        let mut data = vec![0; header.len as usize];
        stream.read_exact(&mut data)?;
        if answer.absorb(OPT_GO, header, &data)? {
            return Ok(answer);
        }
    }
    Err(io::Error::from(io::ErrorKind::InvalidData).into())
}
