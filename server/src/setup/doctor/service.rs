//! The service, and what of the system around it matters: SELinux, battery.

use super::{Finding, Patient};
use crate::supply::Supply;

const UNIT: &str = "stiefel-autokexec.service";
const SUPPLIES: &str = "/sys/class/power_supply";

pub(super) fn system(patient: &Patient) -> Vec<Finding> {
    vec![selinux(patient), battery(patient)]
}

fn selinux(patient: &Patient) -> Finding {
    const CHECK: &str = "selinux";
    let tree = &patient.tree;
    match tree.line("/sys/fs/selinux/enforce").as_deref() {
        Some("1") => Finding::warning(
            CHECK,
            "it is enforcing, under which stiefel was not tested; wrong labels would keep the service from its files",
            "restorecon -Rv /usr/local/bin/stiefel /etc/stiefel /etc/systemd/system /var/lib/stiefel; then see `ausearch -m avc -ts recent`",
        ),
        Some(_) => Finding::ok(CHECK, "it is permissive"),
        None => Finding::ok(CHECK, "it is not in use"),
    }
}

fn battery(patient: &Patient) -> Finding {
    const CHECK: &str = "battery";
    let tree = &patient.tree;
    let limit = patient.config.trigger.battery.0;
    let supply = Supply::read(tree);
    let Some(percent) = supply.percent else {
        return Finding::ok(CHECK, "there is none, or it does not tell its charge");
    };
    let ends = tree
        .names(SUPPLIES)
        .iter()
        .filter_map(|name| {
            tree.line(format!("{SUPPLIES}/{name}/charge_control_end_threshold"))?
                .parse::<u8>()
                .ok()
        })
        .min();
    if let Some(end) = ends.filter(|end| *end > 0 && *end < limit) {
        return Finding::warning(
            CHECK,
            format!(
                "it is charged to {end} % only, and trigger.battery refuses below {limit} %: off the mains nothing is ever served"
            ),
            "set trigger.battery in config.yaml to less than that",
        );
    }
    match supply.is_low(limit) {
        true => Finding::warning(
            CHECK,
            format!("it is at {percent} %, off the mains: below {limit} % (trigger.battery) nothing is served"),
            "plug in the power supply",
        ),
        false => Finding::ok(
            CHECK,
            format!(
                "{percent} %, {}",
                if supply.mains { "on the mains" } else { "off the mains" }
            ),
        ),
    }
}

pub(super) fn service(patient: &Patient) -> Vec<Finding> {
    const CHECK: &str = "service";
    let tree = &patient.tree;
    let there = |path: String| tree.path(path).symlink_metadata().is_ok();
    if !["/etc/systemd/system", "/usr/lib/systemd/system"]
        .iter()
        .any(|folder| there(format!("{folder}/{UNIT}")))
    {
        return vec![Finding::failure(CHECK, "it is not installed", "stiefel install")];
    }
    let mut findings = Vec::new();
    if !there(format!("/etc/systemd/system/multi-user.target.wants/{UNIT}")) {
        findings.push(Finding::failure(
            CHECK,
            "it does not start with the system",
            format!("systemctl enable --now {UNIT}"),
        ));
    }
    if !there("/run/systemd/system".to_owned()) {
        let text = match tree.is_live() {
            true => "systemd does not run here, and leaving the system needs it (`systemctl kexec`)",
            false => "whether it runs cannot be told: no system runs in this tree",
        };
        findings.push(Finding::warning(CHECK, text, "start the laptop with systemd"));
        return findings;
    }
    // A unit's control group is there as long as one of its processes.
    let groups = ["/sys/fs/cgroup", "/sys/fs/cgroup/systemd", "/sys/fs/cgroup/unified"];
    let runs = groups.iter().any(|group| {
        let processes = tree.text(format!("{group}/system.slice/{UNIT}/cgroup.procs"));
        processes.is_ok_and(|processes| !processes.trim().is_empty())
    });
    match runs {
        true if findings.is_empty() => findings.push(Finding::ok(CHECK, "it starts with the system, and runs")),
        true => {}
        false => findings.push(Finding::failure(
            CHECK,
            "it does not run",
            format!("systemctl restart {UNIT}; journalctl -b -u {UNIT} says why it ended"),
        )),
    }
    findings
}
