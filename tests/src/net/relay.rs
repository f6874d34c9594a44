//! The relay in a cable: one thread per direction takes a frame, counts, records, alters, and passes it on.
//!
//! It holds one frame at a time; what waits is in the kernel's bounded socket queue. A machine that takes nothing for a
//! while loses frames, as on a real cable.

use std::io;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::capture::{Capture, MAX_FRAME};
use super::tamper::{Side, Tamper, Verdict};

/// How often a waiting thread looks whether it shall stop.
const WAKE: Duration = Duration::from_millis(100);
/// How long a machine may leave its queue full before frames are lost.
const SEND: Duration = Duration::from_millis(200);

/// Frames that went over a cable.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Passed on from A to B.
    pub a_to_b: u64,
    /// Passed on from B to A.
    pub b_to_a: u64,
    /// Lost: the cable was cut, the tamper dropped it, or nobody took it.
    pub lost: u64,
    /// Passed on after the tamper altered it.
    pub altered: u64,
}

/// What both directions and the test share.
pub(super) struct Shared {
    stop: AtomicBool,
    cut: AtomicBool,
    tamper: Mutex<Option<Box<dyn Tamper>>>,
    capture: Capture,
    recording: bool,
    a_to_b: AtomicU64,
    b_to_a: AtomicU64,
    lost: AtomicU64,
    altered: AtomicU64,
}

impl Shared {
    pub(super) fn new(record: &Path, limit: u64) -> io::Result<Self> {
        Ok(Self {
            stop: AtomicBool::new(false),
            cut: AtomicBool::new(false),
            tamper: Mutex::new(None),
            capture: Capture::create(record, limit)?,
            recording: limit > 0,
            a_to_b: AtomicU64::new(0),
            b_to_a: AtomicU64::new(0),
            lost: AtomicU64::new(0),
            altered: AtomicU64::new(0),
        })
    }

    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    pub(super) fn set_cut(&self, cut: bool) {
        self.cut.store(cut, Ordering::Relaxed);
    }

    pub(super) fn set_tamper(&self, tamper: Option<Box<dyn Tamper>>) {
        *self.tamper.lock().unwrap_or_else(PoisonError::into_inner) = tamper;
    }

    pub(super) fn capture(&self) -> &Capture {
        &self.capture
    }

    pub(super) fn counts(&self) -> Counts {
        Counts {
            a_to_b: self.a_to_b.load(Ordering::Relaxed),
            b_to_a: self.b_to_a.load(Ordering::Relaxed),
            lost: self.lost.load(Ordering::Relaxed),
            altered: self.altered.load(Ordering::Relaxed),
        }
    }

    /// Decides about one frame; records it as its sender sent it.
    fn judge(&self, from: Side, frame: &mut Vec<u8>) -> Verdict {
        if self.cut.load(Ordering::Relaxed) {
            return Verdict::Drop;
        }
        if self.recording {
            self.capture.add(frame);
        }
        match &mut *self.tamper.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(tamper) => tamper.frame(from, frame),
            None => Verdict::Pass,
        }
    }

    fn count(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

/// A socket of the relay.
pub(super) fn bind(path: &Path) -> io::Result<UnixDatagram> {
    let socket = UnixDatagram::bind(path)?;
    socket.set_read_timeout(Some(WAKE))?;
    socket.set_write_timeout(Some(SEND))?;
    Ok(socket)
}

/// One direction of a cable.
pub(super) struct Direction {
    pub(super) from: Side,
    pub(super) input: UnixDatagram,
    pub(super) output: UnixDatagram,
    /// The receiving machine's socket; not there while its NIC is unplugged.
    pub(super) to: PathBuf,
}

impl Direction {
    pub(super) fn run(self, shared: &Shared) {
        let mut buffer = vec![0; MAX_FRAME];
        let mut frame = Vec::with_capacity(MAX_FRAME);
        let passed = match self.from {
            Side::A => &shared.a_to_b,
            Side::B => &shared.b_to_a,
        };
        while !shared.stop.load(Ordering::Relaxed) {
            let Ok(length) = self.input.recv(&mut buffer) else {
                continue;
            };
            frame.clear();
            frame.extend_from_slice(&buffer[..length]);
            let verdict = shared.judge(self.from, &mut frame);
            if verdict == Verdict::Drop || self.output.send_to(&frame, &self.to).is_err() {
                Shared::count(&shared.lost);
                continue;
            }
            Shared::count(passed);
            if verdict == Verdict::Altered {
                Shared::count(&shared.altered);
            }
        }
    }
}
