//! Whether the payload's own initrd has the attach step in it already: then no overlay is made and sent.

use stiefel_initrd_builder::baked::is_baked;

use crate::payload::FoundPayload;
use crate::tree::Tree;

/// Where the hooks lie that call `stiefel bake`. Without any, no initrd is read and decompressed in vain.
const HOOKS: [&str; 5] = [
    "/etc/initramfs-tools/hooks/stiefel",
    "/usr/share/initramfs-tools/hooks/stiefel",
    "/usr/lib/dracut/modules.d/90stiefel",
    "/etc/initcpio/install/stiefel",
    "/usr/lib/initcpio/install/stiefel",
];

/// Whether it has just what an overlay would hold.
pub(super) fn baked(tree: &Tree, payload: &FoundPayload, modules: &[String]) -> bool {
    // Whole files only: what is part of a unified image was put there by others than these hooks.
    let files: Option<Vec<_>> = payload
        .initrds
        .iter()
        .map(|piece| piece.section.is_none().then(|| piece.path.clone()))
        .collect();
    let Some(files) = files else { return false };
    HOOKS.iter().any(|hook| tree.path(hook).exists()) && is_baked(&files, &payload.version, modules)
}
