//! Long requests: reads that go file → pipe → socket, writes that go socket → pipe → file, piece by piece.

use std::io::{self, IoSlice};
use std::net::TcpStream;
use std::sync::Arc;

use rustix::io::ioctl_fionread;

use super::super::connection::{BIG, Broken};
use super::super::export::Export;
use super::super::pipe::Pipe;
use super::super::reply::{Failure, Replies};
use super::super::request::{Command, Range};
use super::patience::Patience;
use super::{Driver, Step, length_of};

/// Bytes that are collected in a pipe before they are written, as long as more are at hand (docs/nbd.md, "The engine").
const GULP: usize = 128 << 10;
/// Files are written in pieces that end where pages do, or the kernel would have to read before it writes.
const PAGE: u64 = 4096;

impl Driver {
    /// A read of more than [`super::SMALL`] bytes: here if it seems to be in memory, else as a task.
    pub(super) fn long_read(&mut self, replies: Replies, range: Range, whole: bool) -> io::Result<Step> {
        let export = &self.connection.export;
        if !export.is_at_hand(range.offset) || !export.is_at_hand(range.offset + range.length - 1) {
            let command = Command::Read { range, whole };
            return self.dispatch(replies, command, Vec::new(), length_of(range).min(BIG));
        }
        self.send_out()?;
        let connection = Arc::clone(&self.connection);
        connection.stream_read(&mut self.scratch, replies, range, whole)?;
        Ok(Step::On)
    }

    /// A write that goes piece by piece as it comes in; as a task if the page cache does not take it at once.
    pub(super) fn long_write(&mut self, replies: Replies, range: Range, fua: bool) -> io::Result<Step> {
        let end = range.offset + range.length;
        let mut at = range.offset;
        let mut result = Ok(());
        if range.length <= BIG as u64 && self.connection.export.is_slow() {
            return self.collect(replies, range, fua);
        }
        while at < end && result.is_ok() {
            if self.input.len() == 0 && self.can_splice() {
                self.send_out()?;
                result = self.write_spliced(&mut at, end)?;
                self.bulk = true;
                continue;
            }
            let mut piece = usize::try_from(end - at).unwrap_or(usize::MAX).min(self.piece(at));
            self.await_payload(piece)?;
            if at + (piece as u64) < end {
                piece -= over_page(at, piece);
            }
            let data = self.input.front(piece);
            let export = &self.connection.export;
            let written = export.write_now(&[IoSlice::new(data)], at);
            if at == range.offset && range.length <= BIG as u64 && !written.as_ref().is_ok_and(|bytes| *bytes > 0) {
                return self.collect(replies, range, fua);
            }
            result = written.and_then(|written| export.write(at + written as u64, &data[written..]));
            self.input.pass(piece);
            at += piece as u64;
        }
        self.skip(end - at)?;
        if fua && result.is_ok() {
            return self.dispatch(replies, Command::Flush, Vec::new(), 0);
        }
        self.connection.export.count(result.is_ok());
        self.reply(|out| match result {
            Ok(()) => replies.done(out),
            Err(error) => replies.error(out, &Failure::from(error)),
        })
    }

    /// Whether payloads can go to the file without passing through memory.
    fn can_splice(&self) -> bool {
        self.scratch.pipe.is_some() && self.connection.export.file().is_some()
    }

    /// How much of a payload to receive into the buffer: all of it, or what is there already, up to the end of a page, where
    /// the rest can be spliced.
    fn piece(&self, at: u64) -> usize {
        if !self.can_splice() {
            return self.input.capacity();
        }
        let here = at + self.input.len() as u64;
        usize::try_from(here.next_multiple_of(PAGE) - at)
            .unwrap_or(usize::MAX)
            .min(self.input.capacity())
    }

    /// Writes the rest of a payload, none of which is in the buffer, from the socket to the file, until `at` is `end` or the
    /// medium failed: the inner error. `at` is then what was taken from the socket.
    fn write_spliced(&mut self, at: &mut u64, end: u64) -> io::Result<io::Result<()>> {
        let Some(pipe) = self.scratch.pipe.take() else {
            return Ok(Ok(()));
        };
        let mut passage = Passage {
            pipe: &pipe,
            stream: &self.connection.peer.stream,
            export: &self.connection.export,
            patience: &mut self.patience,
            at: *at,
            end,
            held: 0,
        };
        let passed = passage.pass();
        *at = passage.at + passage.held as u64;
        match passed {
            Ok(()) => {
                self.scratch.pipe = Some(pipe);
                Ok(Ok(()))
            }
            // A file system that has no splice: what is in the pipe goes through memory, and so does all that comes.
            Err(Broken::Medium(error))
                if matches!(error.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported) =>
            {
                let mut data = vec![0; passage.held];
                pipe.read(&mut data)?;
                Ok(self.connection.export.write(passage.at, &data))
            }
            Err(Broken::Medium(error)) => {
                // The old one holds a part that was not written.
                self.scratch.pipe = Pipe::new().ok();
                Ok(Err(error))
            }
            Err(Broken::Connection(error)) => Err(error),
        }
    }

    /// Takes a write's whole payload into memory and makes a task of it.
    fn collect(&mut self, replies: Replies, range: Range, fua: bool) -> io::Result<Step> {
        let length = length_of(range);
        let mut data = Vec::new();
        data.try_reserve_exact(length)?;
        while data.len() < length {
            if self.input.len() == 0 {
                self.send_out()?;
                if !self.receive()? {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
            }
            let here = self.input.front(length - data.len());
            data.extend_from_slice(here);
            let here = here.len();
            self.input.pass(here);
        }
        self.dispatch(replies, Command::Write { range, fua }, data, length)
    }
}

/// A payload on its way from the socket to the file, through a pipe.
struct Passage<'a> {
    pipe: &'a Pipe,
    stream: &'a TcpStream,
    export: &'a Export,
    patience: &'a mut Patience,
    /// What is written so far, and the end.
    at: u64,
    end: u64,
    /// Bytes in the pipe.
    held: usize,
}

impl Passage<'_> {
    fn pass(&mut self) -> Result<(), Broken> {
        while self.at < self.end {
            let mut left = self.gather().map_err(Broken::Connection)?;
            while left > 0 {
                let written = self.export.write_from(self.pipe, self.at, left, true)?;
                left -= written;
                self.held -= written;
                self.at += written as u64;
            }
        }
        Ok(())
    }

    /// Takes what has come, and waits only if that cannot be written yet; returns how much to write now.
    fn gather(&mut self) -> io::Result<usize> {
        loop {
            let missing = usize::try_from(self.end - self.at).unwrap_or(usize::MAX) - self.held;
            if missing == 0 {
                return Ok(self.held);
            }
            let pages = self.held - over_page(self.at, self.held);
            if self.held >= GULP {
                return Ok(pages);
            }
            // There may be more, and fewer and longer writes cost less.
            let wanted = match self.patience.look(|| here(self.stream))? {
                Some(here) => here.min(missing),
                // Better than to sleep with nothing done.
                None if pages > 0 => return Ok(pages),
                // Sleeps, or comes back with the end.
                None => missing,
            };
            match self.pipe.receive(self.stream, wanted)? {
                Some(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Some(got) => {
                    self.held += got;
                    self.patience.payload(got);
                }
                // Full of small pieces.
                None => return Ok(self.held),
            }
        }
    }
}

/// How many bytes have come, if any.
fn here(stream: &TcpStream) -> io::Result<Option<usize>> {
    let here = usize::try_from(ioctl_fionread(stream)?).unwrap_or(usize::MAX);
    Ok((here > 0).then_some(here))
}

/// How many of `length` bytes at `at` lie behind the last end of a page.
fn over_page(at: u64, length: usize) -> usize {
    usize::try_from((at + length as u64) % PAGE).unwrap_or(0).min(length)
}
