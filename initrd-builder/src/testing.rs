//! What the tests of this crate share: tiny ELF files, and a folder of kernel modules made of them.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use proptest::test_runner::Config;

pub(crate) const EM_X86_64: u16 = 62;
const ET_REL: u16 = 1;
const ET_DYN: u16 = 3;

/// Property tests of this crate leave no files behind.
pub(crate) fn cases(cases: u32) -> Config {
    Config {
        cases,
        failure_persistence: None,
        ..Config::default()
    }
}

/// Whether `what` is installed here, with which a test compares our work. Where `CI` is set (by tests/run, which installs
/// all of it) a missing one is a failure: a test that is left out proves nothing.
fn installed(what: &str, found: bool) -> bool {
    assert!(
        found || std::env::var_os("CI").is_none(),
        "{what} is not installed, but CI must have it"
    );
    if !found {
        eprintln!("skipped: {what} is not installed");
    }
    found
}

/// Another program's command, if it is installed.
pub(crate) fn tool(program: &str) -> Option<Command> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    // Administrators' programs are not in every user's path.
    let folders = std::env::split_paths(&path).chain(["/usr/sbin", "/sbin"].map(PathBuf::from));
    let file = folders.map(|folder| folder.join(program)).find(|file| file.is_file());
    installed(program, file.is_some()).then(|| Command::new(file.unwrap_or_default()))
}

/// The bytes of a file that a package brings, if it is installed.
pub(crate) fn installed_file(path: &str) -> Option<Vec<u8>> {
    let bytes = fs::read(path);
    installed(path, bytes.is_ok()).then(|| bytes.unwrap_or_default())
}

/// A section of an ELF file: its name, type, the section it refers to, the length of its entries, its data.
type Section<'a> = (&'a str, u32, u32, u64, &'a [u8]);

/// An ELF file with these sections (numbered from 1) and their names, and one program header of the type given, for the
/// first of them.
fn elf(kind: u16, machine: u16, segment: u32, sections: &[Section<'_>]) -> Vec<u8> {
    let mut names = vec![0];
    let mut headers = vec![0; 64];
    let mut data = Vec::new();
    let count = u16::try_from(sections.len()).unwrap() + 2;
    let data_at = 64 + 56;
    let mut header = |name: usize, (_, kind, link, entry, bytes): Section<'_>| {
        headers.extend(u32::try_from(name).unwrap().to_le_bytes());
        headers.extend(kind.to_le_bytes());
        for word in [0, 0, (data_at + data.len()) as u64, bytes.len() as u64] {
            headers.extend(word.to_le_bytes());
        }
        // All symbols are global: the first one is number 1.
        headers.extend([link.to_le_bytes(), u32::from(entry > 0).to_le_bytes()].concat());
        headers.extend([1_u64.to_le_bytes(), entry.to_le_bytes()].concat());
        data.extend(bytes);
    };
    for section in sections {
        header(names.len(), *section);
        names.extend(section.0.bytes().chain([0]));
    }
    let names_name = names.len();
    names.extend(b".shstrtab\0");
    header(names_name, (".shstrtab", 3, 0, 0, &names));
    let sections_at = (data_at + data.len()) as u64;
    let first = sections.first().map_or(0, |section| section.4.len() as u64);

    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    file.extend(kind.to_le_bytes());
    file.extend(machine.to_le_bytes());
    file.extend(1_u32.to_le_bytes());
    for word in [0, 64, sections_at] {
        file.extend(word.to_le_bytes());
    }
    file.extend(0_u32.to_le_bytes());
    for half in [64_u16, 56, 1, 64, count, count - 1] {
        file.extend(half.to_le_bytes());
    }
    file.extend(segment.to_le_bytes());
    file.extend(4_u32.to_le_bytes());
    for word in [data_at as u64, 0, 0, first, first, 1] {
        file.extend(word.to_le_bytes());
    }
    [file, data, headers].concat()
}

/// A kernel module that asks for firmware.
pub(crate) fn module(firmware: &[&str]) -> Vec<u8> {
    let info: String = firmware.iter().map(|name| format!("firmware={name}\0")).collect();
    elf(
        ET_REL,
        EM_X86_64,
        0,
        &[(".modinfo", 1, 0, 0, format!("license=GPL\0{info}").as_bytes())],
    )
}

/// A kernel module that calls functions of the kernel.
pub(crate) fn module_calling(functions: &[&str]) -> Vec<u8> {
    let mut names = vec![0];
    let mut symbols = vec![0; 24];
    for function in functions {
        symbols.extend(u32::try_from(names.len()).unwrap().to_le_bytes());
        // Global, without a type; in no section, so defined elsewhere; no address, no length.
        symbols.extend([0x10, 0, 0, 0]);
        symbols.extend([0; 16]);
        names.extend(function.bytes().chain([0]));
    }
    let sections = [
        (".modinfo", 1, 0, 0, &b"license=GPL\0"[..]),
        (".symtab", 2, 3, 24, &symbols),
        (".strtab", 3, 0, 0, &names),
    ];
    elf(ET_REL, EM_X86_64, 0, &sections)
}

/// A static program for a machine.
pub(crate) fn static_program(machine: u16) -> Vec<u8> {
    elf(ET_DYN, machine, 1, &[(".text", 1, 0, 0, b"program")])
}

/// A program that asks for a loader.
pub(crate) fn dynamic_program() -> Vec<u8> {
    let loader = b"/lib64/ld-linux-x86-64.so.2\0";
    elf(ET_DYN, EM_X86_64, 3, &[(".interp", 1, 0, 0, loader)])
}

/// The beginning of a bzImage.
pub(crate) fn kernel(version: &str) -> Vec<u8> {
    let mut kernel = vec![0; 1024];
    kernel[0x202..0x206].copy_from_slice(b"HdrS");
    kernel[0x20e..0x210].copy_from_slice(&0x100_u16.to_le_bytes());
    let text = format!("{version} (debian-kernel@lists.debian.org) #1\0");
    kernel[0x300..0x300 + text.len()].copy_from_slice(text.as_bytes());
    kernel
}

/// Version of the fake tree.
pub(crate) const VERSION: &str = "6.1.0-test";

/// Makes a folder of modules below `root`: all three compressions, dependencies, soft dependencies, things built in.
pub(crate) fn module_tree(root: &Path) -> PathBuf {
    let dir = root.join("lib/modules").join(VERSION);
    let put = |path: &str, bytes: &[u8]| {
        let path = dir.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    };
    let nic = module(&["rtl_nic/rtl8168.fw", "rtl_nic/absent.fw"]);
    put(
        "kernel/drivers/net/ethernet/realtek/r8169.ko.zst",
        &zstd::bulk::compress(&nic, 3).unwrap(),
    );
    let mut xz = lzma_rust2::XzWriter::new(Vec::new(), lzma_rust2::XzOptions::with_preset(1)).unwrap();
    xz.write_all(&module(&[])).unwrap();
    put("kernel/drivers/net/mii.ko.xz", &xz.finish().unwrap());
    let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    gz.write_all(&module(&[])).unwrap();
    put("kernel/drivers/net/usb/cdc_ether.ko.gz", &gz.finish().unwrap());
    for path in [
        "kernel/drivers/net/usb/cdc_subset.ko",
        "kernel/drivers/net/usb/qmi_wwan.ko",
        "kernel/drivers/net/wireless/iwlwifi.ko",
        "kernel/drivers/net/ethernet/mellanox/mlxsw/mlxsw_spectrum.ko",
        "kernel/drivers/block/nbd.ko",
        "kernel/drivers/nvme/host/nvme-tcp.ko",
        "kernel/drivers/nvme/host/nvme.ko",
        "kernel/drivers/usb/host/xhci-hcd.ko",
        "kernel/drivers/net/virtio_net.ko",
        "kernel/drivers/virtio/virtio_pci.ko",
        "kernel/drivers/pci/controller/vmd.ko",
        "kernel/fs/ext4/ext4.ko",
        "kernel/crypto/crc32c_generic.ko",
    ] {
        put(path, &module(&[]));
    }
    put(
        "modules.dep",
        b"kernel/drivers/net/ethernet/realtek/r8169.ko.zst: kernel/drivers/net/mii.ko.xz\n\
          kernel/drivers/net/mii.ko.xz:\n\
          kernel/drivers/net/usb/cdc_ether.ko.gz: kernel/drivers/net/mii.ko.xz\n\
          kernel/drivers/net/usb/cdc_subset.ko:\n\
          kernel/drivers/net/usb/qmi_wwan.ko:\n\
          kernel/drivers/net/wireless/iwlwifi.ko:\n\
          kernel/drivers/net/ethernet/mellanox/mlxsw/mlxsw_spectrum.ko:\n\
          kernel/drivers/block/nbd.ko:\n\
          kernel/drivers/nvme/host/nvme-tcp.ko:\n\
          kernel/drivers/nvme/host/nvme.ko:\n\
          kernel/drivers/usb/host/xhci-hcd.ko:\n\
          kernel/drivers/net/virtio_net.ko:\n\
          kernel/drivers/virtio/virtio_pci.ko:\n\
          kernel/drivers/pci/controller/vmd.ko:\n\
          kernel/fs/ext4/ext4.ko:\n\
          kernel/crypto/crc32c_generic.ko:\n",
    );
    put(
        "modules.alias",
        b"# Aliases\n\
          alias pci:v000010ECd00008168sv*sd*bc*sc*i* r8169\n\
          alias usb:v*p*d*dc*dsc*dp*ic02isc06ip00in* cdc_ether\n\
          alias usb:v0525pA4A2d*dc*dsc*dp*ic*isc*ip*in* cdc_subset\n\
          alias crypto-crc32c crc32c_generic\n",
    );
    put(
        "modules.softdep",
        b"softdep ext4 pre: crypto-crc32c\nsoftdep iwlwifi pre: nothing\n",
    );
    put(
        "modules.builtin",
        b"kernel/drivers/hid/usbhid/usbhid.ko\nkernel/drivers/net/wireguard/wireguard.ko\n",
    );
    dir
}

/// Puts modules that did not come with the kernel into a tree made by [`module_tree`], as depmod lists them.
pub(crate) fn add_modules(dir: &Path, modules: &[(&str, &[u8])]) {
    let mut dep = fs::OpenOptions::new()
        .append(true)
        .open(dir.join("modules.dep"))
        .unwrap();
    for (path, bytes) in modules {
        writeln!(dep, "{path}:").unwrap();
        let path = dir.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
}
