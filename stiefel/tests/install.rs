//! `stiefel install` on real file systems that refuse: a full one, a read-only /etc. In a mount namespace of its own.
#![allow(missing_docs, clippy::unwrap_used)]

use std::process::{Command, Output, Stdio};

/// Runs a script with mounts of its own; `$1` is the program, `$2` an empty folder.
fn run(script: &str) -> Option<Output> {
    let namespace = || {
        let mut unshare = Command::new("unshare");
        unshare
            .args(["--user", "--map-root-user", "--mount"])
            .stdin(Stdio::null());
        unshare
    };
    let allowed = namespace()
        .arg("true")
        .output()
        .is_ok_and(|output| output.status.success());
    if !allowed {
        assert!(std::env::var_os("CI").is_none(), "no mount namespaces here");
        eprintln!("left out: this machine allows no mount namespaces");
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    let common = include_str!("install.sh");
    let output = namespace()
        .args([
            "sh",
            "-euc",
            &format!("{common}\n{script}"),
            "sh",
            env!("CARGO_BIN_EXE_stiefel"),
        ])
        .arg(dir.path())
        .output()
        .unwrap();
    Some(output)
}

/// The install must fail with these words, and leave the tree as it was.
fn refuses(mounts: &str, words: &[&str]) {
    let script = format!(
        "{mounts}\nlist >$2/before\nif \"$1\" install --root $2/root --ramdisk $2/ramdisk --yes >$2/out 2>$2/err; then exit 3; fi\n\
         list >$2/after\ncat $2/err\ndiff $2/before $2/after >&2"
    );
    let Some(output) = run(&script) else { return };
    let (said, diff) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    assert!(output.status.success(), "{}: {said}\n{diff}", output.status);
    for word in words {
        assert!(said.contains(word), "{word:?} is not in: {said}");
    }
}

#[test]
fn a_full_file_system_is_said_and_everything_is_taken_back() {
    refuses(
        "mount -t tmpfs -o size=1M,mode=0755 none $2/root/var/lib",
        &["cannot be written", "taken back", "df", "No space left"],
    );
    refuses(
        "mkdir -p $2/root/usr/local/bin; mount -t tmpfs -o size=64k,mode=0755 none $2/root/usr/local/bin",
        &["/usr/local/bin/stiefel cannot be written", "No space left"],
    );
}

#[test]
fn a_read_only_etc_is_said_and_everything_is_taken_back() {
    refuses(
        "mount --bind $2/root/etc $2/root/etc; mount -o remount,bind,ro $2/root/etc",
        &["cannot be written", "Read-only file system", "findmnt"],
    );
}

#[test]
fn where_there_is_space_the_same_install_succeeds_and_uninstall_leaves_the_tree_as_it_was() {
    let script = "list >$2/before\n\"$1\" install --root $2/root --ramdisk $2/ramdisk --yes\nlist | grep -q zzz-stiefel\n\
                  \"$1\" uninstall --root $2/root --purge --yes\nlist >$2/after\ndiff $2/before $2/after >&2";
    let Some(output) = run(script) else { return };
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
