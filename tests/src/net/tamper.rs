//! Altering what goes over a cable.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::packet::TcpSegment;

/// Where a frame comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The machine at [`super::Wire::a`].
    A,
    /// The machine at [`super::Wire::b`].
    B,
}

/// What becomes of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It goes on as it came.
    Pass,
    /// It goes on, altered.
    Altered,
    /// It is lost.
    Drop,
}

/// Something in the cable that sees every Ethernet frame (without its check sequence).
pub trait Tamper: Send {
    /// May alter the frame, and says so.
    fn frame(&mut self, from: Side, frame: &mut Vec<u8>) -> Verdict;
}

/// Flips one byte in the middle of one large TCP segment (IPv6), once, with a checksum that fits again: TCP takes it.
///
/// The NICs must not leave checksums or segmentation to the host ([`crate::NicModel::VirtioPlain`] or `Usb`).
pub struct FlipTcpByte {
    source_port: u16,
    min_len: usize,
    /// How many segments are still to pass unaltered.
    before: u32,
    done: Arc<AtomicBool>,
}

impl FlipTcpByte {
    /// Alters the `nth` segment (0 is the first) from `source_port` that carries at least `min_len` bytes.
    pub fn new(source_port: u16, min_len: usize, nth: u32) -> Self {
        Self {
            source_port,
            min_len,
            before: nth,
            done: Arc::default(),
        }
    }

    /// Becomes true when the byte was flipped.
    pub fn done(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.done)
    }
}

impl Tamper for FlipTcpByte {
    fn frame(&mut self, _from: Side, frame: &mut Vec<u8>) -> Verdict {
        if self.done.load(Ordering::Relaxed) {
            return Verdict::Pass;
        }
        let Some(segment) = TcpSegment::parse(frame) else {
            return Verdict::Pass;
        };
        let payload = segment.payload.clone();
        if segment.source_port != self.source_port || payload.is_empty() || payload.len() < self.min_len {
            return Verdict::Pass;
        }
        if self.before > 0 {
            self.before -= 1;
            return Verdict::Pass;
        }
        frame[payload.start + payload.len() / 2] ^= 0xff;
        segment.write_checksum(frame);
        self.done.store(true, Ordering::Relaxed);
        Verdict::Altered
    }
}

#[cfg(test)]
mod tests {
    use super::super::packet::tests::tcp_frame;
    use super::*;

    #[test]
    fn only_the_nth_large_segment_from_the_port_is_altered_and_only_once() {
        let mut tamper = FlipTcpByte::new(4420, 500, 1);
        let done = tamper.done();
        let large = tcp_frame(4420, &[7; 1000]);
        for frame in [tcp_frame(4420, &[7; 499]), tcp_frame(80, &[7; 1000]), large.clone()] {
            let mut altered = frame.clone();
            assert_eq!(tamper.frame(Side::A, &mut altered), Verdict::Pass);
            assert_eq!(altered, frame);
        }
        assert!(!done.load(Ordering::Relaxed));

        let mut altered = large.clone();
        assert_eq!(tamper.frame(Side::A, &mut altered), Verdict::Altered);
        assert!(done.load(Ordering::Relaxed));
        let segment = TcpSegment::parse(&altered).unwrap();
        assert!(segment.checksum_is_right(&altered));
        let differing = altered[segment.payload.clone()]
            .iter()
            .filter(|byte| **byte != 7)
            .count();
        assert_eq!(differing, 1);

        let mut again = large.clone();
        assert_eq!(tamper.frame(Side::A, &mut again), Verdict::Pass);
        assert_eq!(again, large);
    }
}
