//! Builds what is booted: the ramdisk, the modules overlay of a payload, the stick image. Needs neither root nor other programs.

mod archive;
pub mod baked;
pub mod modules;
pub mod overlay;
pub mod ramdisk;
pub mod stick;
#[cfg(test)]
mod testing;
pub mod tools;
pub mod uki;
