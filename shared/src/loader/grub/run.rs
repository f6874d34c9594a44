//! Runs a GRUB script: what it sets, which entries it has, and what the chosen one loads.

mod commands;

use std::collections::{BTreeMap, BTreeSet};

use super::script::{Block, Command, parse};
use super::words::{Piece, Word, expand};
use super::{Chosen, Entry, Files, OWN, Variables};

/// What a whole run may cost: bytes of words that were put in, plus [`STEP`] for each command.
const BUDGET: usize = 4 << 20;
/// What a command costs, in bytes: so there are 16,000 at most.
const STEP: usize = 256;
/// The longest words of one command, in bytes together.
const MAX_WORDS: usize = 64 << 10;
/// The deepest nesting of blocks, functions and included files.
const MAX_DEPTH: usize = 64;
/// The deepest nesting of menus.
const MAX_MENUS: usize = 8;
/// Variables that menus inside of menus see without `export`.
const GLOBAL: [&str; 6] = [
    "root",
    "prefix",
    "cmdpath",
    "grub_platform",
    "grub_cpu",
    "config_directory",
];

/// An entry, or a submenu.
#[derive(Debug, Clone)]
struct Item {
    title: String,
    id: Option<String>,
    /// What is run when it is chosen.
    body: Block,
    submenu: bool,
}

struct Run<'a> {
    files: &'a dyn Files,
    variables: Variables,
    exported: BTreeSet<String>,
    functions: BTreeMap<String, Block>,
    items: Vec<Item>,
    /// What was loaded so far.
    entry: Entry,
    /// All that was loaded, one after the other.
    loaded: Vec<Entry>,
    /// The environment block that was loaded last.
    block: Variables,
    budget: usize,
    depth: usize,
    /// The script is over.
    stopped: bool,
    /// The function is over.
    returning: bool,
    /// All branches of conditions are taken.
    all: bool,
}

/// The entry that GRUB boots by itself with the configuration `text`; `None` if the menu is empty.
#[must_use]
pub fn default_entry(text: &str, files: &dyn Files) -> Option<Chosen> {
    let mut run = Run::new(files);
    run.block(&parse(text));
    let mut wanted = run.variables.get("default").cloned().unwrap_or_default();
    let mut reason = run.reason(&wanted);
    let mut titles = Vec::new();
    for _ in 0..MAX_MENUS {
        let (index, below) = find(&run.items, &wanted);
        if index.is_none() && !wanted.is_empty() {
            reason = format!("the first entry of grub.cfg, as {wanted:?} is not there");
        }
        let below = below.to_owned();
        let items = std::mem::take(&mut run.items);
        let item = index.and_then(|index| items.get(index)).or_else(|| items.first())?;
        titles.push(item.title.clone());
        if !item.submenu {
            let entry = run.load(&item.body);
            return Some(Chosen { titles, entry, reason });
        }
        run.enter(&item.body);
        wanted = below;
    }
    None
}

/// Finds the first level of `a>b` among the items: a number, a title or an id; and what is left for the next level.
fn find<'a>(items: &[Item], wanted: &'a str) -> (Option<usize>, &'a str) {
    let (here, below) = split_path(wanted);
    let matching = |name: &str| {
        items
            .iter()
            .position(|item| item.title == name || item.id.as_deref() == Some(name))
    };
    let number = here.parse::<usize>().ok().filter(|number| *number < items.len());
    match number.or_else(|| matching(&here)) {
        Some(index) => (Some(index), below),
        // A title that holds an unescaped `>` is still found as a whole.
        None => (matching(&wanted.replace(">>", ">")), ""),
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

impl<'a> Run<'a> {
    fn new(files: &'a dyn Files) -> Self {
        let platform = if files.efi() { "efi" } else { "pc" };
        let own = format!("({OWN})");
        let variables = [
            ("prefix", own.as_str()),
            ("config_directory", &own),
            ("grub_platform", platform),
            ("grub_cpu", std::env::consts::ARCH),
            ("feature_menuentry_id", "y"),
            ("feature_platform_search_hint", "y"),
            ("feature_default_font_path", "y"),
            ("feature_all_video_module", "y"),
            ("feature_timeout_style", "y"),
            ("feature_200_final", "y"),
            ("?", "0"),
        ];
        Self {
            files,
            variables: variables
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .into(),
            exported: BTreeSet::new(),
            functions: BTreeMap::new(),
            items: Vec::new(),
            entry: Entry::default(),
            loaded: Vec::new(),
            block: Variables::new(),
            budget: BUDGET,
            depth: 0,
            stopped: false,
            returning: false,
            all: false,
        }
    }

    fn variable(&self, name: &str) -> &str {
        self.variables.get(name).map_or("", String::as_str)
    }

    /// Why GRUB takes `wanted`.
    fn reason(&self, wanted: &str) -> String {
        let saved = |name: &str| {
            self.block
                .get(name)
                .is_some_and(|value| !value.is_empty() && value == wanted)
        };
        let text = if wanted.is_empty() {
            "the first entry of grub.cfg"
        } else if saved("next_entry") {
            "next_entry in grubenv"
        } else if saved("saved_entry") {
            "the saved entry in grubenv"
        } else {
            "the default entry of grub.cfg"
        };
        text.to_owned()
    }

    /// Opens a menu inside of the menu, which sees exported variables only.
    fn enter(&mut self, body: &Block) {
        let exported = &self.exported;
        self.variables.retain(|name, _| {
            exported.contains(name) || GLOBAL.contains(&name.as_str()) || name.starts_with("feature_")
        });
        self.stopped = false;
        self.block(body);
    }

    /// Runs the chosen entry.
    fn load(&mut self, body: &Block) -> Entry {
        self.stopped = false;
        self.entry = Entry::default();
        let before = self.variables.clone();
        self.block(body);
        let entry = std::mem::take(&mut self.entry);
        if entry.kernel.is_none() || !entry.initrds.is_empty() {
            return entry;
        }
        // Some images try without an initrd first; the branch that comes when this has failed serves us.
        self.variables = before;
        self.all = true;
        self.stopped = false;
        self.loaded.clear();
        self.block(body);
        let with_initrd = |other: &Entry| other.kernel == entry.kernel && !other.initrds.is_empty();
        let other = self.loaded.drain(..).rfind(with_initrd);
        other.unwrap_or(entry)
    }

    /// Runs commands; the status of the last.
    fn block(&mut self, block: &Block) -> bool {
        if self.depth >= MAX_DEPTH {
            return false;
        }
        self.depth += 1;
        let mut status = true;
        for command in block.iter() {
            if !self.pay(STEP) || self.returning {
                break;
            }
            status = self.command(command);
            self.variables.insert("?".to_owned(), u8::from(!status).to_string());
        }
        self.depth -= 1;
        status
    }

    /// Whether the script may go on.
    fn pay(&mut self, cost: usize) -> bool {
        match self.budget.checked_sub(cost) {
            Some(left) if !self.stopped => self.budget = left,
            _ => self.stopped = true,
        }
        !self.stopped
    }

    fn words(&mut self, words: &[Word]) -> Vec<String> {
        let length = |piece: &Piece| match piece {
            Piece::Text(text) => text.len(),
            Piece::Variable { name, .. } => self.variable(name).len(),
        };
        let size = words.iter().flatten().map(length).sum::<usize>();
        let mut expanded = Vec::new();
        if size > MAX_WORDS {
            self.stopped = true;
        } else if self.pay(size) {
            for word in words {
                expand(word, &self.variables, &mut expanded);
            }
        }
        expanded
    }

    fn command(&mut self, command: &Command) -> bool {
        match command {
            Command::Simple(words, block) => {
                let words = self.words(words);
                self.simple(&words, block.as_ref())
            }
            Command::If(branches, otherwise) => self.condition(branches, otherwise),
            Command::While { until, condition, body } => {
                while self.pay(STEP) && !self.returning && self.block(condition) != *until {
                    self.block(body);
                    if self.all {
                        break;
                    }
                }
                true
            }
            Command::For { name, words, body } => {
                for word in self.words(words) {
                    if !self.pay(STEP) || self.returning {
                        break;
                    }
                    self.variables.insert(name.clone(), word);
                    self.block(body);
                }
                true
            }
            Command::Function { name, body } => {
                self.functions.insert(name.clone(), body.clone());
                true
            }
        }
    }

    fn condition(&mut self, branches: &[(Block, Block)], otherwise: &Block) -> bool {
        for (condition, body) in branches {
            let met = self.block(condition);
            if self.all {
                self.block(body);
            } else if met {
                return self.block(body);
            }
        }
        self.block(otherwise)
    }
}
