//! The root file system's name, where the command line leaves it to the boot loader's disk or to the initrd.
//!
//! systemd finds a root by its partition's type on the disk that was booted from (systemd-gpt-auto-generator(8)); on the
//! desktop that is the stick. So what is the root now is written out.

use stiefel_shared::loader::cmdline;

use crate::tree::{Mount, Tree};

/// The command line without a root that the boot loader's disk decides, and the words to add: those of the configuration,
/// and, where no root is named, the one that is mounted. A note says so.
pub(super) fn name(tree: &Tree, text: &str, append: &[String], notes: &mut Vec<String>) -> (String, Vec<String>) {
    let mut words = append.to_vec();
    let (without, by_loader) = cmdline::without_loader_root(text);
    let named = cmdline::names_root(&without) || append.iter().any(|word| cmdline::names_root(word));
    let mounted = if named { None } else { mounted(tree, &without) };
    match (named, mounted) {
        // What is named besides counts.
        (true, _) => (without, words),
        (false, None) => (text.to_owned(), words),
        (false, Some(mounted)) => {
            let why = if by_loader {
                "root=gpt-auto means the disk that was booted from"
            } else {
                "the command line names no root"
            };
            notes.push(format!(
                "{why}; the one that is mounted now was written out: {}",
                mounted.join(" ")
            ));
            words.splice(..0, mounted);
            (without, words)
        }
    }
}

/// The words that name what is mounted at `/`; `None` if it has no name that holds on another machine.
fn mounted(tree: &Tree, cmdline: &str) -> Option<Vec<String>> {
    let mounts = tree.mounts();
    let mount = mounts.iter().rfind(|mount| mount.point == "/")?;
    let device = tree.root_device()?;
    let mut words = device_words(tree, &device)?;
    words.extend(subvolume(mount).filter(|_| cmdline::value(cmdline, "rootflags").is_none()));
    Some(words)
}

/// LUKS on a partition is opened under its name, all else is known by its UUID.
fn device_words(tree: &Tree, device: &str) -> Option<Vec<String>> {
    let folder = format!("/sys/class/block/{device}");
    let encrypted = tree
        .line(format!("{folder}/dm/uuid"))
        .is_some_and(|uuid| uuid.starts_with("CRYPT-LUKS"));
    if !encrypted {
        let uuid = tree.uuid_of(&format!("/dev/{device}"))?;
        return Some(vec![format!("root=UUID={uuid}")]);
    }
    let name = tree.line(format!("{folder}/dm/name"))?;
    let below = tree.names(format!("{folder}/slaves"));
    let [below] = below.as_slice() else { return None };
    let uuid = tree.uuid_of(&format!("/dev/{below}"))?;
    Some(vec![
        format!("rd.luks.name={uuid}={name}"),
        format!("root=/dev/mapper/{name}"),
    ])
}

/// A btrfs subvolume has to be named, too; one that is the default does no harm.
fn subvolume(mount: &Mount) -> Option<String> {
    let path = mount.root.trim_start_matches('/');
    let plain = !path.is_empty() && !path.contains(|c: char| c.is_whitespace() || c == ',' || c == '"');
    (mount.kind == "btrfs" && plain).then(|| format!("rootflags=subvol={path}"))
}
