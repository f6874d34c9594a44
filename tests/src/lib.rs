//! Boots in QEMU: the harness shared by the end-to-end tests and by `stiefel test-qemu`.
//!
//! It knows machines, cables, disks and serial lines, and nothing of stiefel itself: the caller passes paths and bytes.
//! Everything is synchronous (std threads); a test reads like prose:
//!
//! ```no_run
//! use std::time::Duration;
//! use stiefel_tests::{VmBuilder, Wire, disk::{BaseOptions, BaseSystem, LaptopDisk}};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let base = BaseSystem::ensure(&BaseOptions::default())?;
//! let disk = LaptopDisk::builder(&base).autologin(true).build("/tmp/laptop.img".as_ref())?;
//! let cable = Wire::direct()?;
//!
//! let laptop = VmBuilder::new("laptop").boot(disk.boot(&[])).disk(disk.drive()).start()?;
//! laptop.login("root", "stiefel", Duration::from_secs(60))?;
//! laptop.plug_usb_nic("cable", &cable.a(), "52:54:00:00:00:01")?;
//! laptop.serial().expect("cdc_ether", Duration::from_secs(10))?;
//! laptop.power_off(Duration::from_secs(30))?;
//! disk.fsck_clean()?;
//! # Ok(())
//! # }
//! ```
//!
//! Deadlines are written for KVM; [`Accel::deadline`] stretches them under emulation.

pub mod accel;
pub mod cache;
pub mod disk;
mod interact;
pub mod kit;
pub mod net;
mod process;
pub mod qmp;
pub mod scenario;
pub mod screen;
pub mod serial;
pub mod shell;
pub mod stop;
pub mod tiny;
pub mod tools;
pub mod vm;

pub use accel::{Accel, kernel_cmdline};
pub use net::{Netdev, Wire};
pub use process::CommandError;
pub use serial::{Pattern, re};
pub use vm::{Boot, Content, Drive, NicModel, Vm, VmBuilder};
