//! The `stiefel` command: one static program that is the user's command, the laptop's service, PID 1 of the ramdisk, the
//! role below it, and the first and the last process of a desktop's session. Which of them is told by argv\[0\].

mod cli;
mod commands;

use std::path::Path;
use std::process::ExitCode;

use stiefel_client::{attach, goodbye, keeper};
use stiefel_shared::handover::SESSION_PATH;
use stiefel_sys::process;

fn main() -> ExitCode {
    let arg0 = std::env::args_os().next().unwrap_or_default();
    let name = Path::new(&arg0)
        .file_name()
        .and_then(|name| name.to_str())
        .unwrap_or_default();
    // In a container a user's command may be PID 1, too: there is no session then.
    if process::is_pid_one() {
        match name {
            "init" => stiefel_init::run(),
            "stiefel" if Path::new("/").join(SESSION_PATH).exists() => attach::run(),
            "shutdown" => goodbye::run(),
            _ => {}
        }
    }
    match name {
        stiefel_init::DRIVERS_ARG0 => stiefel_init::run_drivers(),
        stiefel_init::ROLE_ARG0 => commands::role::run(),
        attach::KEEPER_ARG0 => keeper::run(),
        _ => cli::run(),
    }
}
