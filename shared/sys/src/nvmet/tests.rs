use super::*;
use std::fs;

const NQN: &str = "nqn.2026-11.stiefel:disk";
const HOST: &str = "nqn.2026-11.stiefel:desktop";

/// A folder that behaves as nvmet's configfs does, as far as its rules are known here: items come with attributes and
/// groups, are not removed while anything is in them or linked to them, and nothing is set while it is in use.
struct Fake {
    folder: tempfile::TempDir,
    /// Attributes that this kernel lacks.
    lacks: Vec<&'static str>,
    /// Mutating calls so far, with their paths; and the number of the one that fails.
    calls: Vec<String>,
    fail_at: Option<usize>,
}

impl Fake {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        for name in ["hosts", "ports", "subsystems"] {
            fs::create_dir_all(folder.path().join("nvmet").join(name)).unwrap();
        }
        Self {
            folder,
            lacks: Vec::new(),
            calls: Vec::new(),
            fail_at: None,
        }
    }

    fn root(&self) -> PathBuf {
        self.folder.path().to_owned()
    }

    fn nvmet(&self) -> PathBuf {
        self.folder.path().join("nvmet")
    }

    fn call(&mut self, name: &str, path: &Path) -> io::Result<Vec<String>> {
        let relative = path.strip_prefix(self.nvmet()).unwrap();
        let parts: Vec<String> = relative.iter().map(|part| part.to_str().unwrap().to_owned()).collect();
        self.calls.push(format!("{name} {}", relative.display()));
        if self.fail_at == Some(self.calls.len() - 1) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        Ok(parts)
    }

    fn names(&self, folder: &str) -> Vec<String> {
        Configfs.list(&self.nvmet().join(folder)).unwrap_or_default()
    }

    fn is_empty(&self) -> bool {
        ["hosts", "ports", "subsystems"]
            .iter()
            .all(|folder| self.names(folder).is_empty())
    }

    fn text(&self, path: &str) -> String {
        fs::read_to_string(self.nvmet().join(path)).unwrap()
    }

    fn enabled(&self, namespace: &Path) -> bool {
        fs::read_to_string(namespace.join("enable")).is_ok_and(|text| text == "1")
    }

    fn busy() -> io::Error {
        io::Error::from_raw_os_error(libc::EBUSY)
    }
}

impl Tree for Fake {
    fn make_dir(&mut self, path: &Path) -> io::Result<()> {
        let parts = self.call("mkdir", path)?;
        fs::create_dir(path)?;
        let (files, groups): (&[&str], &[&str]) = match parts.iter().map(String::as_str).collect::<Vec<_>>()[..] {
            ["hosts", _] => (&[], &[]),
            ["ports", _] => (
                &["addr_trtype", "addr_adrfam", "addr_traddr", "addr_trsvcid"],
                &["subsystems", "referrals"],
            ),
            ["subsystems", _] => (
                &["attr_allow_any_host", "attr_serial", "attr_model", "attr_qid_max"],
                &["namespaces", "allowed_hosts"],
            ),
            ["subsystems", _, "namespaces", _] => (&["device_path", "device_uuid", "device_nguid", "enable"], &[]),
            _ => panic!("no item may be made at {parts:?}"),
        };
        for file in files.iter().filter(|file| !self.lacks.contains(file)) {
            fs::write(path.join(file), "").unwrap();
        }
        for group in groups {
            fs::create_dir(path.join(group)).unwrap();
        }
        Ok(())
    }

    fn remove_dir(&mut self, path: &Path) -> io::Result<()> {
        let parts = self.call("rmdir", path)?;
        let holds = |group: &str| Configfs.list(&path.join(group)).is_ok_and(|items| !items.is_empty());
        if ["subsystems", "namespaces", "allowed_hosts"]
            .iter()
            .any(|group| holds(group))
        {
            return Err(io::Error::from_raw_os_error(libc::ENOTEMPTY));
        }
        let name = parts.last().unwrap();
        let linked_to = match parts[0].as_str() {
            "hosts" => self
                .names("subsystems")
                .iter()
                .any(|s| self.names(&format!("subsystems/{s}/allowed_hosts")).contains(name)),
            "subsystems" => self
                .names("ports")
                .iter()
                .any(|p| self.names(&format!("ports/{p}/subsystems")).contains(name)),
            _ => false,
        };
        if linked_to || self.enabled(path) {
            return Err(Self::busy());
        }
        fs::remove_dir_all(path)
    }

    fn write(&mut self, path: &Path, text: &str) -> io::Result<()> {
        let parts = self.call("write", path)?;
        let folder = path.parent().unwrap();
        let in_use = parts[0] == "ports" && !Configfs.list(&folder.join("subsystems"))?.is_empty();
        if in_use || (self.enabled(folder) && !path.ends_with("enable")) {
            return Err(Self::busy());
        }
        // As the kernel: a shorter value replaces a longer one.
        if path.exists() {
            fs::write(path, "").unwrap();
        }
        Configfs.write(path, text)
    }

    fn read(&self, path: &Path) -> io::Result<String> {
        // The kernel pads it.
        Ok(format!("{:20}\n", Configfs.read(path)?))
    }

    fn link(&mut self, target: &Path, path: &Path) -> io::Result<()> {
        self.call("link", path)?;
        assert!(target.is_absolute() && target.is_dir());
        Configfs.link(target, path)
    }

    fn unlink(&mut self, path: &Path) -> io::Result<()> {
        self.call("unlink", path)?;
        Configfs.unlink(path)
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        Configfs.list(path)
    }
}

const PORTS: [Port; 2] = [
    Port {
        id: 7,
        address: IpAddr::V6(std::net::Ipv6Addr::LOCALHOST),
        tcp_port: 4420,
    },
    Port {
        id: 8,
        address: IpAddr::V4(std::net::Ipv4Addr::LOCALHOST),
        tcp_port: 4421,
    },
];

fn disk() -> Publish<'static> {
    Publish {
        nqn: NQN,
        host_nqn: HOST,
        model: "Fast Disk 9",
        serial: "S123",
        namespace: Namespace {
            device_path: Path::new("/dev/sda"),
            uuid: None,
            nguid: Some("00112233445566778899AABBCCDDEEFF"),
        },
        ports: &PORTS,
        max_queues: Some(4),
    }
}

fn put(tree: &mut Fake, disk: &Publish<'_>) -> Result<Published, NvmetError> {
    let root = tree.root();
    publish(tree, &root, disk)
}

#[test]
fn a_published_disk_is_described_and_only_for_its_host() {
    let mut tree = Fake::new();
    let published = put(&mut tree, &disk()).unwrap();
    assert!(published.missing().is_empty(), "{published:?}");
    let subsystem = format!("subsystems/{NQN}");
    for (path, expected) in [
        ("attr_allow_any_host", "0"),
        ("attr_serial", "S123"),
        ("attr_model", "Fast Disk 9"),
        ("attr_qid_max", "4"),
        ("namespaces/1/device_path", "/dev/sda"),
        ("namespaces/1/device_uuid", "00000000-0000-0000-0000-000000000000"),
        ("namespaces/1/device_nguid", "00112233-4455-6677-8899-aabbccddeeff"),
        ("namespaces/1/enable", "1"),
    ] {
        assert_eq!(tree.text(&format!("{subsystem}/{path}")), expected, "{path}");
    }
    for (path, expected) in [
        ("7/addr_trtype", "tcp"),
        ("7/addr_adrfam", "ipv6"),
        ("7/addr_traddr", "::1"),
        ("7/addr_trsvcid", "4420"),
        ("8/addr_adrfam", "ipv4"),
        ("8/addr_traddr", "127.0.0.1"),
    ] {
        assert_eq!(tree.text(&format!("ports/{path}")), expected, "{path}");
    }
    assert_eq!(tree.names(&format!("{subsystem}/allowed_hosts")), [HOST]);
    let target = |path: String| fs::read_link(tree.nvmet().join(path)).unwrap();
    assert_eq!(
        target(format!("{subsystem}/allowed_hosts/{HOST}")),
        tree.nvmet().join("hosts").join(HOST)
    );
    assert_eq!(
        target(format!("ports/8/subsystems/{NQN}")),
        tree.nvmet().join(&subsystem)
    );
}

#[test]
fn it_is_taken_back_in_the_reverse_order() {
    let mut tree = Fake::new();
    let mut published = put(&mut tree, &disk()).unwrap();
    tree.calls.clear();
    take_back(&mut tree, &mut published.left).unwrap();
    assert!(tree.is_empty());
    let expected = [
        format!("unlink ports/8/subsystems/{NQN}"),
        format!("unlink ports/7/subsystems/{NQN}"),
        format!("write subsystems/{NQN}/namespaces/1/enable"),
        format!("rmdir subsystems/{NQN}/namespaces/1"),
        format!("unlink subsystems/{NQN}/allowed_hosts/{HOST}"),
        format!("rmdir subsystems/{NQN}"),
        "rmdir ports/8".to_owned(),
        "rmdir ports/7".to_owned(),
        format!("rmdir hosts/{HOST}"),
    ];
    assert_eq!(tree.calls, expected);
    published.withdraw().unwrap();
}

#[test]
fn whatever_step_fails_nothing_is_left() {
    let mut failed = 0;
    for step in 0.. {
        let mut tree = Fake::new();
        tree.fail_at = Some(step);
        match put(&mut tree, &disk()) {
            Err(NvmetError::Publish { source, .. }) => {
                assert_eq!(source.raw_os_error(), Some(libc::EIO));
                assert!(tree.is_empty(), "step {step}: {:?}", tree.calls);
                failed += 1;
            }
            Ok(published) if published.missing().is_empty() => {
                assert!(tree.calls.len() <= step);
                break;
            }
            // An attribute that not every kernel has.
            Ok(published) => assert_eq!(published.missing().len(), 1),
            Err(error) => panic!("{error:?}"),
        }
    }
    assert_eq!(failed, 21);
}

#[test]
fn what_could_not_be_taken_back_is_told_and_can_be_tried_again() {
    let mut tree = Fake::new();
    let mut published = put(&mut tree, &disk()).unwrap();
    // The namespace cannot be disabled.
    tree.fail_at = Some(tree.calls.len() + 2);
    let error = take_back(&mut tree, &mut published.left).unwrap_err();
    assert!(
        matches!(&error, NvmetError::Withdraw { path, .. } if path.ends_with("enable")),
        "{error:?}"
    );
    assert!(!tree.is_empty());
    take_back(&mut tree, &mut published.left).unwrap();
    assert!(tree.is_empty());
}

#[test]
fn attributes_an_old_kernel_lacks_are_tolerated_and_told() {
    let mut tree = Fake::new();
    tree.lacks = vec!["attr_model", "attr_qid_max"];
    let published = put(&mut tree, &disk()).unwrap();
    assert_eq!(published.missing(), ["attr_model", "attr_qid_max"]);
    assert!(!tree.nvmet().join("subsystems").join(NQN).join("attr_model").exists());
}

#[test]
fn what_another_uses_is_not_touched() {
    let mut tree = Fake::new();
    let mut first = put(&mut tree, &disk()).unwrap();
    assert!(matches!(put(&mut tree, &disk()), Err(NvmetError::Taken { .. })));
    let other = Publish {
        nqn: "nqn.2026-11.stiefel:other",
        ports: &PORTS[..1],
        ..disk()
    };
    assert!(matches!(put(&mut tree, &other), Err(NvmetError::Taken { path }) if path.ends_with("ports/7")));
    assert_eq!(tree.names("subsystems"), [NQN]);
    take_back(&mut tree, &mut first.left).unwrap();
    // Left empty by a process that died: taken over.
    tree.make_dir(&tree.nvmet().join("ports/7")).unwrap();
    tree.make_dir(&tree.nvmet().join("hosts").join(HOST)).unwrap();
    let mut again = put(&mut tree, &disk()).unwrap();
    take_back(&mut tree, &mut again.left).unwrap();
    assert!(tree.is_empty());
}

#[test]
fn recovery_takes_back_ours_and_nothing_else() {
    let mut tree = Fake::new();
    let root = tree.root();
    let nvmet = tree.nvmet();
    assert_eq!(recover_in(&mut tree, &root).unwrap(), [] as [&str; 0]);
    let _ = put(&mut tree, &disk()).unwrap();
    // Another's subsystem, on one of our ports and on its own.
    let foreign = nvmet.join("subsystems/nqn.2020-01.org.example:disk");
    tree.make_dir(&foreign).unwrap();
    tree.make_dir(&nvmet.join("ports/1")).unwrap();
    tree.make_dir(&nvmet.join("ports/2")).unwrap();
    for port in ["1", "8"] {
        let link = nvmet
            .join(format!("ports/{port}/subsystems"))
            .join(foreign.file_name().unwrap());
        tree.link(&foreign, &link).unwrap();
    }
    assert_eq!(recover_in(&mut tree, &root).unwrap(), [NQN]);
    assert_eq!(tree.names("subsystems"), ["nqn.2020-01.org.example:disk"]);
    assert_eq!(tree.names("ports"), ["1", "2", "8"]);
    assert_eq!(tree.names("ports/8/subsystems").len(), 1);
    assert!(tree.names("hosts").is_empty());
    assert_eq!(recover_in(&mut tree, &root).unwrap(), [] as [&str; 0]);
}

#[test]
fn a_kernel_without_target_is_told_apart() {
    let empty = tempfile::tempdir().unwrap();
    let target = Target::new(empty.path().to_owned());
    assert!(matches!(target.publish(&disk()), Err(NvmetError::NoTarget { .. })));
    assert!(recover(empty.path()).unwrap().is_empty());
}

#[test]
fn values_the_kernel_would_not_take_are_refused_before_anything_is_done() {
    let mut tree = Fake::new();
    let mut refused = |disk: Publish<'_>| matches!(put(&mut tree, &disk), Err(NvmetError::Value { .. }));
    for nqn in ["", "nqn.2020-01.org.example:disk", "nqn.2026-11.stiefel:../x"] {
        assert!(refused(Publish { nqn, ..disk() }), "{nqn:?}");
        assert!(
            refused(Publish {
                host_nqn: nqn,
                ..disk()
            }),
            "{nqn:?}"
        );
    }
    for serial in ["", " S", "S\n", "123456789012345678901", "\u{e4}"] {
        assert!(refused(Publish { serial, ..disk() }), "{serial:?}");
    }
    assert!(refused(Publish {
        model: "12345678901234567890123456789012345678901",
        ..disk()
    }));
    let with = |device_path: &'static str, uuid, nguid| {
        let namespace = Namespace {
            device_path: Path::new(device_path),
            uuid,
            nguid,
        };
        Publish { namespace, ..disk() }
    };
    assert!(refused(with("sda", None, None)));
    assert!(refused(with("/dev/sda\n", None, None)));
    assert!(refused(with("/dev/sda", Some("1234"), None)));
    assert!(refused(with("/dev/sda", None, Some("0123456789abcdef"))));
    assert!(refused(Publish { ports: &[], ..disk() }));
    assert!(refused(Publish {
        ports: &[PORTS[0], PORTS[0]],
        ..disk()
    }));
    assert!(refused(Publish {
        max_queues: Some(0),
        ..disk()
    }));
    assert_eq!(tree.calls, [] as [&str; 0]);
}

proptest::proptest! {
    #[test]
    fn what_was_made_fitting_is_taken(text: String) {
        let serial = fitting(&text, MAX_SERIAL);
        let disk = Publish { serial: &serial, ..disk() };
        proptest::prop_assert_eq!(disk.check().is_ok(), !serial.is_empty());
    }
}

fn item(nqn: &str) -> Item<'_> {
    Item {
        nqn,
        host_nqn: None,
        model: "Great Disk",
        serial: "S1",
        namespace: Namespace {
            device_path: Path::new("/dev/dm-0"),
            uuid: None,
            nguid: None,
        },
    }
}

const SHELF_PORT: Port = Port {
    id: 4420,
    address: IpAddr::V6(std::net::Ipv6Addr::UNSPECIFIED),
    tcp_port: 4420,
};

#[test]
fn disks_share_a_port_and_come_and_go_by_themselves() {
    let mut tree = Fake::new();
    let root = tree.root();
    let mut shelf = shelf::open_in(&mut tree, &root, &[SHELF_PORT]).unwrap();
    let names = ["a", "b"].map(|name| format!("{TARGET_PREFIX}x.{name}"));
    let mut first = shelf::put_in(&mut tree, &shelf, &item(&names[0])).unwrap();
    let mut second = shelf::put_in(&mut tree, &shelf, &item(&names[1])).unwrap();
    assert_eq!(tree.names("ports/4420/subsystems"), names);
    assert_eq!(tree.text(&format!("subsystems/{}/attr_allow_any_host", names[0])), "1");
    take_back(&mut tree, &mut first.left).unwrap();
    assert_eq!(tree.names("ports/4420/subsystems"), names[1..]);
    assert_eq!(tree.names("subsystems"), names[1..]);
    take_back(&mut tree, &mut second.left).unwrap();
    take_back(&mut tree, &mut shelf.left).unwrap();
    assert!(tree.is_empty());
}

#[test]
fn a_disk_for_one_host_admits_nobody_else() {
    let mut tree = Fake::new();
    let root = tree.root();
    let shelf = shelf::open_in(&mut tree, &root, &[SHELF_PORT]).unwrap();
    let nqn = format!("{TARGET_PREFIX}x.a");
    let host = "nqn.2014-08.org.nvmexpress:uuid:1";
    let item = Item {
        host_nqn: Some(host),
        ..item(&nqn)
    };
    let mut done = shelf::put_in(&mut tree, &shelf, &item).unwrap();
    assert_eq!(tree.text(&format!("subsystems/{nqn}/attr_allow_any_host")), "0");
    assert_eq!(tree.names(&format!("subsystems/{nqn}/allowed_hosts")), [host]);
    take_back(&mut tree, &mut done.left).unwrap();
    assert!(tree.names("hosts").is_empty());
}

#[test]
fn what_an_earlier_target_left_is_taken_back_and_a_session_is_left_alone() {
    let mut tree = Fake::new();
    let root = tree.root();
    let shelf = shelf::open_in(&mut tree, &root, &[SHELF_PORT]).unwrap();
    let nqn = format!("{TARGET_PREFIX}x.a");
    let _ = shelf::put_in(&mut tree, &shelf, &item(&nqn)).unwrap();
    let other = format!("{TARGET_PREFIX}x.b");
    let loan = Item {
        host_nqn: Some("nqn.2026-11.stiefel:borrower.1"),
        ..item(&other)
    };
    let _ = shelf::put_in(&mut tree, &shelf, &loan).unwrap();
    fs::create_dir(tree.nvmet().join("subsystems").join(NQN)).unwrap();
    // The process died; a new one begins.
    let again = shelf::open_in(&mut tree, &root, &[SHELF_PORT]).unwrap();
    assert_eq!(tree.names("subsystems"), [NQN]);
    assert!(tree.names("hosts").is_empty());
    let _ = shelf::put_in(&mut tree, &again, &item(&nqn)).unwrap();
}

#[test]
fn a_disk_that_cannot_be_put_leaves_nothing_and_the_others_alone() {
    let mut tree = Fake::new();
    let root = tree.root();
    let shelf = shelf::open_in(&mut tree, &root, &[SHELF_PORT]).unwrap();
    let names = ["a", "b"].map(|name| format!("{TARGET_PREFIX}x.{name}"));
    let _ = shelf::put_in(&mut tree, &shelf, &item(&names[0])).unwrap();
    let begun = tree.calls.len();
    // Each step once; an attribute that old kernels lack, and what is past the end, do not matter.
    for step in 0..12 {
        tree.fail_at = Some(begun + step);
        tree.calls.truncate(begun);
        let put = shelf::put_in(&mut tree, &shelf, &item(&names[1]));
        tree.fail_at = None;
        if let Ok(mut done) = put {
            take_back(&mut tree, &mut done.left).unwrap();
        }
        assert_eq!(tree.names("subsystems"), names[..1], "step {step}");
    }
    for bad in ["nqn.2026-11.stiefel:disk", "x"] {
        assert!(matches!(
            shelf::put_in(&mut tree, &shelf, &item(bad)),
            Err(NvmetError::Value { field: "nqn", .. })
        ));
    }
}
