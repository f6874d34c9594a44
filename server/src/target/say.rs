//! What people are told meanwhile, on standard error: never by `eprintln!`, which ends the program when nobody hears it (see the lint in
//! `target`).

use std::io::{self, IsTerminal, Write};

pub(super) use stiefel_sys::say::say;

/// A warning, in red on a terminal.
pub(super) fn loudly(warning: &str) {
    let mut out = io::stderr().lock();
    let (red, plain) = if out.is_terminal() {
        ("\x1b[1;31m", "\x1b[0m")
    } else {
        ("", "")
    };
    let _ = out.write_all(format!("{red}WARNING: {warning}{plain}\n").as_bytes());
}
