//! The kernel's NVMe over TCP host: connect to a subsystem, find its block devices, ask how it is, let go.
//!
//! Used by the attacher, the keeper and the goodbye; the other side is `nvmet`. The kernel does all input and output, and
//! reconnects by itself. Interface: `/dev/nvme-fabrics` (`drivers/nvme/host/fabrics.c`: one line of options is written,
//! one line is read back), `/sys/class/nvme`.
//!
//! The kernel's reconnecting worker is always in the initial network namespace: [`connect`] must be called there, or
//! the controller never comes back after a loss. The address must have no scope: a link-local one does not survive a
//! re-plug.

mod protect;

use std::fs::{OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::read;

pub use protect::write_protect;

/// Where the kernel takes new connections.
pub const FABRICS: &str = "/dev/nvme-fabrics";
/// The longest name of a subsystem or host in bytes (NVMe base specification, "NVMe Qualified Names").
pub const MAX_NQN: usize = 223;

/// NVMF_MIN_QUEUE_SIZE, NVMF_MAX_QUEUE_SIZE of `drivers/nvme/host/fabrics.h`.
const QUEUE_SIZES: std::ops::RangeInclusive<u32> = 16..=1024;
/// NVME_IO_TIMEOUT's start value, in seconds (`drivers/nvme/host/core.c`).
const DEFAULT_IO_TIMEOUT: u32 = 30;
/// The kernel's answer is two numbers; newer ones may add to it.
const MAX_ANSWER: u64 = 4096;

/// Why something about an NVMe controller failed.
#[derive(Debug, thiserror::Error)]
pub enum NvmeError {
    /// An option that cannot be one.
    #[error("{value:?} cannot be the {option} of an NVMe connection; give {expected}")]
    Option {
        /// Which.
        option: &'static str,
        /// What was given.
        value: String,
        /// What is allowed.
        expected: &'static str,
    },
    /// The kernel has no NVMe over TCP.
    #[error("cannot open {path}; load the module nvme-tcp, or take disk.transport: nbd", path = path.display())]
    NoFabrics {
        /// What was opened.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The connection failed.
    #[error("the kernel could not connect to {address} by NVMe; its log (dmesg) says why")]
    Connect {
        /// Where to.
        address: IpAddr,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The kernel did not say which controller it made.
    #[error("the kernel's answer {answer:?} names no NVMe controller; look for a new one in /sys/class/nvme")]
    Answer {
        /// What it said.
        answer: String,
    },
    /// The controllers could not be looked at.
    #[error("cannot read {path}; the NVMe controller may be gone", path = path.display())]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A setting was refused.
    #[error("cannot write {path}; is sysfs read-only?", path = path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A command was refused.
    #[error("cannot {action} the NVMe controller nvme{instance}; it may be gone")]
    Refused {
        /// `delete` or `reset`.
        action: &'static str,
        /// Its number.
        instance: u32,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// A connection to be made; [`connect`] takes it.
#[derive(Clone, Copy, Debug)]
pub struct Connect<'a> {
    /// The server's address.
    pub address: IpAddr,
    /// Its TCP port.
    pub port: u16,
    /// The name of the subsystem.
    pub nqn: &'a str,
    /// The name by which the server knows this machine.
    pub host_nqn: &'a str,
    /// A UUID that belongs to `host_nqn` alone: since Linux 6.5 a host's name and id must be a pair for as long as the
    /// module is loaded, also against the kernel's own default id. So it is no option here.
    pub host_id: &'a str,
    /// How long the kernel tries to reconnect, in seconds (rounded up), before input and output fail; `None` for ever.
    pub ctrl_loss_timeout: Option<Duration>,
    /// How long it waits between tries, in seconds (rounded up); at least one.
    pub reconnect_delay: Duration,
    /// After how long without an answer the connection counts as lost, in seconds (rounded up); at least one.
    pub keep_alive: Duration,
    /// How many queues for input and output; `None`: one for each processor.
    pub queues: Option<u32>,
    /// How many requests a queue holds, 16 to 1024; `None`: the kernel's 128.
    pub queue_size: Option<u32>,
}

/// A controller of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Controller {
    /// N of `/dev/nvmeN`.
    pub instance: u32,
    /// Its number at the server.
    pub cntlid: u16,
}

/// How a controller is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// Not connected for the first time yet.
    New,
    /// It works.
    Live,
    /// It is about to connect anew.
    Resetting,
    /// The connection is lost; input and output wait.
    Connecting,
    /// It goes away.
    Deleting,
    /// It is given up: input and output fail.
    Dead,
    /// One that this program does not know.
    Other(String),
}

/// Connects, and waits until the controller is live. `fabrics` is usually [`FABRICS`].
///
/// # Errors
/// [`NvmeError::Option`], [`NvmeError::NoFabrics`], [`NvmeError::Connect`] (EALREADY: such a controller is there),
/// [`NvmeError::Answer`].
pub fn connect(fabrics: &Path, options: &Connect<'_>) -> Result<Controller, NvmeError> {
    let line = options.line()?;
    let mut device = OpenOptions::new()
        .read(true)
        .write(true)
        .open(fabrics)
        .map_err(|source| NvmeError::NoFabrics {
            path: fabrics.to_owned(),
            source,
        })?;
    let failed = |source| NvmeError::Connect {
        address: options.address,
        source,
    };
    // One call: the kernel takes each as a whole set of options.
    let written = device.write(line.as_bytes()).map_err(failed)?;
    if written != line.len() {
        return Err(failed(io::ErrorKind::WriteZero.into()));
    }
    let mut answer = String::new();
    device.take(MAX_ANSWER).read_to_string(&mut answer).map_err(failed)?;
    parse_answer(&answer).ok_or(NvmeError::Answer { answer })
}

/// How long the NVMe driver waits for the answer to a request before it gives its connection up. Controllers take it when
/// they are made; the earlier value comes back.
///
/// # Errors
/// [`NvmeError::Read`], [`NvmeError::Write`].
pub fn set_io_timeout(sysfs: &Path, timeout: Duration) -> Result<Duration, NvmeError> {
    let path = sysfs.join("module/nvme_core/parameters/io_timeout");
    let before = read::bounded(&path, 4096).map_err(|source| NvmeError::Read {
        path: path.clone(),
        source,
    })?;
    let before = number(String::from_utf8_lossy(&before).trim()).unwrap_or(DEFAULT_IO_TIMEOUT);
    std::fs::write(&path, timeout.as_secs().to_string()).map_err(|source| NvmeError::Write { path, source })?;
    Ok(Duration::from_secs(before.into()))
}

/// Leaves the names that open a controller's disk to root: who knows them may connect as this host does.
///
/// # Errors
/// [`NvmeError::Write`]; the others are hidden all the same.
pub fn hide_names(sysfs: &Path, instance: u32) -> Result<(), NvmeError> {
    let mut done = Ok(());
    let own = ["hostnqn", "hostid", "subsysnqn"].map(|name| folder(sysfs, instance).join(name));
    // The subsystem shows its name, too; which it is the kernel says by a link to each of its controllers.
    let controller = format!("nvme{instance}");
    let subsystems = std::fs::read_dir(sysfs.join("class/nvme-subsystem"));
    let subsystems = subsystems.into_iter().flatten().flatten().map(|entry| entry.path());
    let theirs = subsystems
        .filter(|subsystem| subsystem.join(&controller).exists())
        .map(|subsystem| subsystem.join("subsysnqn"));
    for path in own.into_iter().chain(theirs) {
        if let Err(source) = std::fs::set_permissions(&path, Permissions::from_mode(0o400))
            && source.kind() != io::ErrorKind::NotFound
        {
            done = Err(NvmeError::Write { path, source });
        }
    }
    done
}

impl Connect<'_> {
    fn line(&self) -> Result<String, NvmeError> {
        check_nqn("nqn", self.nqn)?;
        check_nqn("host_nqn", self.host_nqn)?;
        let host_id = self.host_id;
        let host_id = uuid_text(host_id).ok_or_else(|| refused_option("host_id", host_id, "a UUID"))?;
        if self.queues == Some(0) {
            return Err(refused_option("queues", "0", "at least one"));
        }
        if let Some(size) = self.queue_size.filter(|size| !QUEUE_SIZES.contains(size)) {
            return Err(refused_option("queue_size", &size.to_string(), "16 to 1024"));
        }
        let loss = match self.ctrl_loss_timeout {
            Some(time) => seconds("ctrl_loss_timeout", time)?,
            None => -1,
        };
        let mut line = format!(
            "transport=tcp,traddr={},trsvcid={},nqn={},hostnqn={},hostid={host_id},ctrl_loss_tmo={loss},reconnect_delay={},keep_alive_tmo={}",
            self.address,
            self.port,
            self.nqn,
            self.host_nqn,
            seconds("reconnect_delay", self.reconnect_delay)?,
            seconds("keep_alive", self.keep_alive)?,
        );
        for (option, value) in [("nr_io_queues", self.queues), ("queue_size", self.queue_size)] {
            if let Some(value) = value {
                line.push_str(&format!(",{option}={value}"));
            }
        }
        Ok(line)
    }
}

/// Rounded up; the kernel reads a signed 32-bit number, and takes zero for "never".
fn seconds(option: &'static str, time: Duration) -> Result<i32, NvmeError> {
    let whole = time.as_secs().saturating_add(u64::from(time.subsec_nanos() > 0));
    match i32::try_from(whole) {
        Ok(whole) if whole > 0 => Ok(whole),
        _ => Err(refused_option(
            option,
            &format!("{time:?}"),
            "at least a second, at most 68 years",
        )),
    }
}

fn refused_option(option: &'static str, value: &str, expected: &'static str) -> NvmeError {
    NvmeError::Option {
        option,
        value: value.to_owned(),
        expected,
    }
}

/// A name goes into a line of options here, and is a folder's name at the server: no comma, slash, blank or control
/// character may be in it.
pub(crate) fn is_nqn(name: &str) -> bool {
    name.len() <= MAX_NQN
        && name.starts_with("nqn.")
        && name.bytes().all(|b| b.is_ascii_graphic() && !b",/\\\"'".contains(&b))
}

fn check_nqn(option: &'static str, name: &str) -> Result<(), NvmeError> {
    if is_nqn(name) {
        Ok(())
    } else {
        let expected = "a name beginning with nqn., at most 223 letters, digits, points, colons and hyphens";
        Err(refused_option(option, name, expected))
    }
}

/// 32 hexadecimal digits, with hyphens anywhere between, as the canonical text of a UUID.
pub(crate) fn uuid_text(text: &str) -> Option<String> {
    let digits: String = text.chars().filter(|&c| c != '-').collect();
    if digits.len() != 32 || !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    let digits = digits.to_ascii_lowercase();
    let parts = [0..8, 8..12, 12..16, 16..20, 20..32].map(|part| digits.get(part).unwrap_or_default());
    Some(parts.join("-"))
}

/// Reads `instance=N,cntlid=M`, with anything else passed over. `None` without both: a kernel without a connection
/// says `instance=-1`.
fn parse_answer(answer: &str) -> Option<Controller> {
    let field = |name: &str| {
        answer
            .trim_matches(|c: char| c.is_whitespace() || c == '\0')
            .split(',')
            .find_map(|part| part.trim().strip_prefix(name)?.strip_prefix('='))
    };
    Some(Controller {
        instance: decimal(field("instance")?)?,
        cntlid: decimal(field("cntlid")?)?,
    })
}

/// Digits alone: `parse` would also take a sign.
fn decimal<T: std::str::FromStr>(text: &str) -> Option<T> {
    text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse().ok())?
}

fn folder(sysfs: &Path, instance: u32) -> PathBuf {
    sysfs.join("class/nvme").join(format!("nvme{instance}"))
}

/// The block devices of a controller, such as `nvme0n1`, in the order of their numbers. None for the first moments
/// after [`connect`]: ask again.
///
/// # Errors
/// [`NvmeError::Read`] if there is no such controller.
pub fn namespaces(sysfs: &Path, instance: u32) -> Result<Vec<String>, NvmeError> {
    let path = folder(sysfs, instance);
    let failed = |source| NvmeError::Read {
        path: path.clone(),
        source,
    };
    let mut found = Vec::new();
    for entry in std::fs::read_dir(&path).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        if let Some(numbers) = name.to_str().and_then(block_device) {
            found.push(numbers);
        }
    }
    found.sort_unstable();
    found.dedup();
    let names = found
        .into_iter()
        .map(|(subsystem, namespace)| format!("nvme{subsystem}n{namespace}"));
    // With multipath the device comes to be a little after the path.
    Ok(names.filter(|name| sysfs.join("block").join(name).exists()).collect())
}

/// The numbers of the block device that belongs to an entry of a controller's folder: `nvme0n1` is one itself,
/// `nvme0c3n1` is the hidden path to `nvme0n1` through controller 3.
fn block_device(entry: &str) -> Option<(u32, u32)> {
    let (subsystem, namespace) = entry.strip_prefix("nvme")?.split_once('n')?;
    let subsystem = match subsystem.split_once('c') {
        Some((subsystem, controller)) => {
            number(controller)?;
            subsystem
        }
        None => subsystem,
    };
    Some((number(subsystem)?, number(namespace)?))
}

fn number(text: &str) -> Option<u32> {
    if text.is_empty() { None } else { decimal(text) }
}

/// The controller of a subsystem, if there is one.
///
/// # Errors
/// [`NvmeError::Read`] if the controllers cannot be listed; a kernel without NVMe has none.
pub fn find(sysfs: &Path, nqn: &str) -> Result<Option<u32>, NvmeError> {
    let path = sysfs.join("class/nvme");
    let entries = match std::fs::read_dir(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        entries => entries.map_err(|source| NvmeError::Read { path, source })?,
    };
    let instances = entries
        .flatten()
        .filter_map(|entry| number(entry.file_name().to_str()?.strip_prefix("nvme")?));
    Ok(instances.into_iter().find(|instance| {
        let name = folder(sysfs, *instance).join("subsysnqn");
        // One that goes away while it is looked at is not it.
        read::bounded(&name, 4096).is_ok_and(|bytes| String::from_utf8_lossy(&bytes).trim() == nqn)
    }))
}

/// How a controller is.
///
/// # Errors
/// [`NvmeError::Read`] if there is no such controller.
pub fn state(sysfs: &Path, instance: u32) -> Result<State, NvmeError> {
    let path = folder(sysfs, instance).join("state");
    match read::bounded(&path, 4096) {
        Ok(bytes) => Ok(parse_state(&String::from_utf8_lossy(&bytes))),
        Err(source) => Err(NvmeError::Read { path, source }),
    }
}

fn parse_state(text: &str) -> State {
    match text.trim() {
        "new" => State::New,
        "live" => State::Live,
        "resetting" => State::Resetting,
        "connecting" => State::Connecting,
        "deleting" | "deleting (no IO)" => State::Deleting,
        "dead" => State::Dead,
        other => State::Other(other.to_owned()),
    }
}

/// Takes a controller and its block devices away; what still waits fails. Returns when it is gone, which takes more
/// than a minute (nvme-core's `admin_timeout`, 60 s) while the server does not answer: bound the wait.
///
/// # Errors
/// [`NvmeError::Refused`].
pub fn delete(sysfs: &Path, instance: u32) -> Result<(), NvmeError> {
    command("delete", "delete_controller", sysfs, instance)
}

/// Connects a live controller anew; input and output wait meanwhile.
///
/// # Errors
/// [`NvmeError::Refused`]: EBUSY unless it is live; ENETRESET if it did not become live again at once.
pub fn reset(sysfs: &Path, instance: u32) -> Result<(), NvmeError> {
    command("reset", "reset_controller", sysfs, instance)
}

fn command(action: &'static str, file: &str, sysfs: &Path, instance: u32) -> Result<(), NvmeError> {
    let write = || {
        let path = folder(sysfs, instance).join(file);
        OpenOptions::new().write(true).open(path)?.write_all(b"1")
    };
    write().map_err(|source| NvmeError::Refused {
        action,
        instance,
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ID: &str = "01234567-89ab-cdef-0123-456789abcdef";

    fn options() -> Connect<'static> {
        Connect {
            address: "fd00::1".parse().unwrap(),
            port: 4420,
            nqn: "nqn.2026-11.stiefel:disk",
            host_nqn: "nqn.2026-11.stiefel:desktop",
            host_id: ID,
            ctrl_loss_timeout: None,
            reconnect_delay: Duration::from_millis(1500),
            keep_alive: Duration::from_secs(5),
            queues: None,
            queue_size: None,
        }
    }

    #[test]
    fn the_line_of_options_is_this() {
        let expected = "transport=tcp,traddr=fd00::1,trsvcid=4420,nqn=nqn.2026-11.stiefel:disk,\
            hostnqn=nqn.2026-11.stiefel:desktop,hostid=01234567-89ab-cdef-0123-456789abcdef,\
            ctrl_loss_tmo=-1,reconnect_delay=2,keep_alive_tmo=5";
        assert_eq!(options().line().unwrap(), expected);
        let more = Connect {
            ctrl_loss_timeout: Some(Duration::from_secs(600)),
            queues: Some(4),
            queue_size: Some(128),
            ..options()
        };
        let expected = expected.replace("=-1", "=600") + ",nr_io_queues=4,queue_size=128";
        assert_eq!(more.line().unwrap(), expected);
    }

    #[test]
    fn options_the_kernel_would_misread_are_refused() {
        let refused = |options: Connect<'_>| matches!(options.line(), Err(NvmeError::Option { .. }));
        let long = format!("nqn.{}", "a".repeat(220));
        for name in [
            "",
            "disk",
            "nqn.a,hostid=x",
            "nqn.a b",
            "nqn.a\n",
            "nqn.a/b",
            "nqn.\u{e4}",
            &long,
        ] {
            assert!(refused(Connect { nqn: name, ..options() }), "{name:?}");
            assert!(
                refused(Connect {
                    host_nqn: name,
                    ..options()
                }),
                "{name:?}"
            );
        }
        for id in [
            "",
            "0123",
            "01234567-89ab-cdef-0123-456789abcdeg",
            "01234567-89ab-cdef-0123-456789abcdef,x",
        ] {
            assert!(
                refused(Connect {
                    host_id: id,
                    ..options()
                }),
                "{id:?}"
            );
        }
        assert!(refused(Connect {
            queues: Some(0),
            ..options()
        }));
        assert!(refused(Connect {
            queue_size: Some(15),
            ..options()
        }));
        assert!(refused(Connect {
            queue_size: Some(1025),
            ..options()
        }));
        assert!(refused(Connect {
            keep_alive: Duration::ZERO,
            ..options()
        }));
        assert!(refused(Connect {
            reconnect_delay: Duration::from_secs(1 << 31),
            ..options()
        }));
    }

    #[test]
    fn the_kernels_answer_is_read_and_no_controller_is_none() {
        let found = Some(Controller {
            instance: 3,
            cntlid: 17,
        });
        assert_eq!(parse_answer("instance=3,cntlid=17\n"), found);
        assert_eq!(parse_answer("cntlid=17,instance=3,more=1"), found);
        for none in [
            "",
            "instance=-1,cntlid=-1,transport=%s",
            "instance=3",
            "instance=+3,cntlid=1",
            "instance=,cntlid=1",
        ] {
            assert_eq!(parse_answer(none), None, "{none:?}");
        }
    }

    #[test]
    fn a_refused_connection_names_its_cause() {
        let folder = tempfile::tempdir().unwrap();
        let absent = connect(&folder.path().join("nvme-fabrics"), &options());
        assert!(matches!(absent, Err(NvmeError::NoFabrics { .. })));
        let silent = folder.path().join("silent");
        std::fs::write(&silent, "").unwrap();
        assert!(matches!(connect(&silent, &options()), Err(NvmeError::Answer { .. })));
        assert!(matches!(
            connect(Path::new("/dev/full"), &options()),
            Err(NvmeError::Connect { .. })
        ));
    }

    #[test]
    fn block_devices_are_found_with_and_without_multipath() {
        let sysfs = tempfile::tempdir().unwrap();
        let make = |path: &str| std::fs::create_dir_all(sysfs.path().join(path)).unwrap();
        for entry in [
            "nvme0c1n10",
            "nvme0c1n2",
            "nvme0c1n3",
            "nvme1n1",
            "ng0n2",
            "hwmon0",
            "nvme0c1",
            "nvmen1",
            "power",
        ] {
            make(&format!("class/nvme/nvme1/{entry}"));
        }
        for device in ["nvme0n10", "nvme0n2", "nvme1n1", "nvme5n1"] {
            make(&format!("block/{device}"));
        }
        // The third path has no device yet.
        assert_eq!(namespaces(sysfs.path(), 1).unwrap(), ["nvme0n2", "nvme0n10", "nvme1n1"]);
        assert!(matches!(namespaces(sysfs.path(), 2), Err(NvmeError::Read { .. })));
    }

    #[test]
    fn states_and_commands_go_through_sysfs() {
        let sysfs = tempfile::tempdir().unwrap();
        let folder = sysfs.path().join("class/nvme/nvme4");
        std::fs::create_dir_all(&folder).unwrap();
        for (text, expected) in [
            ("live\n", State::Live),
            ("connecting\n", State::Connecting),
            ("deleting (no IO)\n", State::Deleting),
            ("odd\n", State::Other("odd".to_owned())),
        ] {
            std::fs::write(folder.join("state"), text).unwrap();
            assert_eq!(state(sysfs.path(), 4).unwrap(), expected);
        }
        assert!(matches!(
            delete(sysfs.path(), 4),
            Err(NvmeError::Refused { instance: 4, .. })
        ));
        assert!(!folder.join("delete_controller").exists());
        for file in ["delete_controller", "reset_controller"] {
            std::fs::write(folder.join(file), "").unwrap();
        }
        delete(sysfs.path(), 4).unwrap();
        assert_eq!(std::fs::read_to_string(folder.join("delete_controller")).unwrap(), "1");
        assert_eq!(std::fs::read_to_string(folder.join("reset_controller")).unwrap(), "");
        reset(sysfs.path(), 4).unwrap();
        assert_eq!(std::fs::read_to_string(folder.join("reset_controller")).unwrap(), "1");
    }

    proptest! {
        #[test]
        fn any_text_is_read(text: String) {
            let _ = parse_answer(&text);
            let _ = block_device(&text);
            let _ = uuid_text(&text);
        }

        #[test]
        fn answers_are_read_back(instance: u32, cntlid: u16) {
            let answer = format!("instance={instance},cntlid={cntlid}\n");
            prop_assert_eq!(parse_answer(&answer), Some(Controller { instance, cntlid }));
        }

        #[test]
        fn no_name_adds_an_option(name in "nqn\\.\\PC*") {
            let wanted = Connect { nqn: &name, ..options() };
            if let Ok(line) = wanted.line() {
                prop_assert_eq!(line.split(',').count(), options().line().unwrap().split(',').count());
            }
        }

        #[test]
        fn uuids_are_made_canonical(bytes: [u8; 16]) {
            let digits: String = bytes.iter().map(|byte| format!("{byte:02X}")).collect();
            let text = uuid_text(&digits).unwrap();
            prop_assert_eq!(text.replace('-', ""), digits.to_ascii_lowercase());
            prop_assert_eq!(uuid_text(&text), Some(text.clone()));
        }
    }
}
