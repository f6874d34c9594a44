//! Keys: one per stick, 32 bytes, named. Files below /etc/stiefel/keys; revoked by deleting.
//!
//! What is spoken with a key never uses the key itself but a subkey for one purpose and one direction, so that
//! nothing said by one side can be reflected to it. Labels and file format: docs/protocol.md, "Keys".

use data_encoding::HEXLOWER;
use hkdf::Hkdf;
use serde::{Deserialize, Deserializer, Serialize, de::Error as _};
use sha2::Sha256;
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

/// The largest key file that is read, in bytes.
pub const MAX_KEY_FILE: u64 = 256;
/// What a key file's only line starts with; the number is the format's version.
const FILE_PREFIX: &str = "stiefel-key-1 ";
/// HKDF's salt: separates our subkeys from those of any other use of the same secret.
const SALT: &[u8] = b"stiefel 1";

/// A stick's key with its name.
#[derive(Clone, Zeroize, ZeroizeOnDrop, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StickKey {
    /// The name its owner gave it; not secret, never sent in clear.
    #[serde(deserialize_with = "checked_name")]
    pub name: String,
    /// The secret.
    #[serde(with = "hex32")]
    secret: [u8; 32],
}

impl std::fmt::Debug for StickKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "StickKey({}, ..)", self.name)
    }
}

/// What a subkey of a [`StickKey`] is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Seals `Discover` and `Wake`.
    DesktopDatagrams,
    /// Seals `Offer` and `Waking`.
    LaptopDatagrams,
    /// The pre-shared key of the session's handshake.
    Handshake,
    /// Seals tickets: [`crate::discovery::Ticket`].
    Ticket,
}

impl Purpose {
    const fn label(self) -> &'static [u8] {
        match self {
            Self::DesktopDatagrams => b"datagrams desktop to laptop",
            Self::LaptopDatagrams => b"datagrams laptop to desktop",
            Self::Handshake => b"session handshake",
            Self::Ticket => b"ticket",
        }
    }
}

/// Why a key was not made or not read.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The name cannot be a file's name on every medium.
    #[error("a key cannot be named {name:?}: use 1 to 64 letters, digits, `.`, `_` and `-`, not starting with `.`")]
    Name {
        /// The name, cut to what can be shown.
        name: String,
    },
    /// The file's content is not a key.
    #[error(
        "the key file of {name} is not understood: it holds one line, `stiefel-key-1` and 64 digits 0-9 a-f; \
         copy it again, or make a new key with `stiefel key new`"
    )]
    Format {
        /// The key's name.
        name: String,
    },
    /// The file was written by a newer version.
    #[error("the key file of {name} has a format that this version of stiefel does not know; use a newer stiefel")]
    Version {
        /// The key's name.
        name: String,
    },
    /// The kernel gave no random bytes.
    #[error("no key could be made: the kernel gave no random bytes")]
    Random(#[source] getrandom::Error),
}

impl StickKey {
    /// Makes a new key from the kernel's randomness.
    ///
    /// # Errors
    /// [`KeyError::Name`] for a bad name, [`KeyError::Random`] if the kernel has no randomness.
    pub fn generate(name: &str) -> Result<Self, KeyError> {
        check_name(name)?;
        // Filled in place: an array that is moved leaves a copy behind.
        let mut key = Self {
            name: name.to_owned(),
            secret: [0; 32],
        };
        getrandom::fill(&mut key.secret).map_err(KeyError::Random)?;
        Ok(key)
    }

    /// Reads the content of the key file of `name` (docs/protocol.md, "Keys"); opens nothing.
    ///
    /// # Errors
    /// [`KeyError`] for anything but exactly one key of this version; the message never shows the content.
    pub fn parse(name: &str, content: &[u8]) -> Result<Self, KeyError> {
        check_name(name)?;
        let format = || KeyError::Format { name: name.to_owned() };
        let line = content.strip_suffix(b"\n").unwrap_or(content);
        let Some(digits) = line.strip_prefix(FILE_PREFIX.as_bytes()) else {
            let newer = line
                .strip_prefix(b"stiefel-key-")
                .is_some_and(|rest| rest.first() != Some(&b'1'));
            return Err(if newer {
                KeyError::Version { name: name.to_owned() }
            } else {
                format()
            });
        };
        let mut key = Self {
            name: name.to_owned(),
            secret: [0; 32],
        };
        if digits.len() != 64 || HEXLOWER.decode_mut(digits, &mut key.secret).is_err() {
            return Err(format());
        }
        Ok(key)
    }

    /// The content of the key's file, with its newline; secret, to be written 0600.
    #[must_use]
    pub fn to_file(&self) -> Zeroizing<String> {
        // Large enough from the start: a growing string would leave copies of the secret behind.
        let mut text = Zeroizing::new(String::with_capacity(FILE_PREFIX.len() + 65));
        text.push_str(FILE_PREFIX);
        HEXLOWER.encode_append(&self.secret, &mut text);
        text.push('\n');
        text
    }

    /// The subkey for one purpose (docs/protocol.md, "Keys").
    #[must_use]
    pub fn subkey(&self, purpose: Purpose) -> Zeroizing<[u8; 32]> {
        derive(&self.secret, purpose.label())
    }

    /// The key of one activation (docs/protocol.md, "Tickets"): leads back neither to this one nor to another activation's.
    #[must_use]
    pub fn for_activation(&self, activation: &[u8; 16]) -> Self {
        let mut key = Self {
            name: self.name.clone(),
            secret: [0; 32],
        };
        let label = [b"activation ".as_slice(), activation].concat();
        key.secret.copy_from_slice(&*derive(&self.secret, &label));
        key
    }
}

/// Whether `name` can name a key.
///
/// # Errors
/// [`KeyError::Name`] unless it is `[A-Za-z0-9._-]{1,64}` and does not start with a dot.
pub fn check_name(name: &str) -> Result<(), KeyError> {
    let fits = (1..=64).contains(&name.len())
        && !name.starts_with('.')
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
    if fits {
        Ok(())
    } else {
        Err(KeyError::Name {
            name: name.chars().take(64).collect(),
        })
    }
}

/// HKDF-SHA256 of `secret`, one block, with `label` as its info.
pub(crate) fn derive(secret: &[u8; 32], label: &[u8]) -> Zeroizing<[u8; 32]> {
    let mut out = Zeroizing::new([0; 32]);
    let expanded = Hkdf::<Sha256>::new(Some(SALT), secret).expand(label, &mut *out);
    // HKDF only fails above 255 blocks; an all-zero key must never be handed out if that ever changed.
    assert!(expanded.is_ok(), "one block of HKDF cannot fail");
    out
}

fn checked_name<'de, D: Deserializer<'de>>(from: D) -> Result<String, D::Error> {
    let name = String::deserialize(from)?;
    check_name(&name).map_err(D::Error::custom)?;
    Ok(name)
}

/// 32 secret bytes as hexadecimal digits in JSON.
pub mod hex32 {
    use data_encoding::HEXLOWER_PERMISSIVE;
    use serde::{Deserialize, Deserializer, Serializer, de::Error as _};
    use zeroize::Zeroizing;

    /// Writes them.
    ///
    /// # Errors
    /// The serializer's.
    pub fn serialize<S: Serializer>(bytes: &[u8; 32], to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&Zeroizing::new(HEXLOWER_PERMISSIVE.encode(bytes)))
    }

    /// Reads them; anything but 64 digits is refused.
    ///
    /// # Errors
    /// The deserializer's.
    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<[u8; 32], D::Error> {
        let text = Zeroizing::new(String::deserialize(from)?);
        let mut bytes = [0; 32];
        if text.len() != 64 {
            return Err(D::Error::custom("a key has 64 hexadecimal digits"));
        }
        HEXLOWER_PERMISSIVE
            .decode_mut(text.as_bytes(), &mut bytes)
            .map_err(|_| D::Error::custom("a key has 64 hexadecimal digits"))?;
        Ok(bytes)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The key of every pinned vector: the bytes 0x00, 0x01, … 0x1f.
    pub fn fixed() -> StickKey {
        let mut secret = [0; 32];
        secret.iter_mut().zip(0..).for_each(|(byte, value)| *byte = value);
        StickKey {
            name: "test".into(),
            secret,
        }
    }

    #[test]
    fn a_key_file_reads_back_as_the_same_key() {
        let key = StickKey::generate("blue-stick").unwrap();
        let back = StickKey::parse("blue-stick", key.to_file().as_bytes()).unwrap();
        assert_eq!(key.secret, back.secret);
        assert_ne!(key.secret, [0; 32]);
        assert!(key.to_file().len() as u64 <= MAX_KEY_FILE);
    }

    #[test]
    fn generated_keys_differ() {
        assert_ne!(
            StickKey::generate("a").unwrap().secret,
            StickKey::generate("a").unwrap().secret
        );
    }

    #[test]
    fn a_key_file_holds_exactly_one_key() {
        let good = fixed().to_file();
        let good = good.as_str();
        assert_eq!(
            good,
            format!("stiefel-key-1 {}\n", crate::vectors::value("keys.txt", "secret"))
        );
        assert!(StickKey::parse("k", good.trim_end().as_bytes()).is_ok());
        for bad in [
            String::new(),
            "\n".into(),
            format!("{good}\n"),
            format!("{good}{good}"),
            format!(" {good}"),
            good.to_uppercase(),
            good.replace("1f", "1F"),
            good.replace("1f", ""),
            good.replace('\n', "\r\n"),
            good.replace("key-1 ", "key-1  "),
        ] {
            assert!(
                matches!(StickKey::parse("k", bad.as_bytes()), Err(KeyError::Format { .. })),
                "{bad:?}"
            );
        }
        let newer = good.replace("key-1", "key-2");
        assert!(matches!(
            StickKey::parse("k", newer.as_bytes()),
            Err(KeyError::Version { .. })
        ));
    }

    #[test]
    fn names_that_leave_their_folder_are_refused() {
        for bad in ["", ".", "..", ".hidden", "a/b", "a b", "ä", "a\0", &"x".repeat(65)] {
            assert!(check_name(bad).is_err(), "{bad:?}");
            assert!(
                serde_json::from_str::<StickKey>(&format!("{{\"name\":{bad:?},\"secret\":\"{}\"}}", "00".repeat(32)))
                    .is_err()
            );
        }
        for good in ["a", "Blue_Stick-1.old", &"x".repeat(64)] {
            assert!(check_name(good).is_ok(), "{good:?}");
        }
    }

    #[test]
    fn debug_and_errors_never_show_the_secret() {
        let shown = format!("{:?}", fixed());
        assert_eq!(shown, "StickKey(test, ..)");
        let spoiled = fixed().to_file().replace("1f", "1g");
        let error = StickKey::parse("k", spoiled.as_bytes()).unwrap_err();
        assert!(!format!("{error} {error:?}").contains("0102"));
    }

    #[test]
    fn subkeys_are_the_pinned_ones() {
        for (purpose, name) in [
            (Purpose::DesktopDatagrams, "desktop_datagrams"),
            (Purpose::LaptopDatagrams, "laptop_datagrams"),
            (Purpose::Handshake, "handshake"),
        ] {
            let subkey = fixed().subkey(purpose);
            assert_eq!(HEXLOWER.encode(&*subkey), crate::vectors::value("keys.txt", name));
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(key) = StickKey::parse("k", &bytes) {
                let file = key.to_file();
                prop_assert_eq!(file.trim_end().as_bytes(), bytes.strip_suffix(b"\n").unwrap_or(&bytes));
            }
        }
    }
}
