//! One module per command: what the user typed is resolved against the machine here, and done by the other crates.

pub(crate) mod build;
pub(crate) mod install;
pub(crate) mod key;
pub(crate) mod nbd;
pub(crate) mod role;
pub(crate) mod serve;
pub(crate) mod stick;
pub(crate) mod test_qemu;

use std::io::{IsTerminal, Read, Write};
use std::path::Path;

use anyhow::{Context, bail};
use stiefel_shared::config::{Config, MAX_CONFIG};

/// Reads the configuration.
fn config(path: &Path) -> anyhow::Result<Config> {
    let file = std::fs::File::open(path).with_context(|| {
        format!(
            "cannot read the configuration {}; `stiefel install` makes one, or name another with --config",
            path.display()
        )
    })?;
    let mut text = String::new();
    file.take(MAX_CONFIG + 1)
        .read_to_string(&mut text)
        .with_context(|| format!("cannot read {}", path.display()))?;
    if text.len() as u64 > MAX_CONFIG {
        bail!(
            "{} is longer than {MAX_CONFIG} bytes; is this the right file?",
            path.display()
        );
    }
    Config::parse(&text).with_context(|| format!("cannot use the configuration {}", path.display()))
}

/// As [`config`], but a file that is not there means the defaults: for commands that work on a machine without stiefel.
fn config_or_default(path: &Path) -> anyhow::Result<Config> {
    if path.exists() {
        config(path)
    } else {
        Ok(Config::default())
    }
}

/// Asks a yes-or-no question; without a terminal nobody can answer, which is an error that names the option.
fn ask(question: &str) -> anyhow::Result<bool> {
    if !std::io::stdin().is_terminal() {
        bail!("{question}: there is no terminal to ask at; say --yes if that is what you want");
    }
    eprint!("{question} [y/N] ");
    std::io::stderr().flush()?;
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer)?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}

/// Bytes for people.
fn mebibytes(bytes: u64) -> String {
    let tenths = bytes.saturating_mul(10) / (1 << 20);
    format!("{}.{} MiB", tenths / 10, tenths % 10)
}
