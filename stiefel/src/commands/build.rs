//! `stiefel build`: the ramdisk.

use std::path::{Path, PathBuf};

use anyhow::Context;
use indicatif::{ProgressBar, ProgressStyle};
use stiefel_initrd_builder::modules::DEBUG;
use stiefel_initrd_builder::ramdisk::{self, BuildReport, RamdiskOptions, Stage};
use stiefel_shared::config::Config;

use super::{config_or_default, mebibytes};
use crate::cli::BuildArgs;

/// Builds what the user asked for.
pub(crate) fn build(config: &Path, args: &BuildArgs) -> anyhow::Result<()> {
    let config = config_or_default(config)?;
    let mut classes = config.modules.0.clone();
    if args.debug && !classes.iter().any(|class| class == DEBUG) {
        classes.push(DEBUG.to_owned());
    }
    let (kernel, modules_dir) = kernel(&config, args.kernel.as_ref().zip(args.modules.as_ref()))?;
    let options = RamdiskOptions {
        kernel,
        modules_dir,
        firmware_dirs: args.firmware.clone(),
        classes,
        program: std::env::current_exe().context("cannot find our own program")?,
        busybox: Some(args.busybox.clone()),
        extra_files: Vec::new(),
        out_dir: args.out.clone(),
    };
    let report = build_with(&options)?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report.manifest)?);
    } else {
        let size = |path: &Path| std::fs::metadata(path).map(|meta| mebibytes(meta.len())).unwrap_or_default();
        println!("kernel   {}  {}", report.kernel.display(), size(&report.kernel));
        println!("ramdisk  {}  {}", report.ramdisk.display(), size(&report.ramdisk));
    }
    Ok(())
}

/// Kernel and modules: from the command line, the configuration, or the running system.
fn kernel(config: &Config, given: Option<(&PathBuf, &PathBuf)>) -> anyhow::Result<(PathBuf, PathBuf)> {
    if let Some((kernel, modules)) = given {
        return Ok((kernel.clone(), modules.clone()));
    }
    let Some(kernel) = config.initrd.kernel.given() else { return Ok(ramdisk::default_kernel()?) };
    let version = ramdisk::kernel_version(kernel)?;
    Ok((kernel.clone(), Path::new("/lib/modules").join(version)))
}

/// Builds, with a progress bar on a terminal.
pub(crate) fn build_with(options: &RamdiskOptions) -> anyhow::Result<BuildReport> {
    // Draws nothing when standard error is no terminal.
    let bar = ProgressBar::new(0);
    bar.set_style(ProgressStyle::with_template("{msg:24} {wide_bar} {percent:>3} %")?);
    let mut stage = None;
    let report = ramdisk::build(options, &mut |now, done, total| {
        if stage != Some(now) {
            stage = Some(now);
            bar.set_message(match now {
                Stage::Modules => "reading modules",
                Stage::Compress => "compressing",
            });
        }
        bar.set_length(total);
        bar.set_position(done);
    });
    bar.finish_and_clear();
    let report = report?;
    if !report.missing_firmware.is_empty() {
        eprintln!(
            "note: {} firmware files that drivers may ask for are not on this machine; the adapters that need them will \
             not work (Debian: packages firmware-realtek, firmware-misc-nonfree …)",
            report.missing_firmware.len()
        );
    }
    Ok(report)
}
