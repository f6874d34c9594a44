//! `stiefel target` without `--open`: found and borrowed by the holders of a key only.

use std::io::Write;
use std::net::TcpListener;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use anyhow::Context;
use stiefel_shared::bundle::DISK_PORT;
use stiefel_shared::discovery::{About, LinkEvent, PORT, Responder, State};
use stiefel_shared::key::StickKey;
use stiefel_sys::link::{self, LinkMonitor};
use stiefel_sys::nvmet::{CONFIGFS, Shelf};
use stiefel_sys::shield;
use tokio::sync::mpsc;

use super::alone::{self, Alone};
use super::desk::{Desk, OnOffer};
use super::follow::Chosen;
use super::grant::Grants;
use super::hosted::Hosted;
use super::listing::LeftOut;
use super::names::machine;
use super::qr::{self, Room};
use super::role::{Press, Sure};
use super::run::{self, Event, LOOK, SETTLE, Signals};
use super::say::say;
use super::share::Mode;
use super::wanted::{Called, look_up, mode, wanted};
use super::{Options, doors, tunnel};
use crate::nbd::{self, Limits, Server};
use crate::tree::Tree;
use crate::{discovery, http};

/// The index that Linux gives the loopback interface: a borrower on this very machine.
const LOOPBACK: u32 = 1;

/// Lends to those who have one of `keys`, until SIGINT or SIGTERM; then all loans are ended in order.
///
/// # Errors
/// Nothing can be lent at all, or a loan was not ended in order.
pub fn run_closed(options: &Options, keys: &[StickKey]) -> anyhow::Result<()> {
    anyhow::ensure!(
        options.writable.iter().all(|disk| disk.host.is_none()),
        "a host's NQN counts with --open only; without it who holds a key may write: name the disk alone"
    );
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    let ended = runtime.block_on(follow(options, keys, Seat::default()));
    runtime.shutdown_background();
    ended
}

/// A person at the machine; nobody by default.
#[derive(Default)]
pub(super) struct Seat {
    pub(super) keys: Option<mpsc::Receiver<char>>,
    pub(super) sure: Sure,
}

impl Seat {
    pub(super) async fn key(&mut self) -> char {
        if let Some(keys) = &mut self.keys
            && let Some(key) = keys.recv().await
        {
            return key;
        }
        // Nobody, or no more.
        self.keys = None;
        std::future::pending().await
    }
}

pub(super) async fn follow(options: &Options, keys: &[StickKey], mut seat: Seat) -> anyhow::Result<()> {
    let mut ended = Signals::new()?;
    // Until all has been taken back.
    let _alone = Alone::take(Path::new(alone::FOLDER))?;
    let (tell, mut events) = mpsc::unbounded_channel();
    run::watch(&tell)?;
    let own = || rustix::system::uname().nodename().to_string_lossy().into_owned();
    let hostname = options.hostname.clone().unwrap_or_else(own);
    doors::load(&["wireguard"]);
    let nvme = !options.no_nvme && doors::load_target().is_ok();
    let desk = Arc::new(Desk::new(hostname.clone(), nvme));
    // As long as this function.
    let _server = serve_disks(&desk)?;
    let responder = answerer(keys, &hostname);
    let host = Arc::new(Hosted(Arc::clone(&desk)));
    let limits = http::Limits::default();
    let web = http::run(http::bind(PORT)?, host, Arc::clone(&responder), limits, Vec::new());
    // Nobody is woken who is awake; the channel only has to stay open.
    let (woken, _woken) = mpsc::channel(1);
    let answers = discovery::run(discovery::bind(PORT)?, responder, follow_links()?, woken);
    tokio::pin!(web, answers);
    sweep(nvme);
    let mut show = Shown::new(options, hostname)?;
    let mut look = tokio::time::interval(LOOK);
    let served: anyhow::Result<()> = async {
        show.update(options, &desk)?;
        loop {
            tokio::select! {
                () = ended.any() => return Ok(()),
                never = &mut web => match never {},
                () = &mut answers => anyhow::bail!("discovery ended"),
                key = seat.key() => match seat.sure.press(key, Instant::now(), &mut Arc::clone(&desk)) {
                    Press::End => return Ok(()),
                    Press::Done(words) | Press::Warned(words) => {
                        say(words);
                        show.update(options, &desk)?;
                    }
                    Press::Nothing => {}
                },
                _ = look.tick() => {
                    desk.look(Instant::now());
                    desk.traffic(LOOK.as_secs()).iter().for_each(say);
                    // Nothing is heard of a disk that is unmounted.
                    if show.used || desk.borrowers() != show.borrowers || show.grants.waits() {
                        show.update(options, &desk)?;
                    }
                }
                Some(Event::Changed) = events.recv() => {
                    tokio::time::sleep(SETTLE).await;
                    while events.try_recv().is_ok() {}
                    show.update(options, &desk)?;
                }
            }
        }
    }
    .await;
    say(format_args!("taking all disks back"));
    // In order also after an error: the kernel would go on serving by itself.
    let closed = tokio::task::spawn_blocking(move || desk.close()).await?;
    served.and(closed)
}

/// The NBD server for those to whom the desk has lent a disk.
fn serve_disks(desk: &Arc<Desk>) -> anyhow::Result<Arc<Server>> {
    let gate: Arc<dyn nbd::Gate> = Arc::<Desk>::clone(desk);
    let listener = TcpListener::bind((std::net::Ipv6Addr::UNSPECIFIED, DISK_PORT))
        .with_context(|| format!("cannot listen on TCP port {DISK_PORT} for the disks"))?;
    let server = Arc::new(Server::start(listener, gate, Limits::default())?);
    desk.serve_by(&server);
    Ok(server)
}

/// Who answers the holders of a key.
fn answerer(keys: &[StickKey], hostname: &str) -> Arc<Mutex<Responder>> {
    let about = About {
        hostname: hostname.to_owned(),
        http_port: PORT,
        ready_in: 0,
    };
    Arc::new(Mutex::new(Responder::new(keys, about, State::Lending, Instant::now())))
}

/// Takes away what a process of ours has left that was killed; we are alone, so none is alive.
fn sweep(nvme: bool) {
    if nvme {
        if let Err(error) = Shelf::open(Path::new(CONFIGFS), &[]) {
            say(format_args!("{:#}", anyhow::Error::new(error)));
        }
        shield::sweep(Path::new("/sys"), Path::new("/dev"));
    }
    tunnel::sweep();
}

/// Tells discovery of all interfaces as they come and go; they are left as their system has them.
fn follow_links() -> anyhow::Result<mpsc::Receiver<LinkEvent>> {
    let (tell, links) = mpsc::channel(64);
    let mut monitor = LinkMonitor::open()?;
    std::thread::Builder::new().name("links".to_owned()).spawn(move || {
        let mut known: Vec<(u32, String)> = Vec::new();
        loop {
            let links = link::list().unwrap_or_default();
            let up = links
                .iter()
                .filter(|link| (link.up && link.carrier) || link.index == LOOPBACK);
            let now: Vec<(u32, String)> = up.map(|link| (link.index, link.name.clone())).collect();
            let gone = known.iter().filter(|link| !now.contains(link));
            let gone = gone.map(|(index, _)| LinkEvent::Removed { index: *index });
            let come = now.iter().filter(|link| !known.contains(link));
            let come = come.map(|(index, name)| LinkEvent::Added {
                index: *index,
                name: name.clone(),
            });
            for event in gone.chain(come).collect::<Vec<_>>() {
                if tell.blocking_send(event).is_err() {
                    return;
                }
            }
            known = now;
            if monitor.next(None).is_err() {
                std::thread::sleep(LOOK);
            }
        }
    })?;
    Ok(links)
}

/// What people have been shown.
struct Shown {
    chosen: Chosen,
    grants: Grants,
    called: Called,
    machine: String,
    hostname: String,
    text: String,
    /// Who had what.
    borrowers: Vec<(String, String)>,
    /// A disk that could be written is in use here.
    used: bool,
}

impl Shown {
    fn new(options: &Options, hostname: String) -> anyhow::Result<Self> {
        let (chosen, grants) = look_up(options)?;
        Ok(Self {
            chosen,
            grants,
            called: Called::default(),
            machine: machine(&Tree::new(Path::new("/"))),
            hostname,
            text: String::new(),
            borrowers: Vec::new(),
            used: false,
        })
    }

    /// Looks at the disks, and shows what can be borrowed if that has changed.
    fn update(&mut self, options: &Options, desk: &Desk) -> anyhow::Result<()> {
        let root = Path::new("/");
        let survey = run::look(root, &mut self.grants, &mut self.chosen)?;
        let (wanted, left_out) = wanted(options, &self.chosen, &survey);
        let named = self.called.with_names(&self.machine, wanted);
        let on_offer = named.into_iter().map(|(want, names)| OnOffer {
            mode: mode(options, &self.grants, &want.source),
            source: want.source,
            users: want.users,
            names,
        });
        let mut on_offer: Vec<OnOffer> = on_offer.collect();
        // In the order of the desk's names: the screen's numbers are the keys.
        on_offer.sort_by(|a, b| a.names.key.cmp(&b.names.key));
        self.used = on_offer
            .iter()
            .any(|disk| disk.mode != Mode::ReadOnly && !disk.users.is_empty());
        desk.offer(on_offer.clone());
        self.borrowers = desk.borrowers();
        let text = match options.json {
            true => json(&self.hostname, &on_offer, &left_out, &self.borrowers),
            false => words(&self.hostname, &on_offer, &left_out, desk, &self.borrowers),
        };
        if text != self.text {
            // Nobody hears it any more: the end, in order.
            let mut out = std::io::stdout().lock();
            writeln!(out, "{text}")?;
            let room = Room::of_stdout().filter(|_| !options.json);
            let lent = on_offer.iter().filter(|disk| !desk.is_withheld(&disk.names.key));
            let commands: Vec<String> = lent.map(|disk| command(&self.hostname, disk)).collect();
            if let Some(room) = room
                && let Some(code) = qr::code(&texts(&commands), room.below(text.lines().count()))
            {
                out.write_all(code.as_bytes())?;
            }
            out.flush()?;
            self.text = text;
        }
        Ok(())
    }
}

/// What others have to type.
fn command(hostname: &str, disk: &OnOffer) -> String {
    format!("stiefel attach {hostname}/{}", disk.names.key)
}

/// What a code may say: all commands, else the one that lists the disks.
fn texts(commands: &[String]) -> Vec<String> {
    match commands {
        [] => Vec::new(),
        [only] => vec![only.clone()],
        several => vec![several.join("\n"), "stiefel attach".to_owned()],
    }
}

fn words(
    hostname: &str,
    disks: &[OnOffer],
    left_out: &[LeftOut],
    desk: &Desk,
    borrowers: &[(String, String)],
) -> String {
    let disk = |(index, disk): (usize, &OnOffer)| {
        let (path, size) = (disk.source.path().display(), disk.source.size() >> 20);
        let (name, number) = (&disk.names.key, index + 1);
        if desk.is_withheld(name) {
            return format!("{number} {name} ({path}, {size} MiB) is taken back");
        }
        let (mode, command) = (disk.mode.words(), command(hostname, disk));
        let of_it = borrowers.iter().filter(|(lent, _)| lent == name);
        let lent: String = of_it.map(|(_, words)| format!("\n    {words}")).collect();
        format!("{number} {name} ({path}, {size} MiB): {mode}\n    {command}{lent}")
    };
    let left = |left: &LeftOut| format!("{} is not lent: {}", left.device, left.why);
    let mut lines: Vec<String> = disks
        .iter()
        .enumerate()
        .map(disk)
        .chain(left_out.iter().map(left))
        .collect();
    if disks.is_empty() {
        lines.push("no disk is lent at the moment; waiting for one".to_owned());
    } else {
        lines.push("only for the holders of a key, and encrypted".to_owned());
    }
    lines.join("\n")
}

fn json(hostname: &str, disks: &[OnOffer], left_out: &[LeftOut], borrowers: &[(String, String)]) -> String {
    let disk = |disk: &OnOffer| {
        let of_it = borrowers.iter().filter(|(lent, _)| *lent == disk.names.key);
        let lent: Vec<&str> = of_it.map(|(_, words)| words.as_str()).collect();
        serde_json::json!({
            "name": disk.names.key, "device": disk.source.path().display().to_string(), "size": disk.source.size(), "mode": disk.mode,
            "users": disk.users, "lent": lent, "attach": command(hostname, disk),
        })
    };
    let disks: Vec<_> = disks.iter().map(disk).collect();
    serde_json::json!({ "disks": disks, "left_out": left_out }).to_string()
}

#[cfg(test)]
mod tests {
    use super::super::names::Names;
    use super::super::share::Source;
    use super::*;

    fn on_offer(name: &str) -> OnOffer {
        OnOffer {
            source: Source::File {
                path: format!("/nowhere/{name}").into(),
                size: 3 << 20,
            },
            names: Names::of_file("m", name, &|_| false),
            mode: Mode::ReadOnly,
            users: Vec::new(),
        }
    }

    #[test]
    fn who_has_a_disk_stands_below_it() {
        let (a, b) = (on_offer("a"), on_offer("b"));
        let borrowers = [("b".to_owned(), "lent to fe80::1 (key stick), read-only".to_owned())];
        let desk = Desk::new("laptop".to_owned(), false);
        let said = words("laptop", &[a.clone(), b.clone()], &[], &desk, &borrowers);
        let expected = "2 b (/nowhere/b, 3 MiB): read-only\n    stiefel attach laptop/b\n    lent to fe80::1 (key stick), read-only\n";
        assert!(said.contains(expected), "{said}");
        let said: serde_json::Value = serde_json::from_str(&json("laptop", &[a, b], &[], &borrowers)).unwrap();
        assert_eq!(said["disks"][0]["lent"].as_array().unwrap().len(), 0);
        assert_eq!(said["disks"][1]["lent"][0], "lent to fe80::1 (key stick), read-only");
    }

    #[test]
    fn a_code_says_all_commands_or_the_one_that_lists_the_disks() {
        assert!(texts(&[]).is_empty());
        let one = command("laptop", &on_offer("a"));
        assert_eq!(texts(std::slice::from_ref(&one)), ["stiefel attach laptop/a"]);
        assert_eq!(texts(&[one.clone(), one]).last().unwrap(), "stiefel attach");
    }
}
