//! `stiefel stick`: the desktop's boot medium.

use std::fs;
use std::io::Read;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use anyhow::{Context, bail};
use indicatif::{ProgressBar, ProgressStyle};
use stiefel_initrd_builder::ramdisk::{KERNEL, Manifest, RAMDISK};
use stiefel_initrd_builder::stick::{self, StickOptions};
use stiefel_server::collect;
use stiefel_shared::config::CONFIG_PATH;
use stiefel_shared::handover::{ClientHandover, Handover, TargetHandover, ramdisk_cmdline};
use stiefel_shared::key::{self, StickKey};
use zeroize::Zeroizing;

use super::{ask, config_or_default, mebibytes};
use crate::cli::StickArgs;

/// Where keys are looked for by name.
const KEYS: &str = "/etc/stiefel/keys";

/// Writes a file, or after asking a device.
pub(crate) fn stick(path: Option<&Path>, args: &StickArgs) -> anyhow::Result<()> {
    let target = &args.target;
    let is_device = fs::metadata(target).is_ok_and(|meta| meta.file_type().is_block_device());
    if !is_device {
        stick::check_image_path(target, args.overwrite)?;
    }
    let config = config_or_default(path)?;
    let manifest = Manifest::load(&args.ramdisk)
        .context("there is no ramdisk to put on the stick; run `stiefel build`, or name its folder with --ramdisk")?;
    manifest.verify(&args.ramdisk)?;
    let handover = if args.laptop {
        // Read anew at each start, from the disk: another one would count once only.
        if path.is_some_and(|path| path != Path::new(CONFIG_PATH)) {
            bail!("a laptop that is started from its stick goes by {CONFIG_PATH} on its disk: leave --config out");
        }
        Handover::Search(Box::new(collect::search(Path::new("/"), &config, &manifest)?))
    } else {
        handover(args)?
    };
    let handover = handover.to_cpio()?;
    let options = StickOptions {
        kernel: args.ramdisk.join(KERNEL),
        ramdisk: args.ramdisk.join(RAMDISK),
        handover: Zeroizing::new(handover.0.clone()),
        cmdline: ramdisk_cmdline(&format!("{} {}", config.initrd.cmdline, args.cmdline)),
        stub: args.stub.clone(),
    };
    let bar = ProgressBar::new(0);
    bar.set_style(ProgressStyle::with_template(
        "writing {wide_bar} {bytes}/{total_bytes}",
    )?);
    let mut progress = |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    };
    let report = if is_device {
        let info = stick::describe(target)?;
        info.check(args.allow_fixed)?;
        eprintln!("{info}");
        if !args.yes && !ask("All of it is lost. Write the stick?")? {
            bail!("nothing was written");
        }
        stick::write_device(&options, &info, args.allow_fixed, &mut progress)?
    } else if target.extension().is_some_and(|end| end.eq_ignore_ascii_case("efi")) {
        stick::write_program(&options, target, args.overwrite, &mut progress)?
    } else {
        stick::write_image(&options, target, args.overwrite, &mut progress)?
    };
    bar.finish_and_clear();
    let note = if args.open {
        "lends all disks to everybody: keep it from others"
    } else if args.laptop {
        "holds no key: the laptop's keys are read from its disk"
    } else {
        "holds a key: keep it as you keep the laptop"
    };
    eprintln!("{}: {}, {note}", target.display(), mebibytes(report.bytes));
    if report.exposed && !args.open {
        eprintln!(
            "stiefel: WARNING: other users of this system can read {}, and the key in it: its file system keeps no owner and mode. Mount it \
             with umask=0077",
            target.display()
        );
    }
    Ok(())
}

/// What the ramdisk is to be.
fn handover(args: &StickArgs) -> anyhow::Result<Handover> {
    if !args.target_mode {
        return Ok(Handover::Client(ClientHandover {
            key: read_key(&args.key)?,
            encrypted_only: args.encrypted_only,
        }));
    }
    let keys = match args.open {
        true => Vec::new(),
        false => vec![read_key(&args.key)?],
    };
    Ok(Handover::Target(TargetHandover {
        keys,
        open: args.open,
        read_write: args.read_write.clone(),
        snapshot: args.snapshot,
        hostname: None,
    }))
}

/// A key by its name, or from a file.
pub(super) fn read_key(name: &str) -> anyhow::Result<StickKey> {
    let path = if name.contains('/') {
        name.into()
    } else {
        Path::new(KEYS).join(format!("{name}.key"))
    };
    let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
    key::check_name(stem)?;
    let file = fs::File::open(&path).with_context(|| {
        format!(
            "there is no key {}; make one with `stiefel key new {stem}`, or name its file with --key",
            path.display()
        )
    })?;
    let mut content = Zeroizing::new(Vec::with_capacity(usize::try_from(key::MAX_KEY_FILE)? + 1));
    file.take(key::MAX_KEY_FILE + 1)
        .read_to_end(&mut content)
        .with_context(|| format!("cannot read the key {}", path.display()))?;
    Ok(StickKey::parse(stem, &content)?)
}
