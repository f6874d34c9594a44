//! `stiefel test-qemu`: tries stiefel in virtual machines, without root, without a bridge, with nothing left behind.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use clap::{Args, Subcommand};
use stiefel_tests::cache;
use stiefel_tests::disk::{ExtraFile, LaptopDisk};
use stiefel_tests::kit::{CONSOLE, DEDICATED_MAC, DESKTOP_MAC, Kit};
use stiefel_tests::scenario::{self, Failure, Machines, Milestones};
use stiefel_tests::tools::{self, Job};
use stiefel_tests::{Boot, Content, Netdev, NicModel, VmBuilder, Wire, kernel_cmdline};

use super::build::BUSYBOX;

/// Its options.
#[derive(Args)]
pub(crate) struct TestQemuArgs {
    #[command(subcommand)]
    what: What,
    /// Install missing programs without asking.
    #[arg(long, short, global = true)]
    yes: bool,
    /// Show the machines' screens in windows.
    #[arg(long, global = true)]
    graphical: bool,
    /// Words for the kernel's command line.
    #[arg(long, global = true, value_name = "WORDS", default_value = "")]
    cmdline: String,
    /// Another kernel; needs --initrd.
    #[arg(long, global = true, value_name = "FILE", requires = "initrd")]
    kernel: Option<PathBuf>,
    /// Another initrd; needs --kernel.
    #[arg(long, global = true, value_name = "FILE", requires = "kernel")]
    initrd: Option<PathBuf>,
    /// Give the machine a USB device of this computer.
    #[arg(long, global = true, value_name = "VENDOR:PRODUCT")]
    forward_usb: Vec<stiefel_shared::config::UsbId>,
    /// Attach the NIC to this bridge of the host, instead of the other machine.
    #[arg(long, global = true, value_name = "BRIDGE")]
    use_existing_bridge: Option<String>,
    /// Put this file or folder on the laptop's disk, below /root.
    #[arg(long, global = true, value_name = "PATH")]
    extra_files: Vec<PathBuf>,
}

#[derive(Subcommand, Clone, Copy)]
enum What {
    /// Both machines: the cable is plugged into the running laptop, and the desktop boots from it.
    Demo,
    /// The laptop: a Debian with stiefel installed; its NIC is plugged in by itself.
    Server,
    /// The desktop, started from the stick; run `server` in another terminal.
    Client,
    /// The ramdisk alone, with a shell.
    Ramdisk,
}

/// Runs it.
pub(crate) fn run(args: TestQemuArgs) -> anyhow::Result<()> {
    let jobs: &[Job] = match args.what {
        What::Ramdisk => &[Job::Boot, Job::LaptopDisk],
        _ => &[Job::Boot, Job::Uefi, Job::LaptopDisk],
    };
    tools::install(&tools::missing(jobs), args.yes)?;
    let done = match args.what {
        What::Demo => demo(),
        What::Server => server(&args),
        What::Client => client(&args),
        What::Ramdisk => ramdisk(&args),
    };
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

fn server(args: &TestQemuArgs) -> Result<(), Failure> {
    let kit = prepare(None)?;
    let place = meeting_place()?;
    let disk = kit.laptop_disk(
        &kit.dir().join("laptop.img"),
        &kit.config(""),
        extra_files(&args.extra_files)?,
    )?;
    // The client's process writes its stick with this key.
    std::fs::copy(kit.key("stick"), place.join("stick.key"))?;
    let laptop = extras(
        args,
        VmBuilder::new("laptop")
            .boot(laptop_boot(args, &disk))
            .disk(disk.drive()),
    )?
    .start()?;
    eprintln!(
        "root's password is `{}`; leave with Ctrl-]",
        stiefel_tests::disk::PASSWORD
    );
    let end = netdev(args, || cable(&place, "laptop", "desktop"));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let plugged = laptop
                .serial()
                .expect("laptop login:", scenario::patience::LOGIN)
                .map_err(Failure::from)
                .and_then(|_| {
                    std::thread::sleep(Duration::from_secs(15));
                    Ok(laptop.plug_usb_nic("cable", &end, DEDICATED_MAC)?)
                });
            if let Err(error) = plugged {
                eprintln!("\r\nthe NIC could not be plugged in: {error}\r");
            }
        });
        laptop.interact()
    })?;
    Ok(())
}

fn client(args: &TestQemuArgs) -> Result<(), Failure> {
    let place = meeting_place()?;
    let key = place.join("stick.key");
    if !key.exists() {
        return Err("there is no laptop yet: run `stiefel test-qemu server` in another terminal first".into());
    }
    let kit = prepare(None)?;
    std::fs::copy(&key, kit.key("stick"))?;
    let stick = kit.dir().join("stick.img");
    kit.stick(&stick, "stick")?;
    let end = netdev(args, || cable(&place, "desktop", "laptop"));
    let builder = VmBuilder::new("desktop")
        .memory_mib(1536)
        .boot(Boot::Uefi)
        .stick(&stick)
        .nic("cable", NicModel::E1000e, &end, DESKTOP_MAC);
    let desktop = extras(args, builder)?.start()?;
    eprintln!("leave with Ctrl-]");
    Ok(desktop.interact()?)
}

fn ramdisk(args: &TestQemuArgs) -> Result<(), Failure> {
    if !Path::new(BUSYBOX).exists() {
        return Err(format!("there is no {BUSYBOX}; install a static one (Debian: busybox-static)").into());
    }
    let kit = prepare(Some(Path::new(BUSYBOX)))?;
    let folder = kit.ramdisk();
    let words: Vec<&str> = CONSOLE.into_iter().chain(args.cmdline.split_whitespace()).collect();
    let boot = Boot::Kernel {
        kernel: args.kernel.clone().unwrap_or_else(|| folder.join("kernel")),
        initrd: vec![Content::File(
            args.initrd.clone().unwrap_or_else(|| folder.join("ramdisk.cpio.zst")),
        )],
        cmdline: kernel_cmdline(&words),
    };
    let vm = extras(args, VmBuilder::new("ramdisk").memory_mib(512).boot(boot))?.start()?;
    eprintln!("leave with Ctrl-]");
    Ok(vm.interact()?)
}

fn laptop_boot(args: &TestQemuArgs, disk: &LaptopDisk) -> Boot {
    let words: Vec<&str> = CONSOLE.into_iter().chain(args.cmdline.split_whitespace()).collect();
    match (disk.boot(&words), &args.kernel, &args.initrd) {
        (Boot::Kernel { cmdline, .. }, Some(kernel), Some(initrd)) => Boot::Kernel {
            kernel: kernel.clone(),
            initrd: vec![Content::File(initrd.clone())],
            cmdline,
        },
        (boot, ..) => boot,
    }
}

fn netdev(args: &TestQemuArgs, direct: impl FnOnce() -> Netdev) -> Netdev {
    match &args.use_existing_bridge {
        Some(name) => Netdev::Bridge { name: name.clone() },
        None => direct(),
    }
}

fn extras(args: &TestQemuArgs, mut builder: VmBuilder) -> Result<VmBuilder, Failure> {
    for usb in &args.forward_usb {
        builder = builder.usb_host(usb.vendor, usb.product);
    }
    Ok(builder.graphical(args.graphical))
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
