//! Reads the pinned vectors in `shared/tests/vectors`, for tests only.
//!
//! They were made by `make.py` there, an implementation of docs/protocol.md that shares no code with this crate.

use std::path::Path;

/// The value called `name` in `file`: lines of `name = value`, `#` starts a comment.
pub fn value(file: &str, name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vectors").join(file);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    text.lines()
        .filter_map(|line| line.split_once(" = "))
        .find_map(|(key, value)| (key == name).then(|| value.to_owned()))
        .unwrap_or_else(|| panic!("{} has no {name}", path.display()))
}

/// The bytes called `name` in `file`.
pub fn bytes(file: &str, name: &str) -> Vec<u8> {
    data_encoding::HEXLOWER.decode(value(file, name).as_bytes()).unwrap()
}
