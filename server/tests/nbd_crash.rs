//! Crash consistency: the server is cut off at random points over a disk that drops what was not flushed, and every
//! write that a client saw flushed must be there. On a real machine the page cache would hide a missing flush.
//!
//! The disk keeps each write apart until it is flushed; at the cut any part of the unflushed ones survives, as on a disk
//! that was writing them. What is checked can fail: with a disk that ignores flushes, or ends them too late, it must.
#![allow(clippy::unwrap_used)]

mod nbd_support;

use std::io::{self, IoSlice, IoSliceMut};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nbd_support::{Answer, Client, Fixture};
use stiefel_server::nbd::{Overlay, Range, Store, Traits, overlay};
use stiefel_shared::nbd::*;

const BLOCK: usize = 4096;
const BLOCKS: u64 = 64;
const SIZE: u64 = BLOCKS * BLOCK as u64;
/// More than the hundred that are asked for.
const CUTS: u64 = 120;

/// What is wrong with the disk, so that the test can be seen to fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    None,
    /// A flush does nothing.
    Ignored,
    /// A flush is answered before it has been done.
    Early,
}

#[derive(Debug)]
struct Medium {
    stable: Vec<u8>,
    /// Writes since the last flush, in their order.
    volatile: Vec<(u64, Vec<u8>)>,
    cut: bool,
}

/// A disk with a cache that a power cut empties.
#[derive(Debug)]
struct Disk {
    medium: Mutex<Medium>,
    fault: Fault,
}

impl Disk {
    fn new(stable: Vec<u8>, fault: Fault) -> Arc<Self> {
        let medium = Medium {
            stable,
            volatile: Vec::new(),
            cut: false,
        };
        Arc::new(Self {
            medium: Mutex::new(medium),
            fault,
        })
    }

    /// Cuts the power: of what is unflushed, what `survives` says reaches the medium. Returns what is on it then.
    fn cut(&self, mut survives: impl FnMut() -> bool) -> Vec<u8> {
        let mut medium = self.medium.lock().unwrap();
        medium.cut = true;
        let volatile = std::mem::take(&mut medium.volatile);
        for (at, data) in volatile.into_iter().filter(|_| survives()) {
            medium.put(at, &data);
        }
        medium.stable.clone()
    }
}

impl Medium {
    fn put(&mut self, at: u64, data: &[u8]) {
        let at = usize::try_from(at).unwrap();
        self.stable[at..at + data.len()].copy_from_slice(data);
    }
}

impl Store for Disk {
    fn size(&self) -> u64 {
        self.medium.lock().unwrap().stable.len() as u64
    }

    fn traits(&self) -> Traits {
        Traits {
            block: 1,
            discards: false,
            rotational: false,
        }
    }

    fn read_now(&self, _parts: &mut [IoSliceMut<'_>], _offset: u64) -> usize {
        0
    }

    fn read(&self, data: &mut [u8], offset: u64) -> io::Result<()> {
        let medium = self.medium.lock().unwrap();
        let from = usize::try_from(offset).unwrap();
        data.copy_from_slice(&medium.stable[from..from + data.len()]);
        for (at, written) in &medium.volatile {
            for (index, byte) in written.iter().enumerate() {
                let at = at + index as u64;
                if (offset..offset + data.len() as u64).contains(&at) {
                    data[usize::try_from(at - offset).unwrap()] = *byte;
                }
            }
        }
        Ok(())
    }

    fn write_now(&self, parts: &[IoSlice<'_>], offset: u64) -> io::Result<usize> {
        let data = parts.iter().flat_map(|part| part.iter().copied()).collect::<Vec<_>>();
        self.write(&data, offset).map(|()| data.len())
    }

    fn write(&self, data: &[u8], offset: u64) -> io::Result<()> {
        let mut medium = self.medium.lock().unwrap();
        if medium.cut {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        medium.volatile.push((offset, data.to_vec()));
        Ok(())
    }

    fn trim(&self, _range: Range) -> io::Result<()> {
        Ok(())
    }

    fn zero(&self, range: Range, _no_hole: bool, _fast: bool) -> io::Result<()> {
        self.write(&vec![0; usize::try_from(range.length).unwrap()], range.offset)
    }

    fn cache(&self, _range: Range) -> io::Result<()> {
        Ok(())
    }

    fn extents(&self, range: Range, _most: usize) -> Vec<Extent> {
        vec![Extent {
            length: range.length,
            state: 0,
        }]
    }

    fn sync(&self) -> io::Result<()> {
        if self.fault == Fault::Ignored {
            return Ok(());
        }
        let mut medium = self.medium.lock().unwrap();
        if medium.cut {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let now = match self.fault {
            // All but the last one, which is left to the next flush.
            Fault::Early => medium.volatile.len().saturating_sub(1),
            _ => medium.volatile.len(),
        };
        for (at, data) in medium.volatile.drain(..now).collect::<Vec<_>>() {
            medium.put(at, &data);
        }
        Ok(())
    }
}

/// xorshift64*: the same cuts in each run.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16) % bound
    }
}

/// What a client knows of its own blocks: per block the generations it wrote, the flushed one first.
struct Known {
    client: Client,
    first: u64,
    blocks: u64,
    flushed: Vec<u32>,
    latest: Vec<u32>,
    /// Writes that were sent and whose answer is not yet known.
    open: Vec<(u64, u32)>,
    generation: u32,
}

fn content(block: u64, generation: u32) -> Vec<u8> {
    let mut data = vec![0; BLOCK];
    data[..8].copy_from_slice(&block.to_le_bytes());
    data[8..12].copy_from_slice(&generation.to_le_bytes());
    data
}

impl Known {
    fn new(client: Client, first: u64, blocks: u64) -> Self {
        let none = vec![0; usize::try_from(blocks).unwrap()];
        Self {
            client,
            first,
            blocks,
            flushed: none.clone(),
            latest: none,
            open: Vec::new(),
            generation: 0,
        }
    }

    /// Asks something; what is answered well is noted. False once the power is off.
    fn step(&mut self, random: &mut Random) -> bool {
        self.generation += 1;
        let index = random.below(self.blocks);
        let (slot, block) = (usize::try_from(index).unwrap(), self.first + index);
        let kind = random.below(10);
        let (command, flags, offset, payload) = match kind {
            0..6 => (CMD_WRITE, 0, block * BLOCK as u64, content(block, self.generation)),
            6 => (
                CMD_WRITE,
                CMD_FLAG_FUA,
                block * BLOCK as u64,
                content(block, self.generation),
            ),
            _ => (CMD_FLUSH, 0, 0, Vec::new()),
        };
        if command == CMD_WRITE {
            self.open = vec![(index, self.generation)];
        }
        let length = u32::try_from(payload.len()).unwrap();
        match self.client.ask(command, flags, offset, length, &payload) {
            Answer::Done => {}
            Answer::Error(_) => return false,
            other => panic!("{other:?}"),
        }
        match (command, flags) {
            (CMD_WRITE, 0) => self.latest[slot] = self.generation,
            (CMD_WRITE, _) => {
                self.latest[slot] = self.generation;
                self.flushed[slot] = self.generation;
            }
            _ => self.flushed.clone_from(&self.latest),
        }
        self.open.clear();
        true
    }

    /// Blocks on the medium that are neither what was flushed nor newer.
    fn lost(&self, medium: &[u8]) -> usize {
        (0..self.blocks)
            .filter(|index| {
                let (slot, block) = (usize::try_from(*index).unwrap(), self.first + index);
                let at = usize::try_from(block).unwrap() * BLOCK;
                let found = &medium[at..at + BLOCK];
                let generation = u32::from_le_bytes(found[8..12].try_into().unwrap());
                let whole = generation == 0 || found == content(block, generation);
                let sent = self.latest[slot].max(
                    self.open
                        .iter()
                        .filter(|open| open.0 == *index)
                        .map(|open| open.1)
                        .max()
                        .unwrap_or(0),
                );
                !whole || generation < self.flushed[slot] || generation > sent
            })
            .count()
    }
}

/// One life of a server until the cut; returns how many blocks were lost. With `overlay` the disk is an upper layer.
fn life(seed: u64, fault: Fault, layered: bool) -> usize {
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let base: Arc<dyn Store> = Disk::new(vec![0; usize::try_from(SIZE).unwrap()], Fault::None);
    let (disk, store): (_, Arc<dyn Store>) = if layered {
        let mut upper = overlay::first_block(SIZE);
        upper.resize(usize::try_from(overlay::upper_size(SIZE)).unwrap(), 0);
        let disk = Disk::new(upper, fault);
        let over = Overlay::over(Arc::clone(&base), Arc::<Disk>::clone(&disk), None).unwrap();
        (disk, Arc::new(over))
    } else {
        let disk = Disk::new(vec![0; usize::try_from(SIZE).unwrap()], fault);
        (Arc::clone(&disk), Arc::<Disk>::clone(&disk))
    };
    let fixture = Fixture::of_store(store);
    let clients = 3;
    let share = BLOCKS / clients;
    let stop = AtomicBool::new(false);
    let (known, medium) = std::thread::scope(|scope| {
        let running: Vec<_> = (0..clients)
            .map(|index| {
                let mut known = Known::new(fixture.simple_client(), index * share, share);
                let mut random = Random(random.below(u64::MAX) | 1);
                let stop = &stop;
                scope.spawn(move || {
                    while !stop.load(Ordering::Relaxed) && known.step(&mut random) {}
                    known
                })
            })
            .collect();
        // When is the machine's choice; that it makes no difference is what is tested.
        std::thread::sleep(Duration::from_micros(500 + random.below(8000)));
        let mut luck = Random(seed | 1);
        let medium = disk.cut(|| luck.below(2) == 0);
        stop.store(true, Ordering::Relaxed);
        (
            running
                .into_iter()
                .map(|client| client.join().unwrap())
                .collect::<Vec<_>>(),
            medium,
        )
    });
    let medium = if layered {
        let again = Overlay::over(base, Disk::new(medium, Fault::None), None).unwrap();
        let mut all = vec![0; usize::try_from(SIZE).unwrap()];
        again.read(&mut all, 0).unwrap();
        all
    } else {
        medium
    };
    known.iter().map(|known| known.lost(&medium)).sum()
}

#[test]
fn what_was_flushed_is_there_after_any_cut() {
    for layered in [false, true] {
        for seed in 1..=CUTS {
            assert_eq!(life(seed, Fault::None, layered), 0, "cut {seed}, overlay {layered}");
        }
    }
}

#[test]
fn the_test_sees_a_flush_that_does_nothing_or_is_answered_too_early() {
    for fault in [Fault::Ignored, Fault::Early] {
        for layered in [false, true] {
            let lost: usize = (1..=CUTS).map(|seed| life(seed, fault, layered)).sum();
            assert!(
                lost > 0,
                "{fault:?}, overlay {layered}: nothing was lost, so nothing is tested"
            );
        }
    }
}

#[test]
fn an_overlay_that_could_not_be_flushed_is_not_taken_for_a_good_one() {
    let base: Arc<dyn Store> = Disk::new(vec![0; usize::try_from(SIZE).unwrap()], Fault::None);
    let mut upper = overlay::first_block(SIZE);
    upper.resize(usize::try_from(overlay::upper_size(SIZE)).unwrap(), 0);
    let disk = Disk::new(upper, Fault::None);
    let over = Overlay::over(base, Arc::<Disk>::clone(&disk), None).unwrap();
    let fixture = Fixture::of_store(Arc::new(over));
    let mut client = fixture.simple_client();
    client.write(0, &[1; BLOCK]);
    disk.cut(|| false);
    for _ in 0..2 {
        assert_eq!(client.ask(CMD_FLUSH, 0, 0, 0, &[]), Answer::Error(Errno::Io));
        assert_eq!(client.ask(CMD_WRITE, 0, 0, 512, &[1; 512]), Answer::Error(Errno::Io));
    }
    assert_eq!(client.read(0, 1).len(), 1);
}
