//! The benchmark of the link: NVMe and NBD, inside the tunnel and without it, against raw TCP and against nbd-client with
//! nbd-server, between the same two virtual machines in one run.
//!
//! `link-bench [--rounds N] [--seconds S] [--cpus N] [--jumbo] [--json] [--yes]`. How it is measured: docs/link.md. Exit
//! status 1 if something fails, 2 for wrong words. In both machines the same program is the first process: see `init`.

mod init;
mod pack;
mod result;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use crate::result::{DONE, ERROR, MARK, Measure, Method, ROLE, ROUNDS, SECONDS, SPAN, Sample, Way, json, rows, table};
use anyhow::{Context, bail};
use stiefel_tests::disk::{BaseOptions, BaseSystem};
use stiefel_tests::kit::DESKTOP_MAC;
use stiefel_tests::tiny::tiny;
use stiefel_tests::tools::{self, Job};
use stiefel_tests::{Accel, Content, Drive, Netdev, NicModel, Vm, stop};

const USAGE: &str = "usage: link-bench [--rounds N] [--seconds S] [--cpus N] [--jumbo] [--json] [--yes]
  --rounds   how often everything is measured in turn (6)
  --seconds  for each measurement (1)
  --cpus     of each machine (1)
  --jumbo    NICs with packets of 9000 bytes instead of 1500
  --json     the result for programs
  --yes      install what is missing without asking";
const LAPTOP_MAC: &str = "52:54:00:57:1e:21";
/// Between two lines of the desktop, besides the time that is measured; as under KVM.
const SILENCE: Duration = Duration::from_secs(60);
/// The laptop keeps the whole disk in its cache.
const LAPTOP_MIB: u32 = 768;

struct Arguments {
    rounds: u32,
    seconds: f64,
    cpus: u32,
    jumbo: bool,
    json: bool,
    yes: bool,
}

fn arguments(mut words: impl Iterator<Item = String>) -> anyhow::Result<Arguments> {
    let mut parsed = Arguments {
        rounds: 6,
        seconds: 1.0,
        cpus: 1,
        jumbo: false,
        json: false,
        yes: false,
    };
    while let Some(word) = words.next() {
        let mut value = || words.next().with_context(|| format!("{word} wants a number"));
        match word.as_str() {
            "--rounds" => parsed.rounds = value()?.parse()?,
            "--seconds" => parsed.seconds = value()?.parse()?,
            "--cpus" => parsed.cpus = value()?.parse()?,
            "--jumbo" => parsed.jumbo = true,
            "--json" => parsed.json = true,
            "--yes" => parsed.yes = true,
            _ => bail!("{word} is not known"),
        }
    }
    let sensible = (1..=1000).contains(&parsed.rounds)
        && (0.1..=600.0).contains(&parsed.seconds)
        && (1..=64).contains(&parsed.cpus);
    anyhow::ensure!(sensible, "1 to 1000 rounds, 0.1 to 600 seconds, 1 to 64 CPUs");
    Ok(parsed)
}

fn main() -> ExitCode {
    // In a container it may be the first process, too, but not by this name.
    if std::process::id() == 1 && std::env::args_os().next().is_some_and(|name| name == "/init") {
        init::run();
    }
    let arguments = match arguments(std::env::args().skip(1)) {
        Ok(arguments) => arguments,
        Err(error) => {
            eprintln!("Error: {error:#}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    let done = run(&arguments);
    if let Err(stopped) = stop::check() {
        eprintln!("Error: {stopped}");
        return ExitCode::FAILURE;
    }
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("Error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let missing = tools::missing(&[Job::Boot, Job::LaptopDisk, Job::LinkBench]);
    tools::install(&missing, arguments.yes)?;
    stop::on_signals()?;
    let begun = Instant::now();
    let samples = measure(arguments)?;
    let rows = rows(&samples);
    let expected = Way::ALL.len() * Method::ALL.len() * Measure::ALL.len();
    anyhow::ensure!(rows.len() == expected, "only {} of {expected} results came", rows.len());
    let Arguments {
        rounds, seconds, cpus, ..
    } = arguments;
    if arguments.json {
        let whole = serde_json::json!({
            "accelerator": format!("{:?}", Accel::detect()).to_lowercase(),
            "rounds": rounds,
            "seconds": seconds,
            "cpus": cpus,
            "jumbo": arguments.jumbo,
            "rows": json(&rows),
        });
        println!("{whole:#}");
    } else {
        println!(
            "{:?}, {cpus} CPU each, packets of {} bytes, {rounds} rounds of {seconds} s each, {:.0} s in all\n",
            Accel::detect(),
            if arguments.jumbo { 9000 } else { 1500 },
            begun.elapsed().as_secs_f64(),
        );
        print!("{}", table(&rows));
    }
    Ok(())
}

fn measure(arguments: &Arguments) -> anyhow::Result<Vec<Sample>> {
    let installed = BaseSystem::ensure(&BaseOptions::default())?.extract_kernel()?;
    let dir = tempfile::tempdir()?;
    let disk = pack::disk(dir.path(), SPAN)?;
    let ramdisk = dir.path().join("ramdisk");
    std::fs::write(&ramdisk, pack::ramdisk()?)?;
    let modules = pack::modules(&installed.modules)?;
    // By datagrams everything is three times slower, and uneven.
    let cable = |listens| Netdev::Stream {
        path: dir.path().join("cable"),
        listens,
    };
    let nic = if arguments.jumbo {
        NicModel::VirtioJumbo
    } else {
        NicModel::VirtioPlain
    };
    let machine = |role: &str| {
        let words = [
            format!("{ROLE}{role}"),
            format!("{ROUNDS}{}", arguments.rounds),
            format!("{SECONDS}{}", arguments.seconds),
            "loglevel=4".to_owned(),
        ];
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        tiny(
            role,
            &installed.kernel,
            &Content::File(ramdisk.clone()),
            &modules,
            &words,
        )
        .cpus(arguments.cpus)
    };
    let laptop = machine("laptop")
        .memory_mib(LAPTOP_MIB)
        .disk(Drive {
            path: disk,
            serial: "bench".to_owned(),
            snapshot: false,
        })
        .nic("cable", nic, &cable(true), LAPTOP_MAC)
        .start()?;
    let desktop = machine("desktop")
        .nic("cable", nic, &cable(false), DESKTOP_MAC)
        .start()?;
    listen(&laptop, &desktop, arguments)
}

/// What the desktop says it measured.
fn listen(laptop: &Vm, desktop: &Vm, arguments: &Arguments) -> anyhow::Result<Vec<Sample>> {
    let patience = SILENCE + Duration::from_secs_f64(arguments.seconds);
    let mut samples = Vec::new();
    loop {
        let line = desktop.serial().expect(MARK, patience);
        let line = line.with_context(|| match said_error(laptop) {
            Some(error) => format!("the laptop: {error}"),
            None => format!("the laptop's console: {}", laptop.serial().log().display()),
        })?;
        if let Some(sample) = Sample::parse(&line) {
            eprintln!("{}", line.trim());
            samples.push(sample);
        } else if let Some((_, error)) = line.split_once(ERROR) {
            bail!(
                "the desktop says: {error}; the consoles: {}, {}",
                desktop.serial().log().display(),
                laptop.serial().log().display()
            );
        } else if line.trim_end().ends_with(DONE) {
            return Ok(samples);
        }
    }
}

fn said_error(machine: &Vm) -> Option<String> {
    let lines = machine.serial().lines();
    let mut errors = lines.iter().filter_map(|(_, line)| {
        let (_, error) = line.split_once(&format!("{MARK}{ERROR}"))?;
        Some(error.to_owned())
    });
    errors.next_back()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &str) -> anyhow::Result<Arguments> {
        arguments(words.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn words_are_understood() {
        let parsed = parse("--rounds 5 --seconds 0.5 --yes").unwrap();
        assert_eq!((parsed.rounds, parsed.seconds, parsed.yes), (5, 0.5, true));
        assert!(!parsed.json && !parsed.jumbo);
    }

    #[test]
    fn nonsense_is_refused() {
        for words in [
            "--rounds",
            "--rounds x",
            "--rounds 0",
            "--seconds NaN",
            "--cpus 65",
            "more",
        ] {
            assert!(parse(words).is_err(), "{words}");
        }
    }
}
