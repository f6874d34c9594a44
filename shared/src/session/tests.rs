//! Both sides of a session against each other, and against an enemy on the wire.

use proptest::prelude::*;

use super::*;
use crate::bundle::{ControlKey, DeviceClaims, DiskOffer, Goodbye, LinkOffer, Manifest, ManifestError, Transport};
use crate::handover::{BootFolder, LinkMode};
use crate::handover::{DiskIdentity, Part, PartSize, Payload};
use crate::key;
use crate::superblock::{Claim, ClaimKind};
use crate::vectors;

mod asking;

const OFFER: Random = counting(0xb0);
const NAME: SessionName = SessionName(counting(0xe0));

const fn counting<const N: usize>(first: u8) -> [u8; N] {
    let mut bytes = [0; N];
    let mut index = 0;
    let mut value = first;
    while index < N {
        bytes[index] = value;
        value = value.wrapping_add(1);
        index += 1;
    }
    bytes
}

fn machine() -> MachineId {
    MachineId(counting(0xd0))
}

fn control() -> ControlKey {
    ControlKey(counting(0x20))
}

fn manifest(sizes: &[(Part, u64)]) -> Manifest {
    Manifest {
        hostname: "laptop".into(),
        payload: Payload {
            version: "6.1.0".into(),
            cmdline: "root=UUID=1 ro".into(),
            parts: sizes.iter().map(|&(part, size)| PartSize { part, size }).collect(),
            boot: Some(vec![BootFolder {
                path: "/boot".into(),
                partition: Some(2),
                fstype: "ext4".into(),
                fingerprint: "0a".repeat(32),
            }]),
        },
        disk: DiskOffer {
            identity: DiskIdentity {
                serial: Some("S1".into()),
                size: 4096,
                ..DiskIdentity::default()
            },
            logical_block_size: 512,
            transport: Transport::Nbd {
                port: 10809,
                export: "x".into(),
            },
            guest: false,
        },
        link: LinkOffer {
            mode: LinkMode::Dedicated,
            address: std::net::Ipv6Addr::LOCALHOST,
            laptop: std::net::Ipv6Addr::LOCALHOST,
            grace: 900,
            tunnel: None,
        },
        claims: vec![DeviceClaims {
            name: "sda1".into(),
            claims: vec![claim("0ABC-12EF")],
        }],
        control: control(),
        session: NAME.to_string(),
    }
}

fn claim(value: &str) -> Claim {
    Claim {
        kind: ClaimKind::FsUuid,
        value: value.into(),
    }
}

fn small() -> Manifest {
    manifest(&[(Part::Kernel, 3), (Part::Initrd, 0), (Part::Overlay, 2)])
}

fn vector(name: &str) -> Vec<u8> {
    vectors::bytes("session.txt", name)
}

/// A handshake with the pinned ephemeral keys: the vectors' two sides after it.
fn pinned() -> (Vec<u8>, Vec<u8>, Accepted, Opened) {
    let (ours, theirs): ([u8; 32], [u8; 32]) = (counting(0x40), counting(0x60));
    let (initiator, opening) =
        Initiator::start_with(&key::tests::fixed(), &OFFER, machine(), |b| fixed_ephemeral(b, &ours)).unwrap();
    let accepted = Opening::parse(&opening)
        .unwrap()
        .accept_with(&key::tests::fixed(), NAME, |b| fixed_ephemeral(b, &theirs))
        .unwrap();
    let answer = accepted.answer.clone();
    let opened = initiator.finish(&answer).unwrap();
    (opening, answer, accepted, opened)
}

fn fixed_ephemeral<'a>(builder: Builder<'a>, key: &[u8; 32]) -> Builder<'a> {
    // The builder borrows the key for its own life time; a test may leak 32 bytes.
    builder.fixed_ephemeral_key_for_testing_only(Box::leak(Box::new(*key)))
}

/// Both ends of a stream.
fn connected() -> (Sender, Receiver) {
    let (_, _, accepted, opened) = pinned();
    (accepted.begin(&opened.begin).unwrap(), opened.stream)
}

/// What came out of a stream: names and data of the items, or how it failed.
fn read(receiver: &mut Receiver, mut bytes: &[u8]) -> Result<Vec<String>, StreamError> {
    let mut items = Vec::new();
    while let Some(item) = receiver.next(&mut bytes)? {
        items.push(match item {
            Item::Waiting => "waiting".into(),
            Item::Manifest(manifest) => format!("manifest of {}", manifest.hostname),
            Item::Data { part, bytes } => format!("{part:?} {}", String::from_utf8_lossy(bytes)),
            Item::End => "end".into(),
            Item::Loan(_) => "loan".into(),
            Item::Unlocking(_) => "unlocking".into(),
        });
    }
    assert!(bytes.is_empty());
    receiver.finish()?;
    Ok(items)
}

fn small_stream(sender: &mut Sender) -> Vec<u8> {
    let frames = [
        sender.waiting().unwrap(),
        sender.manifest(&small()).unwrap(),
        sender.data(b"abc").unwrap(),
        sender.data(b"de").unwrap(),
        sender.end().unwrap(),
    ];
    frames.concat()
}

#[test]
fn the_handshake_is_the_pinned_one() {
    let (opening, answer, accepted, opened) = pinned();
    assert_eq!(opening, vector("opening"));
    assert_eq!(answer, vector("opened"));
    assert_eq!(opened.begin, vector("begin"));
    assert_eq!(
        (opening.len(), answer.len(), opened.begin.len()),
        (OPENING, OPENED, BEGIN)
    );
    assert_eq!((accepted.machine, opened.session), (machine(), NAME));
}

#[test]
fn frames_are_the_pinned_ones() {
    let (mut sender, mut receiver) = connected();
    assert_eq!(
        *small().to_json().unwrap(),
        vectors::value("session.txt", "manifest_json").as_bytes()
    );
    let stream = small_stream(&mut sender);
    assert_eq!(
        stream,
        ["waiting", "manifest", "data1", "data2", "end"].map(vector).concat()
    );
    let items = read(&mut receiver, &stream).unwrap();
    assert_eq!(
        items,
        ["waiting", "manifest of laptop", "Kernel abc", "Overlay de", "end"]
    );

    let (mut sender, mut receiver) = connected();
    let refusal = sender.refusal("zu spät").unwrap();
    assert_eq!(refusal, vector("refusal"));
    let error = read(&mut receiver, &refusal).unwrap_err();
    assert_eq!(error.to_string(), "the laptop refuses: zu spät");
}

#[test]
fn goodbyes_are_the_pinned_ones() {
    for (name, goodbye, nonce) in [
        ("goodbye_poweroff", Goodbye::Poweroff, 0x50),
        ("goodbye_reboot", Goodbye::Reboot, 0x51),
        ("goodbye_reboot_anew", Goodbye::RebootAnew, 0x52),
    ] {
        let farewell = Farewell::new_with(&control(), NAME, goodbye, counting(nonce), counting(0x70)).unwrap();
        assert_eq!(farewell.body, vector(name));
        let heard = ReceivedGoodbye::open(&control(), NAME, &farewell.body).unwrap();
        assert_eq!(heard.goodbye, goodbye);
        let done = heard.answer_with(&control(), NAME, Ok(()), counting(0x60)).unwrap();
        assert_eq!(done, vector("answer_done"));
        farewell.answered(&control(), NAME, &done).unwrap();
        let refused = heard
            .answer_with(&control(), NAME, Err("disk full"), counting(0x61))
            .unwrap();
        assert_eq!(refused, vector("answer_refused"));
        let error = farewell.answered(&control(), NAME, &refused).unwrap_err();
        assert!(error.to_string().contains("disk full"));
    }
}

#[test]
fn a_handshake_with_the_wrong_key_or_for_another_offer_is_refused() {
    let stranger = StickKey::generate("stranger").unwrap();
    let (_, opening) = Initiator::start(&stranger, &OFFER, machine()).unwrap();
    let refused = Opening::parse(&opening).unwrap().accept(&key::tests::fixed(), NAME);
    assert!(matches!(refused.err(), Some(SessionError::Unverified)));

    let (_, mut moved) = Initiator::start(&key::tests::fixed(), &OFFER, machine()).unwrap();
    moved[1..17].copy_from_slice(&counting::<16>(1));
    let refused = Opening::parse(&moved).unwrap().accept(&key::tests::fixed(), NAME);
    assert!(
        matches!(refused.err(), Some(SessionError::Unverified)),
        "the prologue binds the offer"
    );
}

#[test]
fn any_flipped_bit_of_the_handshake_is_refused() {
    let (_, opening) = Initiator::start(&key::tests::fixed(), &OFFER, machine()).unwrap();
    for bit in 0..opening.len() * 8 {
        let mut bad = opening.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        let accepted = Opening::parse(&bad).and_then(|opening| opening.accept(&key::tests::fixed(), NAME));
        assert!(accepted.is_err(), "bit {bit}");
    }
    for bit in 0..OPENED * 8 {
        let (initiator, opening) = Initiator::start(&key::tests::fixed(), &OFFER, machine()).unwrap();
        let mut bad = Opening::parse(&opening)
            .unwrap()
            .accept(&key::tests::fixed(), NAME)
            .unwrap()
            .answer;
        bad[bit / 8] ^= 1 << (bit % 8);
        assert!(initiator.finish(&bad).is_err(), "bit {bit}");
    }
    for bit in 0..BEGIN * 8 {
        let (_, _, accepted, opened) = pinned();
        let mut bad = opened.begin;
        bad[bit / 8] ^= 1 << (bit % 8);
        assert!(accepted.begin(&bad).is_err(), "bit {bit}");
    }
}

#[test]
fn handshake_messages_of_another_length_are_refused() {
    let (_, opening) = Initiator::start(&key::tests::fixed(), &OFFER, machine()).unwrap();
    for length in 0..OPENING {
        assert!(Opening::parse(&opening[..length]).is_err());
    }
    assert!(Opening::parse(&[opening.as_slice(), &[0]].concat()).is_err());
    let answer = Opening::parse(&opening)
        .unwrap()
        .accept(&key::tests::fixed(), NAME)
        .unwrap()
        .answer;
    for length in 0..OPENED {
        let (initiator, _) = Initiator::start(&key::tests::fixed(), &OFFER, machine()).unwrap();
        assert!(initiator.finish(&answer[..length]).is_err());
    }
    for length in (0..BEGIN).chain([BEGIN + 1, 65535]) {
        let (_, _, accepted, mut opened) = pinned();
        opened.begin.resize(length, 0);
        assert!(accepted.begin(&opened.begin).is_err());
    }
}

#[test]
fn a_recorded_handshake_does_not_begin_a_session() {
    // The enemy replays the desktop's two messages; the laptop's ephemeral key is another one this time.
    let (opening, _, _, opened) = pinned();
    let again = Opening::parse(&opening)
        .unwrap()
        .accept(&key::tests::fixed(), NAME)
        .unwrap();
    assert!(matches!(
        again.begin(&opened.begin).err(),
        Some(SessionError::Unverified)
    ));
}

#[test]
fn another_version_is_named() {
    let (_, mut opening) = Initiator::start(&key::tests::fixed(), &OFFER, machine()).unwrap();
    opening[0] = 9;
    let error = Opening::parse(&opening).unwrap_err();
    assert!(error.to_string().contains("version 9"), "{error}");
}

#[test]
fn any_flipped_bit_of_the_stream_is_noticed_before_it_is_handed_out() {
    let (mut sender, _) = connected();
    let stream = small_stream(&mut sender);
    for bit in 0..stream.len() * 8 {
        let mut bad = stream.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        let error = read(&mut connected().1, &bad).unwrap_err();
        assert!(
            matches!(error, StreamError::Altered | StreamError::Truncated),
            "bit {bit}: {error}"
        );
    }
}

#[test]
fn a_stream_cut_anywhere_is_truncated() {
    let (mut sender, _) = connected();
    let stream = small_stream(&mut sender);
    for length in 0..stream.len() {
        let error = read(&mut connected().1, &stream[..length]).unwrap_err();
        assert!(matches!(error, StreamError::Truncated), "{length}: {error}");
    }
}

#[test]
fn frames_left_out_doubled_or_moved_are_noticed() {
    let frames = ["waiting", "manifest", "data1", "data2", "end"].map(vector);
    for order in [
        vec![1, 2, 3, 4],
        vec![0, 1, 3, 4],
        vec![0, 1, 2, 2, 3, 4],
        vec![0, 1, 3, 2, 4],
        vec![0, 1, 2, 3, 4, 4],
        vec![0, 1, 2, 3, 4, 0],
    ] {
        let stream: Vec<u8> = order.iter().flat_map(|&frame| frames[frame].clone()).collect();
        assert!(read(&mut connected().1, &stream).is_err(), "{order:?}");
    }
}

#[test]
fn a_stream_of_another_session_is_noticed() {
    let (mut sender, _) = connected();
    let (initiator, opening) = Initiator::start(&key::tests::fixed(), &OFFER, machine()).unwrap();
    let accepted = Opening::parse(&opening)
        .unwrap()
        .accept(&key::tests::fixed(), NAME)
        .unwrap();
    let mut opened = initiator.finish(&accepted.answer).unwrap();
    let stream = small_stream(&mut sender);
    assert!(matches!(
        read(&mut opened.stream, &stream).unwrap_err(),
        StreamError::Altered
    ));
}

#[test]
fn a_laptop_that_says_things_out_of_order_is_not_followed() {
    let whole = || manifest(&[(Part::Kernel, 3)]);
    let (mut sender, _) = connected();
    assert!(sender.data(b"abc").is_err());
    assert!(sender.end().is_err());
    sender.manifest(&whole()).unwrap();
    assert!(sender.manifest(&whole()).is_err());
    assert!(sender.refusal("no").is_err());
    assert!(sender.waiting().is_err());
    assert!(sender.data(b"").is_err());
    assert!(sender.data(b"abcd").is_err());
    assert!(sender.data(&vec![0; CHUNK + 1]).is_err());
    assert!(sender.end().is_err());
    sender.data(b"ab").unwrap();
    sender.data(b"c").unwrap();
    assert!(sender.data(b"d").is_err());
    sender.end().unwrap();
    assert!(sender.end().is_err());

    // The receiver does not rely on that.
    type Frames = fn(&mut Sender) -> Vec<Vec<u8>>;
    let cases: [(&str, Frames); 4] = [
        ("data", |s| vec![s.raw(5, b"abc")]),
        ("too much data", |s| {
            vec![s.manifest(&manifest(&[(Part::Kernel, 3)])).unwrap(), s.raw(5, b"abcd")]
        }),
        ("the end", |s| {
            vec![s.manifest(&manifest(&[(Part::Kernel, 3)])).unwrap(), s.raw(6, b"")]
        }),
        ("an unknown frame", |s| vec![s.raw(9, b"")]),
    ];
    for (what, frames) in cases {
        let (mut sender, mut receiver) = connected();
        let stream = frames(&mut sender).concat();
        let error = read(&mut receiver, &stream).unwrap_err();
        assert!(
            matches!(error, StreamError::Order { what: told } if told == what),
            "{what}: {error}"
        );
    }
}

#[test]
fn a_guest_is_told_so_and_others_hear_nothing_of_it() {
    let text = |manifest: &Manifest| String::from_utf8(manifest.to_json().unwrap().to_vec()).unwrap();
    assert!(!text(&small()).contains("guest"));
    let mut guest = small();
    guest.disk.guest = true;
    assert!(text(&guest).contains(r#""export":"x"},"guest":true},"#));
    assert!(Manifest::parse(text(&guest).as_bytes()).unwrap().disk.guest);
}

#[test]
fn a_manifest_is_refused_before_anything_is_allocated_for_it() {
    let too_large = |part: Part| manifest(&[(Part::Kernel, 3), (part, part.limit() + 1)]);
    assert!(matches!(
        too_large(Part::Initrd).to_json(),
        Err(ManifestError::PartTooLarge { .. })
    ));
    type Spoil = fn(&mut Manifest);
    let cases: [(&str, Spoil); 13] = [
        ("size", |m| m.payload.parts[0].size = u64::MAX),
        ("twice", |m| m.payload.parts[1].part = Part::Kernel),
        ("kernel", |m| m.payload.parts.remove(0).size = 0),
        ("folder", |m| m.payload.version = "../../etc".into()),
        ("folder", |m| m.payload.version = "..".into()),
        ("line", |m| m.payload.cmdline = "a\nb".into()),
        ("screen", |m| m.hostname = "\x1b[2J".into()),
        ("session", |m| m.session = "../goodbye".into()),
        ("block", |m| m.disk.logical_block_size = 0),
        ("boot folder", |m| {
            m.payload.boot = Some(vec![BootFolder {
                path: "/boot/../x".into(),
                partition: None,
                fstype: "ext4".into(),
                fingerprint: "0a".repeat(32),
            }])
        }),
        ("device", |m| m.claims[0].name = "sda\n".into()),
        ("label", |m| m.claims[0].claims[0].value = "\x1b[2J".into()),
        ("long label", |m| m.claims[0].claims[0].value = "x".repeat(257)),
    ];
    for (what, spoil) in cases {
        let mut bad = small();
        spoil(&mut bad);
        assert!(bad.to_json().is_err(), "{what}");
        let (mut sender, mut receiver) = connected();
        let frame = sender.raw(4, &serde_json::to_vec(&bad).unwrap());
        let error = read(&mut receiver, &frame).unwrap_err();
        assert!(matches!(error, StreamError::Manifest(_)), "{what}: {error}");
    }
    let mut long = small();
    long.payload.cmdline = "x".repeat(crate::bundle::MAX_MANIFEST);
    assert!(matches!(long.to_json(), Err(ManifestError::TooLarge { .. })));
    let (mut sender, mut receiver) = connected();
    let other = Manifest {
        session: SessionName(counting(1)).to_string(),
        ..small()
    };
    let frame = sender.manifest(&other).unwrap();
    assert!(matches!(
        read(&mut receiver, &frame).unwrap_err(),
        StreamError::Order { .. }
    ));
}

#[test]
fn as_many_claims_are_sent_as_fit() {
    let device = |name: &str, count: usize| DeviceClaims {
        name: name.into(),
        // Such characters are escaped.
        claims: vec![claim(&"\"".repeat(256)); count],
    };
    let mut few = vec![device("sda", 3), device("sda1", 0), device("sda2", 1)];
    assert_eq!(DeviceClaims::shorten(&mut few), 0);
    assert_eq!(few, [device("sda", 3), device("sda2", 1)]);
    let mut many: Vec<_> = (0..200).map(|_| device("sda", 10)).collect();
    let left_out = DeviceClaims::shorten(&mut many);
    let kept: usize = many.iter().map(|device| device.claims.len()).sum();
    assert!(kept > 50 && kept + left_out == 2000, "{kept} kept");
    let mut manifest = small();
    manifest.claims = many;
    let json = manifest.to_json().unwrap();
    assert_eq!(Manifest::parse(&json).unwrap().claims, manifest.claims);
}

#[test]
fn a_refusal_cannot_disturb_the_screen() {
    let (mut sender, mut receiver) = connected();
    let frame = sender.refusal(&format!("\x1b[2J{}", "ä".repeat(5000))).unwrap();
    let Err(StreamError::Refused { reason }) = read(&mut receiver, &frame) else {
        panic!()
    };
    assert!(!reason.contains('\x1b') && reason.len() <= 1024);
}

#[test]
fn signs_of_life_are_the_pinned_ones() {
    let pulse = Pulse::new(&control(), NAME, 0);
    let beat = Beat {
        number: 5,
        mtu: 1420,
        random: counting(0x70),
        length: SHORTEST,
    };
    assert_eq!(pulse.beat_with(&beat, counting(0x80)).unwrap(), vector("beat"));
    assert_eq!(pulse.hear(&vector("beat")).unwrap(), beat);
    let sign = Sign {
        battery: Some(42),
        mains: false,
        power_off: true,
        mtu: 9000,
    };
    assert_eq!(pulse.sign_with(&beat, sign, counting(0x81)).unwrap(), vector("sign"));
    assert_eq!(pulse.read(&vector("sign")).unwrap(), (counting(0x70), sign));
}

#[test]
fn a_goodbye_is_bound_to_its_session_key_direction_and_question() {
    let other = SessionName(counting(1));
    let farewell = Farewell::new(&control(), NAME, Goodbye::Poweroff).unwrap();
    assert!(ReceivedGoodbye::open(&control(), other, &farewell.body).is_err());
    assert!(ReceivedGoodbye::open(&ControlKey([0; 32]), NAME, &farewell.body).is_err());
    let heard = ReceivedGoodbye::open(&control(), NAME, &farewell.body).unwrap();
    let answer = heard.answer(&control(), NAME, Ok(())).unwrap();
    farewell.answered(&control(), NAME, &answer).unwrap();
    assert!(farewell.answered(&control(), other, &answer).is_err());
    assert!(
        farewell.answered(&control(), NAME, &farewell.body).is_err(),
        "reflected"
    );
    assert!(ReceivedGoodbye::open(&control(), NAME, &answer).is_err(), "reflected");
    let later = Farewell::new(&control(), NAME, Goodbye::Poweroff).unwrap();
    assert!(
        later.answered(&control(), NAME, &answer).is_err(),
        "the answer to another question"
    );
    for bit in 0..farewell.body.len() * 8 {
        let mut bad = farewell.body.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        assert!(ReceivedGoodbye::open(&control(), NAME, &bad).is_err(), "bit {bit}");
    }
    for bit in 0..answer.len() * 8 {
        let mut bad = answer.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        assert!(farewell.answered(&control(), NAME, &bad).is_err(), "bit {bit}");
    }
    for length in 0..farewell.body.len() {
        assert!(ReceivedGoodbye::open(&control(), NAME, &farewell.body[..length]).is_err());
    }
}

#[test]
fn a_long_reason_is_cut_at_a_character() {
    let farewell = Farewell::new(&control(), NAME, Goodbye::Reboot).unwrap();
    let heard = ReceivedGoodbye::open(&control(), NAME, &farewell.body).unwrap();
    let answer = heard.answer(&control(), NAME, Err(&"ä".repeat(300))).unwrap();
    let Err(GoodbyeError::Refused { reason }) = farewell.answered(&control(), NAME, &answer) else {
        panic!()
    };
    assert_eq!(reason, "ä".repeat(MAX_REASON / 2));
}

#[test]
fn machine_ids_are_read_from_both_sources() {
    let plain: MachineId = "d0d1d2d3d4d5d6d7d8d9dadbdcdddedf\n".parse().unwrap();
    let dmi: MachineId = "D0D1D2D3-D4D5-D6D7-D8D9-DADBDCDDDEDF\n".parse().unwrap();
    assert_eq!((plain, dmi), (machine(), machine()));
    assert_eq!(plain.to_string(), "d0d1d2d3d4d5d6d7d8d9dadbdcdddedf");
    for bad in ["", "d0", "uninitialized", &"0".repeat(33), &"0".repeat(1000)] {
        assert!(bad.parse::<MachineId>().is_err(), "{bad}");
    }
}

proptest! {
    #[test]
    fn a_stream_is_the_same_in_whatever_pieces_it_comes(
        kernel in proptest::collection::vec(any::<u8>(), 1..5000),
        overlay in proptest::collection::vec(any::<u8>(), 0..5000),
        chunk in 1..4000_usize,
        piece in 1..4000_usize,
    ) {
        let length = |bytes: &Vec<u8>| u64::try_from(bytes.len()).unwrap();
        let manifest = manifest(&[(Part::Overlay, length(&overlay)), (Part::Kernel, length(&kernel))]);
        let (mut sender, mut receiver) = connected();
        let mut stream = sender.manifest(&manifest).unwrap();
        for bytes in [&overlay, &kernel] {
            for chunk in bytes.chunks(chunk) {
                stream.extend(sender.data(chunk).unwrap());
            }
        }
        stream.extend(sender.end().unwrap());
        let mut got = std::collections::BTreeMap::<Part, Vec<u8>>::new();
        for mut piece in stream.chunks(piece) {
            prop_assert!(receiver.finish().is_err());
            while let Some(item) = receiver.next(&mut piece).unwrap() {
                if let Item::Data { part, bytes } = item {
                    got.entry(part).or_default().extend_from_slice(bytes);
                }
            }
        }
        receiver.finish().unwrap();
        prop_assert_eq!(got.remove(&Part::Kernel).unwrap_or_default(), kernel);
        prop_assert_eq!(got.remove(&Part::Overlay).unwrap_or_default(), overlay);
    }

    #[test]
    fn any_bytes_are_no_stream(bytes in proptest::collection::vec(any::<u8>(), 0..70_000)) {
        prop_assert!(read(&mut connected().1, &bytes).is_err());
    }
}
