//! Laptop and desktop against each other over loopback: discovery, session, bundle and goodbye, with a fake host
//! instead of a disk; and what strangers and damaged cables may do to them. Needs no privileges.

// Every helper here runs in a test; clippy.toml only knows the test functions themselves.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod discovery;
mod fetch;
mod goodbye;
mod http;
mod laptop;
mod unlock;
