//! A machine with nothing but a kernel and a ramdisk: most fault tests need no more, and it is up in seconds.

use std::path::Path;

use crate::accel::kernel_cmdline;
use crate::vm::{Boot, Content, VmBuilder};

/// A small machine that starts `kernel` with `ramdisk`, to which `handover` (a cpio archive; may be empty) is appended, and
/// with `args` on the kernel's command line.
///
/// It has 512 MiB and one CPU; add disks and NICs to it.
pub fn tiny(name: &str, kernel: &Path, ramdisk: &Content, handover: &[u8], args: &[&str]) -> VmBuilder {
    let mut initrd = vec![ramdisk.clone()];
    if !handover.is_empty() {
        initrd.push(Content::Bytes(handover.to_vec()));
    }
    let boot = Boot::Kernel {
        kernel: kernel.to_owned(),
        initrd,
        cmdline: kernel_cmdline(args),
    };
    VmBuilder::new(name).memory_mib(512).cpus(1).boot(boot)
}
