//! What goes wrong when a new user sets the laptop up: each mistake is said, with what to do next, and changes nothing; a set-up
//! that was killed half way is finished by the next one, and taken out without a trace.

use std::time::Duration;

use stiefel_tests::disk::{ExtraFile, System};
use stiefel_tests::kit::CONSOLE;
use stiefel_tests::scenario::{self, Failure, patience};
use stiefel_tests::{Vm, VmBuilder};

use crate::runner::Bench;
use crate::setup::{BUILD, PACKAGE, TREE, TREE_SCRIPT};

/// All that `install` may have put in place; printed by the shell, nothing when nothing is there.
const PUT: &str =
    "ls -d /etc/systemd/system/stiefel* /etc/NetworkManager/conf.d/*stiefel* /var/lib/stiefel/[a-z]* 2>/dev/null";
/// Fills the root file system to the last block.
const FILL: &str = "mkdir /root/fill; for size in 1G 256M 64M 16M 4M 1M 256K 64K 16K 4K; do n=0; \
                    while fallocate -l $size /root/fill/$size-$n 2>/dev/null; do n=$((n+1)); done; done";

/// How a shell tells the end of `timeout` and its command by SIGKILL.
const KILLED: i32 = 128 + 9;

/// Something that is not as it should be.
struct Mistake {
    /// Makes it so.
    make: &'static str,
    /// What the user types then.
    command: &'static str,
    /// How that ends, and what it says.
    status: i32,
    says: &'static [&'static str],
    /// Makes it good again, as the message says or as the user would.
    mend: &'static str,
}

/// Before anything is installed.
const MISTAKES: [Mistake; 7] = [
    // A missing configuration is no mistake: the example is installed. One that cannot be read is.
    Mistake {
        make: "mv /etc/stiefel/config.yaml /root/good.yaml; printf 'trigger:\\n  method: [kexec\\n' >/etc/stiefel/config.yaml",
        command: "stiefel install --yes",
        status: 2,
        says: &["/etc/stiefel/config.yaml", "line 2"],
        mend: "mv /root/good.yaml /etc/stiefel/config.yaml",
    },
    Mistake {
        make: "cp /etc/stiefel/config.yaml /root/good.yaml; echo 'triger: {method: kexec}' >>/etc/stiefel/config.yaml",
        command: "stiefel install --yes",
        status: 2,
        says: &["/etc/stiefel/config.yaml", "triger"],
        mend: "mv /root/good.yaml /etc/stiefel/config.yaml",
    },
    Mistake {
        make: "echo hello >/etc/stiefel/keys/wrong.key; chmod 600 /etc/stiefel/keys/wrong.key",
        command: "stiefel doctor",
        status: 1,
        says: &["wrong.key"],
        mend: "rm /etc/stiefel/keys/wrong.key",
    },
    Mistake {
        make: "chmod 644 /etc/stiefel/keys/*.key",
        command: "stiefel doctor",
        status: 1,
        says: &["chmod 0600 /etc/stiefel/keys/"],
        mend: "chmod 600 /etc/stiefel/keys/*.key",
    },
    Mistake {
        make: "mv /lib/modules/$(uname -r) /root/modules",
        command: "stiefel install --yes",
        status: 1,
        says: &["modules"],
        mend: "mv /root/modules /lib/modules/$(uname -r)",
    },
    Mistake {
        make: "mount --bind /etc /etc && mount -o remount,bind,ro /etc",
        command: "stiefel install --yes",
        status: 1,
        says: &["ead-only"],
        mend: "umount /etc",
    },
    Mistake {
        make: FILL,
        command: "stiefel install --yes",
        status: 1,
        says: &["No space left"],
        mend: "rm -r /root/fill",
    },
];

pub(crate) fn mistakes(bench: &Bench) -> Result<(), Failure> {
    let dir = tempfile::tempdir_in(bench.kit.dir())?;
    let package = bench.kit.package(&dir.path().join("package"))?;
    let files = vec![
        ExtraFile::new(package.as_path(), PACKAGE, 0o644),
        ExtraFile::new(TREE_SCRIPT, TREE, 0o755),
    ];
    let system = System::default();
    let disk = bench
        .kit
        .plain_disk_of(&system, &dir.path().join("laptop.img"), files)?;
    let home = scenario::laptop_with_its_files(&disk, VmBuilder::new("laptop").boot(disk.boot(&CONSOLE)))?;
    home.run_ok_within(&format!("{TREE} >/root/tree/before"), BUILD)?;
    home.run_ok(&format!("dpkg -i {PACKAGE}"))?;
    let said = home.run_ok_within("stiefel init --yes", BUILD)?;
    if !said.contains("No USB network adapter to dedicate is plugged in") {
        return Err(format!("`stiefel init` without an adapter says:\n{said}").into());
    }
    for mistake in &MISTAKES {
        try_it(&home, mistake)?;
    }
    killed_half_way(bench, &home)?;
    home.run_ok_within("stiefel uninstall --yes --purge", BUILD)?;
    home.run_ok("dpkg --purge stiefel && rm -rf /root/ramdisk")?;
    home.run_ok_within(&format!("{TREE} >/root/tree/after"), BUILD)?;
    let left = home.run("diff /root/tree/before /root/tree/after")?.output;
    if !left.is_empty() {
        return Err(format!("after the removal the laptop is not as it was before:\n{left}").into());
    }
    home.power_off(patience::SHUTDOWN)?;
    Ok(())
}

fn try_it(home: &Vm, mistake: &Mistake) -> Result<(), Failure> {
    home.run_ok_within(mistake.make, BUILD)?;
    let ran = home.run_within(mistake.command, BUILD)?;
    let complaint = |what: &str| -> Failure {
        format!(
            "after `{}`, `{}` {what}; it ended with {} and said:\n{}",
            mistake.make, mistake.command, ran.status, ran.output
        )
        .into()
    };
    if ran.status != mistake.status {
        return Err(complaint(&format!("was to end with {}", mistake.status)));
    }
    if let Some(missing) = mistake.says.iter().find(|words| !ran.output.contains(**words)) {
        return Err(complaint(&format!("was to say {missing:?}")));
    }
    if !ran.output.contains("next: ") {
        return Err(complaint("was to say what is next"));
    }
    if ran.output.contains("panicked") {
        return Err(complaint("panicked"));
    }
    home.run_ok_within(mistake.mend, BUILD)?;
    let put = home.run(PUT)?.output;
    if !put.is_empty() {
        return Err(complaint(&format!("left behind {put:?}")));
    }
    Ok(())
}

/// Killed at many points, without any warning; with a read-only /boot, which nobody needs to write.
fn killed_half_way(bench: &Bench, home: &Vm) -> Result<(), Failure> {
    home.run_ok_within("stiefel build --out /root/ramdisk", BUILD)?;
    home.run_ok("mount --bind /boot /boot && mount -o remount,bind,ro /boot")?;
    let mut killed = 0;
    for tenths in [1, 3, 5, 7, 9, 12, 15, 20] {
        let time = Duration::from_millis(100 * tenths).as_secs_f32();
        let install = format!("timeout -s KILL {time} stiefel install --yes --ramdisk /root/ramdisk");
        // The later ones may have been quicker.
        killed += u32::from(home.run_within(&install, BUILD)?.status == KILLED);
    }
    bench.note(&format!("{killed} installations were killed\n"));
    if killed < 3 {
        return Err(format!("only {killed} installations were killed before their end").into());
    }
    home.run_ok_within("stiefel install --yes", BUILD)?;
    home.run_ok("umount /boot && systemctl is-active stiefel-autokexec.service")?;
    let doctor = home.run_within("stiefel doctor", BUILD)?;
    if doctor.status != 0 {
        return Err(format!("after the set-up `stiefel doctor` finds:\n{}", doctor.output).into());
    }
    Ok(())
}
