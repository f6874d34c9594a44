//! What a connection has received and nobody has looked at yet.
//!
//! Counterpart: any NBD client. Specification: "Transmission": requests come one after the other, a write's payload behind
//! its header. Nothing is believed of a length but what has come: the buffer never grows. Refused: broken framing.

use std::io;
use std::net::TcpStream;

use rustix::io::Errno as Os;
use rustix::net::{RecvFlags, recv};
use stiefel_shared::nbd::{Asked, EXTENDED_REQUEST_LEN, REQUEST_LEN, Request};

use super::super::negotiate::Style;
use super::patience::Patience;

/// Bytes received, and of a long write written, at a time at most: fewer cost more calls, and with more the copies no longer
/// stay in the processor's own cache (docs/nbd.md, "The engine").
const INPUT: usize = 512 << 10;

/// The receiving buffer.
pub(super) struct Input {
    bytes: Vec<u8>,
    /// The part that nobody has looked at yet.
    start: usize,
    end: usize,
    extended: bool,
    patience: Patience,
}

impl Input {
    /// Begins with what was received before.
    pub(super) fn new(ahead: &[u8], style: Style) -> Self {
        let mut bytes = vec![0; INPUT.max(ahead.len())];
        bytes[..ahead.len()].copy_from_slice(ahead);
        Self {
            bytes,
            start: 0,
            end: ahead.len(),
            extended: style == Style::Extended,
            patience: Patience::new(),
        }
    }

    /// Bytes that are here.
    pub(super) fn len(&self) -> usize {
        self.end - self.start
    }

    /// Bytes that can be here at the same time.
    pub(super) fn capacity(&self) -> usize {
        self.bytes.len()
    }

    /// Where the next byte lies, for [`Input::at`].
    pub(super) fn position(&self) -> usize {
        self.start
    }

    /// Bytes at a position, whether looked at or not; they stay there until more is received.
    pub(super) fn at(&self, position: usize, length: usize) -> &[u8] {
        &self.bytes[position..][..length]
    }

    /// The next bytes, at most `length`.
    pub(super) fn front(&self, length: usize) -> &[u8] {
        &self.bytes[self.start..][..length.min(self.len())]
    }

    /// Passes over bytes that are here.
    pub(super) fn pass(&mut self, length: usize) {
        self.start += length.min(self.len());
    }

    /// Length of a request's header.
    pub(super) fn header(&self) -> usize {
        if self.extended {
            EXTENDED_REQUEST_LEN
        } else {
            REQUEST_LEN
        }
    }

    /// The next request, if its header is here.
    ///
    /// # Errors
    /// Broken framing.
    pub(super) fn peek(&self) -> io::Result<Option<Asked>> {
        let here = &self.bytes[self.start..self.end];
        let asked = if self.extended {
            here.first_chunk().map(Asked::parse_extended)
        } else {
            here.first_chunk().map(|header| Request::parse(header).map(Asked::from))
        };
        asked.transpose().map_err(io::Error::other)
    }

    /// A request was taken.
    pub(super) fn took_request(&mut self) {
        self.patience.request();
    }

    /// The client is not expected to send soon.
    pub(super) fn expect_nothing(&mut self) {
        self.patience.pass();
    }

    /// Waits for more, at most `most` bytes if there is a limit; returns how many came, 0 at the end (and when full).
    pub(super) fn receive(&mut self, stream: &TcpStream, most: Option<usize>) -> io::Result<usize> {
        self.make_room();
        let room = self.bytes.len() - self.end;
        let to = self.end + most.unwrap_or(room).min(room);
        let Self {
            bytes, end, patience, ..
        } = self;
        let here = patience.look(|| match receive(stream, &mut bytes[*end..to], RecvFlags::DONTWAIT) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            got => got.map(Some),
        })?;
        let got = match here {
            Some(got) => got,
            None => receive(stream, &mut self.bytes[self.end..to], RecvFlags::empty())?,
        };
        self.end += got;
        self.patience.payload(got);
        Ok(got)
    }

    /// Waits until `length` bytes, not more than the buffer holds, are here.
    ///
    /// # Errors
    /// The connection ended before.
    pub(super) fn fill(&mut self, stream: &TcpStream, length: usize) -> io::Result<()> {
        while self.len() < length {
            let missing = length - self.len();
            if self.receive(stream, Some(missing))? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(())
    }

    fn make_room(&mut self) {
        if self.start > 0 {
            self.bytes.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
    }
}

/// One receive, whatever interrupts it.
fn receive(stream: &TcpStream, into: &mut [u8], flags: RecvFlags) -> io::Result<usize> {
    loop {
        match recv(stream, &mut *into, flags) {
            Err(Os::INTR) => {}
            Err(errno) => return Err(errno.into()),
            Ok((_, got)) => return Ok(got),
        }
    }
}
