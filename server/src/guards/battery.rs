//! Whether the battery lasts. Specification: Linux, Documentation/ABI/testing/sysfs-class-power.

use super::Refusal;
use crate::tree::Tree;

const SUPPLIES: &str = "/sys/class/power_supply";

pub(super) fn check(tree: &Tree, limit: u8) -> Option<Refusal> {
    let mut charges = Vec::new();
    for name in tree.names(SUPPLIES) {
        let get = |attribute: &str| tree.line(format!("{SUPPLIES}/{name}/{attribute}"));
        if get("type").as_deref() != Some("Battery") {
            // Mains, USB and the like.
            if get("online").as_deref() == Some("1") {
                return None;
            }
        } else if get("scope").as_deref() != Some("Device") && get("present").as_deref() != Some("0") {
            // A mouse's battery is of scope `Device`. Not every laptop tells of its mains, so the battery's state counts too.
            if matches!(get("status").as_deref(), Some("Charging" | "Full" | "Not charging")) {
                return None;
            }
            charges.extend(get("capacity").and_then(|percent| percent.parse::<u8>().ok()));
        }
    }
    let count = u32::try_from(charges.len()).ok().filter(|count| *count > 0)?;
    let sum: u32 = charges.iter().copied().map(u32::from).sum();
    let percent = u8::try_from(sum / count).unwrap_or(u8::MAX);
    (percent < limit).then_some(Refusal::Battery { percent, limit })
}

#[cfg(test)]
mod tests {
    use super::super::tests::Files;
    use super::*;

    fn laptop(capacity: &str, status: &str, mains: &str) -> Files {
        Files::new(&[
            ("/sys/class/power_supply/BAT0/type", "Battery\n"),
            ("/sys/class/power_supply/BAT0/capacity", capacity),
            ("/sys/class/power_supply/BAT0/status", status),
            ("/sys/class/power_supply/AC/type", "Mains\n"),
            ("/sys/class/power_supply/AC/online", mains),
            ("/sys/class/power_supply/hidpp_battery_0/type", "Battery\n"),
            ("/sys/class/power_supply/hidpp_battery_0/scope", "Device\n"),
            ("/sys/class/power_supply/hidpp_battery_0/capacity", "90\n"),
        ])
    }

    #[test]
    fn a_low_battery_is_refused_only_off_the_mains() {
        assert_eq!(
            check(&laptop("9\n", "Discharging\n", "0\n").tree(), 10),
            Some(Refusal::Battery { percent: 9, limit: 10 })
        );
        assert_eq!(check(&laptop("9\n", "Discharging\n", "1\n").tree(), 10), None);
        assert_eq!(check(&laptop("9\n", "Charging\n", "0\n").tree(), 10), None);
        assert_eq!(check(&laptop("10\n", "Discharging\n", "0\n").tree(), 10), None);
    }

    #[test]
    fn a_machine_without_battery_is_not_refused() {
        assert_eq!(check(&Files::new(&[]).tree(), 100), None);
    }

    #[test]
    fn nonsense_from_the_firmware_is_no_reason() {
        assert_eq!(check(&laptop("-5\n", "Discharging\n", "0\n").tree(), 10), None);
    }
}
