//! Keeps the link in place: a NIC that was plugged in again, a tunnel that somebody has altered.
//!
//! All that is done to network interfaces happens on a thread of its own. A driver may hang in what it is told, and until it is done
//! the kernel lets nobody near the network's settings; signs of life and the end of the desktop must not wait for that.

use std::fs::File;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread::JoinHandle;

use stiefel_shared::bundle::AttachSession;
use stiefel_sys::console::Console;
use stiefel_sys::link as sys_link;

use crate::link::{self, Place};
use crate::mtu;

/// What the thread works with.
struct Tools {
    console: Arc<Console>,
    session: Arc<AttachSession>,
    place: Arc<Place>,
    /// procfs.
    proc: File,
}

/// Mends the link when asked to.
pub(crate) struct Mender {
    tools: Arc<Tools>,
    running: Option<JoinHandle<anyhow::Result<Option<u32>>>>,
    /// What the running thread does about [`Mender::lower`].
    lowering: Option<u32>,
    /// The link has changed since it was looked at last.
    changed: bool,
    /// The NICs' packets are to be so small, in bytes.
    lower: Option<u32>,
    /// The link could not be mended at the last try, and why.
    failed: Option<String>,
    /// The NIC's index, as far as the tunnel was told.
    nic: Option<u32>,
}

impl Mender {
    /// A mender of the link at `place`; `proc` is an open procfs.
    pub(crate) fn new(console: &Arc<Console>, session: &Arc<AttachSession>, place: &Arc<Place>, proc: File) -> Self {
        Self {
            tools: Arc::new(Tools {
                console: Arc::clone(console),
                session: Arc::clone(session),
                place: Arc::clone(place),
                proc,
            }),
            running: None,
            lowering: None,
            changed: false,
            lower: None,
            failed: None,
            nic: None,
        }
    }

    /// Something has changed.
    pub(crate) const fn changed(&mut self) {
        self.changed = true;
    }

    /// The laptop takes only packets of `mtu` bytes now.
    pub(crate) const fn lower(&mut self, mtu: u32) {
        self.lower = Some(mtu);
    }

    /// Whether there will be something to do without any news.
    pub(crate) const fn is_busy(&self) -> bool {
        self.running.is_some() || self.failed.is_some() || self.lower.is_some()
    }

    /// Begins what is to be done, and sees what has come of it.
    pub(crate) fn step(&mut self) {
        if let Some(running) = self.running.take() {
            if !running.is_finished() {
                self.running = Some(running);
                return;
            }
            self.finished(running);
        }
        if !self.changed && self.lower.is_none() && self.failed.is_none() {
            return;
        }
        let (tools, nic, lower) = (Arc::clone(&self.tools), self.nic, self.lower);
        let work = move || tools.mend(nic, lower);
        match std::thread::Builder::new().name("mend".to_owned()).spawn(work) {
            Ok(thread) => {
                self.running = Some(thread);
                (self.changed, self.lowering) = (false, lower);
            }
            Err(error) => self.tools.console.error(&format!("no thread: {error}")),
        }
    }

    fn finished(&mut self, thread: JoinHandle<anyhow::Result<Option<u32>>>) {
        let failed = match thread.join() {
            Ok(Ok(nic)) => {
                // Without a NIC it was not done; and it may have been asked for more meanwhile.
                if nic.is_some() && self.lower == self.lowering {
                    self.lower = None;
                }
                self.nic = nic.or(self.nic);
                None
            }
            Ok(Err(error)) => {
                // The tunnel may not have been told.
                self.nic = None;
                Some(format!("{error:#}"))
            }
            Err(_) => Some("the keeper's thread has failed".to_owned()),
        };
        // Tried every second; said when it changes.
        if let Some(why) = failed.as_ref().filter(|_| failed != self.failed) {
            self.tools
                .console
                .error(&format!("the link to the laptop cannot be mended yet: {why}"));
        }
        self.failed = failed;
    }
}

impl Tools {
    /// Looks at everything; `told` is the NIC that the tunnel knows. The NIC's index, if it is there.
    fn mend(&self, told: Option<u32>, lower: Option<u32>) -> anyhow::Result<Option<u32>> {
        let (place, session) = (&self.place, &self.session);
        place.keep_parent(session)?;
        let index = match (place.bring_up(session)?, &place.namespace) {
            (Some(index), _) => index,
            (None, None) => return Ok(None),
            // In a namespace of its own it is not seen from here, but where it was plugged in again.
            (None, Some(_)) => {
                let appeared = sys_link::list()?
                    .into_iter()
                    .find(|nic| link::is_sessions(nic, session));
                let Some(nic) = appeared else { return Ok(None) };
                self.console.warn(&format!("the NIC {} is plugged in again", nic.name));
                place.take(&nic, session)?
            }
        };
        if told != Some(index)
            && let Some(tunnel) = &session.link.tunnel
        {
            place.redirect(session, tunnel, index)?;
        }
        if let Some(mtu) = lower {
            mtu::lower(&self.console, session, place, index, mtu)?;
        }
        place.repair(session, index, self.proc.as_fd())?;
        Ok(Some(index))
    }
}
