//! PID 1 of the ramdisk: mounts, drivers, role.
