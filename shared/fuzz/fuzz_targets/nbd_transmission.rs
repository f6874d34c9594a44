//! What NBD peers say about the disk's blocks.

#![no_main]

use libfuzzer_sys::fuzz_target;
use stiefel_shared::nbd::{Asked, Chunk, ExtendedChunk, Request, SimpleReply, parse_block_status, parse_error_payload};

fuzz_target!(|data: &[u8]| {
    if let Some((bytes, _)) = data.split_first_chunk() {
        if let Ok(request) = Request::parse(bytes) {
            assert_eq!(request.encode(), *bytes);
        }
    }
    if let Some((bytes, _)) = data.split_first_chunk() {
        let _ = SimpleReply::parse(bytes);
    }
    if let Some((bytes, _)) = data.split_first_chunk() {
        let _ = Chunk::parse(bytes);
    }
    if let Some((bytes, _)) = data.split_first_chunk() {
        if let Ok(asked) = Asked::parse_extended(bytes) {
            assert_eq!(asked.encode_extended(), *bytes);
        }
    }
    if let Some((bytes, _)) = data.split_first_chunk() {
        if let Ok(chunk) = ExtendedChunk::parse(bytes) {
            assert_eq!(chunk.encode(), *bytes);
        }
    }
    let _ = parse_error_payload(data);
    let _ = parse_block_status(data);
});
