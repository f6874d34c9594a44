//! The end of a session.

use std::net::SocketAddr;
use std::time::Duration;

use stiefel_client::control::{FarewellError, goodbye, goodbye_within};
use stiefel_shared::bundle::{ControlKey, Goodbye};
use stiefel_shared::session::{Farewell, GoodbyeError};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::laptop::{LONG, Laptop, Plan, Seen, fetch, soon};

/// A laptop with a session, and the session's name.
async fn in_session(plan: Plan) -> (Laptop, String) {
    let mut laptop = Laptop::start(plan).await;
    let patience = stiefel_client::fetch::Patience {
        connect: LONG,
        silence: LONG,
    };
    let (manifest, _) = fetch(&laptop, laptop.http, patience, |_| ()).await;
    assert!(matches!(laptop.next().await, Seen::Begin(_)));
    assert_eq!(laptop.next().await, Seen::Fetched(Ok(())));
    (laptop, manifest.unwrap().session)
}

/// Says goodbye as the shutdown program does: blocking.
async fn say(laptop: &Laptop, session: &str, control: &ControlKey, way: Goodbye) -> Result<(), FarewellError> {
    let (peer, session, control) = (SocketAddr::V6(laptop.http), session.to_owned(), control.clone());
    soon(tokio::task::spawn_blocking(move || {
        goodbye(peer, &session, &control, way)
    }))
    .await
    .unwrap()
}

#[tokio::test]
async fn a_goodbye_is_honoured_once_and_the_laptop_goes_after_its_answer() {
    for way in [Goodbye::Poweroff, Goodbye::Reboot, Goodbye::RebootAnew] {
        let (mut laptop, session) = in_session(Plan::default()).await;
        say(&laptop, &session, &laptop.control, way).await.unwrap();
        assert_eq!(laptop.next().await, Seen::Goodbye(way));
        assert_eq!(laptop.next().await, Seen::Parted(way));
        let again = say(&laptop, &session, &laptop.control, way).await.unwrap_err();
        assert!(matches!(again, FarewellError::Unknown { .. }), "{again:?}");
        assert!(laptop.seen.try_recv().is_err());
    }
}

#[tokio::test]
async fn the_same_goodbye_sent_again_gets_the_same_answer() {
    let (mut laptop, session) = in_session(Plan::default()).await;
    let name = session.parse().unwrap();
    let farewell = Farewell::new(&laptop.control, name, Goodbye::Poweroff).unwrap();
    let head = format!(
        "POST /session/{session}/goodbye HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n",
        farewell.body.len()
    );
    for _ in 0..3 {
        let mut stream = TcpStream::connect(laptop.http).await.unwrap();
        stream
            .write_all(&[head.as_bytes(), &farewell.body].concat())
            .await
            .unwrap();
        let mut answer = Vec::new();
        soon(stream.read_to_end(&mut answer)).await.unwrap();
        let split = answer.windows(4).position(|four| four == b"\r\n\r\n").unwrap();
        farewell.answered(&laptop.control, name, &answer[split + 4..]).unwrap();
    }
    assert_eq!(laptop.next().await, Seen::Goodbye(Goodbye::Poweroff));
    assert_eq!(laptop.next().await, Seen::Parted(Goodbye::Poweroff));
    assert!(laptop.seen.try_recv().is_err());
}

#[tokio::test]
async fn a_goodbye_that_failed_can_be_said_again() {
    let refuse_goodbyes = vec!["the disk could not be flushed".to_owned()];
    let (mut laptop, session) = in_session(Plan {
        refuse_goodbyes,
        ..Plan::default()
    })
    .await;
    let refused = say(&laptop, &session, &laptop.control, Goodbye::Reboot)
        .await
        .unwrap_err();
    assert!(
        matches!(&refused, FarewellError::Answer(GoodbyeError::Refused { .. })),
        "{refused:?}"
    );
    assert!(refused.to_string().contains("could not be flushed"));
    say(&laptop, &session, &laptop.control, Goodbye::Reboot).await.unwrap();
    assert_eq!(laptop.next().await, Seen::Goodbye(Goodbye::Reboot));
    assert_eq!(laptop.next().await, Seen::Goodbye(Goodbye::Reboot));
    assert_eq!(laptop.next().await, Seen::Parted(Goodbye::Reboot));
}

#[tokio::test]
async fn a_goodbye_without_the_sessions_key_is_not_heard() {
    let (mut laptop, session) = in_session(Plan::default()).await;
    let stranger = ControlKey::generate().unwrap();
    let forged = say(&laptop, &session, &stranger, Goodbye::Poweroff).await.unwrap_err();
    assert!(matches!(&forged, FarewellError::Unknown { .. }));
    assert!(forged.to_string().contains("does not verify"), "{forged}");
    let unknown = say(&laptop, &"0".repeat(32), &laptop.control, Goodbye::Poweroff)
        .await
        .unwrap_err();
    assert!(matches!(unknown, FarewellError::Unknown { .. }));
    assert!(laptop.seen.try_recv().is_err());
}

#[tokio::test]
async fn a_laptop_that_has_gone_does_not_keep_the_desktop() {
    let (laptop, session) = in_session(Plan::default()).await;
    let (peer, control) = (SocketAddr::V6(laptop.http), laptop.control.clone());
    drop(laptop);
    let outcome = soon(tokio::task::spawn_blocking(move || {
        goodbye_within(Duration::from_millis(100), peer, &session, &control, Goodbye::Poweroff)
    }))
    .await
    .unwrap();
    assert!(matches!(outcome.unwrap_err(), FarewellError::Silent { .. }));
}
