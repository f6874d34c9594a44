//! An orderly end by SIGINT, SIGTERM or SIGHUP: what runs is ended, what waits fails, and so every machine, cable and folder
//! goes as it does at the end of a test.
//!
//! QEMU and host tools register here. Once they are gone, whoever waits for them gets an error and returns it.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::process::Child;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// How long the end in order may take.
const GRACE: Duration = Duration::from_secs(10);
/// Added to a signal's number in the exit status, as shells do.
const BY_SIGNAL: i32 = 128;

static STATE: Mutex<State> = Mutex::new(State {
    signal: None,
    next: 0,
    children: BTreeMap::new(),
});
static CHANGED: Condvar = Condvar::new();

struct State {
    signal: Option<i32>,
    next: u64,
    /// What runs; handles, since numbers are given anew.
    children: BTreeMap<u64, OwnedFd>,
}

/// A signal asked for the end.
#[derive(Debug, thiserror::Error)]
#[error("stopped by a signal; the machines are ended, their files removed")]
pub struct Stopped;

/// From now on signals lead to an orderly end; a second one, or 10 s that did not suffice, to a quick one.
///
/// # Errors
/// When signals cannot be listened to.
pub fn on_signals() -> io::Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP])?;
    std::thread::spawn(move || {
        let mut arriving = signals.forever();
        let Some(signal) = arriving.next() else { return };
        request(signal);
        std::thread::spawn(move || {
            std::thread::sleep(GRACE);
            std::process::exit(BY_SIGNAL + signal);
        });
        if let Some(signal) = arriving.next() {
            std::process::exit(BY_SIGNAL + signal);
        }
    });
    Ok(())
}

/// Says whether a signal came.
///
/// # Errors
/// [`Stopped`] if so.
pub fn check() -> Result<(), Stopped> {
    match lock().signal {
        Some(_) => Err(Stopped),
        None => Ok(()),
    }
}

/// Waits for `duration`, where there is no condition to wait for.
///
/// # Errors
/// [`Stopped`], at once, when a signal came.
pub fn pause(duration: Duration) -> Result<(), Stopped> {
    let waited = CHANGED.wait_timeout_while(lock(), duration, |state| state.signal.is_none());
    match waited.unwrap_or_else(PoisonError::into_inner).0.signal {
        Some(_) => Err(Stopped),
        None => Ok(()),
    }
}

/// A program that is ended by a signal as long as this value lives.
#[derive(Debug)]
pub(crate) struct Registered(u64);

/// Registers a program that was not waited for yet.
pub(crate) fn register(child: &Child) -> Registered {
    let mut state = lock();
    let number = state.next;
    state.next += 1;
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    // Without handles (Linux before 5.3) the program goes with this process, by setpriv or the terminal.
    if let Some(handle) = pid.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok()) {
        if state.signal.is_some() {
            end(&handle);
        }
        state.children.insert(number, handle);
    }
    Registered(number)
}

impl Drop for Registered {
    fn drop(&mut self) {
        lock().children.remove(&self.0);
    }
}

fn request(signal: i32) {
    let mut state = lock();
    state.signal = Some(signal);
    state.children.values().for_each(end);
    CHANGED.notify_all();
}

fn end(child: &OwnedFd) {
    // It may have ended by itself.
    let _ = pidfd_send_signal(child, Signal::TERM);
}

fn lock() -> MutexGuard<'static, State> {
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process;
    use std::io::{BufRead, BufReader};
    use std::process::{Command, Stdio};

    /// Where the process below makes its folder.
    const PLACE: &str = "STIEFEL_TEST_STOP_PLACE";
    const READY: &str = "the folder is there";

    /// Not a test of its own: the process that the next one sends signals to.
    #[test]
    #[ignore = "started by the next test"]
    fn process_with_a_folder_a_program_and_a_pause() {
        let Some(place) = std::env::var_os(PLACE) else { return };
        on_signals().unwrap();
        let folder = tempfile::tempdir_in(place).unwrap();
        let program = std::thread::spawn(|| process::run(process::command("sleep").unwrap().arg("1000")));
        println!("{READY}");
        assert!(pause(Duration::from_secs(1000)).is_err());
        assert!(program.join().unwrap().is_err(), "sleep was not ended");
        // What is started too late is ended, too.
        assert!(process::run(process::command("sleep").unwrap().arg("1000")).is_err());
        assert!(check().is_err());
        drop(folder);
    }

    #[test]
    fn signals_end_programs_and_pauses_and_leave_no_folder() {
        for signal in [Signal::INT, Signal::TERM, Signal::HUP] {
            let place = tempfile::tempdir().unwrap();
            let mut child = Command::new(std::env::current_exe().unwrap())
                .args(["--ignored", "--exact", "--nocapture"])
                .arg("stop::tests::process_with_a_folder_a_program_and_a_pause")
                .env(PLACE, place.path())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
            assert!(lines.any(|line| line.contains(READY)));
            assert_eq!(std::fs::read_dir(&place).unwrap().count(), 1);
            rustix::process::kill_process(Pid::from_child(&child), signal).unwrap();
            let rest: Vec<_> = lines.collect();
            assert!(child.wait().unwrap().success(), "{signal:?}: {rest:?}");
            assert_eq!(std::fs::read_dir(&place).unwrap().count(), 0, "{signal:?}");
        }
    }

    #[test]
    fn without_a_signal_a_pause_ends_well() {
        pause(Duration::from_millis(1)).unwrap();
        check().unwrap();
    }
}
