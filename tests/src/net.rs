//! Cables between machines: datagram sockets that carry Ethernet frames, without root and without host interfaces.
//!
//! Counterpart: QEMU's `-netdev dgram`. A cable may be direct, or go through a relay in this process that counts, records,
//! cuts and alters.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;

use serde_json::{Value, json};

mod capture;
mod packet;
mod relay;
mod tamper;

pub use capture::CaptureError;
pub use relay::Counts;
pub use tamper::{FlipTcpByte, Side, Tamper, Verdict};

/// One end of a network, for a NIC.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Netdev {
    /// One end of a [`Wire`].
    Dgram {
        /// The socket QEMU makes.
        local: PathBuf,
        /// The socket it sends to.
        remote: PathBuf,
    },
    /// One end of a byte stream between two machines, one of which listens and must be started first: nothing is lost, and
    /// who is too fast waits.
    Stream {
        /// The socket.
        path: PathBuf,
        /// Whether this end listens.
        listens: bool,
    },
    /// A bridge of the host; needs `qemu-bridge-helper` and its permission in /etc/qemu/bridge.conf.
    Bridge {
        /// The bridge's interface name.
        name: String,
    },
}

impl Netdev {
    /// QEMU's description of it, with the name `id`.
    pub(crate) fn to_json(&self, id: &str) -> Value {
        match self {
            Self::Dgram { local, remote } => json!({
                "type": "dgram",
                "id": id,
                "local": { "type": "unix", "path": local },
                "remote": { "type": "unix", "path": remote },
            }),
            Self::Stream { path, listens } => json!({
                "type": "stream",
                "id": id,
                "server": listens,
                "addr": { "type": "unix", "path": path },
            }),
            Self::Bridge { name } => json!({ "type": "bridge", "id": id, "br": name }),
        }
    }
}

/// A cable could not be made.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// A socket or file cannot be made.
    #[error("cannot make the cable's sockets in {dir}")]
    Io {
        /// Where.
        dir: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// There is no relay that could do it.
    #[error("this cable is a direct one; make it with Wire::relayed")]
    Direct,
    /// The record of the traffic does not answer the question.
    #[error(transparent)]
    Capture(#[from] CaptureError),
}

/// A cable between two machines. Gone when dropped: keep it as long as the machines.
pub struct Wire {
    // The order matters: the relay's threads end before their sockets' directory goes.
    relay: Option<Relay>,
    dir: tempfile::TempDir,
}

struct Relay {
    shared: Arc<relay::Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Wire {
    /// A cable from machine to machine, with nothing in between.
    ///
    /// # Errors
    /// When its directory cannot be made.
    pub fn direct() -> Result<Self, WireError> {
        Ok(Self {
            dir: directory()?,
            relay: None,
        })
    }

    /// A cable through this process. It records the first `record_limit` bytes of frames into a pcap file (0: no record).
    ///
    /// # Errors
    /// When its sockets or its record cannot be made.
    pub fn relayed(record_limit: u64) -> Result<Self, WireError> {
        let dir = directory()?;
        let io_error = |source| WireError::Io {
            dir: dir.path().to_owned(),
            source,
        };
        let shared = Arc::new(relay::Shared::new(&dir.path().join("record.pcap"), record_limit).map_err(io_error)?);
        let mut relay = Relay {
            shared,
            threads: Vec::new(),
        };
        let a = relay::bind(&dir.path().join("a.relay")).map_err(io_error)?;
        let b = relay::bind(&dir.path().join("b.relay")).map_err(io_error)?;
        let directions = [(Side::A, &a, &b, "b"), (Side::B, &b, &a, "a")];
        for (from, input, output, to) in directions {
            let direction = relay::Direction {
                from,
                input: input.try_clone().map_err(io_error)?,
                output: output.try_clone().map_err(io_error)?,
                to: dir.path().join(to),
            };
            let shared = Arc::clone(&relay.shared);
            relay.threads.push(std::thread::spawn(move || direction.run(&shared)));
        }
        Ok(Self {
            dir,
            relay: Some(relay),
        })
    }

    /// The end for the one machine.
    pub fn a(&self) -> Netdev {
        self.end("a", "b")
    }

    /// The end for the other machine.
    pub fn b(&self) -> Netdev {
        self.end("b", "a")
    }

    fn end(&self, this: &str, other: &str) -> Netdev {
        let remote = if self.relay.is_some() {
            format!("{this}.relay")
        } else {
            other.to_owned()
        };
        Netdev::Dgram {
            local: self.dir.path().join(this),
            remote: self.dir.path().join(remote),
        }
    }

    /// Cuts the cable (frames are lost, the carrier stays), or mends it.
    ///
    /// # Errors
    /// When the cable is a direct one.
    pub fn set_cut(&self, cut: bool) -> Result<(), WireError> {
        self.shared()?.set_cut(cut);
        Ok(())
    }

    /// Shows every frame to `tamper`, or to none any more.
    ///
    /// # Errors
    /// When the cable is a direct one.
    pub fn set_tamper(&self, tamper: Option<Box<dyn Tamper>>) -> Result<(), WireError> {
        self.shared()?.set_tamper(tamper);
        Ok(())
    }

    /// What went through until now.
    ///
    /// # Errors
    /// When the cable is a direct one.
    pub fn counts(&self) -> Result<Counts, WireError> {
        Ok(self.shared()?.counts())
    }

    /// Whether `pattern` occurred in the recorded traffic: within a frame, or across the segments of a TCP connection.
    ///
    /// # Errors
    /// When the cable is a direct one, or the record is not whole (so that "no" would prove nothing).
    pub fn carried(&self, pattern: &[u8]) -> Result<bool, WireError> {
        Ok(self.shared()?.capture().contains(pattern)?)
    }

    /// Copies the record until now to `file` (pcap, readable by Wireshark).
    ///
    /// # Errors
    /// When the cable is a direct one, or the record cannot be written.
    pub fn save_record(&self, file: &Path) -> Result<(), WireError> {
        Ok(self.shared()?.capture().copy_to(file)?)
    }

    fn shared(&self) -> Result<&relay::Shared, WireError> {
        self.relay.as_ref().map(|relay| &*relay.shared).ok_or(WireError::Direct)
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.shared.stop();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn directory() -> Result<tempfile::TempDir, WireError> {
    // Not below a long path: a unix socket's name has at most 107 bytes.
    let temp = std::env::temp_dir();
    tempfile::Builder::new()
        .prefix("stiefel-wire-")
        .tempdir_in(&temp)
        .map_err(|source| WireError::Io { dir: temp, source })
}

#[cfg(test)]
mod tests;
