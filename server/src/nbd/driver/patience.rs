//! Looks for a moment before it sleeps.
//!
//! A thread that sleeps on a core that has nothing else to do takes tens of microseconds to wake, longer than a client takes
//! to send its next request or piece. So the socket is asked for a while, every time after everyone else who wants the core,
//! less and less often where that was in vain, so that a client with little to do costs nothing.

use std::io;
use std::thread;
use std::time::{Duration, Instant};

/// How long to look: what waking up costs, for the one who wakes too (30 to 50 µs each on a virtual machine).
const LOOK: Duration = Duration::from_micros(100);
/// After as many looks in vain, one of `1 << MISSES` waits still begins with one.
const MISSES: u32 = 3;

/// Whether the next wait is worth a look.
#[derive(Default)]
pub(super) struct Patience {
    /// Looks in vain, one after the other.
    misses: u32,
    /// Waits to pass without a look.
    pass: u32,
}

impl Patience {
    /// The next wait will be a long one: not worth a look.
    pub(super) fn pass(&mut self) {
        self.pass = self.pass.max(1);
    }

    /// Attempts until it succeeds, at least once, for a moment at most; `None` means it is time to sleep.
    ///
    /// # Errors
    /// The attempt's.
    pub(super) fn look<T>(&mut self, mut attempt: impl FnMut() -> io::Result<Option<T>>) -> io::Result<Option<T>> {
        if let Some(found) = attempt()? {
            return Ok(Some(found));
        }
        if self.pass > 0 {
            self.pass -= 1;
            return Ok(None);
        }
        let begun = Instant::now();
        while begun.elapsed() < LOOK {
            thread::yield_now();
            if let Some(found) = attempt()? {
                self.misses = 0;
                return Ok(Some(found));
            }
        }
        self.misses = (self.misses + 1).min(MISSES);
        self.pass = (1 << self.misses) - 1;
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How often the attempt is made in one look.
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
    fn what_is_there_is_found_at_once() {
        let mut patience = Patience::default();
        for _ in 0..3 {
            assert_eq!(attempts(&mut patience, 1), 1);
        }
    }

    #[test]
    fn looks_in_vain_become_rare() {
        let mut patience = Patience::default();
        let mut looks = 0;
        for _ in 0..1000 {
            let begun = Instant::now();
            attempts(&mut patience, u32::MAX);
            looks += u32::from(begun.elapsed() >= LOOK);
        }
        assert!((MISSES..200).contains(&looks), "{looks} of 1000");
        assert_eq!(
            attempts(&mut patience, 1),
            1,
            "what is there already is taken nevertheless"
        );
    }

    #[test]
    fn a_wait_known_to_be_long_is_passed() {
        let mut patience = Patience::default();
        patience.pass();
        assert_eq!(attempts(&mut patience, u32::MAX), 1);
        assert!(attempts(&mut patience, u32::MAX) > 1, "the one after it is not");
    }

    #[test]
    fn a_find_restores_the_patience() {
        let mut patience = Patience::default();
        while patience.misses < MISSES {
            attempts(&mut patience, u32::MAX);
        }
        patience.pass = 0;
        assert_eq!(attempts(&mut patience, 2), 2, "found while looking");
        assert_eq!((patience.misses, patience.pass), (0, 0));
    }

    #[test]
    fn an_error_ends_the_look() {
        let result = Patience::default().look(|| Err::<Option<()>, _>(io::ErrorKind::BrokenPipe.into()));
        assert_eq!(result.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }
}
