//! LUKS and LVM between the laptop's partitions and its file systems, opened so that nothing at all is written to its disk.
//!
//! Counterpart: `crate::collect::layers`, which has seen what there is when the stick was written. All stands on loop devices that
//! refuse writes; LUKS and LVM are opened for reading, too, so that their own programs do not even try. What was opened is taken down again
//! through the kernel, the uppermost first, also what a role has left that was killed: what stays is an error, for the disk is served next.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, ensure};
use stiefel_shared::handover::Logical;
use stiefel_shared::unlock::Passphrase;
use stiefel_sys::block::Disk;
use stiefel_sys::stack;

use super::desk::Locked;
use super::tools;

/// What the names of open LUKS devices begin with.
const PREFIX: &str = "stiefel-unlocked-";
/// cryptsetup(8), "RETURN CODES": no permission, for the passphrase is wrong.
const WRONG: i32 = 2;
/// How often, and after which pause, what stays is looked at again: who has looked at a new device lets it go soon.
const TRIES: u32 = 25;
const PAUSE: Duration = Duration::from_millis(200);

/// A partition with LUKS that is still closed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Lock {
    /// What people call it.
    pub(super) label: String,
    /// What it will be called.
    pub(super) name: String,
    /// The device that refuses writes.
    pub(super) device: PathBuf,
}

/// What the open LUKS of a partition is called.
pub(super) fn unlocked(partition: u32) -> String {
    format!("{PREFIX}{partition}")
}

/// All of them, and what opens one: whether a passphrase was the right one.
pub(super) struct Locks<F> {
    left: Vec<Lock>,
    open: F,
}

impl<F: FnMut(&Lock, &Passphrase) -> anyhow::Result<bool>> Locks<F> {
    pub(super) const fn new(left: Vec<Lock>, open: F) -> Self {
        Self { left, open }
    }
}

impl<F: FnMut(&Lock, &Passphrase) -> anyhow::Result<bool> + Send + 'static> Locked for Locks<F> {
    fn attempt(&mut self, passphrase: &Passphrase) -> anyhow::Result<usize> {
        let mut opened = 0;
        let mut left = Vec::new();
        let mut failed = None;
        for lock in std::mem::take(&mut self.left) {
            // Each has a time of its own.
            super::step();
            // One that is broken must not keep the others from being remembered.
            match (self.open)(&lock, passphrase) {
                Ok(true) => opened += 1,
                Ok(false) => left.push(lock),
                Err(error) => {
                    failed = failed.or(Some(error));
                    left.push(lock);
                }
            }
        }
        self.left = left;
        failed.map_or(Ok(opened), Err)
    }

    fn wants(&self) -> String {
        let labels: Vec<&str> = self.left.iter().map(|lock| lock.label.as_str()).collect();
        labels.join(", ")
    }
}

/// Opens LUKS by the laptop's own cryptsetup; whether the passphrase was the right one.
pub(super) fn open(root: &Path, lock: &Lock, passphrase: &Passphrase) -> anyhow::Result<bool> {
    let device = lock.device.display().to_string();
    let args = [
        "open",
        "--batch-mode",
        "--type",
        "luks",
        "--readonly",
        // The kernel wipes it with the device.
        "--disable-keyring",
        "--key-file",
        "-",
        &device,
        &lock.name,
    ];
    let ended = tools::run(root, "cryptsetup", &args, passphrase.bytes())?;
    match ended.code() {
        Some(0) => Ok(true),
        Some(WRONG) => Ok(false),
        _ => anyhow::bail!("{} cannot be opened: cryptsetup: {ended}", lock.label),
    }
}

/// Opens a volume of LVM by the laptop's own lvm, which sees nothing but these devices; its device. Not by `--readonly`, nor with
/// `global/metadata_read_only`: opening takes the lock of a writer, which both refuse. That nothing is written the devices see to.
pub(super) fn activate(root: &Path, dev: &Path, logical: &Logical, on: &[PathBuf]) -> anyhow::Result<PathBuf> {
    ensure!(logical.is_sound(), "a volume of LVM has a name that LVM does not take");
    let config = configuration(logical, on);
    let name = format!("{}/{}", logical.group, logical.name);
    let args = [
        "lvchange",
        "--config",
        &config,
        "--noudevsync",
        // Nothing that was begun on it goes on here.
        "--poll",
        "n",
        "--activate",
        "y",
        &name,
    ];
    let ended = tools::run(root, "lvm", &args, b"")?;
    ensure!(
        ended.code() == Some(0),
        "the volume {name} cannot be opened: lvm: {ended}"
    );
    let device = tools::mapped(dev, &logical.mapped());
    ensure!(
        device.exists(),
        "lvm has opened {name}, but {} is not there",
        device.display()
    );
    Ok(device)
}

/// What lvm goes by instead of files (lvm.conf(5)).
fn configuration(logical: &Logical, on: &[PathBuf]) -> String {
    let accept: String = on.iter().map(|path| format!("\"a|^{}$|\",", path.display())).collect();
    format!(
        "devices {{ filter=[{accept}\"r|.*|\"] }} \
         activation {{ read_only_volume_list=[\"{}\"] udev_sync=0 udev_rules=0 monitoring=0 }} \
         backup {{ backup=0 archive=0 }}",
        logical.group
    )
}

/// What stands on the disk, taken down; a seam, so that the order can be tried without any.
pub(super) trait Floor {
    /// One round over all that stands on it, the uppermost first.
    fn take_down(&mut self) -> io::Result<()>;
    /// What still stands on it.
    fn left(&mut self) -> io::Result<Vec<String>>;
    /// Waits a little.
    fn pause(&mut self);
}

/// Takes down all that stands on the disk.
///
/// # Errors
/// Something stays: then it must not be served.
pub(super) fn down(floor: &mut impl Floor) -> anyhow::Result<()> {
    let mut left = floor
        .left()
        .context("what stands on the laptop's disk cannot be seen")?;
    for round in 0..TRIES {
        if left.is_empty() {
            return Ok(());
        }
        if round > 0 {
            floor.pause();
        }
        // What stays is seen next.
        let _ = floor.take_down();
        left = floor
            .left()
            .context("what stands on the laptop's disk cannot be seen")?;
    }
    ensure!(
        left.is_empty(),
        "{} stays open on the laptop's disk, so the disk is served to nobody",
        left.join(", ")
    );
    Ok(())
}

/// The kernel's.
pub(super) struct Kernel<'a> {
    pub(super) disk: &'a Disk,
}

impl Floor for Kernel<'_> {
    fn take_down(&mut self) -> io::Result<()> {
        let dev = Path::new("/dev");
        let standing = stack::volumes(Path::new("/sys"), &self.disk.name)?;
        stack::take_down(Path::new("/sys"), Path::new("/proc"), dev, &self.disk.name)?;
        // Their own programs have made these, and udev is not here.
        for label in standing.into_iter().filter_map(|volume| volume.label) {
            let logical = Logical::from_mapped(&label);
            if label.starts_with(PREFIX) || logical.is_some() {
                let _ = std::fs::remove_file(tools::mapped(dev, &label));
            }
            if let Some(Logical { group, name }) = logical.filter(|_| !label.starts_with(PREFIX)) {
                let _ = std::fs::remove_file(dev.join(&group).join(name));
                let _ = std::fs::remove_dir(dev.join(group));
            }
        }
        Ok(())
    }

    fn left(&mut self) -> io::Result<Vec<String>> {
        let left = stack::volumes(Path::new("/sys"), &self.disk.name)?;
        Ok(left.iter().map(ToString::to_string).collect())
    }

    fn pause(&mut self) {
        std::thread::sleep(PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use super::super::tools::tests::ramdisk;
    use super::*;
    use zeroize::Zeroizing;

    fn typed(text: &str) -> Passphrase {
        Passphrase::new(Zeroizing::new(text.as_bytes().to_vec())).unwrap()
    }

    fn lock(label: &str) -> Lock {
        Lock {
            label: label.to_owned(),
            name: unlocked(2),
            device: "/dev/loop3".into(),
        }
    }

    #[test]
    fn a_lock_that_is_broken_does_not_forget_the_one_that_was_opened() {
        let open = |lock: &Lock, passphrase: &Passphrase| match lock.label.as_str() {
            "broken" => anyhow::bail!("no such cipher"),
            label => Ok(label.as_bytes() == passphrase.bytes()),
        };
        let mut locks = Locks::new(["a", "broken", "b"].map(lock).to_vec(), open);
        assert_eq!(locks.wants(), "a, broken, b");
        assert!(locks.attempt(&typed("a")).is_err());
        assert_eq!(locks.wants(), "broken, b");
        locks.left.retain(|lock| lock.label != "broken");
        assert_eq!(locks.attempt(&typed("c")).unwrap(), 0);
        assert_eq!(locks.attempt(&typed("b")).unwrap(), 1);
        assert_eq!(locks.wants(), "");
    }

    #[test]
    fn luks_is_opened_for_reading_by_a_passphrase_on_standard_input() {
        let script = "test \"$(cat)\" = right || exit 2\n\
            test \"$*\" = 'open --batch-mode --type luks --readonly --disable-keyring --key-file - /dev/loop3 stiefel-unlocked-2' || exit 9";
        let dir = ramdisk("cryptsetup", script);
        assert!(open(dir.path(), &lock("sda2_crypt"), &typed("right")).unwrap());
        assert!(!open(dir.path(), &lock("sda2_crypt"), &typed("wrong")).unwrap());
        let dir = ramdisk(
            "cryptsetup",
            "echo 'Device /dev/loop3 is not a valid LUKS device.' >&2\nexit 1",
        );
        let error = open(dir.path(), &lock("sda2_crypt"), &typed("right"))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("sda2_crypt") && error.contains("not a valid LUKS device"),
            "{error}"
        );
    }

    #[test]
    fn lvm_sees_only_what_it_is_to_see_and_opens_for_reading() {
        let dir = ramdisk(
            "lvm",
            "for last; do :; done\ntest \"$1 $last\" = 'lvchange laptop-vg/root' || exit 5",
        );
        let dev = tempfile::tempdir().unwrap();
        let logical = Logical {
            group: "laptop-vg".into(),
            name: "root".into(),
        };
        let on = [PathBuf::from("/dev/mapper/stiefel-unlocked-2"), "/dev/loop4".into()];
        let missing = activate(dir.path(), dev.path(), &logical, &on).unwrap_err().to_string();
        assert!(missing.contains("laptop--vg-root is not there"), "{missing}");
        std::fs::create_dir(dev.path().join("mapper")).unwrap();
        std::fs::write(dev.path().join("mapper/laptop--vg-root"), "").unwrap();
        let device = activate(dir.path(), dev.path(), &logical, &on).unwrap();
        assert!(device.ends_with("mapper/laptop--vg-root"));
        let config = configuration(&logical, &on);
        let filter = r#"filter=["a|^/dev/mapper/stiefel-unlocked-2$|","a|^/dev/loop4$|","r|.*|"]"#;
        assert!(config.contains(filter), "{config}");
        assert!(config.contains(r#"read_only_volume_list=["laptop-vg"]"#), "{config}");
        let strange = Logical {
            group: "-x".into(),
            ..logical
        };
        assert!(activate(dir.path(), dev.path(), &strange, &on).is_err());
    }

    /// A pile; some things are in use for so many rounds.
    struct Pile {
        standing: Vec<&'static str>,
        busy: u32,
        pauses: u32,
    }

    impl Floor for Pile {
        fn take_down(&mut self) -> io::Result<()> {
            if self.busy > 0 {
                self.busy -= 1;
                return Err(io::ErrorKind::ResourceBusy.into());
            }
            self.standing.pop();
            Ok(())
        }

        fn left(&mut self) -> io::Result<Vec<String>> {
            Ok(self.standing.iter().map(|name| (*name).to_owned()).collect())
        }

        fn pause(&mut self) {
            self.pauses += 1;
        }
    }

    #[test]
    fn what_is_in_use_for_a_moment_is_waited_for_and_what_stays_is_an_error() {
        let pile = |busy| Pile {
            standing: vec!["loop0", "stiefel-unlocked-2 (dm-0)", "vg-root (dm-1)"],
            busy,
            pauses: 0,
        };
        let mut brief = pile(3);
        down(&mut brief).unwrap();
        assert!(brief.standing.is_empty() && brief.pauses > 0);
        let mut stuck = pile(u32::MAX);
        let error = down(&mut stuck).unwrap_err().to_string();
        assert!(
            error.contains("vg-root (dm-1)") && error.contains("served to nobody"),
            "{error}"
        );
        let mut empty = pile(0);
        empty.standing.clear();
        down(&mut empty).unwrap();
        assert_eq!(empty.pauses, 0);
    }
}
