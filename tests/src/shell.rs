//! A shell on a guest's serial console: log in, run commands, get their output and status.
//!
//! Begin and end of the output are marked by words that are put together only when the shell runs them, so the echo of
//! what was typed never looks like them.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use crate::serial::{SerialError, re};
use crate::vm::{Vm, VmError};

/// How long a command may take that names no deadline, as under KVM.
const RUN: Duration = Duration::from_secs(15);
/// How long the guest may take from the name to the prompt, as under KVM.
const LOGIN: Duration = Duration::from_secs(15);
// The kernel may write behind a prompt at any time, so none of these ends with its line.
/// A shell's prompt, as `root@laptop:~# `.
const PROMPT: &str = r"\w+@[\w.-]+:\S*[#$] ";
/// getty's prompt, where nobody was logged in automatically.
const NAME_PROMPT: &str = r"\blogin: *(\[ *\d+\.\d+\].*)?$";
const PASSWORD_PROMPT: &str = "[Pp]assword: ";
/// A terminal in line mode takes no longer line.
const MAX_LINE: usize = 4000;

/// A command in the guest did not do what it should.
#[derive(Debug, thiserror::Error)]
pub enum ShellError {
    /// The console does not answer.
    #[error(transparent)]
    Serial(#[from] SerialError),
    /// The machine does not go off.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// The guest does not let the user in.
    #[error("{name}: the password for {user} is refused")]
    Refused {
        /// The machine.
        name: String,
        /// The user.
        user: String,
    },
    /// The command is too long to be typed.
    #[error("{name}: a line of the command is longer than {MAX_LINE} bytes: put it into a file on the disk")]
    TooLong {
        /// The machine.
        name: String,
    },
    /// The command's status is not 0.
    #[error("{name}: the command {command:?} failed with status {status}:\n{output}")]
    Failed {
        /// The machine.
        name: String,
        /// The command.
        command: String,
        /// Its exit status.
        status: i32,
        /// What it said.
        output: String,
    },
}

/// What a command did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ran {
    /// Its exit status.
    pub status: i32,
    /// What it wrote on both outputs, without the last line end.
    pub output: String,
}

impl Vm {
    /// Waits for a login prompt (or for the shell of an automatic login) on the console, and logs in.
    ///
    /// Then quiets the kernel's messages on the console, which would come between a command's lines; `dmesg` has them.
    ///
    /// # Errors
    /// When no prompt comes within `deadline` (as under KVM), or the password is refused.
    pub fn login(&self, user: &str, password: &str, deadline: Duration) -> Result<(), ShellError> {
        let serial = self.serial();
        let prompts = [re(r"login: .*\(automatic login\)"), re(NAME_PROMPT), re(PROMPT)];
        let found = serial.expect_any(&prompts, deadline)?.index;
        if found == 1 {
            serial.send_line(user)?;
            serial.expect(re(PASSWORD_PROMPT), LOGIN)?;
            serial.send_line(password)?;
        }
        if found != 2 {
            let answers = [re(PROMPT), re("[Ll]ogin incorrect")];
            if serial.expect_any(&answers, LOGIN)?.index == 1 {
                return Err(ShellError::Refused {
                    name: self.name().to_owned(),
                    user: user.to_owned(),
                });
            }
        }
        // An exclamation mark in a command is to stay one, and a test leaves no history on the disk.
        serial.send_line("set +o histexpand; unset HISTFILE")?;
        // As root; anyone else is refused, which does no harm.
        self.run("dmesg --console-level emerg")?;
        Ok(())
    }

    /// Runs a shell command (several lines may be one) in the guest, logged in before.
    ///
    /// # Errors
    /// When it does not end soon (15 s as under KVM).
    pub fn run(&self, command: &str) -> Result<Ran, ShellError> {
        self.run_within(command, RUN)
    }

    /// As [`Vm::run`], with a deadline (as under KVM).
    ///
    /// # Errors
    /// When it does not end in time.
    pub fn run_within(&self, command: &str, deadline: Duration) -> Result<Ran, ShellError> {
        static NEXT: AtomicU32 = AtomicU32::new(1);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        if command.lines().any(|line| line.len() > MAX_LINE) {
            return Err(ShellError::TooLong {
                name: self.name().to_owned(),
            });
        }
        let serial = self.serial();
        serial.skip();
        serial.send(&typed(command, number))?;
        serial.expect(&format!("STIEFEL-BEGIN-{number};"), deadline)?;
        let end = re(&format!(r"STIEFEL-END-{number}:\d+;"));
        let (lines, last) = serial.collect(&end, deadline)?;
        let status = last
            .rsplit_once(':')
            .and_then(|(_, status)| status.trim_end_matches(';').parse().ok());
        Ok(Ran {
            status: status.unwrap_or(i32::MAX),
            output: lines.join("\n").trim_end_matches('\n').to_owned(),
        })
    }

    /// As [`Vm::run`], and demands success; returns what the command wrote.
    ///
    /// # Errors
    /// When it fails, or does not end soon.
    pub fn run_ok(&self, command: &str) -> Result<String, ShellError> {
        self.run_ok_within(command, RUN)
    }

    /// As [`Vm::run_ok`], with a deadline (as under KVM).
    ///
    /// # Errors
    /// When it fails, or does not end in time.
    pub fn run_ok_within(&self, command: &str, deadline: Duration) -> Result<String, ShellError> {
        let Ran { status, output } = self.run_within(command, deadline)?;
        if status == 0 {
            return Ok(output);
        }
        Err(ShellError::Failed {
            name: self.name().to_owned(),
            command: command.to_owned(),
            status,
            output,
        })
    }

    /// Switches the guest off from its shell (`systemctl poweroff`) and waits until QEMU has ended.
    ///
    /// # Errors
    /// When it is not off within `deadline` (as under KVM).
    pub fn power_off(&self, deadline: Duration) -> Result<(), ShellError> {
        self.serial().send_line("systemctl poweroff")?;
        Ok(self.wait_shutdown(deadline)?)
    }
}

/// What is typed for a command: the marks are in two pieces, and nothing the command reads comes from the console.
fn typed(command: &str, number: u32) -> String {
    format!(
        "printf '%s%s;\\n' STIEFEL-BEGIN- {number}; (\n{command}\n) </dev/null; \
         printf '\\n%s%s:%d;\\n' STIEFEL-END- {number} $?\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_echo_of_what_is_typed_does_not_look_like_the_marks() {
        let typed = typed("echo STIEFEL", 7);
        assert!(
            !typed.contains("STIEFEL-BEGIN-7") && !typed.contains("STIEFEL-END-7"),
            "{typed}"
        );
    }

    #[test]
    fn a_shell_prints_the_marks_around_the_output() {
        let script = typed("echo one; printf two; exit 3", 7);
        let output = std::process::Command::new("sh").args(["-c", &script]).output().unwrap();
        assert_eq!(
            String::from_utf8(output.stdout).unwrap(),
            "STIEFEL-BEGIN-7;\none\ntwo\nSTIEFEL-END-7:3;\n"
        );
    }
}
