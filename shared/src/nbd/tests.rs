use super::*;
use proptest::prelude::*;

fn hex(bytes: &[u8]) -> String {
    data_encoding::HEXLOWER.encode(bytes)
}

#[test]
fn greeting_bytes_are_pinned() {
    assert_eq!(hex(&encode_greeting()), "4e42444d4147494349484156454f50540003");
    assert_eq!(parse_greeting(&encode_greeting()), Ok(3));
    assert_eq!(hex(&encode_client_flags(3)), "00000003");
    assert_eq!(hex(&encode_client_flags(1)), "00000001");
}

#[test]
fn oldstyle_and_unfixed_servers_are_refused() {
    let mut oldstyle = encode_greeting();
    oldstyle[8..16].copy_from_slice(&0x0000_4202_8186_1253_u64.to_be_bytes());
    assert_eq!(parse_greeting(&oldstyle), Err(WireError::NotFixedNewstyle));
    let mut unfixed = encode_greeting();
    unfixed[17] = 2;
    assert_eq!(parse_greeting(&unfixed), Err(WireError::NotFixedNewstyle));
    assert_eq!(parse_greeting(b"SSH-2.0-OpenSSH_9."), Err(WireError::NotNbd));
}

#[test]
fn client_flags_must_be_known_and_fixed() {
    assert_eq!(parse_client_flags([0, 0, 0, 1]), Ok(false));
    assert_eq!(parse_client_flags([0, 0, 0, 3]), Ok(true));
    assert_eq!(parse_client_flags([0, 0, 0, 2]), Err(WireError::NotFixedNewstyle));
    assert_eq!(
        parse_client_flags([0, 0, 0, 5]),
        Err(WireError::UnknownClientFlags { flags: 5 })
    );
}

#[test]
fn option_bytes_are_pinned() -> Result<(), WireError> {
    let go = InfoRequest {
        name: "ab".into(),
        wanted: vec![INFO_BLOCK_SIZE],
    };
    let data = go.encode()?;
    assert_eq!(hex(&data), "00000002616200010003");
    assert_eq!(
        hex(&encode_option(OPT_GO, &data)?),
        "49484156454f5054000000070000000a00000002616200010003"
    );
    let meta = MetaRequest {
        name: "a".into(),
        queries: vec!["base:allocation".into()],
    };
    assert_eq!(
        hex(&meta.encode()?),
        "0000000161000000010000000f626173653a616c6c6f636174696f6e"
    );
    Ok(())
}

#[test]
fn option_reply_bytes_are_pinned() -> Result<(), WireError> {
    let mut out = Vec::new();
    put_option_reply(
        &mut out,
        OPT_GO,
        REP_INFO,
        &Info::Export {
            size: 0x1234,
            flags: 0x10f,
        }
        .encode(),
    )?;
    assert_eq!(
        hex(&out),
        "0003e889045565a900000007000000030000000c00000000000000001234010f"
    );
    out.clear();
    put_option_reply(&mut out, 99, REP_ERR_UNSUP, b"no")?;
    assert_eq!(hex(&out), "0003e889045565a90000006380000001000000026e6f");
    let sizes = BlockSizes {
        minimum: 512,
        preferred: 4096,
        maximum: MAX_PAYLOAD,
    };
    assert_eq!(hex(&Info::BlockSize(sizes).encode()), "0003000002000000100002000000");
    assert_eq!(hex(&Info::Name("n".into()).encode()), "00016e");
    assert_eq!(hex(&Info::Description("d".into()).encode()), "000264");
    assert_eq!(hex(&encode_listed("ab", "c")), "00000002616263");
    assert_eq!(
        hex(&encode_meta_context(1, BASE_ALLOCATION)),
        "00000001626173653a616c6c6f636174696f6e"
    );
    Ok(())
}

#[test]
fn export_name_answer_bytes_are_pinned() {
    assert_eq!(
        hex(&encode_export_name_answer(0x1000, 0x10f, true)),
        "0000000000001000010f"
    );
    let padded = encode_export_name_answer(0x1000, 0x10f, false);
    assert_eq!(padded.len(), 10 + EXPORT_NAME_ZEROES);
    assert!(padded[10..].iter().all(|byte| *byte == 0));
}

#[test]
fn request_and_reply_bytes_are_pinned() {
    let request = Request {
        flags: CMD_FLAG_FUA,
        command: CMD_WRITE,
        cookie: 0x0102_0304_0506_0708,
        offset: 512,
        length: 4096,
    };
    assert_eq!(
        hex(&request.encode()),
        "25609513000100010102030405060708000000000000020000001000"
    );
    assert_eq!(request.payload_len(), 4096);
    let simple = SimpleReply {
        error: Errno::NoSpc.code(),
        cookie: 7,
    };
    assert_eq!(hex(&simple.encode()), "674466980000001c0000000000000007");
    let chunk = Chunk {
        flags: REPLY_FLAG_DONE,
        kind: REPLY_OFFSET_DATA,
        cookie: 7,
        length: 520,
    };
    assert_eq!(hex(&chunk.encode()), "668e33ef00010001000000000000000700000208");
    assert_eq!(hex(&encode_error_payload(Errno::Inval, "bad")), "000000160003626164");
    let extents = [
        Extent { length: 4096, state: 0 },
        Extent {
            length: 512,
            state: STATE_HOLE | STATE_ZERO,
        },
    ];
    assert_eq!(
        hex(&encode_block_status(1, &extents, false)),
        "0000000100001000000000000000020000000003"
    );
}

#[test]
fn lying_lengths_are_refused() {
    // A name longer than the data, a name beyond 4096, too many requests, bytes left over.
    assert!(InfoRequest::parse(&[0, 0, 0, 9, b'a', 0, 0]).is_err());
    let mut long = 5000_u32.to_be_bytes().to_vec();
    long.resize(5010, b'a');
    assert!(matches!(
        InfoRequest::parse(&long),
        Err(WireError::TooLong { len: 5000, .. })
    ));
    assert!(InfoRequest::parse(&[0, 0, 0, 0, 0, 2, 0, 1]).is_err());
    assert!(InfoRequest::parse(&[0, 0, 0, 0, 0, 0, 9]).is_err());
    assert!(MetaRequest::parse(&[0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]).is_err());
    assert!(MetaRequest::parse(&[0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 2, b'a']).is_err());
    assert!(matches!(
        InfoRequest::parse(&[0, 0, 0, 1, 0, 0, 0]),
        Err(WireError::NotText { .. })
    ));
}

#[test]
fn impossible_block_sizes_are_refused() {
    for (minimum, preferred, maximum) in [
        (0, 4096, 1 << 25),
        (3, 4096, 1 << 25),
        (1 << 17, 1 << 17, 1 << 25),
        (512, 256, 1 << 25),
        (1, 4096, 512),
    ] {
        let bytes = Info::BlockSize(BlockSizes {
            minimum,
            preferred,
            maximum,
        })
        .encode();
        assert!(
            matches!(Info::parse(&bytes), Err(WireError::BadValue { .. })),
            "{minimum} {preferred} {maximum}"
        );
    }
}

#[test]
fn go_answer_needs_the_size_before_the_end() {
    let ack = OptionReplyHeader {
        option: OPT_GO,
        reply: REP_ACK,
        len: 0,
    };
    let info = OptionReplyHeader {
        option: OPT_GO,
        reply: REP_INFO,
        len: 12,
    };
    let mut answer = GoAnswer::default();
    assert!(answer.absorb(OPT_GO, ack, &[]).is_err());
    assert_eq!(
        answer.absorb(OPT_GO, info, &Info::Export { size: 9, flags: 1 }.encode()),
        Ok(false)
    );
    assert_eq!(answer.absorb(OPT_GO, ack, &[]), Ok(true));
    assert_eq!(answer.export, Some((9, 1)));
    let foreign = OptionReplyHeader {
        option: OPT_INFO,
        ..info
    };
    assert!(matches!(
        answer.absorb(OPT_GO, foreign, &[]),
        Err(WireError::UnexpectedReply { .. })
    ));
    let no = OptionReplyHeader {
        option: OPT_GO,
        reply: REP_ERR_UNKNOWN,
        len: 4,
    };
    let refused = answer.absorb(OPT_GO, no, b"gone").unwrap_err();
    assert_eq!(
        refused.to_string(),
        "the NBD server refused: NBD_REP_ERR_UNKNOWN (no such export) \"gone\""
    );
}

#[test]
fn every_error_survives_the_wire() {
    use Errno::*;
    for error in [Perm, Io, NoMem, Inval, NoSpc, Overflow, NotSup, Shutdown] {
        assert_eq!(Errno::from_code(error.code()), error);
    }
    assert_eq!(Errno::from_code(4711), Inval);
    assert!(parse_error_payload(&[0, 0, 0, 0, 0, 0]).is_err());
}

proptest! {
    #[test]
    fn requests_survive_the_wire(flags: u16, command: u16, cookie: u64, offset: u64, length: u32) {
        let request = Request { flags, command, cookie, offset, length };
        prop_assert_eq!(Request::parse(&request.encode()), Ok(request));
    }

    #[test]
    fn extended_messages_survive_the_wire(flags: u16, command: u16, cookie: u64, offset: u64, length: u64, short: u32) {
        let payload = if flags & CMD_FLAG_PAYLOAD_LEN == 0 { 0 } else { length };
        let asked = Asked { flags, command, cookie, offset, length, payload };
        prop_assert_eq!(Asked::parse_extended(&asked.encode_extended()), Ok(asked));
        let chunk = ExtendedChunk { chunk: Chunk { flags, kind: command, cookie, length: short }, offset };
        prop_assert_eq!(ExtendedChunk::parse(&chunk.encode()), Ok(chunk));
    }

    #[test]
    fn replies_survive_the_wire(error: u32, flags: u16, kind: u16, cookie: u64, length: u32) {
        let simple = SimpleReply { error, cookie };
        prop_assert_eq!(SimpleReply::parse(&simple.encode()), Ok(simple));
        let chunk = Chunk { flags, kind, cookie, length };
        prop_assert_eq!(Chunk::parse(&chunk.encode()), Ok(chunk));
    }

    #[test]
    fn headers_survive_the_wire(option: u32, reply: u32, len: u32) {
        let header = OptionHeader { option, len };
        prop_assert_eq!(OptionHeader::parse(&header.encode()), Ok(header));
        let header = OptionReplyHeader { option, reply, len };
        prop_assert_eq!(OptionReplyHeader::parse(&header.encode()), Ok(header));
    }

    #[test]
    fn option_data_survive_the_wire(name in "[^\0]{0,40}", wanted: Vec<u16>, queries in proptest::collection::vec("[^\0]{0,20}", 0..5)) {
        let info = InfoRequest { name: name.clone(), wanted };
        prop_assert!(InfoRequest::parse(&info.encode().unwrap()) == Ok(info));
        let meta = MetaRequest { name: name.clone(), queries };
        prop_assert!(MetaRequest::parse(&meta.encode().unwrap()) == Ok(meta));
        prop_assert_eq!(parse_listed(&encode_listed(&name, "words")), Ok((name, "words".into())));
    }

    #[test]
    fn error_and_status_payloads_survive_the_wire(message in "[^\0]{0,40}", context: u32, extents in proptest::collection::vec((1_u64..1 << 32, any::<u32>()), 1..9)) {
        prop_assert_eq!(parse_error_payload(&encode_error_payload(Errno::Io, &message)), Ok((Errno::Io, message)));
        let extents: Vec<_> = extents.into_iter().map(|(length, state)| Extent { length, state }).collect();
        prop_assert_eq!(parse_block_status(&encode_block_status(context, &extents, false)), Ok((context, extents)));
    }

    #[test]
    fn no_bytes_make_a_parser_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = (InfoRequest::parse(&bytes), MetaRequest::parse(&bytes), Info::parse(&bytes), parse_listed(&bytes));
        let _ = (parse_meta_context(&bytes), parse_error_payload(&bytes), parse_block_status(&bytes));
    }
}
