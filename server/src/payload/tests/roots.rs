//! How the root file system is named.

use super::*;

/// A laptop that runs a kernel with this command line.
fn laptop(cmdline: &str, mounts: &str) -> Laptop {
    let laptop = Laptop::running("6.1.0-18-amd64");
    laptop.debian("/boot", "6.1.0-18-amd64");
    laptop.file("/proc/cmdline", cmdline);
    laptop.file("/proc/self/mountinfo", mounts);
    laptop
}

const PLAIN: &str = "22 1 8:2 / / rw - ext4 /dev/sda2 rw\n";

#[test]
fn a_root_that_the_loaders_disk_decides_is_written_out() {
    for cmdline in ["root=gpt-auto rw quiet", "rw quiet", "rw quiet root=gpt-auto-force"] {
        let laptop = laptop(cmdline, PLAIN);
        laptop.disk(ROOT_UUID, "sda2");
        laptop.link("../../devices/sda/sda2", "/sys/class/block/sda2");
        laptop.file("/sys/devices/sda/sda2/partition", "2");
        let found = laptop.find().unwrap();
        assert_eq!(found.cmdline, format!("rw quiet root=UUID={ROOT_UUID}"), "{cmdline}");
        assert!(found.notes[0].contains("was written out"), "{:?}", found.notes);
    }
}

#[test]
fn encryption_and_subvolumes_are_written_out_too() {
    let laptop = laptop("rw root=gpt-auto", "22 1 0:25 /@ / rw - btrfs /dev/mapper/root rw\n");
    laptop.link("../dm-0", "/dev/mapper/root");
    laptop.file("/sys/class/block/dm-0/dm/uuid", "CRYPT-LUKS2-1234-root\n");
    laptop.file("/sys/class/block/dm-0/dm/name", "root\n");
    laptop.file("/sys/class/block/dm-0/slaves/sda2/partition", "2\n");
    laptop.disk("55-66", "sda2");
    assert_eq!(
        laptop.find().unwrap().cmdline,
        "rw rd.luks.name=55-66=root root=/dev/mapper/root rootflags=subvol=@"
    );
}

#[test]
fn what_cannot_be_written_out_is_refused() {
    let by_loader = laptop("root=gpt-auto", "");
    assert!(matches!(
        by_loader.find(),
        Err(PayloadError::Cmdline(CmdlineError::RootByLoader { .. }))
    ));
    assert!(matches!(laptop("quiet", "").find(), Err(PayloadError::NoRoot { .. })));
    let live = laptop("boot=live", "22 1 0:25 / / rw - overlay overlay rw\n");
    assert!(matches!(
        live.find(),
        Err(PayloadError::Cmdline(CmdlineError::NoDisk { .. }))
    ));
}

#[test]
fn a_root_in_the_configuration_goes_before_the_loaders_disk() {
    let laptop = laptop("root=gpt-auto quiet", "");
    let load = Load {
        append: Words(vec!["root=LABEL=mine".to_owned()]),
        ..Load::default()
    };
    let found = laptop.find_with(&load).unwrap();
    assert_eq!(found.cmdline, "quiet root=LABEL=mine");
    assert_eq!(found.notes, Vec::<String>::new());
}
