use super::*;
use std::os::unix::fs::symlink;

type Files<'a> = &'a [(&'a str, &'a str)];

/// Builds a sysfs: `devices` are (path below devices, dev number, files with their content).
fn sysfs(devices: &[(&str, &str, Files<'_>)]) -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    for folder in ["block", "dev/block"] {
        std::fs::create_dir_all(root.path().join(folder)).unwrap();
    }
    for (path, dev, files) in devices {
        let folder = root.path().join("devices").join(path);
        let all = [("dev", *dev), ("size", "2048\n")];
        for (file, content) in all.iter().chain(files.iter()) {
            let file = folder.join(file);
            std::fs::create_dir_all(file.parent().unwrap()).unwrap();
            std::fs::write(file, content).unwrap();
        }
        symlink(&folder, root.path().join("dev/block").join(dev.trim())).unwrap();
        if !folder.join("partition").exists() {
            symlink(&folder, root.path().join("block").join(folder.file_name().unwrap())).unwrap();
        }
    }
    root
}

#[test]
fn a_disk_is_read_with_all_that_sysfs_tells() {
    let files: &[_] = &[
        ("queue/logical_block_size", "4096\n"),
        ("queue/physical_block_size", "8192\n"),
        ("queue/rotational", "1\n"),
        ("device/model", "Great Disk      \n"),
        ("device/vpd_pg80", "\0\u{1}\0\u{8}  ABC123"),
        ("device/wwid", "naa.5002538\n"),
        ("removable", "0\n"),
        ("ro", "1\n"),
    ];
    let root = sysfs(&[("pci/ata1/block/sda", "8:0\n", files)]);
    let expected = Disk {
        name: "sda".into(),
        path: "/dev/sda".into(),
        device: (8, 0),
        size: 1 << 20,
        logical_block_size: 4096,
        physical_block_size: 8192,
        model: Some("Great Disk".into()),
        serial: Some("ABC123".into()),
        wwid: Some("naa.5002538".into()),
        removable: false,
        read_only: true,
        rotational: true,
        sequence: None,
    };
    assert_eq!(disks(root.path()).unwrap(), [expected]);
}

#[test]
fn only_disks_with_a_medium_are_listed() {
    let root = sysfs(&[
        ("v/block/vda", "254:0\n", &[]),
        ("v/block/nvme0n1", "259:0\n", &[]),
        ("v/block/nvme0c0n1", "259:1\n", &[("hidden", "1\n")]),
        ("v/block/sdb", "8:16\n", &[("size", "0\n")]),
        ("v/block/loop0", "7:0\n", &[]),
        ("v/block/zram0", "252:0\n", &[]),
        ("v/block/nbd0", "43:0\n", &[]),
        ("v/block/dm-0", "253:0\n", &[]),
        ("v/block/sr0", "11:0\n", &[]),
        ("v/block/mmcblk0", "179:0\n", &[]),
        ("v/block/mmcblk0boot0", "179:8\n", &[]),
    ]);
    let names: Vec<_> = disks(root.path()).unwrap().into_iter().map(|disk| disk.name).collect();
    assert_eq!(names, ["mmcblk0", "nvme0n1", "vda"]);
}

#[test]
fn an_absent_sysfs_is_an_error() {
    assert!(matches!(
        disks(Path::new("/nonexistent")),
        Err(BlockError::Sysfs { .. })
    ));
    assert!(matches!(
        whole_disks_of_device(Path::new("/nonexistent"), (8, 0)),
        Err(BlockError::Sysfs { .. })
    ));
}

#[test]
fn a_volume_over_crypt_over_partitions_leads_to_its_disks() {
    let root = sysfs(&[
        ("pci/block/sda", "8:0\n", &[]),
        ("pci/block/sda/sda1", "8:1\n", &[("partition", "1\n")]),
        ("pci/block/sdb", "8:16\n", &[]),
        ("virtual/block/dm-0", "253:0\n", &[]),
        ("virtual/block/dm-1", "253:1\n", &[]),
    ]);
    let devices = root.path().join("devices");
    for (upper, lower) in [
        ("dm-0", "pci/block/sda/sda1"),
        ("dm-1", "virtual/block/dm-0"),
        ("dm-1", "pci/block/sdb"),
    ] {
        let slaves = devices.join("virtual/block").join(upper).join("slaves");
        std::fs::create_dir_all(&slaves).unwrap();
        symlink(devices.join(lower), slaves.join(Path::new(lower).file_name().unwrap())).unwrap();
    }
    let names = |device| -> Vec<String> {
        whole_disks_of_device(root.path(), device)
            .unwrap()
            .into_iter()
            .map(|disk| disk.name)
            .collect()
    };
    assert_eq!(names((253, 1)), ["sda", "sdb"]);
    assert_eq!(names((8, 1)), ["sda"]);
    assert_eq!(names((8, 16)), ["sdb"]);
}

#[test]
fn proc_has_no_disk_below_it() {
    let error = whole_disks_of(Path::new(crate::SYSFS), Path::new(crate::PROCFS), Path::new("/proc")).unwrap_err();
    assert!(matches!(error, BlockError::NoDevice { .. }), "{error}");
}

#[test]
fn a_subvolume_is_found_by_where_it_is_mounted_not_by_its_number() {
    let mounts = mount::mountinfo(
        b"22 1 0:25 /@ / rw - btrfs /dev/vda1 rw\n23 22 0:5 / /dev rw - devtmpfs udev rw\n\
          24 22 0:25 /@home /home rw - btrfs /dev/vda1 rw\n25 22 0:31 / /home rw - tmpfs tmpfs rw\n",
    );
    let source = |path: &str| mount_of(&mounts, Path::new(path)).map(|mount| mount.source.as_str());
    assert_eq!(source("/"), Some("/dev/vda1"));
    assert_eq!(source("/homestead/x"), Some("/dev/vda1"));
    // What is mounted over it hides it.
    assert_eq!(source("/home/x"), Some("tmpfs"));
    assert_eq!(mount_of(&[], Path::new("/")), None);
}
