//! `stiefel test-qemu`: tries stiefel in virtual machines, without root, without a bridge, with nothing left behind.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, TryRecvError};
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use clap::{Args, Subcommand};
use stiefel_tests::cache;
use stiefel_tests::disk::{ExtraFile, LaptopDisk};
use stiefel_tests::kit::{CONSOLE, DEDICATED_MAC, DESKTOP_MAC, Kit};
use stiefel_tests::scenario::{self, Failure, Machines, Milestones};
use stiefel_tests::tools::{self, Job};
use stiefel_tests::{Boot, Content, Netdev, NicModel, Vm, VmBuilder, Wire, kernel_cmdline, stop};

use super::build::BUSYBOX;

/// How long the laptop's service is let see that there is no NIC; it demands 10 s.
const ABSENT: Duration = Duration::from_secs(15);

/// Its options.
#[derive(Args)]
pub(crate) struct TestQemuArgs {
    #[command(subcommand)]
    what: What,
    /// Install missing programs without asking.
    #[arg(long, short, global = true)]
    yes: bool,
}

#[derive(Subcommand)]
enum What {
    /// Both machines: the cable is plugged into the running laptop, and the desktop boots from it.
    Demo,
    /// The laptop: a Debian with stiefel installed; its NIC is plugged in by itself.
    Server(ServerArgs),
    /// The desktop, started from the stick; run `server` in another terminal.
    Client(ClientArgs),
    /// The ramdisk alone, with a shell.
    Ramdisk(RamdiskArgs),
}

#[derive(Args)]
struct ServerArgs {
    #[command(flatten)]
    machine: MachineArgs,
    #[command(flatten)]
    kernel: KernelArgs,
    #[command(flatten)]
    cable: CableArgs,
    /// Put this file or folder on the laptop's disk, below /root.
    #[arg(long, value_name = "PATH")]
    extra_files: Vec<PathBuf>,
}

#[derive(Args)]
struct ClientArgs {
    #[command(flatten)]
    machine: MachineArgs,
    #[command(flatten)]
    cable: CableArgs,
}

#[derive(Args)]
struct RamdiskArgs {
    #[command(flatten)]
    machine: MachineArgs,
    #[command(flatten)]
    kernel: KernelArgs,
}

/// What every machine has.
#[derive(Args)]
struct MachineArgs {
    /// Show the machine's screen in a window.
    #[arg(long)]
    graphical: bool,
    /// Give the machine a USB device of this computer.
    #[arg(long, value_name = "VENDOR:PRODUCT")]
    forward_usb: Vec<stiefel_shared::config::UsbId>,
}

/// What a machine has that QEMU starts by itself, without a bootloader.
#[derive(Args)]
struct KernelArgs {
    /// Words for the kernel's command line.
    #[arg(long, value_name = "WORDS", default_value = "")]
    cmdline: String,
    /// Another kernel; needs --initrd.
    #[arg(long, value_name = "FILE", requires = "initrd")]
    kernel: Option<PathBuf>,
    /// Another initrd; needs --kernel.
    #[arg(long, value_name = "FILE", requires = "kernel")]
    initrd: Option<PathBuf>,
}

/// What a machine has whose cable leads somewhere.
#[derive(Args)]
struct CableArgs {
    /// Attach the NIC to this bridge of the host, instead of the other machine.
    #[arg(long, value_name = "BRIDGE")]
    use_existing_bridge: Option<String>,
}

/// Runs it.
pub(crate) fn run(args: TestQemuArgs) -> anyhow::Result<()> {
    let jobs: &[Job] = match args.what {
        What::Ramdisk(_) => &[Job::Boot, Job::LaptopDisk, Job::Shell],
        _ => &[Job::Boot, Job::Uefi, Job::LaptopDisk],
    };
    tools::install(&tools::missing(jobs), args.yes)?;
    stop::on_signals().context("cannot listen to signals")?;
    let done = match &args.what {
        What::Demo => demo(),
        What::Server(args) => server(args),
        What::Client(args) => client(args),
        What::Ramdisk(args) => ramdisk(args),
    };
    // What else went wrong then is only a consequence.
    stop::check()?;
    done.map_err(|failure| anyhow!(failure))
}

fn prepare(debug: Option<&Path>) -> Result<Kit, Failure> {
    eprintln!("preparing: a Debian for the laptop (made once, then cached for a week), ramdisk, key");
    let program = std::env::current_exe()?;
    Ok(Kit::prepare(&program, debug)?)
}

fn demo() -> Result<(), Failure> {
    let kit = prepare(None)?;
    let machines = Machines::prepare(&kit, Wire::direct()?)?;
    eprintln!("the laptop starts its own Debian");
    let laptop = scenario::laptop_at_home(&machines.disk, None, true)?;
    let mut milestones = Milestones::new(true);
    eprintln!("plugging the dedicated NIC into the laptop");
    let served = scenario::plug_and_serve(&laptop, &machines.wire.a())?;
    milestones.reached("laptop: from the plug to serving its disk", served);
    eprintln!("the desktop starts from the stick");
    let desktop = scenario::desktop(&machines.stick, &machines.wire.b(), true)?;
    scenario::desktop_boots(&desktop, &mut milestones)?;
    eprintln!("\n{}", milestones.table());
    eprintln!("The desktop runs the laptop's Debian from the laptop's disk.");
    if std::io::stdin().is_terminal() {
        eprintln!("Its console is yours now; leave it with Ctrl-].");
        return Ok(desktop.interact()?);
    }
    desktop.login("root", stiefel_tests::disk::PASSWORD, Duration::from_secs(30))?;
    eprintln!(
        "its root: {}",
        desktop.run_ok("findmnt --noheadings --output SOURCE,TARGET /")?.trim()
    );
    desktop.power_off(scenario::patience::SHUTDOWN)?;
    laptop.wait_reboot(scenario::patience::SHUTDOWN)?;
    eprintln!("the desktop is off; the laptop goes back to its own system");
    drop(laptop);
    Ok(())
}

/// Where the machines of `server` and `client`, two processes, meet: their cable's sockets, and the stick's key.
fn meeting_place() -> anyhow::Result<PathBuf> {
    let dir = cache::dir()?.join("test-qemu");
    std::fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    Ok(dir)
}

/// One end of their cable.
fn cable(dir: &Path, this: &str, other: &str) -> Netdev {
    Netdev::Dgram {
        local: dir.join(this),
        remote: dir.join(other),
    }
}

fn server(args: &ServerArgs) -> Result<(), Failure> {
    let kit = prepare(None)?;
    let place = meeting_place()?;
    let disk = kit.laptop_disk(
        &kit.dir().join("laptop.img"),
        &kit.config(""),
        extra_files(&args.extra_files)?,
    )?;
    // The client's process writes its stick with this key.
    std::fs::copy(kit.key("stick"), place.join("stick.key"))?;
    let builder = VmBuilder::new("laptop")
        .boot(laptop_boot(&args.kernel, &disk))
        .disk(disk.drive());
    let laptop = args.machine.add_to(builder).start()?;
    eprintln!(
        "root's password is `{}`; leave with Ctrl-]",
        stiefel_tests::disk::PASSWORD
    );
    let end = args.cable.end(|| cable(&place, "laptop", "desktop"));
    std::thread::scope(|scope| {
        let (stays, left) = mpsc::channel();
        let laptop = &laptop;
        scope.spawn(move || match plug_when_up(laptop, &end, &left) {
            Err(error) if !has_left(&left) && stop::check().is_ok() => {
                eprintln!("\r\nthe NIC could not be plugged in: {error}\r")
            }
            _ => {}
        });
        let done = laptop.interact();
        // Whoever waits for the machine, or for its time, goes on.
        drop(stays);
        laptop.kill();
        done
    })?;
    Ok(())
}

/// What is never sent: while the sender is there, so is the user.
enum Never {}

fn has_left(left: &Receiver<Never>) -> bool {
    matches!(left.try_recv(), Err(TryRecvError::Disconnected))
}

/// Plugs the NIC in once the laptop's system is up and its service has seen that there is none, unless the user leaves.
fn plug_when_up(laptop: &Vm, end: &Netdev, left: &Receiver<Never>) -> Result<(), Failure> {
    laptop.serial().expect("laptop login:", scenario::patience::LOGIN)?;
    match left.recv_timeout(ABSENT) {
        Err(RecvTimeoutError::Timeout) => Ok(laptop.plug_usb_nic("cable", end, DEDICATED_MAC)?),
        Err(RecvTimeoutError::Disconnected) => Ok(()),
        Ok(never) => match never {},
    }
}

fn client(args: &ClientArgs) -> Result<(), Failure> {
    let place = meeting_place()?;
    let key = place.join("stick.key");
    if !key.exists() {
        return Err("there is no laptop yet: run `stiefel test-qemu server` in another terminal first".into());
    }
    let kit = prepare(None)?;
    std::fs::copy(&key, kit.key("stick"))?;
    let stick = kit.dir().join("stick.img");
    kit.stick(&stick, "stick")?;
    let end = args.cable.end(|| cable(&place, "desktop", "laptop"));
    let builder = VmBuilder::new("desktop")
        .memory_mib(1536)
        .boot(Boot::Uefi)
        .stick(&stick)
        .nic("cable", NicModel::E1000e, &end, DESKTOP_MAC);
    let desktop = args.machine.add_to(builder).start()?;
    eprintln!("leave with Ctrl-]");
    Ok(desktop.interact()?)
}

fn ramdisk(args: &RamdiskArgs) -> Result<(), Failure> {
    let kit = prepare(Some(Path::new(BUSYBOX)))?;
    let folder = kit.ramdisk();
    let (given, words) = (&args.kernel, args.kernel.words());
    let boot = Boot::Kernel {
        kernel: given.kernel.clone().unwrap_or_else(|| folder.join("kernel")),
        initrd: vec![Content::File(
            given.initrd.clone().unwrap_or_else(|| folder.join("ramdisk.cpio.zst")),
        )],
        cmdline: kernel_cmdline(&words),
    };
    let builder = VmBuilder::new("ramdisk").memory_mib(512).boot(boot);
    let vm = args.machine.add_to(builder).start()?;
    eprintln!("leave with Ctrl-]");
    Ok(vm.interact()?)
}

fn laptop_boot(args: &KernelArgs, disk: &LaptopDisk) -> Boot {
    match (disk.boot(&args.words()), &args.kernel, &args.initrd) {
        (Boot::Kernel { cmdline, .. }, Some(kernel), Some(initrd)) => Boot::Kernel {
            kernel: kernel.clone(),
            initrd: vec![Content::File(initrd.clone())],
            cmdline,
        },
        (boot, ..) => boot,
    }
}

impl KernelArgs {
    /// Words for the command line.
    fn words(&self) -> Vec<&str> {
        CONSOLE.into_iter().chain(self.cmdline.split_whitespace()).collect()
    }
}

impl CableArgs {
    fn end(&self, direct: impl FnOnce() -> Netdev) -> Netdev {
        match &self.use_existing_bridge {
            Some(name) => Netdev::Bridge { name: name.clone() },
            None => direct(),
        }
    }
}

impl MachineArgs {
    fn add_to(&self, mut builder: VmBuilder) -> VmBuilder {
        for usb in &self.forward_usb {
            builder = builder.usb_host(usb.vendor, usb.product);
        }
        builder.graphical(self.graphical)
    }
}

/// The files the user names, each as /root/NAME; folders with all that is in them.
fn extra_files(paths: &[PathBuf]) -> anyhow::Result<Vec<ExtraFile>> {
    use std::os::unix::fs::PermissionsExt;
    let mut files = Vec::new();
    for path in paths {
        let base = path.parent().unwrap_or(Path::new(""));
        let mut todo = vec![path.clone()];
        while let Some(path) = todo.pop() {
            let meta = std::fs::metadata(&path).with_context(|| format!("cannot read {}", path.display()))?;
            if meta.is_dir() {
                for entry in std::fs::read_dir(&path)? {
                    todo.push(entry?.path());
                }
            } else {
                let inside = Path::new("/root").join(path.strip_prefix(base)?);
                let Some(inside) = inside.to_str() else {
                    bail!("{} is no UTF-8 name", path.display())
                };
                files.push(ExtraFile::new(
                    path.as_path(),
                    inside,
                    meta.permissions().mode() & 0o7777,
                ));
            }
        }
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: TestQemuArgs,
    }

    fn accepts(words: &str) -> bool {
        Cli::try_parse_from(["test-qemu"].into_iter().chain(words.split(' '))).is_ok()
    }

    #[test]
    fn options_are_accepted_where_they_do_something_and_refused_elsewhere() {
        for (option, users) in [
            ("--yes", &["demo", "server", "client", "ramdisk"][..]),
            ("--graphical", &["server", "client", "ramdisk"]),
            ("--forward-usb 1d6b:0002", &["server", "client", "ramdisk"]),
            ("--cmdline quiet", &["server", "ramdisk"]),
            ("--kernel k --initrd i", &["server", "ramdisk"]),
            ("--use-existing-bridge br0", &["server", "client"]),
            ("--extra-files f", &["server"]),
        ] {
            for what in ["demo", "server", "client", "ramdisk"] {
                assert_eq!(
                    accepts(&format!("{what} {option}")),
                    users.contains(&what),
                    "{what} {option}"
                );
            }
        }
        assert!(!accepts("server --kernel k"), "a kernel without its initrd");
    }

    #[test]
    fn an_option_changes_what_is_started() {
        let words = ["test-qemu", "ramdisk", "--cmdline", "quiet debug", "--graphical"];
        let What::Ramdisk(args) = Cli::try_parse_from(words).map(|cli| cli.args.what).ok().unwrap() else {
            panic!("another subcommand")
        };
        assert!(args.kernel.words().ends_with(&["quiet", "debug"]));
        assert!(args.machine.graphical);
    }

    #[test]
    fn leaving_is_seen_without_a_message() {
        let (stays, left) = mpsc::channel();
        assert!(!has_left(&left));
        drop(stays);
        assert!(has_left(&left));
    }
}
