//! A laptop that was started from a stick of its own and waits for its disk's passphrase: what a desktop sends it, and what it answers.
//!
//! Sent by `client::unlock`, answered by `server::offline::desk`, inside a session's handshake. Layout: docs/protocol.md, "Unlocking".
//! Every request has the same length, so that the traffic does not tell how long a passphrase is. Opens nothing itself.
//! Refused: a passphrase of more than [`MAX_PASSPHRASE`] bytes, anything behind it but zeros.

use zeroize::Zeroizing;

/// The longest passphrase, in bytes.
pub const MAX_PASSPHRASE: usize = 256;
/// Length of a request before it is sealed, in bytes.
pub const REQUEST: usize = 2 + MAX_PASSPHRASE;
/// The longest text that names what is to be opened, in bytes.
pub const MAX_WANTS: usize = 200;

/// What a person has typed; wiped when dropped, and never printed.
#[derive(Default, PartialEq, Eq)]
pub struct Passphrase(Zeroizing<Vec<u8>>);

impl std::fmt::Debug for Passphrase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Passphrase(..)")
    }
}

/// Why something cannot be sent, or was not understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum UnlockError {
    /// It does not fit.
    #[error("a passphrase has at most {MAX_PASSPHRASE} bytes here; add a shorter one with `cryptsetup luksAddKey`")]
    TooLong,
    /// It is none of this version.
    #[error(
        "what the other machine said about its passphrase is not understood; use the same version of stiefel on both"
    )]
    Malformed,
}

impl Passphrase {
    /// Takes one; the bytes are its own from now on. An empty one only asks what is wanted.
    ///
    /// # Errors
    /// [`UnlockError::TooLong`].
    pub fn new(bytes: Zeroizing<Vec<u8>>) -> Result<Self, UnlockError> {
        if bytes.len() > MAX_PASSPHRASE {
            return Err(UnlockError::TooLong);
        }
        Ok(Self(bytes))
    }

    /// The bytes that were typed.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// Whether nothing was typed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// A request, [`REQUEST`] bytes; secret.
    #[must_use]
    pub fn to_request(&self) -> Zeroizing<Vec<u8>> {
        let mut request = Zeroizing::new(Vec::with_capacity(REQUEST));
        // At most 256.
        request.extend(u16::try_from(self.0.len()).unwrap_or(0).to_be_bytes());
        request.extend_from_slice(&self.0);
        request.resize(REQUEST, 0);
        request
    }

    /// Reads a request.
    ///
    /// # Errors
    /// [`UnlockError::TooLong`], [`UnlockError::Malformed`].
    pub fn parse(request: &[u8]) -> Result<Self, UnlockError> {
        if request.len() != REQUEST {
            return Err(UnlockError::Malformed);
        }
        let (length, rest) = request.split_first_chunk().ok_or(UnlockError::Malformed)?;
        let length = usize::from(u16::from_be_bytes(*length));
        let (passphrase, filling) = rest.split_at_checked(length).ok_or(UnlockError::TooLong)?;
        if filling.iter().any(|&byte| byte != 0) {
            return Err(UnlockError::Malformed);
        }
        Ok(Self(Zeroizing::new(passphrase.to_vec())))
    }
}

/// What became of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Nothing was tried: this is what is wanted.
    Wanted,
    /// The passphrase opens nothing of what is wanted.
    Wrong,
    /// It has opened something; what is wanted now has another.
    More,
    /// All is open: the laptop reads its disk.
    Open,
    /// Nothing was tried: another try runs, or there were too many.
    Later,
}

impl Outcome {
    const ALL: [Self; 5] = [Self::Wanted, Self::Wrong, Self::More, Self::Open, Self::Later];
}

/// The laptop's answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unlocking {
    /// What became of the request.
    pub outcome: Outcome,
    /// In how many seconds the next try is taken.
    pub wait: u16,
    /// What is to be opened, for people: without control characters, at most [`MAX_WANTS`] bytes.
    pub wants: String,
}

impl Unlocking {
    /// An answer; what cannot be shown of `wants` is left out.
    #[must_use]
    pub fn new(outcome: Outcome, wait: u16, wants: &str) -> Self {
        let mut wants: String = wants.chars().filter(|c| !c.is_control()).collect();
        wants.truncate(wants.floor_char_boundary(MAX_WANTS));
        Self { outcome, wait, wants }
    }

    /// As it is sent.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = vec![self.outcome as u8];
        bytes.extend(self.wait.to_be_bytes());
        bytes.extend_from_slice(self.wants.as_bytes());
        bytes
    }

    /// Reads an answer.
    ///
    /// # Errors
    /// [`UnlockError::Malformed`].
    pub fn parse(bytes: &[u8]) -> Result<Self, UnlockError> {
        let (&[outcome, a, b], wants) = bytes.split_first_chunk().ok_or(UnlockError::Malformed)?;
        let outcome = *Outcome::ALL.get(usize::from(outcome)).ok_or(UnlockError::Malformed)?;
        let wants = str::from_utf8(wants).map_err(|_| UnlockError::Malformed)?;
        // It goes to a terminal: nothing that could move the cursor.
        if wants.len() > MAX_WANTS || wants.chars().any(char::is_control) {
            return Err(UnlockError::Malformed);
        }
        Ok(Self {
            outcome,
            wait: u16::from_be_bytes([a, b]),
            wants: wants.to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn passphrase(bytes: &[u8]) -> Passphrase {
        Passphrase::new(Zeroizing::new(bytes.to_vec())).unwrap()
    }

    #[test]
    fn a_request_tells_the_passphrase_and_not_its_length() {
        for typed in [b"".as_slice(), b"secret", &[7; MAX_PASSPHRASE]] {
            let request = passphrase(typed).to_request();
            assert_eq!(request.len(), REQUEST);
            assert_eq!(Passphrase::parse(&request).unwrap().bytes(), typed);
        }
    }

    #[test]
    fn a_passphrase_that_is_too_long_is_refused_on_both_sides() {
        let long = Zeroizing::new(vec![7; MAX_PASSPHRASE + 1]);
        assert_eq!(Passphrase::new(long).unwrap_err(), UnlockError::TooLong);
        let mut request = passphrase(&[7; MAX_PASSPHRASE]).to_request();
        request[1] = 1;
        assert_eq!(Passphrase::parse(&request).unwrap_err(), UnlockError::TooLong);
    }

    #[test]
    fn what_is_no_request_is_refused() {
        let request = passphrase(b"secret").to_request();
        let mut filled = request.clone();
        filled[REQUEST - 1] = 1;
        for bad in [&filled[..], &request[1..], &[]] {
            assert_eq!(Passphrase::parse(bad).unwrap_err(), UnlockError::Malformed);
        }
    }

    #[test]
    fn a_passphrase_is_never_printed_and_its_memory_is_wiped() {
        assert_eq!(format!("{:?}", passphrase(b"secret")), "Passphrase(..)");
        // The type that wipes is what is kept: this does not compile otherwise.
        fn wiped(_: &Zeroizing<Vec<u8>>) {}
        wiped(&passphrase(b"secret").0);
        wiped(&passphrase(b"secret").to_request());
    }

    #[test]
    fn an_answer_shows_nothing_that_moves_a_cursor() {
        let answer = Unlocking::new(Outcome::Wrong, 20, &format!("a\x1b[2J{}", "ä".repeat(200)));
        assert_eq!(Unlocking::parse(&answer.to_bytes()), Ok(answer.clone()));
        assert!(answer.wants.starts_with("a[2Jä") && answer.wants.len() <= MAX_WANTS);
        for bad in [
            &b"\x01\x00"[..],
            b"\x05\x00\x00",
            b"\x01\x00\x00\x1b",
            b"\x01\x00\x00\xff",
            &[0; 4 + MAX_WANTS],
        ] {
            assert_eq!(Unlocking::parse(bad), Err(UnlockError::Malformed));
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..300), typed in proptest::collection::vec(any::<u8>(), 0..=256)) {
            let request = passphrase(&typed).to_request();
            let read = Passphrase::parse(&request).unwrap();
            prop_assert_eq!(read.bytes(), typed.as_slice());
            if let Ok(passphrase) = Passphrase::parse(&bytes) {
                prop_assert_eq!(&*passphrase.to_request(), &bytes);
            }
            if let Ok(answer) = Unlocking::parse(&bytes) {
                prop_assert_eq!(answer.to_bytes(), bytes);
            }
        }
    }
}
