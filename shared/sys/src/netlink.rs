//! Netlink framing: one synchronous request socket, messages and attributes as bytes.
//!
//! Used by `link` (rtnetlink), `nbd` and `wireguard` (generic netlink). Layout: netlink(7), `linux/netlink.h`,
//! `linux/genetlink.h`. Bodies and answers are wiped: keys travel in them.
//! Attributes are read one by one, and unknown or odd ones are passed over: a kernel newer than this program must
//! not make a whole interface unreadable, which is what the typed message crates do.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use netlink_sys::SocketAddr;
use netlink_sys::protocols::NETLINK_GENERIC;
use zeroize::Zeroizing;

use crate::process::{deadline, wait_readable};

const HEADER: usize = 16;
const ALIGN: usize = 4;
/// Dumps come in pieces of at most 32 KiB.
const DATAGRAM: usize = 64 << 10;
/// The kernel answers at once; a lost answer must not hang a boot for ever.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// The kernel numbers a dump that changed meanwhile as interrupted; ask again, but not endlessly.
const DUMP_ATTEMPTS: u32 = 5;

pub(crate) const NLM_F_REQUEST: u16 = 0x01;
pub(crate) const NLM_F_ACK: u16 = 0x04;
pub(crate) const NLM_F_DUMP: u16 = 0x300;
pub(crate) const NLM_F_EXCL: u16 = 0x200;
pub(crate) const NLM_F_CREATE: u16 = 0x400;
const NLM_F_DUMP_INTR: u16 = 0x10;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLMSG_OVERRUN: u16 = 4;
const NLMSG_MIN_TYPE: u16 = 16;
const NLA_F_NESTED: u16 = 1 << 15;
const NLA_TYPE_MASK: u16 = 0x3fff;

/// cmd, version, two reserved bytes: what generic netlink puts before the attributes.
pub(crate) const GENERIC_HEADER: usize = 4;
const GENL_ID_CTRL: u16 = 16;
const CTRL_VERSION: u8 = 1;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;
const CTRL_ATTR_MCAST_GROUPS: u16 = 7;
const CTRL_ATTR_MCAST_GRP_NAME: u16 = 1;
const CTRL_ATTR_MCAST_GRP_ID: u16 = 2;

/// One message as it came: its type, flags and what follows the header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Message<'a> {
    pub(crate) kind: u16,
    pub(crate) flags: u16,
    pub(crate) sequence: u32,
    pub(crate) body: &'a [u8],
}

/// Splits a datagram into its messages; stops at the first that is cut off.
pub(crate) fn messages(datagram: &[u8]) -> impl Iterator<Item = Message<'_>> {
    let mut rest = datagram;
    std::iter::from_fn(move || {
        let length = usize::try_from(u32_at(rest, 0)?).ok()?;
        let body = rest.get(HEADER..length)?;
        let message = Message {
            kind: u16_at(rest, 4)?,
            flags: u16_at(rest, 6)?,
            sequence: u32_at(rest, 8)?,
            body,
        };
        rest = rest.get(length.next_multiple_of(ALIGN)..).unwrap_or_default();
        Some(message)
    })
}

/// Splits attributes (from `offset` in `body`) into type, without its flag bits, and value.
pub(crate) fn attributes(body: &[u8], offset: usize) -> impl Iterator<Item = (u16, &[u8])> {
    let mut rest = body.get(offset..).unwrap_or_default();
    std::iter::from_fn(move || {
        let length = usize::from(u16_at(rest, 0)?);
        let kind = u16_at(rest, 2)? & NLA_TYPE_MASK;
        let value = rest.get(ALIGN..length)?;
        rest = rest.get(length.next_multiple_of(ALIGN)..).unwrap_or_default();
        Some((kind, value))
    })
}

pub(crate) fn u16_at(bytes: &[u8], offset: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(offset..offset + 2)?.try_into().ok()?))
}

pub(crate) fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(offset..offset + 4)?.try_into().ok()?))
}

pub(crate) fn u64_at(bytes: &[u8], offset: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(bytes.get(offset..offset + 8)?.try_into().ok()?))
}

/// A string attribute: up to its NUL.
pub(crate) fn text(value: &[u8]) -> String {
    String::from_utf8_lossy(value.split(|&byte| byte == 0).next().unwrap_or_default()).into_owned()
}

/// What follows a message's header: a fixed part, then attributes. There may be keys in it: it never prints, and is
/// wiped.
#[derive(Default)]
pub(crate) struct Body(Zeroizing<Vec<u8>>);

impl std::fmt::Debug for Body {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("netlink::Body(..)")
    }
}

impl Body {
    pub(crate) fn new(fixed: &[u8]) -> Self {
        Self(fixed.to_vec().into())
    }

    /// Appends an attribute. Values are a few bytes; one over 64 KiB would be a mistake here and is cut off.
    pub(crate) fn attr(mut self, kind: u16, value: &[u8]) -> Self {
        let length = u16::try_from(value.len() + ALIGN).unwrap_or(u16::MAX);
        self.make_room(usize::from(length) + ALIGN);
        self.0.extend_from_slice(&length.to_ne_bytes());
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.0
            .extend_from_slice(value.get(..usize::from(length) - ALIGN).unwrap_or_default());
        let padded = self.0.len().next_multiple_of(ALIGN);
        self.0.resize(padded, 0);
        self
    }

    /// A vector that grows by itself leaves its old bytes behind, unwiped.
    fn make_room(&mut self, more: usize) {
        let wanted = self.0.len() + more;
        if wanted > self.0.capacity() {
            let mut larger = Zeroizing::new(Vec::with_capacity(wanted * 2));
            larger.extend_from_slice(&self.0);
            self.0 = larger;
        }
    }

    pub(crate) fn attr_string(self, kind: u16, value: &str) -> Self {
        self.attr(kind, &[value.as_bytes(), &[0]].concat())
    }

    pub(crate) fn nest(self, kind: u16, inner: &Body) -> Self {
        self.attr(kind | NLA_F_NESTED, &inner.0)
    }

    #[cfg(test)]
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }
}

/// Frames one request.
pub(crate) fn encode(kind: u16, flags: u16, sequence: u32, body: &Body) -> Zeroizing<Vec<u8>> {
    let mut bytes = Zeroizing::new(Vec::with_capacity(HEADER + body.0.len()));
    let length = u32::try_from(HEADER + body.0.len()).unwrap_or(u32::MAX);
    bytes.extend_from_slice(&length.to_ne_bytes());
    bytes.extend_from_slice(&kind.to_ne_bytes());
    bytes.extend_from_slice(&flags.to_ne_bytes());
    bytes.extend_from_slice(&sequence.to_ne_bytes());
    bytes.extend_from_slice(&0u32.to_ne_bytes());
    bytes.extend_from_slice(&body.0);
    bytes
}

/// All messages that answer a request: type and what follows the header.
pub(crate) type Answer = Vec<(u16, Zeroizing<Vec<u8>>)>;

/// Begins a generic netlink message.
pub(crate) fn generic(command: u8, version: u8) -> Body {
    Body::new(&[command, version, 0, 0])
}

/// What the generic netlink controller tells about a family.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Family {
    pub(crate) id: u16,
    groups: Vec<(String, u32)>,
}

impl Family {
    /// The number of a multicast group.
    pub(crate) fn group(&self, name: &str) -> Option<u32> {
        let (_, id) = self.groups.iter().find(|(group, _)| group == name)?;
        Some(*id)
    }

    pub(crate) fn parse(body: &[u8]) -> Option<Self> {
        let attribute = |wanted| attributes(body, GENERIC_HEADER).find(move |(kind, _)| *kind == wanted);
        let (_, id) = attribute(CTRL_ATTR_FAMILY_ID)?;
        let (_, groups) = attribute(CTRL_ATTR_MCAST_GROUPS).unwrap_or_default();
        let groups = attributes(groups, 0).filter_map(|(_, group)| {
            let field = |wanted| attributes(group, 0).find(move |(kind, _)| *kind == wanted);
            let (_, name) = field(CTRL_ATTR_MCAST_GRP_NAME)?;
            let (_, id) = field(CTRL_ATTR_MCAST_GRP_ID)?;
            Some((text(name), u32_at(id, 0)?))
        });
        Some(Self {
            id: u16_at(id, 0)?,
            groups: groups.collect(),
        })
    }
}

/// A netlink socket towards the kernel.
pub(crate) struct Socket {
    inner: netlink_sys::Socket,
    sequence: u32,
}

impl std::fmt::Debug for Socket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("netlink::Socket(..)")
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inner.as_fd()
    }
}

impl Socket {
    pub(crate) fn open(protocol: isize) -> io::Result<Self> {
        let mut inner = netlink_sys::Socket::new(protocol)?;
        inner.bind_auto()?;
        Ok(Self { inner, sequence: 0 })
    }

    /// A socket to the generic netlink family `name`; `None` if the kernel has no such family (its module is missing).
    pub(crate) fn open_generic(name: &str) -> io::Result<Option<(Self, Family)>> {
        let mut socket = Self::open(NETLINK_GENERIC)?;
        let question = generic(CTRL_CMD_GETFAMILY, CTRL_VERSION).attr_string(CTRL_ATTR_FAMILY_NAME, name);
        match socket.request(GENL_ID_CTRL, 0, &question) {
            Ok(answers) => {
                let family = answers.iter().find_map(|(_, body)| Family::parse(body));
                Ok(family.map(|family| (socket, family)))
            }
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub(crate) fn join(&mut self, group: u32) -> io::Result<()> {
        self.inner.add_membership(group)
    }

    /// A large queue, so that a burst of events is not lost while we are busy; best effort.
    pub(crate) fn enlarge_queue(&self, bytes: usize) {
        if rustix::net::sockopt::set_socket_recv_buffer_size_force(&self.inner, bytes).is_err() {
            let _ = rustix::net::sockopt::set_socket_recv_buffer_size(&self.inner, bytes);
        }
    }

    /// The next datagram from the kernel itself; `None` after `timeout`. Other processes' datagrams are dropped.
    /// ENOBUFS says that events were lost.
    pub(crate) fn receive(&self, timeout: Option<Duration>) -> io::Result<Option<Vec<u8>>> {
        let deadline = deadline(timeout);
        while wait_readable(self.inner.as_fd(), deadline)? {
            let mut datagram = Vec::with_capacity(DATAGRAM);
            match self.inner.recv_from(&mut datagram, libc::MSG_DONTWAIT) {
                Ok((_, from)) if from.port_number() == 0 => return Ok(Some(datagram)),
                Ok(_) => {}
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    /// Sends a request and returns the bodies of all messages that answer it, each with its type.
    ///
    /// The kernel's errno comes back as the error.
    pub(crate) fn request(&mut self, kind: u16, flags: u16, body: &Body) -> io::Result<Answer> {
        for _ in 0..DUMP_ATTEMPTS {
            if let Some(answer) = self.attempt(kind, flags, body)? {
                return Ok(answer);
            }
        }
        Err(io::ErrorKind::Interrupted.into())
    }

    /// `None`: the dump was interrupted by a change.
    fn attempt(&mut self, kind: u16, flags: u16, body: &Body) -> io::Result<Option<Answer>> {
        self.sequence = self.sequence.wrapping_add(1);
        let request = encode(kind, flags | NLM_F_REQUEST | NLM_F_ACK, self.sequence, body);
        self.inner.send_to(&request, &SocketAddr::new(0, 0), 0)?;
        let mut answer = Vec::new();
        let mut whole = true;
        loop {
            let datagram = self.receive(Some(ANSWER_TIMEOUT))?.ok_or(io::ErrorKind::TimedOut)?;
            let datagram = Zeroizing::new(datagram);
            for message in messages(&datagram).filter(|message| message.sequence == self.sequence) {
                whole &= message.flags & NLM_F_DUMP_INTR == 0;
                match message.kind {
                    NLMSG_ERROR => match u32_at(message.body, 0).map(u32::cast_signed) {
                        Some(0) => return Ok(whole.then_some(answer)),
                        Some(errno) => return Err(io::Error::from_raw_os_error(errno.saturating_neg())),
                        None => return Err(io::ErrorKind::InvalidData.into()),
                    },
                    NLMSG_DONE => return Ok(whole.then_some(answer)),
                    NLMSG_OVERRUN => return Err(io::Error::from_raw_os_error(libc::ENOBUFS)),
                    NLMSG_MIN_TYPE.. => answer.push((message.kind, message.body.to_vec().into())),
                    _ => {}
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn attributes_are_padded_and_nested_ones_marked() {
        let inner = Body::default().attr(1, &[7]);
        let body = Body::new(&[9, 9, 9, 9]).attr_string(3, "ab").nest(7, &inner);
        let expected = [
            9, 9, 9, 9, 7, 0, 3, 0, b'a', b'b', 0, 0, 12, 0, 7, 0x80, 5, 0, 1, 0, 7, 0, 0, 0,
        ];
        assert_eq!(body.bytes(), expected);
    }

    #[test]
    fn a_cut_off_message_ends_the_list() {
        let mut bytes = encode(20, 2, 5, &Body::new(&[1, 2, 3, 4])).to_vec();
        bytes.extend_from_slice(&encode(21, 0, 6, &Body::new(&[1, 2, 3, 4])));
        bytes.pop();
        let seen: Vec<_> = messages(&bytes).collect();
        assert_eq!(
            seen,
            [Message {
                kind: 20,
                flags: 2,
                sequence: 5,
                body: &[1, 2, 3, 4]
            }]
        );
    }

    #[test]
    fn a_length_below_the_header_ends_the_list() {
        assert_eq!(messages(&[0; 32]).count(), 0);
        assert_eq!(attributes(&[0; 32], 0).count(), 0);
        assert_eq!(attributes(&[1], 4).count(), 0);
    }

    #[test]
    fn the_family_and_its_groups_are_found() {
        let group = |name, id: u32| Body::default().attr(2, &id.to_ne_bytes()).attr_string(1, name);
        let groups = Body::default()
            .nest(1, &group("other", 4))
            .nest(2, &group("nbd_mc_group", 5));
        let body = generic(1, 2)
            .attr_string(2, "nbd")
            .attr(1, &0x21u16.to_ne_bytes())
            .nest(7, &groups);
        let family = Family::parse(body.bytes()).unwrap();
        assert_eq!((family.id, family.group("nbd_mc_group")), (0x21, Some(5)));
        assert_eq!(family.group("none"), None);
        assert_eq!(Family::parse(generic(1, 2).bytes()), None);
    }

    #[test]
    fn the_controller_is_a_family_of_every_kernel() {
        let (_, family) = Socket::open_generic("nlctrl").unwrap().unwrap();
        assert_eq!((family.id, family.group("notify")), (GENL_ID_CTRL, Some(16)));
        assert!(Socket::open_generic("no-such-family").unwrap().is_none());
    }

    proptest! {
        #[test]
        fn what_was_encoded_is_read_back(
            parts in prop::collection::vec((0u16..NLA_TYPE_MASK, prop::collection::vec(any::<u8>(), 0..40)), 0..10),
        ) {
            let body = parts.iter().fold(Body::new(&[0; 16]), |body, (kind, value)| body.attr(*kind, value));
            let bytes = encode(30, 1, 2, &body);
            let seen: Vec<_> = messages(&bytes).collect();
            prop_assert_eq!(seen.len(), 1);
            let back: Vec<_> = attributes(seen[0].body, 16).map(|(kind, value)| (kind, value.to_vec())).collect();
            prop_assert_eq!(back, parts);
        }

        #[test]
        fn any_bytes_are_taken_apart(bytes: Vec<u8>) {
            for message in messages(&bytes) {
                let _ = attributes(message.body, 4).count();
            }
            let _ = Family::parse(&bytes);
        }
    }
}
