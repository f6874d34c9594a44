//! The NBD server on a block device: a loop device, where the machine has them and the tests may set them up.
#![allow(clippy::unwrap_used)]

mod nbd_support;

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use nbd_support::{Answer, Client, Fixture, PATIENCE};
use stiefel_server::nbd::{DropError, Export, ExportError, ExportOptions};
use stiefel_shared::nbd::*;

const SIZE: u64 = 16 << 20;

/// A loop device over a file, gone at the end.
struct Loop {
    path: PathBuf,
    backing: PathBuf,
}

impl Loop {
    fn new(sector: u32, backing: &Path) -> Option<Self> {
        let sector = sector.to_string();
        let made = Command::new("losetup")
            .args(["--find", "--show", "-b", &sector])
            .arg(backing)
            .output();
        match made {
            Ok(output) if output.status.success() => {
                let path = String::from_utf8(output.stdout).unwrap().trim().into();
                Some(Self {
                    path,
                    backing: backing.into(),
                })
            }
            _ => {
                eprintln!("skipped: no loop device can be had");
                None
            }
        }
    }

    /// Over a file full of 0x5a.
    fn full(sector: u32) -> Option<(Self, tempfile::NamedTempFile)> {
        let backing = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(backing.path(), vec![0x5a; usize::try_from(SIZE).unwrap()]).unwrap();
        Some((Self::new(sector, backing.path())?, backing))
    }

    /// Bytes that the backing file occupies.
    fn occupied(&self) -> u64 {
        self.backing.metadata().unwrap().blocks() * 512
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.path).status();
    }
}

#[test]
fn a_block_device_is_opened_exclusively_and_with_its_own_block_size() {
    let Some((device, _backing)) = Loop::full(4096) else {
        return;
    };
    let small = ExportOptions {
        block_size: Some(512),
        ..ExportOptions::default()
    };
    assert!(matches!(
        Export::open(&device.path, small),
        Err(ExportError::BlockSize { .. })
    ));
    let export = Export::open(&device.path, ExportOptions::default()).unwrap();
    assert_eq!(export.size(), SIZE);
    assert!(matches!(
        Export::open(&device.path, ExportOptions::default()),
        Err(ExportError::Open { .. })
    ));
    let fixture = Fixture::of(export);
    let mut client = fixture.client();
    assert_eq!(client.ask(CMD_READ, 0, 512, 4096, &[]), Answer::Error(Errno::Inval));
    assert_eq!(client.read(4096, 4096), vec![0x5a; 4096]);
    assert_eq!(fixture.simple_client().read(511, 3), [0x5a; 3]);
}

#[test]
fn a_block_device_is_written_zeroed_and_discarded() {
    let Some((device, _backing)) = Loop::full(512) else {
        return;
    };
    let fixture = Fixture::of(Export::open(&device.path, ExportOptions::default()).unwrap());
    // Told of no block sizes, so zeroes may begin and end inside of a block.
    let mut client = fixture.simple_client();
    for flags in [0, CMD_FLAG_NO_HOLE, CMD_FLAG_FUA] {
        client.write(0, &[7; 8192]);
        assert_eq!(client.ask(CMD_WRITE_ZEROES, flags, 100, 5000, &[]), Answer::Done);
        assert_eq!(
            client.read(0, 8192),
            [vec![7; 100], vec![0; 5000], vec![7; 3092]].concat()
        );
    }
    let inside = client.ask(CMD_WRITE_ZEROES, CMD_FLAG_FAST_ZERO, 8200, 100, &[]);
    assert_eq!(inside, Answer::Error(Errno::NotSup));
    let keep = CMD_FLAG_FAST_ZERO | CMD_FLAG_NO_HOLE;
    assert_eq!(
        client.ask(CMD_WRITE_ZEROES, keep, 8192, 4096, &[]),
        Answer::Error(Errno::NotSup)
    );
    assert_eq!(client.read(8192, 4096), vec![0x5a; 4096]);
    assert_eq!(client.ask(CMD_FLUSH, 0, 0, 0, &[]), Answer::Done);
    let before = device.occupied();
    assert_eq!(client.ask(CMD_TRIM, CMD_FLAG_FUA, 1 << 20, 4 << 20, &[]), Answer::Done);
    assert!(
        device.occupied() + (3 << 20) < before,
        "the file system below gives space back"
    );
    assert_eq!(client.read((1 << 20) - 2, 2), [0x5a; 2]);
    assert_eq!(client.read(5 << 20, 2), [0x5a; 2]);
}

/// A file system of 4 MiB, gone at the end.
struct TooSmall(tempfile::TempDir);

impl TooSmall {
    fn new() -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=4m", "none"])
            .arg(directory.path())
            .status();
        if mounted.is_ok_and(|status| status.success()) {
            return Some(Self(directory));
        }
        eprintln!("skipped: nothing can be mounted");
        None
    }
}

impl Drop for TooSmall {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(self.0.path()).status();
    }
}

/// What brings data onto the medium, and so must notice that it cannot.
const SYNCING: [(u16, u16); 4] = [
    (CMD_FLUSH, 0),
    (CMD_WRITE, CMD_FLAG_FUA),
    (CMD_WRITE_ZEROES, CMD_FLAG_FUA),
    (CMD_TRIM, CMD_FLAG_FUA),
];

fn sync(client: &mut Client, (command, flags): (u16, u16)) -> Answer {
    let length = if command == CMD_FLUSH { 0 } else { 512 };
    let payload = if command == CMD_WRITE { &[3; 512][..] } else { &[] };
    client.ask(command, flags, 0, length, payload)
}

/// The device takes everything into the page cache, but the file below has no room for it.
#[test]
fn a_failed_flush_is_reported_and_stays_reported_on_all_connections() {
    for first in SYNCING {
        let Some(too_small) = TooSmall::new() else { return };
        let backing = too_small.0.path().join("sparse");
        std::fs::File::create(&backing).unwrap().set_len(SIZE).unwrap();
        let Some(device) = Loop::new(512, &backing) else { return };
        let fixture = Fixture::of(Export::open(&device.path, ExportOptions::default()).unwrap());
        let mut clients = [fixture.client(), fixture.simple_client()];
        for offset in (0..SIZE).step_by(1 << 20) {
            clients[0].write(offset, &vec![1; 1 << 20]);
        }
        assert_eq!(sync(&mut clients[0], first), Answer::Error(Errno::Io), "{first:?}");
        for client in &mut clients {
            for again in SYNCING.into_iter().chain([(CMD_WRITE, 0)]) {
                assert_eq!(sync(client, again), Answer::Error(Errno::Io), "{first:?} {again:?}");
            }
        }
        assert!(fixture.export.flush().is_err());
        let stopped = fixture.server.stop(PATIENCE);
        assert!(matches!(stopped, Err(DropError::Flush { .. })));
        drop(fixture.export);
    }
}
