//! Writing to the kernel's log (`/dev/kmsg`): one record per write, marked `stiefel: `.
//!
//! The kernel drops records of a process that writes more than about 10 in 5 s, unless `printk.devkmsg=on` is on its
//! command line or [`unlimited`] was called in time.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;

/// The longest record in bytes with its mark: the kernel refuses (EINVAL) from about 1000 on.
const MAX_RECORD: usize = 976;
const MARK: &str = "stiefel: ";

/// How urgent a record is; the consoles show those below the kernel's `loglevel`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// Something failed.
    Error = 3,
    /// Something is odd, and work goes on.
    Warning = 4,
    /// What the user wants to see.
    Notice = 5,
    /// What happens.
    Info = 6,
    /// For finding faults.
    Debug = 7,
}

/// An open kernel log.
#[derive(Debug)]
pub struct Kmsg {
    file: File,
}

impl Kmsg {
    /// Opens the log's device, e.g. `/dev/kmsg`.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn open(path: &Path) -> io::Result<Self> {
        Ok(Self::from_file(OpenOptions::new().write(true).open(path)?))
    }

    /// Takes a file that is open for writing.
    #[must_use]
    pub fn from_file(file: File) -> Self {
        Self { file }
    }

    /// Writes a text: a record per line, long lines as several. Control characters become `?`, so that no text can
    /// change a terminal or forge a record.
    ///
    /// # Errors
    /// What the kernel says about the first record that failed.
    pub fn log(&mut self, level: Level, text: &str) -> io::Result<()> {
        for record in records(level, text) {
            self.file.write_all(record.as_bytes())?;
        }
        Ok(())
    }
}

/// For use as a program's log output: each write is a text of level info.
impl Write for Kmsg {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.log(Level::Info, &String::from_utf8_lossy(bytes))?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Tells the kernel to keep all records of user space. Fails where `printk.devkmsg=` was given at boot: that stands.
///
/// # Errors
/// If `procfs` is not mounted or the setting is locked.
pub fn unlimited(procfs: &Path) -> io::Result<()> {
    std::fs::write(procfs.join("sys/kernel/printk_devkmsg"), "on\n")
}

fn records(level: Level, text: &str) -> Vec<String> {
    let head = format!("<{}>{MARK}", level as u8);
    let room = MAX_RECORD - head.len() - 1;
    let mut records = Vec::new();
    for line in text.lines().filter(|line| !line.trim().is_empty()) {
        let mut record = head.clone();
        for c in line.chars().map(|c| if c.is_control() { '?' } else { c }) {
            if record.len() + c.len_utf8() > head.len() + room {
                record.push('\n');
                records.push(std::mem::replace(&mut record, head.clone()));
            }
            record.push(c);
        }
        record.push('\n');
        records.push(record);
    }
    records
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_record_has_level_and_mark() {
        assert_eq!(records(Level::Info, "link up"), ["<6>stiefel: link up\n"]);
        assert_eq!(
            records(Level::Error, "a\n\nb\r\n"),
            ["<3>stiefel: a\n", "<3>stiefel: b\n"]
        );
    }

    #[test]
    fn control_characters_are_replaced() {
        assert_eq!(records(Level::Info, "a\x1b[2Jb\0"), ["<6>stiefel: a?[2Jb?\n"]);
    }

    #[test]
    fn the_log_writes_its_records() {
        use std::io::{Read, Seek};
        let mut file = tempfile::tempfile().unwrap();
        let mut kmsg = Kmsg::from_file(file.try_clone().unwrap());
        kmsg.log(Level::Warning, "one").unwrap();
        kmsg.write_all(b"two\n").unwrap();
        let mut text = String::new();
        file.rewind().unwrap();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "<4>stiefel: one\n<6>stiefel: two\n");
    }

    proptest! {
        #[test]
        fn records_keep_the_limit_and_the_text(text in "[^\\p{C}]{0,3000}") {
            let records = records(Level::Debug, &text);
            prop_assert!(records.iter().all(|record| record.len() <= MAX_RECORD));
            let joined: String = records.iter().map(|record| &record["<7>stiefel: ".len()..record.len() - 1]).collect();
            let kept: String = text.lines().filter(|line| !line.trim().is_empty()).collect();
            prop_assert_eq!(joined, kept);
        }
    }
}
