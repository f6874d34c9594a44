use super::*;
use proptest::prelude::*;

fn index(dep: &str, alias: &str, softdep: &str, builtin: &str) -> ModuleIndex {
    let texts = Texts {
        dep: dep.as_bytes(),
        alias: alias.as_bytes(),
        softdep: softdep.as_bytes(),
        builtin: builtin.as_bytes(),
    };
    ModuleIndex::parse(&texts).unwrap()
}

#[test]
fn names_are_brought_into_the_kernels_form() {
    for file in [
        "nvme-tcp",
        "kernel/drivers/nvme/host/nvme-tcp.ko",
        "nvme-tcp.ko.xz",
        "x/nvme_tcp.ko.zst",
    ] {
        assert_eq!(normalise(file), "nvme_tcp");
    }
    assert_eq!(normalise("a.ko.gz"), "a");
    assert_eq!(normalise("odd.name"), "odd.name");
}

#[test]
fn dependencies_come_before_the_module_that_needs_them() {
    let index = index("k/a.ko.xz: k/b.ko k/c.ko\nk/b.ko: k/c.ko\nk/c.ko:\n", "", "", "");
    assert_eq!(index.resolve("a").unwrap(), ["c", "b", "a"]);
    assert_eq!(index.path("a"), Some("k/a.ko.xz"));
    assert_eq!(index.iter().collect::<Vec<_>>()[2], ("c", "k/c.ko"));
}

#[test]
fn soft_dependencies_are_found_through_aliases_and_stand_around_the_module() {
    let index = index(
        "ext4.ko: jbd2.ko\njbd2.ko:\ncrc32c_generic.ko:\nlate.ko: ext4.ko\n",
        "alias crc32c crc32c_generic\n",
        "# comment\nsoftdep ext4 pre: crc32c missing post: late\n",
        "",
    );
    assert_eq!(
        index.resolve("ext4").unwrap(),
        ["crc32c_generic", "jbd2", "ext4", "late"]
    );
}

#[test]
fn post_of_a_dependency_waits_for_the_module_itself() {
    let index = index("a.ko: b.ko\nb.ko:\nc.ko: a.ko\n", "", "softdep b post: c\n", "");
    assert_eq!(index.resolve("a").unwrap(), ["b", "a", "c"]);
}

#[test]
fn builtin_needs_no_loading_and_unknown_is_refused() {
    let index = index("a.ko: scsi-mod.ko\n", "", "", "kernel/drivers/scsi/scsi_mod.ko\n");
    assert_eq!(index.resolve("a").unwrap(), ["a"]);
    assert!(index.is_builtin("scsi-mod"));
    assert!(index.resolve("scsi_mod").unwrap().is_empty());
    assert_eq!(
        index.resolve("no-such"),
        Err(KmodError::Unknown { name: "no_such".into() })
    );
}

#[test]
fn cycles_end() {
    let index = index(
        "a.ko: b.ko\nb.ko: a.ko\n",
        "alias x b\n",
        "softdep a pre: x post: a b\n",
        "",
    );
    assert_eq!(index.resolve("a").unwrap(), ["b", "a"]);
}

#[test]
fn modalias_finds_drivers_in_file_order_and_once() {
    let index = index(
        "",
        "alias usb:v0BDAp8153d*dc*dsc*dp*icFFisc*ip*in* r8152\n\
         alias usb:v*p*d*dc*dsc*dp*ic02isc06ip00in* cdc_ether\n\
         alias usb:v0BDAp8153d*dc*dsc*dp*ic02isc0[5-7]ip00in* r8153_ecm\n\
         alias usb:v0BDA* r8152\n\
         alias platform:i2c-dash dash\n",
        "",
        "",
    );
    assert_eq!(
        index.by_modalias("usb:v0BDAp8153d3100dc00dsc00dp00ic02isc06ip00in00\n"),
        ["cdc_ether", "r8153_ecm", "r8152"]
    );
    assert_eq!(index.by_modalias("platform:i2c-dash"), ["dash"]);
    assert!(index.by_modalias("pci:v1").is_empty());
}

#[test]
fn paths_that_lead_out_of_the_folder_are_not_taken() {
    assert_eq!(
        index("/etc/a.ko:\n../b.ko:\nx//c.ko:\nd.ko:\n", "", "", "")
            .iter()
            .count(),
        1
    );
}

#[test]
fn too_long_a_file_is_refused() {
    let long = vec![b' '; MAX_TEXT + 1];
    let texts = Texts {
        alias: &long,
        ..Texts::default()
    };
    let error = ModuleIndex::parse(&texts).unwrap_err();
    assert_eq!(
        error,
        KmodError::TooLong {
            file: "modules.alias",
            bytes: MAX_TEXT + 1
        }
    );
}

#[test]
fn glob_knows_the_shells_signs() {
    for (pattern, text, expected) in [
        ("a?c", "abc", true),
        ("a?c", "ac", false),
        ("a*c*e", "abcde", true),
        ("a*c*e", "abcdf", false),
        ("[!a]x", "bx", true),
        ("[^a]x", "ax", false),
        ("[]a]", "]", true),
        ("[a-", "[a-", true),
        ("\\*", "*", true),
        ("\\*", "x", false),
        ("*", "", true),
        ("", "", true),
        ("", "a", false),
    ] {
        assert_eq!(glob(pattern.as_bytes(), text.as_bytes()), expected, "{pattern} {text}");
    }
}

#[test]
fn many_stars_do_not_blow_up() {
    let pattern = "*a".repeat(2000) + "b";
    assert!(!glob(pattern.as_bytes(), "a".repeat(4000).as_bytes()));
}

#[test]
fn a_chain_of_dependencies_does_not_overflow_the_stack() {
    let dep: String = (0..100_000).map(|n| format!("m{n}.ko: m{}.ko\n", n + 1)).collect();
    assert_eq!(index(&dep, "", "", "").resolve("m0").unwrap().len(), 100_000);
}

/// What a glob means, written down plainly (and exponentially).
fn plain(pattern: &[u8], text: &[u8]) -> bool {
    match pattern {
        [] => text.is_empty(),
        [b'*', rest @ ..] => (0..=text.len()).any(|skip| plain(rest, &text[skip..])),
        [b'?', rest @ ..] => !text.is_empty() && plain(rest, &text[1..]),
        [c, rest @ ..] => text.first() == Some(c) && plain(rest, &text[1..]),
    }
}

proptest! {
    #[test]
    fn glob_agrees_with_the_plain_meaning(pattern in "[ab*?]{0,8}", text in "[abc]{0,8}") {
        prop_assert_eq!(glob(pattern.as_bytes(), text.as_bytes()), plain(pattern.as_bytes(), text.as_bytes()));
    }

    #[test]
    fn glob_ends_on_any_bytes(pattern: Vec<u8>, text: Vec<u8>) {
        glob(&pattern, &text);
    }

    #[test]
    fn an_alias_without_wildcards_matches_itself_only(name in "[a-z:_-]{1,12}", other in "[a-z:_-]{1,12}") {
        let index = index("", &format!("alias {name} driver\n"), "", "");
        prop_assert_eq!(index.by_modalias(&name), vec!["driver"]);
        let same = name.replace('-', "_") == other.replace('-', "_");
        prop_assert_eq!(index.by_modalias(&other).is_empty(), !same);
    }

    #[test]
    fn any_bytes_are_parsed(dep: Vec<u8>, alias: Vec<u8>, softdep: Vec<u8>, name: String) {
        let texts = Texts { dep: &dep, alias: &alias, softdep: &softdep, builtin: &dep };
        let index = ModuleIndex::parse(&texts).unwrap();
        let _ = index.resolve(&name);
        let _ = index.by_modalias(&name);
    }

    #[test]
    fn every_dependency_stands_before_its_module(edges in prop::collection::vec((0usize..12, 0usize..12), 0..40)) {
        // Edges point to higher numbers only, so there is no cycle.
        let dep: String = (0..12)
            .map(|from| {
                let to: Vec<_> = edges.iter().filter(|(a, b)| *a == from && b > a).map(|(_, b)| format!("m{b}.ko")).collect();
                format!("m{from}.ko: {}\n", to.join(" "))
            })
            .collect();
        let index = index(&dep, "", "", "");
        let order = index.resolve("m0").unwrap();
        let place = |n: usize| order.iter().position(|name| *name == format!("m{n}"));
        for (a, b) in edges.iter().filter(|(a, b)| b > a) {
            if let Some(a) = place(*a) {
                prop_assert!(place(*b).is_some_and(|b| b < a));
            }
        }
    }
}
