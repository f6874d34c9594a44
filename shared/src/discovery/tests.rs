//! Both sides of discovery against each other and against an enemy on the wire, with a clock of our own.

use std::net::SocketAddrV6;
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::*;
use crate::key;
use crate::vectors;

mod tickets;

const SECOND: Duration = Duration::from_secs(1);

fn at(last: u16, scope: u32) -> SocketAddrV6 {
    SocketAddrV6::new(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, last), 40000, 0, scope)
}

fn desktop() -> SocketAddrV6 {
    at(1, 3)
}

fn laptop() -> SocketAddrV6 {
    at(2, 3)
}

fn about() -> About {
    About {
        hostname: "täst-laptop".into(),
        http_port: 61570,
        ready_in: 30,
    }
}

fn responder(state: State, now: Instant) -> Responder {
    Responder::new(
        &[StickKey::generate("other").unwrap(), key::tests::fixed()],
        about(),
        state,
        now,
    )
}

/// A desktop that got one offer, with everything that went over the wire.
struct Met {
    now: Instant,
    seeker: Seeker,
    responder: Responder,
    discover: Vec<u8>,
    offered: Vec<u8>,
    offer: Offer,
}

fn meet(state: State) -> Met {
    let now = Instant::now();
    let mut responder = responder(state, now);
    let mut seeker = Seeker::new(&key::tests::fixed());
    let discover = seeker.discover(now, 3).unwrap();
    let answer = responder.receive(now, desktop(), &discover).unwrap();
    assert_eq!(answer.woken, None);
    let Some(Heard::Offer(offer)) = seeker.receive(now, laptop(), &answer.datagram) else {
        panic!("no offer")
    };
    Met {
        now,
        seeker,
        responder,
        discover,
        offered: answer.datagram,
        offer,
    }
}

fn messages() -> [(&'static str, u8, Message); 6] {
    let random = |first: u8| std::array::from_fn(|i| first + u8::try_from(i).unwrap());
    [
        ("discover", 0x10, Message::Discover { random: random(0xa0) }),
        (
            "offer",
            0x20,
            Message::Offer(OfferBody {
                random: random(0xa0),
                challenge: random(0xb0),
                state: State::Ready,
                http_port: 61570,
                ready_in: 30,
                hostname: "täst-laptop".into(),
            }),
        ),
        (
            "lending",
            0x50,
            Message::Offer(OfferBody {
                random: random(0xa0),
                challenge: random(0xb0),
                state: State::Lending,
                http_port: 61570,
                ready_in: 30,
                hostname: "täst-laptop".into(),
            }),
        ),
        (
            "locked",
            0x70,
            Message::Offer(OfferBody {
                random: random(0xa0),
                challenge: random(0xb0),
                state: State::Locked,
                http_port: 61570,
                ready_in: 30,
                hostname: "täst-laptop".into(),
            }),
        ),
        (
            "wake",
            0x30,
            Message::Wake {
                challenge: random(0xb0),
                random: random(0xc0),
            },
        ),
        (
            "waking",
            0x40,
            Message::Waking {
                random: random(0xc0),
                ready_in: 30,
            },
        ),
    ]
}

#[test]
fn datagrams_are_the_pinned_ones() {
    let keys = DatagramKeys::new(&key::tests::fixed());
    for (name, first, message) in messages() {
        let nonce = std::array::from_fn(|i| first + u8::try_from(i).unwrap());
        let pinned = vectors::bytes("datagrams.txt", name);
        assert_eq!(keys.seal_with_nonce(nonce, &message).unwrap(), pinned, "{name}");
        assert_eq!(pinned.len(), DATAGRAM);
        let opened = [keys.open_desktop(&pinned), keys.open_laptop(&pinned)];
        assert_eq!(opened.into_iter().flatten().collect::<Vec<_>>(), [message], "{name}");
    }
}

#[test]
fn a_desktop_finds_a_laptop_that_has_its_key() {
    let met = meet(State::Ready);
    assert_eq!(met.offer.hostname, "täst-laptop");
    assert_eq!(
        (met.offer.state, met.offer.http_port, met.offer.ready_in),
        (State::Ready, 61570, 30)
    );
    assert_eq!(met.offer.from, laptop());
    assert!(met.offered.len() <= met.discover.len());
}

#[test]
fn a_desktop_wakes_a_sleeping_laptop_once() {
    let mut met = meet(State::Asleep);
    let wake = met.seeker.wake(met.now, &met.offer).unwrap();
    let answer = met.responder.receive(met.now, desktop(), &wake).unwrap();
    assert_eq!(
        answer.woken,
        Some(Woken {
            key: "test".into(),
            peer: desktop()
        })
    );
    assert_eq!(met.responder.state(), State::Waking);
    let heard = met.seeker.receive(met.now, laptop(), &answer.datagram);
    assert_eq!(
        heard,
        Some(Heard::Waking {
            from: laptop(),
            ready_in: 30
        })
    );

    // Replayed, also after the wake was not followed: nothing, not even an answer.
    assert!(met.responder.receive(met.now, desktop(), &wake).is_none());
    met.responder.set_state(State::Asleep);
    assert!(met.responder.receive(met.now, desktop(), &wake).is_none());
    assert_eq!(
        met.seeker.receive(met.now, laptop(), &answer.datagram),
        None,
        "a replayed Waking"
    );
}

#[test]
fn a_laptop_on_its_way_says_so_and_is_not_woken_again() {
    let mut met = meet(State::Asleep);
    let wake = met.seeker.wake(met.now, &met.offer).unwrap();
    met.responder.receive(met.now, desktop(), &wake).unwrap();
    let discover = met.seeker.discover(met.now, 3).unwrap();
    let answer = met.responder.receive(met.now, desktop(), &discover).unwrap();
    let Some(Heard::Offer(offer)) = met.seeker.receive(met.now, laptop(), &answer.datagram) else {
        panic!()
    };
    assert_eq!(offer.state, State::Waking);
    let wake = met.seeker.wake(met.now, &offer).unwrap();
    assert!(met.responder.receive(met.now, desktop(), &wake).is_none());
}

#[test]
fn a_wake_is_honoured_only_from_where_its_challenge_went_and_soon() {
    for (from, later, state, good) in [
        (desktop(), 9 * SECOND, State::Asleep, true),
        (desktop(), 10 * SECOND, State::Asleep, false),
        (desktop(), SECOND, State::Ready, false),
        (at(9, 3), SECOND, State::Asleep, false),
        (at(1, 4), SECOND, State::Asleep, false),
        (
            SocketAddrV6::new(*desktop().ip(), 40001, 0, 3),
            SECOND,
            State::Asleep,
            false,
        ),
    ] {
        let mut met = meet(state);
        let wake = met.seeker.wake(met.now, &met.offer).unwrap();
        let answer = met.responder.receive(met.now + later, from, &wake);
        assert_eq!(answer.is_some(), good, "{from} {later:?} {state:?}");
        assert_eq!(met.responder.state() == State::Waking, good);
    }
}

#[test]
fn a_wake_for_a_challenge_of_another_key_or_of_nobody_is_dropped() {
    let now = Instant::now();
    let stranger = StickKey::generate("stranger").unwrap();
    let mut responder = Responder::new(&[key::tests::fixed(), stranger.clone()], about(), State::Asleep, now);
    let mut seeker = Seeker::new(&key::tests::fixed());
    let discover = seeker.discover(now, 3).unwrap();
    let answer = responder.receive(now, desktop(), &discover).unwrap();
    let Some(Heard::Offer(offer)) = seeker.receive(now, laptop(), &answer.datagram) else {
        panic!()
    };
    let stolen = Seeker::new(&stranger).wake(now, &offer).unwrap();
    assert!(responder.receive(now, desktop(), &stolen).is_none());
    let invented = seeker
        .wake(
            now,
            &Offer {
                challenge: [7; 16],
                ..offer.clone()
            },
        )
        .unwrap();
    assert!(responder.receive(now, desktop(), &invented).is_none());
    assert_eq!(responder.state(), State::Asleep);
    let honest = seeker.wake(now, &offer).unwrap();
    assert!(
        responder.receive(now, desktop(), &honest).is_some(),
        "the challenge was not used up by the others"
    );
}

#[test]
fn a_replayed_discover_gets_at_most_one_offer() {
    let mut met = meet(State::Ready);
    for second in 0..120 {
        for from in [desktop(), at(77, 3), at(1, 9)] {
            assert!(
                met.responder
                    .receive(met.now + second * SECOND, from, &met.discover)
                    .is_none()
            );
        }
    }
}

#[test]
fn offers_are_rate_limited_and_no_larger_than_what_they_answer() {
    let now = Instant::now();
    let mut responder = responder(State::Ready, now);
    let mut seeker = Seeker::new(&key::tests::fixed());
    let mut offers = |now: Instant, count: u32| {
        (0..count)
            .filter(|_| {
                let discover = seeker.discover(now, 3).unwrap();
                let answer = responder.receive(now, desktop(), &discover);
                assert!(
                    answer
                        .as_ref()
                        .is_none_or(|answer| answer.datagram.len() <= discover.len())
                );
                answer.is_some()
            })
            .count()
    };
    assert_eq!(offers(now, 1000), 20);
    assert_eq!(offers(now + SECOND, 1000), 10);
    assert_eq!(offers(now + SECOND + SECOND / 20, 1000), 0, "half a token is none");
    assert_eq!(offers(now + SECOND + SECOND / 10, 1000), 1);
    assert_eq!(
        offers(now + 3600 * SECOND, 1000),
        20,
        "no more than the burst is saved up"
    );
}

#[test]
fn a_flood_neither_fills_memory_nor_pushes_an_honest_challenge_out() {
    let mut met = meet(State::Asleep);
    let mut flood = Seeker::new(&key::tests::fixed());
    for tenth in 0..99_u32 {
        for _ in 0..30 {
            let discover = flood.discover(met.now, 3).unwrap();
            met.responder
                .receive(met.now + tenth * SECOND / 10, at(66, 3), &discover);
        }
    }
    assert!(flood.held() <= 1440);
    let wake = met.seeker.wake(met.now, &met.offer).unwrap();
    assert!(met.responder.receive(met.now + 9 * SECOND, desktop(), &wake).is_some());

    for second in 10..2000 {
        for _ in 0..10 {
            let discover = flood.discover(met.now, 3).unwrap();
            met.responder.receive(met.now + second * SECOND, at(66, 3), &discover);
        }
    }
    let (issued, answered) = met.responder.held();
    assert!(issued <= 320 && answered <= 8192, "{issued} {answered}");
}

#[test]
fn everything_reflected_is_dropped() {
    let mut met = meet(State::Asleep);
    let wake = met.seeker.wake(met.now, &met.offer).unwrap();
    for own in [&met.discover, &wake] {
        assert_eq!(met.seeker.receive(met.now, laptop(), own), None);
    }
    let waking = met.responder.receive(met.now, desktop(), &wake).unwrap().datagram;
    for own in [&met.offered, &waking] {
        assert!(met.responder.receive(met.now, desktop(), own).is_none());
    }
}

#[test]
fn a_message_of_the_other_side_is_dropped_also_if_it_is_sealed_as_ones_own() {
    let keys = DatagramKeys::new(&key::tests::fixed());
    for (_, _, message) in messages() {
        let header = header(message.type_byte());
        let wrong = match message.side() {
            Side::Desktop => Side::Laptop,
            Side::Laptop => Side::Desktop,
        };
        let sealed = keys.of(wrong).seal(&header, &*message.body()).unwrap();
        let datagram = [header.as_slice(), &sealed].concat();
        assert_eq!(
            (keys.open_desktop(&datagram), keys.open_laptop(&datagram)),
            (None, None)
        );
    }
}

#[test]
fn an_offer_is_believed_once_in_time_on_its_link_and_for_ones_own_question() {
    let mut met = meet(State::Ready);
    assert_eq!(met.seeker.receive(met.now, laptop(), &met.offered), None, "replayed");
    assert_eq!(
        met.seeker.receive(met.now, at(9, 3), &met.offered),
        None,
        "replayed from elsewhere"
    );
    assert_eq!(
        Seeker::new(&key::tests::fixed()).receive(met.now, laptop(), &met.offered),
        None,
        "another desktop's"
    );

    let mut late = Seeker::new(&key::tests::fixed());
    let discover = late.discover(met.now, 3).unwrap();
    let offered = met.responder.receive(met.now, at(5, 3), &discover).unwrap().datagram;
    assert_eq!(late.receive(met.now, at(2, 4), &offered), None, "on another link");
    assert_eq!(late.receive(met.now + 5 * SECOND, laptop(), &offered), None, "too late");
    assert!(late.receive(met.now + 4 * SECOND, laptop(), &offered).is_some());
}

#[test]
fn two_laptops_with_the_same_key_are_both_found() {
    let now = Instant::now();
    let mut seeker = Seeker::new(&key::tests::fixed());
    let discover = seeker.discover(now, 3).unwrap();
    for last in [7, 8] {
        let answer = responder(State::Ready, now).receive(now, desktop(), &discover).unwrap();
        assert!(seeker.receive(now, at(last, 3), &answer.datagram).is_some());
    }
}

#[test]
fn a_waking_from_elsewhere_is_dropped() {
    let mut met = meet(State::Asleep);
    let wake = met.seeker.wake(met.now, &met.offer).unwrap();
    let waking = met.responder.receive(met.now, desktop(), &wake).unwrap().datagram;
    assert_eq!(met.seeker.receive(met.now, at(9, 3), &waking), None);
    assert!(met.seeker.receive(met.now, laptop(), &waking).is_some());
}

#[test]
fn the_wrong_key_is_dropped_by_both_sides() {
    let now = Instant::now();
    let mut stranger = Seeker::new(&StickKey::generate("stranger").unwrap());
    let discover = stranger.discover(now, 3).unwrap();
    assert!(
        responder(State::Asleep, now)
            .receive(now, desktop(), &discover)
            .is_none()
    );
    let met = meet(State::Ready);
    assert_eq!(stranger.receive(now, laptop(), &met.offered), None);
}

#[test]
fn a_challenge_opens_one_session_at_its_own_address_within_half_a_minute() {
    let mut met = meet(State::Ready);
    let challenge = met.offer.challenge;
    let other_port = SocketAddrV6::new(*desktop().ip(), 50000, 0, 3);
    let offered = |met: &Met, later: u32, peer| {
        met.responder
            .offered(met.now + later * SECOND, &peer, &challenge)
            .map(|key| key.name.clone())
    };
    assert_eq!(offered(&met, 29, other_port).as_deref(), Some("test"));
    assert_eq!(offered(&met, 30, other_port), None);
    assert_eq!(offered(&met, 1, at(9, 3)), None);
    assert_eq!(offered(&met, 1, at(1, 4)), None);
    assert!(met.responder.offered(met.now, &desktop(), &[1; 16]).is_none());
    assert!(met.responder.spend(&challenge));
    assert!(!met.responder.spend(&challenge));
    assert_eq!(offered(&met, 1, desktop()), None);
}

#[test]
fn a_host_name_cannot_disturb_the_screen() {
    let now = Instant::now();
    let hostname = format!("\x1b[2J{}\n", "ä".repeat(60));
    let about = About { hostname, ..about() };
    let mut responder = Responder::new(&[key::tests::fixed()], about, State::Ready, now);
    let mut seeker = Seeker::new(&key::tests::fixed());
    let discover = seeker.discover(now, 3).unwrap();
    let answer = responder.receive(now, desktop(), &discover).unwrap();
    let Some(Heard::Offer(offer)) = seeker.receive(now, laptop(), &answer.datagram) else {
        panic!()
    };
    assert_eq!(offer.hostname, format!("[2J{}", "ä".repeat(30)));

    let Some((type_byte, mut body)) = Some((2, *messages()[1].2.body())) else {
        unreachable!()
    };
    body[38] = 0x1b;
    assert_eq!(
        Message::parse(type_byte, &body),
        None,
        "and is not believed if it could"
    );
}

#[test]
fn questions_are_asked_soon_while_the_address_is_tentative_and_slower_when_nobody_answers() {
    let mut now = Instant::now();
    let mut pacer = Pacer::new(now);
    assert_eq!(pacer.due(), now, "at once");
    pacer.failed(now);
    assert_eq!(pacer.due(), now + SECOND / 20);
    let mut steps = Vec::new();
    for _ in 0..40 {
        now = pacer.due();
        pacer.sent(now);
        steps.push(pacer.due() - now);
    }
    assert_eq!(steps[0], SECOND / 2);
    assert_eq!(*steps.last().unwrap(), 2 * SECOND);
    assert!(steps.is_sorted());
    for _ in 0..1000 {
        pacer.failed(now);
    }
    assert_eq!(pacer.due(), now + 2 * SECOND, "a link that never works costs little");
}

#[test]
fn something_new_is_asked_for_at_once_but_at_most_once_a_second() {
    let now = Instant::now();
    let mut pacer = Pacer::new(now);
    for _ in 0..40 {
        pacer.sent(now);
    }
    pacer.hurry(now);
    assert_eq!(pacer.due(), now);
    pacer.sent(now);
    for _ in 0..1000 {
        pacer.hurry(now);
    }
    assert_eq!(pacer.due(), now + SECOND);
    let later = now + 10 * SECOND;
    pacer.sent(later);
    pacer.hurry(later);
    assert_eq!(pacer.due(), later);
}

/// Every datagram of a meeting and a waking, with who should get it.
fn recorded() -> (Met, [(bool, Vec<u8>); 4]) {
    let mut met = meet(State::Asleep);
    let wake = met.seeker.wake(met.now, &met.offer).unwrap();
    let discover = met.seeker.discover(met.now, 3).unwrap();
    // From copies that stay as they are, so that each datagram would still be honoured by the ones returned.
    let mut other = responder(State::Asleep, met.now);
    let offered = other.receive(met.now, desktop(), &discover).unwrap().datagram;
    let random = match DatagramKeys::new(&key::tests::fixed()).open_desktop(&wake) {
        Some(Message::Wake { random, .. }) => random,
        _ => panic!(),
    };
    let waking = DatagramKeys::new(&key::tests::fixed())
        .seal(&Message::Waking { random, ready_in: 0 })
        .unwrap();
    (met, [(true, discover), (false, offered), (true, wake), (false, waking)])
}

fn deliver(met: &mut Met, to_laptop: bool, datagram: &[u8]) -> bool {
    if to_laptop {
        met.responder.receive(met.now, desktop(), datagram).is_some()
    } else {
        met.seeker.receive(met.now, laptop(), datagram).is_some()
    }
}

#[test]
fn any_flipped_bit_of_any_datagram_is_dropped() {
    let (mut met, datagrams) = recorded();
    for (to_laptop, datagram) in &datagrams {
        for bit in 0..datagram.len() * 8 {
            let mut bad = datagram.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(!deliver(&mut met, *to_laptop, &bad), "bit {bit}");
        }
        assert!(
            deliver(&mut met, *to_laptop, datagram),
            "the datagram itself would have been honoured"
        );
    }
}

#[test]
fn a_datagram_of_any_other_length_is_dropped() {
    let (mut met, datagrams) = recorded();
    for (to_laptop, datagram) in &datagrams {
        for length in 0..datagram.len() {
            assert!(!deliver(&mut met, *to_laptop, &datagram[..length]));
        }
        for more in [1, 2, 1000, 65000] {
            let longer = [datagram.as_slice(), &vec![0; more]].concat();
            assert!(!deliver(&mut met, *to_laptop, &longer));
        }
        assert!(
            deliver(&mut met, *to_laptop, datagram),
            "the datagram itself would have been honoured"
        );
    }
}

#[test]
fn padding_and_reserved_values_are_refused() {
    for (_, _, message) in messages() {
        let mut body = message.body();
        assert!(Message::parse(message.type_byte(), &*body).is_some());
        body[BODY - 1] = 1;
        assert_eq!(Message::parse(message.type_byte(), &*body), None);
    }
    let mut body = messages()[1].2.body();
    body[32] = 5;
    assert_eq!(Message::parse(2, &*body), None, "an unknown state");
    let mut body = messages()[1].2.body();
    body[37] = 65;
    assert_eq!(Message::parse(2, &*body), None, "a host name that is too long");
    for type_byte in [0, 5, 255] {
        assert_eq!(Message::parse(type_byte, &[0; BODY]), None);
    }
}

proptest! {
    #[test]
    fn any_bytes_are_dropped_by_both_sides(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        let now = Instant::now();
        prop_assert!(responder(State::Asleep, now).receive(now, desktop(), &bytes).is_none());
        prop_assert!(Seeker::new(&key::tests::fixed()).receive(now, laptop(), &bytes).is_none());
    }

    #[test]
    fn a_body_has_only_one_form(type_byte in 1..5_u8, mut body: [u8; BODY], zero_from in 0..BODY) {
        body[zero_from..].fill(0);
        if let Some(message) = Message::parse(type_byte, &body) {
            prop_assert_eq!(&*message.body(), &body);
        }
    }
}
