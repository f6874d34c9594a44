//! Which blocks of a disk an upper layer has, and which of that is not yet written down.

use std::collections::BTreeSet;

/// Bytes that one bit stands for.
pub(super) const BLOCK: u64 = 4096;
/// Bits in one block of bits.
pub(super) const LEAF: u64 = BLOCK * 8;

/// Which blocks the upper layer has: blocks of bits, absent where all are zero.
#[derive(Debug)]
pub(super) struct Map {
    pub(super) leaves: Vec<Option<Box<[u8]>>>,
    /// Leaves that are not yet in the file.
    pub(super) dirty: BTreeSet<usize>,
}

impl Map {
    pub(super) fn has(&self, block: u64) -> bool {
        let (leaf, byte, bit) = place(block);
        self.leaves
            .get(leaf)
            .and_then(Option::as_ref)
            .is_some_and(|bits| bits[byte] & bit != 0)
    }

    /// Where the run of blocks that are alike ends, at most `end`, and whether the upper layer has them.
    pub(super) fn run(&self, block: u64, end: u64) -> (u64, bool) {
        let has = self.has(block);
        let mut at = block + 1;
        while at < end && self.has(at) == has {
            let (leaf, byte, _) = place(at);
            // What is alike as a whole need not be looked at bit by bit.
            at = match self.leaves.get(leaf).and_then(Option::as_ref) {
                None => at.next_multiple_of(LEAF).max(at + 1),
                Some(bits) if at.is_multiple_of(8) && bits[byte] == if has { 0xff } else { 0 } => at + 8,
                Some(_) => at + 1,
            };
        }
        (at.min(end), has)
    }

    pub(super) fn has_all(&self, first: u64, end: u64) -> bool {
        self.run(first, end) == (end, true)
    }

    pub(super) fn set(&mut self, blocks: std::ops::Range<u64>) {
        for block in blocks {
            let (leaf, byte, bit) = place(block);
            let Some(bits) = self.leaves.get_mut(leaf) else { return };
            let bits = bits.get_or_insert_with(|| vec![0; length(BLOCK)].into());
            if bits[byte] & bit == 0 {
                bits[byte] |= bit;
                self.dirty.insert(leaf);
            }
        }
    }
}

/// Leaf, byte and bit of a block.
fn place(block: u64) -> (usize, usize, u8) {
    (length(block / LEAF), length(block % LEAF / 8), 1 << (block % 8))
}

pub(super) fn length(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}
