//! The NBD server on a block device: a loop device, where the machine has them and the tests may set them up.
#![allow(clippy::unwrap_used)]

mod nbd_support;

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::Command;

use nbd_support::{Answer, Fixture};
use stiefel_server::nbd::{Export, ExportError, ExportOptions};
use stiefel_shared::nbd::*;

const SIZE: u64 = 16 << 20;

/// A loop device over a file full of 0x5a, gone at the end.
struct Loop {
    path: PathBuf,
    backing: tempfile::NamedTempFile,
}

impl Loop {
    fn new(sector: u32) -> Option<Self> {
        let backing = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(backing.path(), vec![0x5a; usize::try_from(SIZE).unwrap()]).unwrap();
        let sector = sector.to_string();
        let made = Command::new("losetup")
            .args(["--find", "--show", "-b", &sector])
            .arg(backing.path())
            .output();
        match made {
            Ok(output) if output.status.success() => {
                let path = String::from_utf8(output.stdout).unwrap().trim().into();
                Some(Self { path, backing })
            }
            _ => {
                eprintln!("skipped: no loop device can be had");
                None
            }
        }
    }

    /// Bytes that the backing file occupies.
    fn occupied(&self) -> u64 {
        self.backing.as_file().metadata().unwrap().blocks() * 512
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.path).status();
    }
}

#[test]
fn a_block_device_is_opened_exclusively_and_with_its_own_block_size() {
    let Some(device) = Loop::new(4096) else { return };
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
    let Some(device) = Loop::new(512) else { return };
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
