//! GRUB's `test` and `[`: GRUB manual, "test".

use std::cmp::Ordering;

use super::Kind;

/// The deepest nesting of parentheses and negations.
const MAX_DEPTH: usize = 16;

/// What is asked about a file, by its path as it stands in the script.
pub(super) type Look<'a> = dyn Fn(&str) -> Option<Kind> + 'a;

/// Whether the words (without the command and the closing bracket) are true; what cannot be understood is not.
pub(super) fn holds(words: &[String], look: &Look<'_>) -> bool {
    let mut words = words.iter().map(String::as_str).peekable();
    let found = any(&mut words, look, 0);
    found && words.peek().is_none()
}

fn any<'a, I: Iterator<Item = &'a str>>(words: &mut std::iter::Peekable<I>, look: &Look<'_>, depth: usize) -> bool {
    let mut found = all(words, look, depth);
    while words.next_if_eq(&"-o").is_some() {
        // Both sides are read, whatever the first is.
        found |= all(words, look, depth);
    }
    found
}

fn all<'a, I: Iterator<Item = &'a str>>(words: &mut std::iter::Peekable<I>, look: &Look<'_>, depth: usize) -> bool {
    let mut found = one(words, look, depth);
    while words.next_if_eq(&"-a").is_some() {
        found &= one(words, look, depth);
    }
    found
}

fn one<'a, I: Iterator<Item = &'a str>>(words: &mut std::iter::Peekable<I>, look: &Look<'_>, depth: usize) -> bool {
    let Some(first) = words.next() else { return false };
    if let Some(operator) = words.peek().copied().filter(|word| is_binary(word)) {
        words.next();
        return words.next().is_some_and(|second| compare(first, operator, second));
    }
    let operand = !matches!(words.peek(), None | Some(&"-a" | &"-o" | &")"));
    match first {
        "!" if depth < MAX_DEPTH => !one(words, look, depth + 1),
        "(" if depth < MAX_DEPTH => {
            let found = any(words, look, depth + 1);
            words.next_if_eq(&")");
            found
        }
        "-n" | "-z" | "-e" | "-f" | "-d" | "-s" if operand => {
            let value = words.next().unwrap_or_default();
            match first {
                "-n" => !value.is_empty(),
                "-z" => value.is_empty(),
                "-e" => look(value).is_some(),
                "-d" => look(value) == Some(Kind::Folder),
                "-s" => look(value) == Some(Kind::File),
                _ => matches!(look(value), Some(Kind::File | Kind::Empty)),
            }
        }
        // `[ -n $unset ]`: the variable is no word at all.
        "-z" => true,
        "-n" => false,
        text => !text.is_empty(),
    }
}

fn is_binary(word: &str) -> bool {
    matches!(
        word,
        "=" | "==" | "!=" | "<" | "<=" | ">" | ">=" | "-eq" | "-ne" | "-lt" | "-le" | "-gt" | "-ge" | "-nt" | "-ot"
    )
}

fn compare(first: &str, operator: &str, second: &str) -> bool {
    let number = |text: &str| text.parse::<i64>().unwrap_or_default();
    let order = match operator {
        "-eq" | "-ne" | "-lt" | "-le" | "-gt" | "-ge" => number(first).cmp(&number(second)),
        _ => first.cmp(second),
    };
    match operator {
        "=" | "==" | "-eq" => order == Ordering::Equal,
        "!=" | "-ne" => order != Ordering::Equal,
        "<" | "-lt" => order == Ordering::Less,
        "<=" | "-le" => order != Ordering::Greater,
        ">" | "-gt" => order == Ordering::Greater,
        ">=" | "-ge" => order != Ordering::Less,
        // Ages of files are not known here.
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look(path: &str) -> Option<Kind> {
        match path {
            "/file" => Some(Kind::File),
            "/empty" => Some(Kind::Empty),
            "/dir" => Some(Kind::Folder),
            _ => None,
        }
    }

    #[test]
    fn conditions_are_as_in_grub() {
        let words = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        for text in [
            "xy = xy",
            "a != b",
            "2 -lt 10",
            "10 -ge 10",
            "-s /file",
            "-f /empty",
            "-e /dir",
            "-d /dir",
            "! -f /none",
            "-z",
            "x",
            "a = b -o c = c",
            "( a = b -o c = c ) -a -n x",
            "! a = b",
            "-n x -a ! -e /none",
            "! -n",
        ] {
            assert!(holds(&words(text), &look), "{text}");
        }
        for text in [
            "x = xy",
            "-s /empty",
            "-f /dir",
            "-n",
            "a = a -a b = c",
            "! x",
            "a = a b",
            "-d /file",
            "2 -gt 10",
            "a = ",
            "a -nt b",
        ] {
            assert!(!holds(&words(text), &look), "{text}");
        }
        assert!(!holds(&[], &look));
        assert!(!holds(&[String::new()], &look));
    }

    #[test]
    fn endless_negations_end() {
        let words = vec!["!".to_owned(); 100_000];
        let _ = holds(&words, &look);
        let words = vec!["(".to_owned(); 100_000];
        let _ = holds(&words, &look);
    }
}
