//! Many disks on the same ports, each a subsystem of its own, which come and go: storage target mode.
//!
//! The kernel's discovery controller lists what hangs on the port that it is asked at, so `nvme discover` and
//! `nvme connect-all` see all disks. Used by `server::target`.

use super::tree::{Configfs, Tree};
use super::{
    MAX_MODEL, MAX_SERIAL, Namespace, NvmetError, Path, PathBuf, Port, Published, Step, Undo, carry_out, fitting,
    is_nqn, leftovers, nvmet_folder, require, take_back, uuid_text,
};

/// What the names of the disks of a storage target begin with; [`Shelf::open`] takes away what an earlier process has left.
pub const TARGET_PREFIX: &str = "nqn.2026-11.io.stiefel:storagetm.";

/// A disk for the shelf.
#[derive(Clone, Copy, Debug)]
pub struct Item<'a> {
    /// The name of the subsystem; begins with [`TARGET_PREFIX`].
    pub nqn: &'a str,
    /// The only host that may connect, `None` for everybody.
    pub host_nqn: Option<&'a str>,
    /// The disk's own model, 1 to 40 printable ASCII characters; see [`fitting`].
    pub model: &'a str,
    /// The disk's own serial number, 1 to 20 printable ASCII characters.
    pub serial: &'a str,
    /// The disk.
    pub namespace: Namespace<'a>,
}

/// Ports that listen as long as something is on the shelf.
#[derive(Debug)]
pub struct Shelf {
    nvmet: PathBuf,
    /// The ports' folders.
    ports: Vec<PathBuf>,
    pub(super) left: Vec<Undo>,
}

impl Shelf {
    /// Makes the ports; `root` is where configfs is mounted. They listen from the first [`Shelf::put`] on.
    ///
    /// # Errors
    /// [`NvmetError::NoTarget`], [`NvmetError::Taken`] if another has a port of that number, [`NvmetError::Publish`],
    /// [`NvmetError::Withdraw`] if what an earlier process left cannot be taken back.
    pub fn open(root: &Path, ports: &[Port]) -> Result<Self, NvmetError> {
        open_in(&mut Configfs, root, ports)
    }

    /// As [`Shelf::open`], besides another one: nothing is taken back.
    ///
    /// # Errors
    /// As there.
    pub fn another(root: &Path, ports: &[Port]) -> Result<Self, NvmetError> {
        ports_in(&mut Configfs, root, ports)
    }

    /// Puts a disk on all ports. What fails half-way is undone.
    ///
    /// # Errors
    /// As of [`super::Target::publish`].
    pub fn put(&self, item: &Item<'_>) -> Result<Published, NvmetError> {
        put_in(&mut Configfs, self, item)
    }

    /// Removes the ports; withdraw the disks first.
    ///
    /// # Errors
    /// [`NvmetError::Withdraw`]; may be tried again.
    pub fn close(&mut self) -> Result<(), NvmetError> {
        take_back(&mut Configfs, &mut self.left)
    }
}

impl Drop for Shelf {
    fn drop(&mut self) {
        // A port that still has something on it stays, and is found by the next `open`.
        let _ = take_back(&mut Configfs, &mut self.left);
    }
}

pub(super) fn open_in(tree: &mut impl Tree, root: &Path, ports: &[Port]) -> Result<Shelf, NvmetError> {
    let nvmet = nvmet_folder(root);
    if tree.list(&nvmet).is_err() {
        return Err(NvmetError::NoTarget { path: nvmet });
    }
    let (_, mut left) = leftovers(tree, &nvmet, TARGET_PREFIX)?;
    take_back(tree, &mut left)?;
    ports_in(tree, root, ports)
}

fn ports_in(tree: &mut impl Tree, root: &Path, ports: &[Port]) -> Result<Shelf, NvmetError> {
    let nvmet = nvmet_folder(root);
    let mut done = Published {
        left: Vec::new(),
        missing: Vec::new(),
    };
    let steps = ports.iter().flat_map(|port| port.plan(&nvmet));
    let result = steps.into_iter().try_for_each(|step| step.run(tree, &mut done));
    done.left.reverse();
    if let Err(cause) = result {
        // Ports without anything on them do nothing, so it hardly matters if one stays.
        let _ = take_back(tree, &mut done.left);
        return Err(cause);
    }
    let ports = ports.iter().map(|port| port.folder(&nvmet)).collect();
    Ok(Shelf {
        nvmet,
        ports,
        left: done.left,
    })
}

pub(super) fn put_in(tree: &mut impl Tree, shelf: &Shelf, item: &Item<'_>) -> Result<Published, NvmetError> {
    item.check()?;
    carry_out(tree, item.plan(shelf))
}

impl Item<'_> {
    fn check(&self) -> Result<(), NvmetError> {
        let ours = is_nqn(self.nqn) && self.nqn.starts_with(TARGET_PREFIX);
        require(
            "nqn",
            self.nqn,
            ours,
            "a name that begins with nqn.2026-11.io.stiefel:storagetm.",
        )?;
        let host = self.host_nqn.unwrap_or("nqn.none");
        let host_fits = self.host_nqn.is_none_or(|host| is_nqn(host) && !host.contains('/'));
        require("host_nqn", host, host_fits, "a host's NQN, as in its /etc/nvme/hostnqn")?;
        let fits = |text: &str, limit| !text.is_empty() && fitting(text, limit) == text;
        let model = fits(self.model, MAX_MODEL);
        require("model", self.model, model, "1 to 40 printable ASCII characters")?;
        let serial = fits(self.serial, MAX_SERIAL);
        require("serial", self.serial, serial, "1 to 20 printable ASCII characters")?;
        for (field, id) in [("uuid", self.namespace.uuid), ("nguid", self.namespace.nguid)] {
            let fits = id.is_none_or(|id| uuid_text(id).is_some());
            require(field, id.unwrap_or_default(), fits, "32 hexadecimal digits")?;
        }
        let path = self.namespace.device_path.to_string_lossy();
        let plain = !path.contains(|c: char| c.is_control() || c == char::REPLACEMENT_CHARACTER);
        require("device_path", &path, plain && path.starts_with('/'), "an absolute path")
    }

    fn plan(&self, shelf: &Shelf) -> Vec<Step> {
        let subsystem = shelf.nvmet.join("subsystems").join(self.nqn);
        let mut steps = Vec::new();
        if let Some(host) = self.host_nqn {
            steps.push(Step::Folder {
                path: shelf.nvmet.join("hosts").join(host),
                shared: true,
            });
        }
        steps.push(Step::Folder {
            path: subsystem.clone(),
            shared: false,
        });
        let any = if self.host_nqn.is_some() { "0" } else { "1" };
        steps.push(Step::write(&subsystem, "attr_allow_any_host", any));
        steps.push(Step::offer(&subsystem, "attr_serial", self.serial));
        steps.push(Step::offer(&subsystem, "attr_model", self.model));
        if let Some(host) = self.host_nqn {
            steps.push(Step::Link {
                path: subsystem.join("allowed_hosts").join(host),
                target: shelf.nvmet.join("hosts").join(host),
            });
        }
        steps.extend(self.namespace.plan(&subsystem));
        steps.extend(shelf.ports.iter().map(|port| Step::Link {
            path: port.join("subsystems").join(self.nqn),
            target: subsystem.clone(),
        }));
        steps
    }
}
