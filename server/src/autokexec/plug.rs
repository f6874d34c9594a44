//! Decides whether an interface that appears was plugged in by a person.
//!
//! Pure: told what happens and when. Rules (design.md, "The way of a boot" 1): a plug counts only after the interface was seen
//! absent for [`ABSENCE`]; never at the service's start, never right after a resume (USB devices come anew then), never for
//! an interface that flaps. One that was there at the start counts only once it was unplugged, else a laptop that returned
//! home with the cable in would leave again for ever. One that went away around a sleep comes back with the dock, however
//! long that takes: its return does not count. Nor does the first appearance right after a graphical login: docks are let in
//! then.

use std::fmt;
use std::path::Path;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

use super::sessions;

/// How long an interface must have been absent.
pub const ABSENCE: Duration = Duration::from_secs(10);
/// For how long after a resume nothing counts.
pub const AFTER_RESUME: Duration = Duration::from_secs(15);
/// An interface that went away this long before a sleep, or after it, went away by the sleep.
pub const AROUND_SLEEP: Duration = AFTER_RESUME;
/// For how long after a graphical login an interface that was not seen before does not count.
pub const AFTER_LOGIN: Duration = Duration::from_secs(30);
/// The two clocks are read one after the other; a sleep is longer than what that makes of difference.
const CLOCK_SLACK: Duration = Duration::from_secs(1);

/// A point in time by the clock that stops in suspend and by the one that does not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moment {
    /// CLOCK_MONOTONIC.
    pub awake: Duration,
    /// CLOCK_BOOTTIME.
    pub boot: Duration,
    /// When somebody last logged in to a graphical session, by CLOCK_MONOTONIC; `None` if nobody has.
    pub login: Option<Duration>,
}

impl Moment {
    /// Now.
    #[must_use]
    pub fn now() -> Self {
        let read = |clock| {
            let time = clock_gettime(clock);
            Duration::new(
                u64::try_from(time.tv_sec).unwrap_or(0),
                u32::try_from(time.tv_nsec).unwrap_or(0),
            )
        };
        Self {
            awake: read(ClockId::Monotonic),
            boot: read(ClockId::Boottime),
            login: last_login(Path::new(sessions::SESSIONS)),
        }
    }

    /// How long the machine has slept since it was started.
    fn slept(self) -> Duration {
        self.boot.saturating_sub(self.awake)
    }
}

/// The latest graphical login of a user (not of the login screen itself), by CLOCK_MONOTONIC.
fn last_login(folder: &Path) -> Option<Duration> {
    let sessions = sessions::list(folder).into_iter();
    sessions
        .filter(|session| session.is_graphical && session.is_users)
        .filter_map(|session| session.begun)
        .max()
}

/// What an appearance means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// A person plugged it in.
    Plugged,
    /// It was there all the time.
    AlreadyThere,
    /// It was away for too short a time.
    Flapped {
        /// How long.
        absent: Duration,
    },
    /// The machine has just woken up.
    Resumed {
        /// How long ago.
        ago: Duration,
    },
    /// It went away when the machine went to sleep or woke up.
    BackFromSleep,
    /// Somebody has just logged in.
    LoggedIn {
        /// How long ago.
        ago: Duration,
    },
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Plugged => f.write_str("plugged in"),
            Self::AlreadyThere => f.write_str("was there already; it counts once it was unplugged"),
            Self::Flapped { absent } => write!(
                f,
                "is back, or new since the service's start, after {:.1} s; a plug counts after {} s of absence",
                absent.as_secs_f32(),
                ABSENCE.as_secs()
            ),
            Self::Resumed { ago } => {
                write!(
                    f,
                    "appeared {:.1} s after the machine woke up, which is no plug; unplug it once",
                    ago.as_secs_f32()
                )
            }
            Self::BackFromSleep => {
                f.write_str("is back after it went away with the machine's sleep, which is no plug; unplug it once")
            }
            Self::LoggedIn { ago } => write!(
                f,
                "appeared for the first time, {:.1} s after a login, perhaps with a dock; unplug it once",
                ago.as_secs_f32()
            ),
        }
    }
}

/// One interface that is waited for.
#[derive(Debug)]
pub struct Plug {
    /// Since when it is absent; `None` while it is there.
    absent_since: Option<Duration>,
    /// Whether it was ever there since the service's start.
    seen: bool,
    /// It went away around a sleep.
    lost_by_sleep: bool,
    slept: Duration,
    resumed: Option<Duration>,
}

impl Plug {
    /// At the service's start.
    #[must_use]
    pub fn new(present: bool, now: Moment) -> Self {
        Self {
            absent_since: (!present).then_some(now.awake),
            seen: present,
            lost_by_sleep: false,
            slept: now.slept(),
            resumed: None,
        }
    }

    /// Tells that a clock may have jumped; to be called after a resume, at the latest with the next event.
    pub fn clock(&mut self, now: Moment) {
        if now.slept() > self.slept + CLOCK_SLACK {
            self.resumed = Some(now.awake);
            // The clock that stops in a sleep has not moved since it began.
            self.lost_by_sleep |= self.seen
                && self
                    .absent_since
                    .is_some_and(|since| now.awake.saturating_sub(since) < AROUND_SLEEP);
        }
        self.slept = now.slept();
    }

    /// The interface has appeared.
    pub fn appeared(&mut self, now: Moment) -> Verdict {
        self.clock(now);
        let Some(since) = self.absent_since.take() else {
            return Verdict::AlreadyThere;
        };
        let absent = now.awake.saturating_sub(since);
        let first = !std::mem::replace(&mut self.seen, true);
        let lost_by_sleep = std::mem::take(&mut self.lost_by_sleep);
        let ago = |at: Option<Duration>| at.and_then(|at| now.awake.checked_sub(at));
        match (ago(self.resumed), ago(now.login)) {
            (Some(ago), _) if ago < AFTER_RESUME => Verdict::Resumed { ago },
            _ if lost_by_sleep => Verdict::BackFromSleep,
            (_, Some(ago)) if first && ago < AFTER_LOGIN => Verdict::LoggedIn { ago },
            _ if absent < ABSENCE => Verdict::Flapped { absent },
            _ => Verdict::Plugged,
        }
    }

    /// The interface is gone.
    pub fn disappeared(&mut self, now: Moment) {
        self.clock(now);
        if self.absent_since.is_none() {
            self.absent_since = Some(now.awake);
            let since_resume = self.resumed.map(|at| now.awake.saturating_sub(at));
            self.lost_by_sleep = since_resume.is_some_and(|ago| ago < AROUND_SLEEP);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Seconds awake, seconds slept.
    fn at(awake: u64, slept: u64) -> Moment {
        Moment {
            awake: Duration::from_secs(awake),
            boot: Duration::from_secs(awake + slept),
            login: None,
        }
    }

    #[test]
    fn a_plug_after_ten_seconds_of_absence_counts() {
        let mut plug = Plug::new(false, at(100, 0));
        assert_eq!(plug.appeared(at(110, 0)), Verdict::Plugged);
        assert_eq!(plug.appeared(at(130, 0)), Verdict::AlreadyThere);
    }

    #[test]
    fn what_was_there_at_the_start_counts_only_once_it_was_unplugged() {
        let mut plug = Plug::new(true, at(100, 0));
        assert_eq!(plug.appeared(at(200, 0)), Verdict::AlreadyThere);
        plug.disappeared(at(300, 0));
        assert_eq!(plug.appeared(at(310, 0)), Verdict::Plugged);
    }

    #[test]
    fn what_appears_right_after_the_start_was_only_slow() {
        let mut plug = Plug::new(false, at(100, 0));
        assert!(matches!(plug.appeared(at(109, 0)), Verdict::Flapped { .. }));
        assert_eq!(plug.appeared(at(200, 0)), Verdict::AlreadyThere);
    }

    #[test]
    fn an_interface_that_flaps_never_counts() {
        let mut plug = Plug::new(true, at(0, 0));
        for second in (10..200).step_by(9) {
            plug.disappeared(at(second, 0));
            assert!(matches!(plug.appeared(at(second + 9, 0)), Verdict::Flapped { .. }));
        }
    }

    #[test]
    fn being_told_twice_of_an_absence_does_not_shorten_it() {
        let mut plug = Plug::new(true, at(0, 0));
        plug.disappeared(at(10, 0));
        plug.disappeared(at(19, 0));
        assert_eq!(plug.appeared(at(20, 0)), Verdict::Plugged);
    }

    #[test]
    fn what_appears_after_a_resume_does_not_count() {
        let mut plug = Plug::new(false, at(100, 0));
        plug.clock(at(200, 3600));
        assert!(matches!(plug.appeared(at(214, 3600)), Verdict::Resumed { .. }));
        plug.disappeared(at(220, 3600));
        assert_eq!(plug.appeared(at(230, 3600)), Verdict::Plugged);
    }

    #[test]
    fn what_went_away_around_a_sleep_does_not_count_when_it_comes_back_late() {
        for gone in [190, 200, 214] {
            let mut plug = Plug::new(true, at(100, 0));
            if gone < 200 {
                plug.disappeared(at(gone, 0));
                plug.clock(at(200, 3600));
            } else {
                plug.clock(at(200, 3600));
                plug.disappeared(at(gone, 3600));
            }
            assert_eq!(plug.appeared(at(900, 3600)), Verdict::BackFromSleep, "{gone}");
            plug.disappeared(at(1000, 3600));
            assert_eq!(plug.appeared(at(1010, 3600)), Verdict::Plugged, "once it was unplugged");
        }
    }

    #[test]
    fn what_was_unplugged_long_before_a_sleep_was_unplugged_by_hand() {
        let mut plug = Plug::new(true, at(100, 0));
        plug.disappeared(at(150, 0));
        plug.clock(at(200, 3600));
        assert_eq!(plug.appeared(at(300, 3600)), Verdict::Plugged);
    }

    #[test]
    fn a_first_appearance_right_after_a_login_may_be_a_dock() {
        let login = |awake, login| Moment {
            login: Some(Duration::from_secs(login)),
            ..at(awake, 0)
        };
        let mut plug = Plug::new(false, at(10, 0));
        assert!(matches!(plug.appeared(login(65, 60)), Verdict::LoggedIn { .. }));
        plug.disappeared(login(70, 60));
        assert_eq!(plug.appeared(login(85, 60)), Verdict::Plugged, "unplugged once");
        let mut plug = Plug::new(false, at(10, 0));
        assert_eq!(plug.appeared(login(90, 60)), Verdict::Plugged, "long after it");
        let mut plug = Plug::new(true, at(10, 0));
        plug.disappeared(at(40, 0));
        assert_eq!(plug.appeared(login(65, 60)), Verdict::Plugged, "seen before");
    }

    #[test]
    fn only_graphical_sessions_of_users_are_logins() {
        let dir = tempfile::tempdir().unwrap();
        let session = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        assert_eq!(last_login(dir.path()), None);
        session("1", "UID=0\nTYPE=tty\nCLASS=user\nMONOTONIC=9000000\n");
        session("c1", "UID=7\nTYPE=wayland\nCLASS=greeter\nMONOTONIC=8000000\n");
        assert_eq!(last_login(dir.path()), None);
        session("3", "UID=7\nTYPE=x11\nCLASS=user\nREALTIME=1\nMONOTONIC=5000000\n");
        session("4", "UID=7\nTYPE=wayland\nCLASS=user\nMONOTONIC=7000000\n");
        assert_eq!(last_login(dir.path()), Some(Duration::from_secs(7)));
        assert_eq!(last_login(Path::new("/nonexistent")), None);
    }

    #[test]
    fn a_resume_is_seen_by_the_clock_even_if_nobody_told() {
        let mut plug = Plug::new(false, at(100, 0));
        assert!(matches!(plug.appeared(at(200, 3600)), Verdict::Resumed { .. }));
    }

    #[test]
    fn time_asleep_is_no_time_of_absence() {
        let mut plug = Plug::new(true, at(100, 0));
        plug.disappeared(at(200, 0));
        plug.clock(at(201, 3600));
        assert!(!matches!(plug.appeared(at(205, 3600)), Verdict::Plugged));
    }

    #[test]
    fn long_after_a_resume_a_plug_counts() {
        let mut plug = Plug::new(false, at(100, 0));
        plug.clock(at(200, 3600));
        assert_eq!(plug.appeared(at(215, 3600)), Verdict::Plugged);
    }

    #[test]
    fn setting_the_wall_clock_is_no_resume() {
        let mut plug = Plug::new(false, at(100, 50));
        plug.clock(at(200, 50));
        assert_eq!(plug.appeared(at(201, 50)), Verdict::Plugged);
    }

    proptest! {
        /// Whatever happens, a plug counts only after ten seconds awake without the interface.
        #[test]
        fn no_order_of_events_triggers_without_absence(present: bool, events in prop::collection::vec((0_u64..30, 0_u64..5, 0_u8..3), 0..40)) {
            let (mut awake, mut slept) = (1000, 0);
            let mut plug = Plug::new(present, at(awake, slept));
            let mut absent_since = (!present).then_some(awake);
            let mut asleep_at = None;
            let (mut seen, mut by_sleep) = (present, false);
            for (pause, sleep, event) in events {
                awake += pause;
                slept += sleep * 2;
                if sleep > 0 {
                    asleep_at = Some(awake);
                    by_sleep |= seen && absent_since.is_some_and(|since| awake - since < 15);
                }
                match event {
                    0 => plug.clock(at(awake, slept)),
                    1 => {
                        plug.disappeared(at(awake, slept));
                        by_sleep |= absent_since.is_none() && asleep_at.is_some_and(|at| awake - at < 15);
                        absent_since = absent_since.or(Some(awake));
                    }
                    _ => {
                        let verdict = plug.appeared(at(awake, slept));
                        let absent = absent_since.take().is_some_and(|since| awake - since >= 10);
                        let quiet = asleep_at.is_none_or(|at| awake - at >= 15);
                        prop_assert_eq!(verdict == Verdict::Plugged, absent && quiet && !by_sleep);
                        (seen, by_sleep) = (true, false);
                    }
                }
            }
        }
    }
}
