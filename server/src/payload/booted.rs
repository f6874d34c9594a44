//! What started this system: boot loaders and firmware leave it in variables.
//!
//! Not believed in a session: they are the desktop's then, which was started from the stick, and say nothing of what the laptop's
//! firmware and boot loader would start.
//!
//! Specification: systemd.io/BOOT_LOADER_INTERFACE; UEFI, 3.3 ("Globally Defined Variables"). Parsed by
//! `stiefel_shared::loader::efi`.

use stiefel_shared::loader::efi::{self, GLOBAL, LOADER, LoadOption, MAX_VARIABLE};

use crate::tree::Tree;

/// What is to be said where [`Booted::elsewhere`] was used.
pub(super) const ELSEWHERE: &str = "this system runs on a desktop, whose firmware's variables do not tell what the laptop would boot; \
    they were not looked at. An entry that is chosen there (LoaderEntryDefault, BootOrder) counts at home again";

/// What started this system, as far as it is told; all empty where the firmware is no EFI.
#[derive(Debug, Default)]
pub(super) struct Booted {
    /// There are variables of an EFI firmware.
    pub efi: bool,
    /// Secure Boot is on.
    pub secure: bool,
    /// The boot loader's name and version.
    info: Option<String>,
    /// The entry that was booted, by systemd-boot's name.
    pub selected: Option<String>,
    pub one_shot: Option<String>,
    pub default: Option<String>,
    pub last_booted: Option<String>,
    /// What the firmware started.
    pub option: Option<LoadOption>,
}

/// Which boot loader.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Loader<'a> {
    SystemdBoot,
    Grub,
    /// None: the firmware started a program that is no boot loader we know.
    Firmware(&'a LoadOption),
    Other(&'a str),
    Unknown,
}

impl Booted {
    /// On a desktop that runs from the laptop's disk. Which kind of firmware the laptop has is not known; of GRUB's entries few ask.
    pub fn elsewhere(tree: &Tree) -> Self {
        Self {
            efi: tree.is_folder("/sys/firmware/efi"),
            ..Self::default()
        }
    }

    pub fn read(tree: &Tree) -> Self {
        let variable = |name: &str, space: &str| {
            let path = format!("/sys/firmware/efi/efivars/{name}-{space}");
            tree.bytes(path, MAX_VARIABLE).ok()
        };
        let text = |name: &str| efi::text(&variable(name, LOADER)?);
        let current = || efi::number(&variable("BootCurrent", GLOBAL)?);
        let option = || efi::load_option(&variable(&format!("Boot{:04X}", current()?), GLOBAL)?);
        Self {
            efi: tree.is_folder("/sys/firmware/efi"),
            secure: variable("SecureBoot", GLOBAL).is_some_and(|bytes| efi::value(&bytes) == Some(&[1])),
            info: text("LoaderInfo"),
            selected: text("LoaderEntrySelected"),
            one_shot: text("LoaderEntryOneShot"),
            default: text("LoaderEntryDefault"),
            last_booted: text("LoaderEntryLastBooted"),
            option: option(),
        }
    }

    /// Which boot loader it was.
    pub fn loader(&self) -> Loader<'_> {
        match self.info.as_deref() {
            Some(info) if info.starts_with("systemd-boot") => return Loader::SystemdBoot,
            Some(info) if info.starts_with("GRUB") => return Loader::Grub,
            Some(info) => return Loader::Other(info),
            None => {}
        }
        let Some(option) = &self.option else {
            return Loader::Unknown;
        };
        let path = option.path.as_deref().unwrap_or_default().to_ascii_lowercase();
        let name = path.rsplit('/').next().unwrap_or_default();
        if name.starts_with("grub") || name.starts_with("shim") {
            Loader::Grub
        } else if name.is_empty() || name.starts_with("boot") {
            // EFI/BOOT/BOOTX64.EFI may be a copy of anything.
            Loader::Unknown
        } else {
            Loader::Firmware(option)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn booted(info: Option<&str>, path: &str) -> Booted {
        Booted {
            info: info.map(str::to_owned),
            option: Some(LoadOption {
                path: Some(path.to_owned()),
                ..LoadOption::default()
            }),
            ..Booted::default()
        }
    }

    #[test]
    fn the_loader_is_known_by_what_it_says_else_by_its_file() {
        assert_eq!(
            booted(Some("systemd-boot 252"), "/EFI/BOOT/BOOTX64.EFI").loader(),
            Loader::SystemdBoot
        );
        assert_eq!(booted(Some("GRUB 2.12"), "/x").loader(), Loader::Grub);
        assert_eq!(booted(Some("rEFInd 0.14"), "/x").loader(), Loader::Other("rEFInd 0.14"));
        assert_eq!(booted(None, "/EFI/debian/shimx64.efi").loader(), Loader::Grub);
        assert_eq!(booted(None, "/EFI/BOOT/BOOTX64.EFI").loader(), Loader::Unknown);
        let direct = booted(None, "/EFI/Linux/arch.efi");
        assert_eq!(direct.loader(), Loader::Firmware(direct.option.as_ref().unwrap()));
        assert_eq!(Booted::default().loader(), Loader::Unknown);
    }
}
