//! The desktop: finds the laptop, fetches its payload, boots it, attaches the disk inside it and keeps it.
//!
//! Counterpart: the crate `stiefel-server`, which this one never imports.

mod anew;
pub mod attach;
pub mod borrow;
mod clash;
pub mod control;
pub mod copy;
pub mod discovery;
mod disk;
pub mod fetch;
mod firmware;
mod firmware_variables;
pub mod goodbye;
mod guards;
pub mod keeper;
mod leave;
mod life;
mod link;
mod mend;
mod mtu;
pub mod nbd;
mod pulse;
pub mod role;
pub mod status;
mod unlock;
