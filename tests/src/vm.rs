//! A virtual machine: QEMU, tied to this process, with its serial console and its machine protocol.
//!
//! Everything it needs lives in a run directory of its own, removed at the end. QEMU is killed when the [`Vm`] goes,
//! also by a panic, and by the kernel (`setpriv --pdeathsig`) when this process dies without a word.

use std::collections::HashMap;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::accel::Accel;
use crate::net::Netdev;
use crate::process::CommandError;
use crate::qmp::{Qmp, QmpError};
use crate::serial::{Serial, SerialError};
use crate::stop::{self, Registered};

mod builder;
mod command;

pub use builder::{Boot, Content, Drive, NicModel, VmBuilder};
pub(crate) use command::escape;

/// The emulator.
pub(crate) const QEMU: &str = "qemu-system-x86_64";
/// UEFI firmware, and its empty variable store.
pub(crate) const OVMF_CODE: &str = "/usr/share/OVMF/OVMF_CODE_4M.fd";
pub(crate) const OVMF_VARS: &str = "/usr/share/OVMF/OVMF_VARS_4M.fd";
/// UEFI firmware that can enforce Secure Boot.
pub(crate) const OVMF_SECURE_CODE: &str = "/usr/share/OVMF/OVMF_CODE_4M.secboot.fd";

/// How long QEMU may take to answer a command, as under KVM.
const ANSWER: Duration = Duration::from_secs(15);
/// How long a guest may take to give up an unplugged device, as under KVM.
const UNPLUG: Duration = Duration::from_secs(15);
/// How often a process or socket is looked at that cannot be waited for.
const POLL: Duration = Duration::from_millis(20);

/// A machine could not be started, or not be told something.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// A host program is missing.
    #[error("{name}: cannot start the machine")]
    Command {
        /// The machine.
        name: String,
        /// Why.
        #[source]
        source: CommandError,
    },
    /// A file of the machine cannot be read or written.
    #[error("{name}: cannot {action} {path}")]
    File {
        /// The machine.
        name: String,
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// QEMU ended at once.
    #[error("{name}: QEMU ended at its start; it said:\n{said}")]
    Start {
        /// The machine.
        name: String,
        /// What it said.
        said: String,
    },
    /// QEMU refused, or ended.
    #[error("{name}: QEMU did not do what it was told; it said: {said}")]
    Qmp {
        /// The machine.
        name: String,
        /// What it said on its standard error.
        said: String,
        /// Why.
        #[source]
        source: QmpError,
    },
    /// The serial console failed.
    #[error(transparent)]
    Serial(#[from] SerialError),
    /// The machine still runs.
    #[error("{name}: the machine did not end within {waited:?}; its console: {log}")]
    StillRuns {
        /// The machine.
        name: String,
        /// How long, after stretching.
        waited: Duration,
        /// The serial log.
        log: PathBuf,
    },
    /// No such NIC.
    #[error("{name}: there is no NIC named {id} to unplug")]
    NoNic {
        /// The machine.
        name: String,
        /// The NIC.
        id: String,
    },
}

/// A running machine.
pub struct Vm {
    name: String,
    accel: Accel,
    // The order matters: the process ends first, then its sockets' readers, then the directory goes.
    process: Mutex<Process>,
    qmp: Qmp,
    serial: Serial,
    dir: tempfile::TempDir,
    power_on: Instant,
    /// The network behind each NIC that can be unplugged.
    nics: Mutex<HashMap<String, String>>,
    next_netdev: AtomicU32,
}

/// QEMU's process; ends with this value.
struct Process {
    child: Child,
    status: Option<ExitStatus>,
    _registered: Registered,
}

impl Process {
    fn new(child: Child) -> Self {
        Self {
            _registered: stop::register(&child),
            child,
            status: None,
        }
    }

    fn poll(&mut self) -> io::Result<Option<ExitStatus>> {
        if self.status.is_none() {
            self.status = self.child.try_wait()?;
        }
        Ok(self.status)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.status.is_none() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

impl Vm {
    /// The name given to it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How it runs; stretches deadlines.
    pub fn accel(&self) -> Accel {
        self.accel
    }

    /// Its console.
    pub fn serial(&self) -> &Serial {
        &self.serial
    }

    /// Its machine protocol, for what has no method here.
    pub fn qmp(&self) -> &Qmp {
        &self.qmp
    }

    /// Time since power-on.
    pub fn uptime(&self) -> Duration {
        self.power_on.elapsed()
    }

    /// Its run directory: for files that shall go with it.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// QEMU's process id.
    pub fn pid(&self) -> u32 {
        self.process().child.id()
    }

    /// Runs one command of the machine protocol.
    ///
    /// # Errors
    /// When QEMU refuses it, has ended, or does not answer.
    pub fn execute(&self, command: &str, arguments: Value) -> Result<Value, VmError> {
        self.qmp
            .execute(command, arguments)
            .map_err(|source| self.qmp_error(source))
    }

    /// Plugs a USB NIC named `id` with the address `mac` into a fresh port of `netdev`.
    ///
    /// # Errors
    /// When QEMU refuses it (the name is taken).
    pub fn plug_usb_nic(&self, id: &str, netdev: &Netdev, mac: &str) -> Result<(), VmError> {
        // Re-using an old network behind a new NIC loses traffic: each plug gets its own.
        let net = format!("{id}-net{}", self.next_netdev.fetch_add(1, Ordering::Relaxed));
        self.execute("netdev_add", netdev.to_json(&net))?;
        let device = json!({ "driver": "usb-net", "bus": "xhci.0", "id": id, "netdev": net, "mac": mac });
        if let Err(error) = self.execute("device_add", device) {
            let _ = self.execute("netdev_del", json!({ "id": net }));
            return Err(error);
        }
        self.nics().insert(id.to_owned(), net);
        Ok(())
    }

    /// Unplugs a NIC: one plugged before, or one the machine was built with.
    ///
    /// # Errors
    /// When there is none with this name, or the guest does not let it go.
    pub fn unplug_usb_nic(&self, id: &str) -> Result<(), VmError> {
        let net = self.nics().remove(id).ok_or_else(|| VmError::NoNic {
            name: self.name.clone(),
            id: id.to_owned(),
        })?;
        self.execute("device_del", json!({ "id": id }))?;
        self.qmp
            .wait_event(
                "DEVICE_DELETED",
                |data| data["device"] == id,
                self.accel.deadline(UNPLUG),
            )
            .map_err(|source| self.qmp_error(source))?;
        self.execute("netdev_del", json!({ "id": net })).map(drop)
    }

    /// Sets a NIC's cable state. A virtio NIC's carrier follows; a USB NIC only loses its packets.
    ///
    /// # Errors
    /// When there is no such NIC.
    pub fn set_link(&self, id: &str, up: bool) -> Result<(), VmError> {
        self.execute("set_link", json!({ "name": id, "up": up })).map(drop)
    }

    /// Writes what the screen shows into `file` on the host: PNG, or PPM if the name ends so. Needs `.graphical(…)` or `.vga()`.
    ///
    /// # Errors
    /// When there is no screen, or the file cannot be written.
    pub fn screendump(&self, file: &Path) -> Result<(), VmError> {
        let format = if file.extension().is_some_and(|extension| extension == "ppm") {
            "ppm"
        } else {
            "png"
        };
        self.execute("screendump", json!({ "filename": file, "format": format }))
            .map(drop)
    }

    /// Presses keys together on the machine's own keyboard and lets them go; QEMU's key names (`ctrl`, `a`, `ret`, `spc`).
    ///
    /// # Errors
    /// When QEMU knows no such key.
    pub fn press_keys(&self, keys: &[&str]) -> Result<(), VmError> {
        let keys: Vec<Value> = keys.iter().map(|key| json!({ "type": "qcode", "data": key })).collect();
        self.execute("send-key", json!({ "keys": keys })).map(drop)
    }

    /// Has the guest's kernel do what the magic SysRq `key` means (Linux, Documentation/admin-guide/sysrq.rst): a break on the
    /// serial console, then the key. The guest needs `sysrq_always_enabled=1`.
    ///
    /// # Errors
    /// When QEMU has ended.
    pub fn sysrq(&self, key: char) -> Result<(), VmError> {
        self.execute("chardev-send-break", json!({ "id": command::SERIAL }))?;
        Ok(self.serial.send(&key.to_string())?)
    }

    /// Presses the reset button.
    ///
    /// # Errors
    /// When QEMU has ended.
    pub fn system_reset(&self) -> Result<(), VmError> {
        self.execute("system_reset", json!({})).map(drop)
    }

    /// Presses the power button; the guest decides what it means.
    ///
    /// # Errors
    /// When QEMU has ended.
    pub fn system_powerdown(&self) -> Result<(), VmError> {
        self.execute("system_powerdown", json!({})).map(drop)
    }

    /// Waits until the guest has restarted the machine (not by kexec, which the machine does not notice).
    ///
    /// # Errors
    /// When it does not within `deadline` (as under KVM).
    pub fn wait_reboot(&self, deadline: Duration) -> Result<(), VmError> {
        self.qmp
            .wait_event("RESET", |data| data["guest"] == true, self.accel.deadline(deadline))
            .map(drop)
            .map_err(|source| self.qmp_error(source))
    }

    /// Waits until the guest has switched the machine off (with `.no_reboot()`: or restarted it), and QEMU has ended.
    ///
    /// # Errors
    /// When it does not within `deadline` (as under KVM).
    pub fn wait_shutdown(&self, deadline: Duration) -> Result<(), VmError> {
        self.qmp
            .wait_event("SHUTDOWN", |data| data["guest"] == true, self.accel.deadline(deadline))
            .map_err(|source| self.qmp_error(source))?;
        self.wait_exit(deadline).map(drop)
    }

    /// Waits until QEMU has ended, for whatever reason.
    ///
    /// # Errors
    /// When it does not within `deadline` (as under KVM).
    pub fn wait_exit(&self, deadline: Duration) -> Result<ExitStatus, VmError> {
        let waited = self.accel.deadline(deadline);
        let end = Instant::now() + waited;
        loop {
            let status = self.process().poll().map_err(|source| VmError::File {
                name: self.name.clone(),
                action: "wait for",
                path: QEMU.into(),
                source,
            })?;
            if let Some(status) = status {
                return Ok(status);
            }
            if Instant::now() >= end {
                let log = self.serial.log().to_owned();
                return Err(VmError::StillRuns {
                    name: self.name.clone(),
                    waited,
                    log,
                });
            }
            thread::sleep(POLL);
        }
    }

    /// Whether QEMU still runs.
    pub fn is_running(&self) -> bool {
        matches!(self.process().poll(), Ok(None))
    }

    /// Pulls the power plug: ends QEMU in order, so that what the guest has written is in its images.
    ///
    /// # Errors
    /// When QEMU does not end.
    pub fn quit(self) -> Result<(), VmError> {
        match self.qmp.execute("quit", json!({})) {
            // It may be faster gone than it answers.
            Ok(_) | Err(QmpError::Ended { .. }) => {}
            Err(source) => return Err(self.qmp_error(source)),
        }
        self.wait_exit(ANSWER).map(drop)
    }

    /// Ends QEMU at once; whoever waits for the machine gets an error.
    pub fn kill(&self) {
        // It may have ended by itself.
        let _ = self.process().child.kill();
    }

    fn qmp_error(&self, source: QmpError) -> VmError {
        VmError::Qmp {
            name: self.name.clone(),
            said: qemu_said(self.dir.path()),
            source,
        }
    }

    fn process(&self) -> MutexGuard<'_, Process> {
        self.process.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn nics(&self) -> MutexGuard<'_, HashMap<String, String>> {
        self.nics.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What QEMU wrote on its standard outputs.
fn qemu_said(dir: &Path) -> String {
    let said = std::fs::read(dir.join(command::QEMU_LOG)).unwrap_or_default();
    let text = String::from_utf8_lossy(&said).trim().to_owned();
    if text.is_empty() { "nothing".to_owned() } else { text }
}

/// Connects to one of QEMU's sockets, which it makes at its start.
fn connect(name: &str, process: &mut Process, dir: &Path, socket: &str) -> Result<UnixStream, VmError> {
    let path = dir.join(socket);
    let end = Instant::now() + Accel::Tcg.deadline(ANSWER);
    loop {
        let error = match UnixStream::connect(&path) {
            Ok(stream) => return Ok(stream),
            Err(error) => error,
        };
        if !matches!(process.poll(), Ok(None)) {
            return Err(VmError::Start {
                name: name.to_owned(),
                said: qemu_said(dir),
            });
        }
        if Instant::now() >= end {
            return Err(VmError::File {
                name: name.to_owned(),
                action: "connect to",
                path,
                source: error,
            });
        }
        thread::sleep(POLL);
    }
}
