//! Loading kernel modules with what they need, by name or by a device's modalias.
//!
//! Counterpart of `stiefel_shared::kmod`, which knows the order. Works on any folder that holds the index files and
//! the modules of one kernel version (`/lib/modules/VERSION`, or what was packed for a payload); needs no kmod.

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::system::{finit_module, init_module};
use stiefel_shared::kmod::{self, KmodError, ModuleIndex, Texts};

use crate::read;

/// The longest module file taken, and the longest it may unpack to, in bytes (amdgpu has 30 MB).
const MAX_MODULE: usize = 256 << 20;

/// Why a module cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ModuleError {
    /// An index file could not be read.
    #[error("cannot read {path}; run depmod for this kernel, or build the ramdisk again", path = path.display())]
    Index {
        /// Which.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// The index is not usable, or does not know the name.
    #[error("cannot find a kernel module")]
    Kmod {
        /// The reason.
        #[from]
        source: KmodError,
    },
    /// The name is on the list of modules that must not be loaded.
    #[error("the module {name} is not to be loaded; load it by hand if you need it")]
    Blacklisted {
        /// Which.
        name: String,
    },
    /// The module's file could not be read or unpacked.
    #[error("cannot read the module {name} from {path}; build the ramdisk again", path = path.display())]
    Read {
        /// Which.
        name: String,
        /// Its file.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// The kernel refused the module.
    #[error("the kernel refused the module {name}: {hint}")]
    Refused {
        /// Which.
        name: String,
        /// What this usually means, and what to do.
        hint: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The kernel refused a module because one that it needs could not be loaded.
    #[error("cannot load the module {name}, for one that it needs failed")]
    Dependency {
        /// Which.
        name: String,
        /// The failure of the other.
        source: Box<ModuleError>,
    },
    /// It was refused before, and is not tried again.
    #[error("the module {name} could not be loaded before; see the first message about it")]
    FailedBefore {
        /// Which.
        name: String,
    },
}

/// What one call did.
#[derive(Debug, Default)]
pub struct Loaded {
    /// The modules that this call brought into the kernel, in order; those that were there before are left out.
    pub names: Vec<String>,
    /// What failed on the way. A dependency that fails does not stop the rest: the kernel knows best what is needed.
    pub failed: Vec<ModuleError>,
}

/// Loads the modules of one kernel version, and remembers what it did.
#[derive(Debug)]
pub struct Loader {
    folder: PathBuf,
    index: ModuleIndex,
    blacklist: HashSet<String>,
    /// Whether the kernel has the module, for each that was tried.
    tried: HashMap<String, bool>,
    /// Devices of one kind come in numbers; each modalias is looked up once.
    seen: HashSet<String>,
}

impl Loader {
    /// Reads modules.dep, and where they exist modules.alias, .softdep and .builtin, in `folder`. What `blacklist` names is
    /// never loaded, not even as a dependency.
    ///
    /// # Errors
    /// [`ModuleError::Index`], [`ModuleError::Kmod`].
    pub fn open(folder: &Path, blacklist: &[&str]) -> Result<Self, ModuleError> {
        let dep = index_file(folder, "modules.dep", true)?;
        let alias = index_file(folder, "modules.alias", false)?;
        let softdep = index_file(folder, "modules.softdep", false)?;
        let builtin = index_file(folder, "modules.builtin", false)?;
        let texts = Texts {
            dep: &dep,
            alias: &alias,
            softdep: &softdep,
            builtin: &builtin,
        };
        Ok(Self {
            folder: folder.to_owned(),
            index: ModuleIndex::parse(&texts)?,
            blacklist: blacklist.iter().map(|name| kmod::normalise(name)).collect(),
            tried: HashMap::new(),
            seen: HashSet::new(),
        })
    }

    /// Of the running kernel, as [`Self::open`] with nothing on the blacklist. In a ramdisk there is no modprobe that the kernel
    /// could call for what it needs itself.
    ///
    /// # Errors
    /// As there; also where all is built in, and no modules are installed.
    pub fn running() -> Result<Self, ModuleError> {
        let name = rustix::system::uname();
        Self::open(
            &Path::new("/lib/modules").join(OsStr::from_bytes(name.release().to_bytes())),
            &[],
        )
    }

    /// The index, e.g. to see whether a module exists.
    #[must_use]
    pub fn index(&self) -> &ModuleIndex {
        &self.index
    }

    /// Loads a module (or all that an alias stands for) with what it needs. A module that the kernel already has, or
    /// that is built in, is fine. Failures of other modules on the way are in [`Loaded::failed`].
    ///
    /// # Errors
    /// Why the module itself (of an alias, none) is in the kernel.
    pub fn load(&mut self, name: &str) -> Result<Loaded, ModuleError> {
        self.load_with(name, insert)
    }

    /// Loads all drivers for a device's modalias. Nothing is fatal, and a modalias that was seen before does nothing.
    pub fn load_modalias(&mut self, modalias: &str) -> Loaded {
        self.load_modalias_with(modalias, insert)
    }

    fn load_modalias_with(&mut self, modalias: &str, insert: Insert) -> Loaded {
        let mut all = Loaded::default();
        if !self.seen.insert(modalias.to_owned()) {
            return all;
        }
        for name in owned(self.index.by_modalias(modalias)) {
            if self.blacklist.contains(&name) {
                continue;
            }
            match self.load_with(&name, insert) {
                Ok(mut loaded) => {
                    all.names.append(&mut loaded.names);
                    all.failed.append(&mut loaded.failed);
                }
                Err(ModuleError::FailedBefore { .. }) => {}
                Err(error) => all.failed.push(error),
            }
        }
        all
    }

    fn load_with(&mut self, name: &str, insert: Insert) -> Result<Loaded, ModuleError> {
        let wanted = kmod::normalise(name);
        let order = owned(self.index.resolve(&wanted)?);
        let meant = match self.index.path(&wanted) {
            Some(_) => vec![wanted],
            None => owned(self.index.by_modalias(&wanted)),
        };
        let mut loaded = Loaded::default();
        let mut present = meant.iter().any(|name| self.index.is_builtin(name)) || order.is_empty();
        let mut refused = None;
        for name in order {
            let own = meant.contains(&name);
            match self.insert_once(&name, insert) {
                Ok(new) => {
                    present |= own;
                    loaded.names.extend(new.then_some(name));
                }
                Err(error) if own && refused.is_none() => refused = Some(explain(error, &mut loaded.failed)),
                Err(ModuleError::FailedBefore { .. } | ModuleError::Blacklisted { .. }) => {}
                Err(error) => loaded.failed.push(error),
            }
        }
        match refused {
            Some(error) if !present => return Err(error),
            Some(ModuleError::FailedBefore { .. } | ModuleError::Blacklisted { .. }) | None => {}
            Some(error) => loaded.failed.push(error),
        }
        Ok(loaded)
    }

    /// Whether it was this call that loaded the module.
    fn insert_once(&mut self, name: &str, insert: Insert) -> Result<bool, ModuleError> {
        if self.blacklist.contains(name) {
            return Err(ModuleError::Blacklisted { name: name.to_owned() });
        }
        match self.tried.get(name) {
            Some(true) => return Ok(false),
            Some(false) => return Err(ModuleError::FailedBefore { name: name.to_owned() }),
            None => {}
        }
        let Some(path) = self.index.path(name) else {
            return Err(KmodError::Unknown { name: name.to_owned() }.into());
        };
        let result = insert(name, &self.folder.join(path));
        self.tried.insert(name.to_owned(), result.is_ok());
        result
    }
}

fn owned(names: Vec<&str>) -> Vec<String> {
    names.into_iter().map(str::to_owned).collect()
}

/// A missing symbol is only the consequence where a dependency failed just before: that is what the user must mend.
fn explain(error: ModuleError, failed: &mut Vec<ModuleError>) -> ModuleError {
    match error {
        ModuleError::Refused { name, source, .. }
            if source.raw_os_error() == Some(libc::ENOENT) && !failed.is_empty() =>
        {
            ModuleError::Dependency {
                name,
                source: Box::new(failed.swap_remove(0)),
            }
        }
        error => error,
    }
}

fn index_file(folder: &Path, name: &str, needed: bool) -> Result<Vec<u8>, ModuleError> {
    let path = folder.join(name);
    match read::bounded(&path, kmod::MAX_TEXT) {
        Ok(bytes) => Ok(bytes),
        Err(error) if !needed && error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(source) => Err(ModuleError::Index { path, source }),
    }
}

/// Puts one file into the kernel; `false`: the kernel had the module already.
type Insert = fn(&str, &Path) -> Result<bool, ModuleError>;

fn insert(name: &str, path: &Path) -> Result<bool, ModuleError> {
    let unreadable = |source| ModuleError::Read {
        name: name.to_owned(),
        path: path.to_owned(),
        source,
    };
    let file = File::open(path).map_err(unreadable)?;
    let result = match Packing::of(path) {
        Packing::Plain => finit_module(&file, c"", 0),
        packing => init_module(&unpack(file, packing).map_err(unreadable)?, c""),
    };
    match result {
        Ok(()) => Ok(true),
        Err(rustix::io::Errno::EXIST) => Ok(false),
        Err(errno) => Err(ModuleError::Refused {
            name: name.to_owned(),
            hint: hint(errno),
            source: errno.into(),
        }),
    }
}

fn hint(errno: rustix::io::Errno) -> &'static str {
    use rustix::io::Errno;
    match errno {
        Errno::NOENT => "a symbol it needs is missing; a module it depends on failed, or is of another kernel",
        Errno::NOEXEC => "it was built for another kernel; pack the modules of the kernel that runs",
        Errno::KEYREJECTED | Errno::NOKEY | Errno::BADMSG => {
            "its signature is not trusted under Secure Boot; use the distribution's own modules"
        }
        Errno::PERM | Errno::ACCESS => "loading modules is not permitted; be root, and see kernel.modules_disabled",
        Errno::NODEV => "its hardware is not here; nothing needs to be done",
        Errno::NOMEM => "memory ran out; give the machine more, or pack fewer modules",
        Errno::NOSYS => "this kernel takes no modules; use a distribution's kernel",
        _ => "the kernel's log (dmesg) says more",
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Packing {
    Plain,
    Xz,
    Zstd,
    Gzip,
}

impl Packing {
    fn of(path: &Path) -> Self {
        match path.extension().and_then(|end| end.to_str()) {
            Some("xz") => Self::Xz,
            Some("zst") => Self::Zstd,
            Some("gz") => Self::Gzip,
            _ => Self::Plain,
        }
    }
}

fn unpack(packed: impl Read, packing: Packing) -> io::Result<Vec<u8>> {
    let limit = u64::try_from(MAX_MODULE).unwrap_or(u64::MAX);
    let packed = io::BufReader::new(packed.take(limit));
    match packing {
        Packing::Plain => read_limited(packed, MAX_MODULE),
        Packing::Xz => read_limited(lzma_rust2::XzReader::new_mem_limit(packed, true, 128 << 10), MAX_MODULE),
        Packing::Gzip => read_limited(flate2::read::MultiGzDecoder::new(packed), MAX_MODULE),
        Packing::Zstd => {
            let decoder = ruzstd::decoding::StreamingDecoder::new(packed).map_err(io::Error::other)?;
            read_limited(decoder, MAX_MODULE)
        }
    }
}

fn read_limited(reader: impl Read, limit: usize) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let more = u64::try_from(limit).unwrap_or(u64::MAX).saturating_add(1);
    reader.take(more).read_to_end(&mut bytes)?;
    if bytes.len() > limit {
        Err(io::ErrorKind::FileTooLarge.into())
    } else {
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn folder() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        write(
            "modules.dep",
            "k/usbnet.ko: k/mii.ko\nk/mii.ko:\nk/bad.ko: k/broken.ko\nk/broken.ko:\nk/cdc_ether.ko: k/usbnet.ko\nk/cdc_subset.ko:\n",
        );
        write(
            "modules.alias",
            "alias usb:v0525* cdc_ether\nalias usb:v0525* cdc_subset\nalias usb:v0525* bad\n",
        );
        folder
    }

    fn pretend(name: &str, path: &Path) -> Result<bool, ModuleError> {
        assert!(path.ends_with(format!("k/{name}.ko")), "{}", path.display());
        let refused = |errno| {
            Err(ModuleError::Refused {
                name: name.into(),
                hint: "",
                source: io::Error::from_raw_os_error(errno),
            })
        };
        match name {
            "mii" => Ok(false),
            "broken" => refused(libc::ENODEV),
            "bad" => refused(libc::ENOENT),
            _ => Ok(true),
        }
    }

    #[test]
    fn a_module_is_loaded_after_what_it_needs_and_only_once() {
        let folder = folder();
        let mut loader = Loader::open(folder.path(), &[]).unwrap();
        assert_eq!(
            loader.load_with("cdc-ether", pretend).unwrap().names,
            ["usbnet", "cdc_ether"]
        );
        assert!(loader.load_with("cdc-ether", pretend).unwrap().names.is_empty());
    }

    #[test]
    fn a_modalias_loads_all_its_drivers_but_the_blacklisted_and_reports_what_failed() {
        let folder = folder();
        let mut loader = Loader::open(folder.path(), &["cdc-subset"]).unwrap();
        let loaded = loader.load_modalias_with("usb:v0525pa4a2", pretend);
        assert_eq!(loaded.names, ["usbnet", "cdc_ether"]);
        // What "bad" needs is what failed.
        let messages: Vec<_> = loaded.failed.iter().map(ToString::to_string).collect();
        assert_eq!(messages, ["cannot load the module bad, for one that it needs failed"]);
        let reason = std::error::Error::source(&loaded.failed[0]).unwrap().to_string();
        assert!(reason.contains("broken"), "{reason}");
        assert!(loader.load_modalias_with("usb:v0525pa4a2", pretend).failed.is_empty());
        assert!(loader.load_modalias_with("usb:v0525pffff", pretend).failed.is_empty());
        assert!(matches!(
            loader.load_with("bad", pretend),
            Err(ModuleError::FailedBefore { .. })
        ));
    }

    #[test]
    fn an_alias_is_loaded_if_one_of_its_modules_is() {
        let folder = folder();
        std::fs::write(
            folder.path().join("modules.alias"),
            "alias good bad\nalias good mii\nalias none bad\n",
        )
        .unwrap();
        let mut loader = Loader::open(folder.path(), &[]).unwrap();
        assert_eq!(loader.load_with("good", pretend).unwrap().failed.len(), 1);
        assert!(matches!(
            loader.load_with("none", pretend),
            Err(ModuleError::FailedBefore { .. })
        ));
    }

    #[test]
    fn a_blacklisted_module_is_refused_by_name() {
        let folder = folder();
        let mut loader = Loader::open(folder.path(), &["cdc_subset"]).unwrap();
        assert!(matches!(
            loader.load_with("cdc-subset", pretend),
            Err(ModuleError::Blacklisted { .. })
        ));
        assert!(matches!(
            loader.load_with("nosuch", pretend),
            Err(ModuleError::Kmod { .. })
        ));
    }

    #[test]
    fn a_folder_without_an_index_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        assert!(matches!(
            Loader::open(folder.path(), &[]),
            Err(ModuleError::Index { .. })
        ));
    }

    #[test]
    fn packed_modules_are_unpacked() {
        let plain = b"\x7fELF module".repeat(1000);
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&plain).unwrap();
        let mut xz = lzma_rust2::XzWriter::new(Vec::new(), lzma_rust2::XzOptions::default()).unwrap();
        xz.write_all(&plain).unwrap();
        let zstd = ruzstd::encoding::compress_to_vec(&plain[..], ruzstd::encoding::CompressionLevel::Fastest);
        for (name, packed) in [
            ("a.ko.gz", gzip.finish().unwrap()),
            ("a.ko.xz", xz.finish().unwrap()),
            ("a.ko.zst", zstd),
            ("a.ko", plain.clone()),
        ] {
            assert!(
                unpack(&packed[..], Packing::of(Path::new(name))).unwrap() == plain,
                "{name}"
            );
        }
    }

    #[test]
    fn a_broken_packing_is_an_error() {
        for packing in [Packing::Xz, Packing::Zstd, Packing::Gzip] {
            assert!(unpack(&b"no such format"[..], packing).is_err(), "{packing:?}");
        }
    }

    #[test]
    fn what_unpacks_to_more_than_the_limit_is_refused() {
        let error = read_limited(io::repeat(0), 1000).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::FileTooLarge);
        assert_eq!(read_limited(io::repeat(0).take(1000), 1000).unwrap().len(), 1000);
    }
}
