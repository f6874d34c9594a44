//! `stiefel status`: how the session is that this machine's disk comes through.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde::Serialize;
use stiefel_client::status::{STATUS_PATH, Status};

use super::mebibytes;
use crate::cli::StatusArgs;

/// Over this time the throughput is measured.
const MEASURE: Duration = Duration::from_secs(1);

#[derive(Serialize)]
struct Report {
    #[serde(flatten)]
    status: Status,
    /// Bytes per second.
    reading: u64,
    /// Bytes per second.
    writing: u64,
}

/// Prints it.
pub(crate) fn status(args: &StatusArgs) -> anyhow::Result<()> {
    let path = Path::new("/run").join(STATUS_PATH);
    let json = match std::fs::read(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => bail!(
            "this machine does not run from a laptop's disk; on the laptop, `journalctl -u stiefel-autokexec` says what \
             its service does"
        ),
        read => read.with_context(|| format!("cannot read {}", path.display()))?,
    };
    let status: Status =
        serde_json::from_slice(&json).with_context(|| format!("cannot understand {}", path.display()))?;
    let (before, begun) = (counters(&status.device), Instant::now());
    std::thread::sleep(MEASURE);
    let (after, milliseconds) = (counters(&status.device), begun.elapsed().as_millis());
    let rate = |before: u64, after: u64| {
        let bytes = u128::from(after.saturating_sub(before)) * 1000 / milliseconds.max(1);
        u64::try_from(bytes).unwrap_or(u64::MAX)
    };
    let report = Report {
        reading: rate(before.0, after.0),
        writing: rate(before.1, after.1),
        status,
    };
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{}", words(&report));
    }
    Ok(())
}

/// Bytes read from and written to a block device so far (Linux, Documentation/block/stat.rst: sectors of 512 bytes).
fn counters(device: &str) -> (u64, u64) {
    let text = std::fs::read_to_string(Path::new("/sys/block").join(device).join("stat")).unwrap_or_default();
    let fields: Vec<u64> = text
        .split_ascii_whitespace()
        .map(|field| field.parse().unwrap_or_default())
        .collect();
    let bytes = |index: usize| fields.get(index).copied().unwrap_or_default().saturating_mul(512);
    (bytes(2), bytes(6))
}

fn words(report: &Report) -> String {
    let status = &report.status;
    let connection = match (status.connected, &status.state) {
        (false, _) => "lost; everything waits until the laptop is back".to_owned(),
        (true, Some(state)) => format!("there ({state})"),
        (true, None) => "there".to_owned(),
    };
    let encryption = match status.encryption.as_str() {
        "none" => "none: everyone on the cable can read and change what is sent",
        other => other,
    };
    let supply = if status.mains { "on mains" } else { "on battery" };
    let battery = match status.battery {
        Some(percent) => format!("{percent} %, {supply}"),
        None => "none".to_owned(),
    };
    let kept = if status.guest {
        "guest: nothing is kept, it is gone when this desktop is switched off or reboots"
    } else {
        "on the laptop's disk"
    };
    [
        ("laptop", status.laptop.clone()),
        ("connection", connection),
        ("disk", format!("/dev/{} by {}", status.device, status.transport)),
        ("what is written", kept.to_owned()),
        ("encryption", encryption.to_owned()),
        ("packets", format!("up to {} bytes", status.mtu)),
        (
            "now",
            format!(
                "{}/s read, {}/s written",
                mebibytes(report.reading),
                mebibytes(report.writing)
            ),
        ),
        (
            "so far",
            format!(
                "{} times lost and back, {} connections made anew",
                status.losses, status.reconnects
            ),
        ),
        ("laptop's battery", battery),
    ]
    .iter()
    .map(|(name, value)| format!("{name:<17} {value}\n"))
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_people_must_know_is_said() {
        let mut report = Report {
            status: Status {
                laptop: "tiny".to_owned(),
                encryption: "none".to_owned(),
                battery: Some(7),
                ..Status::default()
            },
            reading: 3 << 20,
            writing: 0,
        };
        let text = words(&report);
        for word in [
            "tiny",
            "lost",
            "can read and change",
            "7 %, on battery",
            "3.0 MiB/s read",
        ] {
            assert!(text.contains(word), "{word}: {text}");
        }
        report.status.connected = true;
        assert!(!words(&report).contains("lost; ") && !words(&report).contains("guest"));
        report.status.guest = true;
        assert!(words(&report).contains("guest: nothing is kept"));
    }
}
