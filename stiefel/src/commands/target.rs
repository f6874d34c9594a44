//! `stiefel target`: this machine's disks for others.

use std::path::Path;

use anyhow::bail;
use stiefel_server::target::{self, Options, Reboot, RebootOptions};

use super::{ask, config_or_default};
use crate::cli::TargetArgs;

/// Lends until it is told to end; or leaves the system for the ramdisk, which does.
pub(crate) fn target(config: Option<&Path>, args: &TargetArgs) -> anyhow::Result<()> {
    if args.reboot {
        return reboot(config, args);
    }
    let options = Options {
        devices: args.devices.clone(),
        all: args.all,
        writable: args.read_write.clone(),
        awaited: false,
        snapshot: args.snapshot,
        no_nvme: args.no_nvme,
        nbd_port: args.port,
        hostname: None,
        json: args.json,
    };
    if args.open {
        target::run(&options)
    } else {
        target::run_closed(&options, &target::keys(&args.keys)?)
    }
}

fn reboot(config: Option<&Path>, args: &TargetArgs) -> anyhow::Result<()> {
    let config = config_or_default(config)?;
    let keys = match args.open {
        true => Vec::new(),
        false => target::keys(&args.keys)?,
    };
    let options = RebootOptions {
        keys,
        open: args.open,
        writable: args.read_write.clone(),
        snapshot: args.snapshot,
    };
    let reboot = Reboot::prepare(&config, options)?;
    eprintln!("{}", reboot.words());
    if !args.yes && !ask("Leave the system now?")? {
        bail!("nothing was done");
    }
    reboot.leave(&config)
}
