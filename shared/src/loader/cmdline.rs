//! A kernel's command line, made ready for another machine.
//!
//! Used by the laptop's server. Split as the kernel splits it (lib/cmdline.c `next_arg`: only `"` quotes). What only meant
//! this laptop's boot is dropped, names of disks that another machine gives to another disk are translated. Refused: shells
//! instead of the system, disks that cannot be named so that it holds anywhere, roots that are on no disk.
//! Words: kernel-parameters.rst, bootparam(7), kernel-command-line(7), dracut.cmdline(7), initramfs-tools(7), mkinitcpio(8).

/// Why a command line is of no use on another machine.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CmdlineError {
    /// It asks for a maintenance shell.
    #[error(
        "the command line asks for a maintenance shell ({word:?}), which is no system to use on the desktop\n  \
         next: boot the system normally once, or set boot.load.cmdline in config.yaml"
    )]
    Rescue {
        /// The word that asks.
        word: String,
    },
    /// A device is named by its place in this machine.
    #[error(
        "{word} names a disk by its place in this machine, which is another disk on the desktop, and its UUID is not known\n  \
         next: find the UUID with `blkid` and set boot.load.cmdline in config.yaml with root=UUID=..."
    )]
    DeviceName {
        /// The whole word of the command line.
        word: String,
    },
    /// The root file system would be looked for on the boot loader's disk.
    #[error(
        "{word} looks for the root file system on the disk that was booted from, which is the stick on the desktop\n  \
         next: find its UUID with `findmnt -no UUID /` and set boot.load.cmdline in config.yaml with root=UUID=..."
    )]
    RootByLoader {
        /// The whole word of the command line.
        word: String,
    },
    /// The root file system is on no disk of the laptop.
    #[error(
        "{word} says that the system is a live system or comes from the network: there is no disk to lend\n  \
         next: install the system to the laptop's disk, or boot the one that is there"
    )]
    NoDisk {
        /// The whole word of the command line.
        word: String,
    },
}

/// Parameters that belong to the boot loader or to this machine's last boot; compared with `-` as `_`, as the kernel does.
const DROPPED: [&str; 6] = [
    "BOOT_IMAGE",
    "initrd",
    "resume",
    "resume_offset",
    "resumeflags",
    "rdinit",
];
/// Words without a value that say the same: the attaching program adds it again.
const DROPPED_WORDS: [&str; 1] = ["noresume"];
/// Roots that are on no disk.
const NO_DISK: [&str; 8] = ["live:", "nfs:", "nfs4:", "iscsi:", "nbd:", "fcoe:", "cifs:", "/dev/nfs"];
/// Systems that run from a medium (`boot=live`).
const LIVE: [&str; 3] = ["live", "casper", "nfs"];
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
const BY_LOADER: [&str; 4] = ["gpt-auto", "gpt-auto-force", "dissect", "dissect-force"];
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

/// The values of a parameter for the kernel, without quotes, in their order.
pub fn values<'a>(text: &'a str, wanted: &str) -> impl Iterator<Item = &'a str> {
    split(text)
        .into_iter()
        .take_while(|word| *word != "--")
        .map(parameter)
        .filter(move |(name, _)| name == wanted)
        .filter_map(|(_, value)| value)
}

/// The value of a parameter for the kernel that counts: the last.
#[must_use]
pub fn value<'a>(text: &'a str, wanted: &str) -> Option<&'a str> {
    values(text, wanted).last()
}

/// The command line without a `root=` that the boot loader's disk decides, and whether there was one.
#[must_use]
pub fn without_loader_root(text: &str) -> (String, bool) {
    let words = split(text);
    let kept: Vec<&str> = words
        .iter()
        .filter(|word| !matches!(parameter(word), (name, Some(value)) if name == "root" && BY_LOADER.contains(&value)))
        .copied()
        .collect();
    (kept.join(" "), kept.len() < words.len())
}

/// Makes a command line ready for the desktop and adds the words of `append`.
///
/// `uuid_of` gives the file system UUID of a block device's path, such as `/dev/sda2`.
///
/// # Errors
/// [`CmdlineError::Rescue`] if it asks for a maintenance shell, [`CmdlineError::DeviceName`] for a disk that is named by a
/// place in this machine and whose UUID is not known or does not help there, [`CmdlineError::RootByLoader`].
pub fn clean(text: &str, append: &[String], uuid_of: &dyn Fn(&str) -> Option<String>) -> Result<String, CmdlineError> {
    let words = split(text);
    // What follows `--` is for init and not for the kernel.
    let kernel_end = words.iter().position(|word| *word == "--").unwrap_or(words.len());
    let (kernel, init) = words.split_at(kernel_end);
    if let Some(word) = words.iter().find(|word| is_rescue(word)) {
        return Err(CmdlineError::Rescue {
            word: (*word).to_owned(),
        });
    }
    let mut cleaned = Vec::with_capacity(words.len() + append.len());
    for word in kernel {
        let (name, value) = parameter(word);
        match value {
            Some(_) if DROPPED.contains(&name.as_str()) => {}
            None if DROPPED_WORDS.contains(&name.as_str()) => {}
            Some(value) if is_elsewhere(&name, value) => {
                return Err(CmdlineError::NoDisk {
                    word: (*word).to_owned(),
                });
            }
            Some(value) if DEVICES.contains(&name.as_str()) => {
                if BY_LOADER.contains(&value) {
                    return Err(CmdlineError::RootByLoader {
                        word: (*word).to_owned(),
                    });
                }
                // dracut also writes `root=block:/dev/…`.
                let device = value.strip_prefix("block:").unwrap_or(value);
                cleaned.push(if is_place(device) {
                    translate(word, device, uuid_of).ok_or_else(|| CmdlineError::DeviceName {
                        word: (*word).to_owned(),
                    })?
                } else if may_change(device) {
                    translate(word, device, uuid_of).unwrap_or_else(|| (*word).to_owned())
                } else {
                    (*word).to_owned()
                });
            }
            _ => cleaned.push((*word).to_owned()),
        }
    }
    cleaned.extend(append.iter().cloned());
    if let Some(word) = cleaned.iter().find(|word| holds_place(word)) {
        return Err(CmdlineError::DeviceName { word: word.clone() });
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

/// Whether the root file system comes from a live medium or the network.
fn is_elsewhere(name: &str, value: &str) -> bool {
    match name {
        "root" => NO_DISK.iter().any(|kind| value.starts_with(kind)),
        "boot" => LIVE.contains(&value),
        _ => false,
    }
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

/// Whether a device's name holds on another machine only with luck: a disk's bus is in its name in by-id, and the desktop
/// reaches it by another; arrays are numbered as they are found.
fn may_change(value: &str) -> bool {
    value.strip_prefix("/dev/").is_some_and(|name| {
        let array = name
            .strip_prefix("md")
            .is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()));
        array || name.starts_with("disk/by-id/")
    })
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
fn translate(word: &str, value: &str, uuid_of: &dyn Fn(&str) -> Option<String>) -> Option<String> {
    // by-path names hold colons themselves, so the whole value is tried first.
    let (device, uuid) = match (uuid_of(value), value.split_once(':')) {
        (Some(uuid), _) => (value, Some(uuid)),
        (None, Some((device, _))) => (device, uuid_of(device)),
        (None, None) => (value, None),
    };
    Some(word.replacen(device, &format!("UUID={}", uuid?), 1))
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
    fn names_that_may_change_become_uuids_where_they_are_known() {
        let known =
            |device: &str| (device == "/dev/disk/by-id/ata-X-part2" || device == "/dev/md127").then(|| "5".to_owned());
        let cleaned = |text: &str| clean(text, &[], &known).unwrap();
        assert_eq!(cleaned("root=/dev/disk/by-id/ata-X-part2"), "root=UUID=5");
        assert_eq!(cleaned("cryptdevice=/dev/md127:root"), "cryptdevice=UUID=5:root");
        assert_eq!(cleaned("root=/dev/md/home"), "root=/dev/md/home");
    }

    #[test]
    fn systems_that_are_on_no_disk_are_refused() {
        for text in [
            "root=live:CDLABEL=Fedora",
            "boot=live components",
            "boot=casper",
            "root=/dev/nfs",
            "root=nfs:1.2.3.4:/x",
        ] {
            let error = clean(text, &[], &uuids).unwrap_err();
            assert!(matches!(&error, CmdlineError::NoDisk { .. }), "{error}");
        }
        assert_eq!(cleaned("boot=zfs root=ZFS=rpool/a"), "boot=zfs root=ZFS=rpool/a");
    }

    #[test]
    fn nothing_of_hibernation_stays() {
        let text = "a resume=UUID=1 resume_offset=2 noresume resumeflags=x resume=\"/dev/a b\" b";
        assert_eq!(cleaned(text), "a b");
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
                    matches!(&error, Err(CmdlineError::DeviceName { word: named }) if named == word),
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
        assert!(matches!(&error, CmdlineError::RootByLoader { .. }), "{error}");
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
                matches!(clean(text, &[], &uuids), Err(CmdlineError::Rescue { .. })),
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
