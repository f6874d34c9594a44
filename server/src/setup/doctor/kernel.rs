//! Whether the kernels can do what a session needs: start another, carry the disk, drive the adapters.

use std::path::{Path, PathBuf};

use stiefel_initrd_builder::modules::{FIRMWARE_DIRS, ModuleTree, Selection};
use stiefel_initrd_builder::ramdisk::KERNEL;
use stiefel_shared::config::{Auto, Method};
use stiefel_shared::handover::{DiskTransport, Encryption};
use stiefel_shared::kernel::release_in_header;

use super::super::Package;
use super::source::explain;
use super::{Finding, Level, Patient};
use crate::collect::STATE_DIR;
use crate::guards::{self, Refusal};
use crate::reboot::{self, Left};

/// How many names of files are told.
const NAMED: usize = 3;

/// Whether the running kernel starts the ramdisk's.
pub(super) fn kexec(patient: &Patient) -> Vec<Finding> {
    const CHECK: &str = "kexec";
    let tree = &patient.tree;
    if !tree.path("/sys/kernel").exists() {
        return vec![Finding::warning(
            CHECK,
            "cannot be told: no system runs in this tree",
            "run `stiefel doctor` on the laptop itself",
        )];
    }
    let kernel = ramdisk_kernel(patient);
    let refusal = guards::kexec::check(tree, &kernel);
    if patient.config.trigger.method == Method::Reboot {
        return vec![by_reboot(patient, refusal.is_none())];
    }
    let found = match refusal {
        Some(Refusal::NoKexec { why, next }) => {
            Finding::failure(CHECK, format!("this kernel starts no other: {why}"), {
                let file = why
                    .contains("kexec_load_disabled")
                    .then(|| sysctl_file(patient))
                    .flatten();
                let mends = file.map_or_else(
                    || next.to_owned(),
                    |file| format!("sed -i '/kexec_load_disabled/d' {file} && reboot"),
                );
                match reboot::check(tree) {
                    Ok(()) => format!("{mends}; or set trigger.method to reboot in config.yaml, then: stiefel install"),
                    Err(_) => mends,
                }
            })
        }
        Some(other) => Finding::failure(CHECK, other.to_string(), "see above"),
        None => {
            let firmware = &patient.machine.firmware;
            let secure = match firmware.secure_boot {
                Some(true) => "Secure Boot is on",
                Some(false) => "Secure Boot is off",
                None => "no Secure Boot",
            };
            let locked = firmware.lockdown.as_deref().is_some_and(|lockdown| lockdown != "none");
            let signed = if locked {
                "; it is locked down, and the ramdisk's kernel is signed"
            } else {
                ""
            };
            Finding::ok(CHECK, format!("this kernel may start another ({secure}){signed}"))
        }
    };
    vec![found]
}

/// Whether the firmware can be told to start the ramdisk (`trigger.method: reboot`).
fn by_reboot(patient: &Patient, kexec_works: bool) -> Finding {
    const CHECK: &str = "reboot";
    let reaches = |()| match (patient.machine.root.disks.as_slice(), &patient.payload) {
        // What else there may be is told by the checks of disk and payload.
        ([disk], Ok(payload)) if patient.config.boot.disk.given().is_none() => {
            reboot::reaches(&patient.tree, disk, payload)
        }
        _ => Ok(()),
    };
    match reboot::check(&patient.tree).and_then(reaches) {
        Ok(()) => {
            let quicker = match kexec_works {
                true => "; kexec would be quicker, if the adapters work after it",
                false => "",
            };
            Finding::ok(
                CHECK,
                format!(
                    "the firmware can start the ramdisk once; `stiefel serve --dry-run` tries all but that{quicker}"
                ),
            )
        }
        Err(error) => {
            let (what, next) = explain(&error);
            Finding::failure(
                CHECK,
                what,
                next.unwrap_or_else(|| "stiefel serve --dry-run".to_owned()),
            )
        }
    }
}

/// Whether a one-time image of an earlier trigger lies about.
pub(super) fn leftover(patient: &Patient) -> Vec<Finding> {
    const CHECK: &str = "reboot";
    match reboot::look(&patient.tree) {
        Left::Nothing => Vec::new(),
        Left::Image(path) => vec![Finding::warning(
            CHECK,
            format!(
                "the firmware has not started the one-time image {}, or it failed early; it holds keys",
                path.display()
            ),
            "stiefel install",
        )],
        Left::Unseen(point) => vec![Finding::warning(
            CHECK,
            format!(
                "a one-time image may be on the EFI system partition, which is not mounted at {point}; it would hold keys"
            ),
            "mount it, then: stiefel install",
        )],
    }
}

/// The kernel that is started, or will be once the ramdisk is built.
fn ramdisk_kernel(patient: &Patient) -> PathBuf {
    let tree = &patient.tree;
    let built = tree.path(STATE_DIR).join(KERNEL);
    let release = patient.machine.release.as_deref().unwrap_or_default();
    let usual = [
        format!("/boot/vmlinuz-{release}"),
        format!("/usr/lib/modules/{release}/vmlinuz"),
    ];
    let given = patient.config.initrd.kernel.given().map(|path| tree.path(path));
    let candidates = [built.clone()].into_iter().chain(given);
    candidates
        .chain(usual.iter().map(|path| tree.path(path)))
        .find(|path| path.is_file())
        .unwrap_or(built)
}

/// The file that forbids kexec.
fn sysctl_file(patient: &Patient) -> Option<String> {
    let folders = ["/etc/sysctl.d", "/run/sysctl.d", "/usr/lib/sysctl.d"];
    let named = |folder: &&str| {
        let names = patient.tree.names(folder).into_iter();
        names.map(|name| format!("{folder}/{name}")).collect::<Vec<_>>()
    };
    let files = folders.iter().flat_map(named).chain(["/etc/sysctl.conf".to_owned()]);
    files.into_iter().find(|file| {
        let text = patient.tree.text(file).unwrap_or_default();
        text.lines()
            .any(|line| line.trim_start().starts_with(['k', '-']) && line.contains("kexec_load_disabled"))
    })
}

/// A module, and what follows without it.
type Need<'a> = (&'a str, Level, &'a str);

/// Whether the kernels have the modules: that of the desktop, and that of the ramdisk.
pub(super) fn modules(patient: &Patient) -> Vec<Finding> {
    let tunnel = match patient.config.link.encryption {
        Encryption::Wireguard => Some(("wireguard", Level::Failure, "link.encryption needs it")),
        Encryption::None => None,
    };
    let slow = match patient.config.disk.transport {
        Auto::Given(DiskTransport::NvmeTcp) => Some((Level::Failure, "disk.transport names it")),
        Auto::Auto => Some((Level::Warning, "NBD is used instead, which is slower")),
        Auto::Given(DiskTransport::Nbd) => None,
    };
    let nvme = |module| slow.map(|(level, why)| (module, level, why));
    let mut findings = Vec::new();
    if let Ok(payload) = &patient.payload {
        let nbd = ("nbd", Level::Failure, "the desktop cannot have its disk without it");
        let needs: Vec<Need<'_>> = [Some(nbd), nvme("nvme_tcp"), tunnel].into_iter().flatten().collect();
        findings.extend(kernel(
            patient,
            &payload.modules,
            &payload.version,
            "for the desktop",
            &needs,
        ));
    }
    if let Some(release) = ramdisk_release(patient) {
        let needs: Vec<Need<'_>> = [nvme("nvmet_tcp"), tunnel].into_iter().flatten().collect();
        let folder = patient.tree.path(format!("/lib/modules/{release}"));
        findings.extend(kernel(patient, &folder, &release, "for the ramdisk", &needs));
        findings.extend(adapters(patient, &folder, &release));
    }
    findings
}

/// The release of the kernel that the ramdisk is, or would be, built for.
fn ramdisk_release(patient: &Patient) -> Option<String> {
    match patient.config.initrd.kernel.given() {
        None => patient.machine.release.clone(),
        Some(path) => {
            let mut head = Vec::new();
            let file = std::fs::File::open(patient.tree.path(path)).ok()?;
            std::io::Read::read_to_end(&mut std::io::Read::take(file, stiefel_shared::kernel::HEAD), &mut head).ok()?;
            release_in_header(&head)
        }
    }
}

fn kernel(patient: &Patient, folder: &Path, release: &str, which: &str, needs: &[Need<'_>]) -> Vec<Finding> {
    const CHECK: &str = "modules";
    let command = patient.machine.distribution.command(Package::Modules(release));
    let modules = match ModuleTree::open(folder) {
        Ok(modules) => modules,
        Err(error) => {
            return vec![Finding::failure(
                CHECK,
                format!("the modules of the kernel {release} {which} are not there ({error})"),
                format!("reboot, if the kernel was upgraded since the start; else: {command}"),
            )];
        }
    };
    let (there, missing): (Vec<&Need<'_>>, Vec<&Need<'_>>) =
        needs.iter().partition(|(module, ..)| modules.offers(module));
    if missing.is_empty() {
        let names: Vec<_> = there.iter().map(|(module, ..)| module.replace('_', "-")).collect();
        return vec![Finding::ok(
            CHECK,
            format!("the kernel {release} {which} has {}", names.join(", ")),
        )];
    }
    let finding = |&&(module, level, why): &&Need<'_>| {
        let text = format!(
            "the kernel {release} {which} has no {}: {why}",
            module.replace('_', "-")
        );
        Finding::of(level, CHECK, text, command.clone())
    };
    missing.iter().map(finding).collect()
}

/// Whether the ramdisk drives the laptop's wired adapters.
fn adapters(patient: &Patient, folder: &Path, release: &str) -> Vec<Finding> {
    const CHECK: &str = "modules";
    let Ok(modules) = ModuleTree::open(folder) else {
        return Vec::new();
    };
    let selection = match modules.select(&patient.config.modules.0) {
        Ok(selection) => selection,
        Err(error) => {
            return vec![Finding::failure(
                CHECK,
                error.to_string(),
                "correct `modules` in config.yaml",
            )];
        }
    };
    let missing = missing_drivers(patient, &modules, &selection);
    let finding = |(nic, driver): (String, String)| {
        Finding::of(
            Level::Failure,
            CHECK,
            format!("the ramdisk for kernel {release} would not drive {nic}: its driver {driver} is not in it"),
            format!("add {driver} to `modules` in config.yaml, then: stiefel install"),
        )
    };
    missing.into_iter().map(finding).collect()
}

fn missing_drivers(patient: &Patient, modules: &ModuleTree, selection: &Selection) -> Vec<(String, String)> {
    let drivers = patient
        .machine
        .nics
        .iter()
        .filter_map(|nic| Some((nic.name.clone(), nic.driver.clone()?)));
    drivers
        .filter(|(_, driver)| modules.offers(driver) && !modules.has(selection, driver))
        .collect()
}

/// Whether the adapters' firmware is there.
pub(super) fn firmware(patient: &Patient) -> Vec<Finding> {
    const CHECK: &str = "firmware";
    let Some(release) = ramdisk_release(patient) else {
        return Vec::new();
    };
    let Ok(modules) = ModuleTree::open(&patient.tree.path(format!("/lib/modules/{release}"))) else {
        return Vec::new();
    };
    let folders = FIRMWARE_DIRS.map(|folder| patient.tree.path(folder));
    let mut drivers: Vec<&String> = patient
        .machine
        .nics
        .iter()
        .filter_map(|nic| nic.driver.as_ref())
        .collect();
    drivers.sort();
    drivers.dedup();
    let mut findings = Vec::new();
    for driver in drivers.into_iter().filter(|driver| modules.offers(driver)) {
        let loaded = modules
            .select(&[driver])
            .and_then(|selection| modules.load(&selection, &folders, &mut |_, _| {}));
        findings.push(match loaded {
            Ok(set) if set.missing_firmware.is_empty() => {
                Finding::ok(CHECK, format!("the driver {driver} has all that it may ask for"))
            }
            Ok(set) => {
                let missing: Vec<_> = set.missing_firmware.iter().take(NAMED).cloned().collect();
                let more = set.missing_firmware.len().saturating_sub(NAMED);
                let more = if more > 0 {
                    format!(" and {more} more")
                } else {
                    String::new()
                };
                let first = missing.first().map_or("", String::as_str);
                Finding::warning(
                    CHECK,
                    format!(
                        "the driver {driver} may ask for firmware that is not here: {}{more}",
                        missing.join(", ")
                    ),
                    patient.machine.distribution.command(Package::Firmware(first)),
                )
            }
            Err(error) => Finding::warning(
                CHECK,
                format!("what the driver {driver} asks for cannot be read: {error}"),
                patient.machine.distribution.command(Package::Modules(&release)),
            ),
        });
    }
    findings
}
