//! Network interfaces: list, bring up, rename, address, and hear of changes (rtnetlink(7), sysfs).
//!
//! Used by discovery on both sides (every wired interface as it comes up), the attacher and the keeper.

use std::collections::VecDeque;
use std::io;
use std::net::{IpAddr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::Path;
use std::time::Duration;

use netlink_sys::protocols::NETLINK_ROUTE;

use crate::netlink::{self, Body, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, attributes, messages, text, u16_at, u32_at};
use crate::process::{deadline, left};
use crate::read;

/// ARPHRD_ETHER: the interface speaks Ethernet.
pub const ARPHRD_ETHER: u16 = 1;

mod rule;

pub use rule::{everybody_reaches, only_root_reaches};

const LINK_HEADER: usize = 16;
const ADDRESS_HEADER: usize = 8;
const IFLA_PARENT_DEV_NAME: u16 = 56;
const IFLA_MAX_MTU: u16 = 51;
/// `linux/if_ether.h`: as much as a length field holds; a driver that names no limit has it.
const ETH_MAX_MTU: u32 = 0xffff;
/// `linux/if_link.h`: interfaces on the same parent do not talk to each other.
const IFLA_MACVLAN_MODE: u16 = 1;
const MACVLAN_MODE_PRIVATE: u32 = 1;
const IFLA_PERM_ADDRESS: u16 = 54;
const IFLA_NET_NS_FD: u16 = 28;
const RTNLGRP_LINK: u32 = 1;
const RTNLGRP_IPV4_IFADDR: u32 = 5;
const RTNLGRP_IPV6_IFADDR: u32 = 9;
const QUEUE: usize = 1 << 20;
/// IFNAMSIZ without its NUL.
const MAX_NAME: usize = 15;

/// Why something about interfaces failed.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// A request was refused.
    #[error("cannot {action} network interface {index}; it may be gone, or in use")]
    Refused {
        /// What was tried.
        action: &'static str,
        /// The interface's index.
        index: u32,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A virtual interface could not be made.
    #[error("cannot make the {kind} interface {name}; the kernel may lack the module {kind}, or the name is taken")]
    Create {
        /// Its name.
        name: String,
        /// Its kind.
        kind: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Who may send to an address could not be said.
    #[error("every user of this machine can reach {address}; this kernel may have no routing rules for IPv6")]
    Rule {
        /// The address.
        address: Ipv6Addr,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The interfaces could not be listed.
    #[error("cannot list the network interfaces; does this kernel have CONFIG_NET?")]
    List {
        /// The kernel's answer.
        source: io::Error,
    },
    /// Duplicate address detection could not be turned off.
    #[error("cannot turn duplicate address detection off on {name}; proc must be mounted and IPv6 enabled")]
    Dad {
        /// The interface's name.
        name: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The name cannot be one of an interface.
    #[error("{name:?} is no name for a network interface; give 1 to {MAX_NAME} letters or digits")]
    Name {
        /// What was given.
        name: String,
    },
    /// Listening failed.
    #[error("cannot hear of changes of network interfaces; try again")]
    Monitor {
        /// The kernel's answer.
        source: io::Error,
    },
    /// More changes came than the queue holds.
    #[error("changes of network interfaces were lost; list them again, then go on")]
    Lost,
    /// No link-local address came up in time.
    #[error(
        "network interface {index} got no link-local address in {seconds} s; check its cable, and that IPv6 is not disabled"
    )]
    NoLinkLocal {
        /// The interface's index.
        index: u32,
        /// How long it was waited for.
        seconds: u64,
    },
    /// Another machine on the link has the same address.
    #[error(
        "the address {address} of network interface {index} is used by another machine on the link; two have the same MAC address"
    )]
    Duplicate {
        /// The interface's index.
        index: u32,
        /// The address.
        address: IpAddr,
    },
}

/// A network interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Link {
    /// Its number; a re-plugged one gets another.
    pub index: u32,
    /// Its name at this moment.
    pub name: String,
    /// Its MAC address now; zeroes where it has none of six bytes.
    pub mac: [u8; 6],
    /// The MAC address it was built with, where the driver tells (Linux 5.6).
    pub permanent_mac: Option<[u8; 6]>,
    /// Administratively up.
    pub up: bool,
    /// A signal on the cable; false while it is down.
    pub carrier: bool,
    /// The kind of a virtual interface: `bridge`, `veth`, `wireguard`, …
    pub kind: Option<String>,
    /// ARPHRD_* of `linux/if_arp.h`.
    pub arphrd: u16,
    /// A wireless LAN interface.
    pub wireless: bool,
    /// sysfs's DEVTYPE: `wlan`, `wwan`, `bluetooth`, `bridge`, …; none for plain Ethernet.
    pub devtype: Option<String>,
    /// It stands on a device of a bus (PCI, USB, virtio).
    pub physical: bool,
    /// The largest packet that it sends now, in bytes.
    pub mtu: u32,
    /// The largest that its driver allows, in bytes, where that is a limit of the hardware and not only of Ethernet's
    /// numbers (`ETH_MAX_MTU` says nothing).
    pub max_mtu: Option<u32>,
    /// The index of the bridge or bond that it belongs to.
    pub controller: Option<u32>,
}

impl Link {
    /// A wired Ethernet adapter: what a cable can be put into.
    #[must_use]
    pub fn is_wired_physical(&self) -> bool {
        self.arphrd == ARPHRD_ETHER && self.physical && !self.wireless && self.kind.is_none() && self.devtype.is_none()
    }
}

/// All interfaces of this network namespace, with what `/sys` tells about them.
///
/// # Errors
/// [`LinkError::List`].
pub fn list() -> Result<Vec<Link>, LinkError> {
    list_at(Path::new(crate::SYSFS))
}

/// As [`list`], with sysfs mounted elsewhere. Without sysfs, wireless interfaces are not told from wired ones, and
/// physical ones are known from Linux 5.14 on.
///
/// # Errors
/// [`LinkError::List`].
pub fn list_at(sysfs: &Path) -> Result<Vec<Link>, LinkError> {
    let answers = request(libc::RTM_GETLINK, NLM_F_DUMP, &Body::new(&[0; LINK_HEADER]))
        .map_err(|source| LinkError::List { source })?;
    let links = answers
        .iter()
        .filter(|(kind, _)| *kind == libc::RTM_NEWLINK)
        .filter_map(|(_, body)| parse_link(body));
    Ok(links.map(|link| with_sysfs(link, sysfs)).collect())
}

fn parse_link(body: &[u8]) -> Option<Link> {
    let flags = u32_at(body, 8)?.cast_signed();
    let mut link = Link {
        index: u32_at(body, 4)?,
        arphrd: u16_at(body, 2)?,
        up: flags & libc::IFF_UP != 0,
        carrier: flags & libc::IFF_LOWER_UP != 0,
        ..Link::default()
    };
    for (kind, value) in attributes(body, LINK_HEADER) {
        match kind {
            libc::IFLA_IFNAME => link.name = text(value),
            libc::IFLA_ADDRESS => link.mac = value.try_into().unwrap_or_default(),
            IFLA_PERM_ADDRESS => link.permanent_mac = value.try_into().ok(),
            libc::IFLA_MTU => link.mtu = u32_at(value, 0).unwrap_or_default(),
            IFLA_MAX_MTU => link.max_mtu = u32_at(value, 0).filter(|mtu| (1..ETH_MAX_MTU).contains(mtu)),
            libc::IFLA_MASTER => link.controller = u32_at(value, 0),
            libc::IFLA_LINKINFO => {
                link.kind = attributes(value, 0)
                    .find(|(kind, _)| *kind == libc::IFLA_INFO_KIND)
                    .map(|(_, kind)| text(kind));
            }
            IFLA_PARENT_DEV_NAME => link.physical = true,
            _ => {}
        }
    }
    Some(link)
}

fn with_sysfs(mut link: Link, sysfs: &Path) -> Link {
    let folder = sysfs.join("class/net").join(&link.name);
    let uevent = read::attribute(&folder.join("uevent")).unwrap_or_default();
    link.devtype = uevent
        .lines()
        .find_map(|line| line.strip_prefix("DEVTYPE="))
        .map(str::to_owned);
    link.wireless =
        link.devtype.as_deref() == Some("wlan") || folder.join("phy80211").exists() || folder.join("wireless").exists();
    link.physical |= folder.join("device").exists();
    link
}

/// Brings an interface up.
///
/// # Errors
/// [`LinkError::Refused`]: ENODEV if it is gone.
pub fn set_up(index: u32) -> Result<(), LinkError> {
    set_flags("bring up", index, libc::IFF_UP.cast_unsigned())
}

/// Takes an interface down; its IPv6 addresses go with that.
///
/// # Errors
/// [`LinkError::Refused`]: ENODEV if it is gone.
pub fn set_down(index: u32) -> Result<(), LinkError> {
    set_flags("take down", index, 0)
}

fn set_flags(action: &'static str, index: u32, flags: u32) -> Result<(), LinkError> {
    let body = link_body(index, flags, libc::IFF_UP.cast_unsigned());
    request(libc::RTM_NEWLINK, 0, &body)
        .map(drop)
        .map_err(refused(action, index))
}

/// Renames an interface; before Linux 6.2 it must be down.
///
/// # Errors
/// [`LinkError::Name`]; [`LinkError::Refused`]: EEXIST if the name is taken, EBUSY while up.
pub fn rename(index: u32, name: &str) -> Result<(), LinkError> {
    check_name(name)?;
    let body = link_body(index, 0, 0).attr_string(libc::IFLA_IFNAME, name);
    request(libc::RTM_NEWLINK, 0, &body)
        .map(drop)
        .map_err(refused("rename", index))
}

/// The index of the interface `name` in this network namespace; `None` if there is none.
///
/// # Errors
/// [`LinkError::Name`], [`LinkError::List`].
pub fn index_of(name: &str) -> Result<Option<u32>, LinkError> {
    check_name(name)?;
    let body = link_body(0, 0, 0).attr_string(libc::IFLA_IFNAME, name);
    match request(libc::RTM_GETLINK, 0, &body) {
        Ok(answers) => {
            let link = answers.iter().find_map(|(_, body)| parse_link(body));
            Ok(link.map(|link| link.index))
        }
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(None),
        Err(source) => Err(LinkError::List { source }),
    }
}

/// Makes a virtual interface and answers its index. EOPNOTSUPP: the kernel does not know the kind. EEXIST: the name is
/// taken.
pub(crate) fn create(name: &str, kind: &'static str) -> Result<u32, LinkError> {
    check_name(name)?;
    let failed = |source| LinkError::Create {
        name: name.to_owned(),
        kind,
        source,
    };
    request(libc::RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, &create_body(name, kind)).map_err(failed)?;
    index_of(name)?.ok_or_else(|| failed(io::Error::from_raw_os_error(libc::ENODEV)))
}

/// Makes a second interface on the Ethernet adapter `parent`, with the MAC address `mac` of its own (macvlan), and answers
/// its index. It goes with its parent.
///
/// # Errors
/// [`LinkError::Name`]; [`LinkError::Create`]: EOPNOTSUPP without the module macvlan, EEXIST if the name is taken.
pub fn create_macvlan(name: &str, parent: u32, mac: [u8; 6]) -> Result<u32, LinkError> {
    check_name(name)?;
    let failed = |source| LinkError::Create {
        name: name.to_owned(),
        kind: "macvlan",
        source,
    };
    let body = macvlan_body(name, parent, mac);
    request(libc::RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, &body).map_err(failed)?;
    index_of(name)?.ok_or_else(|| failed(io::Error::from_raw_os_error(libc::ENODEV)))
}

fn macvlan_body(name: &str, parent: u32, mac: [u8; 6]) -> Body {
    let mode = Body::default().attr(IFLA_MACVLAN_MODE, &MACVLAN_MODE_PRIVATE.to_ne_bytes());
    let info = Body::default()
        .attr_string(libc::IFLA_INFO_KIND, "macvlan")
        .nest(libc::IFLA_INFO_DATA, &mode);
    link_body(0, 0, 0)
        .attr_string(libc::IFLA_IFNAME, name)
        .attr(libc::IFLA_LINK, &parent.to_ne_bytes())
        .attr(libc::IFLA_ADDRESS, &mac)
        .nest(libc::IFLA_LINKINFO, &info)
}

fn create_body(name: &str, kind: &str) -> Body {
    let info = Body::default().attr_string(libc::IFLA_INFO_KIND, kind);
    link_body(0, 0, 0)
        .attr_string(libc::IFLA_IFNAME, name)
        .nest(libc::IFLA_LINKINFO, &info)
}

/// Removes a virtual interface.
///
/// # Errors
/// [`LinkError::Refused`]: ENODEV if it is gone, EOPNOTSUPP if it is no virtual one.
pub fn delete(index: u32) -> Result<(), LinkError> {
    request(libc::RTM_DELLINK, 0, &link_body(index, 0, 0))
        .map(drop)
        .map_err(refused("remove", index))
}

/// Sets the largest packet that an interface sends, in bytes without the Ethernet header.
///
/// # Errors
/// [`LinkError::Refused`]: EINVAL if its driver cannot do that; some must be down for it (EBUSY).
pub fn set_mtu(index: u32, mtu: u32) -> Result<(), LinkError> {
    let body = link_body(index, 0, 0).attr(libc::IFLA_MTU, &mtu.to_ne_bytes());
    request(libc::RTM_NEWLINK, 0, &body)
        .map(drop)
        .map_err(refused("set the MTU of", index))
}

/// Moves an interface of this network namespace into another. It is taken down and loses its addresses, and may get
/// another index there; it keeps its name. To move one out of a namespace, call this inside
/// [`Namespace::run`](crate::netns::Namespace::run).
///
/// # Errors
/// [`LinkError::Refused`]: ENODEV if it is gone, EEXIST if its name is taken there, EINVAL if it may not be moved.
pub fn set_namespace(index: u32, namespace: BorrowedFd<'_>) -> Result<(), LinkError> {
    // The kernel reads the descriptor as unsigned.
    let fd = namespace.as_raw_fd().cast_unsigned();
    let body = link_body(index, 0, 0).attr(IFLA_NET_NS_FD, &fd.to_ne_bytes());
    request(libc::RTM_NEWLINK, 0, &body)
        .map(drop)
        .map_err(refused("move to another network namespace", index))
}

fn link_body(index: u32, flags: u32, change: u32) -> Body {
    Body::new(&[[0; 4], index.to_ne_bytes(), flags.to_ne_bytes(), change.to_ne_bytes()].concat())
}

/// The kernel's rule for names (`dev_valid_name`), which also keeps them from leading elsewhere as a path.
fn check_name(name: &str) -> Result<(), LinkError> {
    let odd = |c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control();
    if name.is_empty() || name.len() > MAX_NAME || matches!(name, "." | "..") || name.contains(odd) {
        return Err(LinkError::Name { name: name.to_owned() });
    }
    Ok(())
}

/// An address of an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    /// The address.
    pub addr: IpAddr,
    /// The length of its network in bits.
    pub prefix: u8,
    /// Not usable yet: the kernel still asks whether another machine has it.
    pub tentative: bool,
    /// Not usable: another machine has it.
    pub duplicate: bool,
}

/// The addresses of an interface.
///
/// # Errors
/// [`LinkError::Refused`].
pub fn addresses(index: u32) -> Result<Vec<Address>, LinkError> {
    let answers = request(libc::RTM_GETADDR, NLM_F_DUMP, &Body::new(&[0; ADDRESS_HEADER]))
        .map_err(refused("list the addresses of", index))?;
    let all = answers
        .iter()
        .filter(|(kind, _)| *kind == libc::RTM_NEWADDR)
        .filter_map(|(_, body)| parse_address(body));
    Ok(all.filter(|(on, _)| *on == index).map(|(_, address)| address).collect())
}

fn parse_address(body: &[u8]) -> Option<(u32, Address)> {
    let index = u32_at(body, 4)?;
    let mut flags = u32::from(*body.get(2)?);
    let (mut local, mut peer) = (None, None);
    for (kind, value) in attributes(body, ADDRESS_HEADER) {
        match kind {
            libc::IFA_LOCAL => local = ip(value),
            libc::IFA_ADDRESS => peer = ip(value),
            libc::IFA_FLAGS => flags = u32_at(value, 0).unwrap_or(flags),
            _ => {}
        }
    }
    // An optimistic address may be used while the kernel still asks.
    let tentative = flags & libc::IFA_F_TENTATIVE != 0 && flags & libc::IFA_F_OPTIMISTIC == 0;
    let duplicate = flags & libc::IFA_F_DADFAILED != 0;
    // On a point-to-point link IFA_ADDRESS is the other end.
    Some((
        index,
        Address {
            addr: local.or(peer)?,
            prefix: *body.get(1)?,
            tentative,
            duplicate,
        },
    ))
}

fn ip(value: &[u8]) -> Option<IpAddr> {
    match value.len() {
        4 => <[u8; 4]>::try_from(value).ok().map(IpAddr::from),
        16 => <[u8; 16]>::try_from(value).ok().map(IpAddr::from),
        _ => None,
    }
}

/// Gives an interface an address that it has not yet.
///
/// # Errors
/// [`LinkError::Refused`]: EEXIST if it has it (changing it instead would be an event that calls for repair again).
pub fn add_address(index: u32, addr: IpAddr, prefix: u8) -> Result<(), LinkError> {
    let body = address_body(index, addr, prefix);
    request(libc::RTM_NEWADDR, NLM_F_CREATE | NLM_F_EXCL, &body)
        .map(drop)
        .map_err(refused("add an address to", index))
}

/// Takes an address from an interface.
///
/// # Errors
/// [`LinkError::Refused`]: EADDRNOTAVAIL if it has not got it.
pub fn delete_address(index: u32, addr: IpAddr, prefix: u8) -> Result<(), LinkError> {
    let body = address_body(index, addr, prefix);
    request(libc::RTM_DELADDR, 0, &body)
        .map(drop)
        .map_err(refused("take an address from", index))
}

/// `linux/if_addr.h`.
const IFA_F_NODAD: u8 = 2;

fn address_body(index: u32, addr: IpAddr, prefix: u8) -> Body {
    // Ours are random or made by us: asking whether another has them would only cost a second.
    let (family, flags, bytes) = match addr {
        IpAddr::V4(addr) => (libc::AF_INET, 0, addr.octets().to_vec()),
        IpAddr::V6(addr) => (libc::AF_INET6, IFA_F_NODAD, addr.octets().to_vec()),
    };
    let family = u8::try_from(family).unwrap_or_default();
    Body::new(&[[family, prefix, flags, 0], index.to_ne_bytes()].concat())
        .attr(libc::IFA_LOCAL, &bytes)
        .attr(libc::IFA_ADDRESS, &bytes)
}

/// Lets an interface use its IPv6 addresses at once, without first asking whether another machine has them; to be
/// called before it is brought up. `procfs` is where proc is mounted.
///
/// # Errors
/// [`LinkError::Name`]; [`LinkError::Dad`] if IPv6 or proc is missing.
pub fn disable_dad(procfs: &Path, name: &str) -> Result<(), LinkError> {
    check_name(name)?;
    let folder = procfs.join("sys/net/ipv6/conf").join(name);
    // Not in every kernel, and only of use where something else turns the asking on again.
    let _ = std::fs::write(folder.join("optimistic_dad"), "1\n");
    std::fs::write(folder.join("accept_dad"), "0\n").map_err(|source| LinkError::Dad {
        name: name.to_owned(),
        source,
    })
}

/// The USB device that an interface belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UsbId {
    /// The vendor's number.
    pub vendor: u16,
    /// The product's number.
    pub product: u16,
    /// The serial number, where it has one.
    pub serial: Option<String>,
}

/// The USB device behind the interface `name`; `None` if it is not on USB, or gone.
#[must_use]
pub fn usb_id(sysfs: &Path, name: &str) -> Option<UsbId> {
    check_name(name).ok()?;
    let device = sysfs.join("class/net").join(name).join("device").canonicalize().ok()?;
    let number = |path: &Path| u16::from_str_radix(&read::attribute(path)?, 16).ok();
    device.ancestors().find_map(|folder| {
        Some(UsbId {
            vendor: number(&folder.join("idVendor"))?,
            product: number(&folder.join("idProduct"))?,
            serial: read::attribute(&folder.join("serial")),
        })
    })
}

/// What a [`Change`] is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChangeKind {
    /// The interface is new, or its state, name or carrier changed.
    Link,
    /// The interface is gone.
    LinkGone,
    /// It has an address, or the address's state changed.
    Address,
    /// It lost an address.
    AddressGone,
}

/// Something changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    /// The interface's index.
    pub index: u32,
    /// What.
    pub kind: ChangeKind,
}

/// Hears of changes of all interfaces and addresses of the network namespace it was opened in.
#[derive(Debug)]
pub struct LinkMonitor {
    socket: netlink::Socket,
    waiting: VecDeque<Change>,
}

impl AsFd for LinkMonitor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl LinkMonitor {
    /// Begins to listen. Open it before you list, and nothing falls between.
    ///
    /// # Errors
    /// [`LinkError::Monitor`].
    pub fn open() -> Result<Self, LinkError> {
        let open = || {
            let mut socket = netlink::Socket::open(NETLINK_ROUTE)?;
            socket.enlarge_queue(QUEUE);
            for group in [RTNLGRP_LINK, RTNLGRP_IPV4_IFADDR, RTNLGRP_IPV6_IFADDR] {
                socket.join(group)?;
            }
            Ok(Self {
                socket,
                waiting: VecDeque::new(),
            })
        };
        open().map_err(|source| LinkError::Monitor { source })
    }

    /// The next change, or `None` after `timeout` (`None` waits for ever). Call it until it answers `None` before you
    /// wait on the descriptor: one datagram may tell of several.
    ///
    /// # Errors
    /// [`LinkError::Lost`], [`LinkError::Monitor`].
    pub fn next(&mut self, timeout: Option<Duration>) -> Result<Option<Change>, LinkError> {
        let deadline = deadline(timeout);
        loop {
            if let Some(change) = self.waiting.pop_front() {
                return Ok(Some(change));
            }
            match self.socket.receive(left(deadline)) {
                Ok(None) => return Ok(None),
                Ok(Some(datagram)) => self.waiting.extend(changes(&datagram)),
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => return Err(LinkError::Lost),
                Err(source) => return Err(LinkError::Monitor { source }),
            }
        }
    }
}

fn changes(datagram: &[u8]) -> impl Iterator<Item = Change> {
    messages(datagram).filter_map(|message| {
        let kind = match message.kind {
            libc::RTM_NEWLINK => ChangeKind::Link,
            libc::RTM_DELLINK => ChangeKind::LinkGone,
            libc::RTM_NEWADDR => ChangeKind::Address,
            libc::RTM_DELADDR => ChangeKind::AddressGone,
            _ => return None,
        };
        // Both headers have the index at the same place.
        Some(Change {
            index: u32_at(message.body, 4)?,
            kind,
        })
    })
}

/// Waits until an interface that is up has a link-local IPv6 address that can be used.
///
/// # Errors
/// [`LinkError::NoLinkLocal`] after `timeout`, [`LinkError::Duplicate`], [`LinkError::Refused`] (ENODEV) if the
/// interface goes away meanwhile, and those of [`LinkMonitor`].
pub fn wait_link_local(index: u32, timeout: Duration) -> Result<Ipv6Addr, LinkError> {
    let deadline = deadline(Some(timeout));
    let mut monitor = LinkMonitor::open()?;
    loop {
        if let Some(addr) = usable_link_local(index, &addresses(index)?)? {
            return Ok(addr);
        }
        // Everything else that happens on the machine is passed over.
        loop {
            match monitor.next(left(deadline)) {
                Ok(Some(Change {
                    index: at,
                    kind: ChangeKind::LinkGone,
                })) if at == index => {
                    let source = io::Error::from_raw_os_error(libc::ENODEV);
                    return Err(refused("wait for an address of", index)(source));
                }
                Ok(Some(change)) if change.index == index => break,
                Ok(Some(_)) => {}
                Err(LinkError::Lost) => break,
                Ok(None) => {
                    return Err(LinkError::NoLinkLocal {
                        index,
                        seconds: timeout.as_secs(),
                    });
                }
                Err(error) => return Err(error),
            }
        }
    }
}

fn usable_link_local(index: u32, addresses: &[Address]) -> Result<Option<Ipv6Addr>, LinkError> {
    let mut duplicate = None;
    for address in addresses {
        match address.addr {
            IpAddr::V6(addr) if addr.is_unicast_link_local() => {
                if address.duplicate {
                    duplicate = Some(address.addr);
                } else if !address.tentative {
                    return Ok(Some(addr));
                }
            }
            _ => {}
        }
    }
    duplicate.map_or(Ok(None), |address| Err(LinkError::Duplicate { index, address }))
}

fn request(kind: u16, flags: u16, body: &Body) -> io::Result<netlink::Answer> {
    netlink::Socket::open(NETLINK_ROUTE)?.request(kind, flags, body)
}

fn refused(action: &'static str, index: u32) -> impl Fn(io::Error) -> LinkError {
    move |source| LinkError::Refused { action, index, source }
}

#[cfg(test)]
mod tests;
