//! What stiefel says while there is no other screen: in the ramdisk, in the payload's initramfs, at the last shutdown step.
//!
//! Every line goes to the kernel log, so that it can be read later; and to the console, unless the kernel
//! prints its log there anyway.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::Mutex;

use crate::kmsg::{Kmsg, Level};

/// Where the lines go.
#[derive(Debug)]
pub struct Console {
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    kmsg: Option<Kmsg>,
    screen: Option<File>,
    /// Levels up to this one the kernel shows on the console by itself.
    shown_by_kernel: u8,
    /// A progress line is on the screen and wants to be ended before the next line.
    open_line: bool,
}

impl Console {
    /// Opens the kernel log and the console below `dev` (such as /dev), and learns from `proc` (such as /proc)
    /// what the kernel shows by itself. What cannot be opened is done without: there is nobody left to tell.
    #[must_use]
    pub fn open(dev: &Path, proc: &Path) -> Self {
        let shown_by_kernel = std::fs::read_to_string(proc.join("sys/kernel/printk"))
            .ok()
            .and_then(|text| text.split_whitespace().next()?.parse::<u8>().ok())
            .map_or(0, |loglevel| loglevel.saturating_sub(1));
        Self {
            inner: Mutex::new(Inner {
                kmsg: Kmsg::open(&dev.join("kmsg")).ok(),
                screen: File::options().write(true).open(dev.join("console")).ok(),
                shown_by_kernel,
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
        if level as u8 > inner.shown_by_kernel || inner.kmsg.is_none() {
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
    fn write(&mut self, bytes: &[u8]) {
        if let Some(screen) = &mut self.screen {
            // As above.
            let _ = screen.write_all(bytes);
        }
    }
}
