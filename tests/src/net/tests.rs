//! Cables with sockets in place of machines.

use std::os::unix::net::UnixDatagram;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::packet::tests::tcp_frame;
use super::*;

/// What QEMU does with one end.
struct Nic {
    socket: UnixDatagram,
    remote: PathBuf,
}

fn nic(end: Netdev) -> Nic {
    let Netdev::Dgram { local, remote } = end else {
        panic!("not an end of a cable")
    };
    let socket = UnixDatagram::bind(local).unwrap();
    // Only a bug reaches it.
    socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    Nic { socket, remote }
}

impl Nic {
    fn send(&self, frame: &[u8]) {
        self.socket.send_to(frame, &self.remote).unwrap();
    }

    fn receive(&self) -> Vec<u8> {
        let mut buffer = vec![0; 70_000];
        let length = self.socket.recv(&mut buffer).unwrap();
        buffer.truncate(length);
        buffer
    }
}

#[test]
fn a_direct_cable_joins_its_ends() {
    let wire = Wire::direct().unwrap();
    let (a, b) = (nic(wire.a()), nic(wire.b()));
    a.send(b"there");
    assert_eq!(b.receive(), b"there");
    b.send(b"back");
    assert_eq!(a.receive(), b"back");
    assert!(matches!(wire.set_cut(true), Err(WireError::Direct)));
}

#[test]
fn a_relayed_cable_counts_and_records() {
    let wire = Wire::relayed(1 << 20).unwrap();
    let (a, b) = (nic(wire.a()), nic(wire.b()));
    a.send(b"a secret there");
    assert_eq!(b.receive(), b"a secret there");
    b.send(b"back");
    assert_eq!(a.receive(), b"back");
    assert!(wire.carried(b"secret").unwrap());
    assert!(!wire.carried(b"hidden").unwrap());
    // What was received was counted at most a moment later: another frame is behind it in the same thread.
    a.send(b"x");
    b.receive();
    let counts = wire.counts().unwrap();
    assert!(counts.a_to_b >= 1 && counts.lost == 0, "{counts:?}");
}

#[test]
fn a_cut_cable_carries_nothing_and_a_mended_one_does() {
    let wire = Wire::relayed(0).unwrap();
    let (a, b) = (nic(wire.a()), nic(wire.b()));
    wire.set_cut(true).unwrap();
    a.send(b"lost");
    while wire.counts().unwrap().lost == 0 {
        std::thread::yield_now();
    }
    wire.set_cut(false).unwrap();
    a.send(b"comes");
    assert_eq!(b.receive(), b"comes");
}

#[test]
fn a_machine_that_is_not_there_loses_frames_and_gets_them_when_it_is() {
    let wire = Wire::relayed(0).unwrap();
    let a = nic(wire.a());
    a.send(b"nobody");
    while wire.counts().unwrap().lost == 0 {
        std::thread::yield_now();
    }
    let b = nic(wire.b());
    a.send(b"somebody");
    assert_eq!(b.receive(), b"somebody");
}

#[test]
fn the_tamper_sits_in_the_cable() {
    let wire = Wire::relayed(0).unwrap();
    let (a, b) = (nic(wire.a()), nic(wire.b()));
    let flip = FlipTcpByte::new(4420, 100, 0);
    let done = flip.done();
    wire.set_tamper(Some(Box::new(flip))).unwrap();
    let frame = tcp_frame(4420, &[1; 1000]);
    a.send(&frame);
    assert_ne!(b.receive(), frame);
    assert!(done.load(Ordering::Relaxed));
    a.send(&frame);
    assert_eq!(b.receive(), frame);
}

#[test]
fn an_unplugged_cable_leaves_nothing_behind() {
    let wire = Wire::relayed(0).unwrap();
    let dir = wire.dir.path().to_owned();
    drop(wire);
    assert!(!dir.exists());
}

#[test]
fn one_end_of_a_stream_listens() {
    let end = |listens| Netdev::Stream {
        path: "/run/cable".into(),
        listens,
    };
    let json = end(true).to_json("n0");
    assert_eq!(json["server"], true);
    assert_eq!(json["addr"]["path"], "/run/cable");
    assert_eq!(end(false).to_json("n0")["server"], false);
}
