//! The initrd that the ramdisk's kernel gets: the ramdisk, then our archive of handover and payload, in one memory file.
//!
//! The kernel unpacks what follows one another in an initrd, each beginning at a multiple of 4 bytes: Linux,
//! Documentation/driver-api/early-userspace/buffer-format.rst.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};

use stiefel_initrd_builder::overlay::{self, Overlay};
use stiefel_shared::config::Session;
use stiefel_shared::cpio;
use stiefel_shared::handover::{
    BootFolder, Handover, MAX_CMDLINE, Part, PartSize, Payload, SecretBytes, ServerHandover, SessionMode, insert_word,
};
use stiefel_sys::kexec;

use super::{CollectError, Collected, checked, fits};
use crate::payload::{FoundPayload, Piece};

/// Stops the OS from using the disk's swap space: systemd.swap= in kernel-command-line(7).
const NO_SWAP: &str = "systemd.swap=0";

/// The finished initrd.
#[derive(Debug)]
pub struct Image {
    /// A sealed file in memory, at its start. Holds the keys.
    pub initrd: File,
    /// Its length in bytes.
    pub size: u64,
    /// What the ramdisk is told.
    pub handover: ServerHandover,
    /// Number of modules in the overlay.
    pub modules: usize,
}

impl Collected {
    /// Reads the payload and puts the image together.
    ///
    /// # Errors
    /// [`CollectError`].
    pub fn image(&self) -> Result<Image, CollectError> {
        let overlay = self.overlay()?;
        let kernel = Source::open(std::slice::from_ref(&self.payload.kernel))?;
        let initrd = Source::open(&self.payload.initrds)?;
        let handover = self.handover(&kernel, &initrd, &overlay)?;
        let document = Handover::Server(Box::new(handover.clone())).to_cpio()?;
        let ramdisk = Source::open(&[self.ramdisk.clone().into()])?;
        let parts: u64 = handover.payload.parts.iter().map(|part| part.size).sum();
        let expected = ramdisk.len + document.0.len() as u64 + parts;
        if let Some(memory) = self.memory {
            let unpacked = self.manifest.unpacked_bytes.saturating_add(expected - ramdisk.len);
            fits(expected, unpacked, memory)?;
        }
        let mut size = 0;
        // Not buffered: the archive has few entries, and a buffer would keep a copy of the keys.
        let file = kexec::memfd("stiefel-initrd", |file| {
            size = write(file, ramdisk, &document, [kernel, initrd], &overlay.bytes)?;
            Ok(())
        });
        let initrd = file.map_err(|source| CollectError::Image { size: expected, source })?;
        Ok(Image {
            initrd,
            size,
            handover,
            modules: overlay.modules,
        })
    }

    pub(super) fn handover(
        &self,
        kernel: &Source,
        initrd: &Source,
        overlay: &Overlay,
    ) -> Result<ServerHandover, CollectError> {
        let sizes = [kernel.len, initrd.len, overlay.bytes.len() as u64];
        let payload = payload(&self.session, &self.payload, sizes, self.boot.clone())?;
        Ok(ServerHandover {
            encryption: self.link.encryption,
            mode: self.link.mode,
            transport: self.transport,
            session: self.session.mode,
            grace: self.session.grace.0.as_secs(),
            keys: self.keys.clone(),
            hostname: self.hostname.clone(),
            disk: self.identity.clone(),
            payload,
            after: self.session.after,
            tickets: Vec::new(),
        })
    }

    /// What goes to the desktop besides the payload's own files; empty, if its initrd has it.
    pub(super) fn overlay(&self) -> Result<Overlay, CollectError> {
        Ok(match self.baked {
            true => overlay::empty(&self.payload.version)?,
            false => overlay::overlay(&self.payload.modules, &self.modules, &self.firmware, self.zstd)?,
        })
    }
}

/// What the desktop is told of its payload; `sizes` are those of its parts, in their order.
pub(crate) fn payload(
    session: &Session,
    found: &FoundPayload,
    sizes: [u64; 3],
    boot: Option<Vec<BootFolder>>,
) -> Result<Payload, CollectError> {
    let mut cmdline = found.cmdline.clone();
    // A guest would swap into the laptop's memory.
    let swap = session.swap && session.mode == SessionMode::Normal;
    if !swap && !cmdline.split(' ').any(|word| word == NO_SWAP) {
        cmdline = insert_word(&cmdline, NO_SWAP);
    }
    let parts = Part::ALL.into_iter().zip(sizes).map(|(part, size)| {
        Ok::<_, CollectError>(PartSize {
            part,
            size: checked(part, size)?,
        })
    });
    let payload = Payload {
        version: found.version.clone(),
        cmdline,
        parts: parts.collect::<Result<_, _>>()?,
        boot,
    };
    let bytes = payload.desktop_cmdline().len();
    if bytes > MAX_CMDLINE {
        let limit = MAX_CMDLINE;
        return Err(CollectError::LongCmdline { bytes, limit });
    }
    Ok(payload)
}

/// Files, or parts of them, that are read one after the other, each beginning at a multiple of 4.
pub(super) struct Source {
    pub(super) reader: Box<dyn Read>,
    pub(super) len: u64,
}

impl Source {
    pub(super) fn open(pieces: &[Piece]) -> Result<Self, CollectError> {
        let mut source = Self {
            reader: Box::new(io::empty()),
            len: 0,
        };
        for piece in pieces {
            let opened = open(piece).map_err(|source| CollectError::Read {
                path: piece.path.clone(),
                source,
            });
            let (file, len) = opened?;
            let gap = cpio::padding(source.len, 4);
            source.len += gap + len;
            source.reader = Box::new(source.reader.chain(io::repeat(0).take(gap)).chain(file.take(len)));
        }
        Ok(source)
    }
}

/// A file at the beginning of what is read of it, and how much that is, in bytes.
fn open(piece: &Piece) -> io::Result<(File, u64)> {
    let mut file = File::open(&piece.path)?;
    let len = file.metadata()?.len();
    let Some(section) = &piece.section else {
        return Ok((file, len));
    };
    if section.offset.checked_add(section.len).is_none_or(|end| end > len) {
        return Err(io::Error::new(
            io::ErrorKind::UnexpectedEof,
            "it is shorter than a moment ago",
        ));
    }
    file.seek(SeekFrom::Start(section.offset))?;
    Ok((file, section.len))
}

/// Writes the ramdisk and, behind it, the handover's document; returns how long both are.
pub(super) fn begin(out: &mut impl Write, mut ramdisk: Source, document: &SecretBytes) -> io::Result<u64> {
    let written = io::copy(&mut ramdisk.reader, out)?;
    let written = written + cpio::pad_to(out, written, 4)?;
    out.write_all(&document.0)?;
    Ok(written + document.0.len() as u64)
}

/// Writes the image; returns its length.
fn write(
    out: &mut impl Write,
    ramdisk: Source,
    document: &SecretBytes,
    [mut kernel, mut initrd]: [Source; 2],
    overlay: &[u8],
) -> io::Result<u64> {
    let written = begin(out, ramdisk, document)?;
    let written = written + cpio::pad_to(out, written, 4)?;
    // Its folder `stiefel` is made by the document's archive.
    let mut archive = cpio::Writer::new(out);
    archive.dir("stiefel/payload", 0o700)?;
    archive.file_from_reader(Part::Kernel.path(), 0o600, kernel.len, &mut kernel.reader)?;
    archive.file_from_reader(Part::Initrd.path(), 0o600, initrd.len, &mut initrd.reader)?;
    archive.file(Part::Overlay.path(), 0o600, overlay)?;
    let before = archive.written();
    archive.finish()?;
    // The trailer's header and name, padded.
    Ok(written + before + 124)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::path::PathBuf;
    use stiefel_shared::handover::{DiskIdentity, DiskTransport, Encryption};

    fn files(contents: &[&[u8]]) -> (tempfile::TempDir, Vec<PathBuf>) {
        let dir = tempfile::tempdir().unwrap();
        let paths = contents
            .iter()
            .enumerate()
            .map(|(index, bytes)| {
                let path = dir.path().join(index.to_string());
                std::fs::write(&path, bytes).unwrap();
                path
            })
            .collect();
        (dir, paths)
    }

    #[test]
    fn several_initrds_are_joined_at_multiples_of_four() {
        let (_dir, paths) = files(&[b"12345", b"abc", b"x"]);
        let mut pieces: Vec<Piece> = paths.into_iter().map(Piece::from).collect();
        let mut source = Source::open(&pieces).unwrap();
        let mut bytes = Vec::new();
        source.reader.read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes, b"12345\0\0\0abc\0x");
        assert_eq!(source.len, bytes.len() as u64);
        // Sections of an image, as of a file each.
        let section = |offset, len| stiefel_shared::loader::uki::Section {
            name: ".initrd".to_owned(),
            offset,
            len,
        };
        pieces.truncate(2);
        pieces[0].section = Some(section(1, 3));
        let mut source = Source::open(&pieces).unwrap();
        let mut bytes = Vec::new();
        source.reader.read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes, b"234\0abc");
        assert_eq!(source.len, 7);
        for (offset, len) in [(3, 3), (u64::MAX, 2)] {
            pieces[0].section = Some(section(offset, len));
            assert!(matches!(Source::open(&pieces), Err(CollectError::Read { .. })));
        }
    }

    #[test]
    fn the_image_is_the_ramdisk_then_the_handover_then_the_parts() {
        let (_dir, paths) = files(&[b"\x28\xb5\x2f\xfdzstd!", b"kernel", b"in", b"itrd"]);
        let pieces: Vec<Piece> = paths.into_iter().map(Piece::from).collect();
        let open = |range: std::ops::Range<usize>| Source::open(&pieces[range]).unwrap();
        let document = stiefel_shared::handover::secret_document("stiefel/handover.json", b"{}").unwrap();
        let mut out = Vec::new();
        let size = write(&mut out, open(0..1), &document, [open(1..2), open(2..4)], b"overlay").unwrap();
        assert_eq!(size, out.len() as u64);
        assert_eq!(&out[..12], b"\x28\xb5\x2f\xfdzstd!\0\0\0");
        let mut first = cpio::Reader::new(&out[12..]);
        let entries: Vec<_> = first.by_ref().map(Result::unwrap).collect();
        assert_eq!(
            (entries[1].path, entries[1].data, entries[1].permissions()),
            (&b"stiefel/handover.json"[..], &b"{}"[..], 0o600)
        );
        let second: Vec<_> = cpio::Reader::new(first.rest()).map(Result::unwrap).collect();
        let found: Vec<_> = second
            .iter()
            .map(|entry| (std::str::from_utf8(entry.path).unwrap(), entry.data))
            .collect();
        assert_eq!(
            found,
            [
                ("stiefel/payload", &b""[..]),
                (Part::Kernel.path(), b"kernel"),
                (Part::Initrd.path(), b"in\0\0itrd"),
                (Part::Overlay.path(), b"overlay"),
            ]
        );
    }

    /// Of the disk /dev/sda, with a manifest that says little.
    pub(crate) fn collected(kernel: PathBuf, ramdisk: PathBuf, payload: crate::payload::FoundPayload) -> Collected {
        let part = serde_json::json!({"bytes": 0, "sha256": ""});
        let manifest = serde_json::json!({
            "stiefel_version": "0", "kernel_version": "6.1", "kernel": part, "ramdisk": part, "unpacked_bytes": 0,
            "modules": 0, "wireguard": true, "nvme_target": true, "firmware": 0, "missing_firmware": 0, "classes": [],
        });
        Collected {
            kernel,
            ramdisk,
            manifest: serde_json::from_value(manifest).unwrap(),
            keys: Vec::new(),
            hostname: "laptop".to_owned(),
            disk: "/dev/sda".into(),
            identity: DiskIdentity::default(),
            payload,
            boot: None,
            session: stiefel_shared::config::Session::default(),
            link: stiefel_shared::config::Link {
                encryption: Encryption::None,
                ..Default::default()
            },
            transport: DiskTransport::Nbd,
            modules: vec!["default".to_owned()],
            firmware: Vec::new(),
            zstd: false,
            baked: false,
            memory: None,
        }
    }

    #[test]
    fn a_module_that_the_configuration_names_is_in_the_overlay() {
        let dir = tempfile::tempdir().unwrap();
        let put = |path: &str, bytes: &[u8]| {
            let path = dir.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, bytes).unwrap();
            path
        };
        put("modules/6.1.0-test/modules.dep", b"kernel/nbd.ko:\nextra/special.ko:\n");
        put("modules/6.1.0-test/kernel/nbd.ko", b"\x7fELF");
        put("modules/6.1.0-test/extra/special.ko", b"\x7fELF");
        let payload = crate::payload::FoundPayload {
            kernel: put("kernel", b"kernel").into(),
            initrds: vec![put("initrd", b"initrd").into()],
            cmdline: String::new(),
            version: "6.1.0-test".to_owned(),
            modules: dir.path().join("modules/6.1.0-test"),
            reason: String::new(),
            notes: Vec::new(),
        };
        let mut collected = collected(put("kernel", b"kernel"), put("ramdisk", b"ramdisk"), payload);
        assert_eq!(collected.image().unwrap().modules, 1);
        collected.session.swap = true;
        for (mode, swaps) in [(SessionMode::Normal, true), (SessionMode::Guest, false)] {
            collected.session.mode = mode;
            let handover = collected.image().unwrap().handover;
            assert_eq!(handover.session, mode);
            assert_eq!(handover.payload.cmdline.contains(NO_SWAP), !swaps);
        }
        collected.modules.push("special".to_owned());
        assert_eq!(collected.image().unwrap().modules, 2);
        collected.baked = true;
        let image = collected.image().unwrap();
        // A trailer.
        assert_eq!((image.modules, image.handover.payload.parts[2].size), (0, 124));
        collected.payload.cmdline = "x".repeat(MAX_CMDLINE);
        assert!(matches!(collected.image(), Err(CollectError::LongCmdline { .. })));
    }
}
