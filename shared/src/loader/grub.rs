//! GRUB's menu: which entry GRUB would boot by itself, and what that entry loads.
//!
//! Used by the laptop's server. Specification: GRUB manual, "Writing full configuration files directly" (the shell-like
//! language), "default", "menuentry", "linux", "initrd", "search", "load_env", the environment block; for `blscfg` the Boot
//! Loader Specification. The script is run as GRUB runs it, with conditions, functions and included files; what only shows
//! something or loads a driver does nothing here and succeeds. A script that goes on for too long is stopped.

mod condition;
mod run;
mod script;
mod words;

use std::collections::BTreeMap;

pub use run::default_entry;

/// Variables of GRUB: from the environment block, and what the configuration sets.
pub type Variables = BTreeMap<String, String>;

/// Begins the name of a device that was searched for by a file system's UUID.
pub const BY_UUID: &str = "uuid/";
/// Begins the name of a device that was searched for by a file system's label.
pub const BY_LABEL: &str = "label/";
/// The device that stands for GRUB's own folder, where grub.cfg and grubenv are.
pub const OWN: &str = "prefix";

/// A file as GRUB names it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Location {
    /// [`BY_UUID`] or [`BY_LABEL`] with what was searched for, [`OWN`], or GRUB's own name (`hd0,gpt2`), or nothing.
    pub device: String,
    /// The path on that device; begins with `/`.
    pub path: String,
}

impl Location {
    /// Reads `(device)/path`, or a path on the device `root`. `None` for what is neither.
    #[must_use]
    pub fn parse(text: &str, root: &str) -> Option<Self> {
        let (device, path) = match text.strip_prefix('(') {
            Some(rest) => rest.split_once(')')?,
            None => (root, text),
        };
        path.starts_with('/').then(|| Self {
            device: device.to_owned(),
            path: path.to_owned(),
        })
    }
}

/// What a path names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A file that holds something.
    File,
    /// An empty file.
    Empty,
    /// A folder.
    Folder,
}

/// The machine that a configuration is for.
pub trait Files {
    /// What is there.
    fn kind(&self, place: &Location) -> Option<Kind>;
    /// A text file; bounded by who reads it.
    fn text(&self, place: &Location) -> Option<String>;
    /// The names in a folder.
    fn names(&self, place: &Location) -> Vec<String>;
    /// Whether GRUB runs as an EFI program (`grub_platform`).
    fn efi(&self) -> bool;
}

/// What an entry loads.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Entry {
    /// The kernel; none for a chain loader and the like.
    pub kernel: Option<Location>,
    /// The kernel's arguments.
    pub cmdline: String,
    /// The initrds, in order.
    pub initrds: Vec<Location>,
    /// What it starts instead of a kernel.
    pub other: Option<Other>,
}

/// What an entry starts instead of Linux itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Other {
    /// Another EFI program or boot sector: a boot loader, or a unified kernel image.
    Program(Location),
    /// By this command of GRUB's, such as `multiboot2` (a hypervisor) or `fwsetup`.
    Command(String),
}

/// The entry that is booted, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chosen {
    /// The titles on the way to it.
    pub titles: Vec<String>,
    /// What it loads.
    pub entry: Entry,
    /// What named it, e.g. `the default entry of grub.cfg`.
    pub reason: String,
}

/// Reads an environment block (grubenv): `name=value` lines, padded with `#`.
#[must_use]
pub fn parse_env(text: &str) -> Variables {
    text.lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.split_once('='))
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect()
}

#[cfg(test)]
mod tests;
