//! GRUB's configuration, environment block and an entry for `blscfg`, each after a NUL.

#![no_main]

use libfuzzer_sys::fuzz_target;
use stiefel_shared::loader::grub::{Files, Kind, Location, OWN, default_entry};

/// The same texts, whatever the device.
struct Machine<'a> {
    env: &'a str,
    entry: &'a str,
    config: &'a str,
}

impl Files for Machine<'_> {
    fn kind(&self, place: &Location) -> Option<Kind> {
        self.text(place)
            .map(|text| if text.is_empty() { Kind::Empty } else { Kind::File })
    }

    fn text(&self, place: &Location) -> Option<String> {
        let text = match place.path.as_str() {
            "/grubenv" if place.device == OWN => self.env,
            "/loader/entries/a-1-2.conf" => self.entry,
            "/grub.cfg" => self.config,
            _ => return None,
        };
        Some(text.to_owned())
    }

    fn names(&self, place: &Location) -> Vec<String> {
        let entries = place.path == "/loader/entries";
        entries.then(|| "a-1-2.conf".to_owned()).into_iter().collect()
    }

    fn efi(&self) -> bool {
        true
    }
}

fuzz_target!(|data: &[u8]| {
    let text = String::from_utf8_lossy(data);
    let mut texts = text.split('\0');
    let mut next = || texts.next().unwrap_or_default();
    let (config, env, entry) = (next(), next(), next());
    let Some(chosen) = default_entry(config, &Machine { env, entry, config }) else {
        return;
    };
    assert!(!chosen.titles.is_empty() && !chosen.reason.is_empty());
    assert!(chosen.entry.kernel.is_none() || chosen.entry.other.is_none());
});
