//! systemd-boot, unified kernel images, kernels that the firmware starts.

use super::*;

const LOADER: &str = "4a67b082-0a4c-41cf-b6c7-440b29bb8c4f";
const GLOBAL: &str = "8be4df61-93ca-11d2-aa0d-00e098032b8c";
const RELEASE: &str = "6.9.1-arch1-1";

fn wide(text: &str) -> Vec<u8> {
    text.encode_utf16().chain([0]).flat_map(u16::to_le_bytes).collect()
}

impl Laptop {
    fn variable(&self, name: &str, space: &str, value: &[u8]) {
        let path = format!("/sys/firmware/efi/efivars/{name}-{space}");
        self.bytes(&path, &[&[6, 0, 0, 0], value].concat());
    }

    fn loader(&self, name: &str, value: &str) {
        self.variable(name, LOADER, &wide(value));
    }

    /// Arch with systemd-boot, its partition at `root`.
    fn arch(root: &str) -> Self {
        let laptop = Self::running(RELEASE);
        laptop.loader("LoaderInfo", "systemd-boot 256.1-1-arch");
        for package in ["linux", "linux-lts"] {
            let release = if package == "linux" { RELEASE } else { LTS };
            laptop.kernel(&format!("{root}/vmlinuz-{package}"), release);
            laptop.file(&format!("{root}/initramfs-{package}.img"), "initrd");
            laptop.modules(release);
            laptop.entry(root, &format!("arch-{package}.conf"), package, "");
        }
        laptop.file(&format!("{root}/amd-ucode.img"), "microcode");
        laptop
    }

    fn entry(&self, root: &str, file: &str, package: &str, more: &str) {
        self.file(
            &format!("{root}/loader/entries/{file}"),
            &format!(
                "title Arch ({package})\nlinux /vmlinuz-{package}\ninitrd /amd-ucode.img\ninitrd /initramfs-{package}.img\n\
                 options root=UUID={ROOT_UUID} rw x=\"a b\"\n{more}"
            ),
        );
    }

    fn image(&self, path: &str, sections: &[(&str, &[u8])]) {
        self.bytes(path, &program(sections));
    }

    fn uki(&self, path: &str, release: &str, cmdline: &str) {
        let kernel = kernel::tests::image(&format!("{release} x"));
        let osrel = format!("ID=arch\nPRETTY_NAME=\"Arch Linux\"\nVERSION_ID={release}\n");
        self.image(
            path,
            &[
                (".osrel", osrel.as_bytes()),
                (".uname", release.as_bytes()),
                (".cmdline", cmdline.as_bytes()),
                (".ucode", b"microcode"),
                (".initrd", b"initrd"),
                (".linux", &kernel),
            ],
        );
        self.modules(release);
    }

    /// The firmware's entry that was booted.
    fn boot_entry(&self, path: &str, arguments: &str) {
        let mut file = vec![4, 4, 0, 0];
        file.extend(wide(path));
        let length = u16::try_from(file.len()).unwrap();
        file[2..4].copy_from_slice(&length.to_le_bytes());
        file.extend([0x7f, 0xff, 4, 0]);
        let length = u16::try_from(file.len()).unwrap().to_le_bytes();
        let arguments = if arguments.is_empty() {
            Vec::new()
        } else {
            wide(arguments)
        };
        let option = [&[1, 0, 0, 0][..], &length, &wide("Arch"), &file, &arguments].concat();
        self.variable("Boot0003", GLOBAL, &option);
        self.variable("BootCurrent", GLOBAL, &[3, 0]);
    }
}

/// An EFI program of these sections.
fn program(sections: &[(&str, &[u8])]) -> Vec<u8> {
    let mut bytes = vec![0; 0x40 + 24 + sections.len() * 40];
    bytes[..2].copy_from_slice(b"MZ");
    bytes[0x3c] = 0x40;
    bytes[0x40..0x44].copy_from_slice(b"PE\0\0");
    bytes[0x46] = u8::try_from(sections.len()).unwrap();
    for (index, (name, data)) in sections.iter().enumerate() {
        let at = 0x40 + 24 + index * 40;
        let (len, offset) = (u32::try_from(data.len()).unwrap(), u32::try_from(bytes.len()).unwrap());
        bytes[at..at + name.len()].copy_from_slice(name.as_bytes());
        for (field, value) in [(8, len), (16, len), (20, offset)] {
            bytes[at + field..at + field + 4].copy_from_slice(&value.to_le_bytes());
        }
        bytes.extend_from_slice(data);
    }
    bytes
}

const LTS: &str = "6.6.30-1-lts";

#[test]
fn systemd_boots_first_entry_is_taken_with_all_its_initrds_wherever_its_partition_is() {
    for root in ["/efi", "/boot", "/boot/efi"] {
        let (kernel, initrds, found) = Laptop::arch(root).found();
        assert_eq!(kernel, format!("{root}/vmlinuz-linux"));
        assert_eq!(
            initrds,
            [format!("{root}/amd-ucode.img"), format!("{root}/initramfs-linux.img")]
        );
        assert_eq!(found.cmdline, format!("root=UUID={ROOT_UUID} rw x=\"a b\""));
        assert_eq!(found.version, RELEASE);
        assert!(
            found.reason.contains("the first entry of systemd-boot's menu"),
            "{}",
            found.reason
        );
    }
}

#[test]
fn the_wishes_of_loader_conf_and_the_firmwares_variables_count() {
    let laptop = Laptop::arch("/boot");
    let version = || laptop.find().unwrap().version;
    laptop.file("/boot/loader/loader.conf", "timeout 3\ndefault arch-linux-*\n");
    assert_eq!(version(), LTS);
    laptop.loader("LoaderEntryDefault", "Arch-Linux.conf");
    assert_eq!(version(), RELEASE);
    laptop.loader("LoaderEntryOneShot", "arch-linux-lts.conf");
    assert_eq!(version(), LTS);
    assert!(laptop.find().unwrap().reason.contains("LoaderEntryOneShot"));
}

#[test]
fn on_a_desktop_the_firmwares_variables_are_not_believed() {
    // As the desktop's firmware tells of itself: another boot loader, an entry of its own system, a wish for the next boot.
    let wishes = |laptop: &Laptop| {
        laptop.loader("LoaderEntryDefault", "arch-linux-lts.conf");
        laptop.loader("LoaderEntryOneShot", "arch-linux-lts.conf");
        laptop.loader("LoaderEntrySelected", "arch-linux-lts.conf");
        laptop.boot_entry("/EFI/Linux/stiefel.efi", "");
    };
    let at_home = Laptop::arch("/boot");
    wishes(&at_home);
    let found = at_home.find().unwrap();
    assert_eq!(found.version, LTS);
    assert!(
        !found.notes.iter().any(|note| note.contains("desktop")),
        "{:?}",
        found.notes
    );

    for loader in ["systemd-boot 256", "rEFInd 0.14", "GRUB 2.12"] {
        let desktop = Laptop::arch("/boot");
        wishes(&desktop);
        desktop.loader("LoaderInfo", loader);
        desktop.file(
            "/proc/cmdline",
            &format!("root=UUID={ROOT_UUID} rw rdinit=/stiefel/stiefel noresume\n"),
        );
        let found = desktop.find().unwrap();
        assert_eq!(found.version, RELEASE, "{loader}: {}", found.reason);
        assert!(
            found.reason.contains("the first entry of systemd-boot's menu"),
            "{loader}: {}",
            found.reason
        );
        assert!(found.notes.iter().any(|note| note.contains("runs on a desktop")));
        // What lies on the laptop's own disk counts.
        desktop.file("/boot/loader/loader.conf", "default arch-linux-lts.conf\n");
        assert_eq!(desktop.find().unwrap().version, LTS, "{loader}");
    }
}

#[test]
fn a_root_on_a_device_of_the_link_is_a_desktop_too() {
    let desktop = Laptop::arch("/boot");
    desktop.loader("LoaderEntryDefault", "arch-linux-lts.conf");
    desktop.file(
        "/proc/self/mountinfo",
        "22 1 43:1 / / rw - ext4 /dev/nbd0p1 rw\n23 22 43:2 / /boot rw - vfat /dev/nbd0p2 rw\n",
    );
    desktop.file("/sys/class/block/nbd0/nbd0p1/partition", "1\n");
    fs::create_dir_all(desktop.dir.path().join("dev")).unwrap();
    desktop.file("/dev/nbd0p1", "");
    desktop.link("nbd0/nbd0p1", "/sys/class/block/nbd0p1");
    let found = desktop.find().unwrap();
    assert_eq!(found.version, RELEASE, "{}", found.reason);
}

#[test]
fn the_saved_entry_and_counters_are_honoured() {
    let laptop = Laptop::arch("/boot");
    laptop.file("/boot/loader/loader.conf", "default @saved\n");
    laptop.loader("LoaderEntryLastBooted", "arch-linux-lts.conf");
    assert_eq!(laptop.find().unwrap().version, LTS);
    let laptop = Laptop::arch("/boot");
    let entries = laptop.dir.path().join("boot/loader/entries");
    fs::rename(entries.join("arch-linux.conf"), entries.join("arch-linux+0-3.conf")).unwrap();
    assert_eq!(laptop.find().unwrap().version, LTS, "no tries are left");
}

#[test]
fn another_system_as_the_default_gives_way_to_what_was_booted() {
    let laptop = Laptop::arch("/boot");
    laptop.file("/boot/loader/loader.conf", "default auto-windows\n");
    laptop.loader("LoaderEntrySelected", "arch-linux-lts.conf");
    let found = laptop.find().unwrap();
    assert_eq!(found.version, LTS);
    assert!(
        found.reason.contains("was booted this time") && found.reason.contains("auto-windows"),
        "{}",
        found.reason
    );
}

#[test]
fn entries_for_other_machines_or_without_files_are_not_listed() {
    let laptop = Laptop::arch("/boot");
    laptop.entry("/boot", "z.conf", "linux", "architecture aa64\n");
    laptop.entry("/boot", "y.conf", "gone", "");
    assert_eq!(laptop.find().unwrap().version, RELEASE);
}

#[test]
fn entries_on_both_partitions_are_one_menu() {
    let laptop = Laptop::arch("/efi");
    laptop.kernel("/boot/vmlinuz-zen", "6.10.0-zen");
    laptop.file("/boot/amd-ucode.img", "x");
    laptop.file("/boot/initramfs-zen.img", "x");
    laptop.modules("6.10.0-zen");
    laptop.entry("/boot", "zen.conf", "zen", "");
    let (kernel, _, _) = laptop.found();
    assert_eq!(kernel, "/boot/vmlinuz-zen");
}

#[test]
fn a_unified_image_is_taken_apart() {
    let laptop = Laptop::running("6.9.0-old");
    laptop.loader("LoaderInfo", "systemd-boot 256");
    laptop.uki("/efi/EFI/Linux/arch-old.efi", "6.9.0-old", "root=UUID=1 old");
    laptop.uki("/efi/EFI/Linux/arch-new+3.efi", RELEASE, "root=UUID=1 rw quiet\n");
    let (kernel, initrds, found) = laptop.found();
    assert_eq!(kernel, "/efi/EFI/Linux/arch-new+3.efi.linux");
    assert_eq!(
        initrds,
        [
            "/efi/EFI/Linux/arch-new+3.efi.ucode",
            "/efi/EFI/Linux/arch-new+3.efi.initrd"
        ]
    );
    assert_eq!(
        (found.cmdline.as_str(), found.version.as_str()),
        ("root=UUID=1 rw quiet", RELEASE)
    );
    assert!(
        found.reason.contains("\"Arch Linux\" (arch-new+3.efi)"),
        "{}",
        found.reason
    );
    assert!(serde_json::to_string(&found).unwrap().contains("\"name\":\".linux\""));
    assert!(found.to_string().contains("arch-new+3.efi section .initrd"), "{found}");
    // The one that was chosen in the menu.
    laptop.file("/efi/loader/loader.conf", "default auto-osx\n");
    laptop.loader("LoaderEntrySelected", "arch-old.efi");
    assert_eq!(laptop.find().unwrap().version, "6.9.0-old");
}

#[test]
fn addons_are_added_and_named_and_the_rest_is_told() {
    let laptop = Laptop::running(RELEASE);
    laptop.loader("LoaderInfo", "systemd-boot 256");
    laptop.uki("/efi/EFI/Linux/arch+3.efi", RELEASE, "root=UUID=1");
    laptop.image(
        "/efi/EFI/Linux/arch.efi.extra.d/debug.addon.efi",
        &[(".cmdline", b"debug x=1")],
    );
    laptop.file("/efi/EFI/Linux/arch.efi.extra.d/secret.cred", "x");
    laptop.image(
        "/efi/loader/addons/all.addon.efi",
        &[(".cmdline", b"all"), (".initrd", b"x")],
    );
    laptop.file("/efi/loader/addons/broken.addon.efi", "x");
    let found = laptop.find().unwrap();
    assert_eq!(found.cmdline, "root=UUID=1 debug x=1 all");
    let notes = found.notes.join("\n");
    for told in [
        "debug.addon.efi adds",
        "secret.cred is left out",
        "section .initrd",
        "broken.addon.efi is left out",
    ] {
        assert!(notes.contains(told), "{notes}");
    }
}

#[test]
fn an_image_that_the_firmware_starts_is_found_by_its_entry() {
    let laptop = Laptop::running(RELEASE);
    laptop.uki("/efi/EFI/Linux/arch.efi", RELEASE, "root=UUID=1 own");
    laptop.boot_entry("\\EFI\\Linux\\arch.efi", "");
    let (kernel, _, found) = laptop.found();
    assert_eq!(
        (kernel.as_str(), found.cmdline.as_str()),
        ("/efi/EFI/Linux/arch.efi.linux", "root=UUID=1 own")
    );
    assert!(found.reason.contains("the firmware starts it"), "{}", found.reason);
    laptop.boot_entry("\\EFI\\Linux\\arch.efi", "root=UUID=2 given");
    assert_eq!(laptop.find().unwrap().cmdline, "root=UUID=2 given");
    laptop.variable("SecureBoot", GLOBAL, &[1]);
    assert_eq!(laptop.find().unwrap().cmdline, "root=UUID=1 own");
    laptop.boot_entry("\\EFI\\..\\..\\etc\\passwd", "");
    let text = laptop.find().unwrap_err().to_string();
    assert!(text.contains("on no partition that is mounted"), "{text}");
}

#[test]
fn a_kernel_that_the_firmware_starts_has_its_initrds_as_words() {
    let laptop = Laptop::running(RELEASE);
    laptop.kernel("/boot/vmlinuz-linux", RELEASE);
    laptop.file("/boot/initramfs-linux.img", "initrd");
    laptop.file("/boot/amd-ucode.img", "x");
    laptop.boot_entry(
        "\\vmlinuz-linux",
        "root=UUID=1 initrd=\\amd-ucode.img initrd=\\initramfs-linux.img rw",
    );
    let (kernel, initrds, found) = laptop.found();
    assert_eq!(kernel, "/boot/vmlinuz-linux");
    assert_eq!(initrds, ["/boot/amd-ucode.img", "/boot/initramfs-linux.img"]);
    assert_eq!(found.cmdline, "root=UUID=1 rw");
}

#[test]
fn images_behind_other_loaders_entries_are_known() {
    // GRUB that chain-loads an image; systemd-boot with `efi` and options.
    let laptop = Laptop::running(RELEASE);
    laptop.uki("/boot/efi/EFI/Linux/arch.efi", RELEASE, "root=UUID=1");
    laptop.file(
        "/boot/grub/grub.cfg",
        "menuentry x { search --fs-uuid --set=root 1-2\nchainloader /EFI/Linux/arch.efi }",
    );
    assert_eq!(laptop.found().0, "/boot/efi/EFI/Linux/arch.efi.linux");
    fs::remove_dir_all(laptop.dir.path().join("boot/grub")).unwrap();
    fs::rename(
        laptop.dir.path().join("boot/efi/EFI/Linux/arch.efi"),
        laptop.dir.path().join("boot/efi/EFI/x.efi"),
    )
    .unwrap();
    laptop.file(
        "/boot/efi/loader/entries/x.conf",
        "efi \\EFI\\x.efi\noptions root=UUID=5\n",
    );
    let (kernel, _, found) = laptop.found();
    assert_eq!(
        (kernel.as_str(), found.cmdline.as_str()),
        ("/boot/efi/EFI/x.efi.linux", "root=UUID=5")
    );
}

#[test]
fn a_broken_image_is_passed_over() {
    let laptop = Laptop::arch("/boot");
    laptop.file("/boot/EFI/Linux/zzz.efi", "MZ broken");
    laptop.image("/boot/EFI/Linux/yyy.efi", &[(".text", b"no kernel")]);
    assert_eq!(laptop.find().unwrap().version, RELEASE);
}

#[test]
fn an_image_without_modules_or_initrd_is_refused_by_name() {
    let laptop = Laptop::running(RELEASE);
    let kernel = kernel::tests::image("6.0.0 x");
    laptop.image(
        "/efi/EFI/Linux/a.efi",
        &[(".cmdline", b"root=UUID=1"), (".linux", &kernel)],
    );
    assert!(matches!(laptop.find(), Err(PayloadError::NoInitrd { .. })));
    laptop.image(
        "/efi/EFI/Linux/a.efi",
        &[(".cmdline", b"root=UUID=1"), (".initrd", b"x"), (".linux", &kernel)],
    );
    let error = laptop.find().unwrap_err();
    assert!(
        matches!(&error, PayloadError::NoModules { version, .. } if version == "6.0.0"),
        "{error}"
    );
}

#[test]
fn an_unknown_boot_loader_is_named() {
    let laptop = Laptop::arch("/boot");
    laptop.loader("LoaderInfo", "rEFInd 0.14.2");
    laptop.file("/usr/lib/modules/6.9.1-arch1-1/pkgbase", "linux\n");
    let found = laptop.find().unwrap();
    assert_eq!(found.version, RELEASE);
    assert!(found.reason.contains("rEFInd"), "{}", found.reason);
}
