//! Whether a file can be put somewhere without a link, or somebody else, deciding where it really goes.
//!
//! `install` and `uninstall` run as root. A link in the path may lead out of the tree below `--root`; a folder that another
//! user may change could be swapped for a link between the look and the write. Both are refused by name.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::InstallError;
use crate::tree::Tree;

/// Checks the folders of a path of the tree, as far as they are there.
///
/// # Errors
/// [`InstallError::Elsewhere`], [`InstallError::NotOurs`], [`InstallError::InTheWay`], [`InstallError::Read`].
pub(super) fn check(tree: &Tree, path: &str) -> Result<(), InstallError> {
    let unreadable = |place: &Path| {
        let path = place.to_owned();
        move |source| InstallError::Read { path, source }
    };
    let top = tree.path("/");
    let top = top.canonicalize().map_err(unreadable(&top))?;
    let mut folders: Vec<&Path> = Path::new(path).ancestors().skip(1).collect();
    folders.reverse();
    for folder in folders.into_iter().skip(1) {
        let place = tree.path(folder);
        let meta = match place.symlink_metadata() {
            Ok(meta) => meta,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(source) => return Err(unreadable(&place)(source)),
        };
        check_owner(&place, meta.uid())?;
        let real = match place.canonicalize() {
            Ok(real) => real,
            // A link that leads nowhere.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(InstallError::InTheWay { path: place });
            }
            Err(source) => return Err(unreadable(&place)(source)),
        };
        if !real.starts_with(&top) {
            return Err(InstallError::Elsewhere { path: place, real });
        }
        if !real.is_dir() {
            return Err(InstallError::InTheWay { path: place });
        }
        for folder in real.ancestors().take_while(|folder| *folder != top) {
            let meta = folder.metadata().map_err(unreadable(folder))?;
            check_owner(folder, meta.uid())?;
            if meta.mode() & 0o002 != 0 {
                return Err(InstallError::NotOurs {
                    path: folder.to_owned(),
                });
            }
        }
    }
    Ok(())
}

fn check_owner(place: &Path, owner: u32) -> Result<(), InstallError> {
    if owner == 0 || owner == rustix::process::geteuid().as_raw() {
        Ok(())
    } else {
        Err(InstallError::NotOurs { path: place.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};

    #[test]
    fn links_within_the_tree_are_followed_and_others_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        for folder in ["root/usr/lib", "root/etc", "outside"] {
            fs::create_dir_all(dir.path().join(folder)).unwrap();
        }
        let tree = Tree::new(&root);
        assert!(check(&tree, "/etc/absent/folder/file").is_ok());
        symlink("usr/lib", root.join("lib")).unwrap();
        assert!(check(&tree, "/lib/file").is_ok(), "as on every distribution");
        symlink(dir.path().join("outside"), root.join("etc/stiefel")).unwrap();
        let error = check(&tree, "/etc/stiefel/config.yaml").unwrap_err();
        assert!(matches!(error, InstallError::Elsewhere { .. }), "{error}");
        symlink("nowhere", root.join("etc/systemd")).unwrap();
        fs::write(root.join("etc/udev"), "").unwrap();
        for path in ["/etc/systemd/x", "/etc/udev/rules.d/x"] {
            let error = check(&tree, path).unwrap_err();
            assert!(
                matches!(error, InstallError::InTheWay { .. } | InstallError::Read { .. }),
                "{error}"
            );
        }
    }

    #[test]
    fn folders_that_others_may_change_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("etc/open/below");
        fs::create_dir_all(&folder).unwrap();
        let tree = Tree::new(dir.path());
        assert!(check(&tree, "/etc/open/below/file").is_ok());
        fs::set_permissions(dir.path().join("etc/open"), fs::Permissions::from_mode(0o777)).unwrap();
        assert!(matches!(
            check(&tree, "/etc/open/below/file"),
            Err(InstallError::NotOurs { .. })
        ));
        fs::set_permissions(dir.path().join("etc/open"), fs::Permissions::from_mode(0o755)).unwrap();
        if rustix::process::geteuid().is_root() {
            std::os::unix::fs::chown(&folder, Some(1000), None).unwrap();
            let error = check(&tree, "/etc/open/below/file").unwrap_err();
            assert!(error.to_string().contains("etc/open/below"), "{error}");
        }
    }
}
