//! The batch client: keeps a number of requests open per connection and asks the kernel as rarely as it can, so that what
//! is measured is the server. Simple replies, as the Linux kernel's client has them.

use std::io::{IoSlice, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Barrier;
use std::time::{Duration, Instant};

use stiefel_shared::nbd::{
    CMD_FLUSH, CMD_READ, CMD_WRITE, GoAnswer, InfoRequest, OPT_GO, OptionReplyHeader, Request, SIMPLE_REPLY_LEN,
    SimpleReply, encode_client_flags, encode_option, parse_greeting,
};

use super::BLOCK;

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Read,
    Write,
    /// A write, then a flush, one after the other.
    WriteFlush,
}

pub struct Load {
    pub kind: Kind,
    /// Bytes per request.
    pub size: usize,
    /// Requests open per connection.
    pub depth: usize,
    pub connections: usize,
    random: bool,
}

impl Load {
    pub const fn new(kind: Kind, size: usize, depth: usize, connections: usize, random: bool) -> Self {
        Self {
            kind,
            size,
            depth,
            connections,
            random,
        }
    }
}

/// What one measurement gave.
#[derive(Clone, Default)]
pub struct Sample {
    pub operations: u64,
    pub bytes: u64,
    pub seconds: f64,
    /// Microseconds per operation, only at depth 1.
    pub latencies: Vec<f32>,
}

/// Connections in transmission.
pub fn connect(address: SocketAddr, count: usize) -> Vec<TcpStream> {
    (0..count).map(|_| negotiate(address)).collect()
}

fn negotiate(address: SocketAddr) -> TcpStream {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_nodelay(true).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting).unwrap();
    let flags = encode_client_flags(parse_greeting(&greeting).unwrap());
    let wanted = InfoRequest {
        name: "disk".into(),
        wanted: vec![],
    };
    let option = encode_option(OPT_GO, &wanted.encode().unwrap()).unwrap();
    stream.write_all(&[&flags[..], &option].concat()).unwrap();
    let mut answer = GoAnswer::default();
    loop {
        let mut header = [0; 20];
        stream.read_exact(&mut header).unwrap();
        let header = OptionReplyHeader::parse(&header).unwrap();
        let mut data = vec![0; header.len as usize];
        stream.read_exact(&mut data).unwrap();
        if answer.absorb(OPT_GO, header, &data).unwrap() {
            return stream;
        }
    }
}

/// Runs the load on all connections at once.
pub fn run(connections: Vec<TcpStream>, load: &Load, disk: u64, time: Duration) -> (Vec<TcpStream>, Sample) {
    let start = Barrier::new(connections.len());
    let (start, share) = (&start, disk / connections.len() as u64);
    let done: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = connections
            .into_iter()
            .enumerate()
            .map(|(index, stream)| {
                scope.spawn(move || {
                    let mut one = Connection::new(stream, load, index as u64 * share, share);
                    start.wait();
                    let sample = one.run(time);
                    (one.stream, sample)
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let mut all = Sample::default();
    let mut streams = Vec::new();
    for (stream, sample) in done {
        streams.push(stream);
        all.operations += sample.operations;
        all.bytes += sample.bytes;
        all.seconds = all.seconds.max(sample.seconds);
        all.latencies.extend(sample.latencies);
    }
    (streams, all)
}

struct Connection<'a> {
    stream: TcpStream,
    load: &'a Load,
    /// The part of the disk that is this connection's, in blocks of the load's size.
    first: u64,
    count: u64,
    next: u64,
    random: u64,
    payload: Vec<u8>,
    out: Vec<u8>,
    input: Vec<u8>,
    /// Bytes in `input` not yet looked at.
    held: std::ops::Range<usize>,
    /// Bytes of the present reply's payload still to come.
    body: usize,
}

impl<'a> Connection<'a> {
    fn new(stream: TcpStream, load: &'a Load, start: u64, share: u64) -> Self {
        let size = load.size as u64;
        Self {
            stream,
            load,
            first: start.div_ceil(size),
            count: share / size - 1,
            next: 0,
            random: start ^ 0x9e37_79b9_7f4a_7c15,
            payload: vec![0x5a; load.size],
            out: Vec::with_capacity(load.depth * (28 + BLOCK)),
            input: vec![0; 256 << 10],
            held: 0..0,
            body: 0,
        }
    }

    fn offset(&mut self) -> u64 {
        let index = if self.load.random {
            // xorshift64*
            self.random ^= self.random >> 12;
            self.random ^= self.random << 25;
            self.random ^= self.random >> 27;
            self.random.wrapping_mul(0x2545_f491_4f6c_dd1d) % self.count
        } else {
            self.next = (self.next + 1) % self.count;
            self.next
        };
        (self.first + index) * self.load.size as u64
    }

    fn put(&mut self, command: u16, offset: u64, length: usize) {
        let request = Request {
            flags: 0,
            command,
            // Says what must come back.
            cookie: offset,
            offset: if command == CMD_FLUSH { 0 } else { offset },
            length: u32::try_from(length).unwrap(),
        };
        self.out.extend_from_slice(&request.encode());
    }

    /// Asks for `count` more, in one system call as far as possible.
    fn ask(&mut self, count: usize) {
        for _ in 0..count {
            let offset = self.offset();
            if self.load.kind == Kind::Read {
                self.put(CMD_READ, offset, self.load.size);
                continue;
            }
            self.put(CMD_WRITE, offset, self.load.size);
            for (index, block) in self.payload.chunks_mut(BLOCK).enumerate() {
                let number = offset / BLOCK as u64 + index as u64;
                block[..8].copy_from_slice(&number.to_le_bytes());
            }
            if self.load.size <= BLOCK {
                self.out.extend_from_slice(&self.payload);
            } else {
                self.send_with_payload();
            }
        }
        self.stream.write_all(&self.out).unwrap();
        self.out.clear();
    }

    fn send_with_payload(&mut self) {
        let mut parts = [IoSlice::new(&self.out), IoSlice::new(&self.payload)];
        let mut rest = &mut parts[..];
        while !rest.is_empty() {
            let sent = self.stream.write_vectored(rest).unwrap();
            IoSlice::advance_slices(&mut rest, sent);
        }
        self.out.clear();
    }

    /// Takes what has come; returns how many replies ended.
    fn take(&mut self) -> usize {
        let mut ended = 0;
        while ended == 0 {
            self.fill();
            loop {
                if self.body > 0 {
                    let here = self.body.min(self.held.len());
                    self.held.start += here;
                    self.body -= here;
                    if self.body > 0 {
                        break;
                    }
                    ended += 1;
                }
                let reads = self.load.kind == Kind::Read;
                // Eight bytes more, so that a read's first block can be looked at.
                let wanted = SIMPLE_REPLY_LEN + if reads { 8 } else { 0 };
                if self.held.len() < wanted {
                    break;
                }
                let here = &self.input[self.held.clone()];
                let reply = SimpleReply::parse(here.first_chunk().unwrap()).unwrap();
                assert_eq!(reply.error, 0, "the server answered with an error");
                self.held.start += SIMPLE_REPLY_LEN;
                if reads {
                    let number = u64::from_le_bytes(here[SIMPLE_REPLY_LEN..][..8].try_into().unwrap());
                    assert_eq!(number, reply.cookie / BLOCK as u64, "the server sent another block");
                    self.body = self.load.size;
                } else {
                    ended += 1;
                }
            }
        }
        ended
    }

    fn fill(&mut self) {
        self.input.copy_within(self.held.clone(), 0);
        self.held = 0..self.held.len();
        let got = self.stream.read(&mut self.input[self.held.end..]).unwrap();
        assert!(got > 0, "the server closed the connection");
        self.held.end += got;
    }

    fn run(&mut self, time: Duration) -> Sample {
        let start = Instant::now();
        let mut sample = Sample::default();
        let mut open = 0;
        while start.elapsed() < time {
            let asked = Instant::now();
            self.ask(self.load.depth - open);
            open = self.load.depth;
            if self.load.kind == Kind::WriteFlush {
                self.take();
                self.put(CMD_FLUSH, 0, 0);
                self.ask(0);
            }
            let ended = self.take();
            open -= ended;
            sample.operations += ended as u64;
            if self.load.depth == 1 {
                sample.latencies.push(asked.elapsed().as_secs_f32() * 1e6);
            }
        }
        while open > 0 {
            let ended = self.take();
            open -= ended;
            sample.operations += ended as u64;
        }
        sample.seconds = start.elapsed().as_secs_f64();
        sample.bytes = sample.operations * self.load.size as u64;
        sample
    }
}
