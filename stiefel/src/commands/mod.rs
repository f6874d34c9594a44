//! One module per command: what the user typed is resolved against the machine here, and done by the other crates.

pub(crate) mod attach;
pub(crate) mod build;
pub(crate) mod copy;
pub(crate) mod doctor;
pub(crate) mod init;
pub(crate) mod install;
pub(crate) mod key;
pub(crate) mod nbd;
mod probe;
pub(crate) mod role;
pub(crate) mod serve;
pub(crate) mod status;
pub(crate) mod stick;
pub(crate) mod target;
pub(crate) mod test_qemu;

use std::io::{BufRead, IsTerminal, Read, Write};
use std::path::Path;

use anyhow::{Context, bail};
use stiefel_shared::config::{CONFIG_PATH, Config, MAX_CONFIG};

/// Reads the configuration that was named, or the installed one.
fn config(named: Option<&Path>) -> anyhow::Result<Config> {
    let path = named.unwrap_or(Path::new(CONFIG_PATH));
    Config::parse(&config_text(named)?).with_context(|| format!("cannot use the configuration {}", path.display()))
}

/// As [`config`], its text alone.
fn config_text(named: Option<&Path>) -> anyhow::Result<String> {
    let path = named.unwrap_or(Path::new(CONFIG_PATH));
    let file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Err(no_config(path).into()),
        Err(error) => {
            return Err(error).with_context(|| format!("cannot read the configuration {}", path.display()));
        }
    };
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
    Ok(text)
}

fn no_config(path: &Path) -> Usage {
    Usage(format!(
        "there is no configuration {}; `stiefel init` makes one, or name another with --config",
        path.display()
    ))
}

/// As [`config`], but where none was named and none is installed, the defaults count: for commands that work on a machine
/// without stiefel. A file that was named, or is there and cannot be read, is never passed over.
fn config_or_default(named: Option<&Path>) -> anyhow::Result<Config> {
    match named {
        None if !is_there(Path::new(CONFIG_PATH))? => Ok(Config::default()),
        _ => config(named),
    }
}

fn is_there(path: &Path) -> anyhow::Result<bool> {
    path.try_exists()
        .with_context(|| format!("cannot see whether there is a configuration {}", path.display()))
}

/// Asks a yes-or-no question; without a terminal nobody can answer, which is an error that names the option.
fn ask(question: &str) -> anyhow::Result<bool> {
    if !std::io::stdin().is_terminal() {
        bail!("there is no terminal to ask at: {question} Say --yes if that is what you want");
    }
    eprint!("{question} [y/N] ");
    std::io::stderr().flush()?;
    Ok(matches!(line()?.trim(), "y" | "Y" | "yes"))
}

/// A line from standard input; its end (Ctrl-D) is an error, for no question is answered by it.
fn line() -> anyhow::Result<String> {
    // Longer than any answer.
    const LONGEST: u64 = 4096;
    let mut answer = String::new();
    std::io::stdin().lock().take(LONGEST).read_line(&mut answer)?;
    if answer.is_empty() {
        eprintln!();
        bail!("the question was not answered; nothing was done");
    }
    Ok(answer)
}

/// The command was called in a way that cannot work; exit status 2, as for what clap refuses.
#[derive(Debug)]
pub(crate) struct Usage(pub(crate) String);

impl std::fmt::Display for Usage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

/// A signal has ended something in order, which can be gone on with; the program then ends by that signal, so that a script around it
/// ends, too.
#[derive(Debug)]
pub(crate) struct Stopped(pub(crate) i32);

impl std::fmt::Display for Stopped {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("stopped by a signal; the same call goes on where this one was")
    }
}

impl std::error::Error for Stopped {}

/// Bytes for people.
fn mebibytes(bytes: u64) -> String {
    let tenths = bytes.saturating_mul(10) / (1 << 20);
    format!("{}.{} MiB", tenths / 10, tenths % 10)
}
