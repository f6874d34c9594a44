//! The kernel's NVMe over TCP target: publish a disk to one host, and take it back (configfs, `nvmet`).
//!
//! Used by the server; the other side is `nvme`. The kernel does all input and output, also when this process is gone:
//! a restarted server finds what was published still at work, and [`recover`] ends it. Interface:
//! `drivers/nvme/target/configfs.c`; modules nvmet and nvmet-tcp.
//!
//! The kernel opens the disk for writing, and not exclusively: hold your own O_EXCL descriptor. It listens in the network
//! namespace of the thread that publishes. A namespace that is published again must have the same UUID and NGUID, or a
//! host that reconnects drops the disk.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use crate::nvme::{is_nqn, uuid_text};

mod shelf;
mod tree;

pub use shelf::{Item, Shelf, TARGET_PREFIX};
use tree::{Configfs, Tree};

/// Where configfs usually is.
pub const CONFIGFS: &str = "/sys/kernel/config";
/// What the names of our subsystems and hosts begin with; [`recover`] takes away what has it.
pub const NQN_PREFIX: &str = "nqn.2026-11.stiefel:";
/// The longest serial number in bytes.
pub const MAX_SERIAL: usize = 20;
/// The longest model name in bytes.
pub const MAX_MODEL: usize = 40;

/// The number of our only namespace.
const NAMESPACE_ID: &str = "1";
/// Says "none": without it the kernel makes one up, another one each time.
const NIL_UUID: &str = "00000000-0000-0000-0000-000000000000";

/// Why a disk could not be published, or not taken back.
#[derive(Debug, thiserror::Error)]
pub enum NvmetError {
    /// A value that cannot be one.
    #[error("{value:?} cannot be the {field} of a published disk; give {expected}")]
    Value {
        /// Which.
        field: &'static str,
        /// What was given.
        value: String,
        /// What is allowed.
        expected: &'static str,
    },
    /// The kernel has no NVMe target.
    #[error("{path} is missing; load the modules nvmet and nvmet-tcp, and mount configfs", path = path.display())]
    NoTarget {
        /// What was looked for.
        path: PathBuf,
    },
    /// It is there already.
    #[error("{path} is there already and in use; withdraw what was published before, or take another", path = path.display())]
    Taken {
        /// What is there.
        path: PathBuf,
    },
    /// A step failed; those before it were undone.
    #[error("cannot set up {path}; the kernel's log (dmesg) may say why", path = path.display())]
    Publish {
        /// Where in configfs.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A step failed, and what came before it could not be undone.
    #[error("cannot publish the disk, and {path} could not be taken back ({undo}); the disk may still be in use", path = path.display())]
    Left {
        /// What is left in configfs.
        path: PathBuf,
        /// Why it is left.
        undo: io::Error,
        /// Why it was to be undone.
        source: Box<NvmetError>,
    },
    /// Taking back failed.
    #[error("cannot take back {path}; the disk may still be in use, try again", path = path.display())]
    Withdraw {
        /// What is left in configfs.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// A disk to be published; [`Target::publish`] takes it.
#[derive(Clone, Copy, Debug)]
pub struct Publish<'a> {
    /// The name of the subsystem; begins with [`NQN_PREFIX`].
    pub nqn: &'a str,
    /// The name of the only host that may connect; begins with [`NQN_PREFIX`].
    pub host_nqn: &'a str,
    /// The disk's own model, 1 to 40 printable ASCII characters; see [`fitting`].
    pub model: &'a str,
    /// The disk's own serial number, 1 to 20 printable ASCII characters; see [`fitting`].
    pub serial: &'a str,
    /// The disk.
    pub namespace: Namespace<'a>,
    /// Where to listen.
    pub ports: &'a [Port],
    /// The most queues a host may have; `None` leaves the kernel's 128.
    pub max_queues: Option<u16>,
}

/// A disk as the host sees it.
#[derive(Clone, Copy, Debug)]
pub struct Namespace<'a> {
    /// The block device, as an absolute path.
    pub device_path: &'a Path,
    /// Its own UUID; `None` if it has none.
    pub uuid: Option<&'a str>,
    /// Its own NGUID, 32 hexadecimal digits; `None` if it has none.
    pub nguid: Option<&'a str>,
}

/// Where to listen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Port {
    /// Its number in configfs. One that is there but serves nothing is taken over.
    pub id: u16,
    /// The address; `::` or `0.0.0.0` for all.
    pub address: IpAddr,
    /// The TCP port.
    pub tcp_port: u16,
}

/// Cuts `text` down to what fits a serial number ([`MAX_SERIAL`]) or model ([`MAX_MODEL`]): printable ASCII without blanks
/// at the ends. May be empty.
#[must_use]
pub fn fitting(text: &str, limit: usize) -> String {
    let printable: String = text.chars().filter(|c| matches!(c, ' '..='~')).collect();
    let cut: String = printable.trim().chars().take(limit).collect();
    cut.trim_end().to_owned()
}

/// The kernel's target.
#[derive(Clone, Debug)]
pub struct Target {
    root: PathBuf,
}

/// A disk that is published until [`withdraw`](Self::withdraw). Dropping this leaves it published.
#[derive(Debug)]
#[must_use = "the disk stays published until it is withdrawn"]
pub struct Published {
    /// In the order in which it is to be taken back.
    left: Vec<Undo>,
    missing: Vec<&'static str>,
}

impl Target {
    /// `root` is where configfs is mounted, usually [`CONFIGFS`].
    #[must_use]
    pub fn new(root: PathBuf) -> Self {
        Self { root }
    }

    /// Publishes a disk. What fails half-way is undone.
    ///
    /// # Errors
    /// [`NvmetError::Value`], [`NvmetError::NoTarget`], [`NvmetError::Taken`], [`NvmetError::Publish`] (EADDRINUSE: the
    /// TCP port; ENOENT: the device, or on `addr_trtype` the module nvmet-tcp), [`NvmetError::Left`].
    pub fn publish(&self, disk: &Publish<'_>) -> Result<Published, NvmetError> {
        publish(&mut Configfs, &self.root, disk)
    }
}

impl Published {
    /// The attributes that this kernel does not have, or did not take, such as `attr_model`, or an `attr_serial`
    /// that is no hexadecimal number, on old ones: the host sees others.
    #[must_use]
    pub fn missing(&self) -> &[&'static str] {
        &self.missing
    }

    /// Takes the disk back: no host is served any more, and the kernel has closed the device, when this succeeds. After an
    /// error it may be called again, and goes on with what is left.
    ///
    /// # Errors
    /// [`NvmetError::Withdraw`].
    pub fn withdraw(&mut self) -> Result<(), NvmetError> {
        take_back(&mut Configfs, &mut self.left)
    }
}

/// Takes back all that an earlier process published under [`NQN_PREFIX`], and answers the names of its subsystems.
/// `root` as for [`Target::new`]. A kernel without a target has nothing to take back.
///
/// # Errors
/// [`NvmetError::Withdraw`], after trying all.
pub fn recover(root: &Path) -> Result<Vec<String>, NvmetError> {
    recover_in(&mut Configfs, root)
}

impl Publish<'_> {
    /// All is checked before anything is done.
    fn check(&self) -> Result<(), NvmetError> {
        for (field, name) in [("nqn", self.nqn), ("host_nqn", self.host_nqn)] {
            require(
                field,
                name,
                is_nqn(name) && name.starts_with(NQN_PREFIX),
                "a name that begins with nqn.2026-11.stiefel:",
            )?;
        }
        let fits = |text: &str, limit| !text.is_empty() && fitting(text, limit) == text;
        require(
            "model",
            self.model,
            fits(self.model, MAX_MODEL),
            "1 to 40 printable ASCII characters",
        )?;
        require(
            "serial",
            self.serial,
            fits(self.serial, MAX_SERIAL),
            "1 to 20 printable ASCII characters",
        )?;
        let path = self.namespace.device_path.to_string_lossy();
        let plain = !path.contains(|c: char| c.is_control() || c == char::REPLACEMENT_CHARACTER);
        require("device_path", &path, plain && path.starts_with('/'), "an absolute path")?;
        for (field, id) in [("uuid", self.namespace.uuid), ("nguid", self.namespace.nguid)] {
            let id = id.unwrap_or(NIL_UUID);
            require(field, id, uuid_text(id).is_some(), "32 hexadecimal digits")?;
        }
        let ids: BTreeSet<u16> = self.ports.iter().map(|port| port.id).collect();
        let distinct = !ids.is_empty() && ids.len() == self.ports.len();
        require(
            "ports",
            &format!("{:?}", self.ports),
            distinct,
            "at least one, each with its own id",
        )?;
        require("max_queues", "0", self.max_queues != Some(0), "at least one")
    }

    /// What is to be done, in order; taking back is the reverse.
    fn plan(&self, nvmet: &Path) -> Vec<Step> {
        let host = nvmet.join("hosts").join(self.host_nqn);
        let subsystem = nvmet.join("subsystems").join(self.nqn);
        let mut steps = vec![Step::Folder {
            path: host.clone(),
            shared: true,
        }];
        steps.extend(self.ports.iter().flat_map(|port| port.plan(nvmet)));
        steps.push(Step::Folder {
            path: subsystem.clone(),
            shared: false,
        });
        steps.push(Step::write(&subsystem, "attr_allow_any_host", "0"));
        steps.push(Step::offer(&subsystem, "attr_serial", self.serial));
        steps.push(Step::offer(&subsystem, "attr_model", self.model));
        if let Some(queues) = self.max_queues {
            steps.push(Step::offer(&subsystem, "attr_qid_max", &queues.to_string()));
        }
        steps.push(Step::Link {
            path: subsystem.join("allowed_hosts").join(self.host_nqn),
            target: host,
        });
        steps.extend(self.namespace.plan(&subsystem));
        steps.extend(self.ports.iter().map(|port| Step::Link {
            path: port.folder(nvmet).join("subsystems").join(self.nqn),
            target: subsystem.clone(),
        }));
        steps
    }
}

impl Namespace<'_> {
    fn plan(&self, subsystem: &Path) -> Vec<Step> {
        let folder = subsystem.join("namespaces").join(NAMESPACE_ID);
        let id = |id: Option<&str>| id.and_then(uuid_text).unwrap_or_else(|| NIL_UUID.to_owned());
        vec![
            Step::Folder {
                path: folder.clone(),
                shared: false,
            },
            Step::write(&folder, "device_path", &self.device_path.to_string_lossy()),
            Step::write(&folder, "device_uuid", &id(self.uuid)),
            Step::write(&folder, "device_nguid", &id(self.nguid)),
            Step::Enable {
                path: folder.join("enable"),
            },
        ]
    }
}

impl Port {
    fn folder(&self, nvmet: &Path) -> PathBuf {
        nvmet.join("ports").join(self.id.to_string())
    }

    fn plan(&self, nvmet: &Path) -> Vec<Step> {
        let folder = self.folder(nvmet);
        let family = if self.address.is_ipv4() { "ipv4" } else { "ipv6" };
        vec![
            Step::Folder {
                path: folder.clone(),
                shared: true,
            },
            Step::write(&folder, "addr_trtype", "tcp"),
            Step::write(&folder, "addr_adrfam", family),
            Step::write(&folder, "addr_traddr", &self.address.to_string()),
            Step::write(&folder, "addr_trsvcid", &self.tcp_port.to_string()),
        ]
    }
}

fn require(field: &'static str, value: &str, holds: bool, expected: &'static str) -> Result<(), NvmetError> {
    if holds {
        return Ok(());
    }
    Err(NvmetError::Value {
        field,
        value: value.to_owned(),
        expected,
    })
}

/// One thing to do in configfs.
#[derive(Debug)]
enum Step {
    /// Make an item. A shared one may be there, unless something is linked into it: it is left from an earlier try.
    Folder { path: PathBuf, shared: bool },
    /// Set an attribute.
    Write { path: PathBuf, text: String },
    /// Set an attribute that not every kernel has.
    Offer {
        path: PathBuf,
        name: &'static str,
        text: String,
    },
    /// Open the device.
    Enable { path: PathBuf },
    /// Let an item belong to another.
    Link { path: PathBuf, target: PathBuf },
}

impl Step {
    fn write(folder: &Path, name: &str, text: &str) -> Self {
        Self::Write {
            path: folder.join(name),
            text: text.to_owned(),
        }
    }

    fn offer(folder: &Path, name: &'static str, text: &str) -> Self {
        Self::Offer {
            path: folder.join(name),
            name,
            text: text.to_owned(),
        }
    }

    /// Does it, and notes in `done` how it is undone.
    fn run(self, tree: &mut impl Tree, done: &mut Published) -> Result<(), NvmetError> {
        match self {
            Self::Folder { path, shared } => {
                match tree.make_dir(&path) {
                    Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                        let busy = tree
                            .list(&path.join("subsystems"))
                            .is_ok_and(|linked| !linked.is_empty());
                        if !shared || busy {
                            return Err(NvmetError::Taken { path });
                        }
                    }
                    result => publishing(&path, result)?,
                }
                let undo = if shared { Undo::Release } else { Undo::Folder };
                done.left.push(undo(path));
            }
            Self::Write { path, text } => publishing(&path, tree.write(&path, &text))?,
            Self::Offer { path, name, text } => {
                // Old kernels take a serial number for a hexadecimal one, silently.
                let taken = tree.write(&path, &text).and_then(|()| tree.read(&path));
                if taken.is_ok_and(|taken| taken.trim() == text) {
                    return Ok(());
                }
                done.missing.push(name);
            }
            Self::Enable { path } => {
                publishing(&path, tree.write(&path, "1"))?;
                done.left.push(Undo::Disable(path));
            }
            Self::Link { path, target } => {
                publishing(&path, tree.link(&target, &path))?;
                done.left.push(Undo::Link(path));
            }
        }
        Ok(())
    }
}

fn publishing(path: &Path, result: io::Result<()>) -> Result<(), NvmetError> {
    result.map_err(|source| NvmetError::Publish {
        path: path.to_owned(),
        source,
    })
}

/// One thing to take back.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Undo {
    Folder(PathBuf),
    /// Remove a host or port, unless others use it too.
    Release(PathBuf),
    Disable(PathBuf),
    Link(PathBuf),
}

impl Undo {
    fn path(&self) -> &Path {
        match self {
            Self::Folder(path) | Self::Release(path) | Self::Disable(path) | Self::Link(path) => path,
        }
    }

    fn run(&self, tree: &mut impl Tree) -> io::Result<()> {
        let result = match self {
            Self::Folder(path) | Self::Release(path) => tree.remove_dir(path),
            Self::Disable(path) => tree.write(path, "0"),
            Self::Link(path) => tree.unlink(path),
        };
        match result {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) if matches!(self, Self::Release(_)) && in_use(&error) => Ok(()),
            result => result,
        }
    }
}

/// What configfs answers for an item that is linked to, or has something in it.
fn in_use(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ResourceBusy | io::ErrorKind::DirectoryNotEmpty
    )
}

fn publish(tree: &mut impl Tree, root: &Path, disk: &Publish<'_>) -> Result<Published, NvmetError> {
    disk.check()?;
    let nvmet = nvmet_folder(root);
    if tree.list(&nvmet).is_err() {
        return Err(NvmetError::NoTarget { path: nvmet });
    }
    carry_out(tree, disk.plan(&nvmet))
}

/// Takes all steps, or none: what was done is taken back when one fails.
fn carry_out(tree: &mut impl Tree, steps: Vec<Step>) -> Result<Published, NvmetError> {
    let mut done = Published {
        left: Vec::new(),
        missing: Vec::new(),
    };
    let result = steps.into_iter().try_for_each(|step| step.run(tree, &mut done));
    done.left.reverse();
    let Err(cause) = result else { return Ok(done) };
    match take_back(tree, &mut done.left) {
        Err(NvmetError::Withdraw { path, source: undo }) => Err(NvmetError::Left {
            path,
            undo,
            source: Box::new(cause),
        }),
        _ => Err(cause),
    }
}

/// configfs resolves the target of a link when it is made, from the working folder: paths must be absolute.
fn nvmet_folder(root: &Path) -> PathBuf {
    std::path::absolute(root)
        .unwrap_or_else(|_| root.to_owned())
        .join("nvmet")
}

/// Goes on after an error; `left` keeps what failed, the first of which is answered.
fn take_back(tree: &mut impl Tree, left: &mut Vec<Undo>) -> Result<(), NvmetError> {
    let mut first = None;
    left.retain(|undo| match undo.run(tree) {
        Ok(()) => false,
        Err(source) => {
            let path = undo.path().to_owned();
            first.get_or_insert(NvmetError::Withdraw { path, source });
            true
        }
    });
    first.map_or(Ok(()), Err)
}

fn recover_in(tree: &mut impl Tree, root: &Path) -> Result<Vec<String>, NvmetError> {
    let nvmet = nvmet_folder(root);
    let (subsystems, mut left) = leftovers(tree, &nvmet, NQN_PREFIX)?;
    take_back(tree, &mut left)?;
    Ok(subsystems)
}

/// The names of the subsystems that begin with `prefix`, and what to take back in its order.
fn leftovers(tree: &impl Tree, nvmet: &Path, prefix: &str) -> Result<(Vec<String>, Vec<Undo>), NvmetError> {
    let ours = |name: &String| name.starts_with(prefix);
    let (mut links, mut folders, mut ports) = (Vec::new(), Vec::new(), Vec::new());
    for port in children(tree, &nvmet.join("ports"))? {
        let port = nvmet.join("ports").join(port);
        let linked = children(tree, &port.join("subsystems"))?;
        links.extend(
            linked
                .iter()
                .filter(|name| ours(name))
                .map(|name| Undo::Link(port.join("subsystems").join(name))),
        );
        // One that serves others too, or never served us, is not ours.
        if !linked.is_empty() && linked.iter().all(ours) {
            ports.push(Undo::Release(port));
        }
    }
    let mut subsystems = children(tree, &nvmet.join("subsystems"))?;
    subsystems.retain(ours);
    // A target's hosts have other names: those of the initiators, or of the loans.
    let mut hosts: BTreeSet<String> = children(tree, &nvmet.join("hosts"))?.into_iter().filter(ours).collect();
    for name in &subsystems {
        let subsystem = nvmet.join("subsystems").join(name);
        for namespace in children(tree, &subsystem.join("namespaces"))? {
            let namespace = subsystem.join("namespaces").join(namespace);
            folders.extend([Undo::Disable(namespace.join("enable")), Undo::Folder(namespace)]);
        }
        for host in children(tree, &subsystem.join("allowed_hosts"))? {
            folders.push(Undo::Link(subsystem.join("allowed_hosts").join(&host)));
            hosts.insert(host);
        }
        folders.push(Undo::Folder(subsystem));
    }
    let hosts = hosts
        .into_iter()
        .map(|host| Undo::Release(nvmet.join("hosts").join(host)));
    let order = links.into_iter().chain(folders).chain(ports).chain(hosts).collect();
    Ok((subsystems, order))
}

fn children(tree: &impl Tree, folder: &Path) -> Result<Vec<String>, NvmetError> {
    match tree.list(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        result => result.map_err(|source| NvmetError::Withdraw {
            path: folder.to_owned(),
            source,
        }),
    }
}

#[cfg(test)]
mod tests;
