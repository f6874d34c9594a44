use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::AtomicBool;

use stiefel_shared::nbd::{CMD_READ, CMD_WRITE, FLAG_HAS_FLAGS, MAX_PAYLOAD, Request, SimpleReply};

use super::*;
use crate::nbd::ExportOptions;
use crate::nbd::negotiate::Style;
use crate::nbd::request::Bounds;

#[test]
fn a_closing_connection_answers_eshutdown_and_writes_nothing() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(4096).unwrap();
    let export = Export::open(file.path(), ExportOptions::default()).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let peer = Arc::new(Peer {
        stream: listener.accept().unwrap().0,
        closing: AtomicBool::new(true),
    });
    let bounds = Bounds {
        size: 4096,
        flags: FLAG_HAS_FLAGS,
        minimum: 1,
        maximum: MAX_PAYLOAD,
        block_status: false,
        extended: false,
    };
    for (cookie, command) in [(1, CMD_WRITE), (2, CMD_READ)] {
        let request = Request {
            flags: 0,
            command,
            cookie,
            offset: 0,
            length: 512,
        };
        client.write_all(&request.encode()).unwrap();
        if command == CMD_WRITE {
            client.write_all(&[7; 512]).unwrap();
        }
    }
    client.shutdown(Shutdown::Write).unwrap();
    let agreed = Agreed {
        export,
        bounds,
        style: Style::Simple,
    };
    transmit(peer, &[], agreed, Arc::default(), (1, 0), Box::new(()));
    let mut heard = Vec::new();
    client.read_to_end(&mut heard).unwrap();
    let expected = [1, 2].map(|cookie| {
        SimpleReply {
            error: Errno::Shutdown.code(),
            cookie,
        }
        .encode()
    });
    assert_eq!(heard, expected.concat());
    assert_eq!(std::fs::read(file.path()).unwrap(), vec![0; 4096]);
}
