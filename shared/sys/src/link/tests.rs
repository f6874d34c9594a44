use super::*;
use crate::netlink::encode;
use proptest::prelude::*;
use std::os::unix::fs::symlink;

fn loopback() -> Link {
    list().unwrap().into_iter().find(|link| link.name == "lo").unwrap()
}

#[test]
fn loopback_is_listed_and_not_wired() {
    let lo = loopback();
    assert_eq!((lo.index, lo.arphrd, lo.mac), (1, 772, [0; 6]));
    assert!(!lo.is_wired_physical());
}

#[test]
fn loopback_has_its_address() {
    set_up(loopback().index).unwrap();
    let found = addresses(loopback().index).unwrap();
    let expected = Address {
        addr: [127, 0, 0, 1].into(),
        prefix: 8,
        tentative: false,
        duplicate: false,
    };
    assert!(found.contains(&expected), "{found:?}");
    let error = add_address(1, [127, 0, 0, 1].into(), 8).unwrap_err();
    assert!(matches!(error, LinkError::Refused { source, .. } if source.raw_os_error() == Some(libc::EEXIST)));
}

#[test]
fn an_absent_interface_is_refused_with_enodev() {
    for result in [
        set_up(0x7fff_fff0),
        set_down(0x7fff_fff0),
        rename(0x7fff_fff0, "stiefellink"),
    ] {
        assert!(
            matches!(result, Err(LinkError::Refused { source, .. }) if source.raw_os_error() == Some(libc::ENODEV))
        );
    }
}

#[test]
fn names_the_kernel_would_not_take_are_refused() {
    for name in ["", ".", "..", "a/b", "a b", "a:b", "sixteen-letters!", "a\n"] {
        assert!(matches!(rename(1, name), Err(LinkError::Name { .. })), "{name:?}");
        assert!(matches!(
            disable_dad(Path::new("/nonexistent"), name),
            Err(LinkError::Name { .. })
        ));
    }
}

#[test]
fn an_interface_without_link_local_address_times_out() {
    let error = wait_link_local(0x7fff_fff0, Duration::ZERO).unwrap_err();
    assert!(
        matches!(error, LinkError::NoLinkLocal { index: 0x7fff_fff0, .. }),
        "{error:?}"
    );
}

#[test]
fn a_link_is_read_from_its_message() {
    let info = Body::default().attr_string(libc::IFLA_INFO_KIND, "veth");
    let mut header = vec![0, 0, 1, 0];
    header.extend(7u32.to_ne_bytes());
    header.extend((libc::IFF_UP | libc::IFF_LOWER_UP).to_ne_bytes());
    header.extend([0; 4]);
    let body = Body::new(&header)
        .attr_string(libc::IFLA_IFNAME, "v0")
        .attr(libc::IFLA_ADDRESS, &[2, 0, 0, 0, 0, 1])
        .attr(IFLA_PERM_ADDRESS, &[4, 0, 0, 0, 0, 1])
        .attr(libc::IFLA_MASTER, &9u32.to_ne_bytes())
        .nest(libc::IFLA_LINKINFO, &info);
    let expected = Link {
        index: 7,
        name: "v0".into(),
        mac: [2, 0, 0, 0, 0, 1],
        permanent_mac: Some([4, 0, 0, 0, 0, 1]),
        up: true,
        carrier: true,
        kind: Some("veth".into()),
        arphrd: u16::from_ne_bytes([1, 0]),
        controller: Some(9),
        ..Link::default()
    };
    assert_eq!(parse_link(body.bytes()), Some(expected));
}

fn address_message(flags: u32, addr: &str) -> Option<(u32, Address)> {
    let body = address_body(4, addr.parse().unwrap(), 64).attr(libc::IFA_FLAGS, &flags.to_ne_bytes());
    parse_address(body.bytes())
}

#[test]
fn an_optimistic_address_counts_as_usable_and_a_tentative_one_not() {
    let tentative = |flags| address_message(flags, "fe80::1").unwrap().1.tentative;
    assert!(tentative(libc::IFA_F_TENTATIVE));
    assert!(!tentative(libc::IFA_F_TENTATIVE | libc::IFA_F_OPTIMISTIC));
    assert!(!tentative(libc::IFA_F_PERMANENT));
}

#[test]
fn only_a_usable_link_local_address_ends_the_wait() {
    let address = |flags, addr| address_message(flags, addr).unwrap().1;
    let tentative = address(libc::IFA_F_TENTATIVE, "fe80::1");
    let global = address(0, "2001:db8::1");
    let failed = address(libc::IFA_F_DADFAILED | libc::IFA_F_TENTATIVE, "fe80::2");
    let good = address(0, "fe80::3");
    assert_eq!(usable_link_local(4, &[tentative, global]).unwrap(), None);
    assert_eq!(
        usable_link_local(4, &[failed, good]).unwrap(),
        Some("fe80::3".parse().unwrap())
    );
    assert!(matches!(
        usable_link_local(4, &[failed]),
        Err(LinkError::Duplicate { index: 4, .. })
    ));
}

#[test]
fn requests_have_these_bytes() {
    if cfg!(target_endian = "big") {
        return;
    }
    assert_eq!(
        link_body(3, 1, 1).bytes(),
        [0, 0, 0, 0, 3, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0]
    );
    assert_eq!(
        create_body("st0", "wireguard").bytes()[16..],
        [
            8, 0, 3, 0, b's', b't', b'0', 0, 20, 0, 18, 0x80, 14, 0, 1, 0, b'w', b'i', b'r', b'e', b'g', b'u', b'a',
            b'r', b'd', 0, 0, 0
        ]
    );
    let body = address_body(3, [10, 0, 0, 1].into(), 24);
    assert_eq!(
        body.bytes(),
        [
            2, 24, 0, 0, 3, 0, 0, 0, 8, 0, 2, 0, 10, 0, 0, 1, 8, 0, 1, 0, 10, 0, 0, 1
        ]
    );
}

#[test]
fn one_datagram_may_tell_of_several_changes() {
    let address = address_body(4, [10, 0, 0, 1].into(), 24);
    let datagram = [
        encode(libc::RTM_NEWLINK, 0, 0, &link_body(3, 0, 0)),
        encode(libc::RTM_NEWROUTE, 0, 0, &Body::new(&[0; 12])),
        encode(libc::RTM_DELADDR, 0, 0, &address),
    ];
    let datagram: Vec<u8> = datagram.iter().flat_map(|message| message.to_vec()).collect();
    let expected = [
        Change {
            index: 3,
            kind: ChangeKind::Link,
        },
        Change {
            index: 4,
            kind: ChangeKind::AddressGone,
        },
    ];
    assert_eq!(changes(&datagram).collect::<Vec<_>>(), expected);
}

#[test]
fn a_monitor_hears_of_a_new_address() {
    let addr: IpAddr = [127, 83, 84, u8::try_from(std::process::id() % 250).unwrap() + 1].into();
    let mut monitor = LinkMonitor::open().unwrap();
    add_address(1, addr, 32).unwrap();
    // Other interfaces of the machine may change meanwhile.
    let mut heard = std::iter::from_fn(|| monitor.next(Some(Duration::from_secs(10))).unwrap());
    let heard = heard.find(|change| change.index == 1);
    let body = address_body(1, addr, 32);
    request(libc::RTM_DELADDR, 0, &body).unwrap();
    assert!(heard.is_some());
}

#[test]
fn sysfs_tells_wired_wireless_and_modem_apart() {
    let sysfs = tempfile::tempdir().unwrap();
    let net = sysfs.path().join("class/net");
    let device = sysfs.path().join("devices/pci0/usb1/1-1");
    std::fs::create_dir_all(device.join("1-1:1.0")).unwrap();
    for (name, uevent) in [
        ("eth0", "INTERFACE=eth0\n"),
        ("wlan0", "DEVTYPE=wlan\n"),
        ("wwan0", "DEVTYPE=wwan\n"),
    ] {
        std::fs::create_dir_all(net.join(name)).unwrap();
        std::fs::write(net.join(name).join("uevent"), uevent).unwrap();
        symlink(device.join("1-1:1.0"), net.join(name).join("device")).unwrap();
    }
    let wired = |name: &str| {
        let link = Link {
            name: name.into(),
            arphrd: ARPHRD_ETHER,
            ..Link::default()
        };
        with_sysfs(link, sysfs.path())
    };
    assert!(wired("eth0").is_wired_physical());
    assert!(wired("wlan0").wireless && !wired("wlan0").is_wired_physical());
    assert!(!wired("wwan0").is_wired_physical());
    assert!(!wired("bridge0").is_wired_physical());

    std::fs::write(device.join("idVendor"), "0bda\n").unwrap();
    std::fs::write(device.join("idProduct"), "8153\n").unwrap();
    std::fs::write(device.join("serial"), "0013000000\n").unwrap();
    let expected = UsbId {
        vendor: 0x0bda,
        product: 0x8153,
        serial: Some("0013000000".into()),
    };
    assert_eq!(usb_id(sysfs.path(), "eth0"), Some(expected));
    assert_eq!(usb_id(sysfs.path(), "lo"), None);
}

/// IFLA_MTU of an interface.
fn mtu(index: u32) -> Option<u32> {
    let answers = request(libc::RTM_GETLINK, 0, &link_body(index, 0, 0)).ok()?;
    let (_, body) = answers.first()?;
    let (_, value) = attributes(body, LINK_HEADER).find(|(kind, _)| *kind == libc::IFLA_MTU)?;
    u32_at(value, 0)
}

#[test]
fn a_virtual_interface_is_made_sized_and_removed() {
    let namespace = crate::netns::Namespace::new().unwrap();
    let in_namespace = || {
        let index = create("st0", "veth").unwrap();
        assert_eq!(index_of("st0").unwrap(), Some(index));
        assert!(create("st0", "veth").is_err());
        set_mtu(index, 9000).unwrap();
        assert_eq!(mtu(index), Some(9000));
        delete(index).unwrap();
        assert_eq!(index_of("st0").unwrap(), None);
        delete(index)
    };
    let gone = namespace.run(in_namespace).unwrap();
    assert!(matches!(gone, Err(LinkError::Refused { source, .. }) if source.raw_os_error() == Some(libc::ENODEV)));
}

#[test]
fn a_kind_the_kernel_lacks_is_refused() {
    let error = create("st0", "no-such-kind").unwrap_err();
    assert!(matches!(error, LinkError::Create { source, .. } if source.raw_os_error() == Some(libc::EOPNOTSUPP)));
}

#[test]
fn duplicate_detection_is_turned_off_in_proc() {
    let procfs = tempfile::tempdir().unwrap();
    assert!(disable_dad(procfs.path(), "eth0").is_err());
    let folder = procfs.path().join("sys/net/ipv6/conf/eth0");
    std::fs::create_dir_all(&folder).unwrap();
    disable_dad(procfs.path(), "eth0").unwrap();
    assert_eq!(std::fs::read_to_string(folder.join("accept_dad")).unwrap(), "0\n");
}

proptest! {
    #[test]
    fn any_bytes_are_read(bytes: Vec<u8>) {
        let _ = parse_link(&bytes);
        let _ = parse_address(&bytes);
        let _ = changes(&bytes).count();
    }
}
