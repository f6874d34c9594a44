//! A payload for tests of the link: instead of a distribution's `/init`, it writes to the disk, block by block, each flushed,
//! says so on the console, reads all back, and waits.
//!
//! Block n of the disk gets several [`pattern`]s, one after the other; the end-to-end tests check that the laptop's disk image has the last one:
//! an older write that comes late would show.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use rustix::mount::{MountFlags, mount};
use rustix::time::{ClockId, clock_gettime, clock_settime};
use stiefel_tests::scenario::{CLOCK_AT, CLOCK_WORD, LOAD_BLOCK, LOAD_BLOCKS, LOAD_TIMES, pattern};

fn main() {
    if let Err(error) = run() {
        say(&format!("load: ERROR {error}"));
    }
    loop {
        // The kernel panics when it ends.
        std::thread::sleep(Duration::from_secs(3600));
    }
}

fn run() -> std::io::Result<()> {
    for (fstype, target) in [
        ("proc", "/proc"),
        ("devtmpfs", "/dev"),
        ("tmpfs", "/run"),
        ("sysfs", "/sys"),
    ] {
        std::fs::create_dir_all(target)?;
        mount(fstype, target, fstype, MountFlags::empty(), None)?;
    }
    let disk = File::options().read(true).write(true).open(device()?)?;
    let words = std::fs::read_to_string("/proc/cmdline")?;
    let step = words
        .split_ascii_whitespace()
        .find_map(|word| word.strip_prefix(CLOCK_WORD)?.parse().ok());
    let links = std::fs::read_dir("/sys/class/net")?.flatten();
    let links: Vec<_> = links
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    say(&format!("load: interfaces {}", links.join(" ")));
    say("load: begin");
    for number in 0..LOAD_BLOCKS {
        if let Some(hours) = step.filter(|_| number == CLOCK_AT) {
            step_clock(hours)?;
        }
        for time in 0..LOAD_TIMES {
            disk.write_all_at(&pattern(number, time), number * LOAD_BLOCK as u64)?;
            disk.sync_all()?;
        }
        say(&format!("load: wrote {number}"));
    }
    // From the laptop, not from this machine's memory.
    std::fs::write("/proc/sys/vm/drop_caches", "3")?;
    let mut read = vec![0; LOAD_BLOCK];
    for number in 0..LOAD_BLOCKS {
        disk.read_exact_at(&mut read, number * LOAD_BLOCK as u64)?;
        if read != pattern(number, LOAD_TIMES - 1) {
            say(&format!("load: ERROR block {number} is not what was written"));
        }
    }
    say("load: done");
    Ok(())
}

/// The laptop's disk, whichever way it comes.
fn device() -> std::io::Result<&'static str> {
    let found = ["/dev/nbd0", "/dev/nvme0n1"]
        .into_iter()
        .find(|path| std::path::Path::new(path).exists());
    found.ok_or_else(|| std::io::Error::other("there is no disk"))
}

/// Sets the clock forward or back, as a time server or a wrong time zone does.
fn step_clock(hours: i64) -> std::io::Result<()> {
    let mut now = clock_gettime(ClockId::Realtime);
    now.tv_sec += hours * 3600;
    clock_settime(ClockId::Realtime, now)?;
    say(&format!("load: clock stepped by {hours} h"));
    Ok(())
}

fn say(text: &str) {
    let console = File::options().write(true).open("/dev/console");
    // Nobody else could be told.
    let _ = console.and_then(|mut console| writeln!(console, "{text}"));
}
