//! cpio "newc" archives: the format of every initramfs.
//!
//! Written by `initrd-builder` (ramdisk, overlay) and wherever a handover is appended to an initrd; unpacked by the kernel.
//! Specification: Linux, Documentation/driver-api/early-userspace/buffer-format.rst; cpio(5), "New ASCII Format".
//!
//! The same calls give the same bytes: inodes count from 1, times and owners are 0. Hard links and checksums are not written.
//! The reader refuses what does not fit into the bytes it was given, and allocates nothing.

use std::io::{self, Read, Write};

/// Bytes of one entry's header, before its name.
const HEADER_LEN: usize = 110;
/// Magic of the format without checksums.
const MAGIC: &[u8; 6] = b"070701";
/// Magic of the format with checksums, which the kernel reads as well.
const MAGIC_CRC: &[u8; 6] = b"070702";
/// Name of the entry that ends an archive.
const TRAILER: &str = "TRAILER!!!";
/// Longest name the kernel takes (PATH_MAX), with its NUL.
const NAME_MAX: usize = 4096;
/// Each header and each file's data begin at a multiple of this many bytes.
const ALIGN: u64 = 4;

/// File type bits of a mode: see inode(7).
pub const S_IFMT: u32 = 0o170_000;
/// A directory.
pub const S_IFDIR: u32 = 0o040_000;
/// A regular file.
pub const S_IFREG: u32 = 0o100_000;
/// A symbolic link; its data is the target.
pub const S_IFLNK: u32 = 0o120_000;
/// A character device.
pub const S_IFCHR: u32 = 0o020_000;

/// How many zero bytes bring `len` to the next multiple of `align` (which must not be 0).
#[must_use]
pub fn padding(len: u64, align: u64) -> u64 {
    (align - len % align) % align
}

/// Appends the zero bytes that bring `written` bytes to a multiple of `align`; returns how many they are.
///
/// An archive appended to another, or to an initrd, must begin at a multiple of 4.
///
/// # Errors
/// Those of `out`.
pub fn pad_to(out: &mut (impl Write + ?Sized), written: u64, align: u64) -> io::Result<u64> {
    let missing = padding(written, align);
    io::copy(&mut io::repeat(0).take(missing), out)?;
    Ok(missing)
}

/// Writes an archive, entry by entry. A directory must be written before what is in it: the kernel makes no parents.
///
/// Paths are relative to the root of the initramfs; a leading `/` is dropped. Modes are permission bits (`0o755`).
pub struct Writer<W: Write> {
    out: W,
    written: u64,
    inode: u32,
}

/// What differs between the entries' headers.
struct Header {
    mode: u32,
    nlink: u32,
    size: u32,
    rdev: (u32, u32),
}

impl<W: Write> Writer<W> {
    /// Begins an archive at the current place of `out`, which must be a multiple of 4 in the initrd.
    pub fn new(out: W) -> Self {
        Self {
            out,
            written: 0,
            inode: 0,
        }
    }

    /// Bytes written so far.
    #[must_use]
    pub fn written(&self) -> u64 {
        self.written
    }

    /// Adds a directory.
    ///
    /// # Errors
    /// `InvalidInput` for a path that is empty, too long or leads outside; else those of the output.
    pub fn dir(&mut self, path: &str, mode: u32) -> io::Result<()> {
        self.entry(
            path,
            &Header {
                mode: S_IFDIR | permissions(mode),
                nlink: 2,
                size: 0,
                rdev: (0, 0),
            },
        )
    }

    /// Adds a regular file.
    ///
    /// # Errors
    /// As [`Writer::dir`]; `InvalidInput` also for 4 GiB and more.
    pub fn file(&mut self, path: &str, mode: u32, data: &[u8]) -> io::Result<()> {
        self.file_from_reader(path, mode, data.len() as u64, &mut &*data)
    }

    /// Adds a regular file of exactly `len` bytes, copied from `data` without holding it in memory.
    ///
    /// # Errors
    /// As [`Writer::file`]; `UnexpectedEof` if `data` ends early (the archive is then unusable), `InvalidInput` if it goes on.
    pub fn file_from_reader(&mut self, path: &str, mode: u32, len: u64, data: &mut dyn Read) -> io::Result<()> {
        let size =
            u32::try_from(len).map_err(|_| invalid(format!("{path}: {len} bytes do not fit into a cpio archive")))?;
        self.entry(
            path,
            &Header {
                mode: S_IFREG | permissions(mode),
                nlink: 1,
                size,
                rdev: (0, 0),
            },
        )?;
        let copied = io::copy(&mut Read::take(&mut *data, len), &mut self.out)?;
        if copied != len {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                format!("{path}: ended after {copied} of {len} bytes"),
            ));
        }
        if data.read(&mut [0])? != 0 {
            return Err(invalid(format!(
                "{path}: is longer than the {len} bytes announced (did it change?)"
            )));
        }
        self.written += len;
        self.align()
    }

    /// Adds a symbolic link to `target`.
    ///
    /// # Errors
    /// As [`Writer::dir`]; `InvalidInput` also for an empty or overlong target.
    pub fn symlink(&mut self, path: &str, target: &str) -> io::Result<()> {
        let size = match u32::try_from(target.len()) {
            Ok(size) if size > 0 && target.len() < NAME_MAX && !target.contains('\0') => size,
            _ => {
                return Err(invalid(format!("{path}: {target:?} cannot be the target of a link")));
            }
        };
        self.entry(
            path,
            &Header {
                mode: S_IFLNK | 0o777,
                nlink: 1,
                size,
                rdev: (0, 0),
            },
        )?;
        self.put(target.as_bytes())?;
        self.align()
    }

    /// Adds a character device `major`:`minor`.
    ///
    /// # Errors
    /// As [`Writer::dir`].
    pub fn node(&mut self, path: &str, mode: u32, major: u32, minor: u32) -> io::Result<()> {
        self.entry(
            path,
            &Header {
                mode: S_IFCHR | permissions(mode),
                nlink: 1,
                size: 0,
                rdev: (major, minor),
            },
        )
    }

    /// Ends the archive and gives the output back, not flushed. Its length is a multiple of 4.
    ///
    /// # Errors
    /// Those of the output.
    pub fn finish(mut self) -> io::Result<W> {
        self.header(
            TRAILER,
            0,
            &Header {
                mode: 0,
                nlink: 1,
                size: 0,
                rdev: (0, 0),
            },
        )?;
        Ok(self.out)
    }

    fn entry(&mut self, path: &str, header: &Header) -> io::Result<()> {
        let name = relative(path)?;
        let inode = self
            .inode
            .checked_add(1)
            .ok_or_else(|| invalid("too many entries for a cpio archive".to_owned()))?;
        self.inode = inode;
        self.header(name, inode, header)
    }

    fn header(&mut self, name: &str, inode: u32, header: &Header) -> io::Result<()> {
        let Header {
            mode,
            nlink,
            size,
            rdev: (major, minor),
        } = header;
        let name_size = name.len() + 1;
        let text = format!(
            "070701{inode:08x}{mode:08x}{uid:08x}{gid:08x}{nlink:08x}{mtime:08x}{size:08x}{dev:08x}{dev:08x}{major:08x}{minor:08x}{name_size:08x}{check:08x}",
            uid = 0,
            gid = 0,
            mtime = 0,
            dev = 0,
            check = 0,
        );
        self.put(text.as_bytes())?;
        self.put(name.as_bytes())?;
        self.put(&[0])?;
        self.align()
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.out.write_all(bytes)?;
        self.written += bytes.len() as u64;
        Ok(())
    }

    fn align(&mut self) -> io::Result<()> {
        self.written += pad_to(&mut self.out, self.written, ALIGN)?;
        Ok(())
    }
}

fn permissions(mode: u32) -> u32 {
    mode & !S_IFMT & 0o7777
}

fn invalid(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, text)
}

/// The name to store for `path`: without a leading slash, and never outside the root.
fn relative(path: &str) -> io::Result<&str> {
    let name = path.trim_start_matches('/').trim_end_matches('/');
    let plain = !name.is_empty() && name != TRAILER && name.len() < NAME_MAX && !name.contains('\0');
    if plain && name.split('/').all(|part| !matches!(part, "" | "." | "..")) {
        Ok(name)
    } else {
        Err(invalid(format!("{path:?} cannot be a path in an initramfs")))
    }
}

/// Why bytes are no cpio archive.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ReadError {
    /// The bytes end inside an entry, or before the trailer.
    #[error("the cpio archive is cut off in the entry at byte {offset}")]
    Truncated {
        /// Where the entry begins.
        offset: usize,
    },
    /// No newc header where one must be, or one with fields that are no numbers.
    #[error("there is no cpio (newc) header at byte {offset}: is the archive compressed?")]
    NoHeader {
        /// Where the header should be.
        offset: usize,
    },
    /// A name without its NUL, empty, or longer than the kernel takes.
    #[error("the cpio entry at byte {offset} has an impossible name")]
    BadName {
        /// Where the entry begins.
        offset: usize,
    },
}

/// One entry of an archive; everything is borrowed from the archive's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry<'a> {
    /// As stored: usually without a leading slash, not necessarily UTF-8.
    pub path: &'a [u8],
    /// File type and permission bits.
    pub mode: u32,
    /// Contents of a file, or target of a link.
    pub data: &'a [u8],
    /// Major and minor number of a device.
    pub rdev: (u32, u32),
}

impl Entry<'_> {
    /// The file type bits, e.g. [`S_IFDIR`].
    #[must_use]
    pub fn kind(&self) -> u32 {
        self.mode & S_IFMT
    }

    /// The permission bits.
    #[must_use]
    pub fn permissions(&self) -> u32 {
        self.mode & !S_IFMT
    }
}

/// Goes through the entries of the first archive in some bytes. Ends after its trailer, or after the first error.
pub struct Reader<'a> {
    bytes: &'a [u8],
    offset: usize,
    done: bool,
}

impl<'a> Reader<'a> {
    /// Reads from the beginning of `bytes`.
    #[must_use]
    pub fn new(bytes: &'a [u8]) -> Self {
        Self {
            bytes,
            offset: 0,
            done: false,
        }
    }

    /// What follows the archive, without the zero bytes between: another archive, compressed data, or nothing.
    ///
    /// Meaningful once the iterator has ended without an error.
    #[must_use]
    pub fn rest(&self) -> &'a [u8] {
        let rest = self.bytes.get(self.offset..).unwrap_or_default();
        let zeros = rest.iter().take_while(|byte| **byte == 0).count();
        rest.get(zeros..).unwrap_or_default()
    }

    /// Reads the entry at the current offset, and returns it with the offset of the next one.
    fn read(&self) -> Result<(Entry<'a>, usize), ReadError> {
        let offset = self.offset;
        let truncated = ReadError::Truncated { offset };
        let slice = |start: usize, len: usize| {
            start
                .checked_add(len)
                .and_then(|end| self.bytes.get(start..end))
                .ok_or(ReadError::Truncated { offset })
        };
        let header = slice(offset, HEADER_LEN)?;
        if !header.starts_with(MAGIC) && !header.starts_with(MAGIC_CRC) {
            return Err(ReadError::NoHeader { offset });
        }
        let field = |index: usize| hex(header, 6 + 8 * index).ok_or(ReadError::NoHeader { offset });
        let size = |index: usize| field(index).map(|value| usize::try_from(value).unwrap_or(usize::MAX));
        let (mode, data_len, name_len) = (field(1)?, size(6)?, size(11)?);
        let rdev = (field(9)?, field(10)?);
        if !(2..=NAME_MAX).contains(&name_len) {
            return Err(ReadError::BadName { offset });
        }
        let name = slice(offset + HEADER_LEN, name_len)?;
        let path = match name.split_last() {
            Some((0, path)) if !path.contains(&0) => path,
            _ => return Err(ReadError::BadName { offset }),
        };
        let data_at = aligned(offset + HEADER_LEN + name_len).ok_or(truncated)?;
        let data = if data_len == 0 { &[] } else { slice(data_at, data_len)? };
        let next = data_at
            .checked_add(data_len)
            .and_then(aligned)
            .ok_or(ReadError::Truncated { offset })?;
        Ok((Entry { path, mode, data, rdev }, next))
    }
}

impl<'a> Iterator for Reader<'a> {
    type Item = Result<Entry<'a>, ReadError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        match self.read() {
            Ok((entry, next)) => {
                self.offset = next;
                self.done = entry.path == TRAILER.as_bytes();
                (!self.done).then_some(Ok(entry))
            }
            Err(error) => {
                self.done = true;
                Some(Err(error))
            }
        }
    }
}

fn aligned(offset: usize) -> Option<usize> {
    offset.checked_next_multiple_of(4)
}

/// Eight hexadecimal digits at `start`.
fn hex(header: &[u8], start: usize) -> Option<u32> {
    let digits = header.get(start..start + 8)?;
    digits.iter().try_fold(0_u32, |value, digit| {
        Some(value << 4 | char::from(*digit).to_digit(16)?)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> Vec<u8> {
        let mut writer = Writer::new(Vec::new());
        writer.dir("/dev", 0o755).unwrap();
        writer.node("dev/console", 0o600, 5, 1).unwrap();
        writer.file("init", 0o755, b"hello").unwrap();
        writer.symlink("bin/sh", "busybox").unwrap();
        writer.finish().unwrap()
    }

    #[test]
    fn bytes_of_a_file_are_pinned() {
        let mut writer = Writer::new(Vec::new());
        writer.file("/init", 0o755, b"hello").unwrap();
        let expected = concat!(
            "070701",
            "00000001",
            "000081ed",
            "00000000",
            "00000000",
            "00000001",
            "00000000",
            "00000005",
            "00000000",
            "00000000",
            "00000000",
            "00000000",
            "00000005",
            "00000000",
            "init\0\0",
            "hello\0\0\0",
            "070701",
            "00000000",
            "00000000",
            "00000000",
            "00000000",
            "00000001",
            "00000000",
            "00000000",
            "00000000",
            "00000000",
            "00000000",
            "00000000",
            "0000000b",
            "00000000",
            "TRAILER!!!\0\0\0\0",
        );
        assert_eq!(writer.finish().unwrap(), expected.as_bytes());
    }

    #[test]
    fn reader_gives_back_what_was_written() {
        let bytes = sample();
        let mut reader = Reader::new(&bytes);
        let entries: Vec<_> = reader.by_ref().map(Result::unwrap).collect();
        let paths: Vec<_> = entries
            .iter()
            .map(|entry| std::str::from_utf8(entry.path).unwrap())
            .collect();
        assert_eq!(paths, ["dev", "dev/console", "init", "bin/sh"]);
        assert_eq!((entries[0].kind(), entries[0].permissions()), (S_IFDIR, 0o755));
        assert_eq!((entries[1].kind(), entries[1].rdev), (S_IFCHR, (5, 1)));
        assert_eq!(
            (entries[2].kind(), entries[2].permissions(), entries[2].data),
            (S_IFREG, 0o755, &b"hello"[..])
        );
        assert_eq!((entries[3].kind(), entries[3].data), (S_IFLNK, &b"busybox"[..]));
        assert_eq!(reader.rest(), b"");
        assert_eq!(bytes.len() % 4, 0);
    }

    #[test]
    fn what_follows_the_archive_is_the_rest_without_padding() {
        let mut bytes = sample();
        let written = bytes.len() as u64;
        pad_to(&mut bytes, written, 512).unwrap();
        assert_eq!(bytes.len() % 512, 0);
        bytes.extend_from_slice(b"\x28\xb5\x2f\xfd");
        let mut reader = Reader::new(&bytes);
        assert_eq!(reader.by_ref().count(), 4);
        assert_eq!(reader.rest(), b"\x28\xb5\x2f\xfd");
    }

    #[test]
    fn padding_reaches_the_next_multiple_and_not_further() {
        assert_eq!([0, 1, 2, 3, 4, 5].map(|len| padding(len, 4)), [0, 3, 2, 1, 0, 3]);
    }

    #[test]
    fn paths_that_lead_outside_are_refused() {
        for path in ["", "/", "..", "a/../b", "a//b", "./a", "a\0b", TRAILER] {
            let error = Writer::new(Vec::new()).dir(path, 0o755).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{path:?}");
        }
    }

    #[test]
    fn a_reader_of_another_length_is_refused() {
        let mut writer = Writer::new(Vec::new());
        assert_eq!(
            writer
                .file_from_reader("a", 0o644, 4, &mut &b"abc"[..])
                .unwrap_err()
                .kind(),
            io::ErrorKind::UnexpectedEof
        );
        let mut writer = Writer::new(Vec::new());
        assert_eq!(
            writer
                .file_from_reader("a", 0o644, 2, &mut &b"abc"[..])
                .unwrap_err()
                .kind(),
            io::ErrorKind::InvalidInput
        );
    }

    #[test]
    fn compressed_data_is_named_as_no_header() {
        let zstd = [b"\x28\xb5\x2f\xfd".as_slice(), &[7; 200]].concat();
        assert_eq!(Reader::new(&zstd).next(), Some(Err(ReadError::NoHeader { offset: 0 })));
    }

    #[test]
    fn every_truncation_is_an_error_and_never_a_short_file() {
        let bytes = sample();
        let trailer = bytes.len() - 124;
        for len in 0..trailer + HEADER_LEN {
            assert!(Reader::new(&bytes[..len]).any(|entry| entry.is_err()), "{len}");
        }
    }

    proptest! {
        #[test]
        fn files_of_any_content_come_back(files in proptest::collection::vec(("[a-z]{1,20}(/[a-z.+-]{1,9}x){0,3}", 0_u32..0o10000, proptest::collection::vec(any::<u8>(), 0..300)), 0..12)) {
            let mut writer = Writer::new(Vec::new());
            for (path, mode, data) in &files {
                writer.file(path, *mode, data).unwrap();
            }
            let bytes = writer.finish().unwrap();
            let read: Vec<_> = Reader::new(&bytes).map(|entry| entry.unwrap()).map(|entry| (String::from_utf8_lossy(entry.path).into_owned(), entry.permissions(), entry.data.to_vec())).collect();
            prop_assert_eq!(read, files);
        }

        #[test]
        fn arbitrary_bytes_never_panic_and_entries_lie_inside(mut bytes in proptest::collection::vec(any::<u8>(), 0..600), header in any::<bool>(), at in 0_usize..300, digits in "[0-9a-f]{8}") {
            if header {
                bytes = sample();
                bytes[at..at + 8].copy_from_slice(digits.as_bytes());
            }
            let total: usize = Reader::new(&bytes).filter_map(Result::ok).map(|entry| HEADER_LEN + entry.data.len()).sum();
            prop_assert!(total <= bytes.len());
        }
    }

    #[test]
    fn gnu_cpio_lists_the_same_entries() {
        let Ok(mut child) = std::process::Command::new("cpio")
            .arg("-t")
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::null())
            .spawn()
        else {
            assert!(
                std::env::var_os("CI").is_none(),
                "cpio is not installed, but CI must have it"
            );
            eprintln!("skipped: cpio is not installed");
            return;
        };
        child.stdin.take().unwrap().write_all(&sample()).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success());
        assert_eq!(
            String::from_utf8(output.stdout).unwrap(),
            "dev\ndev/console\ninit\nbin/sh\n"
        );
    }
}
