//! Looks for a moment before it sleeps.
//!
//! A thread that sleeps on a core that has nothing else to do takes tens of microseconds to wake, longer than a client takes
//! to send its next request or piece. So the socket is asked for a while, every time after everyone else who wants the core.
//! That is paid by what comes in: a client whose requests or bytes are far apart, as over a real network, soon has the thread
//! sleep.

use std::io;
use std::thread;
use std::time::{Duration, Instant};

/// How long to look at most: what waking up costs, for the one who wakes too (30 to 50 µs each on a virtual machine).
const LOOK: Duration = Duration::from_micros(100);
/// Time to look that one request earns: a little more than a client on the same machine needs for the next one.
const PER_REQUEST: Duration = Duration::from_micros(25);
/// Bytes of payload that earn a nanosecond: some time at gigabytes per second, next to none at a network's speed.
const BYTES_PER_NANOSECOND: u64 = 4;
/// What can be saved up.
const MOST: Duration = Duration::from_millis(1);

/// Whether the next wait is worth a look.
pub(super) struct Patience {
    /// Time to look that was earned.
    credit: Duration,
    /// The next wait will be a long one.
    pass: bool,
}

impl Patience {
    pub(super) fn new() -> Self {
        Self {
            credit: LOOK,
            pass: false,
        }
    }

    /// A request has come.
    pub(super) fn request(&mut self) {
        self.earn(PER_REQUEST);
    }

    /// So many bytes of payload have come.
    pub(super) fn payload(&mut self, bytes: usize) {
        self.earn(Duration::from_nanos(bytes as u64 / BYTES_PER_NANOSECOND));
    }

    fn earn(&mut self, time: Duration) {
        self.credit = (self.credit + time).min(MOST);
    }

    /// The next wait will be a long one: not worth a look.
    pub(super) fn pass(&mut self) {
        self.pass = true;
    }

    /// Attempts until it succeeds, at least once, for a moment at most; `None` means it is time to sleep.
    ///
    /// # Errors
    /// The attempt's.
    pub(super) fn look<T>(&mut self, mut attempt: impl FnMut() -> io::Result<Option<T>>) -> io::Result<Option<T>> {
        if let Some(found) = attempt()? {
            return Ok(Some(found));
        }
        if std::mem::take(&mut self.pass) || self.credit < LOOK {
            return Ok(None);
        }
        let begun = Instant::now();
        loop {
            thread::yield_now();
            let found = attempt();
            let spent = begun.elapsed();
            if !matches!(found, Ok(None)) || spent >= LOOK {
                self.credit = self.credit.saturating_sub(spent);
                return found;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How often the attempt is made in one look; `until` then it succeeds.
    fn attempts(patience: &mut Patience, until: u32) -> u32 {
        let mut made = 0;
        let found = patience.look(|| {
            made += 1;
            Ok((made == until).then_some(()))
        });
        assert_eq!(found.unwrap().is_some(), made == until);
        made
    }

    #[test]
    fn what_is_there_is_found_at_once_and_costs_nothing() {
        let mut patience = Patience::new();
        for _ in 0..3 {
            assert_eq!(attempts(&mut patience, 1), 1);
        }
        assert_eq!(patience.credit, LOOK);
    }

    #[test]
    fn what_comes_soon_is_waited_for() {
        assert_eq!(attempts(&mut Patience::new(), 2), 2);
    }

    #[test]
    fn a_look_in_vain_is_paid_by_later_requests() {
        let mut patience = Patience::new();
        assert!(attempts(&mut patience, u32::MAX) > 1);
        for _ in 0..3 {
            assert_eq!(attempts(&mut patience, u32::MAX), 1, "nothing is left");
            patience.request();
        }
        patience.request();
        assert!(attempts(&mut patience, u32::MAX) > 1);
    }

    #[test]
    fn slow_bytes_earn_next_to_nothing_and_fast_ones_enough() {
        let mut patience = Patience::new();
        attempts(&mut patience, u32::MAX);
        (0..1000).for_each(|_| patience.payload(1));
        assert_eq!(attempts(&mut patience, u32::MAX), 1);
        patience.payload(1 << 20);
        assert!(attempts(&mut patience, u32::MAX) > 1);
    }

    #[test]
    fn a_wait_known_to_be_long_is_passed() {
        let mut patience = Patience::new();
        patience.pass();
        assert_eq!(attempts(&mut patience, u32::MAX), 1);
        assert!(attempts(&mut patience, u32::MAX) > 1, "the one after it is not");
    }

    #[test]
    fn an_error_ends_the_look() {
        let result = Patience::new().look(|| Err::<Option<()>, _>(io::ErrorKind::BrokenPipe.into()));
        assert_eq!(result.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }
}
