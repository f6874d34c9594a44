//! A guest's serial console: logged with times, searched for what a test expects, written to.
//!
//! Counterpart: QEMU's serial port on a unix socket. A thread of its own reads; every line goes into a log file with
//! seconds since power-on. What was expected once is behind the cursor and is not found again.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::accel::Accel;

mod clean;
mod pattern;

use clean::Cleaner;
pub use pattern::{Pattern, re};

/// How many lines an error shows.
const SHOWN_LINES: usize = 30;
/// How many lines are kept in memory; the log file has them all.
const KEPT_LINES: usize = 200_000;
/// An unfinished line (a prompt) is looked at only after so much silence: its rest may be on the way.
const SILENCE: Duration = Duration::from_millis(300);

/// What was expected on the console did not come.
#[derive(Debug, thiserror::Error)]
pub enum SerialError {
    /// Nothing that matches came in time.
    #[error("{name}: no {expected} on the serial console within {waited:?}; the last lines:\n{last}\nwhole log: {log}")]
    Timeout {
        /// The machine.
        name: String,
        /// What was expected.
        expected: String,
        /// How long, after stretching.
        waited: Duration,
        /// The last lines.
        last: String,
        /// The log file.
        log: String,
    },
    /// The machine ended before.
    #[error("{name}: the machine ended before {expected} came; the last lines:\n{last}\nwhole log: {log}")]
    Ended {
        /// The machine.
        name: String,
        /// What was expected.
        expected: String,
        /// The last lines.
        last: String,
        /// The log file.
        log: String,
    },
    /// What to expect is not understood.
    #[error("bad pattern {pattern}")]
    BadPattern {
        /// The pattern.
        pattern: String,
        /// Why.
        #[source]
        source: regex_lite::Error,
    },
    /// The socket failed.
    #[error("cannot write to the serial console of {name}")]
    Send {
        /// The machine.
        name: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The log cannot be written.
    #[error("cannot create the serial log {path}")]
    Log {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A line that matched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Which of the patterns.
    pub index: usize,
    /// The line, without escape sequences.
    pub line: String,
    /// When it ended, since power-on (for an unfinished line: now).
    pub at: Duration,
}

/// Who speaks, and where it is written down.
pub(crate) struct Options {
    pub(crate) name: String,
    pub(crate) log: PathBuf,
    /// Print every line on standard error, too.
    pub(crate) live: bool,
    pub(crate) accel: Accel,
}

/// The console of one machine.
pub struct Serial {
    writer: Mutex<UnixStream>,
    shared: Arc<Shared>,
    reader: Option<JoinHandle<()>>,
    options: Options,
    power_on: Instant,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    /// Everything goes to standard output as it comes, for a user at the console.
    raw: AtomicBool,
}

#[derive(Default)]
struct State {
    /// Finished lines; the first one kept has the number `first`.
    lines: VecDeque<Line>,
    first: usize,
    unfinished: String,
    last_byte: Option<Instant>,
    ended: bool,
    cursor: Cursor,
}

struct Line {
    at: Duration,
    text: String,
}

/// From where on is searched: a line's number, and the byte in it.
#[derive(Clone, Copy, Default)]
struct Cursor {
    line: usize,
    byte: usize,
}

impl Serial {
    /// Starts reading; `power_on` is the zero of all times.
    ///
    /// # Errors
    /// When the log cannot be created or the socket not be shared.
    pub(crate) fn start(stream: UnixStream, options: Options, power_on: Instant) -> Result<Self, SerialError> {
        let log = File::create(&options.log).map_err(|source| SerialError::Log {
            path: options.log.clone(),
            source,
        })?;
        let input = stream.try_clone().map_err(|source| SerialError::Send {
            name: options.name.clone(),
            source,
        })?;
        let shared = Arc::new(Shared::default());
        let reader = Reader {
            shared: Arc::clone(&shared),
            log: BufWriter::new(log),
            prefix: options.live.then(|| options.name.clone()),
            power_on,
        };
        let reader = Some(std::thread::spawn(move || reader.run(input)));
        Ok(Self {
            writer: Mutex::new(stream),
            shared,
            reader,
            options,
            power_on,
        })
    }

    /// Waits for a line with `pattern` (text, or [`re`]) behind the cursor, moves the cursor behind it, returns the line.
    ///
    /// # Errors
    /// When none comes within `deadline` (as under KVM; see [`Accel::deadline`]), or the machine ends.
    pub fn expect(&self, pattern: impl Into<Pattern>, deadline: Duration) -> Result<String, SerialError> {
        self.expect_any(&[pattern.into()], deadline).map(|found| found.line)
    }

    /// As [`Serial::expect`], for the first line that has one of `patterns`.
    ///
    /// # Errors
    /// As there.
    pub fn expect_any(&self, patterns: &[Pattern], deadline: Duration) -> Result<Found, SerialError> {
        for pattern in patterns {
            pattern.check()?;
        }
        let waited = self.options.accel.deadline(deadline);
        let end = Instant::now() + waited;
        let mut state = self.shared.lock();
        loop {
            let now = Instant::now();
            if let Some(found) = state.find(patterns, now, self.power_on) {
                return Ok(found);
            }
            if state.ended {
                return Err(self.ended(&state, patterns));
            }
            if now >= end {
                return Err(self.timeout(&state, patterns, waited));
            }
            let mut pause = end - now;
            if !state.unfinished.is_empty() {
                pause = pause.min(SILENCE);
            }
            state = self
                .shared
                .changed
                .wait_timeout(state, pause)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// As [`Serial::expect`]; also returns the lines between the cursor's line and the one that matched.
    pub(crate) fn collect(&self, end: &Pattern, deadline: Duration) -> Result<(Vec<String>, String), SerialError> {
        let from = self.shared.lock().cursor.line + 1;
        let last = self.expect(end.clone(), deadline)?;
        let state = self.shared.lock();
        let range = from.max(state.first)..state.cursor.line;
        let lines = range.filter_map(|number| state.lines.get(number - state.first));
        Ok((lines.map(|line| line.text.clone()).collect(), last))
    }

    /// Whether a line that was seen until now, before or behind the cursor, has `pattern`. The cursor stays.
    ///
    /// # Errors
    /// When the pattern is not understood.
    pub fn said(&self, pattern: impl Into<Pattern>) -> Result<bool, SerialError> {
        let pattern = pattern.into();
        pattern.check()?;
        let state = self.shared.lock();
        Ok(state
            .lines
            .iter()
            .map(|line| &line.text)
            .chain([&state.unfinished])
            .any(|line| pattern.find(line).is_some()))
    }

    /// Puts the cursor behind everything seen until now.
    pub fn skip(&self) {
        let mut state = self.shared.lock();
        state.cursor = Cursor {
            line: state.first + state.lines.len(),
            byte: state.unfinished.len(),
        };
    }

    /// All finished lines until now (the last 200,000), with their times since power-on.
    pub fn lines(&self) -> Vec<(Duration, String)> {
        self.shared
            .lock()
            .lines
            .iter()
            .map(|line| (line.at, line.text.clone()))
            .collect()
    }

    /// Types `text` as it is.
    ///
    /// # Errors
    /// When the machine is gone.
    pub fn send(&self, text: &str) -> Result<(), SerialError> {
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        writer.write_all(text.as_bytes()).map_err(|source| SerialError::Send {
            name: self.options.name.clone(),
            source,
        })
    }

    /// Types `text` and Enter.
    ///
    /// # Errors
    /// When the machine is gone.
    pub fn send_line(&self, text: &str) -> Result<(), SerialError> {
        self.send(&format!("{text}\n"))
    }

    /// Whether every byte goes to standard output as it comes, instead of lines.
    pub(crate) fn set_raw(&self, raw: bool) {
        self.shared.raw.store(raw, Ordering::Relaxed);
    }

    /// The log file with every line.
    pub fn log(&self) -> &Path {
        &self.options.log
    }

    fn ended(&self, state: &State, patterns: &[Pattern]) -> SerialError {
        SerialError::Ended {
            name: self.options.name.clone(),
            expected: pattern::describe(patterns),
            last: state.last_lines(),
            log: self.options.log.display().to_string(),
        }
    }

    fn timeout(&self, state: &State, patterns: &[Pattern], waited: Duration) -> SerialError {
        SerialError::Timeout {
            name: self.options.name.clone(),
            expected: pattern::describe(patterns),
            waited,
            last: state.last_lines(),
            log: self.options.log.display().to_string(),
        }
    }
}

impl Drop for Serial {
    fn drop(&mut self) {
        let _ = self
            .writer
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner)
            .shutdown(std::net::Shutdown::Both);
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Searches from the cursor on; moves it behind what was found, or to the first line still unfinished.
    fn find(&mut self, patterns: &[Pattern], now: Instant, power_on: Instant) -> Option<Found> {
        let unfinished = self.first + self.lines.len();
        if self.cursor.line < self.first {
            self.cursor = Cursor {
                line: self.first,
                byte: 0,
            };
        }
        while self.cursor.line < unfinished {
            let line = &self.lines[self.cursor.line - self.first];
            if let Some((index, end)) = earliest(patterns, &line.text, self.cursor.byte) {
                self.cursor.byte = end;
                return Some(Found {
                    index,
                    line: line.text.clone(),
                    at: line.at,
                });
            }
            self.cursor = Cursor {
                line: self.cursor.line + 1,
                byte: 0,
            };
        }
        let silent = self.ended || self.last_byte.is_some_and(|last| now.duration_since(last) >= SILENCE);
        if !silent {
            return None;
        }
        let (index, end) = earliest(patterns, &self.unfinished, self.cursor.byte)?;
        self.cursor.byte = end;
        Some(Found {
            index,
            line: self.unfinished.clone(),
            at: now.duration_since(power_on),
        })
    }

    fn last_lines(&self) -> String {
        let start = self.lines.len().saturating_sub(SHOWN_LINES);
        let mut lines: Vec<String> = self.lines.range(start..).map(Line::to_string).collect();
        if !self.unfinished.is_empty() {
            lines.push(format!("[     now] {}", self.unfinished));
        }
        lines.join("\n")
    }
}

/// The match that begins first in `line[from..]`: which pattern, and where it ends in `line`.
fn earliest(patterns: &[Pattern], line: &str, from: usize) -> Option<(usize, usize)> {
    // Not behind the end, not inside a character: a line may have been cut short since.
    let rest = line.get(from..)?;
    patterns
        .iter()
        .enumerate()
        .filter_map(|(index, pattern)| pattern.find(rest).map(|range| (range.start, index, from + range.end)))
        .min()
        .map(|(_, index, end)| (index, end))
}

impl std::fmt::Display for Line {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "[{:8.3}] {}", self.at.as_secs_f64(), self.text)
    }
}

/// The thread that reads.
struct Reader {
    shared: Arc<Shared>,
    log: BufWriter<File>,
    prefix: Option<String>,
    power_on: Instant,
}

impl Reader {
    fn run(mut self, mut input: UnixStream) {
        let mut cleaner = Cleaner::default();
        let mut buffer = [0; 4096];
        while let Ok(count) = input.read(&mut buffer) {
            if count == 0 {
                break;
            }
            if self.shared.raw.load(Ordering::Relaxed) {
                // A closed terminal must not stop the machine.
                let mut terminal = io::stdout().lock();
                let _ = terminal.write_all(&buffer[..count]).and_then(|()| terminal.flush());
            }
            let at = self.power_on.elapsed();
            let finished = cleaner.feed(&buffer[..count]);
            let lines: Vec<Line> = finished.into_iter().map(|text| Line { at, text }).collect();
            self.write_down(&lines);
            self.publish(lines, cleaner.unfinished());
        }
        let rest = cleaner.unfinished();
        if !rest.is_empty() {
            self.write_down(&[Line {
                at: self.power_on.elapsed(),
                text: rest,
            }]);
        }
        self.shared.lock().ended = true;
        self.shared.changed.notify_all();
    }

    /// A log that cannot be written must not stop the machine: what is expected is still found.
    fn write_down(&mut self, lines: &[Line]) {
        for line in lines {
            let _ = writeln!(self.log, "{line}");
            if let Some(prefix) = &self.prefix
                && !self.shared.raw.load(Ordering::Relaxed)
            {
                eprintln!("{prefix} | {}", line.text);
            }
        }
        let _ = self.log.flush();
    }

    fn publish(&self, lines: Vec<Line>, unfinished: String) {
        let mut state = self.shared.lock();
        state.lines.extend(lines);
        while state.lines.len() > KEPT_LINES {
            state.lines.pop_front();
            state.first += 1;
        }
        state.unfinished = unfinished;
        state.last_byte = Some(Instant::now());
        drop(state);
        self.shared.changed.notify_all();
    }
}

#[cfg(test)]
mod tests;
