//! The payload: which kernel, initrd and command line the laptop's OS would boot by itself, and why.
//!
//! Used by `collect` and shown by `stiefel payload`. Order: the configuration; GRUB's default entry; the running kernel.
//! Specification: design.md, "The way of a boot" 2; facts.md, "Finding the payload".
//! Refused: a maintenance boot, a root file system that is not named or named by its place in this machine, a kernel without
//! its modules.

pub mod cmdline;
pub mod grub;
pub mod kernel;

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use serde::Serialize;
use stiefel_shared::config::Load;

use crate::tree::Tree;

/// What would be booted on the desktop, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FoundPayload {
    /// The kernel's file.
    pub kernel: PathBuf,
    /// The initrds, to be concatenated in this order.
    pub initrds: Vec<PathBuf>,
    /// The command line, cleaned.
    pub cmdline: String,
    /// The kernel's release.
    pub version: String,
    /// Its modules' folder.
    pub modules: PathBuf,
    /// Why these, in words.
    pub reason: String,
}

impl fmt::Display for FoundPayload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "kernel   {} ({})", self.kernel.display(), self.version)?;
        for initrd in &self.initrds {
            writeln!(f, "initrd   {}", initrd.display())?;
        }
        writeln!(f, "cmdline  {}", self.cmdline)?;
        writeln!(f, "modules  {}", self.modules.display())?;
        write!(f, "because  {}", self.reason)
    }
}

/// Why there is no payload.
#[derive(Debug, thiserror::Error)]
pub enum PayloadError {
    /// The command line asks for a maintenance shell.
    #[error(
        "the command line asks for a maintenance shell ({word:?}), which is no system to use on the desktop\n  \
         next: boot the system normally once, or set boot.load.cmdline in config.yaml"
    )]
    Rescue {
        /// The word that asks.
        word: String,
    },
    /// A device is named by its place in this machine.
    #[error(
        "{word} names a disk by its place in this machine, which is another disk on the desktop, and its UUID is not known\n  \
         next: find the UUID with `blkid` and set boot.load.cmdline in config.yaml with root=UUID=..."
    )]
    DeviceName {
        /// The whole word of the command line.
        word: String,
    },
    /// The root file system would be looked for on the boot loader's disk.
    #[error(
        "{word} looks for the root file system on the disk that was booted from, which is the stick on the desktop\n  \
         next: find its UUID with `findmnt -no UUID /` and set boot.load.cmdline in config.yaml with root=UUID=..."
    )]
    RootByLoader {
        /// The whole word of the command line.
        word: String,
    },
    /// Nothing names the root file system.
    #[error(
        "the command line ({cmdline:?}) has no root=, so the initrd would choose by what it finds, on the desktop perhaps another disk\n  \
         next: find the UUID with `findmnt -no UUID /` and set boot.load.append to [\"root=UUID=...\"] in config.yaml"
    )]
    NoRoot {
        /// The cleaned command line.
        cmdline: String,
    },
    /// A file that is to be booted is not there, or cannot be read.
    #[error("the {what} {path} cannot be read\n  next: correct {option} in config.yaml, or install it again")]
    File {
        /// `kernel` or `initrd`.
        what: &'static str,
        /// Where it should be.
        path: PathBuf,
        /// The option that names it.
        option: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// There is a kernel but no initrd.
    #[error(
        "no initrd belongs to the kernel {kernel}; stiefel starts inside of it\n  \
         next: make one (update-initramfs, dracut, mkinitcpio), or set boot.load.initrd in config.yaml"
    )]
    NoInitrd {
        /// The kernel.
        kernel: String,
    },
    /// Nothing says what to boot.
    #[error(
        "nothing to boot was found: {why}; and the running kernel's files are not in the usual places ({release})\n  \
         next: set boot.load.kernel and boot.load.initrd in config.yaml; after a kernel upgrade, reboot first"
    )]
    Nothing {
        /// Why the boot loader's configuration gave nothing.
        why: String,
        /// The running kernel's release, in words.
        release: String,
    },
    /// The kernel's release cannot be found out.
    #[error(
        "the release of the kernel {kernel} is not known: neither the file's header nor its name has it\n  \
         next: name it vmlinuz-RELEASE and set boot.load.kernel in config.yaml"
    )]
    NoRelease {
        /// The kernel.
        kernel: PathBuf,
    },
    /// There are no modules for it.
    #[error(
        "the kernel {kernel} has release {version}, but there are no modules of it in {folder}\n  \
         next: install its modules, or choose another kernel with boot.load.kernel in config.yaml"
    )]
    NoModules {
        /// The kernel.
        kernel: PathBuf,
        /// Its release.
        version: String,
        /// Where they should be.
        folder: PathBuf,
    },
}

/// What was found, with paths inside of the tree and the command line as it was.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Candidate {
    kernel: String,
    initrds: Vec<String>,
    cmdline: String,
    reason: String,
}

/// Finds the payload of the system below `root` (`/` for the running one).
///
/// # Errors
/// [`PayloadError`], which says what to do next.
pub fn find(root: &Path, load: &Load) -> Result<FoundPayload, PayloadError> {
    let tree = Tree::new(root);
    let mut candidate = match load.kernel.given() {
        Some(kernel) => configured(&tree, kernel),
        // Other loaders' entries (BLS, UKI) come here, before GRUB's.
        None => match from_grub(&tree) {
            Ok(candidate) => candidate,
            Err(why) => running(&tree, &why)?,
        },
    };
    let mut overridden = Vec::new();
    if let Some(initrds) = load.initrd.given() {
        candidate.initrds = initrds
            .0
            .iter()
            .map(|path| path.to_string_lossy().into_owned())
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

/// Checks the files, cleans the command line.
fn complete(tree: &Tree, candidate: Candidate, append: &[String]) -> Result<FoundPayload, PayloadError> {
    let Candidate {
        kernel,
        initrds,
        cmdline,
        reason,
    } = candidate;
    let readable = |path: &str, what, option| {
        let path = tree.path(path);
        let opened = std::fs::File::open(&path).and_then(|file| file.metadata());
        let checked = opened.and_then(|meta| match meta.is_file() && meta.len() > 0 {
            true => Ok(()),
            false => Err(io::Error::new(io::ErrorKind::InvalidData, "it is empty, or no file")),
        });
        match checked {
            Ok(()) => Ok(path),
            Err(source) => Err(PayloadError::File {
                what,
                path,
                option,
                source,
            }),
        }
    };
    let image = readable(&kernel, "kernel", "boot.load.kernel")?;
    if initrds.is_empty() {
        return Err(PayloadError::NoInitrd { kernel });
    }
    let initrds = initrds
        .iter()
        .map(|path| readable(path, "initrd", "boot.load.initrd"))
        .collect::<Result<_, _>>()?;
    let cmdline = cmdline::clean(&cmdline, append, &|device| tree.uuid_of(device))?;
    if !cmdline::names_root(&cmdline) {
        return Err(PayloadError::NoRoot { cmdline });
    }
    let version = kernel::release(&image)
        .map_err(|source| PayloadError::File {
            what: "kernel",
            path: image.clone(),
            option: "boot.load.kernel",
            source,
        })?
        .ok_or_else(|| PayloadError::NoRelease { kernel: image.clone() })?;
    let modules = modules(tree, &version).ok_or_else(|| PayloadError::NoModules {
        kernel: image.clone(),
        version: version.clone(),
        folder: tree.path(format!("/lib/modules/{version}")),
    })?;
    Ok(FoundPayload {
        kernel: image,
        initrds,
        cmdline,
        version,
        modules,
        reason,
    })
}

/// The modules' folder of a release, if it holds any.
fn modules(tree: &Tree, version: &str) -> Option<PathBuf> {
    [
        "/lib/modules",
        "/usr/lib/modules",
        // NixOS, whose kernels have no folder in common.
        "/run/booted-system/kernel-modules/lib/modules",
        "/run/current-system/kernel-modules/lib/modules",
    ]
    .iter()
    .map(|folder| tree.path(format!("{folder}/{version}")))
    .find(|folder| folder.join("modules.dep").is_file())
}

fn configured(tree: &Tree, kernel: &Path) -> Candidate {
    let kernel = kernel.to_string_lossy().into_owned();
    let release = kernel::release(&tree.path(&kernel)).ok().flatten();
    let initrds = initrd_of(tree, &kernel, release.as_deref()).into_iter().collect();
    Candidate {
        kernel,
        initrds,
        cmdline: tree.text("/proc/cmdline").unwrap_or_default(),
        reason: "boot.load.kernel in the configuration".to_owned(),
    }
}

/// GRUB's default entry.
///
/// # Errors
/// Why there is none, or why it is no payload, in words.
fn from_grub(tree: &Tree) -> Result<Candidate, String> {
    let (folder, text) = ["/boot/grub", "/boot/grub2"]
        .iter()
        .find_map(|folder| Some((folder, tree.text(format!("{folder}/grub.cfg")).ok()?)))
        .ok_or("there is no GRUB configuration that can be read")?;
    let env = grub::parse_env(&tree.text(format!("{folder}/grubenv")).unwrap_or_default());
    let menu = grub::parse(&text, &env);
    let Some(chosen) = menu.default_entry(&env) else {
        return Err(if menu.blscfg {
            format!("{folder}/grub.cfg takes its entries from loader/entries, which are not read yet")
        } else {
            format!("{folder}/grub.cfg has no entries")
        });
    };
    let title = chosen.titles.join(" > ");
    let entry = chosen.entry;
    let Some(kernel) = &entry.kernel else {
        return Err(format!("GRUB's default entry {title:?} boots no Linux"));
    };
    let places =
        Places::new(tree, entry.fs_uuid.as_deref()).map_err(|why| format!("GRUB's default entry {title:?} {why}"))?;
    let locate = |path: &String| {
        places
            .locate(path)
            .ok_or_else(|| format!("GRUB's default entry {title:?} loads {path}, which is not there"))
    };
    let kernel = locate(kernel)?;
    let mut initrds = entry.initrds.iter().map(locate).collect::<Result<Vec<_>, _>>()?;
    if initrds.is_empty() {
        // Cloud images try without one first; a memory test never has one.
        let release = kernel::release(&tree.path(&kernel)).ok().flatten();
        initrds.extend(initrd_of(tree, &kernel, release.as_deref()));
    }
    if initrds.is_empty() {
        return Err(format!(
            "GRUB's default entry {title:?} loads {kernel}, which has no initrd"
        ));
    }
    let reason = format!("{title:?} is {}", chosen.reason);
    Ok(Candidate {
        kernel,
        initrds,
        cmdline: entry.cmdline.clone(),
        reason,
    })
}

/// Where the folders of a boot loader's file system are in the tree.
struct Places<'a> {
    tree: &'a Tree,
    /// A folder of the file system, and where it is mounted.
    mounted: Vec<(String, String)>,
}

impl<'a> Places<'a> {
    /// Those of the file system with this UUID; without a UUID, or in a tree where nothing runs, the usual ones.
    fn new(tree: &'a Tree, uuid: Option<&str>) -> Result<Self, String> {
        let mounts = tree.mounts();
        let mounted = match uuid.filter(|_| !mounts.is_empty()) {
            None => ["/", "/boot"].map(|point| ("/".to_owned(), point.to_owned())).into(),
            Some(uuid) => {
                let device = tree.device_with_uuid(uuid);
                let found: Vec<_> = mounts
                    .iter()
                    .rev()
                    .filter(|mount| {
                        let source = tree
                            .block_name(&mount.source)
                            .or_else(|| tree.block_name(&mount.device));
                        device.is_some() && source == device
                    })
                    .map(|mount| (mount.root.clone(), mount.point.clone()))
                    .collect();
                if found.is_empty() {
                    return Err(format!("is on the file system {uuid}, which is not mounted"));
                }
                found
            }
        };
        Ok(Self { tree, mounted })
    }

    /// The tree's path of what the boot loader calls `path`.
    fn locate(&self, path: &str) -> Option<String> {
        // `($root)/vmlinuz`, `(hd0,gpt2)/vmlinuz`: the device is the one that was searched.
        let path = match path.strip_prefix('(') {
            Some(rest) => rest.split_once(')')?.1,
            None => path,
        };
        let inside = |root: &str| {
            let rest = path.strip_prefix(root.trim_end_matches('/'))?;
            rest.starts_with('/').then(|| rest.to_owned())
        };
        self.mounted
            .iter()
            .filter_map(|(root, point)| Some(format!("{}{}", point.trim_end_matches('/'), inside(root)?)))
            .find(|path| !path.split('/').any(|part| part == "..") && self.tree.is_file(path))
    }
}

/// The kernel that runs, by the names distributions give its files.
fn running(tree: &Tree, why: &str) -> Result<Candidate, PayloadError> {
    let nothing = |release: String| PayloadError::Nothing {
        why: why.to_owned(),
        release,
    };
    let release = tree
        .line("/proc/sys/kernel/osrelease")
        .filter(|release| kernel::is_release(release))
        .ok_or_else(|| nothing("none runs in this tree".to_owned()))?;
    let package = package_of(tree, &release).map(|package| format!("/boot/vmlinuz-{package}"));
    let usual = [
        format!("/boot/vmlinuz-{release}"),
        format!("/boot/kernel-{release}"),
        format!("/boot/vmlinux-{release}"),
    ];
    let kernel = usual
        .into_iter()
        .chain(package)
        .chain([format!("/usr/lib/modules/{release}/vmlinuz")])
        // Arch keeps one file per package: it may be newer than what runs.
        .find(|path| kernel::release(&tree.path(path)).is_ok_and(|found| found.as_ref() == Some(&release)))
        .ok_or_else(|| nothing(release.clone()))?;
    let initrds = initrd_of(tree, &kernel, Some(&release)).into_iter().collect();
    Ok(Candidate {
        kernel,
        initrds,
        cmdline: tree.text("/proc/cmdline").unwrap_or_default(),
        reason: format!("it runs now; {why}"),
    })
}

/// Arch's package of a release, e.g. `linux-lts`.
fn package_of(tree: &Tree, release: &str) -> Option<String> {
    tree.line(format!("/usr/lib/modules/{release}/pkgbase"))
        .filter(|name| kernel::is_release(name))
}

/// The initrd that belongs to a kernel by the names distributions give them.
fn initrd_of(tree: &Tree, kernel: &str, release: Option<&str>) -> Option<String> {
    let (folder, name) = kernel.rsplit_once('/')?;
    let suffix = name.split_once('-').map(|(_, suffix)| suffix);
    let package = release.and_then(|release| package_of(tree, release));
    let suffixes = [release, suffix, package.as_deref()];
    [folder, "/boot"]
        .iter()
        .flat_map(|folder| suffixes.iter().flatten().map(move |suffix| (folder, suffix)))
        .flat_map(|(folder, suffix)| {
            [
                format!("{folder}/initrd.img-{suffix}"),
                format!("{folder}/initramfs-{suffix}.img"),
                format!("{folder}/initrd-{suffix}"),
            ]
        })
        .find(|path| tree.is_file(path))
}

#[cfg(test)]
mod tests;
