//! Whether the battery lasts.

use super::Refusal;
use crate::supply::Supply;
use crate::tree::Tree;

pub(super) fn check(tree: &Tree, limit: u8) -> Option<Refusal> {
    let supply = Supply::read(tree);
    let percent = supply.percent.filter(|_| supply.is_low(limit))?;
    Some(Refusal::Battery { percent, limit })
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
    fn the_idle_one_of_two_batteries_is_no_mains() {
        let laptop = laptop("9\n", "Discharging\n", "0\n");
        for (name, text) in [("type", "Battery\n"), ("capacity", "5\n"), ("status", "Not charging\n")] {
            laptop.write(&format!("/sys/class/power_supply/BAT1/{name}"), text.as_bytes());
        }
        assert_eq!(
            check(&laptop.tree(), 10),
            Some(Refusal::Battery { percent: 7, limit: 10 })
        );
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
