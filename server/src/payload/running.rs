//! The kernel that runs, by the names distributions give its files.

use stiefel_shared::kernel::is_release;

use super::{Candidate, PayloadError, Source, files};
use crate::tree::Tree;

/// The running kernel. `why` says why no boot loader named one.
///
/// # Errors
/// [`PayloadError::Nothing`].
pub(super) fn find(tree: &Tree, why: &str) -> Result<Candidate, PayloadError> {
    let nothing = |release: String| PayloadError::Nothing {
        why: why.to_owned(),
        release,
    };
    let release = tree
        .line("/proc/sys/kernel/osrelease")
        .filter(|release| is_release(release))
        .ok_or_else(|| nothing("none runs in this tree".to_owned()))?;
    let kernel = usual(tree, &release)
        .into_iter()
        // Arch keeps one file per package: it may be newer than what runs.
        .find(|path| files::release(tree, path).as_ref() == Some(&release))
        .ok_or_else(|| nothing(release.clone()))?;
    let initrds = files::initrd_of(tree, &kernel, Some(&release));
    Ok(Candidate {
        kernel: kernel.into(),
        initrds: initrds.into_iter().map(Source::from).collect(),
        cmdline: tree.text("/proc/cmdline").unwrap_or_default(),
        reason: format!("it runs now; {why}"),
        ..Candidate::default()
    })
}

/// Where the kernel of a release may be.
fn usual(tree: &Tree, release: &str) -> Vec<String> {
    let arch = std::env::consts::ARCH;
    let mut paths = vec![
        format!("/boot/vmlinuz-{release}"),
        format!("/boot/kernel-{release}"),
        format!("/boot/vmlinux-{release}"),
        format!("/boot/kernel-genkernel-{arch}-{release}"),
    ];
    paths.extend(files::package_of(tree, release).map(|package| format!("/boot/vmlinuz-{package}")));
    // kernel-install: below the machine's id, or another token that the machine has.
    let tokens = [tree.line("/etc/machine-id"), tree.line("/etc/kernel/entry-token")];
    let id = tokens.into_iter().flatten().filter(|token| is_release(token));
    for token in id {
        for folder in ["/boot", "/efi", "/boot/efi"] {
            paths.push(format!("{folder}/{token}/{release}/linux"));
        }
    }
    paths.push(format!("/usr/lib/modules/{release}/vmlinuz"));
    paths
}
