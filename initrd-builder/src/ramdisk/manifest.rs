//! The manifest beside a ramdisk: what was built from what, and the checksums that say the set is whole.
//!
//! Written last by `ramdisk::build`, read before a kexec and by `stiefel status`. JSON, without secrets.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{Parts, Plan, RamdiskOptions};

/// Name of the kernel in the output folder.
pub const KERNEL: &str = "kernel";
/// Name of the ramdisk in the output folder.
pub const RAMDISK: &str = "ramdisk.cpio.zst";
/// Name of the manifest in the output folder.
pub const MANIFEST: &str = "manifest";
/// The longest manifest taken, in bytes.
const MANIFEST_MAX: u64 = 64 << 10;

/// One file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// Its length.
    pub bytes: u64,
    /// Its SHA-256 in hexadecimal digits.
    pub sha256: String,
}

/// What a ramdisk was built from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of stiefel that built it.
    pub stiefel_version: String,
    /// The kernel's version, as `uname -r` prints it.
    pub kernel_version: String,
    /// The file [`KERNEL`].
    pub kernel: Part,
    /// The file [`RAMDISK`].
    pub ramdisk: Part,
    /// Length of the ramdisk before compression: the memory it takes.
    pub unpacked_bytes: u64,
    /// SHA-256 of the ramdisk before compression: whether another build would give another one.
    #[serde(default)]
    pub unpacked_sha256: String,
    /// Number of modules in it.
    pub modules: usize,
    /// Whether it can make the tunnel: WireGuard as a module, or in the kernel.
    pub wireguard: bool,
    /// Whether it can serve a disk by NVMe over TCP.
    #[serde(default)]
    pub nvme_target: bool,
    /// What it has for reading the laptop's disk by itself: `loop`, file systems, device mapper.
    #[serde(default)]
    pub reads: Vec<String>,
    /// Number of firmware files in it.
    pub firmware: usize,
    /// Number of firmware files that drivers ask for and that were not found.
    pub missing_firmware: usize,
    /// What was asked for.
    pub classes: Vec<String>,
}

/// Why a ramdisk must not be booted.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// A file is missing or cannot be read.
    #[error("cannot read {}: run stiefel build", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The manifest is none.
    #[error("{} is no manifest of a ramdisk: run stiefel build", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// A file is not the one that was built.
    #[error("{} is not the file that was built with its manifest: run stiefel build", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
    },
}

impl Manifest {
    /// Reads the manifest of the ramdisk in `dir`.
    ///
    /// # Errors
    /// `Read` or `Format`.
    pub fn load(dir: &Path) -> Result<Self, ManifestError> {
        let path = dir.join(MANIFEST);
        let mut text = Vec::new();
        let result = File::open(&path).and_then(|file| file.take(MANIFEST_MAX).read_to_end(&mut text));
        result.map_err(|source| ManifestError::Read {
            path: path.clone(),
            source,
        })?;
        serde_json::from_slice(&text).map_err(|source| ManifestError::Format { path, source })
    }

    /// Checks that kernel and ramdisk in `dir` are those of this manifest.
    ///
    /// # Errors
    /// `Read` or `Changed`.
    pub fn verify(&self, dir: &Path) -> Result<(), ManifestError> {
        for (name, part) in [(KERNEL, &self.kernel), (RAMDISK, &self.ramdisk)] {
            let path = dir.join(name);
            let hash = || -> io::Result<Option<String>> {
                if fs::metadata(&path)?.len() != part.bytes {
                    return Ok(None);
                }
                let mut hash = Sha256::new();
                io::copy(&mut File::open(&path)?, &mut HashWriter(&mut hash))?;
                Ok(Some(hex(&hash.finalize())))
            };
            let found = hash().map_err(|source| ManifestError::Read {
                path: path.clone(),
                source,
            })?;
            if found.as_ref() != Some(&part.sha256) {
                return Err(ManifestError::Changed { path });
            }
        }
        Ok(())
    }

    /// Whether the set in `dir` is whole, and just what a build of these parts would give.
    pub(super) fn is_of(&self, options: &RamdiskOptions, parts: &Parts, plan: &Plan, dir: &Path) -> bool {
        self.unpacked_sha256 == plan.sha256
            && self.stiefel_version == env!("CARGO_PKG_VERSION")
            && self.classes == options.classes
            && self.reads == parts.reads
            && self.kernel.sha256 == hex(&Sha256::digest(&parts.kernel))
            && self.verify(dir).is_ok()
    }

    /// As it is stored: indented, for people to read.
    pub(super) fn to_json(&self) -> Vec<u8> {
        // A struct of numbers and strings always has a JSON form.
        let mut json = serde_json::to_vec_pretty(self).unwrap_or_default();
        json.push(b'\n');
        json
    }
}

/// Hashes what is written into it.
pub(super) struct HashWriter<'a>(pub(super) &'a mut Sha256);

impl io::Write for HashWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Lower-case hexadecimal digits.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
