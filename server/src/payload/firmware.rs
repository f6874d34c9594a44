//! A kernel that the firmware starts without a boot loader: a unified kernel image, or one with its own EFI stub.

use stiefel_shared::kernel::is_bzimage;
use stiefel_shared::loader::cmdline;
use stiefel_shared::loader::efi::LoadOption;

use super::booted::Booted;
use super::{Candidate, Source, kernel, uki};
use crate::tree::{BY_PARTUUID, Tree};

/// Where the firmware's partition usually is mounted.
const USUAL: [&str; 3] = ["/efi", "/boot/efi", "/boot"];

/// What the firmware has started.
///
/// # Errors
/// Why it is no payload, in words.
pub(super) fn find(tree: &Tree, booted: &Booted, option: &LoadOption) -> Result<Candidate, String> {
    let name = format!("the firmware's entry {:?}", option.description);
    let path = option.path.as_deref().unwrap_or_default();
    let root = partition(tree, option)
        .into_iter()
        .chain(USUAL.map(str::to_owned))
        .find(|root| inside(tree, root, path).is_some())
        .ok_or_else(|| format!("{name} starts {path}, which is on no partition that is mounted"))?;
    let file = inside(tree, &root, path).unwrap_or_default();
    let reason = format!("the firmware starts it: {name}");
    program(tree, &root, &file, &option.arguments, booted.secure)
        .map(|candidate| Candidate { reason, ..candidate })
        .ok_or_else(|| format!("{name} starts {path}, which is no Linux"))
}

/// Where the partition of an entry is mounted.
fn partition(tree: &Tree, option: &LoadOption) -> Option<String> {
    let device = tree.device_by(BY_PARTUUID, option.partition.as_deref()?)?;
    let mounts = tree.mounts();
    let mount = mounts
        .iter()
        .rfind(|mount| mount.root == "/" && tree.block_name(&mount.source).as_ref() == Some(&device))?;
    Some(mount.point.clone())
}

/// The tree's path of a file on a partition; it is there, and does not lead upwards.
pub(super) fn inside(tree: &Tree, root: &str, path: &str) -> Option<String> {
    let path = path.replace('\\', "/");
    let file = format!("{}/{}", root.trim_end_matches('/'), path.trim_start_matches('/'));
    (!path.split('/').any(|part| part == "..") && tree.is_file(&file)).then_some(file)
}

/// What an EFI program boots if it is Linux: a unified kernel image (whose own command line counts where none is given, or
/// with Secure Boot), or a kernel, which is given its initrds as words.
pub(super) fn program(tree: &Tree, root: &str, file: &str, arguments: &str, secure: bool) -> Option<Candidate> {
    if let Some(image) = uki::read(tree, file) {
        let mut candidate = image.candidate;
        if !arguments.is_empty() && (!secure || candidate.cmdline.is_empty()) {
            candidate.cmdline = arguments.to_owned();
        }
        return Some(candidate);
    }
    let head = kernel::head(&tree.resolve(file).ok()?.into()).ok()?;
    let initrds = cmdline::values(arguments, "initrd");
    is_bzimage(&head).then(|| Candidate {
        kernel: file.to_owned().into(),
        initrds: initrds
            .map(|path| {
                // What is not there is told by name later.
                let file = inside(tree, root, path);
                Source::from(file.unwrap_or_else(|| format!("{root}/{path}").replace('\\', "/")))
            })
            .collect(),
        cmdline: arguments.to_owned(),
        ..Candidate::default()
    })
}
