//! A real Debian on the desktop while everything goes wrong with the link, one thing after the other, under a load that
//! writes to its root all the time; and what becomes of a desktop whose laptop is gone.

use std::thread::sleep;
use std::time::{Duration, Instant};

use stiefel_shared::handover::{DiskTransport, Encryption};
use stiefel_tests::disk::{ExtraFile, PASSWORD, System};
use stiefel_tests::kit::{DEDICATED_MAC, DESKTOP_MAC};
use stiefel_tests::scenario::{self, Failure, Machines, Milestones, patience};
use stiefel_tests::{NicModel, Vm, Wire};

use crate::journey;
use crate::link::{WAYS, Way};
use crate::runner::Bench;

/// Where the load is on the laptop's disk.
const LOAD: &str = "/usr/local/bin/load";
/// Stops it.
const STOP: &str = "/run/load.stop";
/// What it says.
const LOG: &str = "/run/load.log";

/// Laptop and desktop, the desktop at its login with the load running.
pub(crate) struct Session {
    pub(crate) laptop: Vm,
    pub(crate) desktop: Vm,
    pub(crate) machines: Machines,
}

fn machines(bench: &Bench, way: Way, config: &str, files: Vec<ExtraFile>) -> Result<Machines, Failure> {
    machines_of(bench, &System::default(), way, config, files)
}

/// A laptop with this system, whose disk goes this way, and with the load on it.
pub(crate) fn machines_of(
    bench: &Bench,
    system: &System,
    (transport, encryption): Way,
    config: &str,
    files: Vec<ExtraFile>,
) -> Result<Machines, Failure> {
    let transport = match transport {
        DiskTransport::NvmeTcp => "nvme-tcp",
        DiskTransport::Nbd => "nbd",
    };
    let encryption = match encryption {
        Encryption::Wireguard => "wireguard",
        Encryption::None => "none",
    };
    let program = std::env::current_exe()?.with_file_name("load");
    let config = format!("disk: {{transport: {transport}}}\nlink: {{encryption: {encryption}}}\n{config}");
    let files = [vec![ExtraFile::new(program.as_path(), LOAD, 0o755)], files].concat();
    Machines::of(bench.kit, system, Wire::relayed(0)?, &config, files)
}

impl Session {
    /// Plugs, boots the desktop up to its login, and starts the load there.
    pub(crate) fn begin(machines: Machines) -> Result<Self, Failure> {
        let laptop = scenario::laptop_at_home(&machines.disk, None, false)?;
        scenario::plug_and_serve(&laptop, &machines.wire.a())?;
        let desktop = scenario::desktop_with(NicModel::Usb, &machines.stick, &machines.wire.b(), false)?;
        let session = Self {
            laptop,
            desktop,
            machines,
        };
        session.boots()?;
        session.start_load()?;
        Ok(session)
    }

    /// The desktop boots, up to a shell.
    fn boots(&self) -> Result<(), Failure> {
        scenario::desktop_logs_in(&self.desktop, &self.machines.disk, &mut Milestones::new(false))
    }

    /// As [`Session::boots`], for a desktop that is asking already.
    fn boots_after_asking(&self) -> Result<(), Failure> {
        scenario::desktop_boots_after_asking(&self.desktop, &mut Milestones::new(false))?;
        Ok(self.desktop.login("root", PASSWORD, Duration::from_secs(30))?)
    }

    fn start_load(&self) -> Result<(), Failure> {
        self.desktop
            .run_ok(&format!("rm -f {STOP}; setsid {LOAD} /root/load {STOP} >{LOG} 2>&1 &"))?;
        self.load_goes_on("at its start")
    }

    /// Waits until the load has written more than it had.
    pub(crate) fn load_goes_on(&self, when: &str) -> Result<(), Failure> {
        let writes = || -> Result<u64, Failure> {
            let said = self.desktop.run_ok(&format!("tail -n 1 {LOG}"))?;
            Ok(said
                .trim()
                .strip_prefix("load: ")
                .and_then(|number| number.parse().ok())
                .unwrap_or(0))
        };
        let (before, begun) = (writes()?, Instant::now());
        while begun.elapsed() < Duration::from_secs(120) {
            if writes()? > before + 2 {
                return Ok(());
            }
            sleep(Duration::from_secs(1));
        }
        Err(format!("the load does not go on {when}").into())
    }

    /// Stops the load, and checks what it wrote and what the kernel said.
    pub(crate) fn load_is_right(&self) -> Result<(), Failure> {
        self.desktop.run_ok(&format!("touch {STOP}"))?;
        let said = self.desktop.run_ok_within(
            &format!("until grep -qE 'load: (ok|ERROR)' {LOG}; do sleep 1; done; tail -n 1 {LOG}"),
            Duration::from_secs(60),
        )?;
        if !said.contains("load: ok") {
            return Err(format!("the load says {said:?}").into());
        }
        let said = self
            .desktop
            .run("dmesg | grep -iE 'I/O error|EXT4-fs (error|warning)|XFS.*(error|corrupt)|BTRFS (error|critical)|Remounting|blk_update'")?
            .output;
        let errors: Vec<&str> = said.lines().filter(|line| !is_read_ahead(line)).collect();
        if !errors.is_empty() {
            return Err(format!("the desktop's kernel says {}", errors.join("\n")).into());
        }
        Ok(())
    }

    /// The desktop powers off; the laptop comes home by itself, and its file system is clean.
    pub(crate) fn end(self) -> Result<(), Failure> {
        self.end_with(|_| Ok(()))
    }

    /// As [`Session::end`]; the laptop is looked at when it is home.
    pub(crate) fn end_with(self, look: impl FnOnce(&Vm) -> Result<(), Failure>) -> Result<(), Failure> {
        self.desktop.power_off(patience::SHUTDOWN)?;
        journey::ended_cleanly(&self.desktop)?;
        self.laptop.wait_reboot(patience::SHUTDOWN)?;
        self.laptop.unplug_usb_nic("cable")?;
        scenario::login(&self.laptop, &self.machines.disk)?;
        look(&self.laptop)?;
        self.laptop.power_off(patience::SHUTDOWN)?;
        Ok(self.machines.disk.fsck_clean()?)
    }
}

/// Whether the kernel only says that it has given up reading ahead, what it does when an NVMe connection is lost: nobody has
/// asked for that yet, and who does is served when the connection is back. (Flags of `linux/blk_types.h`: REQ_RAHEAD, which
/// is never tried again. The line before it names the command.)
fn is_read_ahead(line: &str) -> bool {
    const REQ_RAHEAD: u64 = 1 << 19;
    let flags = line
        .split_once("flags 0x")
        .and_then(|(_, rest)| u64::from_str_radix(rest.split(' ').next()?, 16).ok());
    let path = line.contains(": I/O Cmd(0x2) ") && line.contains("(sct 0x3 / sc 0x71)");
    path || (line.contains("op 0x0:(READ)") && flags.is_some_and(|flags| flags & REQ_RAHEAD != 0))
}

/// Everything that can happen to the link, one after the other.
pub(crate) fn link_faults(bench: &Bench, way: Way) -> Result<(), Failure> {
    let session = Session::begin(machines(bench, way, "", networkd())?)?;
    let (laptop, desktop, wire) = (&session.laptop, &session.desktop, &session.machines.wire);
    for seconds in [20, 120] {
        desktop.set_link("cable", false)?;
        wire.set_cut(true)?;
        sleep(Duration::from_secs(seconds));
        wire.set_cut(false)?;
        desktop.set_link("cable", true)?;
        session.load_goes_on(&format!("after the cable was out for {seconds} s"))?;
    }
    for _ in 0..5 {
        laptop.sysrq('i')?;
        laptop.serial().expect(
            "the server was started anew; the session goes on",
            Duration::from_secs(10),
        )?;
        session.load_goes_on("after the server was killed")?;
    }
    desktop.unplug_usb_nic("cable")?;
    desktop.plug_usb_nic("cable", &wire.b(), DESKTOP_MAC)?;
    session.load_goes_on("after the desktop's adapter was plugged in again")?;
    laptop.unplug_usb_nic("cable")?;
    laptop.plug_usb_nic("cable", &wire.a(), DEDICATED_MAC)?;
    session.load_goes_on("after the laptop's adapter was plugged in again")?;
    desktop.run_ok("systemctl start systemd-networkd")?;
    desktop.run(
        "for link in $(networkctl list --no-legend | awk '{print $2}'); do networkctl down $link; done; \
         networkctl reconfigure stiefel0; systemctl restart systemd-networkd",
    )?;
    session.load_goes_on("after systemd-networkd took every link down")?;
    desktop.run_ok(FIREWALL)?;
    session.load_goes_on("behind a firewall that lets only answers in")?;
    wire.set_cut(true)?;
    sleep(Duration::from_secs(20));
    wire.set_cut(false)?;
    session.load_goes_on("behind a firewall, after the cable was out for 20 s")?;
    session.load_is_right()?;
    session.end()
}

/// What ufw and firewalld come to.
const FIREWALL: &str = "nft 'table inet strict { chain input { type filter hook input priority 0; policy drop; \
     iif lo accept; meta l4proto 58 accept; ct state established,related accept; }; }'";

/// systemd-networkd, told to take every interface there is.
fn networkd() -> Vec<ExtraFile> {
    let network = "[Match]\nName=*\n[Network]\nDHCP=yes\nLinkLocalAddressing=no\nIPv6AcceptRA=no\n";
    vec![ExtraFile::new(
        network.as_bytes().to_vec(),
        "/etc/systemd/network/10-all.network",
        0o644,
    )]
}

/// The desktop reboots, is reset without a goodbye, and at last wants to power off when its laptop is gone: nobody lays a
/// hand on the laptop meanwhile, and the power-off ends within a minute.
pub(crate) fn desktop_comes_and_goes(bench: &Bench) -> Result<(), Failure> {
    let session = Session::begin(machines(bench, WAYS[0], "", Vec::new())?)?;
    let (laptop, desktop) = (&session.laptop, &session.desktop);
    session.load_is_right()?;
    desktop.serial().send_line("systemctl reboot")?;
    laptop
        .serial()
        .expect("the desktop reboots; serving on", patience::SHUTDOWN)?;
    journey::ended_cleanly(desktop)?;
    session.boots()?;
    session.start_load()?;
    desktop.system_reset()?;
    laptop.serial().expect(
        "the same desktop starts anew and takes over from itself",
        patience::STICK,
    )?;
    session.boots()?;
    // Cached, so that it can be started when the disk is gone.
    desktop.run_ok("systemctl --version >/dev/null; sync")?;
    laptop.kill();
    let begun = Instant::now();
    desktop.serial().send_line("systemctl poweroff")?;
    desktop.wait_shutdown(Duration::from_secs(60))?;
    let took = begun.elapsed();
    if took > Duration::from_secs(60) {
        return Err(format!("the power-off without the laptop took {} s", took.as_secs()).into());
    }
    Ok(())
}

/// What the laptop boots is changed on the desktop, as an upgrade does: at the reboot the laptop goes home to collect it, and the
/// stick wakes it there. No hand is laid on it.
pub(crate) fn upgrade(bench: &Bench) -> Result<(), Failure> {
    let session = Session::begin(machines(bench, WAYS[0], "", Vec::new())?)?;
    let (laptop, desktop) = (&session.laptop, &session.desktop);
    session.load_is_right()?;
    desktop.run_ok("echo 'the settings of a new kernel' > /boot/config-new && sync")?;
    desktop.serial().send_line("systemctl reboot")?;
    laptop.serial().expect(
        "its kernel or initrd was changed; the laptop goes home",
        patience::SHUTDOWN,
    )?;
    journey::ended_cleanly(desktop)?;
    laptop.wait_reboot(patience::SHUTDOWN)?;
    desktop
        .serial()
        .expect("its own system runs; waking it", patience::STICK + patience::LOGIN)?;
    scenario::wait_until_serving(laptop)?;
    session.boots_after_asking()?;
    desktop.run_ok("test -f /boot/config-new")?;
    session.end()
}

/// The laptop is reset in the middle of the session: it boots its own system and writes. The desktop says that its session is
/// over and ends; nothing that it still had to write appears on the disk.
pub(crate) fn laptop_reset(bench: &Bench, way: Way) -> Result<(), Failure> {
    let machines = machines(bench, way, "session: {grace: 30s}\n", Vec::new())?;
    let session = Session::begin(machines)?;
    let (laptop, desktop) = (&session.laptop, &session.desktop);
    laptop.system_reset()?;
    desktop
        .serial()
        .expect("laptop is not heard any more", Duration::from_secs(30))?;
    laptop.login("root", PASSWORD, patience::LOGIN)?;
    let written = laptop.run_ok("sha256sum /root/load/file-*; date > /root/written-at-home; sync")?;
    desktop
        .serial()
        .expect("This session is over", Duration::from_secs(120))?;
    desktop.system_powerdown()?;
    desktop.wait_shutdown(Duration::from_secs(60))?;
    let after = laptop.run_ok("echo 3 > /proc/sys/vm/drop_caches; sha256sum /root/load/file-*")?;
    if after != written {
        return Err("the desktop has written to the laptop's disk after its session was over".into());
    }
    laptop.power_off(patience::SHUTDOWN)?;
    Ok(session.machines.disk.fsck_clean()?)
}
