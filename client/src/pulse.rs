//! The desktop's side of the [signs of life](stiefel_shared::session::Pulse): sends one every two seconds, hears the answers.

use std::net::{Ipv6Addr, SocketAddrV6, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use anyhow::Context;
use stiefel_shared::bundle::{AttachSession, PULSE_PORT};
use stiefel_shared::discovery::Random;
use stiefel_shared::seal;
use stiefel_shared::session::{Beat, LONGEST, Pulse, SHORTEST, Sign};
use stiefel_sys::process;

/// Between two beats.
const EVERY: Duration = Duration::from_secs(2);
/// How many beats may still be answered: a sign that comes later than that says nothing of now.
const OPEN: usize = 4;

/// The heart.
pub(crate) struct Heart {
    pulse: Pulse,
    socket: UdpSocket,
    laptop: SocketAddrV6,
    number: u64,
    open: Vec<Random>,
    next: Instant,
}

impl Heart {
    /// Prepares the session's pulse; the socket lives in the caller's network namespace.
    pub(crate) fn new(session: &AttachSession, now: Instant) -> anyhow::Result<Self> {
        let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0)).context("no socket for signs of life")?;
        socket.set_nonblocking(true)?;
        Ok(Self {
            pulse: Pulse::new(&session.control, session.session.parse()?, 0),
            socket,
            laptop: SocketAddrV6::new(session.link.laptop, PULSE_PORT, 0, 0),
            number: 0,
            open: Vec::new(),
            next: now,
        })
    }

    /// How long until the next beat.
    pub(crate) fn rest(&self, now: Instant) -> Duration {
        self.next.saturating_duration_since(now)
    }

    /// Sends a beat when it is time.
    pub(crate) fn beat(&mut self, now: Instant) -> anyhow::Result<()> {
        if now < self.next {
            return Ok(());
        }
        self.next = now + EVERY;
        self.send(0, SHORTEST)
    }

    fn send(&mut self, mtu: u16, length: usize) -> anyhow::Result<()> {
        self.number += 1;
        let beat = Beat {
            number: self.number,
            mtu,
            random: seal::random()?,
            length,
        };
        let datagram = self.pulse.beat(&beat)?;
        if self.open.len() >= OPEN {
            self.open.remove(0);
        }
        self.open.push(beat.random);
        // A link that is down for the moment is what the silence will tell.
        let _ = self.socket.send_to(&datagram, self.laptop);
        Ok(())
    }

    /// Sends a beat of `length` bytes that asks for an MTU (0: for none), and waits for its sign.
    pub(crate) fn ask(&mut self, mtu: u16, length: usize, patience: Duration) -> Option<Sign> {
        self.open.clear();
        self.send(mtu, length).ok()?;
        let deadline = Instant::now() + patience;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let readable = process::poll(&[self.socket.as_fd()], Some(left)).ok()?;
            match self.hear() {
                Some(sign) => return Some(sign),
                None if !readable.contains(&true) => return None,
                None => {}
            }
        }
    }

    /// The latest sign that has come, if one has.
    pub(crate) fn hear(&mut self) -> Option<Sign> {
        let mut bytes = [0; LONGEST];
        let mut latest = None;
        while let Ok((length, _)) = self.socket.recv_from(&mut bytes) {
            let Ok((random, sign)) = self.pulse.read(bytes.get(..length).unwrap_or_default()) else {
                continue;
            };
            if let Some(at) = self.open.iter().position(|open| *open == random) {
                self.open.remove(at);
                latest = Some(sign);
            }
        }
        latest
    }
}

impl AsFd for Heart {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
