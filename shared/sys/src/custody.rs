//! What a role gives to PID 1 to keep: the descriptors of what it serves, and how the machine's turn will end.
//!
//! A role that is killed loses its descriptors, and with the last one of a disk the kernel forgets what it could not write to
//! it, with that of a file in memory the file. PID 1 holds copies, each under a number, and gives them to the role that it
//! starts next. The two speak through a socket of packets, which is the role's standard input: a tag, a number, perhaps a
//! descriptor; each is answered.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::net::sockopt::{Timeout, set_socket_timeout, socket_type};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};

/// How long the other side may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// So many descriptors can be kept: their numbers are below it.
pub const PLACES: u8 = 16;

/// What a role asks for.
#[derive(Debug)]
pub enum Request {
    /// Keep this descriptor under this number, instead of an earlier one.
    Hold(u8, OwnedFd),
    /// Close what is kept under this number.
    Release(u8),
    /// This is how it will end: an exit status of the role. Counts also if the role never exits.
    Verdict(u8),
    /// Give back a copy of what is kept under this number.
    Fetch(u8),
}

const HOLD: u8 = 1;
const RELEASE: u8 = 2;
const VERDICT: u8 = 3;
const FETCH: u8 = 4;

/// The role's end.
#[derive(Debug)]
pub struct Custody {
    socket: OwnedFd,
    /// An answer was missed: the next to come would be the answer to another question.
    lost: AtomicBool,
}

impl Custody {
    /// The one that PID 1 gave to this process as its standard input; `None` if that is something else.
    #[must_use]
    pub fn inherited() -> Option<Self> {
        let stdin = std::io::stdin().as_fd().try_clone_to_owned().ok()?;
        let is_ours = socket_type(&stdin).is_ok_and(|kind| kind == SocketType::SEQPACKET);
        is_ours.then(|| Self::from(stdin))
    }

    /// Has a copy of a descriptor kept under a number below [`PLACES`], instead of an earlier one.
    ///
    /// # Errors
    /// PID 1 does not answer.
    pub fn hold(&self, place: u8, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.ask(&[HOLD, place], Some(fd)).map(drop)
    }

    /// Has what is kept under a number closed: it is when this returns.
    ///
    /// # Errors
    /// PID 1 does not answer.
    pub fn release(&self, place: u8) -> io::Result<()> {
        self.ask(&[RELEASE, place], None).map(drop)
    }

    /// Says how the machine's turn will end, before it does: an exit status of the role.
    ///
    /// # Errors
    /// PID 1 does not answer.
    pub fn verdict(&self, status: u8) -> io::Result<()> {
        self.ask(&[VERDICT, status], None).map(drop)
    }

    /// A copy of what an earlier role has had kept under a number.
    ///
    /// # Errors
    /// PID 1 does not answer.
    pub fn fetch(&self, place: u8) -> io::Result<Option<OwnedFd>> {
        self.ask(&[FETCH, place], None)
    }

    fn ask(&self, request: &[u8], fd: Option<BorrowedFd<'_>>) -> io::Result<Option<OwnedFd>> {
        if self.lost.load(Ordering::Acquire) {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let answered = self.ask_once(request, fd);
        self.lost.store(answered.is_err(), Ordering::Release);
        answered
    }

    fn ask_once(&self, request: &[u8], fd: Option<BorrowedFd<'_>>) -> io::Result<Option<OwnedFd>> {
        set_socket_timeout(&self.socket, Timeout::Recv, Some(PATIENCE))?;
        send(&self.socket, request, fd)?;
        match receive(&self.socket)? {
            Some((answer, fd)) if answer.first() == request.first() => Ok(fd),
            Some(_) => Err(io::ErrorKind::InvalidData.into()),
            None => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

impl From<OwnedFd> for Custody {
    /// The end that a [`Custodian::pair`] gives away.
    fn from(socket: OwnedFd) -> Self {
        Self {
            socket,
            lost: AtomicBool::new(false),
        }
    }
}

/// PID 1's end.
#[derive(Debug)]
pub struct Custodian(OwnedFd);

impl Custodian {
    /// Makes both ends; the second is for the role's standard input.
    ///
    /// # Errors
    /// No descriptors are left.
    pub fn pair() -> io::Result<(Self, OwnedFd)> {
        let (own, role) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        Ok((Self(own), role))
    }

    /// Waits for the role's next request; `None` when the role has gone.
    ///
    /// # Errors
    /// What the kernel says; a request that is none is passed over.
    pub fn next(&self) -> io::Result<Option<Request>> {
        loop {
            let Some((bytes, fd)) = receive(&self.0)? else {
                return Ok(None);
            };
            let request = match (bytes.as_slice(), fd) {
                ([HOLD, place @ ..PLACES], Some(fd)) => Request::Hold(*place, fd),
                ([RELEASE, place @ ..PLACES], None) => Request::Release(*place),
                ([VERDICT, status], None) => Request::Verdict(*status),
                ([FETCH, place @ ..PLACES], None) => Request::Fetch(*place),
                _ => continue,
            };
            return Ok(Some(request));
        }
    }

    /// Answers a request that was done; [`Request::Fetch`] with what is kept.
    ///
    /// # Errors
    /// The role has gone.
    pub fn answer(&self, request: &Request, kept: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let (tag, fd) = match request {
            Request::Hold(..) => (HOLD, None),
            Request::Release(_) => (RELEASE, None),
            Request::Verdict(_) => (VERDICT, None),
            Request::Fetch(_) => (FETCH, kept),
        };
        send(&self.0, &[tag], fd)
    }
}

fn send(socket: &OwnedFd, bytes: &[u8], fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds: Vec<BorrowedFd<'_>> = fd.into_iter().collect();
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(io::ErrorKind::OutOfMemory.into());
    }
    sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// One packet and the descriptor that came with it; `None` at the end.
fn receive(socket: &OwnedFd) -> io::Result<Option<(Vec<u8>, Option<OwnedFd>)>> {
    let mut bytes = [0; 8];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC;
    let received =
        rustix::io::retry_on_intr(|| recvmsg(socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags))?;
    let mut fd = None;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = message {
            // More than one is not asked for: the rest is closed here.
            fds.for_each(|received| {
                fd.get_or_insert(received);
            });
        }
    }
    if received.bytes == 0 {
        return Ok(None);
    }
    Ok(Some((bytes.get(..received.bytes).unwrap_or_default().to_vec(), fd)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use std::io::{Read, Seek, Write};

    fn keep(custodian: Custodian) -> std::thread::JoinHandle<Vec<u8>> {
        std::thread::spawn(move || {
            let (mut kept, mut verdicts) = (BTreeMap::<u8, OwnedFd>::new(), Vec::new());
            while let Some(request) = custodian.next().unwrap() {
                let wanted = match &request {
                    Request::Fetch(place) => kept.get(place).map(AsFd::as_fd),
                    _ => None,
                };
                custodian.answer(&request, wanted).unwrap();
                match request {
                    Request::Hold(place, fd) => drop(kept.insert(place, fd)),
                    Request::Release(place) => drop(kept.remove(&place)),
                    Request::Verdict(status) => verdicts.push(status),
                    Request::Fetch(_) => {}
                }
            }
            verdicts
        })
    }

    #[test]
    fn what_is_kept_is_the_same_open_file_and_is_released_on_demand() {
        let (custodian, role) = Custodian::pair().unwrap();
        let (keeper, role) = (keep(custodian), Custody::from(role));
        assert!(role.fetch(0).unwrap().is_none());
        let mut file = tempfile::tempfile().unwrap();
        let other = tempfile::tempfile().unwrap();
        role.hold(0, file.as_fd()).unwrap();
        role.hold(PLACES - 1, other.as_fd()).unwrap();
        file.write_all(b"abc").unwrap();
        let mut again = std::fs::File::from(role.fetch(0).unwrap().unwrap());
        // One position for both: it is the same open file description.
        assert_eq!(again.stream_position().unwrap(), 3);
        again.rewind().unwrap();
        let mut text = String::new();
        again.read_to_string(&mut text).unwrap();
        assert_eq!(text, "abc");
        role.release(0).unwrap();
        assert!(role.fetch(0).unwrap().is_none() && role.fetch(PLACES - 1).unwrap().is_some());
        role.verdict(10).unwrap();
        drop(role);
        assert_eq!(keeper.join().unwrap(), [10]);
    }

    #[test]
    fn what_is_no_request_is_passed_over() {
        let (custodian, role) = Custodian::pair().unwrap();
        let file = tempfile::tempfile().unwrap();
        send(&role, &[HOLD, 0], None).unwrap();
        send(&role, &[HOLD, PLACES], Some(file.as_fd())).unwrap();
        send(&role, &[9, 9, 9], Some(file.as_fd())).unwrap();
        send(&role, &[FETCH, 1], None).unwrap();
        assert!(matches!(custodian.next().unwrap(), Some(Request::Fetch(1))));
    }
}
