//! What stiefel says while there is no other screen: in the ramdisk, in the payload's initramfs, at the last shutdown step.
//!
//! Every line goes to the kernel log, so that it can be read later; and to the console, unless the kernel
//! prints its log there anyway. A console that is held (Ctrl-S, Scroll Lock) or slow loses lines; it never stops who speaks.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;

use crate::kmsg::{Kmsg, Level};

/// How long a line may wait for a slow console before the rest of it is dropped.
const PATIENCE: Duration = Duration::from_millis(300);

/// Where the lines go.
#[derive(Debug)]
pub struct Console {
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    kmsg: Option<Kmsg>,
    screen: Option<File>,
    /// /proc/sys/kernel/printk: what the kernel shows on the console by itself. Others may change that at any time.
    printk: Option<File>,
    /// A progress line is on the screen and wants to be ended before the next line.
    open_line: bool,
}

impl Console {
    /// Opens the kernel log and the console below `dev` (such as /dev), and learns from `proc` (such as /proc)
    /// what the kernel shows by itself. What cannot be opened is done without: there is nobody left to tell.
    #[must_use]
    pub fn open(dev: &Path, proc: &Path) -> Self {
        Self {
            inner: Mutex::new(Inner {
                kmsg: Kmsg::open(&dev.join("kmsg")).ok(),
                screen: screen(&dev.join("console")),
                printk: File::open(proc.join("sys/kernel/printk")).ok(),
                open_line: false,
            }),
        }
    }

    /// Something that goes as it should.
    pub fn info(&self, text: &str) {
        self.say(Level::Info, text);
    }

    /// Something the user should look at.
    pub fn warn(&self, text: &str) {
        self.say(Level::Warning, text);
    }

    /// Something failed.
    pub fn error(&self, text: &str) {
        self.say(Level::Error, text);
    }

    /// A line that the next call overwrites, e.g. a progress bar; on the screen only.
    pub fn progress(&self, text: &str) {
        let mut inner = self.lock();
        inner.open_line = true;
        inner.write(format!("\r\x1b[Kstiefel: {text}").as_bytes());
    }

    fn say(&self, level: Level, text: &str) {
        let mut inner = self.lock();
        if let Some(kmsg) = &mut inner.kmsg {
            // A full or missing log must not stop what is being done.
            let _ = kmsg.log(level, text);
        }
        if level as u8 > inner.shown_by_kernel() || inner.kmsg.is_none() {
            let start = if std::mem::take(&mut inner.open_line) {
                "\r\x1b[K"
            } else {
                ""
            };
            let lines: String = text.lines().map(|line| format!("{start}stiefel: {line}\r\n")).collect();
            inner.write(lines.as_bytes());
        } else if std::mem::take(&mut inner.open_line) {
            inner.write(b"\r\n");
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl Inner {
    /// Levels up to this one the kernel shows on the console by itself.
    fn shown_by_kernel(&self) -> u8 {
        let mut text = [0; 64];
        let length = self.printk.as_ref().and_then(|file| file.read_at(&mut text, 0).ok());
        length
            .and_then(|length| std::str::from_utf8(text.get(..length)?).ok())
            .and_then(|text| text.split_whitespace().next()?.parse::<u8>().ok())
            .map_or(0, |loglevel| loglevel.saturating_sub(1))
    }

    fn write(&mut self, mut bytes: &[u8]) {
        let Some(screen) = &mut self.screen else { return };
        let end = Instant::now() + PATIENCE;
        while !bytes.is_empty() {
            match screen.write(bytes) {
                Ok(written) if written > 0 => bytes = bytes.get(written..).unwrap_or_default(),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock && Instant::now() < end => wait(screen, end),
                // Held, gone, or too slow: the kernel log has the line.
                _ => return,
            }
        }
    }
}

/// Opens the console without ever waiting for it.
fn screen(path: &Path) -> Option<File> {
    let flags = i32::try_from((OFlags::NONBLOCK | OFlags::NOCTTY).bits()).ok()?;
    File::options().write(true).custom_flags(flags).open(path).ok()
}

fn wait(screen: &File, end: Instant) {
    let left = Timespec::try_from(end.saturating_duration_since(Instant::now())).ok();
    // An error shows at the next write.
    let _ = poll(
        &mut [PollFd::from_borrowed_fd(screen.as_fd(), PollFlags::OUT)],
        left.as_ref(),
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn what_the_kernel_shows_by_itself_is_asked_each_time() {
        let dir = tempfile::tempdir().unwrap();
        let screen = dir.path().join("console");
        let printk = dir.path().join("sys/kernel/printk");
        for file in [&screen, &printk, &dir.path().join("kmsg")] {
            std::fs::create_dir_all(file.parent().unwrap()).unwrap();
            std::fs::write(file, "").unwrap();
        }
        let console = Console::open(dir.path(), dir.path());
        for (levels, shown) in [("7\t4\t1\t7\n", ""), ("1\t4\t1\t7\n", "stiefel: hello\r\n")] {
            std::fs::write(&printk, levels).unwrap();
            console.warn("hello");
            assert_eq!(std::fs::read_to_string(&screen).unwrap(), shown);
        }
    }

    #[test]
    fn a_console_that_takes_nothing_does_not_stop_the_speaker() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("console");
        assert!(
            std::process::Command::new("mkfifo")
                .arg(&fifo)
                .status()
                .unwrap()
                .success()
        );
        let mut reader = File::options().read(true).write(true).open(&fifo).unwrap();
        let console = Console::open(dir.path(), dir.path());
        console.info("first");
        let begun = Instant::now();
        // Far more than a pipe holds.
        console.info(&"x".repeat(1 << 20));
        assert!(begun.elapsed() < Duration::from_secs(60));
        let mut start = [0; 16];
        reader.read_exact(&mut start).unwrap();
        assert_eq!(&start, b"stiefel: first\r\n");
    }
}
