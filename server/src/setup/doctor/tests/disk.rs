//! What is said of the disk: names in its tables, encryption, swap space, hibernation, initrds, space.

use super::*;

/// Runs the command that is to mend `/etc/NAME`, on the laptop's copy.
fn do_as_told(laptop: &Fixture, name: &str) {
    let path = format!("/etc/{name}");
    let copy = laptop.tree().path(&path);
    let command = worst(laptop, name).next.unwrap().replace(&path, copy.to_str().unwrap());
    let done = std::process::Command::new("sh").args(["-c", &command]).status();
    assert!(done.unwrap().success(), "{command}");
}

#[test]
fn names_by_place_in_fstab_are_failures_with_a_command_that_mends_them() {
    let laptop = Fixture::debian_luks_lvm();
    is(&laptop, "fstab", Level::Ok, &[]);
    let fstab = |line: &str| laptop.write("/etc/fstab", &format!("UUID=AB-CD / ext4 defaults 0 1\n{line}\n"));
    fstab("/dev/nvme0n1p2 /boot ext2 defaults 0 2");
    is(
        &laptop,
        "fstab",
        Level::Failure,
        &["/boot", "/dev/nvme0n1p2", "UUID=0b-0b"],
    );
    do_as_told(&laptop, "fstab");
    is(&laptop, "fstab", Level::Ok, &[]);
    assert!(
        laptop
            .tree()
            .text("/etc/fstab")
            .unwrap()
            .contains("\nUUID=0b-0b /boot ext2")
    );
    fstab("/dev/sdz1 /data ext4 defaults,nofail 0 2");
    is(&laptop, "fstab", Level::Warning, &["blkid '/dev/sdz1'"]);
    for fine in [
        "/dev/sda1 none swap sw 0 0",
        "/dev/sda1 /mnt ext4 noauto 0 0",
        "#/dev/sda1 /mnt ext4 defaults 0 0",
        "tmpfs /tmp tmpfs defaults 0 0",
        "",
    ] {
        fstab(fine);
        is(&laptop, "fstab", Level::Ok, &[]);
    }
    configure(&laptop, "session: {swap: true}\n");
    fstab("/dev/sda1 none swap sw 0 0");
    is(&laptop, "fstab", Level::Failure, &["/dev/sda1"]);
}

#[test]
fn a_file_system_on_a_disk_that_stays_behind_stops_the_desktop() {
    let laptop = Fixture::two_disks();
    is(&laptop, "fstab", Level::Failure, &["/data is on sda", "nofail"]);
    do_as_told(&laptop, "fstab");
    is(&laptop, "fstab", Level::Ok, &[]);
    assert!(
        laptop
            .tree()
            .text("/etc/fstab")
            .unwrap()
            .contains("UUID=5a-5a /data ext4 defaults,nofail 0 2")
    );
}

#[test]
fn names_by_place_in_crypttab_are_failures() {
    let laptop = Fixture::debian_luks_lvm();
    is(&laptop, "crypttab", Level::Ok, &[]);
    laptop.write("/etc/crypttab", "c /dev/nvme0n1p3 none luks\n");
    is(&laptop, "crypttab", Level::Failure, &["/dev/nvme0n1p3", "UUID=1c-1c"]);
    do_as_told(&laptop, "crypttab");
    assert_eq!(laptop.tree().text("/etc/crypttab").unwrap(), "c UUID=1c-1c none luks\n");
    is(&laptop, "crypttab", Level::Ok, &[]);
    let laptop = Fixture::two_disks();
    laptop.write("/etc/crypttab", "data UUID=5a-5a /etc/data.key luks\n");
    is(&laptop, "crypttab", Level::Failure, &["data", "sda", "nofail"]);
}

/// A LUKS2 header with two key slots.
pub(super) fn luks2(tokens: &str) -> Vec<u8> {
    let mut header = b"LUKS\xba\xbe\0\x02".to_vec();
    header.extend(16384_u64.to_be_bytes());
    header.resize(4096, 0);
    let json = format!(r#"{{"keyslots":{{"0":{{"type":"luks2"}},"1":{{"type":"luks2"}}}},"tokens":{{{tokens}}}}}"#);
    header.extend(json.as_bytes());
    header.resize(16384, 0);
    header
}

#[test]
fn a_volume_that_only_this_machines_tpm_opens_is_a_failure() {
    let laptop = Fixture::debian_luks_lvm();
    let device = "/dev/nvme0n1p3";
    laptop.write_bytes(device, &luks2(""));
    is(&laptop, "tpm", Level::Ok, &["not bound"]);
    laptop.write_bytes(device, &luks2(r#""0":{"type":"systemd-tpm2","keyslots":["1"]}"#));
    is(&laptop, "tpm", Level::Ok, &["systemd-tpm2", "passphrase"]);
    laptop.write_bytes(device, &luks2(r#""0":{"type":"clevis","keyslots":["0","1"]}"#));
    is(
        &laptop,
        "tpm",
        Level::Failure,
        &["clevis", "cryptsetup luksAddKey /dev/nvme0n1p3"],
    );
    laptop.write_bytes(device, b"LUKS\xba\xbe\0\x01 and the rest of it");
    is(&laptop, "tpm", Level::Ok, &["LUKS 1"]);
    laptop.write_bytes(device, &[0; 64]);
    is(&laptop, "tpm", Level::Warning, &["luksDump"]);
    laptop.write_bytes(device, b"");
    is(&laptop, "tpm", Level::Warning, &["cannot be read"]);
    is(&Fixture::arch(), "tpm", Level::Ok, &["not encrypted"]);
}

#[test]
fn swap_space_on_the_disk_counts_only_if_it_would_be_used() {
    let laptop = Fixture::debian_luks_lvm();
    is(&laptop, "swap", Level::Ok, &["no swap space"]);
    laptop.write(
        "/proc/swaps",
        "Filename Type Size Used Priority\n/dev/dm-0 partition 9 0 -2\n/dev/zram0 partition 9 0 100\n",
    );
    laptop.write("/dev/dm-0", "");
    is(&laptop, "swap", Level::Ok, &["/dev/dm-0 is not used"]);
    configure(&laptop, "session: {swap: true}\n");
    is(&laptop, "swap", Level::Warning, &["deadlock", "session.swap"]);
}

#[test]
fn hibernation_that_is_set_up_is_a_warning_and_an_image_a_failure() {
    let laptop = Fixture::debian_luks_lvm();
    is(&laptop, "hibernation", Level::Ok, &["not set up"]);
    laptop.write("/etc/initramfs-tools/conf.d/resume", "RESUME=none\n");
    is(&laptop, "hibernation", Level::Ok, &[]);
    laptop.write("/etc/initramfs-tools/conf.d/resume", "RESUME=UUID=1\n");
    is(
        &laptop,
        "hibernation",
        Level::Warning,
        &["RESUME in", "systemctl mask hibernate.target"],
    );
    for target in [
        "hibernate.target",
        "suspend-then-hibernate.target",
        "hybrid-sleep.target",
    ] {
        laptop.link("/dev/null", &format!("/etc/systemd/system/{target}"));
    }
    is(&laptop, "hibernation", Level::Ok, &["switched off"]);
    laptop.efi("HibernateLocation-8cf2644b-4b0b-428f-9387-6d876050dc67", b"x");
    is(
        &laptop,
        "hibernation",
        Level::Failure,
        &["HibernateLocation", "shut it down"],
    );
    let laptop = Fixture::arch();
    laptop.write("/proc/cmdline", "root=UUID=3e-3e resume=UUID=9\n");
    is(&laptop, "hibernation", Level::Warning, &["resume=UUID=9"]);
    laptop.write("/proc/cmdline", "");
    laptop.write("/etc/mkinitcpio.conf", "HOOKS=(base udev resume)\n");
    is(&laptop, "hibernation", Level::Warning, &["hook resume"]);
}

#[test]
fn initrds_for_this_machine_only_are_told_with_what_would_be_missing() {
    let laptop = Fixture::debian_luks_lvm();
    is(&laptop, "initrd", Level::Ok, &[]);
    laptop.write("/etc/initramfs-tools/conf.d/driver-policy", "MODULES=dep\n");
    laptop.link("../../nvme", "/sys/devices/pci/nvme0n1/driver/module");
    is(
        &laptop,
        "initrd",
        Level::Warning,
        &[
            "MODULES=dep in /etc/initramfs-tools/conf.d/driver-policy",
            "microcode",
            "(nvme)",
            "update-initramfs -u",
        ],
    );
    is(
        &Fixture::arch(),
        "initrd",
        Level::Warning,
        &["autodetect", "mkinitcpio -P"],
    );
    let laptop = Fixture::fedora();
    is(
        &laptop,
        "initrd",
        Level::Warning,
        &[
            "hostonly in /usr/lib/dracut/dracut.conf.d/01-dist.conf",
            "dracut --regenerate-all",
        ],
    );
    laptop.write("/etc/dracut.conf.d/99-stiefel.conf", "hostonly=\"no\"\n");
    is(&laptop, "initrd", Level::Ok, &[]);
    let laptop = Fixture::new();
    laptop.write("/etc/booster.yaml", "compression: zstd\n");
    is(&laptop, "initrd", Level::Warning, &["booster"]);
}

#[test]
fn little_space_and_memory_are_told() {
    let laptop = Fixture::debian_luks_lvm();
    laptop.write("/var/x", "");
    let patient = |space: fn(&Path) -> Option<Space>| Patient {
        payload: payload::find(laptop.root(), &Config::default().boot.load),
        machine: Machine::of(&laptop.tree()),
        config: Config::default(),
        privileged: true,
        space,
        tree: laptop.tree(),
    };
    let levels = |space: fn(&Path) -> Option<Space>| -> Vec<Level> {
        space::check(&patient(space))
            .iter()
            .map(|finding| finding.level)
            .collect()
    };
    assert_eq!(levels(|_| Some(Space(1 << 40))), [Level::Ok, Level::Ok, Level::Ok]);
    assert_eq!(
        levels(|_| Some(Space(5 << 20))),
        [Level::Warning, Level::Warning, Level::Ok]
    );
    assert_eq!(levels(|_| None), [Level::Warning, Level::Warning, Level::Ok]);
    laptop.write("/proc/meminfo", "MemTotal:       400000 kB\n");
    is(&laptop, "memory", Level::Failure, &["390 MiB", "modules"]);
}
