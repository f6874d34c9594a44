//! Entries of the Boot Loader Specification: files in loader/entries, and the boot counters in files' names.
//!
//! Read by the laptop's server for systemd-boot and GRUB's `blscfg`. Specification: UAPI group, "Boot Loader
//! Specification", "Type #1"; "Automatic Boot Assessment" (counters). Unknown keys are left out, as they demand.

use std::collections::BTreeMap;

/// More entries than any folder has.
pub const MAX_ENTRIES: usize = 1024;
/// The longest entry that is read, in bytes.
pub const MAX_TEXT: usize = 64 << 10;

/// An entry.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Entry {
    /// For people.
    pub title: Option<String>,
    /// For ordering.
    pub version: Option<String>,
    /// The installation it belongs to.
    pub machine_id: Option<String>,
    /// For ordering before the version.
    pub sort_key: Option<String>,
    /// The kernel, from the file system's root.
    pub linux: Option<String>,
    /// An EFI program instead.
    pub efi: Option<String>,
    /// A unified kernel image instead.
    pub uki: Option<String>,
    /// The initrds in order.
    pub initrds: Vec<String>,
    /// The kernel's arguments; of several lines, all.
    pub options: Option<String>,
    /// The machine it is for, e.g. `x64`.
    pub architecture: Option<String>,
}

/// Reads an entry. Never fails: a line without a value says nothing.
#[must_use]
pub fn parse(text: &str) -> Entry {
    let text = text.get(..text.floor_char_boundary(MAX_TEXT)).unwrap_or_default();
    let mut entry = Entry::default();
    for line in text.lines().map(str::trim) {
        let Some((key, value)) = line.split_once([' ', '\t']).filter(|_| !line.starts_with('#')) else {
            continue;
        };
        let value = value.trim().to_owned();
        match key {
            "title" => entry.title = Some(value),
            "version" => entry.version = Some(value),
            "machine-id" => entry.machine_id = Some(value),
            "sort-key" => entry.sort_key = Some(value),
            "linux" => entry.linux = Some(value),
            "efi" => entry.efi = Some(value),
            "uki" => entry.uki = Some(value),
            "initrd" => entry.initrds.push(value),
            "architecture" => entry.architecture = Some(value),
            "options" => {
                let options = entry.options.get_or_insert_default();
                if !options.is_empty() {
                    options.push(' ');
                }
                options.push_str(&value);
            }
            _ => {}
        }
    }
    entry
}

/// How often an entry may still be tried, and was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tries {
    /// Still.
    pub left: u32,
    /// Already.
    pub done: u32,
}

/// Takes the counter off a file's name without its ending: `arch+3-1` is `arch` with three tries left.
#[must_use]
pub fn tries(stem: &str) -> (&str, Option<Tries>) {
    let read = || {
        let (name, counter) = stem.rsplit_once('+')?;
        let (left, done) = counter.split_once('-').unwrap_or((counter, "0"));
        let number = |text: &str| {
            let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
            digits.then(|| text.parse().ok())?
        };
        let (left, done) = (number(left)?, number(done)?);
        (!name.is_empty()).then_some((name, Some(Tries { left, done })))
    };
    read().unwrap_or((stem, None))
}

/// Reads an os-release file: os-release(5).
#[must_use]
pub fn os_release(text: &str) -> BTreeMap<String, String> {
    text.lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.trim().split_once('='))
        .map(|(name, value)| {
            let quoted = |mark: char| value.strip_prefix(mark)?.strip_suffix(mark);
            let value = quoted('"').or_else(|| quoted('\'')).unwrap_or(value);
            (name.to_owned(), value.to_owned())
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn an_entry_is_read_with_all_its_initrds_and_options() {
        let entry = parse(
            "# Arch\ntitle   Arch Linux\nversion\t6.9.1\nlinux   /vmlinuz-linux\ninitrd  /intel-ucode.img\n\
             initrd  /initramfs-linux.img\noptions root=UUID=1 rw x=\"a b\"\noptions quiet\nunknown x\nsort-key arch\nefi\n",
        );
        assert_eq!(
            entry,
            Entry {
                title: Some("Arch Linux".into()),
                version: Some("6.9.1".into()),
                sort_key: Some("arch".into()),
                linux: Some("/vmlinuz-linux".into()),
                initrds: vec!["/intel-ucode.img".into(), "/initramfs-linux.img".into()],
                options: Some("root=UUID=1 rw x=\"a b\" quiet".into()),
                ..Entry::default()
            }
        );
    }

    #[test]
    fn counters_are_taken_off_names() {
        let counted = |left, done| Some(Tries { left, done });
        assert_eq!(tries("arch+3-1"), ("arch", counted(3, 1)));
        assert_eq!(tries("arch+3"), ("arch", counted(3, 0)));
        assert_eq!(tries("6.1+deb+0-3"), ("6.1+deb", counted(0, 3)));
        for plain in [
            "arch", "arch+", "arch+a", "arch+1-", "+1", "arch+-1", "arch++1x", "6.1+deb",
        ] {
            assert_eq!(tries(plain), (plain, None));
        }
    }

    #[test]
    fn os_releases_are_read_with_their_quotes() {
        let read = os_release("NAME=\"Arch Linux\"\nID=arch\n#X=1\nBUILD_ID='rolling'\nbroken\n");
        assert_eq!(read.len(), 3);
        assert_eq!(
            (read["NAME"].as_str(), read["BUILD_ID"].as_str()),
            ("Arch Linux", "rolling")
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn any_text_is_an_entry(text in "((title|linux|initrd|options|efi)[ \\t]?|[\\PC\\n]){0,40}") {
            let entry = parse(&text);
            for value in entry.initrds.iter().chain(&entry.linux).chain(&entry.options) {
                prop_assert!(!value.contains('\n') && value.trim() == value.as_str());
            }
        }

        #[test]
        fn a_counter_that_was_added_is_found(name in "[a-z.+-]{1,8}", left in 0_u32..99, done in 0_u32..99) {
            let stem = format!("{name}+{left}-{done}");
            prop_assert_eq!(tries(&stem), (name.as_str(), Some(Tries { left, done })));
        }
    }
}
