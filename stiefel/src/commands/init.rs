//! `stiefel init`: looks at this laptop, and writes its configuration and a first key.
//!
//! Everything is decided and said before anything is written. What is there is never replaced without a yes (`--force` is one),
//! and then kept beside.

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use stiefel_server::payload;
use stiefel_server::setup::{self, Choice, Machine, Nic};
use stiefel_shared::config::{CONFIG_PATH, Config};

use super::{Usage, ask, line};
use crate::cli::InitArgs;

/// Runs it.
pub(crate) fn init(named: Option<&Path>, args: &InitArgs) -> anyhow::Result<()> {
    if !args.root.is_dir() {
        bail!(
            "there is no folder {}; mount the system there, or correct --root",
            args.root.display()
        );
    }
    let terminal = std::io::stdin().is_terminal();
    if !terminal && !args.yes && !args.dry_run {
        return Err(Usage(
            "there is no terminal to ask at; `stiefel init --yes` takes what it would propose, `stiefel init --dry-run` only shows it"
                .to_owned(),
        )
        .into());
    }
    let path = named.map_or_else(|| args.root.join(CONFIG_PATH.trim_start_matches('/')), Path::to_owned);
    let machine = Machine::look(&args.root);
    let modules = setup::extra_modules(&args.root, &machine);
    describe(args, &machine, &modules);
    if !args.dry_run {
        setup::check_writable(&path)?;
        setup::check_writable(&args.root.join("etc/stiefel/keys/x"))?;
    }
    let nic = choose(&machine, args.yes || args.dry_run)?;
    let choice = nic.and_then(|nic| {
        let identity = nic.identity(&machine.nics)?;
        Some(Choice { nic, identity })
    });
    let text = setup::render(&machine, choice.as_ref(), &modules)
        .context("what was found makes no configuration; write one by hand, after config-example.yaml")?;
    if args.dry_run {
        println!("\n{} would be:\n\n{text}", path.display());
        return Ok(());
    }
    println!();
    let kept = match decide(&path, args)? {
        Decision::Keep(config) => {
            println!(
                "keep     {} (it is there already; `stiefel init --force` makes it anew)",
                path.display()
            );
            remind(&config, &machine);
            None
        }
        Decision::Write => Some(setup::put(&path, &text)?),
    };
    if let Some(placed) = kept {
        println!("write    {}", path.display());
        if let Some(old) = placed.kept {
            println!("         (the one that was there is kept as {})", old.display());
        }
    }
    match setup::first_key(&args.root)? {
        Some(key) => println!("write    {} (a first stick's key)", key.display()),
        None => println!("keep     the keys that are there"),
    }
    next_commands(&machine, choice.is_some());
    Ok(())
}

/// What is there, in plain words.
fn describe(args: &InitArgs, machine: &Machine, modules: &[String]) {
    let kernel = machine.release.as_deref().unwrap_or("none that runs here");
    println!("system   {}, kernel {kernel}", machine.distribution.name);
    println!("disk     {}", machine.root);
    let loader = machine.firmware.loader.as_deref().unwrap_or("an unknown boot loader");
    let firmware = if machine.firmware.efi { "UEFI" } else { "BIOS" };
    let secure = match machine.firmware.secure_boot {
        Some(true) => ", Secure Boot on",
        Some(false) => ", Secure Boot off",
        None => "",
    };
    let lockdown = machine
        .firmware
        .lockdown
        .as_deref()
        .filter(|lockdown| *lockdown != "none");
    let lockdown = lockdown
        .map(|lockdown| format!(", lockdown {lockdown}"))
        .unwrap_or_default();
    println!("boots    by {loader} ({firmware}{secure}{lockdown})");
    match payload::find(&args.root, &Config::default().boot.load) {
        Ok(payload) => println!(
            "         kernel {} on the desktop, too: {}",
            payload.version, payload.reason
        ),
        Err(error) => {
            let text = error.to_string();
            let what = text.lines().next().unwrap_or_default();
            println!("         what the desktop is to boot is not known yet: {what} (see `stiefel payload`)");
        }
    }
    if machine.nics.is_empty() {
        println!("adapter  no wired network adapter is here");
    }
    for nic in &machine.nics {
        let internet = if nic.default_route {
            "; it leads to the internet"
        } else {
            ""
        };
        println!("adapter  {nic}{internet}");
    }
    if !modules.is_empty() {
        println!(
            "modules  the ramdisk needs {} besides the usual ones",
            modules.join(", ")
        );
    }
}

/// Which adapter is dedicated: the only one there is, or which the user says. Never by itself one that leads to the internet.
fn choose(machine: &Machine, silent: bool) -> anyhow::Result<Option<&Nic>> {
    let candidates: Vec<&Nic> = machine
        .candidates()
        .into_iter()
        .filter(|nic| nic.identity(&machine.nics).is_some())
        .collect();
    let free: Vec<&Nic> = candidates.iter().copied().filter(|nic| !nic.default_route).collect();
    match (candidates.as_slice(), free.as_slice()) {
        ([_], [only]) => {
            println!(
                "\n{} is the adapter to dedicate: plugging it in will start a session.",
                only.name
            );
            return Ok(Some(*only));
        }
        ([], _) => {
            println!(
                "\nNo USB network adapter to dedicate is plugged in; a stick can wake the laptop over a wired adapter."
            );
            return Ok(None);
        }
        _ => {}
    }
    if silent {
        let names: Vec<_> = candidates.iter().map(|nic| nic.name.as_str()).collect();
        println!(
            "\nWhich adapter is to be dedicated cannot be told ({}): none is. Write it into `trigger` in the configuration, or run `stiefel \
             init` without --yes.",
            names.join(", ")
        );
        return Ok(None);
    }
    ask_which(&candidates)
}

fn ask_which<'a>(candidates: &[&'a Nic]) -> anyhow::Result<Option<&'a Nic>> {
    eprintln!(
        "\nWhich adapter is to be dedicated to the desktop? Plugging it in will start a session, and no other program will use it."
    );
    for (number, nic) in (1..).zip(candidates) {
        let internet = if nic.default_route {
            " (it leads to the internet now)"
        } else {
            ""
        };
        eprintln!("  {number}  {nic}{internet}");
    }
    eprintln!("  0  none of them");
    loop {
        eprint!("Number: ");
        std::io::stderr().flush()?;
        let answer = line()?;
        match answer.trim().parse::<usize>() {
            Ok(0) => return Ok(None),
            Ok(number) => {
                if let Some(nic) = candidates.get(number - 1) {
                    return Ok(Some(*nic));
                }
            }
            Err(_) => {}
        }
        eprintln!("`{}` is none of the numbers 0 to {}", answer.trim(), candidates.len());
    }
}

enum Decision {
    /// The one that is there stays.
    Keep(Box<Config>),
    Write,
}

/// What becomes of the configuration that is there.
fn decide(path: &Path, args: &InitArgs) -> anyhow::Result<Decision> {
    let Some(existing) = setup::read_configuration(path)? else {
        return Ok(Decision::Write);
    };
    if args.force {
        return Ok(Decision::Write);
    }
    let parsed = Config::parse(&existing);
    if !args.yes {
        if let Err(error) = &parsed {
            eprintln!("{} cannot be used:\n{error}", path.display());
        }
        let question = format!(
            "{} is there already. Make it anew, and keep the old one beside?",
            path.display()
        );
        if ask(&question)? {
            return Ok(Decision::Write);
        }
    }
    let config = parsed.with_context(|| {
        format!(
            "{} is there, and cannot be used; nothing was changed. `stiefel init --force` makes it anew and keeps the old one beside",
            path.display()
        )
    })?;
    Ok(Decision::Keep(Box::new(config)))
}

/// What belongs into a configuration that is kept.
fn remind(config: &Config, machine: &Machine) {
    for nic in machine.candidates() {
        if !nic.is_named_by(&config.trigger)
            && let Some(identity) = nic.identity(&machine.nics)
        {
            let key = match identity {
                setup::Identity::Usb(_) => "usb",
                setup::Identity::Mac(_) => "macs",
            };
            println!(
                "         it does not name {nic}; to dedicate that one, write below `trigger`:  {key}: [\"{identity}\"]"
            );
        }
    }
}

fn next_commands(machine: &Machine, dedicated: bool) {
    let program = program();
    println!("\nNext, as root:");
    for (command, what) in [
        ("doctor", "what is missing, and the command that mends it"),
        (
            "install",
            "builds the ramdisk, starts the service; shows each change and asks",
        ),
        (
            "stick /dev/sdX",
            "writes the desktop's stick; shows what it wipes and asks",
        ),
    ] {
        println!(
            "  {:<width$} # {what}",
            format!("{program} {command}"),
            width = program.len() + 16
        );
    }
    if !dedicated && machine.candidates().is_empty() {
        println!(
            "Once you have a USB network adapter (gigabit or faster): plug it in and type `{program} init`; it says what to add to\n\
             the configuration. Until then the stick wakes the laptop over its wired adapter, or you type `{program} serve`."
        );
    }
}

/// As the user calls it: before `install` it is not in the path.
fn program() -> String {
    let typed = std::env::args_os().next().map(PathBuf::from).unwrap_or_default();
    let typed = typed.to_string_lossy();
    match typed.contains('/') {
        true => typed.into_owned(),
        false => "stiefel".to_owned(),
    }
}
