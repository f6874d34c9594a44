//! The NBD server against hostile, broken and slow clients: what each phase allows, and that nobody else suffers.
#![allow(clippy::unwrap_used)]

mod nbd_support;

use std::io::{self, IoSlice, IoSliceMut, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nbd_support::{Answer, Client, Fixture, PATIENCE, is_closed};
use proptest::prelude::*;
use stiefel_server::nbd::{ExportOptions, Limits, Range, Server, Store, Traits};
use stiefel_shared::nbd::*;

const MIB: u32 = 1 << 20;

/// Waits until the server has no connection any more.
fn all_are_gone(server: &Server) -> bool {
    let begun = Instant::now();
    while server.connections() > 0 && begun.elapsed() < PATIENCE {
        std::thread::sleep(Duration::from_millis(1));
    }
    server.connections() == 0
}

fn in_a_hurry() -> Fixture {
    let limits = Limits {
        negotiation: Duration::from_millis(300),
        ..Limits::default()
    };
    Fixture::with(4096, ExportOptions::default(), limits, true)
}

#[test]
fn a_client_that_never_reads_is_bounded_and_holds_nobody() {
    let fixture = Fixture::new(u64::from(64 * MIB));
    let mut greedy = fixture.client();
    for _ in 0..2000 {
        greedy.send(CMD_READ, 0, 0, MIB, &[]);
    }
    let mut other = fixture.client();
    for _ in 0..100 {
        assert_eq!(other.read(0, 4096).len(), 4096);
    }
    // At most one request per worker, and what the sockets take.
    assert!(fixture.export.stats().bytes_read < 200 << 20);
    fixture.server.drop_connections(PATIENCE).unwrap();
    assert_eq!(fixture.server.connections(), 0);
}

#[test]
fn connections_beyond_the_limit_are_closed() {
    let limits = Limits {
        connections: 2,
        ..Limits::default()
    };
    let fixture = Fixture::with(4096, ExportOptions::default(), limits, true);
    let mut first = fixture.client();
    let _second = fixture.client();
    assert!(is_closed(&mut Client::raw(fixture.address)));
    assert_eq!(first.read(0, 512).len(), 512);
}

#[test]
fn who_is_not_admitted_hears_nothing() {
    let fixture = Fixture::with(4096, ExportOptions::default(), Limits::default(), false);
    assert!(is_closed(&mut Client::raw(fixture.address)));
}

#[test]
fn a_negotiation_has_a_deadline() {
    let limits = Limits {
        negotiation: Duration::from_millis(100),
        ..Limits::default()
    };
    let fixture = Fixture::with(4096, ExportOptions::default(), limits, true);
    let mut silent = Client::connect(fixture.address);
    assert!(silent.is_closed());
}

#[test]
fn a_half_open_negotiation_ends_at_its_deadline_wherever_it_stopped() {
    let fixture = in_a_hurry();
    let info = InfoRequest {
        name: "disk".into(),
        wanted: vec![],
    };
    let go = encode_option(OPT_GO, &info.encode().unwrap()).unwrap();
    let long = OptionHeader {
        option: 77,
        len: 400_000,
    };
    let skipped = [&long.encode()[..], &[0; 99]].concat();
    // After the greeting, inside of a header, behind a header, and inside of data that are to be skipped.
    for said in [&go[..0], &go[..5], &go[..16], &skipped[..]] {
        let mut client = Client::connect(fixture.address);
        client.stream.write_all(said).unwrap();
        assert!(client.is_closed(), "{said:?}");
    }
    let mut mute = Client::raw(fixture.address);
    mute.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut greeting = [0; GREETING_LEN];
    io::Read::read_exact(&mut mute, &mut greeting).unwrap();
    assert!(is_closed(&mut mute));
    assert!(all_are_gone(&fixture.server));
}

#[test]
fn a_negotiation_in_small_steps_gets_no_more_time() {
    let fixture = in_a_hurry();
    let mut client = Client::connect(fixture.address);
    let begun = Instant::now();
    // Each option is answered, until the time is up.
    while client.stream.write_all(&encode_option(99, &[]).unwrap()).is_ok() && begun.elapsed() < PATIENCE {
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(begun.elapsed() < PATIENCE);
    assert!(all_are_gone(&fixture.server));
}

#[test]
fn a_client_that_takes_nothing_is_dropped_in_time() {
    let limits = Limits {
        peer_timeout: Duration::from_secs(1),
        ..Limits::default()
    };
    let fixture = Fixture::with(u64::from(64 * MIB), ExportOptions::default(), limits, true);
    let mut greedy = fixture.simple_client();
    for _ in 0..64 {
        greedy.send(CMD_READ, 0, 0, MIB, &[]);
    }
    assert!(all_are_gone(&fixture.server));
}

#[test]
fn a_payload_that_never_comes_holds_nobody() {
    let fixture = Fixture::new(u64::from(8 * MIB));
    // A small one, one that goes straight to the file, and one that is longer than anything that is held.
    let mut halves: Vec<Client> = [4096, 256 << 10, 4 * MIB]
        .into_iter()
        .map(|length| {
            let mut client = fixture.client();
            client.send(CMD_WRITE, 0, 0, length, &[7; 100]);
            client
        })
        .collect();
    let mut other = fixture.client();
    other.write(u64::from(4 * MIB), &[9; 512]);
    assert_eq!(other.ask(CMD_FLUSH, 0, 0, 0, &[]), Answer::Done);
    fixture.server.drop_connections(PATIENCE).unwrap();
    assert!(halves.iter_mut().all(Client::is_closed));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
    /// Whatever a client sends in whichever phase, the others are served, and its connection ends with it.
    #[test]
    fn no_bytes_of_a_hostile_client_harm_the_others(
        phase in 0..4,
        requests in proptest::collection::vec((any::<u16>(), 0_u16..10, 0_u64..70_000, any::<u32>(), any::<bool>()), 0..20),
        noise in proptest::collection::vec(any::<u8>(), 0..300),
    ) {
        let fixture = Fixture::new(65_536);
        let mut other = fixture.simple_client();
        let mut hostile = match phase {
            0 => Client::raw(fixture.address),
            1 => Client::connect(fixture.address).stream,
            2 => fixture.client().stream,
            _ => fixture.extended_client().stream,
        };
        for (flags, command, offset, length, short) in requests {
            let length = if short { length % 70_000 } else { length };
            let request = Request { flags: flags & 0x3f, command, cookie: 1, offset, length };
            let bytes = match phase {
                3 => Asked::from(request).encode_extended().to_vec(),
                _ => request.encode().to_vec(),
            };
            // The server may have closed the connection already.
            let _ = hostile.write_all(&bytes);
        }
        let _ = hostile.write_all(&noise);
        prop_assert_eq!(other.read(0, 512).len(), 512);
        drop(hostile);
        fixture.server.drop_connections(PATIENCE).unwrap();
        // One that was not accepted yet is not dropped, but ends by itself: its client is gone.
        prop_assert!(all_are_gone(&fixture.server));
    }
}

/// A medium whose every call fails in one way.
#[derive(Debug)]
struct Failing(io::ErrorKind);

impl Failing {
    fn fail<T>(&self) -> io::Result<T> {
        Err(self.0.into())
    }
}

impl Store for Failing {
    fn size(&self) -> u64 {
        1 << 30
    }

    fn traits(&self) -> Traits {
        Traits {
            block: 1,
            discards: true,
            rotational: false,
        }
    }

    fn read_now(&self, _parts: &mut [IoSliceMut<'_>], _offset: u64) -> usize {
        0
    }

    fn read(&self, _data: &mut [u8], _offset: u64) -> io::Result<()> {
        self.fail()
    }

    fn write_now(&self, _parts: &[IoSlice<'_>], _offset: u64) -> io::Result<usize> {
        self.fail()
    }

    fn write(&self, _data: &[u8], _offset: u64) -> io::Result<()> {
        self.fail()
    }

    fn trim(&self, _range: Range) -> io::Result<()> {
        self.fail()
    }

    fn zero(&self, _range: Range, _no_hole: bool, _fast: bool) -> io::Result<()> {
        self.fail()
    }

    fn cache(&self, _range: Range) -> io::Result<()> {
        self.fail()
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
fn each_error_of_the_medium_is_told_as_what_it_is_in_each_form_of_reply() {
    for (kind, errno) in [
        (io::ErrorKind::StorageFull, Errno::NoSpc),
        (io::ErrorKind::QuotaExceeded, Errno::NoSpc),
        (io::ErrorKind::Unsupported, Errno::NotSup),
        (io::ErrorKind::OutOfMemory, Errno::NoMem),
        (io::ErrorKind::Other, Errno::Io),
    ] {
        let fixture = Fixture::of_store(Arc::new(Failing(kind)));
        for mut client in [fixture.client(), fixture.simple_client(), fixture.extended_client()] {
            for (command, flags, length) in [
                (CMD_READ, 0, 512),
                (CMD_READ, 0, 300_000),
                (CMD_READ, 0, 3 * MIB),
                (CMD_WRITE, 0, 512),
                (CMD_WRITE, CMD_FLAG_FUA, 512),
                (CMD_WRITE, 0, 300_000),
                (CMD_WRITE, CMD_FLAG_FUA, 3 * MIB),
                (CMD_TRIM, 0, 512),
                (CMD_CACHE, 0, 512),
                (CMD_WRITE_ZEROES, CMD_FLAG_FAST_ZERO, 512),
                (CMD_WRITE_ZEROES, CMD_FLAG_NO_HOLE, 512),
            ] {
                let payload = vec![3; if command == CMD_WRITE { length as usize } else { 0 }];
                let answer = client.ask(command, flags, 0, length, &payload);
                assert_eq!(answer, Answer::Error(errno), "{kind:?} {command} {flags} {length}");
            }
            // The connection is in step after all that.
            assert_eq!(client.ask(CMD_FLUSH, 0, 0, 0, &[]), Answer::Done);
        }
    }
}
