//! Which files belong to a kernel, by the names distributions give them.

use stiefel_shared::kernel::is_release;

use super::kernel;
use crate::tree::Tree;

/// The release of a kernel's file in the tree.
pub(super) fn release(tree: &Tree, path: &str) -> Option<String> {
    kernel::release(&tree.resolve(path).ok()?).ok().flatten()
}

/// Arch's package of a release, e.g. `linux-lts`.
pub(super) fn package_of(tree: &Tree, release: &str) -> Option<String> {
    tree.line(format!("/usr/lib/modules/{release}/pkgbase"))
        .filter(|name| is_release(name))
}

/// The initrd that belongs to a kernel.
pub(super) fn initrd_of(tree: &Tree, kernel: &str, release: Option<&str>) -> Option<String> {
    let (folder, name) = kernel.rsplit_once('/')?;
    let suffix = name.split_once('-').map(|(_, suffix)| suffix);
    let package = release.and_then(|release| package_of(tree, release));
    let suffixes = [release, suffix, package.as_deref()];
    let named = [folder, "/boot"]
        .into_iter()
        .flat_map(|folder| suffixes.iter().flatten().map(move |suffix| (folder, suffix)))
        .flat_map(|(folder, suffix)| {
            [
                format!("{folder}/initrd.img-{suffix}"),
                format!("{folder}/initramfs-{suffix}.img"),
                format!("{folder}/initrd-{suffix}"),
                // Gentoo's genkernel.
                format!("{folder}/initramfs-{suffix}"),
            ]
        });
    // kernel-install puts both into a folder of the release.
    let alone = release.filter(|release| folder.ends_with(&format!("/{release}")));
    let beside = ["initrd", "initrd.img", "initramfs.img"].map(|name| format!("{folder}/{name}"));
    named
        .chain(beside.into_iter().filter(|_| alone.is_some()))
        .find(|path| tree.is_file(path))
}
