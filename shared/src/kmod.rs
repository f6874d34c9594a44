//! The index of kernel modules: which file holds a module, what must be loaded before it, who drives a device.
//!
//! Read by `stiefel_sys::module` (which loads), by the collector and by the ramdisk builder (which copy).
//! Formats: modules.dep(5), modprobe.d(5) "alias" and "softdep", as depmod(8) writes them below
//! `/lib/modules/VERSION`. Lines that cannot be understood are skipped, as modprobe does; an over-long file is
//! refused.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};

/// The longest index file taken, in bytes. Debian's largest (modules.alias) has 1.6 MB.
pub const MAX_TEXT: usize = 16 << 20;
/// The longest alias pattern and modalias taken, in bytes: the kernel's fit a page.
const MAX_ALIAS: usize = 4096;

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

/// The firmware files that a module asks for: the fields `firmware=…` of `modinfo`, its section `.modinfo` (`linux/moduleparam.h`:
/// fields end with a zero byte), or the whole module. Names that lead elsewhere are left out.
#[must_use]
pub fn firmware_names(modinfo: &[u8]) -> BTreeSet<String> {
    modinfo
        .split(|byte| *byte == 0)
        .filter_map(|field| std::str::from_utf8(field).ok()?.strip_prefix("firmware="))
        .filter(|name| name.split('/').all(|part| !matches!(part, "" | "." | "..")))
        .map(str::to_owned)
        .collect()
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
            let depends = depends.split_ascii_whitespace().map(normalise).collect();
            self.modules.push(Module {
                name,
                path: path.to_owned(),
                depends,
            });
        }
    }

    fn add_alias(&mut self, order: usize, line: &str) {
        let mut words = line.split_ascii_whitespace();
        let (Some("alias"), Some(pattern), Some(module)) = (words.next(), words.next(), words.next()) else {
            return;
        };
        if pattern.len() > MAX_ALIAS {
            return;
        }
        let pattern = underscore_pattern(pattern);
        let wildcard = |byte| matches!(byte, b'*' | b'?' | b'[' | b'\\');
        let literal = pattern.bytes().position(wildcard).unwrap_or(pattern.len());
        let alias = Alias {
            order,
            module: normalise(module),
            pattern,
        };
        let key = alias.pattern.get(..literal).unwrap_or_default();
        match self.aliases.get_mut(key) {
            Some(same) => same.push(alias),
            None => {
                self.lengths.insert(key.len());
                self.aliases.insert(key.to_owned(), vec![alias]);
            }
        }
    }

    fn add_soft(&mut self, line: &str) {
        let mut words = line.split_ascii_whitespace();
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
        if modalias.len() > MAX_ALIAS {
            return Vec::new();
        }
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
        .map(str::trim_ascii)
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
}

/// `-` becomes `_` but for ranges in brackets, as depmod does it.
fn underscore_pattern(pattern: &str) -> String {
    if !pattern.contains('-') {
        return pattern.to_owned();
    }
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
mod tests;
