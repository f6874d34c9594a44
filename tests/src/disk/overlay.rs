//! The files that make an installed system the laptop of a test, as a tar archive laid over it.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

use tar::{Builder, EntryType, Header};

use super::{DiskError, io_error};
use crate::vm::Content;

/// A file to be put on the laptop's disk; owned by root.
#[derive(Clone, Debug)]
pub struct ExtraFile {
    /// What is in it.
    pub content: Content,
    /// Where it goes, as `/usr/local/bin/stiefel`. Missing directories are made.
    pub path: String,
    /// Its permissions, as `0o755`.
    pub mode: u32,
}

impl ExtraFile {
    /// A file from the host or from memory.
    pub fn new(content: impl Into<Content>, path: &str, mode: u32) -> Self {
        Self {
            content: content.into(),
            path: path.to_owned(),
            mode,
        }
    }
}

/// Writes the archive.
pub(super) struct Overlay<W: Write> {
    builder: Builder<W>,
}

impl<W: Write> Overlay<W> {
    pub(super) fn new(writer: W) -> Self {
        Self {
            builder: Builder::new(writer),
        }
    }

    pub(super) fn file(&mut self, file: &ExtraFile) -> Result<(), DiskError> {
        let path = relative(&file.path)?;
        let mut header = header(EntryType::Regular, file.mode);
        match &file.content {
            Content::Bytes(bytes) => {
                header.set_size(bytes.len() as u64);
                self.builder.append_data(&mut header, path, bytes.as_slice())
            }
            Content::File(from) => {
                let source = File::open(from).map_err(io_error("open", from))?;
                let length = source.metadata().map_err(io_error("open", from))?.len();
                header.set_size(length);
                self.builder.append_data(&mut header, path, source)
            }
        }
        .map_err(io_error("add to the disk the file", &file.path))
    }

    pub(super) fn text(&mut self, path: &str, text: &str) -> Result<(), DiskError> {
        self.file(&ExtraFile::new(text, path, 0o644))
    }

    /// A symbolic link at `path` that leads to `target`.
    pub(super) fn link(&mut self, path: &str, target: &str) -> Result<(), DiskError> {
        let mut header = header(EntryType::Symlink, 0o777);
        header.set_size(0);
        let added = self.builder.append_link(&mut header, relative(path)?, target);
        added.map_err(io_error("add to the disk the link", path))
    }

    pub(super) fn finish(self) -> io::Result<()> {
        self.builder.into_inner()?.flush()
    }
}

fn header(kind: EntryType, mode: u32) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode & 0o7777);
    header.set_uid(0);
    header.set_gid(0);
    // 2026-01-01: a time before the guest's clock.
    header.set_mtime(1_767_225_600);
    header
}

/// A guest's path as it stands in the archive.
fn relative(path: &str) -> Result<&Path, DiskError> {
    let refused = || DiskError::GuestPath { path: path.to_owned() };
    let inner = path.strip_prefix('/').ok_or_else(refused)?;
    let straight = inner.split('/').all(|part| !matches!(part, "" | "." | ".."));
    if straight { Ok(Path::new(inner)) } else { Err(refused()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_that_leads_out_of_the_guest_is_refused() {
        for path in ["", "etc/x", "/", "/../etc/x", "/etc/../../x", "/etc//x", "/etc/"] {
            assert!(matches!(relative(path), Err(DiskError::GuestPath { .. })), "{path}");
        }
        assert_eq!(relative("/etc/hostname").unwrap(), Path::new("etc/hostname"));
    }

    #[test]
    fn files_belong_to_root_and_keep_their_mode() {
        let mut bytes = Vec::new();
        let mut overlay = Overlay::new(&mut bytes);
        overlay.file(&ExtraFile::new("#!", "/usr/local/bin/x", 0o755)).unwrap();
        overlay.link("/etc/y", "/usr/local/bin/x").unwrap();
        overlay.finish().unwrap();
        let mut archive = tar::Archive::new(bytes.as_slice());
        let mut entries = archive.entries().unwrap().map(Result::unwrap);
        let file = entries.next().unwrap();
        assert_eq!(file.path().unwrap(), Path::new("usr/local/bin/x"));
        assert_eq!(
            (file.header().mode().unwrap(), file.header().uid().unwrap()),
            (0o755, 0)
        );
        let link = entries.next().unwrap();
        assert_eq!(link.link_name().unwrap().unwrap(), Path::new("/usr/local/bin/x"));
        assert!(entries.next().is_none());
    }
}
