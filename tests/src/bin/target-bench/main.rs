//! The benchmark of the storage target mode: stiefel against systemd-storagetm, both on a stick, by UEFI, with Debian 13's kernel,
//! in the same virtual machine; read by Debian's nvme-cli, written by that or nbd-client. How big, how long from power-on to the disk
//! being lent, how fast. As root, for systemd's image is made in a chroot.
//!
//! `target-bench --program FILE [--rounds N] [--yes]`. How it is measured, and the result: docs/target.md. Exit status 1 if something
//! fails, 2 for wrong words.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context, anyhow};
use stiefel_initrd_builder::stick::{self, StickOptions};
use stiefel_shared::cpio;
use stiefel_tests::disk::{Initrd, LaptopDisk, Layout, System};
use stiefel_tests::kit::{CONSOLE, DESKTOP_MAC};
use stiefel_tests::scenario::{Failure, laptop_with_its_files};
use stiefel_tests::serial::re;
use stiefel_tests::tools::{self, Job};
use stiefel_tests::{Boot, Drive, NicModel, Vm, VmBuilder, Wire, stop};

const USAGE: &str = "usage: target-bench --program FILE [--rounds N] [--yes]
  --program  the program to measure
  --rounds   how often each is started and read (5)
  --yes      install what is missing without asking";
const TARGET_MAC: &str = "52:54:00:57:1e:31";
/// Bytes that are lent, and read.
const SIZE: u64 = 64 << 20;
/// For what takes a while, as under KVM.
const LONG: Duration = Duration::from_secs(240);
/// From power-on to being lent, as under KVM.
const START: Duration = Duration::from_secs(120);

/// Makes systemd's image in the unpacked system $1 with the kernel's release $2: an initrd for any machine, as stiefel's is, which lends
/// instead of booting (systemd-storagetm.service(8)).
const MAKE: &str = "mount --rbind /dev \"$1\"/dev && mount -t proc proc \"$1\"/proc && chroot \"$1\" dracut --force --quiet \
     --no-hostonly --no-early-microcode --zstd --add 'systemd-networkd' --add-drivers 'nvmet nvmet-tcp' \
     --install '/usr/lib/systemd/systemd-storagetm /usr/lib/systemd/system/systemd-storagetm.service \
     /usr/lib/systemd/system/storage-target-mode.target' /boot/storagetm.img \"$2\"";

struct Arguments {
    program: PathBuf,
    rounds: u32,
    yes: bool,
}

fn arguments(mut words: impl Iterator<Item = String>) -> anyhow::Result<Arguments> {
    let (mut program, mut rounds, mut yes) = (None, 5, false);
    while let Some(word) = words.next() {
        let mut value = || words.next().with_context(|| format!("{word} wants a value"));
        match word.as_str() {
            "--program" => program = Some(PathBuf::from(value()?)),
            "--rounds" => rounds = value()?.parse()?,
            "--yes" => yes = true,
            _ => return Err(anyhow!("{word} is not known")),
        }
    }
    anyhow::ensure!((1..=100).contains(&rounds), "1 to 100 rounds");
    let program = program.context("--program is missing")?;
    Ok(Arguments { program, rounds, yes })
}

fn main() -> ExitCode {
    let arguments = match arguments(std::env::args().skip(1)) {
        Ok(arguments) => arguments,
        Err(error) => {
            eprintln!("Error: {error:#}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    match measure(&arguments) {
        Ok(table) => {
            print!("{table}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("Error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// One of the two.
struct Contender {
    name: &'static str,
    stick: PathBuf,
    /// Its UEFI program, in bytes.
    size: u64,
    /// What its console says when the disk is lent.
    lent: &'static str,
    /// How the name of the first disk's subsystem ends, which is read.
    read: &'static str,
    /// Of what it said, what makes the disk to be written `$disk` at the client: as its users write.
    write: fn(&Said) -> String,
}

/// What was measured of it.
#[derive(Default)]
struct Samples {
    /// Seconds from power-on.
    lent: Vec<f64>,
    /// MiB per second.
    read: Vec<f64>,
    written: Vec<f64>,
}

fn measure(arguments: &Arguments) -> Result<String, Failure> {
    let missing = tools::missing(&[Job::Boot, Job::LaptopDisk]);
    tools::install(&missing, arguments.yes)?;
    stop::on_signals()?;
    let dir = tempfile::tempdir()?;
    let system = System::new(Layout::Ext4, Initrd::Dracut)
        .suite("trixie")
        .package("dracut-network")
        .package("zstd")
        .package("nvme-cli")
        .package("nbd-client");
    let disk = LaptopDisk::of(&system)?
        .hostname("client")
        .autologin(true)
        .build(&dir.path().join("client.img"))?;
    let contenders = [ours(&arguments.program, &disk, dir.path())?, theirs(&disk, dir.path())?];
    let data = ["data-a", "data-b"].map(|name| dir.path().join(name));
    for path in &data {
        std::fs::write(path, noise(SIZE)?)?;
    }
    let wire = Wire::direct()?;
    let client =
        VmBuilder::new("client")
            .boot(disk.boot(&CONSOLE))
            .nic("wired", NicModel::Virtio, &wire.b(), DESKTOP_MAC);
    let client = laptop_with_its_files(&disk, client)?;
    client.run_ok("modprobe -a nvme-tcp nbd; ip link set $(ls /sys/class/net | grep -v lo | head -n 1) up")?;
    let mut samples = [Samples::default(), Samples::default()];
    for _ in 0..arguments.rounds {
        for (contender, samples) in contenders.iter().zip(&mut samples) {
            round(contender, &data, &wire, &client, samples)?;
        }
    }
    Ok(table(&contenders, &samples))
}

fn run(command: &mut Command) -> Result<(), Failure> {
    let output = command.stdin(Stdio::null()).output()?;
    match output.status.success() {
        true => Ok(()),
        false => Err(format!("{command:?}: {}", String::from_utf8_lossy(&output.stderr)).into()),
    }
}

/// stiefel's stick, as its user writes it.
fn ours(program: &Path, disk: &LaptopDisk, dir: &Path) -> Result<Contender, Failure> {
    let Boot::Kernel { kernel, .. } = disk.boot(&[]) else {
        return Err("no kernel".into());
    };
    let modules = kernel
        .parent()
        .and_then(Path::parent)
        .ok_or("no root")?
        .join("lib/modules")
        .join(disk.kernel_version());
    let defaults = dir.join("defaults.yaml");
    std::fs::write(&defaults, "")?;
    let stiefel = |words: &[&str], paths: &[(&str, &Path)]| -> Result<(), Failure> {
        let mut command = Command::new(program);
        command.args(words).arg("--config").arg(&defaults);
        paths.iter().for_each(|(option, path)| {
            command.arg(option).arg(path);
        });
        run(&mut command)
    };
    let (ramdisk, image) = (dir.join("ramdisk"), dir.join("ours.img"));
    stiefel(
        &["build"],
        &[("--kernel", &kernel), ("--modules", &modules), ("--out", &ramdisk)],
    )?;
    let name = image.to_string_lossy().into_owned();
    let cmdline = CONSOLE.join(" ");
    let words = [
        "stick",
        "--target",
        "--open",
        "--read-write",
        "data-b",
        "--cmdline",
        &cmdline,
        &name,
    ];
    stiefel(&words, &[("--ramdisk", &ramdisk)])?;
    let size = ["kernel", "ramdisk.cpio.zst"]
        .iter()
        .map(|file| Ok(std::fs::metadata(ramdisk.join(file))?.len()))
        .sum::<std::io::Result<u64>>()?;
    Ok(Contender {
        name: "stiefel stick --target --open",
        stick: image,
        size,
        lent: r"nvme connect -t tcp -a fe80\S+ -s \d+ -n \S*data-a",
        read: "data-a",
        write: by_nbd,
    })
}

/// systemd-storagetm's, on a stick of the same kind.
fn theirs(disk: &LaptopDisk, dir: &Path) -> Result<Contender, Failure> {
    let root = dir.join("system");
    std::fs::create_dir(&root)?;
    let mut tar = Command::new("tar");
    tar.args(["--numeric-owner", "--exclude=./dev/*", "-xpf"]);
    run(tar.arg(disk.archive()).arg("-C").arg(&root))?;
    let mut dracut = Command::new("unshare");
    dracut.args(["--mount", "--propagation", "private", "sh", "-ec", MAKE, "sh"]);
    run(dracut.arg(&root).arg(disk.kernel_version()))?;
    let Boot::Kernel { kernel, .. } = disk.boot(&[]) else {
        return Err("no kernel".into());
    };
    let (ramdisk, image) = (root.join("boot/storagetm.img"), dir.join("theirs.img"));
    let size = std::fs::metadata(&kernel)?.len() + std::fs::metadata(&ramdisk)?.len();
    let options = StickOptions {
        kernel,
        ramdisk,
        handover: cpio::Writer::new(Vec::new()).finish()?.into(),
        cmdline: format!(
            "rd.systemd.unit=storage-target-mode.target ip=link-local {}",
            CONSOLE.join(" ")
        ),
        stub: None,
    };
    stick::write_image(&options, &image, false, &mut |_, _| {})?;
    Ok(Contender {
        name: "systemd-storagetm",
        stick: image,
        size,
        lent: r"nvme connect-all -t tcp -a fe80\S+ -s \d+",
        read: "vda",
        write: |said| by_name(said, "vdb"),
    })
}

/// Power-on, lent, read and written once.
fn round(
    contender: &Contender,
    data: &[PathBuf],
    wire: &Wire,
    client: &Vm,
    samples: &mut Samples,
) -> Result<(), Failure> {
    let mut target = VmBuilder::new("target")
        .memory_mib(1024)
        .boot(Boot::Uefi)
        .stick(&contender.stick);
    for path in data {
        target = target.disk(Drive {
            path: path.clone(),
            serial: path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            snapshot: true,
        });
    }
    let target = target.nic("wired", NicModel::Virtio, &wire.a(), TARGET_MAC).start()?;
    let found = target.serial().expect_any(&[re(contender.lent)], START)?;
    let (name, seconds) = (contender.name, found.at.as_secs_f64());
    eprintln!("{name}: lent after {seconds:.1} s: {}", found.line.trim());
    samples.lent.push(seconds);
    let said = Said::parse(&found.line);
    let read = "if=$disk of=/dev/null iflag=direct";
    let write = "if=/dev/zero of=$disk oflag=direct conv=fsync";
    for (connect, dd, speeds) in [
        (by_name(&said, contender.read), read, &mut samples.read),
        ((contender.write)(&said), write, &mut samples.written),
    ] {
        let words = client.run_ok_within(&timed(&connect, dd), LONG)?;
        let speed: f64 = words
            .lines()
            .last()
            .and_then(|line| line.trim().parse().ok())
            .ok_or_else(|| format!("the client says {words:?}"))?;
        eprintln!("{name}: {dd}: {speed:.1} MiB/s");
        speeds.push(speed);
    }
    target.kill();
    Ok(())
}

/// Where a target said it can be reached.
struct Said {
    address: String,
    port: String,
}

impl Said {
    /// Of the command that it printed.
    fn parse(line: &str) -> Self {
        let words: Vec<&str> = line.split_whitespace().collect();
        let after = |option: &str| {
            let at = words.iter().position(|word| *word == option);
            at.and_then(|at| words.get(at + 1)).copied().unwrap_or_default()
        };
        Self {
            address: after("-a").split('%').next().unwrap_or_default().to_owned(),
            port: after("-s").to_owned(),
        }
    }
}

/// Connects to the disk whose subsystem's name ends so, by NVMe. One by one: the discovery log of Linux gives link-local addresses
/// without their interface, so `nvme connect-all` reaches none.
fn by_name(said: &Said, end: &str) -> String {
    let Said { address, port } = said;
    let at = format!("-t tcp -a {address}%$nic -s {port}");
    format!(
        "nqn=$(nvme discover {at} | awk '/^subnqn:.*{end}$/ {{ print $2 }}' | head -n 1); nvme connect {at} -n $nqn >&2; \
         for i in $(seq 100); do for s in /sys/class/nvme-subsystem/*; do [ \"$(cat $s/subsysnqn)\" = \"$nqn\" ] && \
         disk=$(ls $s | grep -E '^nvme[0-9]+n[0-9]+$' | head -n 1); done; [ -b \"/dev/$disk\" ] && break; sleep 0.2; done; disk=/dev/$disk"
    )
}

/// Connects to the disk that may be written, which is so only after a while.
fn by_nbd(said: &Said) -> String {
    format!(
        "disk=/dev/nbd0; for i in $(seq 100); do nbd-client {}%$nic $disk -N data-b >&2 && [ $(blockdev --getro $disk) = 0 ] && break; \
         nbd-client -d $disk; sleep 0.5; done",
        said.address
    )
}

/// Connects, copies, lets go, and prints MiB per second.
fn timed(connect: &str, dd: &str) -> String {
    let size = SIZE >> 20;
    format!(
        "nic=$(ls /sys/class/net | grep -v lo | head -n 1); {connect}; \
         begun=$(date +%s.%N); dd {dd} bs=1M count={size} status=none || exit 1; ended=$(date +%s.%N); \
         nvme disconnect-all >/dev/null; nbd-client -d /dev/nbd0 >/dev/null 2>&1; awk \"BEGIN {{ print {size} / ($ended - $begun) }}\""
    )
}

fn table(contenders: &[Contender], samples: &[Samples]) -> String {
    let mut text = String::from(
        "| | kernel and ramdisk, MiB | power-on to lent, s (lowest–highest) | read, MiB/s | written, MiB/s |\n|---|---|---|---|---|\n",
    );
    for (contender, samples) in contenders.iter().zip(samples) {
        text += &format!(
            "| {} | {:.1} | {} | {} | {} |\n",
            contender.name,
            contender.size as f64 / f64::from(1 << 20),
            spread(&samples.lent),
            spread(&samples.read),
            spread(&samples.written)
        );
    }
    text
}

/// Median, lowest and highest.
fn spread(values: &[f64]) -> String {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    match (values.get(values.len() / 2), values.first(), values.last()) {
        (Some(median), Some(low), Some(high)) => format!("{median:.1} ({low:.1}–{high:.1})"),
        _ => "–".to_owned(),
    }
}

/// Random bytes.
fn noise(size: u64) -> Result<Vec<u8>, Failure> {
    use std::io::Read;
    let mut bytes = Vec::new();
    std::fs::File::open("/dev/urandom")?
        .take(size)
        .read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_understood_and_nonsense_is_refused() {
        let parse = |words: &str| arguments(words.split_whitespace().map(str::to_owned));
        assert_eq!(parse("--program x --rounds 3 --yes").unwrap().rounds, 3);
        for words in ["", "--program", "--program x --rounds 0", "more"] {
            assert!(parse(words).is_err(), "{words}");
        }
    }

    #[test]
    fn the_client_connects_to_what_the_target_said_by_its_own_interface() {
        let said = Said::parse("x nvme connect-all -t tcp -a fe80::1%eth0 -s 16858 y");
        let command = timed(&by_name(&said, "vdb"), "");
        assert!(command.contains("-a fe80::1%$nic -s 16858 "), "{command}");
        assert!(by_nbd(&said).contains("nbd-client fe80::1%$nic $disk -N data-b "));
    }

    #[test]
    fn the_median_is_given_with_both_ends() {
        assert_eq!(spread(&[3.0, 1.0, 2.0]), "2.0 (1.0–3.0)");
    }
}
