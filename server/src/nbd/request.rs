//! Checks a request against what was negotiated, before anything is done. Pure.
//!
//! Specification: "Request types", "Command flags", "Size constraints", "Error values".

use stiefel_shared::nbd::{
    Asked, CMD_BLOCK_STATUS, CMD_CACHE, CMD_DISC, CMD_FLAG_DF, CMD_FLAG_FAST_ZERO, CMD_FLAG_FUA, CMD_FLAG_NO_HOLE,
    CMD_FLAG_PAYLOAD_LEN, CMD_FLAG_REQ_ONE, CMD_FLUSH, CMD_READ, CMD_RESIZE, CMD_TRIM, CMD_WRITE, CMD_WRITE_ZEROES,
    Errno, FLAG_READ_ONLY, FLAG_SEND_CACHE, FLAG_SEND_DF, FLAG_SEND_FAST_ZERO, FLAG_SEND_FLUSH, FLAG_SEND_FUA,
    FLAG_SEND_TRIM, FLAG_SEND_WRITE_ZEROES,
};

/// What a connection may ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// The export's size in bytes.
    pub size: u64,
    /// The transmission flags as sent to this client.
    pub flags: u16,
    /// Offsets and lengths must be multiples of this power of two; 1 for a client that was not told.
    pub minimum: u32,
    /// The largest payload in bytes.
    pub maximum: u32,
    /// Whether `base:allocation` was selected for this export.
    pub block_status: bool,
    /// Whether headers are extended.
    pub extended: bool,
}

/// Part of an export, in bytes; lies within it and is not empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// First byte.
    pub offset: u64,
    /// Number of bytes; for a payload never more than the maximum.
    pub length: u64,
}

/// A request that may be executed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Send the data.
    Read {
        /// Where.
        range: Range,
        /// In one chunk.
        whole: bool,
    },
    /// Take the data; with `fua`, onto the medium.
    Write {
        /// Where.
        range: Range,
        /// Answer only when it is on the medium.
        fua: bool,
    },
    /// Bring everything answered so far onto the medium.
    Flush,
    /// Forget the data.
    Trim {
        /// Where.
        range: Range,
        /// Answer only when it is on the medium.
        fua: bool,
    },
    /// Read ahead.
    Cache(Range),
    /// Write zeroes.
    WriteZeroes {
        /// Where.
        range: Range,
        /// Answer only when they are on the medium.
        fua: bool,
        /// Keep the space allocated.
        no_hole: bool,
        /// Fail unless faster than writing.
        fast: bool,
    },
    /// Report holes.
    BlockStatus {
        /// Where.
        range: Range,
        /// One extent only.
        one: bool,
    },
    /// End the connection.
    Disconnect,
}

/// Why a request is not executed; the connection stays in step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refusal {
    /// The error sent.
    pub errno: Errno,
    /// Words for the client's user, sent in structured replies.
    pub message: &'static str,
}

fn refuse<T>(errno: Errno, message: &'static str) -> Result<T, Refusal> {
    Err(Refusal { errno, message })
}

/// Checks a request wholly: command, flags, permission, length, alignment and range, in this order.
///
/// # Errors
/// EINVAL for what was not offered, is unknown, empty or unaligned, for a read, trim or query past the end and for a
/// payload written beyond the maximum; EPERM for writing to a read-only export; EOVERFLOW for a read longer than the
/// maximum; ENOSPC for writing past the end.
pub fn validate(request: &Asked, bounds: &Bounds) -> Result<Command, Refusal> {
    let (needed, own_flags, writes) = match request.command {
        CMD_READ => (
            0,
            if bounds.flags & FLAG_SEND_DF == 0 {
                0
            } else {
                CMD_FLAG_DF
            },
            false,
        ),
        CMD_WRITE => {
            let payload = if bounds.extended { CMD_FLAG_PAYLOAD_LEN } else { 0 };
            if request.flags & payload != payload {
                return refuse(Errno::Inval, "a write without its payload");
            }
            (0, payload, true)
        }
        CMD_DISC => return Ok(Command::Disconnect),
        CMD_FLUSH => (FLAG_SEND_FLUSH, 0, false),
        CMD_TRIM => (FLAG_SEND_TRIM, 0, true),
        CMD_CACHE => (FLAG_SEND_CACHE, 0, false),
        CMD_WRITE_ZEROES => {
            let fast = if bounds.flags & FLAG_SEND_FAST_ZERO == 0 {
                0
            } else {
                CMD_FLAG_FAST_ZERO
            };
            (FLAG_SEND_WRITE_ZEROES, CMD_FLAG_NO_HOLE | fast, true)
        }
        CMD_BLOCK_STATUS => (0, CMD_FLAG_REQ_ONE, false),
        CMD_RESIZE => return refuse(Errno::Inval, "an export's size is fixed"),
        _ => return refuse(Errno::Inval, "unknown command"),
    };
    if writes && bounds.flags & FLAG_READ_ONLY != 0 {
        return refuse(Errno::Perm, "the export is read-only");
    }
    if bounds.flags & needed != needed {
        return refuse(Errno::Inval, "this command was not offered for the export");
    }
    let fua_flag = if bounds.flags & FLAG_SEND_FUA == 0 {
        0
    } else {
        CMD_FLAG_FUA
    };
    if request.flags & !(own_flags | fua_flag) != 0 {
        return refuse(Errno::Inval, "a flag that is unknown or not for this command");
    }
    if request.command == CMD_FLUSH {
        if request.offset != 0 || request.length != 0 {
            return refuse(Errno::Inval, "offset and length of a flush must be zero");
        }
        return Ok(Command::Flush);
    }
    if request.command == CMD_BLOCK_STATUS && !bounds.block_status {
        return refuse(Errno::Inval, "no metadata context was selected for this export");
    }
    let range = check_range(request, bounds)?;
    let flag = |flag| request.flags & flag != 0;
    let fua = flag(CMD_FLAG_FUA);
    Ok(match request.command {
        CMD_READ => Command::Read {
            range,
            whole: flag(CMD_FLAG_DF),
        },
        CMD_WRITE => Command::Write { range, fua },
        CMD_TRIM => Command::Trim { range, fua },
        CMD_CACHE => Command::Cache(range),
        CMD_WRITE_ZEROES => Command::WriteZeroes {
            range,
            fua,
            no_hole: flag(CMD_FLAG_NO_HOLE),
            fast: flag(CMD_FLAG_FAST_ZERO),
        },
        _ => Command::BlockStatus {
            range,
            one: flag(CMD_FLAG_REQ_ONE),
        },
    })
}

fn check_range(request: &Asked, bounds: &Bounds) -> Result<Range, Refusal> {
    let Asked { offset, length, .. } = *request;
    if length == 0 {
        return refuse(Errno::Inval, "the length is zero");
    }
    if length > u64::from(bounds.maximum) {
        match request.command {
            CMD_READ => return refuse(Errno::Overflow, "longer than the largest payload"),
            // The specification keeps EOVERFLOW for requests without payload.
            CMD_WRITE => return refuse(Errno::Inval, "longer than the largest payload"),
            _ => {}
        }
    }
    let mask = u64::from(bounds.minimum.max(1)) - 1;
    if (offset | length) & mask != 0 {
        return refuse(Errno::Inval, "not aligned to the minimum block size");
    }
    if offset.checked_add(length).is_none_or(|end| end > bounds.size) {
        let errno = match request.command {
            CMD_WRITE | CMD_WRITE_ZEROES => Errno::NoSpc,
            _ => Errno::Inval,
        };
        return refuse(errno, "past the end of the export");
    }
    Ok(Range { offset, length })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use stiefel_shared::nbd::{MAX_PAYLOAD, Request};

    const ALL: u16 = FLAG_SEND_FLUSH
        | FLAG_SEND_FUA
        | FLAG_SEND_TRIM
        | FLAG_SEND_WRITE_ZEROES
        | FLAG_SEND_DF
        | FLAG_SEND_CACHE
        | FLAG_SEND_FAST_ZERO;

    const BOUNDS: Bounds = Bounds {
        size: 1 << 30,
        flags: ALL,
        minimum: 512,
        maximum: MAX_PAYLOAD,
        block_status: true,
        extended: false,
    };

    fn ask(command: u16, flags: u16, offset: u64, length: u32, bounds: &Bounds) -> Result<Command, Errno> {
        let request = Request {
            flags,
            command,
            cookie: 0,
            offset,
            length,
        };
        validate(&request.into(), bounds).map_err(|no| no.errno)
    }

    #[test]
    fn the_end_of_the_export_is_exact() {
        let end = BOUNDS.size;
        for command in [
            CMD_READ,
            CMD_WRITE,
            CMD_TRIM,
            CMD_CACHE,
            CMD_WRITE_ZEROES,
            CMD_BLOCK_STATUS,
        ] {
            assert!(ask(command, 0, end - 512, 512, &BOUNDS).is_ok());
            let errno = if matches!(command, CMD_WRITE | CMD_WRITE_ZEROES) {
                Errno::NoSpc
            } else {
                Errno::Inval
            };
            assert_eq!(ask(command, 0, end - 512, 1024, &BOUNDS), Err(errno));
            assert_eq!(ask(command, 0, u64::MAX - 511, 512, &BOUNDS), Err(errno));
        }
    }

    #[test]
    fn every_writing_command_is_eperm_on_a_read_only_export() {
        let bounds = Bounds {
            flags: FLAG_READ_ONLY | FLAG_SEND_FLUSH | FLAG_SEND_FUA,
            ..BOUNDS
        };
        for command in [CMD_WRITE, CMD_TRIM, CMD_WRITE_ZEROES] {
            assert_eq!(ask(command, 0, 0, 512, &bounds), Err(Errno::Perm));
            assert_eq!(ask(command, CMD_FLAG_FUA, 0, 512, &bounds), Err(Errno::Perm));
        }
        assert!(ask(CMD_READ, 0, 0, 512, &bounds).is_ok());
        assert_eq!(ask(CMD_FLUSH, 0, 0, 0, &bounds), Ok(Command::Flush));
    }

    #[test]
    fn unknown_commands_and_misplaced_flags_are_einval() {
        for command in [CMD_RESIZE, 9, 255, u16::MAX] {
            assert_eq!(ask(command, 0, 0, 512, &BOUNDS), Err(Errno::Inval));
        }
        for (command, flags) in [
            (CMD_READ, CMD_FLAG_NO_HOLE),
            (CMD_WRITE, CMD_FLAG_DF),
            (CMD_TRIM, CMD_FLAG_FAST_ZERO),
            (CMD_CACHE, CMD_FLAG_REQ_ONE),
            (CMD_WRITE_ZEROES, CMD_FLAG_REQ_ONE),
            (CMD_BLOCK_STATUS, CMD_FLAG_DF),
            (CMD_WRITE, 1 << 5),
            (CMD_READ, 1 << 15),
        ] {
            assert_eq!(
                ask(command, flags, 0, 512, &BOUNDS),
                Err(Errno::Inval),
                "{command} {flags}"
            );
        }
    }

    #[test]
    fn flags_are_for_those_who_were_offered_them() {
        let bounds = Bounds {
            flags: ALL & !FLAG_SEND_DF & !FLAG_SEND_FAST_ZERO & !FLAG_SEND_TRIM,
            ..BOUNDS
        };
        assert_eq!(ask(CMD_READ, CMD_FLAG_DF, 0, 512, &bounds), Err(Errno::Inval));
        assert_eq!(
            ask(CMD_WRITE_ZEROES, CMD_FLAG_FAST_ZERO, 0, 512, &bounds),
            Err(Errno::Inval)
        );
        assert_eq!(ask(CMD_TRIM, 0, 0, 512, &bounds), Err(Errno::Inval));
        let blind = Bounds {
            block_status: false,
            ..BOUNDS
        };
        assert_eq!(ask(CMD_BLOCK_STATUS, 0, 0, 512, &blind), Err(Errno::Inval));
    }

    #[test]
    fn lengths_and_alignment_are_checked() {
        assert_eq!(ask(CMD_READ, 0, 0, 0, &BOUNDS), Err(Errno::Inval));
        assert_eq!(ask(CMD_READ, 0, 1, 512, &BOUNDS), Err(Errno::Inval));
        assert_eq!(ask(CMD_WRITE, 0, 0, 511, &BOUNDS), Err(Errno::Inval));
        assert_eq!(ask(CMD_READ, 0, 0, MAX_PAYLOAD + 512, &BOUNDS), Err(Errno::Overflow));
        assert_eq!(ask(CMD_WRITE, 0, 0, MAX_PAYLOAD + 512, &BOUNDS), Err(Errno::Inval));
        assert!(ask(CMD_WRITE_ZEROES, 0, 0, MAX_PAYLOAD + 512, &BOUNDS).is_ok());
        assert_eq!(ask(CMD_FLUSH, 0, 0, 512, &BOUNDS), Err(Errno::Inval));
    }

    proptest! {
        #[test]
        fn what_is_accepted_lies_inside(flags: u16, command in 0_u16..10, offset: u64, length: u64, transmission: u16, size: u64, shift in 0_u32..17) {
            let bounds = Bounds { size, flags: transmission, minimum: 1 << shift, maximum: MAX_PAYLOAD, block_status: true, extended: false };
            let request = Asked { flags, command, cookie: 0, offset, length, payload: 0 };
            let writes = matches!(command, CMD_WRITE | CMD_TRIM | CMD_WRITE_ZEROES);
            match validate(&request, &bounds) {
                Ok(Command::Disconnect) => prop_assert_eq!(command, CMD_DISC),
                Ok(Command::Flush) => prop_assert_eq!(command, CMD_FLUSH),
                Ok(_) => {
                    prop_assert!(u128::from(offset) + u128::from(length) <= u128::from(size));
                    prop_assert!(offset % (1 << shift) == 0 && length > 0 && length % (1 << shift) == 0);
                    prop_assert!(!writes || transmission & FLAG_READ_ONLY == 0);
                }
                Err(_) => {}
            }
        }
    }
}
