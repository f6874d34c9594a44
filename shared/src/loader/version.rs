//! Which of two versions is newer, as boot loaders see it.
//!
//! Specifications: UAPI group, "Version Format" (systemd-boot); rpm's rules, which Fedora's GRUB has for the files' names of
//! its entries.

use std::cmp::Ordering;

/// Takes what satisfies `wanted` off the beginning.
fn take<'a>(text: &mut &'a str, wanted: impl Fn(char) -> bool) -> &'a str {
    let end = text.find(|c: char| !wanted(c)).unwrap_or(text.len());
    let (taken, rest) = text.split_at(end);
    *text = rest;
    taken
}

fn strip(text: &mut &str, mark: char) -> bool {
    let stripped = text.strip_prefix(mark);
    *text = stripped.unwrap_or(text);
    stripped.is_some()
}

/// Digits of any length, by their value.
fn numbers(a: &str, b: &str) -> Ordering {
    let (a, b) = (a.trim_start_matches('0'), b.trim_start_matches('0'));
    a.len().cmp(&b.len()).then_with(|| a.cmp(b))
}

/// The order of versions in systemd-boot: UAPI group, "Version Format".
#[must_use]
pub fn compare(mut a: &str, mut b: &str) -> Ordering {
    let ignored = |c: char| !c.is_ascii_alphanumeric() && !matches!(c, '~' | '-' | '^' | '.');
    loop {
        take(&mut a, ignored);
        take(&mut b, ignored);
        // Before everything, even the end.
        match (strip(&mut a, '~'), strip(&mut b, '~')) {
            (true, true) => continue,
            (true, false) => return Ordering::Less,
            (false, true) => return Ordering::Greater,
            (false, false) => {}
        }
        if a.is_empty() || b.is_empty() {
            return b.is_empty().cmp(&a.is_empty());
        }
        let mut both = false;
        for mark in ['-', '^', '.'] {
            match (strip(&mut a, mark), strip(&mut b, mark)) {
                (true, true) => both = true,
                (true, false) => return Ordering::Less,
                (false, true) => return Ordering::Greater,
                (false, false) => continue,
            }
            break;
        }
        if both {
            continue;
        }
        let (x, y) = (
            take(&mut a, |c| c.is_ascii_digit()),
            take(&mut b, |c| c.is_ascii_digit()),
        );
        let order = if x.is_empty() && y.is_empty() {
            let letter = |c: char| c.is_ascii_alphabetic();
            take(&mut a, letter).cmp(take(&mut b, letter))
        } else {
            x.is_empty().cmp(&y.is_empty()).reverse().then_with(|| numbers(x, y))
        };
        if order != Ordering::Equal {
            return order;
        }
    }
}

/// The order of `NAME-VERSION-RELEASE` in Fedora's GRUB: each part by rpm's rules.
#[must_use]
pub fn packages(a: &str, b: &str) -> Ordering {
    let ((name_a, version_a, release_a), (name_b, version_b, release_b)) = (parts(a), parts(b));
    rpm(name_a, name_b)
        .then_with(|| rpm(version_a, version_b))
        .then_with(|| rpm(release_a, release_b))
}

/// Name, version and release; what is missing is missing from the end.
fn parts(text: &str) -> (&str, &str, &str) {
    match text.rsplit_once('-') {
        None => (text, "", ""),
        Some((rest, last)) => match rest.rsplit_once('-') {
            None => (rest, last, ""),
            Some((name, version)) => (name, version, last),
        },
    }
}

/// rpm's order of one part.
fn rpm(mut a: &str, mut b: &str) -> Ordering {
    loop {
        let ignored = |c: char| !c.is_ascii_alphanumeric() && !matches!(c, '~' | '^');
        take(&mut a, ignored);
        take(&mut b, ignored);
        match (strip(&mut a, '~'), strip(&mut b, '~')) {
            (true, true) => continue,
            (true, false) => return Ordering::Less,
            (false, true) => return Ordering::Greater,
            (false, false) => {}
        }
        // After the end, but before everything else.
        match (strip(&mut a, '^'), strip(&mut b, '^')) {
            (true, true) => continue,
            (true, false) => {
                return if b.is_empty() {
                    Ordering::Greater
                } else {
                    Ordering::Less
                };
            }
            (false, true) => {
                return if a.is_empty() {
                    Ordering::Less
                } else {
                    Ordering::Greater
                };
            }
            (false, false) => {}
        }
        if a.is_empty() || b.is_empty() {
            return b.is_empty().cmp(&a.is_empty());
        }
        let order = if a.starts_with(|c: char| c.is_ascii_digit()) {
            let (x, y) = (
                take(&mut a, |c| c.is_ascii_digit()),
                take(&mut b, |c| c.is_ascii_digit()),
            );
            // Digits are newer than letters.
            if y.is_empty() { Ordering::Greater } else { numbers(x, y) }
        } else {
            let letter = |c: char| c.is_ascii_alphabetic();
            let (x, y) = (take(&mut a, letter), take(&mut b, letter));
            if y.is_empty() { Ordering::Less } else { x.cmp(y) }
        };
        if order != Ordering::Equal {
            return order;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn versions_are_ordered_as_the_specification_says() {
        // Each is older than the next.
        let rising = [
            "122.1~rc1",
            "122.1",
            "122.1-1",
            "122.1^post",
            "123",
            "123a",
            "123a-1",
            "124-1",
            "124-1.1",
        ];
        for pair in rising.windows(2) {
            assert_eq!(compare(pair[0], pair[1]), Ordering::Less, "{pair:?}");
            assert_eq!(compare(pair[1], pair[0]), Ordering::Greater, "{pair:?}");
        }
        for (old, new) in [
            ("6.9.1", "6.10.0"),
            ("6.1.0-9-amd64", "6.1.0-10-amd64"),
            ("arch.conf", "arch2.conf"),
            ("6.1", "6.1.1"),
            ("", "1"),
            ("a", "1"),
        ] {
            assert_eq!(compare(old, new), Ordering::Less, "{old} {new}");
        }
        assert_eq!(compare("1_0+", "10"), Ordering::Less);
        assert_eq!(compare("007", "7"), Ordering::Equal);
    }

    #[test]
    fn fedoras_entries_are_ordered_by_machine_then_version() {
        let id = "6a9857a393724b7a981ebb5b8495b9ea";
        let rising = [
            format!("{id}-0-rescue"),
            format!("{id}-5.14.0-70.el9.x86_64"),
            format!("{id}-6.5.6-300.fc39.x86_64"),
            format!("{id}-6.5.10-200.fc39.x86_64"),
            format!("{id}-6.5.10-300.fc39.x86_64"),
            format!("{id}-6.12.0~rc1-1.x86_64"),
            format!("{id}-6.12.0-1.x86_64"),
        ];
        for pair in rising.windows(2) {
            assert_eq!(packages(&pair[0], &pair[1]), Ordering::Less, "{pair:?}");
        }
        assert_eq!(packages("a", "a"), Ordering::Equal);
        assert_eq!(rpm("1.0^git1", "1.0"), Ordering::Greater);
        assert_eq!(rpm("1.0^git1", "1.0.1"), Ordering::Less);
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn either_is_newer_or_both_are_the_same(a in "[a-c0-2~^.+ -]{0,8}", b in "[a-c0-2~^.+ é-]{0,8}") {
            for order in [compare, packages] {
                prop_assert_eq!(order(&a, &b), order(&b, &a).reverse());
                prop_assert_eq!(order(&a, &a), Ordering::Equal);
            }
        }
    }
}
