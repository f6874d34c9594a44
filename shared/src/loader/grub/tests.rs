//! Tests of GRUB's menus, with configurations shaped like those that distributions write.

use std::collections::BTreeMap;

use super::*;
use proptest::prelude::*;

const DEBIAN: &str = include_str!("../../../tests/vectors/grub/debian.cfg");
const UBUNTU: &str = include_str!("../../../tests/vectors/grub/ubuntu.cfg");
const FEDORA: &str = include_str!("../../../tests/vectors/grub/fedora.cfg");
const ARCH: &str = include_str!("../../../tests/vectors/grub/arch.cfg");
const ROOT: &str = "root=UUID=0a3407de-014b-458b-b5c1-848e92a327a3";
const MACHINE: &str = "6a9857a393724b7a981ebb5b8495b9ea";

/// A machine with these files, by `device:path`.
#[derive(Default)]
struct Machine(BTreeMap<String, String>);

impl Machine {
    fn with(mut self, file: &str, text: &str) -> Self {
        self.0.insert(file.to_owned(), text.to_owned());
        self
    }

    fn env(text: &str) -> Self {
        Self::default().with("prefix:/grubenv", text)
    }
}

fn key(place: &Location) -> String {
    format!("{}:{}", place.device, place.path)
}

impl Files for Machine {
    fn kind(&self, place: &Location) -> Option<Kind> {
        let empty = self.0.get(&key(place))?.is_empty();
        Some(if empty { Kind::Empty } else { Kind::File })
    }

    fn text(&self, place: &Location) -> Option<String> {
        self.0.get(&key(place)).cloned()
    }

    fn names(&self, place: &Location) -> Vec<String> {
        let folder = format!("{}/", key(place));
        self.0
            .keys()
            .filter_map(|key| Some(key.strip_prefix(&folder)?.to_owned()))
            .collect()
    }

    fn efi(&self) -> bool {
        true
    }
}

/// A configuration with its blanks filled in.
fn filled(text: &str, default: &str) -> String {
    text.replace("@DEFAULT@", default)
        .replace("@UUID@", "1-2")
        .replace("@BOOT@", "/boot")
}

fn chosen(text: &str, default: &str, env: &str) -> Chosen {
    default_entry(&filled(text, default), &Machine::env(env)).unwrap()
}

fn on_root(path: &str) -> Location {
    Location {
        device: "uuid/1-2".into(),
        path: path.into(),
    }
}

#[test]
fn debians_first_entry_is_read_as_grub_would_load_it() {
    let found = chosen(DEBIAN, "0", "");
    assert_eq!(found.titles, ["Debian GNU/Linux"]);
    assert_eq!(found.reason, "the default entry of grub.cfg");
    assert_eq!(
        found.entry,
        Entry {
            kernel: Some(on_root("/boot/vmlinuz-6.1.0-18-amd64")),
            cmdline: format!("{ROOT} ro quiet"),
            initrds: vec![on_root("/boot/initrd.img-6.1.0-18-amd64")],
            other: None,
        }
    );
}

#[test]
fn entries_are_named_by_number_title_id_and_path() {
    let old = "Debian GNU/Linux, with Linux 6.1.0-17-amd64";
    for default in [
        "1>2",
        "gnulinux-advanced-x>gnulinux-6.1.0-17-amd64-advanced-x",
        "Advanced options for Debian GNU/Linux>Debian GNU/Linux, with Linux 6.1.0-17-amd64",
        "1>gnulinux-6.1.0-17-amd64-advanced-x",
    ] {
        let found = chosen(DEBIAN, default, "");
        assert_eq!(
            found.titles,
            ["Advanced options for Debian GNU/Linux", old],
            "{default}"
        );
    }
    assert_eq!(chosen(DEBIAN, "gnulinux-simple-x", "").titles, ["Debian GNU/Linux"]);
    assert_eq!(
        chosen(DEBIAN, "1", "").titles.len(),
        2,
        "a submenu stands for its first entry"
    );
    for gone in ["no such title", "99"] {
        let found = chosen(DEBIAN, gone, "");
        assert_eq!(found.titles, ["Debian GNU/Linux"], "what is not found is the first");
        assert!(found.reason.contains(gone), "{}", found.reason);
    }
}

#[test]
fn the_saved_entry_counts_where_the_configuration_asks_for_it() {
    let env = "# GRUB Environment Block\nsaved_entry=gnulinux-advanced-x>gnulinux-6.1.0-17-amd64-advanced-x\n########";
    let found = chosen(DEBIAN, "${saved_entry}", env);
    assert_eq!(found.entry.kernel, Some(on_root("/boot/vmlinuz-6.1.0-17-amd64")));
    assert_eq!(found.reason, "the saved entry in grubenv");
    assert_eq!(chosen(DEBIAN, "0", env).titles, ["Debian GNU/Linux"]);
    let nothing_saved = chosen(DEBIAN, "${saved_entry}", "");
    assert_eq!(nothing_saved.titles, ["Debian GNU/Linux"]);
    assert_eq!(nothing_saved.reason, "the first entry of grub.cfg");
}

#[test]
fn the_next_entry_goes_before_the_default() {
    let found = chosen(DEBIAN, "0", "next_entry=1>2\nsaved_entry=0\n");
    assert_eq!(
        found.titles.last().unwrap(),
        "Debian GNU/Linux, with Linux 6.1.0-17-amd64"
    );
    assert_eq!(found.reason, "next_entry in grubenv");
}

#[test]
fn what_is_no_linux_is_told_by_what_starts_it() {
    let windows = chosen(DEBIAN, "osprober-efi-1", "").entry;
    assert_eq!(windows.kernel, None);
    let program = Location {
        device: "uuid/1234-ABCD".into(),
        path: "/EFI/Microsoft/Boot/bootmgfw.efi".into(),
    };
    assert_eq!(windows.other, Some(Other::Program(program)));
    assert_eq!(
        chosen(DEBIAN, "uefi-firmware", "").entry.other,
        Some(Other::Command("fwsetup".into()))
    );
    assert_eq!(
        chosen(DEBIAN, "2", "").entry.kernel,
        Some(on_root("/boot/memtest86+x64.bin"))
    );
}

#[test]
fn ubuntus_functions_set_what_its_entries_use() {
    let found = chosen(UBUNTU, "0", "");
    assert_eq!(found.entry.cmdline, format!("{ROOT} ro quiet splash vt.handoff=7"));
    // After a failed boot the screen is set up otherwise.
    let found = chosen(UBUNTU, "0", "recordfail=1\n");
    assert_eq!(found.entry.cmdline, format!("{ROOT} ro quiet splash"));
    let found = chosen(UBUNTU, "0", "initrdfail=1\nprev_entry=1>1\n");
    assert!(found.entry.cmdline.contains("recovery"), "{}", found.entry.cmdline);
}

#[test]
fn exported_variables_alone_are_seen_in_submenus() {
    let text = "set a=1\nset b=2\nexport b\nsubmenu x { menuentry y { linux /k a=$a b=$b\n initrd /i } }";
    let found = default_entry(text, &Machine::default()).unwrap();
    assert_eq!(found.entry.cmdline, "a= b=2");
}

fn fedora(env: &str) -> Machine {
    let entry = |release: &str, options: &str| {
        format!(
            "title Fedora Linux ({release}) 39\nversion {release}\nlinux /vmlinuz-{release}\ninitrd /initramfs-{release}.img $tuned_initrd\n{options}\n"
        )
    };
    let mut machine = Machine::env(env);
    for (release, options) in [
        ("0-rescue", "options $kernelopts"),
        ("6.5.6-300.fc39.x86_64", "options $kernelopts $tuned_params"),
        (
            "6.5.10-200.fc39.x86_64",
            "options root=UUID=9 ro x=\"a b\" $tuned_params",
        ),
        ("6.5.9-300.fc39.x86_64", "options $kernelopts"),
    ] {
        machine = machine.with(
            &format!("uuid/1-2:/loader/entries/{MACHINE}-{release}.conf"),
            &entry(release, options),
        );
    }
    machine.with("uuid/1-2:/loader/entries/readme.txt", "linux /x")
}

#[test]
fn fedoras_entries_are_sorted_and_their_variables_put_in() {
    let found = default_entry(&filled(FEDORA, ""), &fedora("")).unwrap();
    assert_eq!(found.titles, ["Fedora Linux (6.5.10-200.fc39.x86_64) 39"]);
    assert_eq!(found.entry.kernel, Some(on_root("/vmlinuz-6.5.10-200.fc39.x86_64")));
    assert_eq!(found.entry.cmdline, "root=UUID=9 ro \"x=a b\"");
    assert_eq!(found.entry.initrds, [on_root("/initramfs-6.5.10-200.fc39.x86_64.img")]);

    let saved = format!("saved_entry={MACHINE}-6.5.6-300.fc39.x86_64\ntuned_params=skew_tick=1 nohz=on\n");
    let found = default_entry(&filled(FEDORA, ""), &fedora(&saved)).unwrap();
    assert_eq!(found.reason, "the saved entry in grubenv");
    assert_eq!(
        found.entry.cmdline,
        format!("{ROOT} ro rootflags=subvol=root rhgb quiet skew_tick=1 nohz=on")
    );
    let found = default_entry(
        &filled(FEDORA, ""),
        &fedora("kernelopts=root=UUID=7 ro\nsaved_entry=1\n"),
    )
    .unwrap();
    assert_eq!(found.entry.cmdline, "root=UUID=7 ro");
    assert_eq!(found.entry.kernel, Some(on_root("/vmlinuz-6.5.9-300.fc39.x86_64")));
}

#[test]
fn a_counter_that_has_run_out_rolls_back() {
    let found = default_entry(&filled(FEDORA, ""), &fedora("boot_counter=0\nboot_success=0\n")).unwrap();
    assert!(found.titles[0].contains("6.5.9"), "{:?}", found.titles);
    let found = default_entry(&filled(FEDORA, ""), &fedora("boot_counter=1\nboot_success=0\n")).unwrap();
    assert!(found.titles[0].contains("6.5.10"), "{:?}", found.titles);
}

#[test]
fn arch_loads_microcode_before_its_initrd() {
    let found = chosen(ARCH, "gnulinux-advanced-a>gnulinux-linux-advanced-a", "");
    assert_eq!(
        found.entry.initrds,
        [on_root("/boot/intel-ucode.img"), on_root("/boot/initramfs-linux.img")]
    );
    assert_eq!(found.entry.cmdline, format!("{ROOT} rw loglevel=3 quiet"));
}

#[test]
fn of_branches_the_one_with_an_initrd_is_taken() {
    let text = r#"set kernelopts="root=UUID=1 ro"
menuentry "Cloud \"x\" > 1" --unrestricted --id cloud {
  if [ "${initrdfail}" = 1 ]; then
    linux /vmlinuz-1 $kernelopts "a b" \
      more
    initrd /early.img /initrd-1
  else
    linux /vmlinuz-1 root=PARTUUID=2 ro panic=-1
  fi
}"#;
    let found = default_entry(text, &Machine::default()).unwrap();
    assert_eq!(found.titles, ["Cloud \"x\" > 1"]);
    assert_eq!(found.entry.cmdline, "root=UUID=1 ro \"a b\" more");
    let paths: Vec<_> = found.entry.initrds.iter().map(|place| place.path.as_str()).collect();
    assert_eq!(paths, ["/early.img", "/initrd-1"]);
}

#[test]
fn included_files_and_other_configurations_are_followed() {
    let machine = Machine::default()
        .with(
            "uuid/9:/grub2/grub.cfg",
            "set default=b\nmenuentry a { linux /a }\nsource $prefix/more.cfg",
        )
        .with("uuid/9:/grub2/more.cfg", "menuentry b { linux /b\ninitrd (uuid/5)/i }");
    let stub = "search --no-floppy --fs-uuid --set=dev 9\nset prefix=($dev)/grub2\nexport $prefix\nconfigfile $prefix/grub.cfg\n\
                menuentry never { linux /never }";
    let found = default_entry(stub, &machine).unwrap();
    assert_eq!(found.titles, ["b"]);
    assert_eq!(found.entry.initrds[0].device, "uuid/5");
}

#[test]
fn loops_and_functions_run() {
    let text = "function f { for x in $@; do set all=\"$all$x\"; done; return; set all=never }\nset n=3\n\
                while [ $n -gt 0 ]; do f $n b; decrement n; done\nuntil [ $n = 2 ]; do increment n; done\n\
                menuentry $all { linux /k n=$n; }";
    let found = default_entry(text, &Machine::default()).unwrap();
    assert_eq!(found.titles, ["3b2b1b"]);
    assert_eq!(found.entry.cmdline, "n=2");
}

#[test]
fn the_chainloading_entries_of_uki_are_listed_newest_first() {
    let machine = Machine::default()
        .with("uuid/1:/EFI/Linux/a-6.9.efi", "x")
        .with("uuid/1:/EFI/Linux/a-6.10.efi", "x");
    let found = default_entry("search --fs-uuid --set=root 1\nuki", &machine).unwrap();
    let program = Location {
        device: "uuid/1".into(),
        path: "/EFI/Linux/a-6.10.efi".into(),
    };
    assert_eq!(found.entry.other, Some(Other::Program(program)));
}

#[test]
fn a_menu_without_entries_has_no_default() {
    for text in [
        "",
        "set default=1\n",
        "blscfg",
        "menuentry",
        "}",
        "{",
        "function f { menuentry a { linux /x } }",
        "submenu a { }",
        "if true; then",
        "fi; done; else",
    ] {
        assert_eq!(default_entry(text, &Machine::default()), None, "{text}");
    }
}

#[test]
fn scripts_without_an_end_are_ended() {
    let growing = "set a=xxxxxxxxxxxxxxxx\nwhile true; do set a=$a$a; done";
    let deep = "submenu a { ".repeat(100_000);
    let nested = "if true; then ".repeat(100_000);
    for text in [
        "while true; do set a=b; done\nmenuentry x { linux /x }",
        "function f { f; f; }\nf",
        "function f { source (prefix)/grub.cfg; }\nf",
        growing,
        &deep,
        &nested,
    ] {
        let machine = Machine::default().with("prefix:/grub.cfg", text);
        let _ = default_entry(text, &machine);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn any_text_is_read_as_a_menu(text in "(menuentry|submenu|linux /k|initrd|set default=|if |then|fi|while|do|done|function f|blscfg|source|load_env|\\[ |\\$\\{|[{}'\"\\\\;#>\\n a-c0-2]){0,60}") {
        let machine = Machine::env(&text).with("prefix:/loader/entries/a.conf", &text).with(":/loader/entries/b.conf", &text);
        let _ = default_entry(&text, &machine);
    }

    #[test]
    fn arguments_reach_the_command_line_as_they_are(words in proptest::collection::vec("[a-z=,.:/]{1,8}( [a-z]{1,4})?", 1..6)) {
        let quoted: Vec<_> = words.iter().map(|word| format!("'{word}'")).collect();
        let text = format!("menuentry x {{ linux /k {} ; initrd /i }}", quoted.join(" "));
        let line = default_entry(&text, &Machine::default()).unwrap().entry.cmdline;
        let back: Vec<_> = super::super::cmdline::split(&line).iter().map(|word| word.replace('"', "")).collect();
        prop_assert_eq!(back, words);
    }
}
