//! The service's control socket: who may ask it to stay, and what it tells those who watch.
//!
//! The other side is `stiefel cancel` and `stiefel notify` ([`client`]), both started by a person. One connection for each
//! request, a line of it: `cancel`, answered by one [`Answer`] as a line of JSON, or `watch`, answered by a [`Notice`] whenever
//! there is one.
//!
//! Everybody may connect (the socket's mode is 0666); who it is, is the kernel's word (SO_PEERCRED, unix(7)). `cancel` is for
//! root, and for the user whose session is in front at this laptop's own screen, by logind: who could switch the laptop off,
//! too. `watch` is for every user who is logged in; nothing secret is said. All others are told that they are denied. Connections are
//! bounded in number, for each user and in all; requests in length and time; nobody who does not read is waited for.

pub(super) mod client;

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::net::{SendFlags, send, sockopt::socket_peercred};
use serde::{Deserialize, Serialize};

use super::{log, sessions};

/// The socket's folder: the unit's RuntimeDirectory=. Not /run/stiefel, which is that of a desktop's keeper and of borrowed disks:
/// systemd removes this one when the service ends.
pub const FOLDER: &str = "/run/stiefel-autokexec";
/// The socket in it.
const SOCKET: &str = "control";
/// Connections of one user at a time.
const MAX_OF_ONE: usize = 8;
/// Connections of all users but root, who is never kept out by others.
const MAX_OF_ALL: usize = 64;
/// How long a request may take in all, and one write of an answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long a wish may wait until it is known what becomes of it: a little longer than who wished waits.
const OUTCOME: Duration = client::PATIENCE.saturating_add(Duration::from_secs(10));
/// The longest request, in bytes.
const MAX_REQUEST: usize = 16;
/// The longest line that is sent, in bytes; longer reasons are cut.
pub(super) const MAX_LINE: usize = 8 * 1024;
/// The longest reason, in characters.
const MAX_REASON: usize = 1000;

/// What the service tells those who watch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "notice", rename_all = "kebab-case")]
pub enum Notice {
    /// The laptop leaves its OS, unless somebody cancels it.
    Countdown {
        /// In so many seconds.
        seconds: u64,
        /// What triggered it.
        why: String,
    },
    /// It leaves now.
    Leaving {
        /// What triggered it.
        why: String,
    },
    /// Somebody or something has stopped the countdown.
    Cancelled {
        /// Who or what.
        why: String,
    },
    /// It was triggered, and stays.
    Refused {
        /// Why.
        why: String,
    },
}

/// What becomes of a wish to stay.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "kebab-case")]
pub enum Answer {
    /// The laptop stays because of it.
    Cancelled,
    /// It stays, but for another reason.
    StaysAnyway {
        /// Which.
        why: String,
    },
    /// Nothing had been triggered.
    Idle,
    /// The shutdown has begun.
    TooLate,
    /// Not for this user.
    Denied,
}

/// A user's wish that the laptop stays; it is answered when it is known what becomes of it.
#[derive(Debug)]
pub(super) struct Wish {
    /// Who, in words.
    pub who: String,
    /// To be told.
    pub answer: Sender<Answer>,
}

/// Those who watch, and the door they come in by.
#[derive(Clone)]
pub(super) struct Control {
    shared: Arc<Shared>,
}

struct Shared {
    /// logind's description of the sessions.
    sessions: PathBuf,
    /// [`OUTCOME`].
    outcome: Duration,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Connections of each user.
    users: BTreeMap<u32, usize>,
    watchers: BTreeMap<u64, Arc<UnixStream>>,
    next: u64,
}

impl Control {
    /// With nobody who watches, and no door yet.
    pub(super) fn new(sessions: &Path) -> Self {
        Self::with(sessions, OUTCOME)
    }

    fn with(sessions: &Path, outcome: Duration) -> Self {
        Self {
            shared: Arc::new(Shared {
                sessions: sessions.to_owned(),
                outcome,
                state: Mutex::default(),
            }),
        }
    }

    /// Opens the socket below `folder`, and gives `wished` what users want.
    ///
    /// # Errors
    /// Those of bind(2); `AddrInUse` if another service answers there.
    pub(super) fn listen(&self, folder: &Path, wished: impl Fn(Wish) + Send + Sync + 'static) -> io::Result<()> {
        let listener = bind(folder)?;
        let (control, wished) = (self.clone(), Arc::new(wished));
        thread::Builder::new().name("control".to_owned()).spawn(move || {
            loop {
                match listener.accept() {
                    Ok((stream, _)) => control.enter(stream, &wished),
                    // Out of descriptors or memory; it may pass, but must not keep a processor busy.
                    Err(_) => thread::sleep(Duration::from_secs(1)),
                }
            }
        })?;
        Ok(())
    }

    /// Tells all who watch. Who does not read what was told before is dropped.
    pub(super) fn tell(&self, notice: &Notice) {
        let Some(line) = line(&notice.clone().cut()) else {
            return;
        };
        for watcher in self.lock().watchers.values() {
            let sent = send(watcher, &line, SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
            if sent != Ok(line.len()) {
                // Its thread takes it off the list.
                let _ = watcher.shutdown(std::net::Shutdown::Both);
            }
        }
    }

    /// Somebody has connected.
    fn enter<W: Fn(Wish) + Send + Sync + 'static>(&self, stream: UnixStream, wished: &Arc<W>) {
        let Ok(uid) = socket_peercred(&stream).map(|peer| peer.uid.as_raw()) else {
            return;
        };
        let Some(place) = Place::take(self, uid) else {
            // Closed without a word: who has so many connections knows why.
            return;
        };
        let wished = Arc::clone(wished);
        // What cannot have a thread is closed.
        let _ = thread::Builder::new().name("control".to_owned()).spawn(move || {
            let place = place;
            // What goes wrong here is the other side's.
            let _ = place.control.serve(uid, stream, &*wished);
        });
    }

    fn serve(&self, uid: u32, mut stream: UnixStream, wished: &dyn Fn(Wish)) -> io::Result<()> {
        stream.set_write_timeout(Some(PATIENCE))?;
        match request(&mut stream, Instant::now() + PATIENCE)?.as_slice() {
            b"cancel" if self.may_cancel(uid) => {
                let (answer, answered) = mpsc::channel();
                wished(Wish { who: name(uid), answer });
                // It is dropped unanswered when the service ends; who wished does not wait for ever, either.
                let outcome = answered.recv_timeout(self.shared.outcome);
                outcome.map_or(Ok(()), |answer| reply(&mut stream, answer))
            }
            b"watch" if self.may_watch(uid) => self.watch(stream),
            b"cancel" | b"watch" => reply(&mut stream, Answer::Denied),
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    /// Has it told everything from now on, until it goes.
    fn watch(&self, stream: UnixStream) -> io::Result<()> {
        stream.set_read_timeout(None)?;
        let stream = Arc::new(stream);
        let number = {
            let mut state = self.lock();
            state.next += 1;
            let number = state.next;
            state.watchers.insert(number, Arc::clone(&stream));
            number
        };
        // It has nothing more to say: whatever comes is the end.
        let _ = (&*stream).read(&mut [0]);
        self.lock().watchers.remove(&number);
        Ok(())
    }

    fn may_cancel(&self, uid: u32) -> bool {
        uid == 0 || self.any_session(|session| session.uid == uid && session.is_in_front)
    }

    fn may_watch(&self, uid: u32) -> bool {
        uid == 0 || self.any_session(|session| session.uid == uid)
    }

    fn any_session(&self, is: impl Fn(&sessions::Session) -> bool) -> bool {
        let sessions = sessions::list(&self.shared.sessions);
        sessions.iter().any(|session| session.is_users && is(session))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection that is counted as long as this is there.
struct Place {
    control: Control,
    uid: u32,
}

impl Place {
    fn take(control: &Control, uid: u32) -> Option<Self> {
        let mut state = control.lock();
        let of_all: usize = state
            .users
            .iter()
            .filter(|(uid, _)| **uid != 0)
            .map(|(_, count)| count)
            .sum();
        let of_one = state.users.entry(uid).or_default();
        if *of_one >= MAX_OF_ONE || (uid != 0 && of_all >= MAX_OF_ALL) {
            return None;
        }
        *of_one += 1;
        drop(state);
        Some(Self {
            control: control.clone(),
            uid,
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut state = self.control.lock();
        if let Some(count) = state.users.get_mut(&self.uid) {
            *count = count.saturating_sub(1);
        }
        state.users.retain(|_, count| *count > 0);
    }
}

/// A socket in the folder, which everybody may connect to once it is there.
fn bind(folder: &Path) -> io::Result<UnixListener> {
    let place = folder.join(SOCKET);
    DirBuilder::new().recursive(true).mode(0o755).create(folder)?;
    if UnixStream::connect(&place).is_ok() {
        return Err(io::ErrorKind::AddrInUse.into());
    }
    let beside = folder.join(".control.new");
    match fs::remove_file(&beside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(&beside)?;
    // The service's umask would keep everybody else out.
    fs::set_permissions(&beside, Permissions::from_mode(0o666))?;
    // Who waits for it sees it only when it answers.
    fs::rename(&beside, &place)?;
    Ok(listener)
}

/// What is asked for, without the line's end; all of it must be there by then.
fn request(stream: &mut UnixStream, deadline: Instant) -> io::Result<Vec<u8>> {
    let mut request = Vec::new();
    let mut byte = [0];
    while request.len() <= MAX_REQUEST {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        stream.read_exact(&mut byte)?;
        if byte == *b"\n" {
            return Ok(request);
        }
        request.extend(byte);
    }
    Err(io::ErrorKind::InvalidData.into())
}

fn reply(stream: &mut UnixStream, answer: Answer) -> io::Result<()> {
    let answer = match answer {
        Answer::StaysAnyway { why } => Answer::StaysAnyway { why: cut(why) },
        other => other,
    };
    line(&answer).map_or(Ok(()), |line| stream.write_all(&line))
}

/// One line of JSON.
fn line(what: &impl Serialize) -> Option<Vec<u8>> {
    let mut line = serde_json::to_vec(what).ok()?;
    line.push(b'\n');
    if line.len() > MAX_LINE {
        log::error(format_args!("a message of {} bytes cannot be sent", line.len()));
        return None;
    }
    Some(line)
}

impl Notice {
    fn cut(mut self) -> Self {
        let (Self::Countdown { why, .. } | Self::Leaving { why } | Self::Cancelled { why } | Self::Refused { why }) =
            &mut self;
        *why = cut(std::mem::take(why));
        self
    }
}

fn cut(text: String) -> String {
    match text.char_indices().nth(MAX_REASON) {
        None => text,
        Some((end, _)) => format!("{} …", text.get(..end).unwrap_or_default()),
    }
}

/// Users are not looked up by name: a static program has no NSS.
fn name(uid: u32) -> String {
    match uid {
        0 => "root".to_owned(),
        uid => format!("the user {uid}"),
    }
}

#[cfg(test)]
mod tests;
