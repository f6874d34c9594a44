//! Firewalls that would drop what a desktop asks while the laptop's system runs.
//!
//! Only a wake needs that: in the ramdisk there is no firewall, and plugging the adapter in asks nobody. Read are the files of
//! firewalld, ufw and nftables; of the running system the rules themselves, with `nft list ruleset`. What rules do together
//! cannot be told for sure from outside, so nothing here is a failure; the Discover that `stiefel doctor` sends proves it.

use std::io::Read;
use std::process::{Command, Stdio};
use std::sync::mpsc;

use stiefel_shared::config::Wake;
use stiefel_shared::discovery::PORT;

use super::{Finding, PATIENCE, Patient};
use crate::tree::Tree;

const CHECK: &str = "firewall";
/// More rules than that are not read, in bytes.
const MAX_RULES: u64 = 4 << 20;

pub(super) fn check(patient: &Patient) -> Vec<Finding> {
    if patient.config.trigger.wake == Wake::Off {
        return vec![Finding::ok(CHECK, "no wake is listened for (trigger.wake: off)")];
    }
    let tree = &patient.tree;
    let mut findings = Vec::new();
    if enabled(tree, "firewalld.service") {
        findings.push(firewalld(tree));
    }
    if tree
        .text("/etc/ufw/ufw.conf")
        .is_ok_and(|text| text.lines().any(|line| line.trim() == "ENABLED=yes"))
    {
        findings.push(ufw(tree));
    }
    // Both write their rules by nftables or iptables.
    if findings.is_empty() {
        findings.push(rules(patient));
    }
    findings
}

fn enabled(tree: &Tree, unit: &str) -> bool {
    let folders = ["multi-user.target.wants", "sysinit.target.wants", "basic.target.wants"];
    folders.iter().any(|folder| {
        tree.path(format!("/etc/systemd/system/{folder}/{unit}"))
            .symlink_metadata()
            .is_ok()
    })
}

fn dropped(by: &str, next: String) -> Finding {
    Finding::warning(
        CHECK,
        format!("{by} would drop a stick's wake (UDP port {PORT}, IPv6); plugging the adapter in still works"),
        next,
    )
}

fn firewalld(tree: &Tree) -> Finding {
    let conf = tree.text("/etc/firewalld/firewalld.conf").unwrap_or_default();
    let zone = conf
        .lines()
        .rev()
        .find_map(|line| line.trim().strip_prefix("DefaultZone="))
        .unwrap_or("public")
        .trim();
    let zone: String = zone
        .chars()
        .filter(|c| c.is_ascii_alphanumeric() || "-_".contains(*c))
        .collect();
    let text = ["/etc/firewalld/zones", "/usr/lib/firewalld/zones"]
        .iter()
        .find_map(|folder| tree.text(format!("{folder}/{zone}.xml")).ok())
        .unwrap_or_default();
    if text.contains("target=\"ACCEPT\"") || zone_opens(&text) {
        return Finding::ok(CHECK, format!("firewalld's zone {zone} lets a stick's wake in"));
    }
    dropped(
        &format!("firewalld (zone {zone})"),
        format!("firewall-cmd --permanent --add-port={PORT}/udp && firewall-cmd --reload"),
    )
}

/// Whether a zone's `<port protocol="udp" port="1025-65535"/>` covers ours.
fn zone_opens(xml: &str) -> bool {
    let attribute = |tag: &str, name: &str| {
        let (_, rest) = tag.split_once(&format!("{name}=\""))?;
        Some(rest.split_once('"')?.0.to_owned())
    };
    xml.split("<port ").skip(1).any(|rest| {
        let tag = rest.split('>').next().unwrap_or_default();
        let ports = attribute(tag, "port").unwrap_or_default();
        let (first, last) = ports.split_once('-').unwrap_or((ports.as_str(), ports.as_str()));
        let number = |text: &str| text.parse::<u16>().ok();
        let covers = number(first)
            .zip(number(last))
            .is_some_and(|(first, last)| (first..=last).contains(&PORT));
        covers && attribute(tag, "protocol").as_deref() == Some("udp")
    })
}

fn ufw(tree: &Tree) -> Finding {
    let default = tree.text("/etc/default/ufw").unwrap_or_default();
    let accepts = default
        .lines()
        .any(|line| line.trim().replace('"', "") == "DEFAULT_INPUT_POLICY=ACCEPT");
    let rules = tree.text("/etc/ufw/user6.rules").unwrap_or_default();
    let named = rules
        .lines()
        .any(|line| line.contains("ACCEPT") && line.contains(&format!("--dport {PORT}")));
    match accepts || named {
        true => Finding::ok(CHECK, "ufw lets a stick's wake in"),
        false => dropped("ufw", format!("ufw allow {PORT}/udp")),
    }
}

/// nftables, and iptables that writes into it.
fn rules(patient: &Patient) -> Finding {
    let tree = &patient.tree;
    let file = "/etc/nftables.conf";
    let nftables = enabled(tree, "nftables.service");
    let text = if tree.is_live() && patient.privileged {
        match ruleset(Command::new("nft")) {
            Ok(text) => text,
            Err(why) => {
                return Finding::warning(CHECK, format!("the rules cannot be listed: {why}"), "nft list ruleset");
            }
        }
    } else if nftables {
        tree.text(file).ok()
    } else {
        None
    };
    let old = tree.text("/etc/iptables/rules.v6").unwrap_or_default();
    if old.lines().any(|line| line.starts_with(":INPUT DROP")) && !old.contains(&format!("--dport {PORT}")) {
        return dropped(
            "ip6tables (/etc/iptables/rules.v6)",
            format!("ip6tables -I INPUT -p udp --dport {PORT} -j ACCEPT && netfilter-persistent save"),
        );
    }
    match text.as_deref().and_then(dropping_chain) {
        Some(chain) => dropped(
            &format!("nftables ({chain})"),
            format!("nft insert rule {chain} udp dport {PORT} accept   # and the same in {file}"),
        ),
        None => Finding::ok(CHECK, "none is known to drop a stick's wake"),
    }
}

/// The first chain that drops what comes in by IPv6 and is not allowed, as `FAMILY TABLE CHAIN`.
fn dropping_chain(rules: &str) -> Option<String> {
    let (mut table, mut chain) = (String::new(), String::new());
    let (mut input, mut drops, mut accepts) = (false, false, false);
    for line in rules.lines().map(str::trim) {
        let mut words = line.split_ascii_whitespace();
        match words.next() {
            Some("table") => table = words.take_while(|word| *word != "{").collect::<Vec<_>>().join(" "),
            Some("chain") => {
                chain = words.next().unwrap_or_default().to_owned();
                (input, drops, accepts) = (false, false, false);
            }
            Some("}") if input && drops && !accepts && !table.starts_with("ip ") && !table.starts_with("arp ") => {
                return Some(format!("{table} {chain}"));
            }
            Some("}") => input = false,
            _ => {
                input |= line.contains("hook input");
                drops |= line.contains("policy drop")
                    || matches!(line, "drop" | "reject")
                    || line.starts_with("reject with");
                accepts |= line.contains("accept") && line.contains(&PORT.to_string());
            }
        }
    }
    None
}

/// The running rules; `None` without the program.
fn ruleset(mut nft: Command) -> Result<Option<String>, String> {
    let spawned = nft
        .args(["list", "ruleset"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn();
    let mut child = match spawned {
        Ok(child) => child,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(format!("`nft` cannot be started: {error}")),
    };
    let Some(stdout) = child.stdout.take() else {
        return Err("`nft` says nothing".to_owned());
    };
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let read = stdout.take(MAX_RULES).read_to_end(&mut bytes);
        let _ = sender.send(read.map(|_| bytes));
    });
    let answer = receiver.recv_timeout(PATIENCE);
    // It has closed its output, or it hangs; either way it has nothing more to say.
    let _ = child.kill();
    let _ = child.wait();
    match answer {
        Ok(Ok(bytes)) => Ok(Some(String::from_utf8_lossy(&bytes).into_owned())),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("`nft` has not answered within {} s", PATIENCE.as_secs())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: &str = "table inet filter {\n\tchain input {\n\t\ttype filter hook input priority filter; policy drop;\n\t\tct state established accept\n\t}\n\tchain output {\n\t\ttype filter hook output priority filter; policy drop;\n\t}\n}\n";

    #[test]
    fn a_chain_that_drops_what_comes_in_is_named() {
        assert_eq!(dropping_chain(RULES).as_deref(), Some("inet filter input"));
        let open = RULES.replace("ct state established accept", "udp dport 61570 accept");
        assert_eq!(dropping_chain(&open), None);
        assert_eq!(dropping_chain(&RULES.replace("policy drop", "policy accept")), None);
        let rejects = RULES.replacen("policy drop", "policy accept", 1).replace(
            "established accept\n",
            "established accept\n\t\treject with icmpx admin-prohibited\n",
        );
        assert_eq!(dropping_chain(&rejects).as_deref(), Some("inet filter input"));
        assert_eq!(dropping_chain(&RULES.replace("inet", "ip")), None, "IPv4 is not ours");
        assert_eq!(dropping_chain(""), None);
    }

    #[test]
    fn a_zone_opens_the_port_alone_or_in_a_range() {
        assert!(zone_opens("<zone>\n<port protocol=\"udp\" port=\"1025-65535\"/>"));
        assert!(zone_opens("<port port=\"61570\" protocol=\"udp\"/>"));
        assert!(!zone_opens("<port protocol=\"tcp\" port=\"1025-65535\"/>"));
        assert!(!zone_opens(
            "<port protocol=\"udp\" port=\"137-139\"/><service name=\"ssh\"/>"
        ));
    }

    #[test]
    fn a_program_that_hangs_is_not_waited_for_for_ever() {
        let mut hangs = Command::new("sh");
        hangs.args(["-c", "sleep 600", "nft"]);
        let begun = std::time::Instant::now();
        assert!(ruleset(hangs).unwrap_err().contains("not answered"));
        assert!(begun.elapsed() < PATIENCE * 10);
        assert_eq!(ruleset(Command::new("/nonexistent/nft")), Ok(None));
    }
}
