//! The host programs a job needs, which Debian package brings each, and how to get what is missing.
//!
//! Used by `stiefel test-qemu` before it starts. Never names `qemu-utils`: with a backported version of it apt removes
//! `qemu-system-x86`, and nothing here needs it (images are raw).

use std::collections::BTreeSet;
use std::io::{self, BufRead, IsTerminal, Write};
use std::path::PathBuf;

use crate::process::{self, CommandError};

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Job {
    /// Run a virtual machine.
    Boot,
    /// Let it boot by UEFI, from a stick.
    Uefi,
    /// Put a shell into a ramdisk.
    Shell,
    /// Make the laptop's disk.
    LaptopDisk,
    /// Measure the link against others.
    LinkBench,
}

/// A program (or file) that is not there, and the package that brings it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Missing {
    /// The program's name, or a file's absolute path.
    pub program: &'static str,
    /// The Debian package.
    pub package: &'static str,
}

/// Missing programs could not be installed.
#[derive(Debug, thiserror::Error)]
pub enum ToolsError {
    /// There is no apt here.
    #[error("this system has no apt-get; install the programs {programs} by its own means, then try again")]
    NoApt {
        /// What is missing.
        programs: String,
    },
    /// Nobody is there who could be asked.
    #[error("packages are missing: {packages}; install them, or say yes with --yes")]
    NotAsked {
        /// The packages.
        packages: String,
    },
    /// The user said no.
    #[error("not installed, as you wished: {packages}")]
    Declined {
        /// The packages.
        packages: String,
    },
    /// The terminal cannot be read.
    #[error("cannot read the answer")]
    Answer {
        /// Why.
        #[source]
        source: io::Error,
    },
    /// apt failed.
    #[error("cannot install the packages {packages}")]
    Install {
        /// The packages.
        packages: String,
        /// Why.
        #[source]
        source: CommandError,
    },
}

const BOOT: &[(&str, &str)] = &[(crate::vm::QEMU, "qemu-system-x86"), ("setpriv", "util-linux")];
const UEFI: &[(&str, &str)] = &[
    (crate::vm::OVMF_CODE, "ovmf"),
    (crate::vm::OVMF_VARS, "ovmf"),
    ("/usr/lib/systemd/boot/efi/linuxx64.efi.stub", "systemd-boot-efi"),
];
/// A static one, which a ramdisk can take.
const SHELL: &[(&str, &str)] = &[("/bin/busybox", "busybox-static")];
const LAPTOP_DISK: &[(&str, &str)] = &[
    ("mmdebstrap", "mmdebstrap"),
    ("sgdisk", "gdisk"),
    ("mkfs.ext4", "e2fsprogs"),
    ("e2fsck", "e2fsprogs"),
    ("debugfs", "e2fsprogs"),
    ("mcopy", "mtools"),
    ("tar", "tar"),
];
/// What making a disk needs besides when the user is not root.
const LAPTOP_DISK_AS_USER: &[(&str, &str)] = &[("newuidmap", "uidmap"), ("fakeroot", "fakeroot")];

/// The other NBD server and client, and what tells which libraries they need.
const LINK_BENCH: &[(&str, &str)] = &[
    ("nbd-server", "nbd-server"),
    ("nbd-client", "nbd-client"),
    ("ldd", "libc-bin"),
];

/// The full path of a program, if it is installed.
pub fn find(program: &str) -> Option<PathBuf> {
    process::find(program)
}

/// What `jobs` need and this machine lacks.
pub fn missing(jobs: &[Job]) -> Vec<Missing> {
    needed(jobs, is_root())
        .into_iter()
        .filter(|(program, _)| process::find(program).is_none())
        .map(|(program, package)| Missing { program, package })
        .collect()
}

fn needed(jobs: &[Job], root: bool) -> Vec<(&'static str, &'static str)> {
    let mut all = Vec::new();
    for job in jobs {
        match job {
            Job::Boot => all.extend_from_slice(BOOT),
            Job::Uefi => all.extend_from_slice(UEFI),
            Job::Shell => all.extend_from_slice(SHELL),
            Job::LinkBench => all.extend_from_slice(LINK_BENCH),
            Job::LaptopDisk => {
                all.extend_from_slice(LAPTOP_DISK);
                if !root {
                    all.extend_from_slice(LAPTOP_DISK_AS_USER);
                }
            }
        }
    }
    all
}

pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Installs what is missing: says what, asks on the terminal unless `yes`, then runs apt-get (by sudo when not root).
///
/// # Errors
/// Without apt, without a terminal to ask on, when the user declines, or when apt fails.
pub fn install(missing: &[Missing], yes: bool) -> Result<(), ToolsError> {
    let names: BTreeSet<&str> = missing.iter().map(|missing| missing.package).collect();
    if names.is_empty() {
        return Ok(());
    }
    let packages = names.iter().copied().collect::<Vec<_>>().join(" ");
    let programs = missing
        .iter()
        .map(|missing| missing.program)
        .collect::<Vec<_>>()
        .join(", ");
    if process::find("apt-get").is_none() {
        return Err(ToolsError::NoApt { programs });
    }
    eprintln!("Not installed here: {programs}\nTo be installed by apt-get: {packages}");
    if !yes {
        ask(&packages)?;
    }
    let arguments: Vec<&str> = ["install", "-y", "--no-install-recommends"]
        .into_iter()
        .chain(names)
        .collect();
    apt_get(&["update"])
        .and_then(|()| apt_get(&arguments))
        .map_err(|source| ToolsError::Install { packages, source })
}

fn ask(packages: &str) -> Result<(), ToolsError> {
    let stdin = io::stdin();
    if !stdin.is_terminal() {
        return Err(ToolsError::NotAsked {
            packages: packages.to_owned(),
        });
    }
    eprint!("Install them now? [y/N] ");
    let mut answer = String::new();
    io::stderr()
        .flush()
        .and_then(|()| stdin.lock().read_line(&mut answer))
        .map_err(|source| ToolsError::Answer { source })?;
    match answer.trim() {
        "y" | "Y" | "yes" => Ok(()),
        _ => Err(ToolsError::Declined {
            packages: packages.to_owned(),
        }),
    }
}

fn apt_get(arguments: &[&str]) -> Result<(), CommandError> {
    let mut command = if is_root() {
        process::command("apt-get")?
    } else {
        let mut sudo = process::command("sudo")?;
        // The user's terminal is sudo's, which asks for a password there.
        sudo.arg("apt-get");
        sudo
    };
    command.env("DEBIAN_FRONTEND", "noninteractive").args(arguments);
    process::run(&mut command).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Job; 5] = [Job::Boot, Job::Uefi, Job::Shell, Job::LaptopDisk, Job::LinkBench];

    #[test]
    fn qemu_utils_is_never_asked_for() {
        assert!(needed(&ALL, false).iter().all(|(_, package)| *package != "qemu-utils"));
    }

    #[test]
    fn a_user_without_root_needs_more() {
        let packages = |root| needed(&[Job::LaptopDisk], root).len();
        assert!(packages(false) > packages(true));
    }

    #[test]
    fn nothing_missing_installs_nothing() {
        install(&[], false).unwrap();
    }
}
