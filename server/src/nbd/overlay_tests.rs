use super::*;
use proptest::prelude::*;
use stiefel_shared::nbd::STATE_ZERO;

const SIZE: u64 = 300_000;

/// A base of 0x5a with a hole.
fn base() -> (Arc<dyn Store>, tempfile::NamedTempFile) {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(SIZE).unwrap();
    file.as_file().write_all_at(&[0x5a; 200_000], 0).unwrap();
    (open_base(file.path()).unwrap(), file)
}

fn all(store: &dyn Store) -> Vec<u8> {
    let mut data = vec![0; length(SIZE)];
    store.read(&mut data, 0).unwrap();
    data
}

#[derive(Debug, Clone)]
enum Step {
    Write(u64, usize, u8),
    WriteNow(u64, usize, u8),
    Zero(u64, u64, bool),
    Trim(u64, u64),
    Sync,
    Resume,
}

fn step() -> impl Strategy<Value = Step> {
    let range = || (0..SIZE - 20_000, 1..20_000_u64);
    prop_oneof![
        (range(), any::<u8>()).prop_map(|((at, len), byte)| Step::Write(at, length(len), byte)),
        (range(), any::<u8>()).prop_map(|((at, len), byte)| Step::WriteNow(at, length(len), byte)),
        (range(), any::<bool>()).prop_map(|((at, len), keep)| Step::Zero(at, len, keep)),
        range().prop_map(|(at, len)| Step::Trim(at, len)),
        Just(Step::Sync),
        Just(Step::Resume),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]
    /// The overlay is one array of bytes, also for who goes on with it, and the base stays as it was.
    #[test]
    fn an_overlay_in_memory_is_one_array_of_bytes(steps in proptest::collection::vec(step(), 1..40)) {
        let (base, file) = base();
        let before = std::fs::read(file.path()).unwrap();
        let mut model = before.clone();
        let mut overlay = Overlay::memory(Arc::clone(&base), 1 << 30).unwrap();
        for step in steps {
            match step {
                Step::Write(at, len, byte) => {
                    overlay.write(&vec![byte; len], at).unwrap();
                    model[length(at)..][..len].fill(byte);
                }
                Step::WriteNow(at, len, byte) => {
                    let data = vec![byte; len];
                    let done = overlay.write_now(&[IoSlice::new(&data)], at).unwrap();
                    model[length(at)..][..done].fill(byte);
                }
                Step::Zero(offset, length, keep) => {
                    overlay.zero(Range { offset, length }, keep, false).unwrap();
                    model[super::length(offset)..][..super::length(length)].fill(0);
                }
                Step::Trim(offset, length) => {
                    overlay.trim(Range { offset, length }).unwrap();
                    let (from, to) = (offset.next_multiple_of(BLOCK), (offset + length) / BLOCK * BLOCK);
                    if from < to {
                        model[super::length(from)..super::length(to)].fill(0);
                    }
                }
                Step::Sync => overlay.sync().unwrap(),
                Step::Resume => {
                    let kept = overlay.upper().unwrap().try_clone().unwrap();
                    drop(overlay);
                    overlay = Overlay::resume(Arc::clone(&base), kept, Some(1 << 30)).unwrap();
                }
            }
            prop_assert!(all(&overlay) == model);
            let mut at_hand = vec![0; model.len()];
            let read = overlay.read_now(&mut [IoSliceMut::new(&mut at_hand)], 0);
            prop_assert!(at_hand[..read] == model[..read]);
            let mut at = 0;
            for extent in overlay.extents(Range { offset: 0, length: SIZE }, 9999) {
                let here = &model[at..][..length(extent.length)];
                prop_assert!(extent.state & STATE_ZERO == 0 || here.iter().all(|byte| *byte == 0));
                at += here.len();
            }
            prop_assert_eq!(at as u64, SIZE);
        }
        prop_assert!(std::fs::read(file.path()).unwrap() == before);
    }
}

#[test]
fn a_kept_overlay_is_sparse_and_found_again_and_used_by_one() {
    let (base, _file) = base();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("overlay");
    let overlay = Overlay::file(Arc::clone(&base), &path).unwrap();
    overlay.write(b"kept", 12_345).unwrap();
    overlay.sync().unwrap();
    assert!(path.metadata().unwrap().blocks() * 512 < 64 << 10);
    let second = Overlay::file(Arc::clone(&base), &path);
    assert!(matches!(second, Err(ExportError::InUse { .. })));
    let expected = all(&overlay);
    drop(overlay);
    assert!(all(&Overlay::file(base, &path).unwrap()) == expected);
}

#[test]
fn what_is_no_overlay_of_this_base_is_refused() {
    let (base, file) = base();
    let refused = Overlay::file(Arc::clone(&base), file.path());
    assert!(matches!(refused, Err(ExportError::InUse { .. })));
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("other");
    std::fs::write(&path, b"data of somebody").unwrap();
    assert!(Overlay::file(Arc::clone(&base), &path).is_err());
    assert_eq!(std::fs::read(&path).unwrap(), b"data of somebody");
    // One that lost data.
    let path = directory.path().join("lost");
    drop(Overlay::file(Arc::clone(&base), &path).unwrap());
    let upper = OpenOptions::new().write(true).open(&path).unwrap();
    upper.write_all_at(&[1], LOST_AT).unwrap();
    assert!(
        Overlay::file(base, &path)
            .unwrap_err()
            .to_string()
            .contains("cannot open")
    );
}

#[test]
fn memory_has_a_limit_and_trimming_gives_it_back() {
    let (base, _file) = base();
    let overlay = Overlay::memory(base, 100_000).unwrap();
    let full = loop {
        let used = overlay.upper().unwrap().metadata().unwrap().blocks() * 512;
        if let Err(error) = overlay.write(&[1; 4096], used.next_multiple_of(4096)) {
            break error;
        }
    };
    assert_eq!(full.kind(), io::ErrorKind::StorageFull);
    // What is there can still be overwritten.
    overlay.write(&[2; 8192], 3 * BLOCK).unwrap();
    assert!(all(&overlay)[12_288..20_480].iter().all(|byte| *byte == 2));
    let (used, limit) = overlay.filled().unwrap();
    assert!(limit == 100_000 && used <= limit && used > 80_000, "{used}");
    let whole = Range {
        offset: 0,
        length: SIZE,
    };
    overlay.trim(whole).unwrap();
    overlay.write(&[1; 4096], 0).unwrap();
}

#[test]
fn space_that_was_trimmed_counts_again_when_it_is_written() {
    let (base, _file) = base();
    let overlay = Overlay::memory(base, 100_000).unwrap();
    let whole = Range {
        offset: 0,
        length: SIZE,
    };
    // All blocks are the upper layer's now, and none takes memory.
    overlay.trim(whole).unwrap();
    let full = overlay.write(&[1; 150_000], 0).unwrap_err();
    assert_eq!(full.kind(), io::ErrorKind::StorageFull);
    let part = overlay.write_now(&[IoSlice::new(&[1; 150_000])], 0).unwrap_err();
    assert_eq!(part.kind(), io::ErrorKind::StorageFull);
}

#[test]
fn what_guests_share_must_not_be_open_for_writing() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let path = file.path();
    assert!(base_of(file.reopen().unwrap(), path).is_err());
    assert!(base_of(File::open(path).unwrap(), path).is_ok());
}

#[test]
fn guests_share_a_base_that_nobody_writes() {
    let (base, file) = base();
    let guests = [1, 2].map(|byte| {
        let overlay = Overlay::memory(Arc::clone(&base), 1 << 20).unwrap();
        overlay.write(&[byte; 10], 0).unwrap();
        overlay
    });
    assert_eq!((all(&guests[0])[0], all(&guests[1])[0]), (1, 2));
    assert!(matches!(
        FileStore::open(file.path(), Access::Write),
        Err(ExportError::InUse { .. })
    ));
}

#[test]
fn upper_layers_are_named_by_words() {
    let parse = |text: &str| text.parse::<Upper>();
    assert_eq!(parse("memory"), Ok(Upper::Memory(None)));
    assert_eq!(parse("memory:2G"), Ok(Upper::Memory(Some(2 << 30))));
    assert_eq!(parse("memory:4096"), Ok(Upper::Memory(Some(4096))));
    assert_eq!(parse("./memory"), Ok(Upper::File("./memory".into())));
    for wrong in [
        "",
        "memory:",
        "memory:x",
        "memory:0",
        "memory:99999999999T",
        "memory:1KK",
    ] {
        assert!(parse(wrong).is_err(), "{wrong}");
    }
}
