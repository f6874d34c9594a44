//! Ramdisks from a fake tree of modules. (Those of a real kernel: the end-to-end tests, `image`.)

use super::*;
use crate::modules::DEFAULT;
use crate::testing::{EM_X86_64, VERSION, dynamic_program, kernel, module_tree, static_program};
use std::collections::BTreeMap;
use stiefel_shared::cpio::{Reader, S_IFCHR, S_IFDIR, S_IFLNK};

fn options(root: &Path, classes: &[&str]) -> RamdiskOptions {
    let put = |name: &str, bytes: &[u8]| {
        let path = root.join(name);
        fs::write(&path, bytes).unwrap();
        path
    };
    let extra = put("extra", b"extra file");
    fs::set_permissions(&extra, fs::Permissions::from_mode(0o4664)).unwrap();
    RamdiskOptions {
        kernel: put("vmlinuz", &kernel(VERSION)),
        modules_dir: module_tree(root),
        firmware_dirs: vec![],
        classes: classes.iter().map(ToString::to_string).collect(),
        program: put("program", &static_program(EM_X86_64)),
        busybox: Some(put("busybox", &static_program(EM_X86_64))),
        extra_files: vec![(extra, "/etc/stiefel/motd".to_owned())],
        out_dir: root.join("out"),
    }
}

/// Path → (mode, rdev, data).
type Entries = BTreeMap<String, (u32, (u32, u32), Vec<u8>)>;

fn unpack(path: &Path) -> Entries {
    let packed = fs::read(path).unwrap();
    let mut decoder = zstd::Decoder::new(packed.as_slice()).unwrap();
    decoder.window_log_max(WINDOW_LOG).unwrap();
    let mut bytes = Vec::new();
    io::Read::read_to_end(&mut decoder, &mut bytes).unwrap();
    let entries = Reader::new(&bytes).map(Result::unwrap);
    entries
        .map(|entry| {
            (
                String::from_utf8(entry.path.to_vec()).unwrap(),
                (entry.mode, entry.rdev, entry.data.to_vec()),
            )
        })
        .collect()
}

#[test]
fn ramdisk_has_init_devices_folders_and_modules() {
    let root = tempfile::tempdir().unwrap();
    let report = build(&options(root.path(), &["nic", "nbd"]), &mut |_, _, _| {}).unwrap();
    let entries = unpack(&report.ramdisk);
    assert_eq!(entries["init"].0, 0o100_755);
    assert_eq!(entries["init"].2, static_program(EM_X86_64));
    for (path, number) in [("dev/console", (5, 1)), ("dev/null", (1, 3)), ("dev/kmsg", (1, 11))] {
        assert_eq!(
            (entries[path].0 & 0o170_000, entries[path].1),
            (S_IFCHR, number),
            "{path}"
        );
    }
    for path in ["dev", "proc", "sys", "run", "tmp", "etc"] {
        assert_eq!(entries[path].0 & 0o170_000, S_IFDIR, "{path}");
    }
    assert_eq!(entries["etc/stiefel/motd"], (0o100_644, (0, 0), b"extra file".to_vec()));
    assert!(entries.contains_key(&format!("lib/modules/{VERSION}/modules.dep")));
    assert!(entries.contains_key(&format!("lib/modules/{VERSION}/kernel/drivers/net/mii.ko")));
    assert!(!entries.contains_key("bin/sh"), "a shell only with the class debug");
    assert_eq!(report.manifest.modules, 7);
    assert_eq!(report.missing_firmware, ["rtl_nic/absent.fw", "rtl_nic/rtl8168.fw"]);
}

#[test]
fn class_debug_brings_a_shell_and_demands_a_busybox() {
    let root = tempfile::tempdir().unwrap();
    let mut options = options(root.path(), &[DEFAULT, DEBUG]);
    let entries = unpack(&build(&options, &mut |_, _, _| {}).unwrap().ramdisk);
    assert_eq!(entries["bin/busybox"].0, 0o100_755);
    assert_eq!(
        (entries["bin/sh"].0 & 0o170_000, entries["bin/sh"].2.as_slice()),
        (S_IFLNK, &b"busybox"[..])
    );
    options.busybox = None;
    assert!(matches!(
        build(&options, &mut |_, _, _| {}),
        Err(RamdiskError::NoBusybox)
    ));
}

#[test]
fn same_input_gives_same_bytes() {
    let [first, second] = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let reports = [&first, &second].map(|root| build(&options(root.path(), &[DEFAULT]), &mut |_, _, _| {}).unwrap());
    assert_eq!(reports[0].manifest, reports[1].manifest);
    assert_eq!(
        fs::read(&reports[0].ramdisk).unwrap(),
        fs::read(&reports[1].ramdisk).unwrap()
    );
}

#[test]
fn manifest_is_read_back_and_notices_changed_files() {
    let root = tempfile::tempdir().unwrap();
    let report = build(&options(root.path(), &["nbd"]), &mut |_, _, _| {}).unwrap();
    let dir = root.path().join("out");
    let manifest = Manifest::load(&dir).unwrap();
    assert_eq!(manifest, report.manifest);
    assert_eq!(
        (manifest.kernel_version.as_str(), manifest.kernel.bytes),
        (VERSION, 1024)
    );
    manifest.verify(&dir).unwrap();
    let mut bytes = fs::read(&report.ramdisk).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&report.ramdisk, bytes).unwrap();
    let error = manifest.verify(&dir).unwrap_err();
    assert!(
        matches!(&error, ManifestError::Changed { path } if path.ends_with(RAMDISK)),
        "{error}"
    );
    fs::write(dir.join(MANIFEST), "{").unwrap();
    assert!(matches!(Manifest::load(&dir), Err(ManifestError::Format { .. })));
}

#[test]
fn failed_build_leaves_the_old_files_and_no_others() {
    let root = tempfile::tempdir().unwrap();
    let mut options = options(root.path(), &["nbd"]);
    build(&options, &mut |_, _, _| {}).unwrap();
    options
        .extra_files
        .push((options.program.clone(), "/../outside".to_owned()));
    assert!(matches!(
        build(&options, &mut |_, _, _| {}),
        Err(RamdiskError::Write { .. })
    ));
    let dir = root.path().join("out");
    let mut names: Vec<_> = fs::read_dir(&dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    names.sort();
    assert_eq!(names, [KERNEL, MANIFEST, RAMDISK]);
    Manifest::load(&dir).unwrap().verify(&dir).unwrap();
}

#[test]
fn what_would_not_run_is_refused_before_anything_is_written() {
    let root = tempfile::tempdir().unwrap();
    let good = options(root.path(), &["nbd"]);
    let refused = |change: &dyn Fn(&RamdiskOptions)| {
        let options = options(root.path(), &["nbd"]);
        change(&options);
        let error = build(&options, &mut |_, _, _| {}).unwrap_err();
        assert!(!good.out_dir.exists(), "{error}");
        error
    };
    let error = refused(&|options| fs::write(&options.program, dynamic_program()).unwrap());
    assert!(
        matches!(
            error,
            RamdiskError::Program {
                source: ProgramError::Dynamic { .. },
                ..
            }
        ),
        "{error}"
    );
    let error = refused(&|options| fs::write(&options.program, static_program(183)).unwrap());
    assert!(
        matches!(
            error,
            RamdiskError::Program {
                source: ProgramError::OtherMachine,
                ..
            }
        ),
        "{error}"
    );
    let error = refused(&|options| fs::write(&options.kernel, kernel("5.10.0")).unwrap());
    assert!(matches!(error, RamdiskError::VersionMismatch { .. }), "{error}");
    let error = refused(&|options| fs::write(&options.kernel, b"no kernel").unwrap());
    assert!(
        matches!(
            error,
            RamdiskError::Program {
                source: ProgramError::NotAKernel,
                ..
            }
        ),
        "{error}"
    );
    let error = refused(&|options| fs::remove_file(&options.program).unwrap());
    assert!(matches!(error, RamdiskError::Read { .. }), "{error}");
}

#[test]
fn progress_ends_at_its_total() {
    let root = tempfile::tempdir().unwrap();
    let mut last = BTreeMap::new();
    build(&options(root.path(), &["nic"]), &mut |stage, done, total| {
        assert!(done <= total);
        last.insert(format!("{stage:?}"), (done, total));
    })
    .unwrap();
    assert_eq!(last["Modules"], (6, 6));
    assert_eq!(last["Compress"].0, last["Compress"].1);
}

#[test]
fn default_kernel_is_looked_for_in_boot_and_beside_the_modules() {
    let root = tempfile::tempdir().unwrap();
    let find = || default_kernel_in(root.path(), VERSION.to_owned());
    let error = find().unwrap_err().to_string();
    assert!(error.contains("boot/vmlinuz-") && error.contains(VERSION), "{error}");
    let dir = module_tree(root.path());
    fs::write(dir.join("vmlinuz"), b"").unwrap();
    assert_eq!(find().unwrap(), (dir.join("vmlinuz"), dir.clone()));
    fs::create_dir(root.path().join("boot")).unwrap();
    fs::write(root.path().join(format!("boot/vmlinuz-{VERSION}")), b"").unwrap();
    assert_eq!(find().unwrap().0, root.path().join(format!("boot/vmlinuz-{VERSION}")));
}

#[test]
fn what_is_up_to_date_is_not_built_again_and_every_change_is_seen() {
    let root = tempfile::tempdir().unwrap();
    let current = root.path().join("out");
    let mut options = options(root.path(), &["nic", "nbd"]);
    let again = |options: &RamdiskOptions| {
        let options = RamdiskOptions {
            out_dir: root.path().join("other"),
            ..options.clone()
        };
        let built = build_if_changed(&options, &current, &mut |_, _, _| {}).unwrap();
        let _ = fs::remove_dir_all(root.path().join("other"));
        built.is_some()
    };
    assert!(again(&options), "there was none");
    build(&options, &mut |_, _, _| {}).unwrap();
    assert!(!again(&options));
    let module = options.modules_dir.join("kernel/drivers/block/nbd.ko");
    let before = fs::read(&module).unwrap();
    fs::write(&module, [before.as_slice(), b"rebuilt"].concat()).unwrap();
    assert!(again(&options), "a module of the same version");
    fs::write(&module, before).unwrap();
    let kernel = fs::read(&options.kernel).unwrap();
    fs::write(&options.kernel, [kernel.as_slice(), b"rebuilt"].concat()).unwrap();
    assert!(again(&options), "a kernel of the same version");
    fs::write(&options.kernel, kernel).unwrap();
    options.classes.push("usb".to_owned());
    assert!(again(&options), "classes");
    options.classes.pop();
    assert!(!again(&options));
    fs::write(current.join(RAMDISK), b"cut").unwrap();
    assert!(again(&options), "a set that is not whole");
}
