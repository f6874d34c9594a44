//! One line per decision, for the journal: sd-daemon(3) reads the priority in front of a line.

use std::fmt::Arguments;
use std::io::Write;

/// Says what was looked at, and meant nothing.
pub fn debug(text: Arguments<'_>) {
    print(7, text);
}

/// Says what happened.
pub fn info(text: Arguments<'_>) {
    print(6, text);
}

/// Says what a person should see.
pub fn notice(text: Arguments<'_>) {
    print(5, text);
}

/// Says what went wrong and can be lived with.
pub fn warning(text: Arguments<'_>) {
    print(4, text);
}

/// Says what failed.
pub fn error(text: Arguments<'_>) {
    print(3, text);
}

fn print(priority: u8, text: Arguments<'_>) {
    // Set by systemd when the journal reads our output: systemd.exec(5).
    let journal = std::env::var_os("JOURNAL_STREAM").is_some();
    for line in text.to_string().lines() {
        let line = if journal {
            format!("<{priority}>{line}\n")
        } else {
            format!("{line}\n")
        };
        // The journal may have gone; that must not end the service, as `eprintln!` would.
        let _ = std::io::stderr().write_all(line.as_bytes());
    }
}
