//! Replies as bytes, in the form that was agreed on. Pure.
//!
//! Specification: "Simple reply message", "Structured reply chunk message", "Extended reply chunk message".

use std::io;

use stiefel_shared::nbd::{
    CHUNK_LEN, Chunk, Errno, ExtendedChunk, Extent, REPLY_BLOCK_STATUS, REPLY_BLOCK_STATUS_EXT, REPLY_ERROR,
    REPLY_FLAG_DONE, REPLY_NONE, REPLY_OFFSET_DATA, REPLY_OFFSET_HOLE, SimpleReply, encode_block_status,
    encode_error_payload,
};

use super::negotiate::{ALLOCATION_CONTEXT, Style};
use super::request::Refusal;

/// The longest header with what comes between it and the data, in bytes.
pub(super) const MAX_HEAD: usize = 40;
/// Bytes of data, and of a hole, in one chunk at most: far below what its 32 bits can say.
const MAX_CHUNK: u64 = 1 << 30;

/// Writes replies to one request.
#[derive(Debug, Clone, Copy)]
pub(super) struct Replies {
    pub(super) style: Style,
    pub(super) cookie: u64,
    /// The request's offset.
    pub(super) offset: u64,
}

/// Why a request failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Failure {
    pub(super) errno: Errno,
    pub(super) message: String,
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        Self {
            errno: refusal.errno,
            message: refusal.message.into(),
        }
    }
}

/// What the medium refused ("Error values").
impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        let errno = match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => Errno::NoSpc,
            io::ErrorKind::Unsupported => Errno::NotSup,
            io::ErrorKind::OutOfMemory => Errno::NoMem,
            // Given up because the connection is being dropped.
            io::ErrorKind::ConnectionAborted => Errno::Shutdown,
            _ => Errno::Io,
        };
        Self {
            errno,
            message: error.to_string(),
        }
    }
}

impl Replies {
    fn simple(&self, out: &mut Vec<u8>, error: u32) {
        let cookie = self.cookie;
        out.extend_from_slice(&SimpleReply { error, cookie }.encode());
    }

    fn chunk(&self, out: &mut Vec<u8>, kind: u16, length: usize, done: bool) {
        let chunk = Chunk {
            flags: if done { REPLY_FLAG_DONE } else { 0 },
            kind,
            cookie: self.cookie,
            // Cannot saturate: no payload is longer than MAX_CHUNK.
            length: u32::try_from(length).unwrap_or(u32::MAX),
        };
        if self.style == Style::Extended {
            let offset = self.offset;
            out.extend_from_slice(&ExtendedChunk { chunk, offset }.encode());
        } else {
            out.extend_from_slice(&chunk.encode());
        }
    }

    /// Done, without data.
    pub(super) fn done(&self, out: &mut Vec<u8>) {
        match self.style {
            Style::Simple => self.simple(out, 0),
            _ => self.chunk(out, REPLY_NONE, 0, true),
        }
    }

    /// What stands before `length` bytes of data, at most 1 GiB, from `offset` on. A simple reply has one such head.
    pub(super) fn data_head(&self, out: &mut Vec<u8>, offset: u64, length: usize, done: bool) {
        if self.style == Style::Simple {
            return self.simple(out, 0);
        }
        self.chunk(out, REPLY_OFFSET_DATA, 8 + length, done);
        out.extend_from_slice(&offset.to_be_bytes());
    }

    /// A part that reads as zeroes; not for simple replies.
    pub(super) fn hole(&self, out: &mut Vec<u8>, offset: u64, length: u64, done: bool) {
        self.chunk(out, REPLY_OFFSET_HOLE, 12, done);
        out.extend_from_slice(&offset.to_be_bytes());
        // Cannot saturate: no read is longer than the largest payload.
        let length = u32::try_from(length.min(MAX_CHUNK)).unwrap_or(u32::MAX);
        out.extend_from_slice(&length.to_be_bytes());
    }

    /// Extents of `base:allocation`; not for simple replies.
    pub(super) fn status(&self, out: &mut Vec<u8>, extents: &[Extent]) {
        let extended = self.style == Style::Extended;
        let kind = if extended {
            REPLY_BLOCK_STATUS_EXT
        } else {
            REPLY_BLOCK_STATUS
        };
        let payload = encode_block_status(ALLOCATION_CONTEXT, extents, extended);
        self.chunk(out, kind, payload.len(), true);
        out.extend_from_slice(&payload);
    }

    /// The request failed; in structured form also after some of its data were sent.
    pub(super) fn error(&self, out: &mut Vec<u8>, failure: &Failure) {
        if self.style == Style::Simple {
            return self.simple(out, failure.errno.code());
        }
        let payload = encode_error_payload(failure.errno, &failure.message);
        self.chunk(out, REPLY_ERROR, payload.len(), true);
        out.extend_from_slice(&payload);
    }
}

const _: () = assert!(MAX_HEAD >= CHUNK_LEN + 8 + 12);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_the_medium_keep_their_meaning() {
        let errno = |kind: io::ErrorKind| Failure::from(io::Error::from(kind)).errno;
        assert_eq!(errno(io::ErrorKind::StorageFull), Errno::NoSpc);
        assert_eq!(errno(io::ErrorKind::QuotaExceeded), Errno::NoSpc);
        assert_eq!(errno(io::ErrorKind::FileTooLarge), Errno::NoSpc);
        assert_eq!(errno(io::ErrorKind::Unsupported), Errno::NotSup);
        assert_eq!(errno(io::ErrorKind::OutOfMemory), Errno::NoMem);
        assert_eq!(errno(io::ErrorKind::Other), Errno::Io);
    }

    #[test]
    fn no_head_is_longer_than_promised() {
        for style in [Style::Simple, Style::Structured, Style::Extended] {
            let replies = Replies {
                style,
                cookie: 1,
                offset: 2,
            };
            let mut out = Vec::new();
            replies.data_head(&mut out, 3, 4, true);
            assert!(out.len() <= MAX_HEAD, "{style:?}");
        }
    }
}
