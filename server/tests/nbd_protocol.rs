//! The NBD server over loopback: every answer and every error of the transmission phase.
#![allow(clippy::unwrap_used)]

mod nbd_support;

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::TcpStream;

use nbd_support::{Answer, Client, Fixture, PATIENCE};
use proptest::prelude::*;
use stiefel_server::nbd::{DropError, ExportError, ExportOptions, Limits};
use stiefel_shared::nbd::*;

const MIB: u32 = 1 << 20;

fn blocks_of(block_size: u32) -> ExportOptions {
    ExportOptions {
        block_size: Some(block_size),
        ..ExportOptions::default()
    }
}

#[test]
fn what_is_written_is_read_back_and_is_in_the_file() {
    let fixture = Fixture::new(u64::from(8 * MIB));
    let data: Vec<u8> = (0..3 * MIB).map(|i| (i % 251) as u8).collect();
    for mut client in [fixture.client(), fixture.simple_client()] {
        client.write(12345, &data);
        assert_eq!(client.read(12345, 3 * MIB), data);
        assert_eq!(client.ask(CMD_FLUSH, 0, 0, 0, &[]), Answer::Done);
    }
    let file = std::fs::read(fixture.file().path()).unwrap();
    assert!(file[12345..][..data.len()] == data);
    assert!(file[..12345].iter().all(|byte| *byte == 0));
    let stats = fixture.export.stats();
    assert_eq!(
        (stats.bytes_written, stats.bytes_read),
        (2 * data.len() as u64, 2 * data.len() as u64)
    );
    assert_eq!((stats.requests, stats.errors), (6, 0));
}

/// Asks, expects this error, and that the connection is still in step.
fn expect_error(client: &mut Client, command: u16, flags: u16, offset: u64, length: u32, errno: Errno) {
    let payload = if command == CMD_WRITE {
        vec![0xee; length as usize]
    } else {
        vec![]
    };
    let got = client.ask(command, flags, offset, length, &payload);
    assert_eq!(got, Answer::Error(errno), "{command} {flags} {offset} {length}");
    assert_eq!(client.read(0, 512), vec![0; 512]);
}

#[test]
fn each_wrong_request_gets_its_error_and_the_connection_goes_on() {
    let size = u64::from(64 * MIB);
    let fixture = Fixture::with(size, blocks_of(512), Limits::default(), true);
    let mut client = fixture.client();
    for (command, flags, offset, length, errno) in [
        (CMD_READ, 0, size - 512, 1024, Errno::Inval),
        (CMD_TRIM, 0, size, 512, Errno::Inval),
        (CMD_CACHE, 0, size, 512, Errno::Inval),
        (CMD_WRITE, 0, size - 512, 1024, Errno::NoSpc),
        (CMD_WRITE, 0, u64::MAX - 511, 512, Errno::NoSpc),
        (CMD_WRITE_ZEROES, 0, size, 512, Errno::NoSpc),
        (CMD_READ, 0, 1, 512, Errno::Inval),
        (CMD_WRITE, 0, 0, 511, Errno::Inval),
        (CMD_READ, 0, 0, 0, Errno::Inval),
        (CMD_WRITE, 0, 0, 0, Errno::Inval),
        (CMD_READ, 0, 0, MAX_PAYLOAD + 512, Errno::Overflow),
        (CMD_WRITE, 0, 0, MAX_PAYLOAD + 512, Errno::Inval),
        (CMD_READ, CMD_FLAG_NO_HOLE, 0, 512, Errno::Inval),
        (CMD_WRITE, 1 << 9, 0, 512, Errno::Inval),
        (CMD_FLUSH, 0, 512, 0, Errno::Inval),
        (CMD_BLOCK_STATUS, 0, 0, 512, Errno::Inval),
        (CMD_RESIZE, 0, 0, 512, Errno::Inval),
        (4711, 0, 0, 512, Errno::Inval),
    ] {
        expect_error(&mut client, command, flags, offset, length, errno);
    }
    assert_eq!(fixture.export.stats().errors, 18);
    // DF was not offered to who has no structured replies, and block sizes bind only those who were told.
    let mut simple = fixture.simple_client();
    expect_error(&mut simple, CMD_READ, CMD_FLAG_DF, 0, 512, Errno::Inval);
    simple.write(1001, b"odd");
    assert_eq!(simple.read(1000, 5), b"\0odd\0");
}

#[test]
fn every_writing_command_is_eperm_on_a_read_only_export() {
    let options = ExportOptions {
        read_only: true,
        ..ExportOptions::default()
    };
    let fixture = Fixture::with(4096, options, Limits::default(), true);
    let mut client = fixture.client();
    for command in [CMD_WRITE, CMD_TRIM, CMD_WRITE_ZEROES] {
        expect_error(&mut client, command, 0, 0, 512, Errno::Perm);
        expect_error(&mut client, command, CMD_FLAG_FUA, 0, 512, Errno::Perm);
    }
    assert_eq!(client.ask(CMD_FLUSH, 0, 0, 0, &[]), Answer::Done);
    assert_eq!(client.read(0, 4096), vec![0; 4096]);
}

#[test]
fn a_medium_that_lost_its_data_is_eio() {
    let fixture = Fixture::new(8192);
    let mut client = fixture.client();
    fixture.file().as_file().set_len(1024).unwrap();
    assert_eq!(client.ask(CMD_READ, 0, 4096, 512, &[]), Answer::Error(Errno::Io));
    assert_eq!(client.read(0, 512), vec![0; 512]);
}

#[test]
fn broken_framing_closes_the_connection() {
    let fixture = Fixture::new(8192);
    let mut client = fixture.client();
    client.stream.write_all(&[0x55; REQUEST_LEN]).unwrap();
    assert!(client.is_closed());
}

#[test]
fn disconnect_answers_what_is_outstanding_and_closes() {
    let fixture = Fixture::new(8192);
    let mut client = fixture.client();
    let first = client.send(CMD_READ, 0, 0, 512, &[]);
    client.send(CMD_DISC, 0, 0, 0, &[]);
    assert_eq!(client.answer(512), (first, Answer::Data(0, vec![0; 512])));
    assert!(client.is_closed());
}

#[test]
fn zeroes_trims_and_cache_work_with_all_their_flags() {
    let fixture = Fixture::new(u64::from(4 * MIB));
    let mut client = fixture.client();
    for flags in [
        0,
        CMD_FLAG_NO_HOLE,
        CMD_FLAG_FAST_ZERO,
        CMD_FLAG_FUA,
        CMD_FLAG_NO_HOLE | CMD_FLAG_FUA,
    ] {
        client.write(0, &vec![9; MIB as usize]);
        match client.ask(CMD_WRITE_ZEROES, flags, 4096, 100_000, &[]) {
            Answer::Done => assert_eq!(
                client.read(4000, 100_100),
                [vec![9; 96], vec![0; 100_000], vec![9; 4]].concat()
            ),
            // Only where the file system of the tests has no holes.
            Answer::Error(Errno::NotSup) if flags & CMD_FLAG_FAST_ZERO != 0 => {}
            other => panic!("{flags}: {other:?}"),
        }
    }
    assert_eq!(client.ask(CMD_WRITE, CMD_FLAG_FUA, 0, 3, b"fua"), Answer::Done);
    assert_eq!(client.ask(CMD_TRIM, CMD_FLAG_FUA, 0, MIB, &[]), Answer::Done);
    assert_eq!(client.ask(CMD_CACHE, 0, 0, 4 * MIB, &[]), Answer::Done);
    assert_eq!(
        client.ask(CMD_READ, CMD_FLAG_DF, 0, 4096, &[]),
        Answer::Data(0, vec![0; 4096])
    );
}

#[test]
fn block_status_shows_holes_to_who_selected_the_context() {
    let fixture = Fixture::new(u64::from(4 * MIB));
    let mut client = Client::connect(fixture.address);
    client.option(OPT_STRUCTURED_REPLY, &[]);
    client.structured = true;
    let meta = MetaRequest {
        name: "disk".into(),
        queries: vec!["x-other:y".into(), BASE_ALLOCATION.into()],
    };
    let replies = client.option(OPT_SET_META_CONTEXT, &meta.encode().unwrap());
    assert_eq!(parse_meta_context(&replies[0].1).unwrap(), (1, BASE_ALLOCATION.into()));
    client.go(&[]);
    client.write(u64::from(MIB), &vec![1; MIB as usize]);
    let hole = |length: u32| Extent {
        length: length.into(),
        state: STATE_HOLE | STATE_ZERO,
    };
    let status = client.ask(CMD_BLOCK_STATUS, 0, 0, 4 * MIB, &[]);
    assert_eq!(
        status,
        Answer::Status(vec![
            hole(MIB),
            Extent {
                length: MIB.into(),
                state: 0
            },
            hole(2 * MIB)
        ])
    );
    assert_eq!(
        client.ask(CMD_BLOCK_STATUS, CMD_FLAG_REQ_ONE, 0, 4096, &[]),
        Answer::Status(vec![hole(4096)])
    );
}

#[test]
fn long_structured_reads_come_in_chunks_with_holes_unless_df_forbids() {
    let fixture = Fixture::new(u64::from(8 * MIB));
    let mut client = fixture.client();
    client.write(u64::from(2 * MIB), &vec![7; MIB as usize]);
    let expected = [
        vec![0; 2 * MIB as usize],
        vec![7; MIB as usize],
        vec![0; 5 * MIB as usize],
    ]
    .concat();
    assert!(client.read(0, 8 * MIB) == expected);
    assert_eq!(client.holes, 2);
    assert!(client.parts > 4, "data come in pieces");
    (client.parts, client.holes) = (0, 0);
    let whole = client.ask(CMD_READ, CMD_FLAG_DF, 0, 8 * MIB, &[]);
    assert!(whole == Answer::Data(0, expected.clone()));
    assert_eq!((client.parts, client.holes), (1, 0));
    assert!(fixture.simple_client().read(0, 8 * MIB) == expected);
    // Unaligned, and longer than a pipe holds.
    for (offset, length) in [(1, 2 * MIB), (2 * MIB - 3, MIB), (4095, MIB + 2), (2 * MIB + 1, 70_000)] {
        for mut client in [fixture.client(), fixture.simple_client(), fixture.extended_client()] {
            let part = &expected[offset as usize..][..length as usize];
            assert!(client.read(u64::from(offset), length) == part, "{offset} {length}");
        }
    }
}

#[test]
fn extended_headers_serve_everything_and_ranges_of_64_bits() {
    let size = 6 << 30;
    let fixture = Fixture::new(size);
    let mut client = fixture.extended_client();
    client.write(size - 5, b"hello");
    client.write(0, &vec![3; 3 * MIB as usize]);
    assert_eq!(client.read(size - 6, 6), b"\0hello");
    assert!(client.read(0, 3 * MIB) == vec![3; 3 * MIB as usize]);
    let whole = Asked {
        flags: 0,
        command: CMD_BLOCK_STATUS,
        cookie: 9,
        offset: 1 << 30,
        length: (5 << 30) - 4096,
        payload: 0,
    };
    let hole = Extent {
        length: whole.length,
        state: STATE_HOLE | STATE_ZERO,
    };
    assert_eq!(client.ask_extended(whole), Answer::Status(vec![hole]));
    let zeroes = Asked {
        command: CMD_WRITE_ZEROES,
        offset: 0,
        length: size,
        ..whole
    };
    assert_eq!(client.ask_extended(zeroes), Answer::Done);
    assert_eq!(client.read(size - 6, 6), [0; 6]);
    // A write without payload, reads and writes that are too long, a payload that nobody asked for.
    for (command, flags, length, errno) in [
        (CMD_WRITE, 0, 512, Errno::Inval),
        (CMD_READ, 0, 1 << 33, Errno::Overflow),
        (CMD_TRIM, 0, 1 << 60, Errno::Inval),
    ] {
        let asked = Asked {
            command,
            flags,
            length,
            ..whole
        };
        assert_eq!(client.ask_extended(asked), Answer::Error(errno));
    }
    assert_eq!(client.ask(CMD_FLUSH, 0, 0, 0, &[]), Answer::Done);
    let trim = Asked {
        command: CMD_TRIM,
        flags: CMD_FLAG_PAYLOAD_LEN,
        length: 3,
        ..whole
    };
    client
        .stream
        .write_all(&[&trim.encode_extended()[..], b"abc"].concat())
        .unwrap();
    assert_eq!(client.answer(0).1, Answer::Error(Errno::Inval));
    assert_eq!(client.read(0, 1), [0]);
    // A payload that would never end, or was not meant to be one.
    let endless = Asked {
        length: 1 << 33,
        ..trim
    };
    client.stream.write_all(&endless.encode_extended()).unwrap();
    assert!(client.is_closed());
}

#[test]
fn neighbouring_small_requests_in_one_batch_each_get_their_answer() {
    let fixture = Fixture::new(u64::from(MIB));
    for mut client in [fixture.client(), fixture.simple_client(), fixture.extended_client()] {
        let mut batch = Vec::new();
        let extended = client.extended;
        let mut put = |command, cookie: u64, offset: u64, payload: &[u8]| {
            let request = Request {
                flags: 0,
                command,
                cookie,
                offset,
                length: 1000,
            };
            let mut asked = Asked::from(request);
            if extended {
                asked.flags = if payload.is_empty() { 0 } else { CMD_FLAG_PAYLOAD_LEN };
                batch.extend_from_slice(&asked.encode_extended());
            } else {
                batch.extend_from_slice(&request.encode());
            }
            batch.extend_from_slice(payload);
        };
        for index in 0..100_u64 {
            put(CMD_WRITE, index, index * 1000, &[index.to_le_bytes()[0]; 1000]);
        }
        client.stream.write_all(&batch).unwrap();
        let mut done: Vec<_> = (0..100).map(|_| client.answer(0)).collect();
        done.sort_by_key(|(cookie, _)| *cookie);
        assert!(
            done.iter()
                .zip(0..)
                .all(|((cookie, answer), index)| *cookie == index && *answer == Answer::Done)
        );
        batch = Vec::new();
        for index in 0..100_u64 {
            let request = Request {
                flags: 0,
                command: CMD_READ,
                cookie: index,
                offset: index * 1000,
                length: 1000,
            };
            if extended {
                batch.extend_from_slice(&Asked::from(request).encode_extended());
            } else {
                batch.extend_from_slice(&request.encode());
            }
        }
        client.stream.write_all(&batch).unwrap();
        for _ in 0..100 {
            let (cookie, answer) = client.answer(1000);
            let Answer::Data(_, data) = answer else {
                panic!("{answer:?}")
            };
            assert_eq!(data, [cookie.to_le_bytes()[0]; 1000]);
        }
    }
}

#[test]
fn a_writer_has_the_file_alone_and_readers_share_it() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let open = |read_only| {
        stiefel_server::nbd::Export::open(
            file.path(),
            ExportOptions {
                read_only,
                ..ExportOptions::default()
            },
        )
    };
    let writer = open(false).unwrap();
    assert!(matches!(open(true), Err(ExportError::InUse { .. })));
    assert!(matches!(open(false), Err(ExportError::InUse { .. })));
    drop(writer);
    let readers = [open(true).unwrap(), open(true).unwrap()];
    assert!(matches!(open(false), Err(ExportError::InUse { .. })));
    drop(readers);
    open(false).unwrap();
}

#[test]
fn many_requests_of_one_connection_all_get_their_own_answer() {
    let fixture = Fixture::new(u64::from(MIB));
    let mut client = fixture.client();
    client.write(0, &(0..MIB).map(|i| (i / 512).to_le_bytes()[0]).collect::<Vec<_>>());
    let mut open: HashMap<u64, u32> = (0..1000)
        .map(|i| (client.send(CMD_READ, 0, u64::from(i % 2048) * 512, 512, &[]), i))
        .collect();
    while !open.is_empty() {
        let (cookie, answer) = client.answer(512);
        let index = open.remove(&cookie).unwrap();
        let expected = vec![index.to_le_bytes()[0]; 512];
        assert_eq!(answer, Answer::Data(u64::from(index) * 512, expected));
    }
}

#[test]
fn dropped_connections_are_gone_and_new_ones_are_let_in() {
    let fixture = Fixture::new(u64::from(MIB));
    let mut clients = [
        fixture.client(),
        fixture.simple_client(),
        Client::connect(fixture.address),
    ];
    clients[0].write(0, b"kept");
    fixture.server.drop_connections(PATIENCE).unwrap();
    assert_eq!(fixture.server.connections(), 0);
    assert!(clients.iter_mut().all(Client::is_closed));
    // Nothing of the server holds the export any more: only the gate and this test do.
    assert_eq!(std::sync::Arc::strong_count(&fixture.export), 2);
    assert_eq!(fixture.client().read(0, 4), b"kept");
    let address = fixture.address;
    let stopped: Result<(), DropError> = fixture.server.stop(PATIENCE);
    stopped.unwrap();
    assert!(TcpStream::connect(address).is_err());
}

#[test]
fn after_a_drop_nothing_is_written_any_more() {
    let fixture = Fixture::new(u64::from(MIB));
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..4)
            .map(|_| {
                let mut client = fixture.simple_client();
                client.write(0, &[1; 4096]);
                // Until the server closes the connection; what it answers meanwhile is nobody's business here.
                scope.spawn(move || {
                    let request = Request {
                        flags: 0,
                        command: CMD_WRITE,
                        cookie: 0,
                        offset: 0,
                        length: 4096,
                    };
                    let message = [&request.encode()[..], &[2; 4096]].concat();
                    let mut reply = [0; SIMPLE_REPLY_LEN];
                    while client.stream.write_all(&message).is_ok() && client.stream.read_exact(&mut reply).is_ok() {}
                })
            })
            .collect();
        fixture.server.drop_connections(PATIENCE).unwrap();
        let written = fixture.export.stats().bytes_written;
        assert_eq!(std::sync::Arc::strong_count(&fixture.export), 2);
        assert!(writers.into_iter().all(|writer| writer.join().is_ok()));
        assert_eq!(fixture.export.stats().bytes_written, written);
    });
}

#[test]
fn a_write_whose_payload_never_came_does_not_reach_the_file() {
    let fixture = Fixture::new(8192);
    let mut client = fixture.client();
    client.send(CMD_WRITE, 0, 0, 4096, &[7; 1000]);
    drop(client);
    fixture.server.drop_connections(PATIENCE).unwrap();
    assert_eq!(std::fs::read(fixture.file().path()).unwrap(), vec![0; 8192]);
}

#[derive(Debug, Clone)]
enum Step {
    Write(u32, u32, u8),
    Zero(u32, u32, bool),
    Flush,
    Check(u32, u32),
}

fn step() -> impl Strategy<Value = Step> {
    let range = || (0..200_000_u32, 1..20_000_u32);
    prop_oneof![
        (range(), any::<u8>()).prop_map(|((at, len), byte)| Step::Write(at, len, byte)),
        (range(), any::<bool>()).prop_map(|((at, len), keep)| Step::Zero(at, len, keep)),
        Just(Step::Flush),
        range().prop_map(|(at, len)| Step::Check(at, len)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
    /// Two connections in turn behave as one array of bytes.
    #[test]
    fn the_export_is_one_array_of_bytes(steps in proptest::collection::vec(step(), 1..40)) {
        let mut model = vec![0_u8; 220_000];
        let fixture = Fixture::new(model.len() as u64);
        let mut clients = [fixture.client(), fixture.simple_client()];
        for (turn, step) in steps.into_iter().enumerate() {
            let client = &mut clients[turn % 2];
            match step {
                Step::Write(at, len, byte) => {
                    model[at as usize..][..len as usize].fill(byte);
                    client.write(u64::from(at), &vec![byte; len as usize]);
                }
                Step::Zero(at, len, keep) => {
                    model[at as usize..][..len as usize].fill(0);
                    let flags = if keep { CMD_FLAG_NO_HOLE } else { 0 };
                    prop_assert_eq!(client.ask(CMD_WRITE_ZEROES, flags, u64::from(at), len, &[]), Answer::Done);
                }
                Step::Flush => prop_assert_eq!(client.ask(CMD_FLUSH, 0, 0, 0, &[]), Answer::Done),
                Step::Check(at, len) => {
                    prop_assert!(client.read(u64::from(at), len) == model[at as usize..][..len as usize]);
                }
            }
        }
        prop_assert!(std::fs::read(fixture.file().path()).unwrap() == model);
    }
}

#[test]
fn an_export_for_one_ends_the_earlier_connection_before_it_is_granted_again() {
    let options = ExportOptions {
        single: true,
        ..ExportOptions::default()
    };
    let fixture = Fixture::with(u64::from(MIB), options, Limits::default(), true);
    let mut old = fixture.client();
    old.write(0, &[1; 512]);
    let mut new = fixture.client();
    new.write(0, &[2; 512]);
    // What is still on its way through the old connection must not be done any more.
    let mut late = Request {
        flags: 0,
        command: CMD_WRITE,
        cookie: 7,
        offset: 0,
        length: 512,
    }
    .encode()
    .to_vec();
    late.extend_from_slice(&[1; 512]);
    let _ = old.stream.write_all(&late);
    assert!(old.is_closed());
    assert_eq!(new.read(0, 512), vec![2; 512]);
    let (_, flags) = Client::connect(fixture.address).go(&[]).export.unwrap();
    assert_eq!(flags & FLAG_CAN_MULTI_CONN, 0);
}
