//! What is collected for a start by the firmware: the handover with keys of one activation, and where the payload's files lie.
//!
//! Counterpart: `crate::offline::once`. It goes onto the EFI system partition, where everybody with the disk can read it: so no key
//! of a stick, and of the payload nothing but the overlay, which is the distribution's own modules and firmware.

use std::io::{self, Read};
use std::time::SystemTime;

use sha2::{Digest, Sha256};
use stiefel_shared::cpio;
use stiefel_shared::discovery::Ticket;
use stiefel_shared::handover::{FilePart, Handover, OnceHandover, Part, Place, SecretBytes};
use stiefel_shared::seal::SealError;

use super::image::Source;
use super::place::{PlaceError, place, readable};
use super::{CollectError, Collected, HandoverError, fits};
use crate::payload::Piece;
use crate::tree::Tree;

/// What goes behind the ramdisk; secret.
pub(crate) struct Once {
    /// A finished archive.
    pub(crate) archive: SecretBytes,
    /// Number of modules in the overlay.
    pub(crate) modules: usize,
}

/// Why it cannot be put together.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OnceError {
    /// The ramdisk would not find a file.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// Something is missing.
    #[error(transparent)]
    Collect(#[from] CollectError),
    /// No keys could be made.
    #[error("no keys could be made for this activation")]
    Keys(#[from] SealError),
    /// The archive could not be written.
    #[error("the handover could not be put together in memory")]
    Write(#[from] io::Error),
}

/// Puts it together; `image` is where it will lie.
pub(crate) fn once(tree: &Tree, collected: &Collected, image: Place) -> Result<Once, OnceError> {
    let disk = collected.disk.file_name().unwrap_or_default().to_string_lossy();
    let (kernel_files, initrd_files) = (
        std::slice::from_ref(&collected.payload.kernel),
        collected.payload.initrds.as_slice(),
    );
    let (kernel_places, initrd_places) = (places(tree, &disk, kernel_files)?, places(tree, &disk, initrd_files)?);
    let places = [&image].into_iter().chain(&kernel_places).chain(&initrd_places);
    readable(&collected.manifest, places.map(|place| &place.volume))?;
    let overlay = collected.overlay()?;
    let (kernel, initrd) = (Source::open(kernel_files)?, Source::open(initrd_files)?);
    let mut server = collected.handover(&kernel, &initrd, &overlay)?;
    if let Some(memory) = collected.memory {
        let parts: u64 = server.payload.parts.iter().map(|part| part.size).sum();
        let unpacked = collected.manifest.unpacked_bytes.saturating_add(parts);
        fits(
            collected.manifest.ramdisk.bytes + overlay.bytes.len() as u64,
            unpacked,
            memory,
        )?;
    }
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let now = now.map_or(0, |now| now.as_secs());
    let issued = server.keys.iter().map(|key| Ticket::issue(key, now));
    let (tickets, keys) = issued.collect::<Result<Vec<_>, _>>()?.into_iter().unzip();
    (server.tickets, server.keys) = (tickets, keys);
    let handover = Handover::Once(Box::new(OnceHandover {
        server,
        image,
        kernel: FilePart {
            files: kernel_places,
            sha256: digest(kernel)?,
        },
        initrd: FilePart {
            files: initrd_places,
            sha256: digest(initrd)?,
        },
    }));
    Ok(Once {
        archive: archive(&handover, &overlay.bytes)?,
        modules: overlay.modules,
    })
}

fn places(tree: &Tree, disk: &str, pieces: &[Piece]) -> Result<Vec<Place>, PlaceError> {
    pieces.iter().map(|piece| place(tree, disk, piece)).collect()
}

/// SHA-256 of it all, in hexadecimal digits.
fn digest(mut source: Source) -> io::Result<String> {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let got = source.reader.read(&mut buffer)?;
        if got == 0 {
            break;
        }
        hash.update(buffer.get(..got).unwrap_or_default());
    }
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// The handover, then the overlay in its place.
fn archive(handover: &Handover, overlay: &[u8]) -> Result<SecretBytes, OnceError> {
    let document = handover
        .to_cpio()
        .map_err(|error: HandoverError| CollectError::from(error))?;
    // Large enough from the start: a growing vector would leave copies of the keys behind.
    let mut out = SecretBytes(Vec::with_capacity(document.0.len() + overlay.len() + 4096));
    out.0.extend_from_slice(&document.0);
    cpio::pad_to(&mut out.0, document.0.len() as u64, 4)?;
    let mut archive = cpio::Writer::new(&mut out.0);
    archive.dir("stiefel/payload", 0o700)?;
    archive.file(Part::Overlay.path(), 0o600, overlay)?;
    archive.finish()?;
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use stiefel_shared::handover::HANDOVER_PATH;
    use stiefel_shared::handover::TargetHandover;

    #[test]
    fn the_archive_is_the_handover_then_the_overlay() {
        let handover = Handover::Target(TargetHandover {
            keys: Vec::new(),
            open: false,
            read_write: Vec::new(),
            snapshot: false,
            hostname: None,
        });
        let archive = archive(&handover, b"modules").unwrap();
        assert_eq!(archive.0.len() % 4, 0);
        let mut first = cpio::Reader::new(&archive.0);
        let document: Vec<_> = first.by_ref().map(Result::unwrap).collect();
        let file = document
            .iter()
            .find(|entry| entry.path == HANDOVER_PATH.as_bytes())
            .unwrap();
        assert!(!file.data.is_empty() && file.permissions() == 0o600);
        let second: Vec<_> = cpio::Reader::new(first.rest()).map(Result::unwrap).collect();
        let file = second
            .iter()
            .find(|entry| entry.path == Part::Overlay.path().as_bytes())
            .unwrap();
        assert_eq!((file.data, file.permissions()), (&b"modules"[..], 0o600));
    }

    #[test]
    fn the_digest_is_of_all_pieces_as_they_are_joined() {
        let dir = tempfile::tempdir().unwrap();
        let pieces = [("a", "12345"), ("b", "abc")].map(|(name, text)| {
            let path = dir.path().join(name);
            std::fs::write(&path, text).unwrap();
            Piece::from(path)
        });
        let expected: String = Sha256::digest(b"12345\0\0\0abc")
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        assert_eq!(digest(Source::open(&pieces).unwrap()).unwrap(), expected);
    }
}
