//! Leaving the OS by a reboot (`trigger.method: reboot`): for machines whose kernel starts no other, or whose devices do not survive that.
//!
//! The ramdisk is put as one unified kernel image on the EFI system partition, and the firmware is told to start it the next time, and
//! only then (`BootNext`): a start that fails ends in the installed OS by itself. The image lies outside of the folders where boot loaders
//! look for entries, so that none of them shows it, or takes it for its default. What is in it: `collect::once`. Counterpart:
//! `crate::offline::once`, which takes it away again. Specification: docs/architecture.md, "Leaving by a reboot"; UEFI, 3.3 (`BootNext`).
//!
//! Refused: BIOS, Secure Boot (the image is not signed), an EFI system partition that others can read, that is on another disk, or has
//! no room; a payload that the ramdisk could not read.

mod esp;
mod leftover;
mod variables;

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use stiefel_initrd_builder::ramdisk::Manifest;
use stiefel_initrd_builder::stick::{self, DEFAULT_STUB, StickError, StickOptions};
use stiefel_shared::handover::{Place, ramdisk_cmdline};
use stiefel_shared::loader::efi;
use stiefel_sys::wipe;
use zeroize::Zeroizing;

use crate::collect::{self, Collected, PlaceError, STATE_DIR};
use crate::payload::FoundPayload;
use crate::tree::Tree;
use esp::Esp;
use leftover::Turn;
pub(crate) use leftover::look;
pub use leftover::{Left, sweep};

/// The image's folder and name on the EFI system partition.
const FOLDER: &str = "/EFI/stiefel";
const IMAGE: &str = "/EFI/stiefel/once.efi";
/// Its name while it is written.
const BESIDE: &str = "/EFI/stiefel/once.new";
/// What the firmware's entry is called.
const TITLE: &str = "stiefel (once)";
/// What stays free on the EFI system partition, in bytes.
const SPARE: u64 = 4 << 20;

/// Why the laptop cannot leave by a reboot.
#[derive(Debug, thiserror::Error)]
pub enum RebootError {
    /// Not started by EFI.
    #[error(
        "this laptop was started by BIOS, or the firmware's variables are not mounted; trigger.method: reboot needs UEFI\n  \
         next: set trigger.method to kexec; or see `findmnt /sys/firmware/efi/efivars`"
    )]
    NoEfi,
    /// The firmware would not start the image.
    #[error(
        "Secure Boot is on, and the one-time image is not signed: the firmware would not start it\n  \
         next: turn Secure Boot off; or set trigger.method to kexec with the distribution's signed kernel as initrd.kernel"
    )]
    SecureBoot,
    /// The reboot would not be one.
    #[error(
        "a reboot of this system would start another kernel by kexec, and not go through the firmware: {why}\n  next: {next}; or set \
         trigger.method to kexec"
    )]
    NotThroughFirmware {
        /// What does that.
        why: &'static str,
        /// What ends it.
        next: &'static str,
    },
    /// There is no stub.
    #[error("there is no UEFI stub {stub}\n  next: install it (Debian: systemd-boot-efi; Arch, Fedora: systemd, systemd-boot)", stub = stub.display())]
    NoStub {
        /// Where it should be.
        stub: PathBuf,
    },
    /// There is no EFI system partition.
    #[error(
        "no EFI system partition of {disk} with a GPT is mounted at /efi, /boot/efi or /boot\n  next: mount it (see /etc/fstab), or set trigger.method to kexec"
    )]
    NoEsp {
        /// The served disk.
        disk: String,
    },
    /// Others could read the keys.
    #[error(
        "all users of this laptop can read the EFI system partition at {point}, and the image for it holds keys\n  \
         next: have umask=0077 among its options in /etc/fstab, then: umount {point} && mount {point}",
        point = point.display()
    )]
    Open {
        /// Where it is mounted.
        point: PathBuf,
    },
    /// Its owner could read them.
    #[error(
        "the EFI system partition at {point} belongs to the user {owner}, who could read or replace the image for it, which holds keys\n  \
         next: take uid= out of its options in /etc/fstab, then: umount {point} && mount {point}",
        point = point.display()
    )]
    NotRoots {
        /// Where it is mounted.
        point: PathBuf,
        /// The owner's number.
        owner: u32,
    },
    /// It is too full.
    #[error(
        "the EFI system partition at {point} has {free} MiB free, and the one-time image needs {needed} MiB\n  \
         next: remove what is not needed there, or take fewer classes of `modules` in config.yaml and run `stiefel install`",
        point = point.display()
    )]
    Space {
        /// Where it is mounted.
        point: PathBuf,
        /// What is free, in MiB.
        free: u64,
        /// What is needed, in MiB.
        needed: u64,
    },
    /// The ramdisk would not find a file.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// The image cannot be put together.
    #[error("the one-time image cannot be put together")]
    Collect(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// As above: stub, kernel or ramdisk.
    #[error("the one-time image cannot be put together")]
    Image(#[from] StickError),
    /// Writing failed.
    #[error("{path} cannot be written\n  next: see whether its file system is read-only; after changing trigger.method run `stiefel install`", path = path.display())]
    Write {
        /// What.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Somebody else is at it.
    #[error(
        "another `stiefel` is leaving by a reboot, or takes away what an earlier one has left\n  next: try again in a moment"
    )]
    Busy,
    /// Somebody else has replaced it.
    #[error("{path} was replaced while it was written\n  next: find out by whom; then try again", path = path.display())]
    Replaced {
        /// What.
        path: PathBuf,
    },
    /// The firmware did not keep what was written.
    #[error("the firmware did not keep the entry for one start\n  next: set trigger.method to kexec; see `efibootmgr`")]
    NotKept,
}

/// Everything that is decided before anything is written. (Not shown by `Debug`: the program holds keys.)
pub(crate) struct Plan {
    tree: Tree,
    /// As long as this is there, nobody else arms, or takes away what this one has armed.
    turn: Turn,
    esp: Esp,
    program: Zeroizing<Vec<u8>>,
    /// Number of modules for the desktop.
    pub(crate) modules: usize,
}

/// Whether this system can be left by a reboot at all, as far as can be told without a payload.
///
/// # Errors
/// [`RebootError::NoEfi`], [`RebootError::SecureBoot`], [`RebootError::NotThroughFirmware`], [`RebootError::NoStub`].
pub(crate) fn check(tree: &Tree) -> Result<(), RebootError> {
    if !tree.is_folder(variables::FOLDER) || tree.names(variables::FOLDER).is_empty() {
        return Err(RebootError::NoEfi);
    }
    let secure = variables::read(tree, "SecureBoot").is_some_and(|bytes| efi::value(&bytes) == Some(&[1]));
    if secure {
        return Err(RebootError::SecureBoot);
    }
    through_firmware(tree)?;
    let stub = tree.path(DEFAULT_STUB);
    if !stub.is_file() {
        return Err(RebootError::NoStub { stub });
    }
    Ok(())
}

/// Whether `systemctl reboot` is a reboot: a kernel that is loaded is started by systemd (254 and later) or kexec-tools instead.
fn through_firmware(tree: &Tree) -> Result<(), RebootError> {
    if tree.line("/sys/kernel/kexec_loaded").as_deref() == Some("1") {
        return Err(RebootError::NotThroughFirmware {
            why: "one is loaded (/sys/kernel/kexec_loaded)",
            next: "kexec --unload",
        });
    }
    // Debian's kexec-tools load one while the system is shut down.
    let settings = tree.text("/etc/default/kexec").unwrap_or_default();
    let mut lines = settings.lines().map(str::trim);
    let loads = |line: &str| {
        let value = line.strip_prefix("LOAD_KEXEC=");
        value.is_some_and(|value| value.trim_matches(['"', '\'']) == "true")
    };
    let installed = ["/usr/sbin/kexec", "/sbin/kexec"].iter().any(|path| tree.is_file(path));
    if installed && lines.any(loads) {
        return Err(RebootError::NotThroughFirmware {
            why: "kexec-tools load one at each reboot (/etc/default/kexec)",
            next: "dpkg-reconfigure kexec-tools",
        });
    }
    Ok(())
}

/// Whether the ramdisk, as far as there is one, would find on `disk` (the kernel's name) what this payload is.
///
/// # Errors
/// [`RebootError::NoEsp`], [`RebootError::Place`].
pub(crate) fn reaches(tree: &Tree, disk: &str, payload: &FoundPayload) -> Result<(), RebootError> {
    let mut volumes = vec![esp::find(tree, disk)?.volume];
    for piece in payload.initrds.iter().chain([&payload.kernel]) {
        volumes.push(collect::place(tree, disk, piece)?.volume);
    }
    if let Ok(ramdisk) = Manifest::load(&tree.path(STATE_DIR)) {
        collect::readable(&ramdisk, &volumes)?;
    }
    Ok(())
}

/// What can be told before an image is put together: said before anybody is kept waiting for it.
///
/// # Errors
/// As of [`Plan::of`].
pub(crate) fn foresee(root: &Path, collected: &Collected) -> Result<(), RebootError> {
    let tree = Tree::new(root);
    check(&tree)?;
    let disk = collected.disk.file_name().unwrap_or_default().to_string_lossy();
    reaches(&tree, &disk, &collected.payload)?;
    let esp = esp::find(&tree, &disk)?;
    esp::closed(&tree, &esp)?;
    // The overlay comes to that.
    let manifest = &collected.manifest;
    check_space(
        &tree,
        &esp,
        manifest.kernel.bytes.saturating_add(manifest.ramdisk.bytes),
    )
}

impl Plan {
    /// Checks, and puts the image together in memory. Words for the ramdisk's command line are `extra`.
    ///
    /// # Errors
    /// [`RebootError`]; nothing was changed.
    pub(crate) fn of(root: &Path, collected: &Collected, extra: &str) -> Result<Self, RebootError> {
        let tree = Tree::new(root);
        check(&tree)?;
        let turn = Turn::take(&tree)?;
        let disk = collected.disk.file_name().unwrap_or_default().to_string_lossy();
        let esp = esp::find(&tree, &disk)?;
        esp::closed(&tree, &esp)?;
        let image = Place {
            volume: esp.volume.clone(),
            path: IMAGE.to_owned(),
            range: None,
        };
        let once = collect::once(&tree, collected, image).map_err(|error| RebootError::Collect(error.into()))?;
        let options = StickOptions {
            kernel: collected.kernel.clone(),
            ramdisk: collected.ramdisk.clone(),
            handover: Zeroizing::new(once.archive.0.clone()),
            cmdline: ramdisk_cmdline(extra),
            stub: Some(tree.path(DEFAULT_STUB)),
        };
        let program = stick::program(&options)?;
        let plan = Self {
            tree,
            turn,
            esp,
            program,
            modules: once.modules,
        };
        check_space(&plan.tree, &plan.esp, plan.size())?;
        Ok(plan)
    }

    /// The image's length in bytes.
    pub(crate) fn size(&self) -> u64 {
        self.program.len() as u64
    }

    /// Writes the image and tells the firmware to start it once, unless `go_on` refuses that in between: writing takes its time.
    ///
    /// # Errors
    /// [`RebootError`], or what `go_on` says; what was written is taken back.
    pub(crate) fn arm<E: From<RebootError>>(&self, go_on: impl FnOnce() -> Result<(), E>) -> Result<(), E> {
        let armed = self.write_image().map_err(E::from).and_then(|()| {
            go_on()?;
            let program = self.esp.program(IMAGE);
            let option = efi::boot_option(TITLE, &program).ok_or(RebootError::NotKept)?;
            Ok(variables::start_once(&self.tree, TITLE, &option)?)
        });
        if armed.is_err() {
            self.disarm();
        }
        armed
    }

    /// Takes back what [`Self::arm`] has done, as far as it can; what is left, the next start of the service takes away.
    pub(crate) fn disarm(&self) {
        let _ = variables::cancel(&self.tree, TITLE);
        if crate::offline::take_away(&self.tree.path(&self.esp.point), IMAGE).is_ok() {
            leftover::unmark(&self.tree);
        }
    }

    /// The shutdown has begun: nobody takes away any more what is armed, as long as this process lasts.
    pub(crate) fn keep(self) {
        std::mem::forget(self.turn);
    }

    /// Written beside, synced, renamed; the secrets are written only once nobody else can read the file.
    fn write_image(&self) -> Result<(), RebootError> {
        let folder = self.tree.path(format!("{}{FOLDER}", self.esp.point));
        let beside = self.tree.path(format!("{}{BESIDE}", self.esp.point));
        let failed = |source| RebootError::Write {
            path: beside.clone(),
            source,
        };
        leftover::mark(&self.tree, &self.esp.point)?;
        let mut closed = DirBuilder::new();
        closed.recursive(true).mode(0o700).create(&folder).map_err(failed)?;
        if beside.exists() {
            wipe::written_file(&beside).map_err(failed)?;
        }
        let mut options = OpenOptions::new();
        let mut file = options
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&beside)
            .map_err(failed)?;
        let written = self.fill(&mut file).and_then(|()| {
            let image = self.tree.path(format!("{}{IMAGE}", self.esp.point));
            let (ours, there) = (file.metadata(), beside.symlink_metadata());
            let (ours, there) = (ours.map_err(failed)?, there.map_err(failed)?);
            if (ours.dev(), ours.ino()) != (there.dev(), there.ino()) {
                return Err(RebootError::Replaced { path: beside.clone() });
            }
            // Renaming over one that is left over would leave its keys in clusters that are free.
            if image.exists() {
                wipe::written_file(&image).map_err(failed)?;
            }
            std::fs::rename(&beside, image).map_err(failed)?;
            File::open(&folder).and_then(|folder| folder.sync_all()).map_err(failed)
        });
        if written.is_err() {
            let _ = wipe::written_file(&beside);
        }
        written
    }

    fn fill(&self, file: &mut File) -> Result<(), RebootError> {
        let failed = |source| RebootError::Write {
            path: self.tree.path(format!("{}{IMAGE}", self.esp.point)),
            source,
        };
        let point = self.tree.path(&self.esp.point);
        let folder = self.tree.path(format!("{}{FOLDER}", self.esp.point));
        let (ours, above) = (file.metadata().map_err(failed)?, folder.metadata().map_err(failed)?);
        // FAT has no permissions: its mount gives all files the same.
        private(&point, ours.mode(), ours.uid())?;
        // Who may look into the folder does not matter, but who may replace what is in it.
        private(&point, above.mode() & 0o022, above.uid())?;
        file.write_all(&self.program).map_err(failed)?;
        file.sync_all().map_err(failed)
    }
}

/// Where the firmware's variables are mounted.
pub(crate) const VARIABLES: &str = variables::FOLDER;

/// In the ramdisk that was started: has the firmware not do that again. It should have removed `BootNext` itself (UEFI, 3.3), but where one
/// does not, the laptop would never come home. Whether this one did not.
///
/// # Errors
/// [`RebootError::Write`].
pub(crate) fn not_again(tree: &Tree) -> Result<bool, RebootError> {
    variables::cancel(tree, TITLE)
}

/// Whether nobody else can read what has this mode and owner, on what is mounted at `point`.
fn private(point: &Path, mode: u32, owner: u32) -> Result<(), RebootError> {
    let point = point.to_owned();
    if mode & 0o077 != 0 {
        return Err(RebootError::Open { point });
    }
    // Without being root, only a tree of one's own can be written: in tests.
    if owner != 0 && owner != rustix::process::geteuid().as_raw() {
        return Err(RebootError::NotRoots { point, owner });
    }
    Ok(())
}

/// Whether an image of `size` bytes has room.
fn check_space(tree: &Tree, esp: &Esp, size: u64) -> Result<(), RebootError> {
    let point = tree.path(&esp.point);
    let Ok(found) = rustix::fs::statvfs(&point) else {
        // Writing will tell.
        return Ok(());
    };
    let free = found.f_bavail.saturating_mul(found.f_frsize);
    room(free, size).map_or(Ok(()), |needed| {
        Err(RebootError::Space {
            point,
            free: free >> 20,
            needed,
        })
    })
}

/// How many MiB an image of `size` bytes needs, if that is more than the bytes that are free.
const fn room(free: u64, size: u64) -> Option<u64> {
    let needed = size.saturating_add(SPARE);
    if free >= needed {
        None
    } else {
        Some(needed.div_ceil(1 << 20))
    }
}

#[cfg(test)]
mod tests;
