//! GRUB as distributions set it up.

use super::*;

const MACHINE: &str = "6a9857a393724b7a981ebb5b8495b9ea";

#[test]
fn ubuntus_default_has_what_its_functions_set() {
    let laptop = Laptop::running("6.8.0-45-generic");
    let text = include_str!("../../../../shared/tests/vectors/grub/ubuntu.cfg");
    laptop.file("/boot/grub/grub.cfg", &filled(text, "0", "/boot", ROOT_UUID));
    laptop.debian("/boot", "6.8.0-45-generic");
    let (kernel, _, found) = laptop.found();
    assert_eq!(kernel, "/boot/vmlinuz-6.8.0-45-generic");
    assert_eq!(
        found.cmdline,
        format!("root=UUID={ROOT_UUID} ro quiet splash vt.handoff=7")
    );
}

/// Fedora with a separate /boot: GRUB's blscfg.
fn fedora(env: &str) -> Laptop {
    let laptop = Laptop::running("6.5.6-300.fc39.x86_64");
    let text = include_str!("../../../../shared/tests/vectors/grub/fedora.cfg");
    laptop.file("/boot/grub2/grub.cfg", &filled(text, "", "", BOOT_UUID));
    laptop.file("/boot/grub2/grubenv", env);
    for release in ["6.5.6-300.fc39.x86_64", "6.5.10-200.fc39.x86_64"] {
        laptop.kernel(&format!("/boot/vmlinuz-{release}"), release);
        laptop.file(&format!("/boot/initramfs-{release}.img"), "initrd");
        laptop.modules(release);
        laptop.file(
            &format!("/boot/loader/entries/{MACHINE}-{release}.conf"),
            &format!(
                "title Fedora ({release})\nversion {release}\nlinux /vmlinuz-{release}\ninitrd /initramfs-{release}.img $tuned_initrd\n\
                 options $kernelopts $tuned_params\n"
            ),
        );
    }
    laptop.disk(ROOT_UUID, "sda3");
    laptop.disk(BOOT_UUID, "sda2");
    laptop.file(
        "/proc/self/mountinfo",
        "22 1 0:25 /root / rw - btrfs /dev/sda3 rw\n30 22 8:2 / /boot rw - ext4 /dev/sda2 rw\n",
    );
    laptop
}

#[test]
fn fedoras_newest_entry_is_the_default_until_one_is_saved() {
    let (kernel, initrds, found) = fedora("").found();
    assert_eq!(kernel, "/boot/vmlinuz-6.5.10-200.fc39.x86_64");
    assert_eq!(initrds, ["/boot/initramfs-6.5.10-200.fc39.x86_64.img"]);
    assert_eq!(
        found.cmdline,
        format!("root=UUID={ROOT_UUID} ro rootflags=subvol=root rhgb quiet")
    );
    let (kernel, _, found) = fedora(&format!(
        "saved_entry={MACHINE}-6.5.6-300.fc39.x86_64\nkernelopts=root=UUID=1 ro\ntuned_params=nohz=on\n"
    ))
    .found();
    assert_eq!(kernel, "/boot/vmlinuz-6.5.6-300.fc39.x86_64");
    assert_eq!(found.cmdline, "root=UUID=1 ro nohz=on");
    assert!(found.reason.contains("the saved entry in grubenv"), "{}", found.reason);
}

#[test]
fn archs_microcode_comes_before_the_initrd() {
    let laptop = Laptop::running("6.9.1-arch1-1");
    let text = include_str!("../../../../shared/tests/vectors/grub/arch.cfg");
    laptop.file("/boot/grub/grub.cfg", &filled(text, "0", "/@/boot", ROOT_UUID));
    laptop.kernel("/boot/vmlinuz-linux", "6.9.1-arch1-1");
    laptop.file("/boot/initramfs-linux.img", "initrd");
    laptop.file("/boot/intel-ucode.img", "microcode");
    laptop.disk(ROOT_UUID, "nvme0n1p2");
    laptop.file("/proc/self/mountinfo", "22 1 0:25 /@ / rw - btrfs /dev/nvme0n1p2 rw\n");
    let (kernel, initrds, found) = laptop.found();
    assert_eq!(kernel, "/boot/vmlinuz-linux");
    assert_eq!(initrds, ["/boot/intel-ucode.img", "/boot/initramfs-linux.img"]);
    assert_eq!(found.version, "6.9.1-arch1-1");
}

#[test]
fn suses_paths_count_from_the_default_subvolume_and_zfs_datasets_are_marked() {
    let menu = |path: &str| {
        format!(
            "search --fs-uuid --set=root {ROOT_UUID}\nmenuentry x {{ linux {path}/vmlinuz-6 root=UUID=1\ninitrd {path}/initrd-6 }}"
        )
    };
    for (folder, path, mounts) in [
        (
            "/boot/grub2",
            "/boot",
            "22 1 0:25 /@/.snapshots/1/snapshot / rw - btrfs /dev/sda2 rw\n",
        ),
        (
            "/boot/grub",
            "/BOOT/ubuntu_1@",
            "22 1 0:25 / / rw - zfs rpool/ROOT/ubuntu_1 rw\n23 22 0:26 / /boot rw - zfs bpool/BOOT/ubuntu_1 rw\n",
        ),
    ] {
        let laptop = Laptop::running("6");
        laptop.file(&format!("{folder}/grub.cfg"), &menu(path));
        laptop.kernel("/boot/vmlinuz-6", "6");
        laptop.file("/boot/initrd-6", "initrd");
        laptop.disk(ROOT_UUID, "sda2");
        laptop.file("/proc/self/mountinfo", mounts);
        let (kernel, _, found) = laptop.found();
        assert_eq!(kernel, "/boot/vmlinuz-6");
        assert!(found.reason.starts_with("\"x\" is"), "{}", found.reason);
    }
}

#[test]
fn nixos_has_its_modules_beside_its_first_program() {
    let laptop = Laptop::running("6.6.1");
    fs::remove_dir_all(laptop.dir.path().join("lib/modules")).unwrap();
    laptop.kernel("/boot/kernels/x-bzImage", "6.6.1");
    laptop.file("/boot/kernels/x-initrd", "initrd");
    laptop.file("/nix/store/x-system/kernel-modules/lib/modules/6.6.1/modules.dep", "");
    laptop.file(
        "/boot/grub/grub.cfg",
        "menuentry \"NixOS\" {\nlinux ($drive1)/kernels/x-bzImage init=/nix/store/x-system/init root=UUID=1\n\
         initrd ($drive1)/kernels/x-initrd\n}",
    );
    let found = laptop.find().unwrap();
    assert_eq!(
        laptop.inside(&found.modules),
        "/nix/store/x-system/kernel-modules/lib/modules/6.6.1"
    );
}

#[test]
fn a_hypervisor_is_no_payload() {
    let laptop = Laptop::running("6.1.0-18-amd64");
    laptop.debian("/boot", "6.1.0-18-amd64");
    laptop.file(
        "/boot/grub/grub.cfg",
        "menuentry 'Xen' { multiboot2 /boot/xen.gz\nmodule2 /boot/vmlinuz-6.1.0-18-amd64 root=UUID=1\n}",
    );
    let found = laptop.find().unwrap();
    assert!(found.reason.contains("multiboot2"), "{}", found.reason);
}
