//! Whether a payload's own initrd already holds what the overlay would bring: `stiefel bake` was called by a hook of what built it.
//!
//! An initrd is a row of cpio archives, each plain or compressed, with zeros between: Linux,
//! Documentation/driver-api/early-userspace/buffer-format.rst. Compression that is not known (lz4, lzo, bzip2) counts as not baked:
//! then the overlay is sent, which is never wrong. Sizes are bounded before anything is held in memory.

use std::fs::File;
use std::io::{self, Read};
use std::path::PathBuf;

use lzma_rust2::XzReader;
use stiefel_shared::cpio::Reader;

/// Where the mark lies in an initrd.
pub(crate) const MARK: &str = "stiefel/baked";
/// The longest archive that is looked into, in bytes, uncompressed: a generic initrd has some 300 MB.
const ARCHIVE_MAX: u64 = 1 << 30;
/// Memory an xz decoder may take, in KiB.
const XZ_MEMORY_KIB: u32 = 128 << 10;

/// What says that all is there, for this kernel, by this version of stiefel, with these modules of the configuration.
pub(crate) fn mark(version: &str, configured: &[String]) -> String {
    format!(
        "stiefel {}\nkernel {version}\nmodules {}\n",
        env!("CARGO_PKG_VERSION"),
        configured.join(" ")
    )
}

/// Whether one of the initrds has been given just what the overlay for this kernel would hold. What cannot be read has not.
#[must_use]
pub fn is_baked(initrds: &[PathBuf], version: &str, configured: &[String]) -> bool {
    let mark = mark(version, configured);
    initrds.iter().any(|path| {
        let bytes = File::open(path).and_then(|mut file| bounded(&mut file));
        bytes
            .and_then(|bytes| holds(&bytes, mark.as_bytes()))
            .unwrap_or_default()
    })
}

/// Looks into one archive after the other.
fn holds(mut initrd: &[u8], mark: &[u8]) -> io::Result<bool> {
    loop {
        let zeros = initrd.iter().take_while(|byte| **byte == 0).count();
        initrd = initrd.get(zeros..).unwrap_or_default();
        let archive = match initrd {
            [b'0', b'7', b'0', b'7', ..] => {
                let mut reader = Reader::new(initrd);
                if entries(&mut reader, mark)? {
                    return Ok(true);
                }
                initrd = reader.rest();
                continue;
            }
            [0x1f, 0x8b, ..] => bounded(&mut flate2::bufread::GzDecoder::new(&mut initrd))?,
            [0x28, 0xb5, 0x2f, 0xfd, ..] => bounded(&mut zstd::Decoder::with_buffer(&mut initrd)?.single_frame())?,
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => {
                bounded(&mut XzReader::new_mem_limit(&mut initrd, false, XZ_MEMORY_KIB))?
            }
            _ => return Ok(false),
        };
        // Only archives are compressed, never what is compressed already.
        if archive.starts_with(b"0707") && entries(&mut Reader::new(&archive), mark)? {
            return Ok(true);
        }
    }
}

fn entries(reader: &mut Reader, mark: &[u8]) -> io::Result<bool> {
    for entry in reader {
        let entry = entry.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        let path = entry.path.strip_prefix(b"./").unwrap_or(entry.path);
        if path.strip_prefix(b"/").unwrap_or(path) == MARK.as_bytes() {
            return Ok(entry.data == mark);
        }
    }
    Ok(false)
}

fn bounded(archive: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    archive.take(ARCHIVE_MAX + 1).read_to_end(&mut bytes)?;
    match bytes.len() as u64 > ARCHIVE_MAX {
        true => Err(io::ErrorKind::FileTooLarge.into()),
        false => Ok(bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::archive::Archive;
    use crate::testing::cases;
    use proptest::prelude::*;
    use std::io::Write;

    fn archive(path: &str, data: &[u8]) -> Vec<u8> {
        let mut archive = Archive::new(Vec::new());
        archive.dir("stiefel", 0o755).unwrap();
        archive.file(path, 0o644, data).unwrap();
        archive.finish().unwrap()
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn the_mark_is_found_behind_microcode_and_in_each_known_compression() {
        let mark = mark("6.1.0", &["default".to_owned()]);
        let baked = archive(MARK, mark.as_bytes());
        let early = archive("stiefel/other", b"microcode");
        let zstd = zstd::bulk::compress(&baked, 3).unwrap();
        for (name, last) in [("plain", baked.clone()), ("gzip", gzip(&baked)), ("zstd", zstd)] {
            for zeros in [0, 4, 512] {
                let row = [
                    early.as_slice(),
                    &vec![0; zeros],
                    &gzip(&early),
                    &[0; 4],
                    &last,
                    &[0; 8],
                ]
                .concat();
                assert!(holds(&row, mark.as_bytes()).unwrap(), "{name}, {zeros} zeros");
                assert!(!holds(&row, b"another").unwrap(), "{name}");
            }
        }
        assert!(!holds(&gzip(&early), mark.as_bytes()).unwrap());
        assert!(!holds(b"\x02\x21\x4c\x18lz4", mark.as_bytes()).unwrap());
        assert!(!holds(&[], mark.as_bytes()).unwrap());
    }

    #[test]
    fn another_version_configuration_or_no_file_is_not_baked() {
        let dir = tempfile::tempdir().unwrap();
        let initrd = dir.path().join("initrd");
        let configured = ["default".to_owned()];
        std::fs::write(&initrd, gzip(&archive(MARK, mark("6.1.0", &configured).as_bytes()))).unwrap();
        let initrds = [dir.path().join("absent"), initrd];
        assert!(is_baked(&initrds, "6.1.0", &configured));
        assert!(!is_baked(&initrds, "6.1.1", &configured));
        assert!(!is_baked(
            &initrds,
            "6.1.0",
            &["default".to_owned(), "r8127".to_owned()]
        ));
        assert!(!is_baked(&initrds[..1], "6.1.0", &configured));
    }

    proptest! {
        #![proptest_config(cases(256))]
        #[test]
        fn damaged_initrds_never_panic(at in any::<prop::sample::Index>(), value: u8, len in any::<prop::sample::Index>()) {
            let plain = archive(MARK, b"mark");
            let mut bytes = [plain.as_slice(), &[0; 4], &gzip(&plain), &zstd::bulk::compress(&plain, 1).unwrap()].concat();
            let at = at.index(bytes.len());
            bytes[at] = value;
            bytes.truncate(len.index(bytes.len() + 1));
            let _ = holds(&bytes, b"other");
        }
    }
}
