//! Whether a program asks not to be shut down.
//!
//! Asked of systemd-logind by `busctl`, which prints the documented answer of `ListInhibitors`
//! (org.freedesktop.login1(5)); `systemd-inhibit --list` prints tables for people only. `systemctl kexec` started by a
//! service heeds no inhibitor, so we must. Delays are left to logind.

use std::path::Path;
use std::process::{Command, Stdio};

use serde::Deserialize;

use super::Refusal;
use crate::tree::Tree;

/// The system bus (D-Bus specification, "Well-known Message Bus Instances").
const BUS: &str = "/run/dbus/system_bus_socket";

/// One inhibitor, as logind lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inhibitor {
    /// What it inhibits, separated by `:`.
    pub what: String,
    /// Who asked.
    pub who: String,
    /// Why.
    pub why: String,
    /// `block`, `block-weak` (since systemd 257) or `delay`.
    pub mode: String,
}

impl Inhibitor {
    /// Whether it stands against a shutdown. Who may override a weak one is a person who decides to, which we are not: systemd
    /// calls so what `block` was before its version 257.
    #[must_use]
    pub fn blocks_shutdown(&self) -> bool {
        matches!(self.mode.as_str(), "block" | "block-weak") && self.what.split(':').any(|what| what == "shutdown")
    }
}

pub(super) fn check(tree: &Tree) -> Vec<Refusal> {
    // Only the running system has programs to ask.
    if !tree.is_live() {
        return Vec::new();
    }
    ask(Path::new(BUS), Command::new("busctl"))
}

/// What logind says; what cannot be understood is a refusal: a package upgrade that is cut off can leave a system that does
/// not start.
fn ask(bus: &Path, busctl: Command) -> Vec<Refusal> {
    match list(bus, busctl) {
        Ok(inhibitors) => refusals(inhibitors),
        Err(why) => vec![Refusal::LogindSilent { why }],
    }
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

/// None where there is no system bus: then nothing can have asked logind.
fn list(bus: &Path, mut busctl: Command) -> Result<Vec<Inhibitor>, String> {
    if !bus.exists() {
        return Ok(Vec::new());
    }
    let output = busctl
        .args([
            "--json=short",
            "--timeout=5",
            "call",
            "org.freedesktop.login1",
            "/org/freedesktop/login1",
        ])
        .args(["org.freedesktop.login1.Manager", "ListInhibitors"])
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("`busctl` cannot be started: {error}"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(format!("`busctl` failed ({}): {}", output.status, said.trim()));
    }
    parse(&output.stdout).ok_or_else(|| "its answer is not understood".to_owned())
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
    fn each_way_to_block_a_shutdown_is_a_reason() {
        let inhibitor = |what: &str, mode: &str| Inhibitor {
            what: what.into(),
            who: "x".into(),
            why: "y".into(),
            mode: mode.into(),
        };
        for (what, mode) in [
            ("shutdown", "block"),
            ("shutdown", "block-weak"),
            // As fwupd asks while it writes a firmware.
            ("shutdown:sleep:idle:handle-power-key:handle-lid-switch", "block"),
            ("sleep:shutdown", "block"),
        ] {
            assert_eq!(refusals(vec![inhibitor(what, mode)]).len(), 1, "{what} {mode}");
        }
        for (what, mode) in [
            ("shutdown", "delay"),
            ("sleep:idle", "block"),
            ("handle-lid-switch", "block"),
            ("", "block"),
            ("shutdowns", "block"),
        ] {
            assert_eq!(refusals(vec![inhibitor(what, mode)]), [], "{what} {mode}");
        }
    }

    /// What is said with a `busctl` that runs this script.
    fn asked(script: &str) -> Vec<Refusal> {
        let mut busctl = Command::new("sh");
        busctl.args(["-c", script, "busctl"]);
        ask(Path::new("/"), busctl)
    }

    #[test]
    fn a_bus_that_does_not_answer_is_a_reason_to_stay() {
        for script in ["echo no such service >&2; exit 1", "echo garbage", "kill $$", "exit 0"] {
            let refusals = asked(script);
            assert!(
                matches!(&refusals[..], [Refusal::LogindSilent { .. }]),
                "{script}: {refusals:?}"
            );
        }
        assert!(
            asked("echo no such service >&2; exit 1")[0]
                .to_string()
                .contains("no such service")
        );
        let missing = ask(Path::new("/"), Command::new("/nonexistent/busctl"));
        assert!(matches!(&missing[..], [Refusal::LogindSilent { .. }]), "{missing:?}");
        assert!(missing[0].to_string().contains("next: "));
        assert_eq!(asked(r#"echo '{"type":"a(ssssuu)","data":[[]]}'"#), []);
    }

    #[test]
    fn without_a_system_bus_nobody_can_have_asked() {
        assert_eq!(
            ask(Path::new("/nonexistent/bus"), Command::new("/nonexistent/busctl")),
            []
        );
    }

    #[test]
    fn other_answers_are_not_understood() {
        for json in ["", "{}", "[]", r#"{"type":"s","data":["x"]}"#] {
            assert_eq!(parse(json.as_bytes()), None, "{json}");
        }
        assert_eq!(parse(br#"{"type":"a(ssssuu)","data":[[]]}"#), Some(Vec::new()));
    }
}
