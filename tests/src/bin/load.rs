//! A load for tests on an installed system: writes files over and over, each flushed, until it is told to stop; then reads all
//! back past the cache and says whether they are what was written last.
//!
//! `load FOLDER STOP`: writes below FOLDER until the file STOP is there. Its last line is `load: ok, N writes`, or
//! `load: ERROR …`.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Files that are written in turn.
const FILES: u64 = 24;
/// Lines of 64 bytes in each.
const LINES: usize = 4096;

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let (Some(folder), Some(stop)) = (args.next(), args.next()) else {
        eprintln!("usage: load FOLDER STOP");
        return ExitCode::from(2);
    };
    match run(Path::new(&folder), Path::new(&stop)) {
        Ok(writes) => {
            println!("load: ok, {writes} writes");
            ExitCode::SUCCESS
        }
        Err(error) => {
            println!("load: ERROR {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(folder: &Path, stop: &Path) -> std::io::Result<u64> {
    fs::create_dir_all(folder)?;
    let mut writes = 0;
    while !stop.exists() {
        writes += 1;
        let file = path(folder, writes % FILES);
        let beside = file.with_extension("new");
        let mut new = File::create(&beside)?;
        new.write_all(&content(writes))?;
        new.sync_all()?;
        fs::rename(&beside, &file)?;
        File::open(folder)?.sync_all()?;
        println!("load: {writes}");
    }
    // What is in memory proves nothing of the disk.
    fs::write("/proc/sys/vm/drop_caches", "3\n")?;
    for last in writes.saturating_sub(FILES - 1).max(1)..=writes {
        let file = path(folder, last % FILES);
        if fs::read(&file)? != content(last) {
            return Err(std::io::Error::other(format!(
                "{} is not what was written last",
                file.display()
            )));
        }
    }
    Ok(writes)
}

fn path(folder: &Path, number: u64) -> PathBuf {
    folder.join(format!("file-{number}"))
}

fn content(write: u64) -> Vec<u8> {
    format!("{:<63}\n", format!("stiefel's load, write {write}"))
        .repeat(LINES)
        .into_bytes()
}
