//! `stiefel autokexec`, `serve` and `payload`: what the laptop does while its own system runs.

use std::path::Path;

use anyhow::bail;
use stiefel_server::autokexec::{self, Mode};
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
