//! One connection's transmission phase: what its threads share, and the requests that may wait for the medium.
//!
//! The [driver](super::driver) receives, and answers at once what needs no medium. Everything else becomes a [`Task`] on
//! a thread that may wait, so that requests run concurrently and complete out of order. Memory: the driver's two buffers,
//! and what tasks hold, bounded by the connection's budget. A client that does not read its replies stops its own driver
//! and at most one other thread.

use std::any::Any;
use std::io::{self, IoSlice};
use std::net::Shutdown;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use stiefel_shared::nbd::STATE_ZERO;

use super::export::Export;
use super::negotiate::Style;
use super::output::Output;
use super::pipe::Pipe;
use super::pool::Pool;
use super::reply::{Failure, MAX_HEAD, Replies};
use super::request::{Bounds, Command, Range};
use super::wire::Peer;

/// Bytes that are held in memory for one request at most; longer ones go piece by piece.
pub(super) const BIG: usize = 1 << 20;
/// Bytes of a long request that go at a time: they stay in the processor's cache.
pub(super) const PIECE: usize = 256 << 10;
/// Bytes that are zeroed or trimmed at a time: who drops the connection, or wants the same map, waits for so much only.
const STEP: u64 = 64 << 20;
/// Extents looked up at a time when a long read is split at its holes.
const EXTENTS: usize = 64;

/// What the threads of one connection share. Dropped by the last of them, when no request runs any more.
pub(super) struct Connection {
    pub(super) peer: Arc<Peer>,
    pub(super) export: Arc<Export>,
    pub(super) bounds: Bounds,
    pub(super) style: Style,
    pub(super) pool: Arc<Pool>,
    pub(super) output: Output,
    /// Told of the end by being dropped, after all else.
    pub(super) _guard: Box<dyn Any + Send + Sync>,
}

/// What one thread needs for long requests, kept from one to the next.
#[derive(Default)]
pub(super) struct Scratch {
    /// Only grows, so that it need not be zeroed anew.
    pub(super) buffer: Vec<u8>,
    pub(super) head: Vec<u8>,
    /// Absent where data must pass through the buffer.
    pub(super) pipe: Option<Pipe>,
}

impl Scratch {
    /// With a pipe where one can be had and used.
    pub(super) fn new(export: &Export) -> Self {
        Self {
            pipe: export.file().and_then(|_| Pipe::new().ok()),
            ..Self::default()
        }
    }

    fn part(&mut self, length: usize) -> &mut [u8] {
        if self.buffer.len() < length {
            self.buffer.resize(length, 0);
        }
        &mut self.buffer[..length]
    }
}

/// A request that may have to wait for the medium.
pub(super) struct Task {
    pub(super) replies: Replies,
    pub(super) command: Command,
    /// A write's payload.
    pub(super) data: Vec<u8>,
    /// Bytes of the budget it holds.
    pub(super) held: u32,
}

impl Connection {
    /// Executes a task and has its reply sent.
    pub(super) fn execute(&self, task: Task) {
        let Task {
            replies,
            command,
            data,
            held,
        } = task;
        let mut out = Vec::new();
        match command {
            Command::Read { range, whole } if range.length > BIG as u64 => {
                // Its pieces are sent as they come; an error has closed the connection.
                let _ = self.stream_read(&mut Scratch::default(), replies, range, whole);
            }
            Command::Read { range, .. } => {
                let result = self.read_whole(&mut out, replies, range);
                self.conclude(&mut out, replies, result);
            }
            _ => {
                let result = self.act(&mut out, replies, command, &data);
                self.conclude(&mut out, replies, result);
            }
        }
        drop(data);
        self.output.post(&self.peer.stream, out, held);
    }

    /// Counts a request and, if it failed, makes the error its reply.
    pub(super) fn conclude(&self, out: &mut Vec<u8>, replies: Replies, result: io::Result<()>) {
        self.export.count(result.is_ok());
        if let Err(error) = result {
            out.clear();
            replies.error(out, &Failure::from(error));
        }
    }

    /// Everything but reading; the reply goes to `out`.
    fn act(&self, out: &mut Vec<u8>, replies: Replies, command: Command, data: &[u8]) -> io::Result<()> {
        let export = &self.export;
        let flush = match command {
            Command::BlockStatus { range, one } => {
                replies.status(out, &export.extents(range, one));
                return Ok(());
            }
            Command::Write { range, fua } => {
                export.write(range.offset, data)?;
                fua
            }
            Command::Trim { range, fua } => {
                self.in_steps(range, |step| export.trim(step))?;
                fua
            }
            Command::WriteZeroes {
                range,
                fua,
                no_hole,
                fast,
            } => {
                if fast {
                    // All or nothing.
                    export.zero(range, no_hole, fast)?;
                } else {
                    self.in_steps(range, |step| export.zero(step, no_hole, false))?;
                }
                fua
            }
            Command::Flush => true,
            Command::Cache(range) => {
                export.cache(range)?;
                false
            }
            Command::Read { .. } | Command::Disconnect => false,
        };
        if flush {
            // FUA too, not by RWF_DSYNC: its error would not tell a refused write from lost data of before.
            export.flush()?;
        }
        replies.done(out);
        Ok(())
    }

    /// Does a long request step by step, as long as the connection is not being dropped.
    fn in_steps(&self, range: Range, act: impl Fn(Range) -> io::Result<()>) -> io::Result<()> {
        let end = range.offset + range.length;
        let mut offset = range.offset;
        while offset < end {
            if self.peer.closing.load(Ordering::Acquire) {
                return Err(io::ErrorKind::ConnectionAborted.into());
            }
            let length = (end - offset).min(STEP - offset % STEP);
            act(Range { offset, length })?;
            offset += length;
        }
        Ok(())
    }

    /// Reads at most [`BIG`] bytes into one reply.
    fn read_whole(&self, out: &mut Vec<u8>, replies: Replies, range: Range) -> io::Result<()> {
        let length = usize::try_from(range.length).map_err(io::Error::other)?;
        out.try_reserve_exact(MAX_HEAD + length)?;
        replies.data_head(out, range.offset, length, true);
        let head = out.len();
        out.resize(head + length, 0);
        self.export.read(range.offset, &mut out[head..])
    }

    /// Answers a long read piece by piece.
    ///
    /// # Errors
    /// The connection is broken, or had to be broken because the medium failed where no error can be told any more.
    pub(super) fn stream_read(
        &self,
        scratch: &mut Scratch,
        replies: Replies,
        range: Range,
        whole: bool,
    ) -> io::Result<()> {
        let sent = if replies.style != Style::Simple && !whole {
            self.stream_chunks(scratch, replies, range)
        } else if range.length <= BIG as u64 {
            self.stream_piece(scratch, replies, range, true)
        } else {
            self.stream_unbroken(scratch, replies, range)
        };
        match sent {
            Ok(()) => self.export.count(true),
            Err(Broken::Medium(error)) => {
                let mut out = Vec::new();
                self.conclude(&mut out, replies, Err(error));
                self.send(&out)?;
            }
            Err(Broken::Connection(error)) => return Err(error),
        }
        Ok(())
    }

    fn send(&self, bytes: &[u8]) -> io::Result<()> {
        let mut turn = self.output.turn(&self.peer.stream);
        turn.send(&mut [IoSlice::new(bytes)])
    }

    /// One head with at most [`BIG`] bytes of data, sent once they were read.
    fn stream_piece(&self, scratch: &mut Scratch, replies: Replies, piece: Range, done: bool) -> Result<(), Broken> {
        let length = usize::try_from(piece.length).map_err(io::Error::other)?;
        scratch.head.clear();
        replies.data_head(&mut scratch.head, piece.offset, length, done);
        if let (Some(pipe), Some(file)) = (&scratch.pipe, self.export.file())
            && Pipe::holds(piece.offset, piece.length)
        {
            match pipe.take(file, piece.offset, length) {
                Ok(()) => {
                    self.export.count_read(length);
                    let mut turn = self.output.turn(&self.peer.stream);
                    return turn.send_from(&scratch.head, pipe, length).map_err(Broken::Connection);
                }
                // A file system that has no splice: through memory, from now on.
                Err(error) if matches!(error.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported) => {
                    scratch.pipe = None;
                }
                Err(error) => {
                    // It holds a part that nobody wants.
                    scratch.pipe = Pipe::new().ok();
                    return Err(Broken::Medium(error));
                }
            }
        }
        self.export.read(piece.offset, scratch.part(length))?;
        let mut turn = self.output.turn(&self.peer.stream);
        let mut parts = [IoSlice::new(&scratch.head), IoSlice::new(&scratch.buffer[..length])];
        turn.send(&mut parts).map_err(Broken::Connection)
    }

    /// One head for all the data. They are read once before, because in a simple reply no error can be told after the head; a
    /// chunk is then filled up with zeroes, and the error follows it ("Structured reply chunk message").
    fn stream_unbroken(&self, scratch: &mut Scratch, replies: Replies, range: Range) -> Result<(), Broken> {
        for (at, length) in pieces(range) {
            self.export.try_read(at, scratch.part(length))?;
        }
        let mut head = Vec::with_capacity(MAX_HEAD);
        let length = usize::try_from(range.length).map_err(io::Error::other)?;
        let simple = replies.style == Style::Simple;
        replies.data_head(&mut head, range.offset, length, simple);
        let mut turn = self.output.turn(&self.peer.stream);
        turn.send(&mut [IoSlice::new(&head)]).map_err(Broken::Connection)?;
        let mut failed = None;
        for (at, length) in pieces(range) {
            let part = scratch.part(length);
            if failed.is_some() {
                part.fill(0);
            } else if let Err(error) = self.export.read(at, part) {
                if simple {
                    let _ = self.peer.stream.shutdown(Shutdown::Both);
                    return Err(Broken::Connection(error));
                }
                part.fill(0);
                failed = Some(error);
            }
            turn.send(&mut [IoSlice::new(part)]).map_err(Broken::Connection)?;
        }
        if let Some(error) = failed {
            return Err(Broken::Medium(error));
        }
        if !simple {
            head.clear();
            replies.done(&mut head);
            turn.send(&mut [IoSlice::new(&head)]).map_err(Broken::Connection)?;
        }
        Ok(())
    }

    /// Chunks of data and holes; other replies may come between them.
    fn stream_chunks(&self, scratch: &mut Scratch, replies: Replies, range: Range) -> Result<(), Broken> {
        let end = range.offset + range.length;
        let mut at = range.offset;
        while at < end {
            let rest = Range {
                offset: at,
                length: end - at,
            };
            for extent in self.export.extents_up_to(rest, EXTENTS) {
                let here = Range {
                    offset: at,
                    length: extent.length,
                };
                at += extent.length;
                if extent.state & STATE_ZERO != 0 {
                    let mut out = Vec::with_capacity(MAX_HEAD + 12);
                    replies.hole(&mut out, here.offset, here.length, at == end);
                    self.send(&out).map_err(Broken::Connection)?;
                    continue;
                }
                for (offset, length) in pieces(here) {
                    let length = length as u64;
                    self.stream_piece(scratch, replies, Range { offset, length }, offset + length == end)?;
                }
            }
        }
        Ok(())
    }
}

/// Why a long request did not come to its end.
pub(super) enum Broken {
    /// The error can be told.
    Medium(io::Error),
    /// Nothing can be told any more.
    Connection(io::Error),
}

impl From<io::Error> for Broken {
    fn from(error: io::Error) -> Self {
        Self::Medium(error)
    }
}

/// Cuts a range into pieces of at most [`PIECE`] bytes, at multiples of it.
fn pieces(range: Range) -> impl Iterator<Item = (u64, usize)> {
    let end = range.offset + range.length;
    let mut at = range.offset;
    std::iter::from_fn(move || {
        let size = PIECE as u64;
        let next = (at - at % size).saturating_add(size).min(end);
        let piece = (at, usize::try_from(next - at).ok()?);
        at = next;
        (piece.1 > 0).then_some(piece)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn pieces_cover_a_range_once(offset in 0..1_u64 << 40, length in 1_u64..4 << 20) {
            let mut at = offset;
            for (from, length) in pieces(Range { offset, length }) {
                prop_assert!(from == at && (1..=PIECE).contains(&length));
                at += length as u64;
            }
            prop_assert_eq!(at, offset + length);
        }
    }
}
