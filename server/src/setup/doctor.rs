//! `stiefel doctor`: what stands against a session, and the command that mends it.
//!
//! Each check looks at one requirement below a root folder, and says ok, warning or failure. A check that cannot be made is a
//! warning that says why. Nothing is changed, nothing waits longer than a few seconds. What needs a socket (does the service
//! answer?) is asked by the command, which knows the desktop's side, too.

mod files;
mod firewall;
mod initrd;
mod kernel;
mod luks;
mod names;
mod network;
mod service;
mod sleep;
mod source;
mod space;

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;
use stiefel_shared::config::{CONFIG_PATH, Config};

use super::Machine;
use crate::payload::{self, FoundPayload, PayloadError};
use crate::tree::Tree;
pub use space::Space;

/// The longest that another program is waited for.
const PATIENCE: Duration = Duration::from_secs(3);

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Level {
    /// As it should be.
    Ok,
    /// It works, but not as well as it could; or it could not be looked at.
    Warning,
    /// No session like this.
    Failure,
}

/// What one check has found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The check's name, for scripts.
    pub check: &'static str,
    /// How bad it is.
    pub level: Level,
    /// What was found, in words.
    pub text: String,
    /// What mends it: a command where there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}

impl Finding {
    /// As it should be.
    #[must_use]
    pub fn ok(check: &'static str, text: impl Into<String>) -> Self {
        Self {
            check,
            level: Level::Ok,
            text: text.into(),
            next: None,
        }
    }

    /// Not as well as it could be.
    #[must_use]
    pub fn warning(check: &'static str, text: impl Into<String>, next: impl Into<String>) -> Self {
        Self {
            level: Level::Warning,
            next: Some(next.into()),
            ..Self::ok(check, text)
        }
    }

    /// No session like this.
    #[must_use]
    pub fn failure(check: &'static str, text: impl Into<String>, next: impl Into<String>) -> Self {
        Self {
            level: Level::Failure,
            ..Self::warning(check, text, next)
        }
    }

    /// Of this level; for what is worse in one configuration than in another.
    fn of(level: Level, check: &'static str, text: impl Into<String>, next: impl Into<String>) -> Self {
        Self {
            level,
            ..Self::warning(check, text, next)
        }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let level = match self.level {
            Level::Ok => "ok",
            Level::Warning => "warning",
            Level::Failure => "FAILURE",
        };
        // Texts of other modules' errors have several lines.
        let text = self.text.lines().map(str::trim).collect::<Vec<_>>().join("; ");
        write!(f, "{level:<8} {:<12} {text}", self.check)?;
        self.next
            .iter()
            .try_for_each(|next| write!(f, "\n{:<21} next: {next}", ""))
    }
}

/// What to look at.
#[derive(Debug, Clone)]
pub struct DoctorOptions {
    /// The system's root folder.
    pub root: PathBuf,
    /// The configuration, if not the one below `root`.
    pub config: Option<PathBuf>,
}

/// What was looked at, and what was found.
#[derive(Debug, Clone)]
pub struct Examination {
    /// The machine.
    pub machine: Machine,
    /// Its configuration; the defaults, where there is none that can be used.
    pub config: Config,
    /// What the checks say.
    pub findings: Vec<Finding>,
}

/// What the checks look at.
struct Patient {
    tree: Tree,
    machine: Machine,
    config: Config,
    payload: Result<FoundPayload, PayloadError>,
    /// We are root.
    privileged: bool,
    /// Space on the file system of a path.
    space: fn(&Path) -> Option<Space>,
}

/// Makes all checks.
#[must_use]
pub fn examine(options: &DoctorOptions) -> Examination {
    let tree = Tree::new(&options.root);
    let path = options.config.clone().unwrap_or_else(|| tree.path(CONFIG_PATH));
    let (config, finding) = files::configuration(&tree, &path);
    let patient = Patient {
        payload: payload::find(&options.root, &config.boot.load),
        machine: Machine::of(&tree),
        config,
        privileged: rustix::process::geteuid().is_root(),
        space: space::of,
        tree,
    };
    let mut findings = vec![finding];
    findings.extend(patient.check());
    Examination {
        machine: patient.machine,
        config: patient.config,
        findings,
    }
}

impl Patient {
    fn check(&self) -> Vec<Finding> {
        let checks: [fn(&Self) -> Vec<Finding>; 21] = [
            privileges,
            source::payload,
            source::disk,
            kernel::kexec,
            kernel::leftover,
            kernel::modules,
            kernel::firmware,
            names::fstab,
            names::crypttab,
            luks::tpm,
            sleep::swap,
            sleep::hibernation,
            initrd::drivers,
            space::check,
            network::trigger,
            network::managers,
            firewall::check,
            files::keys,
            files::ramdisk,
            service::system,
            service::service,
        ];
        checks.iter().flat_map(|check| check(self)).collect()
    }
}

fn privileges(patient: &Patient) -> Vec<Finding> {
    if patient.privileged {
        return Vec::new();
    }
    vec![Finding::warning(
        "privileges",
        "not everything can be looked at: keys, encryption and firewalls show themselves to root only",
        "sudo stiefel doctor",
    )]
}

/// A text between single quotes for a shell.
fn shell(text: &str) -> String {
    format!("'{}'", text.replace('\'', "'\\''"))
}

/// A text that stands for itself in a pattern of `sed -E` between `#`.
fn pattern(text: &str) -> String {
    let mut pattern = String::new();
    for c in text.chars() {
        if "\\.*[]^$+?(){}|#/".contains(c) {
            pattern.push('\\');
        }
        pattern.push(c);
    }
    pattern
}

#[cfg(test)]
mod tests;
