//! Unified kernel images, and what lies beside them. The sections are found by `stiefel_shared::loader::uki`.
//!
//! Specification: systemd-stub(7): addons are programs with a `.cmdline` that is added; credentials and extensions beside an
//! image go to its initrd through the stub, which the desktop does not run.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};

use stiefel_shared::loader::bls::{os_release, tries};
use stiefel_shared::loader::uki::{self, HEAD, Section};

use super::{Candidate, Source};
use crate::tree::Tree;

/// The longest text of a section that is read, in bytes.
const MAX_TEXT: u64 = 64 << 10;
/// Ends an addon's name.
const ADDON: &str = ".addon.efi";

/// An image that was read.
pub(super) struct Image {
    /// What it boots, without a reason.
    pub candidate: Candidate,
    /// Its os-release.
    pub os_release: BTreeMap<String, String>,
}

/// A program's sections and its file.
fn open(tree: &Tree, path: &str) -> Option<(File, Vec<Section>)> {
    let path = tree.resolve(path).ok()?;
    let meta = path.metadata().ok().filter(std::fs::Metadata::is_file)?;
    let mut file = File::open(path).ok()?;
    let mut head = Vec::new();
    file.by_ref().take(HEAD).read_to_end(&mut head).ok()?;
    Some((file, uki::sections(&head, meta.len())?))
}

/// The raw bytes of a section's text.
fn bytes(file: &mut File, section: &Section) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(section.offset)).ok()?;
    file.take(section.len.min(MAX_TEXT)).read_to_end(&mut bytes).ok()?;
    Some(bytes)
}

/// Reads an image; `None` if the file is no unified kernel image.
pub(super) fn read(tree: &Tree, path: &str) -> Option<Image> {
    let (mut file, sections) = open(tree, path)?;
    let image = uki::image(&sections)?;
    let mut text = |section: &Option<Section>| bytes(&mut file, section.as_ref()?);
    let os_release = text(&image.osrel).map(|bytes| os_release(&String::from_utf8_lossy(&bytes)));
    let source = |section: Section| Source {
        path: path.to_owned(),
        section: Some(section),
    };
    let mut candidate = Candidate {
        cmdline: text(&image.cmdline).map(|bytes| uki::text(&bytes)).unwrap_or_default(),
        release: text(&image.uname).map(|bytes| uki::text(&bytes)),
        kernel: source(image.kernel),
        initrds: image.initrds.into_iter().map(source).collect(),
        ..Candidate::default()
    };
    if image.profiles > 1 {
        let note = format!("of the {} profiles of {path} the first was taken", image.profiles);
        candidate.notes.push(note);
    }
    add_addons(tree, path, &mut candidate);
    Some(Image {
        candidate,
        os_release: os_release.unwrap_or_default(),
    })
}

/// Adds what addons add to the command line, and says what is left out.
fn add_addons(tree: &Tree, path: &str, candidate: &mut Candidate) {
    let base = path.strip_suffix(".efi").unwrap_or(path);
    let (uncounted, _) = tries(base);
    let mut folders = vec![format!("{path}.extra.d"), format!("{uncounted}.efi.extra.d")];
    folders.dedup();
    // For all images of this file system.
    folders.extend(
        path.find("/EFI/")
            .and_then(|at| Some(format!("{}/loader/addons", path.get(..at)?))),
    );
    for folder in folders {
        for name in tree.names(&folder) {
            let file = format!("{folder}/{name}");
            if name.ends_with(ADDON) {
                add_addon(tree, &file, candidate);
            } else {
                candidate
                    .notes
                    .push(format!("{file} is left out: the desktop does not run the image's stub"));
            }
        }
    }
}

fn add_addon(tree: &Tree, path: &str, candidate: &mut Candidate) {
    let Some((mut file, sections)) = open(tree, path) else {
        candidate
            .notes
            .push(format!("the addon {path} is left out: it is no EFI program"));
        return;
    };
    for section in sections.iter().filter(|section| section.len > 0) {
        match section.name.as_str() {
            ".cmdline" => {
                let words = bytes(&mut file, section)
                    .map(|bytes| uki::text(&bytes))
                    .unwrap_or_default();
                candidate.cmdline = format!("{} {words}", candidate.cmdline);
                candidate
                    .notes
                    .push(format!("the addon {path} adds to the command line: {words}"));
            }
            ".initrd" | ".ucode" | ".dtb" => {
                let name = &section.name;
                candidate
                    .notes
                    .push(format!("the addon {path} has a section {name}, which is left out"));
            }
            _ => {}
        }
    }
}
