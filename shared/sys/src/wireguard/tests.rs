use super::*;
use proptest::prelude::*;

const OTHER: PublicKey = PublicKey::from_bytes([0xbb; 32]);

fn endpoint() -> SocketAddrV6 {
    SocketAddrV6::new("fe80::12".parse().unwrap(), 0x1234, 0, 7)
}

/// sockaddr_in6 of [`endpoint`].
const ENDPOINT: [u8; 28] = [
    10, 0, 0x12, 0x34, 0, 0, 0, 0, 0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x12, 7, 0, 0, 0,
];

#[cfg(target_endian = "little")]
mod bytes {
    use super::*;

    #[test]
    fn configure_has_these_bytes() {
        let (private, shared) = (PrivateKey::from_bytes([0x40; 32]), PresharedKey::from_bytes([0xcc; 32]));
        let device = Device {
            interface: Interface::Name("st0"),
            private_key: &private,
            listen_port: Some(0xca6c),
            peer: Peer {
                public_key: OTHER,
                preshared_key: &shared,
                endpoint: Some(endpoint()),
                allowed_ips: &[("fd00::1".parse().unwrap(), 127), ([10, 0, 0, 0].into(), 8)],
                persistent_keepalive: Some(5),
            },
            replace_peers: true,
        };
        let expected = [
            &[1, 1, 0, 0][..],                  // SET_DEVICE, version
            &[8, 0, 2, 0, b's', b't', b'0', 0], // IFNAME
            &[36, 0, 3, 0][..],                 // PRIVATE_KEY
            &[0x40; 32],
            &[8, 0, 5, 0, 1, 0, 0, 0],           // FLAGS: REPLACE_PEERS
            &[6, 0, 6, 0, 0x6c, 0xca, 0, 0],     // LISTEN_PORT
            &[200, 0, 8, 0x80, 196, 0, 0, 0x80], // PEERS {ITEM
            &[36, 0, 1, 0][..],                  // PUBLIC_KEY
            &[0xbb; 32],
            &[8, 0, 3, 0, 2, 0, 0, 0], // FLAGS: REPLACE_ALLOWEDIPS
            &[36, 0, 2, 0][..],        // PRESHARED_KEY
            &[0xcc; 32],
            &[32, 0, 4, 0][..], // ENDPOINT
            &ENDPOINT,
            &[6, 0, 5, 0, 5, 0, 0, 0],                  // PERSISTENT_KEEPALIVE_INTERVAL
            &[72, 0, 9, 0x80],                          // ALLOWEDIPS
            &[40, 0, 0, 0x80, 6, 0, 1, 0, 10, 0, 0, 0], // ITEM {FAMILY
            &[20, 0, 2, 0, 0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1], // IPADDR
            &[5, 0, 3, 0, 127, 0, 0, 0],                // CIDR_MASK}
            &[28, 0, 0, 0x80, 6, 0, 1, 0, 2, 0, 0, 0],
            &[8, 0, 2, 0, 10, 0, 0, 0],
            &[5, 0, 3, 0, 8, 0, 0, 0],
        ];
        assert_eq!(device.body().bytes(), expected.concat());
    }

    #[test]
    fn what_is_not_given_is_not_sent() {
        let (private, shared) = (PrivateKey::from_bytes([0x40; 32]), PresharedKey::from_bytes([0xcc; 32]));
        let device = Device {
            interface: 9.into(),
            private_key: &private,
            listen_port: None,
            peer: Peer {
                public_key: OTHER,
                preshared_key: &shared,
                endpoint: None,
                allowed_ips: &[],
                persistent_keepalive: None,
            },
            replace_peers: false,
        };
        let body = device.body();
        let sent: Vec<u16> = attributes(body.bytes(), GENERIC_HEADER).map(|(kind, _)| kind).collect();
        assert_eq!(sent, [WGDEVICE_A_IFINDEX, WGDEVICE_A_PRIVATE_KEY, WGDEVICE_A_PEERS]);
        assert_eq!(body.bytes()[4..12], [8, 0, 1, 0, 9, 0, 0, 0]);
        let peer = device.peer.body();
        let sent: Vec<u16> = attributes(peer.bytes(), 0).map(|(kind, _)| kind).collect();
        assert_eq!(
            sent,
            [
                WGPEER_A_PUBLIC_KEY,
                WGPEER_A_FLAGS,
                WGPEER_A_PRESHARED_KEY,
                WGPEER_A_ALLOWEDIPS
            ]
        );
    }

    #[test]
    fn a_new_endpoint_only_updates() {
        let expected = [
            &[1, 1, 0, 0, 8, 0, 2, 0, b's', b't', b'0', 0][..],
            &[84, 0, 8, 0x80, 80, 0, 0, 0x80, 36, 0, 1, 0],
            &[0xbb; 32],
            &[8, 0, 3, 0, 4, 0, 0, 0, 32, 0, 4, 0], // FLAGS: UPDATE_ONLY, ENDPOINT
            &ENDPOINT,
        ];
        assert_eq!(
            endpoint_body("st0".into(), &OTHER, endpoint()).bytes(),
            expected.concat()
        );
    }

    #[test]
    fn a_removal_never_adds() {
        let expected = [
            &[1, 1, 0, 0, 8, 0, 1, 0, 9, 0, 0, 0][..],
            &[52, 0, 8, 0x80, 48, 0, 0, 0x80, 36, 0, 1, 0],
            &[0xbb; 32],
            &[8, 0, 3, 0, 5, 0, 0, 0], // FLAGS: REMOVE_ME, UPDATE_ONLY
        ];
        assert_eq!(removal_body(9.into(), &OTHER).bytes(), expected.concat());
    }
}

#[test]
fn networks_that_cannot_be_are_refused_before_anything_is_sent() {
    let (private, shared) = (PrivateKey::from_bytes([1; 32]), PresharedKey::from_bytes([2; 32]));
    let configured = |allowed_ips: &[(IpAddr, u8)]| {
        configure(&Device {
            interface: "no-such-tunnel".into(),
            private_key: &private,
            listen_port: None,
            peer: Peer {
                public_key: OTHER,
                preshared_key: &shared,
                endpoint: None,
                allowed_ips,
                persistent_keepalive: None,
            },
            replace_peers: false,
        })
    };
    let six: IpAddr = Ipv6Addr::LOCALHOST.into();
    for wrong in [([10, 0, 0, 0].into(), 33), (six, 129)] {
        assert!(matches!(configured(&[wrong]), Err(WireGuardError::Prefix { .. })));
    }
    assert!(matches!(
        configured(&[(six, 128); 257]),
        Err(WireGuardError::TooManyNetworks { count: 257 })
    ));
    assert!(!matches!(
        configured(&[(six, 128); 256]),
        Err(WireGuardError::TooManyNetworks { .. } | WireGuardError::Prefix { .. })
    ));
}

fn peer_message(key: u8, received: u64) -> Body {
    Body::default()
        .attr(WGPEER_A_PUBLIC_KEY, &[key; 32])
        .attr(WGPEER_A_PRESHARED_KEY, &[9; 32])
        .attr(WGPEER_A_ENDPOINT, &ENDPOINT)
        .attr(
            WGPEER_A_LAST_HANDSHAKE_TIME,
            &[1_700_000_000u64.to_ne_bytes(), 5u64.to_ne_bytes()].concat(),
        )
        .attr(WGPEER_A_RX_BYTES, &received.to_ne_bytes())
        .attr(WGPEER_A_TX_BYTES, &(1u64 << 40).to_ne_bytes())
}

#[test]
fn a_status_is_put_together_from_several_messages() {
    let begin = || generic(WG_CMD_GET_DEVICE, VERSION).attr_string(WGDEVICE_A_IFNAME, "st0");
    let list = |peers: &[Body]| peers.iter().fold(Body::default(), |list, peer| list.nest(ITEM, peer));
    let first = begin()
        .attr(WGDEVICE_A_PRIVATE_KEY, &[1; 32])
        .attr(WGDEVICE_A_PUBLIC_KEY, &[2; 32])
        .attr(WGDEVICE_A_LISTEN_PORT, &51820u16.to_ne_bytes())
        .nest(WGDEVICE_A_PEERS, &list(&[peer_message(3, 7), peer_message(4, 8)]));
    // The last peer's networks go on here.
    let rest = Body::default().attr(WGPEER_A_PUBLIC_KEY, &[4; 32]);
    let never = Body::default()
        .attr(WGPEER_A_PUBLIC_KEY, &[5; 32])
        .attr(WGPEER_A_LAST_HANDSHAKE_TIME, &[0; 16]);
    let second = begin().nest(WGDEVICE_A_PEERS, &list(&[rest, never]));
    let seen = parse_status([first.bytes(), second.bytes()].into_iter()).unwrap();
    let peer = |key, rx_bytes| PeerStatus {
        public_key: PublicKey::from_bytes([key; 32]),
        endpoint: Some(endpoint().into()),
        last_handshake: Some(UNIX_EPOCH + Duration::new(1_700_000_000, 5)),
        rx_bytes,
        tx_bytes: 1 << 40,
    };
    let fresh = PeerStatus {
        public_key: PublicKey::from_bytes([5; 32]),
        endpoint: None,
        last_handshake: None,
        rx_bytes: 0,
        tx_bytes: 0,
    };
    let expected = Status {
        public_key: Some(PublicKey::from_bytes([2; 32])),
        listen_port: 51820,
        peers: vec![peer(3, 7), peer(4, 8), fresh],
    };
    assert_eq!(seen, expected);
    assert_eq!(parse_status(std::iter::empty()), None);
}

#[test]
fn an_endpoint_of_ipv4_is_read() {
    let bytes = [2u16.to_ne_bytes(), 80u16.to_be_bytes(), [10, 0], [0, 1]].concat();
    assert_eq!(parse_socket_address(&bytes), Some("10.0.0.1:80".parse().unwrap()));
    assert_eq!(parse_socket_address(&[1, 0, 0, 0, 1, 2, 3, 4]), None);
}

#[test]
fn a_kernel_without_wireguard_is_told_apart() {
    // A machine with the module makes one, in a namespace that is gone afterwards; one without says why.
    let namespace = crate::netns::Namespace::new().unwrap();
    let made = namespace.run(|| create("st0")).unwrap();
    assert!(
        matches!(made, Ok(_) | Err(WireGuardError::NoWireGuard { .. })),
        "{made:?}"
    );
    let seen = namespace.run(|| status("st0")).unwrap();
    match made {
        Ok(_) => assert_eq!(seen.unwrap().peers, []),
        Err(_) => assert!(matches!(seen, Err(WireGuardError::NoWireGuard { .. })), "{seen:?}"),
    }
}

proptest! {
    #[test]
    fn any_bytes_are_read(bodies: Vec<Vec<u8>>) {
        let _ = parse_status(bodies.iter().map(Vec::as_slice));
        for body in &bodies {
            let _ = (parse_peer(body), parse_time(body));
        }
    }

    #[test]
    fn endpoints_are_read_back(octets: [u8; 16], port: u16, flow: u32, scope: u32) {
        let address = SocketAddrV6::new(octets.into(), port, flow, scope);
        prop_assert_eq!(parse_socket_address(&socket_address(address)), Some(address.into()));
    }
}
