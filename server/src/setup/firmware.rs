//! What the firmware and the kernel say of how this system was started: Secure Boot, lockdown, the boot loader.
//!
//! Specification: UEFI 2.10, 3.3 (SecureBoot); systemd, "The Boot Loader Interface" (LoaderInfo); kernel_lockdown(7). In efivarfs
//! four bytes of attributes come before a variable's value.

use std::fs::File;
use std::io::Read;

use super::presentable;
use crate::tree::Tree;

const EFIVARS: &str = "/sys/firmware/efi/efivars";
const SECURE_BOOT: &str = "SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c";
const LOADER_INFO: &str = "LoaderInfo-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f";
/// The longest variable that is read, in bytes.
const MAX_VARIABLE: u64 = 4096;

/// How the system was started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Firmware {
    /// UEFI, and not BIOS.
    pub efi: bool,
    /// Whether Secure Boot is on.
    pub secure_boot: Option<bool>,
    /// The kernel's lockdown: `none`, `integrity` or `confidentiality`.
    pub lockdown: Option<String>,
    /// The boot loader's name.
    pub loader: Option<String>,
}

impl Firmware {
    pub(super) fn of(tree: &Tree) -> Self {
        let lockdown = tree.line("/sys/kernel/security/lockdown");
        let chosen = |text: String| {
            let (_, rest) = text.split_once('[')?;
            Some(presentable(rest.split_once(']')?.0))
        };
        Self {
            efi: tree.path("/sys/firmware/efi").is_dir(),
            secure_boot: variable(tree, SECURE_BOOT).and_then(|value| value.first().map(|&byte| byte == 1)),
            lockdown: lockdown.and_then(chosen),
            loader: loader(tree),
        }
    }
}

/// What the loader says of itself, else what its files look like.
fn loader(tree: &Tree) -> Option<String> {
    if let Some(info) = variable(tree, LOADER_INFO) {
        let units: Vec<u16> = info
            .chunks_exact(2)
            .filter_map(|pair| Some(u16::from_le_bytes(pair.try_into().ok()?)))
            .take_while(|&unit| unit != 0)
            .collect();
        let name = presentable(&String::from_utf16_lossy(&units));
        if !name.is_empty() {
            return Some(name);
        }
    }
    let there = |path: &str| tree.path(path).exists();
    let grub = ["/boot/grub/grub.cfg", "/boot/grub2/grub.cfg", "/efi/grub/grub.cfg"];
    if grub.into_iter().any(there) {
        return Some("GRUB".to_owned());
    }
    let entries = [
        "/boot/loader/entries",
        "/efi/loader/entries",
        "/boot/efi/loader/entries",
    ];
    entries.into_iter().any(there).then(|| "systemd-boot".to_owned())
}

fn variable(tree: &Tree, name: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    let file = File::open(tree.path(format!("{EFIVARS}/{name}"))).ok()?;
    file.take(MAX_VARIABLE).read_to_end(&mut bytes).ok()?;
    bytes.get(4..).map(<[u8]>::to_vec)
}
