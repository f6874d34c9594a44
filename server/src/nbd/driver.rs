//! The engine: receives a connection's requests, many per system call, and answers at once what needs no medium.
//!
//! Reads that are in the page cache, and writes that the page cache takes, are done here; neighbours in one system call.
//! All replies that are ready go out in one more, before this thread waits for the client again. What has to wait for
//! the medium becomes a task: on another thread while more requests are at hand, else on this very thread, after another
//! one has taken over the driving; so a lone flush or cold read is not handed around.
//!
//! Specification: "Transmission". Why this engine and not another: docs/nbd.md, "The engine".

use std::any::Any;
use std::io::{self, IoSlice, IoSliceMut};
use std::net::Shutdown;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno as Os;
use rustix::net::{RecvFlags, recv};
use stiefel_shared::nbd::{Asked, EXTENDED_REQUEST_LEN, Errno, REQUEST_LEN, Request};

use super::connection::{BIG, Connection, PIECE, Scratch, Task};
use super::export::Export;
use super::negotiate::{Agreed, Style};
use super::output::Output;
use super::pipe::Pipe;
use super::pool::Pool;
use super::reply::{Failure, MAX_HEAD, Replies};
use super::request::{Command, Range, Refusal, validate};
use super::wire::Peer;

/// Bytes received at a time at most.
const INPUT: usize = PIECE;
/// Payload up to which a request is done in these buffers, together with its neighbours.
const SMALL: usize = 64 << 10;
/// Bytes received after a header where a long payload is expected, in case something else comes.
const SHORT: usize = 8 << 10;
/// Bytes written to a file from a pipe at a time at least, if more are to come.
const GULP: usize = 128 << 10;
/// Replies that are collected before they are sent, in bytes.
const OUTPUT: usize = 256 << 10;
/// Neighbours done in one system call at most.
const RUN: usize = 64;
/// Files are written in pieces that end where pages do, or the kernel would have to read before it writes.
const PAGE: u64 = 4096;

/// The receiving side of a connection. Moves from thread to thread.
pub(super) struct Driver {
    connection: Arc<Connection>,
    input: Vec<u8>,
    /// The part of `input` that holds bytes not yet looked at.
    start: usize,
    end: usize,
    /// Replies not yet sent: the first `filled` bytes.
    out: Vec<u8>,
    filled: usize,
    scratch: Scratch,
    /// The last request was a long write: the next bytes are better left in the socket.
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

/// A small request of a run, and where its payload lies in the input.
struct Member {
    replies: Replies,
    range: Range,
    payload: usize,
}

/// Serves a connection until the client leaves, breaks the framing, or is dropped. `ahead` is what it sent too early for
/// the negotiation to look at; `guard` is dropped when the last request has ended, which may be later than this returns.
pub(super) fn transmit(
    peer: Arc<Peer>,
    ahead: &[u8],
    agreed: Agreed<Arc<Export>>,
    pool: Arc<Pool>,
    (workers, bytes_in_flight): (usize, u32),
    guard: Box<dyn Any + Send + Sync>,
) {
    let mut input = vec![0; INPUT.max(ahead.len())];
    input[..ahead.len()].copy_from_slice(ahead);
    let least = u32::try_from(BIG).unwrap_or(u32::MAX);
    let connection = Arc::new(Connection {
        peer,
        export: agreed.export,
        bounds: agreed.bounds,
        style: agreed.style,
        pool,
        output: Output::new(bytes_in_flight.max(least)),
        tasks: AtomicUsize::new(0),
        workers,
        _guard: guard,
    });
    let driver = Driver {
        connection,
        input,
        start: 0,
        end: ahead.len(),
        out: vec![0; OUTPUT],
        filled: 0,
        scratch: Scratch {
            pipe: Pipe::new().ok(),
            ..Scratch::default()
        },
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
        let Some(asked) = self.peek()? else {
            self.send_out()?;
            return Ok(if self.receive()? { Step::On } else { Step::End });
        };
        self.start += self.header();
        let replies = self.replies(&asked);
        let mut work = validate(&asked, &self.connection.bounds);
        if work == Ok(Command::Disconnect) {
            return Ok(Step::End);
        }
        if self.connection.peer.closing.load(Ordering::Acquire) {
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
            Err(refusal) => {
                self.skip(asked.payload)?;
                self.connection.export.count(false);
                self.reply(|out| replies.error(out, &Failure::from(refusal)))
            }
        }
    }

    fn replies(&self, asked: &Asked) -> Replies {
        Replies {
            style: self.connection.style,
            cookie: asked.cookie,
            offset: asked.offset,
        }
    }

    /// Length of a request's header.
    fn header(&self) -> usize {
        match self.connection.style {
            Style::Extended => EXTENDED_REQUEST_LEN,
            _ => REQUEST_LEN,
        }
    }

    /// The next request, if its header is here; an error is broken framing.
    fn peek(&self) -> io::Result<Option<Asked>> {
        let here = &self.input[self.start..self.end];
        let asked = match self.connection.style {
            Style::Extended => here.first_chunk().map(Asked::parse_extended),
            _ => here.first_chunk().map(|header| Request::parse(header).map(Asked::from)),
        };
        asked.transpose().map_err(io::Error::other)
    }

    /// Receives more, at least a byte; false when no more will come.
    fn receive(&mut self) -> io::Result<bool> {
        if self.start > 0 {
            self.input.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        let most = if self.bulk {
            self.header() + SHORT
        } else {
            self.input.len()
        };
        self.bulk = false;
        let got = self.receive_into(self.end, most.max(self.end + 1), RecvFlags::empty())?;
        self.end += got;
        Ok(got > 0)
    }

    fn receive_into(&mut self, from: usize, to: usize, flags: RecvFlags) -> io::Result<usize> {
        loop {
            match recv(&self.connection.peer.stream, &mut self.input[from..to], flags) {
                Err(Os::INTR) => {}
                Err(errno) => return Err(errno.into()),
                Ok((_, got)) => return Ok(got),
            }
        }
    }

    /// Waits until `length` bytes of payload, not more than the input holds, are in the buffer.
    fn await_payload(&mut self, length: usize) -> io::Result<()> {
        if self.end - self.start >= length {
            return Ok(());
        }
        self.send_out()?;
        if self.input.len() - self.start < length {
            self.input.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        while self.end - self.start < length {
            let to = self.start + length;
            let got = self.receive_into(self.end, to, RecvFlags::WAITALL)?;
            if got == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            self.end += got;
        }
        Ok(())
    }

    /// Passes over a payload that nobody wants.
    fn skip(&mut self, mut length: u64) -> io::Result<()> {
        while length > 0 {
            if self.start == self.end && !self.receive()? {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let here = usize::try_from(length).unwrap_or(usize::MAX).min(self.end - self.start);
            self.start += here;
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

    /// Makes a task of a request. It runs elsewhere if more requests are at hand, now if there are too many tasks already,
    /// else on this thread while another one drives.
    fn dispatch(&mut self, replies: Replies, command: Command, data: Vec<u8>, held: usize) -> io::Result<Step> {
        let held = u32::try_from(held).map_err(io::Error::other)?;
        let more = self.peek()?.is_some();
        let connection = Arc::clone(&self.connection);
        if !connection.output.budget.try_take(held) {
            self.send_out()?;
            connection.output.budget.take(held);
        }
        let task = Task {
            replies,
            command,
            data,
            held,
        };
        if connection.tasks.fetch_add(1, Ordering::AcqRel) >= connection.workers {
            self.send_out()?;
            connection.execute(task);
            return Ok(Step::On);
        }
        if !more {
            return Ok(Step::Wait(task));
        }
        let pool = Arc::clone(&connection.pool);
        if let Err((job, _)) = pool.run(Box::new(move || connection.execute(task))) {
            self.send_out()?;
            job();
        }
        Ok(Step::On)
    }

    /// Dispatches those of a run that could not be done at once.
    fn dispatch_all(&mut self, run: &[Member], command: impl Fn(Range) -> Command, writes: bool) -> io::Result<Step> {
        let mut step = Step::On;
        for (index, member) in run.iter().enumerate() {
            let length = usize::try_from(member.range.length).map_err(io::Error::other)?;
            let data = if writes {
                self.input[member.payload..][..length].to_vec()
            } else {
                Vec::new()
            };
            step = self.dispatch(member.replies, command(member.range), data, length)?;
            if let Step::Wait(task) = step {
                if index + 1 == run.len() {
                    return Ok(Step::Wait(task));
                }
                let (connection, pool) = (Arc::clone(&self.connection), Arc::clone(&self.connection.pool));
                if let Err((job, _)) = pool.run(Box::new(move || connection.execute(task))) {
                    self.send_out()?;
                    job();
                }
                step = Step::On;
            }
        }
        Ok(step)
    }

    /// Small reads that follow one another on the disk, with one system call.
    fn small_reads(&mut self, replies: Replies, range: Range) -> io::Result<Step> {
        let mut run = vec![Member {
            replies,
            range,
            payload: 0,
        }];
        let mut bytes = MAX_HEAD + length_of(range);
        let mut next = range.offset + range.length;
        while run.len() < RUN {
            let Some(asked) = self.peek()? else { break };
            let Ok(Command::Read { range, .. }) = validate(&asked, &self.connection.bounds) else {
                break;
            };
            let more = MAX_HEAD + length_of(range);
            if range.offset != next || range.length > SMALL as u64 || bytes + more > self.out.len() {
                break;
            }
            self.start += self.header();
            run.push(Member {
                replies: self.replies(&asked),
                range,
                payload: 0,
            });
            bytes += more;
            next += range.length;
        }
        self.room(bytes)?;
        let done = self.read_run(&run);
        self.connection.export.count_many(done);
        self.dispatch_all(&run[done..], |range| Command::Read { range, whole: true }, false)
    }

    /// Reads what is in the page cache into the replies; returns how many members of the run that were.
    fn read_run(&mut self, run: &[Member]) -> usize {
        let mut head = Vec::with_capacity(MAX_HEAD);
        let mut parts = Vec::with_capacity(run.len());
        // Where each reply ends.
        let mut ends = Vec::with_capacity(run.len());
        let mut end = self.filled;
        let mut rest = &mut self.out[self.filled..];
        for member in run {
            let length = length_of(member.range);
            head.clear();
            member.replies.data_head(&mut head, member.range.offset, length, true);
            let (front, behind) = rest.split_at_mut(head.len());
            front.copy_from_slice(&head);
            let (data, behind) = behind.split_at_mut(length);
            parts.push(IoSliceMut::new(data));
            rest = behind;
            end += head.len() + length;
            ends.push(end);
        }
        let mut read = self.connection.export.read_now(&mut parts, run[0].range.offset);
        let mut done = 0;
        for (member, end) in run.iter().zip(ends) {
            let length = length_of(member.range);
            if read < length {
                break;
            }
            read -= length;
            self.filled = end;
            done += 1;
        }
        done
    }

    /// Small writes that follow one another on the disk, with one system call.
    fn small_writes(&mut self, replies: Replies, range: Range) -> io::Result<Step> {
        self.await_payload(length_of(range))?;
        let mut run = vec![Member {
            replies,
            range,
            payload: self.start,
        }];
        self.start += length_of(range);
        let mut next = range.offset + range.length;
        while run.len() < RUN {
            let Some(asked) = self.peek()? else { break };
            let Ok(Command::Write { range, fua: false }) = validate(&asked, &self.connection.bounds) else {
                break;
            };
            let (header, length) = (self.header(), length_of(range));
            if range.offset != next || self.end - self.start < header + length {
                break;
            }
            run.push(Member {
                replies: self.replies(&asked),
                range,
                payload: self.start + header,
            });
            self.start += header + length;
            next += range.length;
        }
        let parts: Vec<_> = run
            .iter()
            .map(|member| IoSlice::new(&self.input[member.payload..][..length_of(member.range)]))
            .collect();
        // An error is found again, and told, by the task.
        let mut written = self.connection.export.write_now(&parts, range.offset).unwrap_or(0);
        let mut done = 0;
        for member in &run {
            let length = length_of(member.range);
            if written < length {
                break;
            }
            written -= length;
            done += 1;
            self.reply(|out| member.replies.done(out))?;
        }
        self.connection.export.count_many(done);
        self.dispatch_all(&run[done..], |range| Command::Write { range, fua: false }, true)
    }

    /// A read of more than [`SMALL`] bytes: here if it seems to be in memory, else as a task.
    fn long_read(&mut self, replies: Replies, range: Range, whole: bool) -> io::Result<Step> {
        let export = &self.connection.export;
        if !export.is_at_hand(range.offset) || !export.is_at_hand(range.offset + range.length - 1) {
            return self.dispatch(
                replies,
                Command::Read { range, whole },
                Vec::new(),
                length_of(range).min(BIG),
            );
        }
        self.send_out()?;
        let connection = Arc::clone(&self.connection);
        connection.stream_read(&mut self.scratch, replies, range, whole)?;
        Ok(Step::On)
    }

    /// A write that goes piece by piece as it comes in; as a task if the page cache does not take it at once.
    fn long_write(&mut self, replies: Replies, range: Range, fua: bool) -> io::Result<Step> {
        let end = range.offset + range.length;
        let mut at = range.offset;
        let mut result = Ok(());
        if range.length <= BIG as u64 && self.connection.export.is_slow() {
            return self.collect(replies, range, fua);
        }
        while at < end && result.is_ok() {
            if self.start == self.end && self.scratch.pipe.is_some() && self.connection.export.file().is_some() {
                self.send_out()?;
                result = self.write_spliced(&mut at, end)?;
                self.bulk = true;
                continue;
            }
            let mut piece = usize::try_from(end - at).unwrap_or(usize::MAX).min(self.piece(at));
            self.await_payload(piece)?;
            if at + (piece as u64) < end {
                piece -= usize::try_from((at + piece as u64) % PAGE).unwrap_or(0);
            }
            let data = &self.input[self.start..][..piece];
            let export = &self.connection.export;
            let written = export.write_now(&[IoSlice::new(data)], at);
            if at == range.offset && range.length <= BIG as u64 && !written.as_ref().is_ok_and(|bytes| *bytes > 0) {
                return self.collect(replies, range, fua);
            }
            result = written.and_then(|written| export.write(at + written as u64, &data[written..], false));
            self.start += piece;
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

    /// How much of a payload to receive into the buffer: all of it, or what is there already, up to the end of a page, where
    /// the rest can be spliced.
    fn piece(&self, at: u64) -> usize {
        if self.scratch.pipe.is_none() || self.connection.export.file().is_none() {
            return self.input.len();
        }
        let here = at + (self.end - self.start) as u64;
        usize::try_from(here.next_multiple_of(PAGE) - at)
            .unwrap_or(usize::MAX)
            .min(self.input.len())
    }

    /// Writes the rest of a payload, none of which is in the buffer, from the socket to the file, until `at` is `end` or the
    /// medium failed: the inner error. `at` is then what was taken from the socket.
    fn write_spliced(&mut self, at: &mut u64, end: u64) -> io::Result<io::Result<()>> {
        let Some(pipe) = &self.scratch.pipe else {
            return Ok(Ok(()));
        };
        let connection = &self.connection;
        let stream = &connection.peer.stream;
        let mut held = 0;
        let mut waited = false;
        while *at < end {
            let wanted = usize::try_from(end - *at).unwrap_or(usize::MAX).saturating_sub(held);
            let got = if wanted == 0 {
                None
            } else {
                pipe.receive(stream, wanted)?
            };
            if got == Some(0) {
                self.scratch.pipe = Pipe::new().ok();
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            held += got.unwrap_or(0);
            let all = *at + held as u64 == end;
            let pages = held - usize::try_from((*at + held as u64) % PAGE).unwrap_or(0).min(held);
            let now = match got {
                _ if all => held,
                _ if pages >= GULP => pages,
                // Better than to wait with nothing done.
                None if pages > 0 => pages,
                // Nothing came although something is there: the pipe is full.
                None if waited => held,
                None => {
                    let _ = poll(&mut [PollFd::new(stream, PollFlags::IN)], None);
                    waited = true;
                    continue;
                }
                Some(_) => 0,
            };
            waited = false;
            let mut left = now;
            while left > 0 {
                match connection.export.write_from(pipe, *at, left, true) {
                    Ok(written) => {
                        left -= written;
                        held -= written;
                        *at += written as u64;
                    }
                    Err(error) => {
                        *at += held as u64;
                        self.scratch.pipe = Pipe::new().ok();
                        return Ok(Err(error));
                    }
                }
            }
        }
        Ok(Ok(()))
    }

    /// Takes a write's whole payload into memory and makes a task of it.
    fn collect(&mut self, replies: Replies, range: Range, fua: bool) -> io::Result<Step> {
        let length = length_of(range);
        let mut data = Vec::new();
        data.try_reserve_exact(length)?;
        while data.len() < length {
            if self.start == self.end {
                self.send_out()?;
                if !self.receive()? {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
            }
            let here = (length - data.len()).min(self.end - self.start);
            data.extend_from_slice(&self.input[self.start..][..here]);
            self.start += here;
        }
        self.dispatch(replies, Command::Write { range, fua }, data, length)
    }
}

/// A range's length in memory; no payload is longer than 32 bits can say.
fn length_of(range: Range) -> usize {
    usize::try_from(range.length).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::sync::atomic::AtomicBool;

    use stiefel_shared::nbd::{CMD_READ, CMD_WRITE, FLAG_HAS_FLAGS, MAX_PAYLOAD, SimpleReply};

    use super::*;
    use crate::nbd::ExportOptions;
    use crate::nbd::request::Bounds;

    #[test]
    fn a_closing_connection_answers_eshutdown_and_writes_nothing() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(4096).unwrap();
        let export = Export::open(file.path(), ExportOptions::default()).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let peer = Arc::new(Peer {
            stream: listener.accept().unwrap().0,
            closing: AtomicBool::new(true),
        });
        let bounds = Bounds {
            size: 4096,
            flags: FLAG_HAS_FLAGS,
            minimum: 1,
            maximum: MAX_PAYLOAD,
            block_status: false,
            extended: false,
        };
        for (cookie, command) in [(1, CMD_WRITE), (2, CMD_READ)] {
            let request = Request {
                flags: 0,
                command,
                cookie,
                offset: 0,
                length: 512,
            };
            client.write_all(&request.encode()).unwrap();
            if command == CMD_WRITE {
                client.write_all(&[7; 512]).unwrap();
            }
        }
        client.shutdown(Shutdown::Write).unwrap();
        let agreed = Agreed {
            export,
            bounds,
            style: Style::Simple,
        };
        transmit(peer, &[], agreed, Arc::default(), (1, 0), Box::new(()));
        let mut heard = Vec::new();
        client.read_to_end(&mut heard).unwrap();
        let expected = [1, 2].map(|cookie| {
            SimpleReply {
                error: Errno::Shutdown.code(),
                cookie,
            }
            .encode()
        });
        assert_eq!(heard, expected.concat());
        assert_eq!(std::fs::read(file.path()).unwrap(), vec![0; 4096]);
    }
}
