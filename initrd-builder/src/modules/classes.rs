//! Which kernel modules belong to which class: the words a user writes below `modules:` in the configuration.
//!
//! Folders are those of the kernel's sources, as modules.dep shows them; a new driver is found without being named here.

/// A named set of modules.
#[derive(Debug)]
pub struct Class {
    /// The word in the configuration.
    pub name: &'static str,
    /// What it is for, in a few words.
    pub about: &'static str,
    /// All modules below these folders.
    pub(super) folders: &'static [&'static str],
    /// Modules by name, in the kernel's spelling (`_`). Those that this kernel does not have are no error.
    pub(super) names: &'static [&'static str],
    /// Never taken from the folders: names, or beginnings of names that end with `*`.
    pub(super) without: &'static [&'static str],
}

/// Class of what a cable is plugged into.
pub(super) const NIC: &str = "nic";
/// Stands for all classes but `debug`.
pub const DEFAULT: &str = "default";
/// Class that also brings a shell into the ramdisk.
pub const DEBUG: &str = "debug";

/// What a laptop's own stick opens LUKS and LVM with (`stiefel_server::offline`): device mapper, and what nothing names as its
/// dependency, for the kernel would ask modprobe for it, which is not in the ramdisk. The last ones are for a cryptsetup that computes
/// in the kernel.
pub const MAPPER: &[&str] = &[
    "dm_mod",
    "dm_crypt",
    "dm_snapshot",
    "dm_thin_pool",
    "aesni_intel",
    "aes_generic",
    "aes_x86_64",
    "ecb",
    "xts",
    "cbc",
    "essiv",
    "sha256_generic",
    "sha256_ssse3",
    "sha512_generic",
    "af_alg",
    "algif_hash",
    "algif_skcipher",
];

/// All classes.
pub const CLASSES: &[Class] = &[
    Class {
        name: NIC,
        about: "wired network adapters, also USB and Thunderbolt",
        folders: &[
            "kernel/drivers/net/ethernet/",
            "kernel/drivers/net/usb/",
            "kernel/drivers/net/phy/",
            "kernel/drivers/net/mdio/",
            "kernel/drivers/net/pcs/",
            "kernel/drivers/net/thunderbolt/",
            // What stands between the processor and a card: bridges of some boards and hypervisors, slots. No
            // driver of a card names them as a dependency.
            "kernel/drivers/pci/controller/",
            "kernel/drivers/pci/hotplug/",
        ],
        names: &[
            "virtio_pci",
            "virtio_mmio",
            "hv_vmbus",
            "xen_platform_pci",
            "xen_pcifront",
            "virtio_net",
            "thunderbolt_net",
            "vmxnet3",
            "xen_netfront",
            "hv_netvsc",
            "af_packet",
            "ipv6",
        ],
        without: &[
            // CompactPCI, and old servers of IBM.
            "cpcihp_*",
            "acpiphp_ibm",
            // It races cdc_ether for the same adapters, and gives them a random MAC address.
            "cdc_subset",
            // Mobile broadband and telephones.
            "qmi_wwan",
            "cdc_mbim",
            "cdc_phonet",
            "huawei_cdc_ncm",
            "sierra_net",
            "lg_vl600",
            "hso",
            "kalmia",
            "cx82310_eth",
            "ipheth",
            // Switch chips and offload cards of data centres: no link to a laptop, and up to 100 MB of firmware.
            "mlxsw*",
            "prestera*",
            "nfp",
            "liquidio*",
            "octeon_ep",
            "cavium_ptp",
            "thunder_*",
            "nicvf",
            "nicpf",
            "funeth",
            "funcore",
            "pds_core",
            "ionic",
            "hinic",
            "cxgb4vf",
            "*_cs",
            "ena",
            "gve",
            "mana",
            "bna",
            "netxen_nic",
            "fm10k",
            "enic",
        ],
    },
    Class {
        name: "disk",
        about: "disks: NVMe, SATA, SCSI, USB, SD cards, virtual",
        folders: &[
            "kernel/drivers/nvme/host/",
            "kernel/drivers/ata/",
            "kernel/drivers/scsi/",
            "kernel/drivers/ufs/",
            "kernel/drivers/message/fusion/",
            "kernel/drivers/usb/storage/",
            "kernel/drivers/mmc/",
            "kernel/drivers/memstick/",
            "kernel/drivers/misc/cardreader/",
        ],
        names: &[
            "vmd",
            "virtio_blk",
            "virtio_scsi",
            "virtio_pci",
            "virtio_mmio",
            "xen_blkfront",
            "hv_storvsc",
            "sd_mod",
        ],
        without: &[
            // Fibre Channel, iSCSI and InfiniBand: no disk of a laptop or a desktop.
            "nvme_fc",
            "nvme_rdma",
            "qla*",
            "tcm_*",
            "lpfc",
            "efct",
            "bfa",
            "fnic",
            "snic",
            "csiostor",
            "bnx2fc",
            "bnx2i",
            "qedf",
            "qedi",
            "be2iscsi",
            "cxgb3i",
            "cxgb4i",
            "libcxgbi",
            "libfc",
            "libfcoe",
            "fcoe",
            "scsi_transport_fc",
            "scsi_transport_iscsi",
            "iscsi_*",
            "libiscsi*",
            "scsi_transport_srp",
            "ibmvfc",
            "ibmvscsi*",
            // Tapes, changers, shelves, tests, PCMCIA.
            "st",
            "osst",
            "ch",
            "ses",
            "scsi_debug",
            "pcmcia",
            "*_cs",
            "mptfc",
            "mptlan",
            "mptctl",
            "pata_parport",
            "ppa",
            "imm",
            "spi_*",
            "mmc_spi",
            "mmc_test",
            "of_mmc_spi",
            "ums_onetouch",
        ],
    },
    Class {
        name: "usb",
        about: "USB and Thunderbolt controllers, USB-C",
        folders: &[
            "kernel/drivers/usb/core/",
            "kernel/drivers/usb/common/",
            "kernel/drivers/usb/host/",
            "kernel/drivers/usb/roles/",
            "kernel/drivers/usb/typec/",
            "kernel/drivers/usb/dwc3/",
            "kernel/drivers/usb/chipidea/",
            "kernel/drivers/thunderbolt/",
        ],
        names: &[
            "intel_lpss_pci",
            "intel_lpss_acpi",
            "usbhid",
            // Hubs that are soldered onto boards, and have to be switched on.
            "onboard_usb_hub",
            "onboard_usb_dev",
        ],
        // Pictures over USB-C would bring the graphics stack.
        without: &[
            "sl811*",
            "u132_hcd",
            "ledtrig_usbport",
            "typec_displayport",
            "typec_nvidia",
        ],
    },
    Class {
        name: "hid",
        about: "keyboards: USB, I2C, PS/2, virtual",
        folders: &[
            "kernel/drivers/hid/usbhid/",
            "kernel/drivers/hid/i2c-hid/",
            "kernel/drivers/hid/surface-hid/",
        ],
        names: &[
            "hid_generic",
            "atkbd",
            "i8042",
            "evdev",
            "virtio_input",
            "hyperv_keyboard",
            "hid_hyperv",
            "applespi",
            "i2c_designware_platform",
            "i2c_designware_pci",
            "intel_lpss_pci",
            "intel_lpss_acpi",
            "hid_a4tech",
            "hid_apple",
            "hid_asus",
            "hid_belkin",
            "hid_cherry",
            "hid_chicony",
            "hid_corsair",
            "hid_cougar",
            "hid_cypress",
            "hid_elan",
            "hid_elecom",
            "hid_ezkey",
            "hid_gembird",
            "hid_glorious",
            "hid_google_hammer",
            "hid_gyration",
            "hid_holtek_kbd",
            "hid_ite",
            "hid_kensington",
            "hid_keytouch",
            "hid_kye",
            "hid_lenovo",
            "hid_lg_g15",
            "hid_logitech",
            "hid_logitech_dj",
            "hid_logitech_hidpp",
            "hid_macally",
            "hid_maltron",
            "hid_microsoft",
            "hid_monterey",
            "hid_multitouch",
            "hid_nti",
            "hid_ortek",
            "hid_petalynx",
            "hid_primax",
            "hid_redragon",
            "hid_roccat",
            "hid_roccat_arvo",
            "hid_roccat_isku",
            "hid_roccat_ryos",
            "hid_samsung",
            "hid_semitek",
            "hid_sunplus",
            "hid_topseed",
            "hid_uclogic",
            "hid_vivaldi",
            "hid_zydacron",
        ],
        without: &[],
    },
    Class {
        name: "nbd",
        about: "network block devices",
        folders: &[],
        names: &["nbd"],
        without: &[],
    },
    Class {
        name: "nvme",
        about: "NVMe over TCP, both sides",
        folders: &[],
        names: &["nvme_tcp", "nvmet", "nvmet_tcp", "loop"],
        without: &[],
    },
    Class {
        name: "wireguard",
        about: "the encrypted tunnel",
        folders: &[],
        names: &["wireguard"],
        without: &[],
    },
    Class {
        name: "dm",
        about: "device-mapper: encrypted disks, LVM, snapshots",
        folders: &[],
        names: MAPPER,
        without: &[],
    },
    Class {
        name: "fs",
        about: "file systems of /boot",
        folders: &[],
        names: &[
            "loop",
            "ext4",
            "vfat",
            "btrfs",
            "xfs",
            "efivarfs",
            "overlay",
            "nls_cp437",
            "nls_iso8859_1",
            "nls_ascii",
            "nls_utf8",
            "crc32c_generic",
            "crc32c_intel",
        ],
        without: &[],
    },
    Class {
        name: "power",
        about: "battery, mains, power key",
        folders: &[],
        names: &[
            "battery",
            "ac",
            "button",
            "surface_battery",
            "surface_charger",
            "pcspkr",
        ],
        without: &[],
    },
    Class {
        name: DEBUG,
        about: "a shell, and help for looking for faults",
        folders: &[],
        names: &[
            "netconsole",
            "usb_serial_simple",
            "ftdi_sio",
            "pl2303",
            "8250_pci",
            "efi_pstore",
        ],
        without: &[],
    },
];

impl Class {
    /// Finds a class by its name.
    #[must_use]
    pub fn named(name: &str) -> Option<&'static Class> {
        CLASSES.iter().find(|class| class.name == name)
    }

    /// Whether the module `name` (normalised), whose file is `path`, belongs to the class.
    pub(super) fn has(&self, name: &str, path: &str) -> bool {
        let below = |folder: &&str| path.starts_with(*folder);
        self.names.contains(&name)
            || self.folders.iter().any(below) && !self.without.iter().any(|pattern| fits(pattern, name))
    }
}

/// Whether `name` fits a pattern with at most one `*`, at one of its ends.
fn fits(pattern: &str, name: &str) -> bool {
    match (pattern.strip_prefix('*'), pattern.strip_suffix('*')) {
        (Some(end), _) => name.ends_with(end),
        (_, Some(start)) => name.starts_with(start),
        _ => name == pattern,
    }
}
