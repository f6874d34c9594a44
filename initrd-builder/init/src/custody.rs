//! What PID 1 keeps for the role: the descriptors of what it serves, and its verdict on how the machine's turn ends.
//!
//! Counterpart: [`stiefel_sys::custody::Custody`], in the role. Here everything that a dead disk could make last for ever (closing
//! it, too) happens on a thread that nobody waits for without a limit.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use stiefel_sys::console::Console;
use stiefel_sys::custody::{Custodian, Request};

use crate::supervise::RoleEnd;

/// How long the requests of a role that has gone may take; usually they are done already.
const REST: Duration = Duration::from_millis(300);

/// What outlives the role's process.
#[derive(Debug, Default)]
pub(crate) struct Kept(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// By their numbers; the custodian lets no number through that is too large.
    held: BTreeMap<u8, OwnedFd>,
    verdict: Option<Verdict>,
}

/// How the machine's turn will end, and since when that is decided.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Verdict {
    pub(crate) end: RoleEnd,
    pub(crate) since: Instant,
}

/// A role whose requests are answered.
pub(crate) struct Attended(Receiver<()>);

impl Attended {
    /// Waits until what a role asked for before it went has been done.
    pub(crate) fn finish(self) {
        // A disk that does not let itself be closed must not keep the next role waiting.
        let _ = self.0.recv_timeout(REST);
    }
}

impl Kept {
    /// Answers a role's requests until it has gone; the end for its standard input.
    ///
    /// # Errors
    /// No descriptors, no thread.
    pub(crate) fn attend(self: &Arc<Self>, console: &'static Console) -> std::io::Result<(OwnedFd, Attended)> {
        let (custodian, role) = Custodian::pair()?;
        let (done, finished) = mpsc::channel();
        let kept = Arc::clone(self);
        std::thread::Builder::new().name("custody".to_owned()).spawn(move || {
            if let Err(error) = kept.serve(&custodian) {
                console.warn(&format!("what the role asks for cannot be kept: {error}"));
            }
            // Nobody listens any more if it lasted.
            let _ = done.send(());
        })?;
        Ok((role, Attended(finished)))
    }

    fn serve(&self, custodian: &Custodian) -> std::io::Result<()> {
        while let Some(request) = custodian.next()? {
            let copy = match &request {
                Request::Hold(place, fd) => {
                    let fd = fd.try_clone()?;
                    let before = self.state().held.insert(*place, fd);
                    // The last copy's end may last: not while the state is locked.
                    drop(before);
                    None
                }
                Request::Release(place) => {
                    let before = self.state().held.remove(place);
                    if *place == 0 {
                        drop(before);
                    } else {
                        // What lies in memory alone may be large, and nobody waits for its end. (Without a thread it ends here.)
                        let _ = std::thread::Builder::new().spawn(move || drop(before));
                    }
                    None
                }
                Request::Verdict(status) => {
                    if let Some(end) = RoleEnd::from_status(i32::from(*status)) {
                        let since = Instant::now();
                        self.state().verdict.get_or_insert(Verdict { end, since }).end = end;
                    }
                    None
                }
                Request::Fetch(place) => self.state().held.get(place).map(OwnedFd::try_clone).transpose()?,
            };
            // The role may have been killed meanwhile: the next word from it is its end.
            let _ = custodian.answer(&request, copy.as_ref().map(AsFd::as_fd));
        }
        Ok(())
    }

    /// How the machine's turn will end, if that is decided.
    pub(crate) fn verdict(&self) -> Option<Verdict> {
        self.state().verdict
    }

    /// Gives away all that is held.
    pub(crate) fn take(&self) -> Vec<OwnedFd> {
        std::mem::take(&mut self.state().held).into_values().collect()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Does something that a broken disk could make last for ever, but waits for it only so long; `None`: it was not done.
pub(crate) fn within<T: Send + 'static>(limit: Duration, work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    let (done, result) = mpsc::channel();
    std::thread::Builder::new()
        .name("bounded".to_owned())
        .spawn(move || {
            // Nobody listens any more once the time is over.
            let _ = done.send(work());
        })
        .ok()?;
    result.recv_timeout(limit).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::{PipeReader, Read, Seek, Write};
    use std::path::Path;

    use stiefel_sys::custody::Custody;

    fn console() -> &'static Console {
        Box::leak(Box::new(Console::open(Path::new("/none"), Path::new("/none"))))
    }

    fn is_closed(mut pipe: &PipeReader) -> bool {
        rustix::io::ioctl_fionbio(pipe, true).unwrap();
        pipe.read(&mut [0]).is_ok_and(|length| length == 0)
    }

    #[test]
    fn what_is_held_outlives_the_role_and_its_successor_gets_the_same_open_file() {
        let kept = Arc::new(Kept::default());
        let (role, attended) = kept.attend(console()).unwrap();
        let first = Custody::from(role);
        let mut file = tempfile::tempfile().unwrap();
        first.hold(3, file.as_fd()).unwrap();
        file.write_all(b"abc").unwrap();
        drop((file, first));
        attended.finish();
        let (role, _attended) = kept.attend(console()).unwrap();
        let mut again = File::from(Custody::from(role).fetch(3).unwrap().unwrap());
        assert_eq!(again.stream_position().unwrap(), 3);
        assert_eq!(kept.take().len(), 1);
    }

    #[test]
    fn what_is_released_is_closed_before_the_role_is_told_and_what_is_replaced_too() {
        let kept = Arc::new(Kept::default());
        let (role, _attended) = kept.attend(console()).unwrap();
        let role = Custody::from(role);
        let (first, writer) = std::io::pipe().unwrap();
        role.hold(0, writer.as_fd()).unwrap();
        drop(writer);
        assert!(!is_closed(&first));
        let (second, writer) = std::io::pipe().unwrap();
        role.hold(0, writer.as_fd()).unwrap();
        drop(writer);
        assert!(is_closed(&first) && !is_closed(&second));
        let (other, writer) = std::io::pipe().unwrap();
        role.hold(1, writer.as_fd()).unwrap();
        drop(writer);
        role.release(0).unwrap();
        assert!(is_closed(&second) && role.fetch(0).unwrap().is_none());
        assert!(!is_closed(&other) && role.fetch(1).unwrap().is_some());
    }

    #[test]
    fn the_last_verdict_counts_from_the_first_on_and_nonsense_is_none() {
        let kept = Arc::new(Kept::default());
        let (role, _attended) = kept.attend(console()).unwrap();
        let role = Custody::from(role);
        role.verdict(1).unwrap();
        assert!(kept.verdict().is_none());
        role.verdict(10).unwrap();
        let since = kept.verdict().unwrap().since;
        role.verdict(11).unwrap();
        let verdict = kept.verdict().unwrap();
        assert_eq!((verdict.end, verdict.since), (RoleEnd::PowerOff, since));
    }

    #[test]
    fn work_that_hangs_is_not_waited_for() {
        let (_never, hangs) = mpsc::channel::<()>();
        assert!(within(Duration::from_millis(1), move || hangs.recv()).is_none());
        assert_eq!(within(Duration::from_secs(60), || 7), Some(7));
    }
}
