//! Keeps the desktop's firmware from what the laptop's system would write into it, as long as the session lasts.
//!
//! Whoever mounts efivarfs, and when (systemd does early, in the initrd or later; an fstab may, too): the keeper sees it in
//! the table of mounts and makes the file system read-only at once. Beside it a unit does the same before anything that writes
//! is started (`guards`). Programs that update a boot loader (grub-install, bootctl, fwupd) would else make an entry for the
//! laptop's disk in the desktop's firmware, and the laptop's would lack it.
//!
//! Each mounted file system is made read-only once: who has it writable again afterwards (`mount -o remount,rw`) has decided
//! so.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use stiefel_sys::mount::{self, MountEntry};

/// The type of the file system.
const EFIVARFS: &str = "efivarfs";
/// The system's root folder, below procfs: our own is that of an initramfs which is gone.
const ROOT: &str = "1/root";

/// What was made read-only already, and what could not.
#[derive(Debug, Default)]
pub(crate) struct Variables {
    /// By the file system's device number, while it is mounted.
    done: Vec<(u32, u32)>,
    /// Failed, and said so.
    failed: bool,
}

impl Variables {
    /// Makes the firmware's variables read-only if they were mounted since. `proc` is procfs.
    ///
    /// # Errors
    /// Only the first time that it fails; it is tried again at the next call.
    pub(crate) fn protect(&mut self, table: &[MountEntry], proc: &File) -> io::Result<()> {
        self.protect_by(table, |place| mount::make_read_only(proc, &below_root(place)))
    }

    fn protect_by(&mut self, table: &[MountEntry], make: impl Fn(&Path) -> io::Result<()>) -> io::Result<()> {
        let mounted: Vec<_> = table.iter().filter(|entry| entry.fstype == EFIVARFS).collect();
        self.done
            .retain(|device| mounted.iter().any(|entry| entry.device == *device));
        for entry in mounted {
            if self.done.contains(&entry.device) {
                continue;
            }
            if entry.super_options.split(',').next() != Some("ro")
                && let Err(error) = make(&entry.mount_point)
            {
                return match std::mem::replace(&mut self.failed, true) {
                    true => Ok(()),
                    false => Err(error),
                };
            }
            self.done.push(entry.device);
        }
        self.failed = false;
        Ok(())
    }

    /// Whether something is left to be tried again.
    pub(crate) const fn is_waiting(&self) -> bool {
        self.failed
    }
}

/// The same place below PID 1's root; it is absolute in the table.
fn below_root(place: &Path) -> PathBuf {
    Path::new(ROOT).join(place.strip_prefix("/").unwrap_or(place))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    fn table(lines: &str) -> Vec<MountEntry> {
        mount::mountinfo(lines.as_bytes())
    }

    const OTHERS: &str = "22 1 0:21 / /sys rw - sysfs sysfs rw\n25 1 8:1 / / rw - ext4 /dev/sda1 rw\n";

    fn efivarfs(device: u32, options: &str) -> String {
        format!("{OTHERS}30 22 0:{device} / /sys/firmware/efi/efivars rw,nosuid - efivarfs efivarfs {options}\n")
    }

    #[test]
    fn what_is_mounted_later_and_anew_is_made_read_only_once() {
        let made = RefCell::new(Vec::new());
        let mut variables = Variables::default();
        let mut see = |text: &str| {
            variables
                .protect_by(&table(text), |place| {
                    made.borrow_mut().push(place.to_owned());
                    Ok(())
                })
                .unwrap();
            made.take()
        };
        assert!(see(OTHERS).is_empty(), "not there yet");
        assert_eq!(see(&efivarfs(30, "rw")), [Path::new("/sys/firmware/efi/efivars")]);
        assert!(see(&efivarfs(30, "rw")).is_empty(), "made writable by hand");
        assert!(see(OTHERS).is_empty(), "unmounted");
        assert_eq!(see(&efivarfs(30, "rw")).len(), 1, "mounted anew");
        assert_eq!(see(&efivarfs(31, "rw")).len(), 1, "another one");
        assert!(see(&efivarfs(32, "ro")).is_empty(), "read-only already");
    }

    #[test]
    fn what_fails_is_said_once_and_tried_until_it_works() {
        let mut variables = Variables::default();
        let table = table(&efivarfs(30, "rw"));
        let busy = |_: &Path| Err(io::ErrorKind::ResourceBusy.into());
        assert!(variables.protect_by(&table, busy).is_err());
        assert!(variables.is_waiting());
        assert!(variables.protect_by(&table, busy).is_ok());
        assert!(variables.is_waiting());
        assert!(variables.protect_by(&table, |_| Ok(())).is_ok());
        assert!(!variables.is_waiting());
    }

    #[test]
    fn the_place_is_looked_for_below_the_systems_own_root() {
        assert_eq!(
            below_root(Path::new("/sys/firmware/efi/efivars")),
            Path::new("1/root/sys/firmware/efi/efivars")
        );
    }
}
