//! The bundle, over good and bad cables.

use std::net::{Ipv6Addr, SocketAddrV6};
use std::sync::Arc;
use std::time::Duration;

use stiefel_client::fetch::{FetchError, Patience, Progress};
use stiefel_server::http::Limits;
use stiefel_shared::discovery::State;
use stiefel_shared::handover::Part;
use stiefel_shared::key::StickKey;
use stiefel_shared::session::StreamError;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;

use crate::laptop::{LONG, Laptop, Plan, Seen, fetch, machine, noise};

/// For tests in which silence is what happens.
const SHORT: Patience = Patience {
    connect: LONG,
    silence: Duration::from_millis(300),
};
const PATIENT: Patience = Patience {
    connect: LONG,
    silence: LONG,
};

#[tokio::test]
async fn a_bundle_arrives_whole() {
    let mut laptop = Laptop::start(Plan::default()).await;
    let (manifest, got) = fetch(&laptop, laptop.http, PATIENT, |_| ()).await;
    let manifest = manifest.unwrap();
    assert_eq!(manifest.payload.version, "6.1.0");
    assert!(got.kernel == noise(300_000) && got.initrd == noise(1_000_001));
    assert_eq!(got.progress[0], Progress::Connected);
    assert_eq!(
        got.progress.last(),
        Some(&Progress::Part {
            part: Part::Initrd,
            done: 1_000_001,
            total: 1_000_001
        })
    );
    let Seen::Begin(begin) = laptop.next().await else {
        panic!()
    };
    assert_eq!(
        (begin.key.as_str(), begin.machine, begin.peer.ip()),
        ("blue", machine(), &Ipv6Addr::LOCALHOST)
    );
    assert_eq!(begin.session.to_string(), manifest.session);
    assert_eq!(laptop.next().await, Seen::Fetched(Ok(())));
}

#[tokio::test]
async fn a_laptop_of_one_activation_is_found_by_its_ticket_and_gives_its_bundle() {
    let mut laptop = Laptop::start(Plan {
        activation: true,
        ..Plan::default()
    })
    .await;
    let (manifest, got) = fetch(&laptop, laptop.http, PATIENT, |_| ()).await;
    assert_eq!(manifest.unwrap().payload.version, "6.1.0");
    assert!(got.kernel == noise(300_000));
    let Seen::Begin(begin) = laptop.next().await else {
        panic!()
    };
    // The key has the stick's name.
    assert_eq!(begin.key, "blue");
    let found = laptop.found().await;
    assert!(found.activation.is_some());
    assert_ne!(found.key(&laptop.key).to_file(), laptop.key.to_file());
}

#[tokio::test]
async fn a_laptop_that_needs_time_is_waited_for() {
    let hold = Arc::new(Notify::new());
    let limits = Limits {
        waiting: Duration::from_millis(10),
        ..Limits::default()
    };
    let laptop = Laptop::start(Plan {
        hold: Some(Arc::clone(&hold)),
        limits,
        ..Plan::default()
    })
    .await;
    let mut waits = 0;
    let (manifest, _) = fetch(&laptop, laptop.http, PATIENT, |step| {
        waits += u32::from(step == Progress::Waiting);
        if waits == 3 {
            hold.notify_one();
        }
    })
    .await;
    manifest.unwrap();
}

#[tokio::test]
async fn a_refusal_comes_with_its_reason() {
    let refuse = Some("another desktop uses this disk".to_owned());
    let mut laptop = Laptop::start(Plan {
        refuse,
        ..Plan::default()
    })
    .await;
    let (outcome, got) = fetch(&laptop, laptop.http, PATIENT, |_| ()).await;
    assert_eq!(
        outcome.unwrap_err().to_string(),
        "the laptop refuses: another desktop uses this disk"
    );
    assert!(got.kernel.is_empty());
    assert!(matches!(laptop.next().await, Seen::Begin(_)));
    assert!(matches!(laptop.next().await, Seen::Fetched(Err(_))));
}

#[tokio::test]
async fn a_desktop_that_goes_while_it_waits_is_reported_once_the_host_has_finished() {
    let hold = Arc::new(Notify::new());
    let limits = Limits {
        waiting: Duration::from_millis(10),
        ..Limits::default()
    };
    let mut laptop = Laptop::start(Plan {
        hold: Some(Arc::clone(&hold)),
        limits,
        ..Plan::default()
    })
    .await;
    {
        let waiting = Notify::new();
        let fetching = fetch(&laptop, laptop.http, PATIENT, |step| {
            if step == Progress::Waiting {
                waiting.notify_one();
            }
        });
        tokio::select! {
            _ = fetching => panic!("nothing was to come"),
            () = waiting.notified() => {}
        }
    }
    assert!(matches!(laptop.next().await, Seen::Begin(_)));
    // Ten times the interval at which it would notice.
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(laptop.seen.try_recv().is_err(), "not before the host has finished");
    hold.notify_one();
    let Seen::Fetched(Err(why)) = laptop.next().await else {
        panic!()
    };
    assert!(why.contains("went away"), "{why}");
}

#[tokio::test]
async fn a_part_that_is_shorter_than_promised_is_not_called_whole() {
    let parts = vec![(Part::Kernel, noise(100_000))];
    let mut laptop = Laptop::start(Plan {
        parts,
        sizes: Some(vec![100_001]),
        ..Plan::default()
    })
    .await;
    let (outcome, _) = fetch(&laptop, laptop.http, PATIENT, |_| ()).await;
    assert!(matches!(outcome.unwrap_err(), FetchError::Gone));
    assert!(matches!(laptop.next().await, Seen::Begin(_)));
    let Seen::Fetched(Err(why)) = laptop.next().await else {
        panic!()
    };
    assert!(why.contains("kernel"), "{why}");
}

#[tokio::test]
async fn nobody_there_is_said() {
    let laptop = Laptop::start(Plan::default()).await;
    let unused = TcpListener::bind((Ipv6Addr::LOCALHOST, 0))
        .await
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let peer = SocketAddrV6::new(Ipv6Addr::LOCALHOST, unused, 0, 0);
    let (outcome, _) = fetch(&laptop, peer, PATIENT, |_| ()).await;
    assert!(matches!(outcome.unwrap_err(), FetchError::Connect { .. }));
}

#[tokio::test]
async fn a_key_that_the_laptop_does_not_have_opens_nothing() {
    let mut laptop = Laptop::start(Plan::default()).await;
    let challenge = laptop.challenge().await;
    let stranger = StickKey::generate("stranger").unwrap();
    let outcome =
        stiefel_client::fetch::fetch(laptop.http, &challenge, &stranger, machine(), |_, _| Ok(()), |_| ()).await;
    assert!(matches!(outcome.unwrap_err(), FetchError::Rejected { .. }));
    assert!(laptop.seen.try_recv().is_err());
    // The stranger did not use the challenge up.
    let key = laptop.key.clone();
    stiefel_client::fetch::fetch(laptop.http, &challenge, &key, machine(), |_, _| Ok(()), |_| ())
        .await
        .unwrap();
}

#[tokio::test]
async fn a_challenge_opens_one_session() {
    let laptop = Laptop::start(Plan::default()).await;
    assert_eq!(laptop.responder.lock().unwrap().state(), State::Ready);
    let challenge = laptop.challenge().await;
    let get = || stiefel_client::fetch::fetch(laptop.http, &challenge, &laptop.key, machine(), |_, _| Ok(()), |_| ());
    get().await.unwrap();
    assert!(matches!(get().await.unwrap_err(), FetchError::Rejected { .. }));
}

/// What a bad cable does to the bytes that come from the laptop, in the connection that carries the bundle.
#[derive(Debug, Clone, Copy)]
enum Damage {
    Flip(usize),
    Close(usize),
    Stop(usize),
}

/// A proxy before the laptop that leaves the first connection (the handshake) alone.
async fn damaged(to: SocketAddrV6, damage: Damage) -> SocketAddrV6 {
    let listener = TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        for connection in 0.. {
            let (mut desktop, _) = listener.accept().await.unwrap();
            let mut laptop = TcpStream::connect(to).await.unwrap();
            if connection == 0 {
                // Ends when both sides closed.
                let _ = tokio::io::copy_bidirectional(&mut desktop, &mut laptop).await;
            } else {
                tokio::spawn(relay(desktop, laptop, damage));
            }
        }
    });
    SocketAddrV6::new(Ipv6Addr::LOCALHOST, port, 0, 0)
}

async fn relay(desktop: TcpStream, laptop: TcpStream, damage: Damage) {
    let (mut from_desktop, mut to_desktop) = desktop.into_split();
    let (mut from_laptop, mut to_laptop) = laptop.into_split();
    tokio::spawn(async move {
        let _ = tokio::io::copy(&mut from_desktop, &mut to_laptop).await;
    });
    let mut place = 0;
    let mut buffer = vec![0; 16 * 1024];
    while let Ok(length @ 1..) = from_laptop.read(&mut buffer).await {
        let mut bytes = buffer[..length].to_vec();
        let within = |at: usize| (place..place + length).contains(&at).then(|| at - place);
        let stop = match damage {
            Damage::Flip(at) => {
                within(at).into_iter().for_each(|index| bytes[index] ^= 0x10);
                None
            }
            Damage::Close(at) | Damage::Stop(at) => within(at),
        };
        let bytes = &bytes[..stop.unwrap_or(length)];
        if to_desktop.write_all(bytes).await.is_err() {
            return;
        }
        place += length;
        if stop.is_some() {
            if matches!(damage, Damage::Stop(_)) {
                std::future::pending::<()>().await;
            }
            return;
        }
    }
}

#[tokio::test]
async fn a_flipped_bit_on_the_way_is_noticed() {
    // The headers are shorter than 300 bytes, the manifest follows, then frames of 60 KiB.
    for at in [400, 600, 5000, 70_000, 200_000, 299_000, 305_000, 1_000_000, 1_290_000] {
        let laptop = Laptop::start(Plan::default()).await;
        let proxy = damaged(laptop.http, Damage::Flip(at)).await;
        let (outcome, got) = fetch(&laptop, proxy, PATIENT, |_| ()).await;
        let error = outcome.unwrap_err();
        assert!(
            matches!(error, FetchError::Stream(StreamError::Altered)),
            "{at}: {error:?}"
        );
        assert!(error.to_string().contains("altered or damaged on the way"));
        assert!(
            noise(300_000).starts_with(&got.kernel),
            "{at}: nothing unverified is handed out"
        );
        assert!(
            noise(1_000_001).starts_with(&got.initrd),
            "{at}: nothing unverified is handed out"
        );
    }
}

#[tokio::test]
async fn a_flipped_bit_in_any_early_byte_never_yields_a_bundle_that_differs() {
    // Headers, chunk lengths, frame lengths, manifest: some flips are harmless (a header nobody reads), none may
    // let anything wrong through or hang.
    let parts = || vec![(Part::Kernel, noise(50)), (Part::Initrd, noise(50))];
    for at in (0..1000).step_by(7) {
        let laptop = Laptop::start(Plan {
            parts: parts(),
            ..Plan::default()
        })
        .await;
        let proxy = damaged(laptop.http, Damage::Flip(at)).await;
        let (outcome, got) = fetch(&laptop, proxy, SHORT, |_| ()).await;
        if outcome.is_ok() {
            assert!(got.kernel == noise(50) && got.initrd == noise(50), "{at}");
        }
    }
}

#[tokio::test]
async fn a_laptop_that_vanishes_is_told_from_a_damaged_cable() {
    for at in [0, 100, 400, 5000, 305_000, 1_290_000] {
        for (damage, patience) in [(Damage::Close(at), PATIENT), (Damage::Stop(at), SHORT)] {
            let laptop = Laptop::start(Plan::default()).await;
            let proxy = damaged(laptop.http, damage).await;
            let (outcome, _) = fetch(&laptop, proxy, patience, |_| ()).await;
            let error = outcome.unwrap_err();
            assert!(matches!(error, FetchError::Gone), "{damage:?}: {error:?}");
        }
    }
}

#[tokio::test]
async fn no_room_for_a_part_is_said() {
    let laptop = Laptop::start(Plan::default()).await;
    let challenge = laptop.challenge().await;
    let full = |part, _: &[u8]| match part {
        Part::Initrd => Err(std::io::ErrorKind::StorageFull.into()),
        _ => Ok(()),
    };
    let outcome = stiefel_client::fetch::fetch(laptop.http, &challenge, &laptop.key, machine(), full, |_| ()).await;
    assert!(matches!(
        outcome.unwrap_err(),
        FetchError::Store { part: Part::Initrd, .. }
    ));
}
