//! Small laptops for tests: a folder that looks like a machine's file tree.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use crate::tree::Tree;

/// A laptop's file tree.
pub struct Fixture(tempfile::TempDir);

/// vendor, product, serial
type Usb<'a> = (&'a str, &'a str, Option<&'a str>);

impl Fixture {
    pub fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub fn root(&self) -> &Path {
        self.0.path()
    }

    pub fn tree(&self) -> Tree {
        Tree::new(self.root())
    }

    pub fn write(&self, path: &str, text: &str) {
        self.write_bytes(path, text.as_bytes());
    }

    pub fn write_bytes(&self, path: &str, bytes: &[u8]) {
        let path = self.tree().path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }

    pub fn link(&self, target: &str, path: &str) {
        let path = self.tree().path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let _ = fs::remove_file(&path);
        symlink(target, path).unwrap();
    }

    pub fn remove(&self, path: &str) {
        let path = self.tree().path(path);
        if path.is_dir() {
            fs::remove_dir_all(path).unwrap();
        } else {
            fs::remove_file(path).unwrap();
        }
    }

    /// A whole disk of `sectors` sectors.
    pub fn disk(&self, name: &str, model: &str, sectors: u64) {
        let number = name.bytes().map(u32::from).sum::<u32>();
        let folder = format!("/sys/devices/pci/{name}");
        for (file, text) in [
            ("dev", format!("259:{number}\n")),
            ("size", format!("{sectors}\n")),
            ("device/model", format!("{model}\n")),
        ] {
            self.write(&format!("{folder}/{file}"), &text);
        }
        self.link(
            &format!("../../devices/pci/{name}"),
            &format!("/sys/class/block/{name}"),
        );
        self.link(&format!("../devices/pci/{name}"), &format!("/sys/block/{name}"));
    }

    /// A partition of a disk, with what is on it.
    pub fn partition(&self, disk: &str, name: &str, uuid: &str) {
        self.write(&format!("/sys/devices/pci/{disk}/{name}/partition"), "1\n");
        self.link(
            &format!("../../devices/pci/{disk}/{name}"),
            &format!("/sys/class/block/{name}"),
        );
        self.write(&format!("/dev/{name}"), "");
        self.link(&format!("../../{name}"), &format!("/dev/disk/by-uuid/{uuid}"));
    }

    /// A device-mapper volume on another device.
    pub fn volume(&self, name: &str, on: &str, uuid: &str, label: &str) {
        let folder = format!("/sys/class/block/{name}");
        self.write(&format!("{folder}/dm/uuid"), &format!("{uuid}\n"));
        self.write(&format!("{folder}/dm/name"), &format!("{label}\n"));
        self.write(&format!("{folder}/slaves/{on}/x"), "");
        self.link(&format!("../{name}"), &format!("/dev/mapper/{label}"));
    }

    /// Adds a mount; `device` is the number, or a name where the number leads nowhere.
    pub fn mount(&self, device: &str, point: &str, kind: &str, source: &str) {
        let path = "/proc/self/mountinfo";
        let device = if device.contains(':') { device } else { "0:99" };
        let before = self.tree().text(path).unwrap_or_default();
        self.write(
            path,
            &format!("{before}22 1 {device} / {point} rw,relatime shared:1 - {kind} {source} rw\n"),
        );
    }

    pub fn efi(&self, variable: &str, value: &[u8]) {
        let bytes = [&[6, 0, 0, 0], value].concat();
        self.write_bytes(&format!("/sys/firmware/efi/efivars/{variable}"), &bytes);
    }

    /// A wired network adapter, in place of one of the same name.
    pub fn nic(&self, name: &str, driver: &str, usb: Option<Usb<'_>>) {
        let bus = if usb.is_some() { "usb" } else { "pci" };
        let device = format!("/sys/devices/{bus}/{name}");
        if let Some((vendor, product, serial)) = usb {
            self.write(&format!("{device}/idVendor"), &format!("{vendor}\n"));
            self.write(&format!("{device}/idProduct"), &format!("{product}\n"));
            self.write(&format!("{device}/manufacturer"), "Realtek\n");
            self.write(&format!("{device}/product"), "USB 10/100/1000 LAN\n");
            if let Some(serial) = serial {
                self.write(&format!("{device}/serial"), &format!("{serial}\n"));
            }
        }
        let number = name
            .bytes()
            .rev()
            .find(u8::is_ascii_digit)
            .map_or(0, |digit| digit - b'0');
        let folder = format!("{device}/1:1.0/net/{name}");
        for (file, text) in [
            ("type", "1\n".to_owned()),
            ("address", format!("02:00:00:00:00:{:02x}\n", number + 1)),
            ("addr_assign_type", "0\n".to_owned()),
            ("flags", "0x1003\n".to_owned()),
            ("ifindex", format!("{}\n", number + 2)),
            ("uevent", format!("INTERFACE={name}\n")),
        ] {
            // A test that made a file before meant it.
            if !self.tree().path(format!("{folder}/{file}")).exists() {
                self.write(&format!("{folder}/{file}"), &text);
            }
        }
        self.link("../../../1:1.0", &format!("{folder}/device"));
        self.link(&format!("../../drivers/{driver}"), &format!("{device}/1:1.0/driver"));
        self.write(&format!("/sys/bus/drivers/{driver}/x"), "");
        self.link(
            &format!("../../devices/{bus}/{name}/1:1.0/net/{name}"),
            &format!("/sys/class/net/{name}"),
        );
    }

    /// A kernel with these modules, and its image in /boot.
    pub fn kernel(&self, release: &str, modules: &[&str]) {
        let folder = format!("/lib/modules/{release}");
        let dep: String = modules.iter().map(|module| format!("{module}.ko:\n")).collect();
        self.write(&format!("{folder}/modules.dep"), &dep);
        for file in ["modules.alias", "modules.softdep", "modules.builtin", "modules.order"] {
            self.write(&format!("{folder}/{file}"), "");
        }
        self.write("/proc/sys/kernel/osrelease", &format!("{release}\n"));
        let mut image = vec![0; 0x3000];
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x20e..0x210].copy_from_slice(&0x2000_u16.to_le_bytes());
        let text = format!("{release} (builder@host) #1 SMP");
        image[0x2200..0x2200 + text.len()].copy_from_slice(text.as_bytes());
        self.write_bytes(&format!("/boot/vmlinuz-{release}"), &image);
    }

    /// What a kernel needs for a session, and drivers of two adapters.
    pub const MODULES: [&str; 6] = [
        "kernel/drivers/block/nbd",
        "kernel/drivers/nvme/host/nvme-tcp",
        "kernel/drivers/nvme/target/nvmet-tcp",
        "kernel/drivers/net/wireguard/wireguard",
        "kernel/drivers/net/usb/r8152",
        "kernel/drivers/net/ethernet/intel/e1000e/e1000e",
    ];

    /// What all of them have.
    fn base(os_release: &str, release: &str) -> Self {
        let laptop = Self::new();
        laptop.write("/etc/os-release", os_release);
        laptop.write("/etc/hostname", "laptop\n");
        laptop.kernel(release, &Self::MODULES);
        laptop.write("/sys/kernel/kexec_loaded", "0\n");
        laptop.write("/proc/meminfo", "MemTotal:       16000000 kB\n");
        laptop.write("/proc/swaps", "Filename Type Size Used Priority\n");
        laptop
    }

    /// Debian 12 by its installer: LVM on LUKS on NVMe, GRUB, one USB adapter.
    pub fn debian_luks_lvm() -> Self {
        let release = "6.1.0-13-amd64";
        let laptop = Self::base(
            "PRETTY_NAME=\"Debian GNU/Linux 12 (bookworm)\"\nID=debian\nVERSION_ID=\"12\"\n",
            release,
        );
        laptop.disk("nvme0n1", "Samsung SSD 980", 1_000_215_216);
        for (partition, uuid) in [("p1", "AB-CD"), ("p2", "0b-0b"), ("p3", "1c-1c")] {
            laptop.partition("nvme0n1", &format!("nvme0n1{partition}"), uuid);
        }
        laptop.volume(
            "dm-0",
            "nvme0n1p3",
            "CRYPT-LUKS2-1c1c-nvme0n1p3_crypt",
            "nvme0n1p3_crypt",
        );
        laptop.volume("dm-1", "dm-0", "LVM-abc", "vg-root");
        laptop.mount("254:1", "/", "ext4", "/dev/mapper/vg-root");
        laptop.write(
            "/etc/fstab",
            "# static\n/dev/mapper/vg-root / ext4 errors=remount-ro 0 1\nUUID=0b-0b /boot ext2 defaults 0 2\n\
             UUID=AB-CD /boot/efi vfat umask=0077 0 1\n/dev/sr0 /media/cdrom0 udf,iso9660 user,noauto 0 0\n",
        );
        laptop.write("/etc/crypttab", "nvme0n1p3_crypt UUID=1c-1c none luks,discard\n");
        laptop.write(
            "/etc/initramfs-tools/initramfs.conf",
            "# x\nMODULES=most\nBUSYBOX=auto\n",
        );
        laptop.write(
            "/proc/cmdline",
            "BOOT_IMAGE=/vmlinuz root=/dev/mapper/vg-root ro quiet\n",
        );
        laptop.write(&format!("/boot/initrd.img-{release}"), "initrd");
        laptop.write(
            "/boot/grub/grub.cfg",
            &format!(
                "menuentry 'Debian' {{\n linux /vmlinuz-{release} root=/dev/mapper/vg-root ro quiet\n initrd /initrd.img-{release}\n}}\n"
            ),
        );
        laptop.nic("enp0", "e1000e", None);
        laptop.nic("usb1", "r8152", Some(("0bda", "8153", Some("000001"))));
        laptop
    }

    /// Fedora: BLS, SELinux, Secure Boot and lockdown, firewalld, dracut for this machine only.
    pub fn fedora() -> Self {
        let release = "6.11.4-301.fc41.x86_64";
        let laptop = Self::base("NAME=\"Fedora Linux\"\nID=fedora\n", release);
        laptop.disk("nvme0n1", "WD", 2_000_000);
        laptop.partition("nvme0n1", "nvme0n1p3", "2d-2d");
        laptop.mount("0:31", "/", "btrfs", "/dev/nvme0n1p3");
        laptop.write("/etc/fstab", "UUID=2d-2d / btrfs subvol=root 0 0\n");
        laptop.write("/sys/kernel/security/lockdown", "none [integrity] confidentiality\n");
        laptop.efi("SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c", &[1]);
        laptop.write("/boot/loader/entries/fedora.conf", "title Fedora\n");
        laptop.write("/boot/grub2/grub.cfg", "blscfg\n");
        laptop.write("/sys/fs/selinux/enforce", "1\n");
        laptop.write("/usr/lib/dracut/dracut.conf.d/01-dist.conf", "hostonly=\"yes\"\n");
        laptop.write("/proc/cmdline", "root=UUID=2d-2d rootflags=subvol=root rhgb quiet\n");
        laptop.write(&format!("/boot/initramfs-{release}.img"), "initrd");
        laptop.nic("eth0", "e1000e", None);
        laptop
    }

    /// Arch: systemd-boot, btrfs, mkinitcpio with autodetect.
    pub fn arch() -> Self {
        let release = "6.11.6-arch1-1";
        let laptop = Self::base("NAME=\"Arch Linux\"\nPRETTY_NAME=\"Arch Linux\"\nID=arch\n", release);
        laptop.disk("sda", "Crucial", 1_000_000);
        laptop.partition("sda", "sda2", "3e-3e");
        laptop.mount("0:31", "/", "btrfs", "/dev/sda2");
        laptop.write("/etc/fstab", "UUID=3e-3e / btrfs subvol=/@ 0 0\n");
        let info: Vec<u8> = "systemd-boot 256.7-1-arch\0"
            .encode_utf16()
            .flat_map(u16::to_le_bytes)
            .collect();
        laptop.efi("LoaderInfo-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f", &info);
        laptop.efi("SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c", &[0]);
        laptop.write(
            "/etc/mkinitcpio.conf",
            "MODULES=()\n# HOOKS=(base)\nHOOKS=(base udev autodetect microcode modconf kms keyboard block filesystems fsck)\n",
        );
        laptop.write("/proc/cmdline", "root=UUID=3e-3e rw\n");
        laptop.write(&format!("/boot/initramfs-{release}.img"), "initrd");
        laptop.nic("usb1", "r8152", Some(("0bda", "8153", Some("000001"))));
        laptop
    }

    /// As Debian's, with a second disk that is mounted.
    pub fn two_disks() -> Self {
        let laptop = Self::debian_luks_lvm();
        laptop.disk("sda", "Seagate", 4_000_000);
        laptop.partition("sda", "sda1", "5a-5a");
        let fstab = laptop.tree().text("/etc/fstab").unwrap();
        laptop.write("/etc/fstab", &format!("{fstab}UUID=5a-5a /data ext4 defaults 0 2\n"));
        laptop
    }
}
