//! Who is connected, and what they do.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use stiefel_shared::bundle::NVME_PORT;

use crate::nbd::{Server, Stats};
use crate::tree::Tree;

/// Of a connection that carries data (`include/net/tcp_states.h`).
const ESTABLISHED: &str = "01";

/// Who has what: the disk's name (`None`: some disk by NVMe, the kernel does not say which) and the address.
pub(super) type Who = (Option<String>, IpAddr);

/// All connections at this moment, with how many each has.
pub(super) fn connected(server: &Server, tree: &Tree) -> BTreeMap<Who, usize> {
    let mut all = BTreeMap::new();
    for (peer, export) in server.clients() {
        let who = (Some(export.name().to_owned()), peer.ip().to_canonical());
        *all.entry(who).or_default() += 1;
    }
    for table in ["/proc/net/tcp", "/proc/net/tcp6"] {
        for address in peers_of(&tree.text(table).unwrap_or_default(), NVME_PORT) {
            *all.entry((None, address)).or_default() += 1;
        }
    }
    all
}

/// The other ends of the established connections to a TCP port of ours, of the text of /proc/net/tcp or tcp6 (proc_net_tcp(5)).
fn peers_of(table: &str, port: u16) -> Vec<IpAddr> {
    let line = |line: &str| -> Option<IpAddr> {
        let mut fields = line.split_ascii_whitespace().skip(1);
        let (local, remote, state) = (fields.next()?, fields.next()?, fields.next()?);
        let (_, local_port) = local.split_once(':')?;
        let ours = u16::from_str_radix(local_port, 16).ok()? == port && state == ESTABLISHED;
        let (address, _) = remote.split_once(':')?;
        ours.then(|| address_of(address)).flatten()
    };
    table.lines().skip(1).filter_map(line).collect()
}

/// An address as the kernel prints it there: words of 32 bits in the machine's order.
fn address_of(digits: &str) -> Option<IpAddr> {
    let word = |at: usize| {
        u32::from_str_radix(digits.get(at..at + 8)?, 16)
            .ok()
            .map(u32::to_ne_bytes)
    };
    match digits.len() {
        8 => Some(IpAddr::V4(Ipv4Addr::from(word(0)?))),
        32 => {
            let words = [word(0)?, word(8)?, word(16)?, word(24)?].concat();
            let bytes: [u8; 16] = words.try_into().ok()?;
            Some(IpAddr::V6(Ipv6Addr::from(bytes)).to_canonical())
        }
        _ => None,
    }
}

/// What was done on a block device, of the text of its `stat` (Documentation/block/stat.rst): it counts 512 bytes, whatever the
/// device's blocks are.
pub(super) fn done(text: &str) -> Option<Stats> {
    let mut fields = text.split_ascii_whitespace().map(str::parse::<u64>);
    let mut next = |skip| fields.nth(skip)?.ok();
    let (reads, read) = (next(0)?, next(1)?);
    let (writes, written) = (next(1)?, next(1)?);
    Some(Stats {
        bytes_read: read.checked_mul(512)?,
        bytes_written: written.checked_mul(512)?,
        requests: reads.checked_add(writes)?,
        errors: 0,
    })
}

/// What changed between two looks, in words.
pub(super) fn changes(before: &BTreeMap<Who, usize>, now: &BTreeMap<Who, usize>) -> Vec<String> {
    let name = |disk: &Option<String>| disk.clone().unwrap_or_else(|| "a disk by NVMe".to_owned());
    let come = now.keys().filter(|who| !before.contains_key(who));
    let come = come.map(|(disk, address)| format!("{address} has connected to {}", name(disk)));
    let gone = before.keys().filter(|who| !now.contains_key(who));
    let gone = gone.map(|(disk, address)| format!("{address} has left {}", name(disk)));
    come.chain(gone).collect()
}

/// One disk's traffic between two looks, `seconds` apart; `None` if nothing happened.
pub(super) fn traffic(name: &str, before: Stats, now: Stats, seconds: u64) -> Option<String> {
    if now == before {
        return None;
    }
    let rate = |before: u64, now: u64| now.saturating_sub(before) / seconds.max(1) / 1024;
    let mut words = format!(
        "{name}: {} KiB/s read, {} KiB/s written, {} MiB and {} MiB in all",
        rate(before.bytes_read, now.bytes_read),
        rate(before.bytes_written, now.bytes_written),
        now.bytes_read >> 20,
        now.bytes_written >> 20
    );
    if now.errors > before.errors {
        words.push_str(&format!(
            ", {} NEW ERRORS ({} in all)",
            now.errors - before.errors,
            now.errors
        ));
    }
    Some(words)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TABLE: &str = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n\
         0: 0100007F:1144 0200000A:D431 01 00000000:00000000 00:00000000 00000000     0        0 1 1 0\n\
         1: 0100007F:1144 0300000A:D431 06 00000000:00000000 00:00000000 00000000     0        0 1 1 0\n\
         2: 0100007F:0016 0400000A:D431 01 00000000:00000000 00:00000000 00000000     0        0 1 1 0\n";

    #[cfg(target_endian = "little")]
    #[test]
    fn only_living_connections_to_the_port_count() {
        assert_eq!(peers_of(TABLE, 4420), ["10.0.0.2".parse::<IpAddr>().unwrap()]);
    }

    #[cfg(target_endian = "little")]
    #[test]
    fn addresses_are_read_in_both_lengths() {
        let v6 = address_of("000080FE00000000FF005450C15CD8FE").unwrap();
        assert_eq!(v6.to_string(), "fe80::5054:ff:fed8:5cc1");
        let mapped = address_of("0000000000000000FFFF00000100000A").unwrap();
        assert_eq!(mapped.to_string(), "10.0.0.1");
        assert_eq!(address_of("00"), None);
    }

    #[test]
    fn who_comes_and_goes_is_said_once() {
        let at = |disk: Option<&str>| (disk.map(str::to_owned), "10.0.0.2".parse().unwrap());
        let before = BTreeMap::from([(at(Some("a")), 1), (at(None), 1)]);
        let now = BTreeMap::from([(at(Some("a")), 4), (at(Some("b")), 1)]);
        let told = changes(&before, &now);
        assert_eq!(
            told,
            ["10.0.0.2 has connected to b", "10.0.0.2 has left a disk by NVMe"]
        );
    }

    #[test]
    fn what_was_done_on_a_device_is_read() {
        let stats =
            done("     117       4     6162      20       5       0       16       3        0       24\n").unwrap();
        assert_eq!(
            (stats.bytes_read, stats.bytes_written, stats.requests),
            (6162 * 512, 16 * 512, 122)
        );
        assert_eq!(done("1 2 3"), None);
        assert_eq!(done("1 0 18446744073709551615 0 0 0 0"), None);
    }

    #[test]
    fn errors_are_said_loudly_and_silence_is_not_said() {
        let before = Stats::default();
        assert_eq!(traffic("a", before, before, 2), None);
        let now = Stats {
            bytes_read: 4 << 20,
            errors: 3,
            requests: 9,
            ..before
        };
        let words = traffic("a", before, now, 2).unwrap();
        assert!(
            words.contains("2048 KiB/s read") && words.contains("3 NEW ERRORS"),
            "{words}"
        );
    }

    proptest! {
        #[test]
        fn any_table_is_read(text in ".{0,200}") {
            let _ = peers_of(&text, 4420);
            let _ = address_of(&text);
            let _ = done(&text);
        }
    }
}
