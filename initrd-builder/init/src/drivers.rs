//! Drivers by modalias: for what is there (coldplug), and for what appears (kernel uevents).

use std::convert::Infallible;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use stiefel_sys::console::Console;
use stiefel_sys::module::Loader;
use stiefel_sys::uevent::{self, Monitor, UeventError};

use crate::describe;

/// Modules without a device of their own that a role needs; absent or built-in ones are no fault.
const BY_NAME: [&str; 2] = ["ipv6", "af_packet"];
/// `cdc_subset` races `cdc_ether` for QEMU's USB NIC and gives it a random hardware address.
pub(crate) const NEVER: [&str; 1] = ["cdc_subset"];

/// The argv\[0\] under which the program knows that it is the child that loads drivers.
pub const DRIVERS_ARG0: &str = "stiefel-drivers";
/// How long to wait after a failure.
const AGAIN: Duration = Duration::from_secs(1);

/// The process that loads drivers: not PID 1 itself, which a fault in a parser or a module that hangs must not stop.
pub(crate) struct Child {
    process: Option<std::process::Child>,
    /// When it is started anew, after it has ended.
    again: Option<Instant>,
}

impl Child {
    /// Starts it.
    pub(crate) fn start(console: &Console) -> Self {
        let child = Command::new("/init").arg0(DRIVERS_ARG0).spawn();
        Self {
            process: child
                .map_err(|error| console.error(&format!("no drivers are loaded: {error}")))
                .ok(),
            again: None,
        }
    }

    /// Its process number, while it runs.
    pub(crate) fn id(&self) -> Option<u32> {
        self.process.as_ref().map(std::process::Child::id)
    }

    /// Starts it anew a while after it has ended. Returns at once: the role must not wait for it.
    pub(crate) fn keep(&mut self, console: &Console, now: Instant) {
        if self.due(now) {
            *self = Self::start(console);
        }
    }

    /// Whether it has ended for long enough.
    fn due(&mut self, now: Instant) -> bool {
        if let Some(process) = &mut self.process
            && matches!(process.try_wait(), Ok(None))
        {
            return false;
        }
        self.process = None;
        now >= *self.again.get_or_insert(now + AGAIN)
    }
}

/// Loads drivers for ever.
pub fn run() -> ! {
    let console = Console::open(Path::new("/dev"), Path::new("/proc"));
    loop {
        let Err(error) = load_all(&console);
        console.error(&format!("no drivers are loaded for the moment: {error:#}"));
        std::thread::sleep(AGAIN);
    }
}

fn load_all(console: &Console) -> anyhow::Result<Infallible> {
    // Listening before looking: a device that appears in between is seen twice, never missed.
    let mut monitor = Monitor::open()?;
    let mut loader = Loader::open(&modules_dir()?, &NEVER)?;
    for name in BY_NAME {
        if loader.index().path(name).is_some()
            && let Err(error) = loader.load(name)
        {
            console.warn(&describe(&error));
        }
    }
    let loaded = coldplug(console, &mut loader);
    console.info(&format!("{loaded} drivers loaded for the devices found"));
    loop {
        match monitor.next(None) {
            Ok(Some(event)) if event.action == "add" => {
                if let Some(modalias) = event.modalias() {
                    load(console, &mut loader, modalias);
                }
            }
            Ok(_) => {}
            // More devices came at once than the queue holds: look at all again.
            Err(UeventError::Lost) => {
                coldplug(console, &mut loader);
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// Loads the drivers of all devices that are there; how many modules that were.
fn coldplug(console: &Console, loader: &mut Loader) -> usize {
    uevent::coldplug(Path::new("/sys"))
        .map(|device| load(console, loader, &device.modalias))
        .sum()
}

fn load(console: &Console, loader: &mut Loader, modalias: &str) -> usize {
    let loaded = loader.load_modalias(modalias);
    for error in &loaded.failed {
        console.warn(&describe(error));
    }
    loaded.names.len()
}

/// The ramdisk has the modules of one kernel: the running one, or it is a mistake that is worth a message.
fn modules_dir() -> anyhow::Result<PathBuf> {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let dir = Path::new("/lib/modules").join(&release);
    if !dir.is_dir() {
        let have: Vec<String> = std::fs::read_dir("/lib/modules")
            .map(|entries| {
                entries
                    .flatten()
                    .map(|entry| entry.file_name().to_string_lossy().into_owned())
                    .collect()
            })
            .unwrap_or_default();
        anyhow::bail!(
            "the ramdisk has modules for kernel {}, but {release} is running; build both together with `stiefel build`",
            if have.is_empty() {
                "none".to_owned()
            } else {
                have.join(", ")
            }
        );
    }
    Ok(dir)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Stdio;

    #[test]
    fn it_is_started_anew_a_while_after_its_end_and_nobody_waits_for_that() {
        let now = Instant::now();
        let mut child = Child {
            process: Some(Command::new("cat").stdin(Stdio::piped()).spawn().unwrap()),
            again: None,
        };
        assert!(!child.due(now + 2 * AGAIN), "it runs");
        let process = child.process.as_mut().unwrap();
        process.kill().unwrap();
        process.wait().unwrap();
        assert!(!child.due(now));
        assert_eq!(child.id(), None, "its number may be another's now");
        assert!(!child.due(now + AGAIN / 2));
        assert!(child.due(now + AGAIN));
    }
}
