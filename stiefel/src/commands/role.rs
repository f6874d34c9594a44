//! The role: what the ramdisk is, run as a child of its PID 1.

use std::path::Path;
use std::process::ExitCode;

use anyhow::Context;
use stiefel_init::RoleEnd;
use stiefel_server::role::End;
use stiefel_shared::handover::{HANDOVER_PATH, Handover, MAX_DOCUMENT, SecretBytes};
use stiefel_sys::console::Console;

/// Runs the role; its exit status tells PID 1 what comes next.
pub(crate) fn run() -> ExitCode {
    // As long as the process: threads that follow NICs speak through it, too.
    let console: &'static Console = Box::leak(Box::new(Console::open(Path::new("/dev"), Path::new("/proc"))));
    match role(console) {
        Ok(end) => ExitCode::from(end as u8),
        Err(error) => {
            console.error(&format!("{error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn role(console: &'static Console) -> anyhow::Result<RoleEnd> {
    let handover = read()?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("cannot start")?;
    runtime.block_on(async {
        match handover {
            Handover::Client(client) => {
                stiefel_client::role::run(console, &client).await?;
                Ok(RoleEnd::Kexec)
            }
            Handover::Server(server) => Ok(match stiefel_server::role::run(console, *server).await {
                Ok(End::Restart) => RoleEnd::Restart,
                Ok(End::PowerOff) => RoleEnd::PowerOff,
                Err(error) => {
                    console.error(&format!("{error:#}"));
                    RoleEnd::GiveUp
                }
            }),
        }
    })
}

fn read() -> anyhow::Result<Handover> {
    let path = Path::new("/").join(HANDOVER_PATH);
    let size = std::fs::metadata(&path).context("there is no handover")?.len();
    anyhow::ensure!(
        size <= MAX_DOCUMENT,
        "the handover is {size} bytes long; at most {MAX_DOCUMENT} are read"
    );
    let json = SecretBytes(std::fs::read(&path).context("cannot read the handover")?);
    Ok(Handover::parse(&json.0)?)
}
