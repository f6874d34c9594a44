//! Single files: modules and firmware, compressed or not, and what a module says about itself.
//!
//! Sizes are bounded before anything is decompressed into memory.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use lzma_rust2::XzReader;
use object::{Object, ObjectSection, ObjectSymbol};
use stiefel_shared::kmod;

/// The largest module taken, in bytes, uncompressed. The largest ones that exist have some 20 MB.
const MODULE_MAX: u64 = 64 << 20;
/// The largest piece of firmware taken, in bytes, uncompressed.
const FIRMWARE_MAX: u64 = 32 << 20;
/// Memory an xz decoder may take, in KiB.
const XZ_MEMORY_KIB: u32 = 128 << 10;
/// Endings of compressed files.
const COMPRESSED: [&str; 3] = [".xz", ".zst", ".gz"];

/// The name of a module's file once it is uncompressed.
pub(super) fn plain_name(path: &str) -> &str {
    COMPRESSED.iter().find_map(|end| path.strip_suffix(end)).unwrap_or(path)
}

/// Reads a module's file, decompressed as its ending says.
pub(super) fn read_module(path: &Path) -> io::Result<Vec<u8>> {
    let bytes = read_plain(path, MODULE_MAX)?;
    if bytes.starts_with(b"\x7fELF") {
        Ok(bytes)
    } else {
        Err(io::Error::new(io::ErrorKind::InvalidData, "it is no ELF file"))
    }
}

fn read_plain(path: &Path, max: u64) -> io::Result<Vec<u8>> {
    let file = File::open(path)?;
    let ending = path.extension().and_then(|ending| ending.to_str()).unwrap_or_default();
    let reader: Box<dyn Read> = match ending {
        "xz" => Box::new(XzReader::new_mem_limit(io::BufReader::new(file), true, XZ_MEMORY_KIB)),
        "zst" => Box::new(zstd::Decoder::new(file)?),
        "gz" => Box::new(flate2::read::MultiGzDecoder::new(file)),
        _ => Box::new(file),
    };
    let mut bytes = Vec::new();
    reader.take(max + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > max {
        return Err(io::Error::new(
            io::ErrorKind::FileTooLarge,
            format!("it has more than {max} bytes"),
        ));
    }
    Ok(bytes)
}

/// The firmware files a module asks for: `firmware=` in its section `.modinfo`.
pub(super) fn firmware_names(module: &[u8]) -> BTreeSet<String> {
    let Ok(elf) = object::File::parse(module) else {
        return BTreeSet::new();
    };
    let info = elf
        .section_by_name(".modinfo")
        .and_then(|section| section.data().ok())
        .unwrap_or_default();
    kmod::firmware_names(info)
}

/// What a driver of a wired network adapter calls to make its interface.
const WIRED: [&str; 3] = ["alloc_etherdev_mqs", "devm_alloc_etherdev_mqs", "usbnet_probe"];
/// How the functions begin that only wireless drivers call; some of them make their interfaces as wired ones do.
const WIRELESS: [&str; 3] = ["wiphy_", "cfg80211_", "ieee80211_"];

/// Whether a module is the driver of a wired network adapter, judged by what it calls.
pub(super) fn drives_wired_nic(module: &[u8]) -> bool {
    let Ok(elf) = object::File::parse(module) else {
        return false;
    };
    let (mut wired, mut wireless) = (false, false);
    for name in elf
        .symbols()
        .filter(|symbol| symbol.is_undefined())
        .filter_map(|symbol| symbol.name().ok())
    {
        wired |= WIRED.contains(&name);
        wireless |= WIRELESS.iter().any(|start| name.starts_with(start));
    }
    wired && !wireless
}

/// Finds firmware where the kernel would: per folder first that of the kernel's version, then the plain one.
pub(super) fn find_firmware(dirs: &[PathBuf], version: &str, name: &str) -> Option<Vec<u8>> {
    let places = dirs.iter().flat_map(|dir| [dir.join(version), dir.clone()]);
    places
        .flat_map(|dir| ["", ".xz", ".zst"].map(|ending| dir.join(format!("{name}{ending}"))))
        .find_map(|path| read_plain(&path, FIRMWARE_MAX).ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{cases, module, module_calling};
    use proptest::prelude::*;

    #[test]
    fn firmware_that_leads_outside_is_ignored() {
        let names = firmware_names(&module(&["a/b.fw", "../../etc/shadow", "/etc/shadow", ""]));
        assert_eq!(names, BTreeSet::from(["a/b.fw".to_owned()]));
    }

    proptest! {
        #![proptest_config(cases(256))]
        #[test]
        fn damaged_modules_never_panic(at in any::<prop::sample::Index>(), value: u8, len in any::<prop::sample::Index>()) {
            for mut bytes in [module(&["a.fw"]), module_calling(&["usbnet_probe"])] {
                let at = at.index(bytes.len());
                bytes[at] = value;
                bytes.truncate(len.index(bytes.len() + 1));
                let _ = (firmware_names(&bytes), drives_wired_nic(&bytes));
            }
        }
    }

    #[test]
    fn drivers_of_wired_adapters_are_known_by_what_they_call() {
        assert!(drives_wired_nic(&module_calling(&["printk", "alloc_etherdev_mqs"])));
        assert!(drives_wired_nic(&module_calling(&["usbnet_probe"])));
        for other in [
            &["alloc_etherdev_mqs", "wiphy_new_nm"][..],
            &["alloc_netdev_mqs"],
            &["my_usbnet_probe"],
            &[],
        ] {
            assert!(!drives_wired_nic(&module_calling(other)), "{other:?}");
        }
        assert!(!drives_wired_nic(b"\x7fELF"));
    }

    #[test]
    fn what_unpacks_to_too_much_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bomb.ko.zst");
        std::fs::write(&path, zstd::bulk::compress(&vec![0; 100_000], 19).unwrap()).unwrap();
        assert_eq!(
            read_plain(&path, 99_999).unwrap_err().kind(),
            io::ErrorKind::FileTooLarge
        );
        assert_eq!(read_plain(&path, 100_000).unwrap().len(), 100_000);
    }
}
