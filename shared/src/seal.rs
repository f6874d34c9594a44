//! Sealed messages: AES-256-EAX with random nonces.
//!
//! Used by [`crate::discovery`] and for the goodbye in [`crate::session`]. A sealed message is
//! nonce (16), ciphertext, tag (16); its header is bound as associated data. Layout: docs/protocol.md, "Sealing".

use aes::Aes256;
use eax::{AeadInOut, Eax, KeyInit, Nonce};
use zeroize::Zeroizing;

/// Length of a nonce, in bytes.
pub const NONCE: usize = 16;
/// Length of a tag, in bytes.
pub const TAG: usize = 16;
/// What sealing adds to a plaintext, in bytes.
pub const OVERHEAD: usize = NONCE + TAG;

/// Why something could not be sealed or opened.
#[derive(Debug, thiserror::Error)]
pub enum SealError {
    /// The kernel gave no random bytes.
    #[error("the kernel gave no random bytes")]
    Random(#[source] getrandom::Error),
    /// The message is not from someone who has the key, or it was altered.
    #[error("the message does not verify")]
    Unverified,
}

/// A key that seals and opens; wiped when dropped.
///
/// `Eax` keeps its raw key and wipes nothing; so it lies in one heap place that is overwritten at the end.
pub struct SealKey(Box<Eax<Aes256>>);

impl std::fmt::Debug for SealKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SealKey(..)")
    }
}

impl Drop for SealKey {
    fn drop(&mut self) {
        *self.0 = Eax::new(&[0; 32].into());
        // The store above must not be optimised away as dead.
        std::hint::black_box(&mut *self.0);
    }
}

impl SealKey {
    /// Takes a subkey, which must be used for nothing else.
    #[must_use]
    pub fn new(subkey: &[u8; 32]) -> Self {
        Self(Box::new(Eax::new(subkey.into())))
    }

    /// Seals `plaintext` under a fresh random nonce and binds `header` to it.
    ///
    /// # Errors
    /// [`SealError::Random`] without randomness.
    pub fn seal(&self, header: &[u8], plaintext: &[u8]) -> Result<Vec<u8>, SealError> {
        self.seal_with_nonce(random()?, header, plaintext)
    }

    /// Seals under a nonce that must never be used twice; for pinned vectors.
    pub(crate) fn seal_with_nonce(
        &self,
        nonce: [u8; NONCE],
        header: &[u8],
        plaintext: &[u8],
    ) -> Result<Vec<u8>, SealError> {
        let mut out = Vec::with_capacity(plaintext.len() + OVERHEAD);
        out.extend_from_slice(&nonce);
        out.extend_from_slice(plaintext);
        let tag = self
            .0
            .encrypt_inout_detached(&nonce.into(), header, (&mut out[NONCE..]).into())
            .map_err(|_| SealError::Unverified)?;
        out.extend_from_slice(&tag);
        Ok(out)
    }

    /// Opens what [`SealKey::seal`] made with the same key and header. The caller bounds `sealed`.
    ///
    /// # Errors
    /// [`SealError::Unverified`] for everything else.
    pub fn open(&self, header: &[u8], sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>, SealError> {
        let (nonce, rest) = sealed.split_first_chunk::<NONCE>().ok_or(SealError::Unverified)?;
        let (ciphertext, tag) = rest.split_last_chunk::<TAG>().ok_or(SealError::Unverified)?;
        let mut plaintext = Zeroizing::new(ciphertext.to_vec());
        let nonce: &Nonce<_> = nonce.into();
        self.0
            .decrypt_inout_detached(nonce, header, plaintext.as_mut_slice().into(), tag.into())
            .map_err(|_| SealError::Unverified)?;
        Ok(plaintext)
    }
}

/// Random bytes of the kernel.
///
/// # Errors
/// [`SealError::Random`] if it has none.
pub fn random<const N: usize>() -> Result<[u8; N], SealError> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(SealError::Random)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_same_words_never_look_the_same() {
        let key = SealKey::new(&[7; 32]);
        assert_ne!(key.seal(b"h", b"words").unwrap(), key.seal(b"h", b"words").unwrap());
    }

    #[test]
    fn debug_never_shows_the_key() {
        assert_eq!(format!("{:?}", SealKey::new(&[7; 32])), "SealKey(..)");
    }

    proptest! {
        #[test]
        fn what_was_sealed_opens(header: Vec<u8>, words: Vec<u8>, key: [u8; 32]) {
            let key = SealKey::new(&key);
            let sealed = key.seal(&header, &words).unwrap();
            prop_assert_eq!(sealed.len(), words.len() + OVERHEAD);
            prop_assert_eq!(&*key.open(&header, &sealed).unwrap(), &words);
        }

        #[test]
        fn any_flipped_bit_is_refused(words: Vec<u8>, at: prop::sample::Index, bit in 0..8u8) {
            let key = SealKey::new(&[7; 32]);
            let mut sealed = key.seal(b"header", &words).unwrap();
            let at = at.index(sealed.len());
            sealed[at] ^= 1 << bit;
            prop_assert!(key.open(b"header", &sealed).is_err());
        }

        #[test]
        fn another_header_key_or_length_is_refused(words: Vec<u8>, cut: prop::sample::Index) {
            let key = SealKey::new(&[7; 32]);
            let sealed = key.seal(b"header", &words).unwrap();
            prop_assert!(key.open(b"headeR", &sealed).is_err());
            prop_assert!(key.open(b"heade", &sealed).is_err());
            prop_assert!(SealKey::new(&[8; 32]).open(b"header", &sealed).is_err());
            prop_assert!(key.open(b"header", &sealed[..cut.index(sealed.len())]).is_err());
            let mut longer = sealed;
            longer.push(0);
            prop_assert!(key.open(b"header", &longer).is_err());
        }
    }
}
