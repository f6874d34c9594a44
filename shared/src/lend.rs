//! Storage target mode, closed: what the holder of a key asks a machine that lends its disks, and what it answers.
//!
//! Asked by `client::borrow`, answered by `server::target`, inside a session's handshake. Layout: docs/protocol.md,
//! "Lending". Both are JSON, sealed; unknown fields are refused. A machine that lends says so in its Offer
//! ([`crate::discovery::State::Lending`]), which older sticks do not understand and so pass over.

use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::bundle::{ControlKey, DiskOffer, LinkOffer};
use crate::discovery::MAX_HOSTNAME;
use crate::session::SessionName;

/// The longest question, in bytes.
pub const MAX_ASK: usize = 400;
/// The longest answer, in bytes: fits one frame of the stream.
pub const MAX_LOAN: usize = 60 * 1024;
/// The longest name of a disk, in bytes.
pub const MAX_NAME: usize = 80;
/// The longest other text, in bytes.
const MAX_TEXT: usize = 256;
/// Disks, and partitions of one.
const MAX_LIST: usize = 128;

/// What is asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Ask {
    /// Which disks are there?
    List,
    /// Lend me one.
    Attach {
        /// Its name in the list.
        disk: String,
        /// To write, too.
        read_write: bool,
        /// Whether this side can have it by NVMe over TCP; by NBD it can always.
        nvme: bool,
    },
}

/// What is answered.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "loan", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Loan {
    /// These.
    Disks {
        /// Each of them.
        disks: Vec<DiskInfo>,
    },
    /// The disk, and the way to it.
    Attached(Box<Lent>),
}

/// A disk that is lent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskInfo {
    /// Lower-case letters, digits and dashes.
    pub name: String,
    /// The model; may be empty.
    pub model: String,
    /// In bytes.
    pub size: u64,
    /// Whether it may be written.
    pub writable: bool,
    /// What else uses it, in words: mounts, sessions.
    pub users: Vec<String>,
    /// The whole disk first, then its partitions.
    pub parts: Vec<PartInfo>,
}

/// A disk or partition.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PartInfo {
    /// The other kernel's name for it.
    pub name: String,
    /// In bytes.
    pub size: u64,
    /// What lies on it: formats, and labels or names that people gave.
    pub content: Vec<String>,
}

/// A disk that one side has now.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lent {
    /// The other machine's name.
    pub hostname: String,
    /// The disk, and how it is served.
    pub disk: DiskOffer,
    /// The way there; there is always a tunnel, whose port is the other side's only.
    pub link: LinkOffer,
    /// Whether it can be written.
    pub writable: bool,
    /// The secret of this session.
    pub control: ControlKey,
    /// The session's public name.
    pub session: String,
}

/// Why a question or an answer was not accepted.
#[derive(Debug, thiserror::Error)]
pub enum LendError {
    /// It is none of this version.
    #[error("what the other machine said is not understood; use the same version of stiefel on both")]
    Json(#[source] serde_json::Error),
    /// It does not fit.
    #[error("the other machine's list has {size} bytes, more than the {MAX_LOAN} that fit")]
    TooLarge {
        /// Its length.
        size: usize,
    },
    /// A field holds what it must not.
    #[error("what the other machine said has an impossible {field}")]
    Field {
        /// Which field.
        field: &'static str,
    },
}

fn field(field: &'static str, fits: bool) -> Result<(), LendError> {
    if fits { Ok(()) } else { Err(LendError::Field { field }) }
}

/// It goes to a terminal: nothing that could move the cursor.
fn shown(text: &str, limit: usize) -> bool {
    text.len() <= limit && !text.chars().any(char::is_control)
}

/// Whether a text can be a disk's name: also as the name of a file.
#[must_use]
pub fn is_name(text: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    (1..=MAX_NAME).contains(&text.len()) && text.bytes().all(plain)
}

impl Ask {
    /// Reads and checks a question.
    ///
    /// # Errors
    /// [`LendError`].
    pub fn parse(json: &[u8]) -> Result<Self, LendError> {
        if json.len() > MAX_ASK {
            return Err(LendError::TooLarge { size: json.len() });
        }
        let ask: Self = serde_json::from_slice(json).map_err(LendError::Json)?;
        ask.check()?;
        Ok(ask)
    }

    /// The question as JSON.
    ///
    /// # Errors
    /// [`LendError`] if the other side would not accept it.
    pub fn to_json(&self) -> Result<Vec<u8>, LendError> {
        self.check()?;
        serde_json::to_vec(self).map_err(LendError::Json)
    }

    fn check(&self) -> Result<(), LendError> {
        match self {
            Self::List => Ok(()),
            Self::Attach { disk, .. } => field("disk name", is_name(disk)),
        }
    }
}

impl Loan {
    /// Reads and checks an answer.
    ///
    /// # Errors
    /// [`LendError`] for anything that [`Loan::to_json`] would not write.
    pub fn parse(json: &[u8]) -> Result<Self, LendError> {
        if json.len() > MAX_LOAN {
            return Err(LendError::TooLarge { size: json.len() });
        }
        let loan: Self = serde_json::from_slice(json).map_err(LendError::Json)?;
        loan.check()?;
        Ok(loan)
    }

    /// The answer as JSON; secret.
    ///
    /// # Errors
    /// [`LendError`] if the other side would not accept it.
    pub fn to_json(&self) -> Result<Zeroizing<Vec<u8>>, LendError> {
        self.check()?;
        // Large enough from the start: a growing vector would leave copies of the secret behind.
        let mut json = Zeroizing::new(Vec::with_capacity(2 * MAX_LOAN));
        serde_json::to_writer(&mut *json, self).map_err(LendError::Json)?;
        if json.len() > MAX_LOAN {
            return Err(LendError::TooLarge { size: json.len() });
        }
        Ok(json)
    }

    fn check(&self) -> Result<(), LendError> {
        match self {
            Self::Disks { disks } => {
                field("number of disks", disks.len() <= MAX_LIST)?;
                disks.iter().try_for_each(DiskInfo::check)
            }
            Self::Attached(lent) => lent.check(),
        }
    }
}

impl DiskInfo {
    fn check(&self) -> Result<(), LendError> {
        field("disk name", is_name(&self.name))?;
        field("model", shown(&self.model, MAX_TEXT))?;
        let texts = |texts: &[String]| texts.len() <= MAX_LIST && texts.iter().all(|text| shown(text, MAX_TEXT));
        field("use of a disk", texts(&self.users))?;
        field("number of partitions", self.parts.len() <= MAX_LIST)?;
        let part = |part: &PartInfo| shown(&part.name, MAX_TEXT) && texts(&part.content);
        field("partition", self.parts.iter().all(part))
    }
}

impl Lent {
    fn check(&self) -> Result<(), LendError> {
        field("host name", shown(&self.hostname, MAX_HOSTNAME))?;
        field("session name", self.session.parse::<SessionName>().is_ok())?;
        let block = self.disk.logical_block_size;
        field("block size", [512, 4096].contains(&block))?;
        field(
            "size",
            self.disk.identity.size > 0 && self.disk.identity.size.is_multiple_of(u64::from(block)),
        )?;
        // Never in clear: who holds a key gets a tunnel.
        field(
            "tunnel",
            self.link.tunnel.as_ref().is_some_and(|tunnel| tunnel.port != 0),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bundle::{Transport, Tunnel};
    use crate::handover::{DiskIdentity, LinkMode};
    use proptest::prelude::*;

    fn lent() -> Lent {
        Lent {
            hostname: "laptop".into(),
            disk: DiskOffer {
                guest: false,
                identity: DiskIdentity {
                    gpt_guid: None,
                    wwid: None,
                    serial: Some("S1".into()),
                    model: None,
                    size: 1 << 20,
                },
                logical_block_size: 512,
                transport: Transport::Nbd {
                    port: 61571,
                    export: "x".into(),
                },
            },
            link: LinkOffer {
                mode: LinkMode::Lan,
                address: "fd00::1".parse().unwrap(),
                laptop: "fd00::".parse().unwrap(),
                grace: 60,
                tunnel: Some(Tunnel {
                    private_key: [1; 32],
                    laptop_key: [2; 32],
                    preshared_key: [3; 32],
                    port: 61580,
                    mtu: 1420,
                }),
            },
            writable: false,
            control: ControlKey([4; 32]),
            session: "0".repeat(32),
        }
    }

    fn info() -> DiskInfo {
        DiskInfo {
            name: "ssd-1".into(),
            model: "SSD".into(),
            size: 1 << 40,
            writable: false,
            users: vec!["mounted at /".into()],
            parts: vec![PartInfo {
                name: "sda1".into(),
                size: 1 << 30,
                content: vec!["ext".into(), "label root".into()],
            }],
        }
    }

    #[test]
    fn questions_and_answers_come_back() {
        for ask in [
            Ask::List,
            Ask::Attach {
                disk: "ssd-1".into(),
                read_write: true,
                nvme: false,
            },
        ] {
            assert_eq!(Ask::parse(&ask.to_json().unwrap()).unwrap(), ask);
        }
        let json = Loan::Disks { disks: vec![info()] }.to_json().unwrap();
        let Loan::Disks { disks } = Loan::parse(&json).unwrap() else {
            panic!("another answer")
        };
        assert_eq!(disks, [info()]);
        let json = Loan::Attached(Box::new(lent())).to_json().unwrap();
        assert!(matches!(Loan::parse(&json).unwrap(), Loan::Attached(got) if got.session == lent().session));
    }

    #[test]
    fn the_bytes_are_pinned() {
        assert_eq!(Ask::List.to_json().unwrap(), br#"{"ask":"list"}"#);
        let attach = Ask::Attach {
            disk: "ssd-1".into(),
            read_write: false,
            nvme: true,
        };
        assert_eq!(
            attach.to_json().unwrap(),
            br#"{"ask":"attach","disk":"ssd-1","read_write":false,"nvme":true}"#
        );
        let json = Loan::Disks { disks: vec![info()] }.to_json().unwrap();
        let expected = concat!(
            r#"{"loan":"disks","disks":[{"name":"ssd-1","model":"SSD","size":1099511627776,"writable":false,"#,
            r#""users":["mounted at /"],"parts":[{"name":"sda1","size":1073741824,"content":["ext","label root"]}]}]}"#
        );
        assert_eq!(std::str::from_utf8(&json).unwrap(), expected);
    }

    #[test]
    fn a_disk_without_a_tunnel_is_refused() {
        let mut clear = lent();
        clear.link.tunnel = None;
        assert!(Loan::Attached(Box::new(clear)).to_json().is_err());
    }

    #[test]
    fn a_name_that_could_lead_elsewhere_is_refused() {
        for name in ["", "../x", "A", "a b", "a/b", "a\u{1b}"] {
            assert!(!is_name(name), "{name:?}");
            let json = format!(r#"{{"ask":"attach","disk":{name:?},"read_write":false,"nvme":false}}"#);
            assert!(Ask::parse(json.as_bytes()).is_err(), "{name:?}");
        }
        let mut odd = info();
        odd.parts[0].content[0] = "\u{1b}[2J".into();
        assert!(Loan::Disks { disks: vec![odd] }.to_json().is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_are_read(bytes: Vec<u8>) {
            let _ = Ask::parse(&bytes);
            let _ = Loan::parse(&bytes);
        }
    }
}
