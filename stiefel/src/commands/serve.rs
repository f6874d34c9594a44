//! `stiefel autokexec`, `serve`, `cancel` and `payload`: what the laptop does while its own system runs.

use std::path::Path;

use anyhow::bail;
use stiefel_server::autokexec::{self, Answer, CONTROL_FOLDER, ControlError, Mode};
use stiefel_server::payload;

use super::{ask, config, config_or_default};
use crate::cli::{AutokexecArgs, PayloadArgs, ServeArgs};

const fn mode(dry_run: bool) -> Mode {
    if dry_run { Mode::DryRun } else { Mode::Real }
}

/// The service.
pub(crate) fn autokexec(path: Option<&Path>, args: &AutokexecArgs) -> anyhow::Result<()> {
    autokexec::run(&config(path)?, mode(args.dry_run))
}

/// Leaves the system now.
pub(crate) fn serve(path: Option<&Path>, args: &ServeArgs) -> anyhow::Result<()> {
    let config = config(path)?;
    if !args.dry_run && !args.yes && !ask("This ends all programs and leaves the system. Go on?")? {
        bail!("nothing was done");
    }
    Ok(autokexec::serve(&config, mode(args.dry_run))?)
}

/// Has the service stay in this system.
pub(crate) fn cancel() -> anyhow::Result<()> {
    match autokexec::cancel(Path::new(CONTROL_FOLDER))? {
        Answer::Cancelled => println!("cancelled: this laptop stays in its system"),
        Answer::StaysAnyway { why } => println!("this laptop stays in its system anyway: {why}"),
        Answer::Idle => bail!("there is nothing to cancel: no plug and no wake is being followed"),
        Answer::TooLate => bail!("it is too late: the shutdown has begun"),
        Answer::Denied => return Err(ControlError::Denied.into()),
    }
    Ok(())
}

/// Shows what would be booted.
pub(crate) fn payload(path: Option<&Path>, args: &PayloadArgs) -> anyhow::Result<()> {
    let found = payload::find(&args.root, &config_or_default(path)?.boot.load)?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&found)?);
    } else {
        println!("{found}");
    }
    Ok(())
}
