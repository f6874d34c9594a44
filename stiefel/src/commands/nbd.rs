//! `stiefel nbd`: just the NBD server.

use crate::cli::NbdArgs;
use stiefel_server::nbd::{ExportOptions, Target, run_standalone};

/// Serves until it is told to end.
pub(crate) fn nbd(args: &NbdArgs) -> anyhow::Result<()> {
    let options = ExportOptions {
        name: args.name.clone(),
        read_only: args.read_only,
        ..ExportOptions::default()
    };
    let target = Target {
        path: args.target.clone(),
        overlay: args.overlay.clone(),
    };
    run_standalone(&target, &args.listen, options)
}
