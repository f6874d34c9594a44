//! Where a desktop sends the passphrase of a laptop that was started from a stick of its own.
//!
//! Counterpart: `client::unlock`. Specification: docs/protocol.md, "Unlocking". The sticks' keys lie on what is locked, so the ones that
//! count here are made from them, and are good for this alone: no session begins. What opens the disk is [`super::layers`]; the same
//! passphrase is tried on all that is still locked. One try at a time, and not many ([`Limit`]).

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use stiefel_shared::bundle::Goodbye;
use stiefel_shared::discovery::{About, LinkEvent, PORT, Responder, State, Ticket};
use stiefel_shared::key::StickKey;
use stiefel_shared::session::SessionName;
use stiefel_shared::unlock::{Outcome, Passphrase, Unlocking};
use stiefel_sys::console::Console;
use stiefel_sys::wired;
use tokio::sync::{Notify, mpsc};

use super::limit::Limit;
use crate::discovery;
use crate::http::{self, Begin, Bundle, Refusal, SessionHost};

/// How often who waits is seen to be alive.
const TICK: Duration = Duration::from_secs(30);
/// How long a try takes at least, in seconds: what is told to who comes while another one runs.
const BUSY: u16 = 3;

/// What is locked.
pub(super) trait Locked: Send + 'static {
    /// Tries a passphrase on all that is still locked; how much it has opened.
    ///
    /// # Errors
    /// Something else than the passphrase is wrong.
    fn attempt(&mut self, passphrase: &Passphrase) -> anyhow::Result<usize>;

    /// What is still locked, for people; empty when all is open.
    fn wants(&self) -> String;
}

/// Who is asked, and by whom.
pub(super) struct Asking<'a> {
    pub(super) hostname: &'a str,
    pub(super) keys: &'a [StickKey],
    pub(super) tickets: &'a [Ticket],
}

/// Listens until a desktop has opened all. Call it on a thread of tokio's that may block.
///
/// # Errors
/// Nobody can be listened to.
pub(super) fn wait(console: &'static Console, asking: &Asking<'_>, locked: impl Locked) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Handle::try_current().context("nobody can be listened to")?;
    runtime.block_on(listen(console, asking, locked))
}

async fn listen(console: &'static Console, asking: &Asking<'_>, locked: impl Locked) -> anyhow::Result<()> {
    let about = About {
        hostname: asking.hostname.to_owned(),
        http_port: PORT,
        ready_in: 0,
    };
    let responder = Responder::new(asking.keys, about, State::Locked, Instant::now()).with_tickets(asking.tickets);
    let responder = Arc::new(Mutex::new(responder));
    let names: Vec<&str> = asking.keys.iter().map(|key| key.name.as_str()).collect();
    let desk = Arc::new(Desk::new(console, locked));
    let web = http::run(
        http::bind(PORT)?,
        Arc::clone(&desk),
        Arc::clone(&responder),
        http::Limits::default(),
        Vec::new(),
    );
    // Nobody is woken who is awake; the channel only has to stay open.
    let (woken, _woken) = mpsc::channel(1);
    let answers = discovery::run(discovery::bind(PORT)?, responder, follow_links(console)?, woken);
    console.warn(&format!(
        "this laptop's disk is locked ({}): its passphrase is wanted at the desktop; sticks with these keys may send it: {}",
        desk.wants(),
        names.join(", ")
    ));
    tokio::pin!(web, answers);
    loop {
        tokio::select! {
            never = &mut web => match never {},
            () = &mut answers => bail!("discovery ended"),
            () = desk.opened.notified() => return Ok(()),
            // A person may take any time, then nothing hangs; a try may not: it reads the disk.
            () = tokio::time::sleep(TICK) => if desk.busy.try_lock().is_ok() { super::step() },
        }
    }
}

/// Brings all wired NICs up, and tells discovery of them.
fn follow_links(console: &'static Console) -> anyhow::Result<mpsc::Receiver<LinkEvent>> {
    let (links, followed) = mpsc::channel(64);
    // It ends with the next news after nobody listens any more.
    wired::follow(console, move |event| links.blocking_send(event).is_ok())?;
    Ok(followed)
}

/// Takes passphrases.
struct Desk<L> {
    console: &'static Console,
    locked: Arc<Mutex<L>>,
    /// What is still locked: told also while a try runs.
    wants: Mutex<String>,
    limit: Mutex<Limit>,
    /// A try runs.
    busy: tokio::sync::Mutex<()>,
    opened: Notify,
}

impl<L: Locked> Desk<L> {
    fn new(console: &'static Console, locked: L) -> Self {
        Self {
            console,
            wants: Mutex::new(locked.wants()),
            locked: Arc::new(Mutex::new(locked)),
            limit: Mutex::default(),
            busy: tokio::sync::Mutex::new(()),
            opened: Notify::new(),
        }
    }

    fn wants(&self) -> String {
        lock(&self.wants).clone()
    }

    fn answer(&self, outcome: Outcome, wait: u16) -> Unlocking {
        Unlocking::new(outcome, wait, &self.wants())
    }

    async fn attempt(&self, key: &str, passphrase: Passphrase) -> anyhow::Result<Unlocking> {
        let Ok(_only) = self.busy.try_lock() else {
            return Ok(self.answer(Outcome::Later, BUSY));
        };
        if self.wants().is_empty() {
            return Ok(self.answer(Outcome::Open, 0));
        }
        if let Err(wait) = lock(&self.limit).take(Instant::now()) {
            self.console.warn(&format!(
                "too many passphrases were tried; the next is taken in {wait} s"
            ));
            return Ok(self.answer(Outcome::Later, wait));
        }
        self.console.info(&format!(
            "a desktop with the key \"{key}\" has sent a passphrase; trying it"
        ));
        let locked = Arc::clone(&self.locked);
        let tried = tokio::task::spawn_blocking(move || {
            let mut locked = lock(&locked);
            let opened = locked.attempt(&passphrase);
            (opened, locked.wants())
        });
        let (opened, wants) = tried.await?;
        lock(&self.wants).clone_from(&wants);
        let outcome = match opened? {
            _ if wants.is_empty() => Outcome::Open,
            0 => Outcome::Wrong,
            _ => Outcome::More,
        };
        self.console.info(match outcome {
            Outcome::Open => "the passphrase is right",
            Outcome::More => "the passphrase is right, but not for all",
            _ => "the passphrase is wrong",
        });
        let wait = lock(&self.limit).wait(Instant::now());
        Ok(self.answer(outcome, wait))
    }
}

impl<L: Locked> SessionHost for Desk<L> {
    async fn begin(&self, _request: Begin) -> Result<Bundle, Refusal> {
        Err(locked_still())
    }

    async fn unlock(&self, request: Begin, passphrase: Passphrase) -> Result<Unlocking, Refusal> {
        if passphrase.is_empty() {
            let wait = lock(&self.limit).wait(Instant::now());
            return Ok(self.answer(Outcome::Wanted, wait));
        }
        self.attempt(&request.key, passphrase).await.map_err(|error| {
            self.console.error(&format!("{error:#}"));
            Refusal {
                reason: format!("{error:#}"),
            }
        })
    }

    fn unlocked(&self) {
        self.opened.notify_one();
    }

    async fn goodbye(&self, _session: SessionName, _goodbye: Goodbye) -> Result<(), Refusal> {
        Err(locked_still())
    }

    fn parted(&self, _session: SessionName, _goodbye: Goodbye) {}
}

fn locked_still() -> Refusal {
    Refusal {
        reason: "this laptop waits for its disk's passphrase, and serves nobody before".to_owned(),
    }
}

/// A lock that outlives a panic in another task: the data are plain tables.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{Ipv6Addr, SocketAddrV6};
    use std::path::Path;
    use zeroize::Zeroizing;

    /// Each with the passphrase that opens it.
    struct Doors(Vec<(&'static str, &'static str)>);

    impl Locked for Doors {
        fn attempt(&mut self, passphrase: &Passphrase) -> anyhow::Result<usize> {
            if passphrase.bytes() == b"break" {
                bail!("the door is broken");
            }
            let before = self.0.len();
            self.0.retain(|(_, opens)| opens.as_bytes() != passphrase.bytes());
            Ok(before - self.0.len())
        }

        fn wants(&self) -> String {
            self.0.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ")
        }
    }

    fn desk(doors: &[(&'static str, &'static str)]) -> Desk<Doors> {
        let console = Box::leak(Box::new(Console::open(Path::new("/none"), Path::new("/none"))));
        Desk::new(console, Doors(doors.to_vec()))
    }

    async fn send(desk: &Desk<Doors>, typed: &str) -> Result<Unlocking, Refusal> {
        let begin = Begin {
            peer: SocketAddrV6::new(Ipv6Addr::LOCALHOST, 1, 0, 0),
            key: "stick".to_owned(),
            machine: "00".repeat(16).parse().unwrap(),
            session: SessionName::generate().unwrap(),
        };
        let passphrase = Passphrase::new(Zeroizing::new(typed.as_bytes().to_vec())).unwrap();
        desk.unlock(begin, passphrase).await
    }

    async fn said(desk: &Desk<Doors>, typed: &str) -> (Outcome, String) {
        let answer = send(desk, typed).await.unwrap();
        (answer.outcome, answer.wants)
    }

    #[tokio::test]
    async fn one_passphrase_is_tried_on_all_and_those_left_are_asked_for() {
        let desk = desk(&[("sda2", "one"), ("sda3", "two"), ("sda4", "one")]);
        assert_eq!(said(&desk, "").await, (Outcome::Wanted, "sda2, sda3, sda4".to_owned()));
        assert_eq!(
            said(&desk, "none").await,
            (Outcome::Wrong, "sda2, sda3, sda4".to_owned())
        );
        assert_eq!(said(&desk, "one").await, (Outcome::More, "sda3".to_owned()));
        assert_eq!(said(&desk, "two").await, (Outcome::Open, String::new()));
        assert_eq!(said(&desk, "two").await, (Outcome::Open, String::new()), "said again");
    }

    #[tokio::test]
    async fn after_four_tries_the_right_passphrase_has_to_wait_too() {
        let desk = desk(&[("sda2", "right")]);
        for _ in 0..4 {
            assert_eq!(said(&desk, "wrong").await.0, Outcome::Wrong);
        }
        let answer = send(&desk, "right").await.unwrap();
        assert_eq!(answer.outcome, Outcome::Later);
        assert!((50..=61).contains(&answer.wait), "{}", answer.wait);
        assert_eq!(said(&desk, "").await.0, Outcome::Wanted, "asking is no try");
    }

    #[tokio::test]
    async fn while_a_try_runs_no_other_is_taken() {
        let desk = desk(&[("sda2", "right")]);
        let busy = desk.busy.lock().await;
        assert_eq!(said(&desk, "right").await.0, Outcome::Later);
        assert_eq!(said(&desk, "").await.0, Outcome::Wanted);
        drop(busy);
        assert_eq!(said(&desk, "right").await.0, Outcome::Open);
    }

    #[tokio::test]
    async fn what_is_wrong_besides_is_told_and_nothing_else_is_served() {
        let desk = desk(&[("sda2", "right")]);
        let refusal = send(&desk, "break").await.unwrap_err();
        assert!(refusal.reason.contains("broken") && !refusal.reason.contains("break"));
        let session = SessionName::generate().unwrap();
        assert!(desk.goodbye(session, Goodbye::Reboot).await.is_err());
    }
}
