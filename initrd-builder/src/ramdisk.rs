//! The ramdisk: kernel, compressed initramfs and manifest, as `stiefel build` leaves them in `/var/lib/stiefel`.
//!
//! Booted by kexec on the laptop and from the stick on the desktop; PID 1 in it is `stiefel-init`. Formats: cpio newc,
//! zstd (RFC 8878) with a window of at most 8 MiB, which is what the kernel's decompressor takes.
//! Holds no key and no secret: those come with the handover. The same input gives the same bytes.

mod manifest;
mod program;

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use stiefel_shared::handover::VOLUMES;
use stiefel_shared::kernel::release_in_header;
use tempfile::NamedTempFile;

use crate::archive::Archive;
use crate::modules::{DEBUG, ModuleSet, ModuleTree, ModulesError};
pub use manifest::{KERNEL, MANIFEST, Manifest, ManifestError, Part, RAMDISK};
pub use program::{ProgramError, interpreter};

/// Level 19 saves a tenth against 15, for three times the work.
const LEVEL: i32 = 15;
/// The kernel's decompressor takes windows up to 2^23 bytes.
const WINDOW_LOG: u32 = 23;
/// Bytes each thread works on; part of what determines the output.
const JOB_SIZE: u32 = 16 << 20;
/// The module of devices over other devices: the laptop's disk is read through one that refuses writes.
pub const LOOP: &str = "loop";
/// The module of volumes on it that are encrypted, or LVM's.
pub const DM: &str = "dm_mod";
/// The module of those that are encrypted.
pub const CRYPT: &str = "dm_crypt";
/// The largest program or extra file taken, in bytes.
const FILE_MAX: u64 = 256 << 20;
/// Character devices that PID 1 needs before it mounts devtmpfs: name, mode, major, minor.
const NODES: [(&str, u32, u32, u32); 3] = [
    ("dev/console", 0o600, 5, 1),
    ("dev/null", 0o666, 1, 3),
    ("dev/kmsg", 0o600, 1, 11),
];

/// What goes into a ramdisk.
#[derive(Debug, Clone)]
pub struct RamdiskOptions {
    /// The kernel's image (bzImage).
    pub kernel: PathBuf,
    /// Its modules, such as `/lib/modules/6.1.0-13-amd64`.
    pub modules_dir: PathBuf,
    /// Where firmware is looked for, in order.
    pub firmware_dirs: Vec<PathBuf>,
    /// Classes and names of modules: see [`crate::modules::CLASSES`].
    pub classes: Vec<String>,
    /// The static program that becomes `/init`.
    pub program: PathBuf,
    /// A static busybox; taken only with the class `debug`.
    pub busybox: Option<PathBuf>,
    /// Further files, each with its path in the ramdisk.
    pub extra_files: Vec<(PathBuf, String)>,
    /// Where the three files go; made if missing.
    pub out_dir: PathBuf,
}

/// What was built.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BuildReport {
    /// What was written to the manifest.
    pub manifest: Manifest,
    /// Path of the kernel.
    pub kernel: PathBuf,
    /// Path of the compressed ramdisk.
    pub ramdisk: PathBuf,
    /// Firmware that drivers ask for and no folder has.
    pub missing_firmware: Vec<String>,
}

/// What is being done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Reading modules; counted in modules.
    Modules,
    /// Compressing; counted in bytes of the uncompressed ramdisk.
    Compress,
}

/// Gets the stage, how much of it is done, and how much it is in all.
pub type Progress<'a> = &'a mut dyn FnMut(Stage, u64, u64);

/// Why no ramdisk was built. Nothing was changed then, but for a failure between the renames of [`RamdiskError::Write`].
#[derive(Debug, thiserror::Error)]
pub enum RamdiskError {
    /// No kernel of the running system is where distributions put it.
    #[error("cannot find the kernel {version} of the running system (looked for {})\n  next: reboot if it was just updated, install its package again, or name another one in the configuration (initrd.kernel)", looked.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", "))]
    NoDefaultKernel {
        /// `uname -r`.
        version: String,
        /// Where it was looked for.
        looked: Vec<PathBuf>,
    },
    /// A file that goes in cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Kernel or program would not run.
    #[error("{} cannot be used", path.display())]
    Program {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: ProgramError,
    },
    /// Kernel and modules do not belong together.
    #[error("the kernel {} is version {kernel}, the modules are for {modules}: give those of one version", path.display())]
    VersionMismatch {
        /// The kernel's file.
        path: PathBuf,
        /// What it says of itself.
        kernel: String,
        /// Name of the modules' folder.
        modules: String,
    },
    /// The class `debug` wants a shell.
    #[error(
        "the class debug needs a static busybox: install it (Debian: busybox-static) and name it, or leave the class out"
    )]
    NoBusybox,
    /// Modules cannot be chosen or read.
    #[error(transparent)]
    Modules(#[from] ModulesError),
    /// The output cannot be written.
    #[error("cannot write the ramdisk to {}\n  next: see whether there is space (`df`) and the file system is writable (`findmnt`); then do it again", path.display())]
    Write {
        /// The folder or file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Kernel and modules folder of the running system.
///
/// # Errors
/// `NoDefaultKernel` if one is in none of the usual places.
pub fn default_kernel() -> Result<(PathBuf, PathBuf), RamdiskError> {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    default_kernel_in(Path::new("/"), release)
}

fn default_kernel_in(root: &Path, version: String) -> Result<(PathBuf, PathBuf), RamdiskError> {
    let modules = ["lib/modules", "usr/lib/modules"].map(|dir| root.join(dir).join(&version));
    let kernels = [
        root.join(format!("boot/vmlinuz-{version}")),
        modules[0].join("vmlinuz"),
        modules[1].join("vmlinuz"),
        root.join(format!("boot/vmlinux-{version}")),
    ];
    let kernel = kernels.iter().find(|path| path.is_file());
    let dir = modules.iter().find(|path| path.join("modules.dep").is_file());
    match (kernel, dir) {
        (Some(kernel), Some(dir)) => Ok((kernel.clone(), dir.clone())),
        (Some(_), None) => {
            let looked = modules.map(|dir| dir.join("modules.dep")).to_vec();
            Err(RamdiskError::NoDefaultKernel { version, looked })
        }
        (None, _) => Err(RamdiskError::NoDefaultKernel {
            version,
            looked: kernels.to_vec(),
        }),
    }
}

/// A file for the ramdisk, in memory.
struct Extra {
    path: String,
    mode: u32,
    bytes: Vec<u8>,
}

/// Everything that goes in, read and checked.
struct Parts {
    kernel: Vec<u8>,
    program: Vec<u8>,
    busybox: Option<Vec<u8>>,
    extras: Vec<Extra>,
    modules: ModuleSet,
    /// Whether it can make the tunnel.
    wireguard: bool,
    /// Whether it can serve a disk by NVMe over TCP.
    nvme_target: bool,
    /// What it can read the laptop's disk with.
    reads: Vec<String>,
}

/// Builds kernel, ramdisk and manifest in `options.out_dir`. Neither root nor other programs are needed.
///
/// Each file is written beside, synced and renamed, the manifest last: with its checksums a set that was not replaced as a whole
/// is recognised ([`Manifest::verify`]).
///
/// # Errors
/// See [`RamdiskError`]; all input is checked before anything is written.
pub fn build(options: &RamdiskOptions, progress: Progress) -> Result<BuildReport, RamdiskError> {
    let parts = gather(options, progress)?;
    let plan = plan(options, &parts)?;
    write(options, &parts, &plan, progress).map_err(|source| unwritten(options, source))
}

/// As [`build`], but only if something else would come out of it than the set in `current`, which is looked at as a whole:
/// reading all input takes a second, compressing it many. `None`: that set is up to date, and nothing was written.
///
/// # Errors
/// As [`build`].
pub fn build_if_changed(
    options: &RamdiskOptions,
    current: &Path,
    progress: Progress,
) -> Result<Option<BuildReport>, RamdiskError> {
    let parts = gather(options, progress)?;
    let plan = plan(options, &parts)?;
    if Manifest::load(current).is_ok_and(|manifest| manifest.is_of(options, &parts, &plan, current)) {
        return Ok(None);
    }
    let written = write(options, &parts, &plan, progress);
    written.map(Some).map_err(|source| unwritten(options, source))
}

fn unwritten(options: &RamdiskOptions, source: io::Error) -> RamdiskError {
    RamdiskError::Write {
        path: options.out_dir.clone(),
        source,
    }
}

/// What the archive will be before it is compressed.
struct Plan {
    bytes: u64,
    sha256: String,
}

/// A dry run: better compression and a true progress bar by the length, a digest of all that goes in, and bad paths are found
/// before any write.
fn plan(options: &RamdiskOptions, parts: &Parts) -> Result<Plan, RamdiskError> {
    let made = || -> io::Result<Plan> {
        let mut hash = Sha256::new();
        let mut archive = Archive::new(manifest::HashWriter(&mut hash));
        fill(&mut archive, parts)?;
        let bytes = archive.written();
        archive.finish()?;
        Ok(Plan {
            bytes,
            sha256: manifest::hex(&hash.finalize()),
        })
    };
    made().map_err(|source| unwritten(options, source))
}

fn gather(options: &RamdiskOptions, progress: Progress) -> Result<Parts, RamdiskError> {
    let tree = ModuleTree::open(&options.modules_dir)?;
    let selection = tree.select(&options.classes)?;
    let debug = options.classes.iter().any(|class| class == DEBUG);
    let unusable = |path: &Path| {
        let path = path.to_owned();
        move |source| RamdiskError::Program { path, source }
    };

    let kernel = read(&options.kernel)?;
    let machine = program::kernel_machine(&kernel).map_err(unusable(&options.kernel))?;
    if let Some(version) = release_in_header(&kernel).filter(|version| version != tree.version()) {
        let modules = tree.version().to_owned();
        return Err(RamdiskError::VersionMismatch {
            path: options.kernel.clone(),
            kernel: version,
            modules,
        });
    }
    let static_program = |path: &Path| -> Result<Vec<u8>, RamdiskError> {
        let bytes = read(path)?;
        program::check_static(&bytes, machine).map_err(unusable(path))?;
        Ok(bytes)
    };
    let program = static_program(&options.program)?;
    let busybox = match (debug, &options.busybox) {
        (false, _) => None,
        (true, None) => return Err(RamdiskError::NoBusybox),
        (true, Some(path)) => Some(static_program(path)?),
    };
    let mut extras = Vec::new();
    for (source, path) in &options.extra_files {
        let bytes = read(source)?;
        let found = fs::metadata(source);
        let mode = found
            .map_err(|error| RamdiskError::Read {
                path: source.clone(),
                source: error,
            })?
            .permissions()
            .mode();
        extras.push(Extra {
            path: path.trim_start_matches('/').to_owned(),
            mode: mode & 0o755,
            bytes,
        });
    }
    let modules = tree.load(&selection, &options.firmware_dirs, &mut |done, total| {
        progress(Stage::Modules, done, total)
    })?;
    Ok(Parts {
        kernel,
        program,
        busybox,
        extras,
        wireguard: tree.has(&selection, "wireguard"),
        nvme_target: tree.has(&selection, "nvmet_tcp"),
        reads: reads(|module| tree.has(&selection, module)),
        modules,
    })
}

/// The modules by which the ramdisk reads the laptop's disk by itself, those of them that it has.
fn reads(has: impl Fn(&str) -> bool) -> Vec<String> {
    let file_systems = VOLUMES.iter().map(|(fstype, _)| *fstype);
    let wanted = [LOOP].into_iter().chain(file_systems).chain([DM, CRYPT]);
    wanted.filter(|module| has(module)).map(str::to_owned).collect()
}

fn read(path: &Path) -> Result<Vec<u8>, RamdiskError> {
    let failed = |source| RamdiskError::Read {
        path: path.to_owned(),
        source,
    };
    let len = fs::metadata(path).map_err(failed)?.len();
    if len > FILE_MAX {
        return Err(failed(io::Error::new(
            io::ErrorKind::FileTooLarge,
            format!("it has more than {FILE_MAX} bytes"),
        )));
    }
    fs::read(path).map_err(failed)
}

/// Writes the archive's entries. `each` is told how many bytes are written so far.
fn fill<W: Write>(archive: &mut Archive<W>, parts: &Parts) -> io::Result<()> {
    for (path, mode) in [
        ("dev", 0o755),
        ("proc", 0o555),
        ("sys", 0o555),
        ("run", 0o755),
        ("tmp", 0o1777),
        ("etc", 0o755),
    ] {
        archive.dir(path, mode)?;
    }
    for (path, mode, major, minor) in NODES {
        archive.node(path, mode, major, minor)?;
    }
    archive.file("init", 0o755, &parts.program)?;
    if let Some(busybox) = &parts.busybox {
        archive.file("bin/busybox", 0o755, busybox)?;
        archive.symlink("bin/sh", "busybox")?;
    }
    parts.modules.write(archive, "lib")?;
    for extra in &parts.extras {
        archive.file(&extra.path, extra.mode, &extra.bytes)?;
    }
    Ok(())
}

fn write(options: &RamdiskOptions, parts: &Parts, plan: &Plan, progress: Progress) -> io::Result<BuildReport> {
    fs::create_dir_all(&options.out_dir)?;
    let (ramdisk_file, ramdisk, unpacked) = compress(&options.out_dir, parts, plan.bytes, progress)?;
    let (kernel_file, kernel) = plain(&options.out_dir, &parts.kernel)?;
    let manifest = Manifest {
        stiefel_version: env!("CARGO_PKG_VERSION").to_owned(),
        kernel_version: parts.modules.version.clone(),
        kernel,
        ramdisk,
        unpacked_bytes: unpacked,
        unpacked_sha256: plan.sha256.clone(),
        modules: parts.modules.modules,
        wireguard: parts.wireguard,
        nvme_target: parts.nvme_target,
        reads: parts.reads.clone(),
        firmware: parts.modules.firmware.len(),
        missing_firmware: parts.modules.missing_firmware.len(),
        classes: options.classes.clone(),
    };
    let (manifest_file, _) = plain(&options.out_dir, &manifest.to_json())?;
    let place = |name| options.out_dir.join(name);
    for (file, name) in [
        (kernel_file, KERNEL),
        (ramdisk_file, RAMDISK),
        (manifest_file, MANIFEST),
    ] {
        file.persist(place(name)).map_err(|error| error.error)?;
    }
    File::open(&options.out_dir)?.sync_all()?;
    let missing_firmware = parts.modules.missing_firmware.iter().cloned().collect();
    Ok(BuildReport {
        manifest,
        kernel: place(KERNEL),
        ramdisk: place(RAMDISK),
        missing_firmware,
    })
}

/// Writes the compressed archive beside its place; returns also its uncompressed length.
fn compress(dir: &Path, parts: &Parts, total: u64, progress: Progress) -> io::Result<(NamedTempFile, Part, u64)> {
    let file = beside(dir)?;
    let mut encoder = zstd::Encoder::new(BufWriter::new(Hashing::new(file)), LEVEL)?;
    encoder.window_log(WINDOW_LOG)?;
    encoder.include_checksum(true)?;
    // One worker or many give the same bytes, so long as there is one.
    encoder
        .multithread(std::thread::available_parallelism().map_or(1, |count| u32::try_from(count.get()).unwrap_or(1)))?;
    encoder.set_parameter(zstd::zstd_safe::CParameter::JobSize(JOB_SIZE))?;
    let counting = Counting {
        out: encoder,
        done: 0,
        total,
        progress,
    };
    let mut archive = Archive::new(counting);
    fill(&mut archive, parts)?;
    let counting = archive.finish()?;
    let unpacked = counting.done;
    let hashing = counting
        .out
        .finish()?
        .into_inner()
        .map_err(io::IntoInnerError::into_error)?;
    let (file, part) = hashing.finish()?;
    Ok((file, part, unpacked))
}

/// Writes bytes beside their place.
fn plain(dir: &Path, bytes: &[u8]) -> io::Result<(NamedTempFile, Part)> {
    let mut hashing = Hashing::new(beside(dir)?);
    hashing.write_all(bytes)?;
    hashing.finish()
}

fn beside(dir: &Path) -> io::Result<NamedTempFile> {
    tempfile::Builder::new()
        .prefix(".stiefel-")
        .permissions(fs::Permissions::from_mode(0o644))
        .tempfile_in(dir)
}

/// Writes into a file and hashes what it writes.
struct Hashing {
    file: NamedTempFile,
    hash: Sha256,
    bytes: u64,
}

impl Hashing {
    fn new(file: NamedTempFile) -> Self {
        Self {
            file,
            hash: Sha256::new(),
            bytes: 0,
        }
    }

    fn finish(self) -> io::Result<(NamedTempFile, Part)> {
        self.file.as_file().sync_all()?;
        Ok((
            self.file,
            Part {
                bytes: self.bytes,
                sha256: manifest::hex(&self.hash.finalize()),
            },
        ))
    }
}

impl Write for Hashing {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.file.write(bytes)?;
        self.hash.update(&bytes[..written]);
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// Tells how far the archive is.
struct Counting<'a, W> {
    out: W,
    done: u64,
    total: u64,
    progress: Progress<'a>,
}

impl<W: Write> Write for Counting<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.out.write(bytes)?;
        self.done += written as u64;
        (self.progress)(Stage::Compress, self.done, self.total.max(self.done));
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

#[cfg(test)]
mod tests;
