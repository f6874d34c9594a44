//! Our own files: configuration, keys, ramdisk.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use stiefel_initrd_builder::ramdisk::Manifest;
use stiefel_shared::config::{Config, MAX_CONFIG};
use stiefel_shared::handover::Encryption;

use super::super::{place, presentable};
use super::source::explain;
use super::{Finding, Patient};
use crate::collect::{self, KEYS_DIR, STATE_DIR};
use crate::tree::Tree;

/// The configuration, or the defaults, and what is to be said of it.
pub(super) fn configuration(tree: &Tree, path: &Path) -> (Config, Finding) {
    const CHECK: &str = "config";
    // As the user knows it: below a root it has the tree's name.
    let shown = path
        .strip_prefix(tree.path("/"))
        .map_or_else(|_| path.to_owned(), |rest| Path::new("/").join(rest));
    let shown = shown.display();
    let text = match place::read_configuration(path) {
        Ok(Some(text)) => text,
        Ok(None) => {
            let finding = Finding::failure(CHECK, format!("there is no {shown}"), "stiefel init");
            return (Config::default(), finding);
        }
        Err(error) => {
            let (text, next) = explain(&error);
            let next = next.unwrap_or_else(|| format!("is it longer than {MAX_CONFIG} bytes?"));
            return (Config::default(), Finding::failure(CHECK, text, next));
        }
    };
    match Config::parse(&text) {
        Err(error) => {
            let text = error.to_string();
            let why = text.split("\n  next: ").next().unwrap_or_default();
            let finding = Finding::failure(
                CHECK,
                format!("{shown} is not understood, and the defaults are looked at instead: {why}"),
                "correct it, or make it anew with `stiefel init --force`, which keeps it beside",
            );
            (Config::default(), finding)
        }
        Ok(config) => {
            let open = std::fs::metadata(path).is_ok_and(|meta| meta.mode() & 0o022 != 0 || !is_ours(meta.uid()));
            let finding = match open {
                true => Finding::warning(
                    CHECK,
                    format!("others than root can change {shown}, and so what is served, and how"),
                    format!("chown root:root {shown} && chmod 0644 {shown}"),
                ),
                false => Finding::ok(CHECK, format!("{shown} is understood")),
            };
            (config, finding)
        }
    }
}

/// Root, or who looks (in a tree of their own).
fn is_ours(uid: u32) -> bool {
    uid == 0 || uid == rustix::process::geteuid().as_raw()
}

pub(super) fn keys(patient: &Patient) -> Vec<Finding> {
    const CHECK: &str = "keys";
    let folder = patient.tree.path(KEYS_DIR);
    let mut findings = Vec::new();
    if let Ok(meta) = std::fs::metadata(&folder)
        && (meta.mode() & 0o077 != 0 || !is_ours(meta.uid()))
    {
        findings.push(Finding::warning(
            CHECK,
            format!("others can look into {KEYS_DIR} (mode {:04o})", meta.mode() & 0o7777),
            format!("chown root:root {KEYS_DIR} && chmod 0700 {KEYS_DIR}"),
        ));
    }
    findings.push(match collect::read_keys(&folder) {
        Ok(keys) => {
            let names: Vec<_> = keys.iter().map(|key| presentable(&key.name)).collect();
            Finding::ok(CHECK, names.join(", "))
        }
        Err(collect::CollectError::NoKeys { .. }) => Finding::failure(CHECK, "there is none", "stiefel key new stick"),
        Err(error) if !patient.privileged => Finding::warning(
            CHECK,
            format!("cannot be looked at: {}", explain(&error).0),
            "sudo stiefel doctor",
        ),
        Err(error) => {
            let (text, next) = explain(&error);
            Finding::failure(
                CHECK,
                text,
                next.unwrap_or_else(|| "stiefel key revoke NAME; stiefel key new NAME".to_owned()),
            )
        }
    });
    findings
}

pub(super) fn ramdisk(patient: &Patient) -> Vec<Finding> {
    const CHECK: &str = "ramdisk";
    let folder = patient.tree.path(STATE_DIR);
    let manifest = match Manifest::load(&folder).and_then(|manifest| manifest.verify(&folder).map(|()| manifest)) {
        Ok(manifest) => manifest,
        Err(error) => return vec![Finding::failure(CHECK, explain(&error).0, "stiefel install")],
    };
    let mut findings = Vec::new();
    let version = presentable(&manifest.kernel_version);
    if patient.config.link.encryption == Encryption::Wireguard && !manifest.wireguard {
        findings.push(Finding::failure(
            CHECK,
            "it has no WireGuard, but link.encryption is wireguard",
            "have `wireguard` or `default` among `modules` in config.yaml, then: stiefel install",
        ));
    }
    if manifest.classes != patient.config.modules.0 {
        findings.push(Finding::warning(
            CHECK,
            format!(
                "it was built with modules [{}], which config.yaml says no more",
                presentable(&manifest.classes.join(", "))
            ),
            "stiefel install",
        ));
    }
    let running = patient
        .machine
        .release
        .as_ref()
        .filter(|_| patient.config.initrd.kernel.given().is_none());
    if let Some(running) = running.filter(|running| **running != manifest.kernel_version) {
        findings.push(Finding::warning(
            CHECK,
            format!("it was built for the kernel {version}, and {running} runs"),
            "stiefel install",
        ));
    }
    if manifest.stiefel_version != env!("CARGO_PKG_VERSION") {
        findings.push(Finding::warning(
            CHECK,
            format!(
                "it was built by stiefel {}, and this is {}",
                presentable(&manifest.stiefel_version),
                env!("CARGO_PKG_VERSION")
            ),
            "stiefel install",
        ));
    }
    if findings.is_empty() {
        findings.push(Finding::ok(
            CHECK,
            format!(
                "it is whole, with {} modules, for the kernel {version}",
                manifest.modules
            ),
        ));
    }
    findings
}
