//! Plain TCP with the patterns of the measurements: the most that a disk behind the same link could have.

use std::io::{Read, Write};
use std::net::{Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use super::machine::wait;
use crate::result::{LONG, Measure, SHORT, Way};

/// The laptop sends as long as the desktop listens.
const SOURCE: u16 = 7001;
/// The laptop takes what comes, and says at the end how fast it came.
const SINK: u16 = 7002;
/// The laptop answers each [`REQUEST`] with an [`ANSWER`].
const ECHO: u16 = 7003;
/// Bytes of a request, and of an answer: those of a short read by NBD.
const REQUEST: usize = 28;
const ANSWER: usize = 16 + SHORT;
/// Bytes for one call of the kernel.
const PIECE: usize = LONG / 4;
/// For a new connection to find its pace.
const PACE: Duration = Duration::from_millis(300);
/// No answer for so long: the link is broken.
const SILENCE: Duration = Duration::from_secs(60);

/// Begins to answer on all ports.
pub(crate) fn serve() -> std::io::Result<()> {
    for (port, work) in [
        (SOURCE, source as fn(TcpStream) -> std::io::Result<()>),
        (SINK, sink),
        (ECHO, echo),
    ] {
        let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port))?;
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                // The desktop ends a connection whenever its time is over.
                std::thread::spawn(move || work(stream));
            }
        });
    }
    Ok(())
}

fn source(mut stream: TcpStream) -> std::io::Result<()> {
    let piece = vec![0x5a; PIECE];
    loop {
        stream.write_all(&piece)?;
    }
}

fn sink(mut stream: TcpStream) -> std::io::Result<()> {
    let rate = receive(&stream, None)?;
    stream.write_all(&rate.to_be_bytes())
}

fn echo(mut stream: TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let (mut request, answer) = ([0; REQUEST], [0x5a; ANSWER]);
    loop {
        stream.read_exact(&mut request)?;
        stream.write_all(&answer)?;
    }
}

/// Waits until the laptop is there.
pub(crate) fn wait_for_laptop(way: Way, patience: Duration) -> anyhow::Result<()> {
    wait("the laptop", patience, || {
        Ok(TcpStream::connect_timeout(&way.at(ECHO), Duration::from_secs(5)).ok())
    })?;
    Ok(())
}

/// Bytes or answers per second.
pub(crate) fn measure(way: Way, measure: Measure, time: Duration) -> anyhow::Result<f64> {
    Ok(match measure {
        Measure::Read => receive(&connect(way.at(SOURCE))?, Some(time))?,
        Measure::Write => send(&connect(way.at(SINK))?, time)?,
        Measure::Random1 => ask(way, 1, time)?,
        Measure::Random8 => ask(way, 8, time)?,
    })
}

fn connect(at: SocketAddr) -> std::io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&at, SILENCE)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(SILENCE))?;
    stream.set_write_timeout(Some(SILENCE))?;
    Ok(stream)
}

/// Bytes per second once the connection has found its pace; until the other end stops, or for so long.
fn receive(mut stream: &TcpStream, time: Option<Duration>) -> std::io::Result<f64> {
    let mut piece = vec![0; PIECE];
    let begun = Instant::now();
    while begun.elapsed() < PACE && stream.read(&mut piece)? != 0 {}
    let (begun, mut total) = (Instant::now(), 0);
    while time.is_none_or(|time| begun.elapsed() < time) {
        match stream.read(&mut piece)? {
            0 => break,
            count => total += count,
        }
    }
    Ok(total as f64 / begun.elapsed().as_secs_f64())
}

/// The same, as the other end sees it: what this kernel has taken is not yet there.
fn send(mut stream: &TcpStream, time: Duration) -> std::io::Result<f64> {
    let piece = vec![0x5a; PIECE];
    let begun = Instant::now();
    while begun.elapsed() < PACE + time {
        stream.write_all(&piece)?;
    }
    stream.shutdown(Shutdown::Write)?;
    let mut rate = [0; 8];
    stream.read_exact(&mut rate)?;
    Ok(f64::from_be_bytes(rate))
}

fn ask(way: Way, connections: usize, time: Duration) -> std::io::Result<f64> {
    let streams = (0..connections).map(|_| connect(way.at(ECHO)));
    let streams: Vec<_> = streams.collect::<std::io::Result<_>>()?;
    let begun = Instant::now();
    let counts = std::thread::scope(|scope| {
        let threads: Vec<_> = streams
            .into_iter()
            .map(|mut stream| {
                scope.spawn(move || {
                    let (request, mut answer, mut count) = ([0; REQUEST], [0; ANSWER], 0_u32);
                    while begun.elapsed() < time {
                        stream.write_all(&request)?;
                        stream.read_exact(&mut answer)?;
                        count += 1;
                    }
                    Ok(count)
                })
            })
            .collect();
        let done = threads.into_iter().map(|thread| {
            let count: std::io::Result<u32> = thread.join().unwrap_or_else(|_| Err(std::io::ErrorKind::Other.into()));
            count
        });
        done.collect::<std::io::Result<Vec<u32>>>()
    })?;
    Ok(f64::from(counts.iter().sum::<u32>()) / begun.elapsed().as_secs_f64())
}
