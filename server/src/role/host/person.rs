//! What a person at the laptop decides: who gets the disk when two desktops want it, and when it goes home.

use std::sync::{MutexGuard, PoisonError, TryLockError};

use super::seat::{Holder, Seat};
use super::{Host, Inner, News, refuse};
use crate::http::{Begin, Refusal};
use crate::role::End;
use crate::role::keys::{Answer, PATIENCE};

impl Host {
    /// The key `p`.
    pub(in crate::role) fn power_off_pressed(&self) {
        let console = self.0.setup.console;
        if self.ask_power_off() {
            console.info(if self.0.has_guests() {
                "all guests are asked to power off"
            } else {
                "the desktop is asked to power off"
            });
        } else {
            console.info("no desktop is here; press h to go home");
        }
    }

    /// The key `h`.
    pub(in crate::role) fn home_pressed(&self) {
        self.0.go_home();
    }
}

impl Inner {
    /// Asks who is at the laptop whether `request` may end the session of another desktop, and ends it then. The seat is
    /// free while the question stands, so that the other one can say goodbye.
    pub(super) fn contend<'a>(
        &'a self,
        seat: MutexGuard<'a, Seat>,
        request: &Begin,
    ) -> Result<MutexGuard<'a, Seat>, Refusal> {
        let Some(present) = seat.holder().cloned() else {
            return Ok(seat);
        };
        if seat.denied.as_ref() == Some(&(request.key.clone(), request.machine)) {
            return self.in_use(request, &present);
        }
        drop(seat);
        let answer = self.setup.person.ask(&format!(
            "the desktop at {} (key {}) wants the disk, which the one at {} (key {}) has; press y within {} s to end that \
             one's session (what it has not written is lost), n to refuse\u{7}",
            request.peer.ip(),
            request.key,
            present.peer.ip(),
            present.key,
            PATIENCE.as_secs(),
        ));
        let mut seat = self.seat();
        if let Some(closed) = &seat.closed {
            return refuse(closed);
        }
        match seat.holder().cloned() {
            None => Ok(seat),
            // The answer was about the session that was there when it was asked.
            Some(now) if now.session == present.session && answer == Answer::Yes => {
                self.setup
                    .console
                    .warn("the session of the desktop that had the disk is ended");
                self.close(&mut seat, now.session)?;
                Ok(seat)
            }
            Some(now) => {
                if now.session == present.session && answer == Answer::No {
                    seat.denied = Some((request.key.clone(), request.machine));
                }
                self.in_use(request, &now)
            }
        }
    }

    /// Refuses a desktop, and tells it who has the disk.
    fn in_use<T>(&self, request: &Begin, present: &Holder) -> Result<T, Refusal> {
        let (peer, key, there) = (request.peer.ip(), &request.key, present.peer.ip());
        self.setup.console.warn(&format!(
            "refused the desktop at {peer} (key {key}): the disk is in use by the one at {there}"
        ));
        refuse(format!(
            "the disk is in use by another desktop (key {}); switch that one off, or restart the laptop",
            present.key
        ))
    }

    /// Ends the laptop's turn, if no desktop has the disk.
    fn go_home(&self) {
        let console = self.setup.console;
        let mut seat = match self.seat.try_lock() {
            Ok(seat) => seat,
            Err(TryLockError::Poisoned(seat)) => PoisonError::into_inner(seat),
            Err(TryLockError::WouldBlock) => {
                console.warn("a session begins or ends; press h again in a moment");
                return;
            }
        };
        if let Some(closed) = &seat.closed {
            console.warn(closed);
            return;
        }
        let present: Vec<Holder> = seat.sessions.iter().map(|session| session.holder.clone()).collect();
        if present.iter().any(|holder| !self.is_silent(holder.session)) {
            console.warn("a desktop is using the disk; press p to ask it to power off");
            return;
        }
        for (number, holder) in (1..).zip(&present) {
            console.warn(&format!(
                "the desktop (key {}) is not heard; its session is ended",
                holder.key
            ));
            let end = (number == present.len()).then_some(End::Restart);
            // What fails was said already.
            if self.close_with(&mut seat, holder.session, |_, _| end).is_err() {
                return;
            }
        }
        if !present.is_empty() {
            let _ = self.setup.news.send(News::End(End::Restart));
            return;
        }
        console.info("going back to the laptop's own system");
        self.end_turn(&mut seat, None, End::Restart);
        // Without a receiver the laptop's turn is over already.
        let _ = self.setup.news.send(News::End(End::Restart));
    }
}
