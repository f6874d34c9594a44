//! The end-to-end tests: stiefel in virtual machines, as its users run it.
//!
//! `e2e --program FILE [--full] [--resume] [--jobs N] [--list] [NAME …]` runs the tests whose names contain one of the given words,
//! or all; long ones only with `--full` or by name. With `--resume` those are left out that have passed with the same two programs.
//! Several run at the same time (`--jobs`; by default one per CPU, four at most). Each prints one line when it has ended; the last
//! line counts them. Exit status 1 if one failed, 2 if none could be run or a signal came. Serial logs stay in the harness's log folder.

mod endure;
mod faults;
mod guest;
mod image;
mod interlocks;
mod journey;
mod link;
mod mistakes;
mod once;
mod runner;
mod setup;
mod systems;
mod target;
mod target_faults;
mod target_stick;
mod target_systemd;
mod tiny;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use link::{WAYS, Way};
use runner::{Bench, Passed, Test};
use stiefel_tests::kit::Kit;
use stiefel_tests::scenario::Failure;
use stiefel_tests::tools::{self, Job};
use stiefel_tests::{Accel, cache, stop};

#[derive(Default)]
struct Tests(Vec<Test>);

impl Tests {
    fn add(&mut self, name: &str, run: impl Fn(&Bench) -> Result<(), Failure> + Send + Sync + 'static) {
        self.0.push(Test {
            name: name.to_owned(),
            long: false,
            waits: false,
            run: Box::new(run),
        });
    }

    /// A test that runs only with `--full`, or by name.
    fn long(&mut self, name: &str, run: impl Fn(&Bench) -> Result<(), Failure> + Send + Sync + 'static) {
        self.add(name, run);
        if let Some(test) = self.0.last_mut() {
            test.long = true;
        }
    }

    /// A long test for each way that mostly waits.
    fn waits(&mut self, name: &str, ways: &[Way], run: fn(&Bench, Way) -> Result<(), Failure>) {
        for &way in ways {
            self.0.push(Test {
                name: format!("{name} ({})", called(way)),
                long: true,
                waits: true,
                run: Box::new(move |bench| run(bench, way)),
            });
        }
    }

    /// A test for each way that the disk may travel; those of the `short` numbers in every run.
    fn ways(&mut self, name: &str, short: &[usize], run: fn(&Bench, Way) -> Result<(), Failure>) {
        for (number, way) in WAYS.into_iter().enumerate() {
            self.0.push(Test {
                name: format!("{name} ({})", called(way)),
                long: !short.contains(&number),
                waits: false,
                run: Box::new(move |bench| run(bench, way)),
            });
        }
    }
}

/// A way's name.
fn called((transport, encryption): Way) -> String {
    format!("{transport:?}, {encryption:?}").to_lowercase()
}

fn tests() -> Vec<Test> {
    let mut tests = Tests::default();
    // Those that mostly wait come first: others run meanwhile.
    tests.waits("cable_out_for_10_min_under_load_loses_nothing", &WAYS, |bench, way| {
        link::cable_out(bench, way, 600)
    });
    // Only the tunnel's handshakes know of the time.
    tests.waits(
        "clock_stepped_by_half_a_day_under_load_stops_nothing",
        &[WAYS[0], WAYS[1]],
        link::clock_step,
    );
    tests.waits("cable_out_for_120_s_under_load_loses_nothing", &WAYS, |bench, way| {
        link::cable_out(bench, way, 120)
    });
    tests.add("ramdisk_of_debians_kernel_is_small_and_has_all_drivers", image::ramdisk);
    tests.add(
        "overlay_of_debians_kernel_has_all_that_reaches_the_laptop",
        image::session_overlay,
    );
    tests.add(
        "plug_boots_the_desktop_and_power_off_brings_the_laptop_home",
        journey::plug,
    );
    tests.add("wake_boots_the_desktop_without_a_plug", journey::wake);
    tests.ways(
        "everything_that_happens_to_the_link_leaves_debians_root_whole",
        &[],
        endure::link_faults,
    );
    tests.long(
        "desktop_reboots_is_reset_and_powers_off_without_its_laptop",
        endure::desktop_comes_and_goes,
    );
    tests.long(
        "initrd_with_the_attach_step_in_it_boots_the_desktop_without_more_modules",
        journey::baked,
    );
    tests.long(
        "kernel_changed_on_the_desktop_sends_the_laptop_home_to_collect_it",
        endure::upgrade,
    );
    tests.ways(
        "laptop_reset_in_mid_session_ends_the_desktop_and_nothing_is_written_later",
        &[0],
        endure::laptop_reset,
    );
    tests.add("wrong_key_finds_nothing_and_changes_nothing", faults::wrong_key);
    tests.add("altered_bundle_is_refused_and_fetched_anew", faults::altered_bundle);
    tests.add(
        "server_killed_during_the_fetch_is_said_and_searched_again",
        faults::server_killed,
    );
    tests.ways("cable_out_for_20_s_under_load_loses_nothing", &[0], |bench, way| {
        link::cable_out(bench, way, 20)
    });
    tests.ways(
        "adapter_of_the_desktop_replugged_under_load_loses_nothing",
        &[1],
        link::desktop_replug,
    );
    tests.ways(
        "adapter_of_the_laptop_replugged_under_load_loses_nothing",
        &[0],
        link::laptop_replug,
    );
    tests.ways("system_without_ipv6_has_the_link_all_the_same", &[], link::without_ipv6);
    tests.long(
        "nic_stays_the_systems_in_a_lan_and_is_hidden_on_a_cable_of_its_own",
        link::lan,
    );
    tests.long("packets_are_large_where_the_whole_way_carries_them", link::packets);
    tests.ways(
        "server_killed_five_times_under_load_loses_nothing",
        &[1],
        link::server_killed,
    );
    tests.ways(
        "recorded_traffic_shows_nothing_of_the_disk_inside_the_tunnel_and_all_without",
        &[0, 3],
        link::recorded,
    );
    tests.add(
        "guest_writes_into_the_laptops_memory_through_a_killed_server_and_changes_nothing_on_its_disk",
        guest::one,
    );
    tests.long(
        "two_guests_at_once_write_apart_and_change_nothing_on_the_laptops_disk",
        guest::two,
    );
    for way in [WAYS[0], WAYS[2]] {
        let name = format!("networkmanager_switching_all_off_leaves_the_root ({})", called(way));
        tests.long(&name, move |bench| systems::network_manager(bench, way));
    }
    tests.long(
        "luks_and_lvm_root_boots_and_is_taken_down_in_order",
        systems::luks_and_lvm,
    );
    tests.long("btrfs_subvolumes_boot_by_dracut_and_come_home_clean", systems::btrfs);
    tests.long("xfs_root_boots_by_dracut_and_comes_home_clean", systems::xfs);
    tests.add("package_sets_a_debian_up_and_leaves_no_trace", setup::short);
    tests.long(
        "package_sets_a_debian_up_and_leaves_no_trace (ext4, initramfs-tools)",
        |bench| setup::plain(bench, "bookworm"),
    );
    tests.long("package_sets_a_debian_up_and_leaves_no_trace (debian 13)", |bench| {
        setup::plain(bench, "trixie")
    });
    tests.long(
        "package_sets_a_debian_up_and_leaves_no_trace (luks and lvm, initramfs-tools)",
        setup::luks_and_lvm,
    );
    tests.long(
        "package_sets_a_debian_up_and_leaves_no_trace (btrfs, dracut)",
        setup::btrfs,
    );
    tests.long("package_sets_a_debian_up_and_leaves_no_trace (xfs, dracut)", setup::xfs);
    tests.add(
        "mistakes_of_a_new_user_are_said_and_what_was_killed_half_way_is_finished",
        mistakes::mistakes,
    );
    tests.add("absent_disk_is_said_and_the_laptop_goes_home", faults::absent_disk);
    tests.add(
        "desktop_with_a_disk_of_the_same_uuid_is_not_booted",
        interlocks::same_uuid,
    );
    tests.add("two_desktops_want_the_disk_and_a_key_decides", interlocks::two_desktops);
    tests.add("hibernated_laptop_refuses_the_session", interlocks::hibernated);
    tests.long(
        "disks_are_lent_in_clear_to_nvme_cli_and_nbd_client_and_only_read",
        target::open,
    );
    tests.long(
        "disks_are_lent_to_the_holder_of_a_key_and_given_back",
        target::with_a_key,
    );
    tests.long(
        "a_lent_disk_is_written_wherever_it_is_plugged_in_and_no_other_one",
        target::followed,
    );
    tests.long(
        "laptop_is_restarted_to_lend_its_own_disk_and_comes_home",
        target::reboot,
    );
    tests.long(
        "disk_with_a_bad_sector_is_read_around_it_and_a_borrower_reset_while_writing_gets_its_disk_again",
        target_faults::faults,
    );
    tests.long("a_hundred_loans_leave_nothing_behind", target_faults::rounds);
    tests.long(
        "one_efi_file_lends_a_machines_disks_and_its_screen_says_how",
        target_stick::one_file,
    );
    tests.long(
        "dracuts_initrd_lends_after_the_documents_recipe",
        target_systemd::recipe_of_the_document,
    );
    tests.long(
        "desktops_stick_lends_where_the_kernels_command_line_says_so",
        target_stick::by_its_line,
    );
    tests.add("keys_at_the_laptop_are_heard", faults::keys);
    tests.add(
        "laptop_of_one_activation_removes_its_image_and_serves_what_is_on_its_disk",
        once::activation,
    );
    tests.long(
        "laptop_started_from_its_own_stick_serves_what_is_on_its_disk",
        once::search,
    );
    tests.long(
        "laptop_started_from_its_own_stick_asks_the_desktop_for_its_passphrase",
        once::search_luks,
    );
    tests.long(
        "laptop_that_leaves_by_a_reboot_serves_once_and_comes_home",
        once::firmware,
    );
    tests.add("ramdisk_reaches_its_role_in_256_mib", faults::small_memory);
    tests.0
}

struct Arguments {
    program: PathBuf,
    words: Vec<String>,
    list: bool,
    full: bool,
    resume: bool,
    jobs: usize,
}

fn arguments() -> Result<Arguments, Failure> {
    let mut parsed = Arguments {
        program: PathBuf::new(),
        words: Vec::new(),
        list: false,
        full: false,
        resume: false,
        jobs: std::thread::available_parallelism().map_or(1, usize::from).min(4),
    };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--program" => parsed.program = args.next().ok_or("--program wants a file")?.into(),
            "--list" => parsed.list = true,
            "--full" => parsed.full = true,
            "--resume" => parsed.resume = true,
            "--jobs" => {
                let number = args.next().and_then(|word| word.parse().ok());
                parsed.jobs = number.filter(|jobs| *jobs > 0).ok_or("--jobs wants a number")?;
            }
            word if !word.starts_with('-') => parsed.words.push(word.to_owned()),
            other => {
                return Err(format!(
                    "{other} is not known; accepted: --program FILE, --full, --resume, --jobs N, --list, names"
                )
                .into());
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
    let tests = tests();
    let named = |test: &Test| arguments.words.iter().any(|word| test.name.contains(word.as_str()));
    let chosen: Vec<&Test> = tests
        .iter()
        .filter(|test| named(test) || (arguments.words.is_empty() && (arguments.full || !test.long)))
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
    let kit = Kit::prepare(&arguments.program, None)?;
    println!(
        "prepared in {:.0} s: installed system, ramdisk, key",
        begun.elapsed().as_secs_f64()
    );
    let passed = Passed::open(&arguments.program)?;
    let (before, rest): (Vec<_>, Vec<_>) = if arguments.resume {
        let done = passed.names()?;
        chosen.into_iter().partition(|test| done.contains(&test.name))
    } else {
        (Vec::new(), chosen)
    };
    let failed = runner::run(&rest, &kit, &arguments.program, arguments.jobs, &passed)?;
    println!("{} passed, {failed} failed", rest.len() - failed);
    if !before.is_empty() {
        println!("{} had passed before with the same programs", before.len());
    }
    let left_out = tests.iter().filter(|test| test.long && !arguments.full).count();
    if arguments.words.is_empty() && left_out > 0 {
        println!("{left_out} long tests were left out; --full runs them, too");
    }
    Ok(failed == 0)
}
