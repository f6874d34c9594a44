//! Tests of installing into and uninstalling from a small file tree.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use sha2::{Digest, Sha256};

use super::record::Kind;
use super::*;

mod cut;

/// A laptop's file tree, and what is to be installed.
struct Laptop {
    dir: tempfile::TempDir,
}

impl Laptop {
    fn new() -> Self {
        let laptop = Self {
            dir: tempfile::tempdir().unwrap(),
        };
        laptop.write("source/stiefel", "the program");
        laptop.ramdisk("kernel", "ramdisk");
        laptop.write("root/etc/hostname", "laptop\n");
        laptop
    }

    /// What `stiefel build` leaves.
    fn ramdisk(&self, kernel: &str, ramdisk: &str) {
        self.write("source/kernel", kernel);
        self.write("source/ramdisk.cpio.zst", ramdisk);
        let part = |text: &str| {
            let digest: String = Sha256::digest(text).iter().map(|byte| format!("{byte:02x}")).collect();
            format!("{{\"bytes\": {}, \"sha256\": \"{digest}\"}}", text.len())
        };
        let manifest = format!(
            "{{\"stiefel_version\": \"0\", \"kernel_version\": \"6.1\", \"kernel\": {}, \"ramdisk\": {}, \"unpacked_bytes\": 1,
             \"modules\": 1, \"wireguard\": true, \"firmware\": 0, \"missing_firmware\": 0, \"classes\": []}}",
            part(kernel),
            part(ramdisk)
        );
        self.write("source/manifest", &manifest);
    }

    fn path(&self, path: &str) -> PathBuf {
        self.dir.path().join(path)
    }

    fn write(&self, path: &str, text: &str) {
        let path = self.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn options(&self) -> InstallOptions {
        InstallOptions {
            program: self.path("source/stiefel"),
            ramdisk: Some(self.path("source")),
            yes: true,
            ..InstallOptions::new(self.path("root"))
        }
    }

    fn install(&self) -> Result<(), InstallError> {
        install(&self.options())
    }

    /// As `stiefel upgrade` does once it has built a ramdisk.
    fn refresh(&self) -> Result<(), InstallError> {
        install(&InstallOptions {
            yes: false,
            refresh: true,
            ..self.options()
        })
    }

    fn uninstall(&self, purge: bool) -> Result<(), InstallError> {
        uninstall(&UninstallOptions {
            root: self.path("root"),
            purge,
            yes: true,
            dry_run: false,
        })
    }

    /// Everything below the root: mode and content, or target.
    fn tree(&self) -> BTreeMap<String, (u32, Vec<u8>)> {
        let mut tree = BTreeMap::new();
        let root = self.path("root");
        let mut waiting = vec![root.clone()];
        while let Some(folder) = waiting.pop() {
            for entry in fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                let meta = path.symlink_metadata().unwrap();
                let content = if meta.is_symlink() {
                    fs::read_link(&path)
                        .unwrap()
                        .to_string_lossy()
                        .into_owned()
                        .into_bytes()
                } else if meta.is_dir() {
                    waiting.push(path.clone());
                    Vec::new()
                } else {
                    fs::read(&path).unwrap()
                };
                tree.insert(
                    path.strip_prefix(&root).unwrap().display().to_string(),
                    (meta.mode() & 0o7777, content),
                );
            }
        }
        tree
    }
}

#[test]
fn everything_is_put_in_place_with_its_mode() {
    let laptop = Laptop::new();
    laptop.install().unwrap();
    let tree = laptop.tree();
    for (path, mode) in [
        ("usr/local/bin/stiefel", 0o755),
        ("etc/systemd/system/stiefel-autokexec.service", 0o644),
        ("etc/xdg/autostart/stiefel-notify.desktop", 0o644),
        ("etc/stiefel/config.yaml", 0o644),
        ("etc/stiefel/keys", 0o700),
        ("etc/stiefel/keys/stick.key", 0o600),
        ("var/lib/stiefel/kernel", 0o644),
        ("var/lib/stiefel/ramdisk.cpio.zst", 0o644),
        ("var/lib/stiefel/manifest", 0o644),
        ("var/lib/stiefel/installed.json", 0o644),
    ] {
        assert_eq!(tree.get(path).map(|(mode, _)| *mode), Some(mode), "{path}");
    }
    let enabled = &tree["etc/systemd/system/multi-user.target.wants/stiefel-autokexec.service"].1;
    assert_eq!(enabled, b"/etc/systemd/system/stiefel-autokexec.service");
    assert!(!tree.keys().any(|path| path.contains("stiefel-new")));
    assert!(crate::collect::read_keys(&laptop.path("root/etc/stiefel/keys")).is_ok());
}

#[test]
fn a_second_install_changes_nothing() {
    let laptop = Laptop::new();
    laptop.install().unwrap();
    let first = laptop.tree();
    laptop.install().unwrap();
    assert_eq!(laptop.tree(), first);
}

#[test]
fn uninstall_leaves_no_trace_but_configuration_and_keys() {
    let laptop = Laptop::new();
    let before = laptop.tree();
    laptop.install().unwrap();
    laptop.uninstall(false).unwrap();
    let mut after = laptop.tree();
    for path in [
        "etc/stiefel",
        "etc/stiefel/config.yaml",
        "etc/stiefel/keys",
        "etc/stiefel/keys/stick.key",
    ] {
        assert!(after.remove(path).is_some(), "{path}");
    }
    assert_eq!(after, before);
    laptop.uninstall(true).unwrap();
    assert_eq!(laptop.tree(), before);
}

#[test]
fn purge_takes_keys_that_were_made_later_as_well() {
    let laptop = Laptop::new();
    let before = laptop.tree();
    laptop.install().unwrap();
    laptop.write("root/etc/stiefel/keys/other.key", "key");
    laptop.uninstall(true).unwrap();
    assert_eq!(laptop.tree(), before);
}

#[test]
fn a_dry_run_changes_nothing() {
    let laptop = Laptop::new();
    let before = laptop.tree();
    install(&InstallOptions {
        dry_run: true,
        ..laptop.options()
    })
    .unwrap();
    assert_eq!(laptop.tree(), before);
}

#[test]
fn configuration_and_keys_that_are_there_are_never_touched() {
    let laptop = Laptop::new();
    laptop.write(
        "root/etc/stiefel/config.yaml",
        "trigger: {macs: ['00:e0:4c:68:01:02']}\n",
    );
    laptop.write("root/etc/stiefel/keys/mine.key", "key");
    let before = laptop.tree();
    laptop.install().unwrap();
    let tree = laptop.tree();
    for path in ["etc/stiefel/config.yaml", "etc/stiefel/keys/mine.key"] {
        assert_eq!(tree[path], before[path]);
    }
    assert!(!tree.contains_key("etc/stiefel/keys/stick.key"));
    assert!(tree.contains_key("etc/NetworkManager/conf.d/90-stiefel.conf"));
    laptop.uninstall(false).unwrap();
    assert_eq!(laptop.tree(), before);
}

#[test]
fn guards_of_nics_that_are_named_no_more_are_taken_away() {
    let laptop = Laptop::new();
    laptop.install().unwrap();
    let plain = laptop.tree();
    laptop.write(
        "root/etc/stiefel/config.yaml",
        "trigger: {macs: ['00:e0:4c:68:01:02'], usb: ['0bda:8153']}\n",
    );
    laptop.install().unwrap();
    assert!(laptop.tree().contains_key("etc/udev/rules.d/84-stiefel.rules"));
    laptop.write("root/etc/stiefel/config.yaml", "");
    laptop.install().unwrap();
    let files = |tree: &BTreeMap<String, (u32, Vec<u8>)>| {
        tree.keys()
            .filter(|path| path.contains("stiefel"))
            .cloned()
            .collect::<Vec<_>>()
    };
    assert_eq!(files(&laptop.tree()), files(&plain));
}

#[test]
fn a_new_version_replaces_the_old_one() {
    let laptop = Laptop::new();
    let before = laptop.tree();
    laptop.install().unwrap();
    laptop.write("source/stiefel", "a newer program");
    laptop.ramdisk("newer kernel", "newer ramdisk");
    laptop.install().unwrap();
    let tree = laptop.tree();
    assert_eq!(tree["usr/local/bin/stiefel"].1, b"a newer program");
    assert_eq!(tree["var/lib/stiefel/kernel"].1, b"newer kernel");
    laptop.uninstall(true).unwrap();
    assert_eq!(laptop.tree(), before);
}

#[test]
fn a_file_of_somebody_else_is_kept_and_put_back() {
    let laptop = Laptop::new();
    laptop.write("root/usr/local/bin/stiefel", "somebody else's");
    let before = laptop.tree();
    laptop.install().unwrap();
    assert_eq!(laptop.tree()["usr/local/bin/stiefel"].1, b"the program");
    laptop.write("source/stiefel", "a newer program");
    laptop.install().unwrap();
    laptop.uninstall(true).unwrap();
    assert_eq!(laptop.tree(), before);
}

#[test]
fn a_guard_that_was_changed_by_hand_stays() {
    let laptop = Laptop::new();
    laptop.install().unwrap();
    laptop.write("root/etc/systemd/system/stiefel-autokexec.service", "mine");
    laptop.uninstall(true).unwrap();
    assert_eq!(laptop.tree()["etc/systemd/system/stiefel-autokexec.service"].1, b"mine");
}

#[test]
fn a_broken_ramdisk_never_replaces_a_working_one() {
    let laptop = Laptop::new();
    laptop.install().unwrap();
    let before = laptop.tree();
    laptop.write("source/kernel", "cut of");
    assert!(matches!(laptop.install(), Err(InstallError::Ramdisk(_))));
    assert_eq!(laptop.tree(), before);
}

#[test]
fn what_cannot_be_read_or_is_in_the_way_changes_nothing() {
    let laptop = Laptop::new();
    laptop.write("root/etc/stiefel/config.yaml", "trigger: {wake: always}\n");
    let before = laptop.tree();
    let error = laptop.install().unwrap_err();
    assert!(matches!(&error, InstallError::Config { path, .. } if path.ends_with("etc/stiefel/config.yaml")));
    laptop.write("root/etc/stiefel/config.yaml", "");
    fs::create_dir_all(laptop.path("root/usr/local/bin/stiefel")).unwrap();
    assert!(matches!(laptop.install(), Err(InstallError::InTheWay { .. })));
    fs::remove_dir_all(laptop.path("root/usr")).unwrap();
    let after = laptop.tree();
    assert_eq!(after.keys().collect::<Vec<_>>(), before.keys().collect::<Vec<_>>());
}

#[test]
fn an_install_that_was_cut_off_can_be_finished_and_undone() {
    let laptop = Laptop::new();
    let before = laptop.tree();
    laptop.install().unwrap();
    // As if power had failed between the renames.
    fs::remove_file(laptop.path("root/var/lib/stiefel/manifest")).unwrap();
    fs::remove_file(laptop.path("root/etc/systemd/system/stiefel-autokexec.service")).unwrap();
    laptop.write("root/usr/local/bin/.stiefel.stiefel-new", "half");
    laptop.install().unwrap();
    assert!(laptop.tree().contains_key("var/lib/stiefel/manifest"));
    fs::remove_file(laptop.path("root/var/lib/stiefel/manifest")).unwrap();
    laptop.uninstall(true).unwrap();
    assert_eq!(laptop.tree(), before);
}

#[test]
fn a_ramdisk_that_was_built_in_its_place_goes_as_well() {
    let laptop = Laptop::new();
    let before = laptop.tree();
    for name in ["kernel", "ramdisk.cpio.zst", "manifest"] {
        fs::create_dir_all(laptop.path("root/var/lib/stiefel")).unwrap();
        fs::copy(
            laptop.path("source").join(name),
            laptop.path("root/var/lib/stiefel").join(name),
        )
        .unwrap();
    }
    install(&InstallOptions {
        ramdisk: Some(laptop.path("root/var/lib/stiefel")),
        ..laptop.options()
    })
    .unwrap();
    laptop.uninstall(true).unwrap();
    let mut after = laptop.tree();
    after.retain(|path, _| !matches!(path.as_str(), "var" | "var/lib"));
    assert_eq!(after, before, "but for folders that install did not make");
}

#[test]
fn what_was_never_installed_is_not_uninstalled() {
    let laptop = Laptop::new();
    assert!(matches!(
        laptop.uninstall(false),
        Err(InstallError::NotInstalled { .. })
    ));
}

#[test]
fn a_record_that_leads_elsewhere_is_not_believed() {
    let laptop = Laptop::new();
    for path in ["../etc/passwd", "/../../etc/passwd"] {
        let json = format!(r#"{{"version":1,"entries":[{{"path":"{path}","kind":{{"file":"00"}},"fate":"remove"}}]}}"#);
        laptop.write("root/var/lib/stiefel/installed.json", &json);
        assert!(matches!(laptop.uninstall(false), Err(InstallError::Record { .. })));
    }
}

const PROGRAM: &str = "root/usr/local/bin/stiefel";

#[test]
fn a_file_of_somebody_else_survives_an_install_that_cannot_keep_it_aside() {
    let laptop = Laptop::new();
    laptop.write(PROGRAM, "somebody else's");
    let before = laptop.tree();
    // A folder where the copy would be written first.
    let blocked = laptop.path("root/var/lib/stiefel/.before!usr!local!bin!stiefel.stiefel-new");
    fs::create_dir_all(blocked.join("x")).unwrap();
    assert!(matches!(laptop.install(), Err(InstallError::Write { .. })));
    assert_eq!(fs::read(laptop.path(PROGRAM)).unwrap(), b"somebody else's");
    fs::remove_dir_all(laptop.path("root/var")).unwrap();
    laptop.install().unwrap();
    assert_eq!(fs::read(laptop.path(PROGRAM)).unwrap(), b"the program");
    laptop.uninstall(true).unwrap();
    assert_eq!(laptop.tree(), before);
}

#[test]
fn an_install_cut_off_at_any_change_keeps_the_user_s_file() {
    for done in 0..4 {
        let laptop = Laptop::new();
        laptop.write(PROGRAM, "somebody else's");
        let before = laptop.tree();
        laptop.install().unwrap();
        // As after a power failure: this much was done of keeping, recording, replacing.
        if done < 3 {
            fs::remove_file(laptop.path(PROGRAM)).unwrap();
            laptop.write(PROGRAM, "somebody else's");
        }
        if done < 2 {
            fs::remove_file(laptop.path("root/var/lib/stiefel/installed.json")).unwrap();
        }
        if done < 1 {
            fs::remove_file(laptop.path("root/var/lib/stiefel/before!usr!local!bin!stiefel")).unwrap();
        }
        laptop.install().unwrap();
        assert_eq!(fs::read(laptop.path(PROGRAM)).unwrap(), b"the program");
        laptop.uninstall(true).unwrap();
        let file = "usr/local/bin/stiefel";
        assert_eq!(laptop.tree().get(file), before.get(file), "{done}");
    }
}

#[test]
fn an_update_that_was_cut_off_leaves_no_old_version_behind() {
    let laptop = Laptop::new();
    let before = laptop.tree();
    laptop.install().unwrap();
    laptop.write("source/stiefel", "a newer program");
    let record = Record::load(&Tree::new(&laptop.path("root"))).unwrap().unwrap();
    laptop.install().unwrap();
    // Recorded, but not replaced yet.
    let mut cut = record.clone();
    let newer = Record::load(&Tree::new(&laptop.path("root"))).unwrap().unwrap();
    for (entry, newer) in cut.entries.iter_mut().zip(newer.entries) {
        if entry.kind != newer.kind {
            let Kind::File(digest) = &entry.kind else { panic!() };
            *entry = Entry {
                older: Some(digest.clone()),
                ..newer
            };
        }
    }
    assert_ne!(cut, record);
    cut.store(&Tree::new(&laptop.path("root"))).unwrap();
    laptop.write(PROGRAM, "the program");
    laptop.install().unwrap();
    assert_eq!(fs::read(laptop.path(PROGRAM)).unwrap(), b"a newer program");
    assert!(
        !laptop
            .tree()
            .keys()
            .any(|path| path.contains("before") || path.contains("edited"))
    );
    laptop.uninstall(true).unwrap();
    assert_eq!(laptop.tree(), before);
}

#[test]
fn what_the_admin_changed_is_kept_when_it_is_replaced() {
    let laptop = Laptop::new();
    let before = laptop.tree();
    laptop.install().unwrap();
    let installed = laptop.tree();
    let unit = "etc/systemd/system/stiefel-autokexec.service";
    let kept = "var/lib/stiefel/edited!etc!systemd!system!stiefel-autokexec.service";
    for (edit, name) in [("mine", kept.to_owned()), ("mine again", format!("{kept}.2"))] {
        laptop.write(&format!("root/{unit}"), edit);
        laptop.install().unwrap();
        let tree = laptop.tree();
        assert_eq!(tree[unit], installed[unit]);
        assert_eq!(tree[&name].1, edit.as_bytes());
    }
    laptop.uninstall(false).unwrap();
    assert_eq!(laptop.tree()[kept].1, b"mine", "kept without --purge");
    laptop.uninstall(true).unwrap();
    let mut after = laptop.tree();
    // They held what was kept.
    after.retain(|path, _| !matches!(path.as_str(), "var" | "var/lib"));
    assert_eq!(after, before);
}

#[test]
fn what_took_another_s_place_and_was_changed_is_kept_and_the_first_put_back() {
    let laptop = Laptop::new();
    laptop.write(PROGRAM, "somebody else's");
    let before = laptop.tree();
    laptop.install().unwrap();
    laptop.write(PROGRAM, "changed by hand");
    laptop.install().unwrap();
    let tree = laptop.tree();
    assert_eq!(
        tree["var/lib/stiefel/before!usr!local!bin!stiefel"].1,
        b"somebody else's"
    );
    assert_eq!(
        tree["var/lib/stiefel/edited!usr!local!bin!stiefel"].1,
        b"changed by hand"
    );
    laptop.uninstall(true).unwrap();
    assert_eq!(laptop.tree(), before);
}

#[test]
fn a_copy_that_is_gone_is_complained_of_before_anything_is_removed() {
    let laptop = Laptop::new();
    laptop.write(PROGRAM, "somebody else's");
    laptop.install().unwrap();
    fs::remove_file(laptop.path("root/var/lib/stiefel/before!usr!local!bin!stiefel")).unwrap();
    let before = laptop.tree();
    let error = laptop.uninstall(false).unwrap_err();
    assert!(matches!(error, InstallError::CopyGone { .. }), "{error}");
    assert_eq!(laptop.tree(), before);
    fs::remove_file(laptop.path(PROGRAM)).unwrap();
    laptop.uninstall(false).unwrap();
}

#[test]
fn a_given_configuration_is_installed_where_none_is_and_its_guards_with_it() {
    let laptop = Laptop::new();
    laptop.write("my.yaml", "trigger: {macs: ['00:e0:4c:68:01:02']}\n");
    let options = |config: &str| InstallOptions {
        config: Some(laptop.path(config)),
        ..laptop.options()
    };
    let before = laptop.tree();
    assert!(matches!(
        install(&options("absent.yaml")),
        Err(InstallError::Read { .. })
    ));
    assert_eq!(laptop.tree(), before);
    install(&options("my.yaml")).unwrap();
    let first = laptop.tree();
    assert_eq!(
        first["etc/stiefel/config.yaml"].1,
        fs::read(laptop.path("my.yaml")).unwrap()
    );
    assert!(first.contains_key("etc/NetworkManager/conf.d/90-stiefel.conf"));
    laptop.write("other.yaml", "");
    install(&options("other.yaml")).unwrap();
    assert_eq!(
        laptop.tree(),
        first,
        "one that is there is never touched, nor its guards"
    );
}

#[test]
fn a_root_that_is_not_there_is_refused_and_not_made() {
    let laptop = Laptop::new();
    let root = laptop.path("mistyped");
    let options = InstallOptions {
        root: root.clone(),
        ..laptop.options()
    };
    assert!(matches!(install(&options), Err(InstallError::NoRoot { .. })));
    assert!(!root.exists());
}

#[test]
fn guards_that_install_did_not_write_for_this_configuration_are_missed() {
    let laptop = Laptop::new();
    laptop.install().unwrap();
    let config = "trigger: {macs: ['00:e0:4c:68:01:02'], usb: ['0bda:8153']}\n";
    let trigger = stiefel_shared::config::Config::parse(config).unwrap().trigger;
    let root = laptop.path("root");
    assert_eq!(missing_guards(&root, &Trigger::default()), Vec::<String>::new());
    let missing = missing_guards(&root, &trigger);
    assert_eq!(missing.len(), 4, "{missing:?}");
    assert!(missing.contains(&"/etc/NetworkManager/conf.d/90-stiefel.conf".to_owned()));
    laptop.write("root/etc/stiefel/config.yaml", config);
    laptop.install().unwrap();
    assert_eq!(missing_guards(&root, &trigger), Vec::<String>::new());
}
