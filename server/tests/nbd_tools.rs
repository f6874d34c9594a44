//! The NBD server against other people's clients: libnbd's tools, qemu's, nbd-client.
//!
//! A tool that is not installed is skipped with a word, but is a failure where `CI` is set.
#![allow(clippy::unwrap_used)]

mod nbd_support;

use std::path::Path;
use std::process::{Command, Stdio};

use nbd_support::{Fixture, PATIENCE};
use stiefel_server::nbd::{ExportOptions, Limits};

const SIZE: u64 = 24 << 20;

/// Whether the tool can be run; CI must have it.
fn have(tool: &str) -> bool {
    let found = Command::new(tool)
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok();
    assert!(
        found || std::env::var_os("CI").is_none(),
        "{tool} is not installed, but CI must have it"
    );
    if !found {
        eprintln!("skipped: {tool} is not installed");
    }
    found
}

/// Runs a tool to its good end and returns what it printed.
fn run(tool: &str, arguments: &[&str]) -> String {
    let output = Command::new(tool).args(arguments).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{tool} {arguments:?}: {text}");
    text
}

/// A file with data, holes and an odd end.
fn image(directory: &Path) -> std::path::PathBuf {
    let path = directory.join("image");
    let mut data = vec![0_u8; usize::try_from(SIZE).unwrap()];
    for (index, byte) in data.iter_mut().enumerate() {
        if index / (1 << 20) % 3 == 1 {
            // Not zero, and not the same in every block.
            *byte = (index / 512 + index).to_le_bytes()[0] | 1;
        }
    }
    std::fs::write(&path, data).unwrap();
    path
}

#[test]
fn nbdinfo_understands_the_export() {
    if !have("nbdinfo") {
        return;
    }
    let fixture = Fixture::new(SIZE);
    let json = run("nbdinfo", &["--json", &fixture.uri()]);
    for line in [
        "\"structured\": true",
        "\"export-name\": \"disk\"",
        "\"description\": \"a test\"",
        "\"export-size\": 25165824",
        "\"is_read_only\": false",
        "\"can_multi_conn\": true",
        "\"can_fast_zero\": true",
        "\"can_cache\": true",
        "\"block_size_minimum\": 1",
        "\"block_size_maximum\": 33554432",
        "base:allocation",
    ] {
        assert!(json.contains(line), "{line} is missing in {json}");
    }
    assert!(run("nbdinfo", &["--list", &format!("nbd://{}", fixture.address)]).contains("disk"));
    let map = run("nbdinfo", &["--map", &fixture.uri()]);
    assert!(map.contains("25165824") && map.contains("hole,zero"), "{map}");
    let only = ExportOptions {
        read_only: true,
        ..ExportOptions::default()
    };
    let fixture = Fixture::with(SIZE, only, Limits::default(), true);
    run("nbdinfo", &["--is", "read-only", &fixture.uri()]);
}

#[test]
fn nbdcopy_writes_and_reads_back_over_many_connections() {
    if !have("nbdcopy") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let image = image(directory.path());
    let fixture = Fixture::new(SIZE);
    let uri = fixture.uri();
    run(
        "nbdcopy",
        &["--flush", "--connections=4", image.to_str().unwrap(), &uri],
    );
    assert!(std::fs::read(fixture.file().path()).unwrap() == std::fs::read(&image).unwrap());
    let copy = directory.path().join("copy");
    run("nbdcopy", &["--connections=4", &uri, copy.to_str().unwrap()]);
    assert!(std::fs::read(copy).unwrap() == std::fs::read(image).unwrap());
    fixture.server.stop(PATIENCE).unwrap();
}

#[test]
fn qemu_img_converts_and_compares() {
    if !have("qemu-img") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let image = image(directory.path());
    let fixture = Fixture::new(SIZE);
    let (image, uri) = (image.to_str().unwrap(), fixture.uri());
    assert!(run("qemu-img", &["info", "-f", "raw", &uri]).contains("virtual size: 24 MiB"));
    run("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", image, &uri]);
    assert!(run("qemu-img", &["compare", "-f", "raw", "-F", "raw", image, &uri]).contains("identical"));
    assert!(run("qemu-img", &["map", "-f", "raw", "--output=json", &uri]).contains("\"zero\": true"));
}

#[test]
fn qemu_io_verifies_patterns_zeroes_and_discards() {
    if !have("qemu-io") {
        return;
    }
    for block_size in [None, Some(512), Some(4096)] {
        let options = ExportOptions {
            block_size,
            ..ExportOptions::default()
        };
        let fixture = Fixture::with(SIZE, options, Limits::default(), true);
        let uri = fixture.uri();
        let mut arguments = vec!["-f", "raw"];
        for step in [
            "write -P 0x5a 0 4M",
            "write -f -P 0x33 4M 64k",
            "aio_write -P 0x77 5M 1M",
            "aio_flush",
            "write -z 1M 1M",
            "write -z -u 2M 64k",
            "discard 3M 512k",
            "flush",
            "read -P 0x5a 0 1M",
            "read -P 0 1M 1M",
            "read -P 0 2M 64k",
            "read -P 0x33 4M 64k",
            "read -P 0x77 5M 1M",
        ] {
            arguments.extend(["-c", step]);
        }
        arguments.push(&uri);
        let text = run("qemu-io", &arguments);
        assert!(!text.contains("failed") && !text.contains("error"), "{text}");
        assert_eq!(fixture.export.stats().errors, 0);
    }
}

#[test]
fn fio_verifies_what_it_wrote_through_four_connections() {
    if !have("fio") {
        return;
    }
    if !run("fio", &["--enghelp"]).contains("nbd") {
        assert!(
            std::env::var_os("CI").is_none(),
            "this fio has no nbd engine, but CI must have it"
        );
        eprintln!("skipped: this fio has no nbd engine");
        return;
    }
    let fixture = Fixture::new(SIZE);
    let uri = format!("--uri={}", fixture.uri());
    for (pattern, block) in [("randwrite", "4k"), ("write", "256k"), ("randrw", "512-64k")] {
        let blocks = format!("--{}={block}", if block.contains('-') { "bsrange" } else { "bs" });
        let text = run(
            "fio",
            &[
                "--name=verified",
                "--ioengine=nbd",
                &uri,
                &format!("--rw={pattern}"),
                &blocks,
                "--size=4m",
                "--numjobs=4",
                "--offset_increment=4m",
                "--iodepth=16",
                "--fsync=16",
                "--verify=crc32c",
                "--verify_fatal=1",
                "--verify_state_save=0",
                "--serialize_overlap=1",
            ],
        );
        assert!(text.contains("err= 0"), "{text}");
    }
    assert_eq!(fixture.export.stats().errors, 0);
}

/// Each error that the specification names, as libnbd understands it; without libnbd's own checks before.
const ERRORS: &str = r#"
import errno
h.set_strict_mode(0)
h.set_request_structured_replies(STRUCTURED)
h.connect_uri(URI)
def fails(error, call, *arguments):
    try:
        call(*arguments)
    except nbd.Error as e:
        assert e.errno == error, (e.errno, error)
        return
    raise AssertionError("no error")
size = h.get_size()
fails("EINVAL", h.pread, 512, size)
fails("ENOSPC", h.pwrite, b"x" * 512, size - 256)
fails("ENOSPC", h.zero, 512, size)
fails("EINVAL", h.trim, 512, size)
fails("EINVAL", h.cache, 512, size)
fails("EINVAL", h.pread, 512, 0, nbd.CMD_FLAG_NO_HOLE)
fails("EINVAL", h.zero, 0, 0)
fails("EOVERFLOW", h.pread, 33 << 20, 0)
h.pwrite(b"y" * 70000, 1000, nbd.CMD_FLAG_FUA)
assert h.pread(70002, 999) == b"\0" + b"y" * 70000 + b"\0"
h.flush()
h.zero(70000, 1000, nbd.CMD_FLAG_NO_HOLE)
assert h.pread(70000, 1000) == bytes(70000)
cookies = [h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray([i]) * 4096), i * 4096) for i in range(64)]
while h.aio_in_flight() > 0:
    h.poll(-1)
assert h.pread(64 * 4096, 0) == b"".join(bytes([i]) * 4096 for i in range(64))
h.shutdown()
"#;

#[test]
fn libnbd_in_python_gets_each_error_and_all_data() {
    if !have("nbdsh") {
        return;
    }
    for structured in ["False", "True"] {
        let fixture = Fixture::new(SIZE);
        let script = ERRORS
            .replace("URI", &format!("{:?}", fixture.uri()))
            .replace("STRUCTURED", structured);
        // Debian's own, which knows the module, whatever other Python comes first in the PATH.
        run("/usr/bin/python3", &["-m", "nbd", "-c", &script]);
    }
}

#[test]
fn libnbd_in_python_may_not_write_what_is_read_only() {
    if !have("nbdsh") {
        return;
    }
    let options = ExportOptions {
        read_only: true,
        ..ExportOptions::default()
    };
    let fixture = Fixture::with(SIZE, options, Limits::default(), true);
    let writes = r#"
for call in (lambda: h.pwrite(b"x" * 512, 0), lambda: h.zero(512, 0), lambda: h.trim(512, 0)):
    try:
        call()
    except nbd.Error as e:
        assert e.errno == "EPERM", e.errno
    else:
        raise AssertionError("no error")
h.flush()
assert h.pread(512, 0) == bytes(512)
"#;
    let script = format!("h.set_strict_mode(0)\nh.connect_uri({:?})\n{writes}", fixture.uri());
    run("/usr/bin/python3", &["-m", "nbd", "-c", &script]);
}

#[test]
fn nbd_client_lists_the_exports() {
    if !have("nbd-client") {
        return;
    }
    let fixture = Fixture::new(SIZE);
    let port = fixture.address.port().to_string();
    assert!(run("nbd-client", &["-l", "127.0.0.1", &port]).contains("disk"));
}
