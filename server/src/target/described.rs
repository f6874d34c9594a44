//! What borrowers are told of a disk before they have it.

use stiefel_shared::lend::{DiskInfo, PartInfo};
use stiefel_sys::block::Content;

use super::desk::OnOffer;
use super::share::Mode;

/// The longest texts of the list.
const MAX_SHOWN: usize = 200;

/// Fit for the list: without control characters, not too long.
pub(super) fn cut(text: &str) -> String {
    let mut text: String = text.chars().filter(|c| !c.is_control()).collect();
    text.truncate(text.floor_char_boundary(MAX_SHOWN));
    text
}

/// A disk that is on offer; `contents` is `None` if it does not answer.
pub(super) fn describe(disk: &OnOffer, contents: Option<Vec<Content>>) -> DiskInfo {
    let dying = contents.is_none().then(|| "it does not answer".to_owned());
    let part = |content: Content| {
        let names = content.claims.iter().filter(|claim| claim.kind.is_name());
        let names = names.map(|claim| cut(&format!("{} {}", claim.kind, claim.value)));
        let formats = content.formats.iter().map(|format| (*format).to_owned());
        PartInfo {
            name: cut(&content.name),
            size: content.size,
            content: formats.chain(names).collect(),
        }
    };
    DiskInfo {
        name: disk.names.key.clone(),
        model: cut(&disk.names.model),
        size: disk.source.size(),
        writable: disk.mode != Mode::ReadOnly,
        users: disk.users.iter().map(|user| cut(user)).chain(dying).collect(),
        parts: contents.into_iter().flatten().take(128).map(part).collect(),
    }
}
