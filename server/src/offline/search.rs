//! The start from a stick of the laptop's own (`stiefel stick --laptop`): what the laptop would boot by itself is looked for on its disk.
//!
//! The file systems are those that made up the system when the stick was written. What is looked for, and how, is the same as in the
//! running system ([`crate::payload`]); there is only no firmware to ask what has booted, and no udev to ask for UUIDs. Keys and
//! configuration are those on the disk now: what was revoked or changed since the stick was written counts. Where the disk is locked, a
//! desktop is asked for its passphrase first, under keys that are good for nothing else; after that they do not count any more.

use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use stiefel_initrd_builder::overlay;
use stiefel_initrd_builder::tools::UNLOCK;
use stiefel_shared::config::{CONFIG_PATH, Config, MAX_CONFIG};
use stiefel_shared::handover::{After, Part, SearchHandover, ServerHandover};
use stiefel_shared::key::StickKey;
use stiefel_sys::block::Disk;
use stiefel_sys::console::Console;

use super::volumes::{self, Volumes};
use super::{Gather, settle};
use crate::collect::{self, KEYS_DIR};
use crate::payload::{self, Piece};
use crate::role::{Memory, wait_for_disk};
use crate::tree::Tree;

/// Where the laptop's system is put together.
const FOLDER: &str = "/run/stiefel/disk/root";
/// Memory that serving needs besides the parts, in bytes.
const RESERVE: u64 = 64 << 20;

/// Looks for the payload, gets its parts, and gives the handover of a server.
///
/// # Errors
/// Why nobody can be served.
pub fn search(console: &'static Console, mut handover: SearchHandover) -> anyhow::Result<ServerHandover> {
    volumes::release()?;
    let disk = wait_for_disk(console, &handover.disk)?;
    let root = Path::new("/");
    let server = {
        let layers = handover.layers.take();
        if layers.is_some() {
            volumes::take_down(&disk)?;
        }
        let mut volumes = Volumes::new(console, &disk)?;
        if let Some(layers) = &layers {
            volumes.open(console, &handover.hostname, layers)?;
        }
        assemble(&mut volumes, &handover, &disk)?;
        let server = found(console, handover, Path::new(FOLDER), root)?;
        volumes.end()?;
        server
    };
    settle(root, &server)?;
    // A role that is started again needs the programs no more, and memory is dear; without them it goes on all the same.
    let _ = std::fs::remove_dir_all(root.join(UNLOCK));
    Ok(server)
}

/// Mounts all of the system below [`FOLDER`].
fn assemble(volumes: &mut Volumes<'_>, handover: &SearchHandover, disk: &Disk) -> anyhow::Result<()> {
    for (point, volume) in &handover.mounts {
        let place = below(Path::new(FOLDER), point)?;
        volumes.mount(volume, &place).with_context(|| {
            format!(
                "{point} of the laptop's system (partition {} of {}) cannot be read; if the disk was partitioned or encrypted anew, write \
                 this stick anew",
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

/// The configuration of the system in the tree; the defaults where it has none.
fn configuration(system: &Tree) -> anyhow::Result<Config> {
    let bytes = match system.bytes(CONFIG_PATH, MAX_CONFIG) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Config::default()),
        Err(error) => return Err(error).with_context(|| format!("cannot read the laptop's {CONFIG_PATH}")),
    };
    let text = str::from_utf8(&bytes).with_context(|| format!("the laptop's {CONFIG_PATH} is no text"))?;
    Config::parse(text).with_context(|| format!("the laptop's {CONFIG_PATH} cannot be used"))
}

/// The keys of the system in the tree.
fn keys(system: &Tree) -> anyhow::Result<Vec<StickKey>> {
    let folder = system
        .resolve(KEYS_DIR)
        .with_context(|| format!("the laptop's system has no {KEYS_DIR}, so no stick could connect"))?;
    Ok(collect::read_keys(&folder)?)
}

/// Finds the payload in the tree at `system`, and puts its parts below `root`.
fn found(console: &Console, handover: SearchHandover, system: &Path, root: &Path) -> anyhow::Result<ServerHandover> {
    let tree = Tree::new(system);
    let (config, keys) = (configuration(&tree)?, keys(&tree)?);
    let found = payload::find(system, &config.boot.load)?;
    console.info(&format!("what the desktop boots:\n{found}"));
    let transport = collect::ways(&config, handover.wireguard, handover.nvme_target, &found)?;
    let zstd = collect::unpacks_zstd(&tree, &found.version);
    let overlay = overlay::overlay(&found.modules, &config.modules.0, &collect::firmware(&tree), zstd)?;
    let mut gather = Gather::begin(root, Part::Overlay)?;
    gather.write(&overlay.bytes)?;
    let (overlay, _) = gather.end();
    let sizes = [&found.kernel].into_iter().chain(&found.initrds).map(length);
    let parts = sizes.sum::<io::Result<u64>>()?;
    fits(parts, available(&Tree::new(Path::new("/"))))?;
    let kernel = gathered(root, Part::Kernel, std::slice::from_ref(&found.kernel))?;
    let initrd = gathered(root, Part::Initrd, &found.initrds)?;
    Ok(ServerHandover {
        // What changes on the desktop cannot be seen from here: each of its reboots reads the disk anew.
        payload: collect::payload(&config.session, &found, [kernel, initrd, overlay], None)?,
        keys,
        hostname: handover.hostname,
        disk: handover.disk,
        after: after(config.session.after),
        encryption: config.link.encryption,
        mode: config.link.mode,
        transport,
        session: config.session.mode,
        grace: config.session.grace.0.as_secs(),
        tickets: Vec::new(),
    })
}

/// What follows a desktop's power-off. A reboot could end in this stick again, which would serve again, without end.
const fn after(configured: After) -> After {
    match configured {
        After::Return | After::Poweroff => After::Poweroff,
        After::Stay => After::Stay,
    }
}

/// How much of its file a piece is, in bytes.
fn length(piece: &Piece) -> io::Result<u64> {
    match &piece.section {
        Some(section) => Ok(section.len),
        None => Ok(piece.path.metadata()?.len()),
    }
}

/// The memory that is free for files, in bytes, as far as the kernel tells.
fn available(tree: &Tree) -> Option<u64> {
    let text = tree.text("/proc/meminfo").ok()?;
    Some(Memory::parse(&text)?.available)
}

/// Whether parts of so many bytes fit into memory, with room to work in.
fn fits(parts: u64, available: Option<u64>) -> anyhow::Result<()> {
    let room = available.map_or(u64::MAX, |available| available.saturating_sub(RESERVE));
    ensure!(
        parts <= room,
        "what the desktop boots has {} MiB, and there is room for {} MiB in this laptop's memory; make a smaller initrd (e.g. MODULES=dep)",
        parts.div_ceil(1 << 20),
        room >> 20
    );
    Ok(())
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
    use std::os::unix::fs::PermissionsExt;
    use stiefel_shared::cpio;
    use stiefel_shared::handover::{DiskIdentity, DiskTransport};

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
        put("etc/stiefel/config.yaml", config.as_bytes());
        for name in ["blue", "red"] {
            let key = StickKey::generate(name).unwrap();
            let path = format!("etc/stiefel/keys/{name}.key");
            put(&path, key.to_file().as_bytes());
            let path = dir.path().join("system").join(path);
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).unwrap();
        }
        let handover = SearchHandover {
            hostname: "laptop".into(),
            disk: DiskIdentity::default(),
            mounts: Vec::new(),
            wireguard: true,
            nvme_target: true,
            layers: None,
        };
        (dir, handover)
    }

    fn look(config: &str) -> (tempfile::TempDir, anyhow::Result<ServerHandover>) {
        let (dir, handover) = system(config);
        let found = look_in(&dir, handover);
        (dir, found)
    }

    fn look_in(dir: &tempfile::TempDir, handover: SearchHandover) -> anyhow::Result<ServerHandover> {
        let console = Console::open(Path::new("/none"), Path::new("/none"));
        let system = dir.path().join("system");
        found(&console, handover, &system, &dir.path().join("ramdisk"))
    }

    #[test]
    fn a_key_that_was_revoked_after_the_stick_was_written_does_not_count() {
        let (dir, handover) = system("");
        let revoked = dir.path().join("system/etc/stiefel/keys/blue.key");
        std::fs::remove_file(&revoked).unwrap();
        let server = look_in(&dir, handover.clone()).unwrap();
        let names: Vec<_> = server.keys.iter().map(|key| key.name.as_str()).collect();
        assert_eq!(names, ["red"]);
        std::fs::remove_dir_all(revoked.parent().unwrap()).unwrap();
        let refused = look_in(&dir, handover).unwrap_err();
        assert!(format!("{refused:#}").contains("no stick could connect"), "{refused:#}");
    }

    #[test]
    fn a_configuration_that_was_changed_since_counts_and_none_is_the_default() {
        let (dir, handover) = system("session: {grace: 60s}\n");
        let config = dir.path().join("system/etc/stiefel/config.yaml");
        std::fs::write(&config, "session: {grace: 61s}\n").unwrap();
        assert_eq!(look_in(&dir, handover.clone()).unwrap().grace, 61);
        std::fs::write(&config, b"\xff").unwrap();
        assert!(look_in(&dir, handover.clone()).is_err());
        std::fs::remove_file(&config).unwrap();
        let default = Config::default().session.grace.0.as_secs();
        assert_eq!(look_in(&dir, handover).unwrap().grace, default);
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
    fn a_laptop_that_went_home_would_start_this_stick_again_so_it_is_switched_off() {
        for (configured, expected) in [
            ("return", After::Poweroff),
            ("stay", After::Stay),
            ("poweroff", After::Poweroff),
        ] {
            let server = look(&format!("session: {{after: {configured}}}\n")).1.unwrap();
            assert_eq!(server.after, expected, "{configured}");
        }
    }

    #[test]
    fn parts_that_do_not_fit_into_memory_are_refused_before_they_are_read() {
        let (dir, _) = system("");
        let tree = Tree::new(dir.path());
        assert_eq!(available(&tree), None);
        std::fs::create_dir(dir.path().join("proc")).unwrap();
        std::fs::write(
            dir.path().join("proc/meminfo"),
            "MemTotal: 9 kB\nMemAvailable:   204800 kB\n",
        )
        .unwrap();
        let memory = available(&tree);
        assert_eq!(memory, Some(200 << 20));
        assert!(fits(136 << 20, memory).is_ok() && fits(u64::MAX, None).is_ok());
        let refused = fits((136 << 20) + 1, memory).unwrap_err().to_string();
        assert!(refused.contains("137 MiB") && refused.contains("136 MiB"), "{refused}");
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
