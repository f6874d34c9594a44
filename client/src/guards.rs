//! What the keeper writes into the payload's /run: guards against network managers, and the shutdown program.
//!
//! Everything is below /run, so nothing of it outlives the session. The folder is an argument, so that tests use a
//! temporary one.

use std::fs::File;
use std::io::{self, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::Context;
use stiefel_shared::bundle::AttachSession;
use stiefel_shared::config::Mac;
use stiefel_shared::handover::{LinkMode, SecretBytes};
use stiefel_sys::mount::{self, MountFlags};

use crate::goodbye;
use crate::link::{NIC, TUNNEL};

/// A guard that could not be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot write {}: {source}; the link may be reconfigured", path.display())]
pub struct GuardError {
    path: PathBuf,
    source: io::Error,
}

/// Writes the guards below `run`; tries all, and returns what failed. `device` is the disk's name, such as `nbd0`.
pub(crate) fn write(run: &Path, session: &AttachSession, device: &str) -> Vec<GuardError> {
    let mac = Mac(session.link_mac);
    let disk = &session.disk.identity;
    let mut files = vec![
        (NETWORK_MANAGER, {
            // In a LAN the NIC is the system's, and only the tunnel ours.
            let nic = match session.link.mode {
                LinkMode::Dedicated => vec![format!("interface-name:{NIC}"), format!("mac:{mac}")],
                LinkMode::Lan => Vec::new(),
            };
            let devices = [vec![format!("interface-name:{TUNNEL}")], nic].concat();
            format!(
                "# Written by stiefel: the root file system comes over this NIC.\n\
                     [keyfile]\nunmanaged-devices+={}\n\
                     [device-stiefel-session]\nmatch-device={}\nmanaged=0\n",
                devices.join(";"),
                devices.join(",")
            )
        }),
        (
            "systemd/network/00-stiefel-tunnel.network",
            format!("# Written by stiefel.\n[Match]\nName={TUNNEL}\n[Link]\nUnmanaged=yes\n"),
        ),
        (
            "udev/rules.d/61-stiefel.rules",
            by_id_rules(
                device,
                disk.model.as_deref(),
                disk.serial.as_deref(),
                disk.wwid.as_deref(),
            ),
        ),
    ];
    files.extend(units());
    if session.link.mode == LinkMode::Dedicated {
        files.push((
            "systemd/network/00-stiefel.network",
            format!(
                "# Written by stiefel: the root file system comes over this NIC.\n\
                 [Match]\nMACAddress={mac}\n[Link]\nUnmanaged=yes\n"
            ),
        ));
        files.push((
            "systemd/network/00-stiefel.link",
            format!("# Written by stiefel.\n[Match]\nMACAddress={mac}\n[Link]\nNamePolicy=\nName={NIC}\n"),
        ));
    }
    let mut failed: Vec<GuardError> = files
        .into_iter()
        .filter_map(|(name, text)| write_file(&run.join(name), &text).err())
        .collect();
    failed.extend(write_link(&run.join(RUNNING_WANTED), "../stiefel-running.service").err());
    failed.extend(write_link(&run.join(FIRMWARE_WANTED), "../stiefel-firmware.service").err());
    failed
}

/// Not the name of what `stiefel install` has put into the laptop's /etc: of two files with one name NetworkManager reads
/// only the one in /etc (NetworkManager.conf(5)).
const NETWORK_MANAGER: &str = "NetworkManager/conf.d/95-stiefel-session.conf";
/// Units of ours, and others that are masked.
fn units() -> [(&'static str, String); 5] {
    [
        (RUNNING_UNIT, running_unit()),
        (FIRMWARE_UNIT, firmware_unit()),
        // Their shutdown programs (dracut's, mkinitcpio's, Ubuntu's finalrd) would take the place of ours, which does their
        // job, too. An empty unit file is a masked one: systemd.unit(5).
        ("systemd/system.control/dracut-shutdown.service", String::new()),
        (
            "systemd/system.control/mkinitcpio-generate-shutdown-ramfs.service",
            String::new(),
        ),
        ("systemd/system.control/finalrd.service", String::new()),
    ]
}

/// A unit that runs as long as the system does. (Units lie in `system.control`: where there is a folder `systemd/system`,
/// programs believe that systemd runs, sd_booted(3).)
const RUNNING_UNIT: &str = "systemd/system.control/stiefel-running.service";
/// Who starts it.
const RUNNING_WANTED: &str = "systemd/system.control/basic.target.wants/stiefel-running.service";
/// What is there, in /run, while it runs.
pub(crate) const RUNNING: &str = "stiefel-running";

/// systemd itself removes the unit's folder at the beginning of a shutdown, without reading anything from the disk: so
/// the keeper hears of a shutdown even when nothing else can be started any more.
fn running_unit() -> String {
    format!(
        "# Written by stiefel.\n\
         [Unit]\nDescription=Lets stiefel's keeper see that the system goes down\n\
         # Has systemd read these now: it could not when the disk is gone.\n\
         Before=poweroff.target reboot.target halt.target kexec.target\n\
         IgnoreOnIsolate=yes\nConditionPathExists=!/etc/initrd-release\n\
         [Service]\nType=oneshot\nRemainAfterExit=yes\nRuntimeDirectory={RUNNING}\nExecStart=-/bin/sh -c :\n"
    )
}

/// A unit that keeps the system's programs from writing into the desktop's firmware.
const FIRMWARE_UNIT: &str = "systemd/system.control/stiefel-firmware.service";
/// Who starts it.
const FIRMWARE_WANTED: &str = "systemd/system.control/sysinit.target.wants/stiefel-firmware.service";

/// systemd mounts the firmware's variables before it starts any unit. What updates a boot loader (grub-install, bootctl, fwupd)
/// would make an entry for the laptop's disk in the desktop's firmware, and the laptop's would lack it.
fn firmware_unit() -> String {
    "# Written by stiefel.\n\
     [Unit]\nDescription=Protects the desktop's firmware from the laptop's system\n\
     DefaultDependencies=no\nConditionPathExists=!/etc/initrd-release\n\
     ConditionPathIsMountPoint=/sys/firmware/efi/efivars\n\
     # Before the first that may write: a boot counter, a random seed, a token.\n\
     Before=sysinit.target systemd-random-seed.service systemd-boot-random-seed.service \
     systemd-boot-system-token.service systemd-bless-boot.service systemd-pcrphase-sysinit.service\n\
     [Service]\nType=oneshot\nRemainAfterExit=yes\n\
     ExecStart=mount -o remount,ro /sys/firmware/efi/efivars\n"
        .to_owned()
}

fn write_link(path: &Path, target: &str) -> Result<(), GuardError> {
    let failed = |source| GuardError {
        path: path.to_owned(),
        source,
    };
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir).map_err(failed)?;
    }
    std::os::unix::fs::symlink(target, path).map_err(failed)
}

fn write_file(path: &Path, text: &str) -> Result<(), GuardError> {
    let failed = |source| GuardError {
        path: path.to_owned(),
        source,
    };
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir).map_err(failed)?;
    }
    std::fs::write(path, text).map_err(failed)
}

/// An NBD device has no identity of its own, and an NVMe one not that of another bus; these links let fstab, LVM and ZFS
/// find the laptop's disk by its name.
fn by_id_rules(device: &str, model: Option<&str>, serial: Option<&str>, wwid: Option<&str>) -> String {
    let mut rules = String::from("# Written by stiefel: the identity of the laptop's disk.\n");
    let clean = |text: &str| -> String {
        text.chars()
            .map(|c| {
                if c.is_ascii_alphanumeric() || "#+-.:=@_".contains(c) {
                    c
                } else {
                    '_'
                }
            })
            .collect()
    };
    let mut names = Vec::new();
    if let (Some(model), Some(serial)) = (model, serial) {
        // Which of them the laptop's own bus would have made is not known here; a link too many does no harm.
        for bus in ["ata", "nvme", "scsi", "virtio"] {
            names.push(format!("{bus}-{}_{}", clean(model), clean(serial)));
        }
    }
    if let Some(serial) = serial {
        names.push(format!("virtio-{}", clean(serial)));
    }
    if let Some(wwid) = wwid {
        names.push(format!(
            "wwn-0x{}",
            clean(wwid.trim_start_matches("naa.").trim_start_matches("0x"))
        ));
        names.push(format!("nvme-{}", clean(wwid)));
    }
    for name in names {
        rules += &format!("SUBSYSTEM==\"block\", KERNEL==\"{device}\", SYMLINK+=\"disk/by-id/{name}\"\n");
        rules += &format!("SUBSYSTEM==\"block\", KERNEL==\"{device}p*\", SYMLINK+=\"disk/by-id/{name}-part%n\"\n");
    }
    rules
}

/// Makes `run/initramfs`, which systemd pivots to at the end of a shutdown: a file system of its own, because /run may
/// be mounted noexec. The empty `bin/sh` keeps dracut from unpacking its own over it.
///
/// # Errors
/// When the folder cannot be mounted or filled; the shutdown then goes without a goodbye.
pub(crate) fn put_shutdown_program(run: &Path, program: &File, session: &SecretBytes) -> anyhow::Result<()> {
    let dir = run.join("initramfs");
    mount::make_dir_all(&dir, 0o755)?;
    mount::mount(
        "stiefel",
        &dir,
        "tmpfs",
        MountFlags::NOSUID | MountFlags::NODEV,
        Some("mode=0755,size=64M"),
    )?;
    let create = |name: &str, mode: u32| {
        File::options()
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(dir.join(name))
            .with_context(|| format!("cannot create {name} in {}", dir.display()))
    };
    mount::make_dir_all(&dir.join("bin"), 0o755)?;
    create("bin/sh", 0o755)?;
    mount::make_dir_all(&dir.join(goodbye::LOOK_AT), 0o700)?;
    create("session.json", 0o600)?.write_all(&session.0)?;
    let mut source = program.try_clone()?;
    source.rewind()?;
    io::copy(&mut source, &mut create("shutdown", 0o755)?).context("cannot copy our own program")?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use stiefel_shared::bundle::{ControlKey, DiskOffer, LinkOffer, Transport};
    use stiefel_shared::handover::DiskIdentity;

    fn session() -> AttachSession {
        AttachSession {
            hostname: "laptop".to_owned(),
            version: "6.1".to_owned(),
            link_mac: [2, 0, 0, 0, 0, 0x1f],
            laptop: std::net::Ipv6Addr::LOCALHOST,
            http_port: 1,
            disk: DiskOffer {
                identity: DiskIdentity {
                    model: Some("Fast \"SSD\" 1".to_owned()),
                    serial: Some("S/1".to_owned()),
                    ..DiskIdentity::default()
                },
                logical_block_size: 512,
                transport: Transport::Nbd {
                    port: 1,
                    export: "secret-export".to_owned(),
                },
                guest: false,
            },
            link: LinkOffer {
                mode: LinkMode::Dedicated,
                address: std::net::Ipv6Addr::LOCALHOST,
                laptop: std::net::Ipv6Addr::LOCALHOST,
                grace: 900,
                tunnel: None,
            },
            control: ControlKey([0x5a; 32]),
            session: "name".to_owned(),
            boot: None,
        }
    }

    #[test]
    fn guards_name_the_link_by_address_and_hold_no_secret() {
        let run = tempfile::tempdir().unwrap();
        assert!(write(run.path(), &session(), "nbd0").is_empty());
        let nm = std::fs::read_to_string(run.path().join(NETWORK_MANAGER)).unwrap();
        assert!(nm.contains("mac:02:00:00:00:00:1f"), "{nm}");
        let rules = std::fs::read_to_string(run.path().join("udev/rules.d/61-stiefel.rules")).unwrap();
        assert!(rules.contains("disk/by-id/nvme-Fast__SSD__1_S_1\""), "{rules}");
        for text in [nm, rules] {
            assert!(!text.contains("secret-export") && !text.contains("5a5a"));
        }
    }

    #[test]
    fn the_guard_of_the_installed_system_does_not_hide_the_sessions() {
        let name = Path::new(NETWORK_MANAGER).file_name().unwrap();
        let installed = Path::new(env!("CARGO_MANIFEST_DIR")).join("../hooks/networkmanager");
        assert!(installed.is_dir() && !installed.join(name).exists());
        let run = tempfile::tempdir().unwrap();
        write(run.path(), &session(), "nbd0");
        let nm = std::fs::read_to_string(run.path().join(NETWORK_MANAGER)).unwrap();
        // A section of the same name in both files would be one section.
        assert!(!nm.contains("[device-stiefel]"), "{nm}");
    }

    #[test]
    fn in_a_lan_the_nic_stays_the_systems() {
        let run = tempfile::tempdir().unwrap();
        let mut session = session();
        session.link.mode = LinkMode::Lan;
        assert!(write(run.path(), &session, "nbd0").is_empty());
        let nm = std::fs::read_to_string(run.path().join(NETWORK_MANAGER)).unwrap();
        assert!(nm.contains("interface-name:stiefel0") && !nm.contains("mac:"), "{nm}");
        assert!(!run.path().join("systemd/network/00-stiefel.link").exists());
    }

    #[test]
    fn other_shutdown_programs_are_masked_by_empty_units() {
        let run = tempfile::tempdir().unwrap();
        write(run.path(), &session(), "nbd0");
        for unit in [
            "dracut-shutdown.service",
            "mkinitcpio-generate-shutdown-ramfs.service",
            "finalrd.service",
        ] {
            let unit = run.path().join("systemd/system.control").join(unit);
            assert_eq!(unit.metadata().unwrap().len(), 0, "{}", unit.display());
        }
    }

    #[test]
    fn the_firmwares_variables_become_read_only_before_anything_could_write_them() {
        let run = tempfile::tempdir().unwrap();
        assert!(write(run.path(), &session(), "nbd0").is_empty());
        let unit = std::fs::read_to_string(run.path().join(FIRMWARE_UNIT)).unwrap();
        for line in [
            "ExecStart=mount -o remount,ro /sys/firmware/efi/efivars",
            "ConditionPathIsMountPoint=/sys/firmware/efi/efivars",
            "DefaultDependencies=no",
        ] {
            assert!(unit.lines().any(|found| found == line), "{line}: {unit}");
        }
        assert!(unit.lines().any(|line| line.starts_with("Before=sysinit.target ")));
        // The link leads to the unit.
        let wanted = std::fs::read_to_string(run.path().join(FIRMWARE_WANTED)).unwrap();
        assert_eq!(wanted, unit);
    }

    #[test]
    fn a_guard_that_cannot_be_written_is_reported_and_the_others_are_written() {
        let run = tempfile::tempdir().unwrap();
        std::fs::write(run.path().join("systemd"), b"a file in the way").unwrap();
        let failed = write(run.path(), &session(), "nbd0");
        assert_eq!(failed.len(), 10);
        assert!(run.path().join("udev/rules.d/61-stiefel.rules").exists());
    }
}
