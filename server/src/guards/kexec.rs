//! Whether this kernel would start another.
//!
//! Specification: Linux, Documentation/admin-guide/sysctl/kernel.rst (kexec_load_disabled, kexec_load_limit_reboot);
//! kernel_lockdown(7): under lockdown only a signed image is taken. Whether its signer is trusted, only loading shows.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use super::Refusal;
use crate::tree::Tree;

/// PE headers lie in the first page or two.
const PE_HEADERS: u64 = 64 * 1024;

pub(crate) fn check(tree: &Tree, kernel: &Path) -> Option<Refusal> {
    let sysctl = |name: &str| tree.line(format!("/proc/sys/kernel/{name}"));
    if sysctl("kexec_load_disabled").as_deref() == Some("1") {
        return Some(Refusal::NoKexec {
            why: "kernel.kexec_load_disabled is 1",
            next: "remove that from /etc/sysctl.d and reboot: it cannot be taken back while the system runs",
        });
    }
    if sysctl("kexec_load_limit_reboot").as_deref() == Some("0") {
        return Some(Refusal::NoKexec {
            why: "kernel.kexec_load_limit_reboot is used up",
            next: "reboot: it cannot be raised while the system runs",
        });
    }
    if tree.path("/sys/kernel/mm").exists() && !tree.path("/sys/kernel/kexec_loaded").exists() {
        return Some(Refusal::NoKexec {
            why: "it was built without kexec",
            next: "use a kernel with CONFIG_KEXEC_FILE, such as the distribution's",
        });
    }
    let lockdown = tree.line("/sys/kernel/security/lockdown").unwrap_or_default();
    let locked = lockdown.contains("[integrity]") || lockdown.contains("[confidentiality]");
    (locked && kernel.exists() && !is_signed(kernel)).then_some(Refusal::NoKexec {
        why: "it is locked down (Secure Boot), and the ramdisk's kernel is not signed",
        next: "run `stiefel build` with the distribution's signed kernel, or turn Secure Boot off",
    })
}

/// Whether a PE image has a certificate table (PE format, "Optional header data directories").
fn is_signed(file: &Path) -> bool {
    let mut head = Vec::new();
    let read = File::open(file).and_then(|file| file.take(PE_HEADERS).read_to_end(&mut head));
    read.is_ok() && certificate_table_size(&head).is_some_and(|size| size > 0)
}

fn certificate_table_size(head: &[u8]) -> Option<u32> {
    let u16_at = |at: usize| Some(u16::from_le_bytes(head.get(at..at.checked_add(2)?)?.try_into().ok()?));
    let u32_at = |at: usize| Some(u32::from_le_bytes(head.get(at..at.checked_add(4)?)?.try_into().ok()?));
    let pe = usize::try_from(u32_at(0x3c)?).ok()?;
    if !head.starts_with(b"MZ") || head.get(pe..pe.checked_add(4)?)? != b"PE\0\0" {
        return None;
    }
    let optional = pe.checked_add(24)?;
    // The directories of PE32+ begin at 112; the certificate table is the fifth, 8 bytes each: address, then size.
    (u16_at(optional)? == 0x20b).then(|| u32_at(optional.checked_add(112 + 4 * 8 + 4)?))?
}

#[cfg(test)]
mod tests {
    use super::super::tests::Files;
    use super::*;
    use proptest::prelude::*;

    fn image(size: u32) -> Vec<u8> {
        let mut head = vec![0; 0x400];
        head[..2].copy_from_slice(b"MZ");
        head[0x3c] = 0x80;
        head[0x80..0x84].copy_from_slice(b"PE\0\0");
        head[0x98..0x9a].copy_from_slice(&0x20b_u16.to_le_bytes());
        head[0x98 + 148..0x98 + 152].copy_from_slice(&size.to_le_bytes());
        head
    }

    fn reason(files: &Files) -> Option<&'static str> {
        check(&files.tree(), &files.tree().path("/kernel")).map(|refusal| match refusal {
            Refusal::NoKexec { why, .. } => why,
            other => panic!("{other}"),
        })
    }

    #[test]
    fn a_kernel_that_was_told_not_to_is_refused() {
        assert!(
            reason(&Files::new(&[("/proc/sys/kernel/kexec_load_disabled", "1\n")]))
                .unwrap()
                .contains("disabled")
        );
        assert!(
            reason(&Files::new(&[("/proc/sys/kernel/kexec_load_limit_reboot", "0\n")]))
                .unwrap()
                .contains("limit")
        );
        assert_eq!(
            reason(&Files::new(&[("/proc/sys/kernel/kexec_load_limit_reboot", "-1\n")])),
            None
        );
    }

    #[test]
    fn a_kernel_without_kexec_is_refused() {
        let files = Files::new(&[("/sys/kernel/mm/x", "")]);
        assert!(reason(&files).unwrap().contains("built without"));
        files.write("/sys/kernel/kexec_loaded", b"0\n");
        assert_eq!(reason(&files), None);
    }

    #[test]
    fn under_lockdown_the_ramdisks_kernel_must_be_signed() {
        let files = Files::new(&[("/sys/kernel/security/lockdown", "none [integrity] confidentiality\n")]);
        files.write("/kernel", &image(0));
        assert!(reason(&files).unwrap().contains("not signed"));
        files.write("/kernel", &image(1800));
        assert_eq!(reason(&files), None);
        files.write("/sys/kernel/security/lockdown", b"[none] integrity confidentiality\n");
        files.write("/kernel", &image(0));
        assert_eq!(reason(&files), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_looked_at(bytes in proptest::collection::vec(any::<u8>(), 0..300), pe in any::<u32>()) {
            let mut head = image(1);
            head[0x3c..0x40].copy_from_slice(&pe.to_le_bytes());
            head.truncate(bytes.len() * 3);
            let _ = (certificate_table_size(&bytes), certificate_table_size(&head));
        }
    }
}
