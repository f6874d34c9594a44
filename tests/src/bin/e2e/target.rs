//! Storage target mode: a Debian lends its disks to another one, which has nvme-cli and nbd-client as anybody has.

use std::path::Path;
use std::time::Duration;

use serde_json::json;
use stiefel_tests::disk::{BaseOptions, BaseSystem, ExtraFile, LaptopDisk, PASSWORD};
use stiefel_tests::kit::{CONSOLE, DESKTOP_MAC};
use stiefel_tests::scenario::{Failure, patience};
use stiefel_tests::{Drive, NicModel, Vm, VmBuilder, Wire};

use crate::runner::Bench;

/// For commands that connect, or wait for something to appear.
const SOON: Duration = Duration::from_secs(40);
const TARGET_MAC: &str = "52:54:00:57:1e:31";
/// Bytes of each extra disk.
const SIZE: u64 = 32 << 20;

/// The two machines, up and with addresses.
struct Pair {
    target: Vm,
    client: Vm,
    dir: tempfile::TempDir,
    /// The machines' sockets go with it.
    _wire: Wire,
}

impl Pair {
    fn start(bench: &Bench) -> Result<Self, Failure> {
        let base = BaseSystem::ensure(&BaseOptions::default().package("nvme-cli").package("nbd-client"))?;
        let dir = tempfile::tempdir_in(bench.kit.dir())?;
        let wire = Wire::direct()?;
        let machine = |name: &str| -> Result<VmBuilder, Failure> {
            let disk = LaptopDisk::builder(&base)
                .hostname(name)
                .autologin(true)
                .file(ExtraFile::new(bench.program, "/usr/bin/stiefel", 0o755))
                .file(ExtraFile::new(
                    bench.kit.key("stick").as_path(),
                    "/etc/stiefel/keys/stick.key",
                    0o600,
                ))
                .file(ExtraFile::new(
                    bench.kit.key("other").as_path(),
                    "/root/other.key",
                    0o600,
                ))
                .build(&dir.path().join(format!("{name}.img")))?;
            Ok(VmBuilder::new(name).boot(disk.boot(&CONSOLE)).disk(disk.drive()))
        };
        bench.kit.new_key("other")?;
        let mut target = machine("target")?.nic("wired", NicModel::E1000e, &wire.a(), TARGET_MAC);
        for name in ["data-a", "data-b"] {
            let path = dir.path().join(name);
            image(&path, name)?;
            target = target.disk(Drive {
                path,
                serial: name.to_owned(),
                snapshot: false,
            });
        }
        let client = machine("client")?.nic("wired", NicModel::E1000e, &wire.b(), DESKTOP_MAC);
        let (target, client) = (target.start()?, client.start()?);
        for (vm, address) in [(&target, "10.77.0.1"), (&client, "10.77.0.2")] {
            vm.login("root", PASSWORD, patience::LOGIN)?;
            vm.run_ok(&format!(
                "nic=$(ls /sys/class/net | grep -v lo | head -n 1); ip link set $nic up; ip addr add {address}/24 dev $nic"
            ))?;
        }
        client.run_ok_within("modprobe -a nvme-tcp nbd", SOON)?;
        Ok(Self {
            target,
            client,
            dir,
            _wire: wire,
        })
    }

    /// Starts `stiefel target` and waits until it lends `data-a`.
    fn lend(&self, options: &str) -> Result<(), Failure> {
        self.target.run_ok(&format!(
            "rm -f /run/out; systemd-run --quiet --unit lend -p StandardOutput=file:/run/out -p StandardError=file:/run/err \
             stiefel target {options}"
        ))?;
        wait(&self.target, "grep -q data-a /run/out")?;
        Ok(())
    }

    /// Ends it; it must say that all was in order.
    fn lend_no_more(&self) -> Result<(), Failure> {
        self.target
            .run_ok_within("systemctl stop lend; ! systemctl is-failed lend", SOON)?;
        self.target.run_ok(
            "cat /run/err; ! ls /sys/kernel/config/nvmet/subsystems/* 2>/dev/null && ! ls /dev/dm-* 2>/dev/null && \
             ! losetup -a | grep . && ! ip link | grep stiefel-l",
        )?;
        Ok(())
    }
}

/// Runs a command again and again until it succeeds.
fn wait(vm: &Vm, command: &str) -> Result<(), Failure> {
    vm.run_ok_within(
        &format!("for i in $(seq 100); do {command} && exit 0; sleep 0.3; done; exit 1"),
        SOON,
    )?;
    Ok(())
}

/// A disk with known content.
fn image(path: &Path, name: &str) -> Result<(), Failure> {
    let line = format!("{:<511}\n", format!("this is {name} of the target"));
    let lines = usize::try_from(SIZE)? / line.len();
    Ok(std::fs::write(path, line.repeat(lines))?)
}

/// What `sha256sum` says of the whole device.
fn sum(vm: &Vm, device: &str) -> Result<String, Failure> {
    let said = vm.run_ok_within(&format!("sha256sum < {device}"), SOON)?;
    Ok(said.split_whitespace().next().unwrap_or_default().to_owned())
}

fn same(what: &str, a: &str, b: &str) -> Result<(), Failure> {
    if a == b {
        Ok(())
    } else {
        Err(format!("{what}: {a} and {b}").into())
    }
}

/// The name of the only block device here that comes by NVMe.
const NVME: &str = "ls /dev/nvme0n1";

/// Open: discovery, NVMe and NBD as anybody has them; read-only in truth; disks come and go.
pub(crate) fn open(bench: &Bench) -> Result<(), Failure> {
    let pair = Pair::start(bench)?;
    let (target, client) = (&pair.target, &pair.client);
    pair.lend("--all --open")?;
    let (a, b) = (
        sum(target, "/dev/disk/by-id/virtio-data-a")?,
        sum(target, "/dev/disk/by-id/virtio-data-b")?,
    );
    bench.note(&target.run_ok("cat /run/out /run/err")?);
    target.run_ok("grep -q WARNING /run/err && grep -q 'running system lives on it' /run/out")?;

    // The discovery controller names both disks, and not the one that the target lives on.
    let found = client.run_ok_within("nvme discover -t tcp -a 10.77.0.1 -s 4420", SOON)?;
    bench.note(&found);
    let named = found.matches("subnqn:  nqn.2026-11.io.stiefel:storagetm.").count();
    same("disks in the discovery log", &named.to_string(), "2")?;

    // The very command that the target prints.
    client.run_ok_within(
        &target.run_ok("grep -h 'nvme connect -t tcp -a 10.77.0.1 .*data-a' /run/out | head -n 1")?,
        SOON,
    )?;
    wait(client, NVME)?;
    same("data-a by NVMe", &sum(client, "/dev/nvme0n1")?, &a)?;
    client.run_ok(
        "nvme list; nvme id-ctrl /dev/nvme0 | grep -E '^(sn|mn)'; grep -q data-a /sys/class/nvme/nvme0/serial",
    )?;
    let write = "dd if=/dev/zero of=/dev/nvme0n1 bs=4096 count=1 oflag=direct conv=fsync";
    client.run_ok_within(&format!("! {write}"), SOON)?;
    // Lifting the write protection (feature 0x84) may succeed or not; writing must not.
    client.run_ok_within(
        &format!("nvme set-feature /dev/nvme0 -n 1 -f 0x84 -v 0; ! {write} && ! blkdiscard /dev/nvme0n1"),
        SOON,
    )?;
    same(
        "data-a after writes that must fail",
        &sum(target, "/dev/disk/by-id/virtio-data-a")?,
        &a,
    )?;
    client.run_ok_within("nvme disconnect-all", SOON)?;
    client.run_ok_within("nvme connect-all -t tcp -a 10.77.0.1 -s 4420", SOON)?;
    wait(client, "ls /dev/nvme1n1")?;
    client.run_ok_within("nvme disconnect-all", SOON)?;

    client.run_ok_within("nbd-client 10.77.0.1 /dev/nbd0 -N data-b", SOON)?;
    same("data-b by NBD", &sum(client, "/dev/nbd0")?, &b)?;
    client.run_ok_within(
        "blockdev --getro /dev/nbd0 | grep -q 1 && ! dd if=/dev/zero of=/dev/nbd0 bs=4096 count=1 oflag=direct",
        SOON,
    )?;
    same(
        "data-b after a write that must fail",
        &sum(target, "/dev/disk/by-id/virtio-data-b")?,
        &b,
    )?;

    hot_plug(&pair)?;
    same(
        "data-b while another disk came and went",
        &sum(client, "/dev/nbd0")?,
        &b,
    )?;
    client.run_ok_within("nbd-client -d /dev/nbd0", SOON)?;
    pair.lend_no_more()?;
    writable(&pair)
}

/// A stick is plugged into the target, read, and pulled out while it is read: an error, and nobody else sees anything of it.
fn hot_plug(pair: &Pair) -> Result<(), Failure> {
    let Pair {
        target, client, dir, ..
    } = pair;
    let path = dir.path().join("hot");
    image(&path, "hot")?;
    let file = json!({ "driver": "file", "filename": path });
    target.execute(
        "blockdev-add",
        json!({ "node-name": "hot", "driver": "raw", "file": file }),
    )?;
    let device = json!({ "driver": "usb-storage", "drive": "hot", "id": "hot", "bus": "xhci.0", "serial": "hot-disk" });
    target.execute("device_add", device)?;
    wait(target, "grep -q hot-disk /run/out")?;
    let name = target.run_ok("grep -o '^[a-z0-9-]*hot-disk' /run/out | tail -n 1")?;
    client.run_ok_within(
        &format!("nbd-client 10.77.0.1 /dev/nbd1 -N {name} && head -c 65536 /dev/nbd1 | grep -q 'this is hot'"),
        SOON,
    )?;
    target.execute("device_del", json!({ "id": "hot" }))?;
    // It ends, with an error.
    client.run_ok_within("! timeout 60 dd if=/dev/nbd1 of=/dev/null bs=1M iflag=direct", SOON * 2)?;
    wait(target, "grep -q 'has gone' /run/err")?;
    client.run_ok_within("nbd-client -d /dev/nbd1; true", SOON)?;
    Ok(())
}

/// Written by one initiator: by NVMe with the host's name, by NBD without; another one is refused.
fn writable(pair: &Pair) -> Result<(), Failure> {
    let (target, client) = (&pair.target, &pair.client);
    let host = client.run_ok("cat /etc/nvme/hostnqn")?;
    pair.lend(&format!(
        "--all --open --read-write data-a={} --read-write data-b",
        host.trim()
    ))?;
    client.run_ok_within(
        &target.run_ok("grep -h 'nvme connect -t tcp -a 10.77.0.1 .*data-a' /run/out | tail -n 1")?,
        SOON,
    )?;
    wait(client, NVME)?;
    client.run_ok_within(
        "yes written-by-nvme | dd of=/dev/nvme0n1 bs=4096 count=16 iflag=fullblock oflag=direct conv=fsync",
        SOON,
    )?;
    client.run_ok_within("nbd-client 10.77.0.1 /dev/nbd0 -N data-b", SOON)?;
    client.run_ok_within(
        "yes written-by-nbd | dd of=/dev/nbd0 bs=4096 count=16 iflag=fullblock oflag=direct conv=fsync",
        SOON,
    )?;
    // Another host's name, another address.
    client.run_ok_within(
        "ip addr add 10.77.0.3/24 dev $(ls /sys/class/net | grep -v lo | head -n 1); \
         ! nvme connect -t tcp -a 10.77.0.1 -s 4420 -q nqn.2014-08.org.nvmexpress:uuid:00000000-0000-4000-8000-000000000000 \
         -n $(cat /sys/class/nvme/nvme0/subsysnqn)",
        SOON,
    )?;
    client.run_ok_within("nvme disconnect-all; nbd-client -d /dev/nbd0", SOON)?;
    pair.lend_no_more()?;
    target.run_ok("head -c 100 /dev/disk/by-id/virtio-data-a | grep -q written-by-nvme")?;
    target.run_ok("head -c 100 /dev/disk/by-id/virtio-data-b | grep -q written-by-nbd")?;
    Ok(())
}

/// With a key: listed, attached, written where allowed, given back; a wrong key sees nothing; nothing is left behind.
pub(crate) fn with_a_key(bench: &Bench) -> Result<(), Failure> {
    let pair = Pair::start(bench)?;
    let (target, client) = (&pair.target, &pair.client);
    pair.lend("--all --read-write data-b")?;
    let a = sum(target, "/dev/disk/by-id/virtio-data-a")?;
    // The target's own words, should the list be empty.
    let listed = client.run_ok_within("stiefel attach --wait 15", SOON)?;
    bench.note(&target.run_ok("cat /run/out /run/err; ip -6 addr; cat /proc/net/igmp6")?);
    bench.note(&listed);
    for word in [
        "target/data-a",
        "32.0 MiB, read-only",
        "target/data-b",
        "can be written",
    ] {
        if !listed.contains(word) {
            return Err(format!("the list lacks {word:?}:\n{listed}").into());
        }
    }
    let wrong = client.run_ok_within("stiefel attach --key /root/other.key 2>&1", SOON)?;
    if wrong.contains("data-a") || !wrong.contains("no machine") {
        return Err(format!("a wrong key sees {wrong:?}").into());
    }
    for more in ["", "--nbd"] {
        let device = client.run_ok_within(&format!("stiefel attach target/data-a {more}"), SOON)?;
        let device = device.trim();
        bench.note(&format!("attached as {device}\n"));
        same("data-a through the tunnel", &sum(client, device)?, &a)?;
        client.run_ok_within(
            &format!("! dd if=/dev/zero of={device} bs=4096 count=1 oflag=direct conv=fsync"),
            SOON,
        )?;
        client.run_ok_within("stiefel detach target/data-a", SOON)?;
    }
    client.run_ok_within("! stiefel attach target/data-a --read-write", SOON)?;
    client.run_ok_within(
        "d=$(stiefel attach data-b --read-write) && \
         yes written-with-the-key | dd of=$d bs=4096 count=16 iflag=fullblock oflag=direct conv=fsync && ! stiefel attach data-b && \
         stiefel detach data-b",
        SOON * 2,
    )?;
    target.run_ok("blockdev --flushbufs /dev/disk/by-id/virtio-data-b; head -c 100 /dev/disk/by-id/virtio-data-b | grep -q written-with-the-key")?;
    let rounds = "for i in $(seq 10); do stiefel attach target/data-a --wait 2 >/dev/null && stiefel detach data-a || exit 1; done";
    client.run_ok_within(rounds, SOON * 6)?;
    client.run_ok(
        "! ls /run/stiefel/borrowed/* 2>/dev/null && ! ip link | grep stiefel-b && ! ls /dev/nvme?n1 2>/dev/null",
    )?;
    same("data-a at the end", &sum(target, "/dev/disk/by-id/virtio-data-a")?, &a)?;
    pair.lend_no_more()
}
