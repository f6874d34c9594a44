//! Collects what the ramdisk is given: keys, the disk's identity, the payload, and the modules a desktop needs for it.
//!
//! Runs in the laptop's OS, where its file systems are mounted and decrypted, so the ramdisk need not know them.
//! Counterpart: `init`, which reads the handover. Specification: design.md, "The way of a boot" 2 and 4.
//! Nothing of it is written to a disk: the image is a file in memory, for the kernel alone.

mod baked;
mod boot;
mod image;
pub(crate) mod keys;
mod layers;
mod once;
mod place;
mod root;
mod search;
mod target;
mod ways;

use std::io;
use std::path::{Path, PathBuf};

use stiefel_initrd_builder::modules::ModulesError;
use stiefel_initrd_builder::overlay::OverlayError;
use stiefel_initrd_builder::ramdisk::{KERNEL, Manifest, ManifestError, RAMDISK};
use stiefel_shared::config::{Auto, Config};
use stiefel_shared::handover::{BootFolder, DiskIdentity, DiskTransport, HandoverError, Part};
use stiefel_shared::key::{KeyError, StickKey};
use stiefel_sys::block::{self, BlockError, Disk};

use crate::payload::{self, FoundPayload, PayloadError};
use crate::tree::Tree;

pub use image::Image;
pub(crate) use image::payload;
#[cfg(test)]
pub(crate) use image::tests::collected as collected_in_tests;
pub(crate) use once::once;
pub use place::PlaceError;
pub(crate) use place::{partition_of, place, readable};
pub use root::{RootStack, disks_of_root};
pub use search::{SearchError, search};
pub use target::{TargetImage, image_for_target};
pub(crate) use ways::ways;

/// Where the ramdisk lies.
pub const STATE_DIR: &str = "/var/lib/stiefel";
/// Where the keys lie.
pub const KEYS_DIR: &str = "/etc/stiefel/keys";

/// Memory that the ramdisk's kernel and programs need for themselves, in bytes.
const RESERVE: u64 = 128 << 20;

/// Why the laptop cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum CollectError {
    /// A kernel cannot make the tunnel.
    #[error(
        "{kernel} has no WireGuard, but link.encryption is wireguard\n  \
         next: have `wireguard` among `modules` and run `stiefel install`, or set link.encryption to none for a cable you trust"
    )]
    NoTunnel {
        /// Which.
        kernel: String,
    },
    /// The ramdisk cannot make the tunnel that disks are lent through.
    #[error(
        "the ramdisk has no WireGuard, through which disks are lent to the holders of a key\n  \
         next: have `wireguard` among `modules` and run `stiefel install`; or lend them to everybody, in clear, with --open"
    )]
    NoTunnelToLend,
    /// A kernel cannot do NVMe over TCP.
    #[error(
        "disk.transport is nvme-tcp, but {lacks}\n  next: set it to auto, or have `nvme` among `modules` and run `stiefel install`"
    )]
    NoNvme {
        /// Which one lacks what.
        lacks: String,
    },
    /// The modules cannot be looked at.
    #[error("the modules of the desktop's kernel cannot be read")]
    Modules(#[from] ModulesError),
    /// There is no key.
    #[error(
        "there is no key in {folder}, so nobody could connect\n  next: make one with `stiefel key new NAME`; then write a stick with it, or copy it to the machine that \
         borrows disks"
    )]
    NoKeys {
        /// The folder.
        folder: PathBuf,
    },
    /// Others could read a key.
    #[error("the key {path} can be read by others (mode {mode:04o}, owner {owner})\n  next: chown root:root {path} && chmod 0600 {path}", path = path.display())]
    KeyNotPrivate {
        /// Its file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
        /// Its owner's number.
        owner: u32,
    },
    /// A key's file holds none.
    #[error("the key {path} cannot be used", path = path.display())]
    Key {
        /// Its file.
        path: PathBuf,
        /// Why.
        #[source]
        source: KeyError,
    },
    /// A file cannot be read.
    #[error("{path} cannot be read\n  next: be root, and see whether it is there", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// There is no payload.
    #[error("what the desktop is to boot was not found")]
    Payload(#[from] PayloadError),
    /// The disk is not known.
    #[error("the disk to serve was not found")]
    Disk(#[from] BlockError),
    /// The ramdisk would not find the disk, or another one.
    #[error(
        "the ramdisk could not tell {disk} from the laptop's other disks\n  next: unplug the others; a disk needs a GUID partition table, a world-wide name or a serial number of its own"
    )]
    NotKnownAgain {
        /// Its name.
        disk: String,
        /// What the search says, if it does not find another disk.
        #[source]
        source: Option<BlockError>,
    },
    /// One disk is served, and there are more.
    #[error(
        "{what} is on several disks ({disks}); one is served, and the system would not start without the others\n  next: put the system on one disk; if one of them is enough, set boot.disk in config.yaml"
    )]
    SeveralDisks {
        /// What.
        what: String,
        /// Their names.
        disks: String,
    },
    /// What is served must be local.
    #[error(
        "{disk} is no disk of this laptop (its data comes from elsewhere)\n  next: set boot.disk in config.yaml to the disk itself"
    )]
    NoRealDisk {
        /// Its name.
        disk: String,
    },
    /// There is no ramdisk, or a half-written one.
    #[error("the ramdisk cannot be used\n  next: run `stiefel build`, then `stiefel install`")]
    Ramdisk(#[from] ManifestError),
    /// The ramdisk would drive nothing.
    #[error(
        "the list `modules` in config.yaml is empty: such a ramdisk drives no disk and no NIC\n  next: set it to [default], then run `stiefel build` and `stiefel install`"
    )]
    NoModules,
    /// The ramdisk would not fit.
    #[error(
        "the ramdisk with the payload needs {needed} MiB of memory, and {limit} MiB are there for it ({total} MiB in all)\n  next: make a smaller initrd (e.g. MODULES=dep), or a smaller ramdisk with fewer classes in `modules`"
    )]
    Memory {
        /// What it needs.
        needed: u64,
        /// What it may have.
        limit: u64,
        /// What the laptop has.
        total: u64,
    },
    /// There is no overlay.
    #[error("the modules that the desktop needs cannot be collected")]
    Overlay(#[from] OverlayError),
    /// A part is larger than a desktop takes.
    #[error(
        "the {part} has {size} bytes, more than the {limit} that a desktop takes\n  next: make a smaller initrd (e.g. MODULES=dep, or without debug symbols)"
    )]
    TooLarge {
        /// Which.
        part: &'static str,
        /// Its size in bytes.
        size: u64,
        /// The limit in bytes.
        limit: u64,
    },
    /// The desktop's kernel would not take the command line: said here, as the desktop hears it too late.
    #[error(
        "the command line for the desktop has {bytes} bytes, more than the {limit} that its kernel takes\n  next: shorten boot.load.cmdline or boot.load.append in config.yaml"
    )]
    LongCmdline {
        /// Its length with what the desktop adds.
        bytes: usize,
        /// The limit.
        limit: usize,
    },
    /// The handover cannot be written.
    #[error(transparent)]
    Handover(#[from] HandoverError),
    /// The image cannot be made.
    #[error(
        "the ramdisk with the payload ({size} bytes) cannot be put together in memory\n  next: close programs; it needs that much free memory twice"
    )]
    Image {
        /// Bytes it would have.
        size: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Everything that is checked and decided before anything large is read.
#[derive(Debug)]
pub struct Collected {
    /// The ramdisk's kernel.
    pub kernel: PathBuf,
    /// The ramdisk.
    pub ramdisk: PathBuf,
    /// What it is.
    pub manifest: Manifest,
    /// The keys of all sticks that may connect.
    pub keys: Vec<StickKey>,
    /// The laptop's name.
    pub hostname: String,
    /// The disk to serve, as it is called now.
    pub disk: PathBuf,
    /// The disk to serve, as it is known again.
    pub identity: DiskIdentity,
    /// What the desktop boots.
    pub payload: FoundPayload,
    /// Where the laptop boots from; `None` if the desktop cannot see whether it was changed.
    pub boot: Option<Vec<BootFolder>>,
    /// What happens afterwards, and what the command line says about swap space.
    pub session: stiefel_shared::config::Session,
    /// How the machines are connected.
    pub link: stiefel_shared::config::Link,
    /// How the disk is served.
    pub transport: DiskTransport,
    /// Whether the payload's initrd needs no overlay.
    baked: bool,
    /// What the configuration says of modules.
    modules: Vec<String>,
    /// Where firmware is looked for.
    firmware: Vec<PathBuf>,
    /// Whether the payload's kernel unpacks zstd.
    zstd: bool,
    /// The laptop's memory in bytes, as far as the kernel tells.
    memory: Option<u64>,
}

/// Collects from the system below `root` (`/` for the running one).
///
/// # Errors
/// [`CollectError`], which says what to do next.
pub fn collect(root: &Path, config: &Config) -> Result<Collected, CollectError> {
    if config.modules.0.is_empty() {
        return Err(CollectError::NoModules);
    }
    let tree = Tree::new(root);
    let state = tree.path(STATE_DIR);
    let manifest = Manifest::load(&state)?;
    manifest.verify(&state)?;
    let keys = read_keys(&tree.path(KEYS_DIR))?;
    let payload = payload::find(root, &config.boot.load)?;
    let transport = ways(config, manifest.wireguard, manifest.nvme_target, &payload)?;
    let disk = disk(&tree, &config.boot.disk)?;
    Ok(Collected {
        kernel: state.join(KERNEL),
        ramdisk: state.join(RAMDISK),
        manifest,
        keys,
        hostname: hostname(&tree),
        identity: identity(&tree, &disk)?,
        boot: boot::folders(&tree, &disk.name, &payload),
        disk: disk.path,
        memory: memory(&tree),
        zstd: unpacks_zstd(&tree, &payload.version),
        baked: baked::baked(&tree, &payload, &config.modules.0),
        payload,
        session: config.session.clone(),
        link: config.link.clone(),
        transport,
        modules: config.modules.0.clone(),
        firmware: firmware(&tree),
    })
}

/// Where the firmware for a desktop may be.
pub(crate) fn firmware(tree: &Tree) -> Vec<PathBuf> {
    let folders = [
        "/lib/firmware/updates",
        "/lib/firmware",
        "/usr/lib/firmware",
        "/run/current-system/firmware",
    ];
    let there = folders.iter().map(|path| tree.path(path));
    there.filter(|path| path.is_dir()).collect()
}

/// The laptop's name, for people.
pub(crate) fn hostname(tree: &Tree) -> String {
    tree.line("/proc/sys/kernel/hostname")
        .or_else(|| tree.line("/etc/hostname"))
        .unwrap_or_else(|| "laptop".to_owned())
}

/// The keys in `folder`: each must belong to root or to who asks, and be closed to all others.
///
/// # Errors
/// [`CollectError::NoKeys`], [`CollectError::KeyNotPrivate`], [`CollectError::Key`], [`CollectError::Read`].
pub fn read_keys(folder: &Path) -> Result<Vec<StickKey>, CollectError> {
    keys::read(folder, rustix::process::geteuid().as_raw())
}

/// Whether the payload's kernel says that it unpacks zstd; where it says nothing, it need not.
pub(crate) fn unpacks_zstd(tree: &Tree, version: &str) -> bool {
    [
        format!("/boot/config-{version}"),
        format!("/lib/modules/{version}/config"),
    ]
    .iter()
    .filter_map(|path| tree.text(path).ok())
    .any(|text| text.lines().any(|line| line == "CONFIG_RD_ZSTD=y"))
}

fn disk(tree: &Tree, configured: &Auto<PathBuf>) -> Result<Disk, CollectError> {
    let (path, what) = match configured {
        Auto::Given(path) => (tree.path(path), path.display().to_string()),
        Auto::Auto => {
            let stack = root::stack(tree);
            if stack.disks.len() > 1 {
                return Err(several(stack.to_string(), stack.disks.iter().map(String::as_str)));
            }
            (tree.path("/"), "/".to_owned())
        }
    };
    let disks = block::whole_disks_of(&tree.path("/sys"), &tree.path("/proc"), &path)?;
    let disk = only(disks, what)?;
    let real = block::disks(&tree.path("/sys"))?;
    if real.iter().any(|found| found.name == disk.name) {
        Ok(disk)
    } else {
        Err(CollectError::NoRealDisk { disk: disk.name })
    }
}

fn only(disks: Vec<Disk>, what: String) -> Result<Disk, CollectError> {
    match <[Disk; 1]>::try_from(disks) {
        Ok([disk]) => Ok(disk),
        Err(disks) if disks.is_empty() => Err(CollectError::NoRealDisk { disk: what }),
        Err(disks) => Err(several(what, disks.iter().map(|disk| disk.name.as_str()))),
    }
}

fn several<'a>(what: String, disks: impl Iterator<Item = &'a str>) -> CollectError {
    CollectError::SeveralDisks {
        what,
        disks: disks.collect::<Vec<_>>().join(", "),
    }
}

/// What the ramdisk knows the disk by, once it is proved that it finds this one by it and no other.
fn identity(tree: &Tree, disk: &Disk) -> Result<DiskIdentity, CollectError> {
    let wanted = block::identity(disk)?;
    // As the ramdisk looks: a disk that cannot be read is none to choose from.
    let seen: Vec<(Disk, DiskIdentity)> = block::disks(&tree.path("/sys"))?
        .into_iter()
        .filter_map(|disk| {
            let identity = block::identity(&disk).ok()?;
            Some((disk, identity))
        })
        .collect();
    known_again(disk, wanted, &seen)
}

fn known_again(disk: &Disk, wanted: DiskIdentity, seen: &[(Disk, DiskIdentity)]) -> Result<DiskIdentity, CollectError> {
    let source = match block::find(&wanted, seen) {
        Ok(found) if found.name == disk.name => return Ok(wanted),
        Ok(_) => None,
        Err(error) => Some(error),
    };
    Err(CollectError::NotKnownAgain {
        disk: disk.name.clone(),
        source,
    })
}

/// `MemTotal` of /proc/meminfo (proc_meminfo(5)), in bytes.
fn memory(tree: &Tree) -> Option<u64> {
    let text = tree.text("/proc/meminfo").ok()?;
    let total = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = total.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// Whether an initrd of `packed` bytes that becomes `unpacked` fits into `total` bytes of memory, with room to work in.
fn fits(packed: u64, unpacked: u64, total: u64) -> Result<(), CollectError> {
    // The root file system of a ramdisk is a tmpfs, which takes half of the memory at most; while it is unpacked, the kernel
    // still has the initrd as it was.
    let limits = [
        (unpacked, total / 2),
        (packed.saturating_add(unpacked), total.saturating_sub(RESERVE)),
    ];
    for (needed, limit) in limits {
        if needed > limit {
            let mib = |bytes: u64| bytes >> 20;
            return Err(CollectError::Memory {
                needed: mib(needed),
                limit: mib(limit),
                total: mib(total),
            });
        }
    }
    Ok(())
}

/// A part that a desktop takes.
fn checked(part: Part, size: u64) -> Result<u64, CollectError> {
    let limit = part.limit();
    if size <= limit {
        Ok(size)
    } else {
        Err(CollectError::TooLarge {
            part: part.name(),
            size,
            limit,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{self, tree};

    #[test]
    fn the_overlay_is_compressed_only_for_a_kernel_that_says_so() {
        let (_dir, tree) = tree(&[
            ("/boot/config-1", "CONFIG_RD_ZSTD=y\n"),
            ("/boot/config-2", "# CONFIG_RD_ZSTD is not set\n"),
        ]);
        assert!(unpacks_zstd(&tree, "1"));
        assert!(!unpacks_zstd(&tree, "2"));
        assert!(!unpacks_zstd(&tree, "3"));
    }

    #[test]
    fn a_system_on_several_disks_is_refused_by_their_names() {
        assert_eq!(only(vec![testing::disk("sda")], "/".into()).unwrap().name, "sda");
        let text = only(vec![testing::disk("sda"), testing::disk("sdb")], "/".into())
            .unwrap_err()
            .to_string();
        assert!(text.contains("sda, sdb"), "{text}");
        assert!(only(Vec::new(), "/".into()).is_err());
    }

    fn an_identity(serial: Option<&str>) -> DiskIdentity {
        DiskIdentity {
            gpt_guid: None,
            wwid: None,
            serial: serial.map(str::to_owned),
            model: None,
            size: 1 << 30,
        }
    }

    #[test]
    fn a_disk_that_the_ramdisk_could_mistake_or_miss_is_refused() {
        let seen = |disks: &[(&str, Option<&str>)]| -> Vec<_> {
            disks
                .iter()
                .map(|(name, serial)| (testing::disk(name), an_identity(*serial)))
                .collect()
        };
        let known = |serial, disks: &[_]| known_again(&testing::disk("sda"), an_identity(serial), &seen(disks));
        known(Some("1"), &[("sda", Some("1")), ("sdb", Some("2"))]).unwrap();
        for (serial, disks) in [
            (Some("1"), &[("sda", Some("1")), ("sdb", Some("1"))][..]),
            (None, &[("sda", None)]),
            (Some("1"), &[("sdb", Some("1"))]),
            (Some("1"), &[]),
        ] {
            let error = known(serial, disks).unwrap_err();
            assert!(matches!(&error, CollectError::NotKnownAgain { .. }), "{disks:?}");
            assert!(error.to_string().contains("sda"), "{error}");
        }
    }

    #[test]
    fn a_ramdisk_that_does_not_fit_is_refused_with_numbers() {
        let (_dir, tree) = tree(&[("/proc/meminfo", "MemTotal:        1048576 kB\nMemFree: 1 kB\n")]);
        let total = memory(&tree).unwrap();
        assert_eq!(total, 1 << 30);
        fits(100 << 20, 300 << 20, total).unwrap();
        let text = fits(100 << 20, 600 << 20, total).unwrap_err().to_string();
        assert!(text.contains("600 MiB") && text.contains("512 MiB"), "{text}");
        let text = fits(500 << 20, 500 << 20, total).unwrap_err().to_string();
        assert!(text.contains("1000 MiB") && text.contains("896 MiB"), "{text}");
        assert!(fits(1, 1, 0).is_err());
        assert!(fits(u64::MAX, u64::MAX, u64::MAX).is_err());
    }

    #[test]
    fn a_ramdisk_without_drivers_is_refused() {
        let config = Config::parse("modules: []\n").unwrap();
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(collect(dir.path(), &config), Err(CollectError::NoModules)));
    }

    #[test]
    fn the_example_of_the_configuration_names_every_class_of_modules() {
        let text = stiefel_shared::config::EXAMPLE;
        let (_, after) = text.split_once("Classes:").unwrap();
        let (classes, _) = after.split_once("console.").unwrap();
        let named: std::collections::BTreeSet<&str> = classes.split(|c: char| !c.is_ascii_alphanumeric()).collect();
        for class in stiefel_initrd_builder::modules::CLASSES {
            assert!(named.contains(class.name), "{}", class.name);
        }
    }

    #[test]
    fn without_a_ramdisk_the_next_step_is_to_build_one() {
        let dir = tempfile::tempdir().unwrap();
        let error = collect(dir.path(), &Config::default()).unwrap_err();
        assert!(error.to_string().contains("stiefel build"), "{error}");
    }

    #[test]
    fn parts_that_no_desktop_takes_are_refused() {
        assert_eq!(checked(Part::Kernel, 5).unwrap(), 5);
        assert!(checked(Part::Kernel, Part::Kernel.limit() + 1).is_err());
    }
}
