//! What is done to configfs, apart from why: so that tests can put something else in its place.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::Path;

use crate::read;

/// configfs attributes fit a page.
const ATTRIBUTE: usize = 4096;

/// The calls that configfs understands (`Documentation/filesystems/configfs.rst`).
pub(super) trait Tree {
    /// Makes an item; the kernel puts its attributes into it.
    fn make_dir(&mut self, path: &Path) -> io::Result<()>;
    /// Removes an item with its attributes.
    fn remove_dir(&mut self, path: &Path) -> io::Result<()>;
    /// Sets an attribute; one that is not there is not made.
    fn write(&mut self, path: &Path, text: &str) -> io::Result<()>;
    fn read(&self, path: &Path) -> io::Result<String>;
    fn link(&mut self, target: &Path, path: &Path) -> io::Result<()>;
    fn unlink(&mut self, path: &Path) -> io::Result<()>;
    /// The names in a folder, in order.
    fn list(&self, path: &Path) -> io::Result<Vec<String>>;
}

/// The kernel's.
#[derive(Debug)]
pub(super) struct Configfs;

impl Tree for Configfs {
    fn make_dir(&mut self, path: &Path) -> io::Result<()> {
        fs::create_dir(path)
    }

    fn remove_dir(&mut self, path: &Path) -> io::Result<()> {
        fs::remove_dir(path)
    }

    fn write(&mut self, path: &Path, text: &str) -> io::Result<()> {
        OpenOptions::new().write(true).open(path)?.write_all(text.as_bytes())
    }

    fn read(&self, path: &Path) -> io::Result<String> {
        let bytes = read::bounded(path, ATTRIBUTE)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    fn link(&mut self, target: &Path, path: &Path) -> io::Result<()> {
        std::os::unix::fs::symlink(target, path)
    }

    fn unlink(&mut self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(path)? {
            names.push(entry?.file_name().to_string_lossy().into_owned());
        }
        names.sort_unstable();
        Ok(names)
    }
}
