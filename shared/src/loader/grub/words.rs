//! GRUB's words: how its shell-like language is cut into words, braces and ends of commands, and variables are put in.
//!
//! Specification: GRUB manual, "Writing full configuration files directly", "Quoting", "Expansion".

use super::Variables;

/// A part of a word.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Piece {
    Text(String),
    /// A variable; unquoted ones are split into words.
    Variable {
        name: String,
        quoted: bool,
    },
}

/// A word: its pieces. One that holds quotes is never a single text, so that it is no keyword.
pub(super) type Word = Vec<Piece>;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Token {
    Word(Word),
    Open,
    Close,
    /// A newline or `;`.
    End,
}

type Chars<'a> = std::iter::Peekable<std::str::Chars<'a>>;

/// Splits text into words, braces and ends of commands. Never fails: what is unclosed ends with the text.
pub(super) fn tokens(text: &str) -> Vec<Token> {
    let mut tokens = Vec::new();
    let mut chars = text.chars().peekable();
    while let Some(&c) = chars.peek() {
        let single = match c {
            '\n' | ';' => Some(Token::End),
            '{' => Some(Token::Open),
            '}' => Some(Token::Close),
            _ => None,
        };
        if let Some(token) = single {
            chars.next();
            tokens.push(token);
        } else if c == '#' {
            while chars.next_if(|c| *c != '\n').is_some() {}
        } else if c.is_whitespace() {
            chars.next();
        } else {
            let word = word(&mut chars);
            // A line that goes on leaves no word.
            if !word.is_empty() {
                tokens.push(Token::Word(word));
            }
        }
    }
    tokens
}

/// One word, up to white space, a brace or `;` outside of quotes.
fn word(chars: &mut Chars<'_>) -> Word {
    let (mut pieces, mut text) = (Vec::new(), String::new());
    let (mut double, mut any_quote) = (false, false);
    while let Some(&c) = chars.peek() {
        if !double && (c.is_whitespace() || matches!(c, ';' | '{' | '}')) {
            break;
        }
        chars.next();
        match c {
            '"' => {
                double = !double;
                any_quote = true;
            }
            '\'' if !double => {
                any_quote = true;
                text.extend(std::iter::from_fn(|| chars.next_if(|c| *c != '\'')));
                chars.next();
            }
            '\\' => match chars.next() {
                // A line that goes on.
                Some('\n') | None => {}
                Some(escaped) => {
                    any_quote = true;
                    // Inside of quotes only these lose their meaning.
                    if double && !matches!(escaped, '$' | '"' | '\\') {
                        text.push('\\');
                    }
                    text.push(escaped);
                }
            },
            '$' => match variable(chars) {
                Some(name) => {
                    if !text.is_empty() {
                        pieces.push(Piece::Text(std::mem::take(&mut text)));
                    }
                    pieces.push(Piece::Variable { name, quoted: double });
                }
                None => text.push('$'),
            },
            _ => text.push(c),
        }
    }
    // An empty quoted word is a word; a quoted keyword is none of the grammar's.
    if !text.is_empty() || (pieces.is_empty() && any_quote) {
        pieces.push(Piece::Text(text));
        if any_quote && pieces.len() == 1 {
            pieces.push(Piece::Text(String::new()));
        }
    }
    pieces
}

/// The name after a `$`.
fn variable(chars: &mut Chars<'_>) -> Option<String> {
    let in_name = |c: &char| c.is_ascii_alphanumeric() || *c == '_';
    if chars.next_if_eq(&'{').is_some() {
        let name = std::iter::from_fn(|| chars.next_if(|c| *c != '}' && *c != '\n')).collect();
        chars.next_if_eq(&'}');
        return Some(name);
    }
    let name: String = match chars.peek() {
        Some('?' | '#' | '@' | '*') => chars.next().into_iter().collect(),
        _ => std::iter::from_fn(|| chars.next_if(in_name)).collect(),
    };
    (!name.is_empty()).then_some(name)
}

/// Adds the words that a word stands for, with its variables' values; an unset variable is empty.
pub(super) fn expand(pieces: &[Piece], variables: &Variables, words: &mut Vec<String>) {
    let mut current: Option<String> = None;
    for piece in pieces {
        match piece {
            Piece::Text(text) => current.get_or_insert_default().push_str(text),
            Piece::Variable { name, quoted } => {
                let value = variables.get(name).map_or("", String::as_str);
                if *quoted {
                    current.get_or_insert_default().push_str(value);
                    continue;
                }
                if value.starts_with(char::is_whitespace) {
                    words.extend(current.take());
                }
                for (index, part) in value.split_whitespace().enumerate() {
                    if index > 0 {
                        words.extend(current.take());
                    }
                    current.get_or_insert_default().push_str(part);
                }
                if value.ends_with(char::is_whitespace) {
                    words.extend(current.take());
                }
            }
        }
    }
    words.extend(current);
}
