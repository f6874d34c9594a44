//! Whether a desktop lives: its signs of life, the countdown when none comes any more, and what the laptop asks of it.

use std::net::{IpAddr, SocketAddr};
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
    /// It is asked to power off.
    ask: bool,
}

impl Life {
    fn is_silent(&self) -> bool {
        self.heard.elapsed() >= SILENT
    }
}

impl Host {
    /// Hears a datagram; the answer, if it is the desktop's.
    pub(in crate::role) fn hear(&self, peer: SocketAddr, datagram: &[u8]) -> Option<Vec<u8>> {
        self.0.hear(peer, datagram)
    }

    /// Looks at how long the desktops have been silent: counts down, and in the end goes home.
    pub(in crate::role) fn look(&self) {
        for session in self.0.look() {
            let inner = Arc::clone(&self.0);
            tokio::task::spawn_blocking(move || inner.abandon(session));
        }
        self.look_after_guests();
    }

    /// Notes how the laptop is supplied; a desktop is asked to power off before the battery is empty.
    pub(in crate::role) fn supplied(&self, supply: Supply) {
        let inner = &self.0;
        let before = std::mem::replace(
            &mut *inner.supply.lock().unwrap_or_else(PoisonError::into_inner),
            supply,
        );
        let percent = supply.percent.unwrap_or_default();
        let asked = inner.lives().iter().all(|life| life.ask);
        if supply.is_low(CRITICAL) && !asked {
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

    /// Asks all desktops to power off, in order; whether there is one.
    pub(in crate::role) fn ask_power_off(&self) -> bool {
        let mut lives = self.0.lives();
        lives.iter_mut().for_each(|life| life.ask = true);
        !lives.is_empty()
    }

    /// Tells the sessions' links of an interface that came or went.
    pub(in crate::role) fn follow(&self, event: &LinkEvent) -> anyhow::Result<()> {
        let inner = &self.0;
        let silent: Vec<SessionName> = {
            let lives = inner.lives();
            let silent = lives.iter().filter(|life| life.is_silent());
            silent.map(|life| life.session).collect()
        };
        let (changed, outcome) = inner.links.follow(event, &silent);
        for (session, known) in changed {
            inner.setup.records.update(session, |record| record.link = known);
        }
        outcome
    }
}

impl Inner {
    pub(super) fn lives(&self) -> MutexGuard<'_, Vec<Life>> {
        self.lives.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn begin_life(&self, session: SessionName, control: &ControlKey, peer: IpAddr, heard: Option<u64>) {
        self.lives().push(Life {
            pulse: Pulse::new(control, session, heard.unwrap_or_default()),
            session,
            peer,
            heard: Instant::now(),
            // One that goes on was heard before.
            alive: heard.is_some(),
            counting: false,
            ending: false,
            ask: false,
        });
    }

    pub(super) fn end_life(&self, session: SessionName) {
        self.lives().retain(|life| life.session != session);
    }

    fn hear(&self, peer: SocketAddr, datagram: &[u8]) -> Option<Vec<u8>> {
        let mut lives = self.lives();
        let mut own = lives.iter_mut().filter(|life| life.peer == peer.ip());
        let (life, beat) = own.find_map(|life| {
            let beat = life.pulse.hear(datagram).ok()?;
            Some((life, beat))
        })?;
        (life.heard, life.alive) = (Instant::now(), true);
        if beat.number % NOTED == 1 {
            self.setup
                .records
                .update(life.session, |record| record.beat = beat.number);
        }
        if std::mem::take(&mut life.counting) {
            self.setup.console.info("the desktop is back");
        }
        if beat.mtu != 0 {
            match self.links.set_mtu(life.session, u32::from(beat.mtu)) {
                Ok(Some(known)) => self.setup.records.update(life.session, |record| record.link = known),
                Ok(None) => {}
                Err(error) => self
                    .setup
                    .console
                    .warn(&format!("the link's packet size stays: {error:#}")),
            }
        }
        let supply = *self.supply.lock().unwrap_or_else(PoisonError::into_inner);
        let sign = Sign {
            battery: supply.percent,
            mains: supply.mains,
            mtu: u16::try_from(self.links.mtu(life.session)).unwrap_or(u16::MAX),
            power_off: life.ask,
        };
        life.pulse.sign(&beat, sign).ok()
    }

    /// How long it takes until this session's desktop counts as silent, if nothing is heard of it; nothing for one that was never
    /// heard.
    pub(super) fn until_silent(&self, session: SessionName) -> Duration {
        let lives = self.lives();
        let mut heard = lives.iter().filter(|life| life.session == session && life.alive);
        heard
            .next()
            .map_or(Duration::ZERO, |life| SILENT.saturating_sub(life.heard.elapsed()))
    }

    /// Whether this session's desktop is not heard.
    pub(super) fn is_silent(&self, session: SessionName) -> bool {
        let lives = self.lives();
        lives.iter().any(|life| life.session == session && life.is_silent())
    }

    /// The sessions whose desktops have been silent for too long.
    fn look(&self) -> Vec<SessionName> {
        let mut lives = self.lives();
        lives.iter_mut().filter_map(|life| self.count_down(life)).collect()
    }

    /// Says how long a silent desktop is still waited for; its session when that is over.
    fn count_down(&self, life: &mut Life) -> Option<SessionName> {
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
                // Others may be there.
                _ if self.has_guests() => "the guest's session ends",
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
        if seat.find(session).is_none() {
            return;
        }
        if !self.is_silent(session) {
            let mut lives = self.lives();
            let own = lives.iter_mut().filter(|life| life.session == session);
            own.for_each(|life| life.ending = false);
            return;
        }
        self.setup
            .console
            .warn("the desktop was not heard for too long; its session is over");
        let mut outcome = (String::new(), None);
        let closed = self.close_with(&mut seat, session, |seat, holder| {
            outcome = self.after(seat, holder, Goodbye::Poweroff);
            outcome.1
        });
        if closed.is_err() {
            return;
        }
        if self.has_guests() {
            self.setup.console.info(&outcome.0);
        }
        if let Some(end) = outcome.1 {
            // Without a receiver the laptop's turn is over already.
            let _ = self.setup.news.send(News::End(end));
        }
    }
}
