//! Fetches the bundle: the handshake with the laptop, then its payload as one encrypted stream.
//!
//! Counterpart: `server::http`. Requests: docs/protocol.md, "HTTP"; what is inside them is
//! [`stiefel_shared::session`]. The parts go to the caller piece by piece as they verify; nothing may be used before
//! [`fetch`] returned, for only then the whole is known to be complete.

use std::io;
use std::net::SocketAddrV6;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::header::HOST;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use stiefel_shared::bundle::Manifest;
use stiefel_shared::discovery::Random;
use stiefel_shared::handover::Part;
use stiefel_shared::key::StickKey;
use stiefel_shared::lend::{Ask, LendError, Loan, MAX_LOAN};
use stiefel_shared::session::{Initiator, Item, MachineId, Receiver, SessionError, SessionName, StreamError};
use stiefel_shared::unlock::{Passphrase, Unlocking};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

/// The longest answer that is read where no stream is expected, in bytes.
const MAX_ANSWER: usize = 4096;
/// The longest answer of a machine that lends disks, in bytes: one frame.
const MAX_LOAN_ANSWER: usize = MAX_LOAN + 64;

/// What the screen can show.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// The handshake succeeded.
    Connected,
    /// The laptop is there but not ready; it says so every few seconds.
    Waiting,
    /// A part grows.
    Part {
        /// Which.
        part: Part,
        /// So many bytes are here.
        done: u64,
        /// Of so many.
        total: u64,
    },
}

/// How long to wait for what.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// For a connection.
    pub connect: Duration,
    /// Without a single byte.
    pub silence: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(5),
            silence: Duration::from_secs(15),
        }
    }
}

/// Why the bundle was not fetched. Nothing of it may be used; search again.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// There is nobody.
    #[error("the laptop at {peer} does not answer; is it still on, and the cable in?")]
    Connect {
        /// Its address.
        peer: SocketAddrV6,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It was there, but is no more.
    #[error("the laptop has gone: nothing more came from it; is it still on, and the cable in?")]
    Gone,
    /// What came is not HTTP.
    #[error("the data was altered or damaged on the way; check the cable, then try again")]
    Http(#[source] hyper::Error),
    /// The laptop does not know what we refer to.
    #[error("the laptop does not accept this stick's request: {reason}")]
    Rejected {
        /// In the laptop's words; not authenticated.
        reason: String,
    },
    /// The laptop speaks another version.
    #[error("the laptop speaks another version of the protocol: {reason}")]
    Version {
        /// In the laptop's words; not authenticated.
        reason: String,
    },
    /// The handshake failed.
    #[error("the laptop could not prove that it has this stick's key, or its answer was altered on the way")]
    Handshake(#[source] SessionError),
    /// The stream failed: altered, truncated, refused by the laptop, or not understood.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// The answer of a machine that lends disks is none, or the question cannot be one.
    #[error(transparent)]
    Loan(LendError),
    /// There is no room for a part.
    #[error("the {} cannot be kept; is there enough memory?", part.name())]
    Store {
        /// Which part.
        part: Part,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// What to fetch from where.
#[derive(Debug, Clone, Copy)]
pub struct Source<'a> {
    /// The laptop's HTTP server, with the interface's scope id.
    pub peer: SocketAddrV6,
    /// The random of its offer.
    pub challenge: &'a Random,
    /// The stick's key.
    pub key: &'a StickKey,
    /// Which machine this is.
    pub machine: MachineId,
    /// How long to wait.
    pub patience: Patience,
}

/// Fetches the bundle from the laptop's HTTP server at `peer` (with the interface's scope id), as it offered with
/// `challenge`. `sink` gets the parts' bytes in the order of the manifest, at most [`Part::limit`] of each.
///
/// # Errors
/// [`FetchError`]; what the sink got is worthless then.
pub async fn fetch(
    peer: SocketAddrV6,
    challenge: &Random,
    key: &StickKey,
    machine: MachineId,
    sink: impl FnMut(Part, &[u8]) -> io::Result<()>,
    progress: impl FnMut(Progress),
) -> Result<Manifest, FetchError> {
    fetch_from(
        Source {
            peer,
            challenge,
            key,
            machine,
            patience: Patience::default(),
        },
        sink,
        progress,
    )
    .await
}

/// [`fetch`] with a patience of the caller's.
///
/// # Errors
/// As there.
pub async fn fetch_from(
    source: Source<'_>,
    sink: impl FnMut(Part, &[u8]) -> io::Result<()>,
    mut progress: impl FnMut(Progress),
) -> Result<Manifest, FetchError> {
    let (initiator, opening) =
        Initiator::start(source.key, source.challenge, source.machine).map_err(FetchError::Handshake)?;
    let mut call = Call::post(&source, "/session", opening).await?;
    let answer = call.whole(&source).await?;
    let opened = initiator.finish(&answer).map_err(FetchError::Handshake)?;
    drop(call);
    progress(Progress::Connected);

    let path = format!("/session/{}/bundle", opened.session);
    let mut call = Call::post(&source, &path, opened.begin).await?;
    call.check(&source).await?;
    let mut stream = opened.stream;
    let mut take = Take {
        sink,
        progress,
        manifest: None,
        done: 0,
    };
    while let Some(bytes) = call.next(&source).await? {
        take.all(&mut stream, &bytes)?;
    }
    stream.finish()?;
    take.manifest.ok_or(FetchError::Stream(StreamError::Truncated))
}

/// Asks a machine that lends disks.
///
/// # Errors
/// [`FetchError`]; also for an answer that is none.
pub async fn ask(source: Source<'_>, question: &Ask) -> Result<Loan, FetchError> {
    let question = question.to_json().map_err(FetchError::Loan)?;
    let (answer, session, stream) = put(source, "lend", &question, MAX_LOAN_ANSWER).await?;
    let json = stream.loan(&answer)?;
    let loan = Loan::parse(&json).map_err(FetchError::Loan)?;
    match &loan {
        Loan::Attached(lent) if lent.session != session.to_string() => Err(StreamError::Order {
            what: "another session's disk",
        }
        .into()),
        _ => Ok(loan),
    }
}

/// Gives a laptop that waits for it a passphrase; an empty one only asks what is wanted.
///
/// # Errors
/// [`FetchError`]; also for an answer that is none.
pub async fn unlock(source: Source<'_>, passphrase: &Passphrase) -> Result<Unlocking, FetchError> {
    let (answer, _, stream) = put(source, "unlock", &passphrase.to_request(), MAX_ANSWER).await?;
    Ok(stream.unlocking(&answer)?)
}

/// A handshake, then one request in it: the whole answer, whose it is, and what opens it.
async fn put(
    source: Source<'_>,
    what: &str,
    question: &[u8],
    limit: usize,
) -> Result<(Vec<u8>, SessionName, Receiver), FetchError> {
    let (initiator, opening) =
        Initiator::start(source.key, source.challenge, source.machine).map_err(FetchError::Handshake)?;
    let mut call = Call::post(&source, "/session", opening).await?;
    let answer = call.whole(&source).await?;
    let opened = initiator.finish(&answer).map_err(FetchError::Handshake)?;
    drop(call);
    let (path, session) = (format!("/session/{}/{what}", opened.session), opened.session);
    let (body, stream) = opened.ask(question).map_err(FetchError::Handshake)?;
    let mut call = Call::post(&source, &path, body).await?;
    call.check(&source).await?;
    let mut answer = Vec::new();
    while let Some(bytes) = call.next(&source).await? {
        answer.extend_from_slice(&bytes);
        if answer.len() > limit {
            return Err(StreamError::Altered.into());
        }
    }
    Ok((answer, session, stream))
}

/// Hands on what comes out of the stream.
struct Take<S, P> {
    sink: S,
    progress: P,
    manifest: Option<Manifest>,
    /// Bytes of the current part so far.
    done: u64,
}

impl<S: FnMut(Part, &[u8]) -> io::Result<()>, P: FnMut(Progress)> Take<S, P> {
    fn all(&mut self, stream: &mut Receiver, mut bytes: &[u8]) -> Result<(), FetchError> {
        while let Some(item) = stream.next(&mut bytes)? {
            match item {
                Item::Waiting => (self.progress)(Progress::Waiting),
                Item::Manifest(manifest) => self.manifest = Some(*manifest),
                Item::Data { part, bytes } => self.write(part, bytes)?,
                Item::End => {}
                // They were not asked for.
                Item::Unlocking(_) => return Err(StreamError::Order { what: "a passphrase" }.into()),
                Item::Loan(_) => return Err(StreamError::Order { what: "a loan" }.into()),
            }
        }
        Ok(())
    }

    fn write(&mut self, part: Part, bytes: &[u8]) -> Result<(), FetchError> {
        (self.sink)(part, bytes).map_err(|source| FetchError::Store { part, source })?;
        self.done += u64::try_from(bytes.len()).unwrap_or(0);
        let parts = self.manifest.iter().flat_map(|manifest| &manifest.payload.parts);
        let total = parts.filter(|entry| entry.part == part).map(|entry| entry.size).sum();
        (self.progress)(Progress::Part {
            part,
            done: self.done,
            total,
        });
        if self.done == total {
            self.done = 0;
        }
        Ok(())
    }
}

/// One request and its answer, on a connection of its own.
struct Call {
    response: Response<Incoming>,
    /// Drives the connection; ends it when dropped.
    _connection: JoinSet<()>,
}

impl Call {
    async fn post(source: &Source<'_>, path: &str, body: Vec<u8>) -> Result<Self, FetchError> {
        let peer = source.peer;
        let connected = tokio::time::timeout(source.patience.connect, TcpStream::connect(peer)).await;
        let stream = connected
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
            .map_err(|source| FetchError::Connect { peer, source })?;
        let (mut send, connection) = quiet(
            source,
            http1::Builder::new().max_headers(32).handshake(TokioIo::new(stream)),
        )
        .await?
        .map_err(http)?;
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            // Its end is seen by who waits for the answer.
            let _ = connection.await;
        });
        let request = Request::post(path)
            .header(HOST, "laptop.stiefel")
            .body(Full::new(Bytes::from(body)))
            .map_err(|_| FetchError::Handshake(SessionError::Malformed))?;
        let response = quiet(source, send.send_request(request)).await?.map_err(http)?;
        Ok(Self {
            response,
            _connection: tasks,
        })
    }

    /// An answer that is not a success, in words.
    async fn check(&mut self, source: &Source<'_>) -> Result<(), FetchError> {
        let status = self.response.status();
        if status == StatusCode::OK {
            return Ok(());
        }
        let words = self.collect(source).await?;
        let words = String::from_utf8_lossy(&words);
        let words: String = words.trim().chars().filter(|c| !c.is_control()).take(300).collect();
        let reason = if words.is_empty() { status.to_string() } else { words };
        Err(match status {
            StatusCode::CONFLICT => FetchError::Version { reason },
            _ => FetchError::Rejected { reason },
        })
    }

    /// The whole of a short answer.
    async fn whole(&mut self, source: &Source<'_>) -> Result<Bytes, FetchError> {
        self.check(source).await?;
        self.collect(source).await
    }

    async fn collect(&mut self, source: &Source<'_>) -> Result<Bytes, FetchError> {
        let body = Limited::new(self.response.body_mut(), MAX_ANSWER);
        match quiet(source, body.collect()).await? {
            Ok(body) => Ok(body.to_bytes()),
            Err(error) => Err(match error.downcast::<hyper::Error>() {
                Ok(error) => http(*error),
                Err(_) => FetchError::Handshake(SessionError::Malformed),
            }),
        }
    }

    /// The next bytes of a long answer; `None` at its end.
    async fn next(&mut self, source: &Source<'_>) -> Result<Option<Bytes>, FetchError> {
        match quiet(source, self.response.body_mut().frame()).await? {
            Some(frame) => Ok(Some(frame.map_err(http)?.into_data().unwrap_or_default())),
            None => Ok(None),
        }
    }
}

/// Waits, but not through a long silence.
async fn quiet<T>(source: &Source<'_>, what: impl Future<Output = T>) -> Result<T, FetchError> {
    tokio::time::timeout(source.patience.silence, what)
        .await
        .map_err(|_| FetchError::Gone)
}

/// Tells a laptop that has gone from bytes that are not HTTP.
fn http(error: hyper::Error) -> FetchError {
    use std::error::Error as _;
    let broken = error
        .source()
        .and_then(|source| source.downcast_ref::<io::Error>())
        .is_some_and(|source| {
            // hyper reports a wrong chunk header as invalid input or data; a broken connection has a kind of its own.
            !matches!(source.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::InvalidData)
        });
    if broken || error.is_incomplete_message() || error.is_closed() || error.is_canceled() {
        FetchError::Gone
    } else {
        FetchError::Http(error)
    }
}
