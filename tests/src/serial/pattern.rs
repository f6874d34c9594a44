//! What a test expects to read: a piece of text, or a regular expression.

use std::ops::Range;

use regex_lite::Regex;

use super::SerialError;

/// Something to look for within a line.
#[derive(Clone, Debug)]
pub struct Pattern {
    kind: Kind,
}

#[derive(Clone, Debug)]
enum Kind {
    Text(String),
    Regex(Regex),
    /// Reported when it is used, so that [`re`] reads well in a test.
    Bad(String, regex_lite::Error),
}

/// A regular expression to look for.
pub fn re(expression: &str) -> Pattern {
    let kind = match Regex::new(expression) {
        Ok(regex) => Kind::Regex(regex),
        Err(error) => Kind::Bad(expression.to_owned(), error),
    };
    Pattern { kind }
}

impl From<&str> for Pattern {
    fn from(text: &str) -> Self {
        Self {
            kind: Kind::Text(text.to_owned()),
        }
    }
}

impl From<&String> for Pattern {
    fn from(text: &String) -> Self {
        text.as_str().into()
    }
}

impl Pattern {
    /// Where it first is in `line`.
    pub(super) fn find(&self, line: &str) -> Option<Range<usize>> {
        match &self.kind {
            Kind::Text(text) => line.find(text).map(|start| start..start + text.len()),
            Kind::Regex(regex) => regex.find(line).map(|found| found.range()),
            Kind::Bad(..) => None,
        }
    }

    pub(super) fn check(&self) -> Result<(), SerialError> {
        match &self.kind {
            Kind::Bad(pattern, source) => Err(SerialError::BadPattern {
                pattern: pattern.clone(),
                source: source.clone(),
            }),
            _ => Ok(()),
        }
    }
}

impl std::fmt::Display for Pattern {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.kind {
            Kind::Text(text) => write!(f, "{text:?}"),
            Kind::Regex(regex) => write!(f, "/{regex}/"),
            Kind::Bad(pattern, _) => write!(f, "/{pattern}/"),
        }
    }
}

/// The patterns as words for an error.
pub(super) fn describe(patterns: &[Pattern]) -> String {
    patterns.iter().map(Pattern::to_string).collect::<Vec<_>>().join(" or ")
}
