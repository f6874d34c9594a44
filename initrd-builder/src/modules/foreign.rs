//! Modules that did not come with the kernel: built by DKMS, or from a vendor's package (`updates/`, `extra/`,
//! `weak-updates/`, …). Their folders say nothing of what they are.
//!
//! depmod(8) lists such a module instead of the kernel's own one of the same name, whose place modules.order still knows.
//! One that is new to the kernel counts as a NIC's driver if it drives a PCI or USB device and calls what such drivers call.

use std::collections::BTreeMap;
use std::path::Path;

use stiefel_shared::kmod::{ModuleIndex, normalise};

use super::classes::{Class, NIC};
use super::{file, text_lines};

/// Where the modules are that came with the kernel.
const OWN: &str = "kernel/";

/// What is known of such a module.
enum Kind {
    /// It stands in for the kernel's own, whose path this is.
    Replaces(String),
    /// It drives a wired network adapter.
    Nic,
}

/// Such modules, by name; those of which nothing is known are left out.
pub(super) struct Foreign(BTreeMap<String, Kind>);

impl Foreign {
    /// Looks for them in `index`, the modules below `dir`; `order` and `alias` are the texts of modules.order and .alias.
    ///
    /// What cannot be read is none: it is refused when it is asked for by name.
    pub(super) fn find(dir: &Path, index: &ModuleIndex, order: &[u8], alias: &[u8]) -> Self {
        let known = index
            .iter()
            .filter(|(_, path)| !path.starts_with(OWN))
            .filter_map(|(name, path)| {
                let own = text_lines(order).map(str::trim).find(|own| normalise(own) == name);
                let kind = match own {
                    Some(own) => Kind::Replaces(own.to_owned()),
                    None if drives_device(alias, name) && is_nic_driver(&dir.join(path)) => Kind::Nic,
                    None => return None,
                };
                Some((name.to_owned(), kind))
            });
        Self(known.collect())
    }

    /// Whether the module `name` belongs to `class`.
    pub(super) fn belongs(&self, name: &str, class: &Class) -> bool {
        match self.0.get(name) {
            Some(Kind::Replaces(path)) => class.has(name, path),
            Some(Kind::Nic) => class.name == NIC,
            None => false,
        }
    }
}

/// Whether a module has an alias of a PCI or USB device that may be a network adapter. (Reading each of them would cost
/// seconds: some graphics drivers have 60 MB.)
fn drives_device(alias: &[u8], name: &str) -> bool {
    text_lines(alias).any(|line| {
        let mut words = line.split_whitespace().skip(1);
        let (Some(pattern), Some(module)) = (words.next(), words.next()) else {
            return false;
        };
        let network = match pattern.strip_prefix("pci:").and_then(|pci| pci.split_once("bc")) {
            // The class 02 is that of network controllers; a driver may leave it open.
            Some((_, class)) => class.starts_with("02") || class.starts_with('*'),
            None => pattern.starts_with("usb:"),
        };
        network && normalise(module) == name
    })
}

fn is_nic_driver(path: &Path) -> bool {
    file::read_module(path).is_ok_and(|module| file::drives_wired_nic(&module))
}

#[cfg(test)]
mod tests {
    use crate::modules::ModuleTree;
    use crate::testing::{add_modules, module, module_calling, module_tree};
    use std::fs;

    #[test]
    fn drivers_from_elsewhere_are_taken_for_what_they_replace_or_call() {
        let root = tempfile::tempdir().unwrap();
        let dir = module_tree(root.path());
        let nic = module_calling(&["alloc_etherdev_mqs"]);
        let wireless = module_calling(&["alloc_etherdev_mqs", "wiphy_new_nm"]);
        let packed = zstd::bulk::compress(&nic, 3).unwrap();
        add_modules(
            &dir,
            &[
                // The kernel's own e1000e is there, too, but no longer listed.
                ("updates/dkms/e1000e.ko", &module(&[])),
                ("updates/dkms/hid-logitech-dj.ko", &module(&[])),
                ("extra/r8125.ko.zst", &packed),
                ("weak-updates/ax/ax_usb_nic.ko", &module_calling(&["usbnet_probe"])),
                ("updates/dkms/88x2bu.ko", &wireless),
                ("updates/dkms/graphics.ko", &nic),
                ("updates/dkms/vboxnetflt.ko", &nic),
                ("updates/dkms/cdc_mbim.ko", &module(&[])),
            ],
        );
        fs::write(
            dir.join("modules.order"),
            "kernel/drivers/net/ethernet/intel/e1000e/e1000e.ko\nkernel/drivers/hid/hid-logitech-dj.ko\n\
             kernel/drivers/net/usb/cdc_mbim.ko\n",
        )
        .unwrap();
        let alias = fs::read_to_string(dir.join("modules.alias")).unwrap();
        let more = "alias pci:v000010ECd00008125sv*sd*bc*sc*i* r8125\n\
                    alias usb:v0B95p1790d*dc*dsc*dp*ic*isc*ip*in* ax_usb_nic\n\
                    alias usb:v0BDApB812d*dc*dsc*dp*icFFiscFFipFFin* 88x2bu\n\
                    alias pci:v000010DEd*sv*sd*bc03sc00i00* graphics\n";
        fs::write(dir.join("modules.alias"), alias + more).unwrap();

        let tree = ModuleTree::open(&dir).unwrap();
        let nics = tree.select(&["nic"]).unwrap();
        for name in ["e1000e", "r8125", "ax_usb_nic"] {
            assert!(nics.contains(name), "{name} missing in {nics:?}");
        }
        for name in ["hid_logitech_dj", "88x2bu", "graphics", "vboxnetflt", "cdc_mbim"] {
            assert!(!nics.contains(name), "{name} in {nics:?}");
        }
        assert!(tree.select(&["hid"]).unwrap().contains("hid_logitech_dj"));
        let set = tree.load(&nics, &[], &mut |_, _| {}).unwrap();
        assert_eq!(set.files["extra/r8125.ko"], nic);
        assert_eq!(set.files["updates/dkms/e1000e.ko"], module(&[]));
    }
}
