//! What others have to type, as a QR code (ISO/IEC 18004) of half blocks: for the screen of a machine that nobody can copy from.
//!
//! Shown only on a terminal that has room for it besides the listing. Always light on black, whatever the terminal's colours:
//! cameras want the border to be light.

use std::io::IsTerminal;

use qrcode::{Color, EcLevel, QrCode};

/// The light border, in modules.
const BORDER: usize = 4;
/// White on black, as the Linux console has it, too.
const PAINT: &str = "\x1b[0;1;37;40m";
const PLAIN: &str = "\x1b[0m";

/// A terminal's size in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Room {
    pub(super) columns: usize,
    pub(super) rows: usize,
}

impl Room {
    /// Of standard output, if it is a terminal that tells its size.
    pub(super) fn of_stdout() -> Option<Self> {
        let out = std::io::stdout();
        if !out.is_terminal() {
            return None;
        }
        let size = rustix::termios::tcgetwinsize(&out).ok()?;
        // A serial line knows none.
        let room = Self {
            columns: usize::from(size.ws_col),
            rows: usize::from(size.ws_row),
        };
        (room.columns > 0 && room.rows > 0).then_some(room)
    }

    /// What is left below so many lines and the cursor's.
    pub(super) const fn below(self, lines: usize) -> Self {
        Self {
            rows: self.rows.saturating_sub(lines + 1),
            ..self
        }
    }
}

/// The first of `texts` whose code has room, with a line break at the end of each of its lines.
pub(super) fn code(texts: &[String], room: Room) -> Option<String> {
    texts.iter().find_map(|text| {
        let code = QrCode::with_error_correction_level(text.as_bytes(), EcLevel::L).ok()?;
        let side = code.width() + 2 * BORDER;
        (side <= room.columns && side.div_ceil(2) <= room.rows).then(|| draw(&code))
    })
}

fn draw(code: &QrCode) -> String {
    let (width, colors) = (code.width(), code.to_colors());
    let side = width + 2 * BORDER;
    let dark = |x: usize, y: usize| {
        let (x, y) = (x.checked_sub(BORDER), y.checked_sub(BORDER));
        let (Some(x), Some(y)) = (x.filter(|x| *x < width), y) else {
            return false;
        };
        colors.get(y * width + x) == Some(&Color::Dark)
    };
    let mut text = String::new();
    for y in (0..side).step_by(2) {
        text.push_str(PAINT);
        for x in 0..side {
            // An odd last line has nothing below, which stays black.
            text.push(match (dark(x, y), y + 1 == side || dark(x, y + 1)) {
                (false, false) => '█',
                (false, true) => '▀',
                (true, false) => '▄',
                (true, true) => ' ',
            });
        }
        text.push_str(PLAIN);
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LARGE: Room = Room {
        columns: 240,
        rows: 120,
    };

    /// Whether each module that is drawn is dark, line by line.
    fn modules(drawn: &str) -> Vec<Vec<bool>> {
        let mut lines = Vec::new();
        for line in drawn.lines() {
            let line = line.strip_prefix(PAINT).unwrap().strip_suffix(PLAIN).unwrap();
            lines.push(line.chars().map(|c| c == ' ' || c == '▄').collect());
            lines.push(line.chars().map(|c| c == ' ' || c == '▀').collect());
        }
        lines
    }

    #[test]
    fn what_is_drawn_is_the_code_in_a_light_border() {
        let text = "stiefel attach laptop/ssd-980-s64d";
        let lines = modules(&code(&[text.to_owned()], LARGE).unwrap());
        let expected = QrCode::with_error_correction_level(text.as_bytes(), EcLevel::L).unwrap();
        let width = expected.width();
        for (y, line) in lines.iter().take(width + 2 * BORDER).enumerate() {
            assert_eq!(line.len(), width + 2 * BORDER);
            for (x, dark) in line.iter().enumerate() {
                let inside = (BORDER..BORDER + width).contains(&x) && (BORDER..BORDER + width).contains(&y);
                assert_eq!(
                    *dark,
                    inside && expected[(x - BORDER, y - BORDER)] == Color::Dark,
                    "{x} {y}"
                );
            }
        }
    }

    #[test]
    fn the_first_text_that_has_room_is_shown() {
        let (long, short) = ("x".repeat(400), "stiefel attach".to_owned());
        let both = [long.clone(), short.clone()];
        assert_eq!(code(&both, LARGE), code(std::slice::from_ref(&long), LARGE));
        // A text console.
        let small = Room { columns: 80, rows: 25 };
        assert_eq!(code(&both, small), code(std::slice::from_ref(&short), LARGE));
        assert!(code(&both, small.below(10)).is_none());
        assert!(code(&[long], small).is_none() && code(&[], LARGE).is_none());
        // More than any code holds.
        assert!(code(&["x".repeat(5000)], LARGE).is_none());
    }

    proptest! {
        #[test]
        fn what_is_drawn_fits(text in ".{0,200}", columns in 0..200usize, rows in 0..100usize) {
            if let Some(drawn) = code(&[text], Room { columns, rows }) {
                prop_assert!(drawn.lines().count() <= rows);
                let widest = drawn.lines().map(|line| line.chars().count() - PAINT.len() - PLAIN.len()).max();
                prop_assert!(widest.unwrap_or_default() <= columns);
            }
        }
    }
}
