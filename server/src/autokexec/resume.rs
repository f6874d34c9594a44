//! Tells when the machine wakes up, without polling.
//!
//! A timer on the wall clock that never expires is cancelled when that clock jumps (timerfd_create(2), `TFD_TIMER_CANCEL_ON_SET`),
//! as it does at a resume. It also is when somebody sets the clock; who listens compares the clocks.

use std::io;
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};

/// Some thousand years, which the kernel still can add to now.
const NEVER: i64 = 1 << 36;

/// A clock that is watched.
#[derive(Debug)]
pub struct ClockWatch {
    timer: OwnedFd,
}

impl ClockWatch {
    /// Begins to watch.
    ///
    /// # Errors
    /// Those of timerfd_create(2) and timerfd_settime(2).
    pub fn new() -> io::Result<Self> {
        let watch = Self {
            timer: timerfd_create(TimerfdClockId::Realtime, TimerfdFlags::CLOEXEC)?,
        };
        watch.arm()?;
        Ok(watch)
    }

    fn arm(&self) -> io::Result<()> {
        let never = Timespec {
            tv_sec: NEVER,
            tv_nsec: 0,
        };
        let once = Itimerspec {
            it_interval: Timespec { tv_sec: 0, tv_nsec: 0 },
            it_value: never,
        };
        timerfd_settime(
            &self.timer,
            TimerfdTimerFlags::ABSTIME | TimerfdTimerFlags::CANCEL_ON_SET,
            &once,
        )?;
        Ok(())
    }

    /// Waits until the wall clock jumps.
    ///
    /// # Errors
    /// Those of read(2).
    pub fn wait(&self) -> io::Result<()> {
        loop {
            match rustix::io::read(&self.timer, &mut [0_u8; 8]) {
                Ok(_) | Err(Errno::CANCELED) => return self.arm(),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_can_be_watched() {
        assert!(ClockWatch::new().is_ok());
    }
}
