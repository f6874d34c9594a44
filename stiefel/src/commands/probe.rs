//! Sends the laptop's own service a Discover with each key, as a desktop would, and sees who answers.
//!
//! The desktop's half of the protocol is `stiefel_shared::discovery::Seeker`; asked is by multicast on each wired interface
//! that is up (the kernel gives our own multicasts back, through the firewall's rules), and on the loopback interface. A Wake
//! is never sent. Bounded by [`PATIENCE`].

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{Ipv6Addr, SocketAddr, SocketAddrV6, UdpSocket};
use std::path::Path;
use std::time::{Duration, Instant};

use stiefel_server::collect::{self, KEYS_DIR};
use stiefel_server::setup::Machine;
use stiefel_server::setup::doctor::Finding;
use stiefel_shared::config::{Config, Wake};
use stiefel_shared::discovery::{DATAGRAM, GROUP, Heard, PORT, Seeker, State};
use stiefel_shared::key::StickKey;

const CHECK: &str = "discovery";
/// How long one key's answers are waited for.
const PATIENCE: Duration = Duration::from_millis(900);
/// When it is asked again: an answer may be lost, and the service answers ten a second.
const AGAIN: Duration = Duration::from_millis(400);
/// As many keys are tried.
const KEYS: usize = 8;

/// An interface to ask on.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    name: String,
    to: SocketAddrV6,
}

/// Asks, and says what that shows.
pub(crate) fn discovery(config: &Config, machine: &Machine) -> Vec<Finding> {
    if config.trigger.wake == Wake::Off {
        return vec![Finding::ok(
            CHECK,
            "no wake is listened for (trigger.wake: off), so nothing is asked",
        )];
    }
    let keys = match collect::read_keys(Path::new(KEYS_DIR)) {
        Ok(keys) => keys,
        Err(error) => {
            let text = error.to_string();
            let why = text.lines().next().unwrap_or_default();
            return vec![Finding::warning(
                CHECK,
                format!("nothing can be asked without a key: {why}"),
                "see `keys` above; only root can read them",
            )];
        }
    };
    if !is_listening(Path::new("/")) {
        return vec![Finding::failure(
            CHECK,
            format!("nobody listens on UDP port {PORT}: the service does not run, or cannot listen"),
            "systemctl restart stiefel-autokexec; journalctl -b -u stiefel-autokexec says why",
        )];
    }
    let places = places(machine, PORT);
    keys.iter().take(KEYS).map(|key| of_key(key, &places)).collect()
}

/// Whether any program has our port: /proc/net/udp6, with addresses and ports in hexadecimal.
fn is_listening(root: &Path) -> bool {
    let table = std::fs::read_to_string(root.join("proc/net/udp6")).unwrap_or_default();
    let port = format!(":{PORT:04X}");
    table
        .lines()
        .filter_map(|line| line.split_ascii_whitespace().nth(1))
        .any(|local| local.ends_with(&port))
}

fn places(machine: &Machine, port: u16) -> Vec<Place> {
    let nics = machine.nics.iter().filter(|nic| nic.up).filter_map(|nic| {
        Some(Place {
            name: nic.name.clone(),
            to: SocketAddrV6::new(GROUP, port, 0, nic.index?),
        })
    });
    let own = Place {
        name: "lo".to_owned(),
        to: SocketAddrV6::new(Ipv6Addr::LOCALHOST, port, 0, 0),
    };
    nics.chain([own]).collect()
}

fn of_key(key: &StickKey, places: &[Place]) -> Finding {
    match ask(key, places) {
        Ok(answers) => verdict(&key.name, places, &answers),
        Err(error) => Finding::warning(
            CHECK,
            format!("nothing can be asked: {error}"),
            "is IPv6 switched off (`ipv6.disable=1` on the command line)?",
        ),
    }
}

/// What was answered, by interface.
#[derive(Debug, Default)]
struct Answers {
    from: BTreeMap<String, State>,
    /// Where the question could be sent at all.
    asked: BTreeSet<String>,
}

/// Asks everywhere, twice, and waits a little.
fn ask(key: &StickKey, places: &[Place]) -> io::Result<Answers> {
    let socket = UdpSocket::bind(SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, 0, 0, 0))?;
    let mut seeker = Seeker::new(key);
    let mut answers = Answers::default();
    let begun = Instant::now();
    let mut next = begun;
    let mut buffer = [0; DATAGRAM + 1];
    loop {
        let now = Instant::now();
        if now.duration_since(begun) >= PATIENCE || answers.from.len() == places.len() {
            return Ok(answers);
        }
        if now >= next {
            next = now + AGAIN;
            send(&socket, &mut seeker, places, &mut answers, now);
        }
        let wait = next.min(begun + PATIENCE).saturating_duration_since(now);
        socket.set_read_timeout(Some(wait.max(Duration::from_millis(1))))?;
        let Ok((length, SocketAddr::V6(from))) = socket.recv_from(&mut buffer) else {
            continue;
        };
        let heard = seeker.receive(Instant::now(), from, buffer.get(..length).unwrap_or_default());
        if let Some(Heard::Offer(offer)) = heard
            && let Some(place) = places.iter().find(|place| place.to.scope_id() == from.scope_id())
        {
            answers.from.insert(place.name.clone(), offer.state);
        }
    }
}

fn send(socket: &UdpSocket, seeker: &mut Seeker, places: &[Place], answers: &mut Answers, now: Instant) {
    for place in places.iter().filter(|place| !answers.from.contains_key(&place.name)) {
        // Fails without a link-local address: no carrier, or IPv6 switched off there.
        let sent = seeker
            .discover(now, place.to.scope_id())
            .is_ok_and(|datagram| socket.send_to(&datagram, place.to).is_ok());
        if sent {
            answers.asked.insert(place.name.clone());
        }
    }
}

fn verdict(key: &str, places: &[Place], answers: &Answers) -> Finding {
    if answers.from.is_empty() {
        return Finding::failure(
            CHECK,
            format!(
                "a Discover with the key {key} is not answered on {}",
                list(places.iter().map(|place| &place.name))
            ),
            "systemctl restart stiefel-autokexec, so that it reads the keys anew; then journalctl -b -u stiefel-autokexec",
        );
    }
    let state = match answers.from.values().next() {
        Some(State::Asleep) => "asleep",
        Some(State::Waking) => "on its way",
        Some(State::Ready) => "ready",
        Some(State::Locked) => "waiting for the passphrase of its disk",
        Some(State::Lending) => "lending its disks by `stiefel target`",
        None => "silent",
    };
    let silent: Vec<&String> = answers
        .asked
        .iter()
        .filter(|name| !answers.from.contains_key(*name))
        .collect();
    if !silent.is_empty() {
        return Finding::warning(
            CHECK,
            format!(
                "a Discover with the key {key} is answered on {} ({state}), but not on {}: a firewall may drop it there",
                list(answers.from.keys()),
                list(silent.into_iter())
            ),
            "see `firewall` above; `journalctl -b -u stiefel-autokexec` says on what it listens",
        );
    }
    let text = format!(
        "a Discover with the key {key} is answered on {} ({state})",
        list(answers.from.keys())
    );
    match answers.from.keys().any(|name| name != "lo") {
        true => Finding::ok(CHECK, text),
        false => Finding::ok(
            CHECK,
            format!("{text}; no wired adapter is connected now, so it was asked on no other"),
        ),
    }
}

fn list<'a>(names: impl Iterator<Item = &'a String>) -> String {
    names.map(String::as_str).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};
    use stiefel_shared::discovery::{About, Responder};

    fn place(name: &str, port: u16) -> Place {
        Place {
            name: name.to_owned(),
            to: SocketAddrV6::new(Ipv6Addr::LOCALHOST, port, 0, 0),
        }
    }

    /// A laptop on the loopback interface that knows `keys`.
    fn laptop<T>(keys: &[StickKey], work: impl FnOnce(u16) -> T) -> T {
        let socket = UdpSocket::bind("[::1]:0").unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        let port = socket.local_addr().unwrap().port();
        let about = About {
            hostname: "laptop".into(),
            http_port: PORT,
            ready_in: 0,
        };
        let mut responder = Responder::new(keys, about, State::Asleep, Instant::now());
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut buffer = [0; DATAGRAM + 1];
                while !done.load(Ordering::SeqCst) {
                    if let Ok((length, SocketAddr::V6(from))) = socket.recv_from(&mut buffer)
                        && let Some(answer) = responder.receive(Instant::now(), from, &buffer[..length])
                    {
                        assert!(answer.woken.is_none(), "a question wakes nobody");
                        socket.send_to(&answer.datagram, from).unwrap();
                    }
                }
            });
            let result = work(port);
            done.store(true, Ordering::SeqCst);
            result
        })
    }

    #[test]
    fn a_service_that_has_the_key_answers_and_one_that_has_not_is_told() {
        let (known, unknown) = (StickKey::generate("blue").unwrap(), StickKey::generate("red").unwrap());
        let findings = laptop(std::slice::from_ref(&known), |port| {
            let places = [place("lo", port)];
            [of_key(&known, &places), of_key(&unknown, &places)]
        });
        assert_eq!(
            findings[0].level,
            stiefel_server::setup::doctor::Level::Ok,
            "{}",
            findings[0]
        );
        assert!(findings[0].text.contains("blue") && findings[0].text.contains("asleep"));
        assert_eq!(findings[1].level, stiefel_server::setup::doctor::Level::Failure);
        assert!(findings[1].text.contains("red") && findings[1].next.is_some());
    }

    #[test]
    fn an_interface_that_stays_silent_beside_one_that_answers_is_a_warning() {
        let places = [place("eth0", 1), place("lo", 2)];
        let mut answers = Answers::default();
        answers.asked.extend(["eth0".to_owned(), "lo".to_owned()]);
        answers.from.insert("lo".to_owned(), State::Asleep);
        let finding = verdict("k", &places, &answers);
        assert!(finding.text.contains("not on eth0"), "{finding}");
        answers.asked.remove("eth0");
        let finding = verdict("k", &places, &answers);
        assert!(
            finding.next.is_none() && finding.text.contains("no wired adapter"),
            "{finding}"
        );
    }

    #[test]
    fn a_port_in_the_table_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        assert!(!is_listening(dir.path()));
        std::fs::create_dir_all(dir.path().join("proc/net")).unwrap();
        let table = "  sl  local_address\n 1: 00000000000000000000000000000000:F082 0:0 07\n";
        std::fs::write(dir.path().join("proc/net/udp6"), table).unwrap();
        assert!(is_listening(dir.path()));
    }
}
