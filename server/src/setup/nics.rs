//! The laptop's wired network adapters, and how the dedicated one is known again.
//!
//! Read from sysfs (Linux, Documentation/ABI/testing/sysfs-class-net), for a tree may be looked at that is not running. Which
//! interfaces are wired and physical is decided as in `stiefel_sys::link`. `trigger` in the configuration takes the identity.

use std::collections::BTreeSet;
use std::fmt;

use stiefel_shared::config::{Mac, Trigger, UsbId};
use stiefel_sys::link;

use super::presentable;
use crate::tree::Tree;

const NET: &str = "/sys/class/net";
/// Drivers of telephones and modems, which are no adapters to put a cable into.
const TELEPHONES: [&str; 8] = [
    "rndis_host",
    "ipheth",
    "cdc_mbim",
    "qmi_wwan",
    "huawei_cdc_ncm",
    "sierra_net",
    "hso",
    "cdc_phonet",
];

/// A wired network adapter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Nic {
    /// The interface's name at this moment.
    pub name: String,
    /// Its hardware address, if that is its own and not made up.
    pub mac: Option<Mac>,
    /// Its USB identity; `None` for one that is not on USB.
    pub usb: Option<UsbId>,
    /// What it calls itself.
    pub product: Option<String>,
    /// The kernel module that drives it.
    pub driver: Option<String>,
    /// Built in: the firmware says that it cannot be unplugged.
    pub fixed: bool,
    /// The way to other networks leads through it.
    pub default_route: bool,
    /// It is up.
    pub up: bool,
    /// The kernel's number of it.
    pub index: Option<u32>,
}

/// How the dedicated adapter is known: a line of `trigger`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Identity {
    /// `trigger.usb`.
    Usb(UsbId),
    /// `trigger.macs`.
    Mac(Mac),
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Usb(id) => fmt::Display::fmt(id, f),
            Self::Mac(mac) => fmt::Display::fmt(mac, f),
        }
    }
}

impl Nic {
    /// Whether it can be the dedicated one: plugged in and out, and made for a cable.
    #[must_use]
    pub fn may_be_dedicated(&self) -> bool {
        let telephone = self
            .driver
            .as_deref()
            .is_some_and(|driver| TELEPHONES.contains(&driver));
        self.usb.is_some() && !self.fixed && !telephone
    }

    /// By what it is known again: vendor, product and serial; without a serial, vendor and product if no other adapter here
    /// has the same; else its address. `None` if nothing tells it from the others.
    #[must_use]
    pub fn identity(&self, all: &[Self]) -> Option<Identity> {
        let id = self.usb.clone()?;
        let alike = |other: &&Self| {
            let same = |usb: &UsbId| (usb.vendor, usb.product) == (id.vendor, id.product);
            other.name != self.name && other.usb.as_ref().is_some_and(same)
        };
        let others: Vec<_> = all.iter().filter(alike).collect();
        let serial = id.serial.as_deref().is_some_and(is_plain);
        if serial && others.iter().all(|other| other.usb != self.usb) {
            return Some(Identity::Usb(id));
        }
        if others.is_empty() {
            return Some(Identity::Usb(UsbId { serial: None, ..id }));
        }
        self.mac.map(Identity::Mac)
    }

    /// Whether `trigger` names it.
    #[must_use]
    pub fn is_named_by(&self, trigger: &Trigger) -> bool {
        let by_usb = |wanted: &UsbId| {
            self.usb.as_ref().is_some_and(|id| {
                (id.vendor, id.product) == (wanted.vendor, wanted.product)
                    && (wanted.serial.is_none() || wanted.serial == id.serial)
            })
        };
        trigger.usb.iter().any(by_usb) || self.mac.is_some_and(|mac| trigger.macs.contains(&mac))
    }
}

impl fmt::Display for Nic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)?;
        if let Some(product) = &self.product {
            write!(f, ", {product}")?;
        }
        match &self.usb {
            Some(id) => write!(f, ", USB {id}")?,
            None => f.write_str(", built in")?,
        }
        self.driver.iter().try_for_each(|driver| write!(f, ", driver {driver}"))
    }
}

/// A serial number that no program reads as a pattern or as two words.
fn is_plain(serial: &str) -> bool {
    (1..=64).contains(&serial.len()) && serial.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
}

/// The wired adapters, by name.
pub(super) fn list(tree: &Tree) -> Vec<Nic> {
    let routes = default_routes(tree);
    tree.names(NET)
        .into_iter()
        .filter(|name| is_wired(tree, name))
        .map(|name| nic(tree, name, &routes))
        .collect()
}

fn is_wired(tree: &Tree, name: &str) -> bool {
    let folder = format!("{NET}/{name}");
    let there = |path: &str| tree.path(format!("{folder}/{path}")).exists();
    let uevent = tree.text(format!("{folder}/uevent")).unwrap_or_default();
    let ethernet = tree.line(format!("{folder}/type")).as_deref() == Some("1");
    ethernet
        && there("device")
        && !there("wireless")
        && !there("phy80211")
        && !uevent.lines().any(|line| line.starts_with("DEVTYPE="))
}

fn nic(tree: &Tree, name: String, routes: &BTreeSet<String>) -> Nic {
    let folder = format!("{NET}/{name}");
    let line = |file: &str| tree.line(format!("{folder}/{file}"));
    // NET_ADDR_PERM of linux/netdevice.h: not random, not stolen, not set by hand.
    let own = line("addr_assign_type").is_none_or(|kind| kind == "0");
    let usb = link::usb_id(&tree.path("/sys"), &name);
    let flags = line("flags").and_then(|flags| u32::from_str_radix(flags.strip_prefix("0x")?, 16).ok());
    let (product, fixed) = usb_words(tree, &folder);
    Nic {
        mac: line("address").and_then(|mac| mac.parse().ok()).filter(|_| own),
        usb: usb.map(|id| UsbId {
            vendor: id.vendor,
            product: id.product,
            serial: id.serial,
        }),
        product,
        driver: driver(tree, &folder),
        fixed,
        default_route: routes.contains(&name),
        up: flags.is_some_and(|flags| flags & 1 != 0),
        index: line("ifindex").and_then(|index| index.parse().ok()),
        name,
    }
}

/// What the USB device behind an interface calls itself, and whether it is built in.
fn usb_words(tree: &Tree, folder: &str) -> (Option<String>, bool) {
    let device = tree.path(format!("{folder}/device")).canonicalize().ok();
    let usb = device
        .iter()
        .flat_map(|device| device.ancestors())
        .find(|path| path.join("idVendor").is_file());
    let Some(usb) = usb.and_then(|path| tree.inside(path)) else {
        return (None, false);
    };
    let word = |file: &str| tree.line(usb.join(file)).map(|word| presentable(&word));
    let words: Vec<_> = ["manufacturer", "product"].into_iter().filter_map(word).collect();
    let product = (!words.is_empty()).then(|| presentable(&words.join(" ")));
    (product, word("removable").as_deref() == Some("fixed"))
}

/// The module of an interface's driver; where the driver is built in, the driver's name.
fn driver(tree: &Tree, folder: &str) -> Option<String> {
    let target = |link: &str| {
        let target = std::fs::read_link(tree.path(format!("{folder}/device/{link}"))).ok()?;
        Some(stiefel_shared::kmod::normalise(target.file_name()?.to_str()?))
    };
    target("driver/module").or_else(|| target("driver"))
}

/// Interfaces of a default route: proc_net_route, and its like for IPv6.
fn default_routes(tree: &Tree) -> BTreeSet<String> {
    let v4 = tree.text("/proc/net/route").unwrap_or_default();
    let v6 = tree.text("/proc/net/ipv6_route").unwrap_or_default();
    let by_v4 = v4.lines().filter_map(|line| {
        let fields: Vec<_> = line.split_ascii_whitespace().collect();
        match fields.as_slice() {
            [name, "00000000", _, _, _, _, _, "00000000", ..] => Some((*name).to_owned()),
            _ => None,
        }
    });
    let by_v6 = v6.lines().filter_map(|line| {
        let fields: Vec<_> = line.split_ascii_whitespace().collect();
        let any = fields.first().is_some_and(|to| to.bytes().all(|byte| byte == b'0')) && fields.get(1) == Some(&"00");
        fields
            .last()
            .filter(|name| any && **name != "lo")
            .map(|name| (*name).to_owned())
    });
    by_v4.chain(by_v6).collect()
}

#[cfg(test)]
mod tests {
    use super::super::fixture::Fixture;
    use super::*;

    fn nics(laptop: &Fixture) -> Vec<Nic> {
        list(&laptop.tree())
    }

    #[test]
    fn wireless_virtual_and_modem_interfaces_are_none() {
        let laptop = Fixture::new();
        laptop.nic("eth0", "e1000e", None);
        laptop.nic("wlan0", "iwlwifi", None);
        laptop.write("/sys/class/net/wlan0/phy80211/x", "");
        laptop.nic("wwan0", "qmi_wwan", None);
        laptop.write("/sys/class/net/wwan0/uevent", "DEVTYPE=wwan\n");
        laptop.write("/sys/class/net/br0/type", "1\n");
        laptop.write("/sys/class/net/lo/type", "772\n");
        let found = nics(&laptop);
        assert_eq!(found.len(), 1);
        assert_eq!(
            (found[0].name.as_str(), found[0].driver.as_deref()),
            ("eth0", Some("e1000e"))
        );
        assert!(!found[0].may_be_dedicated(), "it is not on USB");
    }

    #[test]
    fn an_adapter_is_known_by_serial_else_by_product_else_by_address() {
        let laptop = Fixture::new();
        laptop.nic("usb0", "r8152", Some(("0bda", "8153", Some("A1"))));
        let name = |laptop: &Fixture, index: usize| {
            let all = nics(laptop);
            all[index].identity(&all).map(|identity| identity.to_string())
        };
        assert_eq!(name(&laptop, 0).as_deref(), Some("0bda:8153:A1"));
        laptop.nic("usb1", "r8152", Some(("0bda", "8153", Some("A1"))));
        assert_eq!(
            name(&laptop, 0).as_deref(),
            Some("02:00:00:00:00:01"),
            "two with the same serial"
        );
        let laptop = Fixture::new();
        laptop.nic("usb0", "r8152", Some(("0bda", "8153", None)));
        laptop.nic("usb1", "cdc_ether", Some(("0525", "a4a2", Some("x\"; y"))));
        assert_eq!(name(&laptop, 0).as_deref(), Some("0bda:8153"));
        assert_eq!(
            name(&laptop, 1).as_deref(),
            Some("0525:a4a2"),
            "a serial that could be read as more"
        );
        laptop.nic("usb2", "r8152", Some(("0bda", "8153", None)));
        laptop.write("/sys/class/net/usb2/addr_assign_type", "1\n");
        assert_eq!(name(&laptop, 2), None, "an address that is new each time");
    }

    #[test]
    fn telephones_and_soldered_adapters_are_not_dedicated() {
        let laptop = Fixture::new();
        laptop.nic("usb0", "rndis_host", Some(("18d1", "4ee3", None)));
        laptop.nic("usb1", "smsc95xx", Some(("0424", "ec00", None)));
        laptop.write("/sys/devices/usb/usb1/removable", "fixed\n");
        let found = nics(&laptop);
        assert_eq!(found.len(), 2);
        assert!(found.iter().all(|nic| !nic.may_be_dedicated()));
    }

    #[test]
    fn the_way_to_the_internet_is_seen_in_both_protocols() {
        let laptop = Fixture::new();
        for name in ["eth0", "eth1", "eth2"] {
            laptop.nic(name, "e1000e", None);
        }
        laptop.write(
            "/proc/net/route",
            "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\neth0\t00000000\t0101A8C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n\
             eth2\t0001A8C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n",
        );
        laptop.write(
            "/proc/net/ipv6_route",
            &format!(
                "{z} 00 {z} 00 fe80 00000400 1 0 00000003 eth1\n{z} 00 {z} 00 {z} ffffffff 1 0 00200200 lo\n",
                z = "0".repeat(32)
            ),
        );
        let by_default: Vec<_> = nics(&laptop)
            .into_iter()
            .filter(|nic| nic.default_route)
            .map(|nic| nic.name)
            .collect();
        assert_eq!(by_default, ["eth0", "eth1"]);
    }

    #[test]
    fn what_the_configuration_names_is_recognised() {
        let laptop = Fixture::new();
        laptop.nic("usb0", "r8152", Some(("0bda", "8153", Some("A1"))));
        let nic = nics(&laptop).remove(0);
        let named = |yaml: &str| nic.is_named_by(&stiefel_shared::config::Config::parse(yaml).unwrap().trigger);
        assert!(named("trigger: {usb: ['0bda:8153']}") && named("trigger: {usb: ['0bda:8153:A1']}"));
        assert!(named("trigger: {macs: ['02:00:00:00:00:01']}"));
        assert!(!named("trigger: {usb: ['0bda:8153:A2']}") && !named(""));
    }
}
