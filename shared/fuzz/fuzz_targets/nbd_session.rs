//! A whole session as the server's pure layers see it: the negotiation, then requests, checked against what was agreed on.
//! The server's own modules are taken in by path, without the rest of the server.

#![no_main]
#![allow(dead_code, missing_docs)]

use std::io::{self, Read, Write};

use libfuzzer_sys::fuzz_target;
use stiefel_shared::nbd::{
    Asked, BlockSizes, CMD_READ, CMD_WRITE, EXTENDED_REQUEST_LEN, FLAG_HAS_FLAGS, FLAG_READ_ONLY, FLAG_SEND_CACHE,
    FLAG_SEND_FAST_ZERO, FLAG_SEND_FLUSH, FLAG_SEND_FUA, FLAG_SEND_TRIM, FLAG_SEND_WRITE_ZEROES, GREETING_LEN,
    REQUEST_LEN, Request, parse_greeting,
};

#[path = "../../../server/src/nbd/negotiate.rs"]
mod negotiate;
#[path = "../../../server/src/nbd/request.rs"]
mod request;

use negotiate::{Catalogue, Listed, Offer, Offered, Style};
use request::Command;

/// More than any answer to the options that one client may send.
const MOST_SAID: usize = 4 << 20;

struct Stream<'a> {
    said: &'a [u8],
    heard: Vec<u8>,
}

impl Read for Stream<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.said.read(buffer)
    }
}

impl Write for Stream<'_> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.heard.write(data)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// An export, to be written or only to be read.
struct Disk {
    read_only: bool,
}

impl Offered for Disk {
    fn offer(&self) -> Offer {
        let writes = FLAG_SEND_TRIM | FLAG_SEND_WRITE_ZEROES | FLAG_SEND_FAST_ZERO;
        let more = if self.read_only { FLAG_READ_ONLY } else { writes };
        Offer {
            name: "disk".into(),
            description: "words".into(),
            size: 1 << 20,
            flags: FLAG_HAS_FLAGS | FLAG_SEND_FLUSH | FLAG_SEND_FUA | FLAG_SEND_CACHE | more,
            block_sizes: BlockSizes {
                minimum: 512,
                preferred: 4096,
                maximum: 32 << 20,
            },
        }
    }
}

struct Shelf;

impl Catalogue for Shelf {
    type Export = Disk;

    fn export(&self, name: &str) -> Option<Disk> {
        let read_only = name == "ro";
        (read_only || matches!(name, "" | "disk")).then_some(Disk { read_only })
    }

    fn look(&self, name: &str) -> Option<Disk> {
        self.export(name)
    }

    fn list(&self) -> Vec<Listed> {
        vec![Listed {
            name: "disk".into(),
            description: "words".into(),
        }]
    }

    fn closing(&self) -> bool {
        false
    }
}

fuzz_target!(|data: &[u8]| {
    let mut stream = Stream {
        said: data,
        heard: Vec::new(),
    };
    let agreed = negotiate::run(&mut stream, &Shelf);
    let greeting = stream
        .heard
        .first_chunk::<GREETING_LEN>()
        .expect("a greeting comes first");
    assert!(parse_greeting(greeting).is_ok() && stream.heard.len() < MOST_SAID);
    let Ok(Some(agreed)) = agreed else { return };
    let (bounds, mut rest) = (agreed.bounds, stream.said);
    assert_eq!(bounds.flags & FLAG_READ_ONLY != 0, agreed.export.read_only);
    loop {
        let (asked, length) = if agreed.style == Style::Extended {
            (rest.first_chunk().map(Asked::parse_extended), EXTENDED_REQUEST_LEN)
        } else {
            (
                rest.first_chunk().map(|head| Request::parse(head).map(Asked::from)),
                REQUEST_LEN,
            )
        };
        let Some(Ok(asked)) = asked else { return };
        rest = &rest[length..];
        let range = match request::validate(&asked, &bounds) {
            Ok(Command::Disconnect) => return,
            Ok(Command::Read { range, .. } | Command::Cache(range) | Command::BlockStatus { range, .. }) => Some(range),
            Ok(Command::Write { range, .. } | Command::Trim { range, .. } | Command::WriteZeroes { range, .. }) => {
                assert!(!agreed.export.read_only, "nothing is written that is read-only");
                Some(range)
            }
            Ok(Command::Flush) | Err(_) => None,
        };
        if let Some(range) = range {
            assert!(range.length > 0 && range.offset + range.length <= bounds.size);
            assert!((range.offset | range.length) % u64::from(bounds.minimum) == 0);
            let carries = matches!(asked.command, CMD_READ | CMD_WRITE);
            assert!(!carries || range.length <= u64::from(bounds.maximum));
        }
        // Its payload is passed over, as far as there is one.
        let payload = usize::try_from(asked.payload).unwrap_or(usize::MAX);
        rest = rest.get(payload..).unwrap_or_default();
    }
});
