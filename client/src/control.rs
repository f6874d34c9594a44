//! Tells the laptop that the desktop has finished with the disk, and waits until it says that all is written.
//!
//! Counterpart: `server::http`. Bytes: docs/protocol.md, "The goodbye". Blocking, without a runtime: it is called by
//! the shutdown program, PID 1 of a system that is ending.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use stiefel_shared::bundle::{ControlKey, Goodbye};
use stiefel_shared::session::{Farewell, GoodbyeError, SessionError, SessionName};

/// How long the laptop is asked in all.
const PATIENCE: Duration = Duration::from_secs(18);
/// For one connection to be made.
const CONNECT: Duration = Duration::from_secs(4);
/// Between two tries.
const PAUSE: Duration = Duration::from_millis(500);
/// The longest answer that is read, in bytes.
const MAX_ANSWER: u64 = 4096;

/// Why the laptop did not confirm the goodbye.
#[derive(Debug, thiserror::Error)]
pub enum FarewellError {
    /// The session's name is none.
    #[error("the session has no name; the session file of this boot is damaged")]
    Name(#[source] SessionError),
    /// Nobody answered in time.
    #[error(
        "the laptop at {peer} did not answer the goodbye; look at its screen; switching it off now is safe if that says so"
    )]
    Silent {
        /// Its address.
        peer: SocketAddr,
        /// The last try's failure.
        #[source]
        source: io::Error,
    },
    /// It does not know the session, or not this secret of it.
    #[error("the laptop does not accept this session's goodbye: {words}")]
    Unknown {
        /// In its words; not authenticated.
        words: String,
    },
    /// The answer is not one, or a refusal.
    #[error(transparent)]
    Answer(#[from] GoodbyeError),
}

/// Says goodbye to the laptop's HTTP server at `peer` (a link-local address with its scope id).
///
/// Tries again until the laptop answers, 18 seconds in all; it honours the goodbye once.
///
/// # Errors
/// [`FarewellError`]; the laptop then waits for its own time-out or a key.
pub fn goodbye(peer: SocketAddr, session: &str, control: &ControlKey, goodbye: Goodbye) -> Result<(), FarewellError> {
    goodbye_within(PATIENCE, peer, session, control, goodbye)
}

/// [`goodbye`] with another limit.
///
/// # Errors
/// As there.
pub fn goodbye_within(
    limit: Duration,
    peer: SocketAddr,
    session: &str,
    control: &ControlKey,
    goodbye: Goodbye,
) -> Result<(), FarewellError> {
    let name: SessionName = session.parse().map_err(FarewellError::Name)?;
    let farewell = Farewell::new(control, name, goodbye)?;
    let end = Instant::now() + limit;
    loop {
        let source = match ask(peer, name, &farewell.body, end) {
            Ok((200, body)) => return Ok(farewell.answered(control, name, &body)?),
            // Its table of sessions is gone, the session has said goodbye before, or our key is another.
            Ok((400..=499, body)) => {
                let words = String::from_utf8_lossy(&body);
                let words = words.trim().chars().filter(|c| !c.is_control()).take(200).collect();
                return Err(FarewellError::Unknown { words });
            }
            Ok((status, _)) => io::Error::other(format!("it answered {status}")),
            Err(source) => source,
        };
        if Instant::now() + PAUSE >= end {
            return Err(FarewellError::Silent { peer, source });
        }
        std::thread::sleep(PAUSE);
    }
}

/// One request: status and body of its answer.
fn ask(peer: SocketAddr, session: SessionName, body: &[u8], end: Instant) -> io::Result<(u16, Vec<u8>)> {
    let mut stream = TcpStream::connect_timeout(&peer, left(end)?.min(CONNECT))?;
    stream.set_write_timeout(Some(left(end)?))?;
    let head = format!(
        "POST /session/{session}/goodbye HTTP/1.1\r\nHost: laptop.stiefel\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(&[head.as_bytes(), body].concat())?;
    let mut answer = Vec::new();
    let mut piece = [0; 1024];
    loop {
        stream.set_read_timeout(Some(left(end)?))?;
        let length = stream.read(&mut piece)?;
        answer.extend_from_slice(piece.get(..length).unwrap_or_default());
        if length == 0 || u64::try_from(answer.len()).is_ok_and(|have| have > MAX_ANSWER) {
            break;
        }
    }
    parse(&answer).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "its answer is not complete"))
}

fn left(end: Instant) -> io::Result<Duration> {
    // A time-out of zero means none to the kernel.
    let left = end.saturating_duration_since(Instant::now());
    if left.is_zero() {
        Err(io::ErrorKind::TimedOut.into())
    } else {
        Ok(left)
    }
}

/// Status and body of an HTTP/1.1 answer that says its length, as our server's answers do.
fn parse(answer: &[u8]) -> Option<(u16, Vec<u8>)> {
    let split = answer.windows(4).position(|window| window == b"\r\n\r\n")?;
    let (head, body) = (
        std::str::from_utf8(answer.get(..split)?).ok()?,
        answer.get(split + 4..)?,
    );
    let mut lines = head.split("\r\n");
    let status = lines.next()?.strip_prefix("HTTP/1.1 ")?.get(..3)?.parse().ok()?;
    let length: usize = lines
        .filter_map(|line| line.split_once(':'))
        .find(|(name, _)| name.eq_ignore_ascii_case("content-length"))
        .and_then(|(_, value)| value.trim().parse().ok())?;
    (body.len() == length).then(|| (status, body.to_vec()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_complete_answer_counts() {
        let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc";
        assert_eq!(parse(answer), Some((200, b"abc".to_vec())));
        for length in 0..answer.len() {
            assert_eq!(parse(&answer[..length]), None, "{length}");
        }
        assert_eq!(parse(b"HTTP/1.1 200 OK\r\n\r\nabc"), None);
        assert_eq!(parse(b"HTTP/1.1 2\xff0 OK\r\nContent-Length: 0\r\n\r\n"), None);
    }

    #[test]
    fn a_session_without_a_name_is_told_before_anything_is_sent() {
        let peer = "[::1]:9".parse().unwrap();
        let error = goodbye(peer, "../x", &ControlKey([0; 32]), Goodbye::Poweroff).unwrap_err();
        assert!(matches!(error, FarewellError::Name(_)));
    }
}
