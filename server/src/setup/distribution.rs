//! Which distribution this is, and which command of it brings what is missing.
//!
//! Specification: os-release(5). One that is not known by its ID is what it says it is like.

use super::presentable;
use crate::tree::Tree;

/// A distribution, as far as commands differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// Debian and what is made of it.
    Debian,
    /// Ubuntu and what is made of it: its kernels' modules come in two packages.
    Ubuntu,
    /// Fedora, RHEL and their relatives.
    Fedora,
    /// Arch Linux and its relatives.
    Arch,
    /// Gentoo.
    Gentoo,
    /// openSUSE.
    Suse,
    /// NixOS.
    Nix,
    /// Another one.
    Other,
}

/// The system's distribution.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Distribution {
    /// Its name, for people.
    pub name: String,
    /// Its kind.
    pub family: Family,
}

/// What may be missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Package<'a> {
    /// A kernel with all its modules, or all modules of the kernel with this release.
    Modules(&'a str),
    /// The firmware with this name below /lib/firmware.
    Firmware(&'a str),
}

impl Distribution {
    pub(super) fn of(tree: &Tree) -> Self {
        let text = ["/etc/os-release", "/usr/lib/os-release"]
            .iter()
            .find_map(|path| tree.text(path).ok())
            .unwrap_or_default();
        Self::parse(&text)
    }

    fn parse(text: &str) -> Self {
        let value = |name: &str| {
            let line = text
                .lines()
                .rev()
                .find_map(|line| line.trim().strip_prefix(name)?.strip_prefix('='))?;
            Some(line.trim().trim_matches(['"', '\'']).to_owned())
        };
        let id = value("ID").unwrap_or_default();
        let like = value("ID_LIKE").unwrap_or_default();
        let family = [id.as_str()]
            .into_iter()
            .chain(like.split_ascii_whitespace())
            .map(Family::of)
            .find(|family| *family != Family::Other)
            .unwrap_or(Family::Other);
        let name = value("PRETTY_NAME")
            .or_else(|| value("NAME"))
            .filter(|name| !name.is_empty());
        Self {
            name: name.map_or_else(|| "an unknown Linux".to_owned(), |name| presentable(&name)),
            family,
        }
    }

    /// The command that brings `package`.
    #[must_use]
    pub fn command(&self, package: Package<'_>) -> String {
        match package {
            Package::Modules(release) => self.modules(release),
            Package::Firmware(name) => self.firmware(name),
        }
    }

    fn modules(&self, release: &str) -> String {
        let debian = match std::env::consts::ARCH {
            "aarch64" => "arm64",
            _ => "amd64",
        };
        match self.family {
            Family::Debian => format!("apt install linux-image-{debian} && reboot"),
            Family::Ubuntu => format!("apt install linux-modules-extra-{release}"),
            Family::Fedora => format!("dnf install kernel-modules-{release} kernel-modules-extra-{release}"),
            Family::Arch => "pacman -Syu linux && reboot".to_owned(),
            Family::Gentoo => "emerge --ask sys-kernel/gentoo-kernel-bin && reboot".to_owned(),
            Family::Suse => "zypper install kernel-default && reboot".to_owned(),
            Family::Nix | Family::Other => {
                "install the distribution's usual kernel with all its modules, and reboot".to_owned()
            }
        }
    }

    fn firmware(&self, name: &str) -> String {
        let realtek = name.starts_with("rtl_nic/");
        match (self.family, realtek) {
            (Family::Debian, true) => "apt install firmware-realtek   # of the component non-free-firmware".to_owned(),
            (Family::Debian, false) => {
                "apt install firmware-misc-nonfree   # of the component non-free-firmware".to_owned()
            }
            (Family::Ubuntu, _) => "apt install linux-firmware".to_owned(),
            (Family::Fedora, true) => "dnf install realtek-firmware".to_owned(),
            (Family::Fedora, false) => "dnf install linux-firmware".to_owned(),
            (Family::Arch, _) => "pacman -S linux-firmware".to_owned(),
            (Family::Gentoo, _) => "emerge --ask sys-kernel/linux-firmware".to_owned(),
            (Family::Suse, true) => "zypper install kernel-firmware-realtek".to_owned(),
            (Family::Suse, false) => "zypper install kernel-firmware-network".to_owned(),
            (Family::Nix, _) => {
                "set hardware.enableRedistributableFirmware = true, and nixos-rebuild switch".to_owned()
            }
            (Family::Other, _) => "install the distribution's package linux-firmware".to_owned(),
        }
    }
}

impl Family {
    fn of(id: &str) -> Self {
        match id {
            "debian" | "raspbian" => Self::Debian,
            "ubuntu" => Self::Ubuntu,
            "fedora" | "rhel" | "centos" => Self::Fedora,
            "arch" | "archlinux" => Self::Arch,
            "gentoo" => Self::Gentoo,
            "suse" | "opensuse" | "opensuse-leap" | "opensuse-tumbleweed" => Self::Suse,
            "nixos" => Self::Nix,
            _ => Self::Other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn relatives_count_as_what_they_are_like() {
        for (text, family) in [
            ("ID=debian\n", Family::Debian),
            ("ID=linuxmint\nID_LIKE=\"ubuntu debian\"\n", Family::Ubuntu),
            ("ID=\"almalinux\"\nID_LIKE=\"rhel centos fedora\"\n", Family::Fedora),
            ("ID=manjaro\nID_LIKE=arch\n", Family::Arch),
            ("ID=\"opensuse-tumbleweed\"\n", Family::Suse),
            ("ID=nixos\n", Family::Nix),
            ("ID=void\n", Family::Other),
            ("", Family::Other),
        ] {
            assert_eq!(Distribution::parse(text).family, family, "{text}");
        }
        assert_eq!(Distribution::parse("PRETTY_NAME='A\u{1b}[1m B'\n").name, "A[1m B");
    }

    #[test]
    fn each_distribution_has_its_own_command() {
        let command = |id: &str, package| Distribution::parse(&format!("ID={id}\n")).command(package);
        assert!(command("debian", Package::Modules("6.1")).starts_with("apt install linux-image-"));
        assert_eq!(
            command("ubuntu", Package::Modules("6.8.0-31-generic")),
            "apt install linux-modules-extra-6.8.0-31-generic"
        );
        assert!(command("fedora", Package::Firmware("rtl_nic/x.fw")).contains("realtek-firmware"));
        assert!(command("arch", Package::Firmware("x")).contains("pacman"));
        assert!(command("gentoo", Package::Modules("6.6")).contains("emerge"));
    }

    proptest! {
        #[test]
        fn any_text_is_some_distribution(text in "\\PC{0,200}") {
            let _ = Distribution::parse(&text);
        }
    }
}
