//! Moves bytes from a file's page cache to a socket without passing through this program's memory.

use std::fs::File;
use std::io;
use std::net::TcpStream;
use std::os::fd::OwnedFd;

use rustix::io::Errno as Os;
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};

/// Bytes that a pipe holds: the most that every user may ask for.
const CAPACITY: usize = 1 << 20;
/// A page of a file takes one of the pipe's places, also if only a part of it is moved.
const PAGE: u64 = 4096;

/// A pipe of [`CAPACITY`] bytes.
#[derive(Debug)]
pub(super) struct Pipe {
    out: OwnedFd,
    into: OwnedFd,
}

impl Pipe {
    pub(super) fn new() -> io::Result<Self> {
        let (out, into) = pipe_with(PipeFlags::CLOEXEC)?;
        fcntl_setpipe_size(&into, CAPACITY)?;
        Ok(Self { out, into })
    }

    /// Whether a part of a file fits.
    pub(super) fn holds(offset: u64, length: u64) -> bool {
        (offset % PAGE).saturating_add(length).div_ceil(PAGE) <= CAPACITY as u64 / PAGE
    }

    /// Takes a part of a file that [`Pipe::holds`]; this is where the medium is read. After an error the pipe is not empty.
    pub(super) fn take(&self, file: &File, mut offset: u64, mut length: usize) -> io::Result<()> {
        while length > 0 {
            match splice(file, Some(&mut offset), &self.into, None, length, SpliceFlags::NONBLOCK) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(moved) => length -= moved,
                Err(Os::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    /// Sends `length` bytes that it holds.
    pub(super) fn send(&self, stream: &TcpStream, mut length: usize) -> io::Result<()> {
        while length > 0 {
            match splice(&self.out, None, stream, None, length, SpliceFlags::empty()) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(moved) => length -= moved,
                Err(Os::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }
}
