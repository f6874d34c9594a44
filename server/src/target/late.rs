//! Work that may hang with a disk: waited for a little while, and heard of when it ends later.

use std::io;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

struct Slot<T> {
    done: Option<T>,
    /// Nobody waits any more.
    late: bool,
}

/// Does `work` on a thread of its own. What came of it within `patience`; else nothing, and `late` is told.
///
/// # Errors
/// There is no thread for it.
pub(super) fn soon_or_late<T: Send + 'static>(
    patience: Duration,
    work: impl FnOnce() -> T + Send + 'static,
    late: impl FnOnce(T) + Send + 'static,
) -> io::Result<Option<T>> {
    let shared = Arc::new((
        Mutex::new(Slot {
            done: None,
            late: false,
        }),
        Condvar::new(),
    ));
    let theirs = Arc::clone(&shared);
    std::thread::Builder::new().name("disk".to_owned()).spawn(move || {
        let value = work();
        let (slot, ended) = &*theirs;
        let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
        if slot.late {
            drop(slot);
            late(value);
        } else {
            slot.done = Some(value);
            ended.notify_all();
        }
    })?;
    let end = Instant::now() + patience;
    let (slot, ended) = &*shared;
    let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
    while slot.done.is_none() {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            slot.late = true;
            break;
        }
        (slot, _) = ended.wait_timeout(slot, left).unwrap_or_else(PoisonError::into_inner);
    }
    Ok(slot.done.take())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    #[test]
    fn what_ends_soon_is_there_and_what_hangs_is_told_later() {
        let never = |_: u8| panic!("it was there in time");
        let soon = soon_or_late(Duration::from_secs(60), || 7, never).unwrap();
        assert_eq!(soon, Some(7));
        let ((hold, held), (tell, told)) = (channel::<()>(), channel());
        let hangs = move || {
            let _ = held.recv();
            8
        };
        let later = soon_or_late(Duration::from_millis(20), hangs, move |value| tell.send(value).unwrap());
        assert_eq!(later.unwrap(), None);
        drop(hold);
        assert_eq!(told.recv().unwrap(), 8);
    }
}
