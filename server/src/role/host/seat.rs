//! Who has the disk: one desktop that writes it, or several guests.

use std::net::SocketAddrV6;
use std::sync::Arc;
use std::time::Instant;

use stiefel_shared::session::{MachineId, SessionName};
use stiefel_sys::custody::PLACES;

use crate::http::Begin;
use crate::role::End;
use crate::role::disk::{Base, Served};

/// The most desktops that can be guests at once. Their numbers are below it.
pub(super) const MAX_GUESTS: u8 = 8;
// PID 1 keeps what each has written, and the disk.
const _: () = assert!(MAX_GUESTS < PLACES);

/// A desktop that has the disk.
#[derive(Debug, Clone)]
pub(super) struct Holder {
    pub(super) session: SessionName,
    pub(super) peer: SocketAddrV6,
    pub(super) key: String,
    pub(super) machine: MachineId,
}

impl Holder {
    pub(super) fn new(request: &Begin) -> Self {
        Self {
            session: request.session,
            peer: request.peer,
            key: request.key.clone(),
            machine: request.machine,
        }
    }

    /// Whether a desktop is the one that has the disk already.
    pub(super) fn is(&self, request: &Begin) -> bool {
        self.key == request.key && self.machine == request.machine
    }
}

/// One desktop's session.
pub(super) struct Session {
    pub(super) holder: Holder,
    /// Its number among those that are there.
    pub(super) place: u8,
    pub(super) served: Served,
    /// It was said that its memory is nearly full.
    pub(super) warned: bool,
}

/// A guest that has said that it will be back.
pub(super) struct Returning {
    pub(super) key: String,
    pub(super) machine: MachineId,
    pub(super) since: Instant,
}

/// The sessions that are there: one that writes, or those of guests.
#[derive(Default)]
pub(super) struct Seat {
    pub(super) sessions: Vec<Session>,
    /// Key and machine of another desktop that the person at the laptop does not let in while this session lasts.
    pub(super) denied: Option<(String, MachineId)>,
    /// Guests that reboot.
    pub(super) returning: Vec<Returning>,
    /// How the laptop's turn ends once nobody is waited for any more.
    pub(super) leaving: Option<End>,
    /// Why nobody gets the disk any more before the laptop was restarted.
    pub(super) closed: Option<String>,
}

impl Seat {
    /// The desktop that has the disk; of guests the first.
    pub(super) fn holder(&self) -> Option<&Holder> {
        self.sessions.first().map(|session| &session.holder)
    }

    /// A session by its name.
    pub(super) fn find(&self, session: SessionName) -> Option<&Session> {
        self.sessions.iter().find(|known| known.holder.session == session)
    }

    /// The session of a desktop that asks for another.
    pub(super) fn of(&self, request: &Begin) -> Option<SessionName> {
        let mut holders = self.sessions.iter().map(|session| &session.holder);
        holders.find(|holder| holder.is(request)).map(|holder| holder.session)
    }

    /// Takes a session away.
    pub(super) fn take(&mut self, session: SessionName) -> Option<Session> {
        let mut sessions = self.sessions.iter();
        let at = sessions.position(|known| known.holder.session == session)?;
        Some(self.sessions.remove(at))
    }

    /// The lowest number that no session has.
    pub(super) fn free_place(&self) -> Option<u8> {
        (0..MAX_GUESTS).find(|place| self.sessions.iter().all(|session| session.place != *place))
    }

    /// What guests share, while there are any.
    pub(super) fn base(&self) -> Option<Arc<Base>> {
        self.sessions.iter().find_map(|session| session.served.base()).cloned()
    }
}
