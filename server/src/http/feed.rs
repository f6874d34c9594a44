//! Feeds the bundle into a response: a few frames at a time, as the desktop takes them.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use hyper::body::{Body, Frame};
use stiefel_shared::session::{CHUNK, Sender, SessionName, StreamError};
use tokio::io::AsyncReadExt;
use tokio::sync::mpsc::error::SendTimeoutError;
use tokio::sync::{Notify, mpsc};

use super::route::Sessions;
use super::{Begin, Bundle, FeedError, Limits, SessionHost};

/// How many frames wait to be sent; with one being made and hyper's buffer that bounds the memory of a transfer.
const QUEUE: usize = 8;
/// How much of a part is read at once, in bytes.
const READ: usize = 8 * CHUNK;

/// A response's body.
pub struct Frames(mpsc::Receiver<io::Result<Bytes>>);

impl Body for Frames {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        self.0
            .poll_recv(cx)
            .map(|next| next.map(|bytes| bytes.map(Frame::data)))
    }
}

/// Begins the session and streams its bundle from a task of its own; `cut` breaks the connection if that fails.
pub fn feed<H: SessionHost>(
    host: Arc<H>,
    sessions: Arc<Sessions>,
    begin: Begin,
    sender: Sender,
    limits: Limits,
    cut: Arc<Notify>,
) -> Frames {
    let (queue, frames) = mpsc::channel(QUEUE);
    tokio::spawn(async move {
        let session = begin.session;
        let mut feeder = Feeder { sender, queue, limits };
        let outcome = feeder.run(&*host, &sessions, begin).await;
        if !matches!(outcome, Ok(()) | Err(FeedError::Refused { .. })) {
            // A body that just ended would look complete to a proxy; and a stalled connection never asks for more.
            let _ = feeder.queue.try_send(Err(io::ErrorKind::BrokenPipe.into()));
            cut.notify_one();
        }
        host.fetched(session, outcome);
    });
    Frames(frames)
}

struct Feeder {
    sender: Sender,
    queue: mpsc::Sender<io::Result<Bytes>>,
    limits: Limits,
}

impl Feeder {
    async fn run<H: SessionHost>(&mut self, host: &H, sessions: &Sessions, begin: Begin) -> Result<(), FeedError> {
        let session = begin.session;
        let bundle = match self.wait_for(host.begin(begin)).await? {
            Ok(bundle) => bundle,
            Err(refusal) => {
                let frame = self.sender.refusal(&refusal.reason);
                self.send(frame).await?;
                return Err(FeedError::Refused { reason: refusal.reason });
            }
        };
        if bundle.parts.len() != bundle.manifest.payload.parts.len() {
            return Err(FeedError::Parts);
        }
        sessions.insert(session, bundle.manifest.control.clone());
        self.send_bundle(host, session, bundle).await
    }

    /// Waits for the host to its end, and tells the desktop to wait meanwhile.
    async fn wait_for<T>(&mut self, begun: impl Future<Output = T>) -> Result<T, FeedError> {
        tokio::pin!(begun);
        loop {
            tokio::select! {
                outcome = &mut begun => return Ok(outcome),
                () = tokio::time::sleep(self.limits.waiting) => {}
            }
            let frame = self.sender.waiting();
            if let Err(error) = self.send(frame).await {
                // What has begun must not be left half done, nor be reported as failed before it is there.
                begun.await;
                return Err(error);
            }
        }
    }

    async fn send_bundle<H: SessionHost>(
        &mut self,
        host: &H,
        session: SessionName,
        bundle: Bundle,
    ) -> Result<(), FeedError> {
        let total = bundle.manifest.total();
        let mut done = 0;
        let frame = self.sender.manifest(&bundle.manifest);
        self.send(frame).await?;
        let mut buffer = vec![0; READ];
        for (entry, file) in bundle.manifest.payload.parts.iter().zip(bundle.parts) {
            let failed = |source| FeedError::Read {
                part: entry.part.name(),
                source,
            };
            let mut file = tokio::fs::File::from_std(file).take(entry.size);
            let mut left = entry.size;
            while left > 0 {
                let length = file.read(&mut buffer).await.map_err(failed)?;
                if length == 0 {
                    return Err(failed(io::ErrorKind::UnexpectedEof.into()));
                }
                for chunk in buffer.get(..length).unwrap_or_default().chunks(CHUNK) {
                    let frame = self.sender.data(chunk);
                    self.send(frame).await?;
                }
                let length = u64::try_from(length).unwrap_or(left);
                left = left.saturating_sub(length);
                done += length;
                host.progress(session, done, total);
            }
        }
        let frame = self.sender.end();
        self.send(frame).await
    }

    async fn send(&mut self, frame: Result<Vec<u8>, StreamError>) -> Result<(), FeedError> {
        let frame = Bytes::from(frame.map_err(FeedError::Stream)?);
        match self.queue.send_timeout(Ok(frame), self.limits.stall).await {
            Ok(()) => Ok(()),
            Err(SendTimeoutError::Closed(_)) => Err(FeedError::Gone),
            Err(SendTimeoutError::Timeout(_)) => Err(FeedError::Stalled),
        }
    }
}
