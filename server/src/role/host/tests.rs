use super::*;
use crate::testing;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{Ipv6Addr, SocketAddrV6, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;

use stiefel_shared::bundle::{DISK_PORT, Transport};
use stiefel_shared::handover::{
    After, DiskIdentity, DiskTransport, Encryption, LinkMode, Part, PartSize, Payload, SessionMode,
};
use stiefel_shared::nbd::{
    GoAnswer, INFO_BLOCK_SIZE, InfoRequest, OPT_GO, OptionReplyHeader, encode_client_flags, encode_option,
    parse_greeting,
};
use stiefel_shared::superblock::{Claim, ClaimKind};
use stiefel_sys::custody::{Custodian, Custody, Request};

use crate::role::keys::Answer;
use crate::role::machine::Memory;

mod guests;

const SIZE: u64 = 1 << 20;

/// A host with a file for a disk, on loopback, without a tunnel.
struct Fixture {
    host: Host,
    person: Arc<APerson>,
    news: mpsc::UnboundedReceiver<News>,
    disk: PathBuf,
    _dir: Arc<tempfile::TempDir>,
}

impl Fixture {
    fn new(after: After) -> Self {
        Self::process(a_laptop(), after, None)
    }

    /// A process of the server on the machine `dir`; another may have been there before.
    fn process(dir: Arc<tempfile::TempDir>, after: After, custody: Option<Custody>) -> Self {
        Self::with(dir, after, SessionMode::Normal, custody)
    }

    fn with(dir: Arc<tempfile::TempDir>, after: After, session: SessionMode, custody: Option<Custody>) -> Self {
        let disk = dir.path().join("disk");
        std::fs::create_dir_all(dir.path().join("stiefel/payload")).unwrap();
        std::fs::write(dir.path().join(Part::Kernel.path()), b"kernel").unwrap();
        let handover = ServerHandover {
            keys: Vec::new(),
            hostname: "laptop".to_owned(),
            disk: DiskIdentity {
                size: SIZE,
                ..DiskIdentity::default()
            },
            payload: Payload {
                version: "6.1".to_owned(),
                cmdline: String::new(),
                parts: vec![PartSize {
                    part: Part::Kernel,
                    size: 6,
                }],
                boot: None,
            },
            after,
            encryption: Encryption::None,
            mode: LinkMode::Dedicated,
            transport: DiskTransport::Nbd,
            session,
            grace: 900,
            tickets: Vec::new(),
        };
        let console = Box::leak(Box::new(Console::open(dir.path(), dir.path())));
        let (tell, news) = mpsc::unbounded_channel();
        let machine = Box::new(AFile { path: disk.clone() });
        let records = Records::new(&dir.path().join("record"), custody, |_| 0);
        let person = Arc::new(APerson::default());
        let setup = Setup {
            console,
            machine,
            person: Arc::<APerson>::clone(&person),
            records,
            root: dir.path().to_owned(),
            news: tell,
        };
        let host = Host::new(setup, handover);
        Self {
            host,
            person,
            news,
            disk,
            _dir: dir,
        }
    }

    fn begin(&self, key: &str, machine: char) -> Result<Bundle, Refusal> {
        self.host.0.begin(request(key, machine))
    }

    fn goodbye(&self, bundle: &Bundle, goodbye: Goodbye) -> Result<(), Refusal> {
        self.host.0.goodbye(bundle.manifest.session.parse().unwrap(), goodbye)
    }

    /// Whether the disk is granted under this bundle's name; the connection.
    fn connect(&self, bundle: &Bundle) -> Option<TcpStream> {
        let Transport::Nbd { export, port } = &bundle.manifest.disk.transport else {
            return None;
        };
        // After the session nobody listens there.
        let mut stream = TcpStream::connect((Ipv6Addr::LOCALHOST, *port)).ok()?;
        let mut greeting = [0; 18];
        // A gate that is closed closes the connection without a byte.
        stream.read_exact(&mut greeting).ok()?;
        stream
            .write_all(&encode_client_flags(parse_greeting(&greeting).unwrap()))
            .unwrap();
        let request = InfoRequest {
            name: export.clone(),
            wanted: vec![INFO_BLOCK_SIZE],
        };
        stream
            .write_all(&encode_option(OPT_GO, &request.encode().unwrap()).unwrap())
            .unwrap();
        let mut answer = GoAnswer::default();
        loop {
            let mut header = [0; 20];
            stream.read_exact(&mut header).ok()?;
            let header = OptionReplyHeader::parse(&header).unwrap();
            let mut data = vec![0; header.len as usize];
            stream.read_exact(&mut data).ok()?;
            if answer.absorb(OPT_GO, header, &data).ok()? {
                return Some(stream);
            }
        }
    }
}

/// A laptop's disk.
fn a_laptop() -> Arc<tempfile::TempDir> {
    let dir = Arc::new(tempfile::tempdir().unwrap());
    File::create(dir.path().join("disk")).unwrap().set_len(SIZE).unwrap();
    dir
}

fn request(key: &str, machine: char) -> Begin {
    Begin {
        peer: SocketAddrV6::new(Ipv6Addr::LOCALHOST, 9, 0, 0),
        key: key.to_owned(),
        machine: machine.to_string().repeat(32).parse().unwrap(),
        session: SessionName::generate().unwrap(),
    }
}

/// Somebody at the laptop: what they do when they are asked, if they are there.
#[derive(Default)]
struct APerson(Mutex<Vec<Reaction>>);

type Reaction = Box<dyn FnOnce(&str) -> Answer + Send>;

impl APerson {
    /// Is there for one question.
    fn will(&self, reaction: impl FnOnce(&str) -> Answer + Send + 'static) {
        self.0.lock().unwrap().push(Box::new(reaction));
    }

    /// Was not asked.
    fn still_waits(&self) -> bool {
        self.0.lock().unwrap().pop().is_some()
    }
}

impl Person for APerson {
    fn ask(&self, question: &str) -> Answer {
        let reaction = self.0.lock().unwrap().pop();
        reaction.map_or(Answer::Unasked, |reaction| reaction(question))
    }

    fn never_mind(&self) {}
}

/// A machine whose disk is a file.
struct AFile {
    path: PathBuf,
}

impl Machine for AFile {
    fn disk(&self) -> anyhow::Result<Disk> {
        Ok(a_disk(&self.path))
    }

    fn contents(&self, disk: &Disk) -> std::io::Result<Vec<Content>> {
        stiefel_sys::block::contents(Path::new("/nonexistent"), disk)
    }

    fn resumes(&self) -> bool {
        self.path.with_extension("resume").exists()
    }

    fn open(&self, disk: &Disk, writable: bool) -> anyhow::Result<File> {
        Ok(File::options().read(true).write(writable).open(&disk.path)?)
    }

    fn listen(&self, mut at: SocketAddrV6) -> anyhow::Result<TcpListener> {
        if at.port() == DISK_PORT {
            at.set_port(0);
        }
        Ok(TcpListener::bind(at)?)
    }

    fn memory(&self) -> anyhow::Result<Memory> {
        Ok(Memory {
            total: 8 << 30,
            available: 8 << 30,
        })
    }

    fn link(&self, wanted: Wanted) -> anyhow::Result<(Up, LinkOffer)> {
        let offer = LinkOffer {
            mode: wanted.mode,
            address: *wanted.peer.ip(),
            laptop: Ipv6Addr::LOCALHOST,
            grace: wanted.grace,
            tunnel: None,
        };
        Ok((Up::loopback(wanted.peer), offer))
    }

    fn publish(&self, _: &stiefel_sys::nvmet::Publish<'_>) -> anyhow::Result<()> {
        anyhow::bail!("no target here")
    }

    fn published(&self, _: &str) -> bool {
        false
    }

    fn withdraw(&self) -> anyhow::Result<()> {
        Ok(())
    }
}

fn a_disk(path: &Path) -> Disk {
    Disk {
        path: path.to_owned(),
        size: SIZE,
        ..testing::disk("disk")
    }
}

fn is_closed(mut stream: TcpStream) -> bool {
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    !matches!(stream.read(&mut [0; 1]), Ok(1..))
}

#[test]
fn a_hibernated_system_refuses_every_session_until_it_is_gone() {
    let fixture = Fixture::new(After::Return);
    let refused = |why: &str| {
        let reason = fixture.begin("blue", 'a').unwrap_err().reason;
        assert!(reason.contains(why) && reason.contains("shut it down"), "{reason}");
    };
    let write = |signature: &[u8]| {
        let disk = File::options().write(true).open(&fixture.disk).unwrap();
        disk.write_all_at(signature, 4086).unwrap();
    };
    write(b"S1SUSPEND\0");
    refused("lies on the laptop's disk;");
    write(b"SWAPSPACE2");
    let firmware = fixture.disk.with_extension("resume");
    File::create(&firmware).unwrap();
    refused("HibernateLocation");
    std::fs::remove_file(firmware).unwrap();
    fixture.begin("blue", 'a').unwrap();
    // The desktop has put its own memory there, and starts anew.
    write(b"S1SUSPEND\0");
    refused("lies on the laptop's disk;");
}

#[test]
fn the_desktop_is_told_by_what_the_disk_is_found() {
    let fixture = Fixture::new(After::Return);
    let disk = File::options().write(true).open(&fixture.disk).unwrap();
    disk.write_all_at(b"LUKS\xba\xbe\0\x01", 0).unwrap();
    disk.write_all_at(b"some-uuid", 168).unwrap();
    let claims = fixture.begin("blue", 'a').unwrap().manifest.claims;
    let claim = Claim {
        kind: ClaimKind::LuksUuid,
        value: "some-uuid".to_owned(),
    };
    assert_eq!(
        claims,
        [DeviceClaims {
            name: "disk".to_owned(),
            claims: vec![claim]
        }]
    );
}

#[test]
fn another_desktop_is_refused_and_told_who_has_the_disk() {
    let fixture = Fixture::new(After::Return);
    let first = fixture.begin("blue", 'a').unwrap();
    for (key, machine) in [("blue", 'b'), ("red", 'a')] {
        assert!(fixture.begin(key, machine).unwrap_err().reason.contains("key blue"));
    }
    assert!(
        fixture.connect(&first).is_some(),
        "the refusals must not harm the session"
    );
}

#[test]
fn the_same_desktop_takes_over_and_its_old_name_and_connection_are_dead() {
    let fixture = Fixture::new(After::Return);
    let first = fixture.begin("blue", 'a').unwrap();
    let old = fixture.connect(&first).unwrap();
    let second = fixture.begin("blue", 'a').unwrap();
    assert!(is_closed(old));
    assert!(fixture.connect(&first).is_none(), "the old name opens the disk");
    assert!(fixture.connect(&second).is_some());
    assert!(
        fixture.goodbye(&first, Goodbye::Poweroff).is_err(),
        "the old session can still say goodbye"
    );
}

#[test]
fn after_the_goodbye_nobody_gets_the_disk_unless_it_stays() {
    for (after, goodbye, again) in [
        (After::Return, Goodbye::Poweroff, false),
        (After::Stay, Goodbye::Poweroff, true),
        (After::Return, Goodbye::Reboot, true),
        (After::Stay, Goodbye::RebootAnew, false),
    ] {
        let fixture = Fixture::new(after);
        let bundle = fixture.begin("blue", 'a').unwrap();
        let stream = fixture.connect(&bundle).unwrap();
        fixture.goodbye(&bundle, goodbye).unwrap();
        assert!(is_closed(stream));
        assert!(fixture.connect(&bundle).is_none());
        assert_eq!(fixture.begin("red", 'b').is_ok(), again, "{after:?} {goodbye:?}");
    }
}

#[test]
fn a_desktop_that_went_away_in_mid_fetch_leaves_the_disk_free() {
    let fixture = Fixture::new(After::Return);
    let bundle = fixture.begin("blue", 'a').unwrap();
    fixture.host.0.give_up(bundle.manifest.session.parse().unwrap());
    assert!(fixture.connect(&bundle).is_none());
    let other = fixture.begin("red", 'b').unwrap();
    // Too late: that session is over.
    fixture.host.0.give_up(bundle.manifest.session.parse().unwrap());
    assert!(fixture.connect(&other).is_some());
}

#[test]
fn a_disk_of_another_size_is_not_served() {
    let mut fixture = Fixture::new(After::Return);
    File::options()
        .write(true)
        .open(&fixture.disk)
        .unwrap()
        .set_len(SIZE * 2)
        .unwrap();
    assert!(fixture.begin("blue", 'a').unwrap_err().reason.contains("changed"));
    File::options()
        .write(true)
        .open(&fixture.disk)
        .unwrap()
        .set_len(SIZE)
        .unwrap();
    assert!(fixture.begin("blue", 'a').is_ok());
    assert!(fixture.news.try_recv().is_err());
}

#[test]
fn the_person_at_the_laptop_may_end_the_session_of_a_desktop_for_another() {
    let fixture = Fixture::new(After::Return);
    let first = fixture.begin("blue", 'a').unwrap();
    let old = fixture.connect(&first).unwrap();
    fixture.person.will(|question| {
        assert!(
            question.contains("(key red)") && question.contains("(key blue)"),
            "{question}"
        );
        Answer::Yes
    });
    let second = fixture.begin("red", 'b').unwrap();
    assert!(is_closed(old));
    assert!(fixture.connect(&first).is_none(), "the old name opens the disk");
    assert!(fixture.connect(&second).is_some());
    assert!(fixture.goodbye(&first, Goodbye::Poweroff).is_err());
}

#[test]
fn nobody_is_asked_again_about_a_desktop_that_was_refused_while_the_session_lasts() {
    let mut fixture = Fixture::new(After::Stay);
    let first = fixture.begin("blue", 'a').unwrap();
    fixture.person.will(|_| Answer::No);
    assert!(fixture.begin("red", 'b').unwrap_err().reason.contains("key blue"));
    fixture.person.will(|_| Answer::Yes);
    assert!(fixture.begin("red", 'b').is_err());
    assert!(fixture.person.still_waits());
    assert!(fixture.connect(&first).is_some());
    // Who only did not answer is asked again; and another desktop is another question.
    for (machine, answer) in [('c', Answer::Silence), ('c', Answer::No)] {
        fixture.person.will(move |_| answer);
        assert!(fixture.begin("red", machine).is_err());
        assert!(!fixture.person.still_waits());
    }
    fixture.goodbye(&first, Goodbye::Poweroff).unwrap();
    assert!(fixture.begin("red", 'b').is_ok());
    assert!(fixture.news.try_recv().is_err());
}

#[test]
fn the_desktop_that_has_the_disk_can_say_goodbye_or_start_anew_while_the_question_stands() {
    // What happens meanwhile, what is answered, and whether the other one then gets the disk.
    type Event = fn(&Arc<Inner>, SessionName);
    let leaves: Event = |host, session| host.goodbye(session, Goodbye::Reboot).unwrap();
    let goes_for_good: Event = |host, session| host.goodbye(session, Goodbye::Poweroff).unwrap();
    let takes_over: Event = |host, _| drop(host.begin(request("blue", 'a')).unwrap());
    for (event, answer, begins) in [
        (leaves, Answer::Silence, true),
        (leaves, Answer::Yes, true),
        (goes_for_good, Answer::Yes, false),
        // It was not asked about this session.
        (takes_over, Answer::Yes, false),
    ] {
        let fixture = Fixture::new(After::Return);
        let first = fixture.begin("blue", 'a').unwrap();
        let (host, session) = (Arc::clone(&fixture.host.0), first.manifest.session.parse().unwrap());
        fixture.person.will(move |_| {
            event(&host, session);
            answer
        });
        assert_eq!(fixture.begin("red", 'b').is_ok(), begins);
    }
}

#[test]
fn the_laptop_goes_home_on_demand_unless_a_desktop_has_the_disk() {
    let mut fixture = Fixture::new(After::Stay);
    let bundle = fixture.begin("blue", 'a').unwrap();
    fixture.host.home_pressed();
    assert!(fixture.news.try_recv().is_err());
    assert!(fixture.connect(&bundle).is_some());
    fixture.goodbye(&bundle, Goodbye::Reboot).unwrap();
    fixture.host.home_pressed();
    assert_eq!(fixture.news.try_recv().unwrap(), News::End(End::Restart));
    assert!(fixture.begin("blue", 'a').is_err());
}

/// PID 1, which keeps the disk, and what guests write, beyond the end of a process.
#[derive(Clone, Default)]
struct PidOne(Arc<Mutex<BTreeMap<u8, OwnedFd>>>);

impl PidOne {
    fn attend(&self) -> Custody {
        let (custodian, role) = Custodian::pair().unwrap();
        let kept = Arc::clone(&self.0);
        std::thread::spawn(move || {
            while let Ok(Some(request)) = custodian.next() {
                let mut kept = kept.lock().unwrap();
                match &request {
                    Request::Hold(place, fd) => drop(kept.insert(*place, fd.try_clone().unwrap())),
                    Request::Release(place) => drop(kept.remove(place)),
                    Request::Verdict(_) | Request::Fetch(_) => {}
                }
                let wanted = match &request {
                    Request::Fetch(place) => kept.get(place).map(AsFd::as_fd),
                    _ => None,
                };
                let _ = custodian.answer(&request, wanted);
            }
        });
        Custody::from(role)
    }

    fn keeps(&self) -> bool {
        !self.0.lock().unwrap().is_empty()
    }

    fn places(&self) -> Vec<u8> {
        self.0.lock().unwrap().keys().copied().collect()
    }
}

#[test]
fn a_session_goes_on_in_the_servers_next_process() {
    let pid_one = PidOne::default();
    let dir = a_laptop();
    let first = Fixture::process(Arc::clone(&dir), After::Stay, Some(pid_one.attend()));
    assert!(first.host.resume().unwrap().is_empty());
    let bundle = first.begin("blue", 'a').unwrap();
    assert!(first.connect(&bundle).is_some() && pid_one.keeps());
    drop(first);

    let second = Fixture::process(Arc::clone(&dir), After::Stay, Some(pid_one.attend()));
    let (session, _) = second.host.resume().unwrap().remove(0);
    assert_eq!(session.to_string(), bundle.manifest.session);
    assert!(second.connect(&bundle).is_some(), "the desktop cannot go on");
    assert!(second.begin("red", 'b').is_err(), "another desktop gets the disk");
    second.goodbye(&bundle, Goodbye::Reboot).unwrap();
    assert!(!pid_one.keeps() && second.connect(&bundle).is_none());
    drop(second);

    let third = Fixture::process(dir, After::Stay, Some(pid_one.attend()));
    assert!(third.host.resume().unwrap().is_empty(), "what is over goes on");
}

#[test]
fn lost_writes_are_not_forgotten_by_the_next_process() {
    let pid_one = PidOne::default();
    let dir = a_laptop();
    let first = Fixture::process(Arc::clone(&dir), After::Stay, Some(pid_one.attend()));
    let bundle = first.begin("blue", 'a').unwrap();
    let session = bundle.manifest.session.parse().unwrap();
    first.host.0.setup.records.note_failure(session, "the disk is broken");
    drop(first);

    let mut second = Fixture::process(dir, After::Stay, Some(pid_one.attend()));
    assert_eq!(second.host.resume().unwrap().len(), 1);
    let refusal = second.goodbye(&bundle, Goodbye::Poweroff).unwrap_err();
    assert!(refusal.reason.contains("data may be lost"), "{}", refusal.reason);
    assert!(matches!(second.news.try_recv(), Ok(News::Broken(_))));
    assert!(second.begin("blue", 'a').is_err());
}
