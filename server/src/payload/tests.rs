//! Tests of finding the payload, on small file trees shaped like real ones.

use std::fs;
use std::os::unix::fs::symlink;

use stiefel_shared::config::{Auto, OneOrMany, Words};
use stiefel_shared::loader::cmdline::CmdlineError;

use super::*;

mod distributions;
mod efi;
mod roots;

const ROOT_UUID: &str = "0a3407de-014b-458b-b5c1-848e92a327a3";
const BOOT_UUID: &str = "77d3b1fe-2b3c-4f5a-8f3f-0d9a2a1c9a10";

/// A laptop's file tree.
struct Laptop {
    dir: tempfile::TempDir,
}

impl Laptop {
    /// One that runs `release`.
    fn running(release: &str) -> Self {
        let laptop = Self {
            dir: tempfile::tempdir().unwrap(),
        };
        laptop.file("/proc/sys/kernel/osrelease", &format!("{release}\n"));
        laptop.file(
            "/proc/cmdline",
            &format!("BOOT_IMAGE=/vmlinuz-{release} root=UUID={ROOT_UUID} ro quiet\n"),
        );
        laptop.modules(release);
        laptop
    }

    fn bytes(&self, path: &str, bytes: &[u8]) {
        let path = self.dir.path().join(path.trim_start_matches('/'));
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }

    fn file(&self, path: &str, text: &str) {
        self.bytes(path, text.as_bytes());
    }

    fn kernel(&self, path: &str, release: &str) {
        self.bytes(path, &kernel::tests::image(&format!("{release} (builder) #1")));
    }

    fn modules(&self, release: &str) {
        self.file(&format!("/lib/modules/{release}/modules.dep"), "");
    }

    /// A kernel with initrd and modules by Debian's names.
    fn debian(&self, folder: &str, release: &str) {
        self.kernel(&format!("{folder}/vmlinuz-{release}"), release);
        self.file(&format!("{folder}/initrd.img-{release}"), "initrd");
        self.modules(release);
    }

    /// A partition: known by UUID, and mounted.
    fn disk(&self, uuid: &str, device: &str) {
        let folder = self.dir.path().join("dev/disk/by-uuid");
        fs::create_dir_all(&folder).unwrap();
        fs::write(self.dir.path().join("dev").join(device), "").unwrap();
        symlink(format!("../../{device}"), folder.join(uuid)).unwrap();
    }

    fn find(&self) -> Result<FoundPayload, PayloadError> {
        self.find_with(&Load::default())
    }

    fn find_with(&self, load: &Load) -> Result<FoundPayload, PayloadError> {
        find(self.dir.path(), load)
    }

    fn inside(&self, path: &Path) -> String {
        format!("/{}", path.strip_prefix(self.dir.path()).unwrap().display())
    }

    fn link(&self, target: &str, path: &str) {
        let path = self.dir.path().join(path.trim_start_matches('/'));
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        symlink(target, path).unwrap();
    }

    /// Kernel and initrds of what is found, with their sections.
    fn found(&self) -> (String, Vec<String>, FoundPayload) {
        let found = self.find().unwrap();
        let name = |piece: &Piece| match &piece.section {
            None => self.inside(&piece.path),
            Some(section) => format!("{}{}", self.inside(&piece.path), section.name),
        };
        (name(&found.kernel), found.initrds.iter().map(name).collect(), found)
    }
}

/// One of the configurations in shared/tests/vectors/grub, with its blanks filled in.
fn filled(text: &str, default: &str, prefix: &str, uuid: &str) -> String {
    text.replace("@DEFAULT@", default)
        .replace("@BOOT@", prefix)
        .replace("@UUID@", uuid)
}

/// What Debian's grub-mkconfig writes; `prefix` is /boot as GRUB sees it.
fn debian_grub(default: &str, prefix: &str, uuid: &str) -> String {
    let text = include_str!("../../../shared/tests/vectors/grub/debian.cfg");
    filled(text, default, prefix, uuid)
}

#[test]
fn debian_boots_grubs_default_even_if_it_is_newer_than_what_runs() {
    let laptop = Laptop::running("6.1.0-17-amd64");
    laptop.file("/boot/grub/grub.cfg", &debian_grub("0", "/boot", ROOT_UUID));
    laptop.debian("/boot", "6.1.0-18-amd64");
    laptop.disk(ROOT_UUID, "sda2");
    laptop.file("/proc/self/mountinfo", "22 1 8:2 / / rw - ext4 /dev/sda2 rw\n");
    let found = laptop.find().unwrap();
    assert_eq!(laptop.inside(&found.kernel.path), "/boot/vmlinuz-6.1.0-18-amd64");
    assert_eq!(found.version, "6.1.0-18-amd64");
    assert_eq!(laptop.inside(&found.modules), "/lib/modules/6.1.0-18-amd64");
    assert_eq!(found.cmdline, format!("root=UUID={ROOT_UUID} ro quiet"));
    assert_eq!(found.reason, "\"Debian GNU/Linux\" is the default entry of grub.cfg");
    assert!(
        serde_json::to_string(&found)
            .unwrap()
            .contains("\"version\":\"6.1.0-18-amd64\"")
    );
    assert!(found.to_string().starts_with("kernel   "));
}

#[test]
fn a_separate_boot_is_found_where_it_is_mounted() {
    let laptop = Laptop::running("6.1.0-18-amd64");
    laptop.file("/boot/grub/grub.cfg", &debian_grub("0", "", BOOT_UUID));
    laptop.debian("/boot", "6.1.0-18-amd64");
    // Same names on the root file system must not be taken for it.
    laptop.file("/vmlinuz-6.1.0-18-amd64", "old");
    laptop.disk(ROOT_UUID, "dm-0");
    laptop.disk(BOOT_UUID, "sda2");
    laptop.file(
        "/proc/self/mountinfo",
        "22 1 253:0 / / rw - ext4 /dev/dm-0 rw\n30 22 8:2 / /boot rw shared:5 - ext4 /dev/sda2 rw\n",
    );
    assert_eq!(
        laptop.inside(&laptop.find().unwrap().kernel.path),
        "/boot/vmlinuz-6.1.0-18-amd64"
    );
}

#[test]
fn a_btrfs_subvolume_is_taken_off_the_path() {
    let laptop = Laptop::running("6.1.0-18-amd64");
    laptop.file("/boot/grub/grub.cfg", &debian_grub("0", "/@rootfs/boot", ROOT_UUID));
    laptop.debian("/boot", "6.1.0-18-amd64");
    laptop.disk(ROOT_UUID, "sda2");
    laptop.file(
        "/proc/self/mountinfo",
        "22 1 0:25 /@rootfs / rw - btrfs /dev/sda2 rw,subvol=/@rootfs\n31 22 0:25 /@home /home rw - btrfs /dev/sda2 rw\n",
    );
    let found = laptop.find().unwrap();
    assert_eq!(laptop.inside(&found.kernel.path), "/boot/vmlinuz-6.1.0-18-amd64");
    assert_eq!(laptop.inside(&found.initrds[0].path), "/boot/initrd.img-6.1.0-18-amd64");
}

#[test]
fn what_is_no_payload_gives_way_to_the_running_kernel_and_says_why() {
    for (default, why) in [
        ("osprober-efi-1", "another boot loader"),
        ("uefi-firmware", "fwsetup"),
        ("2", "memory test"),
        ("1>2", "which is not there"),
        ("0", "not mounted"),
    ] {
        let laptop = Laptop::running("6.1.0-17-amd64");
        let uuid = if default == "0" { BOOT_UUID } else { ROOT_UUID };
        laptop.file("/boot/grub/grub.cfg", &debian_grub(default, "/boot", uuid));
        laptop.file("/sys/firmware/efi/runtime", "");
        laptop.debian("/boot", "6.1.0-17-amd64");
        if default == "1>2" {
            fs::rename(
                laptop.dir.path().join("boot/initrd.img-6.1.0-17-amd64"),
                laptop.dir.path().join("boot/initramfs-6.1.0-17-amd64.img"),
            )
            .unwrap();
        }
        laptop.disk(ROOT_UUID, "sda2");
        laptop.file("/proc/self/mountinfo", "22 1 8:2 / / rw - ext4 /dev/sda2 rw\n");
        let found = laptop.find().unwrap();
        assert_eq!(found.version, "6.1.0-17-amd64", "{default}");
        assert!(
            found.reason.starts_with("it runs now") && found.reason.contains(why),
            "{}",
            found.reason
        );
        assert_eq!(found.cmdline, format!("root=UUID={ROOT_UUID} ro quiet"));
    }
}

#[test]
fn a_memory_test_is_no_payload_even_if_its_file_is_there() {
    let laptop = Laptop::running("6.1.0-17-amd64");
    laptop.file("/boot/grub/grub.cfg", &debian_grub("2", "/boot", ROOT_UUID));
    laptop.file("/boot/memtest86+x64.bin", "test");
    laptop.debian("/boot", "6.1.0-17-amd64");
    assert_eq!(laptop.find().unwrap().version, "6.1.0-17-amd64");
}

#[test]
fn without_a_boot_loader_the_running_kernel_is_found_by_its_distributions_names() {
    for (kernel, initrd) in [
        ("/boot/vmlinuz-6.9.1", "/boot/initrd.img-6.9.1"),
        ("/boot/vmlinuz-6.9.1", "/boot/initramfs-6.9.1.img"),
        ("/boot/vmlinuz-linux-lts", "/boot/initramfs-linux-lts.img"),
        ("/boot/kernel-6.9.1", "/boot/initramfs-6.9.1.img"),
        ("/usr/lib/modules/6.9.1/vmlinuz", "/boot/initramfs-6.9.1.img"),
        (
            "/boot/kernel-genkernel-x86_64-6.9.1",
            "/boot/initramfs-genkernel-x86_64-6.9.1.img",
        ),
        ("/boot/kernel-6.9.1", "/boot/initramfs-6.9.1"),
        (
            "/efi/0123456789abcdef/6.9.1/linux",
            "/efi/0123456789abcdef/6.9.1/initrd",
        ),
        ("/boot/gentoo/6.9.1/linux", "/boot/gentoo/6.9.1/initrd"),
    ] {
        let laptop = Laptop::running("6.9.1");
        laptop.file("/etc/machine-id", "0123456789abcdef\n");
        laptop.file("/etc/kernel/entry-token", "gentoo\n");
        laptop.kernel(kernel, "6.9.1");
        laptop.file(initrd, "initrd");
        laptop.file("/usr/lib/modules/6.9.1/pkgbase", "linux-lts\n");
        let found = laptop.find().unwrap();
        assert_eq!(
            (
                laptop.inside(&found.kernel.path).as_str(),
                laptop.inside(&found.initrds[0].path).as_str()
            ),
            (kernel, initrd)
        );
    }
}

#[test]
fn an_upgraded_kernel_under_the_running_ones_name_is_not_taken_for_it() {
    let laptop = Laptop::running("6.9.1-arch1-1");
    laptop.file("/usr/lib/modules/6.9.1-arch1-1/pkgbase", "linux\n");
    laptop.kernel("/boot/vmlinuz-linux", "6.9.2-arch1-1");
    laptop.file("/boot/initramfs-linux.img", "initrd");
    let error = laptop.find().unwrap_err();
    assert!(matches!(error, PayloadError::Nothing { .. }));
    assert!(error.to_string().contains("reboot first"));
}

#[test]
fn a_rescue_entry_is_refused() {
    let laptop = Laptop::running("6.1.0-18-amd64");
    laptop.file("/boot/grub/grub.cfg", &debian_grub("1>1", "/boot", ROOT_UUID));
    laptop.debian("/boot", "6.1.0-18-amd64");
    assert!(matches!(
        laptop.find(),
        Err(PayloadError::Cmdline(CmdlineError::Rescue { .. }))
    ));
}

#[test]
fn missing_modules_initrd_and_release_are_refused_by_name() {
    let laptop = Laptop::running("6.1.0-18-amd64");
    laptop.kernel("/boot/vmlinuz-6.1.0-18-amd64", "6.1.0-18-amd64");
    assert!(matches!(laptop.find(), Err(PayloadError::NoInitrd { .. })));
    laptop.file("/boot/initrd.img-6.1.0-18-amd64", "initrd");
    fs::remove_file(laptop.dir.path().join("lib/modules/6.1.0-18-amd64/modules.dep")).unwrap();
    assert!(laptop.find().unwrap_err().to_string().contains("6.1.0-18-amd64"));
    laptop.kernel("/boot/mine", "../no release");
    let load = Load {
        kernel: Auto::Given("/boot/mine".into()),
        initrd: Auto::Given(OneOrMany(vec!["/boot/initrd.img-6.1.0-18-amd64".into()])),
        ..Load::default()
    };
    assert!(matches!(laptop.find_with(&load), Err(PayloadError::NoRelease { .. })));
}

#[test]
fn the_configuration_goes_before_everything() {
    let laptop = Laptop::running("6.1.0-17-amd64");
    laptop.file("/boot/grub/grub.cfg", &debian_grub("0", "/boot", ROOT_UUID));
    laptop.debian("/boot", "6.1.0-18-amd64");
    laptop.debian("/boot", "6.1.0-17-amd64");
    laptop.file("/boot/ucode.img", "microcode");
    let words = |text: &str| Words(vec![text.to_owned()]);
    let mut load = Load {
        kernel: Auto::Given("/boot/vmlinuz-6.1.0-17-amd64".into()),
        append: words("x=1"),
        ..Load::default()
    };
    let found = laptop.find_with(&load).unwrap();
    assert_eq!(laptop.inside(&found.initrds[0].path), "/boot/initrd.img-6.1.0-17-amd64");
    assert_eq!(found.cmdline, format!("root=UUID={ROOT_UUID} ro quiet x=1"));
    load.kernel = Auto::Auto;
    load.cmdline = Auto::Given(words("root=LABEL=root rw"));
    load.initrd = Auto::Given(OneOrMany(vec![
        "/boot/ucode.img".into(),
        "/boot/initrd.img-6.1.0-18-amd64".into(),
    ]));
    let found = laptop.find_with(&load).unwrap();
    assert_eq!((found.version.as_str(), found.initrds.len()), ("6.1.0-18-amd64", 2));
    assert_eq!(found.cmdline, "root=LABEL=root rw x=1");
    assert!(
        found
            .reason
            .ends_with("boot.load.initrd and boot.load.cmdline from the configuration")
    );
}

#[test]
fn a_configured_file_that_is_missing_names_its_option() {
    let laptop = Laptop::running("6.1.0-18-amd64");
    laptop.debian("/boot", "6.1.0-18-amd64");
    let load = Load {
        kernel: Auto::Given("/boot/nothing".into()),
        initrd: Auto::Given(OneOrMany(vec!["/boot/x".into()])),
        ..Load::default()
    };
    let text = laptop.find_with(&load).unwrap_err().to_string();
    assert!(
        text.contains("/boot/nothing") && text.contains("boot.load.kernel"),
        "{text}"
    );
}

#[test]
fn a_root_by_device_name_is_translated_by_the_uuid_that_udev_knows() {
    let laptop = Laptop::running("6.1.0-18-amd64");
    laptop.debian("/boot", "6.1.0-18-amd64");
    laptop.file("/proc/cmdline", "root=/dev/vda1 ro");
    assert!(matches!(
        laptop.find(),
        Err(PayloadError::Cmdline(CmdlineError::DeviceName { .. }))
    ));
    laptop.disk(ROOT_UUID, "vda1");
    assert_eq!(laptop.find().unwrap().cmdline, format!("root=UUID={ROOT_UUID} ro"));
}

#[test]
fn other_kernel_formats_are_refused_by_their_names() {
    for (head, what) in [
        (&b"\x1f\x8b\x08"[..], "gzip"),
        (b"MZ\0\0zimg", "zboot"),
        (b"\x7fELF", "vmlinux"),
        (b"no header", "no kernel image"),
    ] {
        let laptop = Laptop::running("6.1.0-18-amd64");
        laptop.bytes("/boot/vmlinuz-6.1.0-18-amd64", head);
        laptop.file("/boot/initrd.img-6.1.0-18-amd64", "initrd");
        let error = laptop.find().unwrap_err();
        assert!(matches!(&error, PayloadError::Format { .. }), "{error}");
        assert!(error.to_string().contains(what), "{error}");
    }
}

#[test]
fn an_empty_boot_and_dangling_links_are_told_by_name() {
    let laptop = Laptop::running("6.1.0-18-amd64");
    fs::create_dir_all(laptop.dir.path().join("boot")).unwrap();
    let text = laptop.find().unwrap_err().to_string();
    assert!(
        text.contains("no GRUB configuration") && text.contains("/boot is mounted"),
        "{text}"
    );

    laptop.debian("/boot", "6.1.0-18-amd64");
    fs::remove_file(laptop.dir.path().join("boot/initrd.img-6.1.0-18-amd64")).unwrap();
    laptop.link("nothing", "/boot/initrd.img-6.1.0-18-amd64");
    laptop.file("/boot/grub/grub.cfg", &debian_grub("0", "/boot", ROOT_UUID));
    assert!(matches!(laptop.find(), Err(PayloadError::NoInitrd { .. })));
    let load = Load {
        initrd: Auto::Given(OneOrMany(vec!["/boot/initrd.img-6.1.0-18-amd64".into()])),
        ..Load::default()
    };
    let error = laptop.find_with(&load).unwrap_err();
    assert!(matches!(error, PayloadError::File { what: "initrd", .. }), "{error}");
}

#[test]
fn links_are_followed_inside_of_the_tree_and_never_out_of_it() {
    let laptop = Laptop::running("6.1.0-18-amd64");
    laptop.debian("/boot", "6.1.0-18-amd64");
    laptop.link("/boot/vmlinuz-6.1.0-18-amd64", "/vmlinuz");
    laptop.link("boot/initrd.img-6.1.0-18-amd64", "/initrd.img");
    let menu = |kernel: &str| format!("menuentry x {{ linux {kernel} root=UUID=1\ninitrd /initrd.img }}");
    laptop.file("/boot/grub/grub.cfg", &menu("/vmlinuz"));
    let (kernel, initrds, _) = laptop.found();
    assert_eq!(kernel, "/boot/vmlinuz-6.1.0-18-amd64");
    assert_eq!(initrds, ["/boot/initrd.img-6.1.0-18-amd64"]);

    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("vmlinuz"), kernel::tests::image("6.1.0-18-amd64 x")).unwrap();
    laptop.link(outside.path().join("vmlinuz").to_str().unwrap(), "/boot/outside");
    for path in [
        "/outside",
        "/../boot/vmlinuz-6.1.0-18-amd64",
        "/x/../../boot/vmlinuz-6.1.0-18-amd64",
    ] {
        laptop.file("/boot/grub/grub.cfg", &menu(path));
        let found = laptop.find().unwrap();
        assert!(found.reason.starts_with("it runs now"), "{path}: {}", found.reason);
    }
}
