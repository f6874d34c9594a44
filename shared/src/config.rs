//! The configuration, /etc/stiefel/config.yaml. Every option is explained in config-example.yaml, which a test parses.
//!
//! Names of the original (SFTtech/stiefelsystem) are accepted where the meaning is the same: `boot.disk`,
//! `boot.load.*`, `autokexec.{broadcast,mac_detection,macs}`.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;
use serde::de::{self, Deserializer, Visitor};

use crate::handover::{After, DiskTransport, Encryption, LinkMode, SessionMode};

mod values;

pub use values::{Auto, FromPlain, Mac, OneOrMany, Percent, Seconds, UsbId, Words};

/// Where the configuration lies on the laptop.
pub const CONFIG_PATH: &str = "/etc/stiefel/config.yaml";
/// The largest configuration that is read, in bytes.
pub const MAX_CONFIG: u64 = 256 * 1024;
/// The shortest `session.grace`: a desktop's own restart of its link must fit.
pub const MIN_GRACE: Duration = Duration::from_secs(30);
/// The example, as it is installed.
pub const EXAMPLE: &str = include_str!("../../config-example.yaml");

/// A configuration that cannot be used, with line, column, the line itself and what would be accepted.
#[derive(Debug, thiserror::Error)]
#[error("{text}\n  next: correct this line; every option is explained in config-example.yaml")]
pub struct ConfigError {
    text: String,
}

/// The whole configuration.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Config {
    /// What the desktop boots.
    pub boot: Boot,
    /// Classes and names of kernel modules in the ramdisk.
    pub modules: Modules,
    /// The ramdisk itself.
    pub initrd: Initrd,
    /// What makes the laptop leave its OS.
    pub trigger: Trigger,
    /// How the two machines are connected.
    pub link: Link,
    /// How the disk is served.
    pub disk: Disk,
    /// How a session goes and ends.
    pub session: Session,
}

/// `disk`: how the disk is served.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Disk {
    /// `auto` is NVMe where both kernels have it, else NBD.
    pub transport: Auto<DiskTransport>,
}

/// `link`: how the two machines are connected.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Link {
    /// What the link is used for besides.
    pub mode: LinkMode,
    /// Whether the disk travels inside a tunnel.
    pub encryption: Encryption,
}

/// `boot`: what the desktop boots.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Boot {
    /// The disk to serve: `auto` is the one that holds `/`.
    pub disk: Auto<PathBuf>,
    /// Kernel, initrd and command line of the payload.
    pub load: Load,
}

/// `boot.load`: the payload; `auto` takes what the boot loader would.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Load {
    /// The kernel's file.
    pub kernel: Auto<PathBuf>,
    /// The initrd's files, in order.
    pub initrd: Auto<OneOrMany<PathBuf>>,
    /// The command line: one text, or a list of words.
    pub cmdline: Auto<Words>,
    /// Words added to the end of the command line.
    pub append: Words,
}

/// `modules`: what goes into the ramdisk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Modules(pub Vec<String>);

impl<'de> Deserialize<'de> for Modules {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct ModulesVisitor;
        impl<'de> Visitor<'de> for ModulesVisitor {
            type Value = Modules;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list such as [default, debug]")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Modules, E> {
                Err(E::invalid_type(de::Unexpected::Str(text), &self))
            }
            fn visit_seq<A: de::SeqAccess<'de>>(self, seq: A) -> Result<Modules, A::Error> {
                Vec::deserialize(de::value::SeqAccessDeserializer::new(seq)).map(Modules)
            }
        }
        from.deserialize_any(ModulesVisitor)
    }
}

impl Default for Modules {
    fn default() -> Self {
        Self(vec!["default".to_owned()])
    }
}

/// `initrd`: the ramdisk.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Initrd {
    /// The ramdisk's kernel: `auto` is the running one's file.
    pub kernel: Auto<PathBuf>,
    /// Words added to the command line of the ramdisk's kernel.
    pub cmdline: Words,
}

/// `trigger`: what makes the laptop leave its OS and serve.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Trigger {
    /// Hardware addresses of the dedicated NIC.
    pub macs: Vec<Mac>,
    /// USB identities of the dedicated NIC.
    pub usb: Vec<UsbId>,
    /// Whether a stick may wake the laptop over the network.
    pub wake: Wake,
    /// How the ramdisk is started.
    pub method: Method,
    /// How long to wait, visibly, before leaving the OS.
    pub countdown: Seconds,
    /// Refuse on battery with less than this charge, in per cent.
    pub battery: Percent,
}

impl Default for Trigger {
    fn default() -> Self {
        Self {
            macs: Vec::new(),
            usb: Vec::new(),
            wake: Wake::Wired,
            method: Method::Kexec,
            countdown: Seconds(Duration::ZERO),
            battery: Percent(10),
        }
    }
}

/// `trigger.wake`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Wake {
    /// Listen on wired NICs.
    Wired,
    /// Never listen.
    Off,
}

/// `trigger.method`: how the ramdisk is started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// By the running kernel.
    #[default]
    Kexec,
    /// By the firmware, once: for machines whose kernel starts no other, or whose devices do not survive that.
    Reboot,
}

/// `session`: how a session goes and ends.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Session {
    /// What becomes of what a desktop writes.
    pub mode: SessionMode,
    /// What the laptop does once the desktop was powered off.
    pub after: After,
    /// How long the laptop waits for a desktop that is not heard any more before it goes home.
    pub grace: Seconds,
    /// Whether the desktop uses the swap space on the laptop's disk; over a network it can deadlock.
    pub swap: bool,
}

impl Default for Session {
    fn default() -> Self {
        Self {
            mode: SessionMode::default(),
            after: After::default(),
            grace: Seconds(Duration::from_mins(15)),
            swap: false,
        }
    }
}

/// The original's `autokexec`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct OriginalTrigger {
    #[serde(default = "yes")]
    broadcast: bool,
    #[serde(default)]
    mac_detection: bool,
    #[serde(default)]
    macs: Vec<Mac>,
}

fn yes() -> bool {
    true
}

impl From<OriginalTrigger> for Trigger {
    fn from(original: OriginalTrigger) -> Self {
        Self {
            macs: if original.mac_detection {
                original.macs
            } else {
                Vec::new()
            },
            wake: if original.broadcast { Wake::Wired } else { Wake::Off },
            ..Self::default()
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    #[serde(default)]
    boot: Boot,
    #[serde(default)]
    modules: Modules,
    #[serde(default)]
    initrd: Initrd,
    trigger: Option<Trigger>,
    autokexec: Option<OriginalTrigger>,
    #[serde(default)]
    link: Link,
    #[serde(default)]
    disk: Disk,
    #[serde(default)]
    session: Session,
}

impl Config {
    /// Reads a configuration; what it leaves out has its default.
    ///
    /// # Errors
    /// [`ConfigError`] for anything that is not understood: nothing is guessed or ignored.
    pub fn parse(yaml: &str) -> Result<Self, ConfigError> {
        let fail = |text: String| ConfigError { text };
        // An empty document, or one of comments only, means the defaults; YAML calls it null.
        let document: Option<Document> = serde_saphyr::from_str(yaml).map_err(|error| fail(error.to_string()))?;
        let Some(document) = document else {
            return Ok(Self::default());
        };
        let trigger = match (document.trigger, document.autokexec) {
            (Some(_), Some(_)) => {
                return Err(fail(
                    "both `trigger` and `autokexec` are there; `autokexec` is the original's name of `trigger`, keep one"
                        .to_owned(),
                ));
            }
            (Some(trigger), None) => trigger,
            (None, Some(original)) => original.into(),
            (None, None) => Trigger::default(),
        };
        if document.link.mode == LinkMode::Lan && document.link.encryption == Encryption::None {
            return Err(fail(
                "link: {mode: lan, encryption: none} would send the disk in clear over a network that others use; set \
                 encryption to wireguard, or mode to dedicated for a cable of its own"
                    .to_owned(),
            ));
        }
        if document.session.mode == SessionMode::Guest && document.disk.transport == Auto::Given(DiskTransport::NvmeTcp)
        {
            return Err(fail(
                "session.mode is guest, but disk.transport is nvme-tcp: what guests write is kept apart by stiefel's own \
                 server, which speaks NBD; set disk.transport to auto or nbd, or session.mode to normal"
                    .to_owned(),
            ));
        }
        if document.session.grace.0 < MIN_GRACE {
            return Err(fail(
                "session.grace is too short: a cable must be allowed to be out for at least 30s".to_owned(),
            ));
        }
        Ok(Self {
            boot: document.boot,
            modules: document.modules,
            initrd: document.initrd,
            trigger,
            link: document.link,
            disk: document.disk,
            session: document.session,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn error(yaml: &str) -> String {
        Config::parse(yaml).unwrap_err().to_string()
    }

    #[test]
    fn the_example_is_the_default_configuration() {
        assert_eq!(Config::parse(EXAMPLE).unwrap(), Config::default());
    }

    #[test]
    fn the_ramdisk_is_started_by_kexec_unless_a_reboot_is_asked_for() {
        let method = |yaml: &str| Config::parse(yaml).map(|config| config.trigger.method);
        assert_eq!(method("").unwrap(), Method::Kexec);
        assert_eq!(method("trigger: {wake: off}").unwrap(), Method::Kexec);
        assert_eq!(method("trigger: {method: reboot}").unwrap(), Method::Reboot);
        assert!(method("trigger: {method: firmware}").is_err());
    }

    #[test]
    fn every_commented_value_of_the_example_is_accepted() {
        // `#option: value` (no space) is an example that replaces the default above it; `# text` is explanation.
        let mut lines: Vec<String> = Vec::new();
        for line in EXAMPLE.lines() {
            let (indent, rest) = line.split_at(line.len() - line.trim_start().len());
            match rest
                .strip_prefix('#')
                .filter(|rest| !rest.is_empty() && !rest.starts_with(' '))
            {
                Some(example) => {
                    let key = format!("{indent}{}:", example.split(':').next().unwrap());
                    let default = lines
                        .iter()
                        .rposition(|line| line.starts_with(&key))
                        .expect("an example without default");
                    lines[default] = format!("{indent}{example}");
                }
                None => lines.push(line.to_owned()),
            }
        }
        // The one pair of examples that must not go together.
        let all = lines.join("\n").replace("mode: lan", "mode: dedicated");
        let config = Config::parse(&all).unwrap();
        assert_ne!(config, Config::default());
        assert!(!config.trigger.macs.is_empty() && !config.trigger.usb.is_empty());
    }

    #[test]
    fn nothing_and_comments_only_mean_the_defaults() {
        assert_eq!(Config::parse("").unwrap(), Config::default());
        assert_eq!(Config::parse("# nothing\n").unwrap(), Config::default());
    }

    #[test]
    fn the_originals_trigger_names_are_accepted() {
        let config = Config::parse(
            "autokexec:\n  broadcast: False\n  mac_detection: True\n  macs:\n    - \"11:11:11:11:11:11\"\n",
        )
        .unwrap();
        assert_eq!(config.trigger.wake, Wake::Off);
        assert_eq!(config.trigger.macs, [Mac([0x11; 6])]);
        let config = Config::parse("autokexec: {broadcast: true, macs: ['11:11:11:11:11:11']}").unwrap();
        assert_eq!(config.trigger.wake, Wake::Wired);
        assert!(config.trigger.macs.is_empty(), "mac_detection is off");
    }

    #[test]
    fn an_unknown_key_is_named_with_its_line_and_what_is_accepted() {
        let text = error("boot:\n  disk: auto\n  dsik: /dev/sda\n");
        assert!(
            text.contains("dsik") && text.contains("line 3") && text.contains("load"),
            "{text}"
        );
    }

    #[test]
    fn impossible_values_say_what_is_accepted() {
        for (yaml, accepted) in [
            ("boot: {disk: sda}", "absolute path"),
            ("trigger: {macs: ['0:1']}", "00:e0:4c"),
            ("trigger: {usb: ['bda:8153']}", "0bda:8153"),
            ("trigger: {wake: always}", "wired"),
            ("trigger: {countdown: 5 parsecs}", "30s"),
            ("trigger: {battery: 101%}", "10%"),
            ("link: {encryption: rot13}", "wireguard"),
            ("session: {after: sleep}", "poweroff"),
            ("session: {mode: visitor}", "guest"),
            ("disk: {transport: iscsi}", "nvme-tcp or nbd"),
            ("link: {mode: wan}", "dedicated"),
            ("session: {swap: maybe}", "bool"),
            ("modules: 5", "a list such as [default, debug]"),
            ("modules: debug", "a list such as [default, debug]"),
        ] {
            let text = error(yaml);
            assert!(text.contains(accepted), "{yaml}: {text}");
            assert!(text.contains("line 1"), "{yaml}: {text}");
        }
    }

    #[test]
    fn what_would_endanger_the_disk_is_refused() {
        assert!(error("link: {mode: lan, encryption: none}").contains("wireguard"));
        assert!(error("session: {grace: 5s}").contains("30s"));
    }

    #[test]
    fn guests_have_nbd_and_nothing_else() {
        let refused = error("session: {mode: guest}\ndisk: {transport: nvme-tcp}\n");
        assert!(refused.contains("set disk.transport to auto or nbd"), "{refused}");
        for transport in ["auto", "nbd"] {
            let config = Config::parse(&format!("session: {{mode: guest}}\ndisk: {{transport: {transport}}}\n"));
            assert_eq!(config.unwrap().session.mode, SessionMode::Guest);
        }
        assert!(Config::parse("disk: {transport: nvme-tcp}").is_ok());
    }

    #[test]
    fn a_key_given_twice_is_refused() {
        assert!(error("session: {swap: true}\nsession: {swap: false}\n").contains("session"));
        assert!(error("trigger: {}\nautokexec: {}\n").contains("keep one"));
    }

    #[test]
    fn lists_and_plain_texts_mean_the_same() {
        let plain = Config::parse("boot: {load: {initrd: /a, cmdline: root=UUID=1 rw}}").unwrap();
        let list = Config::parse("boot: {load: {initrd: [/a], cmdline: ['root=UUID=1', rw]}}").unwrap();
        assert_eq!(plain.boot.load.initrd, list.boot.load.initrd);
        let text = |config: &Config| config.boot.load.cmdline.given().map(ToString::to_string);
        assert_eq!(text(&plain), text(&list));
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parser_panic(text in "\\PC{0,200}") {
            let _ = Config::parse(&text);
        }

        #[test]
        fn hardware_addresses_survive_printing(bytes: [u8; 6]) {
            prop_assert_eq!(Mac(bytes).to_string().parse::<Mac>(), Ok(Mac(bytes)));
        }
    }
}
