//! The laptop's supply of power. Specification: Linux, Documentation/ABI/testing/sysfs-class-power.

use crate::tree::Tree;

const SUPPLIES: &str = "/sys/class/power_supply";

/// How the laptop is supplied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Supply {
    /// The batteries' charge in per cent; `None` without any.
    pub(crate) percent: Option<u8>,
    /// On mains, or charging.
    pub(crate) mains: bool,
}

impl Supply {
    /// Looks at it.
    pub(crate) fn read(tree: &Tree) -> Self {
        let (mut charges, mut mains) = (Vec::new(), false);
        let (mut charging, mut discharging) = (false, false);
        for name in tree.names(SUPPLIES) {
            let get = |attribute: &str| tree.line(format!("{SUPPLIES}/{name}/{attribute}"));
            if get("type").as_deref() != Some("Battery") {
                // Mains, USB and the like.
                mains |= get("online").as_deref() == Some("1");
            } else if get("scope").as_deref() != Some("Device") && get("present").as_deref() != Some("0") {
                // A mouse's battery is of scope `Device`.
                let status = get("status");
                charging |= matches!(status.as_deref(), Some("Charging" | "Full" | "Not charging"));
                discharging |= status.as_deref() == Some("Discharging");
                charges.extend(get("capacity").and_then(|percent| percent.parse::<u8>().ok()));
            }
        }
        let count = u32::try_from(charges.len()).ok().filter(|count| *count > 0);
        let sum: u32 = charges.iter().copied().map(u32::from).sum();
        Self {
            percent: count.map(|count| u8::try_from(sum / count).unwrap_or(u8::MAX).min(100)),
            // Of two batteries the idle one is `Full` while the other is used up. Not every laptop tells of its mains.
            mains: mains || (charging && !discharging),
        }
    }

    /// Runs on a battery that is below `limit` per cent.
    pub(crate) fn is_low(self, limit: u8) -> bool {
        !self.mains && self.percent.is_some_and(|percent| percent < limit)
    }
}
