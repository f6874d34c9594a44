//! The first process of both machines: laptop or desktop, as a word on the kernel's command line says.
//!
//! The laptop serves its disk by all methods; the desktop measures and says what it measured on its console. Neither ever
//! ends: the kernel would panic.

mod desktop;
mod disk;
mod laptop;
mod machine;
mod tcp;

use std::fs::File;
use std::io::Write;
use std::time::Duration;

use crate::result::{DONE, ERROR, MARK, ROLE, ROUNDS, SECONDS};
use anyhow::{Context, bail};

/// Does all that this machine is for, and stays.
pub(crate) fn run() -> ! {
    match act() {
        Ok(()) => say(DONE),
        Err(error) => say(&format!("{ERROR}{error:#}")),
    }
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}

fn act() -> anyhow::Result<()> {
    machine::mount_all()?;
    let words = std::fs::read_to_string("/proc/cmdline")?;
    let word = |name: &str| {
        let found = words.split_ascii_whitespace().find_map(|word| word.strip_prefix(name));
        found.with_context(|| format!("{name} is missing on the kernel's command line"))
    };
    match word(ROLE)? {
        laptop::ROLE => match laptop::run()? {},
        desktop::ROLE => {
            let seconds = Duration::try_from_secs_f64(word(SECONDS)?.parse()?)?;
            desktop::run(word(ROUNDS)?.parse()?, seconds)
        }
        other => bail!("{other} is no role"),
    }
}

/// One line for the host. In one piece, so that the kernel does not write between.
fn say(text: &str) {
    let console = File::options().write(true).open("/dev/console");
    // Nobody else could be told.
    let _ = console.and_then(|mut console| console.write_all(format!("\n{MARK}{text}\n").as_bytes()));
}
