//! How a session ends, and with it perhaps the laptop's turn.

use std::time::Duration;

use stiefel_shared::bundle::Goodbye;
use stiefel_shared::handover::After;
use stiefel_shared::session::SessionName;

use super::seat::{Holder, Seat, Session};
use super::{DRAIN, Inner, News, refuse};
use crate::http::Refusal;
use crate::role::End;
use crate::role::link::Up;

/// How long the link outlives the goodbye: the desktop asks again for 18 s if the answer gets lost.
const LINGER: Duration = Duration::from_secs(20);

/// What follows when the one desktop that had the disk has gone: what the screen says, and whether the laptop's turn ends.
const fn after_goodbye(goodbye: Goodbye, after: After) -> (&'static str, Option<End>) {
    match (goodbye, after) {
        (Goodbye::Reboot, _) => ("the desktop reboots; serving on", None),
        (Goodbye::RebootAnew, _) => (
            "the desktop reboots, and its kernel or initrd was changed; the laptop goes home to collect it and can be woken \
             there",
            Some(End::Restart),
        ),
        (Goodbye::Poweroff, After::Stay) => ("the desktop is off; serving on", None),
        (Goodbye::Poweroff, After::Return) => (
            "the desktop is off; going back to the laptop's own system",
            Some(End::Restart),
        ),
        (Goodbye::Poweroff, After::Poweroff) => ("the desktop is off; switching off", Some(End::PowerOff)),
    }
}

impl Inner {
    /// Ends a session, in order. After an error the disk may still be written to: nobody else gets it.
    pub(super) fn close(&self, seat: &mut Seat, session: SessionName) -> Result<(), Refusal> {
        self.close_with(seat, session, |_, _| None)
    }

    /// As [`Inner::close`]; with the session the laptop's turn may end: that is decided when it is gone from the seat.
    pub(super) fn close_with(
        &self,
        seat: &mut Seat,
        session: SessionName,
        decide: impl FnOnce(&mut Seat, &Holder) -> Option<End>,
    ) -> Result<(), Refusal> {
        if let Some(closed) = &seat.closed {
            return refuse(closed);
        }
        let Some(Session {
            holder, place, served, ..
        }) = seat.take(session)
        else {
            return Ok(());
        };
        let link = self.links.take(session);
        let guest = served.base().is_some();
        match served.close(&*self.setup.machine, DRAIN) {
            Err(error) if !guest => return Err(self.break_off(seat, &error)),
            // Nothing of it is on the disk.
            Err(error) => self
                .setup
                .console
                .warn(&format!("a guest's session has not ended well: {error:#}")),
            Ok(()) => {}
        }
        drop(link);
        // Before the record goes: a process that was killed in between would serve on.
        if let Some(end) = decide(seat, &holder) {
            self.end_turn(seat, Some(session), end);
        }
        // PID 1 may still have the disk open otherwise, so nobody may have it; it ends with the ramdisk.
        if let Err(error) = self.setup.records.forget(session, place) {
            return Err(self.break_off(seat, &error));
        }
        seat.denied = None;
        self.setup.person.never_mind();
        self.end_life(session);
        Ok(())
    }

    /// What is done with the disk is not known any more: nobody gets it, and the laptop goes home, whatever hangs.
    pub(super) fn break_off(&self, seat: &mut Seat, error: &anyhow::Error) -> Refusal {
        let reason = format!("{error:#}");
        seat.closed = Some(reason.clone());
        if let Err(error) = self.setup.records.verdict(End::GiveUp) {
            self.setup.console.warn(&format!("{error:#}"));
        }
        // Without a receiver the laptop's turn is over already.
        let _ = self.setup.news.send(News::Broken(reason.clone()));
        Refusal { reason }
    }

    /// Ends the session of a desktop that did not get the whole bundle.
    pub(super) fn give_up(&self, session: SessionName) {
        // What fails was said already.
        let _ = self.close(&mut self.seat(), session);
    }

    pub(super) fn goodbye(&self, session: SessionName, goodbye: Goodbye) -> Result<(), Refusal> {
        let mut seat = self.seat();
        if seat.find(session).is_none() {
            return refuse(seat.closed.as_deref().unwrap_or("this session is over"));
        }
        let mut says = String::new();
        self.close_after(&mut seat, session, |seat, holder| {
            let (words, end) = self.after(seat, holder, goodbye);
            says = words;
            end
        })?;
        if !self.has_guests() {
            self.setup
                .console
                .info("the desktop has said goodbye; the disk is flushed and closed");
        }
        self.setup.console.info(&says);
        Ok(())
    }

    /// What the screen says after a desktop has gone, and whether the laptop's turn ends.
    pub(super) fn after(&self, seat: &mut Seat, holder: &Holder, goodbye: Goodbye) -> (String, Option<End>) {
        if self.has_guests() {
            return self.guest_goes(seat, holder, goodbye);
        }
        let (says, end) = after_goodbye(goodbye, self.handover.after);
        (says.to_owned(), end)
    }

    /// Lets nobody in any more, and has PID 1 know that the laptop's turn ends; `last` is whose goodbye it was, if it was one.
    pub(super) fn end_turn(&self, seat: &mut Seat, last: Option<SessionName>, end: End) {
        seat.closed = Some("the laptop is going home; wait until it is there, it can be woken then".to_owned());
        // A turn ends once: nobody gets here after it was closed.
        let _ = self.over.set((last, end));
        if let Err(error) = self.setup.records.verdict(end) {
            self.setup.console.warn(&format!("{error:#}"));
        }
    }

    /// As [`Inner::close_with`], but the link stays until the answer to the goodbye has gone through it.
    fn close_after(
        &self,
        seat: &mut Seat,
        session: SessionName,
        decide: impl FnOnce(&mut Seat, &Holder) -> Option<End>,
    ) -> Result<(), Refusal> {
        let link = self.links.take(session);
        let closed = self.close_with(seat, session, decide);
        if let Some(link) = link {
            self.linger(link);
        }
        closed
    }

    /// Takes a link down when nothing is said through it any more.
    fn linger(&self, link: Up) {
        let spawned = std::thread::Builder::new().name("link-end".to_owned()).spawn(move || {
            std::thread::sleep(LINGER);
            drop(link);
        });
        if let Err(error) = spawned {
            self.setup
                .console
                .warn(&format!("the link ends before the desktop has its answer: {error}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn after_power_off_the_laptop_does_what_is_configured_and_after_reboot_it_serves_on_unless_the_kernel_changed() {
        assert_eq!(after_goodbye(Goodbye::Poweroff, After::Return).1, Some(End::Restart));
        assert_eq!(after_goodbye(Goodbye::Poweroff, After::Poweroff).1, Some(End::PowerOff));
        assert_eq!(after_goodbye(Goodbye::Poweroff, After::Stay).1, None);
        for after in [After::Return, After::Stay, After::Poweroff] {
            assert_eq!(after_goodbye(Goodbye::Reboot, after).1, None);
            assert_eq!(after_goodbye(Goodbye::RebootAnew, after).1, Some(End::Restart));
        }
    }
}
