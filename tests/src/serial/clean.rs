//! A terminal's byte stream as plain lines: without escape sequences (ECMA-48) and control characters.

/// The longest line; a longer one is cut into several.
const MAX_LINE: usize = 64 * 1024;

/// Takes bytes, gives lines.
#[derive(Default)]
pub(super) struct Cleaner {
    line: Vec<u8>,
    state: State,
}

#[derive(Clone, Copy, Default, PartialEq)]
enum State {
    #[default]
    Text,
    /// After a carriage return: a line feed ends the line, anything else begins to overwrite it.
    Return,
    /// After ESC.
    Escape,
    /// After ESC and an intermediate byte, as in `ESC ( B`.
    Intermediate,
    /// In a control sequence, `ESC [ … letter`.
    Control,
    /// In a control string (title, clipboard, device control): until BEL or `ESC \`.
    String,
    /// After ESC within a control string.
    StringEscape,
}

impl Cleaner {
    /// Takes the next bytes; returns the lines they finish.
    pub(super) fn feed(&mut self, bytes: &[u8]) -> Vec<String> {
        let mut lines = Vec::new();
        for &byte in bytes {
            self.state = self.step(self.state, byte, &mut lines);
        }
        lines
    }

    /// The line begun and not finished.
    pub(super) fn unfinished(&self) -> String {
        String::from_utf8_lossy(&self.line).into_owned()
    }

    fn step(&mut self, state: State, byte: u8, lines: &mut Vec<String>) -> State {
        match (state, byte) {
            (State::Text, 0x1b) => State::Escape,
            (State::Return, b'\r') => State::Return,
            (State::Text | State::Return, b'\n') => {
                lines.push(self.take());
                State::Text
            }
            (State::Text, b'\r') => State::Return,
            (State::Return, _) => {
                // What is overwritten on a terminal is a line of its own here.
                if !self.line.is_empty() {
                    lines.push(self.take());
                }
                self.step(State::Text, byte, lines)
            }
            (State::Text, _) => self.text(byte, lines),
            (State::Escape, b'[') => State::Control,
            (State::Escape, b']' | b'P' | b'X' | b'^' | b'_') => State::String,
            (State::Escape | State::Intermediate, 0x20..=0x2f) => State::Intermediate,
            (State::Control, 0x20..=0x3f) => State::Control,
            (State::String, 0x1b) => State::StringEscape,
            (State::StringEscape, b'\\') | (State::String, 0x07) => State::Text,
            // A line's end is never part of a title: the string was cut off.
            (State::String | State::StringEscape, b'\n') => {
                lines.push(self.take());
                State::Text
            }
            (State::String | State::StringEscape, _) => State::String,
            (State::Escape | State::Intermediate | State::Control, _) => State::Text,
        }
    }

    fn text(&mut self, byte: u8, lines: &mut Vec<String>) -> State {
        if byte == b'\t' || (byte >= 0x20 && byte != 0x7f) {
            self.line.push(byte);
            if self.line.len() >= MAX_LINE {
                lines.push(self.take());
            }
        }
        State::Text
    }

    fn take(&mut self) -> String {
        let line = String::from_utf8_lossy(&self.line).into_owned();
        self.line.clear();
        line
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn clean(bytes: &[u8]) -> (Vec<String>, String) {
        let mut cleaner = Cleaner::default();
        (cleaner.feed(bytes), cleaner.unfinished())
    }

    #[test]
    fn colours_titles_and_charsets_vanish() {
        let (lines, rest) = clean(b"[\x1b[0;32m  OK  \x1b[0m] Started\x1b]0;title\x07 it\x1b(B.\r\n\x1b[?2004hroot# ");
        assert_eq!(lines, ["[  OK  ] Started it."]);
        assert_eq!(rest, "root# ");
    }

    #[test]
    fn an_overwritten_line_is_kept_as_its_own() {
        let (lines, rest) = clean(b"10 %\r20 %\r\x1b[Kdone\r\r\nlogin: ");
        assert_eq!(lines, ["10 %", "20 %", "done"]);
        assert_eq!(rest, "login: ");
    }

    #[test]
    fn an_endless_line_is_cut() {
        let (lines, rest) = clean(&vec![b'x'; 3 * MAX_LINE + 1]);
        assert_eq!(lines.len(), 3);
        assert_eq!(rest, "x");
    }

    proptest! {
        #[test]
        fn how_the_bytes_are_cut_does_not_matter(bytes in prop::collection::vec(any::<u8>(), 0..200), cut in 0_usize..200) {
            let cut = cut.min(bytes.len());
            let mut cleaner = Cleaner::default();
            let mut lines = cleaner.feed(&bytes[..cut]);
            lines.extend(cleaner.feed(&bytes[cut..]));
            prop_assert_eq!((lines, cleaner.unfinished()), clean(&bytes));
        }

        #[test]
        fn no_control_character_comes_through(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let (lines, rest) = clean(&bytes);
            for line in lines.iter().chain([&rest]) {
                prop_assert!(line.chars().all(|c| c == '\t' || !c.is_ascii_control()));
            }
        }
    }
}
