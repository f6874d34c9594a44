//! What is shown; and how, on a bus of our own, with somebody who shows notifications in the place of a desktop's shell.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

use zbus::Message;

use super::*;

/// Only a missing message takes so long.
const HUNG: Duration = Duration::from_secs(60);

fn countdown(seconds: u64) -> Notice {
    Notice::Countdown {
        seconds,
        why: "the dedicated NIC was plugged in".to_owned(),
    }
}

#[test]
fn only_a_countdown_has_a_button_and_it_is_there_as_long() {
    let shown = Shown::of(&countdown(10));
    assert!(shown.can_cancel && shown.is_urgent && shown.milliseconds == 10_000);
    assert_eq!(shown.summary, "stiefel: this laptop leaves for the desktop in 10 s");
    assert_eq!(Shown::of(&countdown(u64::MAX)).milliseconds, i32::MAX);
    let why = "x".to_owned();
    for notice in [
        Notice::Leaving { why: why.clone() },
        Notice::Cancelled { why: why.clone() },
        Notice::Refused { why },
    ] {
        let shown = Shown::of(&notice);
        assert!(!shown.can_cancel && shown.body == "x", "{shown:?}");
    }
}

#[test]
fn nothing_in_a_reason_is_taken_as_markup() {
    let why = "<b>&\"x\"</b>\u{1b}[0m\n  next: y".to_owned();
    assert_eq!(
        Shown::of(&Notice::Refused { why }).body,
        "&lt;b&gt;&amp;\"x\"&lt;/b&gt;\u{fffd}[0m\n  next: y"
    );
}

#[test]
fn a_service_that_ends_the_connection_and_stays_is_heard_again() {
    let dir = tempfile::tempdir().unwrap();
    let service = UnixListener::bind(dir.path().join("control")).unwrap();
    let (sender, mut heard) = channel(WAITING);
    let (folder, owner) = (dir.path().to_owned(), rustix::process::geteuid().as_raw());
    std::thread::spawn(move || listen(&folder, owner, Duration::from_millis(10), &sender));
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        drop(service.accept().unwrap());
        let (mut again, _) = service.accept().unwrap();
        let mut line = serde_json::to_vec(&countdown(10)).unwrap();
        line.push(b'\n');
        again.write_all(&line).unwrap();
        tell.send(heard.blocking_recv()).ok().unwrap();
    });
    let told = told.recv_timeout(HUNG).expect("it is deaf");
    assert!(matches!(told, Some(Heard::Notice(notice)) if notice == countdown(10)));
}

/// A session bus of our own.
struct Bus {
    daemon: Child,
    address: String,
}

impl Bus {
    fn start() -> Option<Self> {
        let daemon = Command::new("dbus-daemon")
            .args(["--session", "--nofork", "--print-address"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn();
        let mut daemon = match daemon {
            Err(error) => {
                assert!(
                    std::env::var_os("CI").is_none(),
                    "dbus-daemon cannot be started: {error}"
                );
                return None;
            }
            Ok(daemon) => daemon,
        };
        let mut address = String::new();
        BufReader::new(daemon.stdout.take().unwrap())
            .read_line(&mut address)
            .unwrap();
        let address = address.trim().to_owned();
        Some(Self { daemon, address })
    }

    async fn connect(&self) -> Connection {
        zbus::connection::Builder::address(self.address.as_str())
            .build()
            .await
            .unwrap()
    }
}

impl Drop for Bus {
    fn drop(&mut self) {
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

/// One call of `Notify`: the number to replace, the summary, the actions.
type Call = (u32, String, Vec<String>);

/// Answers one call of `Notify` with `number`.
async fn answer(shell: &Connection, calls: &mut MessageStream, number: u32) -> Call {
    loop {
        let message: Message = poll_fn(|context| Pin::new(&mut *calls).poll_next(context))
            .await
            .unwrap()
            .unwrap();
        if message
            .header()
            .member()
            .is_none_or(|member| member.as_str() != "Notify")
        {
            continue;
        }
        type Body<'a> = (
            String,
            u32,
            String,
            String,
            String,
            Vec<String>,
            HashMap<String, Variant<'a>>,
            i32,
        );
        let body = message.body();
        let (_, replaces, _, summary, _, actions, hints, _): Body<'_> = body.deserialize().unwrap();
        assert!(matches!(hints.get("urgency"), Some(Variant::U8(1..=2))));
        shell.reply(&message.header(), &number).await.unwrap();
        return (replaces, summary, actions);
    }
}

#[test]
fn a_countdown_is_shown_its_button_cancels_and_the_next_takes_its_place() {
    let Some(bus) = Bus::start() else { return };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let cancelled = Arc::new(Mutex::new(0));
    let count = Arc::clone(&cancelled);
    let cancel = move || {
        *count.lock().unwrap() += 1;
        Ok(Answer::TooLate)
    };
    let told = async {
        let shell = bus.connect().await;
        shell.request_name(NOTIFICATIONS).await.unwrap();
        let mut calls = MessageStream::from(&shell);
        let (sender, heard) = channel(WAITING);
        let desk = Desk::new(bus.connect().await).await.unwrap();
        let own = sender.clone();
        let following = tokio::spawn(async move { desk.follow(heard, &own, cancel).await });
        let press = async |number: u32, key: &str| {
            shell
                .emit_signal(None::<&str>, OBJECT, NOTIFICATIONS, "ActionInvoked", &(number, key))
                .await
                .unwrap();
        };

        sender.send(Heard::Notice(countdown(10))).await.ok().unwrap();
        let (replaces, summary, actions) = answer(&shell, &mut calls, 7).await;
        assert_eq!((replaces, actions), (0, vec!["cancel".to_owned(), "Cancel".to_owned()]));
        assert!(summary.contains("in 10 s"), "{summary}");
        // Another program's notification, another button, then ours.
        press(6, CANCEL).await;
        press(7, "default").await;
        press(7, CANCEL).await;
        let (replaces, summary, actions) = answer(&shell, &mut calls, 7).await;
        assert_eq!((replaces, summary.as_str()), (7, "stiefel: not cancelled"));
        assert!(actions.is_empty());
        sender.send(Heard::Denied).await.ok().unwrap();
        following.await.unwrap().unwrap();
    };
    runtime.block_on(async { tokio::time::timeout(HUNG, told).await.unwrap() });
    assert_eq!(*cancelled.lock().unwrap(), 1);
}

#[test]
fn it_ends_with_its_bus_and_lives_without_anybody_who_shows_notifications() {
    let Some(mut bus) = Bus::start() else { return };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let desk = Desk::new(bus.connect().await).await.unwrap();
        let (sender, heard) = channel(WAITING);
        let own = sender.clone();
        let following = tokio::spawn(async move { desk.follow(heard, &own, || Ok(Answer::Cancelled)).await });
        for _ in 0..=WAITING {
            sender.send(Heard::Notice(countdown(1))).await.ok().unwrap();
        }
        assert!(!following.is_finished());
        bus.daemon.kill().unwrap();
        tokio::time::timeout(HUNG, following).await.unwrap().unwrap().unwrap();
    });
}
