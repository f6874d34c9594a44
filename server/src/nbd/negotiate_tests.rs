use std::collections::VecDeque;

use proptest::prelude::*;
use stiefel_shared::nbd::{
    FLAG_HAS_FLAGS, GREETING_LEN, OPT_STARTTLS, OPTION_REPLY_HEADER_LEN, OptionReplyHeader, encode_option,
    parse_meta_context,
};

use super::*;

/// A client that has said all it will ever say, and the server's words to it.
#[derive(Default)]
struct Script {
    said: VecDeque<u8>,
    heard: Vec<u8>,
}

impl Read for Script {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.said.read(buffer)
    }
}

impl Write for Script {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.heard.write(data)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Disk;

impl Offered for Disk {
    fn offer(&self) -> Offer {
        Offer {
            name: "disk".into(),
            description: "words".into(),
            size: 0x1000,
            flags: FLAG_HAS_FLAGS,
            block_sizes: BlockSizes {
                minimum: 512,
                preferred: 4096,
                maximum: 1 << 25,
            },
        }
    }
}

/// Has one export, unless it is closing.
struct Shelf {
    closing: bool,
}

impl Catalogue for Shelf {
    type Export = Disk;

    fn export(&self, name: &str) -> Option<Disk> {
        (name == "disk").then_some(Disk)
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
        self.closing
    }
}

type Outcome = Result<Option<Agreed<Disk>>, NegotiationError>;

/// Says client flags and options, and returns the outcome and all bytes after the greeting.
fn say(flags: u32, options: &[(u32, &[u8])], closing: bool) -> (Outcome, Vec<u8>) {
    let mut script = Script {
        said: flags.to_be_bytes().into(),
        ..Script::default()
    };
    for (option, data) in options {
        script.said.extend(encode_option(*option, data).unwrap());
    }
    let outcome = run(&mut script, &Shelf { closing });
    assert_eq!(script.heard[..GREETING_LEN], encode_greeting());
    (outcome, script.heard.split_off(GREETING_LEN))
}

/// The replies among the server's words.
fn replies(mut heard: &[u8]) -> Vec<(u32, u32, Vec<u8>)> {
    let mut found = Vec::new();
    while let Some((header, rest)) = heard.split_first_chunk::<OPTION_REPLY_HEADER_LEN>() {
        let header = OptionReplyHeader::parse(header).unwrap();
        let (data, rest) = rest.split_at(header.len as usize);
        found.push((header.option, header.reply, data.to_vec()));
        heard = rest;
    }
    found
}

/// Types of the replies to one option of an open negotiation.
fn types(option: u32, data: &[u8]) -> Vec<u32> {
    let (outcome, heard) = say(3, &[(option, data)], false);
    assert!(
        matches!(outcome, Err(NegotiationError::Stream(_))),
        "still open when the script ends"
    );
    replies(&heard).into_iter().map(|(_, reply, _)| reply).collect()
}

fn info_of(name: &str, wanted: &[u16]) -> Vec<u8> {
    InfoRequest {
        name: name.into(),
        wanted: wanted.into(),
    }
    .encode()
    .unwrap()
}

fn meta_of(name: &str, queries: &[&str]) -> Vec<u8> {
    let queries = queries.iter().map(ToString::to_string).collect();
    MetaRequest {
        name: name.into(),
        queries,
    }
    .encode()
    .unwrap()
}

#[test]
fn clients_without_fixed_newstyle_or_with_unknown_flags_are_dropped() {
    for flags in [0, 2, 4, 7, 1 << 31] {
        let (outcome, heard) = say(flags, &[(OPT_LIST, b"")], false);
        assert!(matches!(outcome, Err(NegotiationError::Wire(_))), "{flags}");
        assert!(heard.is_empty());
    }
}

#[test]
fn go_tells_what_was_asked_and_begins_transmission() {
    let (outcome, heard) = say(
        3,
        &[(
            OPT_GO,
            &info_of("disk", &[INFO_NAME, INFO_DESCRIPTION, INFO_BLOCK_SIZE, 99]),
        )],
        false,
    );
    let agreed = outcome.unwrap().unwrap();
    assert_eq!(
        (agreed.bounds.size, agreed.bounds.minimum, agreed.style),
        (0x1000, 512, Style::Simple)
    );
    let expected = [
        (
            OPT_GO,
            REP_INFO,
            Info::Export {
                size: 0x1000,
                flags: FLAG_HAS_FLAGS,
            }
            .encode(),
        ),
        (OPT_GO, REP_INFO, Info::Name("disk".into()).encode()),
        (OPT_GO, REP_INFO, Info::Description("words".into()).encode()),
        (OPT_GO, REP_INFO, Info::BlockSize(Disk.offer().block_sizes).encode()),
        (OPT_GO, REP_ACK, vec![]),
    ];
    assert_eq!(replies(&heard), expected);
}

#[test]
fn info_answers_like_go_but_stays() {
    assert_eq!(types(OPT_INFO, &info_of("disk", &[])), [REP_INFO, REP_ACK]);
    assert_eq!(types(OPT_INFO, &info_of("other", &[])), [REP_ERR_UNKNOWN]);
    assert_eq!(types(OPT_GO, &info_of("other", &[])), [REP_ERR_UNKNOWN]);
    assert_eq!(types(OPT_GO, b"\0\0\0\x09x"), [REP_ERR_INVALID]);
}

#[test]
fn export_name_answers_with_or_without_zeroes_or_closes() {
    for (flags, zeroes) in [(1, 124), (3, 0)] {
        let (outcome, heard) = say(flags, &[(OPT_EXPORT_NAME, b"disk")], false);
        assert_eq!(outcome.unwrap().unwrap().bounds.minimum, 1);
        assert_eq!(
            heard,
            [&[0, 0, 0, 0, 0, 0, 0x10, 0, 0, 1][..], &vec![0; zeroes]].concat()
        );
    }
    for name in [&b"other"[..], &[b'a'; 4097], b"\xff"] {
        let (outcome, heard) = say(3, &[(OPT_EXPORT_NAME, name)], false);
        assert!(matches!(outcome, Err(NegotiationError::NoSuchExport)));
        assert!(heard.is_empty());
    }
}

#[test]
fn list_names_the_exports_and_takes_no_data() {
    let (_, heard) = say(3, &[(OPT_LIST, b"")], false);
    assert_eq!(
        replies(&heard)[0],
        (OPT_LIST, REP_SERVER, encode_listed("disk", "words"))
    );
    assert_eq!(types(OPT_LIST, b""), [REP_SERVER, REP_ACK]);
    assert_eq!(types(OPT_LIST, b"x"), [REP_ERR_INVALID]);
}

#[test]
fn tls_and_unknown_options_are_unsupported() {
    for option in [OPT_STARTTLS, 0, 4, 12, u32::MAX] {
        assert_eq!(types(option, b""), [REP_ERR_UNSUP], "{option}");
    }
}

#[test]
fn abort_is_acknowledged() {
    let (outcome, heard) = say(3, &[(OPT_ABORT, b"ignored")], false);
    assert!(outcome.unwrap().is_none());
    assert_eq!(replies(&heard), [(OPT_ABORT, REP_ACK, vec![])]);
}

#[test]
fn structured_replies_offer_df() {
    let go = info_of("disk", &[]);
    let (outcome, _) = say(3, &[(OPT_STRUCTURED_REPLY, b""), (OPT_GO, &go)], false);
    let agreed = outcome.unwrap().unwrap();
    assert!(agreed.style == Style::Structured && agreed.bounds.flags & FLAG_SEND_DF != 0);
    assert_eq!(types(OPT_STRUCTURED_REPLY, b"x"), [REP_ERR_INVALID]);
}

#[test]
fn contexts_need_structured_replies_and_hold_for_their_export_only() {
    let (go, set) = (info_of("disk", &[]), meta_of("disk", &[BASE_ALLOCATION]));
    assert_eq!(types(OPT_SET_META_CONTEXT, &set), [REP_ERR_INVALID]);
    let structured = (OPT_STRUCTURED_REPLY, &b""[..]);
    let chosen = |options: &[(u32, &[u8])]| {
        let (outcome, heard) = say(3, options, false);
        (outcome.unwrap().unwrap().bounds.block_status, replies(&heard))
    };
    let (selected, heard) = chosen(&[structured, (OPT_SET_META_CONTEXT, &set), (OPT_GO, &go)]);
    assert!(selected);
    assert_eq!(
        parse_meta_context(&heard[1].2).unwrap(),
        (ALLOCATION_CONTEXT, BASE_ALLOCATION.into())
    );
    // A later request replaces the selection, also when it fails; the wildcard selects nothing.
    for later in [
        meta_of("disk", &[]),
        meta_of("other", &[BASE_ALLOCATION]),
        meta_of("disk", &["base:"]),
        vec![1],
    ] {
        let (selected, _) = chosen(&[
            structured,
            (OPT_SET_META_CONTEXT, &set),
            (OPT_SET_META_CONTEXT, &later),
            (OPT_GO, &go),
        ]);
        assert!(!selected);
    }
}

#[test]
fn contexts_are_listed_by_query() {
    let count = |queries: &[&str]| {
        let list = meta_of("disk", queries);
        let (_, heard) = say(3, &[(OPT_STRUCTURED_REPLY, b""), (OPT_LIST_META_CONTEXT, &list)], false);
        replies(&heard)
            .iter()
            .filter(|(_, reply, _)| *reply == REP_META_CONTEXT)
            .count()
    };
    assert_eq!(count(&[]), 1);
    assert_eq!(count(&["base:"]), 1);
    assert_eq!(count(&[BASE_ALLOCATION, "base:"]), 1);
    assert_eq!(count(&["base:other", "qemu:dirty"]), 0);
}

#[test]
fn a_closing_server_says_so() {
    let (_, heard) = say(3, &[(OPT_GO, &info_of("disk", &[]))], true);
    assert_eq!(replies(&heard)[0].1, REP_ERR_SHUTDOWN);
    assert!(matches!(
        say(3, &[(OPT_EXPORT_NAME, b"disk")], true).0,
        Err(NegotiationError::NoSuchExport)
    ));
    assert!(matches!(say(3, &[(OPT_ABORT, b"")], true).0, Ok(None)));
}

#[test]
fn oversized_options_are_skipped_and_the_negotiation_goes_on() {
    let huge = vec![0; MAX_OPTION as usize + 1];
    let (outcome, heard) = say(3, &[(OPT_GO, &huge), (OPT_GO, &info_of("disk", &[]))], false);
    assert!(outcome.unwrap().is_some());
    assert_eq!(replies(&heard)[0].1, REP_ERR_TOO_BIG);
}

#[test]
fn endless_negotiations_are_cut_off() {
    let many = vec![(OPT_LIST, &b""[..]); MAX_OPTIONS as usize + 1];
    assert!(matches!(say(3, &many, false).0, Err(NegotiationError::TooMuch)));
    let huge = vec![0; MAX_OPTION as usize];
    let much = vec![(99, &huge[..]); 33];
    assert!(matches!(say(3, &much, false).0, Err(NegotiationError::TooMuch)));
}

#[test]
fn a_length_without_data_allocates_nothing() {
    let mut script = Script {
        said: 3_u32.to_be_bytes().into(),
        ..Script::default()
    };
    script.said.extend(
        OptionHeader {
            option: OPT_GO,
            len: u32::MAX,
        }
        .encode(),
    );
    assert!(matches!(
        run(&mut script, &Shelf { closing: false }),
        Err(NegotiationError::TooMuch)
    ));
}

#[test]
fn options_out_of_step_close_the_connection() {
    let mut script = Script {
        said: 3_u32.to_be_bytes().into(),
        ..Script::default()
    };
    script.said.extend([0x55; OPTION_HEADER_LEN]);
    assert!(matches!(
        run(&mut script, &Shelf { closing: false }),
        Err(NegotiationError::Wire(WireError::BadMagic { .. }))
    ));
}

proptest! {
    #[test]
    fn no_client_makes_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let mut script = Script { said: bytes.into(), ..Script::default() };
        let _ = run(&mut script, &Shelf { closing: false });
    }

    #[test]
    fn every_option_gets_one_final_reply(options in proptest::collection::vec((2_u32..14, proptest::collection::vec(0_u8..12, 0..40)), 1..20)) {
        let options: Vec<(u32, &[u8])> =
            options.iter().filter(|(option, _)| *option != OPT_ABORT).map(|(option, data)| (*option, &data[..])).collect();
        let (_, heard) = say(3, &options, false);
        let last: Vec<u32> = replies(&heard)
            .iter()
            .filter(|(_, reply, _)| *reply == REP_ACK || reply >> 31 == 1)
            .map(|(option, ..)| *option)
            .collect();
        prop_assert_eq!(last, options.iter().map(|(option, _)| *option).collect::<Vec<_>>());
    }
}
