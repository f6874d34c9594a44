//! Both sides of the control socket, over a real one; the other side is this process's own user.

use std::sync::mpsc::Receiver;

use super::client::{ControlError, cancel_of, watch};
use super::*;

/// Only a missing message takes so long.
const HUNG: Duration = Duration::from_secs(60);

struct Door {
    dir: tempfile::TempDir,
    control: Control,
    wishes: Receiver<Wish>,
}

fn me() -> u32 {
    rustix::process::geteuid().as_raw()
}

impl Door {
    fn open() -> Self {
        Self::with(OUTCOME)
    }

    fn with(outcome: Duration) -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("sessions")).unwrap();
        let control = Control::with(&dir.path().join("sessions"), outcome);
        let (sender, wishes) = mpsc::channel();
        control
            .listen(&dir.path().join("run"), move |wish| sender.send(wish).unwrap())
            .unwrap();
        let door = Self { dir, control, wishes };
        door.log_in(me(), true);
        door
    }

    fn folder(&self) -> PathBuf {
        self.dir.path().join("run")
    }

    fn log_in(&self, uid: u32, in_front: bool) {
        let active = u8::from(in_front);
        let text = format!("UID={uid}\nACTIVE={active}\nREMOTE=0\nTYPE=wayland\nCLASS=user\nSEAT=seat0\n");
        fs::write(self.dir.path().join(format!("sessions/{uid}")), text).unwrap();
    }

    /// What a watcher hears, and how its watching ends.
    fn watch(&self) -> (Receiver<Notice>, thread::JoinHandle<Result<(), ControlError>>) {
        let (sender, heard) = mpsc::channel();
        let (folder, before) = (self.folder(), self.control.lock().watchers.len());
        let end = thread::spawn(move || watch(&folder, me(), |notice| sender.send(notice).is_ok()));
        let begun = std::time::Instant::now();
        while self.control.lock().watchers.len() == before {
            assert!(begun.elapsed() < HUNG && !end.is_finished(), "it does not watch");
            thread::yield_now();
        }
        (heard, end)
    }
}

fn refused(why: &str) -> Notice {
    Notice::Refused { why: why.to_owned() }
}

#[test]
fn a_wish_is_answered_when_it_is_known_what_becomes_of_it() {
    let door = Door::open();
    for answer in [
        Answer::Cancelled,
        Answer::Idle,
        Answer::TooLate,
        Answer::StaysAnyway {
            why: "the battery".to_owned(),
        },
    ] {
        let folder = door.folder();
        let asking = thread::spawn(move || cancel_of(&folder, me()));
        let wish = door.wishes.recv_timeout(HUNG).unwrap();
        assert_eq!(wish.who, name(me()));
        wish.answer.send(answer.clone()).unwrap();
        assert_eq!(asking.join().unwrap().unwrap(), answer);
    }
}

#[test]
fn a_request_has_a_deadline_however_its_bytes_come() {
    let (mut ours, mut theirs) = UnixStream::pair().unwrap();
    theirs.write_all(b"cancel\nwatch\n").unwrap();
    let late = request(&mut ours, Instant::now()).unwrap_err();
    assert_eq!(late.kind(), io::ErrorKind::TimedOut, "though bytes are there");
    assert_eq!(request(&mut ours, Instant::now() + HUNG).unwrap(), b"cancel");
    // Who has sent a part, and sends nothing more.
    theirs.write_all(b"can").unwrap();
    assert_eq!(request(&mut ours, Instant::now() + HUNG).unwrap(), b"watch");
    assert!(request(&mut ours, Instant::now() + Duration::from_millis(50)).is_err());
}

#[test]
fn who_wishes_waits_for_the_outcome_but_not_for_ever() {
    let door = Door::with(Duration::from_millis(50));
    let mut stream = UnixStream::connect(door.folder().join(SOCKET)).unwrap();
    stream.set_read_timeout(Some(HUNG)).unwrap();
    stream.write_all(b"cancel\n").unwrap();
    let _unanswered = door.wishes.recv_timeout(HUNG).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    assert!(answer.is_empty(), "it is closed without an answer");
    assert!(OUTCOME > client::PATIENCE, "who wishes gives up first");
}

#[test]
fn a_service_that_ends_before_it_knows_is_an_error() {
    let door = Door::open();
    let folder = door.folder();
    let asking = thread::spawn(move || cancel_of(&folder, me()));
    drop(door.wishes.recv_timeout(HUNG).unwrap());
    assert!(matches!(asking.join().unwrap(), Err(ControlError::Connection(_))));
    assert!(matches!(
        cancel_of(&door.dir.path().join("nothing"), me()),
        Err(ControlError::NotThere)
    ));
}

#[test]
fn who_watches_hears_everything_from_then_on_and_who_goes_is_forgotten() {
    let door = Door::open();
    door.control.tell(&refused("before"));
    let (first, _) = door.watch();
    let (second, _) = door.watch();
    let notice = Notice::Countdown {
        seconds: 10,
        why: "a plug".to_owned(),
    };
    door.control.tell(&notice);
    assert_eq!(first.recv_timeout(HUNG).unwrap(), notice);
    assert_eq!(second.recv_timeout(HUNG).unwrap(), notice);
    drop(second);
    // The one that does not listen any more learns of it by the next notice.
    let begun = std::time::Instant::now();
    let users = || door.control.lock().users.get(&me()).copied();
    // Its place is free a moment after it is off the list.
    while door.control.lock().watchers.len() > 1 || users() != Some(1) {
        assert!(begun.elapsed() < HUNG, "it is still there");
        door.control.tell(&refused("x"));
        // One at a time: who is told faster than it reads would be dropped.
        assert_eq!(first.recv_timeout(HUNG).unwrap(), refused("x"));
    }
}

#[test]
fn who_does_not_read_keeps_nobody_waiting_and_is_dropped() {
    let door = Door::open();
    let mut deaf = UnixStream::connect(door.folder().join(SOCKET)).unwrap();
    deaf.write_all(b"watch\n").unwrap();
    let (heard, _end) = door.watch();
    let begun = std::time::Instant::now();
    let long = refused(&"x".repeat(MAX_REASON));
    while door.control.lock().watchers.len() > 1 {
        assert!(begun.elapsed() < HUNG, "it is waited for");
        door.control.tell(&long);
        assert_eq!(heard.recv_timeout(HUNG).unwrap(), long);
    }
}

#[test]
fn only_root_and_who_is_in_front_of_the_laptop_may_cancel() {
    let door = Door::open();
    door.log_in(1001, true);
    door.log_in(1002, false);
    let may = |uid| (door.control.may_cancel(uid), door.control.may_watch(uid));
    assert_eq!(may(0), (true, true));
    assert_eq!(may(1001), (true, true));
    assert_eq!(may(1002), (false, true), "another session is in front");
    assert_eq!(may(1003), (false, false), "not logged in");
    assert!(!Control::new(Path::new("/nonexistent")).may_cancel(1001), "no logind");
}

#[test]
fn who_may_not_is_told_so() {
    if me() == 0 {
        // Root may everything; the answer itself is read by the other side.
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        reply(&mut ours, Answer::Denied).unwrap();
        drop(ours);
        let mut text = String::new();
        (&theirs).read_to_string(&mut text).unwrap();
        assert_eq!(text, "{\"answer\":\"denied\"}\n");
        return;
    }
    let door = Door::open();
    fs::remove_file(door.dir.path().join(format!("sessions/{}", me()))).unwrap();
    assert!(matches!(cancel_of(&door.folder(), me()), Err(ControlError::Denied)));
    assert!(matches!(
        watch(&door.folder(), me(), |_| true),
        Err(ControlError::Denied)
    ));
    assert!(door.wishes.try_recv().is_err());
}

#[test]
fn one_user_cannot_take_all_places_and_no_user_roots() {
    let control = Control::new(Path::new("/nonexistent"));
    let mut places: Vec<_> = (0..MAX_OF_ONE).map(|_| Place::take(&control, 1000).unwrap()).collect();
    assert!(Place::take(&control, 1000).is_none());
    assert!(Place::take(&control, 1001).is_some());
    places.pop();
    places.push(Place::take(&control, 1000).unwrap());
    for uid in 2000.. {
        let Some(place) = Place::take(&control, uid) else { break };
        places.push(place);
    }
    assert_eq!(places.len(), MAX_OF_ALL);
    assert!(Place::take(&control, 0).is_some());
    drop(places);
    assert!(control.lock().users.is_empty());
}

#[test]
fn other_requests_are_closed_and_another_service_is_not_replaced() {
    let door = Door::open();
    for request in [
        &b"x\n"[..],
        b"cancel",
        b"a line that is longer than any request\n",
        b"\n",
    ] {
        let mut stream = UnixStream::connect(door.folder().join(SOCKET)).unwrap();
        let _ = stream.write_all(request);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        assert!(answer.is_empty(), "{request:?}");
    }
    assert!(door.wishes.try_recv().is_err());
    let other = Control::new(Path::new("/nonexistent")).listen(&door.folder(), |_| {});
    assert_eq!(other.unwrap_err().kind(), io::ErrorKind::AddrInUse);
    // What one that was killed has left is.
    let left = door.dir.path().join("left");
    fs::create_dir(&left).unwrap();
    drop(UnixListener::bind(left.join(SOCKET)).unwrap());
    Control::new(Path::new("/nonexistent")).listen(&left, |_| {}).unwrap();
    let mode = left.join(SOCKET).metadata().unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o666);
}

#[test]
fn a_socket_that_is_not_the_services_is_not_believed() {
    let door = Door::open();
    let stranger = me() + 1;
    assert!(matches!(
        cancel_of(&door.folder(), stranger),
        Err(ControlError::NotRoots { .. })
    ));
}

#[test]
fn a_reason_of_any_length_fits_into_a_line() {
    for text in ["\u{1}", "\"", "ü", "𝄞", "x"] {
        let notice = Notice::Countdown {
            seconds: u64::MAX,
            why: text.repeat(100_000),
        };
        assert!(line(&notice.cut()).is_some(), "{text:?}");
    }
    assert_eq!(refused("short").cut(), refused("short"));
}
