//! What opens a LUKS2 volume: its key slots, and the tokens that fill them in without a passphrase.
//!
//! Used by `stiefel doctor`: a slot that only this machine's TPM fills in cannot be opened on the desktop. Specification: LUKS2
//! on-disk format 1.1.1, 2.1 (binary header) and 3 (JSON area). Nothing secret is in either. What is not understood is `None`.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;

/// Length of the binary header, in bytes; the JSON area follows it.
pub const BINARY_HEADER: usize = 4096;
/// The largest header that the format allows, both parts, in bytes.
const LARGEST: u64 = 4 << 20;
/// How many slots and tokens the format allows.
const MOST: usize = 32;

/// What opens a volume.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Openers {
    /// The key slots' numbers.
    pub slots: BTreeSet<String>,
    /// The tokens.
    pub tokens: Vec<Token>,
}

/// A token.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Token {
    /// Its type, e.g. `systemd-tpm2`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The key slots that it opens.
    pub keyslots: Vec<String>,
}

impl Token {
    /// Whether it is bound to this machine, or to something else than what a person types. What `systemd-cryptenroll` calls a
    /// recovery key is typed.
    #[must_use]
    pub fn is_machine_bound(&self) -> bool {
        self.kind == "systemd-tpm2" || self.kind == "clevis"
    }
}

impl Openers {
    /// Slots that no token fills in: of a passphrase or a key file.
    pub fn plain_slots(&self) -> impl Iterator<Item = &str> {
        let filled = |slot: &&String| {
            let by_token = |token: &Token| token.kind != "systemd-recovery" && token.keyslots.contains(slot);
            self.tokens.iter().any(by_token)
        };
        self.slots.iter().filter(move |slot| !filled(slot)).map(String::as_str)
    }
}

/// The version of LUKS of a device that begins with these bytes.
#[must_use]
pub fn version(head: &[u8]) -> Option<u16> {
    let rest = head.strip_prefix(b"LUKS\xba\xbe")?;
    Some(u16::from_be_bytes(rest.get(..2)?.try_into().ok()?))
}

/// How long both parts of a LUKS2 header are, in bytes; `None` for another format or an impossible length.
#[must_use]
pub fn header_length(head: &[u8]) -> Option<usize> {
    if version(head)? != 2 {
        return None;
    }
    let length = u64::from_be_bytes(head.get(8..16)?.try_into().ok()?);
    let sound = length > BINARY_HEADER as u64 && length <= LARGEST;
    usize::try_from(length).ok().filter(|_| sound)
}

/// Reads a JSON area: what follows the binary header.
#[must_use]
pub fn openers(area: &[u8]) -> Option<Openers> {
    #[derive(Deserialize)]
    struct Area {
        keyslots: BTreeMap<String, serde::de::IgnoredAny>,
        #[serde(default)]
        tokens: BTreeMap<String, Token>,
    }
    let end = area.iter().position(|&byte| byte == 0).unwrap_or(area.len());
    let area: Area = serde_json::from_slice(area.get(..end)?).ok()?;
    if area.keyslots.len() > MOST || area.tokens.len() > MOST {
        return None;
    }
    Some(Openers {
        slots: area.keyslots.into_keys().collect(),
        tokens: area.tokens.into_values().collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn plain(json: &str) -> Option<Vec<String>> {
        let openers = openers(json.as_bytes())?;
        Some(openers.plain_slots().map(str::to_owned).collect())
    }

    #[test]
    fn slots_of_tokens_are_told_from_those_of_passphrases() {
        let json = |tokens: &str| {
            format!(
                r#"{{"keyslots":{{"0":{{"type":"luks2"}},"1":{{"type":"luks2"}}}},"tokens":{tokens},"segments":{{}}}}"#
            )
        };
        assert_eq!(plain(&json("{}")).unwrap(), ["0", "1"]);
        let tpm = json(r#"{"0":{"type":"systemd-tpm2","keyslots":["1"],"tpm2-blob":"x"}}"#);
        assert_eq!(plain(&tpm).unwrap(), ["0"]);
        assert!(openers(tpm.as_bytes()).unwrap().tokens[0].is_machine_bound());
        let both = json(r#"{"0":{"type":"clevis","keyslots":["0"]},"1":{"type":"systemd-recovery","keyslots":["1"]}}"#);
        assert_eq!(plain(&both).unwrap(), ["1"], "a recovery key is typed");
        let none = json(r#"{"0":{"type":"clevis","keyslots":["0","1"]}}"#);
        assert!(plain(&none).unwrap().is_empty());
        assert_eq!(plain("{}"), None);
        assert_eq!(plain(r#"{"keyslots":{}}"#).unwrap(), Vec::<String>::new());
    }

    #[test]
    fn the_header_says_how_long_it_is_and_lies_are_refused() {
        let head = |version: u16, length: u64| {
            let mut head = b"LUKS\xba\xbe".to_vec();
            head.extend(version.to_be_bytes());
            head.extend(length.to_be_bytes());
            head
        };
        assert_eq!(header_length(&head(2, 16384)), Some(16384));
        assert_eq!(version(&head(1, 0)), Some(1));
        for head in [
            head(1, 16384),
            head(2, 4096),
            head(2, u64::MAX),
            head(2, 5 << 20),
            b"LUKS".to_vec(),
        ] {
            assert_eq!(header_length(&head), None);
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300), text in "\\PC{0,100}") {
            let _ = (version(&bytes), header_length(&bytes), openers(&bytes), openers(text.as_bytes()));
        }
    }
}
