//! How often a passphrase may be tried: a lost stick's key must be no machine for guessing.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// So many tries are taken within [`WINDOW`], by whomever.
const TRIES: usize = 4;
/// See [`TRIES`].
const WINDOW: Duration = Duration::from_mins(1);

/// The tries of late; bounded.
#[derive(Debug, Default)]
pub(super) struct Limit(VecDeque<Instant>);

impl Limit {
    /// Notes a try, if it is taken; else in how many seconds one will be.
    pub(super) fn take(&mut self, now: Instant) -> Result<(), u16> {
        match self.wait(now) {
            0 => {
                self.0.push_back(now);
                Ok(())
            }
            wait => Err(wait),
        }
    }

    /// In how many seconds the next try is taken.
    pub(super) fn wait(&mut self, now: Instant) -> u16 {
        self.0.retain(|at| now.saturating_duration_since(*at) < WINDOW);
        let Some(first) = self.0.front().filter(|_| self.0.len() >= TRIES) else {
            return 0;
        };
        let left = WINDOW.saturating_sub(now.saturating_duration_since(*first));
        u16::try_from(left.as_secs()).unwrap_or(u16::MAX).saturating_add(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn four_tries_a_minute_are_taken_and_the_next_when_the_first_is_a_minute_old() {
        let (mut limit, begun) = (Limit::default(), Instant::now());
        let at = |seconds| begun + Duration::from_secs(seconds);
        for second in 0..4 {
            assert_eq!(limit.wait(at(second)), 0);
            assert_eq!(limit.take(at(second)), Ok(()));
        }
        assert_eq!(limit.take(at(4)), Err(57));
        assert_eq!(limit.take(at(59)), Err(2));
        // A refused try does not count.
        assert_eq!(limit.take(at(60)), Ok(()));
        assert_eq!(limit.take(at(60)), Err(2));
        assert_eq!(limit.take(at(61)), Ok(()));
    }

    #[test]
    fn nobody_gets_more_by_asking_all_the_time() {
        let (mut limit, begun) = (Limit::default(), Instant::now());
        let taken = (0..600_u64).filter(|second| limit.take(begun + Duration::from_secs(*second)).is_ok());
        assert_eq!(taken.count(), 40);
        assert!(limit.0.len() <= TRIES);
    }
}
