//! `stiefel install` and `uninstall`.

use std::path::Path;

use anyhow::Context;
use stiefel_server::install::{InstallOptions, UninstallOptions};
use stiefel_shared::config::CONFIG_PATH;

use super::build;
use crate::cli::{InstallArgs, UninstallArgs};

/// Puts everything in place; a ramdisk that is not given is built first.
pub(crate) fn install(config: &Path, args: &InstallArgs) -> anyhow::Result<()> {
    let mut options = InstallOptions {
        program: std::env::current_exe().context("cannot find our own program")?,
        ramdisk: args.ramdisk.clone(),
        yes: args.yes,
        dry_run: args.dry_run,
        ..InstallOptions::new(&args.root)
    };
    // Built beside, so that nothing of the installed one changes before the user has agreed.
    let building = tempfile::tempdir().context("cannot make a temporary folder")?;
    if options.ramdisk.is_none() && !options.dry_run {
        let out = building.path().join("ramdisk");
        // The configuration that is about to be used, not that of the machine we run on.
        let config = if config == Path::new(CONFIG_PATH) {
            args.root.join(CONFIG_PATH.trim_start_matches('/'))
        } else {
            config.to_owned()
        };
        build::build_into(&config, &out)?;
        options.ramdisk = Some(out);
    }
    Ok(stiefel_server::install::install(&options)?)
}

/// Takes out what `install` put in.
pub(crate) fn uninstall(args: &UninstallArgs) -> anyhow::Result<()> {
    Ok(stiefel_server::install::uninstall(&UninstallOptions {
        root: args.root.clone(),
        purge: args.purge,
        yes: args.yes,
        dry_run: args.dry_run,
    })?)
}
