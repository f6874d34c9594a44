//! `stiefel install` and `uninstall`.

use std::path::Path;

use anyhow::Context;
use stiefel_initrd_builder::ramdisk::{KERNEL, MANIFEST, RAMDISK};
use stiefel_server::collect::STATE_DIR;
use stiefel_server::install::{InstallOptions, UninstallOptions};
use stiefel_shared::config::{CONFIG_PATH, Config};

use super::config;
use super::{build, is_there};
use crate::cli::{InstallArgs, UninstallArgs};

/// Puts everything in place; a ramdisk that is not given is built first.
pub(crate) fn install(named: Option<&Path>, args: &InstallArgs) -> anyhow::Result<()> {
    // The configuration that is about to be used: the one that is there stays, whatever was named.
    let there = args.root.join(CONFIG_PATH.trim_start_matches('/'));
    let used = if is_there(&there)? {
        Some(there.as_path())
    } else {
        named
    };
    let mut options = InstallOptions {
        program: std::env::current_exe().context("cannot find our own program")?,
        ramdisk: args.ramdisk.clone(),
        config: named.map(Path::to_owned),
        yes: args.yes,
        dry_run: args.dry_run,
        ..InstallOptions::new(&args.root)
    };
    options.check()?;
    // Built beside, so that nothing of the installed one changes before the user has agreed.
    let building = tempfile::tempdir().context("cannot make a temporary folder")?;
    if options.ramdisk.is_none() {
        if options.dry_run {
            for file in [KERNEL, RAMDISK, MANIFEST] {
                println!("build    {STATE_DIR}/{file}");
            }
        } else {
            let out = building.path().join("ramdisk");
            // Without any, the example is installed, which says the defaults; never the configuration of the machine we run on.
            let config = used.map_or_else(|| Ok(Config::default()), |path| config(Some(path)))?;
            build::build_into(&config, &out)?;
            options.ramdisk = Some(out);
        }
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
