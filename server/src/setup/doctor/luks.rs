//! Whether a person can open the encryption on the desktop, whose TPM is another one.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use stiefel_shared::luks::{self, BINARY_HEADER, Openers};

use super::{Finding, Patient};

/// What is on a device.
enum Header {
    Luks2(Openers),
    /// LUKS 1, which has no tokens.
    Older,
    Unknown,
}

pub(super) fn tpm(patient: &Patient) -> Vec<Finding> {
    const CHECK: &str = "tpm";
    let devices = patient.machine.root.encrypted(&patient.tree);
    if devices.is_empty() {
        return vec![Finding::ok(
            CHECK,
            "/ is not encrypted: nothing is bound to this machine's TPM",
        )];
    }
    let finding = |name: String| {
        let device = format!("/dev/{name}");
        match read(&patient.tree.path(&device)) {
            Ok(Header::Luks2(openers)) => verdict(CHECK, &device, &openers),
            Ok(Header::Older) => Finding::ok(
                CHECK,
                format!("{device} is LUKS 1, opened by a passphrase or a key file"),
            ),
            Ok(Header::Unknown) => Finding::warning(
                CHECK,
                format!("{device} carries no LUKS header that is understood, so it is not known what opens it"),
                format!("cryptsetup luksDump {device}   # is there a key slot with a passphrase?"),
            ),
            Err(error) => Finding::warning(
                CHECK,
                format!("what opens {device} cannot be read: {error}"),
                "sudo stiefel doctor",
            ),
        }
    };
    devices.into_iter().map(finding).collect()
}

fn verdict(check: &'static str, device: &str, openers: &Openers) -> Finding {
    let bound: Vec<&str> = openers
        .tokens
        .iter()
        .filter(|token| token.is_machine_bound())
        .map(|token| token.kind.as_str())
        .collect();
    if bound.is_empty() {
        return Finding::ok(check, format!("{device} is not bound to this machine's TPM"));
    }
    let by = bound.join(", ");
    if openers.plain_slots().next().is_some() {
        return Finding::ok(
            check,
            format!("{device} is opened by this machine ({by}), and by a passphrase, which the desktop asks for"),
        );
    }
    Finding::failure(
        check,
        format!("{device} is opened by this machine only ({by}): the desktop cannot, and no passphrase is set"),
        format!("cryptsetup luksAddKey {device}"),
    )
}

fn read(device: &Path) -> io::Result<Header> {
    let file = File::open(device)?;
    let mut head = [0; 16];
    file.read_exact_at(&mut head, 0)?;
    let Some(length) = luks::header_length(&head) else {
        return Ok(match luks::version(&head) {
            Some(1) => Header::Older,
            _ => Header::Unknown,
        });
    };
    // Bounded by `header_length` to 4 MiB.
    let mut area = vec![0; length.saturating_sub(BINARY_HEADER)];
    file.read_exact_at(&mut area, BINARY_HEADER as u64)?;
    Ok(luks::openers(&area).map_or(Header::Unknown, Header::Luks2))
}
