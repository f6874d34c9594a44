//! Stick images, looked at with our own readers and, where they are installed, with other people's.

use super::*;
use crate::testing::tool;
use crate::uki::tests::tiny_pe;
use hadris_fat::FatVolume;
use std::io::{Cursor, Read};
use std::os::unix::fs::PermissionsExt;

const AMD64: u16 = 0x8664;

fn handover() -> Zeroizing<Vec<u8>> {
    let mut writer = cpio::Writer::new(Vec::new());
    writer.file("stiefel/key", 0o600, b"secret key of the stick").unwrap();
    Zeroizing::new(writer.finish().unwrap())
}

/// Inputs in a folder; the ramdisk is random enough to fill some clusters.
fn options(dir: &Path) -> StickOptions {
    let put = |name: &str, bytes: &[u8]| {
        let path = dir.join(name);
        fs::write(&path, bytes).unwrap();
        path
    };
    let noise: Vec<u8> = (0_u32..300_000)
        .flat_map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes())
        .collect();
    let ramdisk = [&ZSTD_MAGIC[..], &noise, b"!"].concat();
    StickOptions {
        kernel: put("kernel", &tiny_pe(AMD64, 512)),
        ramdisk: put("ramdisk", &ramdisk),
        handover: handover(),
        cmdline: "quiet stiefel".to_owned(),
        stub: Some(put("stub", &tiny_pe(AMD64, 1024))),
    }
}

fn image(dir: &Path) -> (PathBuf, StickReport) {
    let path = dir.join("stick.img");
    let report = write_image(&options(dir), &path, false, &mut |_, _| {}).unwrap();
    (path, report)
}

/// The file system's bytes, by the partition table.
fn partition(path: &Path) -> Vec<u8> {
    let mut file = File::open(path).unwrap();
    let table = GPT::find_from(&mut file).unwrap();
    let bytes = table.get_partition_byte_range(1).unwrap();
    let mut partition = vec![0; usize::try_from(bytes.end() - bytes.start() + 1).unwrap()];
    file.read_exact_at(&mut partition, *bytes.start()).unwrap();
    partition
}

fn program_in(partition: Vec<u8>) -> Vec<u8> {
    let volume = FatVolume::open(Cursor::new(partition)).unwrap();
    let mut program = Vec::new();
    let mut reader = volume.open_file_path("EFI/BOOT/BOOTX64.EFI").unwrap();
    let mut buffer = [0; 4096];
    loop {
        match reader.read(&mut buffer).unwrap() {
            0 => return program,
            len => program.extend_from_slice(&buffer[..len]),
        }
    }
}

#[test]
fn image_holds_kernel_ramdisk_handover_and_command_line_in_one_program() {
    let dir = tempfile::tempdir().unwrap();
    let (path, report) = image(dir.path());
    let program = program_in(partition(&path));
    assert_eq!(program.len() as u64, report.program_bytes);
    let sections = uki::sections(&program).unwrap();
    let data = |name: &str| sections.iter().find(|section| section.name == name).unwrap().data;
    assert_eq!(data(".cmdline"), b"quiet stiefel");
    assert_eq!(data(".linux"), tiny_pe(AMD64, 512));
    let ramdisk = fs::read(dir.path().join("ramdisk")).unwrap();
    let initrd = data(".initrd");
    let second = ramdisk.len().next_multiple_of(4);
    assert_eq!(initrd[..ramdisk.len()], ramdisk);
    assert_eq!(initrd[second..], handover()[..]);
}

#[test]
fn image_is_a_gpt_disk_with_one_aligned_efi_partition_for_its_owner_only() {
    let dir = tempfile::tempdir().unwrap();
    let (path, report) = image(dir.path());
    let metadata = fs::metadata(&path).unwrap();
    assert_eq!(metadata.permissions().mode() & 0o777, 0o600);
    assert_eq!(metadata.len(), report.bytes);
    let mut file = File::open(&path).unwrap();
    let table = GPT::find_from(&mut file).unwrap();
    assert_eq!(table.iter().filter(|(_, entry)| entry.is_used()).count(), 1);
    let entry = &table[1];
    assert_eq!(entry.partition_type_guid, ESP_TYPE);
    assert_eq!(entry.partition_name.as_str(), "stiefel");
    assert_eq!(entry.starting_lba, 2048);
    assert!(entry.ending_lba <= table.header.last_usable_lba);
    let mut mbr = [0; 512];
    file.seek(SeekFrom::Start(0)).unwrap();
    file.read_exact(&mut mbr).unwrap();
    assert_eq!((mbr[450], &mbr[510..]), (0xee, &[0x55, 0xaa][..]));
    assert!(
        mbr[..440].iter().all(|byte| *byte == 0),
        "the boot code's place stays free"
    );
}

#[test]
fn the_program_alone_is_the_one_on_the_stick() {
    let dir = tempfile::tempdir().unwrap();
    let (image, _) = image(dir.path());
    let path = dir.path().join("target.efi");
    let mut steps = Vec::new();
    let report = write_program(&options(dir.path()), &path, false, &mut |done, total| {
        steps.push((done, total))
    })
    .unwrap();
    let program = fs::read(&path).unwrap();
    assert!(program == program_in(partition(&image)), "another program");
    assert_eq!(
        (report.bytes, report.program_bytes),
        (program.len() as u64, program.len() as u64)
    );
    assert_eq!(steps.last(), Some(&(report.bytes, report.bytes)));
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    // Whole or not there, and kept unless it may be replaced.
    let again = write_program(&options(dir.path()), &path, false, &mut |_, _| {});
    assert!(matches!(again, Err(StickError::Exists { .. })), "{again:?}");
    write_program(&options(dir.path()), &path, true, &mut |_, _| {}).unwrap();
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 5);
}

#[test]
fn existing_file_is_kept_unless_overwriting_is_allowed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("stick.img");
    fs::write(&path, "precious").unwrap();
    let options = options(dir.path());
    let error = write_image(&options, &path, false, &mut |_, _| {}).unwrap_err();
    assert!(matches!(error, StickError::Exists { .. }), "{error}");
    assert_eq!(fs::read(&path).unwrap(), b"precious");
    let report = write_image(&options, &path, true, &mut |_, _| {}).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().len(), report.bytes);
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
}

#[test]
fn no_file_takes_the_place_of_a_device() {
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path());
    let write = |path: &Path, overwrite| write_image(&options, path, overwrite, &mut |_, _| {}).unwrap_err();
    let absent = Path::new("/dev/stiefel-absent-disk");
    for overwrite in [false, true] {
        let error = write(absent, overwrite);
        assert!(matches!(error, StickError::NoSuchDevice { .. }), "{error}");
        assert!(error.to_string().contains("plugged in"), "{error}");
        assert!(matches!(
            write(Path::new("/dev/null"), overwrite),
            StickError::NotAFile { .. }
        ));
        assert!(matches!(write(dir.path(), overwrite), StickError::NotAFile { .. }));
    }
    // By a way that does not look like /dev.
    let link = dir.path().join("devices");
    std::os::unix::fs::symlink("/dev", &link).unwrap();
    let error = write(&link.join("stiefel-absent-disk"), true);
    assert!(matches!(error, StickError::NoSuchDevice { .. }), "{error}");
    assert!(!absent.exists());
}

#[test]
fn wrong_inputs_are_refused_and_leave_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let out = tempfile::tempdir().unwrap();
    let refused = |options: StickOptions| {
        let error = write_image(&options, &out.path().join("stick.img"), false, &mut |_, _| {}).unwrap_err();
        assert_eq!(fs::read_dir(out.path()).unwrap().count(), 0, "{error}");
        error
    };
    let mut wrong = options(dir.path());
    wrong.handover = Zeroizing::new(b"no archive".to_vec());
    assert!(matches!(refused(wrong), StickError::BadHandover { .. }));
    let mut wrong = options(dir.path());
    wrong.ramdisk.clone_from(&wrong.kernel);
    assert!(matches!(refused(wrong), StickError::NotARamdisk { .. }));
    let mut wrong = options(dir.path());
    wrong.stub = Some(dir.path().join("absent"));
    let error = refused(wrong).to_string();
    assert!(error.contains("systemd-boot-efi"), "{error}");
    let mut wrong = options(dir.path());
    wrong.cmdline = "a\nb".to_owned();
    assert!(matches!(refused(wrong), StickError::Uki(UkiError::BadCommandLine)));
}

#[test]
fn disks_with_large_sectors_get_a_file_system_that_reads_back() {
    let program = tiny_pe(AMD64, 512);
    let image = esp::build(&program, "BOOTX64.EFI", esp::Sector::S4096, 1).unwrap();
    assert_eq!(program_in(image.to_vec()), program);
    fsck(&image);
}

#[test]
fn a_file_and_a_character_device_are_no_sticks() {
    let file = tempfile::NamedTempFile::new().unwrap();
    for path in [file.path(), Path::new("/dev/null")] {
        assert!(matches!(describe(path), Err(DeviceError::NotABlockDevice { .. })));
    }
    assert_eq!(file.as_file().metadata().unwrap().len(), 0);
}

/// fsck.fat finds nothing to complain of, if it is installed.
fn fsck(image: &[u8]) {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(image).unwrap();
    let Some(mut command) = tool("fsck.fat") else {
        return;
    };
    let output = command.arg("-n").arg("-v").arg(file.path()).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}");
    assert!(!text.contains("differ") && !text.contains("rong"), "{text}");
}

#[test]
fn other_programs_agree() {
    let dir = tempfile::tempdir().unwrap();
    let (path, report) = image(dir.path());
    fsck(&partition(&path));
    if let Some(mut command) = tool("sgdisk") {
        let output = command.arg("-v").arg(&path).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(text.contains("No problems found"), "{text}");
    }
    let place = format!("{}@@1M", path.display());
    if let Some(mut command) = tool("mtype") {
        let output = command
            .args(["-i", &place, "::/EFI/BOOT/BOOTX64.EFI"])
            .output()
            .unwrap();
        assert_eq!(
            output.stdout.len() as u64,
            report.program_bytes,
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
}

#[test]
fn what_is_replaced_is_wiped_unless_it_has_another_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("target.efi");
    let replace = || create(&path, true, |file, failed| file.write_all(b"new").map_err(failed)).unwrap();
    fs::write(&path, [7; 10_000]).unwrap();
    let mut open = File::open(&path).unwrap();
    replace();
    let mut left = Vec::new();
    open.read_to_end(&mut left).unwrap();
    assert_eq!((left, fs::read(&path).unwrap()), (vec![0; 10_000], b"new".to_vec()));
    let other = dir.path().join("other");
    fs::hard_link(&path, &other).unwrap();
    replace();
    assert_eq!(fs::read(&other).unwrap(), b"new");
    // A link that was put there meanwhile.
    fs::remove_file(&path).unwrap();
    std::os::unix::fs::symlink(&other, &path).unwrap();
    assert!(create(&path, true, |_, _| Ok(())).is_err());
    assert_eq!(fs::read(&other).unwrap(), b"new");
}

#[test]
fn a_file_that_others_can_read_is_told() {
    let dir = tempfile::tempdir().unwrap();
    assert!(!create(&dir.path().join("private"), false, |_, _| Ok(())).unwrap());
    // As on FAT, which has one mode for all files.
    let as_on_fat = |file: &mut File, failed: &dyn Fn(io::Error) -> StickError| {
        file.set_permissions(fs::Permissions::from_mode(0o755)).map_err(failed)
    };
    assert!(create(&dir.path().join("on-fat"), false, as_on_fat).unwrap());
}
