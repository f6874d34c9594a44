//! What boot loaders read: their configuration, their variables, kernels wrapped in EFI programs, kernel command lines.
//!
//! Used by the laptop's server, which finds the payload as the boot loader would (`server::payload`). Parses texts and
//! bytes, opens nothing: what a configuration refers to is asked from the caller ([`grub::Files`]).
//! Whatever these texts hold ends in a value or in nothing, in bounded time and memory.

pub mod bls;
pub mod cmdline;
pub mod efi;
pub mod grub;
pub mod sdboot;
pub mod uki;
pub mod version;
