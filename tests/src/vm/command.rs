//! QEMU's command line for a machine.
//!
//! Specification: qemu(1). The board is q35 with nothing on it by default; a USB controller `xhci` and a random number
//! generator are always there.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::builder::{Boot, Content, Drive, Nic, NicModel, VmBuilder};
use super::{OVMF_CODE, OVMF_SECURE_CODE, OVMF_VARS, QEMU, VmError};
use crate::accel::Accel;
use crate::process;

/// The sockets and files in the run directory.
pub(super) const SERIAL: &str = "serial";
pub(super) const QMP: &str = "qmp";
pub(super) const QEMU_LOG: &str = "qemu.log";

/// Everything that a NIC could leave to the host: the wire then sees whole frames with their checksums.
const NO_OFFLOADS: &str = ",csum=off,gso=off,guest_csum=off,guest_tso4=off,guest_tso6=off,guest_ecn=off,guest_ufo=off,\
    host_tso4=off,host_tso6=off,host_ecn=off,host_ufo=off,mrg_rxbuf=off";

/// A path within an option, where a comma would end it.
pub(crate) fn escape(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

/// The network behind a NIC that was there from the start.
pub(super) fn netdev_id(nic: &str) -> String {
    format!("{nic}-net")
}

pub(super) fn build(vm: &VmBuilder, accel: Accel, dir: &Path) -> Result<Command, VmError> {
    let tool_error = |source| VmError::Command {
        name: vm.name.clone(),
        source,
    };
    let file_error = |action, path: PathBuf, source| VmError::File {
        name: vm.name.clone(),
        action,
        path,
        source,
    };
    let qemu = process::find(QEMU).ok_or_else(|| {
        tool_error(process::CommandError::NotFound {
            program: QEMU.to_owned(),
        })
    })?;
    let mut command = process::command("setpriv").map_err(tool_error)?;
    command
        .args(["--pdeathsig", "KILL", "--"])
        .arg(qemu)
        .args(board(vm, accel))
        .args(channels(dir));

    let boot = boot(vm, dir).map_err(|(action, path, source)| file_error(action, path, source))?;
    command.args(boot);
    for (number, disk) in vm.disks.iter().enumerate() {
        command.args(virtio_disk(number, disk));
    }
    for (number, stick) in vm.sticks.iter().enumerate() {
        command.args(usb_stick(number, stick));
    }
    for nic in &vm.nics {
        command.args(nic_args(nic));
    }
    for (vendor, product) in &vm.usb_hosts {
        command.args([
            "-device",
            &format!("usb-host,bus=xhci.0,vendorid={vendor:#06x},productid={product:#06x}"),
        ]);
    }

    let said = dir.join(QEMU_LOG);
    let log = File::create(&said).and_then(|log| Ok((log.try_clone()?, log)));
    let (out, err) = log.map_err(|source| file_error("create", said, source))?;
    command.stdin(Stdio::null()).stdout(out).stderr(err);
    Ok(command)
}

fn board(vm: &VmBuilder, accel: Accel) -> Vec<String> {
    let secure = matches!(vm.boot, Boot::SecureUefi { .. });
    let mut args: Vec<String> = accel.qemu_args().iter().map(|&arg| arg.into()).collect();
    let mut add = |option: &str, value: &str| args.extend([option.to_owned(), value.to_owned()]);
    add("-machine", if secure { "q35,smm=on" } else { "q35" });
    if secure {
        add("-global", "driver=cfi.pflash01,property=secure,value=on");
    }
    add("-name", &vm.name.replace(',', ",,"));
    add("-m", &vm.memory_mib.to_string());
    add("-smp", &vm.cpus.to_string());
    add("-device", "qemu-xhci,id=xhci");
    add("-device", "virtio-rng-pci");
    add("-display", if vm.graphical { "gtk" } else { "none" });
    if vm.graphical || vm.vga {
        add("-device", "VGA");
    }
    if vm.debug_exit {
        add("-device", "isa-debug-exit,iobase=0xf4,iosize=0x04");
    }
    args.extend(["-nodefaults".to_owned(), "-S".to_owned()]);
    if vm.no_reboot {
        args.push("-no-reboot".to_owned());
    }
    args
}

/// The console and the machine protocol.
fn channels(dir: &Path) -> Vec<String> {
    let socket = |id: &str| format!("socket,id={id},server=on,wait=off,path={}", escape(&dir.join(id)));
    let args = [
        "-chardev",
        &socket(SERIAL),
        "-serial",
        &format!("chardev:{SERIAL}"),
        "-chardev",
        &socket(QMP),
        "-mon",
        &format!("chardev={QMP},mode=control"),
    ];
    args.map(str::to_owned).to_vec()
}

type FileError = (&'static str, PathBuf, io::Error);

fn boot(vm: &VmBuilder, dir: &Path) -> Result<Vec<String>, FileError> {
    match &vm.boot {
        Boot::Bios => Ok(Vec::new()),
        Boot::Uefi => uefi(OVMF_CODE, Path::new(OVMF_VARS), dir),
        Boot::SecureUefi { vars } => uefi(OVMF_SECURE_CODE, vars, dir),
        Boot::Kernel {
            kernel,
            initrd,
            cmdline,
        } => {
            let mut args = vec![
                "-kernel".to_owned(),
                kernel.display().to_string(),
                "-append".to_owned(),
                cmdline.clone(),
            ];
            if let Some(initrd) = initrd_file(initrd, dir)? {
                args.extend(["-initrd".to_owned(), initrd.display().to_string()]);
            }
            Ok(args)
        }
    }
}

fn uefi(code: &str, vars: &Path, dir: &Path) -> Result<Vec<String>, FileError> {
    let own = dir.join("vars.fd");
    let copied = std::fs::read(vars).and_then(|bytes| std::fs::write(&own, bytes));
    copied.map_err(|source| ("copy", vars.to_owned(), source))?;
    Ok(vec![
        "-drive".to_owned(),
        format!("if=pflash,unit=0,format=raw,readonly=on,file={code}"),
        "-drive".to_owned(),
        format!("if=pflash,unit=1,format=raw,file={}", escape(&own)),
    ])
}

/// One file with all parts of an initrd; the kernel looks for each at a multiple of four bytes.
fn initrd_file(parts: &[Content], dir: &Path) -> Result<Option<PathBuf>, FileError> {
    match parts {
        [] => return Ok(None),
        [Content::File(path)] => return Ok(Some(path.clone())),
        _ => {}
    }
    let path = dir.join("initrd");
    let write_error = |source| ("write", path.clone(), source);
    // It may carry secrets.
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
    let mut file = file.map_err(write_error)?;
    for part in parts {
        let written = match part {
            Content::Bytes(bytes) => file
                .write_all(bytes)
                .map(|()| bytes.len() as u64)
                .map_err(write_error)?,
            Content::File(from) => File::open(from)
                .and_then(|mut from| io::copy(&mut from, &mut file))
                .map_err(|source| ("copy", from.clone(), source))?,
        };
        let padding: &[u8] = match written % 4 {
            0 => &[],
            1 => &[0; 3],
            2 => &[0; 2],
            _ => &[0],
        };
        file.write_all(padding).map_err(write_error)?;
    }
    Ok(Some(path))
}

fn drive(id: &str, drive: &Drive) -> String {
    let snapshot = if drive.snapshot { "on" } else { "off" };
    format!(
        "if=none,id={id},format=raw,discard=unmap,snapshot={snapshot},file={}",
        escape(&drive.path)
    )
}

fn virtio_disk(number: usize, disk: &Drive) -> [String; 4] {
    let id = format!("disk{number}");
    let serial = disk.serial.replace(',', ",,");
    // Sticks are booted first.
    let device = format!("virtio-blk-pci,drive={id},serial={serial},bootindex={}", 100 + number);
    ["-drive".to_owned(), drive(&id, disk), "-device".to_owned(), device]
}

fn usb_stick(number: usize, stick: &Drive) -> [String; 4] {
    let id = format!("stick{number}");
    // A kernel given by the host is 0.
    let index = number + 1;
    let device = format!(
        "usb-storage,drive={id},bus=xhci.0,serial={},bootindex={index},removable=on",
        stick.serial
    );
    ["-drive".to_owned(), drive(&id, stick), "-device".to_owned(), device]
}

fn nic_args(nic: &Nic) -> [String; 4] {
    let net = netdev_id(&nic.id);
    let model = match nic.model {
        NicModel::Virtio | NicModel::VirtioPlain => "virtio-net-pci",
        NicModel::VirtioJumbo => "virtio-net-pci,host_mtu=9000",
        NicModel::E1000e => "e1000e",
        NicModel::Usb => "usb-net,bus=xhci.0",
    };
    let options = if matches!(nic.model, NicModel::VirtioPlain | NicModel::VirtioJumbo) {
        NO_OFFLOADS
    } else {
        ""
    };
    let device = format!("{model},id={},netdev={net},mac={}{options}", nic.id, nic.mac);
    [
        "-netdev".to_owned(),
        nic.netdev.to_json(&net).to_string(),
        "-device".to_owned(),
        device,
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(vm: &VmBuilder) -> String {
        let dir = tempfile::tempdir().unwrap();
        let command = build(vm, Accel::Tcg, dir.path()).unwrap();
        command
            .get_args()
            .map(|arg| arg.to_string_lossy().into_owned())
            .collect::<Vec<_>>()
            .join(" ")
    }

    #[test]
    fn the_kernel_ends_qemu_when_this_process_dies() {
        assert!(args(&VmBuilder::new("x")).starts_with("--pdeathsig KILL -- "));
    }

    #[test]
    fn the_stick_is_booted_before_the_disk() {
        let disk = Drive {
            path: "/d".into(),
            serial: "s".into(),
            snapshot: false,
        };
        let args = args(&VmBuilder::new("x").disk(disk).stick(Path::new("/st")));
        assert!(
            args.contains("drive=stick0,bus=xhci.0,serial=stick0,bootindex=1,"),
            "{args}"
        );
        assert!(args.contains("bootindex=100"), "{args}");
    }

    #[test]
    fn a_comma_in_a_path_does_not_end_the_option() {
        let disk = Drive {
            path: "/a,readonly=on".into(),
            serial: "s".into(),
            snapshot: false,
        };
        assert!(args(&VmBuilder::new("x").disk(disk)).contains("file=/a,,readonly=on"));
    }

    #[test]
    fn initrd_parts_begin_at_multiples_of_four() {
        let dir = tempfile::tempdir().unwrap();
        let first = dir.path().join("first");
        std::fs::write(&first, b"12345").unwrap();
        let parts = [
            Content::File(first),
            Content::Bytes(b"abcd".to_vec()),
            Content::Bytes(b"x".to_vec()),
        ];
        let path = initrd_file(&parts, dir.path()).unwrap().unwrap();
        assert_eq!(std::fs::read(path).unwrap(), b"12345\0\0\0abcdx\0\0\0");
    }
}
