//! The end of a kernel: restart, power off, halt, kexec (reboot(2)).

use std::convert::Infallible;
use std::{fmt, io};

use rustix::system::{RebootCommand, reboot};

/// Which way to leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Power {
    /// Through the firmware into whatever it boots next.
    Restart,
    /// Off.
    PowerOff,
    /// Stop and stay powered.
    Halt,
    /// Into the kernel that `kexec::load` took.
    Kexec,
}

impl fmt::Display for Power {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Restart => "restart",
            Self::PowerOff => "power off",
            Self::Halt => "halt",
            Self::Kexec => "kexec",
        })
    }
}

/// The kernel did not leave.
#[derive(Debug, thiserror::Error)]
pub enum PowerError {
    /// No image was loaded before [`Power::Kexec`].
    #[error("cannot kexec: no kernel is loaded; load one first, or restart instead")]
    NothingLoaded,
    /// The kernel refused.
    #[error("cannot {power} this machine; hold its power key")]
    Refused {
        /// What was tried.
        power: Power,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The call came back as if it had worked.
    #[error("the kernel did not {power}; hold the machine's power key")]
    Returned {
        /// What was tried.
        power: Power,
    },
}

/// Writes all dirty data to the disks, then leaves. This waits for every disk, also one whose server is gone:
/// use [`now`] there.
///
/// # Errors
/// Returns only if the kernel did not leave.
pub fn sync_and(power: Power) -> Result<Infallible, PowerError> {
    rustix::fs::sync();
    now(power)
}

/// Leaves at once, without writing anything.
///
/// # Errors
/// Returns only if the kernel did not leave.
pub fn now(power: Power) -> Result<Infallible, PowerError> {
    let command = match power {
        Power::Restart => RebootCommand::Restart,
        Power::PowerOff => RebootCommand::PowerOff,
        Power::Halt => RebootCommand::Halt,
        Power::Kexec => RebootCommand::Kexec,
    };
    match reboot(command) {
        Ok(()) => Err(PowerError::Returned { power }),
        Err(rustix::io::Errno::INVAL) if power == Power::Kexec => Err(PowerError::NothingLoaded),
        Err(errno) => Err(PowerError::Refused {
            power,
            source: errno.into(),
        }),
    }
}

/// Ctrl-Alt-Del no longer restarts the machine at once; the kernel sends PID 1 a SIGINT instead.
///
/// # Errors
/// EPERM without CAP_SYS_BOOT.
pub fn disable_ctrl_alt_del() -> io::Result<()> {
    Ok(reboot(RebootCommand::CadOff)?)
}
