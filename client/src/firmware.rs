//! The firmware of the NIC that leads to the laptop, for when it is plugged in again: its driver asks for it then, and while it
//! waits for the root file system, which comes over that NIC, nothing goes on any more.
//!
//! The attacher puts it aside in the initramfs, the keeper takes it into memory and writes it below the system's /run, where
//! the kernel is told to look first (`firmware_class.path`). What is not there is looked for at the usual places.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use stiefel_shared::bundle::AttachSession;
use stiefel_shared::kmod;
use stiefel_sys::console::Console;
use stiefel_sys::module::Loader;

use crate::attach::HOME;

/// The kernel's setting, below sysfs.
pub(crate) const SEARCH: &str = "module/firmware_class/parameters/path";
/// Where all firmware lies in the initramfs, and what is put aside of it.
const ALL: &str = "firmware";
const ASIDE: &str = "firmware-of-the-link";
/// Where it goes in the system.
const RUN: &str = "/run/stiefel/firmware";
/// The most that is kept in memory, in bytes; a driver's usually has some ten thousand.
const MOST: u64 = 16 << 20;

/// Firmware by its name.
pub(crate) type Files = BTreeMap<String, Vec<u8>>;

/// Puts aside what the driver of the NIC `name` may ask for.
pub(crate) fn keep(console: &Console, session: &AttachSession, name: &str) {
    let home = Path::new(HOME);
    if let Err(error) = put_aside(home, &home.join("sys"), session, name) {
        console.warn(&format!(
            "the NIC may lack its firmware when it is plugged in again: {error}"
        ));
    }
}

fn put_aside(home: &Path, sysfs: &Path, session: &AttachSession, name: &str) -> std::io::Result<()> {
    // A driver that is built in names no module, and has its firmware built in, too.
    let Ok(module) = std::fs::read_link(sysfs.join("class/net").join(name).join("device/driver/module")) else {
        return Ok(());
    };
    let folder = home.join("modules").join(&session.version);
    let loader = Loader::open(&folder, &[]).map_err(std::io::Error::other)?;
    let module = module.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let Some(path) = loader.index().path(&module) else {
        return Ok(());
    };
    for firmware in kmod::firmware_names(&std::fs::read(folder.join(path))?) {
        let from = home.join(ALL).join(&firmware);
        if from.is_file() {
            let to = home.join(ASIDE).join(&firmware);
            std::fs::create_dir_all(to.parent().unwrap_or(home))?;
            std::fs::hard_link(from, to)?;
        }
    }
    Ok(())
}

/// Takes what was put aside into memory.
pub(crate) fn take() -> std::io::Result<Files> {
    let (root, mut files, mut total) = (Path::new(HOME).join(ASIDE), Files::new(), 0);
    let mut folders = vec![root.clone()];
    while let Some(folder) = folders.pop() {
        let entries = match std::fs::read_dir(&folder) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            entries => entries?,
        };
        for entry in entries {
            let entry = entry?;
            let (path, meta) = (entry.path(), entry.metadata()?);
            if meta.is_dir() {
                folders.push(path);
                continue;
            }
            total += meta.len();
            if total > MOST {
                return Ok(files);
            }
            let name = path.strip_prefix(&root).unwrap_or(&path).to_string_lossy().into_owned();
            files.insert(name, std::fs::read(&path)?);
        }
    }
    Ok(files)
}

/// Writes it into the system's /run, and tells the kernel. `sysfs` is an open one.
pub(crate) fn offer(files: &Files, sysfs: &Path) -> std::io::Result<()> {
    if files.is_empty() {
        return Ok(());
    }
    for (name, bytes) in files {
        let path: PathBuf = Path::new(RUN).join(name);
        std::fs::create_dir_all(path.parent().unwrap_or(Path::new(RUN)))?;
        std::fs::write(path, bytes)?;
    }
    std::fs::write(sysfs.join(SEARCH), RUN)
}
