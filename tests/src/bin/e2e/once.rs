//! `trigger.method: reboot`: the ramdisk's half without any firmware, and the whole way from a Debian through OVMF and home again.

use std::path::Path;
use std::time::{Duration, SystemTime};

use serde_json::json;
use stiefel_initrd_builder::ramdisk::{KERNEL, Manifest, RAMDISK};
use stiefel_initrd_builder::stick::DEFAULT_STUB;
use stiefel_initrd_builder::uki::Uki;
use stiefel_shared::cpio;
use stiefel_shared::discovery::Ticket;
use stiefel_shared::handover::{
    After, DiskIdentity, DiskTransport, Encryption, FilePart, Handover, LinkMode, OnceHandover, Part, PartSize,
    Payload, Place, SearchHandover, ServerHandover, SessionMode, Volume,
};
use stiefel_shared::key::StickKey;
use stiefel_tests::disk::{ExtraFile, Initrd, LaptopDisk, Layout, PASSWORD, System, add_partition, esp_of, ext4_of};
use stiefel_tests::kit::CONSOLE;
use stiefel_tests::scenario::{self, Failure, Machines, Milestones, patience};
use stiefel_tests::{Boot, Drive, NicModel, VmBuilder, Wire, re};

use crate::runner::Bench;
use crate::tiny::{LAPTOP_MAC, client, key, machine};

const SERIAL: &str = "once-disk";
/// Stands for the modules, which come with the handover.
const OVERLAY: &[u8] = b"overlay";
/// The size of a stick of the laptop's own, in bytes, and how long it may take to be written.
const OWN_STICK: u64 = 256 << 20;
const WRITING: Duration = Duration::from_secs(180);
/// Room for a kernel and an initrd, in MiB.
const BOOT_MIB: u32 = 192;

/// The disk has an EFI system partition with an image that holds a key, and an ext4 with a kernel and an initrd. The ramdisk overwrites
/// and removes the image, writes nothing else, shows its ticket to a stick whose own key it does not have, and the desktop
/// receives what is on the disk. A stick with another key does not.
pub(crate) fn activation(bench: &Bench) -> Result<(), Failure> {
    let dir = tempfile::tempdir_in(bench.kit.dir())?;
    let wire = Wire::direct()?;
    let stick = key(bench, "stick")?;
    let disk = dir.path().join("disk.img");
    // A stick's image is the image of an EFI system partition with one program, which holds its key.
    bench.kit.stick(&disk, "stick")?;
    let boot = dir.path().join("boot");
    std::fs::create_dir(&boot)?;
    for name in [KERNEL, RAMDISK] {
        std::fs::copy(bench.kit.ramdisk().join(name), boot.join(name))?;
    }
    let filled = dir.path().join("boot.img");
    ext4_of(&boot, &filled, BOOT_MIB)?;
    let start = add_partition(&disk, 2, &filled, "8300")?;
    let before = partition(&disk, start)?;
    let digits = digits(&stick)?;
    if !holds(&disk, &digits)? {
        return Err("the image does not hold the key, so its end could not be seen".into());
    }

    let archive = handover(bench, &stick, std::fs::metadata(&disk)?.len())?;
    let laptop = machine(bench, "laptop", &archive)
        .disk(Drive {
            path: disk.clone(),
            serial: SERIAL.to_owned(),
            snapshot: false,
        })
        .nic("cable", NicModel::VirtioPlain, &wire.a(), LAPTOP_MAC)
        .start()?;
    laptop.serial().expect(
        "the one-time image was taken off the EFI system partition",
        patience::SERVING,
    )?;
    laptop
        .serial()
        .expect("stiefel: ready; waiting for the desktop", patience::SERVING)?;
    let stranger = client(bench, &key(bench, "stranger")?, &wire.b())?.start()?;
    stranger
        .serial()
        .expect("no laptop that knows this stick's key answers on", patience::STICK)?;
    stranger.quit()?;
    let desktop = client(bench, &stick, &wire.b())?.start()?;
    desktop.serial().expect("found once on", patience::STICK)?;
    desktop.serial().expect(re("stiefel: received "), patience::BUNDLE)?;
    desktop.quit()?;
    laptop.quit()?;
    if holds(&disk, &digits)? {
        return Err("the removed image's key is still on the disk".into());
    }
    if partition(&disk, start)? != before {
        return Err("the partition that was read has changed".into());
    }
    Ok(())
}

/// Where the laptop mounts its EFI system partition, closed to other users, and has the service see it.
const MOUNT: &str = "mkdir -p /boot/efi && mount -o umask=0077 /dev/vda2 /boot/efi && systemctl restart stiefel-autokexec.service && \
                     systemctl is-active --wait stiefel-autokexec.service";
/// Nothing of the activation is left but the firmware's entry.
const NOTHING_LEFT: &str = "! ls /sys/firmware/efi/efivars/BootNext-* && ! test -e /boot/efi/EFI/stiefel/once.efi && \
                            cat /sys/firmware/efi/efivars/Boot0* | tr -d '\\000' | grep -aq 'stiefel (once)'";
/// Room for Debian's unified image and ours, in MiB.
const ESP_MIB: u32 = 384;

/// A Debian that OVMF starts, with `trigger.method: reboot`: at the plug it reboots through the firmware into the ramdisk, the desktop
/// boots from it and is powered off, and the firmware starts the Debian again by itself.
pub(crate) fn firmware(bench: &Bench) -> Result<(), Failure> {
    let dir = tempfile::tempdir_in(bench.kit.dir())?;
    let wire = Wire::direct()?;
    let config = bench.kit.config("").replacen("macs:", "method: reboot, macs:", 1);
    let stub = ExtraFile::new(Path::new(DEFAULT_STUB), DEFAULT_STUB, 0o644);
    let disk = bench
        .kit
        .laptop_disk(&dir.path().join("laptop.img"), &config, vec![stub])?;
    let (program, esp) = (dir.path().join("debian.efi"), dir.path().join("esp.img"));
    std::fs::write(&program, debian(&disk)?)?;
    esp_of(&program, &esp, ESP_MIB)?;
    add_partition(&disk.path, 2, &esp, "ef00")?;
    let stick = dir.path().join("stick.img");
    bench.kit.stick(&stick, "stick")?;

    let laptop = VmBuilder::new("laptop")
        .memory_mib(1536)
        .boot(Boot::Uefi)
        .disk(disk.drive())
        .start()?;
    scenario::login(&laptop, &disk)?;
    laptop.run_ok(MOUNT)?;
    laptop.run_ok("stiefel serve --dry-run 2>&1 | grep -q 'to be started once'")?;
    scenario::plug_and_serve(&laptop, &wire.a())?;
    // Its way into the ramdisk; events are kept until they are taken.
    laptop.wait_reboot(Duration::from_secs(5))?;
    let desktop = scenario::desktop(&stick, &wire.b(), false)?;
    scenario::desktop_boots(&desktop, &mut Milestones::new(false))?;
    desktop.login("root", PASSWORD, Duration::from_secs(30))?;
    desktop.run_ok("echo kept > /root/written-on-the-desktop")?;
    desktop.power_off(patience::SHUTDOWN)?;
    drop(desktop);
    laptop.wait_reboot(patience::SHUTDOWN)?;
    laptop.unplug_usb_nic("cable")?;
    laptop.login("root", PASSWORD, patience::LOGIN + patience::STICK)?;
    laptop.run_ok(MOUNT)?;
    laptop.run_ok(NOTHING_LEFT)?;
    if laptop.run_ok("cat /root/written-on-the-desktop")? != "kept" {
        return Err("what was written on the desktop is not on the laptop's disk".into());
    }
    laptop.power_off(patience::SHUTDOWN)?;
    Ok(disk.fsck_clean()?)
}

/// The laptop's ramdisk as a stick of the laptop's own starts it, with a Debian on the disk that nobody has asked anything: it finds what
/// GRUB would boot, and the desktop boots it.
pub(crate) fn search(bench: &Bench) -> Result<(), Failure> {
    let machines = Machines::prepare(bench.kit, Wire::direct()?)?;
    let manifest = Manifest::load(&bench.kit.ramdisk())?;
    let disk = machines.disk.drive();
    let root = Volume {
        partition: 1,
        fstype: "ext4".to_owned(),
        folder: "/".to_owned(),
        logical: None,
    };
    let handover = Handover::Search(Box::new(SearchHandover {
        hostname: "search".to_owned(),
        disk: DiskIdentity {
            serial: Some(disk.serial.clone()),
            size: std::fs::metadata(&disk.path)?.len(),
            ..DiskIdentity::default()
        },
        mounts: vec![("/".to_owned(), root)],
        wireguard: manifest.wireguard,
        nvme_target: manifest.nvme_target,
        layers: None,
    }));
    let laptop = machine(bench, "laptop", &handover.to_cpio()?.0)
        .memory_mib(1024)
        .disk(disk)
        .nic("cable", NicModel::VirtioPlain, &machines.wire.a(), LAPTOP_MAC)
        .start()?;
    laptop.serial().expect("what the desktop boots", patience::SERVING)?;
    scenario::wait_until_serving(&laptop)?;
    let desktop = scenario::desktop(&machines.stick, &machines.wire.b(), false)?;
    scenario::desktop_boots(&desktop, &mut Milestones::new(false))?;
    desktop.login("root", PASSWORD, Duration::from_secs(30))?;
    desktop.run_ok("echo kept > /root/written-on-the-desktop")?;
    desktop.power_off(patience::SHUTDOWN)?;
    // A reboot could end in the stick again.
    laptop.wait_shutdown(patience::SHUTDOWN)?;
    machines.disk.fsck_clean()?;
    if machines.disk.read_file("/root/written-on-the-desktop")? != b"kept\n" {
        return Err("what was written on the desktop is not on the laptop's disk".into());
    }
    Ok(())
}

/// A laptop with LVM in LUKS writes a stick of its own, and is started from it: the passphrase is typed on the desktop, a wrong one first.
/// Until the desktop has the disk nothing was written to it. The system's own initrd then asks for the passphrase once more.
pub(crate) fn search_luks(bench: &Bench) -> Result<(), Failure> {
    let dir = tempfile::tempdir_in(bench.kit.dir())?;
    let system = System::new(Layout::LuksLvm, Initrd::InitramfsTools);
    let stub = ExtraFile::new(Path::new(DEFAULT_STUB), DEFAULT_STUB, 0o644);
    let machines = Machines::of(bench.kit, &system, Wire::direct()?, "", vec![stub])?;
    let own = dir.path().join("own.img");
    write_on_the_laptop(&machines, &own)?;
    let before = digest(&machines.disk.path)?;

    let laptop = VmBuilder::new("laptop")
        .memory_mib(1536)
        .boot(Boot::Uefi)
        .disk(machines.disk.drive())
        .stick(&own)
        .nic("cable", NicModel::VirtioPlain, &machines.wire.a(), LAPTOP_MAC)
        .start()?;
    let wanted = "its passphrase is wanted at the desktop";
    laptop.serial().expect(wanted, patience::SERVING + patience::STICK)?;
    let desktop = scenario::desktop(&machines.stick, &machines.wire.b(), false)?;
    let asks = || {
        desktop
            .serial()
            .expect(re("wants the passphrase of .*_crypt .*Type it here"), patience::STICK)
    };
    asks()?;
    desktop.serial().send_line("not the passphrase")?;
    desktop
        .serial()
        .expect("that passphrase does not open", patience::SERVING)?;
    laptop.serial().expect("the passphrase is wrong", patience::SERVING)?;
    asks()?;
    desktop.serial().send_line(PASSWORD)?;
    laptop.serial().expect("the passphrase is right", patience::SERVING)?;
    // What the laptop does is looked at before the desktop has a part in it.
    desktop.execute("stop", json!({}))?;
    scenario::wait_until_serving(&laptop)?;
    if digest(&machines.disk.path)? != before {
        return Err("the laptop's ramdisk has written to the disk that it has read".into());
    }
    desktop.execute("cont", json!({}))?;
    scenario::desktop_attaches(&desktop, &mut Milestones::new(false))?;
    scenario::login(&desktop, &machines.disk)?;
    if desktop.run_ok("findmnt --noheadings --output SOURCE /")?.trim() != "/dev/mapper/laptop--vg-root" {
        return Err("the desktop's root is not the laptop's".into());
    }
    desktop.power_off(patience::SHUTDOWN)?;
    laptop.wait_shutdown(patience::SHUTDOWN)?;
    for machine in [&laptop, &desktop] {
        let log = std::fs::read_to_string(machine.serial().log())?;
        if log.contains("not the passphrase") {
            return Err(format!("what was typed is on the console of {}", machine.name()).into());
        }
    }
    Ok(machines.disk.fsck_clean()?)
}

/// The laptop's own system writes a stick for the laptop.
fn write_on_the_laptop(machines: &Machines, image: &Path) -> Result<(), Failure> {
    std::fs::File::create(image)?.set_len(OWN_STICK)?;
    let machine = VmBuilder::new("laptop").boot(machines.disk.boot(&CONSOLE)).stick(image);
    let home = scenario::laptop_with_its_files(&machines.disk, machine)?;
    // As an installer sets it up, though smaller: threads, which end by a library that no program names.
    home.run_ok(&format!(
        "printf %s '{PASSWORD}' | cryptsetup luksConvertKey --batch-mode --pbkdf argon2id --pbkdf-memory 32768 --pbkdf-parallel 4 \
         --pbkdf-force-iterations 4 --key-file - \"$(cryptsetup status vda2_crypt | sed -n 's/^ *device: *//p')\""
    ))?;
    let command = "stiefel stick --laptop --yes /dev/disk/by-id/usb-*stick0* 2>&1 && sync";
    let said = home.run_ok_within(command, WRITING)?;
    if !said.contains("good for asking for this laptop's passphrase") {
        return Err(format!("`stiefel stick --laptop` says:\n{said}").into());
    }
    Ok(home.power_off(patience::SHUTDOWN)?)
}

/// The digest of a disk's image.
fn digest(path: &Path) -> Result<String, Failure> {
    let said = std::process::Command::new("sha256sum").arg(path).output()?;
    let digits = String::from_utf8(said.stdout)?;
    Ok(digits
        .split(' ')
        .next()
        .filter(|digits| digits.len() == 64)
        .ok_or("no digest")?
        .to_owned())
}

/// The disk's own kernel and initrd as one program for the firmware.
fn debian(disk: &LaptopDisk) -> Result<Vec<u8>, Failure> {
    let Boot::Kernel { cmdline, .. } = disk.boot(&CONSOLE) else {
        return Err("the disk is not booted by its kernel".into());
    };
    let initrd = std::fs::read(&disk.installed.initrd)?;
    let uki = Uki {
        stub: &std::fs::read(DEFAULT_STUB)?,
        os_release: "ID=debian\nNAME=Debian\nPRETTY_NAME=Debian\n",
        cmdline: &cmdline,
        initrd: &[&initrd],
        kernel: &std::fs::read(&disk.installed.kernel)?,
    };
    Ok(uki.assemble()?.to_vec())
}

/// What the laptop's OS would have left for the ramdisk.
fn handover(bench: &Bench, stick: &StickKey, size: u64) -> Result<Vec<u8>, Failure> {
    let manifest = Manifest::load(&bench.kit.ramdisk())?;
    let unix = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs();
    let (ticket, key) = Ticket::issue(stick, unix)?;
    let place = |partition, fstype: &str, path: String| Place {
        volume: Volume {
            partition,
            fstype: fstype.to_owned(),
            folder: "/".to_owned(),
            logical: None,
        },
        path,
        range: None,
    };
    let part = |name: &str, sha256: &str| FilePart {
        files: vec![place(2, "ext4", format!("/{name}"))],
        sha256: sha256.to_owned(),
    };
    let sizes = [manifest.kernel.bytes, manifest.ramdisk.bytes, OVERLAY.len() as u64];
    let parts = Part::ALL
        .into_iter()
        .zip(sizes)
        .map(|(part, size)| PartSize { part, size });
    let handover = Handover::Once(Box::new(OnceHandover {
        server: ServerHandover {
            keys: vec![key],
            hostname: "once".to_owned(),
            disk: DiskIdentity {
                serial: Some(SERIAL.to_owned()),
                size,
                ..DiskIdentity::default()
            },
            payload: Payload {
                version: manifest.kernel_version.clone(),
                cmdline: CONSOLE.join(" "),
                parts: parts.collect(),
                boot: Some(Vec::new()),
            },
            after: After::Return,
            encryption: Encryption::None,
            mode: LinkMode::Dedicated,
            transport: DiskTransport::Nbd,
            session: SessionMode::Normal,
            grace: 900,
            tickets: vec![ticket],
        },
        image: place(1, "vfat", "/EFI/BOOT/BOOTX64.EFI".to_owned()),
        kernel: part(KERNEL, &manifest.kernel.sha256),
        initrd: part(RAMDISK, &manifest.ramdisk.sha256),
    }));
    let mut archive = cpio::Writer::new(handover.to_cpio()?.0.clone());
    archive.dir("stiefel/payload", 0o700)?;
    archive.file(Part::Overlay.path(), 0o600, OVERLAY)?;
    Ok(archive.finish()?)
}

/// The key as it stands in a handover.
fn digits(key: &StickKey) -> Result<String, Failure> {
    let file = key.to_file();
    let digits = file.trim_end().rsplit(' ').next();
    Ok(digits.ok_or("a key's file has a space")?.to_owned())
}

fn holds(disk: &Path, text: &str) -> Result<bool, Failure> {
    let bytes = std::fs::read(disk)?;
    Ok(bytes.windows(text.len()).any(|window| window == text.as_bytes()))
}

fn partition(disk: &Path, start: u64) -> Result<Vec<u8>, Failure> {
    let bytes = std::fs::read(disk)?;
    let start = usize::try_from(start)?;
    let end = start + (usize::try_from(BOOT_MIB)? << 20);
    Ok(bytes.get(start..end).ok_or("the image is too short")?.to_vec())
}
