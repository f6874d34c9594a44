//! Arming and its undoing, on file trees: the firmware's variables byte by byte, the image, and each refusal.

use std::os::unix::fs::{PermissionsExt, symlink};
use std::time::SystemTime;

use stiefel_shared::handover::Volume;

use super::*;

const GLOBAL: &str = "8be4df61-93ca-11d2-aa0d-00e098032b8c";
const GUID: &str = "00112233-4455-6677-8899-aabbccddeeff";

/// A laptop with the disk `sda`, whose first partition is the EFI system partition at /boot/efi.
struct Laptop {
    dir: tempfile::TempDir,
    tree: Tree,
}

impl Laptop {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let tree = Tree::new(dir.path());
        let laptop = Self { dir, tree };
        let root = "22 1 8:2 / / rw - ext4 /dev/sda2 rw\n";
        laptop.put(
            "/proc/self/mountinfo",
            format!("{root}23 22 8:1 / /boot/efi rw - vfat /dev/sda1 rw\n"),
        );
        for (number, start, size) in [(1, "2048", "204800"), (2, "206848", "9999")] {
            let folder = format!("/sys/devices/sda/sda{number}");
            laptop.put(&format!("{folder}/partition"), format!("{number}\n"));
            laptop.put(&format!("{folder}/start"), start);
            laptop.put(&format!("{folder}/size"), size);
            laptop.put(&format!("/dev/sda{number}"), "");
            laptop.link(
                &format!("../../devices/sda/sda{number}"),
                &format!("/sys/class/block/sda{number}"),
            );
        }
        laptop.put("/sys/class/block/sda/queue/logical_block_size", "512\n");
        laptop.link("../../sda1", &format!("/dev/disk/by-partuuid/{GUID}"));
        laptop.put("/boot/efi/EFI/debian/grubx64.efi", "loader");
        laptop.variable("BootOrder", &[7, 0, 0, 0, 0, 0]);
        laptop.variable("Boot0000", &[7, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        laptop.put(DEFAULT_STUB, "stub");
        std::fs::create_dir_all(laptop.tree.path(STATE_DIR)).unwrap();
        laptop
    }

    fn put(&self, path: &str, bytes: impl AsRef<[u8]>) {
        let path = self.tree.path(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }

    fn link(&self, target: &str, path: &str) {
        let path = self.tree.path(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        symlink(target, path).unwrap();
    }

    fn variable(&self, name: &str, bytes: &[u8]) {
        self.put(&format!("{}/{name}-{GLOBAL}", variables::FOLDER), bytes);
    }

    fn read(&self, name: &str) -> Option<Vec<u8>> {
        variables::read(&self.tree, name)
    }

    fn variables(&self) -> Vec<String> {
        let names = self.tree.names(variables::FOLDER);
        names
            .iter()
            .map(|name| name.split('-').next().unwrap().to_owned())
            .collect()
    }

    fn plan(&self) -> Plan {
        Plan {
            tree: self.tree.clone(),
            turn: Turn::take(&self.tree).unwrap(),
            esp: esp::find(&self.tree, "sda").unwrap(),
            program: Zeroizing::new(b"secret image".to_vec()),
            modules: 0,
        }
    }

    fn image(&self) -> PathBuf {
        self.tree.path(format!("/boot/efi{IMAGE}"))
    }

    fn on_the_esp(&self) -> Vec<String> {
        self.tree.names(format!("/boot/efi{FOLDER}"))
    }
}

/// Nobody cancels it.
fn arm(plan: &Plan) -> Result<(), RebootError> {
    plan.arm(|| Ok(()))
}

#[test]
fn what_is_cancelled_while_the_image_is_written_is_taken_back() {
    let laptop = Laptop::new();
    let plan = laptop.plan();
    let image = laptop.image();
    let cancelled = plan.arm(|| {
        assert!(image.exists());
        Err(RebootError::NotKept)
    });
    assert!(matches!(cancelled, Err(RebootError::NotKept)));
    assert!(!image.exists());
    assert_eq!(laptop.variables(), ["Boot0000", "BootOrder"]);
}

#[test]
fn the_esp_is_found_with_what_the_firmware_knows_it_by() {
    let laptop = Laptop::new();
    let esp = esp::find(&laptop.tree, "sda").unwrap();
    assert_eq!(esp.point, "/boot/efi");
    let volume = Volume {
        partition: 1,
        fstype: "vfat".into(),
        folder: "/".into(),
        logical: None,
    };
    assert_eq!(esp.volume, volume);
    let program = esp.program(IMAGE);
    assert_eq!((program.partition, program.blocks), (1, (2048, 204_800)));
    assert_eq!(program.guid.to_string(), GUID);
    // A disk with larger blocks is counted in those.
    laptop.put("/sys/class/block/sda/queue/logical_block_size", "4096\n");
    assert_eq!(
        esp::find(&laptop.tree, "sda").unwrap().program(IMAGE).blocks,
        (256, 25_600)
    );
    assert!(matches!(esp::find(&laptop.tree, "sdb"), Err(RebootError::NoEsp { disk }) if disk == "sdb"));
    std::fs::remove_file(laptop.tree.path(format!("/dev/disk/by-partuuid/{GUID}"))).unwrap();
    laptop.link("../../sda1", "/dev/disk/by-partuuid/1234abcd-01");
    assert!(
        esp::find(&laptop.tree, "sda").is_err(),
        "an MBR's partition has no GUID"
    );
}

#[test]
fn arming_writes_the_image_an_entry_and_what_names_it_once() {
    let laptop = Laptop::new();
    arm(&laptop.plan()).unwrap();
    assert_eq!(std::fs::read(laptop.image()).unwrap(), b"secret image");
    assert_eq!(laptop.image().metadata().unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(laptop.on_the_esp(), ["once.efi"]);
    // The lowest number that is free; the order in which the firmware starts by itself is as it was.
    assert_eq!(laptop.read("BootNext").unwrap(), [7, 0, 0, 0, 1, 0]);
    assert_eq!(laptop.read("BootOrder").unwrap(), [7, 0, 0, 0, 0, 0]);
    let option = efi::load_option(&laptop.read("Boot0001").unwrap()).unwrap();
    assert_eq!(option.description, TITLE);
    assert_eq!(option.path.as_deref(), Some(IMAGE));
    assert_eq!(option.partition.as_deref(), Some(GUID));
}

#[test]
fn the_entry_is_kept_for_the_next_time_and_replaced_only_if_it_differs() {
    let laptop = Laptop::new();
    arm(&laptop.plan()).unwrap();
    let first = laptop.read("Boot0001").unwrap();
    let entry = laptop.tree.path(format!("{}/Boot0001-{GLOBAL}", variables::FOLDER));
    std::fs::File::open(&entry)
        .unwrap()
        .set_modified(SystemTime::UNIX_EPOCH)
        .unwrap();
    // The firmware has taken it.
    std::fs::remove_file(laptop.tree.path(format!("{}/BootNext-{GLOBAL}", variables::FOLDER))).unwrap();
    arm(&laptop.plan()).unwrap();
    assert_eq!(
        laptop.on_the_esp(),
        ["once.efi"],
        "it takes the place of one that is left over"
    );
    assert_eq!(laptop.read("Boot0001").unwrap(), first);
    let written = entry.metadata().unwrap().modified().unwrap();
    assert_eq!(written, SystemTime::UNIX_EPOCH, "it was not written again");
    // Another partition, after the disk was partitioned anew.
    laptop.put("/sys/devices/sda/sda1/start", "4096");
    arm(&laptop.plan()).unwrap();
    assert_ne!(laptop.read("Boot0001").unwrap(), first);
    assert_eq!(laptop.variables(), ["Boot0000", "Boot0001", "BootNext", "BootOrder"]);
}

#[test]
fn disarming_leaves_the_firmware_and_the_esp_as_they_were_but_for_the_entry() {
    let laptop = Laptop::new();
    let plan = laptop.plan();
    arm(&plan).unwrap();
    plan.disarm();
    drop(plan);
    assert!(!laptop.image().exists());
    assert_eq!(laptop.read("BootNext"), None);
    assert_eq!(sweep(laptop.dir.path(), true).unwrap(), Left::Nothing);
    assert_eq!(laptop.variables(), ["Boot0000", "BootOrder"]);
    assert!(!laptop.tree.path(format!("/boot/efi{FOLDER}")).exists());
    assert!(laptop.tree.path("/boot/efi/EFI/debian/grubx64.efi").exists());
}

#[test]
fn what_others_have_asked_of_the_firmware_stays() {
    let laptop = Laptop::new();
    laptop.variable("BootNext", &[7, 0, 0, 0, 0, 0]);
    assert_eq!(sweep(laptop.dir.path(), true).unwrap(), Left::Nothing);
    assert_eq!(laptop.read("BootNext").unwrap(), [7, 0, 0, 0, 0, 0]);
    assert_eq!(laptop.variables(), ["Boot0000", "BootNext", "BootOrder"]);
}

#[test]
fn a_firmware_that_keeps_bootnext_does_not_start_us_again() {
    let laptop = Laptop::new();
    arm(&laptop.plan()).unwrap();
    assert!(not_again(&laptop.tree).unwrap());
    assert_eq!(laptop.read("BootNext"), None);
    assert!(laptop.read("Boot0001").is_some(), "kept for the next time");
    assert!(!not_again(&laptop.tree).unwrap());
    laptop.variable("BootNext", &[7, 0, 0, 0, 0, 0]);
    assert!(!not_again(&laptop.tree).unwrap());
    assert!(laptop.read("BootNext").is_some(), "somebody else's");
}

#[test]
fn an_image_that_was_not_started_is_found_and_taken_away() {
    let laptop = Laptop::new();
    arm(&laptop.plan()).unwrap();
    laptop.put(&format!("/boot/efi{FOLDER}/once.new"), "cut off");
    assert_eq!(look(&laptop.tree), Left::Image(laptop.image()), "only looked at");
    assert_eq!(sweep(laptop.dir.path(), false).unwrap(), Left::Image(laptop.image()));
    assert_eq!(look(&laptop.tree), Left::Nothing);
    assert!(laptop.on_the_esp().is_empty());
    assert_eq!(laptop.read("BootNext"), None);
    assert!(laptop.read("Boot0001").is_some(), "kept for the next time");
}

#[test]
fn an_image_on_an_esp_that_is_not_mounted_any_more_is_told_of() {
    let laptop = Laptop::new();
    arm(&laptop.plan()).unwrap();
    let mounts = std::fs::read_to_string(laptop.tree.path("/proc/self/mountinfo")).unwrap();
    laptop.put("/proc/self/mountinfo", "22 1 8:2 / / rw - ext4 /dev/sda2 rw\n");
    let (esp, away) = (laptop.tree.path("/boot/efi"), laptop.tree.path("/away"));
    std::fs::rename(&esp, &away).unwrap();
    for _ in 0..2 {
        assert_eq!(
            sweep(laptop.dir.path(), false).unwrap(),
            Left::Unseen("/boot/efi".into())
        );
    }
    std::fs::rename(&away, &esp).unwrap();
    laptop.put("/proc/self/mountinfo", mounts);
    assert_eq!(sweep(laptop.dir.path(), false).unwrap(), Left::Image(laptop.image()));
    // The ramdisk has taken away what was started: that is nothing to tell.
    arm(&laptop.plan()).unwrap();
    std::fs::remove_file(laptop.image()).unwrap();
    assert_eq!(sweep(laptop.dir.path(), false).unwrap(), Left::Nothing);
}

#[test]
fn what_one_has_armed_another_neither_replaces_nor_takes_away() {
    let laptop = Laptop::new();
    let plan = laptop.plan();
    arm(&plan).unwrap();
    assert!(matches!(Turn::take(&laptop.tree), Err(RebootError::Busy)));
    assert!(sweep(laptop.dir.path(), false).is_err());
    assert!(laptop.image().exists() && laptop.read("BootNext").is_some());
    drop(plan);
    assert!(Turn::take(&laptop.tree).is_ok());
    laptop.plan().keep();
    assert!(sweep(laptop.dir.path(), false).is_err(), "the shutdown has begun");
}

#[test]
fn arming_that_fails_halfway_leaves_no_image() {
    let laptop = Laptop::new();
    // Nothing can be written where the firmware's variables are: a folder is in the way.
    std::fs::create_dir(laptop.tree.path(format!("{}/BootNext-{GLOBAL}", variables::FOLDER))).unwrap();
    assert!(matches!(arm(&laptop.plan()), Err(RebootError::Write { .. })));
    assert!(laptop.on_the_esp().is_empty());
}

#[test]
fn a_machine_that_cannot_be_left_so_is_refused_with_what_to_do() {
    let laptop = Laptop::new();
    assert!(check(&laptop.tree).is_ok());
    std::fs::remove_file(laptop.tree.path(DEFAULT_STUB)).unwrap();
    assert!(matches!(check(&laptop.tree), Err(RebootError::NoStub { .. })));
    laptop.variable("SecureBoot", &[6, 0, 0, 0, 0]);
    assert!(matches!(check(&laptop.tree), Err(RebootError::NoStub { .. })));
    laptop.variable("SecureBoot", &[6, 0, 0, 0, 1]);
    assert!(matches!(check(&laptop.tree), Err(RebootError::SecureBoot)));
    let bios = tempfile::tempdir().unwrap();
    assert!(matches!(check(&Tree::new(bios.path())), Err(RebootError::NoEfi)));
}

#[test]
fn an_esp_that_belongs_to_another_user_is_refused_before_a_key_is_written() {
    let point = Path::new("/boot/efi");
    let own = rustix::process::geteuid().as_raw();
    for owner in [0, own] {
        assert!(private(point, 0o100_600, owner).is_ok());
    }
    assert!(matches!(private(point, 0o100_640, 0), Err(RebootError::Open { .. })));
    let refused = private(point, 0o100_600, own + 1).unwrap_err().to_string();
    assert!(
        refused.contains("uid=") && refused.contains(&(own + 1).to_string()),
        "{refused}"
    );
    let laptop = Laptop::new();
    let folder = laptop.image().parent().unwrap().to_owned();
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::set_permissions(&folder, std::fs::Permissions::from_mode(0o775)).unwrap();
    assert!(matches!(arm(&laptop.plan()), Err(RebootError::Open { .. })));
    assert!(laptop.on_the_esp().is_empty());
    if own == 0 && std::os::unix::fs::chown(&folder, Some(12345), None).is_ok() {
        std::fs::set_permissions(&folder, std::fs::Permissions::from_mode(0o700)).unwrap();
        assert!(matches!(
            arm(&laptop.plan()),
            Err(RebootError::NotRoots { owner: 12345, .. })
        ));
    }
}

#[test]
fn an_esp_that_others_can_read_is_told_by_any_file_on_it() {
    let laptop = Laptop::new();
    let esp = esp::find(&laptop.tree, "sda").unwrap();
    let loader = laptop.tree.path("/boot/efi/EFI/debian/grubx64.efi");
    let mode = |mode| std::fs::set_permissions(&loader, std::fs::Permissions::from_mode(mode)).unwrap();
    mode(0o755);
    assert!(matches!(esp::closed(&laptop.tree, &esp), Err(RebootError::Open { .. })));
    mode(0o700);
    assert!(esp::closed(&laptop.tree, &esp).is_ok());
    std::fs::remove_file(&loader).unwrap();
    assert!(esp::closed(&laptop.tree, &esp).is_ok(), "the image itself will tell");
}

/// What this laptop would leave with.
fn collected(laptop: &Laptop) -> Collected {
    let payload = FoundPayload {
        kernel: laptop.tree.path("/boot/vmlinuz").into(),
        initrds: Vec::new(),
        cmdline: String::new(),
        version: "6.1".to_owned(),
        modules: PathBuf::new(),
        reason: String::new(),
        notes: Vec::new(),
    };
    collect::collected_in_tests(PathBuf::new(), PathBuf::new(), payload)
}

#[test]
fn what_cannot_work_is_told_before_the_countdown() {
    let laptop = Laptop::new();
    laptop.put("/boot/vmlinuz", "kernel");
    let loader = laptop.tree.path("/boot/efi/EFI/debian/grubx64.efi");
    let mode = |mode| std::fs::set_permissions(&loader, std::fs::Permissions::from_mode(mode)).unwrap();
    let foreseen = || foresee(laptop.dir.path(), &collected(&laptop));
    mode(0o700);
    assert!(foreseen().is_ok());
    mode(0o755);
    assert!(matches!(foreseen(), Err(RebootError::Open { .. })));
    mode(0o700);
    let mut large = collected(&laptop);
    large.manifest.ramdisk.bytes = u64::MAX / 2;
    assert!(matches!(
        foresee(laptop.dir.path(), &large),
        Err(RebootError::Space { .. })
    ));
    laptop.put("/proc/self/mountinfo", "22 1 8:2 / / rw - ext4 /dev/sda2 rw\n");
    assert!(matches!(foreseen(), Err(RebootError::NoEsp { .. })));
}

#[test]
fn a_reboot_that_would_start_a_loaded_kernel_is_refused() {
    let laptop = Laptop::new();
    laptop.put("/sys/kernel/kexec_loaded", "0\n");
    laptop.put("/etc/default/kexec", "# LOAD_KEXEC=true\nLOAD_KEXEC=true\n");
    assert!(check(&laptop.tree).is_ok(), "left over from kexec-tools that are gone");
    laptop.put("/usr/sbin/kexec", "");
    let refused = check(&laptop.tree).unwrap_err().to_string();
    assert!(refused.contains("/etc/default/kexec"), "{refused}");
    laptop.put("/etc/default/kexec", "# LOAD_KEXEC=true\nLOAD_KEXEC=false\n");
    assert!(check(&laptop.tree).is_ok());
    laptop.put("/sys/kernel/kexec_loaded", "1\n");
    let refused = check(&laptop.tree).unwrap_err().to_string();
    assert!(refused.contains("kexec --unload"), "{refused}");
}

#[test]
fn an_esp_without_room_is_refused_before_anything_is_written() {
    let laptop = Laptop::new();
    let esp = esp::find(&laptop.tree, "sda").unwrap();
    assert!(check_space(&laptop.tree, &esp, 1).is_ok());
    let much = check_space(&laptop.tree, &esp, u64::MAX / 2);
    assert!(matches!(much, Err(RebootError::Space { .. })));
    let found = rustix::fs::statvfs(laptop.dir.path()).unwrap();
    let free = found.f_bavail * found.f_frsize;
    assert!(room(free, free - SPARE).is_none());
    assert_eq!(room(0, 1), Some(5));
}
