//! The firmware's variables that start a program once: an entry `Boot####` that is in no order, and `BootNext`, which names it.
//!
//! Specification: UEFI, 3.1 and 3.3; Linux, Documentation/filesystems/efivarfs.rst (a write is one whole variable, its attributes first).
//! The entry is kept for the next time, so that each start wears the firmware's memory by one small variable only. Entries of other
//! names are never touched.

use std::fs::OpenOptions;
use std::io::{self, Write};

use stiefel_shared::loader::efi::{self, GLOBAL, MAX_VARIABLE};

use super::RebootError;
use crate::tree::Tree;

/// Where the kernel shows them.
pub(super) const FOLDER: &str = "/sys/firmware/efi/efivars";
const NEXT: &str = "BootNext";

fn path(name: &str) -> String {
    format!("{FOLDER}/{name}-{GLOBAL}")
}

/// A variable of the firmware's own, with its attributes.
pub(super) fn read(tree: &Tree, name: &str) -> Option<Vec<u8>> {
    tree.bytes(path(name), MAX_VARIABLE).ok()
}

fn write(tree: &Tree, name: &str, bytes: &[u8]) -> Result<(), RebootError> {
    let path = tree.path(path(name));
    // Never truncated: a variable that is written is replaced as a whole. (These are not among those that efivarfs makes immutable.)
    let written = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .and_then(|mut file| match file.write(bytes) {
            Ok(len) if len == bytes.len() => Ok(()),
            Ok(_) => Err(io::ErrorKind::WriteZero.into()),
            Err(error) => Err(error),
        });
    written.map_err(|source| RebootError::Write { path, source })
}

fn remove(tree: &Tree, name: &str) -> Result<(), RebootError> {
    let path = tree.path(path(name));
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(RebootError::Write { path, source: error }),
        _ => Ok(()),
    }
}

/// The numbers that are taken, and those of entries with this title.
fn entries(tree: &Tree, title: &str) -> (Vec<u16>, Vec<u16>) {
    let numbers = tree.names(FOLDER).into_iter().filter_map(|name| {
        let digits = name.strip_prefix("Boot")?.strip_suffix(GLOBAL)?.strip_suffix('-')?;
        (digits.len() == 4).then(|| u16::from_str_radix(digits, 16).ok())?
    });
    let taken: Vec<u16> = numbers.collect();
    let is_ours = |number: &&u16| {
        let option = read(tree, &name(**number)).and_then(|bytes| efi::load_option(&bytes));
        option.is_some_and(|option| option.description == title)
    };
    let ours = taken.iter().filter(is_ours).copied().collect();
    (taken, ours)
}

fn name(number: u16) -> String {
    format!("Boot{number:04X}")
}

/// Has the firmware start `option` at the next start, and only then.
///
/// # Errors
/// [`RebootError`].
pub(super) fn start_once(tree: &Tree, title: &str, option: &[u8]) -> Result<(), RebootError> {
    let (taken, ours) = entries(tree, title);
    let kept = ours
        .iter()
        .copied()
        .find(|number| read(tree, &name(*number)).as_deref() == Some(option));
    let number = match kept {
        Some(number) => number,
        None => {
            // Of another partition, or an older version of ours.
            for number in &ours {
                remove(tree, &name(*number))?;
            }
            let free = (0..=u16::MAX).find(|number| !taken.contains(number) || ours.contains(number));
            let number = free.ok_or(RebootError::NotKept)?;
            write(tree, &name(number), option)?;
            number
        }
    };
    write(tree, NEXT, &efi::number_variable(number))?;
    let next = read(tree, NEXT).and_then(|bytes| efi::number(&bytes));
    // Some firmware takes what it does not keep.
    if next == Some(number) && read(tree, &name(number)).as_deref() == Some(option) {
        Ok(())
    } else {
        Err(RebootError::NotKept)
    }
}

/// Has the firmware not start us; what others have asked of it stays. Whether it would have.
///
/// # Errors
/// [`RebootError::Write`]: it still will.
pub(super) fn cancel(tree: &Tree, title: &str) -> Result<bool, RebootError> {
    let next = read(tree, NEXT).and_then(|bytes| efi::number(&bytes));
    let ours = next.is_some_and(|next| entries(tree, title).1.contains(&next));
    if ours {
        remove(tree, NEXT)?;
    }
    Ok(ours)
}

/// Removes the entry that is kept.
///
/// # Errors
/// [`RebootError::Write`].
pub(super) fn forget(tree: &Tree, title: &str) -> Result<(), RebootError> {
    entries(tree, title)
        .1
        .into_iter()
        .try_for_each(|number| remove(tree, &name(number)))
}
