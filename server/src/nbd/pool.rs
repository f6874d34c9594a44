//! Threads that may wait, shared by all connections of a server: made when needed, gone when idle.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

/// What a thread is given to do.
pub(super) type Job = Box<dyn FnOnce() + Send>;

/// How long a thread without work is kept.
const IDLE: Duration = Duration::from_secs(5);
/// Stack of a thread, in bytes: it calls nothing deep.
const STACK: usize = 256 << 10;

/// The threads of one server.
#[derive(Default)]
pub(super) struct Pool {
    state: Mutex<State>,
    ready: Condvar,
}

#[derive(Default)]
struct State {
    /// Never longer than there are threads that wait for it.
    queue: VecDeque<Job>,
    idle: usize,
}

impl Pool {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs a job at once on a thread of its own.
    ///
    /// # Errors
    /// No thread could be had; the job is given back.
    pub(super) fn run(self: &Arc<Self>, job: Job) -> Result<(), (Job, io::Error)> {
        let mut state = self.lock();
        state.queue.push_back(job);
        if state.idle >= state.queue.len() {
            drop(state);
            self.ready.notify_one();
            return Ok(());
        }
        let pool = Arc::clone(self);
        let made = thread::Builder::new()
            .name("nbd".into())
            .stack_size(STACK)
            .spawn(move || pool.work());
        match made {
            Ok(_) => Ok(()),
            Err(error) => match state.queue.pop_back() {
                Some(job) => Err((job, error)),
                None => Ok(()),
            },
        }
    }

    fn work(&self) {
        let mut state = self.lock();
        loop {
            while let Some(job) = state.queue.pop_front() {
                drop(state);
                job();
                state = self.lock();
            }
            state.idle += 1;
            let (woken, timed_out) = self
                .ready
                .wait_timeout(state, IDLE)
                .unwrap_or_else(PoisonError::into_inner);
            state = woken;
            state.idle -= 1;
            if timed_out.timed_out() && state.queue.is_empty() {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn jobs_run_at_once_also_when_all_others_wait() {
        let pool = Arc::new(Pool::default());
        for _ in 0..3 {
            // Each job waits for the one after it.
            let (last, mut ended) = mpsc::channel::<()>();
            for _ in 0..20 {
                let (done, next) = mpsc::channel();
                let before = std::mem::replace(&mut ended, next);
                let job = move || drop((before.recv(), done));
                assert!(pool.run(Box::new(job)).is_ok());
            }
            drop(last);
            assert!(ended.recv_timeout(Duration::from_secs(60)) == Err(mpsc::RecvTimeoutError::Disconnected));
        }
    }
}
