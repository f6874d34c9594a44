//! `stiefel stick`: the desktop's boot medium.

use std::fs;
use std::io::Read;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use anyhow::{Context, bail};
use indicatif::{ProgressBar, ProgressStyle};
use stiefel_initrd_builder::ramdisk::{KERNEL, Manifest, RAMDISK};
use stiefel_initrd_builder::stick::{self, StickOptions};
use stiefel_initrd_builder::tools::{self, CRYPTSETUP, LVM, Tool};
use stiefel_server::collect;
use stiefel_shared::config::CONFIG_PATH;
use stiefel_shared::cpio;
use stiefel_shared::handover::{ClientHandover, Handover, SecretBytes, TargetHandover, ramdisk_cmdline};
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
    let tools = needed(&handover);
    let unlocks = tools.contains(&CRYPTSETUP);
    let handover = with_tools(&handover.to_cpio()?, &tools)?;
    let options = StickOptions {
        kernel: args.ramdisk.join(KERNEL),
        ramdisk: args.ramdisk.join(RAMDISK),
        handover,
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
    } else if unlocks {
        "holds keys that are good for asking for this laptop's passphrase, and for nothing else: keep it as you keep the laptop, and from others"
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

/// The programs without which this laptop's disk could not be read.
fn needed(handover: &Handover) -> Vec<Tool> {
    let Handover::Search(search) = handover else {
        return Vec::new();
    };
    let Some(layers) = &search.layers else {
        return Vec::new();
    };
    let luks = (!layers.luks.is_empty()).then_some(CRYPTSETUP);
    let lvm = (!layers.physical.is_empty()).then_some(LVM);
    luks.into_iter().chain(lvm).collect()
}

/// The handover, and these programs of the running system behind it.
fn with_tools(handover: &SecretBytes, tools: &[Tool]) -> anyhow::Result<Zeroizing<Vec<u8>>> {
    if tools.is_empty() {
        return Ok(Zeroizing::new(handover.0.clone()));
    }
    let programs = tools::archive(tools)?;
    // Large enough from the start: a growing vector would leave copies of the keys behind.
    let mut all = Zeroizing::new(Vec::with_capacity(handover.0.len() + programs.len() + 4));
    all.extend_from_slice(&handover.0);
    cpio::pad_to(&mut *all, handover.0.len() as u64, 4)?;
    all.extend_from_slice(&programs);
    Ok(all)
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
            "there is no key {}; make one with `stiefel key new {stem}` (to borrow disks: copy the lender's there), or name its file with --key",
            path.display()
        )
    })?;
    let mut content = Zeroizing::new(Vec::with_capacity(usize::try_from(key::MAX_KEY_FILE)? + 1));
    file.take(key::MAX_KEY_FILE + 1)
        .read_to_end(&mut content)
        .with_context(|| format!("cannot read the key {}", path.display()))?;
    Ok(StickKey::parse(stem, &content)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use stiefel_shared::handover::{DiskIdentity, Layers, Luks, SearchHandover};

    fn search(layers: Option<Layers>) -> Handover {
        Handover::Search(Box::new(SearchHandover {
            hostname: "laptop".into(),
            disk: DiskIdentity::default(),
            mounts: Vec::new(),
            wireguard: true,
            nvme_target: false,
            layers,
        }))
    }

    fn layers(luks: &[u32], physical: &[u32]) -> Layers {
        let luks = luks.iter().map(|partition| Luks {
            partition: *partition,
            label: "x".into(),
        });
        Layers {
            luks: luks.collect(),
            physical: physical.to_vec(),
            keys: Vec::new(),
            tickets: Vec::new(),
        }
    }

    #[test]
    fn a_laptop_without_luks_and_lvm_has_the_same_stick_as_before_there_were_any() {
        let plain = search(None);
        assert_eq!(needed(&plain), []);
        let handover = plain.to_cpio().unwrap();
        assert_eq!(*with_tools(&handover, &[]).unwrap(), handover.0);
        let json = plain.to_json().unwrap();
        let expected = r#"{"role":"search","hostname":"laptop","disk":{"gpt_guid":null,"wwid":null,"serial":null,"model":null,"size":0},"mounts":[],"wireguard":true,"nvme_target":false}"#;
        assert_eq!(String::from_utf8_lossy(&json.0), expected);
    }

    #[test]
    fn what_opens_the_disk_comes_along_and_nothing_else() {
        for (luks, physical, expected) in [
            (&[3][..], &[][..], &[CRYPTSETUP][..]),
            (&[3], &[3], &[CRYPTSETUP, LVM]),
            (&[], &[3], &[LVM]),
        ] {
            assert_eq!(needed(&search(Some(layers(luks, physical)))), expected);
        }
    }
}
