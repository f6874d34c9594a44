//! What people are told by a program that must go on, on standard error.
//!
//! Their terminal may have been closed, or the pipe's other end. `eprintln!` panics then, which ends the program on the spot: the
//! kernel would go on with what it was told, and what may be written would be held by nobody.

use std::fmt::Display;
use std::io::{self, Write};

/// Says it, if anybody can hear it.
pub fn say(words: impl Display) {
    say_to(&mut io::stderr().lock(), words);
}

fn say_to(out: &mut impl Write, words: impl Display) {
    // In one piece: others write there, too. Nobody could be told of a failure.
    let _ = out.write_all(format!("stiefel: {words}\n").as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_cannot_hear_ends_nothing() {
        let mut heard = Vec::new();
        say_to(&mut heard, format_args!("{} has gone", "sdb"));
        assert_eq!(heard, b"stiefel: sdb has gone\n");
        // As a terminal that was closed: each write fails.
        say_to(&mut std::fs::File::create("/dev/full").unwrap(), "sdb has gone");
    }
}
