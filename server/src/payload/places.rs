//! Where the files of a boot loader's file system are in the tree: it knows file systems by UUID, and no mounts.

use stiefel_shared::loader::grub::{BY_LABEL, BY_UUID, Location, OWN};

use crate::tree::{self, Tree};

/// Where boot loaders' file systems usually are.
const USUAL: [&str; 4] = ["/", "/boot", "/efi", "/boot/efi"];

/// A folder of a file system, and where in the tree it is.
type Mounted = (String, String);

/// The places of one boot loader.
pub(super) struct Places<'a> {
    pub tree: &'a Tree,
    /// The boot loader's own folder.
    pub own: String,
}

impl Places<'_> {
    /// The tree's path of a file that the boot loader sees; it is there, and inside of that file system.
    ///
    /// # Errors
    /// What is wrong, in words, with the path as the subject.
    pub fn file(&self, place: &Location) -> Result<String, String> {
        self.find(place, |tree, path| tree.is_file(path))
    }

    /// As [`Self::file`], for what `is_there` asks.
    pub fn find(&self, place: &Location, is_there: impl Fn(&Tree, &str) -> bool) -> Result<String, String> {
        let path = &place.path;
        if path.split('/').any(|part| part == "..") {
            return Err(format!("{path}, which leads upwards"));
        }
        let mounted = self.mounted(&place.device).map_err(|why| format!("{path} {why}"))?;
        mounted
            .iter()
            .filter_map(|(root, point)| {
                let rest = path.strip_prefix(root.trim_end_matches('/'))?;
                let inside = rest.starts_with('/');
                inside.then(|| format!("{}{rest}", point.trim_end_matches('/')))
            })
            .find(|path| is_there(self.tree, path))
            .ok_or_else(|| format!("{path}, which is not there"))
    }

    /// What of a device is in the tree.
    fn mounted(&self, device: &str) -> Result<Vec<Mounted>, String> {
        if device == OWN {
            return Ok(vec![("/".to_owned(), self.own.clone())]);
        }
        let known = device
            .strip_prefix(BY_UUID)
            .map(|uuid| (tree::BY_UUID, uuid))
            .or_else(|| device.strip_prefix(BY_LABEL).map(|label| (tree::BY_LABEL, label)));
        let mounts = self.tree.mounts();
        let usual = || USUAL.map(|point| ("/".to_owned(), point.to_owned())).into();
        let Some((folder, name)) = known.filter(|_| !mounts.is_empty()) else {
            return Ok(usual());
        };
        let device = self.tree.device_by(folder, name);
        let mut found: Vec<Mounted> = Vec::new();
        let mut relative: Vec<Mounted> = Vec::new();
        for mount in mounts.iter().rev() {
            let source = self.tree.block_name(&mount.source);
            let source = source.or_else(|| self.tree.block_name(&mount.device));
            if device.is_some() && source == device {
                found.push((mount.root.clone(), mount.point.clone()));
                // SUSE's GRUB counts from the default subvolume.
                if mount.kind == "btrfs" && mount.root != "/" && USUAL.contains(&mount.point.as_str()) {
                    relative.push(("/".to_owned(), mount.point.clone()));
                }
            } else if mount.kind == "zfs" {
                // `bpool/BOOT/ubuntu` is `/BOOT/ubuntu@` to GRUB.
                let dataset = mount.source.split_once('/').map_or("", |(_, dataset)| dataset);
                relative.push((format!("/{dataset}@"), mount.point.clone()));
            }
        }
        found.extend(relative);
        if found.is_empty() {
            return Err(format!("is on the file system {name}, which is not mounted"));
        }
        Ok(found)
    }
}
