//! What the kernel's command line says to a ramdisk that lends its machine's disks.
//!
//! For those who start it by PXE or an entry of their boot loader. Who writes that line could start any other system instead; still it opens
//! nothing: `stiefel.role=target` has a desktop's stick lend its machine's disks to the holders of its own key, and only read-only.
//! `stiefel.address=ADDRESS/PREFIX[@NIC]`, more than once if wanted, gives a NIC an address besides its IPv6 link-local one, of use to those who borrow in clear: the first that
//! is ready, or the one of this name or MAC address. What is not understood is said, and left out.

use std::io;
use std::net::IpAddr;
use std::path::Path;

use stiefel_shared::discovery::LinkEvent;
use stiefel_shared::handover::{ClientHandover, Handover, TargetHandover};
use stiefel_sys::console::Console;
use stiefel_sys::link;

use crate::tree::Tree;

const ROLE: &str = "stiefel.role=";
const ADDRESS: &str = "stiefel.address=";
/// More addresses than any machine needs; the kernel's line has at most 2048 bytes on x86-64.
const MAX_ADDRESSES: usize = 16;

/// The words that count here.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Words {
    target: bool,
    addresses: Vec<Address>,
    /// What to tell people of those that were not understood.
    strange: Vec<String>,
}

/// An address for a NIC.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Address {
    address: IpAddr,
    prefix: u8,
    /// Its name or its MAC address in small letters; the first that is ready if there is none.
    nic: Option<String>,
}

impl Words {
    /// The running kernel's.
    #[must_use]
    pub fn read() -> Self {
        Self::parse(&Tree::new(Path::new("/")).text("/proc/cmdline").unwrap_or_default())
    }

    fn parse(line: &str) -> Self {
        let mut words = Self::default();
        for word in line.split_ascii_whitespace() {
            if let Some(role) = word.strip_prefix(ROLE) {
                match role {
                    "target" => words.target = true,
                    _ => words.strange.push(format!("{ROLE} can only be target, not {role:?}")),
                }
            } else if let Some(address) = word.strip_prefix(ADDRESS) {
                match Address::parse(address) {
                    Some(_) if words.addresses.len() == MAX_ADDRESSES => {
                        words.strange.push(format!("there are more than {MAX_ADDRESSES} addresses"));
                    }
                    Some(address) => words.addresses.push(address),
                    None => words.strange.push(format!(
                        "{ADDRESS}{address:?} is not an address like 10.0.0.2/24, 10.0.0.2/24@eth0 or fd00::2/64@52:54:00:12:34:56"
                    )),
                }
            }
        }
        words
    }

    /// Says what of the kernel's command line was not understood, or means nothing to this `role`, which is what [`Words::role`] has made
    /// of the handover.
    pub fn tell(&self, console: &Console, role: &Handover) {
        for strange in self.strange.iter().map(String::as_str).chain(self.idle(role)) {
            console.warn(&format!("on the kernel's command line: {strange}; it is left out"));
        }
    }

    /// What means nothing to this role.
    fn idle(&self, role: &Handover) -> Option<&'static str> {
        let lends = matches!(role, Handover::Target(_));
        match (self.target, self.addresses.is_empty()) {
            (true, _) if !lends => Some("stiefel.role=target is for a desktop's stick, and this is none"),
            (_, false) if !lends => Some("stiefel.address= is for machines that lend their disks"),
            _ => None,
        }
    }

    /// The role that is wanted: the handover's own, unless a desktop's stick is to lend.
    #[must_use]
    pub fn role(&self, handover: Handover) -> Handover {
        match handover {
            Handover::Client(ClientHandover { key, .. }) if self.target => Handover::Target(TargetHandover {
                keys: vec![key],
                open: false,
                read_write: Vec::new(),
                snapshot: false,
                hostname: None,
            }),
            other => other,
        }
    }

    /// Gives out the addresses.
    pub(super) fn into_giver(self) -> Giver {
        Giver {
            left: self.addresses,
            given: Vec::new(),
        }
    }
}

impl Address {
    fn parse(word: &str) -> Option<Self> {
        let (address, nic) = match word.split_once('@') {
            Some((address, nic)) => (address, Some(nic.to_ascii_lowercase())),
            None => (word, None),
        };
        let (address, prefix) = address.split_once('/')?;
        let (address, prefix): (IpAddr, u8) = (address.parse().ok()?, prefix.parse().ok()?);
        let most = if address.is_ipv4() { 32 } else { 128 };
        let usable = !(address.is_unspecified() || address.is_loopback() || address.is_multicast());
        (usable && (1..=most).contains(&prefix) && nic.as_deref() != Some("")).then_some(Self { address, prefix, nic })
    }
}

/// Gives each address to its NIC as that gets ready.
#[derive(Debug)]
pub(super) struct Giver {
    left: Vec<Address>,
    /// And the interface that has it.
    given: Vec<(u32, Address)>,
}

impl Giver {
    /// A NIC is ready, or gone: its addresses are then for the next one that they are for.
    pub(super) fn follow(
        &mut self,
        event: &LinkEvent,
        mac: impl Fn(&str) -> Option<String>,
        mut add: impl FnMut(u32, IpAddr, u8),
    ) {
        match event {
            LinkEvent::Removed { index } => {
                let (gone, given) = std::mem::take(&mut self.given)
                    .into_iter()
                    .partition(|(at, _)| at == index);
                self.given = given;
                self.left
                    .extend(gone.into_iter().map(|(_, address): (u32, Address)| address));
            }
            LinkEvent::Added { index, name } => {
                let mac = mac(name);
                let is_for = |address: &Address| {
                    let nic = address.nic.as_deref();
                    nic.is_none_or(|nic| nic == name.to_ascii_lowercase() || Some(nic) == mac.as_deref())
                };
                let (here, left) = std::mem::take(&mut self.left).into_iter().partition(is_for);
                self.left = left;
                for address in here {
                    add(*index, address.address, address.prefix);
                    self.given.push((*index, address));
                }
            }
        }
    }
}

/// The MAC address of a NIC, in small letters.
pub(super) fn mac(tree: &Tree, nic: &str) -> Option<String> {
    let text = tree.text(format!("/sys/class/net/{nic}/address")).ok()?;
    Some(text.trim().to_ascii_lowercase())
}

/// Gives a NIC an address, and says so.
pub(super) fn add(console: &Console, index: u32, address: IpAddr, prefix: u8) {
    match link::add_address(index, address, prefix) {
        Ok(()) => console.info(&format!("this machine is {address}/{prefix}, too (interface {index})")),
        // It came up again with it.
        Err(link::LinkError::Refused { source, .. }) if source.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => console.error(&format!("{address}/{prefix} is not this machine's address: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use stiefel_shared::key::StickKey;

    const BOTH: &str =
        "quiet stiefel.role=target stiefel.address=10.0.0.2/24 console=ttyS0 stiefel.address=fd00::2/64@ETH1";

    fn added(index: u32) -> LinkEvent {
        let name = format!("eth{index}");
        LinkEvent::Added { index, name }
    }

    /// Follows, and says who got what.
    fn given(giver: &mut Giver, event: &LinkEvent) -> Vec<String> {
        let mut got = Vec::new();
        let mac = |name: &str| (name == "eth2").then(|| "52:54:00:00:00:02".to_owned());
        giver.follow(event, mac, |index, address, prefix| {
            got.push(format!("{index} {address}/{prefix}"));
        });
        got
    }

    #[test]
    fn a_role_and_addresses_are_understood_among_other_words() {
        let words = Words::parse(BOTH);
        assert!(words.target && words.strange.is_empty());
        assert_eq!(words.addresses.len(), 2);
        assert_eq!(words.addresses[1].nic.as_deref(), Some("eth1"));
        assert_eq!(Words::parse("quiet root=/dev/vda1"), Words::default());
    }

    #[test]
    fn what_is_no_address_or_no_role_is_said_and_left_out() {
        for word in [
            "10.0.0.2",
            "10.0.0.2/33",
            "10.0.0.2/0",
            "fd00::1/129",
            "127.0.0.1/8",
            "::/64",
            "ff02::1/64",
            "x/24",
            "10.0.0.2/24@",
        ] {
            let words = Words::parse(&format!("stiefel.address={word}"));
            assert!(words.addresses.is_empty(), "{word}");
            assert!(words.strange[0].contains("10.0.0.2/24@eth0"), "{word}");
        }
        let words = Words::parse("stiefel.role=server");
        assert!(!words.target && words.strange[0].contains("only be target"));
        assert_eq!(
            Words::parse(&"stiefel.address=10.0.0.2/24 ".repeat(99)).addresses.len(),
            MAX_ADDRESSES
        );
    }

    #[test]
    fn a_desktops_stick_lends_to_the_holders_of_its_own_key_and_nothing_else_changes() {
        let key = StickKey::generate("stick").unwrap();
        let client = || {
            Handover::Client(ClientHandover {
                key: key.clone(),
                encrypted_only: false,
            })
        };
        let Handover::Target(target) = Words::parse(BOTH).role(client()) else {
            panic!("no target");
        };
        assert!(
            target.keys.len() == 1
                && target.keys[0].name == key.name
                && !target.open
                && target.read_write.is_empty()
                && !target.snapshot
        );
        assert!(matches!(Words::default().role(client()), Handover::Client(_)));
        assert_eq!(Words::parse(BOTH).idle(&Words::parse(BOTH).role(client())), None);
        let address = Words::parse("stiefel.address=10.0.0.2/24");
        assert!(address.idle(&client()).unwrap().contains("machines that lend"));
        assert!(
            Words::parse("stiefel.role=target")
                .idle(&client())
                .unwrap()
                .contains("desktop's stick")
        );
        let open = Handover::Target(TargetHandover {
            keys: Vec::new(),
            open: true,
            read_write: Vec::new(),
            snapshot: true,
            hostname: None,
        });
        assert!(matches!(Words::parse(BOTH).role(open), Handover::Target(target) if target.open && target.snapshot));
    }

    #[test]
    fn an_address_goes_to_the_nic_of_its_name_or_mac_or_to_the_first() {
        let mut giver = Words::parse(
            "stiefel.address=10.0.0.2/24 stiefel.address=fd00::1/64@eth1 stiefel.address=10.0.1.2/16@52:54:00:00:00:02",
        )
        .into_giver();
        assert_eq!(given(&mut giver, &added(2)), ["2 10.0.0.2/24", "2 10.0.1.2/16"]);
        assert_eq!(given(&mut giver, &added(1)), ["1 fd00::1/64"]);
        assert!(given(&mut giver, &added(3)).is_empty());
        // Pulled out: the next one gets what was for any.
        assert!(given(&mut giver, &LinkEvent::Removed { index: 2 }).is_empty());
        assert_eq!(given(&mut giver, &added(4)), ["4 10.0.0.2/24"]);
    }

    proptest! {
        #[test]
        fn any_line_is_read(line in ".{0,200}") {
            let words = Words::parse(&line);
            prop_assert!(words.addresses.len() <= MAX_ADDRESSES);
        }

        #[test]
        fn an_address_is_what_it_says(address: std::net::Ipv4Addr, prefix in 1_u8..=32) {
            let usable = !(address.is_unspecified() || address.is_loopback() || address.is_multicast());
            let parsed = Address::parse(&format!("{address}/{prefix}"));
            prop_assert_eq!(parsed.map(|found| (found.address, found.prefix)), usable.then_some((IpAddr::V4(address), prefix)));
        }
    }
}
