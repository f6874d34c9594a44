//! TCP over IPv6 in an Ethernet frame, and its checksum (RFC 1071, RFC 8200 section 8.1, RFC 9293 section 3.1).
//!
//! IPv6 without extension headers, as Linux sends TCP; everything else is not a segment here.

use std::ops::Range;

const ETHERNET: usize = 14;
const IPV6: usize = 40;
const TCP: usize = 20;
const TYPE_IPV6: [u8; 2] = [0x86, 0xdd];
const NEXT_TCP: u8 = 6;
/// Where the checksum is in a TCP header.
const CHECKSUM: usize = 16;

/// Where the parts of a TCP segment are within a frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct TcpSegment {
    /// The addresses and ports: what tells one direction of a connection from all others.
    pub(super) flow: [u8; 36],
    pub(super) source_port: u16,
    pub(super) sequence: u32,
    pub(super) payload: Range<usize>,
    /// Header and payload.
    tcp: Range<usize>,
}

impl TcpSegment {
    pub(super) fn parse(frame: &[u8]) -> Option<Self> {
        if frame.get(12..14)? != TYPE_IPV6 {
            return None;
        }
        let ip = frame.get(ETHERNET..ETHERNET + IPV6)?;
        if ip[0] >> 4 != 6 || ip[6] != NEXT_TCP {
            return None;
        }
        let start = ETHERNET + IPV6;
        // Short frames are padded behind the packet.
        let end = start + usize::from(u16::from_be_bytes([ip[4], ip[5]]));
        let tcp = frame.get(start..end)?;
        let header = usize::from(*tcp.get(12)? >> 4) * 4;
        if header < TCP || header > tcp.len() {
            return None;
        }
        let mut flow = [0; 36];
        flow[..32].copy_from_slice(&ip[8..40]);
        flow[32..].copy_from_slice(&tcp[..4]);
        Some(Self {
            flow,
            source_port: u16::from_be_bytes([tcp[0], tcp[1]]),
            sequence: u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]]),
            payload: start + header..end,
            tcp: start..end,
        })
    }

    /// Makes the checksum fit the segment's bytes in `frame`, the frame it was parsed from.
    pub(super) fn write_checksum(&self, frame: &mut [u8]) {
        let field = self.tcp.start + CHECKSUM;
        frame[field..field + 2].fill(0);
        let checksum = !self.sum(frame);
        frame[field..field + 2].copy_from_slice(&checksum.to_be_bytes());
    }

    #[cfg(test)]
    pub(super) fn checksum_is_right(&self, frame: &[u8]) -> bool {
        self.sum(frame) == 0xffff
    }

    /// The ones' complement sum over the pseudo header and the segment.
    fn sum(&self, frame: &[u8]) -> u16 {
        let addresses = &frame[ETHERNET + 8..ETHERNET + IPV6];
        // The length came from a 16-bit field.
        let length = u32::try_from(self.tcp.len()).unwrap_or_default().to_be_bytes();
        ones_complement_sum(&[addresses, &length, &[0, 0, 0, NEXT_TCP], &frame[self.tcp.clone()]])
    }
}

/// The sum of 16-bit words; all parts but the last have an even length.
fn ones_complement_sum(parts: &[&[u8]]) -> u16 {
    let words = parts.iter().flat_map(|part| part.chunks(2));
    let sum: u64 = words
        .map(|word| u64::from(word[0]) << 8 | u64::from(word.get(1).copied().unwrap_or(0)))
        .sum();
    let mut folded = sum;
    while folded > 0xffff {
        folded = (folded >> 16) + (folded & 0xffff);
    }
    u16::try_from(folded).unwrap_or_default()
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A frame from fe80::1 to fe80::2 with a right checksum.
    pub(in super::super) fn tcp_frame(source_port: u16, payload: &[u8]) -> Vec<u8> {
        tcp_frame_at(source_port, 1, payload)
    }

    pub(in super::super) fn tcp_frame_at(source_port: u16, sequence: u32, payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![2; 12];
        frame.extend(TYPE_IPV6);
        frame.extend([0x60, 0, 0, 0]);
        frame.extend(u16::try_from(TCP + payload.len()).unwrap().to_be_bytes());
        frame.extend([NEXT_TCP, 64]);
        for last in [1, 2] {
            let mut address = [0; 16];
            (address[0], address[1], address[15]) = (0xfe, 0x80, last);
            frame.extend(address);
        }
        frame.extend(source_port.to_be_bytes());
        frame.extend(50_000_u16.to_be_bytes());
        frame.extend(sequence.to_be_bytes());
        frame.extend([0, 0, 0, 1, 5 << 4, 0x10, 0xff, 0xff, 0, 0, 0, 0]);
        frame.extend(payload);
        let segment = TcpSegment::parse(&frame).unwrap();
        segment.write_checksum(&mut frame);
        frame
    }

    #[test]
    fn the_sum_is_that_of_the_rfc() {
        // RFC 1071, section 3: the words 0001 f203 f4f5 f6f7 sum up to ddf2.
        assert_eq!(
            ones_complement_sum(&[&[0x00, 0x01, 0xf2, 0x03], &[0xf4, 0xf5, 0xf6, 0xf7]]),
            0xddf2
        );
        assert_eq!(ones_complement_sum(&[&[0xff, 0xff], &[0x01]]), 0x0100);
    }

    #[test]
    fn the_checksum_agrees_with_one_worked_out_elsewhere() {
        // fe80::1 port 4420 to fe80::2 port 50000, sequence 1, acknowledgement 1, ACK, window 65535, "ab"; Python.
        let frame = tcp_frame(4420, b"ab");
        let field = ETHERNET + IPV6 + CHECKSUM;
        assert_eq!(frame[field..field + 2], [0x7c, 0xd5]);
    }

    #[test]
    fn padding_behind_a_short_packet_is_not_payload() {
        let mut frame = tcp_frame(1, b"x");
        let whole = frame.len();
        frame.extend([0; 20]);
        assert_eq!(TcpSegment::parse(&frame).unwrap().payload, whole - 1..whole);
    }

    proptest! {
        #[test]
        fn no_frame_makes_the_parser_panic(frame in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = TcpSegment::parse(&frame);
        }

        #[test]
        fn a_damaged_frame_is_refused_or_stays_within_itself(
            payload in prop::collection::vec(any::<u8>(), 0..100), at in 12_usize..174, byte: u8
        ) {
            let mut frame = tcp_frame(1, &payload);
            let at = at.min(frame.len() - 1);
            frame[at] = byte;
            if let Some(segment) = TcpSegment::parse(&frame) {
                prop_assert!(segment.payload.end <= frame.len());
                segment.write_checksum(&mut frame);
                prop_assert!(segment.checksum_is_right(&frame));
            }
        }

        #[test]
        fn one_flipped_bit_breaks_the_checksum(payload in prop::collection::vec(any::<u8>(), 1..100), bit in 0_usize..800) {
            let mut frame = tcp_frame(1, &payload);
            let segment = TcpSegment::parse(&frame).unwrap();
            prop_assert!(segment.checksum_is_right(&frame));
            let bit = bit % (payload.len() * 8);
            frame[segment.payload.start + bit / 8] ^= 1 << (bit % 8);
            prop_assert!(!segment.checksum_is_right(&frame));
        }
    }
}
