use super::*;

#[test]
fn a_disk_that_may_not_be_written_any_more_allows_no_loan_that_writes_it() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    let mut disk = OnOffer {
        source: Source::File {
            path: file.path().to_owned(),
            size: 1 << 20,
        },
        names: Names::of_file("m", "disk.img", &|_| false),
        mode: Mode::ReadWrite { host: None },
        users: Vec::new(),
    };
    let granted = Mode::ReadWrite { host: None };
    for (mode, writes, then, stays) in [
        (&granted, true, &granted, true),
        (&granted, true, &Mode::ReadOnly, false),
        (&granted, true, &Mode::Snapshot, false),
        (&granted, false, &Mode::ReadOnly, true),
        (&Mode::Snapshot, true, &Mode::ReadOnly, true),
    ] {
        disk.mode = mode.clone();
        let (lent, _) = by_nbd(&disk, writes).unwrap();
        disk.mode = then.clone();
        assert_eq!(disk.allows(&lent), stays, "{mode:?} {writes} {then:?}");
    }
}

fn on_offer(size: u64) -> OnOffer {
    OnOffer {
        source: Source::File {
            path: "/nowhere/disk.img".into(),
            size,
        },
        names: Names::of_file("m", "disk.img", &|_| false),
        mode: Mode::ReadOnly,
        users: Vec::new(),
    }
}

#[test]
fn what_the_other_side_would_not_take_is_not_opened() {
    let desk = Desk::new("laptop".to_owned(), false);
    desk.offer(vec![on_offer(4096)]);
    assert!(desk.free("disk-img", false).is_ok());
    for size in [0, 1000] {
        desk.offer(vec![on_offer(size)]);
        let error = desk.free("disk-img", false).unwrap_err().to_string();
        assert!(error.contains("whole blocks"), "{error}");
    }
}

#[test]
fn what_is_opened_while_all_ends_is_not_lent() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    let mut disk = on_offer(1 << 20);
    if let Source::File { path, .. } = &mut disk.source {
        *path = file.path().to_owned();
    }
    let desk = Arc::new(Desk::new("laptop".to_owned(), false));
    desk.offer(vec![disk.clone()]);
    let begun = desk.begin().unwrap();
    let (tell, told) = std::sync::mpsc::channel();
    let ending = Arc::clone(&desk);
    let thread = std::thread::spawn(move || tell.send(ending.close()).unwrap());
    // It waits for the loan that is being opened.
    while !desk.lock().ended {
        std::thread::yield_now();
    }
    assert!(told.recv_timeout(Duration::from_millis(50)).is_err());
    let (share, _) = by_nbd(&disk, false).unwrap();
    let loan = LoanState {
        disk: "disk-img".to_owned(),
        borrower: "somebody".to_owned(),
        asked_by: ("stick".to_owned(), "0".repeat(32).parse().unwrap()),
        client: Ipv6Addr::LOCALHOST,
        export: share.export.clone(),
        writable: false,
        share,
        tunnel: Tunnel::none(),
        heard: Heard::new(Instant::now()),
        told: Stats::default(),
    };
    assert!(desk.enter("session".to_owned(), loan).is_err());
    assert!(desk.lock().loans.is_empty() && desk.begin().is_err());
    drop(begun);
    told.recv().unwrap().unwrap();
    thread.join().unwrap();
}

#[test]
fn a_loan_that_did_not_end_in_order_is_not_said_to_be_well_when_asked_again() {
    let desk = Desk::new("laptop".to_owned(), false);
    let lost = anyhow::anyhow!("the last flush failed");
    desk.lock().remember("one", Some(&lost));
    desk.lock().remember("two", None);
    assert!(desk.end("one").unwrap_err().to_string().contains("flush"));
    assert!(!desk.end("two").unwrap());
    for number in 0..MAX_LOANS {
        desk.lock().remember(&number.to_string(), Some(&lost));
    }
    assert!(!desk.end("one").unwrap(), "the last ones only");
}
