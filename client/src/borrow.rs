//! Borrowing disks: finds machines that lend theirs, lists the disks, and makes one of them a block device of this running
//! Linux; and gives it back.
//!
//! Counterpart: `server::target`. The disk comes through a tunnel of its own, an interface `stiefel-b…` in the root namespace,
//! by NVMe over TCP where both sides have it (it reconnects by itself), else by NBD (which does not: when its connection is
//! lost, requests fail after half a minute). What is borrowed is written down in [`RECORDS`], for `detach`.

mod device;
mod record;

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail};
use stiefel_shared::bundle::Goodbye;
use stiefel_shared::discovery::{LinkEvent, PORT, State};
use stiefel_shared::key::StickKey;
use stiefel_shared::lend::{Ask, DiskInfo, Loan};
use stiefel_shared::session::MachineId;
use stiefel_sys::link;
use tokio::sync::mpsc;

use crate::control;
use crate::discovery::{self, Event, Found};
use crate::fetch::{self, Patience, Source};
use crate::role::machine_id;

pub use record::{RECORDS, Record, read_all};

/// The index that Linux gives the loopback interface.
const LOOPBACK: u32 = 1;
/// How long an answer may take: the other side opens the disk meanwhile.
const ANSWER: Duration = Duration::from_secs(45);

/// A machine that lends disks, and its disks.
#[derive(Debug)]
pub struct Lender {
    /// Its host name.
    pub hostname: String,
    /// Where it answered.
    pub address: std::net::SocketAddrV6,
    /// Our interface that leads there.
    pub interface: String,
    /// Its disks, or why it did not say.
    pub disks: anyhow::Result<Vec<DiskInfo>>,
}

/// Which machines to look for, and where.
#[derive(Debug, Clone)]
pub struct Search<'a> {
    /// The key that they must have.
    pub key: &'a StickKey,
    /// Only on these interfaces; empty: on all that are up.
    pub interfaces: &'a [String],
    /// How long.
    pub patience: Duration,
}

/// Finds all machines that lend disks to the holder of the key, and asks each for its list.
///
/// # Errors
/// Nothing can be asked at all.
pub async fn list(search: &Search<'_>) -> anyhow::Result<Vec<Lender>> {
    let own = machine_id(Path::new("/sys"))?;
    let mut lenders = Vec::new();
    for found in machines(search, |_| false).await? {
        let disks = match ask(search.key, own, &found, &Ask::List).await {
            Ok(Loan::Disks { disks }) => Ok(disks),
            Ok(Loan::Attached(_)) => Err(anyhow::anyhow!("it answered another question")),
            Err(error) => Err(error),
        };
        lenders.push(Lender {
            hostname: found.hostname,
            address: found.address,
            interface: found.interface,
            disks,
        });
    }
    Ok(lenders)
}

/// Attaches a disk; `machine` may be left out where only one lends disks. The record of it, with its block device.
///
/// # Errors
/// No such machine or disk, it is not lent so, or this kernel cannot.
pub async fn attach(
    search: &Search<'_>,
    machine: Option<&str>,
    disk: &str,
    read_write: bool,
    allow_nvme: bool,
) -> anyhow::Result<Record> {
    let own = machine_id(Path::new("/sys"))?;
    let wanted = |found: &Found| machine.is_some_and(|machine| machine == found.hostname);
    let mut found = machines(search, wanted).await?;
    if let Some(machine) = machine {
        found.retain(|found| found.hostname == machine);
    }
    // One machine may answer on several interfaces.
    let mut names: Vec<&str> = found.iter().map(|found| found.hostname.as_str()).collect();
    names.dedup();
    if names.len() > 1 {
        bail!(
            "several machines lend disks ({}); say which: MACHINE/DISK",
            names.join(", ")
        );
    }
    let found = found.into_iter().next().with_context(|| match machine {
        Some(machine) => format!("no machine {machine} that lends disks to this key answers"),
        None => "no machine that lends disks to this key answers".to_owned(),
    })?;
    if let Some(record) = read_all(Path::new(RECORDS))
        .iter()
        .find(|record| record.is_of(&found.hostname, disk))
    {
        // Two of them would be two views of one disk; and the other machine would take the second for us, started anew.
        bail!(
            "{}/{disk} is attached already, as {}; `stiefel detach` gives it back",
            found.hostname,
            record.device
        );
    }
    let nvme = device::prepare(allow_nvme)?;
    let question = Ask::Attach {
        disk: disk.to_owned(),
        read_write,
        nvme,
    };
    match ask(search.key, own, &found, &question).await? {
        Loan::Attached(lent) => {
            let address = found.address;
            let disk = disk.to_owned();
            tokio::task::spawn_blocking(move || device::make(&disk, &lent, address)).await?
        }
        Loan::Disks { .. } => bail!("{} answered another question", found.hostname),
    }
}

/// Takes a borrowed disk's device away and gives the disk back. With `lost`, also if the other machine does not answer.
///
/// # Errors
/// The device is in use, or the other machine did not confirm; the record stays then.
pub fn detach(record: &Record, lost: bool) -> anyhow::Result<()> {
    device::take_away(record, lost)?;
    let peer = std::net::SocketAddr::V6(record.peer());
    let said = control::goodbye_within(
        Duration::from_secs(30),
        peer,
        &record.session,
        &record.control,
        Goodbye::Poweroff,
    );
    device::close_tunnel(record);
    match said {
        Err(error) if !lost => Err(error)
            .context("the disk is no device here any more, but the other machine has not confirmed; again with --lost"),
        _ => Ok(record.remove(Path::new(RECORDS))?),
    }
}

async fn ask(key: &StickKey, own: MachineId, found: &Found, question: &Ask) -> anyhow::Result<Loan> {
    let patience = Patience {
        silence: ANSWER,
        ..Patience::default()
    };
    let source = Source {
        peer: found.address,
        challenge: &found.challenge,
        key,
        machine: own,
        patience,
    };
    let answer = fetch::ask(source, question).await;
    answer.with_context(|| format!("{} did not answer", found.hostname))
}

/// The interfaces to ask on; a cable that was just plugged in takes a moment, and is waited for until `end`.
async fn usable(search: &Search<'_>, end: tokio::time::Instant) -> anyhow::Result<Vec<LinkEvent>> {
    /// Between two looks.
    const LOOK: Duration = Duration::from_millis(200);
    loop {
        let links = link::list()?.into_iter().filter(|link| {
            let usual = search.interfaces.is_empty() && link.up && link.carrier && link.index != LOOPBACK;
            usual || search.interfaces.contains(&link.name)
        });
        let events: Vec<_> = links
            .map(|link| LinkEvent::Added {
                index: link.index,
                name: link.name,
            })
            .collect();
        if !events.is_empty() {
            return Ok(events);
        }
        if tokio::time::Instant::now() >= end {
            match search.interfaces {
                [] => bail!("there is no network interface to ask on; plug a cable in, or name one with --interface"),
                named => bail!(
                    "there is no network interface {}; `ip link` lists them",
                    named.join(", ")
                ),
            }
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Searches for the whole patience, or until one is `enough`; each address once, with its newest offer.
async fn machines(search: &Search<'_>, enough: impl Fn(&Found) -> bool) -> anyhow::Result<Vec<Found>> {
    let end = tokio::time::Instant::now() + search.patience;
    let (tell, links) = mpsc::channel(256);
    for event in usable(search, end).await? {
        tell.send(event).await?;
    }
    let (report, mut events) = mpsc::channel(64);
    let key = search.key.clone();
    let searching = tokio::spawn(async move { discovery::run(&key, PORT, false, links, report).await });
    let mut machines: Vec<Found> = Vec::new();
    while let Ok(event) = tokio::time::timeout_at(end, events.recv()).await {
        let Some(event) = event else {
            // It ends by itself only with an error.
            searching.await??;
            bail!("the search ended");
        };
        let Event::Found(found) = event else { continue };
        if found.state != State::Lending {
            continue;
        }
        let done = enough(&found);
        machines.retain(|known| known.address != found.address);
        machines.push(found);
        if done {
            break;
        }
    }
    searching.abort();
    machines.sort_by(|a, b| (&a.hostname, a.address).cmp(&(&b.hostname, b.address)));
    Ok(machines)
}
