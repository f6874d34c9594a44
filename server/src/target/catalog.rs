//! What the NBD server gives out: one export per disk, each by its name.
//!
//! A disk that can be written is for one initiator at a time: another address does not see it while it is in use, and a new
//! connection from the same address ends that address's earlier ones (`ExportOptions::single`).

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::nbd::{Export, Gate, Listed};

/// Who holds an export when no client does: the catalogue and the share.
const IDLE: usize = 2;

/// All exports at this moment.
#[derive(Default)]
pub(super) struct Catalog(Mutex<BTreeMap<String, Entry>>);

struct Entry {
    export: Arc<Export>,
    /// Who had a writable one last.
    writer: Option<IpAddr>,
}

impl Catalog {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Entry>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives an export out from now on.
    pub(super) fn insert(&self, export: Arc<Export>) {
        let entry = Entry {
            export: Arc::clone(&export),
            writer: None,
        };
        self.lock().insert(export.name().to_owned(), entry);
    }

    /// Gives it out no more; who has it keeps it until `Server::drop_export`.
    pub(super) fn remove(&self, name: &str) {
        self.lock().remove(name);
    }
}

/// What `peer` may have, or have again, under a name.
fn find<'a>(entries: &'a mut BTreeMap<String, Entry>, name: &str, peer: SocketAddr) -> Option<&'a mut Entry> {
    let entry = match (name, entries.len()) {
        // With one disk there is no doubt which is meant.
        ("", 1) => entries.values_mut().next(),
        _ => entries.get_mut(name),
    }?;
    entry.is_for(peer).then_some(entry)
}

impl Entry {
    /// Whether nobody else has it who must have it alone.
    fn is_for(&self, peer: SocketAddr) -> bool {
        let others = self.writer != Some(peer.ip().to_canonical());
        let busy = self.export.single() && Arc::strong_count(&self.export) > IDLE;
        !(busy && others)
    }
}

impl Gate for Catalog {
    fn admit(&self, _peer: SocketAddr) -> bool {
        true
    }

    fn export(&self, name: &str, peer: SocketAddr) -> Option<Arc<Export>> {
        let mut entries = self.lock();
        let entry = find(&mut entries, name, peer)?;
        entry.writer = Some(peer.ip().to_canonical());
        Some(Arc::clone(&entry.export))
    }

    fn look(&self, name: &str, peer: SocketAddr) -> Option<Arc<Export>> {
        find(&mut self.lock(), name, peer).map(|entry| Arc::clone(&entry.export))
    }

    fn list(&self, peer: SocketAddr) -> Vec<Listed> {
        let entries = self.lock();
        let listed = entries.values().filter(|entry| entry.is_for(peer)).map(|entry| Listed {
            name: entry.export.name().to_owned(),
            description: entry.export.description().to_owned(),
        });
        listed.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nbd::ExportOptions;

    fn export(name: &str, single: bool) -> (Arc<Export>, tempfile::NamedTempFile) {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(4096).unwrap();
        let options = ExportOptions {
            name: name.to_owned(),
            read_only: !single,
            single,
            ..ExportOptions::default()
        };
        (Export::open(file.path(), options).unwrap(), file)
    }

    fn at(address: &str) -> SocketAddr {
        address.parse().unwrap()
    }

    #[test]
    fn the_only_disk_is_the_default_and_of_several_none_is() {
        let catalog = Catalog::default();
        let (a, _a) = export("a", false);
        let (b, _b) = export("b", false);
        catalog.insert(Arc::clone(&a));
        assert!(catalog.export("", at("[::1]:9")).is_some());
        catalog.insert(b);
        assert!(catalog.export("", at("[::1]:9")).is_none());
        assert!(catalog.export("b", at("[::1]:9")).is_some());
        assert_eq!(catalog.list(at("[::1]:9")).len(), 2);
        catalog.remove("b");
        assert!(catalog.export("b", at("[::1]:9")).is_none());
    }

    #[test]
    fn a_writable_disk_is_for_one_address_until_it_has_let_go() {
        let catalog = Catalog::default();
        let (disk, _file) = export("a", true);
        catalog.insert(Arc::clone(&disk));
        let held = catalog.export("a", at("[::ffff:10.0.0.1]:9"));
        assert!(held.is_some());
        assert!(catalog.export("a", at("10.0.0.2:9")).is_none());
        assert!(catalog.list(at("10.0.0.2:9")).is_empty());
        assert_eq!(catalog.list(at("10.0.0.1:9")).len(), 1);
        assert!(catalog.export("a", at("10.0.0.1:77")).is_some());
        drop(held);
        assert!(catalog.export("a", at("10.0.0.2:9")).is_some());
    }

    #[test]
    fn to_ask_about_a_writable_disk_takes_it_from_nobody() {
        let catalog = Catalog::default();
        let (disk, _file) = export("a", true);
        catalog.insert(Arc::clone(&disk));
        assert!(catalog.look("a", at("10.0.0.2:9")).is_some());
        let held = catalog.export("a", at("10.0.0.1:9"));
        assert!(held.is_some());
        assert!(catalog.look("a", at("10.0.0.2:9")).is_none(), "in use");
        assert!(catalog.look("a", at("10.0.0.1:9")).is_some());
    }

    #[test]
    fn a_disk_for_reading_is_for_everybody_at_once() {
        let catalog = Catalog::default();
        let (disk, _file) = export("a", false);
        catalog.insert(disk);
        let held = (
            catalog.export("a", at("10.0.0.1:9")),
            catalog.export("a", at("10.0.0.2:9")),
        );
        assert!(held.0.is_some() && held.1.is_some());
    }
}
