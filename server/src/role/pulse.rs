//! The laptop's side of the [signs of life](stiefel_shared::session::Pulse): answers the desktop's, and counts down when none
//! comes any more.

use std::net::{Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use socket2::{Domain, Protocol, Socket, Type};
use stiefel_shared::bundle::PULSE_PORT;
use stiefel_shared::session::LONGEST;
use tokio::net::UdpSocket;
use tokio::time::{MissedTickBehavior, interval};

use super::host::Host;

/// How often the silence is looked at.
const LOOK: Duration = Duration::from_secs(1);

/// Opens the port.
pub(super) fn bind() -> anyhow::Result<UdpSocket> {
    let bind = || {
        let socket = Socket::new(Domain::IPV6, Type::DGRAM.nonblocking().cloexec(), Some(Protocol::UDP))?;
        socket.set_only_v6(true)?;
        socket.bind(&SocketAddr::from((Ipv6Addr::UNSPECIFIED, PULSE_PORT)).into())?;
        UdpSocket::from_std(socket.into())
    };
    bind().with_context(|| format!("cannot listen on UDP port {PULSE_PORT} for the desktop's signs of life"))
}

/// Answers, and lets the host look at the silence, for ever.
pub(super) async fn run(socket: UdpSocket, host: Arc<Host>) -> std::convert::Infallible {
    let mut bytes = [0; LONGEST + 1];
    let mut look = interval(LOOK);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = look.tick() => host.look(),
            received = socket.recv_from(&mut bytes) => match received {
                Ok((length, peer)) => {
                    let answer = host.hear(peer, bytes.get(..length).unwrap_or_default());
                    if let Some(answer) = answer {
                        // A link that is down for the moment: the next beat will be answered.
                        let _ = socket.send_to(&answer, peer).await;
                    }
                }
                // An earlier answer could not be delivered; not in a busy loop.
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            },
        }
    }
}
