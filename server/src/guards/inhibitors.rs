//! Whether a program asks not to be shut down.
//!
//! Asked of systemd-logind by `busctl`, which prints the documented answer of `ListInhibitors`
//! (org.freedesktop.login1(5)); `systemd-inhibit --list` prints tables for people only. `systemctl kexec` started by a
//! service heeds no inhibitor, so we must. Delays are left to logind.

use std::process::{Command, Stdio};

use serde::Deserialize;

use super::Refusal;
use crate::tree::Tree;

/// One inhibitor, as logind lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inhibitor {
    /// What it inhibits, separated by `:`.
    pub what: String,
    /// Who asked.
    pub who: String,
    /// Why.
    pub why: String,
    /// `block` or `delay`.
    pub mode: String,
}

impl Inhibitor {
    /// Whether it stands against a shutdown.
    #[must_use]
    pub fn blocks_shutdown(&self) -> bool {
        self.mode == "block" && self.what.split(':').any(|what| what == "shutdown")
    }
}

pub(super) fn check(tree: &Tree) -> Vec<Refusal> {
    // Only the running system has programs to ask.
    let inhibitors = if tree.is_live() { list() } else { Vec::new() };
    refusals(inhibitors)
}

fn refusals(inhibitors: Vec<Inhibitor>) -> Vec<Refusal> {
    inhibitors
        .into_iter()
        .filter(Inhibitor::blocks_shutdown)
        .map(|inhibitor| Refusal::Inhibited {
            who: inhibitor.who,
            why: inhibitor.why,
        })
        .collect()
}

/// None where there is no logind: then nothing can have asked it.
fn list() -> Vec<Inhibitor> {
    let output = Command::new("busctl")
        .args([
            "--json=short",
            "--timeout=5",
            "call",
            "org.freedesktop.login1",
            "/org/freedesktop/login1",
        ])
        .args(["org.freedesktop.login1.Manager", "ListInhibitors"])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output();
    output
        .ok()
        .filter(|output| output.status.success())
        .and_then(|output| parse(&output.stdout))
        .unwrap_or_default()
}

/// Reads busctl's JSON of an answer with the signature `a(ssssuu)`.
fn parse(json: &[u8]) -> Option<Vec<Inhibitor>> {
    type Listed = (String, String, String, String, u32, u32);
    #[derive(Deserialize)]
    struct Answer {
        data: (Vec<Listed>,),
    }
    let answer: Answer = serde_json::from_slice(json).ok()?;
    let inhibitor = |(what, who, why, mode, _uid, _pid): Listed| Inhibitor { what, who, why, mode };
    Some(answer.data.0.into_iter().map(inhibitor).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ANSWER: &str = r#"{"type":"a(ssssuu)","data":[[["handle-power-key:sleep","GNOME","x","block",1000,5],
        ["shutdown:sleep","unattended-upgrades","Upgrading","block",0,7],["shutdown","PackageKit","Stop me","delay",0,9]]]}"#;

    #[test]
    fn only_blocks_of_shutdown_are_reasons() {
        let expected = Refusal::Inhibited {
            who: "unattended-upgrades".into(),
            why: "Upgrading".into(),
        };
        assert_eq!(refusals(parse(ANSWER.as_bytes()).unwrap()), [expected]);
    }

    #[test]
    fn other_answers_are_not_understood() {
        for json in ["", "{}", "[]", r#"{"type":"s","data":["x"]}"#] {
            assert_eq!(parse(json.as_bytes()), None, "{json}");
        }
        assert_eq!(parse(br#"{"type":"a(ssssuu)","data":[[]]}"#), Some(Vec::new()));
    }
}
