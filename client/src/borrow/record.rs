//! What is borrowed, written down for `detach`: one private file each.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::net::{Ipv6Addr, SocketAddrV6};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use serde::{Deserialize, Serialize};
use stiefel_shared::bundle::{ControlKey, Transport};
use stiefel_shared::lend::is_name;

/// Where the records are.
pub const RECORDS: &str = "/run/stiefel/borrowed";
/// The longest record, in bytes.
const MAX_RECORD: u64 = 16 * 1024;

/// A borrowed disk.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// The disk's name at its machine.
    pub disk: String,
    /// The machine's host name.
    pub hostname: String,
    /// The block device here.
    pub device: String,
    /// Whether it can be written.
    pub writable: bool,
    /// The machine's HTTP server: its address, our interface's index, its port.
    pub address: (Ipv6Addr, u32, u16),
    /// The tunnel's interface.
    pub tunnel: String,
    /// How it is served.
    pub transport: Transport,
    /// The loan's secret.
    pub control: ControlKey,
    /// The loan's public name.
    pub session: String,
}

impl Record {
    /// The machine's HTTP server.
    #[must_use]
    pub const fn peer(&self) -> SocketAddrV6 {
        SocketAddrV6::new(self.address.0, self.address.2, 0, self.address.1)
    }

    fn file(&self) -> io::Result<String> {
        let safe =
            is_name(&self.disk) && !self.session.is_empty() && self.session.bytes().all(|b| b.is_ascii_hexdigit());
        match safe {
            true => Ok(format!("{}.{}", self.disk, self.session)),
            false => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    /// Writes it down in `folder`: beside, then in place.
    ///
    /// # Errors
    /// The file system's.
    pub fn write(&self, folder: &Path) -> io::Result<()> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
        let path = folder.join(self.file()?);
        let beside = path.with_extension("new");
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&beside)?;
        file.write_all(&serde_json::to_vec(self).map_err(io::Error::other)?)?;
        file.sync_all()?;
        fs::rename(beside, path)
    }

    /// Forgets it.
    ///
    /// # Errors
    /// The file system's.
    pub fn remove(&self, folder: &Path) -> io::Result<()> {
        match fs::remove_file(folder.join(self.file()?)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Whether `name` means this one: the disk, MACHINE/DISK, or the device.
    #[must_use]
    pub fn is(&self, name: &str) -> bool {
        name == self.disk || name == format!("{}/{}", self.hostname, self.disk) || name == self.device
    }

    /// Whether it is this machine's disk.
    #[must_use]
    pub fn is_of(&self, hostname: &str, disk: &str) -> bool {
        self.hostname == hostname && self.disk == disk
    }
}

/// All records in `folder`; those that cannot be read are passed over.
#[must_use]
pub fn read_all(folder: &Path) -> Vec<Record> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut records: Vec<Record> = entries.filter_map(|entry| read(&entry.path()).ok()).collect();
    records.sort_by(|a, b| a.device.cmp(&b.device));
    records
}

fn read(path: &Path) -> io::Result<Record> {
    let mut json = Vec::new();
    File::open(path)?.take(MAX_RECORD).read_to_end(&mut json)?;
    serde_json::from_slice(&json).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn record() -> Record {
        Record {
            disk: "ssd-1".into(),
            hostname: "laptop".into(),
            device: "/dev/nbd3".into(),
            writable: false,
            address: ("fe80::1".parse().unwrap(), 3, 61570),
            tunnel: "stiefel-b0000".into(),
            transport: Transport::Nbd {
                port: 61571,
                export: "secret".into(),
            },
            control: ControlKey([1; 32]),
            session: "00ff".into(),
        }
    }

    #[test]
    fn a_record_is_private_and_comes_back() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("stiefel/borrowed");
        record().write(&folder).unwrap();
        let file = folder.join("ssd-1.00ff");
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::metadata(&folder).unwrap().permissions().mode() & 0o777, 0o700);
        let all = read_all(&folder);
        assert_eq!((all.len(), all[0].device.as_str()), (1, "/dev/nbd3"));
        assert_eq!(all[0].control.0, [1; 32]);
        all[0].remove(&folder).unwrap();
        all[0].remove(&folder).unwrap();
        assert!(read_all(&folder).is_empty());
    }

    #[test]
    fn a_name_that_leads_elsewhere_is_not_written() {
        let root = tempfile::tempdir().unwrap();
        for (disk, session) in [("../x", "00"), ("x", "../y"), ("x", "")] {
            let record = Record {
                disk: disk.into(),
                session: session.into(),
                ..record()
            };
            assert!(record.write(root.path()).is_err(), "{disk} {session}");
        }
    }

    #[test]
    fn a_disk_is_meant_by_its_name_machine_or_device() {
        for name in ["ssd-1", "laptop/ssd-1", "/dev/nbd3"] {
            assert!(record().is(name), "{name}");
        }
        assert!(!record().is("laptop"));
        assert!(record().is_of("laptop", "ssd-1"));
        assert!(!record().is_of("other", "ssd-1") && !record().is_of("laptop", "ssd-2"));
    }

    #[test]
    fn secrets_are_not_shown() {
        let shown = format!("{:?}", record());
        assert!(!shown.contains("secret") && !shown.contains("1, 1, 1"), "{shown}");
    }
}
