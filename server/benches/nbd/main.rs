//! The NBD server against nbdkit, qemu-nbd and nbd-server, in interleaved rounds, with one batch client for all.
//!
//! `cargo bench -p stiefel-server --bench nbd -- [--rounds N] [--seconds S] [--size MIB] [--dir DIR] [--install]
//! [--program STIEFEL] [--rows A,B] [--servers A,B] [--compare PROGRAM]...`: prints the table of docs/nbd.md. Peers come from
//! apt (`--install` fetches its newest); one that is missing is left out with a word. Our own server is `STIEFEL nbd`, or this
//! program started again (the same profile, but for panics), with default options; `--compare` adds another build of this.
//! All serve the same file, whose pages are in memory and were written back before each measurement.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::cast_precision_loss)]

mod client;
mod servers;
mod table;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use client::{Kind, Load, Sample};
use servers::{Kinds, Running};

/// Block that carries its own number, so that a wrong answer does not go unnoticed.
pub const BLOCK: usize = 4096;

/// What is measured, under its name in the table.
pub const ROWS: [(&str, Load); 8] = [
    ("read 1M 1 conn", Load::new(Kind::Read, 1 << 20, 8, 1, false)),
    ("read 1M 4 conn", Load::new(Kind::Read, 1 << 20, 4, 4, false)),
    ("write 1M 1 conn", Load::new(Kind::Write, 1 << 20, 8, 1, false)),
    ("write 1M 4 conn", Load::new(Kind::Write, 1 << 20, 4, 4, false)),
    ("read 4k QD1", Load::new(Kind::Read, 4096, 1, 1, true)),
    ("read 4k QD32", Load::new(Kind::Read, 4096, 32, 1, true)),
    ("write 4k QD32", Load::new(Kind::Write, 4096, 32, 1, true)),
    ("write+flush 4k", Load::new(Kind::WriteFlush, 4096, 1, 1, true)),
];

struct Options {
    rounds: usize,
    seconds: f64,
    size: u64,
    directory: PathBuf,
    install: bool,
    rows: Vec<String>,
    servers: Vec<String>,
    compare: Vec<String>,
    program: Option<String>,
}

impl Options {
    fn parse() -> Self {
        let mut options = Self {
            rounds: 5,
            seconds: 2.0,
            size: 2048 << 20,
            directory: env!("CARGO_TARGET_TMPDIR").into(),
            install: false,
            rows: Vec::new(),
            servers: Vec::new(),
            compare: Vec::new(),
            program: None,
        };
        let mut arguments = std::env::args().skip(1);
        while let Some(argument) = arguments.next() {
            let mut value = || arguments.next().expect("this option needs a value");
            let list = |text: String| text.split(',').map(str::to_owned).collect();
            match argument.as_str() {
                "--rounds" => options.rounds = value().parse().expect("a number of rounds"),
                "--seconds" => options.seconds = value().parse().expect("seconds per measurement"),
                "--size" => options.size = value().parse::<u64>().expect("MiB") << 20,
                "--dir" => options.directory = value().into(),
                "--rows" => options.rows = list(value()),
                "--servers" => options.servers = list(value()),
                "--compare" => options.compare.push(value()),
                "--program" => options.program = Some(value()),
                "--install" => options.install = true,
                // Given by cargo itself.
                "--bench" => {}
                other => panic!("unknown option {other}"),
            }
        }
        options
    }
}

/// A file full of blocks that carry their number; in the page cache afterwards.
fn prepare(path: &Path, size: u64) {
    use std::io::Write;
    let mut file = std::io::BufWriter::with_capacity(1 << 20, std::fs::File::create(path).unwrap());
    let mut block = [0x5a; BLOCK];
    for number in 0..size / BLOCK as u64 {
        block[..8].copy_from_slice(&number.to_le_bytes());
        file.write_all(&block).unwrap();
    }
    file.into_inner().unwrap().sync_all().unwrap();
}

/// One measurement of one server, from its start to its end.
#[derive(Clone, Default)]
pub struct Measured {
    /// What the client saw.
    pub sample: Sample,
    /// Server CPU seconds.
    pub cpu: f64,
    /// Peak resident memory of all its processes, MiB.
    pub memory: f64,
}

fn measure(kind: &Kinds, file: &Path, size: u64, load: &Load, seconds: f64) -> Measured {
    // What the one before has written is not to be this one's burden.
    std::fs::File::open(file).unwrap().sync_all().unwrap();
    let running = Running::start(kind, file);
    // The first moments are not counted: threads start, buffers grow.
    let warm = Duration::from_secs_f64(seconds / 8.0);
    let connections = client::connect(running.address, load.connections);
    let (connections, _) = client::run(connections, load, size, warm);
    let before = running.cpu();
    let (_connections, sample) = client::run(connections, load, size, Duration::from_secs_f64(seconds));
    let measured = Measured {
        cpu: running.cpu() - before,
        memory: running.memory(),
        sample,
    };
    running.stop();
    measured
}

/// Brings the peers, as new as apt has them.
fn install() {
    for arguments in [
        "update -q",
        "install -y --no-install-recommends nbdkit qemu-utils nbd-server",
    ] {
        let done = Command::new("apt-get").args(arguments.split(' ')).status().unwrap();
        assert!(done.success(), "apt-get {arguments} failed");
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, mode, address, file] = &arguments[..]
        && mode == "serve"
    {
        let options = stiefel_server::nbd::ExportOptions {
            name: "disk".into(),
            ..Default::default()
        };
        let target = stiefel_server::nbd::Target {
            path: file.into(),
            overlay: None,
        };
        stiefel_server::nbd::run_standalone(&target, &[address.parse().unwrap()], options).unwrap();
        return;
    }
    let options = Options::parse();
    if options.install {
        install();
    }
    let wanted = |list: &[String], name: &str| list.is_empty() || list.iter().any(|part| name.contains(part.as_str()));
    let mut kinds = servers::known(options.program.as_deref());
    kinds.retain(|kind| wanted(&options.servers, kind.name) && kind.present());
    kinds.extend(options.compare.iter().map(|program| Kinds::other(program)));
    let rows: Vec<_> = ROWS.iter().filter(|(name, _)| wanted(&options.rows, name)).collect();
    let file = options.directory.join("stiefel-bench-disk");
    prepare(&file, options.size);
    // results[row][server][round]
    let mut results = vec![vec![Vec::new(); kinds.len()]; rows.len()];
    for round in 0..options.rounds {
        for (row, (name, load)) in rows.iter().enumerate() {
            for turn in 0..kinds.len() {
                let server = (turn + round) % kinds.len();
                let measured = measure(&kinds[server], &file, options.size, load, options.seconds);
                eprintln!(
                    "round {round} {name:18} {:22} {}",
                    kinds[server].name,
                    table::short(load, &measured)
                );
                results[row][server].push(measured);
            }
        }
    }
    std::fs::remove_file(&file).unwrap();
    table::print(&kinds, &rows, &results);
}
