//! Machines with nothing but the ramdisk, for faults that need no installed system: up in seconds.

use std::path::Path;

use stiefel_shared::cpio;
use stiefel_shared::handover::{
    After, ClientHandover, DiskIdentity, DiskTransport, Encryption, Handover, LinkMode, Part, PartSize, Payload,
    ServerHandover, SessionMode, ramdisk_cmdline,
};
use stiefel_shared::key::StickKey;
use stiefel_tests::kit::CONSOLE;
use stiefel_tests::scenario::Failure;
use stiefel_tests::{Content, Drive, Netdev, NicModel, VmBuilder, tiny::tiny};

use crate::runner::Bench;

/// Hardware addresses of the two machines.
pub(crate) const LAPTOP_MAC: &str = "52:54:00:57:1e:11";
pub(crate) const DESKTOP_MAC: &str = "52:54:00:57:1e:12";
/// The serial number of the disk, and its size.
const SERIAL: &str = "tiny-disk";
pub(crate) const DISK_MIB: u32 = 64;
const DISK_SIZE: u64 = (DISK_MIB as u64) << 20;
/// Random bytes that stand for an initrd: enough for something to happen in the middle.
const INITRD_SIZE: usize = 24 << 20;

/// A key of the kit.
pub(crate) fn key(bench: &Bench, name: &str) -> Result<StickKey, Failure> {
    let path = bench.kit.key(name);
    if !path.exists() {
        bench.kit.new_key(name)?;
    }
    Ok(StickKey::parse(name, &std::fs::read(path)?)?)
}

/// The laptop's ramdisk, with a disk.
pub(crate) struct Server {
    /// The key it knows.
    pub(crate) key: StickKey,
    /// The serial number of its disk; it looks for the one with [`SERIAL`].
    pub(crate) serial: &'static str,
    /// Puts something on its disk's image, and must leave it as long as it was.
    pub(crate) fill: fn(&Path) -> Result<(), Failure>,
    /// How the disk travels.
    pub(crate) encryption: Encryption,
    /// What the link is used for besides.
    pub(crate) mode: LinkMode,
    /// How it is served.
    pub(crate) transport: DiskTransport,
    /// What becomes of what a desktop writes.
    pub(crate) session: SessionMode,
    /// How long it waits for a silent desktop, in seconds.
    pub(crate) grace: u64,
    /// The payload; by default something that does not boot.
    pub(crate) parts: Vec<(Part, Vec<u8>)>,
    /// More words on the payload's command line.
    pub(crate) words: String,
    /// Its NIC.
    pub(crate) nic: NicModel,
}

impl Server {
    pub(crate) fn new(key: &StickKey) -> Self {
        Self {
            key: key.clone(),
            serial: SERIAL,
            fill: |_| Ok(()),
            encryption: Encryption::None,
            mode: LinkMode::Dedicated,
            transport: DiskTransport::Nbd,
            session: SessionMode::Normal,
            grace: 900,
            parts: Vec::new(),
            words: String::new(),
            nic: NicModel::VirtioPlain,
        }
    }

    /// The machine, with its disk's image in `dir`.
    pub(crate) fn machine(self, bench: &Bench, cable: &Netdev, dir: &Path) -> Result<VmBuilder, Failure> {
        let disk = dir.join("disk.img");
        std::fs::File::create(&disk)?.set_len(DISK_SIZE)?;
        (self.fill)(&disk)?;
        let parts = if self.parts.is_empty() {
            vec![
                (Part::Kernel, std::fs::read(&bench.kit.installed().kernel)?),
                (Part::Initrd, noise(INITRD_SIZE)),
            ]
        } else {
            self.parts
        };
        let sizes = parts.iter().map(|(part, bytes)| PartSize {
            part: *part,
            size: bytes.len() as u64,
        });
        let handover = Handover::Server(Box::new(ServerHandover {
            keys: vec![self.key],
            hostname: "tiny".to_owned(),
            disk: DiskIdentity {
                serial: Some(SERIAL.to_owned()),
                size: DISK_SIZE,
                ..DiskIdentity::default()
            },
            payload: Payload {
                version: bench.kit.installed().version.clone(),
                cmdline: format!("{} {}", CONSOLE.join(" "), self.words),
                parts: sizes.collect(),
                boot: Some(Vec::new()),
            },
            after: After::Return,
            encryption: self.encryption,
            mode: self.mode,
            transport: self.transport,
            session: self.session,
            grace: self.grace,
            tickets: Vec::new(),
        }));
        let mut archive = cpio::Writer::new(handover.to_cpio()?.0.clone());
        archive.dir("stiefel/payload", 0o700)?;
        for (part, bytes) in &parts {
            archive.file(part.path(), 0o600, bytes)?;
        }
        Ok(machine(bench, "laptop", &archive.finish()?)
            .disk(Drive {
                path: disk,
                serial: self.serial.to_owned(),
                snapshot: false,
            })
            .nic("cable", self.nic, cable, LAPTOP_MAC))
    }
}

/// The laptop's ramdisk as most tests want it.
pub(crate) fn server(bench: &Bench, key: &StickKey, cable: &Netdev, dir: &Path) -> Result<VmBuilder, Failure> {
    Server::new(key).machine(bench, cable, dir)
}

/// The desktop's ramdisk.
pub(crate) fn client(bench: &Bench, key: &StickKey, cable: &Netdev) -> Result<VmBuilder, Failure> {
    Ok(client_without_nic(bench, key)?.nic("cable", NicModel::VirtioPlain, cable, DESKTOP_MAC))
}

/// The desktop's ramdisk, still without a NIC.
pub(crate) fn client_without_nic(bench: &Bench, key: &StickKey) -> Result<VmBuilder, Failure> {
    let handover = Handover::Client(ClientHandover {
        key: key.clone(),
        encrypted_only: false,
    })
    .to_cpio()?;
    Ok(machine(bench, "desktop", &handover.0))
}

/// A machine with the ramdisk and this handover.
pub(crate) fn machine(bench: &Bench, name: &str, handover: &[u8]) -> VmBuilder {
    let ramdisk = bench.kit.ramdisk();
    let cmdline = ramdisk_cmdline(&CONSOLE.join(" "));
    // For [`stiefel_tests::Vm::sysrq`].
    let words: Vec<&str> = cmdline.split(' ').chain(["sysrq_always_enabled=1"]).collect();
    tiny(
        name,
        &ramdisk.join("kernel"),
        &Content::File(ramdisk.join("ramdisk.cpio.zst")),
        handover,
        &words,
    )
}

/// Bytes that do not compress and are the same in every run (xorshift64).
fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}
