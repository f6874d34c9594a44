//! Whether the desktop lives: its signs of life, the countdown when none comes any more, and what the laptop asks of it.

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use stiefel_shared::bundle::{ControlKey, Goodbye};
use stiefel_shared::discovery::LinkEvent;
use stiefel_shared::handover::After;
use stiefel_shared::session::{Pulse, SessionName, Sign};

use super::{Host, Inner, News};
use crate::supply::Supply;

/// Below this charge the laptop warns, in per cent.
const LOW: u8 = 15;
/// Below this one it asks the desktop to power off.
const CRITICAL: u8 = 5;
/// After so long without a sign of life the desktop counts as silent.
const SILENT: Duration = Duration::from_secs(10);
/// How long a desktop may take from the bundle to its first sign.
const START: Duration = Duration::from_mins(5);
/// Every so many signs of life their number is written down.
const NOTED: u64 = 32;

/// The desktop's life as far as it is known here. A lock of its own: a session's change may last.
pub(super) struct Life {
    pulse: Pulse,
    session: SessionName,
    /// The desktop's address of this session.
    peer: IpAddr,
    /// Its last sign; before the first, the session's beginning.
    heard: Instant,
    /// It was heard at all.
    alive: bool,
    /// The countdown is on the screen.
    counting: bool,
    /// It was silent for too long, and the session is being ended.
    ending: bool,
}

impl Host {
    /// Hears a datagram; the answer, if it is the desktop's.
    pub(in crate::role) fn hear(&self, peer: SocketAddr, datagram: &[u8]) -> Option<Vec<u8>> {
        self.0.hear(peer, datagram)
    }

    /// Looks at how long the desktop has been silent: counts down, and in the end goes home.
    pub(in crate::role) fn look(&self) {
        if let Some(session) = self.0.look() {
            let inner = Arc::clone(&self.0);
            tokio::task::spawn_blocking(move || inner.abandon(session));
        }
    }

    /// Notes how the laptop is supplied; a desktop is asked to power off before the battery is empty.
    pub(in crate::role) fn supplied(&self, supply: Supply) {
        let inner = &self.0;
        let before = std::mem::replace(
            &mut *inner.supply.lock().unwrap_or_else(PoisonError::into_inner),
            supply,
        );
        let percent = supply.percent.unwrap_or_default();
        if supply.is_low(CRITICAL) && !inner.ask.load(Ordering::Acquire) {
            if self.ask_power_off() {
                inner.setup.console.error(&format!(
                    "the battery has {percent} % left: the desktop is asked to power off"
                ));
            }
        } else if supply.is_low(LOW) && !before.is_low(LOW) {
            inner
                .setup
                .console
                .warn(&format!("the battery has {percent} % left; plug the laptop in\u{7}"));
        }
    }

    /// Asks the desktop to power off, in order; whether there is one.
    pub(in crate::role) fn ask_power_off(&self) -> bool {
        let there = self.0.life().is_some();
        self.0.ask.store(there, Ordering::Release);
        there
    }

    /// Tells the session's link of an interface that came or went.
    pub(in crate::role) fn follow(&self, event: &LinkEvent) -> anyhow::Result<()> {
        let inner = &self.0;
        if let Some(known) = inner.setup.door.follow(event, inner.is_silent())? {
            inner.setup.records.update(|record| record.link = known);
        }
        Ok(())
    }
}

impl Inner {
    pub(super) fn life(&self) -> MutexGuard<'_, Option<Life>> {
        self.life.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn begin_life(&self, session: SessionName, control: &ControlKey, peer: IpAddr, heard: Option<u64>) {
        // Meant for the one before.
        self.ask.store(false, Ordering::Release);
        *self.life() = Some(Life {
            pulse: Pulse::new(control, session, heard.unwrap_or_default()),
            session,
            peer,
            heard: Instant::now(),
            // One that goes on was heard before.
            alive: heard.is_some(),
            counting: false,
            ending: false,
        });
    }

    fn hear(&self, peer: SocketAddr, datagram: &[u8]) -> Option<Vec<u8>> {
        let mut life = self.life();
        let life = life.as_mut().filter(|life| life.peer == peer.ip())?;
        let beat = life.pulse.hear(datagram).ok()?;
        (life.heard, life.alive) = (Instant::now(), true);
        if beat.number % NOTED == 1 {
            self.setup.records.update(|record| record.beat = beat.number);
        }
        if std::mem::take(&mut life.counting) {
            self.setup.console.info("the desktop is back");
        }
        if beat.mtu != 0
            && let Err(error) = self.setup.door.set_mtu(u32::from(beat.mtu))
        {
            self.setup
                .console
                .warn(&format!("the link's packet size stays: {error:#}"));
        }
        let supply = *self.supply.lock().unwrap_or_else(PoisonError::into_inner);
        let sign = Sign {
            battery: supply.percent,
            mains: supply.mains,
            mtu: u16::try_from(self.setup.door.mtu()).unwrap_or(u16::MAX),
            power_off: self.ask.load(Ordering::Acquire),
        };
        life.pulse.sign(&beat, sign).ok()
    }

    /// Whether there is a desktop that is not heard.
    pub(super) fn is_silent(&self) -> bool {
        self.life().as_ref().is_some_and(|life| life.heard.elapsed() >= SILENT)
    }

    /// The session whose desktop has been silent for too long.
    fn look(&self) -> Option<SessionName> {
        let mut life = self.life();
        let life = life.as_mut()?;
        // It cannot be heard before its kernel has started.
        let least = if life.alive { Duration::ZERO } else { START };
        let grace = Duration::from_secs(self.handover.grace).max(least);
        let silence = life.heard.elapsed();
        if silence < SILENT {
            return None;
        }
        if life.alive && !std::mem::replace(&mut life.counting, true) {
            self.setup
                .console
                .warn("the desktop is not heard any more; is the cable in?");
        }
        let left = grace.saturating_sub(silence);
        if left.is_zero() {
            let first = !std::mem::replace(&mut life.ending, true);
            return first.then_some(life.session);
        }
        if life.alive {
            let (minutes, seconds) = (left.as_secs() / 60, left.as_secs() % 60);
            let then = match self.handover.after {
                After::Return => "the laptop goes home",
                After::Stay => "its session ends",
                After::Poweroff => "the laptop switches off",
            };
            self.setup
                .console
                .progress(&format!("{then} in {minutes}:{seconds:02} min"));
        }
        None
    }

    /// Ends the session of a desktop that is not heard any more.
    pub(super) fn abandon(&self, session: SessionName) {
        let mut seat = self.seat();
        if seat.holder.as_ref().is_none_or(|holder| holder.session != session) {
            return;
        }
        if !self.is_silent() {
            if let Some(life) = self.life().as_mut() {
                life.ending = false;
            }
            return;
        }
        self.setup
            .console
            .warn("the desktop was not heard for too long; its session is over");
        if self.close_with(&mut seat, self.end_after(Goodbye::Poweroff)).is_ok() {
            // Without a receiver the laptop's turn is over already.
            let _ = self.setup.news.send(News::Silent);
        }
    }
}
