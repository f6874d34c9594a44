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
    HOOKS.iter().any(|hook| tree.path(hook).exists()) && is_baked(&payload.initrds, &payload.version, modules)
}
