//! The configuration that `stiefel init` writes: the example, with what was found on this machine in its places.
//!
//! Counterpart: `stiefel_shared::config`, which must accept every text made here; that is checked before it is given away.

use std::fmt::Write;

use stiefel_shared::config::{Config, ConfigError, EXAMPLE};

use super::{Identity, Machine, Nic, presentable};

/// What is to be dedicated.
#[derive(Debug, Clone)]
pub struct Choice<'a> {
    /// The adapter.
    pub nic: &'a Nic,
    /// By what it is known.
    pub identity: Identity,
}

/// The text of config.yaml for `machine`. `modules` are names of kernel modules that no class of `modules` brings.
///
/// # Errors
/// [`ConfigError`], if what the hardware calls itself made a text that is not understood.
pub fn render(machine: &Machine, choice: Option<&Choice<'_>>, modules: &[String]) -> Result<String, ConfigError> {
    let mut text = Text::new(EXAMPLE);
    text.head(&format!(
        "# stiefel's configuration: /etc/stiefel/config.yaml on the laptop. Made by `stiefel init` for {}: {}.\n\
         # Every option is here, with its default where nothing else was found; what you leave out has it.\n\
         # A line that starts with `#option` is an example. After a change: `stiefel install`, then\n\
         # `systemctl restart stiefel-autokexec`.",
        machine.hostname, machine.distribution.name
    ));
    text.note("boot", "disk", &format!("Found: {}.", machine.root));
    match choice {
        Some(Choice { nic, identity }) => {
            let (key, note) = match identity {
                Identity::Usb(_) => ("usb", format!("Found: {nic}.")),
                Identity::Mac(_) => (
                    "macs",
                    format!("Found: {nic}; by its address, for nothing else tells it from another."),
                ),
            };
            text.set("trigger", key, &format!("[{}]", quoted(&identity.to_string())));
            text.note("trigger", key, &note);
        }
        None => text.note(
            "trigger",
            "usb",
            "No USB network adapter was chosen. Once you have one: plug it in, and `stiefel init` says what belongs here.",
        ),
    }
    if !modules.is_empty() {
        text.set("", "modules", &format!("[default, {}]", modules.join(", ")));
    }
    if !machine.consoles.is_empty() {
        let words: Vec<_> = machine.consoles.iter().map(|word| quoted(word)).collect();
        text.set("initrd", "cmdline", &format!("[{}]", words.join(", ")));
        text.note("initrd", "cmdline", "Found: the consoles of the running kernel.");
    }
    let text = text.finish();
    Config::parse(&text)?;
    Ok(text)
}

/// A text in double quotes, with the escapes that YAML shares with JSON.
fn quoted(text: &str) -> String {
    let mut quoted = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            c if c.is_ascii_graphic() || c == ' ' => quoted.push(c),
            c => {
                let _ = write!(quoted, "\\U{:08X}", u32::from(c));
            }
        }
    }
    quoted + "\""
}

/// The example's lines.
struct Text(Vec<String>);

impl Text {
    fn new(text: &str) -> Self {
        Self(text.lines().map(str::to_owned).collect())
    }

    /// Replaces the comment at the beginning.
    fn head(&mut self, text: &str) {
        let end = self.0.iter().position(|line| !line.starts_with('#')).unwrap_or(0);
        drop(self.0.splice(..end, text.lines().map(str::to_owned)));
    }

    /// The line of an option: of a section, or (without a section) at the top.
    fn line(&self, section: &str, key: &str) -> Option<usize> {
        let (from, prefix) = if section.is_empty() {
            (0, format!("{key}:"))
        } else {
            let section = format!("{section}:");
            (
                self.0.iter().position(|line| *line == section)? + 1,
                format!("  {key}:"),
            )
        };
        let rest = self.0.get(from..)?;
        let inside = rest
            .iter()
            .take_while(|line| section.is_empty() || line.is_empty() || line.starts_with([' ', '#']));
        inside
            .enumerate()
            .find(|(_, line)| line.starts_with(&prefix))
            .map(|(index, _)| from + index)
    }

    fn set(&mut self, section: &str, key: &str, value: &str) {
        if let Some(line) = self.line(section, key).and_then(|line| self.0.get_mut(line)) {
            let end = line.find(':').map_or(line.len(), |colon| colon + 1);
            line.truncate(end);
            line.push(' ');
            line.push_str(value);
        }
    }

    /// A comment before an option.
    fn note(&mut self, section: &str, key: &str, note: &str) {
        const LONGEST: usize = 400;
        if let Some(line) = self.line(section, key) {
            let note: String = note.chars().filter(|c| !c.is_control()).take(LONGEST).collect();
            self.0.insert(line, format!("  # {note}"));
        }
    }

    fn finish(self) -> String {
        self.0.join("\n") + "\n"
    }
}

/// Names of modules fit for the list.
pub(super) fn module_name(name: &str) -> Option<String> {
    let plain = !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-');
    plain.then(|| presentable(name))
}

#[cfg(test)]
mod tests {
    use super::super::fixture::Fixture;
    use super::*;
    use proptest::prelude::*;
    use stiefel_shared::config::Auto;

    fn rendered(laptop: &Fixture, name: Option<&str>, modules: &[&str]) -> (String, Config) {
        let machine = Machine::of(&laptop.tree());
        let nic = name.map(|name| machine.nics.iter().find(|nic| nic.name == name).unwrap());
        let choice = nic.map(|nic| Choice {
            nic,
            identity: nic.identity(&machine.nics).unwrap(),
        });
        let modules: Vec<_> = modules.iter().map(|&name| name.to_owned()).collect();
        let text = render(&machine, choice.as_ref(), &modules).unwrap();
        let config = Config::parse(&text).unwrap();
        (text, config)
    }

    #[test]
    fn what_was_found_is_in_its_place_and_all_else_is_the_default() {
        let (text, config) = rendered(&Fixture::debian_luks_lvm(), Some("usb1"), &[]);
        let mut expected = Config::default();
        expected.trigger.usb = vec!["0bda:8153:000001".parse().unwrap()];
        assert_eq!(config, expected);
        assert_eq!(config.boot.disk, Auto::Auto, "the disk is found anew each time");
        for line in [
            "Made by `stiefel init` for laptop: Debian GNU/Linux 12 (bookworm).",
            "  # Found: / is ext4 on LVM (vg-root)",
            "  # Found: usb1, Realtek USB 10/100/1000 LAN, USB 0bda:8153:000001, driver r8152.\n  usb: [\"0bda:8153:000001\"]\n",
            "  #usb: [\"0bda:8153\", \"0bda:8156:000001\"]",
        ] {
            assert!(text.contains(line), "{line}\n{text}");
        }
        assert!(text.lines().count() > EXAMPLE.lines().count(), "the explanations stay");
    }

    #[test]
    fn without_an_adapter_only_a_wake_triggers_and_the_text_says_what_to_do() {
        let (text, config) = rendered(&Fixture::fedora(), None, &[]);
        assert_eq!(config, Config::default());
        assert!(text.contains("Once you have one: plug it in"));
    }

    #[test]
    fn an_address_modules_and_consoles_are_written_where_they_belong() {
        let laptop = Fixture::arch();
        laptop.nic("usb2", "r8152", Some(("0bda", "8153", Some("000001"))));
        laptop.write(
            "/proc/cmdline",
            "root=UUID=1 console=tty0 console=ttyS0,115200 console=\n",
        );
        let (_, config) = rendered(&laptop, Some("usb1"), &["r8127"]);
        assert_eq!(config.trigger.macs, ["02:00:00:00:00:02".parse().unwrap()]);
        assert!(config.trigger.usb.is_empty());
        assert_eq!(config.modules.0, ["default", "r8127"]);
        assert_eq!(config.initrd.cmdline.0, ["console=tty0", "console=ttyS0,115200"]);
        assert_eq!(config.boot.load.cmdline, Auto::Auto, "the other `cmdline`");
    }

    proptest! {
        #[test]
        fn whatever_the_hardware_calls_itself_the_text_is_understood(
            product in ".{0,60}", model in ".{0,60}", name in ".{0,40}", console in "[^ \\t\\r\\n]{1,20}",
        ) {
            let laptop = Fixture::debian_luks_lvm();
            laptop.write("/sys/devices/usb/usb1/product", &product);
            laptop.write("/sys/devices/pci/nvme0n1/device/model", &model);
            laptop.write("/etc/hostname", &name);
            laptop.write("/proc/cmdline", &format!("console={console}"));
            let (_, config) = rendered(&laptop, Some("usb1"), &[]);
            prop_assert_eq!(config.trigger.usb.len(), 1);
        }
    }
}
