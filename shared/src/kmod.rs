//! The index of kernel modules: which file holds a module, what must be loaded before it, who drives a device.
//!
//! Read by `stiefel_sys::module` (which loads), by the collector and by the ramdisk builder (which copy).
//! Formats: modules.dep(5), modprobe.d(5) "alias" and "softdep", as depmod(8) writes them below
//! `/lib/modules/VERSION`. Lines that cannot be understood are skipped, as modprobe does; an over-long file is
//! refused.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};

/// The longest index file taken, in bytes. Debian's largest (modules.alias) has 1.6 MB.
pub const MAX_TEXT: usize = 16 << 20;

/// The texts of one kernel version's index files; a missing file is the empty text.
#[derive(Clone, Copy, Debug, Default)]
pub struct Texts<'a> {
    /// modules.dep: `path: path…`, relative to the folder of the kernel version.
    pub dep: &'a [u8],
    /// modules.alias: `alias PATTERN NAME`.
    pub alias: &'a [u8],
    /// modules.softdep: `softdep NAME pre: NAME… post: NAME…`.
    pub softdep: &'a [u8],
    /// modules.builtin: one path a line.
    pub builtin: &'a [u8],
}

/// Why the index, or an answer from it, cannot be had.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KmodError {
    /// An index file is longer than [`MAX_TEXT`].
    #[error("{file} has {bytes} bytes, more than {MAX_TEXT}; run depmod again for this kernel")]
    TooLong {
        /// The file's name.
        file: &'static str,
        /// Its length in bytes.
        bytes: usize,
    },
    /// Neither a module, nor an alias of one, nor built in.
    #[error("no kernel module is called {name}; check that it was packed with this kernel's modules")]
    Unknown {
        /// The normalised name that was asked for.
        name: String,
    },
}

/// Brings a module's name, or the path of its file, into the kernel's own form: `-` becomes `_`, folders and
/// `.ko`, `.ko.xz`, `.ko.zst`, `.ko.gz` fall away.
#[must_use]
pub fn normalise(name: &str) -> String {
    let file = name.rsplit('/').next().unwrap_or(name);
    let file = [".xz", ".zst", ".gz"]
        .iter()
        .find_map(|end| file.strip_suffix(end))
        .unwrap_or(file);
    file.strip_suffix(".ko").unwrap_or(file).replace('-', "_")
}

#[derive(Debug)]
struct Module {
    name: String,
    path: String,
    /// Names, as far as modules.dep gives them.
    depends: Vec<String>,
}

#[derive(Debug)]
struct Alias {
    /// The line's number: answers come in the file's order.
    order: usize,
    pattern: String,
    module: String,
}

#[derive(Debug, Default)]
struct Soft {
    pre: Vec<String>,
    post: Vec<String>,
}

/// The modules of one kernel version.
#[derive(Debug, Default)]
pub struct ModuleIndex {
    modules: Vec<Module>,
    by_name: HashMap<String, usize>,
    /// Keyed by what stands before a pattern's first wildcard: of some 20,000 patterns only a handful can match
    /// one device, and those are found by a few look-ups (pattern by pattern takes seconds under emulation).
    aliases: HashMap<String, Vec<Alias>>,
    /// The lengths in bytes that keys of `aliases` have.
    lengths: BTreeSet<usize>,
    soft: HashMap<String, Soft>,
    builtin: HashSet<String>,
}

impl ModuleIndex {
    /// Builds the index.
    ///
    /// # Errors
    /// [`KmodError::TooLong`] if a text has more than [`MAX_TEXT`] bytes.
    pub fn parse(texts: &Texts<'_>) -> Result<Self, KmodError> {
        for (file, text) in [
            ("modules.dep", texts.dep),
            ("modules.alias", texts.alias),
            ("modules.softdep", texts.softdep),
            ("modules.builtin", texts.builtin),
        ] {
            if text.len() > MAX_TEXT {
                return Err(KmodError::TooLong {
                    file,
                    bytes: text.len(),
                });
            }
        }
        let mut index = Self::default();
        lines(texts.dep).for_each(|line| index.add_module(line));
        lines(texts.alias)
            .enumerate()
            .for_each(|(order, line)| index.add_alias(order, line));
        lines(texts.softdep).for_each(|line| index.add_soft(line));
        index.builtin = lines(texts.builtin).map(normalise).collect();
        Ok(index)
    }

    fn add_module(&mut self, line: &str) {
        let Some((path, depends)) = line.split_once(':') else {
            return;
        };
        let (path, name) = (path.trim(), normalise(path.trim()));
        // A path is opened below the modules' folder: it must not lead out of it.
        let inside = !path.starts_with('/') && path.split('/').all(|part| !matches!(part, "" | "." | ".."));
        if inside && !name.is_empty() && !self.by_name.contains_key(&name) {
            self.by_name.insert(name.clone(), self.modules.len());
            let depends = depends.split_whitespace().map(normalise).collect();
            self.modules.push(Module {
                name,
                path: path.to_owned(),
                depends,
            });
        }
    }

    fn add_alias(&mut self, order: usize, line: &str) {
        let mut words = line.split_whitespace();
        let (Some("alias"), Some(pattern), Some(module)) = (words.next(), words.next(), words.next()) else {
            return;
        };
        let pattern = underscore_pattern(pattern);
        let literal = pattern.find(['*', '?', '[', '\\']).unwrap_or(pattern.len());
        let key = pattern.get(..literal).unwrap_or_default().to_owned();
        self.lengths.insert(key.len());
        self.aliases.entry(key).or_default().push(Alias {
            order,
            pattern,
            module: normalise(module),
        });
    }

    fn add_soft(&mut self, line: &str) {
        let mut words = line.split_whitespace();
        let (Some("softdep"), Some(name)) = (words.next(), words.next()) else {
            return;
        };
        let soft = self.soft.entry(normalise(name)).or_default();
        let mut list = None;
        for word in words {
            match (word, &mut list) {
                ("pre:", _) => list = Some(&mut soft.pre),
                ("post:", _) => list = Some(&mut soft.post),
                (_, Some(list)) => list.push(normalise(word)),
                (_, None) => {}
            }
        }
    }

    /// All modules with the path of their file (relative to the folder of the kernel version), as modules.dep
    /// orders them.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.modules
            .iter()
            .map(|module| (module.name.as_str(), module.path.as_str()))
    }

    /// The path of a module's file, relative to the folder of the kernel version.
    #[must_use]
    pub fn path(&self, name: &str) -> Option<&str> {
        self.module(&normalise(name)).map(|module| module.path.as_str())
    }

    /// Whether the kernel itself holds what this module would bring.
    #[must_use]
    pub fn is_builtin(&self, name: &str) -> bool {
        self.builtin.contains(&normalise(name))
    }

    /// The modules whose alias matches a device's modalias, or a plain alias such as `fs-ext4`, in the order of
    /// modules.alias, each once.
    #[must_use]
    pub fn by_modalias(&self, modalias: &str) -> Vec<&str> {
        let wanted = modalias.trim().replace('-', "_");
        let mut found: Vec<&Alias> = self
            .lengths
            .iter()
            .filter_map(|&length| self.aliases.get(wanted.get(..length)?))
            .flatten()
            .filter(|alias| glob(alias.pattern.as_bytes(), wanted.as_bytes()))
            .collect();
        found.sort_by_key(|alias| alias.order);
        let mut seen = HashSet::new();
        found
            .iter()
            .map(|alias| alias.module.as_str())
            .filter(|name| seen.insert(*name))
            .collect()
    }

    /// The names to load, in order, so that `name` (a module or an alias) works: soft dependencies "pre" and
    /// dependencies first, soft dependencies "post" last. What is built in needs no loading and is left out, so
    /// the answer may be empty. Cycles are tolerated; soft dependencies that do not exist are skipped.
    ///
    /// # Errors
    /// [`KmodError::Unknown`] if there is no such module.
    pub fn resolve(&self, name: &str) -> Result<Vec<&str>, KmodError> {
        let name = normalise(name);
        let roots = self.meant(&name);
        if roots.is_empty() && !self.builtin.contains(&name) {
            return Err(KmodError::Unknown { name });
        }
        let mut order = Vec::new();
        let mut entered = HashSet::new();
        // "post" waits until the module that was asked for stands in the list: it may depend on it.
        let mut waiting = VecDeque::from(roots);
        while let Some(root) = waiting.pop_front() {
            self.visit(root, &mut entered, &mut order, &mut waiting);
        }
        Ok(order)
    }

    /// Depth first without recursion: the depth is in the hands of whoever wrote modules.dep.
    fn visit<'a>(
        &'a self,
        root: &'a Module,
        entered: &mut HashSet<&'a str>,
        order: &mut Vec<&'a str>,
        later: &mut VecDeque<&'a Module>,
    ) {
        let mut stack = vec![(root, false)];
        while let Some((module, depends_done)) = stack.pop() {
            let soft = self.soft.get(&module.name);
            if depends_done {
                order.push(&module.name);
                later.extend(
                    soft.iter()
                        .flat_map(|soft| &soft.post)
                        .flat_map(|name| self.meant(name)),
                );
            } else if entered.insert(&module.name) {
                stack.push((module, true));
                let pre = soft.iter().flat_map(|soft| &soft.pre).flat_map(|name| self.meant(name));
                let depends = module.depends.iter().filter_map(|name| self.loadable(name));
                let before: Vec<_> = pre.chain(depends).collect();
                stack.extend(before.into_iter().rev().map(|module| (module, false)));
            }
        }
    }

    fn module(&self, normalised: &str) -> Option<&Module> {
        self.by_name.get(normalised).and_then(|&index| self.modules.get(index))
    }

    fn loadable(&self, normalised: &str) -> Option<&Module> {
        if self.builtin.contains(normalised) {
            None
        } else {
            self.module(normalised)
        }
    }

    /// What a name stands for: the module of that name, else those that carry it as an alias.
    fn meant(&self, normalised: &str) -> Vec<&Module> {
        if self.builtin.contains(normalised) {
            return Vec::new();
        }
        match self.module(normalised) {
            Some(module) => vec![module],
            None => self
                .by_modalias(normalised)
                .into_iter()
                .filter_map(|name| self.loadable(name))
                .collect(),
        }
    }
}

fn lines(text: &[u8]) -> impl Iterator<Item = &str> {
    text.split(|&byte| byte == b'\n')
        .filter_map(|line| std::str::from_utf8(line).ok())
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
}

/// `-` becomes `_` but for ranges in brackets, as depmod does it.
fn underscore_pattern(pattern: &str) -> String {
    let mut bracket = false;
    pattern
        .chars()
        .map(|c| {
            bracket = (bracket || c == '[') && c != ']';
            if c == '-' && !bracket { '_' } else { c }
        })
        .collect()
}

/// Shell pattern matching over bytes, as fnmatch(3) without flags: `*`, `?`, `[…]`, `\`.
///
/// Only the last `*` is ever gone back to, so the time is at most the product of both lengths.
fn glob(pattern: &[u8], text: &[u8]) -> bool {
    let (mut pattern, mut text) = (pattern, text);
    let mut retry: Option<(&[u8], &[u8])> = None;
    loop {
        if let [b'*', rest @ ..] = pattern {
            pattern = rest;
            retry = Some((rest, text));
            continue;
        }
        match (text.split_first(), one(pattern, text.first().copied())) {
            (Some((_, behind)), Some(rest)) => (pattern, text) = (rest, behind),
            (None, _) if pattern.is_empty() => return true,
            _ => match retry {
                Some((after_star, from)) if !from.is_empty() => {
                    (pattern, text) = (after_star, from.get(1..).unwrap_or_default());
                    retry = Some((pattern, text));
                }
                _ => return false,
            },
        }
    }
}

/// Matches one byte against the head of a pattern (not `*`) and returns the rest of the pattern.
fn one(pattern: &[u8], byte: Option<u8>) -> Option<&[u8]> {
    let byte = byte?;
    match pattern {
        [b'?', rest @ ..] => Some(rest),
        [b'[', rest @ ..] => match bracket(rest, byte) {
            Some((matched, rest)) => matched.then_some(rest),
            // Without its end it is an ordinary character.
            None => (byte == b'[').then_some(rest),
        },
        [b'\\', literal, rest @ ..] | [literal, rest @ ..] => (*literal == byte).then_some(rest),
        [] => None,
    }
}

/// Evaluates a set whose `[` was taken: whether `byte` is in it, and what follows the `]`.
fn bracket(set: &[u8], byte: u8) -> Option<(bool, &[u8])> {
    let (negated, mut rest) = match set {
        [b'!' | b'^', rest @ ..] => (true, rest),
        _ => (false, set),
    };
    let mut inside = false;
    let mut first = true;
    loop {
        rest = match rest {
            [b']', rest @ ..] if !first => return Some((inside != negated, rest)),
            [low, b'-', high, rest @ ..] if *high != b']' => {
                inside |= (*low..=*high).contains(&byte);
                rest
            }
            [single, rest @ ..] => {
                inside |= *single == byte;
                rest
            }
            [] => return None,
        };
        first = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn index(dep: &str, alias: &str, softdep: &str, builtin: &str) -> ModuleIndex {
        let texts = Texts {
            dep: dep.as_bytes(),
            alias: alias.as_bytes(),
            softdep: softdep.as_bytes(),
            builtin: builtin.as_bytes(),
        };
        ModuleIndex::parse(&texts).unwrap()
    }

    #[test]
    fn names_are_brought_into_the_kernels_form() {
        for file in [
            "nvme-tcp",
            "kernel/drivers/nvme/host/nvme-tcp.ko",
            "nvme-tcp.ko.xz",
            "x/nvme_tcp.ko.zst",
        ] {
            assert_eq!(normalise(file), "nvme_tcp");
        }
        assert_eq!(normalise("a.ko.gz"), "a");
        assert_eq!(normalise("odd.name"), "odd.name");
    }

    #[test]
    fn dependencies_come_before_the_module_that_needs_them() {
        let index = index("k/a.ko.xz: k/b.ko k/c.ko\nk/b.ko: k/c.ko\nk/c.ko:\n", "", "", "");
        assert_eq!(index.resolve("a").unwrap(), ["c", "b", "a"]);
        assert_eq!(index.path("a"), Some("k/a.ko.xz"));
        assert_eq!(index.iter().collect::<Vec<_>>()[2], ("c", "k/c.ko"));
    }

    #[test]
    fn soft_dependencies_are_found_through_aliases_and_stand_around_the_module() {
        let index = index(
            "ext4.ko: jbd2.ko\njbd2.ko:\ncrc32c_generic.ko:\nlate.ko: ext4.ko\n",
            "alias crc32c crc32c_generic\n",
            "# comment\nsoftdep ext4 pre: crc32c missing post: late\n",
            "",
        );
        assert_eq!(
            index.resolve("ext4").unwrap(),
            ["crc32c_generic", "jbd2", "ext4", "late"]
        );
    }

    #[test]
    fn post_of_a_dependency_waits_for_the_module_itself() {
        let index = index("a.ko: b.ko\nb.ko:\nc.ko: a.ko\n", "", "softdep b post: c\n", "");
        assert_eq!(index.resolve("a").unwrap(), ["b", "a", "c"]);
    }

    #[test]
    fn builtin_needs_no_loading_and_unknown_is_refused() {
        let index = index("a.ko: scsi-mod.ko\n", "", "", "kernel/drivers/scsi/scsi_mod.ko\n");
        assert_eq!(index.resolve("a").unwrap(), ["a"]);
        assert!(index.is_builtin("scsi-mod"));
        assert!(index.resolve("scsi_mod").unwrap().is_empty());
        assert_eq!(
            index.resolve("no-such"),
            Err(KmodError::Unknown { name: "no_such".into() })
        );
    }

    #[test]
    fn cycles_end() {
        let index = index(
            "a.ko: b.ko\nb.ko: a.ko\n",
            "alias x b\n",
            "softdep a pre: x post: a b\n",
            "",
        );
        assert_eq!(index.resolve("a").unwrap(), ["b", "a"]);
    }

    #[test]
    fn modalias_finds_drivers_in_file_order_and_once() {
        let index = index(
            "",
            "alias usb:v0BDAp8153d*dc*dsc*dp*icFFisc*ip*in* r8152\n\
             alias usb:v*p*d*dc*dsc*dp*ic02isc06ip00in* cdc_ether\n\
             alias usb:v0BDAp8153d*dc*dsc*dp*ic02isc0[5-7]ip00in* r8153_ecm\n\
             alias usb:v0BDA* r8152\n\
             alias platform:i2c-dash dash\n",
            "",
            "",
        );
        assert_eq!(
            index.by_modalias("usb:v0BDAp8153d3100dc00dsc00dp00ic02isc06ip00in00\n"),
            ["cdc_ether", "r8153_ecm", "r8152"]
        );
        assert_eq!(index.by_modalias("platform:i2c-dash"), ["dash"]);
        assert!(index.by_modalias("pci:v1").is_empty());
    }

    #[test]
    fn paths_that_lead_out_of_the_folder_are_not_taken() {
        assert_eq!(
            index("/etc/a.ko:\n../b.ko:\nx//c.ko:\nd.ko:\n", "", "", "")
                .iter()
                .count(),
            1
        );
    }

    #[test]
    fn too_long_a_file_is_refused() {
        let long = vec![b' '; MAX_TEXT + 1];
        let texts = Texts {
            alias: &long,
            ..Texts::default()
        };
        let error = ModuleIndex::parse(&texts).unwrap_err();
        assert_eq!(
            error,
            KmodError::TooLong {
                file: "modules.alias",
                bytes: MAX_TEXT + 1
            }
        );
    }

    #[test]
    fn glob_knows_the_shells_signs() {
        for (pattern, text, expected) in [
            ("a?c", "abc", true),
            ("a?c", "ac", false),
            ("a*c*e", "abcde", true),
            ("a*c*e", "abcdf", false),
            ("[!a]x", "bx", true),
            ("[^a]x", "ax", false),
            ("[]a]", "]", true),
            ("[a-", "[a-", true),
            ("\\*", "*", true),
            ("\\*", "x", false),
            ("*", "", true),
            ("", "", true),
            ("", "a", false),
        ] {
            assert_eq!(glob(pattern.as_bytes(), text.as_bytes()), expected, "{pattern} {text}");
        }
    }

    #[test]
    fn many_stars_do_not_blow_up() {
        let pattern = "*a".repeat(2000) + "b";
        assert!(!glob(pattern.as_bytes(), "a".repeat(4000).as_bytes()));
    }

    #[test]
    fn a_chain_of_dependencies_does_not_overflow_the_stack() {
        let dep: String = (0..100_000).map(|n| format!("m{n}.ko: m{}.ko\n", n + 1)).collect();
        assert_eq!(index(&dep, "", "", "").resolve("m0").unwrap().len(), 100_000);
    }

    /// What a glob means, written down plainly (and exponentially).
    fn plain(pattern: &[u8], text: &[u8]) -> bool {
        match pattern {
            [] => text.is_empty(),
            [b'*', rest @ ..] => (0..=text.len()).any(|skip| plain(rest, &text[skip..])),
            [b'?', rest @ ..] => !text.is_empty() && plain(rest, &text[1..]),
            [c, rest @ ..] => text.first() == Some(c) && plain(rest, &text[1..]),
        }
    }

    proptest! {
        #[test]
        fn glob_agrees_with_the_plain_meaning(pattern in "[ab*?]{0,8}", text in "[abc]{0,8}") {
            prop_assert_eq!(glob(pattern.as_bytes(), text.as_bytes()), plain(pattern.as_bytes(), text.as_bytes()));
        }

        #[test]
        fn glob_ends_on_any_bytes(pattern: Vec<u8>, text: Vec<u8>) {
            glob(&pattern, &text);
        }

        #[test]
        fn an_alias_without_wildcards_matches_itself_only(name in "[a-z:_-]{1,12}", other in "[a-z:_-]{1,12}") {
            let index = index("", &format!("alias {name} driver\n"), "", "");
            prop_assert_eq!(index.by_modalias(&name), vec!["driver"]);
            let same = name.replace('-', "_") == other.replace('-', "_");
            prop_assert_eq!(index.by_modalias(&other).is_empty(), !same);
        }

        #[test]
        fn any_bytes_are_parsed(dep: Vec<u8>, alias: Vec<u8>, softdep: Vec<u8>, name: String) {
            let texts = Texts { dep: &dep, alias: &alias, softdep: &softdep, builtin: &dep };
            let index = ModuleIndex::parse(&texts).unwrap();
            let _ = index.resolve(&name);
            index.by_modalias(&name);
        }

        #[test]
        fn every_dependency_stands_before_its_module(edges in prop::collection::vec((0usize..12, 0usize..12), 0..40)) {
            // Edges point to higher numbers only, so there is no cycle.
            let dep: String = (0..12)
                .map(|from| {
                    let to: Vec<_> = edges.iter().filter(|(a, b)| *a == from && b > a).map(|(_, b)| format!("m{b}.ko")).collect();
                    format!("m{from}.ko: {}\n", to.join(" "))
                })
                .collect();
            let index = index(&dep, "", "", "");
            let order = index.resolve("m0").unwrap();
            let place = |n: usize| order.iter().position(|name| *name == format!("m{n}"));
            for (a, b) in edges.iter().filter(|(a, b)| b > a) {
                if let Some(a) = place(*a) {
                    prop_assert!(place(*b).is_some_and(|b| b < a));
                }
            }
        }
    }
}
