//! The wired NICs that are ready for traffic, as they come and go.
//!
//! Followed by discovery on both sides and by the laptop's service. No NIC is special here: which ones take part is only a
//! matter of being wired, physical, up and with a carrier.

use std::collections::BTreeMap;
use std::io;
use std::time::Duration;

use stiefel_shared::discovery::LinkEvent;

use crate::console::Console;
use crate::link::{self, Link, LinkError, LinkMonitor};

/// How long to wait after the kernel could not be asked.
const AGAIN: Duration = Duration::from_secs(1);

/// Sets up all wired NICs as they appear (in the ramdisk nobody else does) and calls `tell` for each that gets ready or is
/// lost, on a thread of its own, until `tell` answers `false`. A failure is said and tried again, for without links nothing goes.
///
/// # Errors
/// There is no thread for it.
pub fn follow(console: &'static Console, mut tell: impl FnMut(LinkEvent) -> bool + Send + 'static) -> io::Result<()> {
    let follow = move || {
        let mut ready = BTreeMap::new();
        while let Err(error) = follow_once(&mut ready, &mut tell) {
            console.error(&format!("the NICs cannot be followed: {error}; trying again"));
            std::thread::sleep(AGAIN);
        }
    };
    std::thread::Builder::new().name("links".to_owned()).spawn(follow)?;
    Ok(())
}

/// Shows what happened to a NIC.
pub fn say(console: &Console, event: &LinkEvent) {
    match event {
        LinkEvent::Added { name, .. } => console.info(&format!("the link {name} is up")),
        LinkEvent::Removed { index } => console.warn(&format!("a link is down (interface {index})")),
    }
}

fn follow_once(ready: &mut BTreeMap<u32, String>, tell: &mut impl FnMut(LinkEvent) -> bool) -> Result<(), LinkError> {
    let mut monitor = LinkMonitor::open()?;
    loop {
        let links = link::list()?;
        for link in links.iter().filter(|link| link.is_wired_physical() && !link.up) {
            // It may be gone again by now; then its end is the next change.
            let _ = link::set_up(link.index);
        }
        for event in difference(ready, &links) {
            if !tell(event) {
                return Ok(());
            }
        }
        match monitor.next(None) {
            Ok(_) | Err(LinkError::Lost) => {}
            Err(error) => return Err(error),
        }
        // One plug makes a burst of changes; look once after it.
        while monitor.next(Some(Duration::ZERO)).is_ok_and(|change| change.is_some()) {}
    }
}

/// Brings `ready` up to date with `links`, and says what changed.
fn difference(ready: &mut BTreeMap<u32, String>, links: &[Link]) -> Vec<LinkEvent> {
    let now: BTreeMap<u32, String> = links
        .iter()
        .filter(|link| link.is_wired_physical() && link.up && link.carrier)
        .map(|link| (link.index, link.name.clone()))
        .collect();
    let gone = ready
        .keys()
        .filter(|index| !now.contains_key(index))
        .map(|&index| LinkEvent::Removed { index });
    let come = now
        .iter()
        .filter(|(index, name)| ready.get(index) != Some(name))
        .map(|(&index, name)| LinkEvent::Added {
            index,
            name: name.clone(),
        });
    let events = gone.chain(come).collect();
    *ready = now;
    events
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nic(index: u32, carrier: bool) -> Link {
        Link {
            index,
            name: format!("eth{index}"),
            mac: [2, 0, 0, 0, 0, 1],
            permanent_mac: None,
            mtu: 1500,
            max_mtu: None,
            up: true,
            carrier,
            kind: None,
            arphrd: 1,
            wireless: false,
            devtype: None,
            physical: true,
            controller: None,
        }
    }

    #[test]
    fn a_nic_is_told_of_when_its_carrier_comes_and_goes() {
        let mut ready = BTreeMap::new();
        assert!(difference(&mut ready, &[nic(2, false)]).is_empty());
        let added = LinkEvent::Added {
            index: 2,
            name: "eth2".to_owned(),
        };
        assert_eq!(difference(&mut ready, &[nic(2, true)]), [added]);
        assert!(difference(&mut ready, &[nic(2, true)]).is_empty());
        assert_eq!(
            difference(&mut ready, &[nic(2, false)]),
            [LinkEvent::Removed { index: 2 }]
        );
    }

    #[test]
    fn a_replugged_nic_with_another_index_is_one_lost_and_one_found() {
        let mut ready = BTreeMap::new();
        difference(&mut ready, &[nic(2, true)]);
        let added = LinkEvent::Added {
            index: 5,
            name: "eth5".to_owned(),
        };
        assert_eq!(
            difference(&mut ready, &[nic(5, true)]),
            [LinkEvent::Removed { index: 2 }, added]
        );
    }

    #[test]
    fn wireless_and_virtual_interfaces_never_take_part() {
        let wireless = Link {
            wireless: true,
            ..nic(2, true)
        };
        let bridge = Link {
            physical: false,
            kind: Some("bridge".to_owned()),
            ..nic(3, true)
        };
        assert!(difference(&mut BTreeMap::new(), &[wireless, bridge]).is_empty());
    }
}
