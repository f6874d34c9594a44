//! The workshop: a machine that lays out disks which the host cannot, and checks them. LUKS, LVM, subvolumes and xfs need a
//! kernel that knows them and somebody who may mount; here that is the installed system's own kernel, with its own programs.
//!
//! Its root file system is a plain disk with the installed system, and `workshop.sh` its first process. What it makes is
//! kept in the cache, beside the installed system and as long.

use std::error::Error;
use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::time::Duration;

use stiefel_shared::cpio;

use super::image::{self, LaptopDisk, LaptopDiskBuilder, PASSWORD};
use super::{BaseSystem, DiskError, ExtraFile, Layout, command_error, io_error};
use crate::process;
use crate::serial::{Pattern, re};
use crate::vm::{Boot, Content, Drive, VmBuilder};

const SCRIPT: &str = include_str!("workshop.sh");
/// The laid out disks' partitions, in MiB: /boot of its own, and the rest.
const BOOT_MIB: u32 = 256;
const REST_MIB: u32 = 1900;
/// The UUID of the laid out root file system: the workshop's own has the usual one.
pub(super) const LAID_OUT_FS_UUID: &str = "57aefe1d-0000-4000-8000-000000000006";
/// The UUID of the encrypted partition.
pub(super) const LUKS_UUID: &str = "57aefe1d-0000-4000-8000-000000000005";
/// A gigabyte is copied.
const MAKE: Duration = Duration::from_secs(600);
const CHECK: Duration = Duration::from_secs(120);

/// Takes the disk with the installed system `base` from the cache, or makes it: some minutes.
pub(super) fn lay_out(base: &BaseSystem, layout: Layout) -> Result<PathBuf, DiskError> {
    let mut hasher = DefaultHasher::new();
    (SCRIPT, BOOT_MIB, REST_MIB, LAID_OUT_FS_UUID, LUKS_UUID).hash(&mut hasher);
    let name = |end: &str| {
        base.archive()
            .with_extension(format!("{}-{:016x}.{end}", layout.name(), hasher.finish()))
    };
    let image = name("img");
    let lock = name("lock");
    let lock_file = File::create(&lock).map_err(io_error("create", &lock))?;
    // Another test may be making the same one: wait for it.
    lock_file.lock().map_err(io_error("lock", &lock))?;
    if !image.exists() {
        eprintln!(
            "Laying out a laptop's disk ({}); some minutes, once a week.",
            layout.name()
        );
        let part = name("part");
        if let Err(error) = make(base, layout, &part) {
            let _ = fs::remove_file(&part);
            return Err(error);
        }
        fs::rename(&part, &image).map_err(io_error("rename", &part))?;
    }
    Ok(image)
}

fn make(base: &BaseSystem, layout: Layout, target: &Path) -> Result<(), DiskError> {
    let length = image::ROOT_OFFSET + (u64::from(BOOT_MIB + REST_MIB) << 20) + image::TABLE_AT_END;
    File::create(target)
        .and_then(|file| file.set_len(length))
        .map_err(io_error("create", target))?;
    let sizes: &[u32] = match layout {
        Layout::Btrfs | Layout::Ext4 => &[BOOT_MIB + REST_MIB],
        Layout::LuksLvm | Layout::Xfs => &[BOOT_MIB, REST_MIB],
    };
    image::make_table(target, sizes)?;
    run(base, layout, "make", target, false, MAKE)
}

/// Copies a disk, without its holes.
pub(super) fn copy(from: &Path, to: &Path) -> Result<(), DiskError> {
    const ACTION: &str = "copy the laptop's disk";
    let mut command = process::command("cp").map_err(command_error(ACTION))?;
    command.args(["--sparse=always", "--reflink=auto"]).arg(from).arg(to);
    process::run(&mut command).map(drop).map_err(command_error(ACTION))
}

/// Demands that all file systems of the disk are clean. Changes nothing.
pub(super) fn fsck_clean(base: &BaseSystem, layout: Layout, image: &Path) -> Result<(), DiskError> {
    run(base, layout, "check", image, true, CHECK)
}

/// Starts the workshop for one job.
fn run(
    base: &BaseSystem,
    layout: Layout,
    job: &str,
    target: &Path,
    snapshot: bool,
    deadline: Duration,
) -> Result<(), DiskError> {
    let failed = |source: Box<dyn Error + Send + Sync>| DiskError::Workshop {
        job: format!("{job} the layout {}", layout.name()),
        source,
    };
    let parent = target.parent().unwrap_or(Path::new("."));
    let dir = tempfile::tempdir_in(parent).map_err(io_error("create a directory in", parent))?;
    let disk = plain(base)?.build(&dir.path().join("workshop.img"))?;
    let words = [
        "init=/workshop".to_owned(),
        format!("workshop.job={job}"),
        format!("workshop.layout={}", layout.name()),
        format!("workshop.uuid={LAID_OUT_FS_UUID}"),
        format!("workshop.luks_uuid={LUKS_UUID}"),
        format!("workshop.passphrase={PASSWORD}"),
    ];
    let mut boot = disk.boot(&words.each_ref().map(String::as_str));
    if let Boot::Kernel { initrd, .. } = &mut boot {
        let nothing = nothing_encrypted().map_err(io_error("write", "the workshop's initrd"))?;
        initrd.push(Content::Bytes(nothing));
    }
    let machine = VmBuilder::new("workshop")
        .boot(boot)
        .disk(disk.drive())
        .disk(Drive {
            path: target.to_owned(),
            serial: "target".to_owned(),
            snapshot,
        })
        .start()
        .map_err(|error| failed(error.into()))?;
    let ends: [Pattern; 2] = ["workshop: done".into(), re(r"workshop: failed|Kernel panic")];
    let found = machine.serial().expect_any(&ends, deadline);
    let found = found.map_err(|error| failed(error.into()))?;
    if found.index != 0 {
        let lines = machine.serial().lines();
        let last: Vec<&str> = lines
            .iter()
            .rev()
            .take(30)
            .rev()
            .map(|(_, line)| line.as_str())
            .collect();
        return Err(failed(last.join("\n").into()));
    }
    machine
        .wait_shutdown(Duration::from_secs(30))
        .map_err(|error| failed(error.into()))
}

/// What is laid over the initrd: the workshop's own root is not encrypted, so it shall not ask for a passphrase.
fn nothing_encrypted() -> std::io::Result<Vec<u8>> {
    let mut archive = cpio::Writer::new(Vec::new());
    archive.dir("cryptroot", 0o755)?;
    archive.file("cryptroot/crypttab", 0o644, b"")?;
    archive.finish()
}

/// The installed system on an ordinary disk, with the script.
fn plain(base: &BaseSystem) -> Result<LaptopDiskBuilder, DiskError> {
    Ok(LaptopDisk::builder(base)
        .autologin(true)
        .file(ExtraFile::new(SCRIPT, "/workshop", 0o755)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_workshop_itself_asks_for_no_passphrase() {
        let archive = nothing_encrypted().unwrap();
        let table = cpio::Reader::new(&archive)
            .map(Result::unwrap)
            .find(|entry| entry.path == b"cryptroot/crypttab")
            .unwrap();
        assert!(table.data.is_empty());
    }

    #[test]
    fn the_script_knows_every_layout_that_it_is_asked_for() {
        for layout in [Layout::LuksLvm, Layout::Btrfs, Layout::Xfs] {
            let cases = SCRIPT.matches(&format!("        {}", layout.name())).count();
            assert!(cases >= 2, "{}", layout.name());
        }
    }
}
