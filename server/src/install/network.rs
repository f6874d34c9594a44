//! Files that keep network managers (NetworkManager, systemd-networkd) from the dedicated NICs.

use std::fmt::Write;

use stiefel_shared::config::{Trigger, UsbId};

use super::wanted::{Content, Wanted};
use crate::tree::Tree;

const NETWORK_MANAGER: &str = include_str!("../../../hooks/networkmanager/90-stiefel.conf");
const NETWORKD: &str = include_str!("../../../hooks/networkd/05-stiefel.network");
const UDEV: &str = include_str!("../../../hooks/udev/84-stiefel.rules");

/// The files that keep network managers from the dedicated NICs and are not there, or not as the configuration wants them.
pub(super) fn missing_guards(tree: &Tree, trigger: &Trigger) -> Vec<String> {
    guards(trigger)
        .into_iter()
        .filter(|guard| match &guard.content {
            Content::Bytes(bytes) => !tree
                .text(&guard.path)
                .is_ok_and(|text| text.as_bytes() == bytes.as_slice()),
            Content::File(_) | Content::Link(_) | Content::Folder => false,
        })
        .map(|guard| guard.path)
        .collect()
}

/// Files that keep network managers from the dedicated NICs.
pub(super) fn guards(trigger: &Trigger) -> Vec<Wanted> {
    let mut guards = Vec::new();
    if !trigger.macs.is_empty() {
        let devices: Vec<_> = trigger.macs.iter().map(|mac| format!("mac:{mac}")).collect();
        let text = NETWORK_MANAGER.replace("@DEVICES@", &devices.join(";"));
        guards.push(Wanted::text(
            "/etc/NetworkManager/conf.d/90-stiefel.conf",
            text,
            "keeps NetworkManager from the dedicated NIC",
        ));
    }
    let networkd = |name: String, matching: String| {
        let text = NETWORKD.replace("@MATCH@", &matching);
        Wanted::text(
            format!("/etc/systemd/network/05-stiefel-{name}.network"),
            text,
            "keeps systemd-networkd from the dedicated NIC",
        )
    };
    for mac in &trigger.macs {
        guards.push(networkd(mac.to_string().replace(':', ""), format!("MACAddress={mac}")));
    }
    for UsbId { vendor, product, .. } in &trigger.usb {
        // networkd knows udev's properties, not USB's own.
        let matching = format!("Property=\"ID_VENDOR_ID={vendor:04x}\" \"ID_MODEL_ID={product:04x}\"");
        guards.push(networkd(format!("{vendor:04x}-{product:04x}"), matching));
    }
    if !trigger.usb.is_empty() {
        let text = UDEV.replace("@RULES@\n", &udev_rules(&trigger.usb));
        guards.push(Wanted::text(
            "/etc/udev/rules.d/84-stiefel.rules",
            text,
            "keeps NetworkManager from the dedicated NIC",
        ));
    }
    // Two adapters alike, told apart by their serials, need one file only.
    guards.sort_by(|a, b| a.path.cmp(&b.path));
    guards.dedup_by(|a, b| a.path == b.path);
    guards
}

fn udev_rules(ids: &[UsbId]) -> String {
    let mut rules = String::new();
    for UsbId {
        vendor,
        product,
        serial,
    } in ids
    {
        let _ = write!(
            rules,
            "ACTION!=\"remove\", SUBSYSTEM==\"net\", SUBSYSTEMS==\"usb\", ATTRS{{idVendor}}==\"{vendor:04x}\", ATTRS{{idProduct}}==\"{product:04x}\", "
        );
        // What udev would read as a pattern, or as the end of the text, cannot be compared; then all alike are meant.
        if let Some(serial) = serial
            .as_deref()
            .filter(|serial| serial.chars().all(|c| c.is_ascii_alphanumeric() || "-_.:".contains(c)))
        {
            let _ = write!(rules, "ATTRS{{serial}}==\"{serial}\", ");
        }
        rules += "ENV{NM_UNMANAGED}=\"1\"\n";
    }
    rules
}

#[cfg(test)]
mod tests {
    use super::*;
    use stiefel_shared::config::Config;

    fn guards(yaml: &str) -> Vec<(String, String)> {
        let config = Config::parse(yaml).unwrap();
        super::guards(&config.trigger)
            .into_iter()
            .map(|wanted| match wanted.content {
                Content::Bytes(bytes) => (wanted.path, String::from_utf8(bytes.to_vec()).unwrap()),
                other => panic!("{other:?}"),
            })
            .collect()
    }

    #[test]
    fn without_dedicated_nics_no_network_manager_is_told_anything() {
        assert_eq!(guards(""), []);
    }

    #[test]
    fn nics_known_by_address_are_kept_from_both_network_managers() {
        let guards = guards("trigger: {macs: ['00:e0:4c:68:01:02', '00:e0:4c:68:01:03']}");
        assert_eq!(guards.len(), 3);
        assert!(
            guards[0]
                .1
                .contains("unmanaged-devices+=mac:00:e0:4c:68:01:02;mac:00:e0:4c:68:01:03\n")
        );
        assert_eq!(guards[1].0, "/etc/systemd/network/05-stiefel-00e04c680102.network");
        assert!(guards[1].1.contains("MACAddress=00:e0:4c:68:01:02\n"));
        assert!(guards.iter().all(|(_, text)| !text.contains('@')));
    }

    #[test]
    fn nics_known_by_usb_identity_are_kept_from_both_network_managers() {
        let guards = guards("trigger: {usb: ['0bda:8153:AB-1', '0bda:8153:x\"y']}");
        assert_eq!(guards.len(), 2);
        assert!(guards[0].1.contains("\"ID_MODEL_ID=8153\""));
        assert!(
            guards[1]
                .1
                .contains("ATTRS{serial}==\"AB-1\", ENV{NM_UNMANAGED}=\"1\"\n")
        );
        assert!(!guards[1].1.contains("x\"y") && !guards[1].1.contains('@'));
    }
}
