//! The start by the firmware that the laptop's OS has prepared: the image goes first, then the parts are read.
//!
//! Counterpart: [`crate::reboot`]. The image holds the keys of this activation: before anybody can have a session, it is
//! overwritten and taken away, the only write to the disk; if that fails, nobody is served.

use std::path::Path;

use anyhow::{Context, ensure};
use rustix::fs::sync;
use stiefel_shared::handover::{FilePart, OnceHandover, Part, Place, ServerHandover};
use stiefel_sys::block::Disk;
use stiefel_sys::console::Console;
use stiefel_sys::mount::{self, MountFlags};
use stiefel_sys::wipe;

use super::volumes::{self, FOLDER, Volumes};
use super::{Gather, part_path, settle};
use crate::reboot;
use crate::role::wait_for_disk;
use crate::tree::Tree;

/// Takes the image away, gets the parts from the disk, and gives the handover of a server.
///
/// # Errors
/// Why nobody can be served; the caller then goes back to the laptop's own OS.
pub fn once(console: &Console, handover: OnceHandover) -> anyhow::Result<ServerHandover> {
    if let Err(error) = not_again(console) {
        // The firmware has, unless it is broken; and the image goes next, so that it would find nothing.
        console.warn(&format!(
            "whether the firmware would start this again cannot be seen: {error:#}"
        ));
    }
    volumes::release()?;
    let disk = wait_for_disk(console, &handover.server.disk)?;
    remove(console, &disk, &handover.image)
        .context("the image that was started could not be taken off the disk, and it holds keys: nobody is served")?;
    let root = Path::new("/");
    for (part, files) in [(Part::Kernel, &handover.kernel), (Part::Initrd, &handover.initrd)] {
        let gathered = gather(console, &disk, root, part, files);
        let size = gathered.with_context(|| format!("the {} for the desktop cannot be had", part.name()))?;
        fits(&handover.server, part, size)?;
    }
    let overlay = part_path(root, Part::Overlay)
        .metadata()
        .context("the modules for the desktop did not come along")?;
    fits(&handover.server, Part::Overlay, overlay.len())?;
    settle(root, &handover.server)?;
    Ok(handover.server)
}

/// Before all else: a firmware that does not forget what it was told to start once would never start the laptop's own system again.
fn not_again(console: &Console) -> anyhow::Result<()> {
    let tree = Tree::new(Path::new("/"));
    let point = Path::new(reboot::VARIABLES);
    volumes::load(&["efivarfs"])?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount::mount("efivarfs", point, "efivarfs", flags, None)?;
    let kept = reboot::not_again(&tree);
    mount::unmount(point, false)?;
    if kept? {
        console.warn("this firmware does not forget what it was told to start once (BootNext); it was removed");
    }
    Ok(())
}

/// The server's handover says what the parts are, and the desktop goes by that.
fn fits(server: &ServerHandover, part: Part, size: u64) -> anyhow::Result<()> {
    let said = server.payload.parts.iter().find(|said| said.part == part);
    ensure!(
        said.is_some_and(|said| said.size == size),
        "the {} has another size than when the laptop's system was left",
        part.name()
    );
    Ok(())
}

/// Overwrites and removes the image. One that is not there was removed by an earlier try.
fn remove(console: &Console, disk: &Disk, image: &Place) -> anyhow::Result<()> {
    ensure!(image.volume.fstype == "vfat", "the EFI system partition is no FAT");
    volumes::load(&volumes::modules_of("vfat"))?;
    let device = volumes::partition(&Tree::new(Path::new("/")), &disk.name, image.volume.partition)?;
    let point = Path::new(FOLDER).join("esp");
    mount::make_dir_all(&point, 0o700)?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount::mount(&device.display().to_string(), &point, "vfat", flags, None)?;
    let removed = take_away(&point, &image.path);
    sync();
    // Also if that has failed: the disk is served to nobody, and the laptop's own system comes next.
    let unmounted = mount::unmount(&point, false);
    if removed? {
        console.info("the one-time image was taken off the EFI system partition");
    }
    Ok(unmounted?)
}

/// Whether there was an image, below the folder `point`. It is gone from there and from the medium's own list afterwards.
pub(crate) fn take_away(point: &Path, path: &str) -> anyhow::Result<bool> {
    let real = Tree::new(point).path(path);
    let Ok(meta) = real.symlink_metadata() else {
        return Ok(false);
    };
    ensure!(meta.is_file(), "{} is no file", real.display());
    wipe::written_file(&real).with_context(|| format!("{} cannot be removed", real.display()))?;
    ensure!(!real.exists(), "{} is still there", real.display());
    Ok(true)
}

/// Puts a part together; its length.
fn gather(console: &Console, disk: &Disk, root: &Path, part: Part, from: &FilePart) -> anyhow::Result<u64> {
    let mut gather = Gather::begin(root, part)?;
    for (number, place) in from.files.iter().enumerate() {
        let point = Path::new(FOLDER).join(format!("{}{number}", part.name()));
        let mut volumes = Volumes::new(console, disk)?;
        volumes.mount(&place.volume, &point)?;
        // Links are followed, but none out of that file system.
        let read = Tree::new(&point)
            .resolve(&place.path)
            .map_err(anyhow::Error::from)
            .and_then(|path| gather.add(&path, place.range));
        read.with_context(|| format!("{} on partition {}", place.path, place.volume.partition))?;
        volumes.end()?;
    }
    let (size, sha256) = gather.end();
    ensure!(
        sha256 == from.sha256,
        "its content is not what it was when the laptop's system was left (an update at the shutdown?); start again"
    );
    Ok(size)
}

#[cfg(test)]
mod tests {
    use super::super::tests::server;
    use super::*;
    use stiefel_shared::handover::PartSize;

    #[test]
    fn the_image_is_gone_afterwards_and_a_second_time_is_no_error() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("EFI/stiefel/once.efi");
        std::fs::create_dir_all(image.parent().unwrap()).unwrap();
        std::fs::write(&image, vec![7; 10_000]).unwrap();
        assert!(take_away(dir.path(), "/EFI/stiefel/once.efi").unwrap());
        assert!(!image.exists());
        assert!(!take_away(dir.path(), "/EFI/stiefel/once.efi").unwrap());
        std::fs::create_dir(&image).unwrap();
        assert!(take_away(dir.path(), "/EFI/stiefel/once.efi").is_err());
    }

    #[test]
    fn a_part_of_another_size_is_not_served() {
        let mut server = server();
        server.payload.parts.push(PartSize {
            part: Part::Kernel,
            size: 5,
        });
        assert!(fits(&server, Part::Kernel, 5).is_ok());
        assert!(fits(&server, Part::Kernel, 6).is_err());
        assert!(fits(&server, Part::Initrd, 5).is_err());
    }
}
