//! systemd-boot's default entry: files of the Boot Loader Specification, and unified kernel images.
//!
//! They lie on the EFI system partition, and on the extended boot partition if there is one. Order and choice are
//! `stiefel_shared::loader::sdboot`'s.

use std::collections::BTreeSet;

use stiefel_shared::kernel::Arch;
use stiefel_shared::loader::bls;
use stiefel_shared::loader::sdboot::{self, Choice, Listed, Wishes};

use super::booted::Booted;
use super::firmware::{inside, program};
use super::{Candidate, Source, uki};
use crate::tree::Tree;

/// Where the partitions usually are mounted.
const USUAL: [&str; 4] = ["/efi", "/boot/efi", "/boot", "/esp"];
const ENTRIES: &str = "loader/entries";
const IMAGES: &str = "EFI/Linux";
const CONFIGURATION: &str = "loader/loader.conf";
/// systemd-boot makes these itself, so files of such names are none.
const AUTOMATIC: &str = "auto-";

/// An entry of the menu.
struct Entry {
    listed: Listed,
    title: String,
    /// Where its partition is mounted.
    root: &'static str,
    body: Body,
}

enum Body {
    Bls(bls::Entry),
    Image(Candidate),
}

/// The default entry.
///
/// # Errors
/// Why there is none, or why it is no payload, in words.
pub(super) fn find(tree: &Tree, booted: &Booted) -> Result<Candidate, String> {
    let roots = roots(tree);
    let mut entries: Vec<Entry> = roots.iter().copied().flat_map(|root| on(tree, root)).collect();
    entries.sort_by(|a, b| sdboot::order(&a.listed, &b.listed));
    let listed: Vec<Listed> = entries.iter().map(|entry| entry.listed.clone()).collect();
    let configured = roots
        .iter()
        .find_map(|root| tree.text(format!("{root}/{CONFIGURATION}")).ok());
    let wishes = Wishes {
        one_shot: booted.one_shot.clone(),
        variable: booted.default.clone(),
        configured: configured.and_then(|text| sdboot::configured_default(&text)),
        saved: booted.last_booted.clone(),
    };
    let why = match sdboot::choose(&listed, &wishes) {
        None => {
            return Err(
                "there are no entries of systemd-boot (loader/entries, EFI/Linux) on mounted partitions".to_owned(),
            );
        }
        Some(Choice::Automatic(name)) => format!("systemd-boot's default is {name}, which is no Linux of this system"),
        Some(Choice::Listed(index, why)) => {
            let Some(entry) = entries.get(index) else {
                return Err(why);
            };
            match entry.candidate(tree, booted) {
                Ok(candidate) => return Ok(entry.because(candidate, &format!("is {why}"))),
                Err(error) => error,
            }
        }
    };
    // The default is no Linux; this one was booted, so it is.
    let selected = booted.selected.clone().and_then(|name| {
        let wishes = Wishes {
            one_shot: Some(name),
            ..Wishes::default()
        };
        match sdboot::choose(&listed, &wishes) {
            Some(Choice::Listed(index, what)) if what == "LoaderEntryOneShot" => entries.get(index),
            _ => None,
        }
    });
    let candidate = selected.and_then(|entry| Some((entry, entry.candidate(tree, booted).ok()?)));
    match candidate {
        Some((entry, candidate)) => Ok(entry.because(candidate, &format!("was booted this time; {why}"))),
        None => Err(why),
    }
}

/// The partitions, each once; where the system runs, only what is mounted is one.
fn roots(tree: &Tree) -> Vec<&'static str> {
    let mut seen = BTreeSet::new();
    // A look mounts what systemd mounts on demand.
    USUAL.iter().for_each(|root| drop(tree.names(root)));
    let mounts = tree.mounts();
    let mounted = |root: &str| mounts.is_empty() || mounts.iter().any(|mount| mount.point == root);
    USUAL
        .into_iter()
        .filter(|root| mounted(root))
        .filter(|root| tree.resolve(root).is_ok_and(|real| seen.insert(real)))
        .collect()
}

/// The entries on one partition; what is not there, or for other machines, is not listed.
fn on(tree: &Tree, root: &'static str) -> Vec<Entry> {
    let files = |folder: &str, ending: &str| {
        let names = tree.names(format!("{root}/{folder}"));
        let named = |name: &String| name.to_ascii_lowercase().ends_with(ending) && !name.starts_with('.');
        names
            .into_iter()
            .filter(|name| named(name) && !name.starts_with(AUTOMATIC))
            .take(bls::MAX_ENTRIES)
            .collect::<Vec<_>>()
    };
    let entries = files(ENTRIES, ".conf");
    let images = files(IMAGES, ".efi");
    entries
        .into_iter()
        .filter_map(|name| from_file(tree, root, name))
        .chain(images.into_iter().filter_map(|name| from_image(tree, root, name)))
        .collect()
}

fn from_file(tree: &Tree, root: &'static str, file: String) -> Option<Entry> {
    let entry = bls::parse(&tree.text(format!("{root}/{ENTRIES}/{file}")).ok()?);
    let ours = |arch: &String| arch.eq_ignore_ascii_case(Arch::OURS.efi_name());
    if entry.architecture.as_ref().is_some_and(|arch| !ours(arch)) {
        return None;
    }
    let loaded = entry.linux.as_ref().or(entry.uki.as_ref()).or(entry.efi.as_ref())?;
    inside(tree, root, loaded)?;
    Some(Entry {
        title: entry.title.clone().unwrap_or_else(|| file.clone()),
        listed: Listed {
            file,
            sort_key: entry.sort_key.clone(),
            machine_id: entry.machine_id.clone(),
            version: entry.version.clone(),
        },
        root,
        body: Body::Bls(entry),
    })
}

fn from_image(tree: &Tree, root: &'static str, file: String) -> Option<Entry> {
    let image = uki::read(tree, &format!("{root}/{IMAGES}/{file}"))?;
    let said = |names: &[&str]| names.iter().find_map(|name| image.os_release.get(*name).cloned());
    Some(Entry {
        title: said(&["PRETTY_NAME", "IMAGE_ID", "NAME", "ID"]).unwrap_or_else(|| file.clone()),
        listed: Listed {
            file,
            sort_key: said(&["IMAGE_ID", "ID"]),
            machine_id: None,
            version: said(&["IMAGE_VERSION", "VERSION", "VERSION_ID", "BUILD_ID"]),
        },
        root,
        body: Body::Image(image.candidate),
    })
}

impl Entry {
    fn because(&self, candidate: Candidate, why: &str) -> Candidate {
        Candidate {
            reason: format!("{:?} ({}) {why}", self.title, self.listed.file),
            ..candidate
        }
    }

    /// What it boots.
    fn candidate(&self, tree: &Tree, booted: &Booted) -> Result<Candidate, String> {
        let name = format!("systemd-boot's entry {:?} ({})", self.title, self.listed.file);
        let entry = match &self.body {
            Body::Image(candidate) => return Ok(candidate.clone()),
            Body::Bls(entry) => entry,
        };
        let locate = |path: &String| {
            inside(tree, self.root, path).ok_or_else(|| format!("{name} loads {path}, which is not on its partition"))
        };
        let options = entry.options.clone().unwrap_or_default();
        if let Some(other) = entry
            .uki
            .as_ref()
            .or(entry.efi.as_ref())
            .filter(|_| entry.linux.is_none())
        {
            let file = locate(other)?;
            return program(tree, self.root, &file, &options, booted.secure)
                .ok_or_else(|| format!("{name} starts another program ({other})"));
        }
        let kernel = locate(entry.linux.as_ref().unwrap_or(&String::new()))?;
        let initrds = entry.initrds.iter().map(locate).collect::<Result<Vec<_>, _>>()?;
        let initrds: Vec<Source> = initrds.into_iter().map(Source::from).collect();
        if let Some(image) = uki::read(tree, &kernel) {
            let mut candidate = image.candidate;
            candidate.initrds.extend(initrds);
            if !options.is_empty() {
                candidate.cmdline = options;
            }
            return Ok(candidate);
        }
        Ok(Candidate {
            kernel: kernel.into(),
            initrds,
            cmdline: options,
            ..Candidate::default()
        })
    }
}
