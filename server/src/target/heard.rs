//! When something came from a borrower last: its kernel says something every five seconds, whatever its programs do.
//!
//! Who is silent for [`SILENT`] may be gone: people are told, and if the same machine asks for the same disk again, it was started anew
//! and what it had ends. Who is silent for [`GRACE`] has had the disk.

use std::time::{Duration, Instant};

/// After this long a loan is over.
pub(super) const GRACE: Duration = Duration::from_secs(300);
/// After this long a borrower is called silent: three of its signs of life did not come.
const SILENT: Duration = Duration::from_secs(16);

/// What people are to be told.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum News {
    /// It has become silent.
    Silent,
    /// It is back.
    Back,
}

/// What came from one borrower.
#[derive(Debug)]
pub(super) struct Heard {
    /// In bytes, all that had come when something came last.
    bytes: u64,
    at: Instant,
    silent: bool,
}

impl Heard {
    /// From now on.
    pub(super) const fn new(now: Instant) -> Self {
        Self {
            bytes: 0,
            at: now,
            silent: false,
        }
    }

    /// Looks at how many bytes have come so far; `None`: that cannot be told.
    pub(super) fn look(&mut self, received: Option<u64>, now: Instant) -> Option<News> {
        if let Some(bytes) = received.filter(|bytes| *bytes != self.bytes) {
            (self.bytes, self.at) = (bytes, now);
        }
        let silent = now.saturating_duration_since(self.at) >= SILENT;
        if silent == std::mem::replace(&mut self.silent, silent) {
            return None;
        }
        Some(if silent { News::Silent } else { News::Back })
    }

    /// Whether it was silent when that was looked at last.
    pub(super) const fn is_silent(&self) -> bool {
        self.silent
    }

    /// Whether it has been silent for too long.
    pub(super) fn is_over(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.at) >= GRACE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn silence_is_told_once_and_its_end_too() {
        let begun = Instant::now();
        let mut heard = Heard::new(begun);
        assert_eq!(heard.look(Some(100), begun + SECOND), None);
        assert_eq!(heard.look(Some(100), begun + SILENT), None);
        assert_eq!(heard.look(Some(100), begun + SECOND + SILENT), Some(News::Silent));
        assert!(heard.is_silent() && !heard.is_over(begun + SECOND * 20));
        assert_eq!(heard.look(Some(100), begun + SECOND * 30), None);
        assert_eq!(heard.look(Some(101), begun + SECOND * 31), Some(News::Back));
        assert!(!heard.is_silent());
    }

    #[test]
    fn a_loan_is_over_after_the_grace_also_when_nothing_can_be_told() {
        let begun = Instant::now();
        let mut heard = Heard::new(begun);
        assert_eq!(heard.look(None, begun + GRACE), Some(News::Silent));
        assert!(heard.is_over(begun + GRACE) && !heard.is_over(begun + GRACE - SECOND));
    }
}
