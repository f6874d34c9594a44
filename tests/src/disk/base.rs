//! The installed system: Debian by mmdebstrap, kept as a tar archive in the cache.
//!
//! The cache's key is the release, the packages and the week: a test's system is never older than a week.

use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::{DiskError, PASSWORD, command_error, io_error};
use crate::{cache, process};

/// Raised when something below changes what is made, so that old caches are not used.
const RECIPE: u32 = 1;

const PACKAGES: [&str; 11] = [
    "systemd-sysv",
    "udev",
    "dbus",
    "kmod",
    "initramfs-tools",
    "linux-image-amd64",
    "iproute2",
    "e2fsprogs",
    "procps",
    // What stiefel's package recommends: a stick can be written there.
    "systemd-boot-efi",
    // A firewall, which nobody has switched on.
    "nftables",
];

/// What no test looks at, and what only takes time and room.
const LEFT_OUT: [&str; 13] = [
    "/usr/share/doc/*",
    "/usr/share/man/*",
    "/usr/share/info/*",
    "/usr/share/locale/*",
    "/usr/share/zoneinfo/*",
    "/lib/modules/*/kernel/drivers/gpu/drm/amd/*",
    "/lib/modules/*/kernel/drivers/gpu/drm/i915/*",
    "/lib/modules/*/kernel/drivers/gpu/drm/nouveau/*",
    "/lib/modules/*/kernel/drivers/gpu/drm/radeon/*",
    "/lib/modules/*/kernel/drivers/media/*",
    "/lib/modules/*/kernel/drivers/net/wireless/*",
    "/lib/modules/*/kernel/lib/test_bpf.ko*",
    "/lib/modules/*/kernel/sound/*",
];

/// What shall be installed.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct BaseOptions {
    /// Debian's release.
    pub suite: String,
    /// The packages besides the required ones.
    pub packages: Vec<String>,
    /// What /etc/crypttab says, for an initrd (by initramfs-tools) that asks for passphrases.
    pub crypttab: Option<String>,
}

impl Default for BaseOptions {
    /// Debian 12 with systemd, a kernel and little more.
    fn default() -> Self {
        Self {
            suite: "bookworm".to_owned(),
            packages: PACKAGES.map(str::to_owned).to_vec(),
            crypttab: None,
        }
    }
}

impl BaseOptions {
    /// One more package.
    pub fn package(mut self, name: &str) -> Self {
        self.packages.push(name.to_owned());
        self
    }

    /// The release and everything else that decides what is made.
    fn key(&self) -> String {
        let mut hasher = DefaultHasher::new();
        (self, RECIPE, LEFT_OUT).hash(&mut hasher);
        format!("{}-{:016x}", self.suite, hasher.finish())
    }
}

/// An installed system, not yet on a disk.
#[derive(Clone, Debug)]
pub struct BaseSystem {
    archive: PathBuf,
}

/// A system's kernel and what belongs to it, unpacked on the host. Read only: it is shared by all tests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Installed {
    /// The kernel's release, as `6.1.0-56-amd64`.
    pub version: String,
    /// The kernel.
    pub kernel: PathBuf,
    /// The distribution's own initrd.
    pub initrd: PathBuf,
    /// The directory with `modules.dep`.
    pub modules: PathBuf,
    /// The directory that stands for `/`: has `boot` and `lib/modules`.
    pub root: PathBuf,
}

impl BaseSystem {
    /// Takes the system from the cache, or makes it: about two minutes, with the network.
    ///
    /// # Errors
    /// When mmdebstrap fails, or the cache cannot be written.
    pub fn ensure(options: &BaseOptions) -> Result<Self, DiskError> {
        let cache = cache::dir().map_err(io_error("make the directory", "~/.cache/stiefel"))?;
        let key = options.key();
        let name = format!("debian-{key}-{}", cache::week(SystemTime::now()));
        let archive = cache.join(format!("{name}.tar"));
        // Another test may be making the same one: wait for it.
        let lock = cache.join("debian.lock");
        let lock_file = File::create(&lock).map_err(io_error("create", &lock))?;
        lock_file.lock().map_err(io_error("lock", &lock))?;
        if !archive.exists() {
            let part = cache.join(format!("{name}.part"));
            let made = mmdebstrap(options, &part);
            if let Err(error) = made {
                let _ = fs::remove_file(&part);
                return Err(error);
            }
            fs::rename(&part, &archive).map_err(io_error("rename", &part))?;
            forget_older(&cache, &key, &name);
        }
        Ok(Self { archive })
    }

    /// The archive.
    pub fn archive(&self) -> &Path {
        &self.archive
    }

    /// Unpacks the kernel, its initrd and its modules on the host, if that was not done before.
    ///
    /// # Errors
    /// When the archive cannot be unpacked or has no kernel.
    pub fn extract_kernel(&self) -> Result<Installed, DiskError> {
        let root = self.archive.with_extension("kernel");
        if !root.exists() {
            let parent = self.archive.parent().unwrap_or(Path::new("/"));
            let part = tempfile::tempdir_in(parent).map_err(io_error("create a directory in", parent))?;
            self.unpack_kernel(part.path())?;
            let part = part.keep();
            // Another test may have been faster.
            if fs::rename(&part, &root).is_err() {
                let _ = fs::remove_dir_all(&part);
            }
        }
        self.installed(root)
    }

    fn unpack_kernel(&self, to: &Path) -> Result<(), DiskError> {
        let mut tar = process::command("tar").map_err(command_error("unpack the kernel"))?;
        tar.arg("-xf").arg(&self.archive).arg("-C").arg(to).args([
            "--no-same-owner",
            "--wildcards",
            "./boot/*",
            "./usr/lib/modules/*",
        ]);
        process::run(&mut tar).map_err(command_error("unpack the kernel"))?;
        std::os::unix::fs::symlink("usr/lib", to.join("lib")).map_err(io_error("link", to))
    }

    fn installed(&self, root: PathBuf) -> Result<Installed, DiskError> {
        let missing = |what| DiskError::Base {
            base: self.archive.clone(),
            what,
        };
        let boot = root.join("boot");
        let version = fs::read_dir(&boot)
            .map_err(io_error("list", &boot))?
            .filter_map(|entry| Some(entry.ok()?.file_name().to_str()?.strip_prefix("vmlinuz-")?.to_owned()))
            .max()
            .ok_or_else(|| missing("kernel"))?;
        let installed = Installed {
            kernel: boot.join(format!("vmlinuz-{version}")),
            initrd: boot.join(format!("initrd.img-{version}")),
            modules: root.join("lib/modules").join(&version),
            root,
            version,
        };
        if !installed.initrd.is_file() {
            return Err(missing("initrd for its kernel"));
        }
        if !installed.modules.join("modules.dep").is_file() {
            return Err(missing("modules for its kernel"));
        }
        Ok(installed)
    }
}

/// Mode auto: as root in a chroot, else in a user namespace (package uidmap).
fn mmdebstrap(options: &BaseOptions, archive: &Path) -> Result<(), DiskError> {
    const ACTION: &str = "install Debian for the laptop's disk";
    eprintln!(
        "Installing Debian ({}) for the laptop's disk; about two minutes, once a week.",
        options.suite
    );
    let mut command = process::command("mmdebstrap").map_err(command_error(ACTION))?;
    command.args(["--variant=minbase", "--format=tar", "--quiet"]);
    command.arg(format!("--include={}", options.packages.join(",")));
    command.args(LEFT_OUT.map(|path| format!("--dpkgopt=path-exclude={path}")));
    command.arg(format!(
        "--customize-hook=echo root:{PASSWORD} | chroot \"$1\" chpasswd"
    ));
    // Loads what was given to it at each boot: a test's kernel would be replaced.
    command.arg(
        "--customize-hook=sed -i s/^LOAD_KEXEC=true/LOAD_KEXEC=false/ \"$1\"/etc/default/kexec 2>/dev/null || true",
    );
    if let Some(crypttab) = &options.crypttab {
        command.arg(format!(
            "--customize-hook=printf '%s\\n' '{crypttab}' >\"$1\"/etc/crypttab && chroot \"$1\" update-initramfs -u"
        ));
    }
    command.arg(&options.suite).arg(archive);
    process::run(&mut command).map(drop).map_err(command_error(ACTION))
}

/// Removes what other weeks left of the same system.
fn forget_older(cache: &Path, key: &str, current: &str) {
    let prefix = format!("debian-{key}-");
    for entry in fs::read_dir(cache).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if !name.starts_with(&prefix) || name.starts_with(current) {
            continue;
        }
        let path = entry.path();
        let _ = if path.is_dir() {
            fs::remove_dir_all(&path)
        } else {
            fs::remove_file(&path)
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_packages_are_another_system() {
        let plain = BaseOptions::default();
        assert_eq!(plain.key(), BaseOptions::default().key());
        assert_ne!(plain.key(), plain.clone().package("dracut-core").key());
        assert!(plain.key().starts_with("bookworm-"));
    }

    #[test]
    fn only_older_weeks_of_the_same_system_are_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["debian-x-1-w1.tar", "debian-x-1-w2.tar", "debian-x-2-w1.tar", "accel"] {
            fs::write(dir.path().join(name), "").unwrap();
        }
        fs::create_dir(dir.path().join("debian-x-1-w1.kernel")).unwrap();
        forget_older(dir.path(), "x-1", "debian-x-1-w2");
        let mut left: Vec<_> = fs::read_dir(dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        left.sort();
        assert_eq!(left, ["accel", "debian-x-1-w2.tar", "debian-x-2-w1.tar"]);
    }
}
