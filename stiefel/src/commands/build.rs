//! `stiefel build`: the ramdisk.

use std::path::{Path, PathBuf};

use anyhow::Context;
use indicatif::{ProgressBar, ProgressStyle};
use stiefel_initrd_builder::modules::{DEBUG, FIRMWARE_DIRS};
use stiefel_initrd_builder::ramdisk::{self, BuildReport, RamdiskOptions, Stage};
use stiefel_shared::config::Config;

use super::{config_or_default, mebibytes};
use crate::cli::BuildArgs;

/// Where Debian's package busybox-static puts its program.
pub(crate) const BUSYBOX: &str = "/bin/busybox";

/// Builds what the user asked for.
pub(crate) fn build(config: &Path, args: &BuildArgs) -> anyhow::Result<()> {
    let config = config_or_default(config)?;
    let mut options = options(&config, args.kernel.as_ref().zip(args.modules.as_ref()), &args.out)?;
    options.firmware_dirs.clone_from(&args.firmware);
    options.busybox = Some(args.busybox.clone());
    if args.debug && !options.classes.iter().any(|class| class == DEBUG) {
        options.classes.push(DEBUG.to_owned());
    }
    let report = build_with(&options)?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report.manifest)?);
    } else {
        let size = |path: &Path| {
            std::fs::metadata(path)
                .map(|meta| mebibytes(meta.len()))
                .unwrap_or_default()
        };
        println!("kernel   {}  {}", report.kernel.display(), size(&report.kernel));
        println!("ramdisk  {}  {}", report.ramdisk.display(), size(&report.ramdisk));
    }
    Ok(())
}

/// Builds what the configuration says, for `stiefel install`.
pub(crate) fn build_into(config: &Path, out: &Path) -> anyhow::Result<()> {
    let options = options(&config_or_default(config)?, None, out)?;
    build_with(&options).map(drop)
}

fn options(config: &Config, kernel: Option<(&PathBuf, &PathBuf)>, out: &Path) -> anyhow::Result<RamdiskOptions> {
    let (kernel, modules_dir) = self::kernel(config, kernel)?;
    Ok(RamdiskOptions {
        kernel,
        modules_dir,
        firmware_dirs: FIRMWARE_DIRS.map(PathBuf::from).to_vec(),
        classes: config.modules.0.clone(),
        program: std::env::current_exe().context("cannot find our own program")?,
        busybox: Some(BUSYBOX.into()),
        extra_files: Vec::new(),
        out_dir: out.to_owned(),
    })
}

/// Kernel and modules: from the command line, the configuration, or the running system.
fn kernel(config: &Config, given: Option<(&PathBuf, &PathBuf)>) -> anyhow::Result<(PathBuf, PathBuf)> {
    if let Some((kernel, modules)) = given {
        return Ok((kernel.clone(), modules.clone()));
    }
    let Some(kernel) = config.initrd.kernel.given() else {
        return Ok(ramdisk::default_kernel()?);
    };
    let image = std::fs::read(kernel).with_context(|| format!("cannot read the kernel {}", kernel.display()))?;
    let version = ramdisk::kernel_version(&image).with_context(|| {
        format!(
            "{} is no kernel; correct initrd.kernel in the configuration",
            kernel.display()
        )
    })?;
    Ok((kernel.clone(), Path::new("/lib/modules").join(version)))
}

/// Builds, with a progress bar on a terminal.
fn build_with(options: &RamdiskOptions) -> anyhow::Result<BuildReport> {
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
