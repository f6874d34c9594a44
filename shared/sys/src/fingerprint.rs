//! Whether the files of a folder are still the same, without keeping a copy of them.
//!
//! The laptop takes the fingerprint of what it boots from when it collects, the desktop at its reboot: they differ after
//! a kernel upgrade. It goes by names and content, not by times, which a look at the files or another kernel changes.

use std::fs::{File, Metadata};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use data_encoding::HEXLOWER;
use sha2::{Digest, Sha256};

/// More files than this are no boot folder.
const MAX_FILES: usize = 20_000;
/// Folders below one another.
const MAX_DEPTH: usize = 16;
/// Up to this size, in bytes, a file is read as a whole.
const WHOLE: u64 = 1 << 20;
/// Of a larger one, so many bytes at its beginning and at its end.
const PIECE: u64 = 256 << 10;

/// A fingerprint that could not be taken.
#[derive(Debug, thiserror::Error)]
pub enum FingerprintError {
    /// Something cannot be read.
    #[error("cannot look at {path}", path = path.display())]
    Read {
        /// Which file or folder.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// It is more than is looked at.
    #[error("{path} has more than {MAX_FILES} files, or folders deeper than {MAX_DEPTH}", path = path.display())]
    TooMuch {
        /// The folder.
        path: PathBuf,
    },
}

/// The fingerprint of the regular files and symbolic links below `folder`, or of one file: 64 hexadecimal digits. Other
/// file systems that are mounted below it, and what the boot loader itself changes at each boot, do not count.
///
/// # Errors
/// [`FingerprintError`].
pub fn fingerprint(folder: &Path) -> Result<String, FingerprintError> {
    let mut walk = Walk {
        top: folder,
        files: Vec::new(),
        device: metadata(folder)?.dev(),
    };
    walk.entry(folder, 0)?;
    let mut files = walk.files;
    // A folder lists its files in any order.
    files.sort();
    let mut all = Sha256::new();
    for file in &files {
        all.update((file.name.len() as u64).to_le_bytes());
        all.update(&file.name);
        all.update([file.kind]);
        all.update(file.size.to_le_bytes());
        all.update(file.digest);
    }
    Ok(HEXLOWER.encode(&all.finalize()))
}

/// A name that comes first decides the order.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Seen {
    name: Vec<u8>,
    kind: u8,
    size: u64,
    digest: [u8; 32],
}

struct Walk<'a> {
    top: &'a Path,
    files: Vec<Seen>,
    device: u64,
}

impl Walk<'_> {
    fn entry(&mut self, path: &Path, depth: usize) -> Result<(), FingerprintError> {
        let found = metadata(path)?;
        let kind = found.file_type();
        let name = path.strip_prefix(self.top).unwrap_or(path);
        if found.dev() != self.device || is_volatile(name) {
            return Ok(());
        }
        if depth > MAX_DEPTH || self.files.len() >= MAX_FILES {
            return Err(FingerprintError::TooMuch {
                path: self.top.to_owned(),
            });
        }
        if kind.is_dir() {
            let entries = std::fs::read_dir(path).map_err(failed(path))?;
            for entry in entries {
                let entry = entry.map_err(failed(path))?;
                self.entry(&entry.path(), depth + 1)?;
            }
            return Ok(());
        }
        let (kind, digest) = if kind.is_file() {
            (b'f', contents(path, &found).map_err(failed(path))?)
        } else if kind.is_symlink() {
            let target = std::fs::read_link(path).map_err(failed(path))?;
            (b'l', Sha256::digest(target.as_os_str().as_bytes()).into())
        } else {
            return Ok(());
        };
        self.files.push(Seen {
            name: name.as_os_str().as_bytes().to_vec(),
            kind,
            size: found.len(),
            digest,
        });
        Ok(())
    }
}

/// What changes at each boot (GRUB's environment, systemd-boot's random seed), or is the boot loader's own and boots no
/// kernel of its own.
fn is_volatile(name: &Path) -> bool {
    let own = |folder: &str| name.starts_with(folder);
    let ends = |ending: &str| name.extension().is_some_and(|extension| extension == ending);
    name.file_name().is_some_and(|file| file == "grubenv")
        || name == Path::new("loader/random-seed")
        || ((own("grub") || own("grub2")) && ["mod", "img", "pf2"].into_iter().any(ends))
}

fn contents(path: &Path, found: &Metadata) -> io::Result<[u8; 32]> {
    let mut file = File::open(path)?;
    let mut digest = Sha256::new();
    let mut take = |length: u64, file: &mut File| -> io::Result<()> {
        let mut bytes = Vec::new();
        file.take(length).read_to_end(&mut bytes)?;
        digest.update(&bytes);
        Ok(())
    };
    if found.len() <= WHOLE {
        take(WHOLE, &mut file)?;
    } else {
        take(PIECE, &mut file)?;
        file.seek(SeekFrom::Start(found.len().saturating_sub(PIECE)))?;
        take(PIECE, &mut file)?;
    }
    Ok(digest.finalize().into())
}

fn metadata(path: &Path) -> Result<Metadata, FingerprintError> {
    path.symlink_metadata().map_err(failed(path))
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> FingerprintError {
    let path = path.to_owned();
    move |source| FingerprintError::Read { path, source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, SystemTime};

    struct Folder(tempfile::TempDir);

    impl Folder {
        fn new(files: &[(&str, &[u8])]) -> Self {
            let folder = Self(tempfile::tempdir().unwrap());
            for (name, bytes) in files {
                folder.put(name, bytes);
            }
            folder
        }

        fn put(&self, name: &str, bytes: &[u8]) {
            let path = self.0.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, bytes).unwrap();
        }

        fn now(&self) -> String {
            fingerprint(self.0.path()).unwrap()
        }
    }

    const FILES: [(&str, &[u8]); 3] = [("vmlinuz", b"1"), ("initrd", b"2"), ("grub/grub.cfg", b"3")];

    #[test]
    fn neither_order_nor_times_nor_place_matter() {
        let one = Folder::new(&FILES);
        let other = Folder::new(&[FILES[2], FILES[1], FILES[0]]);
        File::options()
            .write(true)
            .open(other.0.path().join("vmlinuz"))
            .unwrap()
            .set_modified(SystemTime::now() - Duration::from_hours(1))
            .unwrap();
        assert_eq!(one.now(), other.now());
        assert_eq!(one.now().len(), 64);
    }

    #[test]
    fn every_change_of_a_file_is_noticed() {
        let same = Folder::new(&FILES).now();
        let changes: [&dyn Fn(&Folder); 6] = [
            &|folder| folder.put("vmlinuz", b"x"),
            &|folder| folder.put("vmlinuz-new", b"1"),
            &|folder| folder.put("grub/grub.cfg", b"33"),
            &|folder| std::fs::remove_file(folder.0.path().join("initrd")).unwrap(),
            &|folder| std::fs::rename(folder.0.path().join("initrd"), folder.0.path().join("initrd.old")).unwrap(),
            &|folder| std::os::unix::fs::symlink("initrd", folder.0.path().join("initrd.img")).unwrap(),
        ];
        for (number, change) in changes.iter().enumerate() {
            let folder = Folder::new(&FILES);
            change(&folder);
            assert_ne!(folder.now(), same, "change {number}");
        }
    }

    #[test]
    fn the_target_of_a_link_counts_not_what_is_behind_it() {
        let folder = Folder::new(&FILES);
        let link = |target: &str| {
            let path = folder.0.path().join("link");
            let _ = std::fs::remove_file(&path);
            std::os::unix::fs::symlink(target, path).unwrap();
            folder.now()
        };
        // A folder above would never end, if it was followed.
        assert_ne!(link(".."), link("nowhere"));
        assert_eq!(link("nowhere"), link("nowhere"));
    }

    #[test]
    fn a_large_file_is_known_by_its_ends_and_its_length() {
        let mut bytes = vec![7; 2 << 20];
        let folder = Folder::new(&[("initrd", &bytes)]);
        let same = folder.now();
        let last = bytes.len() - 1;
        for at in [0, last] {
            bytes[at] = 8;
            folder.put("initrd", &bytes);
            assert_ne!(folder.now(), same, "byte {at}");
            bytes[at] = 7;
        }
        folder.put("initrd", &bytes[..last]);
        assert_ne!(folder.now(), same);
    }

    #[test]
    fn what_the_boot_loader_changes_by_itself_does_not_count() {
        let folder = Folder::new(&FILES);
        let same = folder.now();
        for name in [
            "grub/grubenv",
            "EFI/debian/grubenv",
            "loader/random-seed",
            "grub/x86_64-efi/ext2.mod",
            "grub2/i386-pc/core.img",
            "grub/fonts/unicode.pf2",
        ] {
            folder.put(name, b"x");
            assert_eq!(folder.now(), same, "{name}");
        }
        folder.put("initramfs-6.1.img", b"x");
        assert_ne!(folder.now(), same);
    }

    #[test]
    fn a_single_file_has_a_fingerprint_and_a_missing_one_an_error() {
        let folder = Folder::new(&FILES);
        let file = folder.0.path().join("vmlinuz");
        let same = fingerprint(&file).unwrap();
        folder.put("vmlinuz", b"x");
        assert_ne!(fingerprint(&file).unwrap(), same);
        assert!(fingerprint(&folder.0.path().join("none")).is_err());
    }

    #[test]
    fn folders_without_end_are_refused() {
        let folder = Folder::new(&[]);
        std::fs::create_dir_all(folder.0.path().join("a/".repeat(MAX_DEPTH + 1))).unwrap();
        assert!(matches!(
            fingerprint(folder.0.path()),
            Err(FingerprintError::TooMuch { .. })
        ));
    }
}
