//! Long requests: reads that go file → pipe → socket, writes that go socket → buffer → file, piece by piece.

use std::io::{self, IoSlice};
use std::sync::Arc;

use super::super::connection::BIG;
use super::super::reply::{Failure, Replies};
use super::super::request::{Command, Range};
use super::{Driver, Step, length_of};

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
            let mut piece = usize::try_from(end - at)
                .unwrap_or(usize::MAX)
                .min(self.input.capacity());
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
        self.bulk = true;
        if fua && result.is_ok() {
            return self.dispatch(replies, Command::Flush, Vec::new(), 0);
        }
        self.connection.export.count(result.is_ok());
        self.reply(|out| match result {
            Ok(()) => replies.done(out),
            Err(error) => replies.error(out, &Failure::from(error)),
        })
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

/// How many of `length` bytes at `at` lie behind the last end of a page.
fn over_page(at: u64, length: usize) -> usize {
    usize::try_from((at + length as u64) % PAGE).unwrap_or(0).min(length)
}
