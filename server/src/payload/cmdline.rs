//! The payload's kernel command line, made ready for another machine.
//!
//! Split as the kernel splits it (lib/cmdline.c `next_arg`: only `"` quotes). What only meant this laptop's boot is dropped,
//! names of disks that another machine gives to another disk are translated. Rules: facts.md, "Finding the payload".

use super::PayloadError;

/// Parameters that belong to the boot loader or to this machine's last boot; compared with `-` as `_`, as the kernel does.
const DROPPED: [&str; 5] = ["BOOT_IMAGE", "initrd", "resume", "resume_offset", "rdinit"];
/// Parameters whose value starts with a block device, and may start with its UUID.
const DEVICES: [&str; 6] = [
    "root",
    "real_root",
    "mount.usr",
    "cryptdevice",
    "cryptkey",
    "crypt_root",
];
/// Parameters that say where the root file system is.
const ROOTS: [&str; 3] = ["root", "real_root", "zfs"];
/// systemd then takes the disk that the boot loader came from: on the desktop that is the stick.
const BY_LOADER: &str = "gpt-auto";
/// Programs that, as the first process, are no system.
const SHELLS: [&str; 8] = ["sh", "bash", "dash", "ash", "zsh", "ksh", "busybox", "sulogin"];
/// Parameters that stop an initrd half-way (initramfs-tools, mkinitcpio, dracut, systemd).
const BREAKS: [&str; 4] = ["break", "rd.break", "rd.systemd.break", "systemd.break"];
/// Words that ask for a maintenance shell instead of the system (systemd, initramfs-tools, Ubuntu's friendly-recovery).
const RESCUE: [&str; 9] = ["single", "s", "S", "1", "-s", "-b", "rescue", "emergency", "recovery"];

/// Splits a command line into its words; quotes stay where they are.
pub fn split(text: &str) -> Vec<&str> {
    let mut words = Vec::new();
    let (mut start, mut quoted) = (None, false);
    for (at, c) in text.char_indices() {
        if c == '"' {
            quoted = !quoted;
        }
        if c.is_ascii_whitespace() && !quoted {
            words.extend(start.take().map(|start| &text[start..at]));
        } else {
            start.get_or_insert(at);
        }
    }
    words.extend(start.map(|start| &text[start..]));
    words
}

/// Name and value of a word, without the quotes around either.
fn parameter(word: &str) -> (String, Option<&str>) {
    let bare = word.strip_prefix('"').unwrap_or(word);
    let (name, value) = match bare.split_once('=') {
        Some((name, value)) => (name, Some(value.trim_matches('"'))),
        None => (bare.trim_end_matches('"'), None),
    };
    (name.replace('-', "_"), value)
}

/// Makes a command line ready for the desktop and adds the words of `append`.
///
/// `uuid_of` gives the file system UUID of a block device's path, such as `/dev/sda2`.
///
/// # Errors
/// [`PayloadError::Rescue`] if it asks for a maintenance shell, [`PayloadError::DeviceName`] for a disk that is named by a
/// place in this machine and whose UUID is not known or does not help there, [`PayloadError::RootByLoader`].
pub fn clean(text: &str, append: &[String], uuid_of: &dyn Fn(&str) -> Option<String>) -> Result<String, PayloadError> {
    let words = split(text);
    // What follows `--` is for init and not for the kernel.
    let kernel_end = words.iter().position(|word| *word == "--").unwrap_or(words.len());
    let (kernel, init) = words.split_at(kernel_end);
    if let Some(word) = words.iter().find(|word| is_rescue(word)) {
        return Err(PayloadError::Rescue {
            word: (*word).to_owned(),
        });
    }
    let mut cleaned = Vec::with_capacity(words.len() + append.len());
    for word in kernel {
        let (name, value) = parameter(word);
        match value {
            Some(_) if DROPPED.contains(&name.as_str()) => {}
            Some(value) if DEVICES.contains(&name.as_str()) => {
                if value == BY_LOADER {
                    return Err(PayloadError::RootByLoader {
                        word: (*word).to_owned(),
                    });
                }
                // dracut also writes `root=block:/dev/…`.
                let device = value.strip_prefix("block:").unwrap_or(value);
                cleaned.push(match is_place(device) {
                    true => translate(word, device, uuid_of)?,
                    false => (*word).to_owned(),
                });
            }
            _ => cleaned.push((*word).to_owned()),
        }
    }
    cleaned.extend(append.iter().cloned());
    if let Some(word) = cleaned.iter().find(|word| holds_place(word)) {
        return Err(PayloadError::DeviceName { word: word.clone() });
    }
    cleaned.extend(init.iter().map(|word| (*word).to_owned()));
    Ok(cleaned.join(" "))
}

/// Whether a cleaned command line says where the root file system is. Otherwise the initrd decides, by what it finds.
pub fn names_root(text: &str) -> bool {
    split(text)
        .into_iter()
        .take_while(|word| *word != "--")
        .map(parameter)
        .any(|(name, value)| ROOTS.contains(&name.as_str()) && value.is_some_and(|value| !value.is_empty()))
}

fn is_rescue(word: &str) -> bool {
    let (name, value) = parameter(word);
    match (name.as_str(), value) {
        ("systemd.unit" | "rd.systemd.unit", Some(unit)) => {
            matches!(unit, "rescue.target" | "emergency.target" | "rescue" | "emergency")
        }
        ("init", Some(program)) => SHELLS.contains(&program.rsplit('/').next().unwrap_or_default()),
        (name, _) if BREAKS.contains(&name) => true,
        (_, None) => RESCUE.contains(&word),
        _ => false,
    }
}

/// Whether a device is named by where it is in this machine: another machine gives that name to another disk.
fn is_place(value: &str) -> bool {
    let Some(name) = value.strip_prefix("/dev/") else {
        // The kernel also takes numbers: `8:2` or `0802`.
        return !value.is_empty() && value.bytes().all(|b| b.is_ascii_hexdigit() || b == b':');
    };
    let name = name.split(':').next().unwrap_or(name);
    if ["disk/by-path/", "disk/by-diskseq/", "block/"]
        .iter()
        .any(|folder| name.starts_with(folder))
    {
        return true;
    }
    let numbered = ["sd", "hd", "vd", "xvd", "nvme", "mmcblk", "dm-", "nbd", "sr", "loop"];
    !name.contains('/') && numbered.iter().any(|prefix| name.starts_with(prefix))
}

/// Whether the value of a word names a disk by its place, at its beginning or further in (`rootflags=device=/dev/sdb2`).
fn holds_place(word: &str) -> bool {
    let (_, value) = parameter(word);
    value.is_some_and(|value| {
        value
            .match_indices("/dev/")
            .filter_map(|(at, _)| value.get(at..)?.split([',', ';', ' ']).next())
            .any(is_place)
    })
}

/// The same word with the device's UUID instead of its place; what follows the device (`:name`) stays.
fn translate(word: &str, value: &str, uuid_of: &dyn Fn(&str) -> Option<String>) -> Result<String, PayloadError> {
    // by-path names hold colons themselves, so the whole value is tried first.
    let (device, uuid) = match (uuid_of(value), value.split_once(':')) {
        (Some(uuid), _) => (value, Some(uuid)),
        (None, Some((device, _))) => (device, uuid_of(device)),
        (None, None) => (value, None),
    };
    let uuid = uuid.ok_or_else(|| PayloadError::DeviceName { word: word.to_owned() })?;
    Ok(word.replacen(device, &format!("UUID={uuid}"), 1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn uuids(device: &str) -> Option<String> {
        match device {
            "/dev/sda2" | "8:2" | "/dev/disk/by-path/pci-0000:00:17.0-ata-1-part2" => Some("11-22".into()),
            "/dev/nvme0n1p3" => Some("33-44".into()),
            _ => None,
        }
    }

    fn cleaned(text: &str) -> String {
        clean(text, &[], &uuids).unwrap()
    }

    #[test]
    fn what_belongs_to_the_last_boot_is_dropped_and_the_rest_kept_in_order() {
        assert_eq!(
            cleaned(
                "BOOT_IMAGE=/boot/vmlinuz-6.1 root=UUID=ab ro quiet splash initrd=\\a.img resume=/dev/sda3 \
                 resume_offset=5 rdinit=/bin/x vt.handoff=7\n"
            ),
            "root=UUID=ab ro quiet splash vt.handoff=7"
        );
    }

    #[test]
    fn dropped_parameters_are_known_with_dashes_and_quotes() {
        assert_eq!(cleaned("\"initrd=a b\" resume-offset=1 x=\"c d\" e"), "x=\"c d\" e");
    }

    #[test]
    fn roots_by_place_become_uuids() {
        for place in ["/dev/sda2", "8:2", "/dev/disk/by-path/pci-0000:00:17.0-ata-1-part2"] {
            assert_eq!(cleaned(&format!("root={place} ro")), "root=UUID=11-22 ro");
        }
        assert_eq!(
            cleaned("root=block:/dev/sda2 cryptkey=/dev/sda2:ext4:/key"),
            "root=block:UUID=11-22 cryptkey=UUID=11-22:ext4:/key"
        );
        assert_eq!(
            cleaned("cryptdevice=/dev/nvme0n1p3:cryptroot:allow-discards root=/dev/mapper/cryptroot"),
            "cryptdevice=UUID=33-44:cryptroot:allow-discards root=/dev/mapper/cryptroot"
        );
    }

    #[test]
    fn roots_that_hold_on_any_machine_stay() {
        for root in [
            "UUID=1",
            "LABEL=sda2",
            "PARTUUID=1",
            "/dev/disk/by-uuid/1",
            "/dev/mapper/vg-root",
            "/dev/vg/root",
            "/dev/md127",
            "ZFS=rpool/root",
            "zfs:AUTO",
            "/dev/disk/by-id/nvme-x",
        ] {
            assert_eq!(cleaned(&format!("root={root}")), format!("root={root}"));
        }
    }

    #[test]
    fn a_root_by_place_without_uuid_is_refused_with_its_word() {
        for root in [
            "/dev/sdb1",
            "/dev/vda",
            "/dev/nbd0p1",
            "8:17",
            "fe01",
            "block:/dev/sdb2",
            "/dev/block/259:2",
        ] {
            let error = clean(&format!("quiet root={root}"), &[], &uuids).unwrap_err();
            assert!(error.to_string().contains(&format!("root={root}")), "{error}");
        }
    }

    #[test]
    fn places_anywhere_in_a_value_are_refused() {
        for word in [
            "cryptkey=/dev/sdb1:ext4:/key",
            "cryptdevice=/dev/sdb2:name:discard",
            "rootflags=subvol=@,device=/dev/sda2,ssd",
            "rd.luks.key=/keyfile:/dev/sdb1",
            "x=\"a /dev/disk/by-path/pci-1\"",
        ] {
            for (text, append) in [
                (format!("root=UUID=1 {word}"), vec![]),
                ("root=UUID=1".into(), vec![word.into()]),
            ] {
                let error = clean(&text, &append, &|device| {
                    uuids(device).filter(|_| word.starts_with("rootflags"))
                });
                assert!(
                    matches!(&error, Err(PayloadError::DeviceName { word: named }) if named == word),
                    "{word}: {error:?}"
                );
            }
        }
        for word in [
            "x=/dev/mapper/a,b",
            "console=/dev/tty1",
            "rd.luks.options=x",
            "note=sda2",
        ] {
            assert_eq!(cleaned(word), word);
        }
    }

    #[test]
    fn a_root_found_by_the_boot_loader_s_disk_is_refused() {
        let error = clean("quiet root=gpt-auto", &[], &uuids).unwrap_err();
        assert!(matches!(&error, PayloadError::RootByLoader { .. }), "{error}");
        assert!(error.to_string().contains("boot.load.cmdline"));
    }

    #[test]
    fn a_command_line_that_names_no_root_is_known() {
        for text in ["root=UUID=1 ro", "ro zfs=pool/root", "real_root=LABEL=x"] {
            assert!(names_root(text), "{text}");
        }
        for text in ["", "ro quiet", "root=", "xroot=1", "ro -- root=UUID=1", "rootflags=x"] {
            assert!(!names_root(text), "{text}");
        }
    }

    #[test]
    fn maintenance_boots_are_refused() {
        for text in [
            "init=/bin/sh",
            "init=\"/usr/bin/bash\"",
            "rd.break",
            "rd.break=pre-mount",
            "break=premount",
            "break",
            "rd.systemd.unit=emergency.target",
            "ro single",
            "S",
            "1",
            "systemd.unit=rescue.target",
            "ro recovery nomodeset",
            "a -- -b",
        ] {
            assert!(
                matches!(clean(text, &[], &uuids), Err(PayloadError::Rescue { .. })),
                "{text}"
            );
        }
        let fine = "nosingle x=1 rescue_me=0 init=/usr/lib/systemd/systemd";
        assert_eq!(cleaned(fine), fine);
    }

    #[test]
    fn added_words_stand_before_what_is_for_init() {
        let append = ["a=1".to_owned(), "b".to_owned()];
        assert_eq!(clean("ro -- foo", &append, &uuids).unwrap(), "ro a=1 b -- foo");
        assert_eq!(clean("ro", &append, &uuids).unwrap(), "ro a=1 b");
    }

    proptest! {
        #[test]
        fn any_text_is_cleaned_or_refused_and_cleaning_twice_changes_nothing(text in "[ -~\\n]{0,120}") {
            if let Ok(once) = clean(&text, &[], &uuids) {
                prop_assert_eq!(clean(&once, &[], &uuids).unwrap(), once);
            }
        }

        #[test]
        fn no_dropped_parameter_survives(words in proptest::collection::vec("(initrd|resume|BOOT_IMAGE|rdinit|ro|quiet|x)(=[a-z/\"]{0,5})?", 0..10)) {
            if let Ok(text) = clean(&words.join(" "), &[], &uuids) {
                for word in split(&text) {
                    let (name, value) = parameter(word);
                    prop_assert!(value.is_none() || !DROPPED.contains(&name.as_str()), "{}", word);
                }
            }
        }

        #[test]
        fn words_are_split_where_they_were_joined(words in proptest::collection::vec("[a-z=.]{1,8}(\"[a-z ]{0,6}\")?", 0..8)) {
            let text = words.join("  \t");
            prop_assert_eq!(split(&text), words);
        }
    }
}
