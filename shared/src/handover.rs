//! The handover: what one kernel gives to the next, as a small cpio appended to the initrd in memory.
//!
//! Written by `server::collect` (laptop OS → ramdisk), by `initrd_builder::stick` (stick → ramdisk) and by
//! `client::role` (ramdisk → payload); read by `init` and by `client::attach`. It carries secrets, so its files
//! are 0600, and nothing of it is ever put on a command line, which everyone can read in /proc/cmdline.
//!
//! The laptop's handover also carries the payload: the parts are separate files beside the JSON, see [`Part::path`].

use serde::{Deserialize, Serialize};
use zeroize::{Zeroize, ZeroizeOnDrop};

use crate::cpio;
use crate::discovery::Ticket;
use crate::key::StickKey;
use crate::loader::cmdline::split;

mod layers;
pub use layers::{Layers, Logical, Luks};
/// Where the ramdisk's handover lies: one JSON document, [`Handover`].
pub const HANDOVER_PATH: &str = "stiefel/handover.json";
/// Where the desktop's session lies inside the payload's initrd: one JSON document, [`crate::bundle::AttachSession`].
pub const SESSION_PATH: &str = "stiefel/session.json";
/// Where the program lies inside the payload's initrd; also its `rdinit=`.
pub const PROGRAM_PATH: &str = "stiefel/stiefel";
/// The largest handover or session document that is read, in bytes.
pub const MAX_DOCUMENT: u64 = 256 * 1024;

/// The command line of the ramdisk's kernel: only warnings of the kernel on the screen, which is ours to fill; after a
/// panic a reboot, so that the laptop comes home; then what the configuration adds.
#[must_use]
pub fn ramdisk_cmdline(extra: &str) -> String {
    let words: Vec<&str> = ["loglevel=4", "panic=30"]
        .into_iter()
        .chain(extra.split_whitespace())
        .collect();
    words.join(" ")
}

/// What a booted ramdisk is to be, and with what.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "role", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Handover {
    /// The laptop: serve the payload and the disk.
    Server(Box<ServerHandover>),
    /// The desktop, started from its stick: find the laptop and boot from it.
    Client(ClientHandover),
    /// Any machine: lend its disks.
    Target(TargetHandover),
    /// The laptop, started by its firmware for this one time: the payload's kernel and initrd are still on its disk.
    Once(Box<OnceHandover>),
    /// The laptop, started from a stick of its own: what the desktop boots has to be looked for on its disk.
    Search(Box<SearchHandover>),
}

/// What the laptop's ramdisk is told by the laptop's OS that was left by a reboot (`trigger.method: reboot`).
///
/// It lay on the EFI system partition, so its keys are good for this activation alone.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OnceHandover {
    /// What it will be told to serve, once the parts are there. The overlay came with the handover.
    pub server: ServerHandover,
    /// The image that was started: taken away before anything else is done.
    pub image: Place,
    /// The kernel.
    pub kernel: FilePart,
    /// The initrd.
    pub initrd: FilePart,
}

/// A part of the payload that lies in files of the laptop's disk, one after the other, each beginning at a multiple of 4.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FilePart {
    /// Where.
    pub files: Vec<Place>,
    /// The digest of it all, as 64 hexadecimal digits of SHA-256: it must be what the laptop's OS saw.
    pub sha256: String,
}

/// A file on a partition of the served disk, or a range of one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Place {
    /// The file system.
    pub volume: Volume,
    /// From that file system's root, with a slash in front.
    pub path: String,
    /// Where in the file, and how much, in bytes; all of it if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub range: Option<(u64, u64)>,
}

/// A file system on a partition of the served disk: in the clear, or as [`Layers`] say of that partition.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Volume {
    /// The partition's number.
    pub partition: u32,
    /// Its type; one of [`VOLUMES`].
    pub fstype: String,
    /// Which folder of it is meant as its root: a subvolume of btrfs; else `/`.
    pub folder: String,
    /// It is on this volume of LVM, of which the partition has at least a part.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logical: Option<Logical>,
}

/// The file systems that the ramdisk reads, and how each is mounted without bringing its journal up to date: then its content may be
/// older than what the last system has written.
pub const VOLUMES: [(&str, Option<&str>); 4] = [
    ("ext4", Some("noload")),
    ("xfs", Some("norecovery")),
    ("btrfs", Some("rescue=nologreplay")),
    ("vfat", None),
];

/// What the laptop's ramdisk is told by a stick of the laptop's own (`stiefel stick --laptop`). Keys and configuration are read from the
/// disk at each start, so that who has the stick alone boots nothing, and a revoked key counts. Secret is only what [`Layers`] hold.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SearchHandover {
    /// The laptop's host name.
    pub hostname: String,
    /// The disk to serve.
    pub disk: DiskIdentity,
    /// The file systems that make up the laptop's system, `/` first, each with where it is mounted.
    pub mounts: Vec<(String, Volume)>,
    /// Whether this ramdisk can make the tunnel.
    pub wireguard: bool,
    /// Whether this ramdisk can serve a disk by NVMe over TCP.
    pub nvme_target: bool,
    /// What has to be opened first, if anything.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layers: Option<Layers>,
}

/// What the ramdisk of a machine is told that lends its disks.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TargetHandover {
    /// Who has one of these may borrow the disks.
    pub keys: Vec<StickKey>,
    /// Everybody may, in clear.
    #[serde(default)]
    pub open: bool,
    /// The disks that one borrower may write.
    #[serde(default)]
    pub read_write: Vec<WritableDisk>,
    /// All others can be written, too, but what is written is thrown away at the end.
    #[serde(default)]
    pub snapshot: bool,
    /// What the machine is called; `None` if that is not known.
    #[serde(default)]
    pub hostname: Option<String>,
}

/// A disk that may be written, told by one system to another in which it has to be found again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WritableDisk {
    /// The name that `stiefel target` lists it by.
    pub name: String,
    /// In bytes; `None` if that is not known. It tells it from another disk in the same USB case.
    #[serde(default)]
    pub size: Option<u64>,
}

/// What the laptop's ramdisk is told by the laptop's OS.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServerHandover {
    /// The keys of all sticks that may connect.
    pub keys: Vec<StickKey>,
    /// The laptop's host name, shown on both screens.
    pub hostname: String,
    /// The disk to serve.
    pub disk: DiskIdentity,
    /// What the desktop is to boot.
    pub payload: Payload,
    /// What happens when the desktop has been powered off.
    pub after: After,
    /// Whether the disk travels inside a tunnel.
    pub encryption: Encryption,
    /// What the link is used for besides.
    pub mode: LinkMode,
    /// How the disk is served; both kernels can do it. With guests always by NBD.
    pub transport: DiskTransport,
    /// What becomes of what a desktop writes.
    pub session: SessionMode,
    /// How long the laptop waits for a desktop that is not heard any more, in seconds.
    pub grace: u64,
    /// The keys are those of one activation, and these tell the sticks so.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tickets: Vec<Ticket>,
}

/// What the desktop's ramdisk is told by its stick.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClientHandover {
    /// The stick's one key.
    pub key: StickKey,
    /// Refuse a laptop that would send its disk in clear.
    #[serde(default)]
    pub encrypted_only: bool,
}

/// The laptop OS's own kernel, initrd and command line, to be booted on the desktop.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Payload {
    /// The kernel's release, as `uname -r` prints it.
    pub version: String,
    /// The whole command line, ready for the desktop but for what the client adds (`rdinit=` …).
    pub cmdline: String,
    /// Which parts there are, with their sizes, in the order in which they are sent.
    pub parts: Vec<PartSize>,
    /// Where the kernel, the initrd and the boot loader's configuration lie, and what was there; `None` if the desktop could
    /// not see all of it at the end, and has to take it for changed.
    pub boot: Option<Vec<BootFolder>>,
}

/// A folder that the laptop boots from, so that the desktop can see whether it was changed (a kernel upgrade).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootFolder {
    /// Where it is in the laptop's system; of a file system of its own, where that is mounted. Or a single file.
    pub path: String,
    /// The partition of the served disk whose file system it is; `None` if it is part of the root file system.
    pub partition: Option<u32>,
    /// That file system's type, e.g. `vfat`.
    pub fstype: String,
    /// What was in it: `stiefel_sys::fingerprint`, 64 hexadecimal digits.
    pub fingerprint: String,
}

/// More folders than this are not looked at.
pub const MAX_BOOT_FOLDERS: usize = 16;

impl BootFolder {
    /// Whether it can be what the laptop writes: the desktop mounts and reads what it names.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        let plain = |text: &str| !text.chars().any(char::is_control);
        let path = self.path.len() <= 1024 && plain(&self.path) && self.path.starts_with('/');
        let below = !self.path.split('/').any(|part| part == "..");
        let fstype = (1..=32).contains(&self.fstype.len()) && self.fstype.bytes().all(|byte| byte.is_ascii_graphic());
        let digits = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        path && below && fstype && self.fingerprint.len() == 64 && self.fingerprint.bytes().all(digits)
    }
}

/// The longest command line that x86-64 and arm64 kernels take from kexec, in bytes.
pub const MAX_CMDLINE: usize = 2047;

impl Payload {
    /// The command line for the desktop: the payload's own with what the desktop needs besides.
    ///
    /// `noresume`: a hibernation image belongs to the laptop alone. Suspend and hibernation would leave the laptop's disk
    /// half written. (Whether swap is used is the laptop's configuration, so it is in the payload's words already.)
    #[must_use]
    pub fn desktop_cmdline(&self) -> String {
        // Without IPv6 there is no way to the laptop; the system's own interfaces stay without it.
        let words = split(&self.cmdline).into_iter().map(|word| match word {
            "ipv6.disable=1" => "ipv6.disable_ipv6=1",
            word => word,
        });
        let mut line = words.collect::<Vec<_>>().join(" ");
        let masks = [
            "sleep",
            "suspend",
            "hibernate",
            "hybrid-sleep",
            "suspend-then-hibernate",
        ]
        .map(|target| format!("systemd.mask={target}.target"));
        for word in [format!("rdinit=/{PROGRAM_PATH}"), "noresume".to_owned()]
            .into_iter()
            .chain(masks)
        {
            line = insert_word(&line, &word);
        }
        line
    }
}

/// Adds a word for the kernel at the end of a command line, but before `--`: what follows that is for init.
#[must_use]
pub fn insert_word(cmdline: &str, word: &str) -> String {
    let mut words = split(cmdline);
    let end = words.iter().position(|word| *word == "--").unwrap_or(words.len());
    words.insert(end, word);
    words.join(" ")
}

/// A part's length.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PartSize {
    /// Which part.
    pub part: Part,
    /// Its length in bytes.
    pub size: u64,
}

/// The parts of a payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Part {
    /// The kernel image, as kexec_file_load takes it.
    Kernel,
    /// The laptop OS's own initrd(s), concatenated.
    Initrd,
    /// Our cpio of modules and firmware, appended to it.
    Overlay,
}

impl Part {
    /// Every part, in the order in which they are sent.
    pub const ALL: [Self; 3] = [Self::Kernel, Self::Initrd, Self::Overlay];

    /// Where the part lies in the laptop's ramdisk (without the leading slash).
    #[must_use]
    pub const fn path(self) -> &'static str {
        match self {
            Self::Kernel => "stiefel/payload/kernel",
            Self::Initrd => "stiefel/payload/initrd",
            Self::Overlay => "stiefel/payload/overlay",
        }
    }

    /// The word for people.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Kernel => "kernel",
            Self::Initrd => "initrd",
            Self::Overlay => "modules",
        }
    }

    /// The largest size accepted, in bytes: a bound for what a peer may make us hold.
    #[must_use]
    pub const fn limit(self) -> u64 {
        match self {
            Self::Kernel => 256 << 20,
            Self::Initrd => 2 << 30,
            Self::Overlay => 512 << 20,
        }
    }
}

/// `link.encryption`: how the disk travels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Encryption {
    /// Inside a WireGuard tunnel with keys of the session.
    #[default]
    Wireguard,
    /// In clear: only for a cable that its owner trusts.
    None,
}

/// `link.mode`: what the link is used for besides the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LinkMode {
    /// Nothing: the desktop's system never sees its NIC.
    #[default]
    Dedicated,
    /// The desktop's system uses the same NIC, too, for example to reach the internet.
    Lan,
}

/// How the disk's blocks travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskTransport {
    /// NVMe over TCP: both ends are the kernels'.
    NvmeTcp,
    /// NBD: our own server.
    Nbd,
}

/// `session.mode`: what becomes of what a desktop writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SessionMode {
    /// It goes onto the laptop's disk, which one desktop has at a time.
    #[default]
    Normal,
    /// It stays in the laptop's memory, and is gone with the session; several desktops may be there at once.
    Guest,
}

/// `session.after`: what the laptop does once the desktop was powered off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum After {
    /// Reboot into the laptop's own OS.
    #[default]
    Return,
    /// Go on serving.
    Stay,
    /// Power the laptop off.
    Poweroff,
}

/// How a disk is known again under another kernel: by what it is, never by its name.
///
/// A disk matches by its GPT disk GUID when both have one, else by WWID, else by serial and model.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskIdentity {
    /// GPT disk GUID, lower case, as sgdisk prints it.
    pub gpt_guid: Option<String>,
    /// World wide identifier as sysfs has it.
    pub wwid: Option<String>,
    /// Serial number, trimmed.
    pub serial: Option<String>,
    /// Model, trimmed.
    pub model: Option<String>,
    /// Size in bytes.
    pub size: u64,
}

impl std::fmt::Display for DiskIdentity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes", self.size)?;
        let parts = [
            ("model", &self.model),
            ("serial", &self.serial),
            ("WWID", &self.wwid),
            ("GPT GUID", &self.gpt_guid),
        ];
        parts.iter().try_for_each(|(name, value)| match value {
            Some(value) => write!(f, ", {name} {value}"),
            None => Ok(()),
        })
    }
}

/// Why a handover could not be read.
#[derive(Debug, thiserror::Error)]
pub enum HandoverError {
    /// The document is no valid handover.
    #[error("the handover is not understood; build the ramdisk and the stick anew with this version of stiefel")]
    Malformed(#[source] serde_json::Error),
    /// The archive could not be written.
    #[error("the handover archive could not be written to memory")]
    Write(#[source] std::io::Error),
}

/// A secret document as JSON.
///
/// # Errors
/// [`HandoverError::Malformed`] if it cannot be written as JSON.
pub fn secret_json(document: &impl Serialize) -> Result<SecretBytes, HandoverError> {
    // Large enough from the start: a growing vector would leave copies of the secret behind.
    let mut json = SecretBytes(Vec::with_capacity(usize::try_from(MAX_DOCUMENT).unwrap_or_default()));
    serde_json::to_writer(&mut json.0, document).map_err(HandoverError::Malformed)?;
    Ok(json)
}

/// Bytes that are wiped when dropped.
#[derive(Zeroize, ZeroizeOnDrop, Default)]
pub struct SecretBytes(pub Vec<u8>);

impl std::fmt::Debug for SecretBytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SecretBytes({} bytes)", self.0.len())
    }
}

impl Handover {
    /// Reads the document at [`HANDOVER_PATH`].
    ///
    /// # Errors
    /// [`HandoverError::Malformed`] for anything but a complete document of this version.
    pub fn parse(json: &[u8]) -> Result<Self, HandoverError> {
        serde_json::from_slice(json).map_err(HandoverError::Malformed)
    }

    /// The document as JSON; secret.
    ///
    /// # Errors
    /// [`HandoverError::Malformed`] if it cannot be written as JSON.
    pub fn to_json(&self) -> Result<SecretBytes, HandoverError> {
        secret_json(self)
    }

    /// The document as an uncompressed cpio that can be appended to an initrd; secret. It starts with the document;
    /// `finish` it after adding the payload's parts, if there are any.
    ///
    /// # Errors
    /// [`HandoverError`] if it cannot be written.
    pub fn to_cpio(&self) -> Result<SecretBytes, HandoverError> {
        let json = self.to_json()?;
        secret_document(HANDOVER_PATH, &json.0)
    }
}

/// One 0600 file below its folder, as a finished uncompressed cpio; secret.
///
/// # Errors
/// [`HandoverError::Write`] if it cannot be written.
pub fn secret_document(path: &str, bytes: &[u8]) -> Result<SecretBytes, HandoverError> {
    // Enough for header, name and trailer: a growing vector would leave copies of the secret behind.
    let mut out = SecretBytes(Vec::with_capacity(bytes.len() + 4096));
    let mut archive = cpio::Writer::new(&mut out.0);
    (|| {
        archive.dir("stiefel", 0o700)?;
        archive.file(path, 0o600, bytes)?;
        archive.finish()
    })()
    .map_err(HandoverError::Write)?;
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn payload(cmdline: &str) -> Payload {
        Payload {
            version: "6.1".to_owned(),
            cmdline: cmdline.to_owned(),
            parts: Vec::new(),
            boot: None,
        }
    }

    #[test]
    fn the_payloads_words_stay_first_and_sleep_is_masked() {
        let line = payload("root=UUID=1 ro quiet").desktop_cmdline();
        assert!(
            line.starts_with("root=UUID=1 ro quiet rdinit=/stiefel/stiefel noresume "),
            "{line}"
        );
        assert!(line.contains("systemd.mask=hibernate.target"), "{line}");
    }

    #[test]
    fn a_system_without_ipv6_still_gets_the_links_own() {
        let line = payload("ro ipv6.disable=1 quiet").desktop_cmdline();
        assert!(line.starts_with("ro ipv6.disable_ipv6=1 quiet "), "{line}");
    }

    #[test]
    fn words_for_init_stay_behind_ours() {
        let line = payload("root=UUID=1 -- splash").desktop_cmdline();
        assert!(
            line.ends_with(" -- splash") && line.contains(" rdinit=/stiefel/stiefel "),
            "{line}"
        );
        assert_eq!(insert_word("ro --", "noresume"), "ro noresume --");
        assert_eq!(insert_word("", "noresume"), "noresume");
        assert_eq!(insert_word("x=\"a  -- b\" -- c", "y"), "x=\"a  -- b\" y -- c");
    }

    #[test]
    fn a_boot_folder_names_nothing_that_leads_elsewhere() {
        let sound = BootFolder {
            path: "/boot".to_owned(),
            partition: Some(2),
            fstype: "ext4".to_owned(),
            fingerprint: "0a".repeat(32),
        };
        assert!(sound.is_sound());
        let changes: [fn(&mut BootFolder); 6] = [
            |folder| folder.path = "boot".to_owned(),
            |folder| folder.path = "/boot/../dev".to_owned(),
            |folder| folder.path = "/boot\n".to_owned(),
            |folder| folder.fstype = String::new(),
            |folder| folder.fingerprint = "0A".repeat(32),
            |folder| folder.fingerprint.truncate(63),
        ];
        for change in changes {
            let mut folder = sound.clone();
            change(&mut folder);
            assert!(!folder.is_sound(), "{folder:?}");
        }
    }

    #[test]
    fn a_handover_survives_its_own_json_and_prints_no_key() {
        let key = StickKey::generate("blue").unwrap();
        let handover = Handover::Client(ClientHandover {
            key: key.clone(),
            encrypted_only: false,
        });
        let json = handover.to_json().unwrap();
        assert!(matches!(Handover::parse(&json.0), Ok(Handover::Client(read)) if read.key.to_file() == key.to_file()));
        let secret = key.to_file();
        let digits = secret.split(' ').nth(1).unwrap().trim();
        assert!(!format!("{handover:?}").contains(digits));
    }
}
