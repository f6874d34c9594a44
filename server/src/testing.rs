//! What the unit tests of several modules need.

use std::path::Path;

use stiefel_sys::block::Disk;

use crate::tree::Tree;

/// A disk of 1 MiB below /dev that tells nothing of itself.
pub(crate) fn disk(name: &str) -> Disk {
    Disk {
        name: name.to_owned(),
        path: Path::new("/dev").join(name),
        device: (8, 0),
        size: 1 << 20,
        logical_block_size: 512,
        physical_block_size: 512,
        model: None,
        serial: None,
        wwid: None,
        removable: false,
        read_only: false,
        rotational: false,
        sequence: None,
    }
}

/// A system of these files, in a folder that goes with the first value.
pub(crate) fn tree(files: &[(&str, &str)]) -> (tempfile::TempDir, Tree) {
    let dir = tempfile::tempdir().unwrap();
    let tree = Tree::new(dir.path());
    for (path, text) in files {
        std::fs::create_dir_all(tree.path(path).parent().unwrap()).unwrap();
        std::fs::write(tree.path(path), text).unwrap();
    }
    (dir, tree)
}
