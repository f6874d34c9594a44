//! The desktop in the ramdisk: finds the laptop, wakes it if it sleeps, fetches what is to be booted, and loads it.
//!
//! Whatever goes wrong is said, and the search begins anew: the desktop has nowhere else to go.

use std::fs::File;
use std::io::{Seek, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, ensure};
use rustix::fs::{MemfdFlags, memfd_create};
use sha2::{Digest, Sha256};
use stiefel_shared::bundle::{AttachSession, Goodbye, Manifest};
use stiefel_shared::cpio;
use stiefel_shared::discovery::{PORT, State};
use stiefel_shared::handover::{ClientHandover, PROGRAM_PATH, Part, SESSION_PATH, secret_json};
use stiefel_shared::session::MachineId;
use stiefel_sys::console::Console;
use stiefel_sys::link;
use stiefel_sys::{kexec, wired};
use tokio::sync::mpsc;

use crate::attach::GUEST;
use crate::discovery::{self, Event, Found};
use crate::fetch::{self, Progress};
use crate::unlock::{Step, Unlocker};
use crate::{clash, control};

/// After this long without any answer the screen says what to look at.
const HINT: Duration = Duration::from_secs(15);

/// How long this machine's own disks may take to be looked at.
const LOOK: Duration = Duration::from_secs(30);
/// The longest pause between two tries to boot from a laptop that is ready.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// Searches and fetches until the laptop's kernel is loaded; then the caller reboots into it by kexec.
///
/// # Errors
/// Only what makes searching impossible; a boot that fails is said and tried again.
pub async fn run(console: &'static Console, handover: &ClientHandover) -> anyhow::Result<()> {
    let (links, followed) = mpsc::channel(64);
    wired::follow(console, move |event| links.blocking_send(event).is_ok())?;
    let (tell, mut events) = mpsc::channel(64);
    let key = handover.key.clone();
    let search = tokio::spawn(async move { discovery::run(&key, PORT, true, followed, tell).await });
    console.info(&format!(
        "looking for the laptop that knows the key \"{}\"",
        handover.key.name
    ));
    let mut screen = Screen {
        console,
        interfaces: Vec::new(),
        last: None,
        out_of_date: false,
    };
    let mut unlocker = Unlocker::new(console);
    let mut pause = Duration::from_secs(1);
    loop {
        let heard = tokio::time::timeout(HINT, events.recv()).await;
        unlocker.forget_old();
        let event = match heard {
            Err(_) => {
                screen.hint();
                continue;
            }
            Ok(None) => break,
            Ok(Some(event)) => event,
        };
        let Some(found) = screen.show(event) else { continue };
        if found.state == State::Locked {
            let failed = !screen.unlock(&mut unlocker, handover, &found).await;
            // What was heard meanwhile is old; offers come again.
            while events.try_recv().is_ok() {}
            if failed {
                tokio::time::sleep(pause).await;
            }
        } else {
            match boot(console, handover, &found).await {
                Ok(()) => return Ok(()),
                Err(error) => console.error(&format!("{error:#}\nsearching again")),
            }
            screen.last = None;
            // What was heard meanwhile is old; offers come again.
            while events.try_recv().is_ok() {}
            tokio::time::sleep(pause).await;
            // What fails for good should not keep the laptop busy.
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }
    search.await??;
    anyhow::bail!("the search ended")
}

/// What the user has been told.
struct Screen {
    console: &'static Console,
    interfaces: Vec<String>,
    /// What was last said about which laptop, so that repeated offers do not fill the screen.
    last: Option<(String, State)>,
    /// That a ticket is out of date was said.
    out_of_date: bool,
}

impl Screen {
    /// Shows what happened; a laptop that is ready, or wants its passphrase, is returned.
    fn show(&mut self, event: Event) -> Option<Found> {
        match event {
            Event::Asking { interface } => {
                self.console.info(&format!("asking on {interface}"));
                if !self.interfaces.contains(&interface) {
                    self.interfaces.push(interface);
                }
                None
            }
            // It lends disks and boots nobody.
            Event::Found(found) if found.state == State::Lending => None,
            Event::Found(found) => {
                let news = Some((found.hostname.clone(), found.state));
                if self.last != news {
                    let doing = match found.state {
                        State::Asleep if found.woken >= discovery::MAX_WAKES => {
                            "it came back to its own system each time it was woken; its journal says why \
                             (journalctl -u stiefel-autokexec)"
                        }
                        State::Asleep => "its own system runs; waking it",
                        State::Waking => "it is on its way",
                        State::Locked => "its disk is locked",
                        State::Ready | State::Lending => "it is ready",
                    };
                    self.console
                        .info(&format!("found {} on {}: {doing}", found.hostname, found.interface));
                    self.last = news;
                }
                [State::Ready, State::Locked].contains(&found.state).then_some(found)
            }
            Event::OutOfDate { interface, issued } => {
                if !std::mem::replace(&mut self.out_of_date, true) {
                    self.console.warn(&format!(
                        "a laptop on {interface} shows a ticket that was made {issued} s after 1970, more than a week from this \
                         machine's clock; set the clock in the firmware, or let the laptop go home and come again"
                    ));
                }
                None
            }
            Event::Waking { interface, .. } => {
                self.console
                    .info(&format!("the laptop on {interface} heard us and is coming"));
                None
            }
        }
    }

    /// Goes on with a laptop that wants its passphrase; whether that worked, so far.
    async fn unlock(&mut self, unlocker: &mut Unlocker, handover: &ClientHandover, found: &Found) -> bool {
        let step = match machine_id(Path::new("/sys")) {
            Ok(machine) => unlocker.step(&handover.key, machine, found).await,
            Err(error) => Err(error),
        };
        match step {
            Ok(Step::Again) => true,
            Ok(Step::Open) => {
                // Until it is ready it does not answer.
                self.last = Some((found.hostname.clone(), State::Waking));
                true
            }
            Err(error) => {
                self.console.error(&format!("{error:#}\nsearching again"));
                self.last = None;
                false
            }
        }
    }

    /// Nobody has answered for a while.
    fn hint(&self) {
        if let Some((hostname, State::Waking)) = &self.last {
            self.console.info(&format!(
                "{hostname} is on its way, and starts to serve; still waiting for it"
            ));
        } else if self.interfaces.is_empty() {
            self.console
                .warn("no network adapter with a cable that carries a signal; plug the cable in at both ends");
        } else {
            self.console.warn(&format!(
                "no laptop that knows this stick's key answers on {}; is stiefel running there, and was the key not revoked?",
                self.interfaces.join(", ")
            ));
        }
    }
}

/// Fetches and loads.
async fn boot(console: &'static Console, handover: &ClientHandover, found: &Found) -> anyhow::Result<()> {
    let machine = machine_id(Path::new("/sys"))?;
    let memory = |name: &str| {
        memfd_create(name, MemfdFlags::CLOEXEC)
            .map(File::from)
            .context("no memory for the payload")
    };
    let (mut kernel, mut initrd) = (memory("stiefel-kernel")?, memory("stiefel-initrd")?);
    let mut shown = None;
    let manifest = {
        let mut last = None;
        let sink = |part: Part, bytes: &[u8]| -> std::io::Result<()> {
            let file = if part == Part::Kernel { &mut kernel } else { &mut initrd };
            if last.replace(part) != Some(part) {
                // The kernel unpacks one archive after the other; each starts at a multiple of four.
                let at = file.stream_position()?;
                cpio::pad_to(file, at, 4)?;
            }
            file.write_all(bytes)
        };
        fetch::fetch(
            found.address,
            &found.challenge,
            &found.key(&handover.key),
            machine,
            sink,
            |progress| match progress {
                Progress::Connected => console.info(&format!("{} knows us; receiving", found.hostname)),
                Progress::Waiting => console.progress("the laptop is not ready yet"),
                Progress::Part { part, done, total } => {
                    // In steps of the bar's width: a serial console is slow.
                    let percent = done.saturating_mul(25) / total.max(1) * 4;
                    if shown != Some((part, percent)) {
                        shown = Some((part, percent));
                        console.progress(&format!("{:8} {}", part.name(), bar(percent)));
                    }
                }
            },
        )
        .await
        .with_context(|| format!("nothing was booted from {}", found.hostname))?
    };
    console.info(&format!(
        "received {} of {}",
        manifest.payload.version, manifest.hostname
    ));
    let loaded = start(console, handover, found, &manifest, &kernel, &mut initrd).await;
    if loaded.is_err() {
        // Else it keeps its disk for this session, and from others, until it is tired of waiting.
        let (peer, session) = (found.address.into(), manifest.session.clone());
        let control = manifest.control.clone();
        let said = move || control::goodbye(peer, &session, &control, Goodbye::Reboot);
        if let Ok(Err(error)) = tokio::task::spawn_blocking(said).await {
            console.info(&format!("the laptop was not told: {:#}", anyhow::Error::new(error)));
        }
    }
    loaded
}

/// Looks at what was received, and loads it.
async fn start(
    console: &'static Console,
    handover: &ClientHandover,
    found: &Found,
    manifest: &Manifest,
    kernel: &File,
    initrd: &mut File,
) -> anyhow::Result<()> {
    if manifest.disk.guest {
        console.warn(GUEST);
    }
    ensure!(
        manifest.link.tunnel.is_some() || !handover.encrypted_only,
        "{} would send its disk in clear, and this stick forbids that; set link.encryption to wireguard in its \
         config.yaml, or write the stick without --encrypted-only",
        manifest.hostname
    );
    let own = tokio::time::timeout(LOOK, tokio::task::spawn_blocking(clash::own_disks))
        .await
        .with_context(|| {
            format!(
                "this machine's own disks do not answer within {} s; one is broken: unplug it, or switch it off in the firmware",
                LOOK.as_secs()
            )
        })???;
    clash::check(&own, &manifest.claims)?;
    append_session(initrd, manifest, found)?;
    let cmdline = manifest.payload.desktop_cmdline();
    kexec::load(kernel.as_fd(), Some(initrd.as_fd()), &cmdline)?;
    console.info(&format!("starting {}", manifest.payload.version));
    Ok(())
}

/// A bar that every console's font has.
fn bar(percent: u64) -> String {
    let full = usize::try_from(percent / 4).unwrap_or(25).min(25);
    format!("[{}{}] {percent:>3} %", "#".repeat(full), ".".repeat(25 - full))
}

/// Adds our program and the session, which [`crate::attach`] finds in the payload's initramfs.
fn append_session(initrd: &mut File, manifest: &Manifest, found: &Found) -> anyhow::Result<()> {
    let own = link::list()?
        .into_iter()
        .find(|link| link.index == found.address.scope_id())
        .context("the NIC that led to the laptop is gone; plug it in again")?;
    let session = AttachSession {
        hostname: manifest.hostname.clone(),
        version: manifest.payload.version.clone(),
        link_mac: own.permanent_mac.unwrap_or(own.mac),
        laptop: *found.address.ip(),
        http_port: found.address.port(),
        disk: manifest.disk.clone(),
        link: manifest.link.clone(),
        control: manifest.control.clone(),
        session: manifest.session.clone(),
        boot: manifest.payload.boot.clone(),
    };
    let json = secret_json(&session)?;
    let program = std::fs::read("/init").context("cannot read our own program")?;
    let at = initrd.stream_position()?;
    cpio::pad_to(initrd, at, 4)?;
    let mut archive = cpio::Writer::new(&*initrd);
    archive.dir("stiefel", 0o755)?;
    archive.file(PROGRAM_PATH, 0o755, &program)?;
    archive.file(SESSION_PATH, 0o600, &json.0)?;
    archive.finish()?;
    Ok(())
}

/// Which desktop this is, the same at every boot: from what its firmware says of itself, which is not unique on every board,
/// and from its own NIC, which may not have a driver yet where the link is a USB adapter.
pub(crate) fn machine_id(sysfs: &Path) -> anyhow::Result<MachineId> {
    let told = |name: &str| {
        let text = std::fs::read_to_string(sysfs.join("class/dmi/id").join(name)).unwrap_or_default();
        Some(text.trim().to_owned()).filter(|text| is_unique(text))
    };
    let dmi: Vec<String> = ["product_uuid", "product_serial", "board_serial"]
        .into_iter()
        .filter_map(told)
        .collect();
    let mut macs: Vec<(bool, [u8; 6])> = link::list()?
        .iter()
        .filter(|link| link.is_wired_physical())
        .map(|link| {
            (
                link::usb_id(sysfs, &link.name).is_some(),
                link.permanent_mac.unwrap_or(link.mac),
            )
        })
        .collect();
    // Those that are no USB adapters come first; one that is goes with its owner, so it counts only where nothing else does.
    macs.sort_unstable();
    let lasting = macs.first().filter(|(usb, _)| !usb || dmi.is_empty());
    ensure!(
        !dmi.is_empty() || lasting.is_some(),
        "this machine cannot be told from others: its firmware names no UUID or serial number, and it has no wired NIC"
    );
    let mut hash = Sha256::new();
    for part in dmi
        .iter()
        .map(String::as_bytes)
        .chain(lasting.map(|(_, mac)| mac.as_slice()))
    {
        hash.update((part.len() as u64).to_be_bytes());
        hash.update(part);
    }
    let digits: String = hash
        .finalize()
        .iter()
        .take(16)
        .map(|byte| format!("{byte:02x}"))
        .collect();
    Ok(digits.parse()?)
}

/// Whether firmware says something of its own, and not what its maker forgot to fill in.
fn is_unique(text: &str) -> bool {
    let digits: String = text
        .chars()
        .filter(char::is_ascii_alphanumeric)
        .collect::<String>()
        .to_lowercase();
    let same = digits
        .chars()
        .next()
        .is_none_or(|first| digits.chars().all(|digit| digit == first));
    let empty = [
        "tobefilledbyoem",
        "defaultstring",
        "systemserialnumber",
        "notspecified",
        "none",
        "0123456789",
    ];
    // A UUID that many boards share.
    let shared = "03000200040005000006000700080009";
    !same && digits != shared && !empty.contains(&digits.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_maker_forgot_to_fill_in_tells_no_machine() {
        for text in [
            "",
            "None",
            "To be filled by O.E.M.",
            "00000000-0000-0000-0000-000000000000",
            "Default string",
        ] {
            assert!(!is_unique(text), "{text}");
        }
        assert!(!is_unique("03000200-0400-0500-0006-000700080009"));
        assert!(is_unique("4c4c4544-0042-3510-8052-b9c04f4a4e32") && is_unique("PF2XK1AB"));
    }
}
