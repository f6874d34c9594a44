//! The dedicated NICs: which interface is one of them, and which of its events is a plug.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::Path;

use stiefel_shared::config::{Mac, Trigger, UsbId};
use stiefel_sys::link::{self, Link};
use stiefel_sys::uevent::Uevent;

use super::log;
use super::plug::{Moment, Plug, Verdict};

/// How a dedicated NIC is known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Known {
    /// `trigger.macs`.
    Mac(Mac),
    /// `trigger.usb`.
    Usb(UsbId),
}

impl fmt::Display for Known {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mac(mac) => write!(f, "{mac}"),
            Self::Usb(usb) => write!(f, "USB {usb}"),
        }
    }
}

/// An interface as far as it matters here.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Interface {
    /// The kernel's number of it.
    pub index: u32,
    /// Its addresses: the current and the permanent one.
    pub macs: Vec<[u8; 6]>,
    /// The USB device behind it.
    pub usb: Option<(u16, u16, Option<String>)>,
}

impl Interface {
    /// What the kernel tells of an interface.
    #[must_use]
    pub fn of(link: &Link) -> Self {
        let usb = link::usb_id(Path::new("/sys"), &link.name);
        Self {
            index: link.index,
            macs: [Some(link.mac), link.permanent_mac].into_iter().flatten().collect(),
            usb: usb.map(|id| (id.vendor, id.product, id.serial)),
        }
    }

    fn is(&self, known: &Known) -> bool {
        match known {
            Known::Mac(mac) => self.macs.contains(&mac.0),
            Known::Usb(wanted) => self.usb.as_ref().is_some_and(|(vendor, product, serial)| {
                (*vendor, *product) == (wanted.vendor, wanted.product)
                    && (wanted.serial.is_none() || wanted.serial == *serial)
            }),
        }
    }
}

/// All NICs that may trigger.
#[derive(Debug, Default)]
pub struct Nics {
    nics: Vec<Nic>,
    /// Interfaces that are no dedicated NIC, of which that was said.
    strangers: BTreeSet<u32>,
}

#[derive(Debug)]
struct Nic {
    known: Known,
    /// The interfaces that are it, by number: renaming does not change it.
    present: BTreeSet<u32>,
    plug: Plug,
}

/// Which NICs the configuration dedicates.
#[must_use]
pub fn dedicated(trigger: &Trigger) -> Vec<Known> {
    let macs = trigger.macs.iter().copied().map(Known::Mac);
    macs.chain(trigger.usb.iter().cloned().map(Known::Usb)).collect()
}

/// Whether an interface is one of the dedicated NICs.
#[must_use]
pub fn is_dedicated(known: &[Known], interface: &Interface) -> bool {
    known.iter().any(|known| interface.is(known))
}

impl Nics {
    /// At the service's start, with the interfaces that are there.
    #[must_use]
    pub fn new(known: Vec<Known>, interfaces: &[Interface], now: Moment) -> Self {
        let nic = |known: Known| {
            let present: BTreeSet<u32> = interfaces
                .iter()
                .filter(|nic| nic.is(&known))
                .map(|nic| nic.index)
                .collect();
            let state = if present.is_empty() {
                "is absent"
            } else {
                "is there; it counts once it was unplugged"
            };
            log::info(format_args!("waiting for the dedicated NIC {known}, which {state}"));
            Nic {
                plug: Plug::new(!present.is_empty(), now),
                known,
                present,
            }
        };
        Self {
            nics: known.into_iter().map(nic).collect(),
            strangers: BTreeSet::new(),
        }
    }

    /// Whether any of them is there.
    #[must_use]
    pub fn any_present(&self) -> bool {
        self.nics.iter().any(|nic| !nic.present.is_empty())
    }

    /// Tells that a clock may have jumped.
    pub fn clock(&mut self, now: Moment) {
        self.nics.iter_mut().for_each(|nic| nic.plug.clock(now));
    }

    /// An interface has appeared. Answers which dedicated NIC was plugged in by that.
    pub fn appeared(&mut self, interface: &Interface, now: Moment) -> Option<Known> {
        let mut plugged = None;
        for nic in self.nics.iter_mut().filter(|nic| interface.is(&nic.known)) {
            // An adapter with several interfaces is plugged in once.
            let first = nic.present.is_empty();
            if !nic.present.insert(interface.index) || !first {
                continue;
            }
            match nic.plug.appeared(now) {
                Verdict::Plugged => plugged = Some(nic.known.clone()),
                verdict => log::info(format_args!("the dedicated NIC {} {verdict}", nic.known)),
            }
        }
        plugged
    }

    /// Whether an interface has appeared that is no dedicated NIC; once for each (they are renamed).
    pub fn is_news_of_a_stranger(&mut self, interface: &Interface) -> bool {
        !self.nics.iter().any(|nic| interface.is(&nic.known)) && self.strangers.insert(interface.index)
    }

    /// The interface with this number is gone.
    pub fn disappeared(&mut self, index: u32, now: Moment) {
        self.strangers.remove(&index);
        for nic in &mut self.nics {
            if nic.present.remove(&index) && nic.present.is_empty() {
                log::info(format_args!("the dedicated NIC {} is unplugged", nic.known));
                nic.plug.disappeared(now);
            }
        }
    }

    /// After lost events: takes over what is there. Nothing of it is a plug, for it was not seen.
    pub fn resynchronise(&mut self, interfaces: &[Interface], now: Moment) {
        let here: BTreeMap<u32, &Interface> = interfaces.iter().map(|nic| (nic.index, nic)).collect();
        let gone: Vec<u32> = self
            .nics
            .iter()
            .flat_map(|nic| &nic.present)
            .copied()
            .filter(|index| !here.contains_key(index))
            .collect();
        gone.into_iter().for_each(|index| self.disappeared(index, now));
        for nic in &mut self.nics {
            let was_absent = nic.present.is_empty();
            nic.present = here
                .values()
                .filter(|found| found.is(&nic.known))
                .map(|found| found.index)
                .collect();
            if !nic.present.is_empty() {
                let _ = nic.plug.appeared(now);
            }
            if was_absent && !nic.present.is_empty() {
                log::info(format_args!(
                    "the dedicated NIC {} has come while events were lost, which is no plug; unplug it once",
                    nic.known
                ));
            }
        }
    }
}

/// What a uevent says about interfaces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NetEvent {
    /// One with this number has appeared, or has another name now.
    Added(u32),
    /// One is gone.
    Removed(u32),
}

/// Reads a uevent; `None` if it is about something else.
#[must_use]
pub fn net_event(event: &Uevent) -> Option<NetEvent> {
    if event.subsystem.as_deref() != Some("net") {
        return None;
    }
    let index = event.get("IFINDEX")?.parse().ok()?;
    match event.action.as_str() {
        // Renamed by udev, perhaps while its first event was looked at: then it could not be found under its old name.
        "add" | "move" => Some(NetEvent::Added(index)),
        "remove" => Some(NetEvent::Removed(index)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    const MAC: [u8; 6] = [0, 0xe0, 0x4c, 0x68, 1, 2];

    fn at(seconds: u64) -> Moment {
        Moment {
            awake: Duration::from_secs(seconds),
            boot: Duration::from_secs(seconds),
            login: None,
        }
    }

    fn adapter(index: u32) -> Interface {
        Interface {
            index,
            macs: vec![MAC],
            usb: Some((0x0bda, 0x8153, Some("01".into()))),
        }
    }

    fn trigger(macs: &[&str], usb: &[&str]) -> Vec<Known> {
        dedicated(&Trigger {
            macs: macs.iter().map(|mac| mac.parse().unwrap()).collect(),
            usb: usb.iter().map(|id| id.parse().unwrap()).collect(),
            ..Trigger::default()
        })
    }

    #[test]
    fn a_nic_is_known_by_current_or_permanent_address_and_by_usb_identity() {
        let mut changed = adapter(3);
        changed.macs.insert(0, [2, 0, 0, 0, 0, 1]);
        for known in [
            trigger(&["00:e0:4c:68:01:02"], &[]),
            trigger(&[], &["0bda:8153"]),
            trigger(&[], &["0bda:8153:01"]),
        ] {
            let mut nics = Nics::new(known, &[], at(0));
            assert!(nics.appeared(&changed, at(20)).is_some());
        }
        for known in [
            trigger(&["00:e0:4c:68:01:03"], &[]),
            trigger(&[], &["0bda:8152"]),
            trigger(&[], &["0bda:8153:02"]),
        ] {
            let mut nics = Nics::new(known, &[], at(0));
            assert_eq!(nics.appeared(&changed, at(20)), None);
        }
    }

    #[test]
    fn a_replugged_nic_counts_under_its_new_number() {
        let mut nics = Nics::new(trigger(&["00:e0:4c:68:01:02"], &[]), &[adapter(3)], at(0));
        assert!(nics.any_present());
        assert_eq!(nics.appeared(&adapter(3), at(20)), None);
        nics.disappeared(3, at(30));
        assert!(!nics.any_present());
        assert!(nics.appeared(&adapter(4), at(40)).is_some());
    }

    #[test]
    fn a_nic_that_is_not_dedicated_is_told_of_once() {
        let mut nics = Nics::new(trigger(&["00:e0:4c:68:01:02"], &[]), &[], at(0));
        let stranger = |index| Interface {
            macs: vec![[2, 0, 0, 0, 0, 9]],
            ..adapter(index)
        };
        assert!(nics.is_news_of_a_stranger(&stranger(3)));
        assert!(!nics.is_news_of_a_stranger(&stranger(3)), "renamed");
        assert!(nics.is_news_of_a_stranger(&stranger(4)), "another one");
        assert!(!nics.is_news_of_a_stranger(&adapter(5)), "the dedicated one");
        nics.disappeared(3, at(10));
        assert!(nics.is_news_of_a_stranger(&stranger(3)), "plugged in anew");
    }

    #[test]
    fn an_adapter_with_two_interfaces_is_plugged_in_once() {
        let mut nics = Nics::new(trigger(&[], &["0bda:8153"]), &[], at(0));
        assert!(nics.appeared(&adapter(3), at(20)).is_some());
        assert_eq!(nics.appeared(&adapter(4), at(40)), None);
        nics.disappeared(3, at(50));
        assert_eq!(
            nics.appeared(&adapter(5), at(80)),
            None,
            "the second interface was there all the time"
        );
    }

    #[test]
    fn a_nic_that_is_only_known_under_its_new_name_is_plugged_in_once() {
        let mut nics = Nics::new(trigger(&[], &["0bda:8153"]), &[], at(0));
        let unknown = Interface {
            usb: None,
            ..adapter(3)
        };
        assert_eq!(nics.appeared(&unknown, at(20)), None, "renamed while it was looked at");
        assert!(nics.appeared(&adapter(3), at(20)).is_some());
        assert_eq!(nics.appeared(&adapter(3), at(50)), None, "renamed again");
    }

    #[test]
    fn what_came_while_events_were_lost_is_no_plug() {
        let mut nics = Nics::new(trigger(&["00:e0:4c:68:01:02"], &[]), &[], at(0));
        nics.resynchronise(&[adapter(3)], at(100));
        assert_eq!(nics.appeared(&adapter(3), at(100)), None);
        nics.resynchronise(&[], at(200));
        assert!(nics.appeared(&adapter(4), at(210)).is_some());
    }

    #[test]
    fn only_network_interfaces_that_come_or_go_are_events() {
        let event = |action: &str, subsystem: &str| Uevent {
            action: action.into(),
            devpath: "/devices/x".into(),
            subsystem: Some(subsystem.into()),
            fields: BTreeMap::from([("IFINDEX".into(), "7".into())]),
        };
        assert_eq!(net_event(&event("add", "net")), Some(NetEvent::Added(7)));
        assert_eq!(net_event(&event("remove", "net")), Some(NetEvent::Removed(7)));
        assert_eq!(net_event(&event("move", "net")), Some(NetEvent::Added(7)), "renamed");
        assert_eq!(net_event(&event("change", "net")), None);
        assert_eq!(net_event(&event("add", "usb")), None);
    }
}
