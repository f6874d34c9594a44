//! Guests: they share a disk that stays as it is, each with a memory of its own.

use super::*;

use stiefel_shared::nbd::{CMD_FLUSH, CMD_READ, CMD_WRITE, Request as Ask, SimpleReply};
use stiefel_shared::session::{Beat, Pulse, SHORTEST};

/// A laptop in guest mode, with something on its disk.
fn laptop() -> Arc<tempfile::TempDir> {
    let dir = a_laptop();
    std::fs::write(dir.path().join("disk"), disk()).unwrap();
    dir
}

const SECTOR: u64 = 512;

fn disk() -> Vec<u8> {
    vec![0x5a; usize::try_from(SIZE).unwrap()]
}

fn process(dir: &Arc<tempfile::TempDir>, after: After, pid_one: &PidOne) -> Fixture {
    Fixture::with(Arc::clone(dir), after, SessionMode::Guest, Some(pid_one.attend()))
}

fn fixture(after: After) -> Fixture {
    Fixture::with(laptop(), after, SessionMode::Guest, None)
}

fn name(bundle: &Bundle) -> SessionName {
    bundle.manifest.session.parse().unwrap()
}

/// One request, and what comes back.
fn ask(stream: &mut TcpStream, command: u16, offset: u64, data: &[u8], length: u32) -> Vec<u8> {
    let request = Ask {
        flags: 0,
        command,
        cookie: 7,
        offset,
        length,
    };
    stream.write_all(&request.encode()).unwrap();
    stream.write_all(data).unwrap();
    let mut header = [0; 16];
    stream.read_exact(&mut header).unwrap();
    assert_eq!(
        SimpleReply::parse(&header).unwrap(),
        SimpleReply { error: 0, cookie: 7 }
    );
    let mut answer = vec![0; if command == CMD_READ { length as usize } else { 0 }];
    stream.read_exact(&mut answer).unwrap();
    answer
}

/// Fills sectors with a byte, and flushes.
fn write(stream: &mut TcpStream, sectors: std::ops::Range<u64>, byte: u8) {
    let data = vec![byte; usize::try_from((sectors.end - sectors.start) * SECTOR).unwrap()];
    ask(
        stream,
        CMD_WRITE,
        sectors.start * SECTOR,
        &data,
        u32::try_from(data.len()).unwrap(),
    );
    ask(stream, CMD_FLUSH, 0, &[], 0);
}

/// The byte that a sector is full of.
fn read(stream: &mut TcpStream, sector: u64) -> u8 {
    let data = ask(stream, CMD_READ, sector * SECTOR, &[], u32::try_from(SECTOR).unwrap());
    assert!(data.iter().all(|byte| *byte == data[0]));
    data[0]
}

/// Whether the laptop asks this guest to power off, as it would hear it.
fn is_asked(fixture: &Fixture, bundle: &Bundle, number: u64) -> bool {
    let pulse = Pulse::new(&bundle.manifest.control, name(bundle), 0);
    let beat = Beat {
        number,
        mtu: 0,
        random: [3; 16],
        length: SHORTEST,
    };
    let peer = (Ipv6Addr::LOCALHOST, 9).into();
    let sign = fixture.host.hear(peer, &pulse.beat(&beat).unwrap()).unwrap();
    pulse.read(&sign).unwrap().1.power_off
}

#[test]
fn guests_share_the_disk_see_only_their_own_writes_and_change_nothing_on_it() {
    let fixture = fixture(After::Stay);
    let [blue, red] = [('a', "blue"), ('b', "red")].map(|(machine, key)| fixture.begin(key, machine).unwrap());
    assert!(blue.manifest.disk.guest && red.manifest.disk.guest);
    assert!(blue.manifest.session != red.manifest.session && blue.manifest.control.0 != red.manifest.control.0);
    let [mut one, mut two] = [&blue, &red].map(|bundle| fixture.connect(bundle).unwrap());
    write(&mut one, 9..29, 1);
    write(&mut two, 9..10, 2);
    assert_eq!(
        (read(&mut one, 9), read(&mut one, 28), read(&mut one, 29)),
        (1, 1, 0x5a)
    );
    assert_eq!(
        (read(&mut two, 9), read(&mut two, 10), read(&mut two, 8)),
        (2, 0x5a, 0x5a)
    );
    // A new connection of the one ends none of the other.
    let mut again = fixture.connect(&blue).unwrap();
    assert_eq!((read(&mut again, 9), read(&mut two, 9)), (1, 2));
    assert!(is_closed(one));
    assert_eq!(std::fs::read(&fixture.disk).unwrap(), disk());
}

#[test]
fn a_guest_that_boots_anew_begins_with_the_laptops_disk_and_others_stay() {
    let fixture = fixture(After::Stay);
    let [blue, red] = [('a', "blue"), ('b', "red")].map(|(machine, key)| fixture.begin(key, machine).unwrap());
    let [mut one, mut two] = [&blue, &red].map(|bundle| fixture.connect(bundle).unwrap());
    write(&mut one, 0..1, 1);
    write(&mut two, 0..1, 2);
    let anew = fixture.begin("blue", 'a').unwrap();
    assert!(is_closed(one) && fixture.connect(&blue).is_none());
    assert_eq!(read(&mut fixture.connect(&anew).unwrap(), 0), 0x5a);
    // So does one that says before that it reboots.
    fixture.goodbye(&anew, Goodbye::Reboot).unwrap();
    let anew = fixture.begin("blue", 'a').unwrap();
    assert_eq!(read(&mut fixture.connect(&anew).unwrap(), 0), 0x5a);
    assert_eq!(read(&mut two, 0), 2);
}

#[test]
fn no_more_guests_come_than_there_is_place_and_memory_for() {
    let fixture = fixture(After::Stay);
    let guests: Vec<_> = "0123456"
        .chars()
        .map_while(|machine| fixture.begin("blue", machine).ok())
        .collect();
    // Half of 8 GiB: 2048, 1024, 512, 256, 128 and 64 MiB.
    assert_eq!(guests.len(), 6);
    let refusal = fixture.begin("blue", '6').unwrap_err();
    assert!(refusal.reason.contains("memory does not suffice"), "{}", refusal.reason);
    fixture.goodbye(&guests[0], Goodbye::Poweroff).unwrap();
    assert!(fixture.begin("blue", '6').is_ok());
    assert!(!fixture.person.still_waits());
}

#[test]
fn the_laptop_goes_home_when_the_last_guest_has_gone_and_waits_for_one_that_reboots() {
    let mut fixture = fixture(After::Return);
    let [blue, red, green] =
        [('a', "blue"), ('b', "red"), ('c', "green")].map(|(machine, key)| fixture.begin(key, machine).unwrap());
    let mut part = |bundle: &Bundle, way| {
        fixture.goodbye(bundle, way).unwrap();
        fixture.host.parted(name(bundle), way);
        fixture.host.look();
        fixture.news.try_recv().ok()
    };
    assert_eq!(part(&blue, Goodbye::Poweroff), None);
    // What a guest has changed is not booted, so the laptop need not collect it.
    assert_eq!(part(&red, Goodbye::RebootAnew), None);
    assert_eq!(part(&green, Goodbye::Poweroff), None);
    let red = fixture.begin("red", 'b').unwrap();
    fixture.goodbye(&red, Goodbye::Poweroff).unwrap();
    fixture.host.parted(name(&red), Goodbye::Poweroff);
    assert_eq!(fixture.news.try_recv().unwrap(), News::End(End::Restart));
    assert!(fixture.begin("blue", 'a').is_err());
}

#[test]
fn keys_at_the_laptop_are_for_all_guests() {
    let mut fixture = fixture(After::Stay);
    let [blue, red] = [('a', "blue"), ('b', "red")].map(|(machine, key)| fixture.begin(key, machine).unwrap());
    assert!(!is_asked(&fixture, &blue, 1));
    fixture.host.power_off_pressed();
    assert!(is_asked(&fixture, &blue, 2) && is_asked(&fixture, &red, 1));
    // One that comes now was not meant.
    let green = fixture.begin("green", 'c').unwrap();
    assert!(!is_asked(&fixture, &green, 1));
    fixture.host.home_pressed();
    for guest in [&blue, &red, &green] {
        assert!(fixture.news.try_recv().is_err());
        fixture.goodbye(guest, Goodbye::Poweroff).unwrap();
        fixture.host.home_pressed();
    }
    assert_eq!(fixture.news.try_recv().unwrap(), News::End(End::Restart));
}

#[test]
fn what_guests_have_written_goes_on_in_the_servers_next_process_and_ends_with_their_sessions() {
    let (dir, pid_one) = (laptop(), PidOne::default());
    let first = process(&dir, After::Stay, &pid_one);
    let [blue, red] = [('a', "blue"), ('b', "red")].map(|(machine, key)| first.begin(key, machine).unwrap());
    write(&mut first.connect(&blue).unwrap(), 8..18, 1);
    write(&mut first.connect(&red).unwrap(), 8..18, 2);
    assert_eq!(pid_one.places(), [0, 1, 2]);
    drop(first);

    let second = process(&dir, After::Stay, &pid_one);
    assert_eq!(second.host.resume().unwrap().len(), 2);
    for (bundle, byte) in [(&blue, 1), (&red, 2)] {
        let mut stream = second.connect(bundle).expect("the guest cannot go on");
        assert_eq!((read(&mut stream, 17), read(&mut stream, 18)), (byte, 0x5a));
        write(&mut stream, 0..1, byte);
        // It is the same session to the laptop's clock, too.
        is_asked(&second, bundle, 1000);
    }
    second.goodbye(&blue, Goodbye::Reboot).unwrap();
    assert_eq!(pid_one.places(), [0, 2]);
    // The number of the one that has gone is the next one's.
    let green = second.begin("green", 'c').unwrap();
    assert_eq!(pid_one.places(), [0, 1, 2]);
    drop(second);

    let third = process(&dir, After::Stay, &pid_one);
    assert_eq!(third.host.resume().unwrap().len(), 2);
    assert_eq!(read(&mut third.connect(&red).unwrap(), 0), 2);
    assert_eq!(read(&mut third.connect(&green).unwrap(), 8), 0x5a);
    third.goodbye(&red, Goodbye::Poweroff).unwrap();
    third.goodbye(&green, Goodbye::Poweroff).unwrap();
    assert!(!pid_one.keeps());
    assert_eq!(std::fs::read(dir.path().join("disk")).unwrap(), disk());
    drop(third);
    assert!(process(&dir, After::Stay, &pid_one).host.resume().unwrap().is_empty());
}

#[test]
fn a_guest_whose_writes_were_not_kept_does_not_go_on_and_others_do() {
    let (dir, pid_one) = (laptop(), PidOne::default());
    let first = process(&dir, After::Stay, &pid_one);
    let [blue, red] = [('a', "blue"), ('b', "red")].map(|(machine, key)| first.begin(key, machine).unwrap());
    write(&mut first.connect(&red).unwrap(), 0..1, 2);
    drop(first);
    pid_one.0.lock().unwrap().remove(&1);

    let second = process(&dir, After::Stay, &pid_one);
    let went_on = second.host.resume().unwrap();
    assert_eq!(went_on.len(), 1);
    assert!(second.connect(&blue).is_none());
    assert_eq!(read(&mut second.connect(&red).unwrap(), 0), 2);
    drop(second);

    let third = process(&dir, After::Stay, &pid_one);
    assert_eq!(third.host.resume().unwrap().len(), 1);
}

#[test]
fn what_was_kept_for_a_session_that_was_never_written_down_is_closed() {
    let (dir, pid_one) = (laptop(), PidOne::default());
    let first = process(&dir, After::Stay, &pid_one);
    let blue = first.begin("blue", 'a').unwrap();
    first
        .host
        .0
        .setup
        .records
        .hold_memory(3, tempfile::tempfile().unwrap().as_fd())
        .unwrap();
    assert_eq!(pid_one.places(), [0, 1, 4]);
    drop(first);

    let second = process(&dir, After::Stay, &pid_one);
    assert_eq!(second.host.resume().unwrap().len(), 1);
    assert_eq!(pid_one.places(), [0, 1]);
    assert!(second.connect(&blue).is_some());
}

#[test]
fn a_guests_lost_writes_are_its_own_and_are_not_forgotten() {
    let (dir, pid_one) = (laptop(), PidOne::default());
    let first = process(&dir, After::Stay, &pid_one);
    let [blue, red] = [('a', "blue"), ('b', "red")].map(|(machine, key)| first.begin(key, machine).unwrap());
    first.host.0.setup.records.note_failure(name(&blue), "no memory");
    drop(first);

    let mut second = process(&dir, After::Stay, &pid_one);
    assert_eq!(second.host.resume().unwrap().len(), 2);
    let mut failed = second.connect(&blue).unwrap();
    let request = Ask {
        flags: 0,
        command: CMD_FLUSH,
        cookie: 7,
        offset: 0,
        length: 0,
    };
    failed.write_all(&request.encode()).unwrap();
    let mut header = [0; 16];
    failed.read_exact(&mut header).unwrap();
    assert_ne!(SimpleReply::parse(&header).unwrap().error, 0);
    write(&mut second.connect(&red).unwrap(), 0..1, 2);
    // Nothing of it is on the disk, so nothing else is in doubt.
    second.goodbye(&blue, Goodbye::Poweroff).unwrap();
    assert!(second.news.try_recv().is_err() && second.begin("green", 'c').is_ok());
}

#[test]
fn a_hibernated_system_refuses_guests_too() {
    let fixture = fixture(After::Return);
    let disk = File::options().write(true).open(&fixture.disk).unwrap();
    disk.write_all_at(b"S1SUSPEND\0", 4086).unwrap();
    let reason = fixture.begin("blue", 'a').unwrap_err().reason;
    assert!(reason.contains("hibernated"), "{reason}");
}
