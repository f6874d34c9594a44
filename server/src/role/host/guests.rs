//! Guests: desktops that share the disk and write into the laptop's memory. How many there may be, and what each may take.

use std::time::Duration;

use stiefel_shared::bundle::Goodbye;
use stiefel_shared::handover::{After, SessionMode};

use super::seat::{Holder, MAX_GUESTS, Returning, Seat};
use super::{Host, Inner, News, Opening, refuse};
use crate::http::{Begin, Refusal};
use crate::role::End;
use crate::role::machine::Memory;

/// Memory that is left to the ramdisk's kernel and programs, in bytes.
const RESERVE: u64 = 128 << 20;
/// With less than this a system could not even boot, in bytes.
const LEAST: u64 = 64 << 20;
/// How long the laptop waits for a guest that reboots, when all others have gone.
const RETURN: Duration = Duration::from_mins(5);

/// What a new guest may take, when others were promised `promised` bytes and take `used` of them by now: half of what is left
/// of the machine's half, so that there is something for the next one, and nobody can take what another was promised.
fn share(memory: Memory, promised: u64, used: u64) -> Option<u64> {
    let half = (memory.total / 2).saturating_sub(promised);
    let rest = memory.available.saturating_sub(promised.saturating_sub(used));
    let share = half.min(rest.saturating_sub(RESERVE)) / 2;
    (share >= LEAST).then_some(share)
}

impl Inner {
    /// Whether desktops are guests here.
    pub(super) fn has_guests(&self) -> bool {
        self.handover.session == SessionMode::Guest
    }

    /// What one more guest gets.
    pub(super) fn plan_guest(&self, seat: &Seat, request: &Begin) -> Result<Opening, Refusal> {
        let full = |why: String| {
            self.setup.console.warn(&format!(
                "refused the desktop at {} (key {}): {why}",
                request.peer.ip(),
                request.key
            ));
            refuse(why)
        };
        let Some(place) = seat.free_place() else {
            return full(format!("{MAX_GUESTS} guests are here already; switch one of them off"));
        };
        let taken = seat.sessions.iter().filter_map(|session| session.served.filled());
        let (used, promised) = taken.fold((0, 0), |(used, promised), (takes, may)| (used + takes, promised + may));
        let memory = match self.setup.machine.memory() {
            Ok(memory) => memory,
            Err(error) => return full(format!("{error:#}")),
        };
        let Some(limit) = share(memory, promised, used) else {
            return full(format!(
                "the laptop's memory does not suffice for one more guest ({} MiB in all, {} MiB are promised to others); \
                 switch one of them off",
                memory.total >> 20,
                promised >> 20
            ));
        };
        Ok(Opening {
            place,
            guest: Some((seat.base(), limit)),
        })
    }

    /// A desktop is there (again).
    pub(super) fn has_returned(seat: &mut Seat, request: &Begin) {
        seat.leaving = None;
        seat.returning
            .retain(|guest| guest.key != request.key || guest.machine != request.machine);
    }

    /// Notes that a guest will be back.
    pub(super) fn will_return(seat: &mut Seat, holder: &Holder) {
        seat.returning.push(Returning {
            key: holder.key.clone(),
            machine: holder.machine,
            since: std::time::Instant::now(),
        });
    }

    /// Whether the laptop's turn ends when this guest goes, and what the screen says.
    pub(super) fn guest_goes(&self, seat: &mut Seat, holder: &Holder, goodbye: Goodbye) -> (String, Option<End>) {
        let who = format!("the guest at {} (key {})", holder.peer.ip(), holder.key);
        // What it has changed is gone, so what it boots has not changed.
        if goodbye != Goodbye::Poweroff {
            Self::will_return(seat, holder);
            return (
                format!("{who} reboots; what it has written is discarded. Serving on"),
                None,
            );
        }
        let gone = format!("{who} is off; what it has written is discarded");
        let others = seat.sessions.len();
        if others > 0 {
            return (format!("{gone}. {others} more are here; serving on"), None);
        }
        seat.returning.retain(|guest| guest.since.elapsed() < RETURN);
        let (says, end) = match self.handover.after {
            After::Stay => ("serving on", None),
            After::Return => ("going back to the laptop's own system", Some(End::Restart)),
            After::Poweroff => ("switching off", Some(End::PowerOff)),
        };
        if end.is_some() && !seat.returning.is_empty() {
            seat.leaving = end;
            return (format!("{gone}. Another one reboots; waiting for it"), None);
        }
        (format!("{gone}; {says}"), end)
    }
}

impl Host {
    /// Looks after what nobody tells of: guests whose memory gets full, and one that does not come back from its reboot.
    pub(in crate::role) fn look_after_guests(&self) {
        let inner = &self.0;
        // A change that lasts; there is time.
        let Ok(mut seat) = inner.seat.try_lock() else { return };
        for session in &mut seat.sessions {
            let nearly = |(used, limit): (u64, u64)| used >= limit / 10 * 9;
            if !session.warned && session.served.filled().is_some_and(nearly) {
                session.warned = true;
                inner.setup.console.warn(&format!(
                    "the memory for what the guest at {} (key {}) writes is nearly full; it will get write errors",
                    session.holder.peer.ip(),
                    session.holder.key
                ));
            }
        }
        let Some(end) = seat.leaving.filter(|_| seat.sessions.is_empty()) else {
            return;
        };
        seat.returning.retain(|guest| guest.since.elapsed() < RETURN);
        if seat.closed.is_none() && seat.returning.is_empty() {
            inner
                .setup
                .console
                .info("the guest that was to reboot does not come back; the laptop's turn ends");
            inner.end_turn(&mut seat, None, end);
            // Without a receiver the laptop's turn is over already.
            let _ = inner.setup.news.send(News::End(end));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn each_guest_gets_half_of_what_is_left_of_the_machines_half() {
        let memory = |available| Memory {
            total: 8192 * MIB,
            available: available * MIB,
        };
        assert_eq!(share(memory(8000), 0, 0), Some(2048 * MIB));
        assert_eq!(share(memory(8000), 2048 * MIB, 0), Some(1024 * MIB));
        // What the ramdisk itself takes counts.
        assert_eq!(share(memory(1128), 0, 0), Some(500 * MIB));
        // So does what others were promised and have not taken yet.
        assert_eq!(share(memory(1128), 500 * MIB, 400 * MIB), Some(450 * MIB));
        assert_eq!(share(memory(200), 0, 0), None);
    }

    proptest! {
        #[test]
        fn all_together_never_get_more_than_half_of_the_memory(total in 0..1_u64 << 44, taken in 0_u64..=100) {
            let available = total / 100 * taken;
            let mut promised = 0;
            while let Some(more) = share(Memory { total, available }, promised, 0) {
                promised += more;
                prop_assert!(promised <= total / 2 && promised + RESERVE <= available);
            }
        }
    }
}
