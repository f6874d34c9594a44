//! Hooks that have the ramdisk built anew when a kernel was updated: for those of the ways kernels are updated that this
//! system has. They only call `stiefel upgrade`, and never fail the kernel's own update.
//!
//! Specifications: Debian's kernel handbook, "Kernel hook scripts"; kernel-install(8); alpm-hooks(5).

use super::wanted::{PROGRAM_WORD, Wanted};
use crate::tree::Tree;

const SCRIPT: &str = include_str!("../../../hooks/kernel/zzz-stiefel");
const KERNEL_INSTALL: &str = include_str!("../../../hooks/kernel/95-stiefel.install");
const PACMAN: &str = include_str!("../../../hooks/pacman/95-stiefel.hook");

const WHAT: &str = "builds the ramdisk anew after kernel updates";

/// The hooks that fit.
pub(super) fn hooks(tree: &Tree, program: &str) -> Vec<Wanted> {
    let text = |text: &str| text.replace(PROGRAM_WORD, program);
    if tree.is_file("/etc/pacman.conf") {
        return vec![Wanted::text("/etc/pacman.d/hooks/95-stiefel.hook", text(PACMAN), WHAT)];
    }
    let mut hooks = Vec::new();
    let debian = tree.is_file("/var/lib/dpkg/status");
    if debian || tree.path("/etc/kernel/postinst.d").is_dir() {
        for folder in ["postinst.d", "postrm.d"] {
            let path = format!("/etc/kernel/{folder}/zzz-stiefel");
            hooks.push(Wanted::script(path, text(SCRIPT), WHAT));
        }
    }
    // Debian's kernels call kernel-install through postinst.d, if at all.
    if !debian
        && ["/usr/bin/kernel-install", "/bin/kernel-install"]
            .iter()
            .any(|path| tree.is_file(path))
    {
        let path = "/etc/kernel/install.d/95-stiefel.install";
        hooks.push(Wanted::script(path, text(KERNEL_INSTALL), WHAT));
    }
    hooks
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hooks_with(files: &[&str]) -> Vec<String> {
        let dir = tempfile::tempdir().unwrap();
        let tree = Tree::new(dir.path());
        for file in files {
            let path = tree.path(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "").unwrap();
        }
        let hooks = hooks(&tree, "/usr/bin/stiefel");
        for hook in &hooks {
            let super::super::wanted::Content::Bytes(bytes) = &hook.content else {
                panic!("{hook:?}")
            };
            let text = std::str::from_utf8(bytes).unwrap();
            assert!(
                text.contains("/usr/bin/stiefel upgrade --quiet") && !text.contains('@'),
                "{text}"
            );
            assert_eq!(hook.mode == 0o755, text.starts_with("#!"), "{}", hook.path);
        }
        hooks.into_iter().map(|hook| hook.path).collect()
    }

    #[test]
    fn each_distribution_gets_the_hooks_that_fit() {
        let debian = ["/etc/kernel/postinst.d/zzz-stiefel", "/etc/kernel/postrm.d/zzz-stiefel"];
        let kernel_install = "/etc/kernel/install.d/95-stiefel.install";
        assert_eq!(hooks_with(&["/var/lib/dpkg/status", "/usr/bin/kernel-install"]), debian);
        assert_eq!(hooks_with(&["/usr/bin/kernel-install"]), [kernel_install], "Fedora");
        assert_eq!(
            hooks_with(&["/etc/kernel/postinst.d/50-other"]),
            debian,
            "Gentoo without systemd's"
        );
        assert_eq!(
            hooks_with(&["/etc/pacman.conf", "/usr/bin/kernel-install"]),
            ["/etc/pacman.d/hooks/95-stiefel.hook"]
        );
        assert_eq!(hooks_with(&[]), Vec::<String>::new());
    }
}
