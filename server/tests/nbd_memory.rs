//! What many greedy clients can make the server hold in memory. In a program of its own, so that nothing else is counted.
#![allow(clippy::unwrap_used)]

mod nbd_support;

use std::io::{self, IoSlice, IoSliceMut, Write};
use std::net::TcpStream;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use nbd_support::Fixture;
use stiefel_server::nbd::{Range, Store, Traits};
use stiefel_shared::nbd::*;

const CLIENTS: usize = 12;
/// What docs/nbd.md says that one connection may hold, and the stacks of its threads, in KiB.
const EACH: u64 = (2 * 256) + 1024 + 2 * 1024 + 1024 + 18 * 32 + 16 * (128 + 128);

/// A disk that lets nobody in until it is opened.
#[derive(Debug, Default)]
struct Stuck {
    open: Mutex<bool>,
    opened: Condvar,
}

impl Stuck {
    fn wait(&self) {
        let mut open = self.open.lock().unwrap();
        while !*open {
            open = self.opened.wait(open).unwrap();
        }
    }

    fn open(&self) {
        *self.open.lock().unwrap() = true;
        self.opened.notify_all();
    }
}

impl Store for Stuck {
    fn size(&self) -> u64 {
        1 << 40
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

    fn read(&self, data: &mut [u8], _offset: u64) -> io::Result<()> {
        self.wait();
        data.fill(1);
        Ok(())
    }

    fn write_now(&self, _parts: &[IoSlice<'_>], _offset: u64) -> io::Result<usize> {
        Ok(0)
    }

    fn write(&self, _data: &[u8], _offset: u64) -> io::Result<()> {
        self.wait();
        Ok(())
    }

    fn trim(&self, _range: Range) -> io::Result<()> {
        Ok(())
    }

    fn zero(&self, _range: Range, _no_hole: bool, _fast: bool) -> io::Result<()> {
        Ok(())
    }

    fn cache(&self, _range: Range) -> io::Result<()> {
        Ok(())
    }

    fn extents(&self, range: Range, most: usize) -> Vec<Extent> {
        let length = (range.length / most as u64).max(1);
        (0..most as u64)
            .take_while(|index| (index + 1) * length <= range.length)
            .map(|index| Extent {
                length,
                state: u32::from(index % 2 == 0),
            })
            .collect()
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}

/// Peak resident memory of this program, in KiB.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// Sends as much as the server takes, and reads nothing.
fn flood(stream: &mut TcpStream, message: &[u8]) {
    stream.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
    let begun = Instant::now();
    while stream.write_all(message).is_ok() && begun.elapsed() < Duration::from_secs(20) {}
}

#[test]
fn memory_is_bounded_whatever_clients_send_and_never_read() {
    let disk = Arc::new(Stuck::default());
    let fixture = Fixture::of_store(Arc::clone(&disk) as Arc<dyn Store>);
    let request = |command, length: u32| {
        let header = Request {
            flags: 0,
            command,
            cookie: 1,
            offset: 0,
            length,
        };
        let payload = if command == CMD_WRITE { length as usize } else { 0 };
        [&header.encode()[..], &vec![7; payload]].concat()
    };
    // Small and long reads, small and long writes, and block status: all that can be made to wait.
    let messages = [
        request(CMD_READ, 4096).repeat(100),
        request(CMD_READ, 1 << 20).repeat(100),
        request(CMD_READ, 32 << 20).repeat(100),
        request(CMD_WRITE, 4096).repeat(10),
        request(CMD_WRITE, 1 << 20),
        request(CMD_WRITE, 3 << 20),
    ];
    let mut clients: Vec<_> = (0..CLIENTS).map(|_| fixture.simple_client().stream).collect();
    let before = peak();
    std::thread::scope(|scope| {
        for (client, message) in clients.iter_mut().zip(messages.iter().cycle()) {
            scope.spawn(move || flood(client, message));
        }
    });
    // Now all that waited goes out, as far as it is taken.
    disk.open();
    std::thread::scope(|scope| {
        for (client, message) in clients.iter_mut().zip(messages.iter().cycle()) {
            scope.spawn(move || flood(client, message));
        }
    });
    // What needs no payload, and has long answers.
    let mut askers: Vec<_> = (0..CLIENTS).map(|_| fixture.extended_client().stream).collect();
    let question = Asked {
        flags: 0,
        command: CMD_BLOCK_STATUS,
        cookie: 1,
        offset: 0,
        length: 1 << 30,
        payload: 0,
    };
    let questions = question.encode_extended().repeat(1000);
    std::thread::scope(|scope| {
        for client in &mut askers {
            scope.spawn(|| flood(client, &questions));
        }
    });
    let grown = peak() - before;
    assert!(
        grown < 2 * CLIENTS as u64 * EACH,
        "{CLIENTS} and {CLIENTS} clients made it grow by {grown} KiB"
    );
    fixture.server.drop_connections(nbd_support::PATIENCE).unwrap();
}
