//! The power keys of a machine (evdev, `linux/input.h`).
//!
//! Used by the keeper: when the root file system waits for a laptop that has gone, nobody else may be able to hear them.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::os::fd::BorrowedFd;

use rustix::fs::{Dir, Mode, OFlags, openat};

/// Length of `struct input_event` on 64-bit machines: time (16), type (2), code (2), value (4).
const EVENT: usize = 24;
/// `EV_KEY`.
const KEY: u16 = 1;
/// `KEY_POWER`.
const POWER: u16 = 116;
/// A machine has a few dozen devices at most; a fault must not take all descriptors.
const MAX_DEVICES: usize = 64;

/// The input devices that are there, listened to since they were first seen.
#[derive(Debug, Default)]
pub struct PowerKeys(BTreeMap<Vec<u8>, File>);

impl PowerKeys {
    /// Whether a power key was pressed since the last call, on a device below the open devtmpfs `dev`. Devices that appear are
    /// taken in; what cannot be opened or read is passed over.
    pub fn pressed(&mut self, dev: BorrowedFd<'_>) -> bool {
        self.look(dev);
        let mut pressed = false;
        self.0.retain(|_, device| {
            let (alive, power) = drain(device);
            pressed |= power;
            alive
        });
        pressed
    }

    fn look(&mut self, dev: BorrowedFd<'_>) {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let Ok(folder) = openat(dev, "input", flags | OFlags::DIRECTORY, Mode::empty()) else {
            return;
        };
        let Ok(entries) = Dir::read_from(&folder) else { return };
        for entry in entries.flatten() {
            let name = entry.file_name().to_bytes();
            if self.0.len() >= MAX_DEVICES || !name.starts_with(b"event") || self.0.contains_key(name) {
                continue;
            }
            if let Ok(device) = openat(&folder, entry.file_name(), flags | OFlags::NONBLOCK, Mode::empty()) {
                self.0.insert(name.to_vec(), device.into());
            }
        }
    }
}

/// Reads what has happened on a device; whether it is still there, and whether its power key went down.
fn drain(device: &mut impl Read) -> (bool, bool) {
    let mut events = [0; 64 * EVENT];
    let mut power = false;
    loop {
        match device.read(&mut events) {
            Ok(0) => return (false, power),
            Ok(length) => power |= events.get(..length).is_some_and(has_power),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return (true, power),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(_) => return (false, power),
        }
    }
}

fn has_power(events: &[u8]) -> bool {
    events.chunks_exact(EVENT).any(|event| {
        let number = |at: usize| Some(u16::from_ne_bytes(event.get(at..at + 2)?.try_into().ok()?));
        let pressed = event.get(20..24) == Some(&1_i32.to_ne_bytes());
        number(16) == Some(KEY) && number(18) == Some(POWER) && pressed
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(kind: u16, code: u16, value: i32) -> Vec<u8> {
        [
            &[0; 16][..],
            &kind.to_ne_bytes(),
            &code.to_ne_bytes(),
            &value.to_ne_bytes(),
        ]
        .concat()
    }

    #[test]
    fn only_a_power_key_that_goes_down_counts() {
        assert!(has_power(&[event(0, 0, 0), event(1, 116, 1)].concat()));
        for other in [event(1, 116, 0), event(1, 30, 1), event(4, 116, 1), vec![1; 23]] {
            assert!(!has_power(&other));
        }
    }

    #[test]
    fn a_device_that_went_away_is_forgotten() {
        assert_eq!(drain(&mut &event(1, 116, 1)[..]), (false, true));
        assert_eq!(drain(&mut &[][..]), (false, false));
    }

    #[test]
    fn a_machine_without_input_devices_has_no_key_pressed() {
        let dev = tempfile::tempdir().unwrap();
        let dev = File::open(dev.path()).unwrap();
        assert!(!PowerKeys::default().pressed(std::os::fd::AsFd::as_fd(&dev)));
    }
}
