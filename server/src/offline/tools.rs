//! The laptop's own cryptsetup and lvm in its ramdisk, which came with the stick: how they are started.
//!
//! Counterpart: `stiefel_initrd_builder::tools`. They run without an environment and without udev, for a bounded time. What is secret goes
//! through standard input, never onto a command line.

use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, bail};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use stiefel_initrd_builder::ramdisk::interpreter;
use stiefel_initrd_builder::tools::{LIBRARIES, LOADER, PROGRAMS};
use stiefel_sys::process::{dies_with_us, poll};

/// How long one may take: key derivation on a slow machine takes tens of seconds.
const PATIENCE: Duration = Duration::from_mins(2);
/// How much of its complaints is read, in bytes.
const MAX_SAID: u64 = 2048;

/// How one has ended.
pub(super) struct Ended {
    status: ExitStatus,
    /// What it has complained of, on one line, fit for a terminal.
    said: String,
}

impl Ended {
    pub(super) fn code(&self) -> Option<i32> {
        self.status.code()
    }
}

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "it ended with {}: {}", self.status, self.said)
    }
}

/// Runs one of the programs below `root`, which gets `secret` as its standard input.
pub(super) fn run(root: &Path, name: &str, args: &[&str], secret: &[u8]) -> anyhow::Result<Ended> {
    let mut child = command(root, name)
        .and_then(|mut command| command.args(args).spawn())
        .with_context(|| format!("{name} cannot be started; write this laptop's stick anew"))?;
    let ended = finish(&mut child, secret);
    if ended.is_err() {
        let _ = child.kill();
        let _ = child.wait();
    }
    ended.with_context(|| format!("{name} failed"))
}

fn command(root: &Path, name: &str) -> io::Result<Command> {
    let program = root.join(PROGRAMS).join(name);
    let dynamic = interpreter(&std::fs::read(&program)?).is_some();
    let mut command = if dynamic {
        let mut command = Command::new(root.join(LOADER));
        command.arg("--library-path").arg(root.join(LIBRARIES)).arg(program);
        command
    } else {
        Command::new(program)
    };
    command
        .env_clear()
        .env("LC_ALL", "C")
        // There is none, and nobody would answer.
        .env("DM_DISABLE_UDEV", "1")
        .env("LVM_SUPPRESS_FD_WARNINGS", "1")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    // One that outlived this role would open the disk for nobody, and behind the back of the next one.
    dies_with_us(&mut command);
    Ok(command)
}

fn finish(child: &mut Child, secret: &[u8]) -> anyhow::Result<Ended> {
    let mut stdin = child.stdin.take().context("it has no standard input")?;
    match stdin.write_all(secret) {
        // It has ended already, and says why.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
        written => written?,
    }
    // All was said.
    drop(stdin);
    let gone = pidfd_open(Pid::from_child(child), PidfdFlags::empty())?;
    if !poll(&[gone.as_fd()], Some(PATIENCE))?.contains(&true) {
        bail!("it has not ended after {} s", PATIENCE.as_secs());
    }
    let status = child.wait()?;
    let mut said = Vec::new();
    if let Some(stderr) = child.stderr.take() {
        stderr.take(MAX_SAID).read_to_end(&mut said)?;
    }
    let said = String::from_utf8_lossy(&said);
    let words: Vec<&str> = said.split_whitespace().collect();
    let said = words.join(" ").chars().filter(|c| !c.is_control()).take(300).collect();
    Ok(Ended { status, said })
}

/// Where device mapper's nodes are.
pub(super) fn mapped(dev: &Path, name: &str) -> PathBuf {
    dev.join("mapper").join(name)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    /// A ramdisk with a program that is this script, which is started by itself.
    pub(in super::super) fn ramdisk(name: &str, script: &str) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(PROGRAMS).join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
        dir
    }

    #[test]
    fn a_secret_comes_by_standard_input_and_not_on_the_command_line() {
        let dir = ramdisk(
            "cryptsetup",
            "test \"$(cat)\" = 'pass phrase' || exit 3\n\
             case \"$*$(tr '\\0' ' ' </proc/self/environ)\" in *pass*) exit 4;; esac\necho \"$*\" >&2\nexit 2",
        );
        let ended = run(dir.path(), "cryptsetup", &["open", "x"], b"pass phrase").unwrap();
        assert_eq!(ended.code(), Some(2), "{ended}");
        assert_eq!(ended.said, "open x");
    }

    #[test]
    fn complaints_are_one_bounded_line_without_control_characters() {
        let dir = ramdisk("lvm", "printf 'a\\033[2J\\n  b\\n%01000d' 0 >&2\nexit 5");
        let ended = run(dir.path(), "lvm", &[], b"").unwrap();
        assert!(
            ended.said.starts_with("a[2J b 000") && ended.said.len() == 300,
            "{ended}"
        );
    }

    #[test]
    fn one_that_reads_nothing_and_one_that_is_not_there() {
        let dir = ramdisk("lvm", "exit 0");
        assert_eq!(run(dir.path(), "lvm", &[], &[7; 100_000]).unwrap().code(), Some(0));
        let error = run(dir.path(), "cryptsetup", &[], b"").err().unwrap();
        assert!(format!("{error:#}").contains("stick anew"), "{error:#}");
    }
}
