//! Devices that come and go: the kernel's uevents, and those that were there before we listened.
//!
//! Used by the driver loader of the ramdisk, autokexec's trigger, and the keeper. Format: the kernel's
//! `lib/kobject_uevent.c`: `ACTION@DEVPATH`, then `KEY=VALUE`, each ended by a NUL.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use netlink_sys::protocols::NETLINK_KOBJECT_UEVENT;

use crate::{netlink, read};

/// The kernel sends to group 1, udev to group 2.
const KERNEL_GROUP: u32 = 1;
/// A plugged dock sends some hundred events of about 300 bytes while drivers load.
const QUEUE: usize = 4 << 20;
/// sysfs is not deeper than this even behind docks and hubs.
const MAX_DEPTH: usize = 64;

/// Why events cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum UeventError {
    /// The socket could not be opened.
    #[error("cannot listen to the kernel's device events; this needs root and a kernel with CONFIG_NET")]
    Open {
        /// The kernel's answer.
        source: io::Error,
    },
    /// More events came than the queue holds.
    #[error("device events were lost; look through /sys again, then go on")]
    Lost,
    /// Receiving failed.
    #[error("cannot receive device events; open the monitor again")]
    Receive {
        /// The kernel's answer.
        source: io::Error,
    },
}

/// One event.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Uevent {
    /// `add`, `remove`, `change`, `move`, `bind`, `unbind`, …
    pub action: String,
    /// Below sysfs, with a leading slash.
    pub devpath: String,
    /// E.g. `net`, `block`, `usb`.
    pub subsystem: Option<String>,
    /// All fields, also ACTION, DEVPATH and SUBSYSTEM. Bytes that are no UTF-8 stand as U+FFFD.
    pub fields: BTreeMap<String, String>,
}

impl Uevent {
    /// Reads a message of the kernel; `None` for other programs' formats and nonsense.
    #[must_use]
    pub fn parse(message: &[u8]) -> Option<Self> {
        let mut parts = message.split(|&byte| byte == 0).map(String::from_utf8_lossy);
        let head = parts.next()?;
        let (action, devpath) = head.split_once('@')?;
        if action.is_empty() || !devpath.starts_with('/') {
            return None;
        }
        let fields: BTreeMap<String, String> = parts
            .filter_map(|part| {
                part.split_once('=')
                    .map(|(key, value)| (key.to_owned(), value.to_owned()))
            })
            .collect();
        let subsystem = fields.get("SUBSYSTEM").cloned();
        Some(Self {
            action: action.to_owned(),
            devpath: devpath.to_owned(),
            subsystem,
            fields,
        })
    }

    /// A field's value, e.g. of `INTERFACE`, `DEVNAME`.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&str> {
        self.fields.get(key).map(String::as_str)
    }

    /// What to look the driver up by.
    #[must_use]
    pub fn modalias(&self) -> Option<&str> {
        self.get("MODALIAS")
    }
}

/// An open stream of the kernel's events, from [`Monitor::open`] on.
#[derive(Debug)]
pub struct Monitor {
    socket: netlink::Socket,
}

impl AsFd for Monitor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Monitor {
    /// Begins to listen. Open it before a [`coldplug`], and nothing falls between.
    ///
    /// # Errors
    /// [`UeventError::Open`].
    pub fn open() -> Result<Self, UeventError> {
        let open = || {
            let mut socket = netlink::Socket::open(NETLINK_KOBJECT_UEVENT)?;
            socket.enlarge_queue(QUEUE);
            socket.join(KERNEL_GROUP)?;
            Ok(Self { socket })
        };
        open().map_err(|source| UeventError::Open { source })
    }

    /// The next event, or `None` after `timeout` (`None` waits for ever). Only the kernel's own messages count: any
    /// process with the right may send to this group.
    ///
    /// # Errors
    /// [`UeventError::Lost`] (go on after a new [`coldplug`]), [`UeventError::Receive`].
    pub fn next(&mut self, timeout: Option<Duration>) -> Result<Option<Uevent>, UeventError> {
        let deadline = crate::process::deadline(timeout);
        loop {
            let left = crate::process::left(deadline);
            match self.socket.receive(left) {
                Ok(None) => return Ok(None),
                Ok(Some(message)) => {
                    if let Some(event) = Uevent::parse(&message) {
                        return Ok(Some(event));
                    }
                }
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => return Err(UeventError::Lost),
                Err(source) => return Err(UeventError::Receive { source }),
            }
        }
    }
}

/// A device that waits for, or already has, a driver.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Modalias {
    /// Its folder in sysfs.
    pub device: PathBuf,
    /// What to look the driver up by.
    pub modalias: String,
}

/// All devices below `sysfs/devices` that have a modalias, parents before their children. Symbolic links are not
/// followed, so there are no loops; devices that vanish meanwhile are passed over.
pub fn coldplug(sysfs: &Path) -> impl Iterator<Item = Modalias> + use<> {
    let mut waiting = vec![(sysfs.join("devices"), 0)];
    std::iter::from_fn(move || {
        while let Some((folder, depth)) = waiting.pop() {
            // There are some ten thousand folders: each is only listed, and nothing opened in vain.
            let mut modalias = None;
            for entry in std::fs::read_dir(&folder).into_iter().flatten().flatten() {
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    if depth < MAX_DEPTH {
                        waiting.push((entry.path(), depth + 1));
                    }
                } else if entry.file_name() == "modalias" {
                    modalias = read::attribute(&entry.path());
                }
            }
            if let Some(modalias) = modalias {
                return Some(Modalias {
                    device: folder,
                    modalias,
                });
            }
        }
        None
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::fs::symlink;

    const PLUG: &[u8] =
        b"add@/devices/pci0/usb1/1-1/1-1:1.0/net/usb0\0ACTION=add\0SUBSYSTEM=net\0INTERFACE=usb0\0ODD\0";

    #[test]
    fn a_plugged_interface_is_understood() {
        let event = Uevent::parse(PLUG).unwrap();
        assert_eq!(
            (event.action.as_str(), event.subsystem.as_deref()),
            ("add", Some("net"))
        );
        assert_eq!(event.devpath, "/devices/pci0/usb1/1-1/1-1:1.0/net/usb0");
        assert_eq!(event.get("INTERFACE"), Some("usb0"));
        assert_eq!(event.modalias(), None);
    }

    #[test]
    fn bytes_that_are_no_text_do_not_hide_an_event() {
        let event = Uevent::parse(b"add@/devices/x\0NAME=a\xffb\0SUBSYSTEM=input\0").unwrap();
        assert_eq!(event.get("NAME"), Some("a\u{fffd}b"));
        assert_eq!(event.subsystem.as_deref(), Some("input"));
    }

    #[test]
    fn messages_of_udev_are_no_kernel_events() {
        assert_eq!(Uevent::parse(b"libudev\0\xfe\xed\xca\xfe"), None);
        assert_eq!(Uevent::parse(b"@/devices/x\0"), None);
        assert_eq!(Uevent::parse(b""), None);
    }

    #[test]
    fn coldplug_finds_devices_and_follows_no_links() {
        let sysfs = tempfile::tempdir().unwrap();
        let device = sysfs.path().join("devices/pci0/0000:00:01.0");
        std::fs::create_dir_all(device.join("virtio0")).unwrap();
        std::fs::write(device.join("modalias"), "pci:v1\n").unwrap();
        std::fs::write(device.join("virtio0/modalias"), "virtio:d1\n").unwrap();
        std::fs::write(sysfs.path().join("devices/modalias"), "\n").unwrap();
        symlink("..", device.join("subsystem")).unwrap();
        let found: Vec<_> = coldplug(sysfs.path()).collect();
        let expected =
            [(device.clone(), "pci:v1"), (device.join("virtio0"), "virtio:d1")].map(|(device, modalias)| Modalias {
                device,
                modalias: modalias.to_owned(),
            });
        assert_eq!(found, expected);
    }

    #[test]
    fn without_sysfs_there_are_no_devices() {
        assert_eq!(coldplug(Path::new("/nonexistent")).count(), 0);
    }

    #[test]
    fn a_quiet_monitor_times_out() {
        let mut monitor = Monitor::open().unwrap();
        // Other tests' devices may send something; a time-out must come in the end all the same.
        while monitor.next(Some(Duration::ZERO)).unwrap().is_some() {}
    }

    proptest! {
        #[test]
        fn any_bytes_are_parsed(bytes: Vec<u8>) {
            let _ = Uevent::parse(&bytes);
        }

        #[test]
        fn fields_come_back(fields in prop::collection::btree_map("[A-Z_]{1,8}", "[^\0]{0,12}", 0..8)) {
            let mut message = b"change@/devices/x\0".to_vec();
            for (key, value) in &fields {
                message.extend(format!("{key}={value}\0").bytes());
            }
            prop_assert_eq!(Uevent::parse(&message).unwrap().fields, fields);
        }
    }
}
