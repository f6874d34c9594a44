//! A machine's console on the user's terminal.

use std::io::{self, IsTerminal, Read};
use std::os::fd::AsFd;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};

use crate::vm::{Vm, VmError};

/// Ctrl-].
const LEAVE: u8 = 0x1d;
/// How often is looked whether the machine has ended.
const LOOK: Duration = Duration::from_millis(200);

/// The terminal as it was, restored at the end.
struct Raw(Option<Termios>);

impl Raw {
    fn set() -> Self {
        let stdin = io::stdin();
        let before = stdin.is_terminal().then(|| tcgetattr(&stdin).ok()).flatten();
        if let Some(before) = &before {
            let mut raw = before.clone();
            raw.make_raw();
            // Without it keys are only echoed twice.
            let _ = tcsetattr(&stdin, OptionalActions::Now, &raw);
        }
        Self(before)
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            let _ = tcsetattr(io::stdin(), OptionalActions::Now, before);
        }
    }
}

impl Vm {
    /// Connects the terminal with the machine's console, until Ctrl-] or until the machine ends. Without a terminal the
    /// console is only shown.
    ///
    /// # Errors
    /// When the machine can no longer be written to.
    pub fn interact(&self) -> Result<(), VmError> {
        let _raw = Raw::set();
        self.serial().set_raw(true);
        let result = self.pass_keys();
        self.serial().set_raw(false);
        result
    }

    fn pass_keys(&self) -> Result<(), VmError> {
        let stdin = io::stdin();
        let mut open = true;
        let pause = Timespec::try_from(LOOK).ok();
        let mut buffer = [0; 256];
        while self.is_running() {
            if !open {
                std::thread::sleep(LOOK);
                continue;
            }
            let mut fds = [PollFd::from_borrowed_fd(stdin.as_fd(), PollFlags::IN)];
            if !poll(&mut fds, pause.as_ref()).is_ok_and(|ready| ready > 0) {
                continue;
            }
            let count = stdin.lock().read(&mut buffer).unwrap_or(0);
            let keys = buffer.get(..count).unwrap_or_default();
            if keys.contains(&LEAVE) {
                return Ok(());
            }
            open = count > 0;
            self.serial().send(&String::from_utf8_lossy(keys))?;
        }
        Ok(())
    }
}
