//! GRUB's grammar: words become commands, conditions, loops and functions.
//!
//! Specification: GRUB manual, "Writing full configuration files directly". Never fails: what is unclosed ends with the
//! text, what closes nothing is left out.

use std::rc::Rc;

use super::words::{Piece, Token, Word, tokens};

/// The deepest nesting that is followed; what lies deeper is left out.
const MAX_DEPTH: usize = 32;

/// Commands, one after the other; shared, as menu entries keep theirs for later.
pub(super) type Block = Rc<[Command]>;

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Command {
    /// Words; `menuentry` and `submenu` have a block behind them.
    Simple(Vec<Word>, Option<Block>),
    /// Conditions with what they lead to, and what else.
    If(Vec<(Block, Block)>, Block),
    /// `until` goes on while the condition fails.
    While {
        until: bool,
        condition: Block,
        body: Block,
    },
    For {
        name: String,
        words: Vec<Word>,
        body: Block,
    },
    Function {
        name: String,
        body: Block,
    },
}

/// Reads a whole text.
pub(super) fn parse(text: &str) -> Block {
    let tokens = tokens(text);
    let mut parser = Parser { tokens: &tokens, at: 0 };
    let mut commands = Vec::new();
    while parser.at < tokens.len() {
        parser.commands(&mut commands, &[], 0);
        // A keyword or a brace that closes nothing.
        parser.at += 1;
    }
    commands.into()
}

struct Parser<'a> {
    tokens: &'a [Token],
    at: usize,
}

impl Parser<'_> {
    /// The keyword or command name that comes next.
    fn keyword(&self) -> Option<&str> {
        match self.tokens.get(self.at)? {
            Token::Word(word) => match word.as_slice() {
                [Piece::Text(text)] => Some(text),
                _ => None,
            },
            _ => None,
        }
    }

    fn skip_if(&mut self, keyword: &str) -> bool {
        let found = self.keyword() == Some(keyword);
        self.at += usize::from(found);
        found
    }

    /// Adds commands up to one of the keywords, or a closing brace, or the end; that stays.
    fn commands(&mut self, into: &mut Vec<Command>, until: &[&str], depth: usize) {
        const CLOSERS: [&str; 6] = ["then", "elif", "else", "fi", "do", "done"];
        loop {
            match self.tokens.get(self.at) {
                None | Some(Token::Close) => return,
                Some(Token::End) => self.at += 1,
                // A brace where a command should be: as in GRUB, only a group.
                Some(Token::Open) => {
                    self.at += 1;
                    let block = self.block(depth + 1);
                    into.push(Command::If(Vec::new(), block));
                }
                Some(Token::Word(_)) => {
                    let stray = match self.keyword() {
                        Some(keyword) if until.contains(&keyword) => return,
                        Some(keyword) => CLOSERS.contains(&keyword),
                        None => false,
                    };
                    if stray {
                        self.at += 1;
                    } else {
                        into.extend(self.command(depth));
                    }
                }
            }
        }
    }

    /// As [`Self::commands`], as a block. Too deep, they are read and forgotten.
    fn until(&mut self, keywords: &[&str], depth: usize) -> Block {
        let mut commands = Vec::new();
        if depth < MAX_DEPTH {
            self.commands(&mut commands, keywords, depth);
        } else {
            self.skip();
        }
        commands.into()
    }

    /// What stands in braces, of which the first was read.
    fn block(&mut self, depth: usize) -> Block {
        let block = self.until(&[], depth);
        self.at += 1;
        block
    }

    /// Goes to the brace that closes this block.
    fn skip(&mut self) {
        let mut open = 0_usize;
        while let Some(token) = self.tokens.get(self.at) {
            match token {
                Token::Open => open += 1,
                Token::Close if open == 0 => return,
                Token::Close => open -= 1,
                _ => {}
            }
            self.at += 1;
        }
    }

    fn command(&mut self, depth: usize) -> Option<Command> {
        match self.keyword() {
            Some("if") => {
                self.at += 1;
                Some(self.condition(depth + 1))
            }
            Some(keyword @ ("while" | "until")) => {
                let until = keyword == "until";
                self.at += 1;
                let condition = self.until(&["do"], depth + 1);
                let body = self.body(depth + 1);
                Some(Command::While { until, condition, body })
            }
            Some("for") => {
                self.at += 1;
                let name = self.keyword().unwrap_or_default().to_owned();
                self.at += 1;
                self.skip_if("in");
                let words = self.words();
                while self.tokens.get(self.at) == Some(&Token::End) {
                    self.at += 1;
                }
                let body = self.body(depth + 1);
                Some(Command::For { name, words, body })
            }
            Some("function") => {
                self.at += 1;
                let name = self.keyword().unwrap_or_default().to_owned();
                self.at += 1;
                let opens = self.tokens.get(self.at) == Some(&Token::Open);
                opens.then(|| {
                    self.at += 1;
                    let body = self.block(depth + 1);
                    Command::Function { name, body }
                })
            }
            _ => {
                let words = self.words();
                let block = (self.tokens.get(self.at) == Some(&Token::Open)).then(|| {
                    self.at += 1;
                    self.block(depth + 1)
                });
                Some(Command::Simple(words, block))
            }
        }
    }

    fn words(&mut self) -> Vec<Word> {
        let mut words = Vec::new();
        while let Some(Token::Word(word)) = self.tokens.get(self.at) {
            words.push(word.clone());
            self.at += 1;
        }
        words
    }

    /// What follows `if`.
    fn condition(&mut self, depth: usize) -> Command {
        let mut branches = Vec::new();
        loop {
            let condition = self.until(&["then", "fi"], depth);
            self.skip_if("then");
            let body = self.until(&["elif", "else", "fi"], depth);
            branches.push((condition, body));
            if !self.skip_if("elif") {
                break;
            }
        }
        let otherwise: Block = if self.skip_if("else") {
            self.until(&["fi"], depth)
        } else {
            Rc::new([])
        };
        self.skip_if("fi");
        Command::If(branches, otherwise)
    }

    /// What stands between `do` and `done`.
    fn body(&mut self, depth: usize) -> Block {
        self.skip_if("do");
        let body = self.until(&["done"], depth);
        self.skip_if("done");
        body
    }
}
