//! `stiefel target`: this machine's disks for others.

use stiefel_server::target::{self, Options};

use crate::cli::TargetArgs;

/// Lends until it is told to end.
pub(crate) fn target(args: &TargetArgs) -> anyhow::Result<()> {
    let options = Options {
        devices: args.devices.clone(),
        all: args.all,
        writable: args.read_write.clone(),
        snapshot: args.snapshot,
        no_nvme: args.no_nvme,
        nbd_port: args.port,
        json: args.json,
    };
    if args.open {
        target::run(&options)
    } else {
        target::run_closed(&options, &target::keys(&args.keys)?)
    }
}
