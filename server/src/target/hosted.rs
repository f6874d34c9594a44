//! The [`Desk`] as HTTP's host: questions come out of a session's handshake, and each is answered on a thread that may wait for a
//! disk.

use std::sync::Arc;

use stiefel_shared::bundle::Goodbye;
use stiefel_shared::lend::{Ask, Loan};
use stiefel_shared::session::SessionName;

use super::desk::Desk;
use super::say::say;
use crate::http::{Begin, Bundle, Refusal, SessionHost};

/// The desk as HTTP's host.
pub(super) struct Hosted(pub(super) Arc<Desk>);

impl SessionHost for Hosted {
    async fn begin(&self, _request: Begin) -> Result<Bundle, Refusal> {
        let reason = "this machine lends its disks, and nothing is booted from it; see `stiefel attach`".to_owned();
        Err(Refusal { reason })
    }

    async fn lend(&self, request: Begin, ask: Ask) -> Result<Loan, Refusal> {
        let desk = Arc::clone(&self.0);
        let answer = tokio::task::spawn_blocking(move || match ask {
            Ask::List => Ok(desk.list()),
            Ask::Attach { disk, read_write, nvme } => desk.attach(&request, &disk, read_write, nvme),
        });
        let refused = |error: anyhow::Error| Refusal {
            reason: format!("{error:#}"),
        };
        answer.await.map_err(|error| refused(error.into()))?.map_err(refused)
    }

    async fn goodbye(&self, session: SessionName, _goodbye: Goodbye) -> Result<(), Refusal> {
        let desk = Arc::clone(&self.0);
        let ended = tokio::task::spawn_blocking(move || desk.end(&session.to_string()));
        let reason = match ended.await {
            Ok(Ok(_)) => return Ok(()),
            Ok(Err(error)) => format!("{error:#}"),
            Err(error) => error.to_string(),
        };
        Err(Refusal { reason })
    }

    fn parted(&self, session: SessionName, _goodbye: Goodbye) {
        say(format_args!("session {session} is over"));
    }
}
