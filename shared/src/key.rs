//! Keys: one per stick, 32 bytes, named. Files below /etc/stiefel/keys; revoked by deleting.

use serde::{Deserialize, Serialize};
use zeroize::{Zeroize, ZeroizeOnDrop};

/// A stick's key with its name.
#[derive(Clone, Zeroize, ZeroizeOnDrop, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StickKey {
    /// The name its owner gave it; not secret, never sent in clear.
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
