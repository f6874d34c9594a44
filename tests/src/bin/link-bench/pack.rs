//! What the machines start with: this program, Debian's NBD programs of this host with their libraries, modules, a disk.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, ensure};
use stiefel_initrd_builder::overlay;
use stiefel_shared::cpio;
use stiefel_tests::tools;

/// The programs that we are measured against.
const PEERS: [&str; 2] = ["nbd-server", "nbd-client"];
/// What no payload needs to reach the laptop.
const MODULES: [&str; 5] = ["virtio_pci", "virtio_net", "virtio_blk", "nvmet", "nvmet_tcp"];

/// The disk's image, with something in it: holes would be read without a disk.
pub(crate) fn disk(dir: &Path, size: u64) -> std::io::Result<PathBuf> {
    let path = dir.join("disk.img");
    let mut file = std::fs::File::create(&path)?;
    let piece = vec![0x3c; 1 << 20];
    for _ in 0..size >> 20 {
        file.write_all(&piece)?;
    }
    Ok(path)
}

/// An archive of the kernel's modules.
pub(crate) fn modules(tree: &Path) -> anyhow::Result<Vec<u8>> {
    let more = MODULES.map(str::to_owned);
    Ok(overlay::overlay(tree, &more, &[], false)?.bytes)
}

/// The archive with all programs.
pub(crate) fn ramdisk() -> anyhow::Result<Vec<u8>> {
    let mut archive = cpio::Writer::new(Vec::new());
    let mut folders = BTreeSet::new();
    folder(&mut archive, &mut folders, Path::new("/dev"))?;
    archive.node("dev/console", 0o600, 5, 1)?;
    archive.file("init", 0o755, &std::fs::read(std::env::current_exe()?)?)?;
    let mut libraries = BTreeSet::new();
    for name in PEERS {
        let program = tools::find(name).with_context(|| format!("{name} is not installed"))?;
        libraries.extend(needed(&program)?);
        add(&mut archive, &mut folders, &program, &Path::new("/bin").join(name))?;
    }
    for library in libraries {
        add(&mut archive, &mut folders, &library, &library)?;
    }
    Ok(archive.finish()?)
}

type Archive = cpio::Writer<Vec<u8>>;

fn add(archive: &mut Archive, folders: &mut BTreeSet<PathBuf>, from: &Path, to: &Path) -> anyhow::Result<()> {
    let bytes = std::fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
    folder(archive, folders, to.parent().unwrap_or(to))?;
    archive.file(&inside(to), 0o755, &bytes)?;
    Ok(())
}

/// Adds a folder and those above it.
fn folder(archive: &mut Archive, folders: &mut BTreeSet<PathBuf>, path: &Path) -> std::io::Result<()> {
    let mut above: Vec<_> = path.ancestors().filter(|path| path.parent().is_some()).collect();
    above.reverse();
    for path in above {
        if folders.insert(path.to_owned()) {
            archive.dir(&inside(path), 0o755)?;
        }
    }
    Ok(())
}

/// A path as archives have them.
fn inside(path: &Path) -> String {
    path.to_string_lossy().trim_start_matches('/').to_owned()
}

/// The libraries of a program, and who loads them.
fn needed(program: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let output = Command::new("ldd").arg(program).output().context("cannot run ldd")?;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "ldd {}: {said}", program.display());
    let libraries = libraries(&said);
    ensure!(
        !libraries.is_empty(),
        "ldd names no library of {}: {said}",
        program.display()
    );
    Ok(libraries)
}

/// The paths in what ldd says.
fn libraries(said: &str) -> Vec<PathBuf> {
    said.lines()
        .filter_map(|line| {
            let path = line.rsplit_once("=>").map_or(line, |(_, path)| path);
            let path = path.split_whitespace().next()?;
            path.starts_with('/').then(|| PathBuf::from(path))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_and_their_loader_are_found() {
        let said = "\tlinux-vdso.so.1 (0x00007f7150c68000)\n\
                    \tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f71507fb000)\n\
                    \tlibmissing.so => not found\n\
                    \t/lib64/ld-linux-x86-64.so.2 (0x00007f7150c6a000)\n";
        assert_eq!(
            libraries(said),
            ["/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2"].map(PathBuf::from)
        );
        assert!(libraries("\tstatically linked\n").is_empty());
    }

    #[test]
    fn folders_come_before_what_is_in_them_and_once() {
        let mut archive = cpio::Writer::new(Vec::new());
        let mut folders = BTreeSet::new();
        folder(&mut archive, &mut folders, Path::new("/a/b")).unwrap();
        folder(&mut archive, &mut folders, Path::new("/a/c")).unwrap();
        let bytes = archive.finish().unwrap();
        let paths: Vec<_> = cpio::Reader::new(&bytes)
            .map(|entry| String::from_utf8(entry.unwrap().path.to_vec()).unwrap())
            .collect();
        assert_eq!(paths, ["a", "a/b", "a/c"]);
    }
}
