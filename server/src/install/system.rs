//! Makes the running system see what changed. What does not run needs not be told.

use std::path::Path;
use std::process::{Command, Stdio};

use super::wanted::UNIT;

/// Whether systemd runs here, which a change could be told to.
pub(super) fn systemd_runs() -> bool {
    Path::new("/run/systemd/system").exists()
}

/// After an install: starts the service, and has network managers read their files.
pub(super) fn activate() {
    if !systemd_runs() {
        eprintln!("systemd does not run here: start `stiefel autokexec` yourself");
        return;
    }
    tell("systemctl", &["daemon-reload"]);
    if tell("systemctl", &["restart", UNIT]) {
        println!("{UNIT} runs; see `journalctl -u {UNIT}`");
    }
    reload_network_managers();
}

/// After files of an install were brought up to date: a service that runs goes on with them.
pub(super) fn reload() {
    if systemd_runs() {
        tell("systemctl", &["daemon-reload"]);
        tell("systemctl", &["try-restart", UNIT]);
    }
}

pub(super) fn reload_network_managers() {
    for (manager, command) in [
        ("NetworkManager.service", ["nmcli", "general", "reload"].as_slice()),
        ("systemd-networkd.service", &["networkctl", "reload"]),
    ] {
        let active = Command::new("systemctl")
            .args(["--quiet", "is-active", manager])
            .stdin(Stdio::null())
            .status();
        if let (Ok(status), Some((program, arguments))) = (active, command.split_first())
            && status.success()
        {
            tell(program, arguments);
        }
    }
}

/// Runs a command; what it says is for the user. A failure is told and does not undo the files.
pub(super) fn tell(program: &str, arguments: &[&str]) -> bool {
    match Command::new(program).args(arguments).stdin(Stdio::null()).status() {
        Ok(status) if status.success() => true,
        Ok(status) => {
            eprintln!(
                "warning: `{program} {}` failed ({status}); run it again by hand",
                arguments.join(" ")
            );
            false
        }
        Err(error) => {
            eprintln!("warning: `{program}` cannot be started: {error}");
            false
        }
    }
}
