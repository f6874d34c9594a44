//! `stiefel nbd`: just the NBD server.

use crate::cli::NbdArgs;
use stiefel_server::nbd::{ExportOptions, run_standalone};

/// Serves until it is told to end.
pub(crate) fn nbd(args: &NbdArgs) -> anyhow::Result<()> {
    let options = ExportOptions {
        name: args.name.clone(),
        read_only: args.read_only,
        ..ExportOptions::default()
    };
    run_standalone(&args.target, &args.listen, options)
}
