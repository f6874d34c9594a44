//! What is built from a real kernel (Debian's, without firmware: that is non-free, and a laptop's own): how large it is,
//! how long it takes, and whether all drivers are in it that reach a laptop and its disk. No machine is started.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use stiefel_initrd_builder::overlay::overlay;
use stiefel_shared::cpio::Reader;
use stiefel_tests::scenario::Failure;

use crate::runner::Bench;

/// The ramdisk that holds the drivers of all machines is to be no larger, in bytes.
const RAMDISK_MAX: u64 = 40 << 20;
/// What the laptop adds to each session is to be no larger, in bytes.
const OVERLAY_MAX: u64 = 30 << 20;
/// More would be no ramdisk, unpacked, in bytes.
const UNPACKED_MAX: usize = 512 << 20;

/// The way to the laptop, which both images need.
const LINK: [&str; 22] = [
    "drivers/virtio/virtio_pci",
    "drivers/virtio/virtio_mmio",
    "drivers/hv/hv_vmbus",
    "drivers/pci/controller/vmd",
    "drivers/net/virtio_net",
    "drivers/net/ethernet/intel/e1000/e1000",
    "drivers/net/ethernet/intel/e1000e/e1000e",
    "drivers/net/ethernet/intel/igb/igb",
    "drivers/net/ethernet/intel/igc/igc",
    "drivers/net/ethernet/realtek/r8169",
    "drivers/net/phy/realtek",
    "drivers/net/usb/cdc_ether",
    "drivers/net/usb/cdc_ncm",
    "drivers/net/usb/r8152",
    "drivers/net/usb/ax88179_178a",
    "drivers/net/thunderbolt-net",
    "drivers/net/wireguard/wireguard",
    "drivers/block/nbd",
    "drivers/nvme/host/nvme-tcp",
    "drivers/usb/host/xhci-pci",
    "drivers/hid/usbhid/usbhid",
    "drivers/hid/hid-generic",
];
/// The laptop's disk, its battery, /boot, and what serves.
const LAPTOP: [&str; 13] = [
    "drivers/nvme/host/nvme",
    "drivers/nvme/target/nvmet-tcp",
    "drivers/block/virtio_blk",
    "drivers/ata/ahci",
    "drivers/usb/storage/uas",
    "drivers/scsi/sd_mod",
    "drivers/md/dm-crypt",
    "drivers/md/dm-snapshot",
    "drivers/acpi/battery",
    "drivers/acpi/ac",
    "fs/ext4/ext4",
    "fs/fat/vfat",
    "crypto/crc32c_generic",
];
/// In neither: wireless and other foreign worlds, and what takes adapters from their right driver.
const UNWANTED: [&str; 6] = [
    "wireless",
    "cdc_subset",
    "drivers/infiniband",
    "netdevsim",
    "drivers/gpu",
    "sound/",
];

/// The ramdisk has all drivers, and is small; how long it took is only told, for it depends on what else the machine does.
pub(crate) fn ramdisk(bench: &Bench) -> Result<(), Failure> {
    let dir = tempfile::tempdir_in(bench.kit.dir())?;
    let installed = bench.kit.installed();
    let begun = Instant::now();
    let output = Command::new(bench.program)
        .args(["build", "--config"])
        .arg(bench.kit.defaults())
        .arg("--kernel")
        .arg(&installed.kernel)
        .arg("--modules")
        .arg(&installed.modules)
        .arg("--out")
        .arg(dir.path())
        .output()?;
    let took = begun.elapsed();
    if !output.status.success() {
        return Err(format!("stiefel build failed: {}", String::from_utf8_lossy(&output.stderr)).into());
    }
    let packed = std::fs::read(dir.path().join("ramdisk.cpio.zst"))?;
    let size = packed.len() as u64;
    bench.note(&format!(
        "        ramdisk without firmware: {} KiB, built in {:.1} s\n",
        size >> 10,
        took.as_secs_f64()
    ));
    let unpacked = zstd::bulk::decompress(&packed, UNPACKED_MAX)?;
    check(&unpacked, "lib", &installed.version, LINK.iter().chain(&LAPTOP))?;
    small("the ramdisk", size, RAMDISK_MAX)
}

/// The overlay of Debian's kernel has what a desktop needs to reach the laptop, and not the drivers of its own disks.
pub(crate) fn session_overlay(bench: &Bench) -> Result<(), Failure> {
    let installed = bench.kit.installed();
    let begun = Instant::now();
    let overlay = overlay(&installed.modules, &[], &[], true)?;
    bench.note(&format!(
        "        overlay without firmware: {} modules, {} KiB, built in {:.1} s\n",
        overlay.modules,
        overlay.bytes.len() >> 10,
        begun.elapsed().as_secs_f64()
    ));
    let unpacked = zstd::bulk::decompress(&overlay.bytes, UNPACKED_MAX)?;
    let paths = check(&unpacked, "stiefel", &installed.version, &LINK)?;
    if let Some(own) = paths
        .iter()
        .find(|path| path.ends_with("/nvme.ko") || path.contains("/ata/"))
    {
        return Err(format!("{own} is in the overlay: the desktop's own disks are none of ours").into());
    }
    small("the overlay", overlay.bytes.len() as u64, OVERLAY_MAX)
}

/// Whether an archive has the `wanted` modules below `root`, and no unwanted ones; its paths.
fn check<'a>(
    archive: &[u8],
    root: &str,
    version: &str,
    wanted: impl IntoIterator<Item = &'a &'static str>,
) -> Result<BTreeSet<String>, Failure> {
    let mut paths = BTreeSet::new();
    for entry in Reader::new(archive) {
        paths.insert(String::from_utf8_lossy(entry?.path).into_owned());
    }
    let kernel = Path::new(root).join("modules").join(version).join("kernel");
    let absent: Vec<_> = wanted
        .into_iter()
        .filter(|module| !paths.contains(&*kernel.join(format!("{module}.ko")).to_string_lossy()))
        .collect();
    if !absent.is_empty() {
        return Err(format!("modules are missing: {absent:?}").into());
    }
    match paths
        .iter()
        .find(|path| UNWANTED.iter().any(|word| path.contains(word)))
    {
        Some(path) => Err(format!("{path} does not belong there").into()),
        None => Ok(paths),
    }
}

fn small(what: &str, size: u64, max: u64) -> Result<(), Failure> {
    if size < max {
        Ok(())
    } else {
        Err(format!("{what} has {size} bytes; allowed are fewer than {max}").into())
    }
}
