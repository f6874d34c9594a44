//! The image: a GPT with one ext4 root file system, made from an installed system and a test's files.
//!
//! mkfs fills the file system from a directory and comes first: at an offset it wipes the beginning of the image, where
//! the partition table then goes. Without root, fakeroot lets the files belong to root.
//!
//! Other layouts come from the `workshop`; into them no file can be put from outside, so a test's files come as an archive on
//! a second disk, which the laptop unpacks at its first start.

use std::fs::{self, File};
use std::io::{BufWriter, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use super::overlay::Overlay;
use super::workshop::{self, LAID_OUT_FS_UUID};
use super::{BaseSystem, DiskError, ExtraFile, Installed, Layout, System, command_error, grub, inspect, io_error};
use crate::accel::kernel_cmdline;
use crate::vm::{Boot, Content, Drive};
use crate::{process, tools};

/// The password of root.
pub const PASSWORD: &str = "stiefel";
/// The disk's GUID in its partition table.
pub const DISK_GUID: &str = "57AEFE1D-0000-4000-8000-000000000001";
/// The root partition's own GUID.
pub const ROOT_PARTUUID: &str = "57aefe1d-0000-4000-8000-000000000002";
/// The UUID of the root file system.
pub const ROOT_FS_UUID: &str = "57aefe1d-0000-4000-8000-000000000003";

/// Where the root partition begins, in bytes.
pub const ROOT_OFFSET: u64 = 1 << 20;
/// What the partition table takes at the end of the disk, in bytes, rounded up.
pub(super) const TABLE_AT_END: u64 = 1 << 20;
/// The serial number of the disk with a test's files.
const FILES_SERIAL: &str = "stiefel-files";

/// Makes the directory ($1) from the archives ($2, $3), and of it the file system in the image ($4) with the UUID $5, at the
/// offset $6, $7 KiB long. One program, as fakeroot remembers owners no longer than that. Devices are the kernel's to make.
const MAKE_FILE_SYSTEM: &str = "
    mkdir \"$1\"
    tar --numeric-owner -C \"$1\" --exclude='./dev/*' -xpf \"$2\"
    tar --numeric-owner -C \"$1\" -xpf \"$3\"
    mkfs.ext4 -q -F -O ^orphan_file -L laptop -U \"$5\" -E offset=\"$6\" -d \"$1\" \"$4\" \"$7\"k
    rm -rf \"$1\"
";

/// A laptop's disk.
#[derive(Clone, Debug)]
pub struct LaptopDisk {
    /// The image.
    pub path: PathBuf,
    /// The kernel on it, as files on the host.
    pub installed: Installed,
    base: BaseSystem,
    layout: Layout,
    /// The archive that the laptop has to unpack.
    files: Option<PathBuf>,
}

/// A disk to be made.
#[derive(Clone, Debug)]
pub struct LaptopDiskBuilder {
    base: BaseSystem,
    layout: Layout,
    size_mib: u32,
    hostname: String,
    autologin: bool,
    files: Vec<ExtraFile>,
    units: Vec<(String, String)>,
}

impl LaptopDisk {
    /// A disk with the system `base`, 1.4 GB large.
    pub fn builder(base: &BaseSystem) -> LaptopDiskBuilder {
        LaptopDiskBuilder {
            base: base.clone(),
            layout: Layout::Ext4,
            size_mib: 1400,
            hostname: "laptop".to_owned(),
            autologin: false,
            files: Vec::new(),
            units: Vec::new(),
        }
    }

    /// A disk with this system; what it is made of comes from the cache, or is made.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn of(system: &System) -> Result<LaptopDiskBuilder, DiskError> {
        let mut builder = Self::builder(&BaseSystem::ensure(&system.base())?);
        builder.layout = system.layout;
        Ok(builder)
    }

    /// Boots the disk's own kernel and initrd directly (there is no bootloader on it), with `args` on the command line.
    ///
    /// A reboot of the machine boots the same again.
    pub fn boot(&self, args: &[&str]) -> Boot {
        let root = match self.layout {
            Layout::Ext4 => format!("root=UUID={ROOT_FS_UUID}"),
            Layout::Xfs => format!("root=UUID={LAID_OUT_FS_UUID}"),
            Layout::Btrfs => format!("root=UUID={LAID_OUT_FS_UUID} rootflags=subvol=@"),
            Layout::LuksLvm => "root=/dev/mapper/laptop--vg-root".to_owned(),
        };
        Boot::Kernel {
            kernel: self.installed.kernel.clone(),
            initrd: vec![Content::File(self.installed.initrd.clone())],
            cmdline: kernel_cmdline(&[&[root.as_str(), "ro"], args].concat()),
        }
    }

    /// The disk in a machine, with the serial number `stiefel-laptop`.
    pub fn drive(&self) -> Drive {
        Drive {
            path: self.path.clone(),
            serial: "stiefel-laptop".to_owned(),
            snapshot: false,
        }
    }

    /// The disk with the test's files, where the laptop has to unpack them with [`Self::UNPACK`] at its first start.
    pub fn files(&self) -> Option<Drive> {
        let path = self.files.clone()?;
        Some(Drive {
            path,
            serial: FILES_SERIAL.to_owned(),
            snapshot: true,
        })
    }

    /// See [`Self::files`].
    pub const UNPACK: &str = "tar -xpf /dev/disk/by-id/virtio-stiefel-files -C / && systemctl daemon-reload";

    /// Whether whoever boots from it is asked for a passphrase, which is [`PASSWORD`].
    pub fn is_locked(&self) -> bool {
        self.layout == Layout::LuksLvm
    }

    /// The archive of the installed system, without the test's files.
    pub fn archive(&self) -> &Path {
        self.base.archive()
    }

    /// Demands that the file systems are clean and their journals empty.
    ///
    /// # Errors
    /// When one is not.
    pub fn fsck_clean(&self) -> Result<(), DiskError> {
        match self.layout {
            Layout::Ext4 => inspect::fsck_clean(&self.path),
            _ => workshop::fsck_clean(&self.base, self.layout, &self.path),
        }
    }

    /// Reads a file on a disk with [`Layout::Ext4`], while no machine runs from it.
    ///
    /// # Errors
    /// When there is no such file.
    pub fn read_file(&self, path: &str) -> Result<Vec<u8>, DiskError> {
        inspect::read_file(&self.path, path)
    }

    /// As [`Self::boot`], with the initrd that is on the disk now, while no machine runs from it. Not with [`Layout::Btrfs`].
    ///
    /// # Errors
    /// When there is none.
    pub fn boot_its_own_initrd(&self, args: &[&str]) -> Result<Boot, DiskError> {
        let mut boot = self.boot(args);
        if let Boot::Kernel { initrd, .. } = &mut boot {
            // Only with an ext4 is /boot in the root file system; else it is the first partition.
            let folder = if self.layout == Layout::Ext4 { "/boot" } else { "" };
            let path = format!("{folder}/initrd.img-{}", self.installed.version);
            *initrd = vec![Content::Bytes(inspect::read_file(&self.path, &path)?)];
        }
        Ok(boot)
    }

    /// The version of its kernel.
    pub fn kernel_version(&self) -> &str {
        &self.installed.version
    }
}

impl LaptopDiskBuilder {
    /// The size of the root file system in MiB; the disk is 2 MiB larger.
    pub fn size_mib(mut self, size_mib: u32) -> Self {
        self.size_mib = size_mib;
        self
    }

    /// The machine's name, instead of `laptop`.
    pub fn hostname(mut self, name: &str) -> Self {
        self.hostname = name.to_owned();
        self
    }

    /// Whether root is logged in on the serial console without a password.
    pub fn autologin(mut self, autologin: bool) -> Self {
        self.autologin = autologin;
        self
    }

    /// Adds or replaces a file.
    pub fn file(mut self, file: ExtraFile) -> Self {
        self.files.push(file);
        self
    }

    /// Enables a unit: `wanted_by` (as `multi-user.target`) pulls it in.
    pub fn enable(mut self, unit: &str, wanted_by: &str) -> Self {
        self.units.push((unit.to_owned(), wanted_by.to_owned()));
        self
    }

    /// Makes the image at `path`; one that is there is replaced.
    ///
    /// # Errors
    /// When a tool fails, a file cannot be read, or the file system is too small.
    pub fn build(self, path: &Path) -> Result<LaptopDisk, DiskError> {
        if self.layout != Layout::Ext4 {
            return self.build_laid_out(path);
        }
        let installed = self.base.extract_kernel()?;
        let directory = path.parent().unwrap_or(Path::new("."));
        let work = tempfile::Builder::new()
            .prefix(".stiefel-disk-")
            .tempdir_in(directory)
            .map_err(io_error("create a directory in", directory))?;
        let overlay = work.path().join("overlay.tar");
        self.write_overlay(&overlay, &installed.version)?;

        let image = work.path().join("image");
        let length = ROOT_OFFSET + u64::from(self.size_mib) * (1 << 20) + TABLE_AT_END;
        File::create(&image)
            .and_then(|file| file.set_len(length))
            .map_err(io_error("create", &image))?;
        self.make_file_system(work.path(), &overlay, &image)?;
        make_table(&image, &[self.size_mib])?;
        fs::rename(&image, path).map_err(io_error("create", path))?;
        Ok(LaptopDisk {
            path: path.to_owned(),
            installed,
            base: self.base,
            layout: self.layout,
            files: None,
        })
    }

    /// A copy of what the workshop has made.
    fn build_laid_out(self, path: &Path) -> Result<LaptopDisk, DiskError> {
        let installed = self.base.extract_kernel()?;
        let image = workshop::lay_out(&self.base, self.layout)?;
        workshop::copy(&image, path)?;
        let files = path.with_extension("files.tar");
        let mut overlay = create_overlay(&files)?;
        self.add_files(&mut overlay)?;
        overlay.finish().map_err(io_error("write", &files))?;
        Ok(LaptopDisk {
            path: path.to_owned(),
            installed,
            base: self.base,
            layout: self.layout,
            files: Some(files),
        })
    }

    fn write_overlay(&self, path: &Path, version: &str) -> Result<(), DiskError> {
        let mut overlay = create_overlay(path)?;
        overlay.text("/etc/hostname", &format!("{}\n", self.hostname))?;
        overlay.text(
            "/etc/hosts",
            &format!("127.0.0.1 localhost\n127.0.1.1 {}\n::1 localhost\n", self.hostname),
        )?;
        overlay.text(
            "/etc/fstab",
            &format!("UUID={ROOT_FS_UUID} / ext4 errors=remount-ro 0 1\n"),
        )?;
        overlay.text("/etc/default/locale", "LANG=C\n")?;
        let args = format!("console=tty0 {}", kernel_cmdline(&[]));
        overlay.text("/boot/grub/grub.cfg", &grub::config(version, ROOT_FS_UUID, &args))?;
        if self.autologin {
            overlay.text(
                "/etc/systemd/system/serial-getty@ttyS0.service.d/autologin.conf",
                "[Service]\nExecStart=\nExecStart=-/sbin/agetty --autologin root --keep-baud 115200 - $TERM\n",
            )?;
        }
        self.add_files(&mut overlay)?;
        overlay.finish().map_err(io_error("write", path))
    }

    fn add_files(&self, overlay: &mut Overlay<BufWriter<File>>) -> Result<(), DiskError> {
        for file in &self.files {
            overlay.file(file)?;
        }
        for (unit, wanted_by) in &self.units {
            let link = format!("/etc/systemd/system/{wanted_by}.wants/{unit}");
            overlay.link(&link, &self.unit_path(unit))?;
        }
        Ok(())
    }

    /// Where a unit's file is: among the files added, else where packages put them.
    fn unit_path(&self, unit: &str) -> String {
        let own = self
            .files
            .iter()
            .map(|file| file.path.as_str())
            .find(|path| path.ends_with(&format!("/{unit}")));
        own.map_or_else(|| format!("/lib/systemd/system/{unit}"), str::to_owned)
    }

    fn make_file_system(&self, work: &Path, overlay: &Path, image: &Path) -> Result<(), DiskError> {
        const ACTION: &str = "make the laptop's file system";
        let mut command = if tools::is_root() {
            process::command("sh").map_err(command_error(ACTION))?
        } else {
            let mut fakeroot = process::command("fakeroot").map_err(command_error(ACTION))?;
            fakeroot.args(["--", "sh"]);
            fakeroot
        };
        // An ordinary user's PATH may lack mkfs.
        let path = std::env::var("PATH").unwrap_or_default();
        command
            .env("PATH", format!("{path}:/usr/sbin:/sbin:/usr/bin:/bin"))
            .args(["-e", "-c", MAKE_FILE_SYSTEM, "sh"]);
        command
            .arg(work.join("tree"))
            .arg(self.base.archive())
            .arg(overlay)
            .arg(image);
        command.args([
            ROOT_FS_UUID,
            &ROOT_OFFSET.to_string(),
            &(u64::from(self.size_mib) * 1024).to_string(),
        ]);
        process::run(&mut command).map(drop).map_err(command_error(ACTION))
    }
}

fn create_overlay(path: &Path) -> Result<Overlay<BufWriter<File>>, DiskError> {
    let file = File::create(path).map_err(io_error("create", path))?;
    Ok(Overlay::new(BufWriter::new(file)))
}

/// One partition after the other, so many MiB each; the first one at [`ROOT_OFFSET`] and with [`ROOT_PARTUUID`].
pub(super) fn make_table(image: &Path, sizes: &[u32]) -> Result<(), DiskError> {
    const ACTION: &str = "make the partition table";
    let mut command = process::command("sgdisk").map_err(command_error(ACTION))?;
    command.args(["--clear", &format!("--disk-guid={DISK_GUID}")]);
    let mut start = ROOT_OFFSET / 512;
    for (number, size_mib) in (1..).zip(sizes) {
        command.arg(format!("--new={number}:{start}:+{size_mib}M"));
        start += u64::from(*size_mib) << 11;
    }
    command
        .args([
            "--typecode=1:8300",
            &format!("--partition-guid=1:{ROOT_PARTUUID}"),
            "--change-name=1:laptop-root",
        ])
        .arg(image);
    process::run(&mut command).map(drop).map_err(command_error(ACTION))
}

/// Makes a disk without a system at `path`: a GPT with random GUIDs and one partition at [`ROOT_OFFSET`], in it an ext4 with
/// the UUID `fs_uuid`, or nothing.
///
/// # Errors
/// When a tool fails.
pub fn plain_disk(path: &Path, size_mib: u32, fs_uuid: Option<&str>) -> Result<(), DiskError> {
    const ACTION: &str = "make a disk";
    File::create(path)
        .and_then(|file| file.set_len(u64::from(size_mib) << 20))
        .map_err(io_error("create", path))?;
    let partition = size_mib.saturating_sub(2);
    if let Some(uuid) = fs_uuid {
        let mut command = process::command("mkfs.ext4").map_err(command_error(ACTION))?;
        command.args(["-q", "-F", "-U", uuid, "-E", &format!("offset={ROOT_OFFSET}")]);
        command.arg(path).arg(format!("{partition}M"));
        process::run(&mut command).map_err(command_error(ACTION))?;
    }
    let mut command = process::command("sgdisk").map_err(command_error(ACTION))?;
    command.args(["--clear", &format!("--new=1:{}:+{partition}M", ROOT_OFFSET / 512)]);
    process::run(command.arg(path)).map(drop).map_err(command_error(ACTION))
}

/// Makes an ext4 of `size_mib` at `to`, with the files of `folder`.
///
/// # Errors
/// When the tool fails.
pub fn ext4_of(folder: &Path, to: &Path, size_mib: u32) -> Result<(), DiskError> {
    const ACTION: &str = "make a file system";
    let mut command = process::command("mkfs.ext4").map_err(command_error(ACTION))?;
    command.args(["-q", "-F", "-d"]).arg(folder).arg(to);
    let made = process::run(command.arg(format!("{size_mib}M")));
    made.map(drop).map_err(command_error(ACTION))
}

/// Makes a FAT32 of `size_mib` at `to`, in which the firmware finds `program`: an EFI system partition.
///
/// # Errors
/// When a tool fails.
pub fn esp_of(program: &Path, to: &Path, size_mib: u32) -> Result<(), DiskError> {
    const ACTION: &str = "make an EFI system partition";
    let run = |tool: &str, args: &[&str], file: Option<&Path>| {
        let mut command = process::command(tool).map_err(command_error(ACTION))?;
        command
            .arg("-i")
            .arg(to)
            .args(args.iter().take(args.len() - 1))
            .args(file);
        command.args(args.last());
        process::run(&mut command).map(drop).map_err(command_error(ACTION))
    };
    let sectors = (u64::from(size_mib) << 11).to_string();
    run("mformat", &["-C", "-F", "-T", &sectors, "-v", "ESP", "::"], None)?;
    run("mmd", &["::/EFI", "::/EFI/BOOT"], None)?;
    run("mcopy", &["::/EFI/BOOT/BOOTX64.EFI"], Some(program))
}

/// Adds a partition with this content (whole MiB) to a disk's image, behind its others; where it begins, in bytes. `kind` is sgdisk's
/// code for its type.
///
/// # Errors
/// When a tool fails.
pub fn add_partition(image: &Path, number: u32, content: &Path, kind: &str) -> Result<u64, DiskError> {
    const ACTION: &str = "add a partition";
    let length = |path: &Path| Ok::<_, DiskError>(fs::metadata(path).map_err(io_error("look at", path))?.len());
    let start = length(image)?.next_multiple_of(TABLE_AT_END);
    let bytes = length(content)?;
    let copy = || {
        let mut to = File::options().write(true).open(image)?;
        to.set_len(start + bytes.next_multiple_of(TABLE_AT_END) + TABLE_AT_END)?;
        to.seek(SeekFrom::Start(start))?;
        std::io::copy(&mut File::open(content)?, &mut to).map(drop)
    };
    copy().map_err(io_error("fill", image))?;
    let mut command = process::command("sgdisk").map_err(command_error(ACTION))?;
    command.arg("--move-second-header");
    command.arg(format!("--new={number}:{}:{}", start / 512, (start + bytes) / 512 - 1));
    command.arg(format!("--typecode={number}:{kind}"));
    process::run(command.arg(image)).map_err(command_error(ACTION))?;
    Ok(start)
}
