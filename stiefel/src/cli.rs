//! What the user types: parsed here, resolved against the machine in `commands`.

use std::io::Write;
use std::net::SocketAddr;
use std::num::NonZeroU64;
use std::panic;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, CommandFactory, Parser, Subcommand};
use stiefel_server::autokexec;
use stiefel_server::nbd::Upper;
use stiefel_server::target::Writable;
use stiefel_shared::config::ConfigError;
use stiefel_shared::handover::WritableDisk;

use crate::commands;

/// Exit status for wrong usage and for a configuration that cannot be used; clap exits with it, too.
const USAGE: u8 = 2;

/// Boot a desktop from a laptop's own disk over a cable.
#[derive(Parser)]
#[command(
    version,
    max_term_width = 100,
    after_help = "Exit status: 0 done, 1 failed, 2 wrong usage or configuration."
)]
struct Cli {
    /// The configuration, if not /etc/stiefel/config.yaml.
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Look at this laptop, and write its configuration and a first key. The first command to type.
    Init(InitArgs),
    /// Say what is missing for a session, and the command that mends it. Exit status 1 if something is.
    Doctor(DoctorArgs),
    /// Build the ramdisk: kernel, ramdisk.cpio.zst and manifest. Needs no root.
    Build(BuildArgs),
    /// Put stiefel into this laptop's system: program, service, guards, configuration, key, ramdisk. Again after changes.
    Install(InstallArgs),
    /// Bring up to date what is installed: the ramdisk after an update of the kernel, files of ours after one of stiefel.
    Upgrade(UpgradeArgs),
    /// Take out again what `install` put in.
    Uninstall(UninstallArgs),
    /// Write the desktop's boot medium: an image file, or a USB stick.
    Stick(StickArgs),
    /// The sticks' keys.
    #[command(subcommand)]
    Key(KeyCommand),
    /// The service: wait for the dedicated NIC or for a wake, then leave the system and serve.
    Autokexec(AutokexecArgs),
    /// Leave this system and serve its disk now.
    Serve(ServeArgs),
    /// Stop the countdown after a plug or a wake: this laptop stays in its system. For root, and for who sits in front of it.
    Cancel,
    /// Say in this graphical session when the laptop is about to leave, with a button that cancels it, and when it stays. `install`
    /// has it started in each session.
    Notify,
    /// Show what the desktop would boot, and why.
    Payload(PayloadArgs),
    /// Show how the session is, on a desktop that runs from a laptop's disk.
    Status(StatusArgs),
    /// Serve a file or a device over NBD: just the server, in clear.
    Nbd(NbdArgs),
    /// Lend this machine's disks over the network: each as it appears, read-only unless told otherwise.
    Target(TargetArgs),
    /// Show which machines lend disks to the holder of a key; with a name, make one a block device here.
    Attach(AttachArgs),
    /// Give a borrowed disk back; without a name, list them.
    Detach(DetachArgs),
    /// Copy a disk or image to another: goes on after an interruption, leaves zeroes out, compares at the end.
    Copy(CopyArgs),
    /// Try stiefel in virtual machines.
    #[command(name = "test-qemu")]
    TestQemu(commands::test_qemu::TestQemuArgs),
    /// Print the man page, or shell completions; for who makes packages.
    #[command(hide = true)]
    Generate(GenerateArgs),
    /// Put program, modules and firmware of the attach step into the folder of an initrd; for the hooks of what builds initrds.
    #[command(hide = true)]
    Bake(BakeArgs),
}

#[derive(Args)]
pub(crate) struct InitArgs {
    /// Look at the system below this folder, and write there.
    #[arg(long, value_name = "DIR", default_value = "/")]
    pub(crate) root: PathBuf,
    /// Do not ask: take what would be proposed, keep what is there.
    #[arg(long, short)]
    pub(crate) yes: bool,
    /// Replace a configuration that is there; the old one is kept beside it.
    #[arg(long)]
    pub(crate) force: bool,
    /// Only show what was found and what would be written.
    #[arg(long)]
    pub(crate) dry_run: bool,
}

#[derive(Args)]
pub(crate) struct DoctorArgs {
    /// Look at the system below this folder; the service is only asked where it is the running one.
    #[arg(long, value_name = "DIR", default_value = "/")]
    pub(crate) root: PathBuf,
    /// Print as JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args)]
pub(crate) struct BuildArgs {
    /// Where the three files go.
    #[arg(long, value_name = "DIR", default_value = "/var/lib/stiefel")]
    pub(crate) out: PathBuf,
    /// Another kernel than the configured or running one; needs --modules.
    #[arg(long, value_name = "FILE", requires = "modules")]
    pub(crate) kernel: Option<PathBuf>,
    /// That kernel's modules, such as /lib/modules/6.1.0-13-amd64.
    #[arg(long, value_name = "DIR", requires = "kernel")]
    pub(crate) modules: Option<PathBuf>,
    /// A folder with firmware; may be given several times.
    #[arg(long, value_name = "DIR", default_values = ["/lib/firmware/updates", "/lib/firmware"])]
    pub(crate) firmware: Vec<PathBuf>,
    /// Busybox for a debug image (`modules: [default, debug]`).
    #[arg(long, value_name = "FILE", default_value = "/bin/busybox")]
    pub(crate) busybox: PathBuf,
    /// Add the debug class whatever the configuration says: busybox, and a shell for everyone at the console.
    #[arg(long)]
    pub(crate) debug: bool,
    /// Do nothing if just what would be built is there already.
    #[arg(long)]
    pub(crate) if_changed: bool,
    /// Print the report as JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args)]
pub(crate) struct InstallArgs {
    /// Install into the system below this folder.
    #[arg(long, value_name = "DIR", default_value = "/")]
    pub(crate) root: PathBuf,
    /// The ramdisk, as `stiefel build --out DIR` made it; built now if it is not given.
    #[arg(long, value_name = "DIR")]
    pub(crate) ramdisk: Option<PathBuf>,
    /// Do not ask.
    #[arg(long, short)]
    pub(crate) yes: bool,
    /// Only show what would be done.
    #[arg(long)]
    pub(crate) dry_run: bool,
}

#[derive(Args)]
pub(crate) struct UpgradeArgs {
    /// The system below this folder.
    #[arg(long, value_name = "DIR", default_value = "/")]
    pub(crate) root: PathBuf,
    /// Say nothing unless something is wrong.
    #[arg(long, short)]
    pub(crate) quiet: bool,
    /// Only show what would be done.
    #[arg(long)]
    pub(crate) dry_run: bool,
}

#[derive(Args)]
pub(crate) struct UninstallArgs {
    /// The system below this folder.
    #[arg(long, value_name = "DIR", default_value = "/")]
    pub(crate) root: PathBuf,
    /// Remove configuration and keys as well.
    #[arg(long)]
    pub(crate) purge: bool,
    /// Do not ask.
    #[arg(long, short)]
    pub(crate) yes: bool,
    /// Only show what would be done.
    #[arg(long)]
    pub(crate) dry_run: bool,
}

#[derive(Args)]
pub(crate) struct StickArgs {
    /// An image file to create, or the USB stick's device, such as /dev/sdb; a name that ends in .efi becomes one file for any
    /// UEFI firmware, boot entry or iPXE.
    pub(crate) target: PathBuf,
    /// The key to put on it: a name below /etc/stiefel/keys, or a file.
    #[arg(long, value_name = "NAME|FILE", default_value = "stick")]
    pub(crate) key: String,
    /// The ramdisk, as `stiefel build` made it.
    #[arg(long, value_name = "DIR", default_value = "/var/lib/stiefel")]
    pub(crate) ramdisk: PathBuf,
    /// The UEFI stub (package systemd-boot-efi).
    #[arg(long, value_name = "FILE")]
    pub(crate) stub: Option<PathBuf>,
    /// A stick that lends the disks of the machine it is started on, instead of booting from a laptop: to the holders of the key.
    #[arg(long = "target", conflicts_with = "encrypted_only")]
    pub(crate) target_mode: bool,
    /// With --target: lend to everybody, in clear.
    #[arg(long, requires = "target_mode", conflicts_with = "key")]
    pub(crate) open: bool,
    /// With --target: a disk that one borrower may write, by the name that `stiefel target` lists it by, such as ssd-980-s64d, and
    /// its size in bytes; may be given several times. Without the size a disk behind USB is not written: its name may be that of a
    /// case with another disk in it.
    #[arg(long, value_name = "NAME[=BYTES]", requires = "target_mode", value_parser = target_disk)]
    pub(crate) read_write: Vec<WritableDisk>,
    /// With --target: all other disks can be written, too; what is written is thrown away at the end.
    #[arg(long, requires = "target_mode")]
    pub(crate) snapshot: bool,
    /// Refuse a laptop that would send its disk in clear (`link.encryption: none`).
    #[arg(long)]
    pub(crate) encrypted_only: bool,
    /// A stick for this laptop itself: started from it, the laptop serves its disk to all sticks whose keys it has, without its own
    /// system. Holds no stick's key: keys and configuration are read from the disk at each start. Where that is encrypted (LUKS), the
    /// desktop asks for the passphrase; then this stick holds keys by which it may be sent, and this laptop's cryptsetup and lvm.
    #[arg(long, conflicts_with_all = ["target_mode", "encrypted_only", "key"])]
    pub(crate) laptop: bool,
    /// Words for the kernel's command line on the desktop, besides `initrd.cmdline`.
    #[arg(long, value_name = "WORDS", default_value = "")]
    pub(crate) cmdline: String,
    /// Replace an image file that exists.
    #[arg(long)]
    pub(crate) overwrite: bool,
    /// Write to a disk that is not removable.
    #[arg(long)]
    pub(crate) allow_fixed: bool,
    /// Do not ask before wiping a device.
    #[arg(long, short)]
    pub(crate) yes: bool,
}

#[derive(Subcommand)]
pub(crate) enum KeyCommand {
    /// Make a new key; sticks written with it may connect.
    New(KeyArgs),
    /// List the keys' names.
    List {
        /// Where the keys are.
        #[arg(long, value_name = "DIR", default_value = "/etc/stiefel/keys")]
        dir: PathBuf,
        /// Print as JSON.
        #[arg(long)]
        json: bool,
    },
    /// Delete a key; sticks written with it are refused from the next serve on.
    Revoke(KeyArgs),
}

#[derive(Args)]
pub(crate) struct KeyArgs {
    /// The key's name.
    pub(crate) name: String,
    /// Where the keys are.
    #[arg(long, value_name = "DIR", default_value = "/etc/stiefel/keys")]
    pub(crate) dir: PathBuf,
}

#[derive(Args)]
pub(crate) struct AutokexecArgs {
    /// Say what would be done at a trigger, and load nothing.
    #[arg(long)]
    pub(crate) dry_run: bool,
}

#[derive(Args)]
pub(crate) struct ServeArgs {
    /// Check and collect everything, but do not leave the system.
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Do not ask.
    #[arg(long, short)]
    pub(crate) yes: bool,
}

#[derive(Args)]
pub(crate) struct PayloadArgs {
    /// Look at the system below this folder.
    #[arg(long, value_name = "DIR", default_value = "/")]
    pub(crate) root: PathBuf,
    /// Print as JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args)]
pub(crate) struct StatusArgs {
    /// Print as JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args)]
pub(crate) struct NbdArgs {
    /// What to serve.
    pub(crate) target: PathBuf,
    /// Where to listen, such as 127.0.0.1:10809; may be given several times.
    #[arg(long, value_name = "ADDR:PORT", default_value = "[::1]:10809")]
    pub(crate) listen: Vec<SocketAddr>,
    /// Refuse every write.
    #[arg(long)]
    pub(crate) read_only: bool,
    /// Leave the target as it is: writes go into memory (`memory` or `memory:SIZE`, such as memory:2G; gone at the end) or
    /// into a file that is kept, and counts only as long as nobody writes the target itself.
    #[arg(long, value_name = "memory[:SIZE]|FILE", conflicts_with = "read_only")]
    pub(crate) overlay: Option<Upper>,
    /// The export's name.
    #[arg(long, default_value = "")]
    pub(crate) name: String,
}

#[derive(Args)]
pub(crate) struct TargetArgs {
    /// Disks or files to lend.
    #[arg(value_name = "DEVICE", required_unless_present_any = ["all", "reboot"])]
    pub(crate) devices: Vec<PathBuf>,
    /// Every disk but those that the running system lives on; given twice, these, too.
    #[arg(long, short, action = clap::ArgAction::Count, conflicts_with = "devices")]
    pub(crate) all: u8,
    /// Leave this system for the ramdisk, which lends all disks, also this system's; `q` on its keyboard starts the system again.
    #[arg(long, conflicts_with_all = ["devices", "no_nvme", "port", "json"])]
    pub(crate) reboot: bool,
    /// With --reboot: do not ask.
    #[arg(long, short, requires = "reboot")]
    pub(crate) yes: bool,
    /// Lend to everybody, in clear, by NVMe over TCP and NBD, like systemd-storagetm.
    #[arg(long)]
    pub(crate) open: bool,
    /// A disk that is there (its name here or device) that one initiator may write; may be given several times. It is followed
    /// wherever it is plugged in. With the NQN of the only host by NVMe, else by NBD.
    #[arg(long, value_name = "DISK[=HOSTNQN]")]
    pub(crate) read_write: Vec<Writable>,
    /// All other disks can be written, too; what is written is thrown away at the end. By NBD only.
    #[arg(long)]
    pub(crate) snapshot: bool,
    /// Without --open: who has one of the keys in this folder may borrow the disks, through a tunnel.
    #[arg(long, value_name = "DIR", default_value = "/etc/stiefel/keys")]
    pub(crate) keys: PathBuf,
    /// NBD only, without the kernel's NVMe target.
    #[arg(long)]
    pub(crate) no_nvme: bool,
    /// TCP port of the NBD server of --open.
    #[arg(long, value_name = "PORT", default_value_t = 10809, value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) port: u16,
    /// Print JSON: one line now and one for each change.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args)]
pub(crate) struct AttachArgs {
    /// The disk to attach; read-only unless --read-write. Its block device is printed.
    #[arg(value_name = "[MACHINE/]DISK")]
    pub(crate) disk: Option<String>,
    /// To write, too; the other machine must lend it so.
    #[arg(long, requires = "disk")]
    pub(crate) read_write: bool,
    /// The key: a name below /etc/stiefel/keys, or a file.
    #[arg(long, value_name = "NAME|FILE", default_value = "stick")]
    pub(crate) key: String,
    /// Ask only on this interface; may be given several times.
    #[arg(long, value_name = "INTERFACE")]
    pub(crate) interface: Vec<String>,
    /// How many seconds to look for machines.
    #[arg(long, value_name = "SECONDS", default_value_t = 4)]
    pub(crate) wait: u64,
    /// By NBD, also where NVMe over TCP would work.
    #[arg(long)]
    pub(crate) nbd: bool,
    /// Print as JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args)]
pub(crate) struct DetachArgs {
    /// The disk, MACHINE/DISK, or the device.
    pub(crate) disk: Option<String>,
    /// All that is borrowed.
    #[arg(long, conflicts_with = "disk")]
    pub(crate) all: bool,
    /// Also if the other machine does not answer any more.
    #[arg(long)]
    pub(crate) lost: bool,
}

#[derive(Args)]
pub(crate) struct CopyArgs {
    /// A disk or image, such as one that was attached.
    pub(crate) source: PathBuf,
    /// A file, or a disk that is at least as large.
    pub(crate) target: PathBuf,
    /// What cannot be read becomes zeroes, and is said at the end.
    #[arg(long)]
    pub(crate) skip_errors: bool,
    /// Where it is kept what is copied already; by default beside the file, for a disk below /var/lib/stiefel.
    #[arg(long, value_name = "FILE")]
    pub(crate) state: Option<PathBuf>,
    /// Do not ask before overwriting.
    #[arg(long, short)]
    pub(crate) yes: bool,
    /// Print the report as JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args)]
struct GenerateArgs {
    /// `man`, or the name of a shell.
    what: String,
    /// With `man`: write a page for each command into this folder.
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

#[derive(Args)]
pub(crate) struct BakeArgs {
    /// The folder that becomes the initrd.
    pub(crate) dir: PathBuf,
    /// The version of its kernel, such as 6.1.0-13-amd64.
    pub(crate) version: String,
    /// Where the kernels' modules are.
    #[arg(long, value_name = "DIR", default_value = "/lib/modules")]
    pub(crate) modules: PathBuf,
}

/// A disk's name as `stiefel target` lists it; not the kernel's, which may be another disk's on another machine.
fn target_disk(text: &str) -> Result<WritableDisk, String> {
    let (name, size) = match text.split_once('=') {
        Some((name, size)) => (name, Some(size)),
        None => (text, None),
    };
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    if name.is_empty() || name.len() > 80 || !name.chars().all(plain) {
        return Err("give the name that `stiefel target` lists, of lower-case letters, digits and dashes".to_owned());
    }
    let size = size.map(str::parse::<NonZeroU64>).transpose();
    let size = size.map_err(|error| format!("the size in bytes: {error}; `lsblk --bytes` shows it"))?;
    Ok(WritableDisk {
        name: name.to_owned(),
        size: size.map(NonZeroU64::get),
    })
}

/// Runs the user's command.
pub(crate) fn run() -> ExitCode {
    end_with_the_reader();
    let cli = Cli::parse();
    match dispatch(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            report(&error);
            if let Some(commands::Stopped(signal)) = error.downcast_ref() {
                // It does not come back.
                let _ = signal_hook::low_level::emulate_default_handler(*signal);
            }
            if error
                .chain()
                .any(|cause| cause.is::<ConfigError>() || cause.is::<commands::Usage>())
            {
                ExitCode::from(USAGE)
            } else {
                ExitCode::FAILURE
            }
        }
    }
}

/// Ends quietly when nobody reads any more what is printed (`stiefel doctor | head -1`): the standard library panics then. What must go
/// on all the same does not print that way.
fn end_with_the_reader() {
    let panicked = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        if info
            .payload_as_str()
            .is_some_and(|text| text.starts_with("failed printing to"))
        {
            std::process::exit(1);
        }
        panicked(info);
    }));
}

/// What failed, and why, one line each.
fn report(error: &anyhow::Error) {
    eprintln!("Error: {error}");
    for cause in error.chain().skip(1) {
        eprintln!("  because: {cause}");
    }
}

fn dispatch(cli: Cli) -> anyhow::Result<()> {
    let config = cli.config.as_deref();
    match cli.command {
        Command::Init(args) => commands::init::init(config, &args),
        Command::Doctor(args) => commands::doctor::doctor(config, &args),
        Command::Build(args) => commands::build::build(config, &args),
        Command::Install(args) => commands::install::install(config, &args),
        Command::Upgrade(args) => commands::install::upgrade(&args),
        Command::Uninstall(args) => commands::install::uninstall(&args),
        Command::Stick(args) => commands::stick::stick(config, &args),
        Command::Key(command) => commands::key::key(&command),
        Command::Autokexec(args) => commands::serve::autokexec(config, &args),
        Command::Serve(args) => commands::serve::serve(config, &args),
        Command::Cancel => commands::serve::cancel(),
        Command::Notify => autokexec::notify(),
        Command::Payload(args) => commands::serve::payload(config, &args),
        Command::Status(args) => commands::status::status(&args),
        Command::Nbd(args) => commands::nbd::nbd(&args),
        Command::Target(args) => commands::target::target(config, &args),
        Command::Attach(args) => commands::attach::attach(&args),
        Command::Detach(args) => commands::attach::detach(&args),
        Command::Copy(args) => commands::copy::copy(&args),
        Command::TestQemu(args) => commands::test_qemu::run(args),
        Command::Generate(args) => generate(&args),
        Command::Bake(args) => commands::build::bake(config, &args),
    }
}

fn generate(args: &GenerateArgs) -> anyhow::Result<()> {
    use clap::ValueEnum;
    let GenerateArgs { what, dir } = args;
    let mut command = Cli::command();
    if what == "man" {
        match dir {
            Some(dir) => clap_mangen::generate_to(command, dir)?,
            None => clap_mangen::Man::new(command).render(&mut std::io::stdout())?,
        }
        return Ok(());
    }
    let shell = clap_complete::Shell::from_str(what, true)
        .map_err(|_| anyhow::anyhow!("`{what}` is not known; accepted: man, bash, elvish, fish, powershell, zsh"))?;
    // It panics when it cannot write.
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut command, "stiefel", &mut script);
    std::io::stdout().write_all(&script).context("cannot print it")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_disk_that_a_target_stick_may_write_has_a_name_and_perhaps_a_size() {
        let disk = |name: &str, size| {
            let name = name.to_owned();
            Ok(WritableDisk { name, size })
        };
        assert_eq!(target_disk("ssd-980"), disk("ssd-980", None));
        assert_eq!(
            target_disk("usb-0123=500107862016"),
            disk("usb-0123", Some(500_107_862_016))
        );
        for wrong in ["", "=1", "Usb", "usb=", "usb=0", "usb=1G", "usb=-1"] {
            assert!(target_disk(wrong).is_err(), "{wrong}");
        }
    }
}
