//! `stiefel target --reboot`: leaves the installed system by kexec into the ramdisk, which then lends all of this machine's disks.
//!
//! As `autokexec::leave` does it (always by kexec, whatever `trigger.method` is), with the same guards and the same way into the ramdisk; what it is told is a
//! [`TargetHandover`] with the keys, which is read by [`super::run_role`]. Refused: disks that could not be told apart after the
//! start.

use std::fmt::Write as _;
use std::path::Path;

use stiefel_shared::config::{Config, Method};
use stiefel_shared::handover::{TargetHandover, WritableDisk, ramdisk_cmdline};
use stiefel_shared::key::StickKey;

use super::names::Names;
use super::pick::{self, Survey};
use super::share::Source;
use super::{Writable, grant};
use crate::autokexec::leave::{self, LeaveError};
use crate::collect::{TargetImage, hostname, image_for_target};
use crate::tree::Tree;

/// Where the laptop is not left by kexec otherwise.
const BY_KEXEC: &str = "\nNote: the configuration has `trigger.method: reboot`, but this leaves by kexec. If the screen stays dark, switch this machine \
    off and on: it starts its own system.";

/// Everything that is needed to leave.
pub struct Reboot {
    image: TargetImage,
    cmdline: String,
    words: String,
}

/// What the machine is to lend.
#[derive(Debug, Clone, Default)]
pub struct RebootOptions {
    /// Who may borrow; counts without `open`.
    pub keys: Vec<StickKey>,
    /// Everybody may, in clear.
    pub open: bool,
    /// Disks that may be written.
    pub writable: Vec<Writable>,
    /// All others, too, but what is written is thrown away.
    pub snapshot: bool,
}

impl Reboot {
    /// Looks whether it can be done, and prepares it; nothing is changed yet.
    ///
    /// # Errors
    /// The guards speak against it, a disk is not there, or the ramdisk cannot be used.
    pub fn prepare(config: &Config, options: RebootOptions) -> anyhow::Result<Self> {
        let root = Path::new("/");
        guard(root, config)?;
        let survey = pick::survey(root)?;
        let mut handover = handover(options, &survey)?;
        handover.hostname = Some(hostname(&Tree::new(root)));
        let mut words = words(&handover, &survey);
        if config.trigger.method == Method::Reboot {
            words += BY_KEXEC;
        }
        Ok(Self {
            words,
            image: image_for_target(root, &handover)?,
            cmdline: ramdisk_cmdline(&config.initrd.cmdline.to_string()),
        })
    }

    /// What will happen.
    #[must_use]
    pub fn words(&self) -> &str {
        &self.words
    }

    /// Leaves the system. When it returns `Ok`, the shutdown has begun.
    ///
    /// # Errors
    /// As of `stiefel serve`; the system goes on as if nothing had been.
    pub fn leave(self, config: &Config) -> anyhow::Result<()> {
        let kernel = leave::kernel(&self.image.kernel)?;
        // Whoever was asked may have taken their time.
        guard(Path::new("/"), config)?;
        Ok(leave::kexec_into(&kernel, self.image.initrd, &self.cmdline)?)
    }
}

/// Asks the guards of the way that is taken here, not of the configured one.
fn guard(root: &Path, config: &Config) -> Result<(), LeaveError> {
    leave::guard_by(root, config, Method::Kexec)
}

fn handover(options: RebootOptions, survey: &Survey) -> anyhow::Result<TargetHandover> {
    let RebootOptions {
        keys,
        open,
        writable,
        snapshot,
    } = options;
    let mut read_write = Vec::new();
    for Writable { disk, host, .. } in writable {
        anyhow::ensure!(
            host.is_none(),
            "--read-write {disk}: a host's NQN does not go along with --reboot; name the disk alone, it is written by NBD, or with a key"
        );
        read_write.push(grant::lasting(&disk, survey)?);
    }
    Ok(TargetHandover {
        keys: if open { Vec::new() } else { keys },
        open,
        read_write,
        snapshot,
        hostname: None,
    })
}

fn words(handover: &TargetHandover, survey: &Survey) -> String {
    let mut text = String::new();
    // Writing to a String cannot fail.
    let _ = writeln!(
        text,
        "This ends all programs and leaves the system. Then this machine lends:"
    );
    for found in &survey.disks {
        let names = Names::of(
            "",
            &Source::Disk(found.disk.clone()),
            // Of twins the second one is shown with the kernel's name; it has the same one in the ramdisk in most cases.
            &|_| false,
        );
        let is_named = |named: &WritableDisk| named.name == names.key && named.size == Some(found.disk.size);
        let mode = match (handover.read_write.iter().any(is_named), handover.snapshot) {
            (true, _) => "READ-WRITE",
            (false, true) => "snapshot, writes are thrown away",
            (false, false) => "read-only",
        };
        let (path, size) = (found.disk.path.display(), found.disk.size >> 20);
        let _ = writeln!(text, "  {} ({path}, {size} MiB): {mode}", names.key);
    }
    let to = match handover.open {
        true => "EVERYBODY who can reach it, in clear".to_owned(),
        false => {
            let names: Vec<&str> = handover.keys.iter().map(|key| key.name.as_str()).collect();
            format!("the holders of these keys, encrypted: {}", names.join(", "))
        }
    };
    let _ = write!(
        text,
        "to {to}. q on its keyboard ends that, and starts this system again."
    );
    text
}

#[cfg(test)]
mod tests {
    use super::super::pick::fake::Machine;
    use super::*;
    use std::fs;

    /// sda with a serial number, sdb without.
    fn survey() -> Survey {
        let machine = Machine::new(&[("sda", "8:0", &[]), ("sdb", "8:16", &[])], "", "");
        fs::write(machine.root().join("sys/block/sda/serial"), "A1").unwrap();
        machine.survey()
    }

    fn options(writable: &str) -> RebootOptions {
        RebootOptions {
            keys: vec![StickKey::generate("stick").unwrap()],
            writable: vec![writable.parse().unwrap()],
            ..RebootOptions::default()
        }
    }

    #[test]
    fn the_handover_names_disks_as_they_are_called_after_the_start() {
        let survey = survey();
        let handover = handover(options("sda"), &survey).unwrap();
        let named = WritableDisk {
            name: "a1".to_owned(),
            size: Some(1 << 20),
        };
        assert_eq!(handover.read_write, [named]);
        assert_eq!(handover.keys.len(), 1);
        let said = words(&handover, &survey);
        assert!(said.contains("a1 (/dev/sda, 1 MiB): READ-WRITE"), "{said}");
        assert!(
            said.contains("sdb (/dev/sdb, 1 MiB): read-only") && said.contains("keys, encrypted: stick"),
            "{said}"
        );
    }

    #[test]
    fn where_no_kernel_is_started_by_kexec_it_is_refused_whatever_way_is_configured() {
        let root = tempfile::tempdir().unwrap();
        let sysctl = root.path().join("proc/sys/kernel");
        fs::create_dir_all(&sysctl).unwrap();
        fs::write(sysctl.join("kexec_load_disabled"), "1\n").unwrap();
        for method in [Method::Kexec, Method::Reboot] {
            let mut config = Config::default();
            config.trigger.method = method;
            let error = guard(root.path(), &config).unwrap_err();
            assert!(error.to_string().contains("kexec_load_disabled"), "{method:?}: {error}");
        }
    }

    #[test]
    fn what_could_be_another_disk_after_the_start_is_refused() {
        assert!(handover(options("sdb"), &survey()).is_err());
        assert!(handover(options("sdc"), &survey()).is_err());
        assert!(handover(options("sda=nqn.2014-08.org.x"), &survey()).is_err());
    }

    #[test]
    fn no_key_goes_along_where_everybody_may() {
        let open = RebootOptions {
            open: true,
            snapshot: true,
            ..options("sda")
        };
        let survey = survey();
        let handover = handover(open, &survey).unwrap();
        assert!(handover.keys.is_empty());
        let said = words(&handover, &survey);
        assert!(said.contains("EVERYBODY") && said.contains("thrown away"), "{said}");
    }
}
