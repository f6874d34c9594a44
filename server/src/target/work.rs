//! What goes on on other threads and must have ended before the program does.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How much of it there is.
#[derive(Debug, Default)]
pub(super) struct Work {
    count: Mutex<usize>,
    ended: Condvar,
}

/// One piece of it; ended when dropped.
#[derive(Debug)]
pub(super) struct Begun(Arc<Work>);

impl Work {
    fn lock(&self) -> MutexGuard<'_, usize> {
        self.count.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a piece.
    pub(super) fn begin(self: &Arc<Self>) -> Begun {
        *self.lock() += 1;
        Begun(Arc::clone(self))
    }

    /// Waits until all has ended; `false` if it has not after `limit`.
    pub(super) fn wait(&self, limit: Duration) -> bool {
        let end = Instant::now() + limit;
        let mut count = self.lock();
        while *count > 0 {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            (count, _) = self
                .ended
                .wait_timeout(count, left)
                .unwrap_or_else(PoisonError::into_inner);
        }
        true
    }
}

impl Drop for Begun {
    fn drop(&mut self) {
        *self.0.lock() -= 1;
        self.0.ended.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_begun_is_waited_for() {
        let work = Arc::new(Work::default());
        assert!(work.wait(Duration::ZERO));
        let begun = [work.begin(), work.begin()];
        assert!(!work.wait(Duration::from_millis(20)));
        let thread = std::thread::spawn(move || drop(begun));
        assert!(work.wait(Duration::from_secs(60)));
        thread.join().unwrap();
    }
}
