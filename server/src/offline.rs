//! The laptop's ramdisk when it was not started from the laptop's OS: what the desktop boots is read from the disk.
//!
//! `once` is the start by the firmware that the OS has prepared ([`crate::reboot`]), `search` the start from a stick of the laptop's
//! own. Both end in the same: the parts are files of the ramdisk and the handover is that of any server, so that serving, and a
//! role that is started again, know no difference. Specification: docs/architecture.md, "Leaving by a reboot".
//!
//! The disk is read through a loop device that refuses writes (`stiefel_sys::shield`): not even a journal is brought up to date.
//! The one write is the end of the one-time image (`once`). With a stick of the laptop's own, LUKS and LVM are opened over such devices
//! (`layers`), by a passphrase that a desktop sends (`desk`). Refused: another file system than the ones that the ramdisk has.

mod desk;
mod layers;
mod limit;
mod once;
mod search;
mod tools;
mod volumes;

use std::fs::{File, Permissions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, ensure};
use sha2::{Digest, Sha256};
use stiefel_shared::cpio;
use stiefel_shared::handover::{HANDOVER_PATH, Handover, Part, ServerHandover};
use stiefel_sys::wipe;

pub use once::once;
pub(crate) use once::take_away;
pub use search::search;

/// How often something was read from the disk, or mounted: who waits sees by it that it goes on.
static STEPS: AtomicU64 = AtomicU64::new(0);

fn step() {
    STEPS.fetch_add(1, Ordering::Relaxed);
}

/// Ends when the disk has not given anything for `limit`, at most twice that late. Nothing that waits for a disk that hangs can be ended.
pub async fn stalled(limit: Duration) {
    no_more(limit, || STEPS.load(Ordering::Relaxed)).await;
}

async fn no_more(limit: Duration, steps: impl Fn() -> u64) {
    loop {
        let before = steps();
        tokio::time::sleep(limit).await;
        if steps() == before {
            return;
        }
    }
}

/// Bytes copied at a time.
const CHUNK: usize = 1 << 20;

/// Where a part belongs, below `root`, the ramdisk's.
fn part_path(root: &Path, part: Part) -> PathBuf {
    root.join(part.path())
}

/// Makes the ramdisk's handover that of a server whose parts are there: what is started again begins here.
fn settle(root: &Path, server: &ServerHandover) -> anyhow::Result<()> {
    let json = Handover::Server(Box::new(server.clone())).to_json()?;
    let path = root.join(HANDOVER_PATH);
    let mut name = path.clone().into_os_string();
    name.push(".new");
    let beside = PathBuf::from(name);
    wipe::file(&beside).context("cannot remove what an earlier try has left")?;
    let mut file = File::options().write(true).create_new(true).mode(0o600).open(&beside)?;
    file.write_all(&json.0)?;
    drop(file);
    // Renaming over it would leave the old bytes in memory.
    wipe::file(&path).context("cannot wipe the handover")?;
    std::fs::rename(&beside, &path).context("cannot write the handover")
}

/// A part that is being put together from several pieces.
struct Gather {
    to: File,
    len: u64,
    limit: u64,
    hash: Sha256,
}

impl Gather {
    /// Begins `part` below `root`, 0600; what an earlier try has left is overwritten.
    fn begin(root: &Path, part: Part) -> anyhow::Result<Self> {
        let path = part_path(root, part);
        let folder = path.parent().context("a part has a folder")?;
        std::fs::create_dir_all(folder).context("cannot make the payload's folder")?;
        std::fs::set_permissions(folder, Permissions::from_mode(0o700))?;
        let mut options = File::options();
        let to = options.write(true).create(true).truncate(true).mode(0o600).open(&path);
        Ok(Self {
            to: to.with_context(|| format!("cannot write {}", path.display()))?,
            len: 0,
            limit: part.limit(),
            hash: Sha256::new(),
        })
    }

    fn write(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        self.len += bytes.len() as u64;
        ensure!(
            self.len <= self.limit,
            "it has more than the {} bytes that a desktop takes; make a smaller initrd",
            self.limit
        );
        self.hash.update(bytes);
        step();
        Ok(self.to.write_all(bytes)?)
    }

    /// Adds a file, or a range of it; it begins at a multiple of 4, as kernels want it of initrds.
    fn add(&mut self, path: &Path, range: Option<(u64, u64)>) -> anyhow::Result<()> {
        let gap = usize::try_from(cpio::padding(self.len, 4))?;
        self.write([0; 4].get(..gap).unwrap_or_default())?;
        let mut file = File::open(path)?;
        let have = file.metadata()?.len();
        let (offset, len) = range.unwrap_or((0, have));
        ensure!(
            offset.checked_add(len).is_some_and(|end| end <= have),
            "it is shorter than it should be"
        );
        file.seek(SeekFrom::Start(offset))?;
        let mut left = file.take(len);
        let mut buffer = vec![0; CHUNK];
        loop {
            let got = left.read(&mut buffer)?;
            if got == 0 {
                break;
            }
            self.write(buffer.get(..got).unwrap_or_default())?;
        }
        ensure!(
            left.limit() == 0,
            io::Error::new(io::ErrorKind::UnexpectedEof, "it ends early")
        );
        Ok(())
    }

    /// Its length and digest.
    fn end(self) -> (u64, String) {
        let digits = self.hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        (self.len, digits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use stiefel_shared::handover::{After, DiskIdentity, DiskTransport, Encryption, LinkMode, Payload, SessionMode};
    use stiefel_shared::key::StickKey;

    pub(super) fn server() -> ServerHandover {
        ServerHandover {
            keys: vec![StickKey::generate("stick").unwrap()],
            hostname: "laptop".into(),
            disk: DiskIdentity::default(),
            payload: Payload {
                version: "6.1.0".into(),
                cmdline: "root=UUID=1".into(),
                parts: Vec::new(),
                boot: None,
            },
            after: After::Return,
            encryption: Encryption::Wireguard,
            mode: LinkMode::Dedicated,
            transport: DiskTransport::Nbd,
            session: SessionMode::Normal,
            grace: 900,
            tickets: Vec::new(),
        }
    }

    #[tokio::test]
    async fn reading_is_given_up_only_when_nothing_more_comes() {
        let (asked, steps) = (AtomicU64::new(0), [1, 2, 2, 5, 6, 7, 7, 7]);
        let told = || {
            let at = asked.fetch_add(1, Ordering::Relaxed);
            steps[usize::try_from(at).unwrap()]
        };
        no_more(Duration::from_millis(1), told).await;
        // Asked twice in each turn: 1 2, 2 5, 6 7, 7 7.
        assert_eq!(asked.into_inner(), 8);
    }

    #[test]
    fn what_is_put_together_is_seen_from_outside() {
        let dir = tempfile::tempdir().unwrap();
        let before = STEPS.load(Ordering::Relaxed);
        Gather::begin(dir.path(), Part::Kernel).unwrap().write(b"a").unwrap();
        assert!(STEPS.load(Ordering::Relaxed) > before);
    }

    #[test]
    fn pieces_are_joined_at_multiples_of_four_and_closed_to_others() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        std::fs::write(&a, b"12345").unwrap();
        std::fs::write(&b, b"xabcx").unwrap();
        let mut gather = Gather::begin(dir.path(), Part::Initrd).unwrap();
        gather.add(&a, None).unwrap();
        gather.add(&b, Some((1, 3))).unwrap();
        let (len, digest) = gather.end();
        let path = part_path(dir.path(), Part::Initrd);
        let whole = std::fs::read(&path).unwrap();
        assert_eq!((whole.as_slice(), len), (b"12345\0\0\0abc".as_slice(), 11));
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        let expected: String = Sha256::digest(&whole)
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        assert_eq!(digest, expected);
    }

    #[test]
    fn a_range_past_the_end_and_a_part_over_its_limit_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a");
        std::fs::write(&file, b"12345").unwrap();
        let mut gather = Gather::begin(dir.path(), Part::Kernel).unwrap();
        for range in [(3, 3), (6, 0), (u64::MAX, 2)] {
            assert!(gather.add(&file, Some(range)).is_err(), "{range:?}");
        }
        gather.limit = 4;
        assert!(gather.add(&file, None).is_err());
    }

    #[test]
    fn the_settled_handover_is_a_servers_and_replaces_the_old_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(HANDOVER_PATH);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, "old").unwrap();
        std::fs::write(path.with_extension("json.new"), "cut off").unwrap();
        settle(dir.path(), &server()).unwrap();
        let read = Handover::parse(&std::fs::read(&path).unwrap()).unwrap();
        assert!(matches!(read, Handover::Server(read) if read.hostname == "laptop"));
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }
}
