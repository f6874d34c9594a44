//! One client's socket.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

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
