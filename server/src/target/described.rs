//! What borrowers are told of a disk before they have it.

use stiefel_shared::lend::{DiskInfo, LendError, Loan, PartInfo};
use stiefel_sys::block::Content;

use super::desk::OnOffer;
use super::share::Mode;

/// The longest texts of the list.
const MAX_SHOWN: usize = 200;

/// Disks, and words on who uses one, in the list.
const MAX_DISKS: usize = 128;
const MAX_USERS: usize = 16;

/// Fit for the list: without control characters, not too long.
pub(super) fn cut(text: &str) -> String {
    let mut text: String = text.chars().filter(|c| !c.is_control()).collect();
    text.truncate(text.floor_char_boundary(MAX_SHOWN));
    text
}

/// What fits one answer: disks that say much say less, rather than that nobody hears of any.
pub(super) fn fitting(mut disks: Vec<DiskInfo>) -> Loan {
    disks.truncate(MAX_DISKS);
    for disk in &mut disks {
        let more = disk.users.len().saturating_sub(MAX_USERS);
        if more > 0 {
            disk.users.truncate(MAX_USERS);
            disk.users.push(format!("and {more} more"));
        }
    }
    let mut loan = Loan::Disks { disks };
    while let (Err(LendError::TooLarge { .. }), Loan::Disks { disks }) = (loan.to_json(), &mut loan) {
        match disks.iter_mut().max_by_key(|disk| disk.parts.len() + disk.users.len()) {
            Some(most) if most.parts.len() + most.users.len() > 1 => {
                most.parts.clear();
                most.users = vec!["too much lies on it to be told".to_owned()];
            }
            _ => break,
        }
    }
    loan
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

#[cfg(test)]
mod tests {
    use super::*;

    fn info(parts: usize, users: usize) -> DiskInfo {
        let part = |number: usize| PartInfo {
            name: format!("sda{number}"),
            size: 512,
            content: vec!["x".repeat(MAX_SHOWN); 3],
        };
        DiskInfo {
            name: "sda".to_owned(),
            model: "m".repeat(MAX_SHOWN),
            size: 512,
            writable: false,
            users: (0..users).map(|number| format!("mounted at /{number}")).collect(),
            parts: (0..parts).map(part).collect(),
        }
    }

    fn told(disks: Vec<DiskInfo>) -> Vec<DiskInfo> {
        let Loan::Disks { disks } = Loan::parse(&fitting(disks).to_json().unwrap()).unwrap() else {
            panic!("another answer")
        };
        disks
    }

    #[test]
    fn a_disk_on_which_much_lies_hides_no_other_one() {
        let disks = told(vec![info(3, 1), info(128, 1), info(2, 300)]);
        assert_eq!((disks[0].parts.len(), disks[1].parts.len()), (3, 0));
        assert!(disks[1].users[0].contains("too much"), "{:?}", disks[1].users);
        assert_eq!(disks[2].users.len(), MAX_USERS + 1);
        assert_eq!(disks[2].users[MAX_USERS], "and 284 more");
        assert_eq!(told(vec![info(0, 200); 400]).len(), MAX_DISKS);
    }
}
