//! Storage target mode when something breaks, and when it goes on for long: bad sectors, a borrower that is reset, a hundred loans.

use std::collections::BTreeMap;

use stiefel_tests::Vm;
use stiefel_tests::scenario::Failure;

use crate::runner::Bench;
use crate::target::{Pair, SIZE, SOON, same, sum, up, wait};

/// The bytes that are tried at a time where something cannot be read.
const BLOCK: u64 = 4096;
/// The block of the broken disk with the bad sector: in the second of the pieces that `stiefel copy` copies.
const BAD: u64 = 1500;

/// By NVMe and by NBD, in one pair of machines.
pub(crate) fn faults(bench: &Bench) -> Result<(), Failure> {
    let pair = Pair::start(bench)?;
    let a = sum(&pair.target, "/dev/disk/by-id/virtio-data-a")?;
    pair.lend("--all --read-write data-b")?;
    pair.plug_broken("broken", "bad-disk", BAD * BLOCK + 512)?;
    wait(&pair.target, "grep -q bad-disk /run/out")?;
    for by in ["", "--nbd"] {
        bad_sector(&pair, by)?;
        let other = pair
            .client
            .run_ok_within(&format!("stiefel attach target/data-a {by}"), SOON)?;
        same("data-a beside a broken disk", &sum(&pair.client, other.trim())?, &a)?;
        pair.client.run_ok_within("stiefel detach data-a", SOON)?;
    }
    pair.target.run_ok("grep -q 'bad-disk for .* NEW ERRORS' /run/err")?;
    for by in ["", "--nbd"] {
        reset_while_writing(bench, &pair, by)?;
    }
    bench.note(&pair.target.run_ok("grep -v 'KiB/s' /run/err")?);
    pair.lend_no_more()
}

/// One sector cannot be read: an error there, and nowhere else; a copy says where.
fn bad_sector(pair: &Pair, by: &str) -> Result<(), Failure> {
    let client = &pair.client;
    let name = pair
        .target
        .run_ok("grep -o '^[0-9]* [a-z0-9-]*bad-disk' /run/out | tail -n 1 | cut -d ' ' -f 2")?;
    let name = name.trim();
    let device = client.run_ok_within(&format!("stiefel attach target/{name} {by}"), SOON)?;
    let device = device.trim();
    let read = |block: u64| format!("dd if={device} bs={BLOCK} skip={block} count=1 iflag=direct status=none");
    client.run_ok_within(&format!("! {} >/dev/null", read(BAD)), SOON)?;
    for beside in [BAD - 1, BAD + 1] {
        client.run_ok_within(&format!("{} | grep -q 'this is broken'", read(beside)), SOON)?;
    }
    let at = BAD * BLOCK;
    let copy = format!("stiefel copy {device} /root/copy.img --yes");
    let said = client.run_ok_within(&format!("! {copy} 2>&1"), SOON * 2)?;
    let skipping = client.run_ok_within(&format!("{copy} --skip-errors 2>&1"), SOON * 2)?;
    for (said, words) in [
        (said, format!("cannot read the source at byte {at};")),
        (skipping, format!("{BLOCK} bytes at {at} could not be read")),
    ] {
        if !said.contains(&words) {
            return Err(format!("the copy does not say {words:?}, but:\n{said}").into());
        }
    }
    // All lines but those of the block.
    let good = (SIZE - BLOCK) / 512;
    let lines = client.run_ok("grep -a -c 'this is broken' /root/copy.img; rm /root/copy.img")?;
    same("good sectors of the copy", lines.trim(), &good.to_string())?;
    client.run_ok_within(&format!("stiefel detach {name}"), SOON)?;
    Ok(())
}

/// The borrower's machine is reset in the middle of writing: that is said, and when it is up again it gets the disk at once.
fn reset_while_writing(bench: &Bench, pair: &Pair, by: &str) -> Result<(), Failure> {
    let (target, client) = (&pair.target, &pair.client);
    let count = |words: &str| format!("$(grep -c '{words}' /run/err)");
    let silent = count("data-b: nothing comes from");
    let written = count("data-b for .* [1-9][0-9]* KiB/s written");
    target.run_ok(&format!("echo {silent} >/run/silent; echo {written} >/run/written"))?;
    client.run_ok_within(
        &format!(
            "d=$(stiefel attach target/data-b --read-write {by}) && export d && \
             (setsid sh -c 'while yes lost | dd of=$d bs=64k count=256 iflag=fullblock oflag=direct; do :; done' >/dev/null 2>&1 &)"
        ),
        SOON,
    )?;
    wait(target, &format!("[ {written} -gt $(cat /run/written) ]"))?;
    client.system_reset()?;
    client.serial().skip();
    wait(target, &format!("[ {silent} -gt $(cat /run/silent) ]"))?;
    target.run_ok("tail -n 8 /run/out | grep -q 'lent to .*, READ-WRITE, silent'")?;
    up(client, "10.77.0.2")?;
    let word = format!("again{}", by.len());
    let took = std::time::Instant::now();
    client.run_ok_within(
        &format!(
            "d=$(stiefel attach target/data-b --wait 15 --read-write {by}) && \
             yes {word} | dd of=$d bs=4096 count=16 iflag=fullblock oflag=direct conv=fsync && stiefel detach data-b"
        ),
        SOON,
    )?;
    bench.note(&format!(
        "attached anew, written and detached in {:.1} s\n",
        took.elapsed().as_secs_f64()
    ));
    target.run_ok(&format!(
        "blockdev --flushbufs /dev/disk/by-id/virtio-data-b; head -c 100 /dev/disk/by-id/virtio-data-b | grep -q {word}"
    ))?;
    Ok(())
}

/// How many rounds, half of them by NBD.
const ROUNDS: u32 = 100;
/// In one command.
const AT_ONCE: u32 = 10;
/// What a program's heap may grow by, in KiB: by a huge page, and what discovery remembers to tell replays (bounded).
const MEMORY: i64 = 2048 + 512;
/// All that is allocated lies in one heap then, which shrinks; else each new thread may keep a heap and a stack of its own, up to a
/// bound that is not reached within these rounds.
const ONE_HEAP: &str = "MALLOC_ARENA_MAX=1 MALLOC_TRIM_THRESHOLD_=65536 MALLOC_MMAP_THRESHOLD_=131072";
/// What the kernel may count as namespaces that it has freed already: some for each processor.
const FREED: i64 = 24;

/// Counts what a loan takes on either side, when idle threads have ended (10 s); `stiefel target` runs on one only.
const COUNT: &str = "p=$(pidof -s stiefel); \
    for i in $(seq 20); do [ -z \"$(ls /run/stiefel/borrowed 2>/dev/null)\" ] && break; sleep 0.5; done; sleep 12; \
    if [ -n \"$p\" ]; then echo descriptors $(ls /proc/$p/fd | wc -l); echo threads $(ls /proc/$p/task | wc -l); \
    echo memory $(awk '/\\[heap\\]/ { heap = 1 } heap && /^Rss/ { print $2; exit }' /proc/$p/smaps); fi; \
    echo interfaces $(ip -o link | wc -l); echo rules $(ip -6 rule | wc -l); echo routes $(ip -6 route show table all | wc -l); \
    echo published $(find /sys/kernel/config/nvmet -mindepth 2 2>/dev/null | wc -l); echo loops $(losetup -a | wc -l); \
    echo mapped $(ls /dev/dm-* 2>/dev/null | wc -l); echo controllers $(ls /sys/class/nvme 2>/dev/null | wc -l); \
    echo nbd $(cat /sys/block/nbd*/pid 2>/dev/null | wc -l); echo records $(ls /run/stiefel/borrowed 2>/dev/null | wc -l); \
    echo namespaces $(awk '$1 == \"net_namespace\" { print $2 }' /proc/slabinfo)";

/// A hundred times attached and given back: neither side has more of anything than before.
pub(crate) fn rounds(bench: &Bench) -> Result<(), Failure> {
    let pair = Pair::start(bench)?;
    pair.lend_with("--all", ONE_HEAP)?;
    // What is made once, and stays.
    some_rounds(&pair, 4)?;
    let machines = [&pair.target, &pair.client];
    let before = counts(machines)?;
    let begun = std::time::Instant::now();
    for _ in 0..ROUNDS / AT_ONCE {
        some_rounds(&pair, AT_ONCE)?;
    }
    bench.note(&format!(
        "{:.1} s for each round\n",
        begun.elapsed().as_secs_f64() / f64::from(ROUNDS)
    ));
    let after = counts(machines)?;
    let mut more = String::new();
    for (what, before) in &before {
        let after = after.get(what).copied().unwrap_or_default();
        bench.note(&format!("{what}: {before}, then {after}\n"));
        let allowed = match what.rsplit(' ').next() {
            Some("memory") => MEMORY,
            Some("namespaces") => FREED,
            _ => 0,
        };
        if after - before > allowed {
            more += &format!("{what}: {before}, then {after}\n");
        }
    }
    if !more.is_empty() {
        return Err(format!("there is more than before:\n{more}").into());
    }
    pair.lend_no_more()
}

fn some_rounds(pair: &Pair, rounds: u32) -> Result<(), Failure> {
    pair.client.run_ok_within(
        &format!(
            "for i in $(seq {rounds}); do [ $((i % 2)) = 0 ] && by=--nbd || by=; \
             d=$(stiefel attach target/data-a --wait 5 $by) && head -c 100 $d | grep -q data-a && stiefel detach data-a || exit 1; done"
        ),
        SOON * 2,
    )?;
    Ok(())
}

/// What there is of each thing on both machines, by the machine's and the thing's name.
fn counts(machines: [&Vm; 2]) -> Result<BTreeMap<String, i64>, Failure> {
    let mut all = BTreeMap::new();
    for machine in machines {
        for line in machine.run_ok_within(COUNT, SOON)?.lines() {
            if let Some((what, number)) = line.split_once(' ') {
                all.insert(format!("{} {what}", machine.name()), number.trim().parse()?);
            }
        }
    }
    Ok(all)
}
