//! The start from a stick of the laptop's own (`stiefel stick --laptop`): what the laptop would boot by itself is looked for on its disk.
//!
//! The file systems are those that made up the system when the stick was written. What is looked for, and how, is the same as in the
//! running system ([`crate::payload`]); there is only no firmware to ask what has booted, and no udev to ask for UUIDs.

use std::path::{Path, PathBuf};

use anyhow::Context;
use stiefel_initrd_builder::overlay;
use stiefel_shared::config::Config;
use stiefel_shared::handover::{Part, SearchHandover, ServerHandover};
use stiefel_sys::block::Disk;
use stiefel_sys::console::Console;

use super::volumes::Volumes;
use super::{Gather, settle};
use crate::collect;
use crate::payload::{self, Piece};
use crate::role::wait_for_disk;
use crate::tree::Tree;

/// Where the laptop's system is put together.
const FOLDER: &str = "/run/stiefel/disk/root";

/// Looks for the payload, gets its parts, and gives the handover of a server.
///
/// # Errors
/// Why nobody can be served.
pub fn search(console: &Console, handover: SearchHandover) -> anyhow::Result<ServerHandover> {
    let config =
        Config::parse(&handover.config).context("the configuration on this stick cannot be used; write it anew")?;
    let disk = wait_for_disk(console, &handover.disk)?;
    let root = Path::new("/");
    let server = {
        let mut volumes = Volumes::new(console, &disk)?;
        assemble(&mut volumes, &handover, &disk)?;
        found(console, &config, handover, Path::new(FOLDER), root)?
    };
    settle(root, &server)?;
    Ok(server)
}

/// Mounts all of the system below [`FOLDER`].
fn assemble(volumes: &mut Volumes<'_>, handover: &SearchHandover, disk: &Disk) -> anyhow::Result<()> {
    for (point, volume) in &handover.mounts {
        let place = below(Path::new(FOLDER), point)?;
        volumes.mount(volume, &place).with_context(|| {
            format!(
                "{point} of the laptop's system (partition {} of {}) cannot be read; if the disk was partitioned anew, write this stick anew",
                volume.partition,
                disk.path.display()
            )
        })?;
    }
    Ok(())
}

/// A mount point, inside of the tree whatever links are there.
fn below(folder: &Path, point: &str) -> anyhow::Result<PathBuf> {
    if point == "/" {
        return Ok(folder.to_owned());
    }
    let tree = Tree::new(folder);
    tree.resolve(point)
        .with_context(|| format!("{point} is not in the laptop's system"))
}

/// Finds the payload in the tree at `system`, and puts its parts below `root`.
fn found(
    console: &Console,
    config: &Config,
    handover: SearchHandover,
    system: &Path,
    root: &Path,
) -> anyhow::Result<ServerHandover> {
    let found = payload::find(system, &config.boot.load)?;
    console.info(&format!("what the desktop boots:\n{found}"));
    let transport = collect::ways(config, handover.wireguard, handover.nvme_target, &found)?;
    let tree = Tree::new(system);
    let zstd = collect::unpacks_zstd(&tree, &found.version);
    let overlay = overlay::overlay(&found.modules, &config.modules.0, &collect::firmware(&tree), zstd)?;
    let mut gather = Gather::begin(root, Part::Overlay)?;
    gather.write(&overlay.bytes)?;
    let (overlay, _) = gather.end();
    let kernel = gathered(root, Part::Kernel, std::slice::from_ref(&found.kernel))?;
    let initrd = gathered(root, Part::Initrd, &found.initrds)?;
    Ok(ServerHandover {
        // What changes on the desktop cannot be seen from here: each of its reboots reads the disk anew.
        payload: collect::payload(&config.session, &found, [kernel, initrd, overlay], None)?,
        keys: handover.keys,
        hostname: handover.hostname,
        disk: handover.disk,
        after: config.session.after,
        encryption: config.link.encryption,
        mode: config.link.mode,
        transport,
        session: config.session.mode,
        grace: config.session.grace.0.as_secs(),
        tickets: Vec::new(),
    })
}

fn gathered(root: &Path, part: Part, pieces: &[Piece]) -> anyhow::Result<u64> {
    let mut gather = Gather::begin(root, part)?;
    for piece in pieces {
        let range = piece.section.as_ref().map(|section| (section.offset, section.len));
        gather
            .add(&piece.path, range)
            .with_context(|| format!("cannot read {piece}"))?;
    }
    Ok(gather.end().0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use stiefel_shared::cpio;
    use stiefel_shared::handover::{DiskIdentity, DiskTransport};
    use stiefel_shared::key::StickKey;

    /// A laptop's system, as it lies on its disk: nothing of it runs.
    fn system(config: &str) -> (tempfile::TempDir, SearchHandover) {
        let dir = tempfile::tempdir().unwrap();
        let put = |path: &str, bytes: &[u8]| {
            let path = dir.path().join("system").join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, bytes).unwrap();
        };
        let mut kernel = vec![0; 0x3000];
        kernel[0x202..0x206].copy_from_slice(b"HdrS");
        kernel[0x20e..0x210].copy_from_slice(&0x2000_u16.to_le_bytes());
        kernel[0x2200..0x2211].copy_from_slice(b"6.1.0-9 (x) #1 SM");
        put("boot/vmlinuz-6.1.0-9", &kernel);
        put("boot/initrd.img-6.1.0-9", b"initrd");
        put("boot/early.img", b"early");
        let entry = "menuentry 'Debian' {\n linux /boot/vmlinuz-6.1.0-9 root=UUID=1-2 ro quiet\n \
                     initrd /boot/early.img /boot/initrd.img-6.1.0-9\n}\n";
        put("boot/grub/grub.cfg", entry.as_bytes());
        put("lib/modules/6.1.0-9/modules.dep", b"");
        let builtin = b"kernel/drivers/block/nbd.ko\nkernel/drivers/net/wireguard/wireguard.ko\n";
        put("lib/modules/6.1.0-9/modules.builtin", builtin);
        let handover = SearchHandover {
            keys: vec![StickKey::generate("stick").unwrap()],
            hostname: "laptop".into(),
            disk: DiskIdentity::default(),
            mounts: Vec::new(),
            config: config.into(),
            wireguard: true,
            nvme_target: true,
        };
        (dir, handover)
    }

    fn look(config: &str) -> (tempfile::TempDir, anyhow::Result<ServerHandover>) {
        let (dir, handover) = system(config);
        let console = Console::open(Path::new("/none"), Path::new("/none"));
        let config = Config::parse(config).unwrap();
        let system = dir.path().join("system");
        let found = found(&console, &config, handover, &system, &dir.path().join("ramdisk"));
        (dir, found)
    }

    #[test]
    fn the_boot_loaders_entry_becomes_the_parts_of_a_server() {
        let (dir, server) = look("session: {grace: 60s}\n");
        let server = server.unwrap();
        let read = |part: Part| std::fs::read(super::super::part_path(&dir.path().join("ramdisk"), part)).unwrap();
        assert_eq!(read(Part::Initrd), b"early\0\0\0initrd");
        assert_eq!(read(Part::Kernel).len(), 0x3000);
        assert!(cpio::Reader::new(&read(Part::Overlay)).all(|entry| entry.is_ok()));
        for said in &server.payload.parts {
            assert_eq!(said.size, read(said.part).len() as u64);
        }
        assert_eq!(server.payload.parts.len(), Part::ALL.len());
        assert_eq!(server.payload.version, "6.1.0-9");
        assert_eq!(server.payload.cmdline, "root=UUID=1-2 ro quiet systemd.swap=0");
        assert_eq!(server.payload.boot, None, "what changes cannot be seen from here");
        // This kernel has no nvme-tcp.
        assert_eq!((server.transport, server.grace), (DiskTransport::Nbd, 60));
    }

    #[test]
    fn what_is_not_there_is_refused_as_in_the_running_system() {
        let refused = |config: &str| format!("{:#}", look(config).1.unwrap_err());
        let text = refused("disk: {transport: nvme-tcp}\n");
        assert!(text.contains("no nvme-tcp"), "{text}");
        let text = refused("boot: {load: {initrd: /boot/none}}\n");
        assert!(text.contains("/boot/none"), "{text}");
    }

    #[test]
    fn mount_points_lie_in_the_tree_and_what_is_not_there_is_said() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("usr/boot")).unwrap();
        std::os::unix::fs::symlink("/usr/boot", dir.path().join("boot")).unwrap();
        std::os::unix::fs::symlink("../../../../etc", dir.path().join("efi")).unwrap();
        assert_eq!(below(dir.path(), "/").unwrap(), dir.path());
        assert_eq!(below(dir.path(), "/boot").unwrap(), dir.path().join("usr/boot"));
        assert!(below(dir.path(), "/efi").is_err());
    }
}
