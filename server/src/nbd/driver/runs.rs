//! Small requests that follow one another on the disk: a run of them takes one system call.

use std::io::{self, IoSlice, IoSliceMut};

use super::super::reply::{MAX_HEAD, Replies};
use super::super::request::{Command, Range, validate};
use super::{Driver, SMALL, Step, length_of};

/// Neighbours done in one system call at most.
const RUN: usize = 64;

/// A small request of a run, and where its payload lies in the input.
struct Member {
    replies: Replies,
    range: Range,
    payload: usize,
}

impl Driver {
    /// Small reads that follow one another on the disk, with one system call.
    pub(super) fn small_reads(&mut self, replies: Replies, range: Range) -> io::Result<Step> {
        let mut run = vec![Member {
            replies,
            range,
            payload: 0,
        }];
        let mut bytes = MAX_HEAD + length_of(range);
        let mut next = range.offset + range.length;
        while run.len() < RUN {
            let Some(asked) = self.input.peek()? else { break };
            let Ok(Command::Read { range, .. }) = validate(&asked, &self.connection.bounds) else {
                break;
            };
            let more = MAX_HEAD + length_of(range);
            if range.offset != next || range.length > SMALL as u64 || bytes + more > self.out.len() {
                break;
            }
            self.input.pass(self.input.header());
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
    pub(super) fn small_writes(&mut self, replies: Replies, range: Range) -> io::Result<Step> {
        self.await_payload(length_of(range))?;
        let mut run = vec![Member {
            replies,
            range,
            payload: self.input.position(),
        }];
        self.input.pass(length_of(range));
        let mut next = range.offset + range.length;
        while run.len() < RUN {
            let Some(asked) = self.input.peek()? else { break };
            let Ok(Command::Write { range, fua: false }) = validate(&asked, &self.connection.bounds) else {
                break;
            };
            let (header, length) = (self.input.header(), length_of(range));
            if range.offset != next || self.input.len() < header + length {
                break;
            }
            run.push(Member {
                replies: self.replies(&asked),
                range,
                payload: self.input.position() + header,
            });
            self.input.pass(header + length);
            next += range.length;
        }
        let parts: Vec<_> = run
            .iter()
            .map(|member| IoSlice::new(self.input.at(member.payload, length_of(member.range))))
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

    /// Dispatches those of a run that could not be done at once.
    fn dispatch_all(&mut self, run: &[Member], command: impl Fn(Range) -> Command, writes: bool) -> io::Result<Step> {
        let mut step = Step::On;
        for member in run {
            // Only the last one may stay on this thread.
            if let Step::Wait(task) = std::mem::replace(&mut step, Step::On) {
                self.run_elsewhere(task)?;
            }
            let length = length_of(member.range);
            let data = if writes {
                self.input.at(member.payload, length).to_vec()
            } else {
                Vec::new()
            };
            step = self.dispatch(member.replies, command(member.range), data, length)?;
        }
        Ok(step)
    }
}
