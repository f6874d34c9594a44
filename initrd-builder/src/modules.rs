//! Kernel modules for an image: chosen by class or name from `/lib/modules/VERSION`, with all they depend on and
//! the firmware they ask for.
//!
//! Used by `ramdisk` and `overlay`; loaded by `stiefel_sys::module`. Formats: depmod(8), modules.dep(5), modprobe.d(5).
//! An unknown class or module is refused with the words that are known. Missing firmware is counted, not fatal.

mod classes;
mod file;
mod foreign;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use stiefel_shared::kmod::{KmodError, ModuleIndex, Texts, normalise};

use crate::archive::Archive;
pub use classes::{CLASSES, Class, DEBUG, DEFAULT, MAPPER};
use foreign::Foreign;

/// Why modules cannot be chosen or read.
#[derive(Debug, thiserror::Error)]
pub enum ModulesError {
    /// The folder is no folder of kernel modules, or depmod has not run.
    #[error("cannot read {}: install this kernel's modules, or run depmod", path.display())]
    Index {
        /// The file that is missing.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// An index file cannot be used.
    #[error("the module lists in {} cannot be used: run depmod", dir.display())]
    BadIndex {
        /// The folder.
        dir: PathBuf,
        /// Why.
        #[source]
        source: KmodError,
    },
    /// The folder is not called like a kernel version.
    #[error("{} does not end with a kernel's version: give a folder such as /lib/modules/6.1.0-13-amd64", dir.display())]
    NoVersion {
        /// The folder.
        dir: PathBuf,
    },
    /// Neither a class nor a module of this kernel.
    #[error(
        "kernel {version} has no module {name}, and no class is called so: classes are {}",
        known_classes()
    )]
    Unknown {
        /// The word from the configuration.
        name: String,
        /// The kernel's version.
        version: String,
    },
    /// A class of which this kernel has nothing.
    #[error(
        "kernel {version} has no module of the class {class} ({}): install a kernel that has, or leave the class out",
        about(class)
    )]
    EmptyClass {
        /// The class.
        class: String,
        /// The kernel's version.
        version: String,
    },
    /// A module's file cannot be read or decompressed.
    #[error("cannot read the kernel module {}: reinstall the kernel's package", path.display())]
    Module {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

fn known_classes() -> String {
    let names: Vec<_> = [DEFAULT]
        .into_iter()
        .chain(CLASSES.iter().map(|class| class.name))
        .collect();
    names.join(", ")
}

fn about(class: &str) -> &'static str {
    Class::named(class).map_or("", |class| class.about)
}

/// The modules of one kernel version.
pub struct ModuleTree {
    dir: PathBuf,
    version: String,
    index: ModuleIndex,
    alias: Vec<u8>,
    softdep: Vec<u8>,
    builtin: Vec<u8>,
    dep: Vec<u8>,
    foreign: Foreign,
}

/// Where the kernel looks for firmware, in its order.
pub const FIRMWARE_DIRS: [&str; 2] = ["/lib/firmware/updates", "/lib/firmware"];

/// Names of modules, normalised, with all they depend on.
pub type Selection = BTreeSet<String>;

/// Modules and firmware in memory, ready to be put into an archive.
#[derive(Debug)]
pub struct ModuleSet {
    /// The kernel's version.
    pub version: String,
    /// Paths below `modules/VERSION/` with their contents: index files and uncompressed modules.
    pub files: BTreeMap<String, Vec<u8>>,
    /// Number of modules in `files`.
    pub modules: usize,
    /// Paths below `firmware/` with their uncompressed contents.
    pub firmware: BTreeMap<String, Vec<u8>>,
    /// Firmware that modules ask for and that no folder has.
    pub missing_firmware: BTreeSet<String>,
}

impl ModuleTree {
    /// Reads the lists of a folder such as `/lib/modules/6.1.0-13-amd64`; its name is the kernel's version.
    ///
    /// # Errors
    /// `Index` without modules.dep, `BadIndex` for overlong lists, `NoVersion` for `/`.
    pub fn open(dir: &Path) -> Result<Self, ModulesError> {
        let unreadable = |path: PathBuf| move |source| ModulesError::Index { path, source };
        // A link is usually called by the version, what it points to not always; `.` has no name.
        let dir = if dir.file_name().is_some() {
            dir.to_owned()
        } else {
            dir.canonicalize().map_err(unreadable(dir.to_owned()))?
        };
        let version = dir
            .file_name()
            .and_then(|name| name.to_str())
            .ok_or_else(|| ModulesError::NoVersion { dir: dir.clone() })?
            .to_owned();
        let dep_path = dir.join("modules.dep");
        let dep = fs::read(&dep_path).map_err(unreadable(dep_path))?;
        let optional = |name: &str| match fs::read(dir.join(name)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            result => result.map_err(unreadable(dir.join(name))),
        };
        let alias = optional("modules.alias")?;
        let softdep = optional("modules.softdep")?;
        let builtin = optional("modules.builtin")?;
        let order = optional("modules.order")?;
        let index = ModuleIndex::parse(&Texts {
            dep: &dep,
            alias: &alias,
            softdep: &softdep,
            builtin: &builtin,
        })
        .map_err(|source| ModulesError::BadIndex {
            dir: dir.clone(),
            source,
        })?;
        let foreign = Foreign::find(&dir, &index, &order, &alias);
        Ok(Self {
            dir,
            version,
            index,
            foreign,
            alias,
            softdep,
            builtin,
            dep,
        })
    }

    /// The kernel's version, as `uname -r` prints it.
    #[must_use]
    pub fn version(&self) -> &str {
        &self.version
    }

    /// Whether the kernel has the module, as a file or built in.
    #[must_use]
    pub fn offers(&self, module: &str) -> bool {
        self.index.path(module).is_some() || self.index.is_builtin(module)
    }

    /// Whether a system with these modules of it has the module, as one of them or built in.
    #[must_use]
    pub fn has(&self, selection: &Selection, module: &str) -> bool {
        selection.contains(module) || self.index.is_builtin(module)
    }

    /// Whether the kernel has anything of a class, as a file or built in.
    #[must_use]
    pub fn offers_class(&self, class: &Class) -> bool {
        let builtin = text_lines(&self.builtin).any(|path| class.has(&normalise(path), path));
        builtin || self.members(class).next().is_some()
    }

    /// Chooses modules: `wanted` are names of classes (see [`CLASSES`]), [`DEFAULT`], or of modules.
    ///
    /// # Errors
    /// `Unknown` or `EmptyClass`; what is built into the kernel counts as there.
    pub fn select<S: AsRef<str>>(&self, wanted: &[S]) -> Result<Selection, ModulesError> {
        let mut roots = BTreeSet::new();
        for word in wanted.iter().map(AsRef::as_ref) {
            if word == DEFAULT {
                // All of them: what this kernel lacks is not needed by who asked for nothing special.
                roots.extend(
                    CLASSES
                        .iter()
                        .filter(|class| class.name != DEBUG)
                        .flat_map(|class| self.members(class)),
                );
            } else if let Some(class) = Class::named(word) {
                if class.name != DEBUG && !self.offers_class(class) {
                    return Err(ModulesError::EmptyClass {
                        class: word.to_owned(),
                        version: self.version.clone(),
                    });
                }
                roots.extend(self.members(class));
            } else if self.offers(word) {
                roots.insert(normalise(word));
            } else {
                return Err(ModulesError::Unknown {
                    name: word.to_owned(),
                    version: self.version.clone(),
                });
            }
        }
        let mut selection = BTreeSet::new();
        for root in &roots {
            let order = self.index.resolve(root).map_err(|_| ModulesError::Unknown {
                name: root.clone(),
                version: self.version.clone(),
            })?;
            selection.extend(order.into_iter().map(str::to_owned));
        }
        Ok(selection)
    }

    fn members<'a>(&'a self, class: &'a Class) -> impl Iterator<Item = String> + 'a {
        self.index
            .iter()
            .filter(|(name, path)| class.has(name, path) || self.foreign.belongs(name, class))
            .map(|(name, _)| name.to_owned())
    }

    /// Reads the selected modules, the firmware they ask for, and cuts the lists down to them.
    ///
    /// `firmware_dirs` are looked at in order, each also below its folder of the kernel's version. `progress` gets the
    /// number of modules read and of all.
    ///
    /// # Errors
    /// `Module` if one cannot be read.
    pub fn load(
        &self,
        selection: &Selection,
        firmware_dirs: &[PathBuf],
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<ModuleSet, ModulesError> {
        let mut set = ModuleSet {
            version: self.version.clone(),
            files: self.lists(selection),
            modules: 0,
            firmware: BTreeMap::new(),
            missing_firmware: BTreeSet::new(),
        };
        let mut wanted_firmware = BTreeSet::new();
        for name in selection {
            let Some(relative) = self.index.path(name) else {
                continue;
            };
            let path = self.dir.join(relative);
            let bytes = file::read_module(&path).map_err(|source| ModulesError::Module { path, source })?;
            wanted_firmware.extend(file::firmware_names(&bytes));
            set.files.insert(file::plain_name(relative).to_owned(), bytes);
            set.modules += 1;
            progress(set.modules as u64, selection.len() as u64);
        }
        for name in wanted_firmware {
            match file::find_firmware(firmware_dirs, &self.version, &name) {
                Some(bytes) => drop(set.firmware.insert(name, bytes)),
                None => drop(set.missing_firmware.insert(name)),
            }
        }
        Ok(set)
    }

    /// The index files, with only the lines of the selected modules.
    fn lists(&self, selection: &Selection) -> BTreeMap<String, Vec<u8>> {
        let keep = |line: &str, word: Option<&str>| {
            word.is_some_and(|name| selection.contains(&normalise(name)))
                .then(|| format!("{line}\n"))
        };
        let dep = text_lines(&self.dep).filter_map(|line| {
            let (path, depends) = line.split_once(':')?;
            let depends: String = depends
                .split_whitespace()
                .map(|path| format!(" {}", file::plain_name(path)))
                .collect();
            keep(
                &format!("{}:{depends}", file::plain_name(path.trim())),
                Some(path.trim()),
            )
        });
        let alias = text_lines(&self.alias).filter_map(|line| keep(line, line.split_whitespace().nth(2)));
        let softdep = text_lines(&self.softdep).filter_map(|line| keep(line, line.split_whitespace().nth(1)));
        BTreeMap::from([
            ("modules.dep".to_owned(), dep.collect::<String>().into_bytes()),
            ("modules.alias".to_owned(), alias.collect::<String>().into_bytes()),
            ("modules.softdep".to_owned(), softdep.collect::<String>().into_bytes()),
            ("modules.builtin".to_owned(), self.builtin.clone()),
        ])
    }
}

impl ModuleSet {
    /// Writes `ROOT/modules/VERSION/…` and `ROOT/firmware/…`.
    pub(crate) fn write<W: Write>(&self, archive: &mut Archive<W>, root: &str) -> io::Result<()> {
        for (path, bytes) in &self.files {
            archive.file(&format!("{root}/modules/{}/{path}", self.version), 0o644, bytes)?;
        }
        for (path, bytes) in &self.firmware {
            archive.file(&format!("{root}/firmware/{path}"), 0o644, bytes)?;
        }
        Ok(())
    }
}

fn text_lines(text: &[u8]) -> impl Iterator<Item = &str> {
    text.split(|byte| *byte == b'\n')
        .filter_map(|line| std::str::from_utf8(line).ok())
        .filter(|line| !line.trim().is_empty() && !line.starts_with('#'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{VERSION, module_tree};

    fn tree() -> (tempfile::TempDir, ModuleTree) {
        let root = tempfile::tempdir().unwrap();
        let tree = ModuleTree::open(&module_tree(root.path())).unwrap();
        (root, tree)
    }

    fn names(selection: &Selection) -> Vec<&str> {
        selection.iter().map(String::as_str).collect()
    }

    #[test]
    fn class_nic_takes_wired_adapters_their_buses_and_dependencies_only() {
        let (_root, tree) = tree();
        let expected = ["cdc_ether", "mii", "r8169", "virtio_net", "virtio_pci", "vmd"];
        assert_eq!(names(&tree.select(&["nic"]).unwrap()), expected);
    }

    #[test]
    fn soft_dependencies_by_alias_come_along() {
        let (_root, tree) = tree();
        assert_eq!(names(&tree.select(&["fs"]).unwrap()), ["crc32c_generic", "ext4"]);
    }

    #[test]
    fn plain_names_are_taken_in_any_spelling_and_builtin_ones_need_no_file() {
        let (_root, tree) = tree();
        assert_eq!(
            names(&tree.select(&["nvme-tcp", "iwlwifi"]).unwrap()),
            ["iwlwifi", "nvme_tcp"]
        );
        assert_eq!(names(&tree.select(&["wireguard", "usbhid"]).unwrap()), [""; 0]);
    }

    #[test]
    fn default_is_every_class_that_the_kernel_has_but_debug() {
        let (_root, tree) = tree();
        let expected = [
            "cdc_ether",
            "crc32c_generic",
            "ext4",
            "mii",
            "nbd",
            "nvme",
            "nvme_tcp",
            "r8169",
            "virtio_net",
            "virtio_pci",
            "vmd",
            "xhci_hcd",
        ];
        assert_eq!(names(&tree.select(&[DEFAULT]).unwrap()), expected);
    }

    #[test]
    fn unknown_word_is_refused_with_the_classes_that_exist() {
        let (_root, tree) = tree();
        let error = tree.select(&["nics"]).unwrap_err().to_string();
        assert!(error.contains("nics") && error.contains(VERSION), "{error}");
        for word in [
            "default",
            "nic",
            "disk",
            "usb",
            "hid",
            "nbd",
            "nvme",
            "wireguard",
            "fs",
            "debug",
        ] {
            assert!(error.contains(word), "{error}");
        }
    }

    #[test]
    fn a_class_that_the_kernel_lacks_is_refused() {
        let (_root, tree) = tree();
        let error = tree.select(&["power"]).unwrap_err();
        assert!(
            matches!(&error, ModulesError::EmptyClass { class, .. } if class == "power"),
            "{error}"
        );
    }

    #[test]
    fn modules_are_stored_uncompressed_with_lists_cut_down_to_them() {
        let (_root, tree) = tree();
        let set = tree
            .load(&tree.select(&["cdc_ether", "r8169"]).unwrap(), &[], &mut |_, _| {})
            .unwrap();
        assert_eq!(set.modules, 3);
        let text = |name: &str| String::from_utf8(set.files[name].clone()).unwrap();
        assert_eq!(
            text("modules.dep"),
            "kernel/drivers/net/ethernet/realtek/r8169.ko: kernel/drivers/net/mii.ko\n\
             kernel/drivers/net/mii.ko:\n\
             kernel/drivers/net/usb/cdc_ether.ko: kernel/drivers/net/mii.ko\n"
        );
        let alias = text("modules.alias");
        assert!(alias.contains(" r8169\n") && alias.contains(" cdc_ether\n"), "{alias}");
        assert!(!alias.contains("cdc_subset") && !alias.contains("crc32c"), "{alias}");
        assert_eq!(text("modules.softdep"), "");
        assert!(text("modules.builtin").contains("wireguard"));
        for path in [
            "kernel/drivers/net/mii.ko",
            "kernel/drivers/net/usb/cdc_ether.ko",
            "kernel/drivers/net/ethernet/realtek/r8169.ko",
        ] {
            assert!(set.files[path].starts_with(b"\x7fELF"), "{path}");
        }
        // The result is an index again.
        let index = ModuleIndex::parse(&Texts {
            dep: &set.files["modules.dep"],
            ..Texts::default()
        })
        .unwrap();
        assert_eq!(index.resolve("r8169").unwrap(), ["mii", "r8169"]);
    }

    #[test]
    fn firmware_is_found_in_order_and_decompressed_and_missing_is_counted() {
        let (root, tree) = tree();
        let [updates, base] = ["updates", "base"].map(|name| root.path().join(name));
        let load = || {
            tree.load(
                &tree.select(&["r8169"]).unwrap(),
                &[updates.clone(), base.clone()],
                &mut |_, _| {},
            )
            .unwrap()
        };
        fs::create_dir_all(base.join("rtl_nic")).unwrap();
        fs::write(
            base.join("rtl_nic/rtl8168.fw.zst"),
            zstd::bulk::compress(b"old", 3).unwrap(),
        )
        .unwrap();
        let set = load();
        assert_eq!(
            set.firmware,
            BTreeMap::from([("rtl_nic/rtl8168.fw".to_owned(), b"old".to_vec())])
        );
        assert_eq!(set.missing_firmware, BTreeSet::from(["rtl_nic/absent.fw".to_owned()]));
        fs::create_dir_all(updates.join("rtl_nic")).unwrap();
        fs::write(updates.join("rtl_nic/rtl8168.fw"), b"new").unwrap();
        assert_eq!(load().firmware["rtl_nic/rtl8168.fw"], b"new");
    }

    #[test]
    fn a_broken_module_is_named() {
        let (root, tree) = tree();
        let path = root
            .path()
            .join("lib/modules")
            .join(VERSION)
            .join("kernel/drivers/block/nbd.ko");
        fs::write(&path, b"<html>").unwrap();
        let error = tree
            .load(&tree.select(&["nbd"]).unwrap(), &[], &mut |_, _| {})
            .unwrap_err();
        assert!(error.to_string().contains("nbd.ko"), "{error}");
    }

    #[test]
    fn folder_without_lists_says_what_to_do() {
        let root = tempfile::tempdir().unwrap();
        let error = ModuleTree::open(root.path()).err().unwrap().to_string();
        assert!(error.contains("modules.dep") && error.contains("depmod"), "{error}");
    }
}
