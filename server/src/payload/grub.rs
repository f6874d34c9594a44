//! GRUB's default entry, and its files in the tree. The configuration is run by `stiefel_shared::loader::grub`.

use stiefel_shared::loader::grub::{self, Files, Kind, Location, Other};

use super::booted::Booted;
use super::places::Places;
use super::{Candidate, Source, files, uki};
use crate::tree::Tree;

/// Where distributions have GRUB's own folder.
const FOLDERS: [&str; 5] = ["/boot/grub", "/boot/grub2", "/grub", "/efi/grub", "/boot/efi/grub"];
/// A memory test's file, by its name.
const MEMORY_TEST: &str = "memtest";

/// What GRUB asks about the machine.
struct Machine<'a> {
    places: &'a Places<'a>,
    efi: bool,
}

impl Files for Machine<'_> {
    fn kind(&self, place: &Location) -> Option<Kind> {
        let tree = self.places.tree;
        let path = self.places.find(place, |tree, path| tree.resolve(path).is_ok()).ok()?;
        let meta = tree.resolve(path).and_then(std::fs::metadata).ok()?;
        Some(match (meta.is_dir(), meta.len()) {
            (true, _) => Kind::Folder,
            (false, 0) => Kind::Empty,
            (false, _) => Kind::File,
        })
    }

    fn text(&self, place: &Location) -> Option<String> {
        self.places.tree.text(self.places.file(place).ok()?).ok()
    }

    fn names(&self, place: &Location) -> Vec<String> {
        let folder = self.places.find(place, |tree, path| tree.is_folder(path));
        folder.map(|folder| self.places.tree.names(folder)).unwrap_or_default()
    }

    fn efi(&self) -> bool {
        self.efi
    }
}

/// GRUB's default entry.
///
/// # Errors
/// Why there is none, or why it is no payload, in words.
pub(super) fn find(tree: &Tree, booted: &Booted) -> Result<Candidate, String> {
    let mut unreadable = None;
    for folder in FOLDERS {
        let path = format!("{folder}/grub.cfg");
        match tree.text(&path) {
            Ok(text) => return default_entry(tree, booted, folder, &text),
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                unreadable.get_or_insert(format!("{path} cannot be read ({error})"));
            }
            Err(_) => {}
        }
    }
    Err(unreadable.unwrap_or_else(|| "there is no GRUB configuration".to_owned()))
}

fn default_entry(tree: &Tree, booted: &Booted, folder: &str, text: &str) -> Result<Candidate, String> {
    let places = Places {
        tree,
        own: folder.to_owned(),
    };
    let machine = Machine {
        places: &places,
        efi: booted.efi,
    };
    let chosen = grub::default_entry(text, &machine).ok_or_else(|| format!("{folder}/grub.cfg has no entries"))?;
    let title = format!("GRUB's default entry {:?}", chosen.titles.join(" > "));
    let reason = format!("{:?} is {}", chosen.titles.join(" > "), chosen.reason);
    let entry = chosen.entry;
    let Some(kernel) = &entry.kernel else {
        return other(&places, entry.other, &title, reason);
    };
    if kernel.path.to_ascii_lowercase().contains(MEMORY_TEST) {
        return Err(format!("{title} is a memory test"));
    }
    let locate = |place: &Location| places.file(place).map_err(|why| format!("{title} loads {why}"));
    let kernel = locate(kernel)?;
    let mut initrds = entry.initrds.iter().map(locate).collect::<Result<Vec<_>, _>>()?;
    if initrds.is_empty() {
        // Cloud images try without one first.
        initrds.extend(files::initrd_of(
            tree,
            &kernel,
            files::release(tree, &kernel).as_deref(),
        ));
    }
    if initrds.is_empty() {
        return Err(format!("{title} loads {kernel}, which has no initrd"));
    }
    Ok(Candidate {
        kernel: kernel.into(),
        initrds: initrds.into_iter().map(Source::from).collect(),
        cmdline: entry.cmdline,
        reason,
        ..Candidate::default()
    })
}

/// An entry that loads no kernel by itself: only a unified kernel image is Linux all the same.
fn other(places: &Places<'_>, other: Option<Other>, title: &str, reason: String) -> Result<Candidate, String> {
    match other {
        Some(Other::Program(program)) => {
            let image = places
                .file(&program)
                .ok()
                .and_then(|path| uki::read(places.tree, &path));
            match image {
                Some(image) => Ok(Candidate {
                    reason,
                    ..image.candidate
                }),
                None => Err(format!(
                    "{title} starts another boot loader or system ({})",
                    program.path
                )),
            }
        }
        Some(Other::Command(command)) => Err(format!("{title} boots no Linux by itself (it is `{command}`)")),
        None => Err(format!("{title} boots no Linux")),
    }
}
