//! The command as a new user meets it: mistakes get an error that says what failed and what to do, and the right status.
#![allow(missing_docs, clippy::unwrap_used)]

use std::path::Path;
use std::process::{Command, Output, Stdio};

fn stiefel(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_stiefel"))
        .args(args)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

/// Runs it; demands this exit status, and that standard error has all of `words` and no trace of a panic.
fn fails(status: i32, args: &[&str], words: &[&str]) {
    let output = stiefel(args);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "{args:?}: {said}");
    for word in words {
        assert!(said.contains(word), "{args:?} does not say {word:?}: {said}");
    }
    assert!(!said.contains("panicked"), "{said}");
    assert!(output.stdout.is_empty(), "errors belong on standard error");
}

fn write(path: &Path, text: &str) -> String {
    std::fs::write(path, text).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn no_configuration_is_said_with_what_makes_one() {
    fails(
        1,
        &["serve", "--yes", "--config", "/nonexistent/c.yaml"],
        &["/nonexistent/c.yaml", "stiefel install"],
    );
    fails(
        1,
        &["autokexec", "--config", "/nonexistent/c.yaml"],
        &["/nonexistent/c.yaml"],
    );
}

#[test]
fn a_configuration_that_was_named_must_be_there() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let (root, out) = (dir.path().to_str().unwrap(), out.to_str().unwrap());
    for command in [
        vec!["build", "--out", out],
        vec!["payload"],
        vec!["stick", out],
        vec!["install", "--yes", "--root", root],
    ] {
        let args = [command.as_slice(), &["--config", "/nonexistent/c.yaml"]].concat();
        fails(1, &args, &["/nonexistent/c.yaml"]);
    }
    assert!(
        std::fs::read_dir(root).unwrap().next().is_none(),
        "something was written"
    );
}

#[test]
fn a_ramdisk_that_cannot_work_is_not_built() {
    let dir = tempfile::tempdir().unwrap();
    let config = write(&dir.path().join("c.yaml"), "modules: []\n");
    let out = dir.path().join("out");
    let args = ["build", "--kernel", "/bin/true", "--modules", "/usr", "--out"];
    let build = |more: &[&str], words: &[&str]| fails(1, &[&args[..], &[out.to_str().unwrap()], more].concat(), words);
    build(&["--config", &config], &["modules", "empty", "[default]"]);
    let config = write(&dir.path().join("d.yaml"), "");
    build(
        &["--config", &config, "--debug", "--busybox", "/nonexistent/busybox"],
        &["/nonexistent/busybox", "busybox-static", "--busybox"],
    );
}

#[test]
fn a_wrong_configuration_is_shown_with_its_line_and_exits_2() {
    let dir = tempfile::tempdir().unwrap();
    let config = write(&dir.path().join("c.yaml"), "boot:\n  dsik: auto\n");
    fails(
        2,
        &["payload", "--config", &config],
        &["line 2", "dsik", "disk", "config-example.yaml"],
    );
}

#[test]
fn wrong_usage_exits_2() {
    fails(2, &["frobnicate"], &["frobnicate"]);
    fails(2, &["build", "--kernel", "/boot/vmlinuz"], &["--modules"]);
    fails(2, &["nbd", "/dev/null", "--listen", "somewhere"], &["somewhere"]);
}

#[test]
fn a_missing_kernel_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let modules = dir.path().join("6.1.0");
    std::fs::create_dir(&modules).unwrap();
    std::fs::write(modules.join("modules.dep"), "").unwrap();
    let out = dir.path().join("out");
    let args = [
        "build",
        "--kernel",
        "/nonexistent/vmlinuz",
        "--modules",
        modules.to_str().unwrap(),
        "--out",
        out.to_str().unwrap(),
    ];
    fails(1, &args, &["/nonexistent/vmlinuz"]);
    assert!(!out.join("kernel").exists());
    let config = write(&dir.path().join("c.yaml"), "initrd: {kernel: /nonexistent/vmlinuz}\n");
    fails(
        1,
        &["build", "--config", &config, "--out", out.to_str().unwrap()],
        &["/nonexistent/vmlinuz"],
    );
}

#[test]
fn a_stick_without_ramdisk_or_key_says_what_to_run() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("stick.img");
    let args = [
        "stick",
        image.to_str().unwrap(),
        "--ramdisk",
        dir.path().to_str().unwrap(),
    ];
    fails(1, &args, &["stiefel build", "--ramdisk"]);
    assert!(!image.exists());
}

#[test]
fn a_stick_that_is_not_plugged_in_is_no_file() {
    fails(
        1,
        &["stick", "/dev/stiefel-absent"],
        &["/dev/stiefel-absent", "plugged in"],
    );
    fails(
        1,
        &["stick", "/dev/null", "--overwrite"],
        &["/dev/null", "no ordinary file"],
    );
    assert!(!Path::new("/dev/stiefel-absent").exists());
    let dir = tempfile::tempdir().unwrap();
    let image = write(&dir.path().join("stick.img"), "precious");
    fails(1, &["stick", &image], &["exists", "--overwrite"]);
    assert_eq!(std::fs::read(&image).unwrap(), b"precious");
}

#[test]
fn keys_are_made_once_private_and_revoked() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let keys = dir.path().join("keys");
    let keys = keys.to_str().unwrap();
    assert!(stiefel(&["key", "new", "blue", "--dir", keys]).status.success());
    let file = dir.path().join("keys/blue.key");
    assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    let before = std::fs::read(&file).unwrap();
    fails(1, &["key", "new", "blue", "--dir", keys], &["exists", "revoke"]);
    assert_eq!(
        std::fs::read(&file).unwrap(),
        before,
        "a key that exists is never replaced"
    );
    assert_eq!(stiefel(&["key", "list", "--dir", keys]).stdout, b"blue\n");
    assert!(stiefel(&["key", "revoke", "blue", "--dir", keys]).status.success());
    assert!(!file.exists());
    for name in ["../blue", "", ".hidden", "a b"] {
        fails(1, &["key", "new", name, "--dir", keys], &["name"]);
        fails(1, &["key", "revoke", name, "--dir", keys], &["name"]);
    }
}

#[test]
fn nbd_names_what_it_cannot_open() {
    fails(1, &["nbd", "/nonexistent/disk.img"], &["/nonexistent/disk.img"]);
    fails(1, &["nbd", "/proc"], &["/proc", "regular file"]);
}

#[test]
fn install_needs_a_yes_and_changes_nothing_without() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().to_str().unwrap();
    let ramdisk = root.path().join("no-ramdisk");
    fails(
        1,
        &["install", "--root", path, "--ramdisk", ramdisk.to_str().unwrap()],
        &["ramdisk"],
    );
    assert!(
        std::fs::read_dir(root.path()).unwrap().next().is_none(),
        "something was written"
    );
}

#[test]
fn a_dry_run_of_install_lists_what_would_be_built() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().to_str().unwrap();
    let output = stiefel(&["install", "--root", path, "--dry-run"]);
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    for line in [
        "build    /var/lib/stiefel/kernel",
        "build    /var/lib/stiefel/manifest",
        "create   /usr/local/bin/stiefel",
    ] {
        assert!(said.contains(line), "{said}");
    }
    assert!(std::fs::read_dir(root.path()).unwrap().next().is_none());
    fails(
        1,
        &["install", "--root", "/nonexistent/root"],
        &["/nonexistent/root", "--root"],
    );
}

#[test]
fn an_upgrade_of_what_is_not_installed_says_so_and_changes_nothing() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().to_str().unwrap();
    fails(1, &["upgrade", "--root", path], &["not installed", path]);
    assert!(std::fs::read_dir(root.path()).unwrap().next().is_none());
}

#[test]
fn a_kernel_that_is_not_there_is_not_baked() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_str().unwrap();
    fails(1, &["bake", path, "0.0.1-absent"], &["0.0.1-absent", "depmod"]);
    assert!(std::fs::read_dir(dir.path()).unwrap().next().is_none());
}

#[test]
fn every_command_of_the_readme_exists() {
    let readme = include_str!("../../README.md");
    let help = String::from_utf8(stiefel(&["help"]).stdout).unwrap();
    let mut named = 0;
    for command in readme
        .split("stiefel ")
        .skip(1)
        .filter_map(|rest| rest.split(|c: char| !c.is_ascii_lowercase() && c != '-').next())
    {
        let known = [
            "install",
            "upgrade",
            "uninstall",
            "payload",
            "stick",
            "serve",
            "help",
            "key",
        ];
        if known.contains(&command) {
            assert!(
                help.contains(&format!("\n  {command} ")),
                "`stiefel {command}` is in the README, but not in the help"
            );
            named += 1;
        }
    }
    assert!(
        named >= 5,
        "the README names commands in another way now; mend this test"
    );
}

#[test]
fn man_page_and_completions_are_generated() {
    assert!(String::from_utf8_lossy(&stiefel(&["generate", "man"]).stdout).contains("test\\-qemu"));
    assert!(!stiefel(&["generate", "bash"]).stdout.is_empty());
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_str().unwrap();
    assert!(stiefel(&["generate", "man", "--dir", path]).status.success());
    for page in [
        "stiefel.1",
        "stiefel-install.1",
        "stiefel-upgrade.1",
        "stiefel-key-new.1",
    ] {
        assert!(dir.path().join(page).is_file(), "{page}");
    }
    assert!(!dir.path().join("stiefel-bake.1").exists(), "it is for hooks only");
    fails(1, &["generate", "klingon"], &["klingon", "bash"]);
}
