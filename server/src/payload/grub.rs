//! GRUB's menu, read as text: which entry GRUB would boot, and what that entry loads.
//!
//! Specification: GRUB manual, "Writing full configuration files directly" (shell-like language), "default", "menuentry",
//! "linux", "initrd", "search", and the environment block. Conditions are not evaluated: entries and assignments of all
//! branches count, in their order, which is right for what grub-mkconfig writes. `blscfg` is only noticed.

use std::collections::BTreeMap;

/// Variables of GRUB: from the environment block, and what the configuration sets.
pub type Variables = BTreeMap<String, String>;

/// The deepest nesting of menus and blocks that is followed.
const MAX_DEPTH: usize = 32;

/// GRUB's menu.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Menu {
    /// The entries, in order.
    pub items: Vec<Item>,
    /// What the variables are at the end.
    pub variables: Variables,
    /// `blscfg` is called: there are entries in loader/entries besides.
    pub blscfg: bool,
}

/// An entry, or a submenu.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// The title.
    pub title: String,
    /// `--id`.
    pub id: Option<String>,
    /// What it does.
    pub body: Body,
}

/// What an item does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Body {
    /// Shows more items.
    Submenu(Vec<Item>),
    /// Boots something.
    Entry(Entry),
}

/// What an entry loads. Paths are as GRUB sees them: relative to the file system that it searched.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Entry {
    /// UUID of the file system that is searched for last.
    pub fs_uuid: Option<String>,
    /// The kernel; none for a chain loader, memtest and the like.
    pub kernel: Option<String>,
    /// The kernel's arguments.
    pub cmdline: String,
    /// The initrds, in order.
    pub initrds: Vec<String>,
}

/// Reads an environment block (grubenv): `name=value` lines, padded with `#`.
#[must_use]
pub fn parse_env(text: &str) -> Variables {
    text.lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.split_once('='))
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect()
}

/// A part of a word.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Piece {
    Text(String),
    /// A variable; unquoted ones are split into words.
    Variable {
        name: String,
        quoted: bool,
    },
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Token {
    Word(Vec<Piece>),
    Open,
    Close,
    /// A newline or `;`.
    End,
}

/// Splits text into words, braces and ends of commands. Never fails: what is unclosed ends with the text.
fn tokens(text: &str) -> Vec<Token> {
    let mut tokens = Vec::new();
    let mut chars = text.chars().peekable();
    while let Some(&c) = chars.peek() {
        match c {
            '\n' | ';' => {
                chars.next();
                tokens.push(Token::End);
            }
            '#' => while chars.next_if(|c| *c != '\n').is_some() {},
            c if c.is_whitespace() => {
                chars.next();
            }
            _ => {
                let word = word(&mut chars);
                match word.as_slice() {
                    [Piece::Text(text)] if text == "{" => tokens.push(Token::Open),
                    [Piece::Text(text)] if text == "}" => tokens.push(Token::Close),
                    _ => tokens.push(Token::Word(word)),
                }
            }
        }
    }
    tokens
}

type Chars<'a> = std::iter::Peekable<std::str::Chars<'a>>;

/// One word, up to white space or `;` outside of quotes.
fn word(chars: &mut Chars<'_>) -> Vec<Piece> {
    let (mut pieces, mut text) = (Vec::new(), String::new());
    let (mut double, mut any_quote) = (false, false);
    while let Some(&c) = chars.peek() {
        if !double && (c.is_whitespace() || c == ';') {
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
    // An empty quoted word is a word; a quoted brace is none of the grammar's.
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

/// The words that a token stands for, with its variables' values; an unset variable is empty.
fn expand(pieces: &[Piece], variables: &Variables) -> Vec<String> {
    let mut words = Vec::new();
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
    words
}

/// Reads grub.cfg with the variables of the environment block.
#[must_use]
pub fn parse(text: &str, env: &Variables) -> Menu {
    let tokens = tokens(text);
    let mut parser = Parser {
        tokens: &tokens,
        at: 0,
        variables: env.clone(),
        blscfg: false,
        fs_uuid: None,
    };
    // Every GRUB since 2.00 has it; the configuration asks, which is not evaluated here.
    parser.assign("menuentry_id_option", "--id");
    let items = parser.items(0);
    Menu {
        items,
        variables: parser.variables,
        blscfg: parser.blscfg,
    }
}

struct Parser<'a> {
    tokens: &'a [Token],
    at: usize,
    variables: Variables,
    blscfg: bool,
    /// The last file system searched for outside of entries.
    fs_uuid: Option<String>,
}

impl Parser<'_> {
    fn assign(&mut self, name: &str, value: &str) {
        // The configuration sets it empty for a GRUB that is older than all we meet.
        if name != "menuentry_id_option" || value == "--id" {
            self.variables.insert(name.to_owned(), value.to_owned());
        }
    }

    /// The words of one command, up to its end or a brace; `None` at the end of the text.
    fn command(&mut self) -> Option<Vec<String>> {
        while self.tokens.get(self.at) == Some(&Token::End) {
            self.at += 1;
        }
        self.tokens.get(self.at)?;
        let mut words = Vec::new();
        while let Some(Token::Word(pieces)) = self.tokens.get(self.at) {
            words.extend(expand(pieces, &self.variables));
            self.at += 1;
        }
        Some(words)
    }

    /// The items up to the brace that closes this menu, or to the end.
    fn items(&mut self, depth: usize) -> Vec<Item> {
        let mut items = Vec::new();
        while let Some(words) = self.command() {
            let opens = match self.tokens.get(self.at) {
                Some(Token::Open) => true,
                Some(Token::Close) => {
                    self.at += 1;
                    if words.is_empty() {
                        return items;
                    }
                    false
                }
                _ => false,
            };
            if opens {
                self.at += 1;
                items.extend(self.block(&words, depth));
            } else {
                self.top_level(&words);
            }
        }
        items
    }

    /// What follows an opening brace: an entry, a submenu, or a function, which is skipped.
    fn block(&mut self, words: &[String], depth: usize) -> Option<Item> {
        let Some((keyword, arguments)) = without_keywords(words).split_first() else {
            self.skip();
            return None;
        };
        if depth >= MAX_DEPTH || !matches!(keyword.as_str(), "menuentry" | "submenu") {
            self.skip();
            return None;
        }
        let (title, id) = title_and_id(arguments);
        let body = if keyword == "submenu" {
            Body::Submenu(self.items(depth + 1))
        } else {
            Body::Entry(self.entry())
        };
        Some(Item { title, id, body })
    }

    fn skip(&mut self) {
        let mut depth = 1_usize;
        while let Some(token) = self.tokens.get(self.at) {
            self.at += 1;
            match token {
                Token::Open => depth += 1,
                Token::Close => depth -= 1,
                _ => {}
            }
            if depth == 0 {
                return;
            }
        }
    }

    fn top_level(&mut self, words: &[String]) {
        let words = without_keywords(words);
        if let Some((name, value)) = assignment(words) {
            self.assign(name, value);
        } else if let Some(uuid) = searched_uuid(words) {
            self.fs_uuid = Some(uuid);
        } else if words.first().is_some_and(|word| word == "blscfg") {
            self.blscfg = true;
        }
    }

    /// The commands of an entry. Where several kernels are loaded (branches of a condition), one with an initrd is taken.
    fn entry(&mut self) -> Entry {
        let mut loaded: Vec<Entry> = Vec::new();
        let mut fs_uuid = self.fs_uuid.clone();
        let outside = self.variables.clone();
        while let Some(words) = self.command() {
            let words = without_keywords(&words);
            match words.split_first() {
                Some((command, arguments)) if matches!(command.as_str(), "linux" | "linux16" | "linuxefi") => {
                    if let Some((kernel, arguments)) = arguments.split_first() {
                        loaded.push(Entry {
                            fs_uuid: fs_uuid.clone(),
                            kernel: Some(kernel.clone()),
                            cmdline: join(arguments),
                            initrds: Vec::new(),
                        });
                    }
                }
                Some((command, arguments)) if matches!(command.as_str(), "initrd" | "initrd16" | "initrdefi") => {
                    if let Some(entry) = loaded.last_mut() {
                        entry.initrds = arguments.to_vec();
                    }
                }
                _ => {
                    if let Some((name, value)) = assignment(words) {
                        self.assign(name, value);
                    }
                    fs_uuid = searched_uuid(words).or(fs_uuid);
                }
            }
            match self.tokens.get(self.at) {
                Some(Token::Close) => {
                    self.at += 1;
                    break;
                }
                Some(Token::Open) => {
                    self.at += 1;
                    self.skip();
                }
                _ => {}
            }
        }
        self.variables = outside;
        let last = loaded.len().saturating_sub(1);
        let with_initrd = loaded.iter().rposition(|entry| !entry.initrds.is_empty());
        loaded.into_iter().nth(with_initrd.unwrap_or(last)).unwrap_or_default()
    }
}

/// The command behind `then`, `else` and the like.
fn without_keywords(words: &[String]) -> &[String] {
    let keywords = words
        .iter()
        .take_while(|word| matches!(word.as_str(), "then" | "else" | "do" | "fi" | "done" | "export"))
        .count();
    words.get(keywords..).unwrap_or_default()
}

/// `set name=value` or `name=value`.
fn assignment(words: &[String]) -> Option<(&str, &str)> {
    let text = match words {
        [set, text] if set == "set" => text,
        [text] => text,
        _ => return None,
    };
    let (name, value) = text.split_once('=')?;
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '_';
    (!name.is_empty() && name.chars().all(plain)).then_some((name, value))
}

/// The UUID in `search --fs-uuid … UUID` or `search.fs_uuid UUID …`.
fn searched_uuid(words: &[String]) -> Option<String> {
    let (command, arguments) = words.split_first()?;
    match command.as_str() {
        "search.fs_uuid" => arguments.first().cloned(),
        "search" if arguments.iter().any(|word| word == "--fs-uuid" || word == "-u") => {
            arguments.iter().rfind(|word| !word.starts_with('-')).cloned()
        }
        _ => None,
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

/// The entry that is booted, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chosen<'a> {
    /// The titles on the way to it.
    pub titles: Vec<&'a str>,
    /// What it loads.
    pub entry: &'a Entry,
    /// What named it.
    pub reason: &'static str,
}

impl Menu {
    /// The entry GRUB boots by itself: `next_entry` of the environment block, else the last `set default=`, else the first.
    ///
    /// `None` if the menu is empty.
    #[must_use]
    pub fn default_entry(&self, env: &Variables) -> Option<Chosen<'_>> {
        let named = |name: &str| env.get(name).filter(|value| !value.is_empty());
        let (wanted, reason) = if let Some(next) = named("next_entry") {
            (next.as_str(), "next_entry in grubenv")
        } else if let Some(default) = self.variables.get("default").filter(|name| !name.is_empty()) {
            (default.as_str(), "the default entry of grub.cfg")
        } else {
            ("0", "the first entry of grub.cfg")
        };
        let mut titles = Vec::new();
        let entry = descend(&self.items, wanted, &mut titles)?;
        Some(Chosen { titles, entry, reason })
    }
}

/// Follows `a>b` through the menus: a title, an id or a number per level; what is not found is the first, as in GRUB.
fn descend<'a>(items: &'a [Item], wanted: &str, titles: &mut Vec<&'a str>) -> Option<&'a Entry> {
    let (here, below) = split_path(wanted);
    let whole = wanted.replace(">>", ">");
    let matching = |name: &str| {
        items
            .iter()
            .position(|item| item.title == name || item.id.as_deref() == Some(name))
    };
    let number = here.parse::<usize>().ok();
    // A title that holds an unescaped `>` is still found as a whole.
    let (index, below) = match number.or_else(|| matching(&here)) {
        Some(index) => (index, below),
        None => (matching(&whole).unwrap_or(0), ""),
    };
    let item = items.get(index).or_else(|| items.first())?;
    titles.push(&item.title);
    match &item.body {
        Body::Entry(entry) => Some(entry),
        Body::Submenu(items) => descend(items, below, titles),
    }
}

/// The first level of a path, unescaped (`>>` is a `>` in a name), and the rest.
fn split_path(path: &str) -> (String, &str) {
    let mut name = String::new();
    let mut chars = path.char_indices().peekable();
    while let Some((at, c)) = chars.next() {
        if c == '>' && chars.next_if(|(_, next)| *next == '>').is_none() {
            return (name, path.get(at + 1..).unwrap_or_default());
        }
        name.push(c);
    }
    (name, "")
}
