//! Requests and their answers; docs/protocol.md, "HTTP".

use std::collections::VecDeque;
use std::net::SocketAddrV6;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt, Either, Full, Limited};
use hyper::body::Incoming;
use hyper::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use stiefel_shared::bundle::ControlKey;
use stiefel_shared::discovery::Responder;
use stiefel_shared::lend::{Ask, Loan};
use stiefel_shared::session::{Accepted, GoodbyeError, Opening, ReceivedGoodbye, SessionError, SessionName};
use stiefel_shared::unlock::{Outcome, Passphrase};
use tokio::sync::oneshot;

use super::feed::{Frames, feed};
use super::{Begin, Limits, Refusal, SessionHost, Wire, lock};

/// The largest body of any request, in bytes; the longest is a question to a machine that lends disks.
const MAX_BODY: usize = 512;
/// How many sessions' keys are kept for their goodbyes.
const MAX_SESSIONS: usize = 256;
/// How long the laptop waits for its answer to a goodbye to leave.
const PARTING: Duration = Duration::from_secs(5);

const EXPLANATION: &str = "\
This is stiefel. This computer is lending its disk to another computer over the network cable, as if the disk had
been unscrewed and moved: the other one boots from it.

There is nothing to see or to set here. The computer that boots needs a stick (a USB drive) made by this computer's
owner; without its key nothing is handed out.

When the other computer is switched off, this one goes back to its own work.
";

pub type Reply = Response<Either<Full<Bytes>, Frames>>;

/// A handshake that was answered and waits for the request that proves it fresh.
struct Pending {
    accepted: Accepted,
    key: String,
    peer: SocketAddrV6,
    at: Instant,
}

impl Pending {
    /// What is left of the handshake, and who begins with it.
    fn begin(self, peer: SocketAddrV6) -> (Accepted, Begin) {
        let begin = Begin {
            peer,
            key: self.key,
            machine: self.accepted.machine,
            session: self.accepted.session,
        };
        (self.accepted, begin)
    }
}

/// A session's secret, and the goodbye that ended it.
struct Session {
    name: SessionName,
    control: ControlKey,
    /// The goodbye's body and the answer to it, once accepted.
    parted: tokio::sync::Mutex<Option<(Bytes, Bytes)>>,
}

/// The keys of the sessions that began; the oldest are forgotten.
#[derive(Default)]
pub struct Sessions(Mutex<VecDeque<Arc<Session>>>);

impl Sessions {
    /// Remembers a session, so that it can say goodbye.
    pub fn insert(&self, name: SessionName, control: ControlKey) {
        let mut sessions = lock(&self.0);
        if sessions.len() >= MAX_SESSIONS {
            sessions.pop_front();
        }
        sessions.push_back(Arc::new(Session {
            name,
            control,
            parted: tokio::sync::Mutex::default(),
        }));
    }

    fn find(&self, name: SessionName) -> Option<Arc<Session>> {
        lock(&self.0).iter().find(|session| session.name == name).cloned()
    }
}

/// Everything that requests share.
pub struct Server<H> {
    pub limits: Limits,
    host: Arc<H>,
    responder: Arc<Mutex<Responder>>,
    handshakes: Mutex<VecDeque<Pending>>,
    sessions: Arc<Sessions>,
}

impl<H: SessionHost> Server<H> {
    pub fn new(host: Arc<H>, responder: Arc<Mutex<Responder>>, limits: Limits) -> Self {
        Self {
            limits,
            host,
            responder,
            handshakes: Mutex::default(),
            sessions: Arc::default(),
        }
    }

    /// Lets a session say goodbye that an earlier process has begun.
    pub fn resume(&self, session: SessionName, control: ControlKey) {
        self.sessions.insert(session, control);
    }

    /// Answers a request.
    pub async fn answer(&self, request: Request<Incoming>, wire: Wire) -> Reply {
        let path = request.uri().path().to_owned();
        let steps: Vec<&str> = path.split('/').skip(1).take(4).collect();
        let allowed = match steps.as_slice() {
            [""] => "GET, HEAD",
            ["session"] | ["session", _, "bundle" | "goodbye" | "lend" | "unlock"] => "POST",
            _ => return text(StatusCode::NOT_FOUND, "There is nothing here; see /."),
        };
        let posted = request.method() == Method::POST;
        let looked = [Method::GET, Method::HEAD].contains(request.method());
        if (allowed == "POST" && !posted) || (allowed != "POST" && !looked) {
            let mut reply = text(StatusCode::METHOD_NOT_ALLOWED, "This does not work here; see /.");
            reply.headers_mut().insert(ALLOW, HeaderValue::from_static(allowed));
            return reply;
        }
        if looked {
            return text(StatusCode::OK, EXPLANATION);
        }
        let body = match self.body(request).await {
            Ok(body) => body,
            Err(reply) => return *reply,
        };
        match steps.as_slice() {
            ["session"] => self.open(&body, &wire),
            ["session", name, what] => match name.parse() {
                Ok(name) if *what == "bundle" => self.bundle(name, &body, wire),
                Ok(name) if *what == "unlock" => self.unlock(name, &body, wire).await,
                Ok(name) if *what == "lend" => self.lend(name, &body, &wire).await,
                Ok(name) => self.goodbye(name, body, wire).await,
                Err(_) => text(StatusCode::NOT_FOUND, "There is no such session."),
            },
            _ => text(StatusCode::NOT_FOUND, "There is nothing here; see /."),
        }
    }

    async fn body(&self, request: Request<Incoming>) -> Result<Bytes, Box<Reply>> {
        let collected = Limited::new(request.into_body(), MAX_BODY).collect();
        match tokio::time::timeout(self.limits.body, collected).await {
            Ok(Ok(body)) => Ok(body.to_bytes()),
            Ok(Err(_)) => Err(Box::new(text(
                StatusCode::PAYLOAD_TOO_LARGE,
                "The request is too long or broken.",
            ))),
            Err(_) => Err(Box::new(text(
                StatusCode::REQUEST_TIMEOUT,
                "The request took too long.",
            ))),
        }
    }

    /// Answers a handshake's first message. It may be a recording: this makes nothing but an entry in a bounded table.
    fn open(&self, body: &[u8], wire: &Wire) -> Reply {
        let opening = match Opening::parse(body) {
            Ok(opening) => opening,
            Err(error @ SessionError::Version { .. }) => return text(StatusCode::CONFLICT, &error.to_string()),
            Err(error) => return text(StatusCode::BAD_REQUEST, &error.to_string()),
        };
        let unknown = || {
            text(
                StatusCode::FORBIDDEN,
                "No offer to you goes with this request; search again.",
            )
        };
        let now = Instant::now();
        let Some(key) = lock(&self.responder).offered(now, &wire.peer, &opening.offer).cloned() else {
            return unknown();
        };
        let accepted = SessionName::generate()
            .map_err(SessionError::Random)
            .and_then(|session| opening.accept(&key, session));
        let accepted = match accepted {
            Ok(accepted) => accepted,
            Err(SessionError::Unverified | SessionError::Malformed) => return unknown(),
            Err(error) => return text(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
        };
        let mut handshakes = lock(&self.handshakes);
        handshakes.retain(|old| now.saturating_duration_since(old.at) < self.limits.handshake);
        if handshakes.len() >= self.limits.handshakes {
            return text(
                StatusCode::SERVICE_UNAVAILABLE,
                "Too many desktops ask at once; try again in a minute.",
            );
        }
        if !lock(&self.responder).spend(&opening.offer) {
            return unknown();
        }
        let answer = Bytes::from(accepted.answer.clone());
        handshakes.push_back(Pending {
            accepted,
            key: key.name.clone(),
            peer: wire.peer,
            at: now,
        });
        bytes(Either::Left(Full::new(answer)))
    }

    /// Begins a session once its desktop proved to be alive, and streams the bundle.
    fn bundle(&self, name: SessionName, body: &[u8], wire: Wire) -> Reply {
        let Some(pending) = self.pending(name, &wire) else {
            return text(StatusCode::NOT_FOUND, "There is no such session.");
        };
        let (accepted, begin) = pending.begin(wire.peer);
        let Ok(sender) = accepted.begin(body) else {
            return text(StatusCode::FORBIDDEN, "The request does not verify; search again.");
        };
        let frames = feed(
            Arc::clone(&self.host),
            Arc::clone(&self.sessions),
            begin,
            sender,
            self.limits,
            wire.cut,
        );
        bytes(Either::Right(frames))
    }

    /// Takes a handshake that was answered to this peer out of the table: it has one try.
    fn pending(&self, name: SessionName, wire: &Wire) -> Option<Pending> {
        let mut handshakes = lock(&self.handshakes);
        let index = handshakes.iter().position(|pending| {
            let place = |peer: &SocketAddrV6| (*peer.ip(), peer.scope_id());
            pending.accepted.session == name
                && place(&pending.peer) == place(&wire.peer)
                && pending.at.elapsed() < self.limits.handshake
        });
        index.and_then(|index| handshakes.remove(index))
    }

    /// Answers a question about single disks, once who asks proved to be alive.
    async fn lend(&self, name: SessionName, body: &[u8], wire: &Wire) -> Reply {
        let Some(pending) = self.pending(name, wire) else {
            return text(StatusCode::NOT_FOUND, "There is no such session.");
        };
        let (accepted, begin) = pending.begin(wire.peer);
        let Ok((mut sender, question)) = accepted.begin_asking(body) else {
            return text(StatusCode::FORBIDDEN, "The request does not verify; search again.");
        };
        // In a task of its own: what has begun must not be left half done when the other side goes away.
        let host = Arc::clone(&self.host);
        let answer = match Ask::parse(&question) {
            Ok(ask) => tokio::spawn(async move { host.lend(begin, ask).await }).await,
            Err(error) => Ok(Err(Refusal {
                reason: error.to_string(),
            })),
        };
        let reason = match answer {
            Ok(Ok(loan)) => match loan.to_json().map(|json| sender.loan(&json)) {
                Ok(Ok(frame)) => {
                    if let Loan::Attached(lent) = loan {
                        self.sessions.insert(name, lent.control.clone());
                    }
                    return bytes(Either::Left(Full::new(Bytes::from(frame))));
                }
                Ok(Err(error)) => error.to_string(),
                Err(error) => error.to_string(),
            },
            Ok(Err(refusal)) => refusal.reason,
            Err(_) => "the other machine failed; see its screen".to_owned(),
        };
        match sender.refusal(&reason) {
            Ok(frame) => bytes(Either::Left(Full::new(Bytes::from(frame)))),
            Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
        }
    }

    /// Takes a passphrase, once who sends it proved to be alive.
    async fn unlock(&self, name: SessionName, body: &[u8], mut wire: Wire) -> Reply {
        let Some(pending) = self.pending(name, &wire) else {
            return text(StatusCode::NOT_FOUND, "There is no such session.");
        };
        let (accepted, begin) = pending.begin(wire.peer);
        let Ok((mut sender, request)) = accepted.begin_asking(body) else {
            return text(StatusCode::FORBIDDEN, "The request does not verify; search again.");
        };
        let passphrase = match Passphrase::parse(&request) {
            Ok(passphrase) => passphrase,
            Err(error) => return text(StatusCode::BAD_REQUEST, &error.to_string()),
        };
        // In a task of its own: what was opened counts also if the other side goes away meanwhile.
        let host = Arc::clone(&self.host);
        let answer = tokio::spawn(async move {
            let answer = host.unlock(begin, passphrase).await;
            if answer.as_ref().is_ok_and(|answer| answer.outcome == Outcome::Open) {
                tokio::spawn(async move {
                    // Until the connection is closed, when the answer has left; the laptop goes on even if it never is.
                    let _ = tokio::time::timeout(PARTING, wire.closed.changed()).await;
                    host.unlocked();
                });
            }
            answer
        });
        let frame = match answer.await {
            Ok(Ok(answer)) => sender.unlocking(&answer),
            Ok(Err(refusal)) => sender.refusal(&refusal.reason),
            Err(_) => sender.refusal("the laptop failed; see its screen"),
        };
        match frame {
            Ok(frame) => bytes(Either::Left(Full::new(Bytes::from(frame)))),
            Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
        }
    }

    /// Hears a goodbye. The work goes on if the desktop's connection breaks; it may ask again for the answer.
    async fn goodbye(&self, name: SessionName, body: Bytes, wire: Wire) -> Reply {
        let Some(session) = self.sessions.find(name) else {
            return text(StatusCode::NOT_FOUND, "There is no such session.");
        };
        let Ok(heard) = ReceivedGoodbye::open(&session.control, name, &body) else {
            return text(StatusCode::FORBIDDEN, "The request does not verify.");
        };
        let (tell, told) = oneshot::channel();
        let host = Arc::clone(&self.host);
        tokio::spawn(part(host, session, heard, body, wire, tell));
        match told.await {
            Ok(Ok(Some(answer))) => bytes(Either::Left(Full::new(answer))),
            Ok(Ok(None)) => text(StatusCode::GONE, "This session has said goodbye before."),
            Ok(Err(error)) => text(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
            Err(_) => text(
                StatusCode::INTERNAL_SERVER_ERROR,
                "The goodbye failed; see the laptop's screen.",
            ),
        }
    }
}

type Told = Result<Option<Bytes>, GoodbyeError>;

/// Does what a goodbye asks for, once; tells the answer, `None` if another goodbye came before.
async fn part<H: SessionHost>(
    host: Arc<H>,
    session: Arc<Session>,
    heard: ReceivedGoodbye,
    body: Bytes,
    mut wire: Wire,
    tell: oneshot::Sender<Told>,
) {
    // Held while the disk is flushed: the same goodbye sent again waits here for the same answer.
    let mut parted = session.parted.lock().await;
    if let Some((before, answer)) = &*parted {
        let again = (*before == body).then(|| answer.clone());
        // A desktop that has gone needs no answer.
        let _ = tell.send(Ok(again));
        return;
    }
    let outcome = host.goodbye(session.name, heard.goodbye).await;
    let accepted = outcome.is_ok();
    let outcome = outcome.as_ref().copied().map_err(|refusal| refusal.reason.as_str());
    let answer = heard.answer(&session.control, session.name, outcome).map(Bytes::from);
    if accepted && let Ok(answer) = &answer {
        *parted = Some((body, answer.clone()));
    }
    drop(parted);
    let _ = tell.send(answer.map(Some));
    if accepted {
        // Until the connection is closed, when the answer has left; the laptop goes even if it never is.
        let _ = tokio::time::timeout(PARTING, wire.closed.changed()).await;
        host.parted(session.name, heard.goodbye);
    }
}

fn text(status: StatusCode, words: &str) -> Reply {
    let line = if words.ends_with('\n') {
        words.to_owned()
    } else {
        format!("{words}\n")
    };
    let mut reply = bytes(Either::Left(Full::new(Bytes::from(line))));
    *reply.status_mut() = status;
    reply
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    reply
}

fn bytes(body: Either<Full<Bytes>, Frames>) -> Reply {
    let mut reply = Response::new(body);
    let headers = reply.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    reply
}
