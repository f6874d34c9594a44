//! What `install` puts where: the files of `hooks/`, the program, configuration, key and ramdisk.
//!
//! What a package brings (the program, its documentation) is the package manager's, and never put anywhere by us.

use std::io::{self, Read};
use std::path::{Path, PathBuf};

use stiefel_shared::config::{Config, EXAMPLE, MAX_CONFIG, Method};
use stiefel_shared::key::StickKey;
use zeroize::Zeroizing;

use super::change::digest_of;
use super::{InstallError, InstallOptions, drivers, network, updates};
use crate::collect::{KEYS_DIR, STATE_DIR};
use crate::tree::Tree;
use serde::{Deserialize, Serialize};
use stiefel_initrd_builder::ramdisk::{KERNEL, MANIFEST, Manifest, RAMDISK};
use stiefel_shared::config::CONFIG_PATH;

/// Where the program goes, if it does not come from a package.
pub const PROGRAM: &str = "/usr/local/bin/stiefel";
/// Where a package puts it.
const PACKAGED: &str = "/usr/bin/stiefel";
/// The service.
pub const UNIT: &str = "stiefel-autokexec.service";
/// The key that a first install makes.
const FIRST_KEY: &str = "stick";

/// Starts `stiefel notify` in graphical sessions (Desktop Application Autostart Specification).
const AUTOSTART: &str = "/etc/xdg/autostart/stiefel-notify.desktop";

const AUTOSTART_TEXT: &str = include_str!("../../../hooks/xdg/stiefel-notify.desktop");
const UNIT_TEXT: &str = include_str!("../../../hooks/systemd/stiefel-autokexec.service");
/// What else the service may do with `trigger.method: reboot`.
const REBOOT_TEXT: &str = include_str!("../../../hooks/systemd/reboot.conf");
/// Stands in the files of `hooks/` for the place of the program.
pub const PROGRAM_WORD: &str = "@PROGRAM@";

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
    pub fn new(path: impl Into<String>, content: Content, mode: u32, fate: Fate, what: &'static str) -> Self {
        Self {
            path: path.into(),
            content,
            mode,
            fate,
            what,
        }
    }

    pub fn text(path: impl Into<String>, text: impl Into<String>, what: &'static str) -> Self {
        Self::new(
            path,
            Content::Bytes(Zeroizing::new(text.into().into_bytes())),
            0o644,
            Fate::RemoveUnchanged,
            what,
        )
    }

    pub fn script(path: impl Into<String>, text: impl Into<String>, what: &'static str) -> Self {
        Self {
            mode: 0o755,
            ..Self::text(path, text, what)
        }
    }

    pub fn folder(path: impl Into<String>, mode: u32, fate: Fate, what: &'static str) -> Self {
        Self::new(path, Content::Folder, mode, fate, what)
    }
}

/// All that must be there, folders before what is in them.
pub fn wanted(tree: &Tree, options: &InstallOptions) -> Result<Vec<Wanted>, InstallError> {
    let Configuration { text, is_new, .. } = configuration(tree, options.config.as_deref())?;
    let config = Config::parse(&text).map_err(|source| InstallError::Config {
        path: match &options.config {
            Some(given) if is_new => given.clone(),
            _ => tree.path(CONFIG_PATH),
        },
        source,
    })?;
    let program = program(tree, options);
    let mut wanted = vec![
        Wanted::folder(STATE_DIR, 0o755, Fate::Remove, "the ramdisk's folder"),
        Wanted::folder("/etc/stiefel", 0o755, Fate::Keep, "the configuration's folder"),
        Wanted::folder(KEYS_DIR, 0o700, Fate::Keep, "the keys' folder"),
    ];
    wanted.extend(service(program));
    if program == PROGRAM {
        let file = Content::File(options.program.clone());
        wanted.push(Wanted::new(PROGRAM, file, 0o755, Fate::Remove, "the program"));
    }
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
    wanted.extend(reboot(config.trigger.method));
    wanted.extend(network::guards(&config.trigger));
    wanted.extend(updates::hooks(tree, program));
    wanted.extend(drivers::drop_ins(tree));
    if let Some(folder) = &options.ramdisk {
        wanted.extend(ramdisk(folder)?);
    }
    Ok(wanted)
}

/// The service, what starts it, and what shows in graphical sessions what it says.
fn service(program: &str) -> [Wanted; 3] {
    [
        Wanted::text(
            format!("/etc/systemd/system/{UNIT}"),
            UNIT_TEXT.replace(PROGRAM_WORD, program),
            "the service",
        ),
        Wanted::new(
            format!("/etc/systemd/system/multi-user.target.wants/{UNIT}"),
            Content::Link("/etc/systemd/system/stiefel-autokexec.service"),
            0o777,
            Fate::RemoveUnchanged,
            "starts the service at boot",
        ),
        Wanted::text(
            AUTOSTART,
            AUTOSTART_TEXT.replace(PROGRAM_WORD, program),
            "says in graphical sessions when the laptop is about to leave",
        ),
    ]
}

/// What else the service may do, if it leaves by a reboot.
fn reboot(method: Method) -> Option<Wanted> {
    let path = format!("/etc/systemd/system/{UNIT}.d/reboot.conf");
    let what = "lets the service put the one-time image in its place";
    (method == Method::Reboot).then(|| Wanted::text(path, REBOOT_TEXT, what))
}

/// Where the program is started from: a package's own stays where it is.
fn program(tree: &Tree, options: &InstallOptions) -> &'static str {
    let packaged = digest_of(&tree.path(PACKAGED));
    // Not by name: the running program may be called /proc/self/exe.
    let ours = std::fs::canonicalize(&options.program)
        .ok()
        .and_then(|path| digest_of(&path));
    match packaged.is_some() && packaged == ours {
        true => PACKAGED,
        false => PROGRAM,
    }
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

#[cfg(test)]
mod tests {
    use super::*;

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
    fn the_service_may_write_where_the_one_time_image_goes_and_only_if_it_is_to() {
        let dir = tempfile::tempdir().unwrap();
        let tree = Tree::new(dir.path());
        let config = tree.path(CONFIG_PATH);
        std::fs::create_dir_all(config.parent().unwrap()).unwrap();
        let has = |method: &str| {
            std::fs::write(&config, format!("trigger: {{method: {method}}}\n")).unwrap();
            let wanted = wanted(&tree, &InstallOptions::new(dir.path())).unwrap();
            wanted
                .iter()
                .any(|wanted| wanted.path.ends_with(".service.d/reboot.conf"))
        };
        assert!(has("reboot") && !has("kexec"));
        for place in ["/efi", "/boot/efi", "/boot", "/sys/firmware/efi/efivars"] {
            assert!(
                REBOOT_TEXT
                    .split_whitespace()
                    .any(|word| word.ends_with(&format!("-{place}"))),
                "{place}"
            );
        }
    }

    #[test]
    fn the_unit_starts_the_program_where_it_is_put() {
        assert!(UNIT_TEXT.contains(&format!("ExecStart={PROGRAM_WORD} autokexec\n")));
        // This would hide /lib/modules, which the overlay is made from.
        assert!(!UNIT_TEXT.lines().any(|line| line.starts_with("ProtectKernelModules")));
        assert!(AUTOSTART_TEXT.contains(&format!("Exec={PROGRAM_WORD} notify\n")));
    }

    #[test]
    fn the_unit_has_the_folder_of_the_control_socket() {
        let name = crate::autokexec::CONTROL_FOLDER.strip_prefix("/run/").unwrap();
        let line = format!("RuntimeDirectory={name}");
        assert!(UNIT_TEXT.lines().any(|found| found == line), "{line}");
    }
}
