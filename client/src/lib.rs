//! The desktop: finds the laptop, fetches its payload, boots it, attaches the disk inside it and keeps it.
//!
//! Counterpart: the crate `stiefel-server`, which this one never imports.

pub mod attach;
pub mod control;
pub mod discovery;
pub mod fetch;
pub mod goodbye;
mod guards;
pub mod keeper;
mod link;
pub mod nbd;
pub mod role;
