//! What is on the disks that are lent, for the list: read by a thread for each disk, so that one that dies keeps nobody from
//! seeing the others.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use stiefel_sys::block::{Content, Disk};

/// How long a list waits for all disks.
const PATIENCE: Duration = Duration::from_secs(3);

/// A disk in one place, from one plug to the next.
type Plug = (String, Option<u64>);
type Read = dyn Fn(&Disk) -> Vec<Content> + Send + Sync;

/// Looks at disks.
pub(super) struct Parts {
    read: Arc<Read>,
    patience: Duration,
    shared: Arc<(Mutex<State>, Condvar)>,
}

#[derive(Default)]
struct State {
    /// A thread waits for these.
    busy: BTreeSet<Plug>,
    known: BTreeMap<Plug, Vec<Content>>,
}

impl Parts {
    /// `read` looks at one disk, and may take its time.
    pub(super) fn new(read: impl Fn(&Disk) -> Vec<Content> + Send + Sync + 'static) -> Self {
        Self {
            read: Arc::new(read),
            patience: PATIENCE,
            shared: Arc::default(),
        }
    }

    /// What is on each of these disks now, in their order; `None` for one that does not answer.
    pub(super) fn look(&self, disks: &[&Disk]) -> Vec<Option<Vec<Content>>> {
        let (state, done) = &*self.shared;
        let end = Instant::now() + self.patience;
        let asked: Vec<Plug> = disks.iter().map(|disk| plug(disk)).collect();
        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
        for (disk, plug) in disks.iter().zip(&asked) {
            // One thread for each, however often it is asked for.
            if state.busy.insert(plug.clone()) && !self.begin((*disk).clone()) {
                state.busy.remove(plug);
            }
        }
        while asked.iter().any(|plug| state.busy.contains(plug)) {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            (state, _) = done.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner);
        }
        state.known.retain(|plug, _| asked.contains(plug));
        let found = asked.iter().map(|plug| match state.busy.contains(plug) {
            true => None,
            false => Some(state.known.get(plug).cloned().unwrap_or_default()),
        });
        found.collect()
    }

    /// Begins to look at one; `false` if there is no thread for it.
    fn begin(&self, disk: Disk) -> bool {
        let (read, shared) = (Arc::clone(&self.read), Arc::clone(&self.shared));
        let look = move || {
            let found = read(&disk);
            let (state, done) = &*shared;
            let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
            state.busy.remove(&plug(&disk));
            state.known.insert(plug(&disk), found);
            done.notify_all();
        };
        std::thread::Builder::new().name("look".to_owned()).spawn(look).is_ok()
    }
}

fn plug(disk: &Disk) -> Plug {
    (disk.name.clone(), disk.sequence)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::disk;
    use std::sync::atomic::{AtomicUsize, Ordering};

    fn content(name: &str) -> Content {
        Content {
            name: name.to_owned(),
            size: 512,
            formats: vec!["ext4"],
            claims: Vec::new(),
            hibernated: false,
        }
    }

    #[test]
    fn a_disk_that_hangs_is_told_and_the_others_are_seen() {
        let (hold, held) = std::sync::mpsc::channel::<()>();
        let held = Mutex::new(held);
        let asked = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&asked);
        let mut parts = Parts::new(move |disk| {
            if disk.name == "dead" {
                counted.fetch_add(1, Ordering::Relaxed);
                let _ = held.lock().unwrap().recv();
            }
            vec![content(&disk.name)]
        });
        parts.patience = Duration::from_millis(200);
        let (dead, alive) = (disk("dead"), disk("alive"));
        for _ in 0..3 {
            let seen = parts.look(&[&dead, &alive]);
            assert!(seen[0].is_none());
            assert_eq!(seen[1].as_deref(), Some(&[content("alive")][..]));
        }
        assert_eq!(asked.load(Ordering::Relaxed), 1);
        // It comes back.
        parts.patience = Duration::from_secs(60);
        drop(hold);
        assert!(parts.look(&[&dead])[0].is_some());
    }
}
