//! Reads the sticks' keys; one that others could have read is refused, for it is no secret any more.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use stiefel_shared::key::{MAX_KEY_FILE, StickKey};
use zeroize::Zeroizing;

use super::CollectError;

/// Reads `*.key` in `folder`, which must belong to root or to `owner`.
pub(crate) fn read(folder: &Path, owner: u32) -> Result<Vec<StickKey>, CollectError> {
    let unreadable = |source| CollectError::Read {
        path: folder.to_owned(),
        source,
    };
    let mut paths = Vec::new();
    match std::fs::read_dir(folder) {
        Ok(entries) => {
            for entry in entries {
                paths.push(entry.map_err(unreadable)?.path());
            }
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(unreadable(error)),
    }
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "key"));
    paths.sort();
    if paths.is_empty() {
        return Err(CollectError::NoKeys {
            folder: folder.to_owned(),
        });
    }
    paths.iter().map(|path| read_key(path, owner)).collect()
}

fn read_key(path: &Path, owner: u32) -> Result<StickKey, CollectError> {
    let unreadable = |source| CollectError::Read {
        path: path.to_owned(),
        source,
    };
    let file = File::open(path).map_err(unreadable)?;
    // Of the opened file, so that what was checked is what is read.
    let meta = file.metadata().map_err(unreadable)?;
    let mode = meta.mode() & 0o7777;
    if mode & 0o177 != 0 || (meta.uid() != 0 && meta.uid() != owner) {
        return Err(CollectError::KeyNotPrivate {
            path: path.to_owned(),
            mode,
            owner: meta.uid(),
        });
    }
    // As large as ever needed from the start: a growing vector would leave copies of the secret behind.
    let limit = MAX_KEY_FILE + 1;
    let mut content = Zeroizing::new(Vec::with_capacity(usize::try_from(limit).unwrap_or(0)));
    file.take(limit).read_to_end(&mut content).map_err(unreadable)?;
    let name = path.file_stem().unwrap_or_default().to_string_lossy();
    StickKey::parse(&name, &content).map_err(|source| CollectError::Key {
        path: path.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt;

    struct Keys(tempfile::TempDir);

    impl Keys {
        fn new(names: &[&str]) -> Self {
            let keys = Self(tempfile::tempdir().unwrap());
            for name in names {
                let file = keys.0.path().join(name);
                fs::write(&file, StickKey::generate("x").unwrap().to_file().as_bytes()).unwrap();
                fs::set_permissions(&file, Permissions::from_mode(0o600)).unwrap();
            }
            keys
        }

        fn owner(&self) -> u32 {
            fs::metadata(self.0.path()).unwrap().uid()
        }

        fn read(&self) -> Result<Vec<StickKey>, CollectError> {
            read(self.0.path(), self.owner())
        }
    }

    #[test]
    fn keys_are_named_after_their_files_and_other_files_left_alone() {
        let keys = Keys::new(&["blue.key", "red.key", "red.key~", "note.txt"]);
        let names: Vec<_> = keys.read().unwrap().iter().map(|key| key.name.clone()).collect();
        assert_eq!(names, ["blue", "red"]);
    }

    #[test]
    fn without_keys_the_command_that_makes_one_is_named() {
        for folder in [Keys::new(&[]).0.path().to_owned(), "/nonexistent/stiefel".into()] {
            let error = read(&folder, 0).unwrap_err();
            assert!(matches!(error, CollectError::NoKeys { .. }) && error.to_string().contains("key new"));
        }
    }

    #[test]
    fn a_key_that_others_can_read_is_refused_with_the_chmod() {
        let keys = Keys::new(&["blue.key"]);
        let file = keys.0.path().join("blue.key");
        for mode in [0o640, 0o604, 0o622, 0o700] {
            fs::set_permissions(&file, Permissions::from_mode(mode)).unwrap();
            assert!(keys.read().unwrap_err().to_string().contains("chmod 0600"), "{mode:o}");
        }
        fs::set_permissions(&file, Permissions::from_mode(0o400)).unwrap();
        assert!(keys.read().is_ok());
    }

    #[test]
    fn a_key_of_another_user_is_refused() {
        let keys = Keys::new(&["blue.key"]);
        if keys.owner() == 0 && std::os::unix::fs::chown(keys.0.path().join("blue.key"), Some(12345), None).is_err() {
            return; // Root in a sandbox that cannot give files away.
        }
        let asking = if keys.owner() == 0 { 0 } else { keys.owner() + 1 };
        assert!(matches!(
            read(keys.0.path(), asking),
            Err(CollectError::KeyNotPrivate { .. })
        ));
    }

    #[test]
    fn a_spoiled_key_is_named_and_not_shown() {
        let keys = Keys::new(&["blue.key"]);
        let file = keys.0.path().join("blue.key");
        fs::write(&file, "stiefel-key-1 5ecret\n").unwrap();
        let error = keys.read().unwrap_err();
        assert!(error.to_string().contains("blue.key") && !format!("{error:?}").contains("5ecret"));
    }
}
