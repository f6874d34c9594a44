//! Power cut at every single change that `install` and `uninstall` make; failures that are taken back; tricks with links.

use std::os::unix::fs::symlink;

use super::super::files::fuse;
use super::*;

/// A laptop on which all kinds of changes have to be made.
fn laptop() -> Laptop {
    let laptop = Laptop::new();
    for folder in ["root/var/lib", "root/etc/kernel/postinst.d", "root/etc/dracut.conf.d"] {
        fs::create_dir_all(laptop.path(folder)).unwrap();
    }
    laptop.write(PROGRAM, "somebody else's");
    laptop.write("root/etc/dracut.conf.d/90-stiefel.conf", "somebody else's, too");
    fs::set_permissions(laptop.path(PROGRAM), fs::Permissions::from_mode(0o750)).unwrap();
    laptop
}

/// Names what differs; the whole trees are long.
fn assert_same(found: &BTreeMap<String, (u32, Vec<u8>)>, wanted: &BTreeMap<String, (u32, Vec<u8>)>, when: &str) {
    let paths = found.keys().chain(wanted.keys());
    let differ: Vec<_> = paths.filter(|path| found.get(*path) != wanted.get(*path)).collect();
    assert!(differ.is_empty(), "{when}: {differ:?}");
}

/// Keys are random.
fn without_keys(laptop: &Laptop) -> BTreeMap<String, (u32, Vec<u8>)> {
    let mut tree = laptop.tree();
    for (path, (_, content)) in &mut tree {
        if path.ends_with(".key") || path.ends_with("installed.json") {
            content.clear();
        }
    }
    tree
}

/// Runs it with power for so many changes; says whether it got through.
fn with_power_for<T>(changes: u32, run: impl FnOnce() -> Result<T, InstallError>) -> bool {
    fuse::set(Some(changes));
    let result = run();
    let cut = fuse::is_blown();
    fuse::set(None);
    assert!(result.is_ok() || cut, "{:?}", result.err());
    result.is_ok()
}

#[test]
fn an_install_that_is_cut_off_anywhere_is_finished_by_the_next_and_undone_without_a_trace() {
    let reference = laptop();
    reference.install().unwrap();
    let installed = without_keys(&reference);
    let mut cuts = 0;
    while {
        let laptop = laptop();
        let before = laptop.tree();
        let through = with_power_for(cuts, || laptop.install());
        let _ = laptop.uninstall(true);
        assert_same(&laptop.tree(), &before, &format!("undone after {cuts} changes"));

        let laptop = self::laptop();
        with_power_for(cuts, || laptop.install());
        laptop.install().unwrap();
        assert_same(
            &without_keys(&laptop),
            &installed,
            &format!("finished after {cuts} changes"),
        );
        laptop.uninstall(true).unwrap();
        assert_same(
            &laptop.tree(),
            &before,
            &format!("finished and undone after {cuts} changes"),
        );
        !through
    } {
        cuts += 1;
    }
    assert!(cuts > 20, "{cuts}");
}

#[test]
fn an_uninstall_that_is_cut_off_anywhere_is_finished_by_the_next() {
    let mut cuts = 0;
    while {
        let laptop = laptop();
        let before = laptop.tree();
        laptop.install().unwrap();
        let through = with_power_for(cuts, || laptop.uninstall(true));
        let _ = laptop.uninstall(true);
        assert_same(&laptop.tree(), &before, &format!("after {cuts} changes"));
        !through
    } {
        cuts += 1;
    }
    assert!(cuts > 15, "{cuts}");
}

#[test]
fn an_upgrade_that_is_cut_off_anywhere_leaves_a_ramdisk_that_is_known_to_be_whole_or_not() {
    let mut cuts = 0;
    let mut mixed = 0;
    while {
        let laptop = laptop();
        laptop.install().unwrap();
        laptop.ramdisk("newer kernel", "newer ramdisk");
        let through = with_power_for(cuts, || laptop.refresh());
        let state = laptop.path("root/var/lib/stiefel");
        let manifest = stiefel_initrd_builder::ramdisk::Manifest::load(&state).unwrap();
        mixed += u32::from(manifest.verify(&state).is_err());
        laptop.refresh().unwrap();
        assert_eq!(fs::read(state.join("kernel")).unwrap(), b"newer kernel");
        !through
    } {
        cuts += 1;
    }
    assert!(mixed <= 2, "only between the three renames: {mixed}");
}

#[test]
fn an_upgrade_replaces_what_is_ours_and_unchanged_and_nothing_else() {
    let laptop = Laptop::new();
    assert!(matches!(laptop.refresh(), Err(InstallError::NotInstalled { .. })));
    laptop.install().unwrap();
    laptop.write("source/stiefel", "a newer program");
    laptop.ramdisk("newer kernel", "newer ramdisk");
    let unit = "root/etc/systemd/system/stiefel-autokexec.service";
    laptop.write(unit, "mine");
    laptop.write(
        "root/etc/stiefel/config.yaml",
        "trigger: {macs: ['00:e0:4c:68:01:02']}\n",
    );
    let before = laptop.tree();
    laptop.refresh().unwrap();
    let mut after = laptop.tree();
    for (path, content) in [
        ("usr/local/bin/stiefel", "a newer program"),
        ("var/lib/stiefel/kernel", "newer kernel"),
        ("var/lib/stiefel/ramdisk.cpio.zst", "newer ramdisk"),
    ] {
        assert_eq!(after[path].1, content.as_bytes(), "{path}");
        after.insert(path.to_owned(), before[path].clone());
    }
    for path in ["var/lib/stiefel/manifest", "var/lib/stiefel/installed.json"] {
        after.insert(path.to_owned(), before[path].clone());
    }
    assert_eq!(
        after, before,
        "no guard without being asked, and the changed unit stays"
    );
    let before = laptop.tree();
    laptop.refresh().unwrap();
    assert_eq!(laptop.tree(), before, "nothing to do");
}

#[test]
fn an_upgrade_with_a_broken_ramdisk_keeps_the_working_one() {
    let laptop = Laptop::new();
    laptop.install().unwrap();
    let before = laptop.tree();
    laptop.ramdisk("newer kernel", "newer ramdisk");
    laptop.write("source/kernel", "cut of");
    assert!(matches!(laptop.refresh(), Err(InstallError::Ramdisk(_))));
    assert_eq!(laptop.tree(), before);
}

#[test]
fn what_fails_before_anything_is_in_its_place_is_taken_back() {
    for blocked in [
        "root/usr/local/bin/.stiefel.stiefel-new",
        "root/etc/systemd/system/.stiefel-autokexec.service.stiefel-new",
        "root/var/lib/stiefel/.manifest.stiefel-new",
    ] {
        let laptop = laptop();
        // As where there is no space, or the file system is read-only: this file cannot be written.
        fs::create_dir_all(laptop.path(blocked).join("x")).unwrap();
        let before = laptop.tree();
        assert!(matches!(laptop.install(), Err(InstallError::Write { .. })), "{blocked}");
        assert_eq!(laptop.tree(), before, "{blocked}");
    }
    // The same when something is installed already: the record stays true.
    let laptop = laptop();
    laptop.install().unwrap();
    laptop.write("source/stiefel", "a newer program");
    fs::create_dir_all(laptop.path("root/usr/local/bin/.stiefel.stiefel-new/x")).unwrap();
    let before = laptop.tree();
    assert!(matches!(laptop.install(), Err(InstallError::Write { .. })));
    assert_eq!(laptop.tree(), before);
}

#[test]
fn links_that_lead_out_of_the_system_and_folders_of_others_are_refused() {
    let laptop = Laptop::new();
    fs::create_dir_all(laptop.path("outside")).unwrap();
    symlink(laptop.path("outside"), laptop.path("root/var")).unwrap();
    assert!(matches!(laptop.install(), Err(InstallError::Elsewhere { .. })));
    assert_eq!(fs::read_dir(laptop.path("outside")).unwrap().count(), 0);

    let laptop = Laptop::new();
    laptop.install().unwrap();
    // Somebody has put a link in the place of a folder since.
    fs::rename(laptop.path("root/etc/systemd"), laptop.path("systemd")).unwrap();
    symlink(laptop.path("systemd"), laptop.path("root/etc/systemd")).unwrap();
    let before = laptop.tree();
    assert!(matches!(laptop.uninstall(false), Err(InstallError::Elsewhere { .. })));
    assert_eq!(laptop.tree(), before);
    assert!(laptop.path("systemd/system/stiefel-autokexec.service").exists());

    let laptop = Laptop::new();
    fs::create_dir_all(laptop.path("root/etc/systemd")).unwrap();
    fs::set_permissions(laptop.path("root/etc/systemd"), fs::Permissions::from_mode(0o777)).unwrap();
    let error = laptop.install().unwrap_err();
    assert!(matches!(error, InstallError::NotOurs { .. }), "{error}");
    // A link as the file itself is not followed either.
    let laptop = Laptop::new();
    laptop.write("victim", "precious");
    fs::create_dir_all(laptop.path("root/usr/local/bin")).unwrap();
    symlink(laptop.path("victim"), laptop.path(PROGRAM)).unwrap();
    assert!(matches!(laptop.install(), Err(InstallError::InTheWay { .. })));
    assert_eq!(fs::read(laptop.path("victim")).unwrap(), b"precious");
}

#[test]
fn what_became_something_else_or_went_away_does_not_stop_an_uninstall() {
    let laptop = laptop();
    let before = laptop.tree();
    laptop.install().unwrap();
    fs::remove_dir_all(laptop.path("root/etc/systemd")).unwrap();
    laptop.write("root/etc/systemd", "a file");
    fs::remove_file(laptop.path("root/var/lib/stiefel/kernel")).unwrap();
    let hook = laptop.path("root/etc/kernel/postinst.d/zzz-stiefel");
    fs::remove_file(&hook).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &hook,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RWXU,
        0,
    )
    .unwrap();
    laptop.uninstall(true).unwrap();
    fs::remove_file(&hook).unwrap();
    fs::remove_file(laptop.path("root/etc/systemd")).unwrap();
    assert_eq!(laptop.tree(), before, "a pipe is not even opened");
}

#[test]
fn owner_mode_and_time_of_a_replaced_file_come_back() {
    let laptop = laptop();
    let program = laptop.path(PROGRAM);
    if rustix::process::geteuid().is_root() {
        std::os::unix::fs::chown(&program, Some(3), Some(4)).unwrap();
    }
    fs::set_permissions(&program, fs::Permissions::from_mode(0o4755)).unwrap();
    let facts = |meta: &fs::Metadata| (meta.uid(), meta.gid(), meta.mode(), meta.mtime(), meta.mtime_nsec());
    let before = program.metadata().unwrap();
    laptop.install().unwrap();
    let ours = program.metadata().unwrap();
    assert_eq!(
        (ours.mode() & 0o7777, ours.uid()),
        (0o755, rustix::process::geteuid().as_raw())
    );
    laptop.uninstall(true).unwrap();
    assert_eq!(facts(&program.metadata().unwrap()), facts(&before));
}

#[test]
fn a_packages_own_program_is_left_to_the_package_manager() {
    let laptop = Laptop::new();
    let before = laptop.tree();
    laptop.install().unwrap();
    assert!(laptop.path(PROGRAM).exists());
    // The package is installed over what was built by hand.
    laptop.write("root/usr/bin/stiefel", "the program");
    laptop.install().unwrap();
    assert!(!laptop.path(PROGRAM).exists());
    let unit = laptop.tree()["etc/systemd/system/stiefel-autokexec.service"].1.clone();
    assert!(
        String::from_utf8(unit)
            .unwrap()
            .contains("ExecStart=/usr/bin/stiefel autokexec\n")
    );
    laptop.uninstall(true).unwrap();
    assert_eq!(fs::read(laptop.path("root/usr/bin/stiefel")).unwrap(), b"the program");
    fs::remove_dir_all(laptop.path("root/usr")).unwrap();
    assert_eq!(laptop.tree(), before);
}

#[test]
fn two_at_a_time_are_refused() {
    let laptop = Laptop::new();
    let held = lock(&Tree::new(&laptop.path("root"))).unwrap();
    assert!(matches!(laptop.install(), Err(InstallError::Busy)));
    drop(held);
    laptop.install().unwrap();
}
