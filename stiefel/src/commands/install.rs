//! `stiefel install`, `upgrade` and `uninstall`.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use stiefel_initrd_builder::ramdisk::{KERNEL, MANIFEST, Manifest, RAMDISK};
use stiefel_server::collect::STATE_DIR;
use stiefel_server::install::{InstallOptions, UninstallOptions};
use stiefel_shared::config::{CONFIG_PATH, Config};
use stiefel_shared::handover::{DiskTransport, Encryption};

use super::{build, config, is_there, no_config};
use crate::cli::{InstallArgs, UninstallArgs, UpgradeArgs};

/// Puts everything in place; a ramdisk that is not given is built first.
pub(crate) fn install(named: Option<&Path>, args: &InstallArgs) -> anyhow::Result<()> {
    // The configuration that is about to be used: the one that is there stays, whatever was named.
    let there = below(&args.root, CONFIG_PATH);
    let used = if is_there(&there)? {
        Some(there.as_path())
    } else {
        named
    };
    if let Some(named) = named
        && !is_there(named)?
    {
        return Err(no_config(named).into());
    }
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
    let building = workshop()?;
    if options.ramdisk.is_none() {
        if options.dry_run {
            tell_dry_build();
        } else {
            let out = building.path().join("ramdisk");
            // Without any, the example is installed, which says the defaults; never the configuration of the machine we run on.
            let config = used.map_or_else(|| Ok(Config::default()), |path| config(Some(path)))?;
            let report = build::build_into(&config, &args.root, &below(&args.root, STATE_DIR), &out)?;
            report.iter().for_each(build::tell_missing_firmware);
            options.ramdisk = report.map(|_| out);
        }
    }
    Ok(stiefel_server::install::install(&options)?)
}

/// Brings up to date what is installed: the ramdisk, and files of ours that another version of stiefel writes otherwise.
pub(crate) fn upgrade(args: &UpgradeArgs) -> anyhow::Result<()> {
    let mut options = InstallOptions {
        program: std::env::current_exe().context("cannot find our own program")?,
        dry_run: args.dry_run,
        refresh: true,
        quiet: args.quiet,
        ..InstallOptions::new(&args.root)
    };
    options.check()?;
    let building = workshop()?;
    if options.dry_run {
        tell_dry_build();
    } else {
        let out = building.path().join("ramdisk");
        let config = config(Some(&below(&args.root, CONFIG_PATH)))?;
        let built = build::build_into(&config, &args.root, &below(&args.root, STATE_DIR), &out)
            .and_then(|report| {
                report
                    .iter()
                    .try_for_each(|report| check_abilities(&report.manifest, &config))?;
                Ok(report)
            })
            .context("there is no new ramdisk; the one that is installed stays")?;
        options.ramdisk = built.map(|_| out);
    }
    Ok(stiefel_server::install::install(&options)?)
}

/// A folder for a ramdisk that is not yet in its place.
fn workshop() -> anyhow::Result<tempfile::TempDir> {
    tempfile::tempdir().context(
        "cannot make a temporary folder\n  next: see whether there is space (`df`) and the file system is writable (`findmnt`), or name another place in TMPDIR",
    )
}

/// A ramdisk that could not do what the configuration asks for never replaces one that may.
fn check_abilities(manifest: &Manifest, config: &Config) -> anyhow::Result<()> {
    let kernel = &manifest.kernel_version;
    if config.link.encryption == Encryption::Wireguard && !manifest.wireguard {
        bail!(
            "kernel {kernel} has no WireGuard, which link.encryption asks for; boot a kernel that has, or name one in initrd.kernel"
        );
    }
    if config.disk.transport.given() == Some(&DiskTransport::NvmeTcp) && !manifest.nvme_target {
        bail!(
            "kernel {kernel} has no NVMe target, which disk.transport asks for; set it to auto, or name another kernel in initrd.kernel"
        );
    }
    Ok(())
}

fn tell_dry_build() {
    for file in [KERNEL, RAMDISK, MANIFEST] {
        println!("build    {STATE_DIR}/{file} (if anything that goes in has changed)");
    }
}

fn below(root: &Path, path: &str) -> PathBuf {
    root.join(path.trim_start_matches('/'))
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
