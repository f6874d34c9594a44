//! The measurements on the disk, past this machine's own cache.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::result::{LONG, Measure, SHORT, SPAN};
use rustix::fs::{Mode, OFlags};

/// What O_DIRECT wants of memory.
const ALIGNMENT: usize = 4096;

/// Memory at a multiple of [`ALIGNMENT`].
struct Aligned {
    bytes: Vec<u8>,
    used: Range<usize>,
}

impl Aligned {
    fn new(length: usize) -> Self {
        let bytes = vec![0xa5; length + ALIGNMENT];
        let begin = bytes.as_ptr().align_offset(ALIGNMENT);
        Self {
            bytes,
            used: begin..begin + length,
        }
    }

    fn get(&mut self) -> &mut [u8] {
        &mut self.bytes[self.used.clone()]
    }
}

/// Bytes or requests per second.
pub(crate) fn measure(device: &Path, measure: Measure, time: Duration) -> std::io::Result<f64> {
    let flags = OFlags::RDWR | OFlags::DIRECT | OFlags::CLOEXEC;
    let disk = File::from(rustix::fs::open(device, flags, Mode::empty())?);
    // The first request may find things to be set up.
    disk.read_exact_at(Aligned::new(SHORT).get(), 0)?;
    match measure {
        Measure::Read => long(time, |piece, at| disk.read_exact_at(piece, at), || Ok(())),
        Measure::Write => long(time, |piece, at| disk.write_all_at(piece, at), || disk.sync_all()),
        Measure::Random1 => random(&disk, 1, time),
        Measure::Random8 => random(&disk, 8, time),
    }
}

fn long(
    time: Duration,
    work: impl Fn(&mut [u8], u64) -> std::io::Result<()>,
    end: impl FnOnce() -> std::io::Result<()>,
) -> std::io::Result<f64> {
    let mut piece = Aligned::new(LONG);
    let (begun, mut total) = (Instant::now(), 0);
    while begun.elapsed() < time {
        work(piece.get(), total % SPAN)?;
        total += LONG as u64;
    }
    end()?;
    Ok(total as f64 / begun.elapsed().as_secs_f64())
}

fn random(disk: &File, threads: u64, time: Duration) -> std::io::Result<f64> {
    let begun = Instant::now();
    let counts = std::thread::scope(|scope| {
        let threads: Vec<_> = (1..=threads)
            .map(|number| {
                scope.spawn(move || {
                    let (mut piece, mut count) = (Aligned::new(SHORT), 0_u32);
                    // xorshift64
                    let mut state = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
                    while begun.elapsed() < time {
                        state ^= state << 13;
                        state ^= state >> 7;
                        state ^= state << 17;
                        let short = SHORT as u64;
                        disk.read_exact_at(piece.get(), state % (SPAN / short) * short)?;
                        count += 1;
                    }
                    Ok(count)
                })
            })
            .collect();
        let done = threads.into_iter().map(|thread| {
            let count: std::io::Result<u32> = thread.join().unwrap_or_else(|_| Err(std::io::ErrorKind::Other.into()));
            count
        });
        done.collect::<std::io::Result<Vec<u32>>>()
    })?;
    Ok(f64::from(counts.iter().sum::<u32>()) / begun.elapsed().as_secs_f64())
}
