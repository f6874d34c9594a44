//! What is lent, where, and by which commands it is reached: for people, and as JSON.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::IpAddr;

use serde::Serialize;
use stiefel_shared::bundle::NVME_PORT;
use stiefel_shared::nbd::PORT as NBD_PORT;
use stiefel_sys::link::{self, LinkError};

use super::clients::Who;
use super::share::{Mode, Share};

/// Stands for the initiator's own interface in a link-local address: only the initiator knows it.
const THEIR_INTERFACE: &str = "IFACE";

/// An address of this machine that an initiator may use.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub(super) struct Place {
    /// This machine's interface.
    pub(super) interface: String,
    pub(super) address: IpAddr,
}

/// The addresses of all interfaces that are up, of any kind (Thunderbolt's network and Wi-Fi count as much as a cable); link-local
/// ones last.
pub(super) fn places() -> Result<Vec<Place>, LinkError> {
    let mut places = Vec::new();
    for link in link::list()?.into_iter().filter(|link| link.up && link.carrier) {
        // An interface that has gone meanwhile has none.
        for address in link::addresses(link.index).unwrap_or_default() {
            if !address.tentative && !address.duplicate && !address.addr.is_loopback() {
                places.push(Place {
                    interface: link.name.clone(),
                    address: address.addr,
                });
            }
        }
    }
    places.sort_by_key(|place| (is_link_local(place.address), place.clone()));
    places.dedup();
    Ok(places)
}

fn is_link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    }
}

impl Place {
    /// As the initiator has to write it.
    fn host(&self) -> String {
        match self.address {
            IpAddr::V6(v6) if v6.is_unicast_link_local() => format!("{v6}%{THEIR_INTERFACE}"),
            address => address.to_string(),
        }
    }

    /// As it stands in a URI (RFC 6874 for the interface).
    fn uri_host(&self) -> String {
        match self.address {
            IpAddr::V6(v6) if v6.is_unicast_link_local() => format!("[{v6}%25{THEIR_INTERFACE}]"),
            IpAddr::V6(v6) => format!("[{v6}]"),
            IpAddr::V4(v4) => v4.to_string(),
        }
    }
}

/// What is lent at one moment.
#[derive(Debug, Serialize)]
pub(super) struct Listing {
    /// Where all disks are found at once.
    pub(super) discover: Vec<String>,
    pub(super) disks: Vec<Listed>,
    /// Who is connected by NVMe; the kernel does not say to which disks.
    pub(super) nvme_clients: Vec<IpAddr>,
    /// Disks that are there and not lent, and why.
    pub(super) left_out: Vec<LeftOut>,
}

/// A disk that is lent.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub(super) struct Listed {
    pub(super) name: String,
    pub(super) device: String,
    /// In bytes.
    pub(super) size: u64,
    pub(super) model: String,
    pub(super) serial: String,
    pub(super) mode: Mode,
    /// What else uses it.
    pub(super) users: Vec<String>,
    /// Who is connected to it by NBD.
    pub(super) clients: Vec<IpAddr>,
    pub(super) nqn: Option<String>,
    pub(super) uuid: String,
    pub(super) no_nvme: Option<String>,
    /// One command per address.
    pub(super) nvme: Vec<String>,
    pub(super) nbd_client: Vec<String>,
    pub(super) uris: Vec<String>,
}

/// A disk that is not lent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct LeftOut {
    pub(super) device: String,
    pub(super) why: String,
}

impl Listing {
    pub(super) fn new<'a>(
        shares: impl Iterator<Item = &'a Share>,
        left_out: &[LeftOut],
        places: &[Place],
        nbd_port: u16,
    ) -> Self {
        let disks: Vec<Listed> = shares.map(|share| Listed::new(share, places, nbd_port)).collect();
        let nvme = disks.iter().any(|disk| disk.nqn.is_some());
        // The kernel's discovery log gives link-local addresses without their interface: nobody can follow that.
        let discover = places.iter().filter(|place| nvme && !is_link_local(place.address));
        let discover = discover.map(|place| format!("nvme connect-all -t tcp -a {} -s {NVME_PORT}", place.host()));
        Self {
            discover: discover.collect(),
            disks,
            nvme_clients: Vec::new(),
            left_out: left_out.to_vec(),
        }
    }

    pub(super) fn json(&self) -> String {
        // Plain texts and numbers can always be written.
        serde_json::to_string(self).unwrap_or_default()
    }

    /// Adds who is connected.
    pub(super) fn add_clients<'a>(&mut self, who: impl Iterator<Item = &'a Who>) {
        for (name, address) in who {
            match name {
                None => self.nvme_clients.push(*address),
                Some(name) => {
                    let disk = self.disks.iter_mut().find(|disk| disk.name == *name);
                    disk.into_iter().for_each(|disk| disk.clients.push(*address));
                }
            }
        }
    }

    /// The commands that say most, for a code: all disks at once by NVMe, and the only one, or the first, by itself.
    pub(super) fn shortest(&self) -> Vec<String> {
        let one = self.disks.len() == 1 || self.discover.is_empty();
        let first = self.disks.first().filter(|_| one);
        let first = first.and_then(|disk| disk.nvme.first().or(disk.uris.first()));
        first.into_iter().chain(self.discover.first()).cloned().collect()
    }

    pub(super) fn words(&self) -> String {
        self.text(None)
    }

    /// With the numbers by which disks are taken back, and those that are.
    pub(super) fn numbered(&self, withheld: &BTreeSet<String>) -> String {
        self.text(Some(withheld))
    }

    fn text(&self, withheld: Option<&BTreeSet<String>>) -> String {
        let mut text = String::new();
        let lent = self.disks.iter().map(|disk| (&disk.name, Some(disk)));
        let back = withheld.into_iter().flatten().map(|name| (name, None));
        let all: BTreeMap<&String, Option<&Listed>> = back.chain(lent).collect();
        // Writing to a String cannot fail.
        for (index, (name, disk)) in all.into_iter().enumerate() {
            if withheld.is_some() {
                let _ = write!(text, "{} ", index + 1);
            }
            let Some(disk) = disk else {
                let _ = writeln!(text, "{name} is taken back");
                continue;
            };
            text += &disk.words();
        }
        if !self.discover.is_empty() {
            let _ = writeln!(text, "all disks at once:");
            for command in &self.discover {
                let _ = writeln!(text, "    {command}");
            }
        }
        for client in &self.nvme_clients {
            let _ = writeln!(text, "{client} is connected by NVMe");
        }
        for LeftOut { device, why } in &self.left_out {
            let _ = writeln!(text, "{device} is not lent: {why}");
        }
        if self.disks.is_empty() {
            let _ = writeln!(text, "no disk is lent at the moment; waiting for one");
        } else if self
            .disks
            .iter()
            .all(|disk| disk.nvme.is_empty() && disk.uris.is_empty())
        {
            let _ = writeln!(text, "this machine has no network address yet");
        }
        if text.contains(THEIR_INTERFACE) {
            let _ = writeln!(
                text,
                "{THEIR_INTERFACE} is the other machine's own network interface that leads here"
            );
        }
        text
    }
}

impl Listed {
    /// Its lines.
    fn words(&self) -> String {
        let mut text = String::new();
        let (size, mode) = (self.size >> 20, self.mode.words());
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{} ({}, {size} MiB): {mode}", self.name, self.device);
        for user in &self.users {
            let _ = writeln!(text, "  ! {user}: what is read may not fit together");
        }
        if let Some(why) = &self.no_nvme {
            let _ = writeln!(text, "  not by NVMe: {why}");
        }
        for client in &self.clients {
            let _ = writeln!(text, "  {client} is connected");
        }
        for command in self.nvme.iter().chain(&self.nbd_client).chain(&self.uris) {
            let _ = writeln!(text, "    {command}");
        }
        text
    }

    fn new(share: &Share, places: &[Place], nbd_port: u16) -> Self {
        let names = &share.names;
        let by_nvme = share.by_nvme().then_some(());
        let by_nbd = share.export.is_some();
        let nvme = |place: &Place| {
            let (host, nqn) = (place.host(), &names.nqn);
            by_nvme.map(|()| format!("nvme connect -t tcp -a {host} -s {NVME_PORT} -n {nqn}"))
        };
        let port = (nbd_port != NBD_PORT).then_some(nbd_port);
        let client = |place: &Place| {
            let port = port.map(|port| format!(" {port}")).unwrap_or_default();
            by_nbd.then(|| format!("nbd-client {}{port} /dev/nbd0 -N {}", place.host(), names.key))
        };
        let uri = |place: &Place| {
            let port = port.map(|port| format!(":{port}")).unwrap_or_default();
            by_nbd.then(|| format!("nbd://{}{port}/{}", place.uri_host(), names.key))
        };
        Self {
            name: names.key.clone(),
            device: share.source.path().display().to_string(),
            size: share.source.size(),
            model: names.model.clone(),
            serial: names.serial.clone(),
            mode: share.mode.clone(),
            users: share.users.clone(),
            clients: Vec::new(),
            nqn: by_nvme.map(|()| names.nqn.clone()),
            uuid: names.uuid.clone(),
            no_nvme: share.no_nvme.clone(),
            nvme: places.iter().filter_map(nvme).collect(),
            nbd_client: places.iter().filter_map(client).collect(),
            uris: places.iter().filter_map(uri).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::names::Names;
    use super::super::share::Source;
    use super::*;

    fn place(interface: &str, address: &str) -> Place {
        Place {
            interface: interface.to_owned(),
            address: address.parse().unwrap(),
        }
    }

    fn share(file: &tempfile::NamedTempFile) -> Share {
        file.as_file().set_len(3 << 20).unwrap();
        let source = Source::File {
            path: file.path().to_owned(),
            size: 3 << 20,
        };
        let names = Names::of_file("m", "disk.img", &|_| false);
        Share::open(source, names, Mode::ReadOnly, vec!["mounted at /mnt".to_owned()], None).unwrap()
    }

    #[test]
    fn each_address_has_its_exact_commands() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let share = share(&file);
        let places = [
            place("eth0", "10.0.0.1"),
            place("eth0", "fe80::1"),
            place("tb0", "fd00::2"),
        ];
        let listing = Listing::new([&share].into_iter(), &[], &places, 10809);
        let disk = &listing.disks[0];
        assert_eq!(
            disk.nbd_client,
            [
                "nbd-client 10.0.0.1 /dev/nbd0 -N disk-img",
                "nbd-client fe80::1%IFACE /dev/nbd0 -N disk-img",
                "nbd-client fd00::2 /dev/nbd0 -N disk-img"
            ]
        );
        assert_eq!(
            disk.uris[1..],
            ["nbd://[fe80::1%25IFACE]/disk-img", "nbd://[fd00::2]/disk-img"]
        );
        assert!(disk.nvme.is_empty() && listing.discover.is_empty());
        let words = listing.words();
        for part in [
            "3 MiB): read-only",
            "mounted at /mnt",
            "IFACE is the other machine's own",
        ] {
            assert!(words.contains(part), "{words}");
        }
        let other = Listing::new([&share].into_iter(), &[], &places[..1], 7);
        assert_eq!(
            other.disks[0].nbd_client,
            ["nbd-client 10.0.0.1 7 /dev/nbd0 -N disk-img"]
        );
        assert_eq!(other.disks[0].uris, ["nbd://10.0.0.1:7/disk-img"]);
    }

    #[test]
    fn who_is_connected_and_what_was_taken_back_is_shown() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let share = share(&file);
        let mut listing = Listing::new([&share].into_iter(), &[], &[place("eth0", "10.0.0.1")], 10809);
        let (a, b) = ("10.0.0.2".parse().unwrap(), "10.0.0.3".parse().unwrap());
        listing.add_clients([(Some("disk-img".to_owned()), a), (None, b)].iter());
        let words = listing.words();
        assert!(
            words.starts_with("disk-img (") && words.contains("  10.0.0.2 is connected\n"),
            "{words}"
        );
        assert!(words.contains("\n10.0.0.3 is connected by NVMe\n"), "{words}");
        let words = listing.numbered(&BTreeSet::from(["an-earlier-one".to_owned()]));
        assert!(
            words.starts_with("1 an-earlier-one is taken back\n2 disk-img ("),
            "{words}"
        );
        assert_eq!(listing.shortest(), ["nbd://10.0.0.1/disk-img"]);
    }

    #[test]
    fn what_is_not_lent_is_said_with_its_reason() {
        let left = [LeftOut {
            device: "/dev/sda".to_owned(),
            why: "this system lives on it".to_owned(),
        }];
        let listing = Listing::new(std::iter::empty(), &left, &[], 10809);
        assert!(
            listing
                .words()
                .contains("/dev/sda is not lent: this system lives on it")
        );
        let json: serde_json::Value = serde_json::from_str(&listing.json()).unwrap();
        assert_eq!(json["left_out"][0]["device"], "/dev/sda");
    }
}
