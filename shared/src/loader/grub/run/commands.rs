//! GRUB's commands that matter: variables, files, entries, and what is loaded.

use super::super::condition;
use super::super::script::{Block, parse};
use super::super::{BY_LABEL, BY_UUID, Entry, Location, Other, parse_env};
use super::{Item, Run, STEP};
use crate::loader::bls;
use crate::loader::version;

/// Where entries of the Boot Loader Specification lie, on the file system itself or in its folder boot.
const ENTRIES: [&str; 2] = ["/loader/entries", "/boot/loader/entries"];
/// Where unified kernel images lie.
const IMAGES: [&str; 1] = ["/EFI/Linux"];
/// Commands that ask about something that is not so here, e.g. a key that is held.
const FALSE: [&str; 7] = [
    "false",
    "keystatus",
    "cmostest",
    "regexp",
    "smbios",
    "ismounted",
    "pgp_verify",
];
/// Commands that start something other than Linux.
const STARTERS: [&str; 16] = [
    "multiboot",
    "multiboot2",
    "xen_hypervisor",
    "ntldr",
    "freedos",
    "appleloader",
    "kfreebsd",
    "knetbsd",
    "kopenbsd",
    "plan9",
    "truecrypt",
    "xnu_kernel",
    "fwsetup",
    "halt",
    "reboot",
    "legacy_kernel",
];

impl Run<'_> {
    /// A command of words, with the block behind it.
    pub(super) fn simple(&mut self, words: &[String], block: Option<&Block>) -> bool {
        let Some((command, arguments)) = words.split_first() else {
            return true;
        };
        if let Some(body) = self.functions.get(command.as_str()).cloned() {
            return self.call(&body, arguments);
        }
        match command.as_str() {
            "!" => {
                // All at once: each on top of the other would be as deep as the line is long.
                let more = arguments.iter().take_while(|word| *word == "!").count();
                let status = self.simple(arguments.get(more..).unwrap_or_default(), block);
                status ^ more.is_multiple_of(2)
            }
            "set" => {
                for text in arguments {
                    self.assign(text);
                }
                true
            }
            "unset" => {
                for name in arguments {
                    self.variables.remove(name);
                }
                true
            }
            "export" => {
                self.exported.extend(arguments.iter().cloned());
                true
            }
            "increment" | "decrement" => self.count(command == "increment", arguments),
            "load_env" => self.load_env(arguments),
            "search" | "search.fs_uuid" | "search.fs_label" | "search.file" => self.search(command, arguments),
            "[" | "test" => self.test(command, arguments),
            "return" => {
                self.returning = true;
                true
            }
            "exit" | "normal_exit" => {
                self.stopped = true;
                true
            }
            "source" | "." | "configfile" => self.source(command, arguments),
            "menuentry" | "submenu" | "hiddenentry" => {
                if let Some(body) = block {
                    self.item(arguments, body.clone(), command == "submenu");
                }
                true
            }
            "blscfg" => self.bls_entries(),
            "uki" => self.images(),
            _ => self.load_or_other(command, arguments),
        }
    }

    /// What loads a kernel or starts something else; the rest does nothing here.
    fn load_or_other(&mut self, command: &str, arguments: &[String]) -> bool {
        match command {
            "linux" | "linux16" | "linuxefi" => self.linux(arguments),
            "initrd" | "initrd16" | "initrdefi" => {
                let root = self.variable("root").to_owned();
                self.entry.initrds = arguments
                    .iter()
                    .map(|path| Location::parse(path, &root).unwrap_or_else(|| unknown(path)))
                    .collect();
                self.loaded.push(self.entry.clone());
                true
            }
            "chainloader" => {
                let program = arguments.iter().find(|word| !word.starts_with('-'));
                let root = self.variable("root").to_owned();
                let place = program.map(|path| Location::parse(path, &root).unwrap_or_else(|| unknown(path)));
                self.start(place.map_or(Other::Command(command.to_owned()), Other::Program))
            }
            _ if STARTERS.contains(&command) => self.start(Other::Command(command.to_owned())),
            _ if command.contains('=') => self.assign(command),
            _ => !FALSE.contains(&command),
        }
    }

    fn start(&mut self, other: Other) -> bool {
        self.entry = Entry {
            other: Some(other),
            ..Entry::default()
        };
        true
    }

    fn linux(&mut self, arguments: &[String]) -> bool {
        let Some((kernel, arguments)) = arguments.split_first() else {
            return false;
        };
        let kernel = Location::parse(kernel, self.variable("root")).unwrap_or_else(|| unknown(kernel));
        self.entry = Entry {
            kernel: Some(kernel),
            cmdline: join(arguments),
            ..Entry::default()
        };
        true
    }

    /// `name=value`.
    fn assign(&mut self, text: &str) -> bool {
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '_';
        match text.split_once('=') {
            Some((name, value)) if !name.is_empty() && name.chars().all(plain) => {
                self.variables.insert(name.to_owned(), value.to_owned());
                true
            }
            _ => false,
        }
    }

    fn count(&mut self, up: bool, arguments: &[String]) -> bool {
        let Some(name) = arguments.first() else { return false };
        let value: i64 = self.variable(name).parse().unwrap_or_default();
        let value = value.saturating_add(if up { 1 } else { -1 });
        self.variables.insert(name.clone(), value.to_string());
        true
    }

    fn call(&mut self, body: &Block, arguments: &[String]) -> bool {
        let is_argument = |name: &str| matches!(name, "#" | "@" | "*") || name.bytes().all(|b| b.is_ascii_digit());
        let length = arguments.iter().map(String::len).sum::<usize>();
        if !self.pay(2 * length + arguments.len() * STEP) {
            return false;
        }
        let outside = self.variables.iter().filter(|(name, _)| is_argument(name));
        let outside: Vec<(String, String)> = outside.map(|(name, value)| (name.clone(), value.clone())).collect();
        self.variables.retain(|name, _| !is_argument(name));
        for (index, argument) in arguments.iter().enumerate() {
            self.variables.insert((index + 1).to_string(), argument.clone());
        }
        self.variables.insert("#".to_owned(), arguments.len().to_string());
        for name in ["@", "*"] {
            self.variables.insert(name.to_owned(), arguments.join(" "));
        }
        let status = self.block(body);
        self.returning = false;
        self.variables.retain(|name, _| !is_argument(name));
        self.variables.extend(outside);
        status
    }

    fn place(&self, path: &str) -> Option<Location> {
        Location::parse(path, self.variable("root"))
    }

    fn test(&self, command: &str, arguments: &[String]) -> bool {
        let words = match arguments.split_last() {
            Some((last, words)) if command == "[" && last == "]" => words,
            _ if command == "[" => return false,
            _ => arguments,
        };
        condition::holds(words, &|path| self.files.kind(&self.place(path)?))
    }

    /// `load_env [--file FILE] [NAME…]`.
    fn load_env(&mut self, arguments: &[String]) -> bool {
        let mut file = format!("{}/grubenv", self.variable("prefix"));
        let mut names = Vec::new();
        let mut arguments = arguments.iter();
        while let Some(word) = arguments.next() {
            match word.as_str() {
                "-f" | "--file" => file = arguments.next().cloned().unwrap_or_default(),
                _ if word.starts_with("--file=") => file = word.split_once('=').map_or("", |(_, file)| file).to_owned(),
                _ if word.starts_with('-') => {}
                _ => names.push(word),
            }
        }
        let Some(text) = self.place(&file).and_then(|place| self.files.text(&place)) else {
            return false;
        };
        if !self.pay(text.len()) {
            return false;
        }
        let mut block = parse_env(&text);
        block.retain(|name, _| names.is_empty() || names.contains(&name));
        self.variables.extend(block.clone());
        self.block.extend(block);
        true
    }

    /// `search --set=VARIABLE --fs-uuid|--label|--file NAME`. Hints only tell where to look first.
    fn search(&mut self, command: &str, arguments: &[String]) -> bool {
        let mut kind = match command {
            "search.fs_uuid" => BY_UUID,
            "search.fs_label" => BY_LABEL,
            _ => "",
        };
        let (mut variable, mut names) = ("root", Vec::new());
        let mut words = arguments.iter().map(String::as_str);
        while let Some(word) = words.next() {
            match word {
                "-u" | "--fs-uuid" => kind = BY_UUID,
                "-l" | "--label" | "--fs-label" => kind = BY_LABEL,
                "-h" | "--hint" => {
                    words.next();
                }
                _ if word.starts_with("--set=") => variable = word.get(6..).unwrap_or_default(),
                _ if word.starts_with('-') => {}
                _ => names.push(word),
            }
        }
        // `search.fs_uuid UUID VARIABLE HINT…`
        let (name, variable) = match names.as_slice() {
            [name, given, ..] if command != "search" => (*name, *given),
            [.., name] => (*name, variable),
            [] => return false,
        };
        let value = if kind.is_empty() {
            String::new()
        } else {
            format!("{kind}{name}")
        };
        self.assign(&format!("{variable}={value}"))
    }

    fn source(&mut self, command: &str, arguments: &[String]) -> bool {
        let place = arguments
            .iter()
            .find(|word| !word.starts_with('-'))
            .and_then(|path| self.place(path));
        let Some(text) = place.and_then(|place| self.files.text(&place)) else {
            return false;
        };
        if !self.pay(text.len()) {
            return false;
        }
        let status = self.block(&parse(&text));
        // Another configuration instead of this one.
        self.stopped |= command == "configfile";
        status
    }

    fn item(&mut self, arguments: &[String], body: Block, submenu: bool) {
        let (title, id) = title_and_id(arguments);
        self.items.push(Item {
            title,
            id,
            body,
            submenu,
        });
    }

    /// The files in the first folder that has any with this ending, newest first.
    fn found(&self, folders: &[&str], ending: &str) -> Vec<(Location, String)> {
        let devices = [self.variable("boot"), self.variable("root"), ""];
        let places = devices.iter().filter(|device| !device.is_empty()).chain([&""]);
        let mut found: Vec<(Location, String)> = places
            .flat_map(|device| folders.iter().map(move |folder| (*device, *folder)))
            .map(|(device, path)| {
                let place = |path: String| Location {
                    device: device.to_owned(),
                    path,
                };
                let names = self.files.names(&place(path.to_owned()));
                let names = names.into_iter().take(bls::MAX_ENTRIES);
                let ending = |name: String| Some(name.strip_suffix(ending)?.to_owned());
                names
                    .filter_map(ending)
                    .map(|name| (place(format!("{path}/{name}")), name))
                    .collect()
            })
            .find(|found: &Vec<_>| !found.is_empty())
            .unwrap_or_default();
        for (place, _) in &mut found {
            place.path.push_str(ending);
        }
        found.sort_by(|(_, a), (_, b)| version::packages(b, a));
        found
    }

    /// `blscfg`: the entries of the Boot Loader Specification, by their files' names.
    fn bls_entries(&mut self) -> bool {
        for (place, id) in self.found(&ENTRIES, ".conf") {
            let Some(text) = self.files.text(&place) else { continue };
            if !self.pay(text.len() + STEP) {
                return false;
            }
            let entry = bls::parse(&text);
            let Some(kernel) = &entry.linux else { continue };
            let options = entry.options.as_deref().unwrap_or("$default_kernelopts");
            let mut script = format!("linux {kernel} {options}\n");
            if !entry.initrds.is_empty() {
                script += &format!("initrd {}\n", entry.initrds.join(" "));
            }
            self.items.push(Item {
                title: entry.title.clone().unwrap_or_else(|| id.clone()),
                id: Some(id),
                body: parse(&script),
                submenu: false,
            });
        }
        true
    }

    /// `uki`: the unified kernel images.
    fn images(&mut self) -> bool {
        for (place, id) in self.found(&IMAGES, ".efi") {
            let script = format!("chainloader '({}){}'\n", place.device, place.path.replace('\'', ""));
            self.items.push(Item {
                title: id.clone(),
                id: Some(id),
                body: parse(&script),
                submenu: false,
            });
        }
        true
    }
}

/// What is no path: found nowhere, but told by its name.
fn unknown(path: &str) -> Location {
    Location {
        device: String::new(),
        path: path.to_owned(),
    }
}

/// Title and `--id` of a menuentry's or submenu's words.
fn title_and_id(arguments: &[String]) -> (String, Option<String>) {
    let (mut title, mut id) = (None, None);
    let mut arguments = arguments.iter();
    while let Some(word) = arguments.next() {
        match word.as_str() {
            "--id" => id = arguments.next().cloned(),
            "--class" | "--users" | "--hotkey" | "--source" => {
                arguments.next();
            }
            _ if word.starts_with("--id=") => id = word.get(5..).map(str::to_owned),
            _ if word.starts_with("--") => {}
            _ => {
                title.get_or_insert(word);
            }
        }
    }
    (title.cloned().unwrap_or_default(), id)
}

/// Arguments as one command line; one that holds spaces is quoted, as GRUB does.
fn join(words: &[String]) -> String {
    let quoted: Vec<_> = words
        .iter()
        .map(|word| {
            if word.contains(char::is_whitespace) && !word.contains('"') {
                format!("\"{word}\"")
            } else {
                word.clone()
            }
        })
        .collect();
    quoted.join(" ")
}
