//! Programs of the laptop's own system for its ramdisk, with their libraries and the dynamic loader: cryptsetup, and lvm.
//!
//! They go onto a stick of the laptop's own where its disk is encrypted or on LVM, as distributions' initrds have them: a well-kept program
//! opens LUKS better than code of ours would. Which libraries a program needs the loader itself says (`ld.so --list`, ld.so(8)); it
//! runs nothing of the program. Counterpart: `stiefel_server::offline`, which starts them by that loader from the folders named here, so
//! nothing of the ramdisk's is in their way. Refused: a program that is missing, with what to install; a library that is not found.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read};
use std::path::{Component, Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use crate::archive::Archive;
use crate::ramdisk::interpreter;

/// The folder of it all in the ramdisk, without a slash in front, as the others.
pub const UNLOCK: &str = "unlock";
/// The loader's place.
pub const LOADER: &str = "unlock/loader";
/// The libraries' folder.
pub const LIBRARIES: &str = "unlock/lib";
/// The programs' folder.
pub const PROGRAMS: &str = "unlock/bin";
/// Opens LUKS.
pub const CRYPTSETUP: Tool = Tool {
    name: "cryptsetup",
    hint: "install it (Debian: cryptsetup-bin; Fedora, Arch, Gentoo: cryptsetup)",
};
/// Opens volumes of LVM.
pub const LVM: Tool = Tool {
    name: "lvm",
    hint: "install it (Debian, Fedora, Arch, Gentoo: lvm2)",
};

/// Where programs are looked for, in order.
const FOLDERS: [&str; 4] = ["usr/sbin", "sbin", "usr/bin", "bin"];
/// The longest list of libraries that is read, in bytes, and the most libraries.
const MAX_LIST: u64 = 64 << 10;
const MAX_LIBRARIES: usize = 128;
/// The largest file taken, in bytes.
const MAX_FILE: u64 = 64 << 20;
/// How long the loader may take.
const PATIENCE: Duration = Duration::from_secs(20);
/// glibc loads it by itself when a thread ends, as those of Argon2 do; no program says that it needs it.
const UNWINDER: &str = "libgcc_s.so.1";

/// A program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tool {
    /// Its name.
    pub name: &'static str,
    /// How one comes by it.
    hint: &'static str,
}

/// Why there are no such programs.
#[derive(Debug, thiserror::Error)]
pub enum ToolsError {
    /// It is not installed.
    #[error("this laptop's disk is opened by {name}, which is not there\n  next: {hint}")]
    Missing {
        /// The program.
        name: &'static str,
        /// What to do.
        hint: &'static str,
    },
    /// A file cannot be read.
    #[error("{path} cannot be read\n  next: be root, and see whether it is whole", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The loader gives no list.
    #[error("the libraries of {program} cannot be listed by {loader}\n  next: see what `ldd {program}` says", program = program.display(), loader = loader.display())]
    List {
        /// The program.
        program: PathBuf,
        /// The loader.
        loader: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A library is not there, or two have one name.
    #[error("{program} needs {library}, which {what}\n  next: see what `ldd {program}` says, and reinstall its package", program = program.display())]
    Library {
        /// The program.
        program: PathBuf,
        /// The library.
        library: String,
        /// What is wrong with it.
        what: &'static str,
    },
    /// The archive cannot be made.
    #[error(
        "the programs that open this laptop's disk cannot be put together\n  next: see whether there is memory (`free`), and do it again"
    )]
    Archive(#[source] io::Error),
}

/// These programs of the running system, as an uncompressed cpio for its ramdisk.
///
/// # Errors
/// [`ToolsError`].
pub fn archive(tools: &[Tool]) -> Result<Vec<u8>, ToolsError> {
    archive_of(Path::new("/"), tools, run_loader)
}

/// Asks a loader for what a program needs.
type List = fn(loader: &Path, program: &Path) -> io::Result<String>;

fn archive_of(root: &Path, tools: &[Tool], list: List) -> Result<Vec<u8>, ToolsError> {
    let mut files = BTreeMap::new();
    for tool in tools {
        gather(root, *tool, list, &mut files)?;
    }
    let mut archive = Archive::new(Vec::new());
    for (to, from) in &files {
        let bytes = read(from).map_err(|source| ToolsError::Read {
            path: from.clone(),
            source,
        })?;
        archive.file(to, 0o755, &bytes).map_err(ToolsError::Archive)?;
    }
    archive.finish().map_err(ToolsError::Archive)
}

/// Adds a program, its loader and its libraries: where each goes, and where it is.
fn gather(root: &Path, tool: Tool, list: List, files: &mut BTreeMap<String, PathBuf>) -> Result<(), ToolsError> {
    let places = FOLDERS.iter().map(|folder| root.join(folder).join(tool.name));
    let program = places
        .into_iter()
        .find(|path| path.is_file())
        .ok_or(ToolsError::Missing {
            name: tool.name,
            hint: tool.hint,
        })?;
    let bytes = read(&program).map_err(|source| ToolsError::Read {
        path: program.clone(),
        source,
    })?;
    files.insert(format!("{PROGRAMS}/{}", tool.name), program.clone());
    // A static one needs neither; it is started by no loader.
    let Some(loader) = interpreter(&bytes) else {
        return Ok(());
    };
    let loader = root.join(loader.trim_start_matches('/'));
    let failed = |source| ToolsError::List {
        program: program.clone(),
        loader: loader.clone(),
        source,
    };
    let text = list(&loader, &program).map_err(failed)?;
    let library = |library: &str, what| ToolsError::Library {
        program: program.clone(),
        library: library.to_owned(),
        what,
    };
    let mut libraries = libraries(&text).map_err(|Unfound { library: name, what }| library(&name, what))?;
    if let Some(unwinder) = unwinder(root, &libraries) {
        libraries.push(unwinder);
    }
    for path in libraries {
        let path = root.join(path.strip_prefix("/").unwrap_or(&path));
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        put(files, format!("{LIBRARIES}/{name}"), path)
            .map_err(|()| library(&name, "is another one than that of another program"))?;
    }
    put(files, LOADER.to_owned(), loader)
        .map_err(|()| library("its loader", "is another one than that of another program"))
}

/// Notes a file; another one for the same place is refused.
fn put(files: &mut BTreeMap<String, PathBuf>, to: String, from: PathBuf) -> Result<(), ()> {
    let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
    match files.get(&to) {
        Some(known) if real(known) != real(&from) => Err(()),
        _ => {
            files.insert(to, from);
            Ok(())
        }
    }
}

/// A library that a list names, and that is none to take.
#[derive(Debug, PartialEq, Eq)]
struct Unfound {
    library: String,
    what: &'static str,
}

/// The libraries in what `ld.so --list` says, without the loader itself and what the kernel brings:
///
/// ```text
///     linux-vdso.so.1 (0x00007ffd0b9f6000)
///     libcryptsetup.so.12 => /lib/x86_64-linux-gnu/libcryptsetup.so.12 (0x00007f0b9a9e4000)
///     /lib64/ld-linux-x86-64.so.2 (0x00007f0b9abb2000)
/// ```
fn libraries(text: &str) -> Result<Vec<PathBuf>, Unfound> {
    let mut found = Vec::new();
    for line in text.lines() {
        // No path of its own: the loader, or the kernel's.
        let Some((library, path)) = line.trim().split_once(" => ") else {
            continue;
        };
        let path = path.rsplit_once(" (").map_or(path, |(path, _)| path).trim();
        let unfound = |what| Unfound {
            library: library.chars().filter(|c| !c.is_control()).take(100).collect(),
            what,
        };
        if path == "not found" {
            return Err(unfound("is not found"));
        }
        let plain = |part| matches!(part, Component::RootDir | Component::Normal(_));
        if !path.starts_with('/') || !Path::new(path).components().all(plain) {
            return Err(unfound("lies at a strange place"));
        }
        if found.len() >= MAX_LIBRARIES {
            return Err(unfound("is one too many"));
        }
        found.push(PathBuf::from(path));
    }
    Ok(found)
}

/// What glibc loads by itself, from where its other libraries are.
fn unwinder(root: &Path, libraries: &[PathBuf]) -> Option<PathBuf> {
    let glibc = libraries.iter().find(|path| path.ends_with("libc.so.6"))?;
    let mut folders = vec![glibc.parent()?];
    // On usr-merged systems they are the same.
    folders.extend(libraries.iter().filter_map(|path| path.parent()));
    let place = |folder: &Path| folder.join(UNWINDER);
    folders
        .into_iter()
        .map(place)
        .find(|path| root.join(path.strip_prefix("/").unwrap_or(path)).is_file())
        .filter(|path| !libraries.iter().any(|known| known.file_name() == path.file_name()))
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    fs::File::open(path)?.take(MAX_FILE + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    Ok(bytes)
}

/// Runs the loader, with nothing of our environment, for a bounded time.
fn run_loader(loader: &Path, program: &Path) -> io::Result<String> {
    let mut child = Command::new(loader)
        .arg("--list")
        .arg(program)
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let (tell, told) = mpsc::channel();
    let output = child.stdout.take();
    std::thread::spawn(move || {
        let mut text = String::new();
        let read = output.map_or(Ok(0), |output| output.take(MAX_LIST + 1).read_to_string(&mut text));
        // Who asked may have lost patience.
        let _ = tell.send(read.map(|_| text));
    });
    let text = told
        .recv_timeout(PATIENCE)
        .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
    // It has said all, or is not waited for.
    let fine = matches!(&text, Ok(text) if text.len() as u64 <= MAX_LIST);
    if !fine {
        let _ = child.kill();
    }
    let status = child.wait()?;
    let text = text?;
    if !fine {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    if status.success() {
        Ok(text)
    } else {
        Err(io::Error::other(format!("the loader ended with {status}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{EM_X86_64, dynamic_program, static_program};
    use proptest::prelude::*;
    use stiefel_shared::cpio;

    const SAID: &str = "\tlinux-vdso.so.1 (0x00007ffd0b9f6000)\n\
        \tlibcryptsetup.so.12 => /lib/x86_64-linux-gnu/libcryptsetup.so.12 (0x00007f0b9a9e4000)\n\
        \tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f0b9a803000)\n\
        \t/lib64/ld-linux-x86-64.so.2 (0x00007f0b9abb2000)\n";

    fn said(_: &Path, _: &Path) -> io::Result<String> {
        Ok(SAID.to_owned())
    }

    fn system() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (path, bytes) in [
            ("usr/sbin/cryptsetup", dynamic_program()),
            ("sbin/lvm", dynamic_program()),
            ("lib64/ld-linux-x86-64.so.2", b"loader".to_vec()),
            ("lib/x86_64-linux-gnu/libcryptsetup.so.12", b"crypt".to_vec()),
            ("lib/x86_64-linux-gnu/libc.so.6", b"c".to_vec()),
            ("lib/x86_64-linux-gnu/libgcc_s.so.1", b"unwinder".to_vec()),
        ] {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        }
        dir
    }

    #[test]
    fn programs_come_with_their_loader_libraries_and_what_glibc_loads_by_itself() {
        let dir = system();
        let archive = archive_of(dir.path(), &[CRYPTSETUP, LVM], said).unwrap();
        let entries: Vec<_> = cpio::Reader::new(&archive).map(Result::unwrap).collect();
        let names: Vec<_> = entries
            .iter()
            .map(|entry| String::from_utf8_lossy(entry.path).into_owned())
            .collect();
        let expected = [
            "unlock",
            "unlock/bin",
            "unlock/bin/cryptsetup",
            "unlock/bin/lvm",
            "unlock/lib",
            "unlock/lib/libc.so.6",
            "unlock/lib/libcryptsetup.so.12",
            "unlock/lib/libgcc_s.so.1",
            "unlock/loader",
        ];
        assert_eq!(names, expected);
        let crypt = entries
            .iter()
            .find(|entry| entry.path.ends_with(b"libcryptsetup.so.12"))
            .unwrap();
        assert_eq!((crypt.data, crypt.permissions()), (&b"crypt"[..], 0o755));
    }

    #[test]
    fn what_is_missing_is_said_with_what_to_install() {
        let dir = system();
        fs::remove_file(dir.path().join("sbin/lvm")).unwrap();
        let error = archive_of(dir.path(), &[CRYPTSETUP, LVM], said)
            .unwrap_err()
            .to_string();
        assert!(error.contains("lvm") && error.contains("lvm2"), "{error}");
        let unfound = |_: &Path, _: &Path| Ok("\tlibargon2.so.1 => not found\n".to_owned());
        let error = archive_of(dir.path(), &[CRYPTSETUP], unfound).unwrap_err().to_string();
        assert!(
            error.contains("libargon2.so.1") && error.contains("not found"),
            "{error}"
        );
        let silent = |_: &Path, _: &Path| Err(io::ErrorKind::TimedOut.into());
        let error = archive_of(dir.path(), &[CRYPTSETUP], silent).unwrap_err();
        assert!(matches!(error, ToolsError::List { .. }), "{error}");
    }

    #[test]
    fn a_static_program_comes_alone() {
        let dir = system();
        fs::write(dir.path().join("usr/sbin/cryptsetup"), static_program(EM_X86_64)).unwrap();
        let archive = archive_of(dir.path(), &[CRYPTSETUP], |_, _| Err(io::ErrorKind::Other.into())).unwrap();
        let files = cpio::Reader::new(&archive)
            .map(Result::unwrap)
            .filter(|entry| !entry.data.is_empty());
        assert_eq!(files.count(), 1);
    }

    #[test]
    fn strange_places_and_lists_without_end_are_refused() {
        for path in ["../lib/x.so", "/lib/../x.so", "relative.so", ""] {
            let text = format!("x.so => {path} (0x0)\n");
            assert!(libraries(&text).is_err(), "{path}");
        }
        let many: String = (0..=MAX_LIBRARIES)
            .map(|n| format!("l{n}.so => /lib/l{n}.so (0x0)\n"))
            .collect();
        assert!(libraries(&many).is_err());
        let musl = "\t/lib/ld-musl-x86_64.so.1 (0x7f)\n\tlibpopt.so.0 => /usr/lib/libpopt.so.0 (0x7f)\n";
        assert_eq!(libraries(musl), Ok(vec!["/usr/lib/libpopt.so.0".into()]));
        assert_eq!(libraries("\tstatically linked\n"), Ok(Vec::new()));
    }

    #[test]
    fn the_loader_of_this_machine_lists_a_program_of_it() {
        let program = Path::new("/bin/sh");
        let Some(loader) = fs::read(program).ok().and_then(|bytes| interpreter(&bytes)) else {
            return; // A system of static programs.
        };
        let text = run_loader(Path::new(&loader), program).unwrap();
        let found = libraries(&text).unwrap();
        assert!(found.iter().all(|path| path.is_file()), "{text}");
        assert!(run_loader(Path::new(&loader), Path::new("/nowhere")).is_err());
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in "(\\PC|\n|\t| => | \\(){0,200}") {
            if let Ok(found) = libraries(&text) {
                prop_assert!(found.iter().all(|path| path.is_absolute()));
            }
        }
    }
}
