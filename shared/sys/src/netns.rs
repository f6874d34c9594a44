//! Network namespaces: a place for the NIC where no network manager of the desktop sees it (network_namespaces(7)).
//!
//! Used by the attacher and the keeper: the NIC and WireGuard's socket live in a [`Namespace`], the tunnel outside.
//! The calling thread never changes its own namespace: all work inside is done by threads of their own. Needs neither
//! proc nor a mounted file system. Sockets (netlink too) stay in the namespace in which they were opened.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::CWD;
use rustix::mount::{MoveMountFlags, OpenTreeFlags};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use rustix::thread::{LinkNameSpaceType, UnshareFlags};

use crate::link::{self, LinkError};

/// `linux/sockios.h`: a descriptor of the network namespace that a socket is in.
const SIOCGSKNS: libc::Ioctl = 0x894c;
/// The loopback interface of every namespace (LOOPBACK_IFINDEX).
const LOOPBACK: u32 = 1;

/// Why something about a network namespace failed.
#[derive(Debug, thiserror::Error)]
pub enum NetnsError {
    /// No new one could be had.
    #[error("cannot make a network namespace; this needs root, and a kernel with CONFIG_NET_NS")]
    Create {
        /// The kernel's answer.
        source: io::Error,
    },
    /// The loopback interface of a new one could not be brought up.
    #[error("cannot prepare the new network namespace")]
    Loopback {
        /// Why.
        source: LinkError,
    },
    /// What was opened is no network namespace, or may not be entered.
    #[error("cannot enter the network namespace; this needs root, and a file that is a network namespace")]
    Enter {
        /// The kernel's answer.
        source: io::Error,
    },
    /// A file could not be opened.
    #[error("cannot open the network namespace {path}; check that it is still there", path = path.display())]
    Open {
        /// Which.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// It could not be given a name.
    #[error("cannot keep the network namespace at {path}; its folder must exist and be writable", path = path.display())]
    Bind {
        /// Where.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// No thread could be started.
    #[error("cannot start a thread for the network namespace; too many processes, or too little memory")]
    Thread {
        /// The kernel's answer.
        source: io::Error,
    },
}

/// A network namespace, held by a descriptor: it lives at least as long as this does.
///
/// When the last holder goes (descriptors, sockets, threads, [`bind`](Self::bind) mounts), the kernel removes the virtual
/// interfaces inside and gives the physical ones back to the initial namespace.
#[derive(Debug)]
pub struct Namespace {
    fd: OwnedFd,
}

impl AsFd for Namespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl From<Namespace> for OwnedFd {
    /// To be given to another process, which takes it by [`Namespace::from_fd`].
    fn from(namespace: Namespace) -> Self {
        namespace.fd
    }
}

impl Namespace {
    /// Makes a fresh one, with nothing in it but its loopback interface, which is up.
    ///
    /// # Errors
    /// [`NetnsError::Create`], [`NetnsError::Loopback`], [`NetnsError::Thread`].
    pub fn new() -> Result<Self, NetnsError> {
        on_own_thread(|| {
            // SAFETY: NEWNET does not touch the table of descriptors, which is what makes other flags unsound.
            unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }
                .map_err(|errno| NetnsError::Create { source: errno.into() })?;
            let fresh = Self::current()?;
            link::set_up(LOOPBACK).map_err(|source| NetnsError::Loopback { source })?;
            Ok(fresh)
        })?
    }

    /// The one that the calling thread is in.
    ///
    /// # Errors
    /// [`NetnsError::Create`].
    pub fn current() -> Result<Self, NetnsError> {
        let failed = |source| NetnsError::Create { source };
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None)
            .map_err(|errno| failed(errno.into()))?;
        // SAFETY: the descriptor is an open socket; SIOCGSKNS takes no argument and answers a new descriptor.
        let fd = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCGSKNS) };
        if fd < 0 {
            return Err(failed(io::Error::last_os_error()));
        }
        // SAFETY: the kernel just made this descriptor (close-on-exec) for us; nobody else has it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Self { fd })
    }

    /// Opens one that was kept with [`bind`](Self::bind), or a process's (`/proc/N/ns/net`).
    ///
    /// # Errors
    /// [`NetnsError::Open`]; [`NetnsError::Enter`] if it is no network namespace; [`NetnsError::Thread`].
    pub fn open(path: &Path) -> Result<Self, NetnsError> {
        // A pipe somebody put there must not make us wait.
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)
            .map_err(|source| NetnsError::Open {
                path: path.to_owned(),
                source,
            })?;
        Self::from_fd(file.into())
    }

    /// Takes a descriptor of one, such as an inherited one.
    ///
    /// # Errors
    /// [`NetnsError::Enter`] if it is no network namespace; [`NetnsError::Thread`].
    pub fn from_fd(fd: OwnedFd) -> Result<Self, NetnsError> {
        let namespace = Self { fd };
        namespace.run(|| ())?;
        Ok(namespace)
    }

    /// Another handle of the same one.
    ///
    /// # Errors
    /// [`NetnsError::Create`]: no descriptors left.
    pub fn try_clone(&self) -> Result<Self, NetnsError> {
        let fd = self.fd.try_clone().map_err(|source| NetnsError::Create { source })?;
        Ok(Self { fd })
    }

    /// Runs `work` inside, on a thread of its own, and waits for it. A panic of `work` goes on in the caller.
    ///
    /// # Errors
    /// [`NetnsError::Enter`], [`NetnsError::Thread`]; then `work` has not run.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, NetnsError> {
        on_own_thread(|| {
            rustix::thread::move_into_link_name_space(self.as_fd(), Some(LinkNameSpaceType::Network))
                .map_err(|errno| NetnsError::Enter { source: errno.into() })?;
            Ok(work())
        })?
    }

    /// Keeps the namespace at `path`, so that others can [`open`](Self::open) it and it outlives all processes. The file
    /// is made if it is missing. `mount::unmount` (lazily: opened ones hold the mount) ends that. Linux 5.2.
    ///
    /// # Errors
    /// [`NetnsError::Bind`].
    pub fn bind(&self, path: &Path) -> Result<(), NetnsError> {
        self.mount_on(path).map_err(|source| NetnsError::Bind {
            path: path.to_owned(),
            source,
        })
    }

    /// By the newer calls, as the older one needs a path of the namespace, and with it proc.
    fn mount_on(&self, path: &Path) -> io::Result<()> {
        File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
            .open(path)?;
        let flags = OpenTreeFlags::AT_EMPTY_PATH | OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let tree = rustix::mount::open_tree(self.as_fd(), "", flags)?;
        rustix::mount::move_mount(tree, "", CWD, path, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
        Ok(())
    }
}

fn on_own_thread<T: Send>(work: impl FnOnce() -> T + Send) -> Result<T, NetnsError> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("netns".to_owned())
            .spawn_scoped(scope, work)
            .map_err(|source| NetnsError::Thread { source })?;
        Ok(thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::Link;
    use crate::mount;
    use std::net::{SocketAddrV6, UdpSocket};
    use std::os::unix::fs::MetadataExt;
    use std::time::Duration;

    /// Tells the calling thread's namespace from others.
    fn here() -> u64 {
        std::fs::metadata("/proc/thread-self/ns/net").unwrap().ino()
    }

    fn named(name: &str) -> Option<Link> {
        link::list().unwrap().into_iter().find(|link| link.name == name)
    }

    #[test]
    fn a_new_one_has_only_its_loopback_which_is_up() {
        let before = here();
        let namespace = Namespace::new().unwrap();
        let (inside, links) = namespace.run(|| (here(), link::list().unwrap())).unwrap();
        assert_ne!(inside, before);
        assert_eq!(here(), before);
        assert!(links.iter().all(|link| link.name == "lo" || !link.up), "{links:?}");
        assert!(links.iter().any(|link| link.name == "lo" && link.up), "{links:?}");
    }

    #[test]
    fn the_current_one_is_that_of_the_calling_thread() {
        let namespace = Namespace::new().unwrap();
        let inode = |namespace: &Namespace| rustix::fs::fstat(namespace).unwrap().st_ino;
        assert_eq!(inode(&Namespace::current().unwrap()), here());
        let inside = namespace.run(|| Namespace::current().unwrap()).unwrap();
        assert_eq!(inode(&inside), inode(&namespace));
    }

    #[test]
    fn a_link_moves_from_one_to_another_and_back() {
        let (one, two) = (Namespace::new().unwrap(), Namespace::new().unwrap());
        let index = one.run(|| link::create("st0", "veth").unwrap()).unwrap();
        one.run(|| link::set_namespace(index, two.as_fd()).unwrap()).unwrap();
        assert!(one.run(|| named("st0")).unwrap().is_none());
        let there = two.run(|| named("st0")).unwrap().unwrap();
        assert!(!there.up);
        two.run(|| link::set_namespace(there.index, one.as_fd()).unwrap())
            .unwrap();
        assert!(one.run(|| named("st0")).unwrap().is_some());
        assert!(two.run(|| named("st0")).unwrap().is_none());
    }

    #[test]
    fn a_link_whose_name_is_taken_there_is_not_moved() {
        let (one, two) = (Namespace::new().unwrap(), Namespace::new().unwrap());
        two.run(|| link::create("st0", "veth").unwrap()).unwrap();
        let refused = one
            .run(|| link::set_namespace(link::create("st0", "veth").unwrap(), two.as_fd()))
            .unwrap();
        assert!(
            matches!(&refused, Err(link::LinkError::Refused { source, .. }) if source.raw_os_error() == Some(libc::EEXIST)),
            "{refused:?}"
        );
    }

    #[test]
    fn a_cable_between_two_carries_link_local_traffic() {
        let (one, two) = (Namespace::new().unwrap(), Namespace::new().unwrap());
        // The kernel names the other end.
        let peer = one.run(|| {
            link::create("st0", "veth").unwrap();
            let links = link::list().unwrap();
            let peer = links
                .into_iter()
                .find(|link| link.kind.as_deref() == Some("veth") && link.name != "st0");
            let peer = peer.unwrap();
            link::set_namespace(peer.index, two.as_fd()).unwrap();
            peer.name
        });
        let peer = peer.unwrap();
        let raise = |name: &str| {
            link::disable_dad(Path::new(crate::PROCFS), name).unwrap();
            let index = link::index_of(name).unwrap().unwrap();
            link::set_up(index).unwrap();
            index
        };
        let address = |index| (index, link::wait_link_local(index, Duration::from_secs(10)).unwrap());
        let index = one.run(|| raise("st0")).unwrap();
        let listener = two.run(|| {
            let (index, addr) = address(raise(&peer));
            let socket = UdpSocket::bind(SocketAddrV6::new(addr, 0, 0, index)).unwrap();
            socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            (socket.local_addr().unwrap(), socket)
        });
        let (listening, listener) = listener.unwrap();
        let sender = one.run(|| {
            let (index, addr) = address(index);
            let socket = UdpSocket::bind(SocketAddrV6::new(addr, 0, 0, index)).unwrap();
            let to = match listening {
                std::net::SocketAddr::V6(to) => SocketAddrV6::new(*to.ip(), to.port(), 0, index),
                std::net::SocketAddr::V4(_) => unreachable!(),
            };
            socket.send_to(b"hello", to).unwrap();
            socket
        });
        // A socket stays where it was opened: the caller receives what was sent inside.
        let mut buffer = [0; 16];
        let (length, from) = listener.recv_from(&mut buffer).unwrap();
        assert_eq!(&buffer[..length], b"hello");
        assert_eq!(from.ip(), sender.unwrap().local_addr().unwrap().ip());
    }

    #[test]
    fn a_kept_one_is_opened_again_and_is_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("netns");
        let namespace = Namespace::new().unwrap();
        namespace.bind(&path).unwrap();
        let inside = namespace.run(here).unwrap();
        drop(namespace);
        let again = Namespace::open(&path);
        mount::unmount(&path, true).unwrap();
        assert_eq!(again.unwrap().run(here).unwrap(), inside);
    }

    #[test]
    fn what_is_no_network_namespace_is_refused() {
        assert!(matches!(
            Namespace::open(Path::new("/nonexistent")),
            Err(NetnsError::Open { .. })
        ));
        for other in ["/dev/null", "/proc/self/ns/mnt", "/"] {
            assert!(
                matches!(Namespace::open(Path::new(other)), Err(NetnsError::Enter { .. })),
                "{other}"
            );
        }
        let namespace = Namespace::new().unwrap();
        assert!(matches!(
            namespace.bind(Path::new("/nonexistent/x")),
            Err(NetnsError::Bind { .. })
        ));
    }
}
