//! A laptop on loopback: the real discovery and HTTP server, and a host that only notes what it is asked.

use std::fs::File;
use std::io::{Seek, Write};
use std::net::SocketAddrV6;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use stiefel_client::discovery::{Event, Found};
use stiefel_client::fetch::{FetchError, Patience, Progress, Source};
use stiefel_server::http::{self, Begin, Bundle, FeedError, Limits, Refusal, SessionHost};
use stiefel_server::{discovery, http::run};
use stiefel_shared::bundle::{ControlKey, DiskOffer, Goodbye, LinkOffer, Manifest, Transport};
use stiefel_shared::discovery::{About, LinkEvent, Random, Responder, State, Ticket, TicketKind, Woken};
use stiefel_shared::handover::LinkMode;
use stiefel_shared::handover::{DiskIdentity, Part, PartSize, Payload};
use stiefel_shared::key::StickKey;
use stiefel_shared::session::{MachineId, SessionName};
use stiefel_shared::unlock::{Outcome, Passphrase, Unlocking};
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinSet;

/// Longer than anything takes here; a test that waits so long has failed.
pub const LONG: Duration = Duration::from_secs(60);

/// Waits for what must happen.
pub async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(LONG, what).await.expect("it did not happen")
}

/// What the fake host saw.
#[derive(Debug, PartialEq, Eq)]
pub enum Seen {
    Begin(Begin),
    Fetched(Result<(), String>),
    Goodbye(Goodbye),
    Parted(Goodbye),
    /// Who has sent a passphrase.
    Unlock(Begin),
    Unlocked,
}

/// A host whose answers a test can choose.
pub struct FakeHost {
    pub parts: Vec<(Part, Vec<u8>)>,
    /// Sizes in the manifest, if they are to differ from the parts'.
    pub sizes: Option<Vec<u64>>,
    /// Refuses sessions with these words.
    pub refuse: Option<String>,
    /// Refuses the first goodbyes with these words.
    pub refuse_goodbyes: Mutex<Vec<String>>,
    /// Begins only when this is notified.
    pub hold: Option<Arc<Notify>>,
    pub control: ControlKey,
    seen: mpsc::UnboundedSender<Seen>,
}

impl SessionHost for FakeHost {
    async fn begin(&self, request: Begin) -> Result<Bundle, Refusal> {
        let session = request.session;
        self.seen.send(Seen::Begin(request)).unwrap();
        if let Some(hold) = &self.hold {
            hold.notified().await;
        }
        if let Some(reason) = self.refuse.clone() {
            return Err(Refusal { reason });
        }
        Ok(self.bundle(session))
    }

    async fn unlock(&self, request: Begin, passphrase: Passphrase) -> Result<Unlocking, Refusal> {
        self.seen.send(Seen::Unlock(request)).unwrap();
        match passphrase.bytes() {
            b"" => Ok(Unlocking::new(Outcome::Wanted, 0, "sda2")),
            b"right" => Ok(Unlocking::new(Outcome::Open, 0, "")),
            b"broken" => Err(Refusal {
                reason: "the disk is broken".into(),
            }),
            _ => Ok(Unlocking::new(Outcome::Wrong, 7, "sda2")),
        }
    }

    fn unlocked(&self) {
        let _ = self.seen.send(Seen::Unlocked);
    }

    fn fetched(&self, _session: SessionName, outcome: Result<(), FeedError>) {
        // The test may be over.
        let _ = self
            .seen
            .send(Seen::Fetched(outcome.map_err(|error| error.to_string())));
    }

    async fn goodbye(&self, _session: SessionName, goodbye: Goodbye) -> Result<(), Refusal> {
        self.seen.send(Seen::Goodbye(goodbye)).unwrap();
        match self.refuse_goodbyes.lock().unwrap().pop() {
            Some(reason) => Err(Refusal { reason }),
            None => Ok(()),
        }
    }

    fn parted(&self, _session: SessionName, goodbye: Goodbye) {
        let _ = self.seen.send(Seen::Parted(goodbye));
    }
}

impl FakeHost {
    fn bundle(&self, session: SessionName) -> Bundle {
        let sizes = self.parts.iter().enumerate().map(|(index, (part, bytes))| {
            let size = u64::try_from(bytes.len()).unwrap();
            PartSize {
                part: *part,
                size: self.sizes.as_ref().map_or(size, |sizes| sizes[index]),
            }
        });
        let manifest = Manifest {
            hostname: "täst-laptop".into(),
            payload: Payload {
                version: "6.1.0".into(),
                cmdline: "ro".into(),
                parts: sizes.collect(),
                boot: None,
            },
            disk: DiskOffer {
                identity: DiskIdentity::default(),
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
            claims: Vec::new(),
            control: self.control.clone(),
            session: session.to_string(),
        };
        Bundle {
            manifest,
            parts: self.parts.iter().map(|(_, bytes)| file(bytes)).collect(),
        }
    }
}

fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file.rewind().unwrap();
    file
}

/// Bytes that look like a payload: none equal to its neighbour's.
pub fn noise(length: usize) -> Vec<u8> {
    let mut state = 1_u32;
    std::iter::repeat_with(|| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_be_bytes()[0]
    })
    .take(length)
    .collect()
}

/// What a laptop is to be like.
pub struct Plan {
    pub state: State,
    pub limits: Limits,
    pub parts: Vec<(Part, Vec<u8>)>,
    pub sizes: Option<Vec<u64>>,
    pub refuse: Option<String>,
    pub refuse_goodbyes: Vec<String>,
    pub hold: Option<Arc<Notify>>,
    /// It has keys of one activation, and tickets, and no stick's own key.
    pub activation: bool,
    /// The same with keys of a laptop's own stick.
    pub unlocking: bool,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            state: State::Ready,
            limits: Limits::default(),
            parts: vec![
                (Part::Kernel, noise(300_000)),
                (Part::Initrd, noise(1_000_001)),
                (Part::Overlay, vec![]),
            ],
            sizes: None,
            refuse: None,
            refuse_goodbyes: Vec::new(),
            hold: None,
            activation: false,
            unlocking: false,
        }
    }
}

/// The laptop; gone when dropped.
pub struct Laptop {
    pub key: StickKey,
    pub control: ControlKey,
    pub responder: Arc<Mutex<Responder>>,
    pub udp: u16,
    pub http: SocketAddrV6,
    pub woken: mpsc::Receiver<Woken>,
    pub seen: mpsc::UnboundedReceiver<Seen>,
    _links: mpsc::Sender<LinkEvent>,
    _tasks: JoinSet<()>,
}

impl Laptop {
    pub async fn start(plan: Plan) -> Self {
        Self::start_on(plan, 1, "lo").await
    }

    /// A laptop that hears on the interface with this index.
    pub async fn start_on(plan: Plan, index: u32, name: &str) -> Self {
        let key = StickKey::generate("blue").unwrap();
        let listener = http::bind(0).unwrap();
        let http_port = listener.local_addr().unwrap().port();
        let about = About {
            hostname: "täst-laptop".into(),
            http_port,
            ready_in: 30,
        };
        let keys = [StickKey::generate("red").unwrap(), key.clone()];
        let responder = if plan.activation || plan.unlocking {
            let kind = match plan.unlocking {
                true => TicketKind::Unlocking,
                false => TicketKind::Activation,
            };
            let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
            let issued = keys
                .iter()
                .map(|key| Ticket::issue_for(kind, key, now.as_secs()).unwrap());
            let (tickets, keys): (Vec<_>, Vec<_>) = issued.unzip();
            Responder::new(&keys, about, plan.state, Instant::now()).with_tickets(&tickets)
        } else {
            Responder::new(&keys, about, plan.state, Instant::now())
        };
        let responder = Arc::new(Mutex::new(responder));
        let socket = discovery::bind(0).unwrap();
        let udp = socket.local_addr().unwrap().port();
        let (links, links_seen) = mpsc::channel(4);
        links
            .send(LinkEvent::Added {
                index,
                name: name.into(),
            })
            .await
            .unwrap();
        let (wakes, woken) = mpsc::channel(4);
        let (tell, seen) = mpsc::unbounded_channel();
        let control = ControlKey::generate().unwrap();
        let host = FakeHost {
            parts: plan.parts,
            sizes: plan.sizes,
            refuse: plan.refuse,
            refuse_goodbyes: Mutex::new(plan.refuse_goodbyes),
            hold: plan.hold,
            control: control.clone(),
            seen: tell,
        };
        let mut tasks = JoinSet::new();
        tasks.spawn(discovery::run(socket, Arc::clone(&responder), links_seen, wakes));
        let shared = Arc::clone(&responder);
        tasks.spawn(async move {
            run(listener, Arc::new(host), shared, plan.limits, Vec::new()).await;
        });
        let http = SocketAddrV6::new(std::net::Ipv6Addr::LOCALHOST, http_port, 0, 0);
        Self {
            key,
            control,
            responder,
            udp,
            http,
            woken,
            seen,
            _links: links,
            _tasks: tasks,
        }
    }

    /// Looks for the laptop with its own key until `enough` says so; all that happened.
    pub async fn search(&self, wake: bool, enough: impl Fn(&Event) -> bool) -> Vec<Event> {
        let lo = LinkEvent::Added {
            index: 1,
            name: "lo".into(),
        };
        self.search_on(lo, wake, enough).await
    }

    /// The same on another interface.
    pub async fn search_on(&self, link: LinkEvent, wake: bool, enough: impl Fn(&Event) -> bool) -> Vec<Event> {
        let (links, links_seen) = mpsc::channel(4);
        links.send(link).await.unwrap();
        let (tell, mut events) = mpsc::channel(4);
        let (key, udp) = (self.key.clone(), self.udp);
        let searching =
            tokio::spawn(async move { stiefel_client::discovery::run(&key, udp, wake, links_seen, tell).await });
        let mut happened = Vec::new();
        loop {
            let event = soon(events.recv()).await.unwrap();
            let last = enough(&event);
            happened.push(event);
            if last {
                break;
            }
        }
        drop(events);
        soon(searching).await.unwrap().unwrap();
        happened
    }

    /// The laptop's offer.
    pub async fn found(&self) -> Found {
        let happened = self.search(false, |event| matches!(event, Event::Found(_))).await;
        match happened.into_iter().next_back() {
            Some(Event::Found(found)) => found,
            other => panic!("{other:?}"),
        }
    }

    pub async fn challenge(&self) -> Random {
        self.found().await.challenge
    }

    pub async fn next(&mut self) -> Seen {
        soon(self.seen.recv()).await.unwrap()
    }
}

pub fn machine() -> MachineId {
    "0123456789abcdef0123456789abcdef".parse().unwrap()
}

/// What a desktop got.
#[derive(Debug, Default)]
pub struct Got {
    pub kernel: Vec<u8>,
    pub initrd: Vec<u8>,
    pub progress: Vec<Progress>,
}

/// Fetches from `peer`, which may be a proxy before the laptop.
pub async fn fetch(
    laptop: &Laptop,
    peer: SocketAddrV6,
    patience: Patience,
    mut watch: impl FnMut(Progress),
) -> (Result<Manifest, FetchError>, Got) {
    let found = laptop.found().await;
    let source = Source {
        peer,
        challenge: &found.challenge,
        key: &found.key(&laptop.key),
        machine: machine(),
        patience,
    };
    let mut got = Got::default();
    let mut progress = Vec::new();
    let sink = |part, bytes: &[u8]| {
        match part {
            Part::Kernel => got.kernel.extend_from_slice(bytes),
            _ => got.initrd.extend_from_slice(bytes),
        }
        Ok(())
    };
    let outcome = soon(stiefel_client::fetch::fetch_from(source, sink, |step| {
        watch(step);
        progress.push(step);
    }))
    .await;
    got.progress = progress;
    (outcome, got)
}
