//! systemd-boot: in which order it lists its entries, and which one it boots by itself.
//!
//! Used by the laptop's server. Specification: systemd-boot(7), loader.conf(5), UAPI group, "Boot Loader Specification",
//! "Sorting"; systemd.io/BOOT_LOADER_INTERFACE (the variables).

use std::cmp::Ordering;

use super::bls::{Tries, tries};
use super::version;

/// Stands for the entry that was booted last.
const SAVED: &str = "@saved";
/// Begins the names of entries that systemd-boot makes by itself: other systems, the firmware's setup.
const AUTOMATIC: &str = "auto-";

/// An entry as far as ordering and choosing go.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Listed {
    /// The file's name, e.g. `arch+3.conf`.
    pub file: String,
    /// For ordering.
    pub sort_key: Option<String>,
    /// For ordering.
    pub machine_id: Option<String>,
    /// For ordering.
    pub version: Option<String>,
}

impl Listed {
    /// The file's name without its counter, in small letters, and the counter.
    fn id(&self) -> (String, Option<Tries>) {
        let file = self.file.to_ascii_lowercase();
        let (stem, ending) = file.rsplit_once('.').unwrap_or((&file, ""));
        let (stem, tries) = tries(stem);
        (format!("{stem}.{ending}"), tries)
    }

    fn is(&self, pattern: &str) -> bool {
        let pattern = pattern.to_ascii_lowercase();
        // A profile of a unified kernel image.
        let pattern = pattern.split_once('@').map_or(pattern.as_str(), |(file, _)| file);
        matches(pattern, &self.file.to_ascii_lowercase()) || matches(pattern, &self.id().0)
    }
}

/// The order of the menu: what has no tries left comes last, then by sort key, machine and version, newest first.
#[must_use]
pub fn order(a: &Listed, b: &Listed) -> Ordering {
    let ((id_a, tries_a), (id_b, tries_b)) = (a.id(), b.id());
    let spent = |tries: Option<Tries>| tries.is_some_and(|tries| tries.left == 0);
    let new_style = match (&a.sort_key, &b.sort_key) {
        (Some(key_a), Some(key_b)) => key_a
            .cmp(key_b)
            .then_with(|| a.machine_id.cmp(&b.machine_id))
            .then_with(|| {
                let version = |listed: &'_ Listed| listed.version.clone().unwrap_or_default();
                version::compare(&version(b), &version(a))
            }),
        (key_a, key_b) => key_a.is_none().cmp(&key_b.is_none()),
    };
    spent(tries_a)
        .cmp(&spent(tries_b))
        .then(new_style)
        .then_with(|| version::compare(&id_b, &id_a))
        .then_with(|| {
            // Of the same entry with and without a counter the one without, so that this is an order.
            let counter = |tries: Option<Tries>| tries.map(|tries| (u32::MAX - tries.left, tries.done));
            counter(tries_a).cmp(&counter(tries_b))
        })
}

/// What decides, in this order.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Wishes {
    /// LoaderEntryOneShot.
    pub one_shot: Option<String>,
    /// LoaderEntryDefault.
    pub variable: Option<String>,
    /// `default` in loader.conf.
    pub configured: Option<String>,
    /// LoaderEntryLastBooted, which `@saved` means.
    pub saved: Option<String>,
}

/// The entry that is booted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Choice {
    /// That one of the list, and why.
    Listed(usize, String),
    /// One that systemd-boot makes by itself, such as `auto-windows`.
    Automatic(String),
}

/// Which of the entries (sorted by [`order`]) is booted; `None` if there are none.
#[must_use]
pub fn choose(listed: &[Listed], wishes: &Wishes) -> Option<Choice> {
    let wanted = [
        (&wishes.one_shot, "LoaderEntryOneShot"),
        (&wishes.variable, "the default set in the firmware's variables"),
        (&wishes.configured, "the default of loader.conf"),
    ];
    for (wish, what) in wanted {
        let Some(wish) = wish else { continue };
        let (pattern, what) = match &wishes.saved {
            Some(saved) if wish == SAVED => (saved, format!("the entry booted last, which is {what}")),
            _ => (wish, what.to_owned()),
        };
        if let Some(index) = listed.iter().position(|entry| entry.is(pattern)) {
            return Some(Choice::Listed(index, what));
        }
        if pattern.starts_with(AUTOMATIC) && !pattern.contains(['*', '?', '[']) {
            return Some(Choice::Automatic(pattern.clone()));
        }
    }
    (!listed.is_empty()).then(|| Choice::Listed(0, "the first entry of systemd-boot's menu".to_owned()))
}

/// The value of `default` in loader.conf.
#[must_use]
pub fn configured_default(text: &str) -> Option<String> {
    let value = |line: &str| {
        let (key, value) = line.trim().split_once([' ', '\t'])?;
        let value = value.trim();
        (key == "default" && !value.is_empty()).then(|| value.to_owned())
    };
    text.lines().filter_map(value).next_back()
}

/// Whether a text matches a pattern of `*`, `?`, `[…]` and `\`: as fnmatch(3), without special signs for paths.
#[must_use]
pub fn matches(pattern: &str, text: &str) -> bool {
    let (pattern, text): (Vec<char>, Vec<char>) = (pattern.chars().collect(), text.chars().collect());
    let (mut p, mut t) = (0, 0);
    // The last star, and how much of the text it has taken.
    let mut star: Option<(usize, usize)> = None;
    while t < text.len() || p < pattern.len() {
        let here = text.get(t).copied();
        match (pattern.get(p), here) {
            (Some('*'), _) => {
                star = Some((p, t));
                p += 1;
                continue;
            }
            (Some(_), Some(c)) => {
                if let Some(length) = one(pattern.get(p..).unwrap_or_default(), c) {
                    p += length;
                    t += 1;
                    continue;
                }
            }
            _ => {}
        }
        // The star takes one more.
        match star {
            Some((at, taken)) if taken < text.len() => {
                star = Some((at, taken + 1));
                p = at + 1;
                t = taken + 1;
            }
            _ => return false,
        }
    }
    true
}

/// How many characters of the pattern match this one; `None` if they do not.
fn one(pattern: &[char], c: char) -> Option<usize> {
    match pattern {
        ['?', ..] => Some(1),
        ['\\', escaped, ..] => (*escaped == c).then_some(2),
        ['[', set @ ..] => {
            // A bracket at the beginning belongs to the set.
            let end = set.iter().skip(1).position(|c| *c == ']')? + 1;
            let mut members = set.get(..end)?;
            let mut found = false;
            while let [first, rest @ ..] = members {
                members = match rest {
                    ['-', last, after @ ..] => {
                        found |= (*first..=*last).contains(&c);
                        after
                    }
                    _ => {
                        found |= *first == c;
                        rest
                    }
                };
            }
            found.then_some(end + 2)
        }
        [plain, ..] => (*plain == c).then_some(1),
        [] => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn listed(file: &str, sort_key: &str, version: &str) -> Listed {
        let some = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        Listed {
            file: file.into(),
            sort_key: some(sort_key),
            version: some(version),
            machine_id: None,
        }
    }

    #[test]
    fn the_menu_is_ordered_as_systemd_boot_does() {
        let wanted = [
            listed("z.conf", "arch", "6.10"),
            listed("a+2-1.conf", "arch", "6.9"),
            listed("b.efi", "debian", "12"),
            listed("linux-6.10.conf", "", "1"),
            listed("linux-6.9+3.conf", "", "2"),
            listed("linux-6.9+2-1.conf", "", "2"),
            listed("aa+0-3.conf", "arch", "7"),
        ];
        let mut sorted = wanted.clone();
        sorted.reverse();
        sorted.sort_by(order);
        assert_eq!(sorted, wanted);
    }

    #[test]
    fn what_is_wished_first_counts_and_what_is_not_there_does_not() {
        let menu = [
            listed("arch.conf", "", ""),
            listed("Arch-LTS+3.conf", "", ""),
            listed("arch-fallback.conf", "", ""),
        ];
        let some = |text: &str| Some(text.to_owned());
        let chosen = |wishes: &Wishes| match choose(&menu, wishes) {
            Some(Choice::Listed(index, _)) => menu[index].file.clone(),
            other => format!("{other:?}"),
        };
        let mut wishes = Wishes::default();
        assert_eq!(chosen(&wishes), "arch.conf");
        wishes.configured = some("arch-f*");
        assert_eq!(chosen(&wishes), "arch-fallback.conf");
        wishes.variable = some("arch-lts.conf");
        assert_eq!(chosen(&wishes), "Arch-LTS+3.conf");
        wishes.one_shot = some("arch.conf");
        assert_eq!(chosen(&wishes), "arch.conf");
        wishes.one_shot = some("gone.conf");
        assert_eq!(chosen(&wishes), "Arch-LTS+3.conf");
        wishes.variable = some("@saved");
        wishes.saved = some("arch-fallback.conf");
        assert_eq!(chosen(&wishes), "arch-fallback.conf");
        wishes.one_shot = some("auto-windows");
        assert_eq!(choose(&menu, &wishes), Some(Choice::Automatic("auto-windows".into())));
        assert_eq!(choose(&[], &Wishes::default()), None);
    }

    #[test]
    fn the_configured_default_is_read() {
        assert_eq!(
            configured_default("timeout 3\n#default a\ndefault\tb*\n").as_deref(),
            Some("b*")
        );
        assert_eq!(configured_default("default\ndefaults x\n"), None);
    }

    #[test]
    fn patterns_match_as_fnmatch_does() {
        for (pattern, text) in [
            ("", ""),
            ("*", ""),
            ("a*c", "abbc"),
            ("a?c", "abc"),
            ("[a-c]x", "bx"),
            ("[]x]", "]"),
            ("\\*", "*"),
            ("*a*b", "xaxb"),
            ("arch-*", "arch-linux.conf"),
            ("[a-]", "-"),
        ] {
            assert!(matches(pattern, text), "{pattern} {text}");
        }
        for (pattern, text) in [
            ("", "a"),
            ("a", ""),
            ("a?", "a"),
            ("[a-c", "b"),
            ("[a-c]", "d"),
            ("*a", "ab"),
            ("\\", "a"),
        ] {
            assert!(!matches(pattern, text), "{pattern} {text}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn stars_match_what_is_between(parts in proptest::collection::vec("[a-c]{0,3}", 1..5), between in "[a-c]{0,3}") {
            prop_assert!(matches(&parts.join("*"), &parts.join(&between)));
        }

        #[test]
        fn any_pattern_is_answered(pattern in "[a-c*?\\[\\]\\\\-]{0,12}", text in "[a-c*\\]-]{0,12}") {
            let _ = matches(&pattern, &text);
        }

        #[test]
        fn the_order_is_one(names in proptest::collection::vec("[ab][0-9]?(\\+[0-2](-[0-2])?)?\\.(conf|efi)", 3), keys in proptest::collection::vec("[ab]?", 3)) {
            let mut menu: Vec<Listed> = names.iter().zip(&keys).map(|(name, key)| listed(name, key, name)).collect();
            menu.sort_by(order);
            prop_assert!(menu.windows(2).all(|pair| order(&pair[0], &pair[1]) != Ordering::Greater));
        }
    }
}
