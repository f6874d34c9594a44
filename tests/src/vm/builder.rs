//! What a machine is made of.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use serde_json::json;

use super::{ANSWER, Process, Vm, VmError, command, connect};
use crate::accel::Accel;
use crate::net::Netdev;
use crate::qmp::Qmp;
use crate::serial::{self, Serial};
use crate::{cache, process};

/// Bytes, or a file on the host that has them.
#[derive(Clone)]
pub enum Content {
    /// A file.
    File(PathBuf),
    /// The bytes themselves; may be secret, so never printed.
    Bytes(Vec<u8>),
}

impl From<&Path> for Content {
    fn from(path: &Path) -> Self {
        Self::File(path.to_owned())
    }
}

impl From<Vec<u8>> for Content {
    fn from(bytes: Vec<u8>) -> Self {
        Self::Bytes(bytes)
    }
}

impl From<&str> for Content {
    fn from(text: &str) -> Self {
        Self::Bytes(text.as_bytes().to_vec())
    }
}

impl std::fmt::Debug for Content {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::File(path) => write!(f, "File({path:?})"),
            Self::Bytes(bytes) => write!(f, "Bytes(.. {} bytes)", bytes.len()),
        }
    }
}

/// How the machine starts.
#[derive(Clone, Debug)]
pub enum Boot {
    /// By the BIOS, from the first bootable drive.
    Bios,
    /// By UEFI, with an empty variable store.
    Uefi,
    /// By UEFI that enforces Secure Boot with the keys in this variable store (copied).
    SecureUefi {
        /// The variable store.
        vars: PathBuf,
    },
    /// A kernel given by the host.
    Kernel {
        /// The kernel.
        kernel: PathBuf,
        /// The parts of its initrd, concatenated at multiples of four bytes.
        initrd: Vec<Content>,
        /// Its command line; see [`crate::kernel_cmdline`].
        cmdline: String,
    },
}

/// A raw disk image.
#[derive(Clone, Debug)]
pub struct Drive {
    /// The image on the host.
    pub path: PathBuf,
    /// The serial number the guest sees; at most 20 characters.
    pub serial: String,
    /// Whether the guest's writes are thrown away at the end.
    pub snapshot: bool,
}

/// The kind of a NIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NicModel {
    /// virtio-net.
    Virtio,
    /// virtio-net without any offload: every frame on the wire is whole and has its checksum.
    VirtioPlain,
    /// virtio-net without any offload whose driver names a limit for its packets: 9000 bytes. It has them from the start.
    VirtioJumbo,
    /// Intel e1000e, a wired PCI NIC.
    E1000e,
    /// A USB NIC (CDC Ethernet).
    Usb,
}

#[derive(Clone, Debug)]
pub(super) struct Nic {
    pub(super) id: String,
    pub(super) model: NicModel,
    pub(super) netdev: Netdev,
    pub(super) mac: String,
}

/// A machine to be started.
#[derive(Clone, Debug)]
pub struct VmBuilder {
    pub(super) name: String,
    pub(super) memory_mib: u32,
    pub(super) cpus: u32,
    pub(super) boot: Boot,
    pub(super) disks: Vec<Drive>,
    pub(super) sticks: Vec<Drive>,
    pub(super) nics: Vec<Nic>,
    pub(super) usb_hosts: Vec<(u16, u16)>,
    pub(super) vga: bool,
    pub(super) graphical: bool,
    pub(super) no_reboot: bool,
    pub(super) debug_exit: bool,
    live: bool,
    log_dir: Option<PathBuf>,
    pub(super) accel: Option<Accel>,
}

impl VmBuilder {
    /// A machine with 1 GiB of memory, two CPUs and nothing else; `name` is for logs and messages.
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            memory_mib: 1024,
            cpus: 2,
            boot: Boot::Bios,
            disks: Vec::new(),
            sticks: Vec::new(),
            nics: Vec::new(),
            usb_hosts: Vec::new(),
            vga: false,
            graphical: false,
            no_reboot: false,
            debug_exit: false,
            live: std::env::var_os("STIEFEL_TEST_LIVE").is_some(),
            log_dir: None,
            accel: None,
        }
    }

    /// Memory in MiB.
    pub fn memory_mib(mut self, memory_mib: u32) -> Self {
        self.memory_mib = memory_mib;
        self
    }

    /// How many CPUs.
    pub fn cpus(mut self, cpus: u32) -> Self {
        self.cpus = cpus;
        self
    }

    /// How it starts.
    pub fn boot(mut self, boot: Boot) -> Self {
        self.boot = boot;
        self
    }

    /// Adds a virtio disk.
    pub fn disk(mut self, drive: Drive) -> Self {
        self.disks.push(drive);
        self
    }

    /// Adds a USB stick, the first to be booted from.
    pub fn stick(mut self, image: &Path) -> Self {
        let serial = format!("stick{}", self.sticks.len());
        self.sticks.push(Drive {
            path: image.to_owned(),
            serial,
            snapshot: false,
        });
        self
    }

    /// Adds a NIC that is there from the start. A USB one may be unplugged by its `id`.
    pub fn nic(mut self, id: &str, model: NicModel, netdev: &Netdev, mac: &str) -> Self {
        self.nics.push(Nic {
            id: id.to_owned(),
            model,
            netdev: netdev.clone(),
            mac: mac.to_owned(),
        });
        self
    }

    /// Gives the machine a real USB device of the host.
    pub fn usb_host(mut self, vendor: u16, product: u16) -> Self {
        self.usb_hosts.push((vendor, product));
        self
    }

    /// Gives the machine a screen that [`Vm::screendump`] can see, without a window.
    pub fn vga(mut self) -> Self {
        self.vga = true;
        self
    }

    /// Shows the machine's screen in a window.
    pub fn graphical(mut self, graphical: bool) -> Self {
        self.graphical = graphical;
        self
    }

    /// Ends QEMU when the guest restarts the machine.
    pub fn no_reboot(mut self) -> Self {
        self.no_reboot = true;
        self
    }

    /// Lets the guest end QEMU by writing a value v to port 0xf4; the exit status is 2 v + 1.
    pub fn debug_exit(mut self) -> Self {
        self.debug_exit = true;
        self
    }

    /// Prints the console's lines on standard error as they come, each after the machine's name. Also by the environment
    /// variable `STIEFEL_TEST_LIVE`.
    pub fn live(mut self, live: bool) -> Self {
        self.live = live;
        self
    }

    /// Where the serial log goes, instead of [`cache::log_dir`].
    pub fn log_dir(mut self, dir: &Path) -> Self {
        self.log_dir = Some(dir.to_owned());
        self
    }

    /// How it runs, instead of what [`Accel::detect`] says.
    pub fn accel(mut self, accel: Accel) -> Self {
        self.accel = Some(accel);
        self
    }

    /// Starts the machine.
    ///
    /// # Errors
    /// When a tool or file is missing, or QEMU refuses what it is given.
    pub fn start(self) -> Result<Vm, VmError> {
        let file_error = |action, path: &Path, source| VmError::File {
            name: self.name.clone(),
            action,
            path: path.to_owned(),
            source,
        };
        let accel = self.accel.unwrap_or_else(Accel::detect);
        let temp = std::env::temp_dir();
        let dir = tempfile::Builder::new()
            .prefix("stiefel-vm-")
            .tempdir_in(&temp)
            .map_err(|source| file_error("create a directory in", &temp, source))?;
        let log = self
            .log_path()
            .map_err(|source| file_error("create a log in", &temp, source))?;
        let command = command::build(&self, accel, dir.path())?;
        let child =
            process::spawn_lasting(command).map_err(|source| file_error("start", Path::new(super::QEMU), source))?;
        let mut process = Process::new(child);

        let console = connect(&self.name, &mut process, dir.path(), command::SERIAL)?;
        let monitor = connect(&self.name, &mut process, dir.path(), command::QMP)?;
        let started = |source| VmError::Qmp {
            name: self.name.clone(),
            said: super::qemu_said(dir.path()),
            source,
        };
        let qmp = Qmp::new(monitor, accel.deadline(ANSWER)).map_err(started)?;
        let power_on = Instant::now();
        let options = serial::Options {
            name: self.name.clone(),
            log,
            live: self.live,
            accel,
        };
        let serial = Serial::start(console, options, power_on)?;
        // QEMU waited for this: a console nobody reads loses what is written to it.
        qmp.execute("cont", json!({})).map_err(started)?;

        let nics: HashMap<String, String> = self
            .nics
            .iter()
            .map(|nic| (nic.id.clone(), command::netdev_id(&nic.id)))
            .collect();
        Ok(Vm {
            name: self.name,
            accel,
            process: Mutex::new(process),
            qmp,
            serial,
            dir,
            power_on,
            nics: Mutex::new(nics),
            next_netdev: AtomicU32::new(0),
        })
    }

    /// A log file that no other machine of this or another process writes.
    fn log_path(&self) -> std::io::Result<PathBuf> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let dir = match &self.log_dir {
            Some(dir) => {
                fs::create_dir_all(dir)?;
                dir.clone()
            }
            None => cache::log_dir()?,
        };
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name: String = self
            .name
            .chars()
            .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
            .collect();
        Ok(dir.join(format!("{}-{number}-{name}.log", std::process::id())))
    }
}
