//! `stiefel doctor`: what stands against a session, and the command that mends it.

use std::path::Path;

use anyhow::bail;
use serde::Serialize;
use stiefel_server::setup::doctor::{self, DoctorOptions, Finding, Level};

use super::probe;
use crate::cli::DoctorArgs;

#[derive(Serialize)]
struct Report<'a> {
    /// No check failed.
    ok: bool,
    findings: &'a [Finding],
}

/// Runs all checks; fails if one of them does.
pub(crate) fn doctor(config: Option<&Path>, args: &DoctorArgs) -> anyhow::Result<()> {
    if !args.root.is_dir() {
        bail!(
            "there is no folder {}; mount the system there, or correct --root",
            args.root.display()
        );
    }
    let mut examination = doctor::examine(&DoctorOptions {
        root: args.root.clone(),
        config: config.map(Path::to_owned),
    });
    if args.root == Path::new("/") {
        examination
            .findings
            .extend(probe::discovery(&examination.config, &examination.machine));
    }
    let findings = &examination.findings;
    let count = |level| findings.iter().filter(|finding| finding.level == level).count();
    let (failures, warnings) = (count(Level::Failure), count(Level::Warning));
    if args.json {
        let ok = failures == 0;
        println!("{}", serde_json::to_string_pretty(&Report { ok, findings })?);
    } else {
        findings.iter().for_each(|finding| println!("{finding}"));
    }
    if failures > 0 {
        bail!(
            "{failures} of {} checks failed; do what stands after `next:`, then run `stiefel doctor` again",
            findings.len()
        );
    }
    if !args.json {
        eprintln!("no failures, {warnings} warnings");
    }
    Ok(())
}
