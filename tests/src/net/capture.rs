//! The record of what went over a cable: a pcap file (draft-ietf-opsawg-pcap), and searching in it.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use super::packet::TcpSegment;

/// The longest frame; QEMU's datagrams are no longer.
pub(super) const MAX_FRAME: usize = 65_536 + 64;
const MAGIC: u32 = 0xa1b2_c3d4;
const LINK_ETHERNET: u32 = 1;
const FILE_HEADER: usize = 24;
const RECORD_HEADER: usize = 16;

/// The record does not answer.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// More went over the cable than was recorded.
    #[error("the record was full before the end; make it with a higher limit")]
    Full,
    /// The record cannot be written or read.
    #[error("cannot use the record {path}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

pub(super) struct Capture {
    path: PathBuf,
    state: Mutex<State>,
}

struct State {
    file: BufWriter<File>,
    left: u64,
    full: bool,
    broken: Option<io::Error>,
}

impl Capture {
    pub(super) fn create(path: &Path, limit: u64) -> io::Result<Self> {
        let mut file = BufWriter::new(File::create_new(path)?);
        let snap_len = u32::try_from(MAX_FRAME).unwrap_or(u32::MAX);
        // Version 2.4, no time zone, no accuracy.
        let header = [MAGIC, 2 | 4 << 16, 0, 0, snap_len, LINK_ETHERNET];
        file.write_all(&header.map(u32::to_le_bytes).concat())?;
        Ok(Self {
            path: path.to_owned(),
            state: Mutex::new(State {
                file,
                left: limit,
                full: false,
                broken: None,
            }),
        })
    }

    /// Records one frame, unless the record is full.
    pub(super) fn add(&self, frame: &[u8]) {
        let mut state = self.lock();
        if state.full || state.broken.is_some() {
            return;
        }
        let length = u32::try_from(frame.len()).unwrap_or(u32::MAX);
        if u64::from(length) > state.left {
            state.full = true;
            return;
        }
        state.left -= u64::from(length);
        let now = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default();
        let seconds = u32::try_from(now.as_secs()).unwrap_or(u32::MAX);
        let header = [seconds, now.subsec_micros(), length, length]
            .map(u32::to_le_bytes)
            .concat();
        if let Err(error) = state.file.write_all(&header).and_then(|()| state.file.write_all(frame)) {
            state.broken = Some(error);
        }
    }

    pub(super) fn copy_to(&self, file: &Path) -> Result<(), CaptureError> {
        self.flush(&mut self.lock())?;
        std::fs::copy(&self.path, file)
            .map(drop)
            .map_err(|source| CaptureError::Io {
                path: file.to_owned(),
                source,
            })
    }

    /// Whether `pattern` occurs within a frame or within the bytes of a TCP connection's direction.
    pub(super) fn contains(&self, pattern: &[u8]) -> Result<bool, CaptureError> {
        let mut state = self.lock();
        self.flush(&mut state)?;
        let found = File::open(&self.path).and_then(|file| search(&mut BufReader::new(file), pattern));
        let found = found.map_err(|source| CaptureError::Io {
            path: self.path.clone(),
            source,
        })?;
        // What was found is found, also in a part.
        if state.full && !found {
            Err(CaptureError::Full)
        } else {
            Ok(found)
        }
    }

    fn flush(&self, state: &mut State) -> Result<(), CaptureError> {
        let result = match state.broken.take() {
            Some(error) => Err(error),
            None => state.file.flush(),
        };
        result.map_err(|source| CaptureError::Io {
            path: self.path.clone(),
            source,
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn search(file: &mut impl Read, pattern: &[u8]) -> io::Result<bool> {
    let mut header = [0; FILE_HEADER];
    file.read_exact(&mut header)?;
    let mut streams = Streams::default();
    let mut frame = Vec::new();
    let mut header = [0; RECORD_HEADER];
    loop {
        match file.read_exact(&mut header) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(false),
            result => result?,
        }
        let length = u32::from_le_bytes([header[8], header[9], header[10], header[11]]) as usize;
        if length > MAX_FRAME {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a frame longer than any"));
        }
        frame.resize(length, 0);
        file.read_exact(&mut frame)?;
        if occurs(&frame, pattern) || streams.occurs(&frame, pattern) {
            return Ok(true);
        }
    }
}

/// The ends of what each direction of each TCP connection has sent.
#[derive(Default)]
struct Streams {
    tails: HashMap<[u8; 36], Tail>,
}

#[derive(Default)]
struct Tail {
    next: u32,
    bytes: Vec<u8>,
}

impl Streams {
    /// Whether `pattern` ends in this frame's segment and began in those before it. Segments out of order break the stream.
    fn occurs(&mut self, frame: &[u8], pattern: &[u8]) -> bool {
        let Some(segment) = TcpSegment::parse(frame) else {
            return false;
        };
        let payload = &frame[segment.payload.clone()];
        if payload.is_empty() {
            return false;
        }
        let tail = self.tails.entry(segment.flow).or_default();
        if tail.next != segment.sequence {
            tail.bytes.clear();
        }
        tail.bytes.extend_from_slice(payload);
        // Cannot wrap wrongly: a payload is at most 64 KiB.
        tail.next = segment
            .sequence
            .wrapping_add(u32::try_from(payload.len()).unwrap_or_default());
        let found = occurs(&tail.bytes, pattern);
        let surplus = tail.bytes.len().saturating_sub(pattern.len().saturating_sub(1));
        tail.bytes.drain(..surplus);
        found
    }
}

fn occurs(bytes: &[u8], pattern: &[u8]) -> bool {
    let Some((first, rest)) = pattern.split_first() else {
        return true;
    };
    let mut bytes = bytes;
    while let Some(at) = bytes.iter().position(|byte| byte == first) {
        bytes = &bytes[at + 1..];
        if bytes.starts_with(rest) {
            return true;
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::packet::tests::tcp_frame_at;
    use super::*;

    fn capture(limit: u64) -> (tempfile::TempDir, Capture) {
        let dir = tempfile::tempdir().unwrap();
        let capture = Capture::create(&dir.path().join("x.pcap"), limit).unwrap();
        (dir, capture)
    }

    #[test]
    fn a_pattern_across_two_segments_is_found() {
        let (_dir, capture) = capture(10_000);
        capture.add(&tcp_frame_at(4420, 1, b"....sec"));
        capture.add(&tcp_frame_at(80, 9, b"other"));
        capture.add(&tcp_frame_at(4420, 8, b"ret...."));
        assert!(capture.contains(b"secret").unwrap());
        assert!(!capture.contains(b"secret!").unwrap());
        assert!(!capture.contains(b"....secother").unwrap());
    }

    #[test]
    fn a_full_record_does_not_say_no() {
        let (_dir, capture) = capture(100);
        capture.add(&[b'a'; 60]);
        capture.add(&[b'b'; 60]);
        assert!(capture.contains(b"aaa").unwrap());
        assert!(matches!(capture.contains(b"bbb"), Err(CaptureError::Full)));
    }

    #[test]
    fn the_record_is_a_pcap_file() {
        let (dir, capture) = capture(100);
        capture.add(b"frame");
        let copy = dir.path().join("copy.pcap");
        capture.copy_to(&copy).unwrap();
        let bytes = std::fs::read(copy).unwrap();
        assert_eq!(bytes[..8], [0xd4, 0xc3, 0xb2, 0xa1, 2, 0, 4, 0]);
        assert_eq!(bytes[20..24], [1, 0, 0, 0]);
        assert_eq!(bytes[FILE_HEADER + 8..FILE_HEADER + 16], [5, 0, 0, 0, 5, 0, 0, 0]);
        assert_eq!(&bytes[FILE_HEADER + RECORD_HEADER..], b"frame");
    }

    proptest! {
        #[test]
        fn searching_finds_what_a_plain_search_finds(
            bytes in prop::collection::vec(0_u8..3, 0..40), pattern in prop::collection::vec(0_u8..3, 1..5)
        ) {
            let plain = bytes.windows(pattern.len()).any(|window| window == pattern);
            prop_assert_eq!(occurs(&bytes, &pattern), plain);
        }
    }
}
