//! The sending side of a connection: one thread at a time sends, others leave their replies behind and go on.

use std::collections::VecDeque;
use std::io::{self, IoSlice, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;
use rustix::net::{SendFlags, send};

use super::pipe::Pipe;

/// Replies sent in one system call at most.
const BATCH: usize = 64;

/// Something that a connection's tasks share: bytes of payload in memory, or places.
pub(super) struct Budget {
    free: Mutex<u32>,
    freed: Condvar,
}

impl Budget {
    pub(super) fn new(all: u32) -> Self {
        Self {
            free: Mutex::new(all),
            freed: Condvar::new(),
        }
    }

    /// Takes `some` if so much is free.
    pub(super) fn try_take(&self, some: u32) -> bool {
        let mut free = lock(&self.free);
        let enough = *free >= some;
        if enough {
            *free -= some;
        }
        enough
    }

    /// Waits until `some` is free; must not be more than there is in all.
    pub(super) fn take(&self, some: u32) {
        let mut free = lock(&self.free);
        while *free < some {
            free = self.freed.wait(free).unwrap_or_else(PoisonError::into_inner);
        }
        *free -= some;
    }

    fn give(&self, some: u32) {
        *lock(&self.free) += some;
        self.freed.notify_all();
    }
}

/// A task's reply that waits to be sent, and how much of the budget it holds.
struct Posted {
    bytes: Vec<u8>,
    held: u32,
}

#[derive(Default)]
struct State {
    /// A thread has the turn; it sends what is posted before it gives the turn back.
    busy: bool,
    /// Threads that wait for the turn; nobody is woken in vain.
    waiting: usize,
    queue: VecDeque<Posted>,
}

/// Who may send, and what waits for it. The queue is bounded by the tasks that a connection may have: a task's place is free
/// again when its reply was sent, so that who reads no replies gets no more of them made.
pub(super) struct Output {
    state: Mutex<State>,
    free: Condvar,
    /// Bytes.
    pub(super) budget: Budget,
    /// Tasks at the same time.
    pub(super) places: Budget,
}

impl Output {
    pub(super) fn new(budget: u32, places: u32) -> Self {
        Self {
            state: Mutex::default(),
            free: Condvar::new(),
            budget: Budget::new(budget),
            places: Budget::new(places),
        }
    }

    /// Waits for the turn to send.
    pub(super) fn turn<'a>(&'a self, stream: &'a TcpStream) -> Turn<'a> {
        let mut state = lock(&self.state);
        while state.busy {
            state.waiting += 1;
            state = self.free.wait(state).unwrap_or_else(PoisonError::into_inner);
            state.waiting -= 1;
        }
        state.busy = true;
        Turn { output: self, stream }
    }

    /// Sends a task's whole reply, or leaves it to the thread that is sending; then gives `held` back to the budget, and the place.
    pub(super) fn post(&self, stream: &TcpStream, bytes: Vec<u8>, held: u32) {
        let mut state = lock(&self.state);
        state.queue.push_back(Posted { bytes, held });
        if !state.busy {
            state.busy = true;
            drop(state);
            // Its end sends the queue.
            drop(Turn { output: self, stream });
        }
    }
}

/// The right to send.
pub(super) struct Turn<'a> {
    output: &'a Output,
    stream: &'a TcpStream,
}

impl Turn<'_> {
    /// Sends the parts, however long the peer takes for it.
    ///
    /// # Errors
    /// The connection is broken; it is closed then.
    pub(super) fn send(&mut self, parts: &mut [IoSlice<'_>]) -> io::Result<()> {
        send_all(self.stream, parts).inspect_err(|_| {
            // Also wakes the thread that receives. Fails only if the peer has closed already.
            let _ = self.stream.shutdown(Shutdown::Both);
        })
    }

    /// Sends `head`, then `length` bytes that the pipe holds.
    ///
    /// # Errors
    /// The connection is broken; it is closed then.
    pub(super) fn send_from(&mut self, head: &[u8], pipe: &Pipe, length: usize) -> io::Result<()> {
        let mut rest = head;
        let sent = loop {
            if rest.is_empty() {
                break pipe.send(self.stream, length);
            }
            match send(self.stream, rest, SendFlags::MORE | SendFlags::NOSIGNAL) {
                Ok(sent) => rest = &rest[sent..],
                Err(Errno::INTR) => {}
                Err(errno) => break Err(errno.into()),
            }
        };
        sent.inspect_err(|_| {
            let _ = self.stream.shutdown(Shutdown::Both);
        })
    }

    /// Sends everything that is posted.
    fn drain<'s>(&mut self, mut state: MutexGuard<'s, State>) -> MutexGuard<'s, State>
    where
        Self: 's,
    {
        let output = self.output;
        while !state.queue.is_empty() {
            let count = state.queue.len().min(BATCH);
            let batch: Vec<Posted> = state.queue.drain(..count).collect();
            drop(state);
            let mut parts: Vec<_> = batch.iter().map(|posted| IoSlice::new(&posted.bytes)).collect();
            // An error has closed the connection, which its driver notices.
            let _ = self.send(&mut parts);
            let (held, places) = batch
                .iter()
                .fold((0, 0), |(held, places), posted| (held + posted.held, places + 1));
            drop(batch);
            output.budget.give(held);
            output.places.give(places);
            state = output.state.lock().unwrap_or_else(PoisonError::into_inner);
        }
        state
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let output = self.output;
        let state = output.state.lock().unwrap_or_else(PoisonError::into_inner);
        let mut state = self.drain(state);
        state.busy = false;
        let waiting = state.waiting > 0;
        drop(state);
        if waiting {
            output.free.notify_one();
        }
    }
}

fn send_all(mut stream: &TcpStream, mut parts: &mut [IoSlice<'_>]) -> io::Result<()> {
    IoSlice::advance_slices(&mut parts, 0);
    while !parts.is_empty() {
        match stream.write_vectored(parts) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(sent) => IoSlice::advance_slices(&mut parts, sent),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
