//! The link under load: what is written while it fails is written once, in order, and nobody gets an error.
//!
//! The payload is `payload-init`: a program that writes block by block and flushes each.

use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use stiefel_initrd_builder::overlay;
use stiefel_shared::cpio;
use stiefel_shared::handover::{DiskTransport, Encryption, LinkMode, Part};
use stiefel_tests::net::{Side, Tamper, Verdict};
use stiefel_tests::scenario::{CLOCK_WORD, Failure, LOAD_BLOCK, LOAD_BLOCKS, LOAD_TIMES, patience, pattern};
use stiefel_tests::{NicModel, Vm, Wire, re};

use crate::runner::Bench;
use crate::tiny::{DESKTOP_MAC, LAPTOP_MAC, Server, client_without_nic, key};

/// The most of the traffic that is recorded, in bytes: more than there is.
const RECORD: u64 = 400 << 20;

/// How the disk travels.
pub(crate) type Way = (DiskTransport, Encryption);

/// All ways, the default first.
pub(crate) const WAYS: [Way; 4] = [
    (DiskTransport::NvmeTcp, Encryption::Wireguard),
    (DiskTransport::Nbd, Encryption::Wireguard),
    (DiskTransport::NvmeTcp, Encryption::None),
    (DiskTransport::Nbd, Encryption::None),
];

/// A pair of machines and what goes on between them.
struct Plan {
    way: Way,
    mode: LinkMode,
    nic: NicModel,
    /// More words on the desktop's command line.
    words: String,
    /// The cable loses frames that are larger than usual.
    small_frames: bool,
}

impl Plan {
    fn of(way: Way) -> Self {
        Self {
            way,
            mode: LinkMode::Dedicated,
            nic: NicModel::Usb,
            words: String::new(),
            small_frames: false,
        }
    }
}

/// A switch that does not know of larger frames.
struct DropLarge;

impl Tamper for DropLarge {
    fn frame(&mut self, _from: Side, frame: &mut Vec<u8>) -> Verdict {
        if frame.len() > 1518 {
            Verdict::Drop
        } else {
            Verdict::Pass
        }
    }
}

/// From so long an outage on, other tests may run meanwhile.
const LONG: Duration = Duration::from_secs(60);

/// How long a killed server may take to serve again.
pub(crate) const RESTART: Duration = Duration::from_secs(10);

/// Two machines, and the cable between them.
struct Pair {
    laptop: Vm,
    desktop: Vm,
    wire: Wire,
    dir: tempfile::TempDir,
}

impl Pair {
    /// Boots both up to where the desktop has begun to write.
    fn writing(bench: &Bench, way: Way) -> Result<Self, Failure> {
        Self::with(bench, &Plan::of(way))
    }

    /// As [`Pair::writing`], as planned.
    fn with(bench: &Bench, plan: &Plan) -> Result<Self, Failure> {
        let dir = tempfile::tempdir_in(bench.kit.dir())?;
        let wire = Wire::relayed(RECORD)?;
        let key = key(bench, "stick")?;
        let parts = payload(bench)?;
        let (transport, encryption) = plan.way;
        let laptop = Server {
            encryption,
            transport,
            mode: plan.mode,
            words: plan.words.clone(),
            parts,
            nic: plan.nic,
            ..Server::new(&key)
        }
        .machine(bench, &wire.a(), dir.path())?
        .start()?;
        let desktop = client_without_nic(bench, &key)?
            .nic("cable", plan.nic, &wire.b(), DESKTOP_MAC)
            .start()?;
        laptop
            .serial()
            .expect("stiefel: ready; waiting for the desktop", patience::SERVING)?;
        if plan.small_frames {
            // The NICs of this test have large packets from the start; what comes before the attach is none of its business.
            desktop
                .serial()
                .expect("attaching the disk", patience::STICK + patience::BUNDLE)?;
            wire.set_tamper(Some(Box::new(DropLarge)))?;
        }
        desktop
            .serial()
            .expect("load: wrote 4", patience::STICK + patience::BUNDLE + patience::ATTACH)?;
        Ok(Self {
            laptop,
            desktop,
            wire,
            dir,
        })
    }

    /// The link is there: nothing was said of a loss, and the disk still answers.
    fn still_there(self) -> Result<(), Failure> {
        if self.desktop.serial().said("is not heard any more")? {
            return Err("the laptop was lost after the clock's step".into());
        }
        Ok(())
    }

    /// Waits until all is written, and checks it: on the desktop, in its kernel's log, and on the laptop's disk.
    fn all_is_written(self) -> Result<(), Failure> {
        self.desktop.serial().expect("load: done", Duration::from_secs(60))?;
        no_errors(&self.desktop)?;
        drop(self.desktop);
        drop(self.laptop);
        check_disk(&self.dir.path().join("disk.img"))
    }
}

/// Nothing that was written or read has failed.
pub(crate) fn no_errors(desktop: &Vm) -> Result<(), Failure> {
    for bad in ["load: ERROR", "I/O error", "Buffer I/O", "blk_update_request"] {
        if desktop.serial().said(bad)? {
            return Err(format!(
                "the desktop says {bad:?}; its console: {}",
                desktop.serial().log().display()
            )
            .into());
        }
    }
    Ok(())
}

pub(crate) fn check_disk(image: &Path) -> Result<(), Failure> {
    let disk = std::fs::read(image)?;
    for (number, block) in (0..LOAD_BLOCKS).zip(disk.chunks(LOAD_BLOCK)) {
        if block != pattern(number, LOAD_TIMES - 1) {
            return Err(format!("block {number} on the laptop's disk is not what the desktop wrote").into());
        }
    }
    Ok(())
}

/// A payload that writes: Debian's kernel, our program as `/init`, and the overlay of its modules.
pub(crate) fn payload(bench: &Bench) -> Result<Vec<(Part, Vec<u8>)>, Failure> {
    let installed = bench.kit.installed();
    let program = std::env::current_exe()?.with_file_name("payload-init");
    let mut initrd = cpio::Writer::new(Vec::new());
    initrd.dir("dev", 0o755)?;
    initrd.node("dev/console", 0o600, 5, 1)?;
    initrd.file("init", 0o755, &std::fs::read(program)?)?;
    let overlay = overlay::overlay(&installed.modules, &[], &[], true)?;
    Ok(vec![
        (Part::Kernel, std::fs::read(&installed.kernel)?),
        (Part::Initrd, initrd.finish()?),
        (Part::Overlay, overlay.bytes),
    ])
}

/// The cable is out for so many seconds.
pub(crate) fn cable_out(bench: &Bench, way: Way, seconds: u64) -> Result<(), Failure> {
    let pair = Pair::writing(bench, way)?;
    pair.wire.set_cut(true)?;
    let outage = Duration::from_secs(seconds);
    if outage > LONG {
        bench.idle(outage)?;
    } else {
        sleep(outage);
    }
    pair.wire.set_cut(false)?;
    pair.all_is_written()
}

/// The desktop's adapter is pulled out and plugged in again: it has another interface index then.
pub(crate) fn desktop_replug(bench: &Bench, way: Way) -> Result<(), Failure> {
    let pair = Pair::writing(bench, way)?;
    pair.desktop.unplug_usb_nic("cable")?;
    // The adapter is there before the cable is: longer than the keeper waits at a time.
    pair.wire.set_cut(true)?;
    pair.desktop.plug_usb_nic("cable", &pair.wire.b(), DESKTOP_MAC)?;
    sleep(Duration::from_secs(15));
    pair.wire.set_cut(false)?;
    pair.all_is_written()
}

/// The laptop's adapter is.
pub(crate) fn laptop_replug(bench: &Bench, way: Way) -> Result<(), Failure> {
    let pair = Pair::writing(bench, way)?;
    pair.laptop.unplug_usb_nic("cable")?;
    sleep(Duration::from_secs(5));
    pair.laptop.plug_usb_nic("cable", &pair.wire.a(), LAPTOP_MAC)?;
    pair.all_is_written()
}

/// The desktop's clock is set back and forward by half a day while it writes: WireGuard's handshakes carry its time.
pub(crate) fn clock_step(bench: &Bench, way: Way) -> Result<(), Failure> {
    for hours in [-12, 12] {
        let plan = Plan {
            words: format!("{CLOCK_WORD}{hours}"),
            ..Plan::of(way)
        };
        let pair = Pair::with(bench, &plan)?;
        pair.desktop
            .serial()
            .expect("load: clock stepped", Duration::from_secs(60))?;
        // Longer than WireGuard uses one pair of keys: the link must have gone on through a handshake.
        let begun = Instant::now();
        pair.desktop.serial().expect("load: done", Duration::from_secs(120))?;
        bench.idle(Duration::from_secs(240).saturating_sub(begun.elapsed()))?;
        pair.still_there()?;
    }
    Ok(())
}

/// A system that is told to do without IPv6 has the link all the same.
pub(crate) fn without_ipv6(bench: &Bench, way: Way) -> Result<(), Failure> {
    let plan = Plan {
        words: "ipv6.disable=1".to_owned(),
        ..Plan::of(way)
    };
    Pair::with(bench, &plan)?.all_is_written()
}

/// In a LAN the desktop's system keeps its NIC; on a cable of its own it never sees it.
pub(crate) fn lan(bench: &Bench) -> Result<(), Failure> {
    for (mode, seen) in [(LinkMode::Lan, true), (LinkMode::Dedicated, false)] {
        let plan = Plan {
            mode,
            ..Plan::of(WAYS[0])
        };
        let pair = Pair::with(bench, &plan)?;
        if pair.desktop.serial().said(re("load: interfaces.*usb0"))? != seen {
            return Err(format!(
                "{mode:?}: the desktop's system should {}see its NIC",
                if seen { "" } else { "not " }
            )
            .into());
        }
        if mode == LinkMode::Lan {
            pair.desktop.unplug_usb_nic("cable")?;
            pair.desktop.plug_usb_nic("cable", &pair.wire.b(), DESKTOP_MAC)?;
        }
        pair.all_is_written()?;
    }
    Ok(())
}

/// Where NICs and cable can, the packets are large; where the cable cannot, they stay as usual, and all works.
pub(crate) fn packets(bench: &Bench) -> Result<(), Failure> {
    for (small_frames, said) in [
        (false, "packets of 9000 bytes go to the laptop and back"),
        (true, "they stay at 1500"),
    ] {
        let plan = Plan {
            nic: NicModel::VirtioJumbo,
            small_frames,
            ..Plan::of(WAYS[0])
        };
        let pair = Pair::with(bench, &plan)?;
        if !pair.desktop.serial().said(said)? {
            return Err(format!("the desktop did not say {said:?}").into());
        }
        pair.all_is_written()?;
    }
    Ok(())
}

/// Every process of the laptop's ramdisk but the first is killed, again and again: the disk that PID 1 has kept goes on.
pub(crate) fn server_killed(bench: &Bench, way: Way) -> Result<(), Failure> {
    let pair = Pair::writing(bench, way)?;
    for kill in 1..=5 {
        let killed = Instant::now();
        pair.laptop.sysrq('i')?;
        pair.laptop
            .serial()
            .expect("the server was started anew; the session goes on", RESTART)?;
        bench.note(&format!(
            "        killed, and serving again after {:.1} s\n",
            killed.elapsed().as_secs_f64()
        ));
        // It must be served again before the next fault.
        pair.desktop
            .serial()
            .expect(&format!("load: wrote {}", 4 + 4 * kill), Duration::from_secs(60))?;
    }
    pair.all_is_written()
}

/// Who records the traffic finds nothing of the disk in it with the tunnel; without, the same search finds it. The bundle is
/// encrypted either way.
pub(crate) fn recorded(bench: &Bench, way: Way) -> Result<(), Failure> {
    let found = way.1 == Encryption::None;
    let pair = Pair::writing(bench, way)?;
    pair.desktop
        .serial()
        .expect(re("load: wrote 8"), Duration::from_secs(60))?;
    if pair.wire.carried(&pattern(6, 0)[..64])? != found {
        let what = if found { "is not" } else { "is" };
        return Err(format!("what was written to the disk {what} in the recorded traffic").into());
    }
    let kernel = std::fs::read(&bench.kit.installed().kernel)?;
    let middle = kernel.len() / 2;
    if pair.wire.carried(&kernel[middle..middle + 64])? {
        return Err("the payload's kernel is in the recorded traffic".into());
    }
    Ok(())
}
