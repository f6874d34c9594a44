//! The end-to-end tests: stiefel in virtual machines, as its users run it.
//!
//! `e2e --program FILE [--full] [--list] [NAME …]` runs the tests whose names contain one of the given words, or all. Each prints
//! one line; the last line counts them. Exit status 1 if one failed, 2 if none could be run or a signal came. Serial logs
//! stay in the harness's log folder.

mod endure;
mod faults;
mod image;
mod journey;
mod link;
mod tiny;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use stiefel_tests::kit::Kit;
use stiefel_tests::scenario::Failure;
use stiefel_tests::tools::{self, Job};
use stiefel_tests::{Accel, cache, stop};

/// What every test gets.
struct Bench {
    kit: Kit,
    /// The program under test.
    program: PathBuf,
    /// Whether the long matrices run, too.
    full: bool,
}

struct Test {
    name: &'static str,
    run: fn(&Bench) -> Result<(), Failure>,
}

const TESTS: &[Test] = &[
    Test {
        name: "ramdisk_of_debians_kernel_is_small_and_has_all_drivers",
        run: image::ramdisk,
    },
    Test {
        name: "overlay_of_debians_kernel_has_all_that_reaches_the_laptop",
        run: image::session_overlay,
    },
    Test {
        name: "plug_boots_the_desktop_and_power_off_brings_the_laptop_home",
        run: journey::plug,
    },
    Test {
        name: "wake_boots_the_desktop_without_a_plug",
        run: journey::wake,
    },
    Test {
        name: "everything_that_happens_to_the_link_leaves_debians_root_whole",
        run: endure::link_faults,
    },
    Test {
        name: "desktop_reboots_is_reset_and_powers_off_without_its_laptop",
        run: endure::desktop_comes_and_goes,
    },
    Test {
        name: "laptop_reset_in_mid_session_ends_the_desktop_and_nothing_is_written_later",
        run: endure::laptop_reset,
    },
    Test {
        name: "wrong_key_finds_nothing_and_changes_nothing",
        run: faults::wrong_key,
    },
    Test {
        name: "altered_bundle_is_refused_and_fetched_anew",
        run: faults::altered_bundle,
    },
    Test {
        name: "server_killed_during_the_fetch_is_said_and_searched_again",
        run: faults::server_killed,
    },
    Test {
        name: "cable_out_under_load_loses_nothing",
        run: link::cable_out,
    },
    Test {
        name: "adapter_of_the_desktop_replugged_under_load_loses_nothing",
        run: link::desktop_replug,
    },
    Test {
        name: "adapter_of_the_laptop_replugged_under_load_loses_nothing",
        run: link::laptop_replug,
    },
    Test {
        name: "clock_stepped_by_half_a_day_under_load_stops_nothing",
        run: link::clock_step,
    },
    Test {
        name: "system_without_ipv6_has_the_link_all_the_same",
        run: link::without_ipv6,
    },
    Test {
        name: "nic_stays_the_systems_in_a_lan_and_is_hidden_on_a_cable_of_its_own",
        run: link::lan,
    },
    Test {
        name: "packets_are_large_where_the_whole_way_carries_them",
        run: link::packets,
    },
    Test {
        name: "recorded_traffic_shows_nothing_of_the_disk_inside_the_tunnel",
        run: link::recorded,
    },
    Test {
        name: "absent_disk_is_said_and_the_laptop_goes_home",
        run: faults::absent_disk,
    },
    Test {
        name: "ramdisk_reaches_its_role_in_256_mib",
        run: faults::small_memory,
    },
];

struct Arguments {
    program: PathBuf,
    words: Vec<String>,
    list: bool,
    full: bool,
}

fn arguments() -> Result<Arguments, Failure> {
    let mut parsed = Arguments {
        program: PathBuf::new(),
        words: Vec::new(),
        list: false,
        full: false,
    };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--program" => parsed.program = args.next().ok_or("--program wants a file")?.into(),
            "--list" => parsed.list = true,
            "--full" => parsed.full = true,
            word if !word.starts_with('-') => parsed.words.push(word.to_owned()),
            other => {
                return Err(format!("{other} is not known; accepted: --program FILE, --full, --list, names").into());
            }
        }
    }
    if !parsed.list && !parsed.program.is_file() {
        return Err(
            "--program must name the static program, such as target/x86_64-unknown-linux-gnu/release/stiefel".into(),
        );
    }
    Ok(parsed)
}

fn main() -> ExitCode {
    let done = run();
    if let Err(stopped) = stop::check() {
        eprintln!("Error: {stopped}");
        return ExitCode::from(2);
    }
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(failure) => {
            eprintln!("Error: {}", chain(&*failure));
            ExitCode::from(2)
        }
    }
}

/// An error with its causes.
fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}\n  because: {cause}"))
}

fn run() -> Result<bool, Failure> {
    let arguments = arguments()?;
    let chosen: Vec<&Test> = TESTS
        .iter()
        .filter(|test| {
            arguments.words.is_empty() || arguments.words.iter().any(|word| test.name.contains(word.as_str()))
        })
        .collect();
    if arguments.list {
        chosen.iter().for_each(|test| println!("{}", test.name));
        return Ok(true);
    }
    let missing = tools::missing(&[Job::Boot, Job::Uefi, Job::LaptopDisk]);
    if let Some(first) = missing.first() {
        return Err(format!(
            "{} is missing (package {}); `tests/run` installs what is needed",
            first.program, first.package
        )
        .into());
    }
    stop::on_signals()?;
    println!(
        "accelerator: {:?}; logs: {}",
        Accel::detect(),
        cache::log_dir()?.display()
    );
    let begun = Instant::now();
    let bench = Bench {
        full: arguments.full,
        kit: Kit::prepare(&arguments.program, None)?,
        program: arguments.program,
    };
    println!(
        "prepared in {:.0} s: installed system, ramdisk, key",
        begun.elapsed().as_secs_f64()
    );
    let mut failed = 0;
    for test in &chosen {
        let begun = Instant::now();
        let result = (test.run)(&bench);
        stop::check()?;
        let seconds = begun.elapsed().as_secs_f64();
        match result {
            Ok(()) => println!("ok      {} ({seconds:.0} s)", test.name),
            Err(failure) => {
                failed += 1;
                println!("FAILED  {} ({seconds:.0} s)\n{}", test.name, chain(&*failure));
            }
        }
    }
    println!("{} passed, {failed} failed", chosen.len() - failed);
    Ok(failed == 0)
}
