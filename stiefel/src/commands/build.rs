//! `stiefel build`: the ramdisk.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use indicatif::{ProgressBar, ProgressStyle};
use stiefel_initrd_builder::modules::{DEBUG, FIRMWARE_DIRS};
use stiefel_initrd_builder::overlay;
use stiefel_initrd_builder::ramdisk::{self, BuildReport, RamdiskError, RamdiskOptions, Stage};
use stiefel_server::payload;
use stiefel_shared::config::Config;
use stiefel_shared::kernel::release_in_header;

use super::{config_or_default, mebibytes};
use crate::cli::{BakeArgs, BuildArgs};

/// Where Debian's package busybox-static puts its program.
pub(crate) const BUSYBOX: &str = "/bin/busybox";

/// Builds what the user asked for.
pub(crate) fn build(config: Option<&Path>, args: &BuildArgs) -> anyhow::Result<()> {
    let config = config_or_default(config)?;
    let given = args.kernel.as_ref().zip(args.modules.as_ref());
    let mut options = options(&config, given, Path::new("/"), &args.out)?;
    options.firmware_dirs.clone_from(&args.firmware);
    options.busybox = Some(args.busybox.clone());
    if args.debug && !options.classes.iter().any(|class| class == DEBUG) {
        options.classes.push(DEBUG.to_owned());
    }
    let report = with_progress(&options, |progress| match args.if_changed {
        true => ramdisk::build_if_changed(&options, &options.out_dir, progress),
        false => ramdisk::build(&options, progress).map(Some),
    })?;
    let Some(report) = report else {
        eprintln!("{} is up to date", args.out.display());
        return Ok(());
    };
    tell_missing_firmware(&report);
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

/// Puts what the attach step needs into the folder of an initrd.
pub(crate) fn bake(config: Option<&Path>, args: &BakeArgs) -> anyhow::Result<()> {
    let config = config_or_default(config)?;
    let program = std::env::current_exe().context("cannot find our own program")?;
    let modules = args.modules.join(&args.version);
    let firmware = FIRMWARE_DIRS.map(PathBuf::from);
    Ok(overlay::bake(
        &modules,
        &config.modules.0,
        &firmware,
        &program,
        &args.dir,
    )?)
}

/// Builds what the configuration says for the system below `root`, for `stiefel install` and `upgrade`; `None` if just that is
/// in `current` already.
pub(crate) fn build_into(
    config: &Config,
    root: &Path,
    current: &Path,
    out: &Path,
) -> anyhow::Result<Option<BuildReport>> {
    let options = options(config, None, root, out)?;
    with_progress(&options, |progress| {
        ramdisk::build_if_changed(&options, current, progress)
    })
}

fn options(
    config: &Config,
    kernel: Option<(&PathBuf, &PathBuf)>,
    root: &Path,
    out: &Path,
) -> anyhow::Result<RamdiskOptions> {
    let (kernel, modules_dir) = self::kernel(config, kernel, root)?;
    Ok(RamdiskOptions {
        kernel,
        modules_dir,
        firmware_dirs: FIRMWARE_DIRS.map(|folder| below(root, Path::new(folder))).to_vec(),
        classes: config.modules.0.clone(),
        program: std::env::current_exe().context("cannot find our own program")?,
        busybox: Some(BUSYBOX.into()),
        extra_files: Vec::new(),
        out_dir: out.to_owned(),
    })
}

fn below(root: &Path, path: &Path) -> PathBuf {
    root.join(path.strip_prefix("/").unwrap_or(path))
}

/// Kernel and modules: from the command line, the configuration, what the boot loader starts, or the running system. (After an
/// update the running kernel's files may be gone, and it is the new one that starts next.)
fn kernel(config: &Config, given: Option<(&PathBuf, &PathBuf)>, root: &Path) -> anyhow::Result<(PathBuf, PathBuf)> {
    if let Some((kernel, modules)) = given {
        return Ok((kernel.clone(), modules.clone()));
    }
    let Some(kernel) = config.initrd.kernel.given() else {
        return match payload::find(root, &config.boot.load) {
            Ok(found) if found.kernel.section.is_none() => Ok((found.kernel.path, found.modules)),
            Ok(_) | Err(_) if root == Path::new("/") => Ok(ramdisk::default_kernel()?),
            Ok(found) => bail!(
                "the kernel that is booted lies inside of {}; name one for the ramdisk in the configuration (initrd.kernel)",
                found.kernel.path.display()
            ),
            Err(error) => Err(error).context(
                "no kernel for the ramdisk was found; name one in the configuration (initrd.kernel), or give the ramdisk with --ramdisk",
            ),
        };
    };
    let kernel = below(root, kernel);
    let image = std::fs::read(&kernel).with_context(|| format!("cannot read the kernel {}", kernel.display()))?;
    let version = release_in_header(&image).with_context(|| {
        format!(
            "{} is no kernel; correct initrd.kernel in the configuration",
            kernel.display()
        )
    })?;
    Ok((kernel, below(root, Path::new("/lib/modules")).join(version)))
}

/// What the builder cannot know: which options and packages help.
fn check(options: &RamdiskOptions) -> anyhow::Result<()> {
    if options.classes.is_empty() {
        bail!(
            "the list `modules` in the configuration is empty: such a ramdisk could drive nothing; use `modules: [default]`"
        );
    }
    let debug = options.classes.iter().any(|class| class == DEBUG);
    if let Some(busybox) = options.busybox.as_ref().filter(|busybox| debug && !busybox.is_file()) {
        bail!(
            "a debug image needs a static busybox, and {} is not there; install the package busybox-static, or name another with --busybox",
            busybox.display()
        );
    }
    Ok(())
}

fn with_next_step(error: RamdiskError) -> anyhow::Error {
    let denied = matches!(&error, RamdiskError::Write { source, .. } if source.kind() == ErrorKind::PermissionDenied);
    let error = anyhow::Error::from(error);
    match denied {
        true => error.context("the ramdisk cannot be put there; be root, or name a folder of your own with --out"),
        false => error,
    }
}

/// Builds, with a progress bar on a terminal.
fn with_progress<T>(
    options: &RamdiskOptions,
    build: impl FnOnce(ramdisk::Progress) -> Result<T, RamdiskError>,
) -> anyhow::Result<T> {
    check(options)?;
    // Draws nothing when standard error is no terminal.
    let bar = ProgressBar::new(0);
    bar.set_style(ProgressStyle::with_template("{msg:24} {wide_bar} {percent:>3} %")?);
    let mut stage = None;
    let built = build(&mut |now, done, total| {
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
    built.map_err(with_next_step)
}

/// What a user may wonder about later.
pub(crate) fn tell_missing_firmware(report: &BuildReport) {
    if !report.missing_firmware.is_empty() {
        eprintln!(
            "note: {} firmware files that drivers may ask for are not on this machine; the adapters that need them will \
             not work (Debian: packages firmware-realtek, firmware-misc-nonfree …)",
            report.missing_firmware.len()
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_may_not_write_there_is_told_of_out() {
        let failed = |kind: ErrorKind| {
            with_next_step(RamdiskError::Write {
                path: "/var/lib/stiefel".into(),
                source: kind.into(),
            })
        };
        let denied = failed(ErrorKind::PermissionDenied);
        assert!(denied.to_string().contains("--out"), "{denied}");
        assert!(format!("{denied:#}").contains("/var/lib/stiefel"), "{denied:#}");
        assert!(!failed(ErrorKind::StorageFull).to_string().contains("--out"));
    }
}
