//! Datagrams over real sockets.

use std::net::Ipv6Addr;
use std::time::Instant;

use stiefel_client::discovery::Event;
use stiefel_shared::discovery::{DATAGRAM, Heard, LinkEvent, Seeker, State};
use stiefel_shared::key::StickKey;
use tokio::net::UdpSocket;

use crate::laptop::{Laptop, Plan, soon};

#[tokio::test]
async fn a_laptop_is_found_where_it_is() {
    let laptop = Laptop::start(Plan::default()).await;
    let happened = laptop.search(true, |event| matches!(event, Event::Found(_))).await;
    assert_eq!(happened[0], Event::Asking { interface: "lo".into() });
    let Some(Event::Found(found)) = happened.last() else {
        panic!()
    };
    assert_eq!((found.hostname.as_str(), found.state), ("täst-laptop", State::Ready));
    assert_eq!((found.address, found.interface.as_str()), (laptop.http, "lo"));
}

#[tokio::test]
async fn a_sleeping_laptop_is_woken_and_says_so() {
    let mut laptop = Laptop::start(Plan {
        state: State::Asleep,
        ..Plan::default()
    })
    .await;
    let happened = laptop.search(true, |event| matches!(event, Event::Waking { .. })).await;
    assert!(
        happened
            .iter()
            .any(|event| matches!(event, Event::Found(found) if found.state == State::Asleep))
    );
    let woken = soon(laptop.woken.recv()).await.unwrap();
    assert_eq!(woken.key, "blue");
    let after = laptop.search(true, |event| matches!(event, Event::Found(_))).await;
    assert!(matches!(after.last(), Some(Event::Found(found)) if found.state == State::Waking));
    assert!(laptop.woken.try_recv().is_err(), "woken once");
}

#[tokio::test]
async fn a_laptop_that_is_only_looked_for_is_not_woken() {
    let mut laptop = Laptop::start(Plan {
        state: State::Asleep,
        ..Plan::default()
    })
    .await;
    laptop.search(false, |event| matches!(event, Event::Found(_))).await;
    laptop.search(false, |event| matches!(event, Event::Found(_))).await;
    assert!(laptop.woken.try_recv().is_err());
}

#[tokio::test]
async fn what_does_not_verify_is_not_answered() {
    let laptop = Laptop::start(Plan {
        state: State::Asleep,
        ..Plan::default()
    })
    .await;
    let socket = UdpSocket::bind((Ipv6Addr::LOCALHOST, 0)).await.unwrap();
    let to = (Ipv6Addr::LOCALHOST, laptop.udp);
    let mut seeker = Seeker::new(&laptop.key);
    let mut stranger = Seeker::new(&StickKey::generate("stranger").unwrap());
    let mut buffer = [0; 2048];
    let mut offered = Vec::new();
    for round in 0..3 {
        let discover = seeker.discover(Instant::now(), 0).unwrap();
        let mut flipped = discover.clone();
        flipped[30] ^= 1;
        let longer = [discover.as_slice(), &[0]].concat();
        let wrong_key = stranger.discover(Instant::now(), 0).unwrap();
        let bad: [&[u8]; 7] = [
            &[],
            b"hello",
            &flipped,
            &discover[..DATAGRAM - 1],
            &longer,
            &vec![7; 60_000],
            &wrong_key,
        ];
        // Loopback keeps the order: had any of these been answered, that answer would come first.
        for datagram in bad.into_iter().chain(std::iter::once(offered.as_slice())) {
            socket.send_to(datagram, to).await.unwrap();
        }
        socket.send_to(&discover, to).await.unwrap();
        socket.send_to(&discover, to).await.unwrap();
        let (length, from) = soon(socket.recv_from(&mut buffer)).await.unwrap();
        assert!(length <= discover.len());
        let std::net::SocketAddr::V6(from) = from else { panic!() };
        let heard = seeker.receive(Instant::now(), from, &buffer[..length]);
        assert!(matches!(heard, Some(Heard::Offer(_))), "round {round}: {heard:?}");
        offered = buffer[..length].to_vec();
    }
}

#[tokio::test]
async fn the_search_ends_when_nobody_listens() {
    let (_links, links_seen) = tokio::sync::mpsc::channel(1);
    let (tell, events) = tokio::sync::mpsc::channel(1);
    drop(events);
    let key = StickKey::generate("blue").unwrap();
    soon(stiefel_client::discovery::run(&key, 9, false, links_seen, tell))
        .await
        .unwrap();
}

/// Run it with `unshare -n cargo test -p stiefel-server --test protocol -- --ignored`.
#[tokio::test]
#[ignore = "needs root and a network namespace of its own: makes a pair of interfaces"]
async fn a_laptop_is_found_by_multicast_as_soon_as_the_address_is_no_longer_tentative() {
    let ip = |words: &str| {
        let done = std::process::Command::new("ip")
            .args(words.split(' '))
            .status()
            .unwrap();
        assert!(done.success(), "ip {words}");
    };
    ip("link add desktop0 type veth peer name laptop0");
    ip("link set laptop0 up");
    ip("link set desktop0 up");
    let index = |name: &str| -> u32 {
        // /sys shows the namespace in which it was mounted.
        let out = std::process::Command::new("ip")
            .args(["-o", "link", "show", name])
            .output()
            .unwrap();
        String::from_utf8(out.stdout)
            .unwrap()
            .split(':')
            .next()
            .unwrap()
            .parse()
            .unwrap()
    };
    let laptop = Laptop::start_on(
        Plan {
            state: State::Asleep,
            ..Plan::default()
        },
        index("laptop0"),
        "laptop0",
    )
    .await;
    let link = LinkEvent::Added {
        index: index("desktop0"),
        name: "desktop0".into(),
    };
    let began = Instant::now();
    let happened = laptop
        .search_on(link, true, |event| matches!(event, Event::Waking { .. }))
        .await;
    eprintln!("woken {:?} after the link came up", began.elapsed());
    let Some(Event::Waking { address, interface, .. }) = happened.last() else {
        panic!()
    };
    assert!(address.ip().is_unicast_link_local());
    assert_eq!(
        (address.scope_id(), interface.as_str()),
        (index("desktop0"), "desktop0")
    );
    ip("link del desktop0");
}
