//! `stiefel notify`: shows in a person's graphical session what the service is about to do, and lets them stop it.
//!
//! Started in each graphical session by an autostart file (hooks/xdg), as that user, without any privilege: the service is root and
//! must not enter users' sessions, whose buses let in nobody but their user. It hears the service through the
//! [control socket](super::control) and shows what it hears by D-Bus; "Cancel" is what `stiefel cancel` is.
//!
//! Specification: Desktop Notifications Specification 1.2 (`Notify`, `ActionInvoked`). There is never more than one notification of
//! ours: the next takes the place of the last. It ends with the session's bus; a service that ends is waited for.

use std::collections::HashMap;
use std::future::poll_fn;
use std::path::Path;
use std::pin::Pin;
use std::time::Duration;

use anyhow::Context;
use tokio::sync::mpsc::{Receiver, Sender, channel};
use zbus::export::futures_core::Stream;
use zbus::{Connection, MatchRule, MessageStream, Variant, message};

use super::control::client::{self, ControlError};
use super::control::{Answer, FOLDER, Notice};
use super::keys;
use crate::guards;

/// Bus name and interface of who shows notifications.
const NOTIFICATIONS: &str = "org.freedesktop.Notifications";
/// Its object.
const OBJECT: &str = "/org/freedesktop/Notifications";
/// Our button, by its key.
const CANCEL: &str = "cancel";
/// How long one call may take; nobody may show notifications here.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long a service that has ended the connection, but may still be there, is left alone.
const AGAIN: Duration = Duration::from_secs(5);
/// Notices that wait to be shown.
const WAITING: usize = 8;

/// What there is to show or do.
enum Heard {
    Notice(Notice),
    /// Our own wish has not worked.
    NotCancelled(String),
    /// The service says nothing to this user.
    Denied,
}

/// Shows what the service says, until the session ends.
///
/// # Errors
/// If there is no session bus.
pub fn notify() -> anyhow::Result<()> {
    if let Some(refusal) = guards::on_a_link(Path::new("/")) {
        eprintln!("nothing to do on a desktop: {refusal}");
        return Ok(());
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start a runtime")?;
    let result = runtime.block_on(async {
        let bus = zbus::connection::Builder::session()
            .method_timeout(PATIENCE)
            .build()
            .await
            .context("there is no session bus; start this in a graphical session, as its user")?;
        let (sender, heard) = channel(WAITING);
        let service = sender.clone();
        std::thread::Builder::new()
            .name("service".to_owned())
            .spawn(move || listen(Path::new(FOLDER), 0, AGAIN, &service))
            .context("cannot start a thread")?;
        Desk::new(bus)
            .await?
            .follow(heard, &sender, || client::cancel(Path::new(FOLDER)))
            .await
    });
    // A thread may still wait for the service.
    runtime.shutdown_background();
    result
}

/// Hears the service, which must be `owner`'s, and waits for one where there is none, until nobody wants to hear it. One that has
/// ended the connection is tried again after `again`: where it stays, nothing in its folder changes.
fn listen(folder: &Path, owner: u32, again: Duration, sender: &Sender<Heard>) {
    let mut said = String::new();
    let mut hear = || {
        let heard = |notice| sender.blocking_send(Heard::Notice(notice)).is_ok();
        match client::watch(folder, owner, heard) {
            Ok(()) => {
                said.clear();
                true
            }
            Err(ControlError::NotThere) => {
                said.clear();
                false
            }
            Err(ControlError::Denied) => {
                let _ = sender.blocking_send(Heard::Denied);
                false
            }
            Err(error) => {
                let text = reason(&error);
                // Once, not at each try.
                if said != text {
                    eprintln!("{text}");
                    said = text;
                }
                matches!(error, ControlError::Connection(_))
            }
        }
    };
    let changed = || {
        while hear() && !sender.is_closed() {
            std::thread::sleep(again);
        }
        !sender.is_closed()
    };
    if let Err(error) = keys::watch(folder, changed) {
        eprintln!("cannot wait for stiefel's service: {error}");
    }
}

/// An error with its causes.
fn reason(error: &ControlError) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(source) = cause {
        text += &format!("\n  because: {source}");
        cause = source.source();
    }
    text
}

/// The place where notifications are shown.
struct Desk {
    bus: Connection,
    clicks: MessageStream,
    /// The number of our last notification; 0 before the first.
    shown: u32,
}

impl Desk {
    async fn new(bus: Connection) -> anyhow::Result<Self> {
        let rule = MatchRule::builder()
            .msg_type(message::Type::Signal)
            .sender(NOTIFICATIONS)
            .interface(NOTIFICATIONS)
            .member("ActionInvoked")
            .build()?;
        let clicks = MessageStream::for_match_rule(rule, &bus, None)
            .await
            .context("the session bus does not tell of buttons")?;
        Ok(Self { bus, clicks, shown: 0 })
    }

    /// Shows what is heard, and does what the button says.
    async fn follow(
        mut self,
        mut heard: Receiver<Heard>,
        sender: &Sender<Heard>,
        cancel: impl Fn() -> Result<Answer, ControlError> + Clone + Send + 'static,
    ) -> anyhow::Result<()> {
        loop {
            tokio::select! {
                what = heard.recv() => {
                    let shown = match what {
                        None => return Ok(()),
                        Some(Heard::Denied) => {
                            eprintln!("stiefel's service tells only who is logged in, and logind knows no session of this user");
                            return Ok(());
                        }
                        Some(Heard::Notice(notice)) => Shown::of(&notice),
                        Some(Heard::NotCancelled(why)) => Shown::not_cancelled(&why),
                    };
                    if let Err(error) = self.show(&shown).await {
                        eprintln!("{}: {} (it cannot be shown: {error})", shown.summary, shown.body);
                    }
                }
                clicked = next_click(&mut self.clicks) => match clicked {
                    None => return Ok(()),
                    Some((number, action)) if number == self.shown && action == CANCEL => {
                        let (cancel, sender) = (cancel.clone(), sender.clone());
                        tokio::task::spawn_blocking(move || {
                            let why = match cancel() {
                                // The service tells all who watch.
                                Ok(Answer::Cancelled | Answer::StaysAnyway { .. }) => return,
                                Ok(Answer::TooLate) => "the shutdown has begun".to_owned(),
                                Ok(Answer::Idle) => "nothing counts down any more".to_owned(),
                                Ok(Answer::Denied) => ControlError::Denied.to_string(),
                                Err(error) => reason(&error),
                            };
                            let _ = sender.blocking_send(Heard::NotCancelled(why));
                        });
                    }
                    Some(_) => {}
                },
            }
        }
    }

    /// Puts a notification in the place of the last one.
    async fn show(&mut self, shown: &Shown) -> zbus::Result<()> {
        let actions: &[&str] = if shown.can_cancel { &[CANCEL, "Cancel"] } else { &[] };
        let hints = HashMap::from([
            // 2 is critical: it stays, also above what fills the screen.
            ("urgency", Variant::from(if shown.is_urgent { 2_u8 } else { 1 })),
            ("category", Variant::from("device")),
        ]);
        let body = (
            "stiefel",
            self.shown,
            "computer-laptop",
            shown.summary.as_str(),
            shown.body.as_str(),
            actions,
            hints,
            shown.milliseconds,
        );
        let reply = self
            .bus
            .call_method(Some(NOTIFICATIONS), OBJECT, Some(NOTIFICATIONS), "Notify", &body)
            .await?;
        self.shown = reply.body().deserialize()?;
        Ok(())
    }
}

/// The next button that was pressed on any notification: the notification's number, and the button's key. `None` when the bus is
/// gone.
async fn next_click(clicks: &mut MessageStream) -> Option<(u32, String)> {
    loop {
        let message = poll_fn(|context| Pin::new(&mut *clicks).poll_next(context)).await?;
        if let Ok(message) = message
            && let Ok(click) = message.body().deserialize()
        {
            return Some(click);
        }
    }
}

/// A notification.
#[derive(Debug, PartialEq, Eq)]
struct Shown {
    summary: String,
    body: String,
    can_cancel: bool,
    is_urgent: bool,
    /// How long it is there; -1 is as usual.
    milliseconds: i32,
}

impl Shown {
    fn of(notice: &Notice) -> Self {
        let shown = |summary: &str, why: &str| Self {
            summary: summary.to_owned(),
            body: escape(why),
            can_cancel: false,
            is_urgent: false,
            milliseconds: -1,
        };
        match notice {
            Notice::Countdown { seconds, why } => Self {
                can_cancel: true,
                is_urgent: true,
                milliseconds: seconds.saturating_mul(1000).try_into().unwrap_or(i32::MAX),
                ..shown(
                    &format!("stiefel: this laptop leaves for the desktop in {seconds} s"),
                    why,
                )
            },
            Notice::Leaving { why } => Self {
                is_urgent: true,
                ..shown("stiefel: this laptop leaves for the desktop now", why)
            },
            Notice::Cancelled { why } => shown("stiefel: cancelled, this laptop stays", why),
            Notice::Refused { why } => shown("stiefel: this laptop stays in its system", why),
        }
    }

    fn not_cancelled(why: &str) -> Self {
        Self {
            summary: "stiefel: not cancelled".to_owned(),
            body: escape(why),
            can_cancel: false,
            is_urgent: true,
            milliseconds: -1,
        }
    }
}

/// A body may hold markup; other programs' names and reasons must not.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '\n' | '\t' => escaped.push(c),
            c if c.is_control() => escaped.push('\u{fffd}'),
            c => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests;
