//! Each finding, ok and not, on small laptops.

mod disk;

use std::os::unix::fs::PermissionsExt;

use stiefel_initrd_builder::stick::DEFAULT_STUB;
use stiefel_shared::config::{Config, EXAMPLE};

use super::super::fixture::Fixture;
use super::*;

/// A laptop that lacks nothing of what its files say: configuration, key, guards.
fn set_up(laptop: Fixture) -> Fixture {
    configure(&laptop, "trigger: {usb: ['0bda:8153:000001']}\n");
    super::super::first_key(laptop.root()).unwrap();
    laptop
}

fn configure(laptop: &Fixture, yaml: &str) {
    laptop.write(CONFIG_PATH, yaml);
}

fn all(laptop: &Fixture) -> Vec<Finding> {
    examine(&DoctorOptions {
        root: laptop.root().to_owned(),
        config: None,
    })
    .findings
}

/// The worst finding of a check.
fn worst(laptop: &Fixture, check: &str) -> Finding {
    let findings = all(laptop).into_iter().filter(|finding| finding.check == check);
    findings
        .max_by_key(|finding| finding.level)
        .unwrap_or_else(|| panic!("nothing about {check}"))
}

/// Demands the worst finding of a check, with words of its text and of what is to be done.
fn is(laptop: &Fixture, check: &str, level: Level, words: &[&str]) {
    let found = worst(laptop, check);
    let said = format!("{found}");
    assert_eq!(found.level, level, "{said}");
    assert_eq!(
        found.next.is_none(),
        level == Level::Ok,
        "what is wrong has a remedy: {said}"
    );
    for word in words {
        assert!(said.contains(word), "{word:?} is not in: {said}");
    }
}

#[test]
fn a_debian_that_is_set_up_lacks_only_what_install_brings() {
    let laptop = set_up(Fixture::debian_luks_lvm());
    laptop.write_bytes("/dev/nvme0n1p3", &disk::luks2(""));
    let failures: Vec<_> = all(&laptop)
        .into_iter()
        .filter(|finding| finding.level == Level::Failure)
        .collect();
    let checks: Vec<_> = failures.iter().map(|finding| finding.check).collect();
    assert_eq!(checks, ["ramdisk", "service"], "{failures:?}");
}

#[test]
fn the_configuration_that_is_missing_broken_or_open_is_told() {
    let laptop = Fixture::debian_luks_lvm();
    is(
        &laptop,
        "config",
        Level::Failure,
        &["no /etc/stiefel/config.yaml", "stiefel init"],
    );
    configure(&laptop, "boot:\n  dsik: auto\n");
    is(&laptop, "config", Level::Failure, &["dsik", "line 2", "--force"]);
    configure(&laptop, EXAMPLE);
    is(&laptop, "config", Level::Ok, &["/etc/stiefel/config.yaml"]);
    let path = laptop.tree().path(CONFIG_PATH);
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666)).unwrap();
    is(&laptop, "config", Level::Warning, &["chmod 0644"]);
    laptop.remove(CONFIG_PATH);
    laptop.write_bytes(CONFIG_PATH, b"\xff\xfe");
    is(&laptop, "config", Level::Failure, &["cannot be read"]);
}

#[test]
fn kexec_that_is_forbidden_is_told_with_the_file_that_forbids_it() {
    let laptop = Fixture::debian_luks_lvm();
    is(&laptop, "kexec", Level::Ok, &["no Secure Boot"]);
    laptop.write("/proc/sys/kernel/kexec_load_disabled", "1\n");
    is(
        &laptop,
        "kexec",
        Level::Failure,
        &["kexec_load_disabled is 1", "reboot"],
    );
    laptop.write(
        "/etc/sysctl.d/60-x.conf",
        "# kexec_load_disabled\nkernel.kexec_load_disabled = 1\n",
    );
    is(
        &laptop,
        "kexec",
        Level::Failure,
        &["sed -i '/kexec_load_disabled/d' /etc/sysctl.d/60-x.conf && reboot"],
    );
    is(&Fixture::new(), "kexec", Level::Warning, &["no system runs"]);
}

#[test]
fn where_kexec_is_forbidden_a_reboot_is_recommended_if_the_firmware_can_do_it() {
    let laptop = Fixture::debian_luks_lvm();
    laptop.write("/proc/sys/kernel/kexec_load_disabled", "1\n");
    let kexec = |laptop: &Fixture| worst(laptop, "kexec").next.unwrap();
    assert!(!kexec(&laptop).contains("trigger.method"));
    laptop.efi("BootOrder-8be4df61-93ca-11d2-aa0d-00e098032b8c", &[0, 0]);
    laptop.write(DEFAULT_STUB, "stub");
    assert!(
        kexec(&laptop).contains("trigger.method to reboot"),
        "{}",
        kexec(&laptop)
    );

    configure(&laptop, "trigger: {method: reboot}");
    is(
        &laptop,
        "reboot",
        Level::Failure,
        &["no EFI system partition of nvme0n1"],
    );
    laptop.mount("259:2", "/boot/efi", "vfat", "/dev/nvme0n1p1");
    laptop.write("/boot/efi/EFI/debian/grubx64.efi", "");
    laptop.link(
        "../../nvme0n1p1",
        "/dev/disk/by-partuuid/00112233-4455-6677-8899-aabbccddeeff",
    );
    laptop.write("/sys/class/block/nvme0n1/queue/logical_block_size", "512\n");
    laptop.write("/sys/class/block/nvme0n1p1/start", "2048\n");
    laptop.write("/sys/class/block/nvme0n1p1/size", "1048576\n");
    // The kernel is on the encrypted root.
    is(
        &laptop,
        "reboot",
        Level::Failure,
        &["/ (ext4 on /dev/mapper/vg-root)", "/boot on a partition of its own"],
    );
    laptop.mount("259:3", "/boot", "ext2", "/dev/nvme0n1p2");
    is(&laptop, "reboot", Level::Ok, &["start the ramdisk once"]);
    let part = "{\"bytes\": 1, \"sha256\": \"\"}";
    let ramdisk = |reads: &str| {
        format!(
            "{{\"stiefel_version\": \"0\", \"kernel_version\": \"6.1.0-13-amd64\", \"kernel\": {part}, \"ramdisk\": {part}, \
             \"unpacked_bytes\": 1, \"modules\": 1, \"wireguard\": true, \"firmware\": 0, \"missing_firmware\": 0, \"classes\": [], \
             \"reads\": [{reads}]}}"
        )
    };
    laptop.write("/var/lib/stiefel/manifest", &ramdisk("\"loop\", \"ext4\""));
    is(
        &laptop,
        "reboot",
        Level::Failure,
        &["the ramdisk has no vfat", "modules"],
    );
    laptop.write("/var/lib/stiefel/manifest", &ramdisk("\"loop\", \"ext4\", \"vfat\""));
    is(&laptop, "reboot", Level::Ok, &["start the ramdisk once"]);
    laptop.write("/boot/efi/EFI/stiefel/once.efi", "");
    is(&laptop, "reboot", Level::Warning, &["once.efi", "holds keys"]);
    laptop.remove("/boot/efi/EFI/stiefel/once.efi");
    laptop.remove(DEFAULT_STUB);
    is(&laptop, "reboot", Level::Failure, &["no UEFI stub", "systemd-boot-efi"]);
    laptop.efi("SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c", &[1]);
    is(&laptop, "reboot", Level::Failure, &["Secure Boot is on", "not signed"]);
    let bios = Fixture::debian_luks_lvm();
    configure(&bios, "trigger: {method: reboot}");
    bios.write("/proc/sys/kernel/kexec_load_disabled", "1\n");
    is(&bios, "reboot", Level::Failure, &["BIOS", "trigger.method to kexec"]);
}

#[test]
fn lockdown_wants_a_signed_kernel() {
    let laptop = Fixture::fedora();
    configure(&laptop, "boot: {load: {kernel: /boot/vmlinuz-6.11.4-301.fc41.x86_64}}");
    is(
        &laptop,
        "kexec",
        Level::Failure,
        &["locked down", "not signed", "Secure Boot"],
    );
    is(&Fixture::arch(), "kexec", Level::Ok, &["Secure Boot is off"]);
}

#[test]
fn modules_that_are_missing_are_told_with_the_distributions_command() {
    let laptop = Fixture::debian_luks_lvm();
    is(&laptop, "modules", Level::Ok, &["6.1.0-13-amd64"]);
    let without = |module: &str| {
        let modules: Vec<_> = Fixture::MODULES
            .into_iter()
            .filter(|path| !path.ends_with(module))
            .collect();
        laptop.kernel("6.1.0-13-amd64", &modules);
    };
    without("/nvmet-tcp");
    is(
        &laptop,
        "modules",
        Level::Warning,
        &["no nvmet-tcp", "NBD is used instead", "apt install linux-image-"],
    );
    without("/wireguard");
    is(&laptop, "modules", Level::Failure, &["no wireguard", "link.encryption"]);
    configure(&laptop, "link: {encryption: none}\n");
    is(&laptop, "modules", Level::Ok, &["6.1.0"]);
    configure(&laptop, "disk: {transport: nvme-tcp}\n");
    without("/nvme-tcp");
    is(&laptop, "modules", Level::Failure, &["no nvme-tcp", "disk.transport"]);
    without("/nbd");
    is(&laptop, "modules", Level::Failure, &["no nbd"]);
    let laptop = Fixture::fedora();
    laptop.kernel("6.11.4-301.fc41.x86_64", &["kernel/drivers/block/nbd"]);
    is(
        &laptop,
        "modules",
        Level::Failure,
        &["dnf install kernel-modules-6.11.4-301.fc41.x86_64"],
    );
}

#[test]
fn modules_of_a_kernel_that_is_gone_ask_for_a_reboot() {
    let laptop = Fixture::arch();
    laptop.remove("/lib/modules/6.11.6-arch1-1");
    is(
        &laptop,
        "modules",
        Level::Failure,
        &["are not there", "reboot", "pacman"],
    );
}

#[test]
fn an_adapter_that_the_ramdisk_would_not_drive_is_named() {
    let laptop = Fixture::debian_luks_lvm();
    laptop.nic("usb2", "r8127", Some(("0bda", "8127", None)));
    let modules = [&Fixture::MODULES[..], &["updates/dkms/r8127"]].concat();
    laptop.kernel("6.1.0-13-amd64", &modules);
    is(
        &laptop,
        "modules",
        Level::Failure,
        &["usb2", "r8127", "modules` in config.yaml"],
    );
    configure(&laptop, "modules: [default, r8127]\n");
    is(&laptop, "modules", Level::Ok, &[]);
    configure(&laptop, "modules: [defautl]\n");
    is(&laptop, "modules", Level::Failure, &["defautl"]);
}

#[test]
fn the_trigger_is_told_with_its_adapter() {
    let laptop = set_up(Fixture::debian_luks_lvm());
    is(&laptop, "trigger", Level::Ok, &["usb1", "0bda:8153:000001"]);
    configure(&laptop, "trigger: {usb: ['0bda:8156']}\n");
    is(
        &laptop,
        "trigger",
        Level::Warning,
        &["0bda:8156 is not plugged in", "another adapter", "0bda:8153:000001"],
    );
    configure(&laptop, "");
    is(
        &laptop,
        "trigger",
        Level::Warning,
        &["no adapter is dedicated", "0bda:8153:000001"],
    );
    laptop.remove("/sys/class/net/usb1");
    is(
        &laptop,
        "trigger",
        Level::Warning,
        &["only a stick's wake", "stiefel init"],
    );
    configure(&laptop, "trigger: {usb: ['0bda:8156']}\n");
    is(&laptop, "trigger", Level::Ok, &["not plugged in now"]);
    configure(&laptop, "trigger: {wake: off}\n");
    is(&laptop, "trigger", Level::Failure, &["nothing triggers"]);
    laptop.remove("/sys/class/net/enp0");
    configure(&laptop, "");
    is(&laptop, "trigger", Level::Warning, &["no wired network adapter"]);
}

#[test]
fn the_way_to_the_internet_through_the_dedicated_adapter_is_told() {
    let laptop = set_up(Fixture::debian_luks_lvm());
    laptop.write(
        "/proc/net/route",
        "Iface Destination x\nusb1 00000000 0 0 0 0 0 00000000 0 0 0\n",
    );
    is(&laptop, "trigger", Level::Warning, &["usb1", "will be lost"]);
}

#[test]
fn network_managers_without_a_guard_are_told() {
    let laptop = set_up(Fixture::debian_luks_lvm());
    is(
        &laptop,
        "guards",
        Level::Warning,
        &["84-stiefel.rules", "stiefel install"],
    );
    // As install writes them.
    let options = crate::install::InstallOptions {
        program: "/bin/true".into(),
        yes: true,
        ..crate::install::InstallOptions::new(laptop.root())
    };
    crate::install::install(&options).unwrap();
    is(&laptop, "guards", Level::Ok, &[]);
    laptop.write("/etc/network/interfaces", "auto lo\nallow-hotplug enp0 usb1\n");
    is(&laptop, "guards", Level::Warning, &["ifupdown", "usb1"]);
    laptop.remove("/etc/network/interfaces");
    laptop.link("/x", "/etc/systemd/system/multi-user.target.wants/connman.service");
    is(
        &laptop,
        "guards",
        Level::Warning,
        &["connman", "NetworkInterfaceBlacklist"],
    );
}

#[test]
fn firewalls_that_would_drop_a_wake_are_warnings_with_a_command() {
    let laptop = Fixture::fedora();
    is(&laptop, "firewall", Level::Ok, &[]);
    laptop.link("/x", "/etc/systemd/system/multi-user.target.wants/firewalld.service");
    laptop.write("/etc/firewalld/firewalld.conf", "DefaultZone=public\n");
    laptop.write(
        "/usr/lib/firewalld/zones/public.xml",
        "<zone><service name=\"ssh\"/></zone>",
    );
    is(
        &laptop,
        "firewall",
        Level::Warning,
        &["firewalld (zone public)", "--add-port=61570/udp"],
    );
    laptop.write(
        "/etc/firewalld/zones/public.xml",
        "<zone><port protocol=\"udp\" port=\"1025-65535\"/></zone>",
    );
    is(&laptop, "firewall", Level::Ok, &["public"]);
    let laptop = Fixture::debian_luks_lvm();
    laptop.write("/etc/ufw/ufw.conf", "ENABLED=yes\n");
    laptop.write("/etc/default/ufw", "DEFAULT_INPUT_POLICY=\"DROP\"\n");
    is(&laptop, "firewall", Level::Warning, &["ufw allow 61570/udp"]);
    laptop.write(
        "/etc/ufw/user6.rules",
        "-A ufw6-user-input -p udp --dport 61570 -j ACCEPT\n",
    );
    is(&laptop, "firewall", Level::Ok, &["ufw"]);
    laptop.remove("/etc/ufw");
    laptop.link("/x", "/etc/systemd/system/sysinit.target.wants/nftables.service");
    laptop.write(
        "/etc/nftables.conf",
        "table inet f {\n chain in {\n type filter hook input priority 0; policy drop;\n }\n}\n",
    );
    is(
        &laptop,
        "firewall",
        Level::Warning,
        &["nft insert rule inet f in udp dport 61570 accept"],
    );
    configure(&laptop, "trigger: {wake: off}\n");
    is(&laptop, "firewall", Level::Ok, &["wake"]);
    let laptop = Fixture::debian_luks_lvm();
    laptop.write("/etc/iptables/rules.v6", "*filter\n:INPUT DROP [0:0]\nCOMMIT\n");
    is(&laptop, "firewall", Level::Warning, &["ip6tables -I INPUT"]);
}

#[test]
fn keys_that_are_missing_or_open_are_told() {
    let laptop = Fixture::debian_luks_lvm();
    is(&laptop, "keys", Level::Failure, &["stiefel key new stick"]);
    let key = super::super::first_key(laptop.root()).unwrap().unwrap();
    is(&laptop, "keys", Level::Ok, &["stick"]);
    let folder = key.parent().unwrap();
    std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o755)).unwrap();
    is(&laptop, "keys", Level::Warning, &["chmod 0700"]);
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o644)).unwrap();
    is(&laptop, "keys", Level::Failure, &["chmod 0600"]);
    std::fs::write(&key, "garbage").unwrap();
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o600)).unwrap();
    let said = worst(&laptop, "keys").to_string();
    assert!(said.contains("FAILURE") && !said.contains("garbage"), "{said}");
}

#[test]
fn a_ramdisk_that_is_missing_old_or_not_whole_is_built_again() {
    use sha2::{Digest, Sha256};
    let laptop = Fixture::debian_luks_lvm();
    is(&laptop, "ramdisk", Level::Failure, &["stiefel install"]);
    let built = |kernel: &str, classes: &str, wireguard: bool| {
        let part = |text: &str| {
            let digest: String = Sha256::digest(text).iter().map(|byte| format!("{byte:02x}")).collect();
            format!("{{\"bytes\": {}, \"sha256\": \"{digest}\"}}", text.len())
        };
        let manifest = format!(
            "{{\"stiefel_version\": \"{}\", \"kernel_version\": \"{kernel}\", \"kernel\": {}, \"ramdisk\": {}, \"unpacked_bytes\": 1,
             \"modules\": 1, \"wireguard\": {wireguard}, \"firmware\": 0, \"missing_firmware\": 0, \"classes\": [{classes}]}}",
            env!("CARGO_PKG_VERSION"),
            part("k"),
            part("r")
        );
        laptop.write("/var/lib/stiefel/kernel", "k");
        laptop.write("/var/lib/stiefel/ramdisk.cpio.zst", "r");
        laptop.write("/var/lib/stiefel/manifest", &manifest);
    };
    built("6.1.0-13-amd64", "\"default\"", true);
    is(&laptop, "ramdisk", Level::Ok, &["6.1.0-13-amd64"]);
    built("6.1.0-12-amd64", "\"default\"", true);
    is(
        &laptop,
        "ramdisk",
        Level::Warning,
        &["6.1.0-12-amd64", "6.1.0-13-amd64 runs"],
    );
    built("6.1.0-13-amd64", "\"nic\"", true);
    is(&laptop, "ramdisk", Level::Warning, &["[nic]"]);
    built("6.1.0-13-amd64", "\"default\"", false);
    is(&laptop, "ramdisk", Level::Failure, &["WireGuard"]);
    laptop.write("/var/lib/stiefel/kernel", "another");
    is(&laptop, "ramdisk", Level::Failure, &["not the file", "stiefel install"]);
}

#[test]
fn the_service_is_installed_enabled_and_runs_or_not() {
    let laptop = Fixture::debian_luks_lvm();
    is(
        &laptop,
        "service",
        Level::Failure,
        &["not installed", "stiefel install"],
    );
    let unit = "stiefel-autokexec.service";
    laptop.write(&format!("/etc/systemd/system/{unit}"), "");
    laptop.write("/run/systemd/system/x", "");
    is(&laptop, "service", Level::Failure, &["systemctl"]);
    laptop.link("/x", &format!("/etc/systemd/system/multi-user.target.wants/{unit}"));
    is(&laptop, "service", Level::Failure, &["does not run", "journalctl"]);
    laptop.write(&format!("/sys/fs/cgroup/system.slice/{unit}/cgroup.procs"), "812\n");
    is(&laptop, "service", Level::Ok, &["runs"]);
    laptop.remove("/run/systemd");
    is(&laptop, "service", Level::Warning, &["cannot be told"]);
}

#[test]
fn selinux_and_battery_are_looked_at() {
    let laptop = Fixture::fedora();
    is(&laptop, "selinux", Level::Warning, &["enforcing", "restorecon"]);
    laptop.write("/sys/fs/selinux/enforce", "0\n");
    is(&laptop, "selinux", Level::Ok, &["permissive"]);
    is(&Fixture::arch(), "selinux", Level::Ok, &[]);
    is(&laptop, "battery", Level::Ok, &["none"]);
    for (file, text) in [("type", "Battery\n"), ("capacity", "8\n"), ("status", "Discharging\n")] {
        laptop.write(&format!("/sys/class/power_supply/BAT0/{file}"), text);
    }
    is(&laptop, "battery", Level::Warning, &["8 %", "plug in"]);
    laptop.write("/sys/class/power_supply/BAT0/capacity", "80\n");
    is(&laptop, "battery", Level::Ok, &["80 %"]);
    laptop.write("/sys/class/power_supply/BAT0/charge_control_end_threshold", "60\n");
    configure(&laptop, "trigger: {battery: 70%}\n");
    is(&laptop, "battery", Level::Warning, &["60 %", "trigger.battery"]);
}

#[test]
fn what_is_served_is_told_or_why_nothing_is() {
    let laptop = Fixture::debian_luks_lvm();
    is(&laptop, "payload", Level::Ok, &["6.1.0-13-amd64"]);
    is(&laptop, "disk", Level::Ok, &["nvme0n1"]);
    laptop.remove("/boot/initrd.img-6.1.0-13-amd64");
    is(&laptop, "payload", Level::Failure, &["initrd"]);
    configure(&laptop, "boot: {disk: /dev/disk/by-id/none}\n");
    is(&laptop, "disk", Level::Failure, &["/dev/disk/by-id/none"]);
    let laptop = Fixture::arch();
    laptop.disk("sdb", "Other", 1000);
    for device in ["sda2", "sdb"] {
        laptop.write(&format!("/sys/fs/btrfs/1-2/devices/{device}/size"), "1\n");
    }
    is(
        &laptop,
        "disk",
        Level::Failure,
        &["2 disks", "sda (Crucial", "sdb (Other"],
    );
    let laptop = Fixture::new();
    laptop.mount("0:30", "/", "zfs", "rpool/ROOT/debian");
    is(&laptop, "disk", Level::Failure, &["zpool status -P rpool"]);
    let laptop = Fixture::debian_luks_lvm();
    laptop.write("/proc/cmdline", "root=UUID=1 rdinit=/stiefel/stiefel\n");
    is(&laptop, "disk", Level::Failure, &["runs from a link"]);
}

#[test]
fn firmware_that_cannot_be_looked_at_is_a_warning() {
    // The modules' files are missing, as in a cut-off install.
    is(
        &Fixture::debian_luks_lvm(),
        "firmware",
        Level::Warning,
        &["cannot be read", "apt install"],
    );
}

#[test]
fn a_folder_without_a_system_makes_no_check_panic() {
    let laptop = Fixture::new();
    let findings = all(&laptop);
    assert!(findings.iter().any(|finding| finding.level == Level::Failure));
    for finding in findings {
        assert_eq!(finding.next.is_some(), finding.level != Level::Ok, "{finding}");
        assert!(!finding.text.is_empty());
    }
}

#[test]
fn a_finding_is_one_line_and_its_remedy() {
    let finding = Finding::warning("x", "a\n  b", "do");
    assert_eq!(
        finding.to_string(),
        "warning  x            a; b\n                      next: do"
    );
    let json = serde_json::to_string(&Finding::ok("x", "y")).unwrap();
    assert_eq!(json, r#"{"check":"x","level":"ok","text":"y"}"#);
}

#[test]
fn what_is_put_into_a_command_stays_one_word() {
    assert_eq!(shell("a'b"), r"'a'\''b'");
    assert_eq!(pattern("/dev/x.y#"), r"\/dev\/x\.y\#");
}
