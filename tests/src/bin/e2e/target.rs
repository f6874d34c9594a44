//! Storage target mode: a Debian lends its disks to another one, which has nvme-cli and nbd-client as anybody has.

use std::path::Path;
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use serde_json::json;
use stiefel_tests::disk::{BaseOptions, BaseSystem, ExtraFile, LaptopDisk, PASSWORD};
use stiefel_tests::kit::{CONSOLE, DESKTOP_MAC};
use stiefel_tests::scenario::{self, Failure, Machines, patience};
use stiefel_tests::{Drive, NicModel, Vm, VmBuilder, Wire};

use crate::runner::Bench;

/// For commands that connect, or wait for something to appear.
pub(crate) const SOON: Duration = Duration::from_secs(40);
pub(crate) const TARGET_MAC: &str = "52:54:00:57:1e:31";
/// Bytes of each extra disk.
pub(crate) const SIZE: u64 = 32 << 20;

/// The two machines, up and with addresses.
pub(crate) struct Pair {
    pub(crate) target: Vm,
    pub(crate) client: Vm,
    dir: tempfile::TempDir,
    /// The machines' sockets go with it.
    _wire: Wire,
}

impl Pair {
    pub(crate) fn start(bench: &Bench) -> Result<Self, Failure> {
        let base = base()?;
        let dir = tempfile::tempdir_in(bench.kit.dir())?;
        let wire = Wire::direct()?;
        let machine = |name: &str| debian(bench, &base, dir.path(), name);
        other_key(bench)?;
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
            up(vm, address)?;
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
    pub(crate) fn lend(&self, options: &str) -> Result<(), Failure> {
        self.lend_with(options, "")
    }

    /// The same, with words of the environment.
    pub(crate) fn lend_with(&self, options: &str, environment: &str) -> Result<(), Failure> {
        self.target.run_ok(&format!(
            "rm -f /run/out; systemd-run --quiet --unit lend -p StandardOutput=file:/run/out -p StandardError=file:/run/err \
             -p Environment='{environment}' stiefel target {options}"
        ))?;
        wait(&self.target, "grep -q data-a /run/out")?;
        Ok(())
    }

    /// Plugs a stick with known content into the target.
    fn plug(&self, id: &str, serial: &str) -> Result<(), Failure> {
        plug(&self.target, self.dir.path(), id, serial, None)
    }

    /// Plugs a stick with a place at `byte` that cannot be read into the target.
    pub(crate) fn plug_broken(&self, id: &str, serial: &str, byte: u64) -> Result<(), Failure> {
        plug(&self.target, self.dir.path(), id, serial, Some(byte))
    }

    /// Ends it; it must say that all was in order.
    pub(crate) fn lend_no_more(&self) -> Result<(), Failure> {
        self.target
            .run_ok_within("systemctl stop lend; ! systemctl is-failed lend", SOON)?;
        self.target.run_ok(
            "cat /run/err; ! ls /sys/kernel/config/nvmet/subsystems/* 2>/dev/null && ! ls /dev/dm-* 2>/dev/null && \
             ! losetup -a | grep . && ! ip link | grep stiefel-l",
        )?;
        Ok(())
    }
}

/// The Debian of all these machines.
pub(crate) fn base() -> Result<BaseSystem, Failure> {
    let packages = BaseOptions::default().package("nvme-cli").package("nbd-client");
    Ok(BaseSystem::ensure(&packages)?)
}

/// Waits until the machine is up, and gives it an address.
pub(crate) fn up(vm: &Vm, address: &str) -> Result<(), Failure> {
    vm.login("root", PASSWORD, patience::LOGIN)?;
    vm.run_ok(&format!(
        "nic=$(ls /sys/class/net | grep -v lo | head -n 1); ip link set $nic up; ip addr add {address}/24 dev $nic"
    ))?;
    Ok(())
}

/// Plugs a stick with known content into a machine; with `broken`, the sector at this byte of it cannot be read.
pub(crate) fn plug(vm: &Vm, dir: &Path, id: &str, serial: &str, broken: Option<u64>) -> Result<(), Failure> {
    let path = dir.join(id);
    image(&path, id)?;
    let mut file = json!({ "driver": "file", "filename": path });
    if let Some(byte) = broken {
        let rule = json!({ "event": "none", "iotype": "read", "errno": 5, "sector": byte / 512 });
        file = json!({ "driver": "blkdebug", "image": file, "inject-error": [rule] });
    }
    let node = json!({ "node-name": id, "driver": "raw", "file": file });
    vm.execute("blockdev-add", node)?;
    let device = json!({ "driver": "usb-storage", "drive": id, "id": id, "bus": "xhci.0", "serial": serial });
    vm.execute("device_add", device)?;
    Ok(())
}

/// A key that opens nothing; another test may have made it.
pub(crate) fn other_key(bench: &Bench) -> Result<(), Failure> {
    static MAKING: Mutex<()> = Mutex::new(());
    let _making = MAKING.lock().unwrap_or_else(PoisonError::into_inner);
    match bench.kit.key("other").exists() {
        true => Ok(()),
        false => Ok(bench.kit.new_key("other")?),
    }
}

/// The checksum of an image on this machine.
pub(crate) fn known(image: &Path) -> Result<String, Failure> {
    let said = Command::new("sha256sum").arg(image).output()?;
    let said = String::from_utf8(said.stdout)?;
    Ok(said.split_whitespace().next().unwrap_or_default().to_owned())
}

/// The holder of another key finds nobody.
pub(crate) fn another_key_sees_nothing(client: &Vm) -> Result<(), Failure> {
    let said = client.run_ok_within("stiefel attach --key /root/other.key 2>&1", SOON)?;
    if said.contains("data-a") || !said.contains("no machine") {
        return Err(format!("a wrong key sees {said:?}").into());
    }
    Ok(())
}

/// A Debian with the program and the keys, not started yet.
pub(crate) fn debian(bench: &Bench, base: &BaseSystem, dir: &Path, name: &str) -> Result<VmBuilder, Failure> {
    let disk = LaptopDisk::builder(base)
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
        .build(&dir.join(format!("{name}.img")))?;
    Ok(VmBuilder::new(name).boot(disk.boot(&CONSOLE)).disk(disk.drive()))
}

/// Runs a command again and again until it succeeds.
pub(crate) fn wait(vm: &Vm, command: &str) -> Result<(), Failure> {
    vm.run_ok_within(
        &format!("for i in $(seq 100); do {command} && exit 0; sleep 0.3; done; exit 1"),
        SOON,
    )?;
    Ok(())
}

/// A disk with known content.
pub(crate) fn image(path: &Path, name: &str) -> Result<(), Failure> {
    let line = format!("{:<511}\n", format!("this is {name} of the target"));
    let lines = usize::try_from(SIZE)? / line.len();
    Ok(std::fs::write(path, line.repeat(lines))?)
}

/// What `sha256sum` says of the whole device.
pub(crate) fn sum(vm: &Vm, device: &str) -> Result<String, Failure> {
    let said = vm.run_ok_within(&format!("sha256sum < {device}"), SOON)?;
    Ok(said.split_whitespace().next().unwrap_or_default().to_owned())
}

pub(crate) fn same(what: &str, a: &str, b: &str) -> Result<(), Failure> {
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

    // A second one, which would take the disks away from the first one's initiators.
    target.run_ok(
        "! stiefel target --all --open --port 10900 2>/run/second && grep -q 'end that one first' /run/second",
    )?;

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
    let (target, client) = (&pair.target, &pair.client);
    pair.plug("hot", "hot-disk")?;
    wait(target, "grep -q hot-disk /run/out")?;
    let name = target.run_ok("grep -o '^[a-z0-9-]*hot-disk' /run/out | tail -n 1")?;
    client.run_ok_within(
        &format!("nbd-client 10.77.0.1 /dev/nbd1 -N {name} && head -c 65536 /dev/nbd1 | grep -q 'this is hot'"),
        SOON,
    )?;
    target.execute("device_del", json!({ "id": "hot" }))?;
    // It ends by itself, with an error: `timeout` would answer 124.
    client.run_ok_within(
        "timeout 60 dd if=/dev/nbd1 of=/dev/null bs=1M iflag=direct; [ $? = 1 ]",
        SOON * 2,
    )?;
    wait(target, "grep -q 'has gone' /run/err")?;
    client.run_ok_within("nbd-client -d /dev/nbd1; true", SOON)?;
    Ok(())
}

/// A stick that may be written is followed, not the kernel's name of it: another one that gets the name is read-only.
pub(crate) fn followed(bench: &Bench) -> Result<(), Failure> {
    let pair = Pair::start(bench)?;
    let target = &pair.target;
    let name = |serial: &str| {
        let found = format!("basename $(readlink /dev/disk/by-id/usb-*{serial}*-0:0)");
        wait(target, &format!("ls /dev/disk/by-id/usb-*{serial}*-0:0"))?;
        Ok::<_, Failure>(target.run_ok(&found)?.trim().to_owned())
    };
    pair.plug("first", "first-disk")?;
    let first = name("first-disk")?;
    target.run_ok("! stiefel target --all --open --read-write sdz 2>/run/refused && grep -q sdz /run/refused")?;
    pair.lend(&format!("--all --open --read-write {first}"))?;
    target.run_ok("grep -q 'first-disk.*READ-WRITE' /run/out")?;
    target.execute("device_del", json!({ "id": "first" }))?;
    // Its name is free when nobody has it open any more.
    wait(target, "grep -q 'has gone' /run/err")?;
    wait(
        target,
        &format!("! ls -l /proc/$(pidof stiefel)/fd | grep -q /dev/{first}"),
    )?;
    pair.plug("second", "second-disk")?;
    same("the kernel's name of the second stick", &name("second-disk")?, &first)?;
    wait(target, "grep -q 'second-disk.*read-only' /run/out")?;
    target.run_ok("! grep -q 'second-disk.*READ-WRITE' /run/out")?;
    pair.lend_no_more()
}

/// `stiefel target --reboot` on an installed laptop: its own disk is lent from the ramdisk, written by the holder of a key, and
/// after a key press its system is there again and sees that.
pub(crate) fn reboot(bench: &Bench) -> Result<(), Failure> {
    let machines = Machines::prepare(bench.kit, Wire::direct()?)?;
    let laptop = scenario::laptop_at_home(&machines.disk, Some(&machines.wire.a()), false)?;
    let root = laptop.run_ok("findmnt --noheadings --output SOURCE /")?;
    let part: String = root.trim().chars().filter(char::is_ascii_digit).collect();
    laptop.run_ok("! stiefel target --reboot --read-write nothing --yes")?;
    laptop
        .serial()
        .send_line("stiefel target --reboot --read-write vda --yes")?;
    laptop
        .serial()
        .expect("disks are lent to the holders of these keys: stick", patience::SERVING)?;
    laptop.serial().expect("READ-WRITE", patience::SERVING)?;
    let base = base()?;
    let dir = tempfile::tempdir_in(bench.kit.dir())?;
    other_key(bench)?;
    let client = debian(bench, &base, dir.path(), "client")?;
    let client = client
        .nic("wired", NicModel::E1000e, &machines.wire.b(), DESKTOP_MAC)
        .start()?;
    client.login("root", PASSWORD, patience::LOGIN)?;
    client.run_ok("ip link set $(ls /sys/class/net | grep -v lo | head -n 1) up")?;
    bench.note(&client.run_ok_within("stiefel attach --wait 20", SOON)?);
    // Its name is the one that the laptop's own system says, too: the only disk there.
    client.run_ok_within(
        &format!(
            "name=$(stiefel attach --wait 10 --json | grep -o '\"name\": *\"[^\"]*\"' | head -n 1 | cut -d '\"' -f 4); \
             d=$(stiefel attach $name --wait 10 --read-write) && udevadm settle; \
             p={part}; mount $d${{p:+p$p}} /mnt && echo lent > /mnt/root/written-by-the-borrower && umount /mnt && stiefel detach --all"
        ),
        SOON * 2,
    )?;
    laptop.serial().send("q")?;
    laptop.wait_reboot(patience::SHUTDOWN)?;
    laptop.login("root", PASSWORD, patience::LOGIN)?;
    laptop.run_ok("grep -q lent /root/written-by-the-borrower")?;
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

/// Who may log in on either machine cannot reach what is lent: on the target nobody can, on the client only root.
fn only_for_root(pair: &Pair, by_nvme: bool) -> Result<(), Failure> {
    let connect = |address: &str, port: u16| format!("timeout 10 bash -c 'exec 3<>/dev/tcp/{address}/{port}'");
    if by_nvme {
        let at = pair
            .client
            .run_ok("sed 's/traddr=\\([^,]*\\),.*/\\1/' /sys/class/nvme/nvme0/address")?;
        let connect = connect(at.trim(), 4420);
        pair.client.run_ok_within(
            &format!("{connect} && ! setpriv --reuid=65534 {connect} && ! setpriv --reuid=65534 cat /sys/class/nvme/nvme0/hostnqn"),
            SOON,
        )?;
        // The loan's names are there for all to read, and lead nowhere.
        pair.target.run_ok_within(
            &format!("ls /sys/kernel/config/nvmet/hosts/*borrower* && ! {connect} && ! ip link | grep stiefel-l"),
            SOON,
        )?;
    }
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
    another_key_sees_nothing(client)?;
    for more in ["", "--nbd"] {
        let device = client.run_ok_within(&format!("stiefel attach target/data-a {more}"), SOON)?;
        let device = device.trim();
        bench.note(&format!("attached as {device}\n"));
        same("data-a through the tunnel", &sum(client, device)?, &a)?;
        client.run_ok_within(&format!("blockdev --getro {device} | grep 1"), SOON)?;
        // By NVMe who has the kernel forget that gets no further; by NBD that cannot be had.
        if more.is_empty() {
            client.run_ok_within(&format!("nvme set-feature -n 1 -f 0x84 -v 0 {device}"), SOON)?;
            wait(client, &format!("blockdev --getro {device} | grep 0"))?;
        }
        client.run_ok_within(
            &format!("! dd if=/dev/zero of={device} bs=4096 count=1 oflag=direct conv=fsync"),
            SOON,
        )?;
        only_for_root(&pair, more.is_empty())?;
        wait(target, "grep -q 'lent to .* (key stick), read-only' /run/out")?;
        client.run_ok_within("stiefel detach target/data-a", SOON)?;
    }
    client.run_ok_within("! stiefel attach target/data-a --read-write", SOON)?;
    client.run_ok_within(
        "stiefel attach data-b && stiefel detach data-b && d=$(stiefel attach data-b --read-write) && \
         yes written-with-the-key | dd of=$d bs=4096 count=16 iflag=fullblock oflag=direct conv=fsync && ! stiefel attach data-b && \
         stiefel detach data-b",
        SOON * 3,
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
