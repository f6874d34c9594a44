//! Looking into an image from outside, while no machine runs from it (e2fsck(8), debugfs(8)).

use std::path::Path;

use super::image::ROOT_OFFSET;
use super::{DiskError, command_error};
use crate::process;

/// What e2fsck says when the journal still has to be replayed: the file system was not unmounted.
const JOURNAL_NOT_EMPTY: &str = "skipping journal recovery";

/// The root file system within an image, as e2fsprogs name it.
fn root_in(image: &Path) -> String {
    format!("{}?offset={ROOT_OFFSET}", image.display())
}

/// Demands that the root file system in `image` is clean and its journal empty. Changes nothing.
///
/// # Errors
/// When it is not clean, with what e2fsck says.
pub fn fsck_clean(image: &Path) -> Result<(), DiskError> {
    const ACTION: &str = "check the file system";
    let mut command = process::command("e2fsck").map_err(command_error(ACTION))?;
    command.args(["-f", "-n"]).arg(root_in(image));
    let output = process::output(&mut command).map_err(command_error(ACTION))?;
    let said = process::said(&output);
    if output.status.success() && !said.contains(JOURNAL_NOT_EMPTY) {
        return Ok(());
    }
    Err(DiskError::NotClean {
        image: image.to_owned(),
        said,
    })
}

/// Reads the file `path` in the root file system of `image`.
///
/// # Errors
/// When there is no such file. Symbolic links in the last part of the path are not followed.
pub fn read_file(image: &Path, path: &str) -> Result<Vec<u8>, DiskError> {
    const ACTION: &str = "read a file in the image";
    if !path.starts_with('/') || path.contains(['"', '\n']) {
        return Err(DiskError::GuestPath { path: path.to_owned() });
    }
    let mut command = process::command("debugfs").map_err(command_error(ACTION))?;
    command.args(["-R", &format!("cat \"{path}\"")]).arg(root_in(image));
    let output = process::run(&mut command).map_err(command_error(ACTION))?;
    // debugfs ends well even so; its standard error has its version, then the complaint.
    let complaints = String::from_utf8_lossy(&output.stderr)
        .lines()
        .any(|line| !line.starts_with("debugfs "));
    if complaints {
        return Err(DiskError::NoFile {
            image: image.to_owned(),
            path: path.to_owned(),
        });
    }
    Ok(output.stdout)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};

    use super::*;

    fn image() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let tree = dir.path().join("tree");
        fs::create_dir_all(tree.join("etc")).unwrap();
        fs::write(tree.join("etc/a file"), b"con\0tent").unwrap();
        let image = dir.path().join("image");
        File::create(&image).unwrap().set_len(9 << 20).unwrap();
        let mut mkfs = process::command("mkfs.ext4").unwrap();
        mkfs.args(["-q", "-F", "-E", &format!("offset={ROOT_OFFSET}"), "-d"])
            .arg(&tree)
            .arg(&image)
            .arg("8M");
        process::run(&mut mkfs).unwrap();
        dir
    }

    #[test]
    fn a_file_is_read_from_the_image() {
        let dir = image();
        assert_eq!(
            read_file(&dir.path().join("image"), "/etc/a file").unwrap(),
            b"con\0tent"
        );
    }

    #[test]
    fn a_file_that_is_not_there_is_an_error() {
        let dir = image();
        let result = read_file(&dir.path().join("image"), "/etc/none");
        assert!(matches!(result, Err(DiskError::NoFile { .. })), "{result:?}");
    }

    #[test]
    fn a_damaged_file_system_is_not_clean() {
        let dir = image();
        let path = dir.path().join("image");
        fsck_clean(&path).unwrap();
        let mut debugfs = process::command("debugfs").unwrap();
        debugfs.args(["-w", "-R", "clri \"/etc/a file\""]).arg(root_in(&path));
        process::run(&mut debugfs).unwrap();
        assert!(matches!(fsck_clean(&path), Err(DiskError::NotClean { .. })));
    }
}
