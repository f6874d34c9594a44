//! The command as a new user meets it: mistakes get an error that says what failed and what to do, and the right status.
#![allow(missing_docs, clippy::unwrap_used)]

use std::os::unix::process::ExitStatusExt;
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
        2,
        &["serve", "--yes", "--config", "/nonexistent/c.yaml"],
        &["/nonexistent/c.yaml", "stiefel init"],
    );
    fails(
        2,
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
        fails(2, &args, &["/nonexistent/c.yaml"]);
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
fn a_copy_that_is_interrupted_says_that_the_same_call_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    // Of no bytes on the disk, and more than can be copied before the signal.
    std::fs::File::create(path("source"))
        .unwrap()
        .set_len(64 << 30)
        .unwrap();
    let copy = Command::new(env!("CARGO_BIN_EXE_stiefel"))
        .args(["copy", &path("source"), &path("target"), "--yes"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let state = dir.path().join("target.copy-state");
    // From here on the signal is taken.
    for _ in 0..1000 {
        if state.exists() {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    let sent = Command::new("kill").args(["-INT", &copy.id().to_string()]).status();
    let ended = copy.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&ended.stderr);
    assert!(
        sent.unwrap().success() && said.contains("the same call goes on"),
        "{said}"
    );
    // By the signal, so that a script around it ends, too.
    assert_eq!(ended.status.signal(), Some(2));
    assert!(state.exists());
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
            "init",
            "doctor",
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

/// A folder with as much of a laptop as `init` needs: a USB adapter.
fn laptop() -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    let device = root.path().join("sys/devices/usb1");
    let net = device.join("1:1.0/net/usb0");
    std::fs::create_dir_all(&net).unwrap();
    for (file, text) in [("idVendor", "0bda\n"), ("idProduct", "8153\n"), ("serial", "000001\n")] {
        std::fs::write(device.join(file), text).unwrap();
    }
    for (file, text) in [("type", "1\n"), ("address", "02:00:00:00:00:01\n")] {
        std::fs::write(net.join(file), text).unwrap();
    }
    std::os::unix::fs::symlink("../../../1:1.0", net.join("device")).unwrap();
    std::fs::create_dir_all(root.path().join("sys/class/net")).unwrap();
    std::os::unix::fs::symlink(
        "../../devices/usb1/1:1.0/net/usb0",
        root.path().join("sys/class/net/usb0"),
    )
    .unwrap();
    root
}

fn mode(path: &Path) -> u32 {
    use std::os::unix::fs::PermissionsExt;
    std::fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

#[test]
fn init_without_a_terminal_says_what_to_type_and_writes_nothing() {
    let root = laptop();
    let path = root.path().to_str().unwrap();
    fails(2, &["init", "--root", path], &["no terminal", "--yes", "--dry-run"]);
    let output = stiefel(&["init", "--root", path, "--dry-run"]);
    assert!(output.status.success());
    assert!(String::from_utf8_lossy(&output.stdout).contains("usb: [\"0bda:8153:000001\"]"));
    assert!(!root.path().join("etc").exists(), "something was written");
    fails(
        1,
        &["init", "--yes", "--root", "/nonexistent/root"],
        &["/nonexistent/root", "--root"],
    );
}

#[test]
fn init_writes_once_and_replaces_only_by_force_keeping_the_old_one() {
    let root = laptop();
    let path = root.path().to_str().unwrap();
    let config = root.path().join("etc/stiefel/config.yaml");
    let key = root.path().join("etc/stiefel/keys/stick.key");
    let init = |more: &[&str]| {
        let output = stiefel(&[&["init", "--yes", "--root", path], more].concat());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let said = init(&[]);
    for word in [
        "write ",
        "config.yaml",
        "stick.key",
        " doctor",
        " install",
        " stick /dev/sdX",
    ] {
        assert!(said.contains(word), "{word}: {said}");
    }
    assert_eq!(
        (mode(&config), mode(&key), mode(key.parent().unwrap())),
        (0o644, 0o600, 0o700)
    );
    let secret = std::fs::read(&key).unwrap();
    std::fs::write(&config, "# mine\n").unwrap();
    let said = init(&[]);
    assert!(
        said.contains("keep ") && said.contains("usb: [\"0bda:8153:000001\"]"),
        "{said}"
    );
    assert_eq!(std::fs::read(&config).unwrap(), b"# mine\n");
    let said = init(&["--force"]);
    assert!(said.contains("config.yaml.old"), "{said}");
    assert_eq!(
        std::fs::read(config.with_file_name("config.yaml.old")).unwrap(),
        b"# mine\n"
    );
    assert!(std::fs::read_to_string(&config).unwrap().contains("0bda:8153:000001"));
    assert_eq!(std::fs::read(&key).unwrap(), secret, "a key is never replaced");
}

#[test]
fn init_does_not_build_on_a_configuration_that_is_broken() {
    let root = laptop();
    let config = root.path().join("etc/stiefel/config.yaml");
    std::fs::create_dir_all(config.parent().unwrap()).unwrap();
    write(&config, "boot:\n  dsik: auto\n");
    let output = stiefel(&["init", "--yes", "--root", root.path().to_str().unwrap()]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("line 2") && said.contains("--force"), "{said}");
    assert!(!root.path().join("etc/stiefel/keys").exists(), "something was written");
}

#[test]
fn init_says_that_etc_is_in_the_way_before_it_asks_anything() {
    let root = laptop();
    write(&root.path().join("etc"), "");
    let output = stiefel(&["init", "--yes", "--root", root.path().to_str().unwrap()]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("nothing was changed"), "{said}");
}

#[test]
fn doctor_exits_1_with_a_remedy_for_each_failure_also_as_json() {
    let root = laptop();
    let path = root.path().to_str().unwrap();
    let output = stiefel(&["doctor", "--root", path]);
    let said = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        said.contains("FAILURE  config") && said.contains("next: stiefel init"),
        "{said}"
    );
    assert!(String::from_utf8_lossy(&output.stderr).contains("checks failed"));
    let output = stiefel(&["doctor", "--root", path, "--json"]);
    assert_eq!(output.status.code(), Some(1));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["ok"], false);
    let findings = report["findings"].as_array().unwrap();
    assert!(
        findings
            .iter()
            .all(|finding| (finding["level"] == "ok") == finding["next"].is_null())
    );
    fails(
        1,
        &["doctor", "--root", "/nonexistent/root"],
        &["/nonexistent/root", "--root"],
    );
}

#[test]
fn nobody_reading_what_is_printed_is_no_panic() {
    let dir = tempfile::tempdir().unwrap();
    let keys = dir.path().to_str().unwrap();
    assert!(stiefel(&["key", "new", "stick", "--dir", keys]).status.success());
    for args in [
        &["key", "list", "--dir", keys][..],
        &["generate", "bash"],
        &["generate", "man"],
    ] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = Command::new(env!("CARGO_BIN_EXE_stiefel"))
            .args(args)
            .stdout(writer)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{args:?}: {said}");
        assert!(!said.contains("panicked"), "{args:?}: {said}");
    }
}
