//! A small NBD client and ready-made exports for the server's tests.
#![allow(clippy::unwrap_used, dead_code)]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use stiefel_server::nbd::{Export, ExportOptions, Gate, Limits, Listed, Server, Store};
use stiefel_shared::nbd::*;
use tempfile::NamedTempFile;

/// Far more than anything takes: a test that waits this long has failed.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Gives out one export called "disk", also as the default, unless told to keep everyone out.
pub struct OneExport {
    pub export: Arc<Export>,
    pub admits: bool,
}

impl Gate for OneExport {
    fn admit(&self, _peer: SocketAddr) -> bool {
        self.admits
    }

    fn export(&self, name: &str, _peer: SocketAddr) -> Option<Arc<Export>> {
        matches!(name, "" | "disk").then(|| Arc::clone(&self.export))
    }

    fn list(&self, _peer: SocketAddr) -> Vec<Listed> {
        vec![Listed {
            name: "disk".into(),
            description: self.export.description().into(),
        }]
    }
}

/// A server of one export called "disk".
pub struct Fixture {
    pub server: Server,
    pub export: Arc<Export>,
    pub address: SocketAddr,
    file: Option<NamedTempFile>,
}

impl Fixture {
    /// Of a new temporary file.
    pub fn new(size: u64) -> Self {
        Self::with(size, ExportOptions::default(), Limits::default(), true)
    }

    pub fn with(size: u64, options: ExportOptions, limits: Limits, admits: bool) -> Self {
        let file = NamedTempFile::new().unwrap();
        file.as_file().set_len(size).unwrap();
        let options = ExportOptions {
            name: "disk".into(),
            description: "a test".into(),
            ..options
        };
        let export = Export::open(file.path(), options).unwrap();
        Self::start(export, Some(file), limits, admits)
    }

    /// Of any store.
    pub fn of_store(store: Arc<dyn Store>) -> Self {
        let options = ExportOptions {
            name: "disk".into(),
            ..ExportOptions::default()
        };
        Self::of(Export::of(store, std::path::Path::new("store"), options).unwrap())
    }

    /// Of anything.
    pub fn of(export: Arc<Export>) -> Self {
        Self::start(export, None, Limits::default(), true)
    }

    fn start(export: Arc<Export>, file: Option<NamedTempFile>, limits: Limits, admits: bool) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let gate = Arc::new(OneExport {
            export: Arc::clone(&export),
            admits,
        });
        let server = Server::start(listener, gate, limits).unwrap();
        Self {
            server,
            export,
            address,
            file,
        }
    }

    pub fn uri(&self) -> String {
        format!("nbd://{}/disk", self.address)
    }

    /// The temporary file.
    pub fn file(&self) -> &NamedTempFile {
        self.file.as_ref().unwrap()
    }

    /// A client in transmission with structured replies and block sizes.
    pub fn client(&self) -> Client {
        let mut client = Client::connect(self.address);
        assert_eq!(client.option(OPT_STRUCTURED_REPLY, &[]), [(REP_ACK, vec![])]);
        client.structured = true;
        client.go(&[INFO_BLOCK_SIZE]);
        client
    }

    /// A client in transmission with extended headers and `base:allocation`.
    pub fn extended_client(&self) -> Client {
        let mut client = Client::connect(self.address);
        assert_eq!(client.option(OPT_EXTENDED_HEADERS, &[]), [(REP_ACK, vec![])]);
        (client.structured, client.extended) = (true, true);
        let meta = MetaRequest {
            name: "disk".into(),
            queries: vec![BASE_ALLOCATION.into()],
        };
        client.option(OPT_SET_META_CONTEXT, &meta.encode().unwrap());
        client.go(&[]);
        client
    }

    /// A client in transmission with simple replies, told nothing.
    pub fn simple_client(&self) -> Client {
        let mut client = Client::connect(self.address);
        client.go(&[]);
        client
    }
}

/// What a request was answered with.
#[derive(Debug, PartialEq, Eq)]
pub enum Answer {
    Done,
    Data(u64, Vec<u8>),
    Status(Vec<Extent>),
    Error(Errno),
}

pub struct Client {
    pub stream: TcpStream,
    pub structured: bool,
    pub extended: bool,
    /// Chunks of data and holes so far, and how many of them were holes.
    pub parts: usize,
    pub holes: usize,
    cookie: u64,
}

impl Client {
    pub fn raw(address: SocketAddr) -> TcpStream {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    pub fn connect(address: SocketAddr) -> Self {
        let mut stream = Self::raw(address);
        let flags = parse_greeting(&array(&mut stream)).unwrap();
        stream.write_all(&encode_client_flags(flags)).unwrap();
        Self {
            stream,
            structured: false,
            extended: false,
            parts: 0,
            holes: 0,
            cookie: 0x5eed_0000_0000,
        }
    }

    /// All replies to an option, the last one included.
    pub fn option(&mut self, option: u32, data: &[u8]) -> Vec<(u32, Vec<u8>)> {
        self.stream.write_all(&encode_option(option, data).unwrap()).unwrap();
        let mut replies = Vec::new();
        loop {
            let header = OptionReplyHeader::parse(&array(&mut self.stream)).unwrap();
            assert_eq!(header.option, option);
            let data = self.take(header.len);
            replies.push((header.reply, data));
            if header.reply == REP_ACK || header.reply & REP_FLAG_ERROR != 0 {
                return replies;
            }
        }
    }

    pub fn go(&mut self, wanted: &[u16]) -> GoAnswer {
        let request = InfoRequest {
            name: "disk".into(),
            wanted: wanted.to_vec(),
        };
        let mut answer = GoAnswer::default();
        let mut done = false;
        for (reply, data) in self.option(OPT_GO, &request.encode().unwrap()) {
            let header = OptionReplyHeader {
                option: OPT_GO,
                reply,
                len: 0,
            };
            done = answer.absorb(OPT_GO, header, &data).unwrap();
        }
        assert!(done);
        answer
    }

    pub fn send(&mut self, command: u16, flags: u16, offset: u64, length: u32, payload: &[u8]) -> u64 {
        self.cookie += 1;
        let request = Request {
            flags,
            command,
            cookie: self.cookie,
            offset,
            length,
        };
        if self.extended {
            let mut asked = Asked::from(request);
            if command == CMD_WRITE {
                asked.flags |= CMD_FLAG_PAYLOAD_LEN;
            }
            self.stream
                .write_all(&[&asked.encode_extended(), payload].concat())
                .unwrap();
        } else {
            self.stream.write_all(&[&request.encode(), payload].concat()).unwrap();
        }
        self.cookie
    }

    /// Sends an extended request as it stands and takes its answer.
    pub fn ask_extended(&mut self, asked: Asked) -> Answer {
        self.stream.write_all(&asked.encode_extended()).unwrap();
        self.answer(0).1
    }

    /// Sends a request and takes its answer.
    pub fn ask(&mut self, command: u16, flags: u16, offset: u64, length: u32, payload: &[u8]) -> Answer {
        let sent = self.send(command, flags, offset, length, payload);
        let reads = if command == CMD_READ { length } else { 0 };
        let (cookie, answer) = self.answer(reads);
        assert_eq!(cookie, sent);
        answer
    }

    pub fn read(&mut self, offset: u64, length: u32) -> Vec<u8> {
        match self.ask(CMD_READ, 0, offset, length, &[]) {
            Answer::Data(at, data) if at == offset || !self.structured => data,
            other => panic!("read at {offset}: {other:?}"),
        }
    }

    pub fn write(&mut self, offset: u64, data: &[u8]) {
        let length = u32::try_from(data.len()).unwrap();
        assert_eq!(self.ask(CMD_WRITE, 0, offset, length, data), Answer::Done);
    }

    /// Takes one answer; `reads` is the length of the read that a simple reply answers.
    pub fn answer(&mut self, reads: u32) -> (u64, Answer) {
        if !self.structured {
            let reply = SimpleReply::parse(&array(&mut self.stream)).unwrap();
            let answer = match reply.error {
                0 if reads > 0 => Answer::Data(0, self.take(reads)),
                0 => Answer::Done,
                error => Answer::Error(Errno::from_code(error)),
            };
            return (reply.cookie, answer);
        }
        let mut data: Option<(u64, Vec<u8>)> = None;
        loop {
            let chunk = self.chunk();
            let payload = self.take(chunk.length);
            let answer = match chunk.kind {
                REPLY_NONE => Answer::Done,
                REPLY_OFFSET_DATA | REPLY_OFFSET_HOLE => {
                    let (offset, part) = payload.split_first_chunk().unwrap();
                    let (offset, mut part) = (u64::from_be_bytes(*offset), part.to_vec());
                    if chunk.kind == REPLY_OFFSET_HOLE {
                        self.holes += 1;
                        part = vec![0; u32::from_be_bytes(part.try_into().unwrap()) as usize];
                    }
                    let (start, all) = data.get_or_insert((offset, Vec::new()));
                    // Ours come in order, though a server need not send them so.
                    assert_eq!(offset, *start + all.len() as u64);
                    all.extend(part);
                    self.parts += 1;
                    Answer::Done
                }
                REPLY_BLOCK_STATUS => Answer::Status(parse_block_status(&payload).unwrap().1),
                REPLY_BLOCK_STATUS_EXT => Answer::Status(
                    payload[8..]
                        .chunks(16)
                        .map(|extent| Extent {
                            length: u64::from_be_bytes(extent[..8].try_into().unwrap()),
                            state: u64::from_be_bytes(extent[8..].try_into().unwrap()).try_into().unwrap(),
                        })
                        .collect(),
                ),
                REPLY_ERROR => {
                    let (errno, message) = parse_error_payload(&payload).unwrap();
                    assert!(!message.is_empty());
                    Answer::Error(errno)
                }
                kind => panic!("unexpected chunk {kind}"),
            };
            if chunk.flags == REPLY_FLAG_DONE {
                let answer = match (answer, data) {
                    (Answer::Done, Some((offset, all))) => Answer::Data(offset, all),
                    (answer, _) => answer,
                };
                return (chunk.cookie, answer);
            }
        }
    }

    fn chunk(&mut self) -> Chunk {
        if self.extended {
            ExtendedChunk::parse(&array(&mut self.stream)).unwrap().chunk
        } else {
            Chunk::parse(&array(&mut self.stream)).unwrap()
        }
    }

    fn take(&mut self, length: u32) -> Vec<u8> {
        let mut data = vec![0; length as usize];
        self.stream.read_exact(&mut data).unwrap();
        data
    }

    /// Whether the server has closed the connection, with nothing left to read.
    pub fn is_closed(&mut self) -> bool {
        is_closed(&mut self.stream)
    }
}

pub fn is_closed(stream: &mut TcpStream) -> bool {
    match stream.read(&mut [0; 64]) {
        Ok(n) => n == 0,
        Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
    }
}

fn array<const N: usize>(stream: &mut TcpStream) -> [u8; N] {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}
