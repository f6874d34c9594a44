//! `stiefel attach` and `stiefel detach`: another machine's disks on this running Linux.

use std::path::Path;
use std::time::Duration;

use anyhow::bail;
use stiefel_client::borrow::{self, Lender, RECORDS, Record, Search};
use stiefel_shared::lend::DiskInfo;

use super::{mebibytes, stick};
use crate::cli::{AttachArgs, DetachArgs};

/// Lists, or attaches.
pub(crate) fn attach(args: &AttachArgs) -> anyhow::Result<()> {
    let key = stick::read_key(&args.key)?;
    let search = Search {
        key: &key,
        interfaces: &args.interface,
        patience: Duration::from_secs(args.wait),
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    let Some(name) = &args.disk else {
        let lenders = runtime.block_on(borrow::list(&search))?;
        if args.json {
            println!("{}", json(&lenders));
        } else if lenders.is_empty() {
            eprintln!(
                "no machine that lends disks to the key {} answers; is `stiefel target` running there?",
                key.name
            );
        } else {
            print!("{}", lenders.iter().map(words).collect::<String>());
        }
        return Ok(());
    };
    let (machine, disk) = match name.split_once('/') {
        Some((machine, disk)) => (Some(machine), disk),
        None => (None, name.as_str()),
    };
    let record = runtime.block_on(borrow::attach(&search, machine, disk, args.read_write, !args.nbd))?;
    if args.json {
        println!("{}", shown(&record));
    } else {
        println!("{}", record.device);
    }
    Ok(())
}

/// Gives back.
pub(crate) fn detach(args: &DetachArgs) -> anyhow::Result<()> {
    let records = borrow::read_all(Path::new(RECORDS));
    let meant: Vec<&Record> = match &args.disk {
        Some(name) => records.iter().filter(|record| record.is(name)).collect(),
        None if args.all => records.iter().collect(),
        None => {
            for record in &records {
                println!("{} {}/{}", record.device, record.hostname, record.disk);
            }
            return Ok(());
        }
    };
    if meant.is_empty() && !args.all {
        bail!("nothing of that name is borrowed; `stiefel detach` lists what is");
    }
    let mut result = Ok(());
    for record in &meant {
        // All are tried; the first failure is told.
        result = result.and(borrow::detach(record, args.lost));
    }
    result
}

fn words(lender: &Lender) -> String {
    let mut text = format!("{} (on {})\n", lender.hostname, lender.interface);
    match &lender.disks {
        Err(error) => text.push_str(&format!("  did not say what it lends: {error:#}\n")),
        Ok(disks) if disks.is_empty() => text.push_str("  lends no disk at the moment\n"),
        Ok(disks) => text.extend(disks.iter().map(|disk| disk_words(&lender.hostname, disk))),
    }
    text
}

fn disk_words(hostname: &str, disk: &DiskInfo) -> String {
    let DiskInfo {
        name,
        model,
        size,
        users,
        ..
    } = disk;
    let mode = if disk.writable { "can be written" } else { "read-only" };
    let mut text = format!("  {hostname}/{name}  {model}, {}, {mode}\n", mebibytes(*size));
    for user in users {
        text.push_str(&format!("      ! {user}\n"));
    }
    for part in &disk.parts {
        let content = part.content.join(", ");
        text.push_str(&format!(
            "      {:<12} {:>14}  {content}\n",
            part.name,
            mebibytes(part.size)
        ));
    }
    text
}

fn json(lenders: &[Lender]) -> String {
    let lender = |lender: &Lender| {
        let (disks, error) = match &lender.disks {
            Ok(disks) => (Some(disks), None),
            Err(error) => (None, Some(format!("{error:#}"))),
        };
        serde_json::json!({
            "hostname": lender.hostname, "address": lender.address.to_string(), "interface": lender.interface,
            "disks": disks, "error": error,
        })
    };
    serde_json::Value::from_iter(lenders.iter().map(lender)).to_string()
}

/// Without its secrets.
fn shown(record: &Record) -> String {
    serde_json::json!({
        "device": record.device, "disk": record.disk, "hostname": record.hostname, "writable": record.writable,
    })
    .to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use stiefel_shared::lend::PartInfo;

    #[test]
    fn the_list_says_what_lies_on_each_disk() {
        let disk = DiskInfo {
            name: "ssd-1".into(),
            model: "SSD".into(),
            size: 3 << 30,
            writable: false,
            users: vec!["mounted at /".into()],
            parts: vec![PartInfo {
                name: "sda1".into(),
                size: 1 << 20,
                content: vec!["ext".into(), "file system label root".into()],
            }],
        };
        let lender = Lender {
            hostname: "laptop".into(),
            address: "[fe80::1%3]:61570".parse().unwrap(),
            interface: "eth0".into(),
            disks: Ok(vec![disk]),
        };
        let text = words(&lender);
        for part in [
            "laptop/ssd-1",
            "SSD, 3072.0 MiB, read-only",
            "! mounted at /",
            "sda1",
            "ext, file system label root",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        let json: serde_json::Value = serde_json::from_str(&json(&[lender])).unwrap();
        assert_eq!(json[0]["disks"][0]["parts"][0]["name"], "sda1");
    }
}
