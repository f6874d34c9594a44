//! Drivers by modalias: for what is there (coldplug), and for what appears (kernel uevents).

use std::path::{Path, PathBuf};

use stiefel_sys::console::Console;
use stiefel_sys::module::Loader;
use stiefel_sys::uevent::{self, Monitor, UeventError};

use crate::describe;

/// Modules without a device of their own that a role needs; absent or built-in ones are no fault.
const BY_NAME: [&str; 2] = ["ipv6", "af_packet"];
/// `cdc_subset` races `cdc_ether` for QEMU's USB NIC and gives it a random hardware address.
pub(crate) const NEVER: [&str; 1] = ["cdc_subset"];

/// Loads drivers from now on, on a thread of its own.
pub(crate) fn spawn(console: &'static Console) {
    let thread = std::thread::Builder::new().name("drivers".to_owned()).spawn(move || {
        if let Err(error) = run(console) {
            console.error(&format!("no more drivers are loaded: {error:#}"));
        }
    });
    if let Err(error) = thread {
        console.error(&format!("no drivers are loaded: {error}"));
    }
}

fn run(console: &Console) -> anyhow::Result<()> {
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
