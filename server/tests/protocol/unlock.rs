//! A laptop that waits for its passphrase, over real sockets.

use stiefel_client::fetch::{self, FetchError, Patience, Source};
use stiefel_shared::discovery::State;
use stiefel_shared::session::StreamError;
use stiefel_shared::unlock::{Outcome, Passphrase, Unlocking};
use zeroize::Zeroizing;

use crate::laptop::{LONG, Laptop, Plan, Seen, machine, soon};

const PATIENT: Patience = Patience {
    connect: LONG,
    silence: LONG,
};

async fn locked() -> Laptop {
    Laptop::start(Plan {
        state: State::Locked,
        unlocking: true,
        ..Plan::default()
    })
    .await
}

/// Sends a passphrase after an offer of the laptop's.
async fn send(laptop: &Laptop, typed: &str) -> Result<Unlocking, FetchError> {
    let found = laptop.found().await;
    assert_eq!(found.state, State::Locked);
    let source = Source {
        peer: laptop.http,
        challenge: &found.challenge,
        key: &found.key(&laptop.key),
        machine: machine(),
        patience: PATIENT,
    };
    let passphrase = Passphrase::new(Zeroizing::new(typed.as_bytes().to_vec())).unwrap();
    soon(fetch::unlock(source, &passphrase)).await
}

#[tokio::test]
async fn a_passphrase_is_asked_for_tried_and_told_and_the_laptop_goes_on_once_its_answer_has_left() {
    let mut laptop = locked().await;
    for (typed, outcome, wait, wants) in [
        ("", Outcome::Wanted, 0, "sda2"),
        ("wrong", Outcome::Wrong, 7, "sda2"),
        ("right", Outcome::Open, 0, ""),
    ] {
        let answer = send(&laptop, typed).await.unwrap();
        assert_eq!(
            (answer.outcome, answer.wait, answer.wants.as_str()),
            (outcome, wait, wants)
        );
        assert!(
            matches!(laptop.next().await, Seen::Unlock(begin) if begin.key == "blue" && begin.machine == machine())
        );
    }
    assert_eq!(laptop.next().await, Seen::Unlocked);
}

#[tokio::test]
async fn a_reason_that_is_no_wrong_passphrase_is_told() {
    let laptop = locked().await;
    let error = send(&laptop, "broken").await.unwrap_err();
    assert!(matches!(&error, FetchError::Stream(StreamError::Refused { reason }) if reason == "the disk is broken"));
}

#[tokio::test]
async fn who_has_only_the_sticks_own_key_cannot_send_one() {
    let laptop = locked().await;
    let found = laptop.found().await;
    let source = Source {
        peer: laptop.http,
        challenge: &found.challenge,
        key: &laptop.key,
        machine: machine(),
        patience: PATIENT,
    };
    let passphrase = Passphrase::new(Zeroizing::new(b"right".to_vec())).unwrap();
    let error = soon(fetch::unlock(source, &passphrase)).await.unwrap_err();
    assert!(matches!(error, FetchError::Rejected { .. }), "{error}");
}
