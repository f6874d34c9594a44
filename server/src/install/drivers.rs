//! Drop-ins that force the laptop's own drivers into initrds.
//!
//! A kernel or an initrd may be built while the laptop's system runs on a desktop: what builds initrds then sees the desktop's
//! hardware, and would leave out what the laptop starts with. So `install`, on the laptop, writes down what drives its disks, its
//! keyboards and its screen. Specifications: dracut.conf(5), initramfs.conf(5), mkinitcpio.conf(5).
//!
//! On a desktop nothing is written down: what is there stays as it is.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::wanted::Wanted;
use crate::guards;
use crate::tree::Tree;

/// Stands in the files of `hooks/` for the drivers.
const DRIVERS_WORD: &str = "@DRIVERS@";
const DRACUT: &str = include_str!("../../../hooks/dracut/90-stiefel.conf");
const INITRAMFS_TOOLS: &str = include_str!("../../../hooks/initramfs-tools/stiefel.conf");
const MKINITCPIO: &str = include_str!("../../../hooks/mkinitcpio/stiefel.conf");

const WHAT: &str = "has initrds that are built on a desktop start this laptop, too";

/// A keyboard may be plugged in later, and a passphrase be asked.
const ALWAYS: [&str; 5] = ["hid_generic", "usbhid", "usb_storage", "xhci_hcd", "xhci_pci"];
/// The drivers of these kinds of devices are taken, with those of all that they hang from.
const CLASSES: [&str; 3] = ["block", "input", "drm"];

/// The drop-ins for what builds initrds here.
pub(super) fn drop_ins(tree: &Tree) -> Vec<Wanted> {
    let there = |path: &str| tree.path(path).is_dir();
    let mut found = None;
    let mut list = |path: &str, text: &str, suffix: &str| -> Option<Wanted> {
        let old = tree.text(path).ok();
        if guards::on_a_link(&tree.path("/")).is_some() {
            return old.map(|old| Wanted::text(path, old, WHAT));
        }
        let mut drivers = found.get_or_insert_with(|| drivers(tree)).clone();
        // What was plugged in at an earlier install may be plugged in again.
        drivers.extend(old.iter().flat_map(|old| listed(old, text, suffix)));
        let words: Vec<_> = drivers.iter().map(|name| format!("{name}{suffix}")).collect();
        Some(Wanted::text(path, text.replace(DRIVERS_WORD, &words.join(" ")), WHAT))
    };
    let mut drop_ins = Vec::new();
    if there("/etc/dracut.conf.d") || there("/usr/lib/dracut") {
        drop_ins.extend(list("/etc/dracut.conf.d/90-stiefel.conf", DRACUT, ""));
    }
    if tree.is_file("/etc/mkinitcpio.conf") {
        // A driver that a later kernel does not have is no error then.
        drop_ins.extend(list("/etc/mkinitcpio.conf.d/90-stiefel.conf", MKINITCPIO, "?"));
    }
    if there("/etc/initramfs-tools/conf.d") {
        drop_ins.push(Wanted::text(
            "/etc/initramfs-tools/conf.d/stiefel",
            INITRAMFS_TOOLS,
            WHAT,
        ));
    }
    drop_ins
}

/// The drivers that an older drop-in of ours names: what stands where `template` has its word.
fn listed<'a>(old: &'a str, template: &str, suffix: &'a str) -> impl Iterator<Item = String> + 'a {
    let line = template
        .lines()
        .find(|line| line.contains(DRIVERS_WORD))
        .unwrap_or_default();
    let (before, after) = line.split_once(DRIVERS_WORD).unwrap_or_default();
    let (before, after) = (before.to_owned(), after.to_owned());
    old.lines()
        .filter_map(move |line| line.strip_prefix(before.as_str())?.strip_suffix(after.as_str()))
        .flat_map(str::split_ascii_whitespace)
        .filter_map(move |word| word.strip_suffix(suffix))
        .filter(|name| is_name(name))
        .map(str::to_owned)
}

/// What drives this machine's disks, input devices and screens, from the device up to the bus it hangs from.
fn drivers(tree: &Tree) -> BTreeSet<String> {
    let mut drivers: BTreeSet<String> = ALWAYS.map(str::to_owned).into();
    for class in CLASSES {
        let folder = format!("/sys/class/{class}");
        for name in tree.names(&folder) {
            if tree.line(format!("{folder}/{name}/removable")).as_deref() == Some("1") {
                continue;
            }
            if let Ok(device) = tree.path(format!("{folder}/{name}")).canonicalize() {
                drivers.extend(drivers_above(&device));
            }
        }
    }
    drivers
}

fn drivers_above(device: &Path) -> impl Iterator<Item = String> + '_ {
    let modules = device.ancestors().filter_map(|folder| {
        let module: PathBuf = std::fs::read_link(folder.join("driver/module")).ok()?;
        Some(module.file_name()?.to_str()?.to_owned())
    });
    // NVIDIA's own driver refuses to be in an initrd on some distributions, and no laptop needs it to start.
    modules.filter(|name| is_name(name) && !name.starts_with("nvidia"))
}

/// These files are shell scripts to who reads them.
fn is_name(name: &str) -> bool {
    !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || "_-".contains(c))
}

#[cfg(test)]
mod tests {
    use super::super::wanted::Content;
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    struct Laptop(tempfile::TempDir);

    impl Laptop {
        fn new(folders: &[&str]) -> Self {
            let laptop = Self(tempfile::tempdir().unwrap());
            for folder in folders {
                fs::create_dir_all(laptop.0.path().join(folder)).unwrap();
            }
            laptop
        }

        /// A device below others, each with its driver's module.
        fn device(&self, class: &str, name: &str, chain: &[(&str, &str)]) {
            let mut device = self.0.path().join("sys/devices");
            for (bus, module) in chain {
                device.push(bus);
                fs::create_dir_all(device.join("driver")).unwrap();
                symlink(format!("/sys/module/{module}"), device.join("driver/module")).unwrap();
            }
            device.push(name);
            fs::create_dir_all(&device).unwrap();
            let folder = self.0.path().join("sys/class").join(class);
            fs::create_dir_all(&folder).unwrap();
            // As in sysfs: links there are relative.
            let below = device.strip_prefix(self.0.path().join("sys")).unwrap();
            symlink(Path::new("../..").join(below), folder.join(name)).unwrap();
        }

        fn text(&self, path: &str) -> Option<String> {
            let wanted = drop_ins(&Tree::new(self.0.path()))
                .into_iter()
                .find(|wanted| wanted.path == path)?;
            match wanted.content {
                Content::Bytes(bytes) => Some(String::from_utf8(bytes.to_vec()).unwrap()),
                other => panic!("{other:?}"),
            }
        }
    }

    const DRACUT_PLACE: &str = "/etc/dracut.conf.d/90-stiefel.conf";
    const MKINITCPIO_PLACE: &str = "/etc/mkinitcpio.conf.d/90-stiefel.conf";

    fn laptop() -> Laptop {
        let laptop = Laptop::new(&["etc/dracut.conf.d", "etc/initramfs-tools/conf.d"]);
        fs::write(laptop.0.path().join("etc/mkinitcpio.conf"), "").unwrap();
        laptop.device("block", "nvme0n1", &[("vmd0", "vmd"), ("nvme0", "nvme")]);
        laptop.device("input", "event0", &[("i2c", "intel_lpss_pci"), ("hid", "i2c_hid_acpi")]);
        laptop.device("drm", "card0", &[("gpu", "i915")]);
        laptop.device("drm", "card1", &[("gpu2", "nvidia_drm")]);
        laptop.device("block", "sdb", &[("stick", "uas")]);
        fs::write(laptop.0.path().join("sys/devices/stick/sdb/removable"), "1\n").unwrap();
        laptop
    }

    #[test]
    fn what_the_laptop_starts_with_is_named_and_sticks_are_not() {
        let laptop = laptop();
        let all = "hid_generic i2c_hid_acpi i915 intel_lpss_pci nvme usb_storage usbhid vmd xhci_hcd xhci_pci";
        let dracut = laptop.text(DRACUT_PLACE).unwrap();
        assert!(dracut.contains(&format!("\nadd_drivers+=\" {all} \"\n")), "{dracut}");
        let mkinitcpio = laptop.text(MKINITCPIO_PLACE).unwrap();
        let each = all.replace(' ', "? ");
        assert!(mkinitcpio.contains(&format!("\nMODULES+=({each}?)\n")), "{mkinitcpio}");
        let debian = laptop.text("/etc/initramfs-tools/conf.d/stiefel").unwrap();
        assert!(debian.contains("\nMODULES=most\n"), "{debian}");
    }

    #[test]
    fn what_was_plugged_in_at_an_earlier_install_stays() {
        let laptop = laptop();
        let place = laptop.0.path().join(DRACUT_PLACE.trim_start_matches('/'));
        fs::write(&place, "add_drivers+=\" amdgpu $(reboot) \"\nother+=\" x \"\n").unwrap();
        let text = laptop.text(DRACUT_PLACE).unwrap();
        assert!(text.contains("\" amdgpu hid_generic "), "{text}");
        assert!(!text.contains("reboot") && !text.contains(" x "), "{text}");
        fs::write(&place, &text).unwrap();
        assert_eq!(laptop.text(DRACUT_PLACE).unwrap(), text);
    }

    #[test]
    fn on_a_desktop_the_laptops_drivers_stay_as_they_were() {
        let laptop = laptop();
        fs::create_dir_all(laptop.0.path().join("proc")).unwrap();
        fs::write(laptop.0.path().join("proc/cmdline"), "rdinit=/stiefel/stiefel").unwrap();
        assert_eq!(laptop.text(DRACUT_PLACE), None, "a desktop's are none of ours");
        let place = laptop.0.path().join(DRACUT_PLACE.trim_start_matches('/'));
        fs::write(place, "the laptop's").unwrap();
        assert_eq!(laptop.text(DRACUT_PLACE).as_deref(), Some("the laptop's"));
    }

    #[test]
    fn where_nothing_builds_initrds_nothing_is_put() {
        assert!(drop_ins(&Tree::new(Laptop::new(&["etc"]).0.path())).is_empty());
    }
}
