//! The kernel's NBD client, steered through generic netlink: the kernel owns the sockets, no process need stay.
//!
//! Used by the client's disk attacher and keeper, after they shook hands with the NBD server. Numbers:
//! `linux/nbd-netlink.h`, `linux/genetlink.h`. (`stiefel_shared::nbd` has the protocol on the wire.)

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::Duration;

use crate::netlink::{self, Body, Family, GENERIC_HEADER, attributes, generic, messages, u32_at};
use crate::process::{deadline, left};

const FAMILY: &str = "nbd";
const MULTICAST_GROUP: &str = "nbd_mc_group";
const VERSION: u8 = 1;

const NBD_CMD_CONNECT: u8 = 1;
const NBD_CMD_DISCONNECT: u8 = 2;
const NBD_CMD_RECONFIGURE: u8 = 3;
const NBD_CMD_LINK_DEAD: u8 = 4;

const NBD_ATTR_INDEX: u16 = 1;
const NBD_ATTR_SIZE_BYTES: u16 = 2;
const NBD_ATTR_BLOCK_SIZE_BYTES: u16 = 3;
const NBD_ATTR_TIMEOUT: u16 = 4;
const NBD_ATTR_SERVER_FLAGS: u16 = 5;
const NBD_ATTR_SOCKETS: u16 = 7;
const NBD_ATTR_DEAD_CONN_TIMEOUT: u16 = 8;
const NBD_ATTR_BACKEND_IDENTIFIER: u16 = 10;
const NBD_SOCK_ITEM: u16 = 1;
const NBD_SOCK_FD: u16 = 1;

/// Why the kernel's NBD client did not do it.
#[derive(Debug, thiserror::Error)]
pub enum NbdError {
    /// The kernel has no NBD client.
    #[error("the kernel has no NBD client; load the module nbd")]
    NoNbd {
        /// The kernel's answer.
        source: io::Error,
    },
    /// The device is in use.
    #[error("/dev/nbd{index} is in use; disconnect it, or take another")]
    Busy {
        /// Its number.
        index: u32,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Netlink itself failed.
    #[error("cannot talk with the kernel's NBD client; this needs root")]
    Netlink {
        /// The kernel's answer.
        source: io::Error,
    },
    /// A command was refused.
    #[error("the kernel refused to {action} an NBD device; its log (dmesg) says why")]
    Refused {
        /// `connect`, `reconfigure` or `disconnect`.
        action: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The kernel did not say which device it took.
    #[error("the kernel did not name the NBD device it connected; look for a new one in /sys/block")]
    NoIndex,
    /// Events were lost.
    #[error("NBD events were lost; reconnect every device")]
    Lost,
}

/// A device to be made; [`connect`] takes it.
#[derive(Clone, Debug)]
pub struct Connect<'a> {
    /// N of `/dev/nbdN`; `None` takes a free one.
    pub index: Option<u32>,
    /// In bytes.
    pub size: u64,
    /// The logical block size in bytes. It must be the disk's own, or its partitions are looked for at wrong places.
    pub block_size: u64,
    /// How long a request may take before its connection counts as dead, in seconds (rounded up); zero means for ever.
    pub timeout: Duration,
    /// The transmission flags of the handshake.
    pub server_flags: u16,
    /// How long requests wait for a new connection when none is left, in seconds (rounded up), before they fail.
    pub dead_conn_timeout: Duration,
    /// Shown in `/sys/block/nbdN/backend`; each [`reconfigure`] must give the same.
    pub backend_identifier: &'a str,
    /// Connections after their handshake; the kernel keeps its own hold of them.
    pub sockets: &'a [BorrowedFd<'a>],
}

/// New connections for a device; [`reconfigure`] takes it.
#[derive(Clone, Debug)]
pub struct Reconfigure<'a> {
    /// N of `/dev/nbdN`.
    pub index: u32,
    /// As in [`Connect`].
    pub timeout: Duration,
    /// As in [`Connect`].
    pub dead_conn_timeout: Duration,
    /// As it was given to [`connect`].
    pub backend_identifier: &'a str,
    /// As many as connections died: the kernel puts each in a dead one's place.
    pub sockets: &'a [BorrowedFd<'a>],
}

/// Makes an NBD device and answers its number.
///
/// # Errors
/// [`NbdError::NoNbd`], [`NbdError::Busy`], [`NbdError::Refused`] (EINVAL: sizes or flags), [`NbdError::NoIndex`].
pub fn connect(device: &Connect<'_>) -> Result<u32, NbdError> {
    let (mut socket, family) = open()?;
    let answers =
        socket
            .request(family.id, 0, &device.body())
            .map_err(|source| match (source.raw_os_error(), device.index) {
                (Some(libc::EBUSY), Some(index)) => NbdError::Busy { index, source },
                _ => NbdError::Refused {
                    action: "connect",
                    source,
                },
            })?;
    let named = answers.iter().find_map(|(_, body)| index_in(body, NBD_CMD_CONNECT));
    named.or(device.index).ok_or(NbdError::NoIndex)
}

/// Puts new connections in the place of dead ones. The socket given is one per [`LinkDead`].
///
/// # Errors
/// [`NbdError::Refused`]: ENOSPC if no connection is dead, EINVAL if the device is not connected or another's.
pub fn reconfigure(device: &Reconfigure<'_>) -> Result<(), NbdError> {
    command("reconfigure", &device.body())
}

/// Takes a device away; its requests fail. The server is told goodbye on every connection that lives.
///
/// # Errors
/// [`NbdError::Refused`]: EINVAL if there is no such device.
pub fn disconnect(index: u32) -> Result<(), NbdError> {
    command("disconnect", &disconnect_body(index))
}

fn command(action: &'static str, body: &Body) -> Result<(), NbdError> {
    let (mut socket, family) = open()?;
    socket
        .request(family.id, 0, body)
        .map(drop)
        .map_err(|source| NbdError::Refused { action, source })
}

impl Connect<'_> {
    fn body(&self) -> Body {
        let command = generic(NBD_CMD_CONNECT, VERSION);
        let body = match self.index {
            Some(index) => command.attr(NBD_ATTR_INDEX, &index.to_ne_bytes()),
            None => command,
        };
        body.attr(NBD_ATTR_SIZE_BYTES, &self.size.to_ne_bytes())
            .attr(NBD_ATTR_BLOCK_SIZE_BYTES, &self.block_size.to_ne_bytes())
            .attr(NBD_ATTR_TIMEOUT, &seconds(self.timeout).to_ne_bytes())
            .attr(NBD_ATTR_SERVER_FLAGS, &u64::from(self.server_flags).to_ne_bytes())
            .nest(NBD_ATTR_SOCKETS, &socket_list(self.sockets))
            .attr(
                NBD_ATTR_DEAD_CONN_TIMEOUT,
                &seconds(self.dead_conn_timeout).to_ne_bytes(),
            )
            .attr_string(NBD_ATTR_BACKEND_IDENTIFIER, self.backend_identifier)
    }
}

impl Reconfigure<'_> {
    fn body(&self) -> Body {
        generic(NBD_CMD_RECONFIGURE, VERSION)
            .attr(NBD_ATTR_INDEX, &self.index.to_ne_bytes())
            .attr(NBD_ATTR_TIMEOUT, &seconds(self.timeout).to_ne_bytes())
            .nest(NBD_ATTR_SOCKETS, &socket_list(self.sockets))
            .attr(
                NBD_ATTR_DEAD_CONN_TIMEOUT,
                &seconds(self.dead_conn_timeout).to_ne_bytes(),
            )
            .attr_string(NBD_ATTR_BACKEND_IDENTIFIER, self.backend_identifier)
    }
}

/// Rounded up: less than a second must not become "for ever".
fn seconds(duration: Duration) -> u64 {
    duration
        .as_secs()
        .saturating_add(u64::from(duration.subsec_nanos() > 0))
}

fn disconnect_body(index: u32) -> Body {
    generic(NBD_CMD_DISCONNECT, VERSION).attr(NBD_ATTR_INDEX, &index.to_ne_bytes())
}

fn socket_list(sockets: &[BorrowedFd<'_>]) -> Body {
    sockets.iter().fold(Body::default(), |list, socket| {
        // The kernel reads the descriptor as unsigned.
        let fd = socket.as_raw_fd().cast_unsigned().to_ne_bytes();
        list.nest(NBD_SOCK_ITEM, &Body::default().attr(NBD_SOCK_FD, &fd))
    })
}

/// The device number in a message of the family, if it is `command`.
fn index_in(body: &[u8], command: u8) -> Option<u32> {
    if body.first() != Some(&command) {
        return None;
    }
    attributes(body, GENERIC_HEADER)
        .find(|(kind, _)| *kind == NBD_ATTR_INDEX)
        .and_then(|(_, value)| u32_at(value, 0))
}

fn open() -> Result<(netlink::Socket, Family), NbdError> {
    let found = netlink::Socket::open_generic(FAMILY).map_err(|source| NbdError::Netlink { source })?;
    found.ok_or(NbdError::NoNbd {
        source: io::ErrorKind::NotFound.into(),
    })
}

/// A connection of a device died; other connections of it may live.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkDead {
    /// N of `/dev/nbdN`.
    pub index: u32,
}

/// The kernel's announcements of dead connections.
#[derive(Debug)]
pub struct Watch {
    socket: netlink::Socket,
    family: u16,
    waiting: std::collections::VecDeque<LinkDead>,
}

impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Watch {
    /// Begins to listen. Open it before [`connect`], and nothing falls between.
    ///
    /// # Errors
    /// [`NbdError::NoNbd`], [`NbdError::Netlink`].
    pub fn open() -> Result<Self, NbdError> {
        let (mut socket, family) = open()?;
        let group = family.group(MULTICAST_GROUP).ok_or(NbdError::NoNbd {
            source: io::ErrorKind::NotFound.into(),
        })?;
        socket.join(group).map_err(|source| NbdError::Netlink { source })?;
        Ok(Self {
            socket,
            family: family.id,
            waiting: std::collections::VecDeque::new(),
        })
    }

    /// The next death, or `None` after `timeout` (`None` waits for ever). Call it until it answers `None` before you
    /// wait on the descriptor: one datagram may tell of several.
    ///
    /// # Errors
    /// [`NbdError::Lost`], [`NbdError::Netlink`].
    pub fn next(&mut self, timeout: Option<Duration>) -> Result<Option<LinkDead>, NbdError> {
        let deadline = deadline(timeout);
        loop {
            if let Some(dead) = self.waiting.pop_front() {
                return Ok(Some(dead));
            }
            match self.socket.receive(left(deadline)) {
                Ok(None) => return Ok(None),
                Ok(Some(datagram)) => self.waiting.extend(deaths(&datagram, self.family)),
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => return Err(NbdError::Lost),
                Err(source) => return Err(NbdError::Netlink { source }),
            }
        }
    }
}

fn deaths(datagram: &[u8], family: u16) -> impl Iterator<Item = LinkDead> {
    messages(datagram)
        .filter(move |message| message.kind == family)
        .filter_map(|message| index_in(message.body, NBD_CMD_LINK_DEAD))
        .map(|index| LinkDead { index })
}

#[cfg(all(test, target_endian = "little"))]
mod tests {
    use super::*;
    use crate::netlink::{NLM_F_ACK, NLM_F_REQUEST, encode};
    use proptest::prelude::*;

    /// Standard output, so that the number in the bytes is known: nothing is read or written through it.
    fn fd_one() -> BorrowedFd<'static> {
        // SAFETY: descriptor 1 is open for the whole life of a test process.
        unsafe { BorrowedFd::borrow_raw(1) }
    }

    #[test]
    fn connect_has_these_bytes() {
        let device = Connect {
            index: Some(3),
            size: 0x1122_3344_5500,
            block_size: 4096,
            timeout: Duration::from_millis(29_001),
            server_flags: 0x10d,
            dead_conn_timeout: Duration::from_secs(3600),
            backend_identifier: "abc",
            sockets: &[fd_one(), fd_one()],
        };
        #[rustfmt::skip]
        let expected: &[u8] = &[
            124, 0, 0, 0, 0x21, 0, 5, 0, 9, 0, 0, 0, 0, 0, 0, 0, // length, family, REQUEST|ACK, sequence, port
            1, 1, 0, 0,                                          // CONNECT, version
            8, 0, 1, 0, 3, 0, 0, 0,                              // INDEX
            12, 0, 2, 0, 0x00, 0x55, 0x44, 0x33, 0x22, 0x11, 0, 0, // SIZE_BYTES
            12, 0, 3, 0, 0, 0x10, 0, 0, 0, 0, 0, 0,              // BLOCK_SIZE_BYTES
            12, 0, 4, 0, 30, 0, 0, 0, 0, 0, 0, 0,                // TIMEOUT
            12, 0, 5, 0, 0x0d, 1, 0, 0, 0, 0, 0, 0,              // SERVER_FLAGS
            28, 0, 7, 0x80,                                      // SOCKETS
            12, 0, 1, 0x80, 8, 0, 1, 0, 1, 0, 0, 0,              // ITEM {FD}
            12, 0, 1, 0x80, 8, 0, 1, 0, 1, 0, 0, 0,
            12, 0, 8, 0, 0x10, 0x0e, 0, 0, 0, 0, 0, 0,           // DEAD_CONN_TIMEOUT
            8, 0, 10, 0, b'a', b'b', b'c', 0,                    // BACKEND_IDENTIFIER
        ];
        assert_eq!(*encode(0x21, NLM_F_REQUEST | NLM_F_ACK, 9, &device.body()), expected);
        let any = Connect { index: None, ..device };
        assert_eq!(any.body().bytes()[..8], [1, 1, 0, 0, 12, 0, 2, 0]);
    }

    #[test]
    fn reconfigure_has_these_bytes() {
        let device = Reconfigure {
            index: 3,
            timeout: Duration::from_secs(30),
            dead_conn_timeout: Duration::from_secs(3600),
            backend_identifier: "abc",
            sockets: &[fd_one()],
        };
        #[rustfmt::skip]
        let expected: &[u8] = &[
            3, 1, 0, 0,
            8, 0, 1, 0, 3, 0, 0, 0,
            12, 0, 4, 0, 30, 0, 0, 0, 0, 0, 0, 0,
            16, 0, 7, 0x80, 12, 0, 1, 0x80, 8, 0, 1, 0, 1, 0, 0, 0,
            12, 0, 8, 0, 0x10, 0x0e, 0, 0, 0, 0, 0, 0,
            8, 0, 10, 0, b'a', b'b', b'c', 0,
        ];
        assert_eq!(device.body().bytes(), expected);
    }

    #[test]
    fn disconnect_has_these_bytes() {
        assert_eq!(disconnect_body(7).bytes(), [2, 1, 0, 0, 8, 0, 1, 0, 7, 0, 0, 0]);
    }

    #[test]
    fn a_dead_link_is_told_with_its_index() {
        let index = |command, index: u32| generic(command, 1).attr(NBD_ATTR_INDEX, &index.to_ne_bytes());
        let datagram = [
            encode(0x21, 0, 0, &index(NBD_CMD_LINK_DEAD, 5)),
            encode(0x21, 0, 0, &index(NBD_CMD_CONNECT, 6)),
            encode(0x22, 0, 0, &index(NBD_CMD_LINK_DEAD, 7)),
            encode(0x21, 0, 0, &index(NBD_CMD_LINK_DEAD, 8)),
        ];
        let datagram: Vec<u8> = datagram.iter().flat_map(|message| message.to_vec()).collect();
        let seen: Vec<_> = deaths(&datagram, 0x21).collect();
        assert_eq!(seen, [LinkDead { index: 5 }, LinkDead { index: 8 }]);
    }

    #[test]
    fn a_kernel_without_nbd_is_told_apart() {
        // A machine with the module answers, one without says why.
        assert!(matches!(open().map(drop), Ok(()) | Err(NbdError::NoNbd { .. })));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read(bytes: Vec<u8>) {
            let _ = deaths(&bytes, 0x21).count();
        }
    }
}
