//! What the server's role needs of the machine that it runs on; a seam, so that its rules can be tried without one.

use std::fs::File;
use std::net::{SocketAddrV6, TcpListener};
use std::path::Path;
use std::sync::mpsc;
use std::time::Duration;

use anyhow::Context;
use socket2::{Domain, Protocol, Socket, Type};
use stiefel_shared::bundle::LinkOffer;
use stiefel_shared::handover::DiskIdentity;
use stiefel_sys::SYSFS;
use stiefel_sys::block::{self, Content, Disk};
use stiefel_sys::console::Console;
use stiefel_sys::mount::{self, MountFlags};
use stiefel_sys::nvmet::{self, CONFIGFS, Publish};

use super::find_disk;
use super::link::{self, Up, Wanted};
use crate::guards::hibernation;

/// How long the kernel may take to let a disk go that it serves.
const WITHDRAW: Duration = Duration::from_secs(60);

/// Connections that wait to be accepted.
const BACKLOG: i32 = 16;

/// The machine's memory, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Memory {
    /// All of it.
    pub(super) total: u64,
    /// What programs may still have.
    pub(crate) available: u64,
}

impl Memory {
    /// Reads /proc/meminfo.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let number = |name: &str| -> Option<u64> {
            let rest = text.lines().find_map(|line| line.strip_prefix(name))?;
            let kib: u64 = rest.trim().strip_suffix("kB")?.trim().parse().ok()?;
            kib.checked_mul(1024)
        };
        Some(Self {
            total: number("MemTotal:")?,
            available: number("MemAvailable:")?,
        })
    }
}

/// The machine.
pub(super) trait Machine: Send + Sync {
    /// Finds the disk by its identity, each time anew: names such as /dev/sda change their meaning when a disk is
    /// re-plugged.
    fn disk(&self) -> anyhow::Result<Disk>;
    /// What lies on the disk and its partitions.
    fn contents(&self, disk: &Disk) -> std::io::Result<Vec<Content>>;
    /// Whether the firmware remembers a hibernated system that it is to resume.
    fn resumes(&self) -> bool;
    /// Opens the disk exclusively; read-only, unless it is to be written.
    fn open(&self, disk: &Disk, writable: bool) -> anyhow::Result<File>;
    /// Listens for a desktop at the laptop's address of its session.
    fn listen(&self, at: SocketAddrV6) -> anyhow::Result<TcpListener>;
    /// The machine's memory.
    fn memory(&self) -> anyhow::Result<Memory>;
    /// Sets the laptop's end of the link up.
    fn link(&self, wanted: Wanted) -> anyhow::Result<(Up, LinkOffer)>;
    /// Publishes a disk by NVMe.
    fn publish(&self, disk: &Publish<'_>) -> anyhow::Result<()>;
    /// Whether a disk is published under this name.
    fn published(&self, nqn: &str) -> bool;
    /// Takes back all that is published: nobody is served any more when this succeeds.
    fn withdraw(&self) -> anyhow::Result<()>;
}

/// The one that we run on.
pub(super) struct Laptop {
    pub(super) console: &'static Console,
    pub(super) identity: DiskIdentity,
}

impl Machine for Laptop {
    fn disk(&self) -> anyhow::Result<Disk> {
        Ok(find_disk(self.console, &self.identity)?)
    }

    fn contents(&self, disk: &Disk) -> std::io::Result<Vec<Content>> {
        block::contents(Path::new(SYSFS), disk)
    }

    fn resumes(&self) -> bool {
        let variable = Path::new(hibernation::VARIABLE);
        // Without the folder there is no EFI, or it cannot be asked after kexec.
        if let Some(folder) = variable.parent().filter(|folder| is_empty(folder))
            && let Err(error) = mount_variables(folder)
        {
            self.console.warn(&format!(
                "whether the firmware resumes a system is not known: {error:#}"
            ));
        }
        variable.exists()
    }

    fn open(&self, disk: &Disk, writable: bool) -> anyhow::Result<File> {
        let path = &disk.path;
        block::open_exclusive(path, writable).with_context(|| {
            format!(
                "cannot open {} for this session alone; something uses it",
                path.display()
            )
        })
    }

    fn listen(&self, at: SocketAddrV6) -> anyhow::Result<TcpListener> {
        let bind = || {
            let socket = Socket::new(Domain::IPV6, Type::STREAM.cloexec(), Some(Protocol::TCP))?;
            socket.set_only_v6(true)?;
            // Connections of an earlier process linger; and its NIC may be unplugged just now, and its address gone with it.
            socket.set_reuse_address(true)?;
            socket.set_freebind_v6(true)?;
            socket.bind(&at.into())?;
            socket.listen(BACKLOG)?;
            std::io::Result::Ok(TcpListener::from(socket))
        };
        bind().with_context(|| format!("cannot listen on TCP port {} for the disk", at.port()))
    }

    fn memory(&self) -> anyhow::Result<Memory> {
        let text = std::fs::read_to_string("/proc/meminfo").context("cannot ask how much memory there is")?;
        Memory::parse(&text).context("the kernel does not tell how much memory there is")
    }

    fn link(&self, wanted: Wanted) -> anyhow::Result<(Up, LinkOffer)> {
        link::set_up(wanted)
    }

    fn publish(&self, disk: &Publish<'_>) -> anyhow::Result<()> {
        // What an earlier session left would be in the way.
        nvmet::recover(Path::new(CONFIGFS))?;
        let published = nvmet::Target::new(CONFIGFS.into()).publish(disk)?;
        if !published.missing().is_empty() {
            self.console.warn(&format!(
                "the desktop will see the disk under another name: this kernel does not know {}",
                published.missing().join(", ")
            ));
        }
        Ok(())
    }

    fn published(&self, nqn: &str) -> bool {
        Path::new(CONFIGFS).join("nvmet/subsystems").join(nqn).exists()
    }

    fn withdraw(&self) -> anyhow::Result<()> {
        within(WITHDRAW, || nvmet::recover(Path::new(CONFIGFS)).map(drop))
            .and_then(|taken| Ok(taken?))
            .context("the kernel does not let the disk go")
    }
}

fn is_empty(folder: &Path) -> bool {
    std::fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_none())
}

/// Mounts the firmware's variables, never to be written.
fn mount_variables(folder: &Path) -> anyhow::Result<()> {
    // Where it is built in there is no such module; mounting tells whether it is there.
    let _ = super::load(&["efivarfs"]);
    let flags = MountFlags::RDONLY | MountFlags::NOEXEC | MountFlags::NOSUID | MountFlags::NODEV;
    Ok(mount::mount("efivarfs", folder, "efivarfs", flags, None)?)
}

/// Does something that a broken disk could make last for ever, but waits for it only so long.
///
/// # Errors
/// It was not done in time; it may still be going on.
pub(super) fn within<T: Send + 'static>(
    limit: Duration,
    work: impl FnOnce() -> T + Send + 'static,
) -> anyhow::Result<T> {
    let (done, result) = mpsc::channel();
    std::thread::Builder::new()
        .name("bounded".to_owned())
        .spawn(move || {
            // Nobody listens any more once the time is over.
            let _ = done.send(work());
        })
        .context("no thread; free some memory")?;
    result
        .recv_timeout(limit)
        .with_context(|| format!("not done after {} s; the disk may be hanging", limit.as_secs()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_as_the_kernel_tells_it() {
        let text = "MemTotal:        2048 kB\nMemFree:          100 kB\nMemAvailable:    1024 kB\n";
        let (total, available) = (2 << 20, 1 << 20);
        assert_eq!(Memory::parse(text), Some(Memory { total, available }));
        assert_eq!(Memory::parse("MemTotal: 2048 kB\n"), None);
        assert_eq!(
            Memory::parse("MemTotal: 99999999999999999999 kB\nMemAvailable: 1 kB\n"),
            None
        );
    }
}
