//! The console against a scripted machine.

use super::*;

/// Long enough that only a bug reaches it.
const SOON: Duration = Duration::from_secs(20);

struct Machine {
    serial: Serial,
    guest: UnixStream,
    _dir: tempfile::TempDir,
}

fn machine() -> Machine {
    let dir = tempfile::tempdir().unwrap();
    let (ours, guest) = UnixStream::pair().unwrap();
    let log = dir.path().join("laptop.log");
    let options = Options {
        name: "laptop".into(),
        log,
        live: false,
        accel: Accel::Kvm,
    };
    Machine {
        serial: Serial::start(ours, options, Instant::now()).unwrap(),
        guest,
        _dir: dir,
    }
}

#[test]
fn what_was_found_once_is_not_found_again() {
    let mut machine = machine();
    machine.guest.write_all(b"ready 1\r\nready 2\r\n").unwrap();
    assert_eq!(machine.serial.expect("ready", SOON).unwrap(), "ready 1");
    assert_eq!(machine.serial.expect(re("^ready .$"), SOON).unwrap(), "ready 2");
    drop(machine.guest);
    assert!(matches!(
        machine.serial.expect("ready", SOON),
        Err(SerialError::Ended { .. })
    ));
}

#[test]
fn two_things_in_one_line_are_both_found() {
    let mut machine = machine();
    machine.guest.write_all(b"eth0 up, eth1 up\n").unwrap();
    machine.serial.expect("eth0", SOON).unwrap();
    assert_eq!(machine.serial.expect("eth1", SOON).unwrap(), "eth0 up, eth1 up");
}

#[test]
fn a_prompt_without_a_line_end_is_found() {
    let mut machine = machine();
    machine.guest.write_all(b"Debian\r\n\r\nlaptop login: ").unwrap();
    assert_eq!(machine.serial.expect(re("login: $"), SOON).unwrap(), "laptop login: ");
}

#[test]
fn the_first_in_the_stream_wins_not_the_first_in_the_list() {
    let mut machine = machine();
    machine.guest.write_all(b"alpha\nbeta\n").unwrap();
    let found = machine
        .serial
        .expect_any(&["beta".into(), "alpha".into()], SOON)
        .unwrap();
    assert_eq!((found.index, found.line.as_str()), (1, "alpha"));
}

#[test]
fn a_timeout_shows_the_last_lines_and_the_log() {
    let mut machine = machine();
    for number in 0..50 {
        writeln!(machine.guest, "line {number}").unwrap();
    }
    machine.serial.expect("line 49", SOON).unwrap();
    let text = machine
        .serial
        .expect("never", Duration::from_millis(1))
        .unwrap_err()
        .to_string();
    assert!(
        text.contains("\"never\"") && text.contains("line 20") && text.contains("line 49"),
        "{text}"
    );
    assert!(!text.contains("line 19"), "{text}");
    assert!(text.contains(&machine.serial.log().display().to_string()), "{text}");
}

#[test]
fn the_log_has_every_line_with_its_time() {
    let mut machine = machine();
    machine.guest.write_all(b"one\ntwo\nunfinished").unwrap();
    drop(machine.guest);
    assert!(matches!(
        machine.serial.expect("three", SOON),
        Err(SerialError::Ended { .. })
    ));
    let log = std::fs::read_to_string(machine.serial.log()).unwrap();
    let expected = regex_lite::Regex::new(r"^\[ +\d+\.\d{3}\] one\n\[.*\] two\n\[.*\] unfinished\n$").unwrap();
    assert!(expected.is_match(&log), "{log}");
}

#[test]
fn a_bad_expression_is_an_error_not_a_timeout() {
    let machine = machine();
    assert!(matches!(
        machine.serial.expect(re("("), SOON),
        Err(SerialError::BadPattern { .. })
    ));
}

#[test]
fn skipping_hides_what_came_before_and_said_still_sees_it() {
    let mut machine = machine();
    machine.guest.write_all(b"old marker\nsync\n").unwrap();
    machine.serial.expect("sync", SOON).unwrap();
    machine.serial.skip();
    machine.guest.write_all(b"new marker\n").unwrap();
    assert_eq!(machine.serial.expect("marker", SOON).unwrap(), "new marker");
    assert!(machine.serial.said("old marker").unwrap());
    assert!(!machine.serial.said("no marker").unwrap());
}

#[test]
fn what_is_sent_arrives_as_typed() {
    let mut machine = machine();
    machine.serial.send_line("root").unwrap();
    let mut typed = [0; 5];
    machine.guest.read_exact(&mut typed).unwrap();
    assert_eq!(&typed, b"root\n");
}

#[test]
fn the_lines_between_two_marks_are_collected() {
    let mut machine = machine();
    machine
        .guest
        .write_all(b"noise\nbegin\none\ntwo\nend 0\nlater\n")
        .unwrap();
    machine.serial.expect("begin", SOON).unwrap();
    let (lines, last) = machine.serial.collect(&"end".into(), SOON).unwrap();
    assert_eq!(
        (lines, last.as_str()),
        (vec!["one".to_owned(), "two".to_owned()], "end 0")
    );
}
