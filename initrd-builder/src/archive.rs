//! A cpio archive that makes the folders its files need.

use std::collections::BTreeSet;
use std::io::{self, Write};

use stiefel_shared::cpio::Writer;

/// Mode of folders that nobody asked for by name.
const FOLDER_MODE: u32 = 0o755;

/// Writes an archive; paths are relative, without a leading slash.
pub(crate) struct Archive<W: Write> {
    writer: Writer<W>,
    folders: BTreeSet<String>,
}

impl<W: Write> Archive<W> {
    pub(crate) fn new(out: W) -> Self {
        Self {
            writer: Writer::new(out),
            folders: BTreeSet::new(),
        }
    }

    /// Adds a folder, and those above it.
    pub(crate) fn dir(&mut self, path: &str, mode: u32) -> io::Result<()> {
        self.parents(path)?;
        if self.folders.insert(path.to_owned()) {
            self.writer.dir(path, mode)
        } else {
            Ok(())
        }
    }

    pub(crate) fn file(&mut self, path: &str, mode: u32, data: &[u8]) -> io::Result<()> {
        self.parents(path)?;
        self.writer.file(path, mode, data)
    }

    pub(crate) fn symlink(&mut self, path: &str, target: &str) -> io::Result<()> {
        self.parents(path)?;
        self.writer.symlink(path, target)
    }

    pub(crate) fn node(&mut self, path: &str, mode: u32, major: u32, minor: u32) -> io::Result<()> {
        self.parents(path)?;
        self.writer.node(path, mode, major, minor)
    }

    /// Bytes written so far.
    pub(crate) fn written(&self) -> u64 {
        self.writer.written()
    }

    pub(crate) fn finish(self) -> io::Result<W> {
        self.writer.finish()
    }

    fn parents(&mut self, path: &str) -> io::Result<()> {
        for (at, _) in path.match_indices('/') {
            let parent = &path[..at];
            if !self.folders.contains(parent) {
                self.writer.dir(parent, FOLDER_MODE)?;
                self.folders.insert(parent.to_owned());
            }
        }
        Ok(())
    }
}
