//! Discovery on the laptop: hears what desktops ask on the wire, answers what [`Responder`] tells it to.
//!
//! Counterpart: `client::discovery`. Bytes and rules: docs/protocol.md, "Discovery". One socket serves all
//! interfaces: the scope id of a link-local address says which one, so a renamed or re-plugged NIC needs no new
//! socket. What does not come from a link-local address of an admitted interface is dropped: routers do not forward
//! such addresses, so it was sent on that very link.

use std::collections::HashSet;
use std::io;
use std::net::{Ipv6Addr, SocketAddr, SocketAddrV6};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use socket2::{Domain, Protocol, Socket, Type};
use stiefel_shared::discovery::{DATAGRAM, GROUP, LinkEvent, Responder, Woken};
use tokio::net::UdpSocket;
use tokio::sync::mpsc;

/// The index that Linux gives the loopback interface; its addresses carry no scope id.
pub(crate) const LOOPBACK: u32 = 1;

/// Why the laptop cannot be found.
#[derive(Debug, thiserror::Error)]
pub enum DiscoveryError {
    /// The port is not ours.
    #[error("cannot listen for desktops on UDP port {port}; end the other program that uses it (`ss -ulpn`)")]
    Bind {
        /// The UDP port.
        port: u16,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Opens the socket on `port` (0: any, for tests).
///
/// # Errors
/// [`DiscoveryError::Bind`]. Call it inside a tokio runtime.
pub fn bind(port: u16) -> Result<UdpSocket, DiscoveryError> {
    (|| {
        let socket = Socket::new(Domain::IPV6, Type::DGRAM.nonblocking().cloexec(), Some(Protocol::UDP))?;
        socket.set_only_v6(true)?;
        // Answers never leave the link.
        socket.set_unicast_hops_v6(1)?;
        socket.bind(&SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)).into())?;
        UdpSocket::from_std(socket.into())
    })()
    .map_err(|source| DiscoveryError::Bind { port, source })
}

/// Answers desktops until `woken` is closed.
///
/// `links` names the interfaces that take part (wired ones; the caller chooses), as they come and go. `woken` gets
/// each authenticated wake; one that is not followed is reset by [`Responder::set_state`]. `responder` is shared
/// with [`crate::http`], which asks it what was offered.
pub async fn run(
    socket: UdpSocket,
    responder: Arc<Mutex<Responder>>,
    mut links: mpsc::Receiver<LinkEvent>,
    woken: mpsc::Sender<Woken>,
) {
    let mut admitted = HashSet::new();
    let mut links_open = true;
    // One byte more than any datagram of ours: a longer one is seen to be longer.
    let mut buffer = [0; DATAGRAM + 1];
    loop {
        tokio::select! {
            () = woken.closed() => return,
            event = links.recv(), if links_open => match event {
                Some(event) => follow(&socket, &mut admitted, &event),
                None => links_open = false,
            },
            received = socket.recv_from(&mut buffer) => {
                let Ok((length, SocketAddr::V6(from))) = received else {
                    // Only a passing shortage of memory can bring us here; not in a busy loop.
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                };
                if !is_admitted(&admitted, &from) {
                    continue;
                }
                let datagram = buffer.get(..length).unwrap_or_default();
                let answer = responder
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .receive(Instant::now(), from, datagram);
                let Some(answer) = answer else { continue };
                // A lost answer is asked for again.
                let _ = socket.try_send_to(&answer.datagram, from.into());
                if let Some(wake) = answer.woken
                    && woken.send(wake).await.is_err()
                {
                    return;
                }
            }
        }
    }
}

fn follow(socket: &UdpSocket, admitted: &mut HashSet<u32>, event: &LinkEvent) {
    // Joining fails when it was joined before, or the interface is gone already; leaving, when the kernel was faster.
    match event {
        LinkEvent::Added { index, .. } => {
            admitted.insert(*index);
            let _ = socket.join_multicast_v6(&GROUP, *index);
        }
        LinkEvent::Removed { index } => {
            admitted.remove(index);
            let _ = socket.leave_multicast_v6(&GROUP, *index);
        }
    }
}

fn is_admitted(admitted: &HashSet<u32>, from: &SocketAddrV6) -> bool {
    let interface = if from.ip().is_loopback() {
        LOOPBACK
    } else if from.ip().is_unicast_link_local() {
        from.scope_id()
    } else {
        return false;
    };
    admitted.contains(&interface)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_neighbours_on_admitted_links_are_heard() {
        let admitted = HashSet::from([2]);
        let heard = |ip: &str, scope| is_admitted(&admitted, &SocketAddrV6::new(ip.parse().unwrap(), 9, 0, scope));
        assert!(heard("fe80::1", 2));
        assert!(!heard("fe80::1", 3));
        assert!(!heard("::1", 0));
        assert!(!heard("2001:db8::1", 2));
        assert!(!heard("fd00::1", 2));
    }

    #[tokio::test]
    async fn a_port_in_use_is_named() {
        let first = bind(0).unwrap();
        let port = first.local_addr().unwrap().port();
        assert!(bind(port).unwrap_err().to_string().contains(&port.to_string()));
    }
}
