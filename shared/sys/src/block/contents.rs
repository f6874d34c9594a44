//! What lies on a disk and each of its partitions, as far as it matters to who else may use it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use stiefel_shared::superblock::{self, Claim};

use super::{Disk, SECTOR};
use crate::read;

/// What lies on a disk or a partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Content {
    /// The kernel's name of the disk or partition, e.g. `sda2`.
    pub name: String,
    /// In bytes.
    pub size: u64,
    /// Whose signatures it has, for people: `ext`, `LUKS`, `GPT`.
    pub formats: Vec<&'static str>,
    /// By what it is found.
    pub claims: Vec<Claim>,
    /// It holds the memory of a hibernated system.
    pub hibernated: bool,
}

/// Looks at the disk and, in their order, its partitions as the kernel knows them. All is read through the disk itself, not
/// exclusively: a partition's device has a cache of its own, which knows nothing of what is written through the disk.
///
/// # Errors
/// The disk cannot be opened, or something on it that says what there is cannot be read: what it holds is not known.
pub fn contents(sysfs: &Path, disk: &Disk) -> io::Result<Vec<Content>> {
    let file = File::open(&disk.path)?;
    let mut areas = vec![(0, disk.name.clone(), 0, disk.size)];
    areas.extend(partitions(sysfs, disk));
    areas.sort();
    let look = |(_, name, start, size)| {
        let mut failed = Ok(());
        let mut read = |offset: u64, bytes: &mut [u8]| {
            let read = file.read_exact_at(bytes, start + offset);
            if let Err(error) = &read
                && error.kind() != io::ErrorKind::UnexpectedEof
            {
                failed = Err(io::Error::new(error.kind(), error.to_string()));
            }
            read
        };
        let content = Content {
            name,
            size,
            formats: superblock::formats(&mut read, size),
            claims: superblock::probe(&mut read, size),
            hibernated: superblock::holds_memory_image(&mut read, size),
        };
        failed.map(|()| content)
    };
    areas.into_iter().map(look).collect()
}

/// Number, name, and place on the disk in bytes.
fn partitions(sysfs: &Path, disk: &Disk) -> Vec<(u32, String, u64, u64)> {
    let entries = std::fs::read_dir(sysfs.join("block").join(&disk.name));
    let partition = |folder: &Path| {
        let bytes = |file| read::number::<u64>(&folder.join(file))?.checked_mul(SECTOR);
        let (start, size) = (bytes("start")?, bytes("size")?);
        let fits = start.checked_add(size).is_some_and(|end| end <= disk.size);
        let name = folder.file_name()?.to_str()?.to_owned();
        fits.then_some((read::number(&folder.join("partition"))?, name, start, size))
    };
    entries
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| partition(&entry.path()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use stiefel_shared::superblock::ClaimKind;

    #[test]
    fn the_disk_and_its_partitions_are_looked_at_each_for_itself() {
        let root = tempfile::tempdir().unwrap();
        for (name, number, start, size) in [
            ("vda2", "2", "64", "64"),
            ("vda1", "1", "8", "56"),
            ("vda3", "3", "128", "9999"),
        ] {
            let folder = root.path().join("block/vda").join(name);
            std::fs::create_dir_all(&folder).unwrap();
            for (file, value) in [("partition", number), ("start", start), ("size", size)] {
                std::fs::write(folder.join(file), value).unwrap();
            }
        }
        std::fs::create_dir_all(root.path().join("block/vda/queue")).unwrap();
        let image = root.path().join("image");
        let file = File::create(&image).unwrap();
        file.set_len(256 * SECTOR).unwrap();
        // An encrypted volume in the first, a memory image in the second partition.
        file.write_all_at(b"LUKS\xba\xbe\0\x01", 8 * SECTOR).unwrap();
        file.write_all_at(b"some-uuid", 8 * SECTOR + 168).unwrap();
        file.write_all_at(b"S1SUSPEND\0", 64 * SECTOR + 4096 - 10).unwrap();
        let mut disk = Disk {
            name: "vda".into(),
            path: image,
            device: (254, 0),
            size: 256 * SECTOR,
            logical_block_size: 512,
            physical_block_size: 512,
            model: None,
            serial: None,
            wwid: None,
            removable: false,
            read_only: false,
            rotational: false,
            sequence: None,
        };
        let content = |name: &str, sectors: u64, claims: &[(ClaimKind, &str)], hibernated| Content {
            name: name.into(),
            size: sectors * SECTOR,
            formats: if claims.is_empty() { vec![] } else { vec!["LUKS"] },
            claims: claims
                .iter()
                .map(|&(kind, value)| Claim {
                    kind,
                    value: value.into(),
                })
                .collect(),
            hibernated,
        };
        assert_eq!(
            contents(root.path(), &disk).unwrap(),
            [
                content("vda", 256, &[], false),
                content("vda1", 56, &[(ClaimKind::LuksUuid, "some-uuid")], false),
                content("vda2", 64, &[], true),
            ]
        );
        disk.path = root.path().join("gone");
        assert!(contents(root.path(), &disk).is_err());
    }
}
