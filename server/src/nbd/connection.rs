//! The engine: one connection's transmission phase, by blocking threads that take turns.
//!
//! Each worker waits for its turn to receive, takes one request with its payload, lets the next worker receive, executes
//! the request and sends the reply. So requests run concurrently and complete out of order, without a hand-over between
//! threads. What a client that does not read its replies can hold is bounded by [`Budget`]; it holds no other connection.
//!
//! Specification: "Transmission".

use std::io::{self, BufReader, IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use stiefel_shared::nbd::{
    CHUNK_LEN, Chunk, Errno, REPLY_BLOCK_STATUS, REPLY_ERROR, REPLY_FLAG_DONE, REPLY_NONE, REPLY_OFFSET_DATA,
    REQUEST_LEN, Request, SimpleReply, encode_block_status, encode_error_payload,
};

use super::export::Export;
use super::negotiate::{ALLOCATION_CONTEXT, Agreed};
use super::request::{Bounds, Command, Refusal, validate};

/// A worker keeps its buffer for the next request up to this size, in bytes; larger ones are given back.
const KEPT_BUFFER: usize = 1 << 20;
/// Stack of a worker thread, in bytes: it calls nothing deep.
const STACK: usize = 256 << 10;

/// One client's socket, shared by those who serve it and those who may have to drop it.
#[derive(Debug)]
pub(super) struct Peer {
    pub(super) stream: TcpStream,
    /// Set: no further request is executed.
    pub(super) closing: AtomicBool,
}

/// Reads and writes a peer's socket, within a deadline while it negotiates.
pub(super) struct Wire {
    pub(super) peer: Arc<Peer>,
    pub(super) deadline: Option<Instant>,
}

impl Wire {
    /// Time left, never zero, which the socket would take for "for ever".
    fn left(&self) -> io::Result<Option<Duration>> {
        let Some(deadline) = self.deadline else { return Ok(None) };
        match deadline.checked_duration_since(Instant::now()) {
            Some(left) if !left.is_zero() => Ok(Some(left)),
            _ => Err(io::ErrorKind::TimedOut.into()),
        }
    }

    /// Ends the deadline.
    pub(super) fn unlimit(&mut self) -> io::Result<()> {
        self.deadline = None;
        self.peer.stream.set_read_timeout(None)?;
        self.peer.stream.set_write_timeout(None)
    }
}

impl Read for Wire {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if let Some(left) = self.left()? {
            self.peer.stream.set_read_timeout(Some(left))?;
        }
        (&self.peer.stream).read(buffer)
    }
}

impl Write for Wire {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        if let Some(left) = self.left()? {
            self.peer.stream.set_write_timeout(Some(left))?;
        }
        (&self.peer.stream).write(data)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Bounds the payload bytes that requests hold in memory.
struct Budget {
    free: Mutex<u32>,
    freed: Condvar,
}

impl Budget {
    /// Waits until `bytes` are free; `bytes` must not be more than the whole budget.
    fn take(&self, bytes: u32) {
        let mut free = lock(&self.free);
        while *free < bytes {
            free = self.freed.wait(free).unwrap_or_else(PoisonError::into_inner);
        }
        *free -= bytes;
    }

    fn give(&self, bytes: u32) {
        *lock(&self.free) += bytes;
        self.freed.notify_all();
    }
}

/// A request that was received whole, its payload in the worker's buffer.
struct Job {
    cookie: u64,
    work: Result<Command, Refusal>,
    /// Bytes of the budget it holds.
    held: u32,
}

/// What a request is answered with.
enum Reply {
    Done,
    /// The worker's buffer, read from this offset.
    Data {
        offset: u64,
    },
    Status(Vec<u8>),
    Error {
        errno: Errno,
        message: String,
    },
}

struct Transmission {
    input: Mutex<Input>,
    output: Mutex<()>,
    peer: Arc<Peer>,
    export: Arc<Export>,
    bounds: Bounds,
    structured: bool,
    budget: Budget,
}

struct Input {
    wire: BufReader<Wire>,
    ended: bool,
}

/// Serves one connection until the client leaves, breaks the framing, or is dropped; every request taken has then ended.
pub(super) fn transmit(wire: BufReader<Wire>, agreed: Agreed<Arc<Export>>, workers: usize, bytes_in_flight: u32) {
    let Agreed {
        export,
        bounds,
        structured,
    } = agreed;
    let transmission = Transmission {
        peer: Arc::clone(&wire.get_ref().peer),
        input: Mutex::new(Input { wire, ended: false }),
        output: Mutex::new(()),
        export,
        budget: Budget {
            free: Mutex::new(bytes_in_flight.max(bounds.maximum)),
            freed: Condvar::new(),
        },
        bounds,
        structured,
    };
    thread::scope(|scope| {
        for _ in 1..workers {
            let worker = thread::Builder::new().name("nbd-worker".into()).stack_size(STACK);
            // This thread works too, so fewer helpers than wished for are enough.
            if worker.spawn_scoped(scope, || transmission.work()).is_err() {
                break;
            }
        }
        transmission.work();
    });
}

impl Transmission {
    fn work(&self) {
        let mut buffer = Vec::new();
        while let Some(job) = self.receive(&mut buffer) {
            let reply = self.execute(&job, &mut buffer);
            self.export.count(!matches!(reply, Reply::Error { .. }));
            let sent = self.send(job.cookie, &reply, &buffer);
            if buffer.capacity() > KEPT_BUFFER {
                buffer = Vec::new();
            }
            self.budget.give(job.held);
            if sent.is_err() {
                // Also wakes the worker that receives. Nothing more to do when it is closed already.
                let _ = self.peer.stream.shutdown(Shutdown::Both);
            }
        }
    }

    /// Takes the next request with its payload; `None` when no more will come.
    fn receive(&self, buffer: &mut Vec<u8>) -> Option<Job> {
        let mut input = lock(&self.input);
        if input.ended {
            return None;
        }
        let job = self.take_request(&mut input.wire, buffer).ok().flatten();
        input.ended = job.is_none();
        job
    }

    /// An error is a closed connection or broken framing: both end it.
    fn take_request(&self, wire: &mut BufReader<Wire>, buffer: &mut Vec<u8>) -> io::Result<Option<Job>> {
        let mut header = [0; REQUEST_LEN];
        wire.read_exact(&mut header)?;
        let request = Request::parse(&header).map_err(io::Error::other)?;
        let mut work = validate(&request, &self.bounds);
        if work == Ok(Command::Disconnect) {
            return Ok(None);
        }
        if self.peer.closing.load(Ordering::Acquire) {
            work = Err(Refusal {
                errno: Errno::Shutdown,
                message: "the server drops this connection",
            });
        }
        let mut held = 0;
        match work {
            Ok(Command::Read(range) | Command::Write { range, .. }) => held = range.length,
            Ok(_) => {}
            Err(_) => {
                let length = u64::from(request.payload_len());
                if io::copy(&mut wire.take(length), &mut io::sink())? < length {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
            }
        }
        self.budget.take(held);
        if let Ok(Command::Write { range, .. }) = work
            && let Err(error) = resize(buffer, range.length).and_then(|()| wire.read_exact(buffer))
        {
            self.budget.give(held);
            return Err(error);
        }
        Ok(Some(Job {
            cookie: request.cookie,
            work,
            held,
        }))
    }

    fn execute(&self, job: &Job, buffer: &mut Vec<u8>) -> Reply {
        let command = match job.work {
            Ok(command) => command,
            Err(Refusal { errno, message }) => {
                return Reply::Error {
                    errno,
                    message: message.into(),
                };
            }
        };
        let export = &self.export;
        let done = match command {
            Command::Read(range) => {
                let read = resize(buffer, range.length).and_then(|()| export.read(range.offset, buffer));
                return match read {
                    Ok(()) => Reply::Data { offset: range.offset },
                    Err(error) => failure(&error),
                };
            }
            Command::BlockStatus { range, one } => {
                return Reply::Status(encode_block_status(ALLOCATION_CONTEXT, &export.extents(range, one)));
            }
            Command::Write { range, fua } => export.write(range.offset, buffer, fua),
            Command::Flush => export.flush(),
            Command::Trim { range, fua } => export.trim(range, fua),
            Command::Cache(range) => export.cache(range),
            Command::WriteZeroes {
                range,
                fua,
                no_hole,
                fast,
            } => export.zero(range, no_hole, fast, fua),
            Command::Disconnect => Ok(()),
        };
        done.map_or_else(|error| failure(&error), |()| Reply::Done)
    }

    fn send(&self, cookie: u64, reply: &Reply, buffer: &[u8]) -> io::Result<()> {
        let body: &[u8] = match reply {
            Reply::Data { .. } => buffer,
            Reply::Status(status) => status,
            Reply::Done | Reply::Error { .. } => &[],
        };
        let head = if self.structured {
            structured(cookie, reply, body.len())?
        } else {
            simple(cookie, reply)?
        };
        let _turn = lock(&self.output);
        write_both(&self.peer.stream, &head, body)
    }
}

/// Makes the buffer `length` bytes long, which the caller has checked.
fn resize(buffer: &mut Vec<u8>, length: u32) -> io::Result<()> {
    let length = usize::try_from(length).map_err(io::Error::other)?;
    buffer.try_reserve_exact(length.saturating_sub(buffer.len()))?;
    buffer.resize(length, 0);
    Ok(())
}

/// The header of a simple reply.
fn simple(cookie: u64, reply: &Reply) -> io::Result<Vec<u8>> {
    let error = match reply {
        Reply::Done | Reply::Data { .. } => 0,
        Reply::Error { errno, .. } => errno.code(),
        Reply::Status(_) => return Err(io::Error::other("block status needs structured replies")),
    };
    Ok(SimpleReply { error, cookie }.encode().to_vec())
}

/// The header of the only chunk of a structured reply, with all of the payload but `body` bytes.
fn structured(cookie: u64, reply: &Reply, body: usize) -> io::Result<Vec<u8>> {
    let (kind, first) = match reply {
        Reply::Done => (REPLY_NONE, Vec::new()),
        Reply::Data { offset } => (REPLY_OFFSET_DATA, offset.to_be_bytes().to_vec()),
        Reply::Status(_) => (REPLY_BLOCK_STATUS, Vec::new()),
        Reply::Error { errno, message } => (REPLY_ERROR, encode_error_payload(*errno, message)),
    };
    let length = u32::try_from(first.len() + body).map_err(io::Error::other)?;
    let mut head = Vec::with_capacity(CHUNK_LEN + first.len());
    head.extend_from_slice(
        &Chunk {
            flags: REPLY_FLAG_DONE,
            kind,
            cookie,
            length,
        }
        .encode(),
    );
    head.extend_from_slice(&first);
    Ok(head)
}

/// Sends header and body, in one system call as long as the socket takes them.
fn write_both(mut stream: &TcpStream, head: &[u8], body: &[u8]) -> io::Result<()> {
    let mut slices = [IoSlice::new(head), IoSlice::new(body)];
    let mut rest = &mut slices[..];
    IoSlice::advance_slices(&mut rest, 0);
    while !rest.is_empty() {
        match stream.write_vectored(rest) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(sent) => IoSlice::advance_slices(&mut rest, sent),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// The reply to what the medium refused ("Error values").
fn failure(error: &io::Error) -> Reply {
    let errno = match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => Errno::NoSpc,
        io::ErrorKind::Unsupported => Errno::NotSup,
        io::ErrorKind::OutOfMemory => Errno::NoMem,
        _ => Errno::Io,
    };
    Reply::Error {
        errno,
        message: error.to_string(),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use stiefel_shared::nbd::{CMD_READ, CMD_WRITE, FLAG_HAS_FLAGS, MAX_PAYLOAD};

    use super::*;
    use crate::nbd::ExportOptions;

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
        let wire = BufReader::new(Wire { peer, deadline: None });
        transmit(
            wire,
            Agreed {
                export,
                bounds,
                structured: false,
            },
            1,
            0,
        );
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

    #[test]
    fn errors_of_the_medium_keep_their_meaning() {
        let errno = |kind: io::ErrorKind| match failure(&kind.into()) {
            Reply::Error { errno, .. } => errno,
            _ => unreachable!(),
        };
        assert_eq!(errno(io::ErrorKind::StorageFull), Errno::NoSpc);
        assert_eq!(errno(io::ErrorKind::QuotaExceeded), Errno::NoSpc);
        assert_eq!(errno(io::ErrorKind::FileTooLarge), Errno::NoSpc);
        assert_eq!(errno(io::ErrorKind::Unsupported), Errno::NotSup);
        assert_eq!(errno(io::ErrorKind::OutOfMemory), Errno::NoMem);
        assert_eq!(errno(io::ErrorKind::Other), Errno::Io);
    }
}
