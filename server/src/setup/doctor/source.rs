//! What is served: the payload, and the one disk that `/` is on.

use std::error::Error;

use super::{Finding, Patient};
use crate::guards;

/// An error with its causes, and what it says to do next.
pub(super) fn explain(error: &dyn Error) -> (String, Option<String>) {
    let mut text = error.to_string();
    let mut next = None;
    if let Some((what, rest)) = text.split_once("\n  next: ") {
        next = Some(rest.trim().to_owned());
        text = what.to_owned();
    }
    let mut cause = error.source();
    while let Some(source) = cause {
        text += &format!(": {source}");
        cause = source.source();
    }
    (text, next)
}

pub(super) fn payload(patient: &Patient) -> Vec<Finding> {
    const CHECK: &str = "payload";
    vec![match &patient.payload {
        Ok(payload) => Finding::ok(
            CHECK,
            format!("the desktop would boot {}, {}", payload.version, payload.reason),
        ),
        Err(error) => {
            let (text, next) = explain(error);
            let next = next.unwrap_or_else(|| "stiefel payload".to_owned());
            Finding::failure(
                CHECK,
                format!("what the desktop is to boot was not found: {text}"),
                next,
            )
        }
    }]
}

pub(super) fn disk(patient: &Patient) -> Vec<Finding> {
    const CHECK: &str = "disk";
    let root = &patient.machine.root;
    if let Some(refusal) = guards::on_a_link(patient.tree.path("/").as_path()) {
        let (text, next) = explain(&refusal);
        return vec![Finding::failure(CHECK, text, next.unwrap_or_default())];
    }
    if let Some(disk) = patient.config.boot.disk.given() {
        let there = patient.tree.path(disk).exists();
        return vec![match there {
            true => Finding::ok(
                CHECK,
                format!("{} is served, as boot.disk says; {root}", disk.display()),
            ),
            false => Finding::failure(
                CHECK,
                format!("{}, which boot.disk names, is not there", disk.display()),
                "correct boot.disk in config.yaml; `ls -l /dev/disk/by-id` shows the disks",
            ),
        }];
    }
    vec![match (root.disks.as_slice(), &root.pool) {
        (_, Some(pool)) => Finding::failure(
            CHECK,
            root.to_string(),
            format!("set boot.disk in config.yaml to the pool's only disk; `zpool status -P {pool}` shows it"),
        ),
        ([], None) => Finding::failure(
            CHECK,
            root.to_string(),
            "set boot.disk in config.yaml; `lsblk` and `ls -l /dev/disk/by-id` show the disks",
        ),
        ([_], None) => Finding::ok(CHECK, root.to_string()),
        (_, None) => Finding::failure(
            CHECK,
            format!("{root}; one disk is served, and the system would not start without the others"),
            "move / to one disk; or, if one of them is enough, set boot.disk in config.yaml",
        ),
    }]
}
