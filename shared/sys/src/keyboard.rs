//! Keys that people press at the ramdisk's consoles: the screen's and a serial one's.
//!
//! Counterpart: [`crate::console`], which speaks there. Only how lines are read is changed (no waiting for Enter, no echo), not how
//! they are written.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use rustix::fs::OFlags;
use rustix::termios::{LocalModes, OptionalActions, QueueSelector, SpecialCodeIndex, tcflush, tcgetattr, tcsetattr};
use zeroize::Zeroizing;

use crate::process::{deadline, left, poll};

/// Consoles that are listened to; the kernel has eight at most (`MAX_CMDLINECONSOLES`).
const MAX_CONSOLES: usize = 8;
/// What is read from a console at once, in bytes; so much of it waits to be asked for.
const READ: usize = 64;
/// Begins what a key without a character of its own sends (ECMA-48, 5.4).
const ESCAPE: u8 = 0x1b;

/// What ends a line, takes its last character away, and takes all of it away (^U).
const ENTER: [u8; 2] = [b'\r', b'\n'];
const ERASE: [u8; 2] = [0x08, 0x7f];
const KILL: u8 = 0x15;

/// A line that was asked for; what it says is never printed.
#[derive(PartialEq, Eq)]
pub enum Typed {
    /// This one, without its end.
    Line(Zeroizing<Vec<u8>>),
    /// One that is longer than it may be.
    TooLong,
    /// Nobody has pressed a key for too long.
    Nothing,
}

impl std::fmt::Debug for Typed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Line(_) => "Line(..)",
            Self::TooLong => "TooLong",
            Self::Nothing => "Nothing",
        })
    }
}

/// A line while it is typed, which may be secret: wiped when dropped.
struct Line {
    bytes: Zeroizing<Vec<u8>>,
    max: usize,
    too_long: bool,
}

/// The consoles, listened to.
#[derive(Debug)]
pub struct Keyboard {
    consoles: Vec<File>,
    pressed: VecDeque<char>,
}

impl Keyboard {
    /// Opens the active consoles below `dev` (such as /dev), as `sysfs` (such as /sys) lists them, and has them tell each key
    /// at once. What cannot be opened is passed over.
    ///
    /// # Errors
    /// The list cannot be read, or none of its consoles can be listened to.
    pub fn open(dev: &Path, sysfs: &Path) -> io::Result<Self> {
        let active = std::fs::read_to_string(sysfs.join("class/tty/console/active"))?;
        let consoles: Vec<File> = active
            .split_whitespace()
            .filter(|name| !name.contains('/'))
            .take(MAX_CONSOLES)
            .filter_map(|name| match name {
                // tty0 stands for the screen in front, which is the first one in the ramdisk.
                "tty0" => listen(&dev.join("tty1")).or_else(|_| listen(&dev.join(name))).ok(),
                _ => listen(&dev.join(name)).ok(),
            })
            .collect();
        if consoles.is_empty() {
            return Err(io::Error::new(ErrorKind::NotFound, "no console can be listened to"));
        }
        Ok(Self {
            consoles,
            pressed: VecDeque::new(),
        })
    }

    /// Waits for the next key with a printable ASCII character, at most `timeout`; the others are dropped. `None`: none came
    /// in time.
    ///
    /// # Errors
    /// All consoles have gone, or what poll(2) says.
    pub fn next(&mut self, timeout: Option<Duration>) -> io::Result<Option<char>> {
        let end = deadline(timeout);
        loop {
            if let Some(key) = self.pressed.pop_front() {
                return Ok(Some(key));
            }
            if self.consoles.is_empty() {
                return Err(ErrorKind::UnexpectedEof.into());
            }
            let consoles: Vec<BorrowedFd<'_>> = self.consoles.iter().map(AsFd::as_fd).collect();
            if !poll(&consoles, left(end))?.contains(&true) {
                return Ok(None);
            }
            let pressed = &mut self.pressed;
            self.consoles.retain_mut(|console| read(console, pressed));
            // Noise must not make this last.
            if self.pressed.is_empty() && left(end).is_some_and(|left| left.is_zero()) {
                return Ok(None);
            }
        }
    }
}

impl Keyboard {
    /// Has `ask` ask for a line, and reads it without showing it, at most `max` bytes, on all consoles together; nobody may pause for
    /// longer than `patience`. What was pressed before it was asked for is dropped: it was meant for something else.
    ///
    /// # Errors
    /// All consoles have gone, or what poll(2) says.
    pub fn line(&mut self, ask: impl FnOnce(), max: usize, patience: Duration) -> io::Result<Typed> {
        self.pressed.clear();
        for console in &self.consoles {
            // What cannot be dropped is a key too many.
            let _ = tcflush(console, QueueSelector::IFlush);
        }
        // Who answers at once is heard, too.
        ask();
        let mut line = Line {
            // Large enough from the start: a growing vector would leave copies behind.
            bytes: Zeroizing::new(Vec::with_capacity(max)),
            max,
            too_long: false,
        };
        loop {
            if self.consoles.is_empty() {
                return Err(ErrorKind::UnexpectedEof.into());
            }
            let consoles: Vec<BorrowedFd<'_>> = self.consoles.iter().map(AsFd::as_fd).collect();
            if !poll(&consoles, Some(patience))?.contains(&true) {
                return Ok(Typed::Nothing);
            }
            let mut ended = false;
            self.consoles.retain_mut(|console| {
                let mut bytes = Zeroizing::new([0; READ]);
                match console.read(bytes.as_mut_slice()) {
                    Ok(0) => false,
                    Ok(length) => {
                        ended = ended || line.take(bytes.get(..length).unwrap_or_default());
                        true
                    }
                    Err(error) => matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted),
                }
            });
            if ended {
                return Ok(if line.too_long {
                    Typed::TooLong
                } else {
                    Typed::Line(line.bytes)
                });
            }
        }
    }
}

impl Line {
    /// Takes what a console has; whether the line has ended.
    fn take(&mut self, bytes: &[u8]) -> bool {
        for &byte in bytes {
            match byte {
                byte if ENTER.contains(&byte) => return true,
                // An arrow's letters are no keys.
                ESCAPE => return false,
                byte if ERASE.contains(&byte) => self.erase(),
                KILL => {
                    self.bytes.fill(0);
                    self.bytes.clear();
                    self.too_long = false;
                }
                byte if byte < b' ' => {}
                _ if self.bytes.len() >= self.max => self.too_long = true,
                byte => self.bytes.push(byte),
            }
        }
        false
    }

    /// Takes the last character away, all bytes of it (UTF-8).
    fn erase(&mut self) {
        while let Some(byte) = self.bytes.pop() {
            if byte & 0xc0 != 0x80 {
                break;
            }
        }
    }
}

/// Opens a console so that it never becomes this process's terminal and never makes it wait.
fn listen(path: &Path) -> io::Result<File> {
    let flags = (OFlags::NONBLOCK | OFlags::NOCTTY).bits();
    let console = File::options()
        .read(true)
        .custom_flags(i32::try_from(flags).map_err(io::Error::other)?)
        .open(path)?;
    let mut modes = tcgetattr(&console)?;
    modes.local_modes.remove(LocalModes::ICANON | LocalModes::ECHO);
    modes.special_codes[SpecialCodeIndex::VMIN] = 1;
    modes.special_codes[SpecialCodeIndex::VTIME] = 0;
    tcsetattr(&console, OptionalActions::Now, &modes)?;
    Ok(console)
}

/// Takes what a console has; whether it is still there.
fn read(console: &mut impl Read, pressed: &mut VecDeque<char>) -> bool {
    let mut bytes = [0; READ];
    match console.read(&mut bytes) {
        Ok(0) => false,
        Ok(length) => {
            // An arrow's letters are no keys: what follows an escape is left out.
            let keys = bytes.iter().take(length).take_while(|byte| **byte != ESCAPE);
            pressed.extend(
                keys.filter(|byte| matches!(byte, b' '..=b'~'))
                    .map(|byte| char::from(*byte)),
            );
            true
        }
        Err(error) => matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::OsStr;
    use std::io::Write;
    use std::os::unix::ffi::OsStrExt;

    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    use rustix::termios::OutputModes;

    /// A folder that is both /dev and /sys, with a pseudo terminal as the console `ttyS0`; its other end.
    fn machine(active: &str) -> (tempfile::TempDir, File) {
        let person = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&person).unwrap();
        unlockpt(&person).unwrap();
        let name = ptsname(&person, Vec::new()).unwrap();
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink(OsStr::from_bytes(name.to_bytes()), dir.path().join("ttyS0")).unwrap();
        let list = dir.path().join("class/tty/console");
        std::fs::create_dir_all(&list).unwrap();
        std::fs::write(list.join("active"), active).unwrap();
        (dir, person.into())
    }

    #[test]
    fn a_key_counts_at_once_and_noise_does_not() {
        let (dir, mut person) = machine("tty0 ttyS0\n");
        let mut keyboard = Keyboard::open(dir.path(), dir.path()).unwrap();
        assert_eq!(keyboard.next(Some(Duration::ZERO)).unwrap(), None);
        person.write_all(b"\0\xff\x80p").unwrap();
        assert_eq!(keyboard.next(None).unwrap(), Some('p'));
        person.write_all(b"h\x1b[A").unwrap();
        assert_eq!(keyboard.next(None).unwrap(), Some('h'));
        person.write_all(b"y").unwrap();
        assert_eq!(keyboard.next(None).unwrap(), Some('y'));
    }

    #[test]
    fn what_is_written_to_the_console_looks_as_before_and_keys_are_not_shown() {
        let (dir, mut person) = machine("ttyS0");
        let before = tcgetattr(File::open(dir.path().join("ttyS0")).unwrap())
            .unwrap()
            .output_modes;
        let mut keyboard = Keyboard::open(dir.path(), dir.path()).unwrap();
        let mut screen = File::options().write(true).open(dir.path().join("ttyS0")).unwrap();
        assert_eq!(tcgetattr(&screen).unwrap().output_modes, before);
        assert!(before.contains(OutputModes::OPOST));
        person.write_all(b"p").unwrap();
        assert_eq!(keyboard.next(None).unwrap(), Some('p'));
        screen.write_all(b"a\r\nb").unwrap();
        let mut shown = [0; 64];
        let length = person.read(&mut shown).unwrap();
        // The terminal makes \r\n of \n; the second \r changes nothing on a screen.
        assert_eq!(&shown[..length], b"a\r\r\nb");
    }

    #[test]
    fn a_line_is_read_without_being_shown_and_what_was_pressed_before_is_dropped() {
        let (dir, mut person) = machine("ttyS0");
        let mut keyboard = Keyboard::open(dir.path(), dir.path()).unwrap();
        person.write_all(b"earlier\r").unwrap();
        assert_eq!(keyboard.next(None).unwrap(), Some('e'));
        assert_eq!(keyboard.line(|| {}, 8, Duration::ZERO).unwrap(), Typed::Nothing);
        person.write_all(b"too early\r").unwrap();
        // Only what has arrived can be dropped.
        assert_eq!(poll(&[keyboard.consoles[0].as_fd()], None).unwrap(), [true]);
        let at_once = || person.write_all("pä\x7fss\r".as_bytes()).unwrap();
        let typed = keyboard.line(at_once, 8, Duration::MAX).unwrap();
        assert!(typed == Typed::Line(Zeroizing::new(b"pss".to_vec())), "{typed:?}");
        assert_eq!(format!("{typed:?}"), "Line(..)");
        let mut shown = [0; 64];
        rustix::io::ioctl_fionbio(&person, true).unwrap();
        assert!(person.read(&mut shown).is_err(), "nothing was shown");
    }

    #[test]
    fn a_line_that_is_too_long_is_told_unless_it_is_taken_back() {
        let typed = |text: &[u8]| {
            let mut line = Line {
                bytes: Zeroizing::new(Vec::new()),
                max: 4,
                too_long: false,
            };
            (line.take(text), line.too_long, line.bytes.to_vec())
        };
        assert_eq!(typed(b"1234\n"), (true, false, b"1234".to_vec()));
        assert_eq!(typed(b"12345\n"), (true, true, b"1234".to_vec()));
        assert_eq!(typed(b"12345\x15ab"), (false, false, b"ab".to_vec()));
        assert_eq!(typed(b"\x7f\x08a\x03\t b"), (false, false, b"a b".to_vec()));
        assert_eq!(typed("aäß\x7f".as_bytes()), (false, true, "aä".as_bytes().to_vec()));
    }

    #[test]
    fn who_types_nothing_is_not_waited_for_without_end() {
        let (dir, _person) = machine("ttyS0");
        let mut keyboard = Keyboard::open(dir.path(), dir.path()).unwrap();
        let typed = keyboard.line(|| {}, 8, Duration::from_millis(1)).unwrap();
        assert_eq!(typed, Typed::Nothing);
    }

    #[test]
    fn consoles_that_have_gone_are_told_of() {
        let (dir, person) = machine("ttyS0");
        let mut keyboard = Keyboard::open(dir.path(), dir.path()).unwrap();
        drop(person);
        assert!(keyboard.next(None).is_err());
    }

    #[test]
    fn a_machine_without_consoles_has_no_keyboard() {
        let (dir, _person) = machine("tty0 ../ttyS0 ttyS9");
        assert!(Keyboard::open(dir.path(), dir.path()).is_err());
        assert!(Keyboard::open(dir.path(), &dir.path().join("none")).is_err());
    }
}
