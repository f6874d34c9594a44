//! Which laptop: Debian's release, what is installed, which initrd it has, and how its disk is laid out.

use super::BaseOptions;
use super::workshop::LUKS_UUID;

/// dracut, and what lets it boot from any of our file systems.
const DRACUT: [&str; 5] = [
    "dracut",
    "dracut-config-generic",
    "btrfs-progs",
    "xfsprogs",
    "grub2-common",
];
/// What an encrypted root needs, and (zstd) what packs its initrd.
const LUKS_LVM: [&str; 4] = ["cryptsetup-initramfs", "lvm2", "zstd", "grub2-common"];

/// What makes the initrd.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Initrd {
    /// Debian's own.
    InitramfsTools,
    /// dracut, for any machine (`hostonly=no`), with systemd.
    Dracut,
}

/// How the disk is laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Layout {
    /// One ext4.
    Ext4,
    /// LVM in LUKS2 (opened by [`super::PASSWORD`]): root (ext4) and swap space; /boot is an ext4 outside of it.
    LuksLvm,
    /// One btrfs with the subvolumes `@` and `@home`.
    Btrfs,
    /// Root is an xfs, /boot an ext4.
    Xfs,
}

impl Layout {
    /// Its name in file names, and for the workshop.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::LuksLvm => "luks-lvm",
            Self::Btrfs => "btrfs",
            Self::Xfs => "xfs",
        }
    }
}

/// A laptop to be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct System {
    /// Debian's release.
    pub suite: String,
    /// What makes its initrd.
    pub initrd: Initrd,
    /// How its disk is laid out.
    pub layout: Layout,
    /// What is installed besides what it needs.
    pub packages: Vec<String>,
}

impl Default for System {
    fn default() -> Self {
        Self::new(Layout::Ext4, Initrd::InitramfsTools)
    }
}

impl System {
    /// Debian 12 with little installed.
    pub fn new(layout: Layout, initrd: Initrd) -> Self {
        Self {
            suite: BaseOptions::default().suite,
            initrd,
            layout,
            packages: Vec::new(),
        }
    }

    /// Another release than Debian 12, as `trixie`.
    pub fn suite(mut self, suite: &str) -> Self {
        suite.clone_into(&mut self.suite);
        self
    }

    /// One more package.
    pub fn package(mut self, name: &str) -> Self {
        self.packages.push(name.to_owned());
        self
    }

    /// What is to be installed.
    pub(super) fn base(&self) -> BaseOptions {
        let mut base = BaseOptions::default();
        base.suite.clone_from(&self.suite);
        let more: &[&str] = match (self.initrd, self.layout) {
            // One for all its layouts: an initrd for any machine has the programs of all file systems.
            (Initrd::Dracut, _) => &DRACUT,
            (Initrd::InitramfsTools, Layout::Ext4) => &[],
            (Initrd::InitramfsTools, Layout::LuksLvm) => &LUKS_LVM,
            (Initrd::InitramfsTools, Layout::Btrfs) => &["btrfs-progs", "grub2-common"],
            (Initrd::InitramfsTools, Layout::Xfs) => &["xfsprogs", "grub2-common"],
        };
        if self.initrd == Initrd::Dracut {
            base.packages.retain(|package| package != "initramfs-tools");
        }
        if self.layout == Layout::LuksLvm {
            // `initramfs`: where the initrd is made, nothing is encrypted that it could see.
            base.crypttab = Some(format!("vda2_crypt UUID={LUKS_UUID} none luks,discard,initramfs"));
        }
        let more = more.iter().copied();
        more.chain(self.packages.iter().map(String::as_str))
            .fold(base, BaseOptions::package)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_is_the_plain_debian_of_all_other_tests() {
        assert_eq!(System::default().base(), BaseOptions::default());
    }

    #[test]
    fn only_one_program_makes_the_initrd() {
        let base = System::new(Layout::Xfs, Initrd::Dracut)
            .package("network-manager")
            .base();
        let has = |name: &str| base.packages.iter().any(|package| package == name);
        assert!(has("dracut") && has("xfsprogs") && has("network-manager") && has("linux-image-amd64"));
        assert!(!has("initramfs-tools"));
    }
}
