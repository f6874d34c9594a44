//! The role: what the ramdisk is, run as a child of its PID 1.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use stiefel_init::RoleEnd;
use stiefel_server::offline;
use stiefel_server::role::End;
use stiefel_server::target::Words;
use stiefel_shared::handover::Handover;
use stiefel_sys::console::Console;
use stiefel_sys::custody::Custody;

/// A disk that has given nothing for so long gives nothing any more.
const STALL: Duration = Duration::from_mins(5);

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
    let handover = stiefel_init::read_handover()?.context("there is no handover")?;
    let words = Words::read();
    let handover = words.role(handover);
    words.tell(console, &handover);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("cannot start")?;
    let end = runtime.block_on(async {
        let handover = match settled(console, handover).await {
            Ok(handover) => handover,
            Err(error) => return Ok(gave_up(console, &error)),
        };
        match handover {
            Handover::Once(_) | Handover::Search(_) => bail!("the handover was not settled"),
            Handover::Client(client) => {
                stiefel_client::role::run(console, &client).await?;
                Ok(RoleEnd::Kexec)
            }
            Handover::Target(target) => {
                stiefel_server::target::run_role(console, &target, words).await?;
                Ok(RoleEnd::Restart)
            }
            Handover::Server(server) => Ok(
                match stiefel_server::role::run(console, *server, |end| of(end) as u8).await {
                    Ok(end) => of(end),
                    // Its desktop has the disk: another try may go on with it. PID 1 counts, and knows when it is over for certain.
                    Err(error) if stiefel_server::role::has_session() => return Err(error),
                    Err(error) => gave_up(console, &error),
                },
            ),
        }
    });
    // A thread that waits for a disk that hangs must not keep the laptop from going home.
    runtime.shutdown_background();
    end
}

/// The handover of a server, where the laptop was not started from its own system: then its disk is read first. Others stay as they are.
async fn settled(console: &'static Console, handover: Handover) -> anyhow::Result<Handover> {
    let read = move || {
        Ok(match handover {
            Handover::Once(once) => Handover::Server(Box::new(offline::once(console, *once)?)),
            Handover::Search(search) => Handover::Server(Box::new(offline::search(console, *search)?)),
            other => other,
        })
    };
    tokio::select! {
        read = tokio::task::spawn_blocking(read) => read?,
        () = offline::stalled(STALL) => bail!(
            "the laptop's disk has given nothing for {} minutes; see whether it is broken",
            STALL.as_secs() / 60
        ),
    }
}

/// Says why, and that trying again would not help.
fn gave_up(console: &Console, error: &anyhow::Error) -> RoleEnd {
    console.error(&format!("{error:#}"));
    // A thread that waits for a dead disk may keep this process from ending.
    if let Some(custody) = Custody::inherited() {
        let _ = custody.verdict(RoleEnd::GiveUp as u8);
    }
    RoleEnd::GiveUp
}

/// What the server's end means to PID 1.
const fn of(end: End) -> RoleEnd {
    match end {
        End::Restart => RoleEnd::Restart,
        End::PowerOff => RoleEnd::PowerOff,
        End::GiveUp => RoleEnd::GiveUp,
    }
}
