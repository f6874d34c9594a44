//! The main job as a scenario: a laptop with a real Debian, triggered by its dedicated NIC or woken by the stick, and a
//! desktop that boots from it. Shared by `stiefel test-qemu demo` and the end-to-end tests.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::disk::{ExtraFile, LaptopDisk, PASSWORD, System};
use crate::kit::{CONSOLE, DEDICATED_MAC, DESKTOP_MAC, Kit, KitError};
use crate::net::{Netdev, Wire};
use crate::serial::{Pattern, re};
use crate::stop;
use crate::vm::{Boot, NicModel, Vm, VmBuilder};

/// How long each step may take, as under KVM.
pub mod patience {
    use std::time::Duration;

    /// A Debian from power-on to its login prompt.
    pub const LOGIN: Duration = Duration::from_secs(60);
    /// From the trigger to a laptop that serves.
    pub const SERVING: Duration = Duration::from_secs(60);
    /// From the desktop's power-on to its first question.
    pub const STICK: Duration = Duration::from_secs(40);
    /// For the bundle.
    pub const BUNDLE: Duration = Duration::from_secs(40);
    /// For the payload's kernel to attach the disk.
    pub const ATTACH: Duration = Duration::from_secs(40);
    /// For a machine to shut down.
    pub const SHUTDOWN: Duration = Duration::from_secs(40);
}

/// The service counts a plug only when it saw the NIC absent for 10 s.
const ABSENT: Duration = Duration::from_secs(11);

/// Anything that goes wrong in a scenario.
pub type Failure = Box<dyn std::error::Error + Send + Sync>;

/// When what happened, for people.
#[derive(Debug, Default)]
pub struct Milestones {
    rows: Vec<(&'static str, Duration)>,
    print: bool,
}

impl Milestones {
    /// With `print`, each is shown on standard error as it comes.
    #[must_use]
    pub fn new(print: bool) -> Self {
        Self {
            rows: Vec::new(),
            print,
        }
    }

    /// Something happened, so long after what the caller measures from.
    pub fn reached(&mut self, what: &'static str, after: Duration) {
        if self.print {
            eprintln!("── {what}: {:.1} s", after.as_secs_f64());
        }
        self.rows.push((what, after));
    }

    /// The table, one row each.
    #[must_use]
    pub fn table(&self) -> String {
        self.rows
            .iter()
            .map(|(what, after)| format!("{:>8.1} s  {what}\n", after.as_secs_f64()))
            .collect()
    }
}

/// Starts the laptop on `disk` and waits for a shell in its own system, with its service running.
///
/// # Errors
/// When it does not come up.
pub fn laptop_at_home(disk: &LaptopDisk, nic: Option<&Netdev>, live: bool) -> Result<Vm, Failure> {
    let mut builder = VmBuilder::new("laptop").boot(disk.boot(&CONSOLE)).live(live);
    if let Some(nic) = nic {
        builder = builder.nic("wired", NicModel::Usb, nic, DEDICATED_MAC);
    }
    let laptop = laptop_with_its_files(disk, builder)?;
    laptop.run_ok("systemctl start stiefel-autokexec.service")?;
    laptop.run_ok("systemctl is-active --wait stiefel-autokexec.service")?;
    Ok(laptop)
}

/// Starts the machine on `disk`, waits for a shell in its system, and sees to it that the test's files are there.
///
/// # Errors
/// When it does not come up.
pub fn laptop_with_its_files(disk: &LaptopDisk, mut machine: VmBuilder) -> Result<Vm, Failure> {
    machine = machine.disk(disk.drive());
    let files = disk.files();
    let unpack = files.is_some();
    if let Some(files) = files {
        machine = machine.disk(files);
    }
    let laptop = machine.start()?;
    login(&laptop, disk)?;
    if unpack {
        laptop.run_ok(LaptopDisk::UNPACK)?;
    }
    Ok(laptop)
}

/// Waits until the machine that boots from `disk` is at its login, typing the passphrase if one is asked for, and logs in.
///
/// # Errors
/// When it does not come up.
pub fn login(machine: &Vm, disk: &LaptopDisk) -> Result<(), Failure> {
    if disk.is_locked() {
        machine
            .serial()
            .expect(re(r"[Pp]lease (unlock disk|enter passphrase)"), patience::LOGIN)?;
        machine.serial().send_line(PASSWORD)?;
    }
    Ok(machine.login("root", PASSWORD, patience::LOGIN)?)
}

/// Plugs the dedicated NIC into the running laptop, and waits until its ramdisk serves; how long that took.
///
/// # Errors
/// When it does not serve.
pub fn plug_and_serve(laptop: &Vm, cable: &Netdev) -> Result<Duration, Failure> {
    // No condition can be waited for: what counts is that the service saw nothing for so long.
    stop::pause(ABSENT)?;
    let plugged = Instant::now();
    laptop.plug_usb_nic("cable", cable, DEDICATED_MAC)?;
    if let Err(failure) = wait_until_serving(laptop) {
        // A laptop that stayed in its system says why.
        return Err(match laptop.run("journalctl --no-pager -n 40 -u stiefel-autokexec") {
            Ok(said) => format!("{failure}\nits service says:\n{}", said.output).into(),
            Err(_) => failure,
        });
    }
    Ok(plugged.elapsed())
}

/// Waits until the laptop's ramdisk serves.
///
/// # Errors
/// When it says that it can't.
pub fn wait_until_serving(laptop: &Vm) -> Result<(), Failure> {
    let serving: [Pattern; 3] = [
        "stiefel: ready; waiting for the desktop".into(),
        "going back to the laptop's own system".into(),
        "pull the stick out".into(),
    ];
    let found = laptop.serial().expect_any(&serving, patience::SERVING)?;
    if found.index == 0 {
        Ok(())
    } else {
        Err(format!("the laptop gave up; its console: {}", laptop.serial().log().display()).into())
    }
}

/// The desktop, started by UEFI from the stick.
///
/// # Errors
/// When QEMU does not start.
pub fn desktop(stick: &Path, cable: &Netdev, live: bool) -> Result<Vm, Failure> {
    desktop_with(NicModel::E1000e, stick, cable, live)
}

/// As [`desktop`], with another NIC.
///
/// # Errors
/// As there.
pub fn desktop_with(nic: NicModel, stick: &Path, cable: &Netdev, live: bool) -> Result<Vm, Failure> {
    Ok(VmBuilder::new("desktop")
        .memory_mib(1536)
        .boot(Boot::Uefi)
        .stick(stick)
        .nic("cable", nic, cable, DESKTOP_MAC)
        .live(live)
        .start()?)
}

/// Waits until the desktop is at the login prompt of the laptop's system.
///
/// # Errors
/// When a step does not come.
pub fn desktop_boots(desktop: &Vm, milestones: &mut Milestones) -> Result<(), Failure> {
    desktop_asks(desktop, milestones)?;
    desktop_boots_after_asking(desktop, milestones)
}

/// As [`desktop_boots`], from the laptop's `disk`, and logs in.
///
/// # Errors
/// As there.
pub fn desktop_logs_in(desktop: &Vm, disk: &LaptopDisk, milestones: &mut Milestones) -> Result<(), Failure> {
    desktop_asks(desktop, milestones)?;
    desktop_attaches(desktop, milestones)?;
    login(desktop, disk)
}

fn desktop_asks(desktop: &Vm, milestones: &mut Milestones) -> Result<(), Failure> {
    let found = desktop
        .serial()
        .expect_any(&[re(r"stiefel: asking on ")], patience::STICK)?;
    milestones.reached("desktop, since power-on: first discovery sent", found.at);
    Ok(())
}

/// As [`desktop_boots`], for a desktop that is asking already.
///
/// # Errors
/// As there.
pub fn desktop_boots_after_asking(desktop: &Vm, milestones: &mut Milestones) -> Result<(), Failure> {
    desktop_attaches(desktop, milestones)?;
    // The kernel may write between the host name and the prompt.
    let found = desktop.serial().expect_any(&[re(r"\blogin: ")], patience::LOGIN)?;
    milestones.reached("desktop: login prompt", found.at);
    Ok(())
}

/// Waits until the desktop, which is asking, has the laptop's disk.
///
/// # Errors
/// When a step does not come.
pub fn desktop_attaches(desktop: &Vm, milestones: &mut Milestones) -> Result<(), Failure> {
    for (what, marker, patience) in [
        (
            "desktop: bundle received",
            re(r"stiefel: received "),
            patience::SERVING + patience::BUNDLE,
        ),
        ("desktop: kexec", re(r"stiefel: starting "), patience::BUNDLE),
        ("desktop: disk attached", re(r"is attached as /dev/"), patience::ATTACH),
    ] {
        let found = desktop.serial().expect_any(&[marker], patience)?;
        milestones.reached(what, found.at);
    }
    Ok(())
}

/// The laptop's disk and the stick, made from a kit; their files go with this value.
pub struct Machines {
    _dir: tempfile::TempDir,
    /// The laptop's disk.
    pub disk: LaptopDisk,
    /// The stick's image.
    pub stick: PathBuf,
    /// The cable between laptop (a) and desktop (b).
    pub wire: Wire,
}

impl Machines {
    /// Makes them.
    ///
    /// # Errors
    /// When something cannot be made.
    pub fn prepare(kit: &Kit, wire: Wire) -> Result<Self, Failure> {
        Self::with(kit, wire, "", Vec::new())
    }

    /// Makes them, with more in the laptop's configuration and on its disk.
    ///
    /// # Errors
    /// As there.
    pub fn with(kit: &Kit, wire: Wire, config: &str, files: Vec<ExtraFile>) -> Result<Self, Failure> {
        Self::make(kit, wire, |path| kit.laptop_disk(path, &kit.config(config), files))
    }

    /// As [`Machines::with`], with another installed system than the usual one.
    ///
    /// # Errors
    /// As there.
    pub fn of(kit: &Kit, system: &System, wire: Wire, config: &str, files: Vec<ExtraFile>) -> Result<Self, Failure> {
        Self::make(kit, wire, |path| kit.disk_of(system, path, &kit.config(config), files))
    }

    fn make(kit: &Kit, wire: Wire, disk: impl FnOnce(&Path) -> Result<LaptopDisk, KitError>) -> Result<Self, Failure> {
        let dir = tempfile::tempdir_in(kit.dir())?;
        let disk = disk(&dir.path().join("laptop.img"))?;
        let stick = dir.path().join("stick.img");
        kit.stick(&stick, "stick")?;
        Ok(Self {
            _dir: dir,
            disk,
            stick,
            wire,
        })
    }
}

/// How many blocks `payload-init` writes, and how often each, one after the other: the last one must stay.
pub const LOAD_BLOCKS: u64 = 32;
/// The size of a block, in bytes: several requests. Larger ones only take time, in the tunnel between emulated machines.
pub const LOAD_BLOCK: usize = 1 << 18;
/// See [`LOAD_BLOCKS`].
pub const LOAD_TIMES: u64 = 3;

/// The word on its command line that has it step the clock by so many hours, before it writes block [`CLOCK_AT`].
pub const CLOCK_WORD: &str = "load.clock=";
/// See [`CLOCK_WORD`].
pub const CLOCK_AT: u64 = 6;

/// What it writes into block `number` the `time`th time: the same 64 bytes over and over.
#[must_use]
pub fn pattern(number: u64, time: u64) -> Vec<u8> {
    format!(
        "{:<63}\n",
        format!("stiefel writes block {number} of the laptop's disk, {time}")
    )
    .repeat(LOAD_BLOCK / 64)
    .into_bytes()
}
