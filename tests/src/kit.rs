//! What a user prepares before the first boot, made by the program itself: a ramdisk, a key, a laptop's disk with stiefel
//! installed on it, a stick. Shared by `stiefel test-qemu` and the end-to-end tests, so both run what users run.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::cache;
use crate::disk::{BaseOptions, BaseSystem, DiskError, ExtraFile, Installed, LaptopDisk, LaptopDiskBuilder, System};
use crate::process::{CommandError, run};

/// Hardware address of the laptop's dedicated NIC.
pub const DEDICATED_MAC: &str = "52:54:00:57:1e:01";
/// Hardware address of the desktop's NIC.
pub const DESKTOP_MAC: &str = "52:54:00:57:1e:02";
/// Words that every kernel in a test machine needs.
pub const CONSOLE: [&str; 3] = ["console=ttyS0,115200", "no_timer_check", "sysrq_always_enabled=1"];

/// Something could not be prepared.
#[derive(Debug, thiserror::Error)]
pub enum KitError {
    /// The program failed.
    #[error("`stiefel {what}` failed")]
    Program {
        /// Which command.
        what: String,
        /// How.
        #[source]
        source: CommandError,
    },
    /// The Debian package was not built.
    #[error("packaging/build-deb failed")]
    Package {
        /// How.
        #[source]
        source: CommandError,
    },
    /// The laptop's disk could not be made.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// A file failed.
    #[error("cannot {action} {path}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// The parts, in a directory that goes with this value.
pub struct Kit {
    dir: tempfile::TempDir,
    program: PathBuf,
    base: BaseSystem,
    installed: Installed,
}

impl Kit {
    /// Makes the installed system (cached), a ramdisk of its kernel, and a key named `stick`. `debug`: a ramdisk with a
    /// shell, for which `busybox` must be static.
    ///
    /// # Errors
    /// [`KitError`].
    pub fn prepare(program: &Path, debug: Option<&Path>) -> Result<Self, KitError> {
        let base = BaseSystem::ensure(&BaseOptions::default())?;
        let installed = base.extract_kernel()?;
        let cache = cache::dir().map_err(io_error("make", "the cache"))?;
        let dir = tempfile::Builder::new()
            .prefix("kit-")
            .tempdir_in(&cache)
            .map_err(io_error("make", &cache))?;
        let kit = Self {
            dir,
            program: program.to_owned(),
            base,
            installed,
        };
        write(&kit.defaults(), b"")?;
        kit.build(debug)?;
        kit.new_key("stick")?;
        Ok(kit)
    }

    /// The installed system on the laptop's disk, unpacked on the host.
    pub fn installed(&self) -> &Installed {
        &self.installed
    }

    /// The folder with kernel, ramdisk and manifest.
    pub fn ramdisk(&self) -> PathBuf {
        self.dir.path().join("ramdisk")
    }

    /// Where everything lies; the caller may put more there.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The file of a key.
    pub fn key(&self, name: &str) -> PathBuf {
        self.dir.path().join("keys").join(format!("{name}.key"))
    }

    /// Makes a key.
    ///
    /// # Errors
    /// [`KitError::Program`].
    pub fn new_key(&self, name: &str) -> Result<(), KitError> {
        self.stiefel("key new", |command| {
            command.arg(name).arg("--dir").arg(self.dir.path().join("keys"))
        })
    }

    /// The configuration of the laptop: its dedicated NIC, and a console that tests can read.
    pub fn config(&self, extra: &str) -> String {
        format!(
            "trigger: {{macs: [\"{DEDICATED_MAC}\"]}}\ninitrd: {{cmdline: [{}]}}\n{extra}",
            CONSOLE.map(|word| format!("\"{word}\"")).join(", ")
        )
    }

    /// Makes the laptop's disk at `path`: the installed system, and in it what `stiefel install` puts there, with the
    /// key `stick`, the configuration `config` and more files.
    ///
    /// # Errors
    /// [`KitError`].
    pub fn laptop_disk(&self, path: &Path, config: &str, extra: Vec<ExtraFile>) -> Result<LaptopDisk, KitError> {
        self.install_on(LaptopDisk::builder(&self.base), path, config, extra)
    }

    /// As [`Kit::laptop_disk`], with another installed system than the usual one.
    ///
    /// # Errors
    /// [`KitError`].
    pub fn disk_of(
        &self,
        system: &System,
        path: &Path,
        config: &str,
        extra: Vec<ExtraFile>,
    ) -> Result<LaptopDisk, KitError> {
        self.install_on(LaptopDisk::of(system)?, path, config, extra)
    }

    /// Makes a disk with this installed system and these files, and nothing of ours.
    ///
    /// # Errors
    /// [`KitError`].
    pub fn plain_disk_of(&self, system: &System, path: &Path, files: Vec<ExtraFile>) -> Result<LaptopDisk, KitError> {
        let builder = LaptopDisk::of(system)?.autologin(true);
        Ok(files.into_iter().fold(builder, LaptopDiskBuilder::file).build(path)?)
    }

    /// Builds the Debian package of the program, at `out`; its file.
    ///
    /// # Errors
    /// When it cannot be built.
    pub fn package(&self, out: &Path) -> Result<PathBuf, KitError> {
        let mut command = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../packaging/build-deb"));
        command.arg("--program").arg(&self.program).arg("--out").arg(out);
        run(&mut command).map_err(|source| KitError::Package { source })?;
        let is_package = |path: &PathBuf| path.extension().is_some_and(|end| end == "deb");
        let entries = std::fs::read_dir(out).map_err(io_error("read", out))?;
        let found = entries.filter_map(|entry| Some(entry.ok()?.path())).find(is_package);
        found.ok_or_else(|| io_error("find a package in", out)(std::io::ErrorKind::NotFound.into()))
    }

    fn install_on(
        &self,
        builder: LaptopDiskBuilder,
        path: &Path,
        config: &str,
        extra: Vec<ExtraFile>,
    ) -> Result<LaptopDisk, KitError> {
        let root = tempfile::tempdir_in(&self.dir).map_err(io_error("make a folder in", self.dir.path()))?;
        let root = root.path();
        let etc = root.join("etc/stiefel");
        make_dir(&etc.join("keys"))?;
        write(&etc.join("config.yaml"), config.as_bytes())?;
        let key = std::fs::read(self.key("stick")).map_err(io_error("read", self.key("stick")))?;
        write(&etc.join("keys/stick.key"), &key)?;
        self.stiefel("install", |command| {
            command
                .arg("--yes")
                .arg("--root")
                .arg(root)
                .arg("--ramdisk")
                .arg(self.ramdisk())
        })?;
        let mut builder = builder.autologin(true);
        for file in files_below(root)?.into_iter().chain(extra) {
            builder = builder.file(file);
        }
        // What the unit's [Install] section says; `install --root` has made the same link, but links are not copied.
        Ok(builder
            .enable("stiefel-autokexec.service", "multi-user.target")
            .build(path)?)
    }

    /// Writes the stick's image, with the key `key`.
    ///
    /// # Errors
    /// [`KitError::Program`].
    pub fn stick(&self, path: &Path, key: &str) -> Result<(), KitError> {
        self.stick_with(path, key, &CONSOLE.join(" "))
    }

    /// As [`Kit::stick`], with these words on the kernel's command line.
    ///
    /// # Errors
    /// [`KitError::Program`].
    pub fn stick_with(&self, path: &Path, key: &str, cmdline: &str) -> Result<(), KitError> {
        self.stiefel("stick", |command| {
            command
                .arg(path)
                .arg("--key")
                .arg(self.key(key))
                .arg("--ramdisk")
                .arg(self.ramdisk())
                .arg("--cmdline")
                .arg(cmdline)
        })
    }

    /// Writes a stick, or one file if its name ends in `.efi`, that lends a machine's disks to the holders of the key `key`.
    ///
    /// # Errors
    /// [`KitError::Program`].
    pub fn lending_stick(&self, path: &Path, key: &str, cmdline: &str) -> Result<(), KitError> {
        self.stiefel("stick", |command| {
            command.arg(path).arg("--target").arg("--key").arg(self.key(key));
            command
                .arg("--ramdisk")
                .arg(self.ramdisk())
                .arg("--cmdline")
                .arg(cmdline)
        })
    }

    /// A configuration that leaves everything at its default.
    pub fn defaults(&self) -> PathBuf {
        self.dir.path().join("defaults.yaml")
    }

    fn build(&self, debug: Option<&Path>) -> Result<(), KitError> {
        self.stiefel("build", |command| {
            command
                .arg("--kernel")
                .arg(&self.installed.kernel)
                .arg("--modules")
                .arg(&self.installed.modules);
            command.arg("--out").arg(self.ramdisk());
            if let Some(busybox) = debug {
                command.arg("--debug").arg("--busybox").arg(busybox);
            }
            command
        })
    }

    /// Runs a command of the program; without the machine's own configuration.
    fn stiefel(&self, what: &str, more: impl FnOnce(&mut Command) -> &mut Command) -> Result<(), KitError> {
        let mut command = Command::new(&self.program);
        command.args(what.split(' ')).arg("--config").arg(self.defaults());
        more(&mut command);
        run(&mut command).map(drop).map_err(|source| KitError::Program {
            what: what.to_owned(),
            source,
        })
    }
}

fn make_dir(path: &Path) -> Result<(), KitError> {
    std::fs::create_dir_all(path).map_err(io_error("make", path))
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), KitError> {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    std::fs::File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
        .and_then(|mut file| file.write_all(bytes))
        .map_err(io_error("write", path))
}

/// All regular files below `root`, as they shall lie on the laptop.
fn files_below(root: &Path) -> Result<Vec<ExtraFile>, KitError> {
    use std::os::unix::fs::PermissionsExt;
    let mut files = Vec::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).map_err(io_error("read", &folder))? {
            let entry = entry.map_err(io_error("read", &folder))?;
            let path = entry.path();
            let meta = std::fs::symlink_metadata(&path).map_err(io_error("look at", &path))?;
            if meta.is_dir() {
                folders.push(path);
            } else if meta.is_file() {
                let inside = Path::new("/").join(path.strip_prefix(root).unwrap_or(&path));
                files.push(ExtraFile::new(
                    path.as_path(),
                    &inside.to_string_lossy(),
                    meta.permissions().mode() & 0o7777,
                ));
            }
        }
    }
    Ok(files)
}

fn io_error(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> KitError {
    let path = path.into();
    move |source| KitError::Io { action, path, source }
}
