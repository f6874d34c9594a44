use super::*;
use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, symlink};

struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Three pieces and a bit, the second of zeroes.
    fn source(&self) -> Vec<u8> {
        let mut bytes: Vec<u8> = (0..3 * PIECE + 1000).map(|i| u8::try_from(i % 251).unwrap()).collect();
        bytes[PIECE..2 * PIECE].fill(0);
        fs::write(self.path("source"), &bytes).unwrap();
        bytes
    }

    fn copy(&self) -> anyhow::Result<Report> {
        self.copy_heard(|_| Ok(()))
    }

    fn copy_heard(&self, mut hears: impl FnMut(Progress) -> anyhow::Result<()>) -> anyhow::Result<Report> {
        let job = Copy {
            source: &self.path("source"),
            target: &self.path("target"),
            state: &self.path("state"),
            skip_errors: false,
        };
        copy(&job, &mut hears)
    }
}

#[test]
fn a_copy_is_the_same_and_leaves_zeroes_out() {
    let place = Place::new();
    let bytes = place.source();
    let report = place.copy().unwrap();
    assert_eq!(fs::read(place.path("target")).unwrap(), bytes);
    assert_eq!(
        (report.size, report.zeroes, report.resumed),
        (bytes.len() as u64, PIECE as u64, 0)
    );
    let expected: String = hash(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(report.sha256, expected);
    assert!(!place.path("state").exists());
    let blocks = fs::metadata(place.path("target")).unwrap().blocks();
    assert!(blocks * 512 < bytes.len() as u64);
}

#[test]
fn old_bytes_do_not_shine_through_where_the_source_is_zero() {
    let place = Place::new();
    let bytes = place.source();
    fs::write(place.path("target"), vec![0xff; bytes.len() + 5]).unwrap();
    place.copy().unwrap();
    assert_eq!(fs::read(place.path("target")).unwrap(), bytes);
}

/// The state as after the first two pieces.
fn interrupted(place: &Place, bytes: &[u8]) {
    let file = fs::File::create(place.path("target")).unwrap();
    file.set_len(bytes.len() as u64).unwrap();
    file.write_all_at(&bytes[..2 * PIECE], 0).unwrap();
    let size = bytes.len() as u64;
    let mut state = State::create(&place.path("state"), size, hash(&bytes[..PIECE])).unwrap();
    let lost = vec![(PIECE as u64 + 4096, 8192), (2 * PIECE as u64 - 4096, 4096)];
    state
        .add(&[
            (hash(&bytes[..PIECE]), Vec::new()),
            (hash(&bytes[PIECE..2 * PIECE]), lost),
        ])
        .unwrap();
    // Torn in the middle of the third.
    let file = fs::File::options().append(true).open(place.path("state")).unwrap();
    (&file).write_all(&[1; 7]).unwrap();
}

#[test]
fn an_interrupted_copy_goes_on_behind_what_is_there() {
    let place = Place::new();
    let bytes = place.source();
    interrupted(&place, &bytes);
    let report = place.copy().unwrap();
    assert_eq!(report.resumed, 2 * PIECE as u64);
    // What the earlier try could not read is said again.
    let piece = PIECE as u64;
    assert_eq!(report.unreadable, [(piece + 4096, 8192), (2 * piece - 4096, 4096)]);
    assert_eq!(fs::read(place.path("target")).unwrap(), bytes);
}

#[test]
fn another_source_or_target_is_not_gone_on_with() {
    let place = Place::new();
    let mut bytes = place.source();
    interrupted(&place, &bytes);
    let other = fs::File::options().write(true).open(place.path("target")).unwrap();
    other.write_all_at(&[9; 10], PIECE as u64 + 5).unwrap();
    assert!(place.copy().unwrap_err().to_string().contains("does not hold"));
    bytes[0] ^= 1;
    fs::write(place.path("source"), &bytes).unwrap();
    assert!(place.copy().unwrap_err().to_string().contains("another source"));
}

#[test]
fn a_source_that_has_changed_behind_its_first_piece_is_not_gone_on_with() {
    let place = Place::new();
    let mut bytes = place.source();
    interrupted(&place, &bytes);
    // The third piece, without losses.
    let mut state = State::earlier(&place.path("state"), bytes.len() as u64)
        .unwrap()
        .unwrap();
    state = state.go_on(bytes.len() as u64).unwrap();
    state.add(&[(hash(&bytes[2 * PIECE..3 * PIECE]), Vec::new())]).unwrap();
    drop(state);
    let target = fs::File::options().write(true).open(place.path("target")).unwrap();
    target
        .write_all_at(&bytes[2 * PIECE..3 * PIECE], 2 * PIECE as u64)
        .unwrap();
    // A disk that was cloned from the same image.
    bytes[2 * PIECE + 9] ^= 1;
    fs::write(place.path("source"), &bytes).unwrap();
    let error = place.copy().unwrap_err().to_string();
    assert!(error.contains("not what it was"), "{error}");
}

#[test]
fn a_source_that_has_gone_is_no_disk_of_bad_sectors() {
    let place = Place::new();
    let source = place.path("source");
    place.source();
    let job = Copy {
        source: &source,
        target: &place.path("target"),
        state: &place.path("state"),
        skip_errors: true,
    };
    // As when it is pulled out: nothing of it can be read any more.
    let mut pull = |progress| {
        if let Progress::Copied(..) = progress {
            File::options().write(true).open(&source)?.set_len(0)?;
        }
        Ok(())
    };
    let error = copy(&job, &mut pull).unwrap_err().to_string();
    assert!(error.contains("does not answer any more"), "{error}");
    assert!(place.path("state").exists());
}

#[test]
fn a_target_that_changes_under_the_copy_is_noticed() {
    let place = Place::new();
    place.source();
    let target = place.path("target");
    let mut done = false;
    let mut meddle = |progress| {
        if let Progress::Compared(..) = progress
            && !std::mem::replace(&mut done, true)
        {
            let file = fs::File::options().write(true).open(&target).unwrap();
            file.write_all_at(&[1], 2 * PIECE as u64).unwrap();
        }
        Ok(())
    };
    let error = place.copy_heard(&mut meddle).unwrap_err();
    assert!(error.to_string().contains("differs"), "{error}");
}

#[test]
fn nothing_is_written_before_it_begins() {
    let place = Place::new();
    place.source();
    fs::write(place.path("target"), "old").unwrap();
    let ended = |at: Progress| {
        let mut hears = |progress| match progress == at {
            true => bail!("no"),
            false => Ok(()),
        };
        place.copy_heard(&mut hears).unwrap_err().to_string()
    };
    assert_eq!(ended(Progress::Begins(true)), "no");
    assert_eq!(fs::read(place.path("target")).unwrap(), b"old");
    assert!(!place.path("state").exists());
    // What cannot be is refused before anybody is asked.
    fs::remove_file(place.path("target")).unwrap();
    assert_eq!(ended(Progress::Begins(false)), "no");
    fs::create_dir(place.path("target")).unwrap();
    assert!(ended(Progress::Begins(true)).contains("neither a file"));
}

/// What a copy says that asks, when `meanwhile` is done before the answer.
fn asked(place: &Place, meanwhile: impl Fn()) -> String {
    let mut hears = |progress| {
        if let Progress::Begins(_) = progress {
            meanwhile();
        }
        Ok(())
    };
    place.copy_heard(&mut hears).unwrap_err().to_string()
}

#[test]
fn what_changes_while_the_question_is_asked_is_not_written() {
    let place = Place::new();
    place.source();
    let (target, other) = (place.path("target"), place.path("other"));
    fs::write(&target, "old").unwrap();
    fs::write(&other, "another").unwrap();
    let moved = asked(&place, || fs::rename(&other, &target).unwrap());
    assert!(moved.contains("is another one"), "{moved}");
    let gone = asked(&place, || fs::remove_file(&target).unwrap());
    assert!(gone.contains("has gone"), "{gone}");
    let come = asked(&place, || fs::write(&target, "come").unwrap());
    assert!(come.contains("has come meanwhile"), "{come}");
    assert_eq!(fs::read(&target).unwrap(), b"come");
    let grow = || {
        File::options()
            .write(true)
            .open(place.path("source"))
            .unwrap()
            .set_len(PIECE as u64 * 9)
            .unwrap()
    };
    let grown = asked(&place, grow);
    assert!(grown.contains("something writes to it"), "{grown}");
    assert_eq!(fs::read(&target).unwrap(), b"come");
    assert!(!place.path("state").exists());
}

#[test]
fn a_target_that_is_moved_away_is_no_complete_copy() {
    let place = Place::new();
    place.source();
    let mut hears = |progress| {
        if let Progress::Copied(0, _) = progress {
            let _ = fs::rename(place.path("target"), place.path("moved"));
        }
        Ok(())
    };
    let error = place.copy_heard(&mut hears).unwrap_err().to_string();
    assert!(error.contains("has gone") && place.path("state").exists(), "{error}");
    // And nothing is there to go on with.
    assert!(place.copy().unwrap_err().to_string().contains("is not there"));
}

#[test]
fn another_target_than_before_keeps_its_size() {
    let place = Place::new();
    let bytes = place.source();
    for other in [vec![7; 5], vec![7; 2 * bytes.len()]] {
        interrupted(&place, &bytes);
        fs::write(place.path("target"), &other).unwrap();
        let error = place.copy().unwrap_err().to_string();
        assert!(error.contains("does not hold"), "{error}");
        assert!(fs::read(place.path("target")).unwrap() == other);
        fs::remove_file(place.path("state")).unwrap();
    }
}

#[test]
fn a_link_to_where_nothing_is_yet_is_followed() {
    let place = Place::new();
    let bytes = place.source();
    symlink(place.path("there"), place.path("target")).unwrap();
    place.copy().unwrap();
    assert_eq!(fs::read(place.path("there")).unwrap(), bytes);
}

#[test]
fn no_state_is_no_target() {
    let place = Place::new();
    place.source();
    let job = Copy {
        source: &place.path("source"),
        target: &place.path("target"),
        state: &place.path("no-folder/state"),
        skip_errors: false,
    };
    assert!(copy(&job, &mut |_| Ok(())).is_err());
    assert!(!place.path("target").exists());
}

#[test]
fn a_copy_whose_source_hangs_can_be_ended() {
    let place = Place::new();
    let mut state = State::create(&place.path("state"), 9, [0; 32]).unwrap();
    let target = Target::create(&place.path("target")).unwrap();
    // Nothing comes, and it is not over.
    let (_send, receive) = sync_channel(1);
    let mut hears = |_| bail!("enough");
    let ended = write_pieces(&receive, 0, 9, &target, &mut state, &mut hears);
    assert_eq!(ended.unwrap_err().to_string(), "enough");
}

#[test]
fn a_copy_that_is_ended_keeps_what_it_has() {
    let place = Place::new();
    let bytes = place.source();
    let piece = PIECE as u64;
    let mut hears = |progress| match progress {
        Progress::Copied(done, _) if done == 2 * piece => bail!("enough"),
        _ => Ok(()),
    };
    assert_eq!(place.copy_heard(&mut hears).unwrap_err().to_string(), "enough");
    assert_eq!(place.copy().unwrap().resumed, 2 * piece);
    assert_eq!(fs::read(place.path("target")).unwrap(), bytes);
}

#[test]
fn a_file_is_not_copied_onto_itself() {
    let place = Place::new();
    place.source();
    fs::hard_link(place.path("source"), place.path("target")).unwrap();
    assert!(place.copy().unwrap_err().to_string().contains("itself"));
}

#[test]
fn the_state_of_a_file_lies_beside_it() {
    let state = usual_state(Path::new("/tmp/a/disk.img"), Path::new("/var/lib/stiefel"));
    assert_eq!(state, Path::new("/tmp/a/disk.img.copy-state"));
    let state = usual_state(Path::new("/dev/not-plugged-in-yet"), Path::new("/var/lib/stiefel"));
    assert_eq!(state, Path::new("/var/lib/stiefel/copy-not-plugged-in-yet.state"));
}

#[test]
fn what_a_loop_device_stands_on_is_no_target() {
    let root = tempfile::tempdir().unwrap();
    let file = |name: &str| {
        let path = root.path().join(name);
        fs::write(&path, "x").unwrap();
        (fs::metadata(&path).unwrap(), path)
    };
    let ((image, at), (other, aside), (source, _)) = (file("image"), file("other"), file("source"));
    let folder = root.path().join("block/loop0/loop");
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join("backing_file"), format!("{}\n", at.display())).unwrap();
    let error = target::may_be_written(root.path(), &at, &image, &source).unwrap_err();
    assert!(error.to_string().contains("/dev/loop0 stands on"), "{error}");
    target::may_be_written(root.path(), &aside, &other, &source).unwrap();
}
