//! Host programs: found, run to their end, or kept running no longer than this process.
//!
//! Used by every module that calls a tool; which package brings which program is in `tools`.

use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{OnceLock, mpsc};

use crate::stop;

/// Where administration programs live, which are not on an ordinary user's `PATH`.
const SYSTEM_DIRS: [&str; 4] = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"];

/// How much of a failed program's output is put into the error, in bytes from its end.
const OUTPUT_TAIL: usize = 2000;

/// A host program did not do its work.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// The program is not installed.
    #[error("the program {program} is not installed; `stiefel test-qemu` offers to install it")]
    NotFound {
        /// Its name.
        program: String,
    },
    /// It could not be started, or its output not be read.
    #[error("cannot run {program}")]
    Run {
        /// Its name.
        program: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It ran and reported a failure.
    #[error("{program} failed ({status}); the end of what it said:\n{output}")]
    Failed {
        /// Its name.
        program: String,
        /// Its exit status.
        status: std::process::ExitStatus,
        /// The end of its standard output and standard error.
        output: String,
    },
}

/// The full path of `program` (a name, or an absolute path), if it is installed.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    if program.starts_with('/') {
        return Some(PathBuf::from(program)).filter(|path| path.exists());
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(SYSTEM_DIRS.iter().map(PathBuf::from))
        .map(|dir| dir.join(program))
        .find(|candidate| candidate.is_file())
}

/// A command for an installed program, with nothing to read and a fixed language.
pub(crate) fn command(program: &str) -> Result<Command, CommandError> {
    let path = find(program).ok_or_else(|| CommandError::NotFound {
        program: program.to_owned(),
    })?;
    let mut command = Command::new(path);
    command.env("LC_ALL", "C").stdin(Stdio::null());
    Ok(command)
}

/// Runs a program to its end, whatever it reports. A signal to this process ends it (see `stop`).
pub(crate) fn output(command: &mut Command) -> Result<Output, CommandError> {
    let run = |command: &mut Command| {
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        let _registered = stop::register(&child);
        child.wait_with_output()
    };
    run(command).map_err(|source| CommandError::Run {
        program: name_of(command),
        source,
    })
}

/// Runs a program to its end and demands success.
pub(crate) fn run(command: &mut Command) -> Result<Output, CommandError> {
    let output = output(command)?;
    if output.status.success() {
        return Ok(output);
    }
    Err(CommandError::Failed {
        program: name_of(command),
        status: output.status,
        output: said(&output),
    })
}

/// The end of what a program said on both its outputs.
pub(crate) fn said(output: &Output) -> String {
    let mut bytes = output.stdout.clone();
    bytes.extend_from_slice(&output.stderr);
    let start = bytes.len().saturating_sub(OUTPUT_TAIL);
    String::from_utf8_lossy(&bytes[start..]).trim().to_owned()
}

fn name_of(command: &Command) -> String {
    let program = Path::new(command.get_program());
    program
        .file_name()
        .unwrap_or(program.as_os_str())
        .to_string_lossy()
        .into_owned()
}

type SpawnRequest = (Command, mpsc::Sender<io::Result<Child>>);

/// Starts a program from a thread that never ends.
///
/// `setpriv --pdeathsig` ties a program to the *thread* that started it, and a test may well start its machines from
/// threads that end before the machines do.
pub(crate) fn spawn_lasting(command: Command) -> io::Result<Child> {
    static SPAWNER: OnceLock<mpsc::Sender<SpawnRequest>> = OnceLock::new();
    let gone = || io::Error::other("the thread that starts programs is gone");

    let spawner = SPAWNER.get_or_init(|| {
        let (sender, requests) = mpsc::channel::<SpawnRequest>();
        std::thread::spawn(move || {
            for (mut command, answer) in requests {
                // A caller that no longer waits has dropped its receiver: nobody owns the child then, so end it.
                if let Err(mpsc::SendError(Ok(mut child))) = answer.send(command.spawn()) {
                    let _ = child.kill();
                    let _ = child.wait();
                }
            }
        });
        sender
    });
    let (answer, result) = mpsc::channel();
    spawner.send((command, answer)).map_err(|_| gone())?;
    result.recv().map_err(|_| gone())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_program_is_named() {
        let error = command("stiefel-no-such-program").unwrap_err();
        assert!(error.to_string().contains("stiefel-no-such-program"));
    }

    #[test]
    fn a_failing_program_shows_what_it_said() {
        let error = run(command("sh").unwrap().args(["-c", "echo because >&2; exit 3"])).unwrap_err();
        assert!(error.to_string().contains("because"), "{error}");
    }

    #[test]
    fn a_program_outlives_the_thread_that_asked_for_it() {
        let mut command = command("setpriv").unwrap();
        command.args(["--pdeathsig", "KILL", "--", "cat"]).stdin(Stdio::piped());
        let mut child = std::thread::spawn(move || spawn_lasting(command).unwrap())
            .join()
            .unwrap();
        assert!(child.try_wait().unwrap().is_none());
        drop(child.stdin.take());
        assert!(child.wait().unwrap().success());
    }
}
