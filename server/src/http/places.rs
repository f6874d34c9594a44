//! How many connections there may be, in all and from one address.

use std::collections::HashMap;
use std::net::{Ipv6Addr, SocketAddrV6};
use std::sync::{Arc, Mutex};

use super::lock;

type Peer = (Ipv6Addr, u32);

/// The places, shared by all connections.
pub struct Places {
    all: usize,
    per_peer: usize,
    taken: Mutex<HashMap<Peer, usize>>,
}

/// One place; free again when dropped.
pub struct Place {
    places: Arc<Places>,
    peer: Peer,
}

impl Places {
    /// So many in all, so many for one address.
    pub fn new(all: usize, per_peer: usize) -> Arc<Self> {
        Arc::new(Self {
            all,
            per_peer,
            taken: Mutex::default(),
        })
    }

    /// A place, if there is one for this peer.
    pub fn take(places: &Arc<Self>, peer: &SocketAddrV6) -> Option<Place> {
        let peer = (*peer.ip(), peer.scope_id());
        let mut taken = lock(&places.taken);
        let own = taken.get(&peer).copied().unwrap_or(0);
        if own >= places.per_peer || taken.values().sum::<usize>() >= places.all {
            return None;
        }
        taken.insert(peer, own + 1);
        Some(Place {
            places: Arc::clone(places),
            peer,
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = lock(&self.places.taken);
        if let Some(own) = taken.get_mut(&self.peer) {
            *own -= 1;
            if *own == 0 {
                taken.remove(&self.peer);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_cannot_take_all_places() {
        let places = Places::new(3, 2);
        let at = |last: u16| SocketAddrV6::new(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, last), last, 0, 2);
        let first = Places::take(&places, &at(1)).unwrap();
        let _second = Places::take(&places, &at(1)).unwrap();
        assert!(Places::take(&places, &at(1)).is_none());
        let _other = Places::take(&places, &at(2)).unwrap();
        assert!(Places::take(&places, &at(3)).is_none());
        drop(first);
        let _again = Places::take(&places, &at(3)).unwrap();
        assert_eq!(lock(&places.taken).len(), 3);
    }
}
