//! The NBD server over disks that die: an error is told of the range that has it, and no disk takes another one with it.
#![allow(clippy::unwrap_used)]

mod nbd_support;

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::net::{SocketAddr, TcpListener};
use std::ops::Range as Span;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use nbd_support::{Answer, Client, Fixture, PATIENCE};
use stiefel_server::nbd::{DropError, Export, ExportOptions, Gate, Limits, Listed, Range, Server, Store, Traits};
use stiefel_shared::nbd::*;

const SIZE: u64 = 64 << 20;
const MIB: u32 = 1 << 20;

/// A disk with a bad place, or one that does not answer at all.
#[derive(Debug, Default)]
struct Dying {
    bad: Span<u64>,
    /// Where writes go, if anywhere.
    file: Option<File>,
    /// All of it is in memory, and nothing can be spliced from it.
    unspliced: Option<File>,
    /// Reads until all fail; 0 for never.
    tires: AtomicUsize,
    /// Requests wait as long as this is set.
    hangs: Mutex<bool>,
    answers: Condvar,
}

impl Dying {
    fn reach(&self, offset: u64, length: u64) -> io::Result<()> {
        let mut hangs = self.hangs.lock().unwrap();
        while *hangs {
            hangs = self.answers.wait(hangs).unwrap();
        }
        if offset < self.bad.end && self.bad.start < offset + length {
            // EIO.
            return Err(io::Error::from_raw_os_error(5));
        }
        Ok(())
    }

    fn wake(&self) {
        *self.hangs.lock().unwrap() = false;
        self.answers.notify_all();
    }
}

impl Store for Dying {
    fn size(&self) -> u64 {
        SIZE
    }

    fn traits(&self) -> Traits {
        Traits {
            block: 1,
            discards: true,
            rotational: true,
        }
    }

    fn read_now(&self, parts: &mut [IoSliceMut<'_>], _offset: u64) -> usize {
        if self.unspliced.is_none() {
            return 0;
        }
        parts.iter_mut().for_each(|part| part.fill(7));
        parts.iter().map(|part| part.len()).sum()
    }

    fn read(&self, data: &mut [u8], offset: u64) -> io::Result<()> {
        self.reach(offset, data.len() as u64)?;
        match self.tires.load(Ordering::SeqCst) {
            0 => {}
            1 => return Err(io::Error::from_raw_os_error(5)),
            left => self.tires.store(left - 1, Ordering::SeqCst),
        }
        data.fill(7);
        Ok(())
    }

    fn write_now(&self, _parts: &[IoSlice<'_>], _offset: u64) -> io::Result<usize> {
        Ok(0)
    }

    fn write(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.reach(offset, data.len() as u64)?;
        self.file
            .as_ref()
            .map_or(Ok(()), |file| file.write_all_at(data, offset))
    }

    fn file(&self) -> Option<&File> {
        self.unspliced.as_ref()
    }

    fn trim(&self, range: Range) -> io::Result<()> {
        self.reach(range.offset, range.length)
    }

    fn zero(&self, range: Range, _no_hole: bool, _fast: bool) -> io::Result<()> {
        self.reach(range.offset, range.length)
    }

    fn cache(&self, range: Range) -> io::Result<()> {
        self.reach(range.offset, range.length)
    }

    fn extents(&self, range: Range, _most: usize) -> Vec<Extent> {
        let length = range.length;
        vec![Extent { length, state: 0 }]
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_bad_place_is_an_error_there_and_nowhere_else() {
    let bad = 5 << 20;
    let fixture = Fixture::of_store(Arc::new(Dying {
        bad: bad..bad + 4096,
        ..Dying::default()
    }));
    let mut errors = 0;
    for mut client in [fixture.client(), fixture.simple_client(), fixture.extended_client()] {
        // Over it, of each size that goes another way through the server; and right beside it.
        for (offset, length) in [
            (bad, 512),
            (bad - 4096, 8192),
            (bad - 100_000, 300_000),
            (4 << 20, 3 * MIB),
        ] {
            let answer = client.ask(CMD_READ, 0, offset, length, &[]);
            assert_eq!(answer, Answer::Error(Errno::Io), "{offset} {length}");
            errors += 1;
        }
        assert!(client.read(bad - 4096, 4096).iter().all(|&byte| byte == 7));
        assert_eq!(client.read(bad + 4096, 3 * MIB).len(), 3 << 20);
        assert_eq!(client.ask(CMD_WRITE, 0, bad, 512, &[1; 512]), Answer::Error(Errno::Io));
        client.write(bad + 4096, &[1; 512]);
        errors += 1;
    }
    assert_eq!(fixture.export.stats().errors, errors);
}

/// After the first chunk's head, when nothing but data can follow.
#[test]
fn an_error_in_the_middle_of_an_unbroken_read_is_told_where_it_can_be() {
    let tiring = Arc::new(Dying::default());
    let fixture = Fixture::of_store(Arc::clone(&tiring) as Arc<dyn Store>);
    for mut client in [fixture.client(), fixture.extended_client()] {
        // All 256 KiB are read once to see whether they can be, then the first of them again.
        tiring.tires.store(16 + 3, Ordering::SeqCst);
        let answer = client.ask(CMD_READ, CMD_FLAG_DF, 0, 4 * MIB, &[]);
        assert_eq!(answer, Answer::Error(Errno::Io));
        tiring.tires.store(0, Ordering::SeqCst);
        assert_eq!(
            client.ask(CMD_READ, CMD_FLAG_DF, 0, 4 * MIB, &[]),
            Answer::Data(0, vec![7; 4 << 20])
        );
    }
    let mut simple = fixture.simple_client();
    tiring.tires.store(16 + 3, Ordering::SeqCst);
    simple.send(CMD_READ, 0, 0, 4 * MIB, &[]);
    let mut said = Vec::new();
    std::io::Read::read_to_end(&mut simple.stream, &mut said).unwrap();
    assert!(said.len() < 4 << 20, "closed before the end");
}

#[test]
fn long_reads_are_answered_also_where_the_file_system_has_no_splice() {
    let fixture = Fixture::of_store(Arc::new(Dying {
        // The kernel refuses to splice from a directory as from a file that cannot be spliced: EINVAL.
        unspliced: Some(File::open("/").unwrap()),
        ..Dying::default()
    }));
    for mut client in [fixture.client(), fixture.simple_client(), fixture.extended_client()] {
        for length in [MIB, 300_000, 3 * MIB] {
            assert_eq!(client.read(777, length), vec![7; length as usize]);
        }
    }
}

#[test]
fn long_writes_arrive_whole_wherever_they_begin() {
    let file = tempfile::tempfile().unwrap();
    let fixture = Fixture::of_store(Arc::new(Dying {
        file: Some(file.try_clone().unwrap()),
        ..Dying::default()
    }));
    let mut client = fixture.client();
    let data: Vec<u8> = (0..3 * MIB + 777).map(|at| at.to_le_bytes()[1]).collect();
    for offset in [0, 5 << 20, (9 << 20) + 13] {
        client.write(offset, &data);
        let mut arrived = vec![0; data.len()];
        file.read_exact_at(&mut arrived, offset).unwrap();
        assert!(arrived == data, "at {offset}");
    }
}

/// Two exports by their names.
struct Two([Arc<Export>; 2]);

impl Gate for Two {
    fn admit(&self, _peer: SocketAddr) -> bool {
        true
    }

    fn export(&self, name: &str, _peer: SocketAddr) -> Option<Arc<Export>> {
        self.0.iter().find(|export| export.name() == name).cloned()
    }

    fn list(&self, _peer: SocketAddr) -> Vec<Listed> {
        Vec::new()
    }
}

fn client(address: SocketAddr, name: &str) -> Client {
    let mut client = Client::connect(address);
    let request = InfoRequest {
        name: name.into(),
        wanted: vec![],
    };
    let replies = client.option(OPT_GO, &request.encode().unwrap());
    assert_eq!(replies.last().unwrap().0, REP_ACK);
    client
}

#[test]
fn a_disk_that_does_not_answer_holds_no_other_disk() {
    let dead = Arc::new(Dying {
        hangs: Mutex::new(true),
        ..Dying::default()
    });
    let export = |name: &str, store: Arc<dyn Store>| {
        let options = ExportOptions {
            name: name.into(),
            ..ExportOptions::default()
        };
        Export::of(store, std::path::Path::new("store"), options).unwrap()
    };
    let two = [
        export("dead", Arc::clone(&dead) as Arc<dyn Store>),
        export("alive", Arc::new(Dying::default())),
    ];
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let server = Server::start(listener, Arc::new(Two(two.clone())), Limits::default()).unwrap();
    // More requests than a connection has threads, on several connections.
    let mut stuck: Vec<Client> = (0..4).map(|_| client(address, "dead")).collect();
    for client in &mut stuck {
        for number in 0..40 {
            client.send(CMD_READ, 0, number * 4096, 4096, &[]);
        }
    }
    let mut other = client(address, "alive");
    for number in 0..100 {
        assert_eq!(other.read(number * 4096, 4096).len(), 4096);
    }
    assert_eq!(other.read(0, 8 * MIB).len(), 8 << 20);
    // It is taken back within the time that was given, and said so; the other one goes on.
    let begun = Instant::now();
    let dropped = server.drop_export(&two[0], Duration::from_millis(300));
    assert!(matches!(dropped, Err(DropError::StillRunning { .. })), "{dropped:?}");
    assert!(begun.elapsed() < PATIENCE);
    assert_eq!(other.read(0, 4096).len(), 4096);
    dead.wake();
    server.drop_connections(PATIENCE).unwrap();
}
