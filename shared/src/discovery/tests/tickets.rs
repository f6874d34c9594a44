//! A stick and a laptop that has the key of one activation alone.

use super::*;

/// A laptop that has only the key of one activation, and its ticket.
fn activated(now: Instant) -> (Responder, StickKey) {
    let (ticket, key) = Ticket::issue(&key::tests::fixed(), UNIX).unwrap();
    let (other, _) = Ticket::issue(&StickKey::generate("other").unwrap(), UNIX).unwrap();
    let responder = Responder::new(std::slice::from_ref(&key), about(), State::Ready, now);
    (responder.with_tickets(&[other, ticket]), key)
}

const UNIX: u64 = 1_800_000_000;

#[test]
fn a_stick_finds_a_laptop_of_one_activation_by_its_ticket() {
    let now = Instant::now();
    let (mut responder, key) = activated(now);
    let mut seeker = Seeker::new(&key::tests::fixed());
    // Each question gets one ticket, and one of two is this stick's.
    let told: Vec<_> = (0..2)
        .filter_map(|_| {
            let discover = seeker.discover(now, 3).unwrap();
            let answer = responder.receive(now, desktop(), &discover).unwrap();
            assert_eq!((answer.datagram.len(), answer.woken), (DATAGRAM, None));
            assert_eq!(seeker.receive(now, laptop(), &answer.datagram), None);
            seeker.ticket(UNIX + 60, &answer.datagram)
        })
        .collect();
    assert_eq!(told, [Told::Activation]);
    let [activation] = seeker.activations()[..] else {
        panic!()
    };
    let discover = seeker.discover_as(now, 3, Some(activation)).unwrap();
    let answer = responder.receive(now, desktop(), &discover).unwrap();
    let Some(Heard::Offer(offer)) = seeker.receive(now, laptop(), &answer.datagram) else {
        panic!()
    };
    assert_eq!(offer.activation, Some(activation));
    let offered = responder.offered(now, &desktop(), &offer.challenge).unwrap();
    assert_eq!(offered.to_file(), key.to_file());
    assert_eq!(
        offered.to_file(),
        key::tests::fixed().for_activation(&activation).to_file()
    );
}

#[test]
fn an_old_ticket_leads_to_no_question_and_a_known_one_says_nothing_new() {
    let (ticket, _) = Ticket::issue(&key::tests::fixed(), UNIX).unwrap();
    let mut seeker = Seeker::new(&key::tests::fixed());
    let late = UNIX + TICKET_LIFETIME.as_secs() + 1;
    assert_eq!(
        seeker.ticket(late, ticket.datagram()),
        Some(Told::OutOfDate { issued: UNIX })
    );
    assert!(seeker.activations().is_empty());
    assert_eq!(seeker.ticket(UNIX, ticket.datagram()), Some(Told::Activation));
    assert_eq!(seeker.ticket(UNIX, ticket.datagram()), None);
    for _ in 0..10 {
        let (ticket, _) = Ticket::issue(&key::tests::fixed(), UNIX).unwrap();
        seeker.ticket(UNIX, ticket.datagram());
    }
    assert_eq!(seeker.activations().len(), 4);
}

#[test]
fn who_holds_an_activations_key_answers_for_nothing_else() {
    let now = Instant::now();
    let (mut responder, _) = activated(now);
    let mut seeker = Seeker::new(&key::tests::fixed());
    let (ticket, _) = Ticket::issue(&key::tests::fixed(), UNIX).unwrap();
    seeker.ticket(UNIX, ticket.datagram());
    let [another] = seeker.activations()[..] else { panic!() };
    // The laptop of one activation does not open what is asked of another, and answers by a ticket.
    let discover = seeker.discover_as(now, 3, Some(another)).unwrap();
    let answer = responder.receive(now, desktop(), &discover).unwrap();
    assert_eq!(seeker.receive(now, laptop(), &answer.datagram), None);
}

#[test]
fn tickets_are_shown_at_a_bounded_rate_for_discovers_only_and_leave_the_offers_alone() {
    let now = Instant::now();
    let (mut responder, key) = activated(now);
    let mut stranger = Seeker::new(&StickKey::generate("stranger").unwrap());
    let shown = (0..100)
        .filter(|_| {
            let discover = stranger.discover(now, 3).unwrap();
            responder.receive(now, desktop(), &discover).is_some()
        })
        .count();
    assert_eq!(shown, 20);
    let mut honest = Seeker::new(&key);
    let discover = honest.discover(now, 3).unwrap();
    assert!(responder.receive(now, desktop(), &discover).is_some());
    let later = now + Duration::from_secs(10);
    for bytes in [&discover[1..], &[0; DATAGRAM], &[]] {
        assert!(responder.receive(later, desktop(), bytes).is_none());
    }
    // A laptop with the sticks' own keys shows none.
    let mut plain = Responder::new(std::slice::from_ref(&key), about(), State::Ready, now);
    assert!(
        plain
            .receive(later, desktop(), &stranger.discover(later, 3).unwrap())
            .is_none()
    );
}

#[test]
fn recorded_tickets_do_not_push_out_the_one_of_the_laptop_that_runs() {
    let (stick, unix) = (key::tests::fixed(), 1_800_000_000);
    let mut seeker = Seeker::new(&stick);
    let (running, _) = Ticket::issue(&stick, unix).unwrap();
    assert_eq!(seeker.ticket(unix, running.datagram()), Some(Told::Activation));
    let running = seeker.activations();
    for age in 1..100 {
        let (old, _) = Ticket::issue(&stick, unix - age).unwrap();
        seeker.ticket(unix, old.datagram());
    }
    assert!(seeker.activations().contains(&running[0]));
    // What is newer counts also where four are known.
    for younger in 1..5 {
        let (new, _) = Ticket::issue(&stick, unix + younger).unwrap();
        assert_eq!(seeker.ticket(unix, new.datagram()), Some(Told::Activation));
    }
    assert!(!seeker.activations().contains(&running[0]));
    assert_eq!(seeker.activations().len(), 4);
}

/// A laptop that waits for its passphrase, and a desktop that knows its ticket; what the desktop hears, if the laptop says `state`.
fn locked(state: State) -> Option<Heard> {
    let now = Instant::now();
    let stick = key::tests::fixed();
    // As old as such a stick may be.
    let (ticket, key) = Ticket::issue_for(TicketKind::Unlocking, &stick, UNIX).unwrap();
    let responder = Responder::new(std::slice::from_ref(&key), about(), state, now);
    let mut responder = responder.with_tickets(&[ticket]);
    let mut seeker = Seeker::new(&stick);
    let discover = seeker.discover(now, 3).unwrap();
    let answer = responder.receive(now, desktop(), &discover).unwrap();
    let years = 10 * 365 * 24 * 3600;
    assert_eq!(seeker.ticket(UNIX + years, &answer.datagram), Some(Told::Activation));
    let activation = seeker.activations()[0];
    let discover = seeker.discover_as(now, 3, Some(activation)).unwrap();
    let answer = responder.receive(now, desktop(), &discover).unwrap();
    seeker.receive(now, laptop(), &answer.datagram)
}

#[test]
fn a_found_stick_of_a_laptop_asks_for_a_passphrase_and_offers_nothing_to_boot() {
    assert!(matches!(locked(State::Locked), Some(Heard::Offer(offer)) if offer.state == State::Locked));
    for state in [State::Asleep, State::Waking, State::Ready, State::Lending] {
        assert_eq!(locked(state), None, "{state:?}");
    }
}

#[test]
fn no_other_key_asks_for_a_passphrase() {
    let now = Instant::now();
    let stick = key::tests::fixed();
    let (ticket, once) = Ticket::issue(&stick, UNIX).unwrap();
    let mut seeker = Seeker::new(&stick);
    seeker.ticket(UNIX, ticket.datagram()).unwrap();
    for (key, activation) in [(stick, None), (once, Some(seeker.activations()[0]))] {
        let mut responder = Responder::new(std::slice::from_ref(&key), about(), State::Locked, now);
        let discover = seeker.discover_as(now, 3, activation).unwrap();
        let answer = responder.receive(now, desktop(), &discover).unwrap();
        assert_eq!(seeker.receive(now, laptop(), &answer.datagram), None);
    }
}

#[test]
fn tickets_of_laptops_own_sticks_do_not_push_out_an_activations() {
    let stick = key::tests::fixed();
    let mut seeker = Seeker::new(&stick);
    let (ticket, _) = Ticket::issue(&stick, UNIX).unwrap();
    seeker.ticket(UNIX, ticket.datagram()).unwrap();
    let running = seeker.activations()[0];
    for younger in 1..10 {
        let (ticket, _) = Ticket::issue_for(TicketKind::Unlocking, &stick, UNIX + younger).unwrap();
        seeker.ticket(UNIX, ticket.datagram());
    }
    assert!(seeker.activations().contains(&running));
    assert_eq!(seeker.activations().len(), 5);
}

#[test]
fn questions_on_sixteen_interfaces_are_remembered_under_all_keys() {
    let (stick, unix, now) = (key::tests::fixed(), 1_800_000_000, Instant::now());
    let mut seeker = Seeker::new(&stick);
    for number in 0..4 {
        let (ticket, _) = Ticket::issue(&stick, unix + number).unwrap();
        seeker.ticket(unix, ticket.datagram()).unwrap();
        let (ticket, _) = Ticket::issue_for(TicketKind::Unlocking, &stick, unix + number).unwrap();
        seeker.ticket(unix, ticket.datagram()).unwrap();
    }
    let mut asked = 0;
    for (_, scope) in (0..10).flat_map(|half| (1..=16).map(move |scope| (half, scope))) {
        let activations = seeker.activations().into_iter().map(Some);
        for activation in [None].into_iter().chain(activations) {
            seeker.discover_as(now, scope, activation).unwrap();
            asked += 1;
        }
    }
    assert_eq!(seeker.held(), asked);
}
