//! Leaves the laptop's OS: guards, countdown, collection, guards again, kexec, an orderly shutdown into the ramdisk.
//!
//! Specification: design.md, "The way of a boot" 2–4. The kernel is loaded last, so that what is refused or cancelled
//! leaves nothing behind: Debian's kexec-tools would start a loaded kernel at any reboot.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::time::Duration;

use stiefel_shared::config::{Config, Method};
use stiefel_shared::handover::ramdisk_cmdline;
use stiefel_sys::kexec::{self, KexecError};

use super::log;
use crate::collect::{self, CollectError, Collected, Image, STATE_DIR};
use crate::guards::{self, Refusal};
use crate::reboot::{self, Plan, RebootError};
use crate::tree::Tree;

/// Why the laptop stayed in its OS.
#[derive(Debug, thiserror::Error)]
pub enum LeaveError {
    /// The guards speak against it.
    #[error("not now:\n{}", refusals.iter().map(|refusal| format!("- {refusal}")).collect::<Vec<_>>().join("\n"))]
    Refused {
        /// All their reasons.
        refusals: Vec<Refusal>,
    },
    /// Something is missing.
    #[error("this laptop cannot serve as it is")]
    Collect(#[from] CollectError),
    /// Somebody stopped the countdown.
    #[error("cancelled: {why}")]
    Cancelled {
        /// Why.
        why: String,
    },
    /// The ramdisk's kernel cannot be read.
    #[error("the ramdisk's kernel {path} cannot be read\n  next: run `stiefel build`, then `stiefel install`", path = path.display())]
    Kernel {
        /// Its file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The kernel did not take it.
    #[error("the ramdisk was not loaded")]
    Kexec(#[from] KexecError),
    /// The firmware cannot be told to start it.
    #[error("this laptop cannot be left by a reboot as it is")]
    Reboot(#[from] RebootError),
    /// The shutdown did not begin.
    #[error("`systemctl {verb}` did not begin the shutdown: {why}\n  next: see `systemctl status` and the journal")]
    Systemctl {
        /// What it was told.
        verb: &'static str,
        /// What it says.
        why: String,
    },
}

/// How far to go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// All the way.
    Real,
    /// Collect everything, load nothing, and say what would be done.
    DryRun,
}

/// What people are told while it goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// The countdown begins.
    Countdown(Duration),
    /// It is not cancelled any more.
    Leaving,
}

/// Leaves the OS. When it returns `Ok`, the shutdown has begun ([`Mode::Real`]).
///
/// `cancel` ends the countdown with a reason; its other end must live for as long. `tell` hears how far it is.
///
/// # Errors
/// [`LeaveError`]; the OS goes on as if nothing had been.
pub fn leave(config: &Config, mode: Mode, cancel: &Receiver<String>, tell: &dyn Fn(Step)) -> Result<(), LeaveError> {
    guard(config)?;
    log::info(format_args!(
        "nothing speaks against leaving: no inhibitor, no package manager at work, no hibernation image, enough battery, kexec allowed"
    ));
    if mode == Mode::Real {
        if !config.trigger.countdown.0.is_zero() {
            // What cannot work is told before the wait; what counts is collected after it.
            let collected = collect::collect(Path::new("/"), config)?;
            if config.trigger.method == Method::Reboot {
                reboot::foresee(Path::new("/"), &collected)?;
            }
        }
        count_down(config, cancel, tell)?;
    }
    let collected = collect::collect(Path::new("/"), config)?;
    log::info(format_args!(
        "serving {} ({}), keys: {}",
        collected.disk.display(),
        collected.identity.model.as_deref().unwrap_or("unknown model"),
        collected
            .keys
            .iter()
            .map(|key| key.name.as_str())
            .collect::<Vec<_>>()
            .join(", ")
    ));
    log::info(format_args!("the payload:\n{}", collected.payload));
    if config.trigger.method == Method::Reboot {
        return by_reboot(config, mode, cancel, tell, &collected);
    }
    let image = collected.image()?;
    let cmdline = ramdisk_cmdline(&config.initrd.cmdline.to_string());
    describe(&image, &collected.manifest.kernel_version, &cmdline);
    if mode == Mode::DryRun {
        log::notice(format_args!(
            "a dry run: would load this now and call `systemctl kexec`"
        ));
        return Ok(());
    }
    let kernel = kernel(&collected.kernel)?;
    // Collecting took its time: an upgrade may have begun, or the NIC be gone.
    last_look(cancel, || guard(config))?;
    tell(Step::Leaving);
    kexec_into(&kernel, image.initrd, &cmdline)
}

/// Opens the ramdisk's kernel.
pub(crate) fn kernel(path: &Path) -> Result<File, LeaveError> {
    File::open(path).map_err(|source| LeaveError::Kernel {
        path: path.to_owned(),
        source,
    })
}

/// Loads the ramdisk and begins the shutdown into it; `initrd` holds secrets. Nothing stays loaded after an error.
pub(crate) fn kexec_into(kernel: &File, initrd: File, cmdline: &str) -> Result<(), LeaveError> {
    kexec::load(kernel.as_fd(), Some(initrd.as_fd()), cmdline)?;
    // The kernel has its own copy: free ours, the shutdown needs memory too.
    drop(initrd);
    log::notice(format_args!("leaving: the ramdisk is loaded, the shutdown begins"));
    let begun = shut_down("kexec");
    if begun.is_err()
        && let Err(error) = kexec::unload()
    {
        // It holds the keys, and Debian's kexec-tools would start it at the next reboot.
        log::error(format_args!(
            "the ramdisk stays loaded ({error}); `kexec --unload` takes it out"
        ));
    }
    begun
}

/// Has the firmware start the ramdisk once, and reboots.
fn by_reboot(
    config: &Config,
    mode: Mode,
    cancel: &Receiver<String>,
    tell: &dyn Fn(Step),
    collected: &Collected,
) -> Result<(), LeaveError> {
    let plan = Plan::of(Path::new("/"), collected, &config.initrd.cmdline.to_string())?;
    log::info(format_args!(
        "the one-time image: kernel {}, {} MiB with {} modules for the desktop",
        collected.manifest.kernel_version,
        plan.size().div_ceil(1 << 20),
        plan.modules
    ));
    if mode == Mode::DryRun {
        log::notice(format_args!(
            "a dry run: would put this on the EFI system partition, to be started once, and call `systemctl reboot`"
        ));
        return Ok(());
    }
    last_look(cancel, || guard(config))?;
    plan.arm(|| {
        // Writing the image took its time.
        not_cancelled(cancel)?;
        tell(Step::Leaving);
        Ok::<(), LeaveError>(())
    })?;
    log::notice(format_args!(
        "leaving: the firmware starts the ramdisk next, the shutdown begins"
    ));
    let begun = shut_down("reboot");
    match &begun {
        Ok(()) => plan.keep(),
        Err(_) => plan.disarm(),
    }
    begun
}

/// Asks the guards, of the configured way out.
fn guard(config: &Config) -> Result<(), LeaveError> {
    guard_by(Path::new("/"), config, config.trigger.method)
}

/// Asks the guards of the system below `root`, whatever way out is configured.
pub(crate) fn guard_by(root: &Path, config: &Config, method: Method) -> Result<(), LeaveError> {
    let kernel = Path::new(STATE_DIR).join(stiefel_initrd_builder::ramdisk::KERNEL);
    let by_kexec = method == Method::Kexec;
    if !by_kexec {
        reboot::check(&Tree::new(root))?;
    }
    let refusals = guards::check(root, config.trigger.battery.0, by_kexec.then_some(&kernel));
    if refusals.is_empty() {
        Ok(())
    } else {
        Err(LeaveError::Refused { refusals })
    }
}

fn describe(image: &Image, version: &str, cmdline: &str) {
    let mib = |bytes: u64| bytes.div_ceil(1 << 20);
    log::info(format_args!(
        "the ramdisk: kernel {version}, image {} MiB with {} modules for the desktop, command line: {cmdline}",
        mib(image.size),
        image.modules
    ));
    for part in &image.handover.payload.parts {
        log::info(format_args!("  {} {} KiB", part.part.name(), part.size.div_ceil(1024)));
    }
}

fn count_down(config: &Config, cancel: &Receiver<String>, tell: &dyn Fn(Step)) -> Result<(), LeaveError> {
    let countdown = config.trigger.countdown.0;
    if !countdown.is_zero() {
        log::notice(format_args!(
            "leaving in {} s; `stiefel cancel` stops it",
            countdown.as_secs()
        ));
        tell(Step::Countdown(countdown));
    }
    match cancel.recv_timeout(countdown) {
        Ok(why) => Err(LeaveError::Cancelled { why }),
        Err(RecvTimeoutError::Timeout) => Ok(()),
        Err(RecvTimeoutError::Disconnected) => Err(service_ends()),
    }
}

/// Asks `guard`, which takes its time: what was cancelled before or meanwhile is not done.
fn last_look(cancel: &Receiver<String>, guard: impl FnOnce() -> Result<(), LeaveError>) -> Result<(), LeaveError> {
    not_cancelled(cancel)?;
    guard()?;
    not_cancelled(cancel)
}

fn not_cancelled(cancel: &Receiver<String>) -> Result<(), LeaveError> {
    match cancel.try_recv() {
        Ok(why) => Err(LeaveError::Cancelled { why }),
        Err(TryRecvError::Empty) => Ok(()),
        Err(TryRecvError::Disconnected) => Err(service_ends()),
    }
}

fn service_ends() -> LeaveError {
    LeaveError::Cancelled {
        why: "the service ends".to_owned(),
    }
}

/// What ends the OS. A plain `reboot` goes through the firmware, whatever is loaded, or prepared at /run/nextroot (systemd 254 and later).
fn systemctl(verb: &str) -> Command {
    let mut command = Command::new("systemctl");
    command
        .arg(verb)
        .env("SYSTEMCTL_SKIP_AUTO_KEXEC", "1")
        .env("SYSTEMCTL_SKIP_AUTO_SOFT_REBOOT", "1");
    command
}

/// Ends all units in order, and unmounts. With a kernel loaded, `systemctl kexec` takes that one.
fn shut_down(verb: &'static str) -> Result<(), LeaveError> {
    let failed = |why: String| LeaveError::Systemctl { verb, why };
    let output = systemctl(verb)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| failed(format!("it cannot be started: {error}")))?;
    if output.status.success() {
        Ok(())
    } else {
        let said = String::from_utf8_lossy(&output.stderr);
        Err(failed(format!("{}; {}", output.status, said.trim())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::sync::mpsc;
    use stiefel_shared::config::Seconds;

    fn counting(seconds: u64) -> Config {
        let mut config = Config::default();
        config.trigger.countdown = Seconds(Duration::from_secs(seconds));
        config
    }

    #[test]
    fn a_cancelled_countdown_ends_at_once_with_its_reason() {
        let (sender, receiver) = mpsc::channel();
        sender.send("the NIC was unplugged".to_owned()).unwrap();
        let error = count_down(&counting(3600), &receiver, &|_| {}).unwrap_err();
        assert_eq!(error.to_string(), "cancelled: the NIC was unplugged");
    }

    #[test]
    fn people_are_told_of_a_countdown_only_where_there_is_one() {
        for (seconds, expected) in [(0, None), (1, Some(Step::Countdown(Duration::from_secs(1))))] {
            let (_sender, receiver) = mpsc::channel();
            let told = Cell::new(None);
            count_down(&counting(seconds), &receiver, &|step| told.set(Some(step))).unwrap();
            assert_eq!(told.get(), expected);
        }
    }

    #[test]
    fn a_service_that_ends_does_not_leave() {
        let (sender, receiver) = mpsc::channel::<String>();
        drop(sender);
        assert!(count_down(&counting(3600), &receiver, &|_| {}).is_err());
    }

    #[test]
    fn what_was_cancelled_while_collecting_is_not_loaded() {
        let (sender, receiver) = mpsc::channel();
        not_cancelled(&receiver).unwrap();
        sender.send("the NIC was unplugged".to_owned()).unwrap();
        let error = not_cancelled(&receiver).unwrap_err();
        assert_eq!(error.to_string(), "cancelled: the NIC was unplugged");
        drop(sender);
        assert!(not_cancelled(&receiver).is_err());
    }

    #[test]
    fn what_is_cancelled_while_the_guards_are_asked_is_not_loaded() {
        let (sender, receiver) = mpsc::channel();
        last_look(&receiver, || Ok(())).unwrap();
        let asked = || {
            sender.send("by root".to_owned()).unwrap();
            Ok(())
        };
        let error = last_look(&receiver, asked).unwrap_err();
        assert_eq!(error.to_string(), "cancelled: by root");
    }

    #[test]
    fn a_reboot_is_none_by_kexec_or_of_the_user_space_alone() {
        let command = systemctl("reboot");
        let set: Vec<_> = command
            .get_envs()
            .filter(|(_, value)| value.is_some_and(|value| value == "1"))
            .map(|(name, _)| name.to_str().unwrap())
            .collect();
        assert_eq!(set, ["SYSTEMCTL_SKIP_AUTO_KEXEC", "SYSTEMCTL_SKIP_AUTO_SOFT_REBOOT"]);
    }

    #[test]
    fn all_refusals_are_in_the_message() {
        let error = LeaveError::Refused {
            refusals: vec![
                Refusal::Battery { percent: 3, limit: 10 },
                Refusal::Hibernated {
                    place: "/dev/sda3".into(),
                },
            ],
        };
        assert!(error.to_string().contains("3 %") && error.to_string().contains("/dev/sda3"));
    }
}
