//! The sessions' links that are up. A lock of its own: a session's change may last.

use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};

use stiefel_shared::discovery::LinkEvent;
use stiefel_shared::session::SessionName;

use crate::role::link::{Known, Up};

/// Each goes with its session.
#[derive(Default)]
pub(super) struct Links(Mutex<Vec<(SessionName, Up)>>);

impl Links {
    pub(super) fn add(&self, session: SessionName, link: Up) {
        self.lock().push((session, link));
    }

    /// Takes a session's link out; it is still up.
    pub(super) fn take(&self, session: SessionName) -> Option<Up> {
        let mut links = self.lock();
        let at = links.iter().position(|(known, _)| *known == session)?;
        Some(links.remove(at).1)
    }

    /// Tells all links of an interface that came or went; how those are known that this has changed, and what failed.
    pub(super) fn follow(
        &self,
        event: &LinkEvent,
        silent: &[SessionName],
    ) -> (Vec<(SessionName, Known)>, anyhow::Result<()>) {
        let (mut changed, mut outcome) = (Vec::new(), Ok(()));
        for (session, link) in self.lock().iter_mut() {
            match link.follow(event, silent.contains(session)) {
                Ok(true) => changed.push((*session, link.known().clone())),
                Ok(false) => {}
                Err(error) => outcome = Err(error),
            }
        }
        (changed, outcome)
    }

    /// The packet size of a session's link, in bytes.
    pub(super) fn mtu(&self, session: SessionName) -> u32 {
        self.of(session, |link| link.known().mtu).unwrap_or_default()
    }

    /// Sets the packet size of a session's link, in bytes; how it is known then.
    pub(super) fn set_mtu(&self, session: SessionName, mtu: u32) -> anyhow::Result<Option<Known>> {
        let set = self.of(session, |link| link.set_mtu(mtu).map(|_| link.known().clone()));
        set.transpose()
    }

    fn of<T>(&self, session: SessionName, work: impl FnOnce(&mut Up) -> T) -> Option<T> {
        // A NIC's driver may hang in what it is told by who has the lock; signs of life do not wait for that, and ask again.
        let mut links = match self.0.try_lock() {
            Ok(links) => links,
            Err(TryLockError::Poisoned(links)) => links.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        let mut links = links.iter_mut();
        links.find(|(known, _)| *known == session).map(|(_, link)| work(link))
    }

    fn lock(&self) -> MutexGuard<'_, Vec<(SessionName, Up)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
