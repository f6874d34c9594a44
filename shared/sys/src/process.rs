//! What PID 1 and long-lived guardians do about themselves: memory, children, terminal, waiting.

use std::collections::HashSet;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, ExitStatus};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::mm::MlockAllFlags;

/// Keeps this process's memory from being paged out, now and later: its own binary may lie on the disk that it keeps
/// alive. Pages are locked as they are touched (MCL_ONFAULT), or every thread's whole stack would count.
///
/// # Errors
/// ENOMEM over RLIMIT_MEMLOCK, EPERM without CAP_IPC_LOCK.
pub fn lock_memory() -> io::Result<()> {
    Ok(rustix::mm::mlockall(
        MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT,
    )?)
}

/// Sets this machine's name.
///
/// # Errors
/// EINVAL over 64 bytes, EPERM without CAP_SYS_ADMIN.
pub fn set_hostname(name: &str) -> io::Result<()> {
    Ok(rustix::system::sethostname(name.as_bytes())?)
}

/// Whether this is the first process (of its PID namespace).
#[must_use]
pub fn is_pid_one() -> bool {
    std::process::id() == 1
}

/// Tells the kernel never to choose this process when memory runs out.
///
/// # Errors
/// If `procfs` is not mounted, or EACCES without CAP_SYS_RESOURCE.
pub fn oom_protect(procfs: &Path) -> io::Result<()> {
    std::fs::write(procfs.join("self/oom_score_adj"), "-1000")
}

/// Ignores signals (`libc::SIGTERM` and so on) from now on; executed programs inherit this.
///
/// # Errors
/// EINVAL for SIGKILL, SIGSTOP and what is no signal.
pub fn ignore_signals(signals: &[i32]) -> io::Result<()> {
    for &signal in signals {
        // SAFETY: SIG_IGN installs no handler, so no code of ours can run at a bad moment.
        if unsafe { libc::signal(signal, libc::SIG_IGN) } == libc::SIG_ERR {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Whether this process ignores a signal, as what `nohup` starts does.
#[must_use]
pub fn is_ignored(signal: i32) -> bool {
    let mut now = std::mem::MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: without a new action sigaction only writes the present one to where the pointer, which outlives the call, points.
    let asked = unsafe { libc::sigaction(signal, std::ptr::null(), now.as_mut_ptr()) };
    // SAFETY: it has been written if the call succeeded.
    asked == 0 && unsafe { now.assume_init() }.sa_sigaction == libc::SIG_IGN
}

/// Asks the first process to power the machine off in order, as its `procfs` folder says what it is: systemd starts its
/// poweroff.target (`SIGRTMIN+4`, systemd(1) "Signals"), others take `SIGPWR` for a failing supply of power. Whether it was
/// systemd: others, such as an initrd's shell, may not have heard.
///
/// # Errors
/// EPERM without CAP_KILL.
pub fn ask_power_off(procfs: BorrowedFd<'_>) -> io::Result<bool> {
    use std::io::Read;
    let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::CLOEXEC;
    let mut name = String::new();
    rustix::fs::openat(procfs, "1/comm", flags, rustix::fs::Mode::empty())
        .map(std::fs::File::from)?
        .take(64)
        .read_to_string(&mut name)?;
    let systemd = name.trim() == "systemd";
    let signal = if systemd { libc::SIGRTMIN() + 4 } else { libc::SIGPWR };
    // SAFETY: sending a signal touches no memory of ours.
    if unsafe { libc::kill(1, signal) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(systemd)
}

/// Lets this process, and threads that it starts from now on, allocate memory without waiting for a disk to take what is in it
/// (PR_SET_IO_FLUSHER, Linux 5.6): that disk may be the one it keeps alive.
///
/// # Errors
/// EINVAL before Linux 5.6, EPERM without CAP_SYS_RESOURCE.
pub fn never_wait_for_disks() -> io::Result<()> {
    const PR_SET_IO_FLUSHER: libc::c_int = 57;
    let [one, zero]: [libc::c_ulong; 2] = [1, 0];
    // SAFETY: sets a flag of this thread and touches no memory of ours.
    if unsafe { libc::prctl(PR_SET_IO_FLUSHER, one, zero, zero, zero) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Has the kernel kill what `command` starts when the thread that starts it ends, however that ends (PR_SET_PDEATHSIG): a program that
/// goes on by itself would be in the way of who comes after us. That thread must be the one that waits for it.
pub fn dies_with_us(command: &mut Command) -> &mut Command {
    let us = std::process::id();
    let tie = move || {
        let kill: libc::c_ulong = libc::SIGKILL.unsigned_abs().into();
        let zero: libc::c_ulong = 0;
        // SAFETY: sets a flag of this process and touches no memory of ours.
        if unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, kill, zero, zero, zero) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: asks for a number, and touches no memory of ours.
        let parent = unsafe { libc::getppid() };
        if parent.unsigned_abs() == us {
            Ok(())
        } else {
            // We have ended before that could be told to the kernel.
            Err(io::Error::from_raw_os_error(libc::ESRCH))
        }
    };
    // SAFETY: between fork and exec only two system calls are made; nothing is allocated, and no lock is taken.
    unsafe { command.pre_exec(tie) }
}

/// Reaps all children that have ended, but for those in `skip` (someone else waits for these, e.g. tokio), and
/// returns them with their status. Never blocks. `procfs` is only looked at while a child in `skip` has ended and
/// was not yet waited for, for it hides the others.
///
/// # Errors
/// What the kernel says, but not ECHILD: having no children is fine.
pub fn reap_children(skip: &[i32], procfs: &Path) -> io::Result<Vec<(i32, ExitStatus)>> {
    let mut reaped = Vec::new();
    while let Some(pid) = peek_ended()? {
        if skip.contains(&pid) {
            let skip: HashSet<i32> = skip.iter().copied().collect();
            for pid in ended_children(procfs).filter(|pid| !skip.contains(pid)) {
                reaped.extend(reap(pid)?);
            }
            break;
        }
        reaped.extend(reap(pid)?);
    }
    Ok(reaped)
}

/// A child that has ended, left as it is.
fn peek_ended() -> io::Result<Option<i32>> {
    let options = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
    // SAFETY: siginfo_t is plain data; zeroes are a value of it.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    // SAFETY: `info` is a valid place for one siginfo_t and outlives the call.
    if unsafe { libc::waitid(libc::P_ALL, 0, &raw mut info, options) } != 0 {
        let error = io::Error::last_os_error();
        return if error.raw_os_error() == Some(libc::ECHILD) {
            Ok(None)
        } else {
            Err(error)
        };
    }
    // SAFETY: waitid succeeded, so the field for SIGCHLD is the one filled in (or, without a child, still zero).
    let pid = unsafe { info.si_pid() };
    Ok((pid != 0).then_some(pid))
}

fn reap(pid: i32) -> io::Result<Option<(i32, ExitStatus)>> {
    let mut status = 0;
    // SAFETY: `status` is a valid place for an int and outlives the call.
    match unsafe { libc::waitpid(pid, &raw mut status, libc::WNOHANG) } {
        0 => Ok(None),
        found if found > 0 => Ok(Some((found, ExitStatus::from_raw(status)))),
        _ => {
            let error = io::Error::last_os_error();
            if error.raw_os_error() == Some(libc::ECHILD) {
                Ok(None)
            } else {
                Err(error)
            }
        }
    }
}

/// Children of this process in state Z, as procfs shows them; none without procfs.
fn ended_children(procfs: &Path) -> impl Iterator<Item = i32> {
    let own = std::process::id();
    std::fs::read_dir(procfs)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(move |entry| {
            let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
            let stat = crate::read::attribute(&entry.path().join("stat"))?;
            // The name, in parentheses, may hold anything.
            let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
            let ended = fields.next()? == "Z" && fields.next()?.parse() == Ok(own);
            ended.then_some(pid)
        })
}

/// Waits until one of `fds` can be read (or has an error or hang-up to tell), at most `timeout`. Answers, for each,
/// whether it is so: all `false` after the time-out.
///
/// # Errors
/// What poll(2) says, but not EINTR.
pub fn poll(fds: &[BorrowedFd<'_>], timeout: Option<Duration>) -> io::Result<Vec<bool>> {
    poll_until(fds, PollFlags::IN, deadline(timeout))
}

/// As [`poll`], for files that announce a change as urgent: `/proc/self/mountinfo`, sysfs attributes.
///
/// # Errors
/// What poll(2) says, but not EINTR.
pub fn poll_priority(fds: &[BorrowedFd<'_>], timeout: Option<Duration>) -> io::Result<Vec<bool>> {
    poll_until(fds, PollFlags::PRI, deadline(timeout))
}

/// When a time-out ends; `None` never does, nor does one beyond the clock.
pub(crate) fn deadline(timeout: Option<Duration>) -> Option<Instant> {
    timeout.and_then(|timeout| Instant::now().checked_add(timeout))
}

/// What is left until a deadline.
pub(crate) fn left(deadline: Option<Instant>) -> Option<Duration> {
    deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()))
}

/// Waits until `fd` can be read or has an error; `false` once the deadline has passed.
pub(crate) fn wait_readable(fd: BorrowedFd<'_>, deadline: Option<Instant>) -> io::Result<bool> {
    Ok(poll_until(&[fd], PollFlags::IN, deadline)?.contains(&true))
}

fn poll_until(fds: &[BorrowedFd<'_>], events: PollFlags, deadline: Option<Instant>) -> io::Result<Vec<bool>> {
    let mut polled: Vec<PollFd<'_>> = fds
        .iter()
        .map(|fd| PollFd::from_borrowed_fd(fd.as_fd(), events))
        .collect();
    loop {
        // A time the kernel cannot hold is as good as for ever.
        let left = left(deadline).and_then(|left| Timespec::try_from(left).ok());
        match rustix::event::poll(&mut polled, left.as_ref()) {
            Ok(_) => return Ok(polled.iter().map(|fd| !fd.revents().is_empty()).collect()),
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    /// Children are the whole process's: these tests must not meet each other's.
    static CHILDREN: std::sync::Mutex<()> = std::sync::Mutex::new(());

    fn await_zombie(pid: i32) {
        while !ended_children(Path::new(crate::PROCFS)).any(|ended| ended == pid) {
            std::thread::yield_now();
        }
    }

    #[expect(clippy::zombie_processes, reason = "reaping is what is tested")]
    fn child(code: i32) -> i32 {
        let child = Command::new("/bin/sh")
            .args(["-c", &format!("exit {code}")])
            .spawn()
            .unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        await_zombie(pid);
        pid
    }

    #[test]
    fn a_skipped_child_is_left_to_its_owner_and_hides_nobody() {
        let _guard = CHILDREN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let (owned, orphan) = (child(3), child(4));
        let reaped = reap_children(&[owned], Path::new(crate::PROCFS)).unwrap();
        let codes: Vec<_> = reaped.iter().map(|(pid, status)| (*pid, status.code())).collect();
        assert_eq!(codes, [(orphan, Some(4))]);
        assert_eq!(reap(owned).unwrap().unwrap().1.code(), Some(3));
    }

    #[test]
    fn without_children_nothing_is_reaped() {
        let _guard = CHILDREN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        assert!(reap_children(&[], Path::new(crate::PROCFS)).unwrap().is_empty());
    }

    #[test]
    fn a_tied_program_ends_with_the_thread_that_has_started_it() {
        let _guard = CHILDREN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let start = || dies_with_us(Command::new("sleep").arg("600")).spawn().unwrap();
        let mut child = std::thread::spawn(start).join().unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGKILL));
    }

    #[test]
    fn poll_tells_which_descriptor_has_something() {
        let (a, _keep) = UnixStream::pair().unwrap();
        let (b, mut writer) = UnixStream::pair().unwrap();
        assert_eq!(
            poll(&[a.as_fd(), b.as_fd()], Some(Duration::ZERO)).unwrap(),
            [false, false]
        );
        writer.write_all(b"x").unwrap();
        assert_eq!(poll(&[a.as_fd(), b.as_fd()], None).unwrap(), [false, true]);
    }

    #[test]
    fn an_endless_timeout_is_taken() {
        let (a, writer) = UnixStream::pair().unwrap();
        drop(writer);
        assert_eq!(poll(&[a.as_fd()], Some(Duration::MAX)).unwrap(), [true]);
    }

    #[test]
    fn a_file_is_no_terminal() {
        let file = tempfile::tempfile().unwrap();
        assert!(rustix::process::ioctl_tiocsctty(file.as_fd()).is_err());
    }

    #[test]
    fn kill_cannot_be_ignored() {
        assert!(ignore_signals(&[libc::SIGKILL]).is_err());
        assert!(!is_ignored(libc::SIGUSR2) && !is_ignored(libc::SIGKILL) && !is_ignored(-1));
        ignore_signals(&[libc::SIGUSR2]).unwrap();
        assert!(is_ignored(libc::SIGUSR2));
    }
}
