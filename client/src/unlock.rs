//! A laptop that was started from a stick of its own wants its disk's passphrase: asks the person at this desktop, and sends it.
//!
//! Counterpart: `server::offline::desk`. Specification: docs/protocol.md, "Unlocking". What is typed is not shown, goes through the
//! session's encryption only, and is wiped when it was sent. An offer is good for seconds and a person takes longer, so one offer tells what
//! is wanted, and a later one takes what was typed.

use std::net::SocketAddrV6;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context;
use stiefel_shared::key::StickKey;
use stiefel_shared::session::MachineId;
use stiefel_shared::unlock::{MAX_PASSPHRASE, Outcome, Passphrase, Unlocking};
use stiefel_sys::SYSFS;
use stiefel_sys::console::Console;
use stiefel_sys::keyboard::{Keyboard, Typed};

use crate::discovery::Found;
use crate::fetch::{self, Patience, Source};

/// How long the laptop may take to try a passphrase: its key derivation is slow on purpose.
const TRYING: Duration = Duration::from_mins(3);
/// How long nobody may press a key before the search goes on; what was typed is wiped then.
const TYPING: Duration = Duration::from_mins(2);
/// How old a typed passphrase gets that no laptop takes.
const KEPT: Duration = Duration::from_secs(30);

/// What became of an offer of a locked laptop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// Its next offer is wanted.
    Again,
    /// It is open, and will be ready soon.
    Open,
}

/// What was typed, for whom, and when.
struct Waiting {
    laptop: SocketAddrV6,
    passphrase: Passphrase,
    at: Instant,
}

/// Asks and sends.
pub(crate) struct Unlocker {
    console: &'static Console,
    waiting: Option<Waiting>,
    /// No try is taken before this.
    not_before: Option<Instant>,
}

impl Unlocker {
    pub(crate) const fn new(console: &'static Console) -> Self {
        Self {
            console,
            waiting: None,
            not_before: None,
        }
    }

    /// Wipes what was typed and no laptop has taken for too long.
    pub(crate) fn forget_old(&mut self) {
        self.waiting = self.waiting.take().filter(|waiting| waiting.is_young(Instant::now()));
    }

    /// Does what is next with this offer.
    pub(crate) async fn step(&mut self, key: &StickKey, machine: MachineId, found: &Found) -> anyhow::Result<Step> {
        if let Some(when) = self.not_before.take() {
            tokio::time::sleep_until(when.into()).await;
            // This offer may be too old by now.
            return Ok(Step::Again);
        }
        self.forget_old();
        if self
            .waiting
            .as_ref()
            .is_some_and(|waiting| waiting.laptop != found.address)
        {
            // Of another one, or of the same by another NIC: the one that it was typed for offers again.
            return Ok(Step::Again);
        }
        let Some(typed) = self.waiting.take() else {
            let answer = send(key, machine, found, &Passphrase::default()).await?;
            return self.ask(found, &answer).await;
        };
        self.console
            .info(&format!("{} tries the passphrase; that takes a while", found.hostname));
        let answer = send(key, machine, found, &typed.passphrase).await?;
        drop(typed);
        self.told(found, &answer)
    }

    /// Says what became of a passphrase.
    fn told(&mut self, found: &Found, answer: &Unlocking) -> anyhow::Result<Step> {
        let hostname = &found.hostname;
        self.not_before = (answer.wait > 0).then(|| Instant::now() + Duration::from_secs(answer.wait.into()));
        match answer.outcome {
            Outcome::Open => {
                self.not_before = None;
                self.console
                    .info(&format!("{hostname} is unlocked; it reads what is to be booted"));
                return Ok(Step::Open);
            }
            Outcome::Wrong => self
                .console
                .warn(&format!("that passphrase does not open {} of {hostname}", answer.wants)),
            Outcome::More => self.console.info(&format!(
                "that was right, but {hostname} has more that is locked: {}",
                answer.wants
            )),
            Outcome::Later | Outcome::Wanted => {}
        }
        if answer.wait > 0 {
            self.console
                .warn(&format!("{hostname} takes the next passphrase in {} s", answer.wait));
        }
        Ok(Step::Again)
    }

    /// Asks the person here.
    async fn ask(&mut self, found: &Found, answer: &Unlocking) -> anyhow::Result<Step> {
        if answer.outcome == Outcome::Open || answer.wait > 0 {
            return self.told(found, answer);
        }
        let question = format!(
            "{} wants the passphrase of {}. Type it here, then Enter; nothing of it is shown, and keys count as on a US keyboard",
            found.hostname, answer.wants
        );
        let console = self.console;
        let typed = tokio::task::spawn_blocking(move || type_it(console, &question)).await??;
        match typed {
            Typed::Line(line) if line.is_empty() => self.console.info("nothing was typed"),
            Typed::Line(line) => {
                self.waiting = Some(Waiting {
                    laptop: found.address,
                    passphrase: Passphrase::new(line)?,
                    at: Instant::now(),
                });
            }
            Typed::TooLong => self.console.warn(&format!(
                "that is longer than the {MAX_PASSPHRASE} bytes that a passphrase may have here"
            )),
            Typed::Nothing => self.console.info("no passphrase was typed; searching on"),
        }
        Ok(Step::Again)
    }
}

impl Waiting {
    /// Whether it was typed not long ago.
    fn is_young(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.at) < KEPT
    }
}

/// Asks, once keys are heard and are not shown any more.
fn type_it(console: &Console, question: &str) -> anyhow::Result<Typed> {
    let mut keyboard = Keyboard::open(Path::new("/dev"), Path::new(SYSFS))
        .context("this desktop hears no keyboard, so no passphrase can be typed")?;
    Ok(keyboard.line(|| console.warn(question), MAX_PASSPHRASE, TYPING)?)
}

async fn send(key: &StickKey, machine: MachineId, found: &Found, passphrase: &Passphrase) -> anyhow::Result<Unlocking> {
    let key = found.key(key);
    let source = Source {
        peer: found.address,
        challenge: &found.challenge,
        key: &key,
        machine,
        patience: Patience {
            silence: TRYING,
            ..Patience::default()
        },
    };
    let answer = fetch::unlock(source, passphrase).await;
    answer.with_context(|| format!("{} was not unlocked", found.hostname))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv6Addr;
    use stiefel_shared::discovery::State;
    use zeroize::Zeroizing;

    fn found(port: u16) -> Found {
        Found {
            hostname: "laptop".into(),
            state: State::Locked,
            address: SocketAddrV6::new(Ipv6Addr::LOCALHOST, port, 0, 0),
            interface: "lo".into(),
            challenge: [0; 16],
            ready_in: 0,
            woken: 0,
            activation: None,
        }
    }

    fn unlocker() -> Unlocker {
        Unlocker::new(Box::leak(Box::new(Console::open(
            Path::new("/none"),
            Path::new("/none"),
        ))))
    }

    fn waiting() -> Waiting {
        Waiting {
            laptop: found(1).address,
            passphrase: Passphrase::new(Zeroizing::new(b"x".to_vec())).unwrap(),
            at: Instant::now(),
        }
    }

    #[test]
    fn what_was_typed_is_kept_for_a_moment() {
        let waiting = waiting();
        assert!(waiting.is_young(waiting.at) && !waiting.is_young(waiting.at + KEPT));
    }

    #[tokio::test]
    async fn what_was_typed_for_one_laptop_goes_to_no_other_and_waits_for_its_next_offer() {
        let mut unlocker = unlocker();
        unlocker.waiting = Some(waiting());
        let (key, machine) = (StickKey::generate("a").unwrap(), "00".repeat(16).parse().unwrap());
        // Nobody listens there: a question would fail.
        assert_eq!(unlocker.step(&key, machine, &found(2)).await.unwrap(), Step::Again);
        assert!(unlocker.waiting.is_some());
        assert!(unlocker.step(&key, machine, &found(1)).await.is_err());
        assert!(unlocker.waiting.is_none());
    }

    #[test]
    fn a_laptop_that_says_wait_is_left_alone_for_so_long() {
        let mut unlocker = unlocker();
        let step = unlocker.told(&found(1), &Unlocking::new(Outcome::Wrong, 30, "sda2"));
        assert_eq!(step.unwrap(), Step::Again);
        assert!(
            unlocker
                .not_before
                .is_some_and(|when| when > Instant::now() + Duration::from_secs(20))
        );
        let step = unlocker.told(&found(1), &Unlocking::new(Outcome::Open, 30, ""));
        assert_eq!(step.unwrap(), Step::Open);
        assert_eq!(unlocker.not_before, None);
    }
}
