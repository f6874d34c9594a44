//! What strangers and browsers see, and what they cannot use up.

use std::net::SocketAddrV6;
use std::time::Duration;

use stiefel_server::http::Limits;
use stiefel_shared::session::{BEGIN, Initiator, OPENED, OPENING};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::laptop::{Laptop, Plan, Seen, machine, noise, soon};
use stiefel_shared::handover::Part;

/// Sends bytes and reads until the laptop closes.
async fn exchange(peer: SocketAddrV6, bytes: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(peer).await.unwrap();
    // A laptop that has heard enough may close before all is written.
    let _ = stream.write_all(bytes).await;
    let mut answer = Vec::new();
    // Closing with unread bytes resets the connection; what came before counts.
    let _ = soon(stream.read_to_end(&mut answer)).await;
    answer
}

fn post(path: &str, body: &[u8]) -> Vec<u8> {
    let head = format!(
        "POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    [head.as_bytes(), body].concat()
}

/// Status and body.
async fn ask(peer: SocketAddrV6, request: &[u8]) -> (u16, Vec<u8>) {
    let answer = exchange(peer, request).await;
    let split = answer
        .windows(4)
        .position(|four| four == b"\r\n\r\n")
        .expect("an answer");
    let status = std::str::from_utf8(&answer[9..12]).unwrap().parse().unwrap();
    (status, answer[split + 4..].to_vec())
}

#[tokio::test]
async fn people_are_told_what_this_is_and_no_secrets() {
    let laptop = Laptop::start(Plan::default()).await;
    let (status, body) = ask(laptop.http, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await;
    let words = String::from_utf8(body).unwrap();
    assert_eq!(status, 200);
    assert!(words.contains("stiefel") && words.contains("boots from it"));
    assert!(!words.contains("täst-laptop") && !words.contains("blue"));
    let (status, body) = ask(laptop.http, b"HEAD / HTTP/1.1\r\nHost: x\r\n\r\n").await;
    assert_eq!((status, body.len()), (200, 0));
}

#[tokio::test]
async fn unknown_paths_and_methods_are_refused_in_words() {
    let mut laptop = Laptop::start(Plan::default()).await;
    let name = "0".repeat(32);
    for (request, expected) in [
        ("GET /etc/passwd", 404),
        ("GET //", 404),
        ("POST /session/", 404),
        ("POST /session/x/bundle/y", 404),
        ("POST /session/x/bundle", 404),
        (&format!("POST /session/{name}/bundle"), 404),
        (&format!("POST /session/{name}/goodbye"), 404),
        (&format!("GET /session/{name}/bundle"), 405),
        ("GET /session", 405),
        ("POST /", 405),
        ("DELETE /", 405),
        ("POST /session", 400),
    ] {
        let request = format!("{request} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n");
        let (status, body) = ask(laptop.http, request.as_bytes()).await;
        assert_eq!(status, expected, "{request}");
        assert!(body.ends_with(b"\n"), "{request}");
    }
    assert!(laptop.seen.try_recv().is_err());
}

#[tokio::test]
async fn what_is_too_long_is_refused() {
    let laptop = Laptop::start(Plan::default()).await;
    assert_eq!(ask(laptop.http, &post("/session", &[1; 513])).await.0, 413);
    let chunked = b"POST /session HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n201\r\n";
    let endless = [chunked.as_slice(), &[1; 0x201], b"\r\n"].concat();
    assert_eq!(ask(laptop.http, &endless).await.0, 413);
    let many = format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(33));
    assert_eq!(ask(laptop.http, many.as_bytes()).await.0, 431);
    let long = format!("GET / HTTP/1.1\r\na: {}\r\n\r\n", "b".repeat(20_000));
    let answer = exchange(laptop.http, long.as_bytes()).await;
    assert!(
        !answer.starts_with(b"HTTP/1.1 200"),
        "{}",
        String::from_utf8_lossy(&answer)
    );
}

#[tokio::test]
async fn another_version_is_told_both() {
    let laptop = Laptop::start(Plan::default()).await;
    let (status, body) = ask(laptop.http, &post("/session", &[9; OPENING])).await;
    assert_eq!(status, 409);
    let words = String::from_utf8(body).unwrap();
    assert!(words.contains("version 9") && words.contains("version 1"), "{words}");
}

#[tokio::test]
async fn a_recorded_handshake_begins_nothing() {
    let mut laptop = Laptop::start(Plan::default()).await;
    let challenge = laptop.challenge().await;
    let (initiator, opening) = Initiator::start(&laptop.key, &challenge, machine()).unwrap();
    let (status, answer) = ask(laptop.http, &post("/session", &opening)).await;
    assert_eq!((status, answer.len()), (200, OPENED));
    assert_eq!(ask(laptop.http, &post("/session", &opening)).await.0, 403, "replayed");
    let opened = initiator.finish(&answer).unwrap();

    // Someone who saw the session's name on the wire, but has no key.
    let path = format!("/session/{}/bundle", opened.session);
    assert_eq!(ask(laptop.http, &post(&path, &[0; BEGIN])).await.0, 403);
    assert_eq!(ask(laptop.http, &post(&path, &opened.begin)).await.0, 404, "one try");
    assert!(laptop.seen.try_recv().is_err(), "the host was never asked");
}

#[tokio::test]
async fn a_recorded_request_for_the_bundle_begins_no_second_session() {
    let mut laptop = Laptop::start(Plan::default()).await;
    let challenge = laptop.challenge().await;
    let (initiator, opening) = Initiator::start(&laptop.key, &challenge, machine()).unwrap();
    let (_, answer) = ask(laptop.http, &post("/session", &opening)).await;
    let opened = initiator.finish(&answer).unwrap();
    let path = format!("/session/{}/bundle", opened.session);
    assert_eq!(ask(laptop.http, &post(&path, &opened.begin)).await.0, 200);
    assert_eq!(ask(laptop.http, &post(&path, &opened.begin)).await.0, 404);
    assert!(matches!(laptop.next().await, Seen::Begin(_)));
    assert_eq!(laptop.next().await, Seen::Fetched(Ok(())));
    assert!(laptop.seen.try_recv().is_err());
}

#[tokio::test]
async fn unfinished_handshakes_are_few_and_short() {
    let limits = Limits {
        handshakes: 2,
        ..Limits::default()
    };
    let laptop = Laptop::start(Plan {
        limits,
        ..Plan::default()
    })
    .await;
    for expected in [200, 200, 503] {
        let challenge = laptop.challenge().await;
        let (_, opening) = Initiator::start(&laptop.key, &challenge, machine()).unwrap();
        assert_eq!(ask(laptop.http, &post("/session", &opening)).await.0, expected);
    }
    let limits = Limits {
        handshakes: 1,
        handshake: Duration::ZERO,
        ..Limits::default()
    };
    let laptop = Laptop::start(Plan {
        limits,
        ..Plan::default()
    })
    .await;
    for _ in 0..3 {
        let challenge = laptop.challenge().await;
        let (initiator, opening) = Initiator::start(&laptop.key, &challenge, machine()).unwrap();
        let (status, answer) = ask(laptop.http, &post("/session", &opening)).await;
        assert_eq!(status, 200, "old ones make room");
        let opened = initiator.finish(&answer).unwrap();
        let path = format!("/session/{}/bundle", opened.session);
        assert_eq!(
            ask(laptop.http, &post(&path, &opened.begin)).await.0,
            404,
            "and are too old to use"
        );
    }
}

#[tokio::test]
async fn whoever_sends_nothing_or_slowly_is_cut_off() {
    let limits = Limits {
        header: Duration::from_millis(100),
        body: Duration::from_millis(100),
        ..Limits::default()
    };
    let laptop = Laptop::start(Plan {
        limits,
        ..Plan::default()
    })
    .await;
    for beginning in ["", "G", "GET / HTTP/1.1\r\nHo"] {
        let answer = exchange(laptop.http, beginning.as_bytes()).await;
        assert!(!answer.starts_with(b"HTTP/1.1 2"), "{beginning:?}");
    }
    let half = "POST /session HTTP/1.1\r\nHost: x\r\nContent-Length: 81\r\n\r\nabc";
    assert_eq!(ask(laptop.http, half.as_bytes()).await.0, 408);
}

#[tokio::test]
async fn one_peer_cannot_take_all_connections() {
    let limits = Limits {
        per_peer: 2,
        ..Limits::default()
    };
    let laptop = Laptop::start(Plan {
        limits,
        ..Plan::default()
    })
    .await;
    let first = TcpStream::connect(laptop.http).await.unwrap();
    let _second = TcpStream::connect(laptop.http).await.unwrap();
    assert!(
        exchange(laptop.http, b"").await.is_empty(),
        "the third is closed at once"
    );
    drop(first);
    let get = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n";
    while !exchange(laptop.http, get).await.starts_with(b"HTTP/1.1 200") {}
}

#[tokio::test]
async fn whoever_does_not_take_the_bundle_is_cut_off() {
    let limits = Limits {
        stall: Duration::from_millis(100),
        ..Limits::default()
    };
    let parts = vec![(Part::Kernel, noise(64 << 20))];
    let mut laptop = Laptop::start(Plan {
        limits,
        parts,
        ..Plan::default()
    })
    .await;
    let challenge = laptop.challenge().await;
    let (initiator, opening) = Initiator::start(&laptop.key, &challenge, machine()).unwrap();
    let (_, answer) = ask(laptop.http, &post("/session", &opening)).await;
    let opened = initiator.finish(&answer).unwrap();
    let mut stream = TcpStream::connect(laptop.http).await.unwrap();
    let path = format!("/session/{}/bundle", opened.session);
    stream.write_all(&post(&path, &opened.begin)).await.unwrap();
    assert!(matches!(laptop.next().await, Seen::Begin(_)));
    let Seen::Fetched(Err(why)) = laptop.next().await else {
        panic!()
    };
    assert!(why.contains("taken nothing"), "{why}");
    let mut rest = Vec::new();
    let _ = soon(stream.read_to_end(&mut rest)).await;
    assert!(rest.len() < 64 << 20);
}
