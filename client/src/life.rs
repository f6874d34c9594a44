//! What the keeper makes of the laptop's signs of life: whether it is there, whether the session can still go on, and when the
//! desktop must be ended by force. Rules only, without clocks, sockets and devices.

use std::time::{Duration, Instant};

/// After this long without a sign the laptop counts as lost.
const SILENT: Duration = Duration::from_secs(10);
/// How long a shutdown that was asked for may take once the laptop is lost: it may come back, but a machine that cannot read
/// its disk does not end by itself.
const SHUTDOWN: Duration = Duration::from_secs(25);
/// The laptop goes home after the session's grace; so long later it has gone for certain.
const MARGIN: Duration = Duration::from_mins(1);
/// How long the screen says so before the desktop is switched off.
const FAREWELL: Duration = Duration::from_mins(1);

/// What has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum News {
    /// The laptop is not heard any more; everything waits.
    Lost,
    /// It is back after so long.
    Back(Duration),
    /// It has gone home, with the session: it will not come back.
    Over,
    /// The desktop must be switched off now.
    Off,
}

/// The laptop's life as far as it is known here.
#[derive(Debug)]
pub(crate) struct Life {
    heard: Instant,
    /// Since when it counts as lost.
    lost: Option<Instant>,
    over: Option<Instant>,
    /// Since when the desktop is to be switched off.
    wish: Option<Instant>,
    grace: Duration,
}

impl Life {
    /// The laptop was heard just now; it waits for `grace` before it goes home.
    pub(crate) fn new(now: Instant, grace: Duration) -> Self {
        Self {
            heard: now,
            lost: None,
            over: None,
            wish: None,
            grace,
        }
    }

    /// The laptop was heard.
    pub(crate) fn heard(&mut self, now: Instant) -> Option<News> {
        let silence = now.saturating_duration_since(self.heard);
        self.heard = now;
        self.over = None;
        self.lost.take().map(|_| News::Back(silence))
    }

    /// Somebody wants the desktop to be switched off, or not any more.
    pub(crate) fn wish(&mut self, now: Instant, off: bool) {
        self.wish = if off { self.wish.or(Some(now)) } else { None };
    }

    /// Whether the laptop is not heard.
    pub(crate) const fn lost(&self) -> bool {
        self.lost.is_some()
    }

    /// Since when it is not heard.
    pub(crate) fn silence(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.heard)
    }

    /// What time has brought.
    pub(crate) fn tick(&mut self, now: Instant) -> Option<News> {
        let silence = self.silence(now);
        let Some(lost) = self.lost else {
            self.lost = (silence >= SILENT).then_some(now);
            return self.lost.map(|_| News::Lost);
        };
        let since = |at: Instant| now.saturating_duration_since(at);
        if let Some(over) = self.over {
            return (self.wish.is_some() || since(over) >= FAREWELL).then_some(News::Off);
        }
        if silence >= self.grace.saturating_add(MARGIN) {
            self.over = Some(now);
            return Some(News::Over);
        }
        // A shutdown that was going on when the link was lost has its time, too.
        self.wish
            .filter(|wish| since(lost.max(*wish)) >= SHUTDOWN)
            .map(|_| News::Off)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRACE: Duration = Duration::from_mins(15);

    /// Lets time pass second by second; what changed, with its second.
    fn pass(life: &mut Life, begun: Instant, seconds: std::ops::Range<u64>) -> Vec<(u64, News)> {
        let at = |second| begun + Duration::from_secs(second);
        seconds
            .filter_map(|second| Some((second, life.tick(at(second))?)))
            .collect()
    }

    #[test]
    fn a_laptop_that_is_silent_for_ten_minutes_is_lost_and_comes_back() {
        let begun = Instant::now();
        let mut life = Life::new(begun, GRACE);
        assert_eq!(pass(&mut life, begun, 0..600), [(10, News::Lost)]);
        let back = begun + Duration::from_mins(10);
        assert_eq!(life.heard(back), Some(News::Back(Duration::from_mins(10))));
        assert!(!life.lost());
        assert_eq!(life.heard(back), None);
        assert_eq!(pass(&mut life, back, 0..9), []);
    }

    #[test]
    fn after_its_grace_the_session_is_over_and_a_minute_later_the_desktop_is_off() {
        let begun = Instant::now();
        let mut life = Life::new(begun, GRACE);
        let news = pass(&mut life, begun, 0..1021);
        assert_eq!(news, [(10, News::Lost), (960, News::Over), (1020, News::Off)]);
    }

    #[test]
    fn a_shutdown_without_the_laptop_ends_within_a_minute() {
        let begun = Instant::now();
        let mut life = Life::new(begun, GRACE);
        life.wish(begun + Duration::from_secs(1), true);
        let news = pass(&mut life, begun, 0..36);
        assert_eq!(news, [(10, News::Lost), (35, News::Off)]);
    }

    #[test]
    fn a_shutdown_with_the_laptop_takes_its_time_and_one_that_was_called_off_is_forgotten() {
        let begun = Instant::now();
        let mut life = Life::new(begun, GRACE);
        life.wish(begun, true);
        for second in 0..600 {
            let now = begun + Duration::from_secs(second);
            assert_eq!(life.heard(now), None);
            assert_eq!(life.tick(now), None);
        }
        life.wish(begun, false);
        assert_eq!(pass(&mut life, begun, 600..700), [(609, News::Lost)]);
    }

    #[test]
    fn a_link_that_is_lost_late_in_a_shutdown_has_its_time_to_come_back() {
        let begun = Instant::now();
        let mut life = Life::new(begun, GRACE);
        life.wish(begun, true);
        for second in 0..=60 {
            assert_eq!(life.heard(begun + Duration::from_secs(second)), None);
        }
        assert_eq!(pass(&mut life, begun, 61..96), [(70, News::Lost), (95, News::Off)]);
    }

    #[test]
    fn who_knows_that_it_is_over_may_switch_off_at_once() {
        let begun = Instant::now();
        let mut life = Life::new(begun, GRACE);
        assert_eq!(pass(&mut life, begun, 0..961).last(), Some(&(960, News::Over)));
        let now = begun + Duration::from_secs(961);
        life.wish(now, true);
        assert_eq!(life.tick(now), Some(News::Off));
    }
}
