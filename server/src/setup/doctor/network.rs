//! The trigger and its adapter, and who else would take that adapter.

use stiefel_shared::config::Wake;

use super::{Finding, Patient};
use crate::install;

pub(super) fn trigger(patient: &Patient) -> Vec<Finding> {
    const CHECK: &str = "trigger";
    let (machine, trigger) = (&patient.machine, &patient.config.trigger);
    let wakes = trigger.wake == Wake::Wired;
    let mut findings = Vec::new();
    let names: Vec<String> = trigger
        .usb
        .iter()
        .map(ToString::to_string)
        .chain(trigger.macs.iter().map(ToString::to_string))
        .collect();
    let unnamed: Vec<_> = machine
        .candidates()
        .into_iter()
        .filter(|nic| !nic.is_named_by(trigger))
        .collect();
    let here: Vec<_> = machine.nics.iter().filter(|nic| nic.is_named_by(trigger)).collect();
    let other = unnamed
        .first()
        .and_then(|nic| Some((nic, nic.identity(&machine.nics)?)));
    findings.push(match (names.is_empty(), here.first(), other) {
        (false, Some(nic), _) => Finding::ok(CHECK, format!("the dedicated adapter is here: {nic}")),
        (false, None, Some((nic, identity))) => Finding::warning(
            CHECK,
            format!("{} is not plugged in, but another adapter is: {nic}", names.join(", ")),
            format!("if this is the one: name {identity} in `trigger` in config.yaml"),
        ),
        (false, None, None) => Finding::ok(
            CHECK,
            format!(
                "{} is not plugged in now; plugging it in is the trigger",
                names.join(", ")
            ),
        ),
        (true, _, Some((nic, identity))) => Finding::warning(
            CHECK,
            format!("no adapter is dedicated, so plugging one in does nothing; there is {nic}"),
            format!("name {identity} in `trigger` in config.yaml, then: stiefel install"),
        ),
        (true, _, None) if wakes => Finding::warning(
            CHECK,
            "no adapter is dedicated, so only a stick's wake over a wired adapter, or `stiefel serve`, triggers",
            "plug a USB network adapter in, and run `stiefel init`: it says what to write",
        ),
        (true, _, None) => Finding::failure(
            CHECK,
            "nothing triggers: no adapter is dedicated, and trigger.wake is off",
            "set trigger.usb, trigger.macs or trigger.wake in config.yaml",
        ),
    });
    if machine.nics.is_empty() {
        findings.push(Finding::warning(
            CHECK,
            "there is no wired network adapter here, and without one no desktop is reached",
            "plug one in; if one is plugged in, see `dmesg` for why its driver does not take it",
        ));
    }
    if let Some(nic) = here.iter().find(|nic| nic.default_route) {
        findings.push(Finding::warning(
            CHECK,
            format!(
                "the way to the internet leads through the dedicated adapter {}: it will be lost",
                nic.name
            ),
            "use another adapter for that, or link.mode: lan",
        ));
    }
    findings
}

/// Network managers that would configure, rename or take down the dedicated adapter.
pub(super) fn managers(patient: &Patient) -> Vec<Finding> {
    const CHECK: &str = "guards";
    let (tree, trigger) = (&patient.tree, &patient.config.trigger);
    if trigger.usb.is_empty() && trigger.macs.is_empty() {
        return Vec::new();
    }
    let mut findings = Vec::new();
    let missing = install::missing_guards(tree.path("/").as_path(), trigger);
    findings.push(match missing.is_empty() {
        true => Finding::ok(
            CHECK,
            "NetworkManager and systemd-networkd leave the dedicated adapter alone",
        ),
        false => Finding::warning(
            CHECK,
            format!(
                "a network manager may take the dedicated adapter: {} is not there, or not as config.yaml wants it",
                missing.join(", ")
            ),
            "stiefel install",
        ),
    });
    let here: Vec<_> = patient
        .machine
        .nics
        .iter()
        .filter(|nic| nic.is_named_by(trigger))
        .map(|nic| nic.name.as_str())
        .collect();
    let enabled = |unit: &str| {
        tree.path(format!("/etc/systemd/system/multi-user.target.wants/{unit}"))
            .symlink_metadata()
            .is_ok()
    };
    for (unit, next) in [
        (
            "connman.service",
            "add the adapter's name to NetworkInterfaceBlacklist in /etc/connman/main.conf, and restart connman",
        ),
        (
            "dhcpcd.service",
            "echo 'denyinterfaces NAME' >> /etc/dhcpcd.conf, with the adapter's name, and restart dhcpcd",
        ),
        (
            "wicked.service",
            "write STARTMODE=off into /etc/sysconfig/network/ifcfg-NAME, with the adapter's name",
        ),
    ] {
        if enabled(unit) {
            findings.push(Finding::warning(
                CHECK,
                format!("{unit} is enabled, for which stiefel has no guard"),
                next,
            ));
        }
    }
    let folder = "/etc/network/interfaces.d";
    let files = tree.names(folder).into_iter().map(|name| format!("{folder}/{name}"));
    for file in files.chain(["/etc/network/interfaces".to_owned()]) {
        let text = tree.text(&file).unwrap_or_default();
        let taken = text.lines().find_map(|line| {
            let mut words = line.split_ascii_whitespace();
            let first = words.next()?;
            let starts = first == "auto" || first.starts_with("allow-");
            words.find(|word| starts && here.contains(word))
        });
        if let Some(name) = taken {
            findings.push(Finding::warning(
                CHECK,
                format!("ifupdown brings the dedicated adapter {name} up ({file})"),
                format!("sed -i -E '/^(auto|allow-\\S+)\\s+{name}\\b/d' {file}"),
            ));
        }
    }
    findings
}
