//! The keys of a tunnel: 32 bytes each, never printed, wiped when dropped.

use x25519_dalek::StaticSecret;
use zeroize::{Zeroize, ZeroizeOnDrop};

const LENGTH: usize = 32;

/// A tunnel's own key: a scalar of Curve25519 (RFC 7748).
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct PrivateKey([u8; LENGTH]);

impl PrivateKey {
    /// Takes 32 secret random bytes, and clamps them as RFC 7748, section 5 says.
    #[must_use]
    pub fn from_bytes(mut bytes: [u8; LENGTH]) -> Self {
        bytes[0] &= 0b1111_1000;
        bytes[LENGTH - 1] &= 0b0111_1111;
        bytes[LENGTH - 1] |= 0b0100_0000;
        let key = Self(bytes);
        bytes.zeroize();
        key
    }

    /// The key that belongs to it, for the other side.
    #[must_use]
    pub fn public(&self) -> PublicKey {
        PublicKey(x25519_dalek::PublicKey::from(&StaticSecret::from(self.0)).to_bytes())
    }

    /// The clamped bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; LENGTH] {
        &self.0
    }
}

/// The key by which one side of a tunnel is known to the other.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct PublicKey([u8; LENGTH]);

impl PublicKey {
    /// Takes what the other side sent.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; LENGTH]) -> Self {
        Self(bytes)
    }

    pub(super) fn from_slice(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }

    /// Its bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; LENGTH] {
        &self.0
    }
}

/// A secret that both sides mix into every handshake.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct PresharedKey([u8; LENGTH]);

impl PresharedKey {
    /// Takes 32 secret bytes.
    #[must_use]
    pub fn from_bytes(mut bytes: [u8; LENGTH]) -> Self {
        let key = Self(bytes);
        bytes.zeroize();
        key
    }

    /// Its bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; LENGTH] {
        &self.0
    }
}

impl std::fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PrivateKey(..)")
    }
}

impl std::fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PublicKey(..)")
    }
}

impl std::fmt::Debug for PresharedKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PresharedKey(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 7748, section 6.1: Bob's keys.
    #[test]
    fn the_public_key_is_the_one_of_the_standard() {
        let private = hex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb");
        let public = hex("de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f");
        assert_eq!(PrivateKey::from_bytes(private).public(), PublicKey::from_bytes(public));
    }

    fn hex(text: &str) -> [u8; 32] {
        std::array::from_fn(|i| u8::from_str_radix(&text[2 * i..2 * i + 2], 16).unwrap())
    }

    #[test]
    fn private_keys_are_clamped() {
        let key = PrivateKey::from_bytes([0xff; 32]);
        assert_eq!((key.as_bytes()[0], key.as_bytes()[31]), (0xf8, 0x7f));
        assert_eq!(PrivateKey::from_bytes([0; 32]).as_bytes()[31], 0x40);
    }

    #[test]
    fn no_key_is_ever_printed() {
        let printed = format!(
            "{:?} {:?} {:?}",
            PrivateKey::from_bytes([7; 32]),
            PublicKey::from_bytes([7; 32]),
            PresharedKey::from_bytes([7; 32])
        );
        assert_eq!(printed, "PrivateKey(..) PublicKey(..) PresharedKey(..)");
    }
}
