//! How guests are run: by KVM when it really works, else by emulation; and how long that may take.
//!
//! `/dev/kvm` that opens proves nothing (nested virtualisation may let a guest hang for ever), so a tiny guest is run.

use std::io::Write;
use std::process::Stdio;
use std::sync::OnceLock;
use std::time::{Duration, Instant, SystemTime};
use std::{fs, io, thread};

use crate::{cache, process};

/// What runs the guest's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accel {
    /// The host's CPU.
    Kvm,
    /// QEMU's emulation, multi-threaded.
    Tcg,
}

/// How long the probe's guest may take; it needs well under a second.
const PROBE_DEADLINE: Duration = Duration::from_secs(5);
/// How long the probe's result is believed.
const PROBE_AGE: Duration = Duration::from_secs(24 * 3600);
/// What the probe's guest writes to the debug-exit port; QEMU then exits with twice that, plus one.
const PROBE_VALUE: u8 = 0x2a;

/// How much longer than KVM everything takes under emulation.
const TCG_FACTOR: f64 = 4.0;

impl Accel {
    /// What works here. Probed once per process, and once per day and boot of the machine.
    pub fn detect() -> Self {
        static DETECTED: OnceLock<Accel> = OnceLock::new();
        *DETECTED.get_or_init(|| {
            cached().unwrap_or_else(|| {
                let accel = if kvm_runs_a_guest() { Self::Kvm } else { Self::Tcg };
                remember(accel);
                accel
            })
        })
    }

    /// QEMU's options for it.
    pub fn qemu_args(self) -> &'static [&'static str] {
        match self {
            Self::Kvm => &["-accel", "kvm", "-cpu", "host"],
            Self::Tcg => &["-accel", "tcg,thread=multi", "-cpu", "max"],
        }
    }

    /// The time to wait for something that may take up to `kvm` under KVM: the only place where deadlines are stretched.
    ///
    /// Emulation gets four times as much; `STIEFEL_TEST_PATIENCE` (a factor from 1 to 100) is for slow or busy machines.
    pub fn deadline(self, kvm: Duration) -> Duration {
        let patience = std::env::var("STIEFEL_TEST_PATIENCE")
            .ok()
            .and_then(|text| text.parse().ok());
        kvm.mul_f64(self.factor(patience))
    }

    fn factor(self, patience: Option<f64>) -> f64 {
        let machine = match self {
            Self::Kvm => 1.0,
            Self::Tcg => TCG_FACTOR,
        };
        machine
            * patience
                .filter(|factor| factor.is_finite())
                .unwrap_or(1.0)
                .clamp(1.0, 100.0)
    }

    fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}

/// A kernel command line for a guest: the serial console, what emulation needs, then `args`.
///
/// `cdc_subset` takes QEMU's USB NIC from `cdc_ether` every now and then, and gives it a random address.
/// `no_timer_check` must be on every kernel of a guest, also on one started by kexec: on a loaded host the kernel's check
/// of the IO-APIC timer fails and it panics.
pub fn kernel_cmdline(args: &[&str]) -> String {
    let mut line = String::from("console=ttyS0,115200 no_timer_check modprobe.blacklist=cdc_subset");
    for arg in args {
        line.push(' ');
        line.push_str(arg);
    }
    line
}

fn cache_file() -> io::Result<std::path::PathBuf> {
    Ok(cache::dir()?.join("accel"))
}

/// Identifies this boot of this machine: another kernel or host may answer otherwise.
fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .unwrap_or_default()
        .trim()
        .to_owned()
}

fn cached() -> Option<Accel> {
    let path = cache_file().ok()?;
    let age = SystemTime::now()
        .duration_since(fs::metadata(&path).ok()?.modified().ok()?)
        .ok()?;
    if age > PROBE_AGE {
        return None;
    }
    parse_cached(&fs::read_to_string(path).ok()?, &boot_id())
}

fn parse_cached(text: &str, boot_id: &str) -> Option<Accel> {
    let (name, boot) = text.trim().split_once(' ')?;
    [Accel::Kvm, Accel::Tcg]
        .into_iter()
        .find(|accel| boot == boot_id && name == accel.name())
}

fn remember(accel: Accel) {
    // Only a cache: without it the next process probes again.
    if let Ok(path) = cache_file() {
        let _ = fs::write(path, format!("{} {}\n", accel.name(), boot_id()));
    }
}

fn kvm_runs_a_guest() -> bool {
    fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok() && probe(Accel::Kvm).unwrap_or(false)
}

/// Boots the probe's boot sector, and says whether it got to its end in time.
fn probe(accel: Accel) -> io::Result<bool> {
    let dir = tempfile::tempdir()?;
    let image = dir.path().join("probe.img");
    let mut disk = fs::File::create(&image)?;
    disk.write_all(&boot_sector())?;
    // The BIOS boots from no disk of a few sectors.
    disk.set_len(1 << 20)?;

    let mut command = process::command("setpriv").map_err(io::Error::other)?;
    command
        .args(["--pdeathsig", "KILL", "--", crate::vm::QEMU])
        .args(accel.qemu_args())
        .args([
            "-machine",
            "q35",
            "-nodefaults",
            "-display",
            "none",
            "-m",
            "32",
            "-no-reboot",
            "-device",
            "isa-debug-exit,iobase=0xf4,iosize=0x04",
            "-drive",
        ]);
    command.arg(format!(
        "if=none,id=probe,format=raw,readonly=on,file={}",
        crate::vm::escape(&image)
    ));
    command
        .args(["-device", "virtio-blk-pci,drive=probe,bootindex=0"])
        .stdout(Stdio::null())
        .stderr(Stdio::null());

    let mut guest = process::spawn_lasting(command)?;
    let end = Instant::now() + accel.deadline(PROBE_DEADLINE);
    while Instant::now() < end {
        if let Some(status) = guest.try_wait()? {
            return Ok(status.code() == Some(i32::from(PROBE_VALUE) * 2 + 1));
        }
        thread::sleep(Duration::from_millis(20));
    }
    guest.kill()?;
    guest.wait()?;
    Ok(false)
}

/// A boot sector that sees the BIOS clock tick twice (interrupts arrive, `hlt` wakes), then writes to the debug-exit port.
fn boot_sector() -> [u8; 512] {
    #[rustfmt::skip]
    let code = [
        0x31, 0xc0,                   // xor ax, ax
        0x8e, 0xd8,                   // mov ds, ax
        0xfb,                         // sti
        0xb9, 0x02, 0x00,             // mov cx, 2
        0x8b, 0x1e, 0x6c, 0x04,       // next: mov bx, [0x46c]   the BIOS's tick counter
        0xf4,                         // wait: hlt
        0x3b, 0x1e, 0x6c, 0x04,       // cmp bx, [0x46c]
        0x74, 0xf9,                   // je wait
        0xe2, 0xf3,                   // loop next
        0xb0, PROBE_VALUE,            // mov al, PROBE_VALUE
        0xe6, 0xf4,                   // out 0xf4, al
        0xfa, 0xf4,                   // cli; hlt
    ];
    let mut sector = [0; 512];
    sector[..code.len()].copy_from_slice(&code);
    sector[510] = 0x55;
    sector[511] = 0xaa;
    sector
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kernel_skips_the_timer_check() {
        let line = kernel_cmdline(&["quiet", "ro"]);
        assert!(
            line.contains(" no_timer_check ") && line.ends_with(" quiet ro"),
            "{line}"
        );
    }

    #[test]
    fn a_result_of_another_boot_is_not_believed() {
        assert_eq!(parse_cached("kvm here\n", "here"), Some(Accel::Kvm));
        assert_eq!(parse_cached("tcg here\n", "here"), Some(Accel::Tcg));
        assert_eq!(parse_cached("kvm before\n", "here"), None);
        assert_eq!(parse_cached("xen here\n", "here"), None);
        assert_eq!(parse_cached("", "here"), None);
    }

    #[test]
    fn emulation_gets_four_times_as_long() {
        assert_eq!(Accel::Kvm.factor(None), 1.0);
        assert_eq!(Accel::Tcg.factor(None), 4.0);
        assert_eq!(Accel::Tcg.factor(Some(2.0)), 8.0);
        assert_eq!(Accel::Tcg.factor(Some(f64::NAN)), 4.0);
        assert_eq!(Accel::Kvm.factor(Some(0.0)), 1.0);
    }

    #[test]
    #[ignore = "runs QEMU"]
    fn the_probe_sees_a_guest_that_runs() {
        assert!(probe(Accel::Tcg).unwrap());
    }
}
