//! The engine: receives a connection's requests, many per system call, and answers at once what needs no medium.
//!
//! Reads that are in the page cache, and writes that the page cache takes, are done here; neighbours in one system call.
//! All replies that are ready go out in one more, before this thread waits for the client again. What has to wait for
//! the medium becomes a task: on another thread while more requests are at hand, else on this very thread, after another
//! one has taken over the driving; so a lone flush or cold read is not handed around. `input` receives, `runs` does small
//! requests, `long` long ones.
//!
//! Specification: "Transmission". Why this engine and not another: docs/nbd.md, "The engine".

mod input;
mod long;
mod patience;
mod runs;

use std::any::Any;
use std::io::{self, IoSlice};
use std::net::Shutdown;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

use stiefel_shared::nbd::{Asked, Errno};

use self::input::Input;
use super::connection::{BIG, Connection, Scratch, Task};
use super::export::Export;
use super::negotiate::{Agreed, Style};
use super::output::Output;
use super::pool::Pool;
use super::reply::{Failure, MAX_HEAD, Replies};
use super::request::{Command, Range, Refusal, validate};
use super::wire::Peer;

/// Payload up to which a request is done in these buffers, together with its neighbours.
const SMALL: usize = 64 << 10;
/// Replies that are collected before they are sent, in bytes.
const OUTPUT: usize = 256 << 10;

/// The receiving side of a connection. Moves from thread to thread.
pub(super) struct Driver {
    connection: Arc<Connection>,
    input: Input,
    /// Replies not yet sent: the first `filled` bytes.
    out: Vec<u8>,
    filled: usize,
    scratch: Scratch,
    /// The last request was a long write, and so the next one may be.
    bulk: bool,
}

/// What comes after a request.
enum Step {
    /// The next one.
    On,
    /// This task, on this thread, after another has taken over.
    Wait(Task),
    /// No more will come.
    End,
}

/// Serves a connection until the client leaves, breaks the framing, or is dropped. `ahead` is what it sent too early for
/// the negotiation to look at; `guard` is dropped when the last request has ended, which may be later than this returns.
pub(super) fn transmit(
    peer: Arc<Peer>,
    ahead: &[u8],
    agreed: Agreed<Arc<Export>>,
    pool: Arc<Pool>,
    (workers, bytes_in_flight): (u32, u32),
    guard: Box<dyn Any + Send + Sync>,
) {
    let least = u32::try_from(BIG).unwrap_or(u32::MAX);
    let scratch = Scratch::new(&agreed.export);
    let connection = Arc::new(Connection {
        peer,
        export: agreed.export,
        bounds: agreed.bounds,
        style: agreed.style,
        pool,
        output: Output::new(bytes_in_flight.max(least), workers.max(1)),
        _guard: guard,
    });
    let driver = Driver {
        connection,
        input: Input::new(ahead, agreed.style),
        out: vec![0; OUTPUT],
        filled: 0,
        scratch,
        bulk: false,
    };
    Box::new(driver).drive();
}

impl Driver {
    fn drive(mut self: Box<Self>) {
        loop {
            match self.step() {
                Ok(Step::On) => {}
                Ok(Step::Wait(task)) => match self.hand_over(task) {
                    Some(driver) => self = driver,
                    None => return,
                },
                Ok(Step::End) => {
                    // What cannot be sent, nobody waits for.
                    let _ = self.send_out();
                    return;
                }
                // No more comes in from one that is being dropped; its other requests still have their replies sent.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof && self.closing() => {
                    let _ = self.send_out();
                    return;
                }
                // A closed connection or broken framing. Nothing more to do when it is closed already.
                Err(_) => {
                    let _ = self.connection.peer.stream.shutdown(Shutdown::Both);
                    return;
                }
            }
        }
    }

    /// Has another thread drive, and executes the task here; the driver comes back when there is no other thread.
    fn hand_over(mut self: Box<Self>, task: Task) -> Option<Box<Self>> {
        let connection = Arc::clone(&self.connection);
        // An error shows again at the next request.
        let _ = self.send_out();
        // The client most likely sends nothing before it has the answer, and the medium may want this core.
        self.input.expect_nothing();
        let seat = Arc::new(Mutex::new(Some(self)));
        let taken = Arc::clone(&seat);
        let take = move || {
            let driver = taken.lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(driver) = driver {
                driver.drive();
            }
        };
        let back = match connection.pool.run(Box::new(take)) {
            Ok(()) => None,
            Err(_) => seat.lock().unwrap_or_else(PoisonError::into_inner).take(),
        };
        connection.execute(task);
        back
    }

    /// Takes the next request and answers it, or makes a task of it.
    fn step(&mut self) -> io::Result<Step> {
        let Some(asked) = self.input.peek()? else {
            self.send_out()?;
            return Ok(if self.receive()? { Step::On } else { Step::End });
        };
        self.input.pass(self.input.header());
        self.input.took_request();
        let replies = self.replies(&asked);
        let mut work = validate(&asked, &self.connection.bounds);
        if work == Ok(Command::Disconnect) {
            return Ok(Step::End);
        }
        if self.closing() {
            work = Err(Refusal {
                errno: Errno::Shutdown,
                message: "the server drops this connection",
            });
        }
        match work {
            Ok(Command::Read { range, .. }) if range.length <= SMALL as u64 => self.small_reads(replies, range),
            Ok(Command::Read { range, whole }) => self.long_read(replies, range, whole),
            Ok(Command::Write { range, fua: false }) if range.length <= SMALL as u64 => {
                self.small_writes(replies, range)
            }
            Ok(Command::Write { range, fua }) => self.long_write(replies, range, fua),
            Ok(command) => self.dispatch(replies, command, Vec::new(), 0),
            // "Extended headers": a payload that was never allowed is not worth waiting for, or was not meant to be one.
            Err(_)
                if self.connection.style == Style::Extended
                    && asked.payload > self.connection.bounds.maximum.into() =>
            {
                Ok(Step::End)
            }
            Err(refusal) => {
                self.skip(asked.payload)?;
                self.connection.export.count(false);
                self.reply(|out| replies.error(out, &Failure::from(refusal)))
            }
        }
    }

    /// Whether the server drops this connection.
    fn closing(&self) -> bool {
        self.connection.peer.closing.load(Ordering::Acquire)
    }

    fn replies(&self, asked: &Asked) -> Replies {
        Replies {
            style: self.connection.style,
            cookie: asked.cookie,
            offset: asked.offset,
        }
    }

    /// Receives more, at least a byte; false when no more will come.
    fn receive(&mut self) -> io::Result<bool> {
        // Behind a long write's payload comes a header; what follows that is better left in the socket.
        let header = self.input.header().saturating_sub(self.input.len()).max(1);
        let most = std::mem::take(&mut self.bulk).then_some(header);
        Ok(self.input.receive(&self.connection.peer.stream, most)? > 0)
    }

    /// Waits until `length` bytes of payload, not more than the input holds, are in the buffer.
    fn await_payload(&mut self, length: usize) -> io::Result<()> {
        if self.input.len() < length {
            self.send_out()?;
        }
        self.input.fill(&self.connection.peer.stream, length)
    }

    /// Passes over a payload that nobody wants.
    fn skip(&mut self, mut length: u64) -> io::Result<()> {
        while length > 0 {
            if self.input.len() == 0 {
                self.send_out()?;
                if !self.receive()? {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
            }
            let here = usize::try_from(length).unwrap_or(usize::MAX).min(self.input.len());
            self.input.pass(here);
            length -= here as u64;
        }
        Ok(())
    }

    /// Sends all replies that are ready.
    fn send_out(&mut self) -> io::Result<()> {
        if self.filled == 0 {
            return Ok(());
        }
        let mut turn = self.connection.output.turn(&self.connection.peer.stream);
        let sent = turn.send(&mut [IoSlice::new(&self.out[..self.filled])]);
        drop(turn);
        self.filled = 0;
        sent
    }

    /// Makes room for `bytes` of replies, not more than the buffer holds.
    fn room(&mut self, bytes: usize) -> io::Result<()> {
        if self.out.len() - self.filled < bytes {
            self.send_out()?;
        }
        Ok(())
    }

    /// A reply without data, to be sent with the others.
    fn reply(&mut self, write: impl FnOnce(&mut Vec<u8>)) -> io::Result<Step> {
        let mut reply = Vec::with_capacity(MAX_HEAD);
        write(&mut reply);
        self.room(reply.len())?;
        self.out[self.filled..][..reply.len()].copy_from_slice(&reply);
        self.filled += reply.len();
        Ok(Step::On)
    }

    /// Makes a task of a request, when there is room for it. It runs elsewhere if more requests are at hand, else on this thread
    /// while another one drives.
    fn dispatch(&mut self, replies: Replies, command: Command, data: Vec<u8>, held: usize) -> io::Result<Step> {
        let held = u32::try_from(held).map_err(io::Error::other)?;
        let more = self.input.peek()?.is_some();
        let connection = Arc::clone(&self.connection);
        let output = &connection.output;
        for (room, wanted) in [(&output.budget, held), (&output.places, 1)] {
            if !room.try_take(wanted) {
                self.send_out()?;
                room.take(wanted);
            }
        }
        let task = Task {
            replies,
            command,
            data,
            held,
        };
        if !more {
            return Ok(Step::Wait(task));
        }
        self.run_elsewhere(task)?;
        Ok(Step::On)
    }

    /// Executes a task on another thread, or here when there is none.
    fn run_elsewhere(&mut self, task: Task) -> io::Result<()> {
        let connection = Arc::clone(&self.connection);
        let job = move || connection.execute(task);
        if let Err((job, _)) = self.connection.pool.run(Box::new(job)) {
            self.send_out()?;
            job();
        }
        Ok(())
    }
}

/// A range's length in memory; no payload is longer than 32 bits can say.
fn length_of(range: Range) -> usize {
    usize::try_from(range.length).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests;
