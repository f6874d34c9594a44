//! The other side of the service's control socket: what a person's commands say and hear through it.
//!
//! Answered by [`super`]. Only a service that runs as root is believed.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::net::sockopt::socket_peercred;
use serde::de::DeserializeOwned;

use super::{Answer, MAX_LINE, Notice, SOCKET};

/// How long it may take until it is known what becomes of a wish: what is being collected is collected to its end.
pub(super) const PATIENCE: Duration = Duration::from_mins(2);

/// Why the service was not asked, or did not answer.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// There is no socket, or nobody behind it.
    #[error(
        "stiefel's service does not run here\n  next: `systemctl status stiefel-autokexec` says why; `stiefel serve` is cancelled by Ctrl-C"
    )]
    NotThere,
    /// Somebody else's socket.
    #[error("{path} is not root's, but the user {uid}'s; nothing was said to it", path = path.display())]
    NotRoots {
        /// It.
        path: std::path::PathBuf,
        /// Whose.
        uid: u32,
    },
    /// The connection failed.
    #[error("stiefel's service cannot be asked\n  next: see `systemctl status stiefel-autokexec`, and try again")]
    Connection(#[source] io::Error),
    /// What came is no answer.
    #[error(
        "the answer of stiefel's service is not understood\n  next: restart it, so that it is of this version: `systemctl restart stiefel-autokexec`"
    )]
    Nonsense,
    /// It is not for this user.
    #[error(
        "only root, or the user in front of this laptop's own screen, may do that\n  next: do it there, or with sudo"
    )]
    Denied,
}

/// Asks the service below `folder` to stay; answers what became of it.
///
/// # Errors
/// [`ControlError`].
pub fn cancel(folder: &Path) -> Result<Answer, ControlError> {
    cancel_of(folder, 0)
}

pub(super) fn cancel_of(folder: &Path, owner: u32) -> Result<Answer, ControlError> {
    let mut stream = ask(folder, owner, b"cancel\n")?;
    stream
        .get_mut()
        .set_read_timeout(Some(PATIENCE))
        .map_err(ControlError::Connection)?;
    match next(&mut stream)? {
        Some(Answer::Denied) => Err(ControlError::Denied),
        Some(answer) => Ok(answer),
        None => Err(ControlError::Connection(io::ErrorKind::UnexpectedEof.into())),
    }
}

/// Calls `heard` with everything that the service below `folder`, which must be `owner`'s, tells, until that ends or `heard` says
/// `false`.
///
/// # Errors
/// [`ControlError`]; a service that ends is no error.
pub(in crate::autokexec) fn watch(
    folder: &Path,
    owner: u32,
    mut heard: impl FnMut(Notice) -> bool,
) -> Result<(), ControlError> {
    #[derive(serde::Deserialize)]
    #[serde(untagged)]
    enum Said {
        Notice(Notice),
        Answer(Answer),
    }
    let mut stream = ask(folder, owner, b"watch\n")?;
    while let Some(said) = next(&mut stream)? {
        match said {
            Said::Notice(notice) => {
                if !heard(notice) {
                    break;
                }
            }
            Said::Answer(Answer::Denied) => return Err(ControlError::Denied),
            Said::Answer(_) => return Err(ControlError::Nonsense),
        }
    }
    Ok(())
}

fn ask(folder: &Path, owner: u32, request: &[u8]) -> Result<BufReader<UnixStream>, ControlError> {
    let path = folder.join(SOCKET);
    let mut stream = UnixStream::connect(&path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => ControlError::NotThere,
        _ => ControlError::Connection(error),
    })?;
    let peer = socket_peercred(&stream).map_err(|errno| ControlError::Connection(errno.into()))?;
    let uid = peer.uid.as_raw();
    if uid != owner {
        return Err(ControlError::NotRoots { path, uid });
    }
    stream.write_all(request).map_err(ControlError::Connection)?;
    Ok(BufReader::new(stream))
}

/// One line of JSON; `None` at the end.
fn next<T: DeserializeOwned>(stream: &mut BufReader<UnixStream>) -> Result<Option<T>, ControlError> {
    let mut line = Vec::new();
    let longest = u64::try_from(MAX_LINE).unwrap_or(u64::MAX);
    let read = stream.by_ref().take(longest).read_until(b'\n', &mut line);
    match read.map_err(ControlError::Connection)? {
        0 => Ok(None),
        _ => serde_json::from_slice(&line).map_err(|_| ControlError::Nonsense),
    }
}
