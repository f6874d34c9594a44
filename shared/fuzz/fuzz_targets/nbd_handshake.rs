//! What NBD peers say before the disk.

#![no_main]

use libfuzzer_sys::fuzz_target;
use stiefel_shared::nbd::{
    GoAnswer, Info, InfoRequest, MetaRequest, OPTION_HEADER_LEN, OPTION_REPLY_HEADER_LEN, OptionHeader,
    OptionReplyHeader, parse_client_flags, parse_greeting, parse_listed, parse_meta_context,
};

fuzz_target!(|data: &[u8]| {
    if let Some((bytes, _)) = data.split_first_chunk() {
        let _ = parse_greeting(bytes);
    }
    if let Some((bytes, _)) = data.split_first_chunk() {
        let _ = parse_client_flags(*bytes);
    }
    if let Some((bytes, _)) = data.split_first_chunk::<OPTION_HEADER_LEN>() {
        if let Ok(header) = OptionHeader::parse(bytes) {
            assert_eq!(header.encode(), *bytes);
        }
    }
    if let Some((bytes, rest)) = data.split_first_chunk::<OPTION_REPLY_HEADER_LEN>() {
        if let Ok(header) = OptionReplyHeader::parse(bytes) {
            let _ = GoAnswer::default().absorb(header.option, header, rest);
        }
    }
    if let Ok(query) = InfoRequest::parse(data) {
        assert_eq!(query.encode().as_deref(), Ok(data));
    }
    if let Ok(query) = MetaRequest::parse(data) {
        assert_eq!(query.encode().as_deref(), Ok(data));
    }
    let _ = Info::parse(data);
    let _ = parse_listed(data);
    let _ = parse_meta_context(data);
});
