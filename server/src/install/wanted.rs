//! What `install` puts where: the files of `hooks/`, the program, configuration, key and ramdisk.

use std::fmt::Write;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use stiefel_shared::config::{Config, EXAMPLE, MAX_CONFIG, Trigger, UsbId};
use stiefel_shared::key::StickKey;
use zeroize::Zeroizing;

use super::{InstallError, InstallOptions};
use crate::collect::{KEYS_DIR, STATE_DIR};
use crate::tree::Tree;
use serde::{Deserialize, Serialize};
use stiefel_initrd_builder::ramdisk::{KERNEL, MANIFEST, Manifest, RAMDISK};
use stiefel_shared::config::CONFIG_PATH;

/// Where the program goes; the unit names it.
pub const PROGRAM: &str = "/usr/local/bin/stiefel";
/// The service.
pub const UNIT: &str = "stiefel-autokexec.service";
/// The key that a first install makes.
const FIRST_KEY: &str = "stick";

const UNIT_TEXT: &str = include_str!("../../../hooks/systemd/stiefel-autokexec.service");
const NETWORK_MANAGER: &str = include_str!("../../../hooks/networkmanager/90-stiefel.conf");
const NETWORKD: &str = include_str!("../../../hooks/networkd/05-stiefel.network");
const UDEV: &str = include_str!("../../../hooks/udev/84-stiefel.rules");

/// When `uninstall` takes a file away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fate {
    /// Always.
    Remove,
    /// If nobody changed it since.
    RemoveUnchanged,
    /// Only with `--purge`: the user's own.
    Keep,
}

/// Where a file's content comes from.
#[derive(Debug)]
pub enum Content {
    /// These bytes; perhaps secret.
    Bytes(Zeroizing<Vec<u8>>),
    /// A copy of this file.
    File(PathBuf),
    /// A symbolic link to this.
    Link(&'static str),
    /// A folder.
    Folder,
}

/// One thing that must be there.
#[derive(Debug)]
pub struct Wanted {
    /// Where, inside of the tree.
    pub path: String,
    /// What.
    pub content: Content,
    /// Permission bits.
    pub mode: u32,
    /// What becomes of it.
    pub fate: Fate,
    /// What it is, for people.
    pub what: &'static str,
}

impl Wanted {
    fn new(path: impl Into<String>, content: Content, mode: u32, fate: Fate, what: &'static str) -> Self {
        Self {
            path: path.into(),
            content,
            mode,
            fate,
            what,
        }
    }

    fn text(path: impl Into<String>, text: impl Into<String>, what: &'static str) -> Self {
        Self::new(
            path,
            Content::Bytes(Zeroizing::new(text.into().into_bytes())),
            0o644,
            Fate::RemoveUnchanged,
            what,
        )
    }
}

/// All that must be there, folders before what is in them.
pub fn wanted(tree: &Tree, options: &InstallOptions) -> Result<Vec<Wanted>, InstallError> {
    let Configuration { text, is_new, .. } = configuration(tree, options.config.as_deref())?;
    let config = Config::parse(&text)?;
    let folder = |path: &str, mode, fate, what| Wanted::new(path, Content::Folder, mode, fate, what);
    let unit = format!("/etc/systemd/system/{UNIT}");
    let enabled = format!("/etc/systemd/system/multi-user.target.wants/{UNIT}");
    let mut wanted = vec![
        folder(STATE_DIR, 0o755, Fate::Remove, "the ramdisk's folder"),
        folder("/etc/stiefel", 0o755, Fate::Keep, "the configuration's folder"),
        folder(KEYS_DIR, 0o700, Fate::Keep, "the keys' folder"),
        Wanted::new(
            PROGRAM,
            Content::File(options.program.clone()),
            0o755,
            Fate::Remove,
            "the program",
        ),
        Wanted::text(unit, UNIT_TEXT, "the service"),
        Wanted::new(
            enabled,
            Content::Link("/etc/systemd/system/stiefel-autokexec.service"),
            0o777,
            Fate::RemoveUnchanged,
            "starts the service at boot",
        ),
    ];
    if is_new {
        let what = match options.config {
            Some(_) => "the configuration that you gave",
            None => "the configuration, with all defaults",
        };
        let text = Content::Bytes(Zeroizing::new(text.into_bytes()));
        wanted.push(Wanted::new(CONFIG_PATH, text, 0o644, Fate::Keep, what));
    }
    if !tree.names(KEYS_DIR).iter().any(|name| name.ends_with(".key")) {
        let key = StickKey::generate(FIRST_KEY)?;
        let text = Content::Bytes(Zeroizing::new(key.to_file().as_bytes().to_vec()));
        wanted.push(Wanted::new(
            format!("{KEYS_DIR}/{FIRST_KEY}.key"),
            text,
            0o600,
            Fate::Keep,
            "a first stick's key",
        ));
    }
    wanted.extend(network_guards(&config.trigger));
    if let Some(folder) = &options.ramdisk {
        wanted.extend(ramdisk(folder)?);
    }
    Ok(wanted)
}

/// The configuration that will be there.
pub struct Configuration {
    text: String,
    /// It is to be put there.
    is_new: bool,
    /// Another one was given: one that is there is never touched.
    pub given_is_unused: bool,
}

/// Decides between the configuration that is there, the one that was given, and the example.
pub fn configuration(tree: &Tree, given: Option<&Path>) -> Result<Configuration, InstallError> {
    let read = |path: PathBuf| match std::fs::File::open(&path).and_then(|mut file| {
        let mut text = String::new();
        (&mut file).take(MAX_CONFIG + 1).read_to_string(&mut text)?;
        match text.len() as u64 > MAX_CONFIG {
            true => Err(io::ErrorKind::FileTooLarge.into()),
            false => Ok(text),
        }
    }) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(InstallError::Read { path, source }),
    };
    let existing = read(tree.path(CONFIG_PATH))?;
    let given = match given {
        Some(path) => Some(read(path.to_owned())?.ok_or_else(|| InstallError::Read {
            path: path.to_owned(),
            source: io::ErrorKind::NotFound.into(),
        })?),
        None => None,
    };
    let is_new = existing.is_none();
    let given_is_unused = !is_new && given.is_some() && given != existing;
    Ok(Configuration {
        text: existing.or(given).unwrap_or_else(|| EXAMPLE.to_owned()),
        is_new,
        given_is_unused,
    })
}

/// The three files of `stiefel build`, checked against each other.
fn ramdisk(folder: &Path) -> Result<[Wanted; 3], InstallError> {
    Manifest::load(folder)?.verify(folder)?;
    let file = |name: &str, what| {
        Wanted::new(
            format!("{STATE_DIR}/{name}"),
            Content::File(folder.join(name)),
            0o644,
            Fate::Remove,
            what,
        )
    };
    // The manifest last: until it is there, the other two do not count.
    Ok([
        file(KERNEL, "the ramdisk's kernel"),
        file(RAMDISK, "the ramdisk"),
        file(MANIFEST, "the ramdisk's checksums"),
    ])
}

/// The files that keep network managers from the dedicated NICs and are not there, or not as the configuration wants them.
pub fn missing_guards(tree: &Tree, trigger: &Trigger) -> Vec<String> {
    network_guards(trigger)
        .into_iter()
        .filter(|guard| match &guard.content {
            Content::Bytes(bytes) => !tree
                .text(&guard.path)
                .is_ok_and(|text| text.as_bytes() == bytes.as_slice()),
            Content::File(_) | Content::Link(_) | Content::Folder => false,
        })
        .map(|guard| guard.path)
        .collect()
}

/// Files that keep network managers from the dedicated NICs.
fn network_guards(trigger: &Trigger) -> Vec<Wanted> {
    let mut guards = Vec::new();
    if !trigger.macs.is_empty() {
        let devices: Vec<_> = trigger.macs.iter().map(|mac| format!("mac:{mac}")).collect();
        let text = NETWORK_MANAGER.replace("@DEVICES@", &devices.join(";"));
        guards.push(Wanted::text(
            "/etc/NetworkManager/conf.d/90-stiefel.conf",
            text,
            "keeps NetworkManager from the dedicated NIC",
        ));
    }
    let networkd = |name: String, matching: String| {
        let text = NETWORKD.replace("@MATCH@", &matching);
        Wanted::text(
            format!("/etc/systemd/network/05-stiefel-{name}.network"),
            text,
            "keeps systemd-networkd from the dedicated NIC",
        )
    };
    for mac in &trigger.macs {
        guards.push(networkd(mac.to_string().replace(':', ""), format!("MACAddress={mac}")));
    }
    for UsbId { vendor, product, .. } in &trigger.usb {
        // networkd knows udev's properties, not USB's own.
        let matching = format!("Property=\"ID_VENDOR_ID={vendor:04x}\" \"ID_MODEL_ID={product:04x}\"");
        guards.push(networkd(format!("{vendor:04x}-{product:04x}"), matching));
    }
    if !trigger.usb.is_empty() {
        let text = UDEV.replace("@RULES@\n", &udev_rules(&trigger.usb));
        guards.push(Wanted::text(
            "/etc/udev/rules.d/84-stiefel.rules",
            text,
            "keeps NetworkManager from the dedicated NIC",
        ));
    }
    // Two adapters alike, told apart by their serials, need one file only.
    guards.sort_by(|a, b| a.path.cmp(&b.path));
    guards.dedup_by(|a, b| a.path == b.path);
    guards
}

fn udev_rules(ids: &[UsbId]) -> String {
    let mut rules = String::new();
    for UsbId {
        vendor,
        product,
        serial,
    } in ids
    {
        let _ = write!(
            rules,
            "ACTION!=\"remove\", SUBSYSTEM==\"net\", SUBSYSTEMS==\"usb\", ATTRS{{idVendor}}==\"{vendor:04x}\", ATTRS{{idProduct}}==\"{product:04x}\", "
        );
        // What udev would read as a pattern, or as the end of the text, cannot be compared; then all alike are meant.
        if let Some(serial) = serial
            .as_deref()
            .filter(|serial| serial.chars().all(|c| c.is_ascii_alphanumeric() || "-_.:".contains(c)))
        {
            let _ = write!(rules, "ATTRS{{serial}}==\"{serial}\", ");
        }
        rules += "ENV{NM_UNMANAGED}=\"1\"\n";
    }
    rules
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guards(yaml: &str) -> Vec<(String, String)> {
        let config = Config::parse(yaml).unwrap();
        network_guards(&config.trigger)
            .into_iter()
            .map(|wanted| match wanted.content {
                Content::Bytes(bytes) => (wanted.path, String::from_utf8(bytes.to_vec()).unwrap()),
                other => panic!("{other:?}"),
            })
            .collect()
    }

    #[test]
    fn without_dedicated_nics_no_network_manager_is_told_anything() {
        assert_eq!(guards(""), []);
    }

    #[test]
    fn nics_known_by_address_are_kept_from_both_network_managers() {
        let guards = guards("trigger: {macs: ['00:e0:4c:68:01:02', '00:e0:4c:68:01:03']}");
        assert_eq!(guards.len(), 3);
        assert!(
            guards[0]
                .1
                .contains("unmanaged-devices+=mac:00:e0:4c:68:01:02;mac:00:e0:4c:68:01:03\n")
        );
        assert_eq!(guards[1].0, "/etc/systemd/network/05-stiefel-00e04c680102.network");
        assert!(guards[1].1.contains("MACAddress=00:e0:4c:68:01:02\n"));
        assert!(guards.iter().all(|(_, text)| !text.contains('@')));
    }

    #[test]
    fn nics_known_by_usb_identity_are_kept_from_both_network_managers() {
        let guards = guards("trigger: {usb: ['0bda:8153:AB-1', '0bda:8153:x\"y']}");
        assert_eq!(guards.len(), 2);
        assert!(guards[0].1.contains("\"ID_MODEL_ID=8153\""));
        assert!(
            guards[1]
                .1
                .contains("ATTRS{serial}==\"AB-1\", ENV{NM_UNMANAGED}=\"1\"\n")
        );
        assert!(!guards[1].1.contains("x\"y") && !guards[1].1.contains('@'));
    }

    #[test]
    fn the_unit_is_not_restarted_for_a_wrong_configuration_nor_for_ever() {
        for line in [
            "RestartPreventExitStatus=2",
            "StartLimitBurst=5",
            "StartLimitIntervalSec=2min",
        ] {
            assert!(UNIT_TEXT.lines().any(|found| found == line), "{line}");
        }
    }

    #[test]
    fn the_unit_starts_the_program_where_it_is_put() {
        assert!(UNIT_TEXT.contains(&format!("ExecStart={PROGRAM} autokexec\n")));
        // This would hide /lib/modules, which the overlay is made from.
        assert!(!UNIT_TEXT.lines().any(|line| line.starts_with("ProtectKernelModules")));
    }
}
