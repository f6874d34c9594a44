//! The payload: which kernel, initrd and command line the laptop's OS would boot by itself, and why.
//!
//! Used by `collect` and shown by `stiefel payload`. Order: the configuration; the default entry of the boot loader that
//! started this system (a kernel started by the firmware, systemd-boot, GRUB); the running kernel. The parsers are
//! `stiefel_shared::loader`'s; here files are looked for, all inside of the tree.
//! Specification: design.md, "The way of a boot" 2; facts.md, "Finding the payload".
//! Refused: a maintenance boot, a live system, a root file system that is not named or named by its place in this machine, a
//! kernel that kexec does not start, or without its modules.

mod booted;
mod error;
mod files;
mod firmware;
mod grub;
pub mod kernel;
mod places;
mod root;
mod running;
mod sdboot;
mod uki;

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use serde::Serialize;
use stiefel_shared::config::Load;
use stiefel_shared::kernel::{Arch, Format, is_release};
use stiefel_shared::loader::cmdline;
use stiefel_shared::loader::uki::Section;

use crate::guards;
use crate::tree::Tree;
use booted::{Booted, Loader};

pub use error::PayloadError;

/// What would be booted on the desktop, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FoundPayload {
    /// The kernel.
    pub kernel: Piece,
    /// The initrds, to be concatenated in this order.
    pub initrds: Vec<Piece>,
    /// The command line, cleaned.
    pub cmdline: String,
    /// The kernel's release.
    pub version: String,
    /// Its modules' folder.
    pub modules: PathBuf,
    /// Why these, in words.
    pub reason: String,
    /// What else there is to know: what was left out or written in another way.
    pub notes: Vec<String>,
}

/// A file, or a section of one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Piece {
    /// The file.
    pub path: PathBuf,
    /// Which part of it, inside of a unified kernel image.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub section: Option<Section>,
}

impl From<PathBuf> for Piece {
    fn from(path: PathBuf) -> Self {
        Self { path, section: None }
    }
}

impl fmt::Display for Piece {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.section {
            None => write!(f, "{}", self.path.display()),
            Some(section) => write!(f, "{} section {}", self.path.display(), section.name),
        }
    }
}

impl fmt::Display for FoundPayload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "kernel   {} ({})", self.kernel, self.version)?;
        for initrd in &self.initrds {
            writeln!(f, "initrd   {initrd}")?;
        }
        writeln!(f, "cmdline  {}", self.cmdline)?;
        writeln!(f, "modules  {}", self.modules.display())?;
        write!(f, "because  {}", self.reason)?;
        for note in &self.notes {
            write!(f, "\nnote     {note}")?;
        }
        Ok(())
    }
}

/// What was found, with paths inside of the tree and the command line as it was.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Candidate {
    kernel: Source,
    initrds: Vec<Source>,
    cmdline: String,
    /// As a unified kernel image says it.
    release: Option<String>,
    reason: String,
    notes: Vec<String>,
}

/// A file of the tree, or a section of one.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Source {
    path: String,
    section: Option<Section>,
}

impl From<String> for Source {
    fn from(path: String) -> Self {
        Self { path, section: None }
    }
}

/// Finds the payload of the system below `root` (`/` for the running one).
///
/// # Errors
/// [`PayloadError`], which says what to do next.
pub fn find(root: &Path, load: &Load) -> Result<FoundPayload, PayloadError> {
    let tree = Tree::new(root);
    let mut candidate = match load.kernel.given() {
        Some(kernel) => configured(&tree, kernel),
        None => would_boot(&tree, guards::on_a_link(root).is_some())?,
    };
    let mut overridden = Vec::new();
    if let Some(initrds) = load.initrd.given() {
        candidate.initrds = initrds
            .0
            .iter()
            .map(|path| path.to_string_lossy().into_owned().into())
            .collect();
        overridden.push("boot.load.initrd");
    }
    if let Some(words) = load.cmdline.given() {
        candidate.cmdline = words.to_string();
        overridden.push("boot.load.cmdline");
    }
    if !overridden.is_empty() {
        candidate.reason += &format!("; {} from the configuration", overridden.join(" and "));
    }
    complete(&tree, candidate, &load.append.0)
}

/// What the boot loader would start, else what runs. `elsewhere`: this system runs on a desktop, from the laptop's disk.
fn would_boot(tree: &Tree, elsewhere: bool) -> Result<Candidate, PayloadError> {
    let booted = match elsewhere {
        true => Booted::elsewhere(tree),
        false => Booted::read(tree),
    };
    let mut candidate = by_loader(tree, &booted).or_else(|why| running::find(tree, &why))?;
    if elsewhere {
        candidate.notes.push(booted::ELSEWHERE.to_owned());
    }
    Ok(candidate)
}

/// The default entry of the boot loader that started this system; where nothing says which did, of one that is there.
///
/// # Errors
/// Why there is none, in words.
fn by_loader(tree: &Tree, booted: &Booted) -> Result<Candidate, String> {
    match booted.loader() {
        Loader::SystemdBoot => sdboot::find(tree, booted),
        Loader::Grub => grub::find(tree, booted),
        Loader::Firmware(option) => firmware::find(tree, booted, option),
        Loader::Other(name) => Err(format!("the boot loader {name} is not known to stiefel")),
        Loader::Unknown => grub::find(tree, booted)
            .or_else(|why| sdboot::find(tree, booted).map_err(|other| format!("{why}; {other}"))),
    }
}

fn configured(tree: &Tree, kernel: &Path) -> Candidate {
    let kernel = kernel.to_string_lossy().into_owned();
    let reason = "boot.load.kernel in the configuration".to_owned();
    if let Some(image) = uki::read(tree, &kernel) {
        return Candidate {
            reason,
            ..image.candidate
        };
    }
    let release = files::release(tree, &kernel);
    Candidate {
        initrds: files::initrd_of(tree, &kernel, release.as_deref())
            .into_iter()
            .map(Source::from)
            .collect(),
        kernel: kernel.into(),
        cmdline: tree.text("/proc/cmdline").unwrap_or_default(),
        reason,
        ..Candidate::default()
    }
}

/// Checks the files, cleans the command line.
fn complete(tree: &Tree, candidate: Candidate, append: &[String]) -> Result<FoundPayload, PayloadError> {
    let kernel = piece(tree, &candidate.kernel, "kernel", "boot.load.kernel")?;
    let unreadable = |source| PayloadError::File {
        what: "kernel",
        path: kernel.path.clone(),
        option: "boot.load.kernel",
        source,
    };
    let head = kernel::head(&kernel).map_err(unreadable)?;
    check_format(&kernel, Format::of(&head), Arch::OURS)?;
    if candidate.initrds.is_empty() {
        return Err(PayloadError::NoInitrd {
            kernel: candidate.kernel.path,
        });
    }
    let initrds = candidate
        .initrds
        .iter()
        .map(|source| piece(tree, source, "initrd", "boot.load.initrd"))
        .collect::<Result<_, _>>()?;
    let mut notes = candidate.notes;
    let (text, append) = root::name(tree, &candidate.cmdline, append, &mut notes);
    let cmdline = cmdline::clean(&text, &append, &|device| tree.uuid_of(device))?;
    if !cmdline::names_root(&cmdline) {
        return Err(PayloadError::NoRoot { cmdline });
    }
    let said = candidate.release.filter(|release| is_release(release));
    let version = said
        .or_else(|| kernel::release_of(&head, &kernel))
        .ok_or_else(|| PayloadError::NoRelease {
            kernel: kernel.path.clone(),
        })?;
    let modules = modules(tree, &version, &cmdline).ok_or_else(|| PayloadError::NoModules {
        kernel: kernel.path.clone(),
        version: version.clone(),
        folder: tree.path(format!("/lib/modules/{version}")),
    })?;
    Ok(FoundPayload {
        kernel,
        initrds,
        cmdline,
        version,
        modules,
        reason: candidate.reason,
        notes,
    })
}

/// A file that can be read and holds something, where it really lies.
fn piece(tree: &Tree, source: &Source, what: &'static str, option: &'static str) -> Result<Piece, PayloadError> {
    let checked = tree.resolve(&source.path).and_then(|path| {
        // Looked at before it is opened: that of a pipe would wait for ever.
        let meta = path.metadata()?;
        if !meta.is_file() || meta.len() == 0 {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "it is empty, or no file"));
        }
        std::fs::File::open(&path)?;
        Ok(path)
    });
    match checked {
        Ok(path) => Ok(Piece {
            path,
            section: source.section.clone(),
        }),
        Err(source_error) => Err(PayloadError::File {
            what,
            path: tree.path(&source.path),
            option,
            source: source_error,
        }),
    }
}

/// kexec_file_load takes one kind of image on each kind of machine; the desktop is of the laptop's kind.
fn check_format(kernel: &Piece, format: Format, arch: Arch) -> Result<(), PayloadError> {
    if arch.starts(format) {
        return Ok(());
    }
    Err(PayloadError::Format {
        kernel: kernel.path.clone(),
        what: format.name(),
        wanted: arch.wanted(),
    })
}

/// The modules' folder of a release, if it holds any. NixOS has them beside the system's first program.
fn modules(tree: &Tree, version: &str, cmdline: &str) -> Option<PathBuf> {
    let beside_init = cmdline::value(cmdline, "init")
        .and_then(|init| Some(format!("{}/kernel-modules/lib/modules", init.rsplit_once('/')?.0)));
    ["/lib/modules", "/usr/lib/modules"]
        .into_iter()
        .map(str::to_owned)
        .chain(beside_init)
        .map(|folder| format!("{folder}/{version}"))
        .find(|folder| tree.is_file(format!("{folder}/modules.dep")))
        .map(|folder| tree.resolve(&folder).unwrap_or_else(|_| tree.path(&folder)))
}

#[cfg(test)]
mod tests;
